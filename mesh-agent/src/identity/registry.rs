//! What the control plane says exists: the workloads, where they run, and who may sign for them.
//!
//! A snapshot replaces the one before as a whole. One that contradicts itself is refused as a
//! whole: half a registry would let a pod keep an address that is no longer its own.

use std::{
    collections::{BTreeMap, HashMap, hash_map},
    net::IpAddr,
    sync::Arc,
    time::Duration,
};

use mesh_common::{
    api,
    spiffe::{SpiffeError, TrustDomain, WorkloadId, check_segment},
    svid::{SvidError, TrustBundle},
};

use super::services::{Services, ServicesError};

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

/// What the control plane decides for all agents.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// How long the workload certificates live that the CA issues.
    pub svid_lifetime: Duration,
}

/// One version of the registry. Immutable, cheap to share.
#[derive(Debug, Default)]
pub struct Snapshot {
    version: u64,
    bundle: Option<Arc<TrustBundle>>,
    settings: Settings,
    by_uid: BTreeMap<String, Arc<Workload>>,
    by_address: HashMap<IpAddr, Arc<Workload>>,
    services: Services,
}

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
        self.by_uid.get(uid)
    }

    /// The workload that has this address. IPv4 mapped into IPv6 is looked up as IPv4.
    pub fn by_address(&self, address: IpAddr) -> Option<&Arc<Workload>> {
        self.by_address.get(&address.to_canonical())
    }

    /// All workloads, by UID.
    pub fn workloads(&self) -> impl ExactSizeIterator<Item = &Arc<Workload>> {
        self.by_uid.values()
    }

    /// What is connected to instead of a pod. None of their addresses is a workload's.
    pub const fn services(&self) -> &Services {
        &self.services
    }

    /// Takes over from `before` what has not changed, so that whoever holds a part of it can tell
    /// by its address in memory that it is still current.
    #[must_use]
    pub(super) fn sharing_with(mut self, before: &Self) -> Self {
        if let Some(bundle) = &before.bundle
            && self.bundle.as_ref().is_some_and(|new| new == bundle)
        {
            self.bundle = Some(Arc::clone(bundle));
        }
        let Self { by_uid, by_address, .. } = &mut self;
        for (uid, workload) in by_uid {
            if let Some(old) = before.by_uid.get(uid)
                && old == workload
            {
                *workload = Arc::clone(old);
                for address in &old.addresses {
                    by_address.insert(*address, Arc::clone(old));
                }
            }
        }
        self
    }
}

impl TryFrom<api::Snapshot> for Snapshot {
    type Error = RegistryError;

    fn try_from(snapshot: api::Snapshot) -> Result<Self, Self::Error> {
        let api::Snapshot {
            version,
            bundle,
            workloads,
            settings,
            services,
            endpoint_slices,
            nodes,
            ..
        } = snapshot;
        if version == 0 {
            return Err(RegistryError::NoVersion);
        }
        let bundle = TrustBundle::from_api(bundle.ok_or(RegistryError::Missing("trust bundle"))?)?;
        let api::Settings { svid_lifetime_seconds } =
            settings.ok_or(RegistryError::Missing("settings"))?;

        let mut by_uid = BTreeMap::new();
        let mut by_address: HashMap<IpAddr, Arc<Workload>> = HashMap::new();
        for workload in workloads {
            let workload = Arc::new(Workload::new(workload, &bundle.trust_domain)?);
            for address in &workload.addresses {
                match by_address.entry(*address) {
                    hash_map::Entry::Vacant(entry) => {
                        entry.insert(Arc::clone(&workload));
                    }
                    hash_map::Entry::Occupied(entry) => {
                        return Err(RegistryError::DuplicateAddress {
                            address: *address,
                            first: entry.get().uid.clone(),
                            second: workload.uid.clone(),
                        });
                    }
                }
            }
            if let Some(workload) = by_uid.insert(workload.uid.clone(), workload) {
                return Err(RegistryError::DuplicateUid(workload.uid.clone()));
            }
        }
        let services = Services::new(services, endpoint_slices, nodes, |address| {
            by_address.get(&address).map(|workload| workload.uid.as_str())
        })?;
        Ok(Self {
            version,
            bundle: Some(Arc::new(bundle)),
            settings: Settings { svid_lifetime: Duration::from_secs(svid_lifetime_seconds.into()) },
            by_uid,
            by_address,
            services,
        })
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
}

/// An address that something other than this machine can have, canonical.
pub(super) fn host_address(text: &str) -> Option<IpAddr> {
    let address = text.parse::<IpAddr>().ok()?.to_canonical();
    let is_host = !(address.is_unspecified() || address.is_loopback() || address.is_multicast());
    is_host.then_some(address)
}
