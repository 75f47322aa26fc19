//! Counters, for `/metrics` and `status`.

use std::collections::BTreeMap;

use mesh_common::svid::Kind;
use prometheus_client::{
    encoding::text::encode,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};

use crate::refusal::Reason;

type Label = [(&'static str, &'static str); 1];

/// Everything that is counted. Reading it costs nothing but the atomics.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    issued: Family<Label, Counter>,
    refused: Family<Label, Counter>,
    snapshots: Family<Label, Counter>,
    snapshot_bytes: Family<Label, Counter>,
    events: Family<Label, Counter>,
    gauges: Gauges,
}

/// What has become of something that the owner of an application should see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is an Event of the pod.
    Written,
    /// The API server did not take it.
    Failed,
    /// There was too much at once, of the pod, its node or all of them.
    Dropped,
}

impl Outcome {
    const ALL: [Self; 3] = [Self::Written, Self::Failed, Self::Dropped];

    const fn label(self) -> Label {
        let name = match self {
            Self::Written => "written",
            Self::Failed => "failed",
            Self::Dropped => "dropped",
        };
        [("outcome", name)]
    }
}

/// What is so at the moment: set before each scrape.
#[derive(Clone, Debug, Default)]
pub struct Gauges {
    /// Nodes with an open stream of snapshots.
    pub agents_connected: Gauge,
    /// Those that have not acknowledged the present snapshot.
    pub agents_out_of_sync: Gauge,
    /// Workloads in force.
    pub workloads: Gauge,
    /// Services in force.
    pub services: Gauge,
    /// Files of the registry, the services and the trust bundle that have no effect.
    pub problems: Gauge,
    /// The present snapshot.
    pub snapshot_version: Gauge,
    /// When the root ends, in seconds since 1970.
    pub root_not_after: Gauge,
    /// When the issuing CA ends, in seconds since 1970.
    pub issuer_not_after: Gauge,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::with_prefix("nodemesh_control");
        let (issued, refused) = (Family::default(), Family::default());
        registry.register("certificates_issued", "Certificates issued", Family::clone(&issued));
        registry.register("refusals", "Requests and handshakes refused", Family::clone(&refused));
        let (snapshots, snapshot_bytes) = (Family::default(), Family::default());
        registry.register("snapshots", "Snapshots sent to agents", Family::clone(&snapshots));
        let help = "Bytes of snapshots sent to agents";
        registry.register("snapshot_bytes", help, Family::clone(&snapshot_bytes));
        let events = Family::default();
        registry.register("events", "Events for owners of pods", Family::clone(&events));
        let gauges = Gauges::default();
        for (name, help, gauge) in [
            ("agents_connected", "Nodes with an open stream", &gauges.agents_connected),
            (
                "agents_out_of_sync",
                "Connected nodes that have not acknowledged the present snapshot",
                &gauges.agents_out_of_sync,
            ),
            ("workloads", "Workloads in force", &gauges.workloads),
            ("services", "Services in force", &gauges.services),
            (
                "configuration_problems",
                "Files of the registry, the services and the trust bundle that have no effect",
                &gauges.problems,
            ),
            ("snapshot_version", "Version of the present snapshot", &gauges.snapshot_version),
            (
                "root_not_after_timestamp_seconds",
                "When the root ends, in seconds since 1970",
                &gauges.root_not_after,
            ),
            (
                "issuer_not_after_timestamp_seconds",
                "When the issuing CA ends, in seconds since 1970",
                &gauges.issuer_not_after,
            ),
        ] {
            registry.register(name, help, gauge.clone());
        }
        let metrics = Self { registry, issued, refused, snapshots, snapshot_bytes, events, gauges };
        // A series that begins at its first event shows no increase for it.
        for kind in KINDS {
            drop(metrics.issued.get_or_create(&kind_label(kind)));
        }
        for reason in Reason::ALL {
            drop(metrics.refused.get_or_create(&reason_label(reason)));
        }
        for outcome in Outcome::ALL {
            drop(metrics.events.get_or_create(&outcome.label()));
        }
        for extent in [Extent::Whole, Extent::Difference] {
            metrics.sent(extent, 0, 0);
        }
        metrics
    }
}

/// How much of a snapshot is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// All of it.
    Whole,
    /// What has changed.
    Difference,
}

const KINDS: [Kind; 3] = [Kind::Workload, Kind::Node, Kind::Control];

const fn kind_name(kind: Kind) -> &'static str {
    match kind {
        Kind::Workload => "workload",
        Kind::Node => "node",
        Kind::Control => "control",
    }
}

const fn kind_label(kind: Kind) -> Label {
    [("kind", kind_name(kind))]
}

const fn reason_label(reason: Reason) -> Label {
    [("reason", reason.name())]
}

impl Metrics {
    /// Counts a certificate.
    pub fn issued(&self, kind: Kind) {
        self.issued.get_or_create(&kind_label(kind)).inc();
    }

    /// Counts a refusal.
    pub fn refused(&self, reason: Reason) {
        self.refused.get_or_create(&reason_label(reason)).inc();
    }

    /// Counts snapshots sent.
    pub fn sent(&self, extent: Extent, snapshots: u64, bytes: u64) {
        let name = match extent {
            Extent::Whole => "whole",
            Extent::Difference => "difference",
        };
        self.snapshots.get_or_create(&[("extent", name)]).inc_by(snapshots);
        self.snapshot_bytes.get_or_create(&[("extent", name)]).inc_by(bytes);
    }

    /// Counts an Event.
    pub fn event(&self, outcome: Outcome) {
        self.events.get_or_create(&outcome.label()).inc();
    }

    /// Certificates issued since the start, by kind.
    pub fn issued_by_kind(&self) -> BTreeMap<String, u64> {
        let count = |kind| self.issued.get_or_create(&kind_label(kind)).get();
        KINDS.map(|kind| (kind_name(kind).to_owned(), count(kind))).into()
    }

    /// Refusals since the start, by reason, without those that never happened.
    pub fn refused_by_reason(&self) -> BTreeMap<String, u64> {
        let count = |reason| self.refused.get_or_create(&reason_label(reason)).get();
        Reason::ALL
            .into_iter()
            .map(|reason| (reason.name().to_owned(), count(reason)))
            .filter(|(_, count)| *count > 0)
            .collect()
    }

    /// The values that are so at the moment.
    pub const fn gauges(&self) -> &Gauges {
        &self.gauges
    }

    /// The text of `/metrics`.
    ///
    /// # Errors
    ///
    /// If a value cannot be formatted, which does not happen with those above.
    pub fn encode(&self) -> Result<String, std::fmt::Error> {
        let mut text = String::new();
        encode(&mut text, &self.registry)?;
        Ok(text)
    }
}
