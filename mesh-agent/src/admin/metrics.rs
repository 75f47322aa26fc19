//! The status as Prometheus metrics, in the OpenMetrics text format. There are as many series as
//! pods, times a fixed number: no label has a value that an application can choose, and none names
//! the other end of a connection.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric, text},
    metrics::{TypedMetric, counter::ConstCounter, gauge::ConstGauge},
    registry::{Registry, Unit},
};

use super::status::{ControlPlaneState, Pod, Status};
use crate::identity::Counters;

/// The content type of what [`encode`] returns.
pub(super) const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// All metrics. Specified in `docs/operations.md`.
///
/// # Errors
///
/// None that a string can cause.
pub(super) fn encode(
    status: Status,
    counters: Arc<Counters>,
    reports_dropped: u64,
) -> Result<String, fmt::Error> {
    let mut registry = Registry::with_prefix("nodemesh");
    registry.register_collector(Box::new(Metrics { status, counters, reports_dropped }));
    let mut text = String::new();
    text::encode(&mut text, &registry)?;
    Ok(text)
}

#[derive(Debug)]
struct Metrics {
    status: Status,
    counters: Arc<Counters>,
    reports_dropped: u64,
}

/// Names and values of labels.
type Labels<'a> = Vec<(&'static str, &'a str)>;

fn family<'a, M: EncodeMetric + TypedMetric>(
    encoder: &mut DescriptorEncoder<'_>,
    (name, unit): (&str, Option<Unit>),
    help: &str,
    samples: impl IntoIterator<Item = (Labels<'a>, M)>,
) -> fmt::Result {
    let mut metric = encoder.encode_descriptor(name, help, unit.as_ref(), M::TYPE)?;
    for (labels, value) in samples {
        value.encode(metric.encode_family(&labels)?)?;
    }
    Ok(())
}

/// A metric without labels, absent without a value.
fn single<M: EncodeMetric + TypedMetric>(
    encoder: &mut DescriptorEncoder<'_>,
    (name, unit): (&str, Option<Unit>),
    help: &str,
    value: Option<M>,
) -> fmt::Result {
    match value {
        Some(value) => {
            value.encode(encoder.encode_descriptor(name, help, unit.as_ref(), M::TYPE)?)
        }
        None => Ok(()),
    }
}

impl Collector for Metrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let encoder = &mut encoder;
        self.agent(encoder)?;
        self.identity(encoder)?;
        self.traffic(encoder)?;
        self.guard(encoder)
    }
}

impl Metrics {
    fn agent(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let Status { version, ready, degraded, control_plane, pods, .. } = &self.status;
        let info = vec![("version", version.as_str()), ("node", self.status.node.as_str())];
        family(encoder, ("agent", None), "The agent; always 1", [(info, gauge(1))])?;
        let connected = control_plane.state == ControlPlaneState::Connected;
        for (name, help, value) in [
            ("ready", "Whether every known pod is enrolled and served", u64::from(*ready)),
            ("degraded", "Number of things that `status` says are wrong", degraded.len() as u64),
            ("pods", "Enrolled pods", pods.len() as u64),
            ("control_plane_connected", "Whether snapshots flow", u64::from(connected)),
            ("snapshot_version", "Snapshot of the registry in use", control_plane.snapshot_version),
        ] {
            single(encoder, (name, None), help, Some(gauge(value)))?;
        }
        let started = self.status.started.unix_timestamp();
        let times = [
            ("agent_start_time", "When the agent started", Some(started)),
            (
                "control_plane_last_sync_time",
                "When the control plane last confirmed what the agent knows",
                control_plane.last_sync.map(|time| time.unix_timestamp()),
            ),
            (
                "node_certificate_expiry_time",
                "When the node's certificate expires",
                control_plane.certificate.as_ref().map(|c| c.not_after.unix_timestamp()),
            ),
        ];
        for (name, help, time) in times {
            single(encoder, (name, Some(Unit::Seconds)), help, time.map(ConstGauge::new))?;
        }
        Ok(())
    }

