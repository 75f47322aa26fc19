//! What the control plane says exists: the workloads, where they run, and who may sign for them.
//!
//! A snapshot replaces the one before, or says what has changed since. One that contradicts itself
//! is refused as a whole: half a registry would let a pod keep an address that is no longer its own.

use std::{
    borrow::Borrow,
    cmp::Ordering,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use imbl::{OrdMap, OrdSet};
use mesh_common::{
    api,
    spiffe::{SpiffeError, TrustDomain, WorkloadId, check_segment},
    svid::{SvidError, TrustBundle},
};

use super::services::{Services, ServicesError, Update};

/// Why a snapshot is not usable. Sent to the control plane with the refusal.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// Version 0 is what an agent has before it has heard anything.
    #[error("the snapshot has version 0, which the control plane must not use")]
    NoVersion,
    /// A part that every snapshot has is missing.
    #[error("the snapshot has no {0}: is the control plane of another version?")]
    Missing(&'static str),
    /// The trust bundle is not usable.
    #[error("the trust bundle is not usable: {0}")]
    Bundle(#[from] SvidError),
    /// A workload has an unusable name.
    #[error("workload {uid:?}: {source}")]
    Name {
        /// The workload's UID as received.
        uid: String,
        /// Which name, and why.
        source: SpiffeError,
    },
    /// A workload has an address that no pod can have.
    #[error("workload {uid:?}: {address:?} is not the address of a pod")]
    Address {
        /// The workload's UID.
        uid: String,
        /// The address as received.
        address: String,
    },
    /// Two workloads have one UID.
    #[error("two workloads have the UID {0:?}")]
    DuplicateUid(String),
    /// Two workloads have one address.
    #[error("the workloads {first:?} and {second:?} both have the address {address}")]
    DuplicateAddress {
        /// The address in question.
        address: IpAddr,
        /// The UID of one.
        first: String,
        /// The UID of the other.
        second: String,
    },
    /// The difference is to another snapshot than the agent has. What it would become is not guessed.
    #[error(
        "the difference leads from snapshot {base} to {version}, and this agent has {present}: the \
         whole snapshot is needed"
    )]
    Base {
        /// To what it is the difference.
        base: u64,
        /// What it makes of that.
        version: u64,
        /// What the agent has.
        present: u64,
    },
    /// The trust domain of a running mesh has changed.
    #[error("the difference changes the trust domain: the whole snapshot is needed")]
    TrustDomain,
    /// A workload that is to be removed is not there.
    #[error("the difference removes the workload {0:?}, which is not there")]
    UnknownUid(String),
    /// The services contradict themselves or the workloads.
    #[error(transparent)]
    Services(#[from] ServicesError),
}

/// One pod of the mesh.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workload {
    /// What tells the pod from every other, also from an earlier one of the same name.
    pub uid: String,
    /// Whom the pod speaks for.
    pub id: WorkloadId,
    /// The pod's name within its namespace.
    pub name: String,
    /// The node it runs on.
    pub node: String,
    /// Its addresses, canonical: never IPv4 mapped into IPv6.
    pub addresses: Vec<IpAddr>,
    /// What the pod belongs to, "Deployment/checkout", for people and metrics; may be empty.
    pub owner: String,
}

impl Workload {
    /// The address that it connects to this one from.
    pub fn source(&self, destination: SocketAddr) -> Option<IpAddr> {
        self.addresses.iter().copied().find(|own| own.is_ipv4() == destination.is_ipv4())
    }
}

/// What the control plane decides for all agents.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// How long the workload certificates live that the CA issues.
    pub svid_lifetime: Duration,
}

/// One version of the registry. Immutable, cheap to share. Versions share what is the same in them,
/// so that what one change costs does not grow with what is known.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    version: u64,
    bundle: Option<Arc<TrustBundle>>,
    settings: Settings,
    by_uid: OrdSet<ByUid>,
    by_address: OrdMap<IpAddr, Arc<Workload>>,
    by_node: OrdMap<String, OrdSet<ByUid>>,
    services: Services,
}

/// A workload, found by its UID.
#[derive(Clone, Debug)]
struct ByUid(Arc<Workload>);

impl Borrow<str> for ByUid {
    fn borrow(&self) -> &str {
        &self.0.uid
    }
}

impl Ord for ByUid {
    fn cmp(&self, other: &Self) -> Ordering {
        self.0.uid.cmp(&other.0.uid)
    }
}

