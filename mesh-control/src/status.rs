//! What `mesh-control status` shows: gathered and judged in the server, printed by the command.
//!
//! The JSON is documented in `docs/control.md`; keys are added, never renamed or removed. Replicas of
//! other versions answer in it, too: what was added has a default.

mod print;
mod whole;

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, SystemTime},
};

use mesh_common::svid::Fingerprint;
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;

pub use self::{print::Text, whole::whole};
use crate::{ca::Validity, control::Control, registry::Problem, sessions::Session};

/// How long an agent may take to use a new snapshot.
const SYNC: Duration = Duration::from_secs(10);

/// The state of the control plane.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Of mesh-control.
    pub version: String,
    /// The trust domain.
    pub trust_domain: String,
    /// Since the start.
    pub uptime_seconds: u64,
    /// Empty if all is well.
    pub degraded: Vec<String>,
    /// The certificate authority.
    pub ca: CaStatus,
    /// The SHA-256 of every root that agents are told to trust.
    pub trust_bundle: Vec<String>,
    /// The version of the present snapshot.
    pub snapshot_version: u64,
    /// Workloads in force.
    pub workloads: u64,
    /// Services in force.
    pub services: u64,
    /// Files of the registry that have no effect.
    pub registry_problems: Vec<Problem>,
    /// Services, and addresses of services, that have no effect.
    pub service_problems: Vec<Problem>,
    /// Files of roots that have no effect.
    pub bundle_problems: Vec<Problem>,
    /// Agents that are connected, by node.
    pub agents: BTreeMap<String, AgentStatus>,
    /// Nodes whose agent is not connected: on Kubernetes all of the cluster, elsewhere those that have
    /// workloads.
    pub nodes_without_agent: Vec<String>,
    /// Join tokens that can still be used.
    pub open_tokens: u64,
    /// Certificates issued since the start, by kind.
    pub issued: BTreeMap<String, u64>,
    /// Refusals since the start, by reason.
    pub refused: BTreeMap<String, u64>,
    /// Every replica of the control plane. What is counted above is their sum.
    #[serde(default)]
    pub replicas: Vec<ReplicaStatus>,
    /// Every pod of the mesh.
    #[serde(default)]
    pub pods: Vec<PodStatus>,
    /// Every pod outside of it; only on Kubernetes.
    #[serde(default)]
    pub outside: Vec<OutsidePod>,
}

/// A replica of the control plane.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplicaStatus {
    /// Its host's name, on Kubernetes its pod's; its address if it does not answer.
    pub name: String,
    /// Of mesh-control. None if it does not answer.
    pub version: Option<String>,
    /// Since its start.
    pub uptime_seconds: u64,
    /// Agents that are connected to it.
    pub agents: u64,
    /// Why nothing more is known of it.
    pub problem: Option<String>,
}

/// A pod of the mesh.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodStatus {
    /// Its UID.
    pub uid: String,
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its node.
    pub node: String,
    /// What its node's agent says of it. None if nobody knows.
    pub state: Option<PodState>,
}

/// What an agent says of a pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodState {
    /// Whether it is under guard.
    pub enrolled: bool,
    /// When its certificate ends.
    #[serde(with = "time::serde::rfc3339::option")]
    pub certificate_not_after: Option<OffsetDateTime>,
    /// What is not as it should be.
    pub problem: Option<String>,
}

/// A pod that is not in the mesh.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct OutsidePod {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its node.
    pub node: String,
    /// Why it is not.
    pub why: String,
}

/// The certificate authority.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CaStatus {
    /// The SHA-256 of the root.
    pub root_fingerprint: String,
    /// When the root ends.
    #[serde(with = "time::serde::rfc3339")]
    pub root_not_after: OffsetDateTime,
    /// When the issuing CA ends.
    #[serde(with = "time::serde::rfc3339")]
    pub issuer_not_after: OffsetDateTime,
    /// Whether the issuing CA is renewed without the operator.
    pub issuer_renews_itself: bool,
}

/// One connected agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentStatus {
    /// Where it connects from.
    pub address: String,
    /// Of mesh-agent.
    pub agent_version: String,
    /// For how long.
    pub connected_seconds: u64,
    /// The newest snapshot that it uses.
    pub acknowledged_version: Option<u64>,
    /// Whether that is the present one.
    pub in_sync: bool,
    /// Why it could not use the last one that it refused.
    pub last_error: Option<String>,
    /// The replica that it is connected to.
    #[serde(default)]
    pub replica: String,
    /// When the certificate ends that it shows.
    #[serde(default, with = "time::serde::rfc3339::option")]
    pub certificate_not_after: Option<OffsetDateTime>,
    /// Its pods, by UID: only in what replicas tell each other.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pods: Option<BTreeMap<String, PodState>>,
}