    fn identity(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let certificates = || {
            self.status
                .pods
                .iter()
                .filter_map(|pod| Some((labels(pod, []), pod.certificate.as_ref()?)))
        };
        let expiry =
            certificates().map(|(l, c)| (l, ConstGauge::new(c.not_after.unix_timestamp())));
        let help = "When the pod's certificate expires";
        family(encoder, ("certificate_expiry_time", Some(Unit::Seconds)), help, expiry)?;
        let next =
            certificates().map(|(l, c)| (l, ConstGauge::new(c.next_rotation.unix_timestamp())));
        let help = "When the agent asks for the pod's next certificate";
        family(encoder, ("certificate_rotation_time", Some(Unit::Seconds)), help, next)?;

        let Counters {
            svids_issued,
            svid_failures,
            svids_rejected,
            svids_expired,
            svids_withdrawn,
            node_certificates,
            node_certificate_failures,
            connects,
            disconnects,
            snapshots_applied,
            snapshots_refused,
            file_errors,
        } = &*self.counters;
        for (name, help, counter) in [
            ("certificates_issued", "Pod certificates put to use", svids_issued),
            ("certificate_failures", "Requests for a pod certificate that failed", svid_failures),
            ("certificates_rejected", "Pod certificates that peers would refuse", svids_rejected),
            ("certificates_expired", "Pod certificates that expired in use", svids_expired),
            ("certificates_withdrawn", "Pod certificates taken out of use", svids_withdrawn),
            ("node_certificates", "Node certificates received", node_certificates),
            (
                "node_certificate_failures",
                "Attempts to get a node certificate that failed",
                node_certificate_failures,
            ),
            ("control_plane_connects", "Connections to the control plane", connects),
            ("control_plane_disconnects", "Connections that failed or ended", disconnects),
            ("snapshots_applied", "Snapshots put to use", snapshots_applied),
            ("snapshots_refused", "Snapshots that were not usable", snapshots_refused),
            ("runtime_file_errors", "Files in runtime_dir not read or written", file_errors),
        ] {
            single(encoder, (name, None), help, Some(counter_of(counter)))?;
        }
        let help = "Reports for owners of applications that were dropped";
        let dropped = ConstCounter::new(self.reports_dropped);
        single(encoder, ("reports_dropped", None), help, Some(dropped))
    }

    fn traffic(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let connections = || {
            self.status.pods.iter().flat_map(|pod| {
                pod.connections.iter().map(move |connections| {
                    let kind = ("kind", connections.kind.as_str());
                    let direction = ("direction", connections.direction.as_str());
                    (labels(pod, [direction, kind]), connections)
                })
            })
        };
        let open = connections().map(|(labels, c)| (labels, gauge(c.open)));
        family(encoder, ("connections_open", None), "Open connections", open)?;
        let opened = connections().map(|(labels, c)| (labels, ConstCounter::new(c.opened)));
        family(encoder, ("connections", None), "Connections that were let through", opened)?;
        let bytes = connections().flat_map(|(labels, c)| {
            [("client", c.from_client), ("server", c.from_server)].map(|(from, bytes)| {
                let mut labels = labels.clone();
                labels.push(("from", from));
                (labels, ConstCounter::new(bytes))
            })
        });
        family(encoder, ("payload", Some(Unit::Bytes)), "Payload carried", bytes)?;

        let pods = &self.status.pods;
        let denied = pods.iter().flat_map(|pod| {
            pod.denied.iter().map(|denied| {
                let reason = ("reason", denied.reason.as_str());
                let labels = labels(pod, [("direction", denied.direction.as_str()), reason]);
                (labels, ConstCounter::new(denied.count))
            })
        });
        family(encoder, ("connections_denied", None), "Connections that were refused", denied)?;
        let handshakes = pods.iter().flat_map(|pod| {
            pod.handshakes.iter().map(|handshakes| {
                let result = ("result", handshakes.result.as_str());
                let labels = labels(pod, [("direction", handshakes.direction.as_str()), result]);
                (labels, ConstCounter::new(handshakes.count))
            })
        });
        family(encoder, ("handshakes", None), "Handshakes with other agents", handshakes)?;
        let idle = pods.iter().map(|pod| (labels(pod, []), gauge(pod.idle_tunnels)));
        family(encoder, ("tunnels_idle", None), "Tunnels kept for the next connection", idle)?;
        let shared = pods.iter().map(|pod| (labels(pod, []), gauge(pod.shared_tunnels)));
        family(encoder, ("tunnels_shared", None), "Tunnels that connections share", shared)
    }