impl PartialOrd for ByUid {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for ByUid {
    fn eq(&self, other: &Self) -> bool {
        self.0.uid == other.0.uid
    }
}

impl Eq for ByUid {}

impl Snapshot {
    /// The version, growing with every change. 0 before the first snapshot arrived.
    pub const fn version(&self) -> u64 {
        self.version
    }

    /// Whether this came from the control plane, now or before a restart. Otherwise it says
    /// nothing at all: a workload that is missing in it may well be registered.
    pub const fn is_known(&self) -> bool {
        self.version > 0
    }

    /// Who may sign. `None` before the first snapshot arrived: nobody. As long as the content
    /// stays the same, later snapshots hold the same `Arc`.
    pub const fn bundle(&self) -> Option<&Arc<TrustBundle>> {
        self.bundle.as_ref()
    }

    /// What the control plane decides for all agents.
    pub const fn settings(&self) -> &Settings {
        &self.settings
    }

    /// The workload with this UID. As long as its registration stays the same, later snapshots
    /// hold the same `Arc`.
    pub fn by_uid(&self, uid: &str) -> Option<&Arc<Workload>> {
        self.by_uid.get(uid).map(|ByUid(workload)| workload)
    }

    /// The workload that has this address. IPv4 mapped into IPv6 is looked up as IPv4.
    pub fn by_address(&self, address: IpAddr) -> Option<&Arc<Workload>> {
        self.by_address.get(&address.to_canonical())
    }

    /// All workloads, by UID.
    pub fn workloads(&self) -> impl ExactSizeIterator<Item = &Arc<Workload>> {
        self.by_uid.iter().map(|ByUid(workload)| workload)
    }

    /// The workloads of a node, by UID.
    pub fn on_node(&self, node: &str) -> impl Iterator<Item = &Arc<Workload>> {
        self.by_node.get(node).into_iter().flatten().map(|ByUid(workload)| workload)
    }

    /// What is connected to instead of a pod. None of their addresses is a workload's.
    pub const fn services(&self) -> &Services {
        &self.services
    }

    /// What this becomes by an update. What has not changed stays the same in memory, so that
    /// whoever holds a part of it can tell by its address that it is still current.
    pub(super) fn updated(&self, update: api::Snapshot) -> Result<Self, RegistryError> {
        let api::Snapshot {
            version,
            bundle,
            workloads,
            settings,
            services,
            endpoint_slices,
            nodes,
            base_version,
            removed,
            more: _,
        } = update;
        if version == 0 {
            return Err(RegistryError::NoVersion);
        }
        let whole = base_version == 0;
        if !whole && (base_version != self.version || version <= base_version) {
            let (base, present) = (base_version, self.version);
            return Err(RegistryError::Base { base, version, present });
        }
        let mut next = if whole { Self::default() } else { self.clone() };
        next.version = version;
        if let Some(bundle) = bundle {
            next.trust(TrustBundle::from_api(bundle)?, self.bundle.as_ref())?;
        }
        let bundle = next.bundle.clone().ok_or(RegistryError::Missing("trust bundle"))?;
        match settings {
            Some(api::Settings { svid_lifetime_seconds: seconds }) => {
                next.settings = Settings { svid_lifetime: Duration::from_secs(seconds.into()) };
            }
            None if whole => return Err(RegistryError::Missing("settings")),
            None => {}
        }
        let removed = removed.unwrap_or_default();
        let workloads = workloads
            .into_iter()
            .map(|workload| Workload::new(workload, &bundle.trust_domain))
            .map(|workload| workload.map(|workload| self.shared(workload)))
            .collect::<Result<Vec<_>, RegistryError>>()?;
        next.replace(&workloads, &removed.workload_uids)?;
        let Self { by_address, services: next_services, .. } = &mut next;
        let of_workload =
            |address: IpAddr| by_address.get(&address).map(|workload| workload.uid.as_str());
        let update = Update { services, slices: endpoint_slices, nodes, removed };
        next_services.apply(update, of_workload)?;
        for workload in &workloads {
            for &address in &workload.addresses {
                if let Some(service) = next_services.at(address) {
                    let (service, uid) = (service.to_owned(), workload.uid.clone());
                    return Err(ServicesError::Workload { service, address, uid }.into());
                }
            }
        }
        Ok(next)
    }

    /// `before` is what was trusted.
    fn trust(
        &mut self,
        bundle: TrustBundle,
        before: Option<&Arc<TrustBundle>>,
    ) -> Result<(), RegistryError> {
        let present = self.bundle.as_ref();
        if present.is_some_and(|present| present.trust_domain != bundle.trust_domain) {
            return Err(RegistryError::TrustDomain);
        }
        let same = before.filter(|before| ***before == bundle).cloned();
        self.bundle = Some(same.unwrap_or_else(|| Arc::new(bundle)));
        Ok(())
    }