/// Gathers and judges what this replica knows.
pub fn gather(control: &Control, now: SystemTime) -> Status {
    let view = control.view();
    let snapshot_version = control.publisher().version();
    let sessions = control.sessions.list();
    let connected: BTreeSet<_> = sessions.iter().map(|(node, _)| node.as_str()).collect();
    let connected_agents = connected.len() as u64;
    let nodes: BTreeSet<_> = view.registry.workloads().map(|w| w.node.as_str()).collect();
    let nodes_without_agent: Vec<_> =
        nodes.difference(&connected).map(|node| (*node).to_owned()).collect();

    let authority = control.authority();
    let (root, issuer) = (authority.root_validity(), authority.issuer_validity());
    let mut degraded = Vec::new();
    degraded.extend(ending("the root", root, 10, now));
    degraded.extend(ending("the issuing CA", issuer, 4, now));
    degraded.extend(control.ca_trouble());
    let problems = view.unreadable.iter().chain(view.registry.problems());
    let problems = problems.chain(&view.service_problems).chain(&view.bundle_problems);
    degraded.extend(problems.map(Problem::to_string));
    degraded
        .extend(sessions.iter().filter_map(|(node, s)| lagging(node, s, snapshot_version, now)));

    Status {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        trust_domain: control.config().trust_domain.to_string(),
        uptime_seconds: seconds(control.started, now),
        degraded,
        ca: CaStatus {
            root_fingerprint: Fingerprint::of(authority.root()).to_string(),
            root_not_after: root.not_after.into(),
            issuer_not_after: issuer.not_after.into(),
            issuer_renews_itself: authority.renews_itself(),
        },
        trust_bundle: view.bundle.fingerprints().iter().map(ToString::to_string).collect(),
        snapshot_version,
        workloads: view.registry.workloads().len() as u64,
        services: view.services.services.len() as u64,
        registry_problems: view.registry.problems().to_vec(),
        service_problems: view.service_problems.clone(),
        bundle_problems: view.bundle_problems.clone(),
        agents: sessions
            .into_iter()
            .map(|(node, session)| (node, agent(session, snapshot_version, &control.name, now)))
            .collect(),
        nodes_without_agent,
        open_tokens: control.tokens().open_count(now) as u64,
        issued: control.metrics.issued_by_kind(),
        refused: control.metrics.refused_by_reason(),
        replicas: vec![ReplicaStatus {
            name: control.name.clone(),
            version: Some(env!("CARGO_PKG_VERSION").to_owned()),
            uptime_seconds: seconds(control.started, now),
            agents: connected_agents,
            problem: None,
        }],
        pods: Vec::new(),
        outside: Vec::new(),
    }
}

fn seconds(from: SystemTime, to: SystemTime) -> u64 {
    to.duration_since(from).unwrap_or_default().as_secs()
}

/// Whether less than one part in `parts` of a certificate's life is left.
fn ending(what: &str, validity: Validity, parts: u32, now: SystemTime) -> Option<String> {
    let life = validity.not_after.duration_since(validity.not_before).unwrap_or_default();
    let left = validity.not_after.duration_since(now).unwrap_or_default();
    let when = OffsetDateTime::from(validity.not_after).date();
    (left < life / parts).then(|| format!("{what} ends on {when}: replace it in time"))
}

fn lagging(node: &str, session: &Session, version: u64, now: SystemTime) -> Option<String> {
    if let Some((refused, error)) = &session.refused {
        return Some(format!("node {node}: cannot use snapshot {refused}: {error}"));
    }
    let since = session.sent.map_or(session.connected, |(_, at)| at);
    let late = now.duration_since(since).unwrap_or_default() > SYNC;
    (session.acknowledged != Some(version) && late)
        .then(|| format!("node {node}: has not acknowledged snapshot {version}"))
}

fn agent(session: Session, version: u64, replica: &str, now: SystemTime) -> AgentStatus {
    AgentStatus {
        replica: replica.to_owned(),
        certificate_not_after: Some(session.certificate_not_after.into()),
        pods: session.pods,
        address: session.address.to_string(),
        connected_seconds: seconds(session.connected, now),
        in_sync: session.acknowledged == Some(version),
        acknowledged_version: session.acknowledged,
        last_error: session.refused.map(|(_, error)| error),
        agent_version: session.agent_version,
    }
}

/// Brings the gauges of `/metrics` up to date.
pub fn update_gauges(control: &Control, now: SystemTime) {
    let status = gather(control, now);
    let count = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
    let gauges = control.metrics.gauges();
    gauges.agents_connected.set(count(status.agents.len()));
    gauges.agents_out_of_sync.set(count(status.agents.values().filter(|a| !a.in_sync).count()));
    gauges.workloads.set(i64::try_from(status.workloads).unwrap_or(i64::MAX));
    gauges.services.set(i64::try_from(status.services).unwrap_or(i64::MAX));
    let problems = [&status.registry_problems, &status.service_problems, &status.bundle_problems];
    gauges.problems.set(count(problems.into_iter().map(Vec::len).sum()));
    gauges.snapshot_version.set(i64::try_from(status.snapshot_version).unwrap_or(i64::MAX));
    gauges.root_not_after.set(status.ca.root_not_after.unix_timestamp());
    gauges.issuer_not_after.set(status.ca.issuer_not_after.unix_timestamp());
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    /// As a replica of the last release tells it.
    fn released() -> Value {
        serde_json::from_str(include_str!("status/released/status.json")).unwrap()
    }

    #[test]
    fn what_the_last_release_said_is_read_and_all_of_it_is_still_said() {
        let status: Status = serde_json::from_value(released()).unwrap();
        assert_eq!(status.agents["node-1"].pods, None);
        let said = serde_json::to_value(&status).unwrap();
        let agent = |status: &Value| status["agents"]["node-1"].clone();
        for (said, released) in [(agent(&said), agent(&released())), (said, released())] {
            for (key, value) in released.as_object().unwrap().iter().filter(|(k, _)| *k != "agents")
            {
                assert_eq!(said[key], *value, "{key}");
            }
        }
    }

    #[test]
    fn what_a_later_release_adds_is_passed_over() {
        let mut later = released();
        for pointer in ["", "/ca", "/agents/node-1", "/registry_problems/0"] {
            later.pointer_mut(pointer).unwrap()["later"] = true.into();
        }
        let [later, released]: [Status; 2] =
            [later, released()].map(|status| serde_json::from_value(status).unwrap());
        assert_eq!(later, released);
    }
}