    fn guard(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let pods = &self.status.pods;
        let active = pods.iter().flat_map(|pod| {
            pod.guard.iter().map(|guard| {
                (labels(pod, [("layer", guard.layer.as_str())]), gauge(guard.active.into()))
            })
        });
        let help = "Whether this layer guards everything it should";
        family(encoder, ("guard_active", None), help, active)?;
        let drops = pods.iter().flat_map(|pod| {
            pod.drops.iter().map(|drops| {
                let reason = ("reason", drops.reason.as_str());
                let labels = labels(pod, [("layer", drops.layer.as_str()), reason]);
                (labels, ConstCounter::new(drops.count))
            })
        });
        family(encoder, ("guard_drops", None), "What the guard dropped", drops)?;
        let datagrams = pods.iter().map(|pod| (labels(pod, []), ConstCounter::new(pod.datagrams)));
        let help = "UDP datagrams that left a pod, unencrypted";
        family(encoder, ("udp_datagrams", None), help, datagrams)?;
        let repairs = pods.iter().map(|pod| (labels(pod, []), ConstCounter::new(pod.repairs)));
        let help = "Changes inside the pod that were put back";
        family(encoder, ("repairs", None), help, repairs)?;
        let aborted = pods.iter().map(|pod| (labels(pod, []), ConstCounter::new(pod.aborted)));
        let help = "Connections from before the enrolment that were aborted";
        family(encoder, ("connections_aborted", None), help, aborted)?;
        let revoked = pods.iter().map(|pod| (labels(pod, []), ConstCounter::new(pod.revoked)));
        let help = "Connections that were ended because they were no longer allowed";
        family(encoder, ("connections_revoked", None), help, revoked)
    }
}

fn labels<'a, const N: usize>(pod: &'a Pod, more: [(&'static str, &'a str); N]) -> Labels<'a> {
    let namespace = pod.name.as_deref().and_then(|name| name.split_once('/'));
    let namespace = namespace.map_or("", |(namespace, _)| namespace);
    let workload = pod.workload.as_deref().unwrap_or_default();
    let pod = [
        ("namespace", namespace),
        ("workload", workload),
        ("pod", pod.label()),
        ("uid", pod.uid.as_str()),
    ];
    pod.into_iter().chain(more).collect()
}

fn gauge(value: u64) -> ConstGauge<u64> {
    ConstGauge::new(value)
}

fn counter_of(counter: &AtomicU64) -> ConstCounter<u64> {
    ConstCounter::new(counter.load(Ordering::Relaxed))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::admin::status::tests::healthy;

    #[test]
    fn metrics_are_those_that_the_documentation_names() {
        let counters = Arc::new(Counters::default());
        counters.svids_issued.store(3, Ordering::Relaxed);
        let text = encode(healthy(), counters, 7).unwrap();
        for line in [
            "nodemesh_agent{version=\"0.1.0\",node=\"node-1\"} 1",
            "nodemesh_ready 1",
            "nodemesh_degraded 0",
            "nodemesh_snapshot_version 42",
            "nodemesh_certificates_issued_total 3",
            "nodemesh_reports_dropped_total 7",
            "nodemesh_certificate_expiry_time_seconds{namespace=\"shop\",workload=\"StatefulSet/cart\",\
             pod=\"shop/cart-0\",uid=\"u1\"} 1800014400",
            "nodemesh_connections_open{namespace=\"shop\",workload=\"StatefulSet/cart\",\
             pod=\"shop/cart-0\",uid=\"u1\",direction=\"outbound\",\
             kind=\"mtls\"} 3",
            "nodemesh_payload_bytes_total{namespace=\"shop\",workload=\"StatefulSet/cart\",\
             pod=\"shop/cart-0\",uid=\"u1\",direction=\"outbound\",\
             kind=\"mtls\",from=\"server\"} 2048",
            "nodemesh_connections_denied_total{namespace=\"shop\",workload=\"StatefulSet/cart\",\
             pod=\"shop/cart-0\",uid=\"u1\",\
             direction=\"outbound\",reason=\"unknown-in-cluster\"} 2",
            "nodemesh_guard_drops_total{namespace=\"shop\",workload=\"StatefulSet/cart\",\
             pod=\"shop/cart-0\",uid=\"u1\",layer=\"device\",\
             reason=\"plaintext\"} 12",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}\nnot in\n{text}");
        }
        let documented = include_str!("../../../docs/operations.md");
        let names: BTreeSet<_> = text
            .lines()
            .filter_map(|line| line.strip_prefix("# TYPE "))
            .map(|rest| match rest.split_once(' ') {
                Some((name, "counter")) => format!("{name}_total"),
                Some((name, _)) => name.to_owned(),
                None => rest.to_owned(),
            })
            .collect();
        let rows = documented.lines().filter_map(|line| line.strip_prefix("| `nodemesh_"));
        let rows: BTreeSet<_> =
            rows.filter_map(|row| Some(format!("nodemesh_{}", row.split_once('`')?.0))).collect();
        assert!(names.len() > 25, "{text}");
        // Dashboards and alerts are held against the documentation.
        assert_eq!(names, rows);
    }
}