    /// The same in memory, if it is registered like this already.
    fn shared(&self, workload: Workload) -> Arc<Workload> {
        let same = self.by_uid(&workload.uid).filter(|known| ***known == workload).cloned();
        same.unwrap_or_else(|| Arc::new(workload))
    }

    /// Puts workloads in, each in place of the one with its UID, and takes out those with the UIDs
    /// `removed`. First all that goes, so that an address can go from one to the other.
    fn replace(
        &mut self,
        workloads: &[Arc<Workload>],
        removed: &[String],
    ) -> Result<(), RegistryError> {
        for uid in removed {
            self.remove(uid).ok_or_else(|| RegistryError::UnknownUid(uid.clone()))?;
        }
        for workload in workloads {
            self.remove(&workload.uid);
        }
        for workload in workloads {
            if self.by_uid.insert(ByUid(Arc::clone(workload))).is_some() {
                return Err(RegistryError::DuplicateUid(workload.uid.clone()));
            }
            let here = self.by_node.entry(workload.node.clone()).or_default();
            here.insert(ByUid(Arc::clone(workload)));
            for &address in &workload.addresses {
                if let Some(first) = self.by_address.insert(address, Arc::clone(workload)) {
                    let (first, second) = (first.uid.clone(), workload.uid.clone());
                    return Err(RegistryError::DuplicateAddress { address, first, second });
                }
            }
        }
        Ok(())
    }

    fn remove(&mut self, uid: &str) -> Option<()> {
        let ByUid(workload) = self.by_uid.remove(uid)?;
        for address in &workload.addresses {
            self.by_address.remove(address);
        }
        if let Some(here) = self.by_node.get_mut(&workload.node) {
            here.remove(uid);
            if here.is_empty() {
                self.by_node.remove(&workload.node);
            }
        }
        Some(())
    }

    /// As in the API, one thing at a time: put one after the other, their encodings are that of all.
    pub(super) fn fields(&self) -> impl Iterator<Item = api::Snapshot> {
        let seconds = self.settings.svid_lifetime.as_secs();
        let head = api::Snapshot {
            version: self.version,
            bundle: self.bundle.as_deref().map(TrustBundle::to_api),
            settings: Some(api::Settings {
                svid_lifetime_seconds: u32::try_from(seconds).unwrap_or(u32::MAX),
            }),
            ..Default::default()
        };
        let workloads = self.workloads().map(|workload| api::Snapshot {
            workloads: vec![workload.to_api()],
            ..Default::default()
        });
        std::iter::once(head).chain(workloads).chain(self.services.fields())
    }
}

impl TryFrom<api::Snapshot> for Snapshot {
    type Error = RegistryError;

    fn try_from(snapshot: api::Snapshot) -> Result<Self, Self::Error> {
        Self::default().updated(snapshot)
    }
}

impl Workload {
    fn new(workload: api::Workload, trust_domain: &TrustDomain) -> Result<Self, RegistryError> {
        let api::Workload { uid, namespace, service_account, name, node, addresses, owner } =
            workload;
        let bad_name = |source| RegistryError::Name { uid: uid.clone(), source };
        for segment in [&uid, &name, &node] {
            check_segment(segment).map_err(bad_name)?;
        }
        let id = WorkloadId::new(trust_domain.clone(), &namespace, &service_account)
            .map_err(bad_name)?;
        let addresses = addresses
            .into_iter()
            .map(|text| {
                host_address(&text)
                    .ok_or_else(|| RegistryError::Address { uid: uid.clone(), address: text })
            })
            .collect::<Result<_, _>>()?;
        Ok(Self { uid, id, name, node, addresses, owner })
    }

    /// What the agent keeps of it.
    fn to_api(&self) -> api::Workload {
        api::Workload {
            uid: self.uid.clone(),
            namespace: self.id.namespace().to_owned(),
            service_account: self.id.service_account().to_owned(),
            name: self.name.clone(),
            node: self.node.clone(),
            addresses: self.addresses.iter().map(ToString::to_string).collect(),
            owner: String::new(),
        }
    }
}

/// An address that something other than this machine can have, canonical.
pub(super) fn host_address(text: &str) -> Option<IpAddr> {
    let address = text.parse::<IpAddr>().ok()?.to_canonical();
    let is_host = !(address.is_unspecified() || address.is_loopback() || address.is_multicast());
    is_host.then_some(address)
}
