//! What a snapshot says, what differs between two, and how either travels: pure functions.

use std::sync::Arc;

use mesh_common::{
    api::{self, Encoded},
    svid::TrustBundle,
};

use crate::{
    keyed::{Change, changes},
    registry::Workload,
    services::Services,
};

/// What one message holds, but for what is too large to be split.
const PART_BYTES: usize = 512 << 10;

/// What agents are told. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Content {
    /// Who may sign. `None` only before anything was published.
    pub bundle: Option<Arc<TrustBundle>>,
    /// What is decided for all agents.
    pub settings: api::Settings,
    /// Who is who, in the order of their UIDs.
    pub workloads: Vec<Arc<Workload>>,
    /// What is connected to instead of a workload.
    pub services: Services,
}

/// What makes one content of another.
#[derive(Debug)]
pub struct Difference<'a> {
    bundle: Option<&'a TrustBundle>,
    settings: Option<api::Settings>,
    workloads: Vec<Change<'a, Workload>>,
    services: Vec<Change<'a, api::Service>>,
    slices: Vec<Change<'a, api::EndpointSlice>>,
    nodes: Vec<Change<'a, api::Node>>,
}

impl Content {
    /// Everything.
    pub fn whole(&self) -> Difference<'_> {
        static NOTHING: Content = Content {
            bundle: None,
            settings: api::Settings { svid_lifetime_seconds: 0 },
            workloads: Vec::new(),
            services: Services { services: Vec::new(), slices: Vec::new(), nodes: Vec::new() },
        };
        Difference { settings: self.bundle.as_ref().map(|_| self.settings), ..self.since(&NOTHING) }
    }

    /// What is not the same in `before`.
    pub fn since<'a>(&'a self, before: &'a Self) -> Difference<'a> {
        Difference {
            bundle: self.bundle.as_deref().filter(|new| before.bundle.as_deref() != Some(*new)),
            settings: Some(self.settings).filter(|new| before.settings != *new),
            workloads: changes(&before.workloads, &self.workloads),
            services: changes(&before.services.services, &self.services.services),
            slices: changes(&before.services.slices, &self.services.slices),
            nodes: changes(&before.services.nodes, &self.services.nodes),
        }
    }

    /// How many entries there are.
    pub const fn entries(&self) -> usize {
        let Services { services, slices, nodes } = &self.services;
        self.workloads.len() + services.len() + slices.len() + nodes.len()
    }
}

impl Difference<'_> {
    /// Whether there is none.
    pub const fn is_empty(&self) -> bool {
        self.bundle.is_none() && self.settings.is_none() && self.len() == 0
    }

    /// How many entries are new, different or gone.
    pub const fn len(&self) -> usize {
        self.workloads.len() + self.services.len() + self.slices.len() + self.nodes.len()
    }

    /// As one message, for an agent that knows no parts.
    pub fn message(&self, version: u64) -> Encoded {
        parts(version, 0, self.fields(), usize::MAX).swap_remove(0)
    }

    /// As messages. `base` is the version that it is the difference to, 0 for none.
    pub fn messages(&self, version: u64, base: u64) -> Vec<Encoded> {
        parts(version, base, self.fields(), PART_BYTES)
    }

    /// Snapshots of one thing each: put one after the other, their encodings are that of all.
    fn fields(&self) -> impl Iterator<Item = api::Snapshot> {
        let head = api::Snapshot {
            bundle: self.bundle.map(TrustBundle::to_api),
            settings: self.settings,
            ..Default::default()
        };
        let workloads = told(
            &self.workloads,
            |new| api::Snapshot { workloads: vec![new.to_api()], ..Default::default() },
            |old, all| all.workload_uids.push(old.uid.clone()),
        );
        let services = told(
            &self.services,
            |new| api::Snapshot { services: vec![new.clone()], ..Default::default() },
            |old, all| all.services.push(format!("{}/{}", old.namespace, old.name)),
        );
        let slices = told(
            &self.slices,
            |new| api::Snapshot { endpoint_slices: vec![new.clone()], ..Default::default() },
            |old, all| all.endpoint_slices.push(format!("{}/{}", old.namespace, old.name)),
        );
        let nodes = told(
            &self.nodes,
            |new| api::Snapshot { nodes: vec![new.clone()], ..Default::default() },
            |old, all| all.nodes.push(old.name.clone()),
        );
        std::iter::once(head).chain(workloads).chain(services).chain(slices).chain(nodes)
    }
}

/// What is new or different as `put` says it, what is gone as `gone` names it.
fn told<'a, T>(
    changes: &'a [Change<'a, T>],
    put: fn(&T) -> api::Snapshot,
    gone: fn(&T, &mut api::Removed),
) -> impl Iterator<Item = api::Snapshot> + 'a {
    changes.iter().map(move |(old, new)| {
        if let Some(new) = new {
            return put(new);
        }
        let mut removed = api::Removed::default();
        old.iter().for_each(|old| gone(old, &mut removed));
        api::Snapshot { removed: Some(removed), ..Default::default() }
    })
}

/// At least one part, each with the versions and, if it is not the last, `more`.
fn parts(
    version: u64,
    base_version: u64,
    fields: impl Iterator<Item = api::Snapshot>,
    limit: usize,
) -> Vec<Encoded> {
    let part = |mut bytes: Vec<u8>, more| {
        let header = api::Snapshot { version, base_version, more, ..Default::default() };
        bytes.extend_from_slice(Encoded::from(&header).as_ref());
        bytes.shrink_to_fit();
        Encoded::from(bytes)
    };
    let (mut parts, mut bytes) = (Vec::new(), Vec::new());
    for field in fields {
        if bytes.len() >= limit {
            parts.push(part(std::mem::take(&mut bytes), true));
        }
        bytes.extend_from_slice(Encoded::from(&field).as_ref());
    }
    parts.push(part(bytes, false));
    parts
}
