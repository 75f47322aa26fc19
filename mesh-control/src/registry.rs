//! Who is who: the workloads that the operator has registered.
//!
//! Values and pure functions. What cannot be understood is not a workload: unknown means deny.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    net::IpAddr,
    sync::Arc,
};

use mesh_common::{
    abi::MAX_POD_ADDRESSES,
    api,
    spiffe::{SpiffeError, SpiffeId, TrustDomain, WorkloadId, check_segment},
    svid::PodRef,
};
use serde::{Deserialize, Deserializer, Serialize, de};

use crate::{
    files::Source,
    keyed::{self, Keyed},
    refusal::Refusal,
    yaml,
};

/// The longest UID. Kubernetes' have 36 bytes.
const MAX_UID_BYTES: usize = 128;

/// One workload, as in its file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Workload {
    /// This incarnation of the pod, never used for another.
    #[serde(deserialize_with = "uid")]
    pub uid: String,
    /// The pod's name.
    #[serde(deserialize_with = "segment")]
    pub name: String,
    /// Its namespace.
    #[serde(deserialize_with = "segment")]
    pub namespace: String,
    /// Its service account.
    #[serde(deserialize_with = "segment")]
    pub service_account: String,
    /// The only node that gets a certificate for it.
    #[serde(deserialize_with = "segment")]
    pub node: String,
    /// Its addresses, which no other workload may have.
    #[serde(deserialize_with = "addresses")]
    pub addresses: Vec<IpAddr>,
    /// What the pod belongs to, "Deployment/checkout", for people. Files do not say it.
    #[serde(skip)]
    pub owner: String,
}

impl Workload {
    /// The name that its certificate gets.
    ///
    /// # Errors
    ///
    /// Never for a workload that was read from a file.
    pub fn id(&self, trust_domain: &TrustDomain) -> Result<SpiffeId, SpiffeError> {
        WorkloadId::new(trust_domain.clone(), &self.namespace, &self.service_account)
            .map(SpiffeId::Workload)
    }

    /// The pod that its certificate names.
    pub fn pod(&self) -> PodRef {
        PodRef { name: self.name.clone(), uid: self.uid.clone() }
    }

    /// The form in which agents get it.
    pub fn to_api(&self) -> api::Workload {
        api::Workload {
            uid: self.uid.clone(),
            namespace: self.namespace.clone(),
            service_account: self.service_account.clone(),
            name: self.name.clone(),
            node: self.node.clone(),
            addresses: self.addresses.iter().map(ToString::to_string).collect(),
            owner: self.owner.clone(),
        }
    }
}

impl Keyed for Workload {
    fn key(&self) -> (&str, &str) {
        ("", &self.uid)
    }
}

/// Something in the registry that had no effect.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// The file's name, or what it is in the cluster: "service shop/cart".
    pub file: String,
    /// What is wrong with it.
    pub reason: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.file, self.reason)
    }
}

/// The workloads in force, and what was left out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Registry {
    /// In the order of their UIDs.
    workloads: Vec<Entry>,
    problems: Vec<Problem>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    /// Empty in a cluster.
    file: String,
    workload: Arc<Workload>,
}

impl Registry {
    /// Decides which files are in force. Of two that claim one UID or one address the one written
    /// first wins, so that an address in use cannot be taken over by adding a file; of two written
    /// at the same time, the first by name.
    pub fn resolve(mut sources: Vec<Source>) -> Self {
        sources.sort_by(|a, b| (a.modified, &a.file).cmp(&(b.modified, &b.file)));
        let mut problems = Vec::new();
        let mut workloads = BTreeMap::new();
        let mut owners = HashMap::new();
        for Source { file, content, .. } in sources {
            let accepted = content.and_then(|text| parse(&text)).and_then(|workload| {
                conflict(&workloads, &owners, &workload).map_or(Ok(workload), Err)
            });
            match accepted {
                Ok(workload) => {
                    owners.extend(workload.addresses.iter().map(|a| (*a, workload.uid.clone())));
                    let uid = workload.uid.clone();
                    workloads.insert(uid, Entry { file, workload: Arc::new(workload) });
                }
                Err(reason) => problems.push(Problem { file, reason }),
            }
        }
        problems.sort_by(|a, b| a.file.cmp(&b.file));
        Self { workloads: workloads.into_values().collect(), problems }
    }

    /// The workloads of a cluster, which do not contradict each other.
    pub fn from_cluster<T: Into<Arc<Workload>>>(workloads: impl IntoIterator<Item = T>) -> Self {
        let mut workloads: Vec<_> = workloads
            .into_iter()
            .map(|workload| Entry { file: String::new(), workload: workload.into() })
            .collect();
        workloads.sort_by(|a, b| a.workload.uid.cmp(&b.workload.uid));
        Self { workloads, problems: Vec::new() }
    }

    /// Takes over from `before` the workloads that have not changed.
    #[must_use]
    pub fn sharing_with(mut self, before: &Self) -> Self {
        keyed::share(before.shared(), self.workloads.iter_mut().map(|entry| &mut entry.workload));
        self
    }

    /// Whether a workload may be registered beside the others, or in place of the one with the
    /// same UID in the same file.
    ///
    /// # Errors
    ///
    /// What stands against it.
    pub fn admits(&self, workload: &Workload, file: &str) -> Result<(), String> {
        for entry in &self.workloads {
            if entry.workload.uid == workload.uid {
                if entry.file != file {
                    return Err(format!("the UID is registered by {}: edit that file", entry.file));
                }
            } else if let Some(address) =
                workload.addresses.iter().find(|a| entry.workload.addresses.contains(a))
            {
                return Err(format!(
                    "the address {address} is registered for the UID {}: deregister that one first",
                    entry.workload.uid
                ));
            }
        }
        Ok(())
    }

    /// The workload with that UID.
    pub fn get(&self, uid: &str) -> Option<&Workload> {
        self.entry(uid).map(|entry| &*entry.workload)
    }

    /// The workload with that UID, for its own node.
    ///
    /// # Errors
    ///
    /// [`Refusal::ForeignPod`], [`Refusal::UnknownPod`].
    pub fn on_node(&self, uid: &str, node: &str) -> Result<&Workload, Refusal> {
        let (uid, node) = (uid.to_owned(), node.to_owned());
        match self.get(&uid) {
            Some(workload) if workload.node == node => Ok(workload),
            Some(_) => Err(Refusal::ForeignPod { uid, node }),
            None => Err(Refusal::UnknownPod { uid, node }),
        }
    }

    /// The file that registers a UID.
    pub fn file(&self, uid: &str) -> Option<&str> {
        self.entry(uid).map(|entry| entry.file.as_str())
    }

    fn entry(&self, uid: &str) -> Option<&Entry> {
        let place = self.workloads.binary_search_by(|entry| (*entry.workload.uid).cmp(uid));
        self.workloads.get(place.ok()?)
    }

    /// Every workload, in the order of their UIDs.
    pub fn workloads(&self) -> impl ExactSizeIterator<Item = &Workload> {
        self.workloads.iter().map(|entry| &*entry.workload)
    }

    /// The same, to be kept.
    pub fn shared(&self) -> impl Iterator<Item = &Arc<Workload>> {
        self.workloads.iter().map(|entry| &entry.workload)
    }

    /// Every file that has no effect, in the order of their names.
    pub fn problems(&self) -> &[Problem] {
        &self.problems
    }

    /// What an operator wants to read in the log when `self` becomes `next`.
    pub fn changes<'a>(&'a self, next: &'a Self) -> Changes<'a> {
        let (mut added, mut changed, mut removed) = (Vec::new(), Vec::new(), Vec::new());
        for change in keyed::changes(self.shared(), next.shared()) {
            match change {
                (None, Some(new)) => added.push(&**new),
                (Some(_), Some(new)) => changed.push(&**new),
                (Some(old), None) => removed.push(&**old),
                (None, None) => {}
            }
        }
        let problems = next.problems.iter().filter(|p| !self.problems.contains(p)).collect();
        Changes { added, removed, changed, problems }
    }
}

fn conflict(
    workloads: &BTreeMap<String, Entry>,
    owners: &HashMap<IpAddr, String>,
    new: &Workload,
) -> Option<String> {
    if let Some(first) = workloads.get(&new.uid) {
        return Some(format!("the UID {} is registered by {} already", new.uid, first.file));
    }
    let (address, owner) = new.addresses.iter().find_map(|a| Some((a, owners.get(a)?)))?;
    let file = workloads.get(owner).map_or(owner.as_str(), |first| first.file.as_str());
    Some(format!("the address {address} is registered by {file} already: deregister that one"))
}

/// The difference of two registries.
#[derive(Debug, PartialEq, Eq)]
pub struct Changes<'a> {
    /// Workloads that were not there.
    pub added: Vec<&'a Workload>,
    /// Workloads that are not there any more.
    pub removed: Vec<&'a Workload>,
    /// Workloads that say something else under the same UID.
    pub changed: Vec<&'a Workload>,
    /// Problems that are new.
    pub problems: Vec<&'a Problem>,
}

/// The file that registering a UID makes.
pub fn file_name(uid: &str) -> String {
    format!("{uid}.yaml")
}

/// Reads one workload.
///
/// # Errors
///
/// Key, place and reason.
pub fn parse(text: &str) -> Result<Workload, String> {
    yaml::parse(text)
}

/// A name that can stand in a path.
pub(crate) fn segment<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let name = String::deserialize(deserializer)?;
    check_segment(&name).map_err(de::Error::custom)?;
    Ok(name)
}

/// A UID is also the name of a file.
fn uid<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let uid = segment(deserializer)?;
    if uid.len() <= MAX_UID_BYTES && !uid.starts_with('.') {
        Ok(uid)
    } else {
        Err(de::Error::custom(format!(
            "{uid:?} is no UID: at most {MAX_UID_BYTES} bytes, no dot first"
        )))
    }
}

/// Whether something other than this machine can have the address.
pub(crate) const fn is_host(address: IpAddr) -> bool {
    !(address.is_unspecified() || address.is_loopback() || address.is_multicast())
}

fn addresses<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<IpAddr>, D::Error> {
    let mut addresses = Vec::<IpAddr>::deserialize(deserializer)?;
    for address in &mut addresses {
        *address = address.to_canonical();
        if !is_host(*address) {
            return Err(de::Error::custom(format!("{address} cannot be the address of a pod")));
        }
    }
    addresses.sort_unstable();
    addresses.dedup();
    if (1..=MAX_POD_ADDRESSES).contains(&addresses.len()) {
        Ok(addresses)
    } else {
        let n = addresses.len();
        Err(de::Error::custom(format!("{n} addresses: a pod has 1 to {MAX_POD_ADDRESSES}")))
    }
}

#[cfg(test)]
mod tests;
