//! The agent's state as values: what `status --json` prints. Specified in `docs/operations.md`.
//!
//! Fields are added, never renamed or removed, without raising [`SCHEMA`]. The commands ask agents of
//! other versions, too: what was added has a default.

use std::{net::IpAddr, net::SocketAddr, path::PathBuf, time::SystemTime};

use serde::{Deserialize, Serialize};
use time::{OffsetDateTime, serde::rfc3339};

use crate::config::Udp;

/// The version of the JSON.
pub const SCHEMA: u32 = 1;

/// A time as it is shown: whole seconds, UTC.
pub fn timestamp(time: SystemTime) -> OffsetDateTime {
    let time = OffsetDateTime::from(time);
    time.replace_nanosecond(0).unwrap_or(time)
}

/// Everything about one agent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// [`SCHEMA`].
    pub schema: u32,
    /// The node's name.
    pub node: String,
    /// The agent's version.
    pub version: String,
    /// When this was collected.
    #[serde(with = "rfc3339")]
    pub time: OffsetDateTime,
    /// When the agent started.
    #[serde(with = "rfc3339")]
    pub started: OffsetDateTime,
    /// Whether every known pod is enrolled and served.
    pub ready: bool,
    /// What is wrong, in words. Empty: healthy.
    pub degraded: Vec<String>,
    /// The connection to the control plane.
    pub control_plane: ControlPlane,
    /// The eBPF programs that exist once per node.
    pub programs: Vec<Program>,
    /// Whether the kernel encrypts tunnels: `in use`, `off`, or `not in use: ` and why.
    #[serde(default)]
    pub kernel_tls: String,
    /// Whether all pods that the source knew at the start have been reported.
    pub pods_synced: bool,
    /// The enrolled pods.
    pub pods: Vec<Pod>,
    /// Pods of this node that are in the mesh and not enrolled; only on Kubernetes.
    #[serde(default)]
    pub unguarded: Vec<UnguardedPod>,
    /// Pod files that are not used, or not yet.
    pub pod_files: Vec<PodFile>,
    /// The last things that went wrong, the latest last.
    pub problems: Vec<Problem>,
}

/// The connection to the control plane.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ControlPlane {
    /// `starting`, `awaiting-token`, `disconnected` or `connected`.
    pub state: ControlPlaneState,
    /// Which of the configured addresses.
    pub endpoint: Option<String>,
    /// Since when it is connected, or disconnected.
    #[serde(with = "rfc3339::option")]
    pub since: Option<OffsetDateTime>,
    /// When it last confirmed what the agent knows.
    #[serde(with = "rfc3339::option")]
    pub last_sync: Option<OffsetDateTime>,
    /// The snapshot in use; 0: none.
    pub snapshot_version: u64,
    /// The latest thing that went wrong with it.
    pub problem: Option<String>,
    /// The node's own certificate.
    pub certificate: Option<Certificate>,
}

/// Whether the agent is connected to the control plane.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ControlPlaneState {
    /// Not tried yet.
    Starting,
    /// The node has neither a certificate nor a join token.
    AwaitingToken,
    /// Not reachable. The agent goes on with what it knows.
    Disconnected,
    /// Snapshots flow.
    Connected,
}

/// A certificate in use.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Certificate {
    /// In hexadecimal.
    pub serial: String,
    /// When it was issued; of a pod's certificate only. It is valid from a little earlier on.
    #[serde(default, with = "rfc3339::option")]
    pub issued: Option<OffsetDateTime>,
    /// Not valid after.
    #[serde(with = "rfc3339")]
    pub not_after: OffsetDateTime,
    /// When the agent asks for the next one.
    #[serde(with = "rfc3339")]
    pub next_rotation: OffsetDateTime,
}

/// An eBPF program of the node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Program {
    /// Its name.
    pub name: String,
    /// Whether it is attached.
    pub attached: bool,
}

/// An enrolled pod.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Pod {
    /// The UID in the registry.
    pub uid: String,
    /// Namespace and name, as registered.
    pub name: Option<String>,
    /// What it belongs to, "Deployment/cart", as registered.
    #[serde(default)]
    pub workload: Option<String>,
    /// The SPIFFE ID, as registered.
    pub identity: Option<String>,
    /// The addresses, as registered.
    pub addresses: Vec<IpAddr>,
    /// Where its network namespace was found.
    pub netns: PathBuf,
    /// Whether its UDP passes.
    pub udp: Udp,
    /// Whether the agent's listeners in the pod are open.
    pub listening: bool,
    /// The layers of the guard. A layer that this pod cannot have is left out.
    pub guard: Vec<GuardLayer>,
    /// Why the guard, or what the capture rests on, is not what it should be.
    pub problem: Option<String>,
    /// The certificate it shows.
    pub certificate: Option<Certificate>,
    /// Why it has no certificate, or no fresh one.
    pub certificate_problem: Option<String>,
    /// Connections that were let through.
    pub connections: Vec<Connections>,
    /// Connections that were refused.
    pub denied: Vec<Denied>,
    /// Handshakes with other agents.
    pub handshakes: Vec<Handshakes>,
    /// What the guard dropped.
    pub drops: Vec<Drops>,
    /// UDP datagrams that left the pod, which are not encrypted.
    pub datagrams: u64,
    /// Tunnels kept for the next connection.
    pub idle_tunnels: u64,
    /// Tunnels that several of its connections to a pod share.
    #[serde(default)]
    pub shared_tunnels: u64,
    /// How often rules, routes or sysctls changed inside the pod were put back.
    pub repairs: u64,
    /// Connections from before the enrolment that were aborted.
    pub aborted: u64,
    /// Connections that were ended because they were no longer allowed.
    #[serde(default)]
    pub revoked: u64,
}

impl Pod {
    /// The name, or the UID of a pod that is not registered.
    pub fn label(&self) -> &str {
        self.name.as_deref().unwrap_or(&self.uid)
    }
}

/// One layer of a pod's guard.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuardLayer {
    /// `cgroup`, `device` or `peer`.
    pub layer: String,
    /// Whether it guards everything it should.
    pub active: bool,
    /// The devices it is attached to.
    pub devices: Vec<String>,
}

/// Connections of one direction and kind.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Connections {
    /// `outbound` or `inbound`.
    pub direction: String,
    /// `mtls`, `local` or `plaintext`.
    pub kind: String,
    /// Open now.
    pub open: u64,
    /// Opened since the enrolment or the agent's start.
    pub opened: u64,
    /// Bytes that clients sent.
    pub from_client: u64,
    /// Bytes that servers sent.
    pub from_server: u64,
}

/// Refused connections.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Denied {
    /// `outbound` or `inbound`.
    pub direction: String,
    /// One of the reasons in `docs/operations.md`.
    pub reason: String,
    /// How many.
    pub count: u64,
}

/// Handshakes with other agents.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Handshakes {
    /// `outbound` or `inbound`.
    pub direction: String,
    /// `ok`, or one of the failures in `docs/operations.md`.
    pub result: String,
    /// How many.
    pub count: u64,
}

/// What the guard dropped.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drops {
    /// Where: `connect`, `cgroup`, `device`, `peer` or `lookup`.
    pub layer: String,
    /// One of the reasons in `docs/operations.md`.
    pub reason: String,
    /// How many packets, frames or calls.
    pub count: u64,
}

/// A pod that is in the mesh and not enrolled.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnguardedPod {
    /// Its UID.
    pub uid: String,
    /// `<namespace>/<name>`.
    pub name: String,
    /// Why.
    pub problem: String,
}

/// A pod file that is not used, or not yet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodFile {
    /// Its name; `.` is the directory itself.
    pub file: String,
    /// Why.
    pub problem: String,
}

/// Something that went wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// What, in words.
    pub message: String,
    /// How often.
    pub count: u64,
    /// When first.
    #[serde(with = "rfc3339")]
    pub first: OffsetDateTime,
    /// When last.
    #[serde(with = "rfc3339")]
    pub last: OffsetDateTime,
}

/// The open connections: what `status connections --json` prints.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OpenConnections {
    /// [`SCHEMA`].
    pub schema: u32,
    /// When this was collected.
    #[serde(with = "rfc3339")]
    pub time: OffsetDateTime,
    /// By pod, oldest first.
    pub connections: Vec<OpenConnection>,
}

/// An open connection of a pod.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OpenConnection {
    /// The UID of the pod on this node. A connection between two of them is listed for both.
    pub pod: String,
    /// `outbound` or `inbound`.
    pub direction: String,
    /// `mtls`, `local` or `plaintext`.
    pub kind: String,
    /// Who opened it.
    pub client: Party,
    /// Who was dialled.
    pub server: Party,
    /// When it was let through.
    #[serde(with = "rfc3339")]
    pub since: OffsetDateTime,
    /// Bytes that the client sent.
    pub from_client: u64,
    /// Bytes that the server sent.
    pub from_server: u64,
    /// What both agents call it.
    pub trace: Option<String>,
}

/// One end of a connection.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Party {
    /// As the applications see it.
    pub address: SocketAddr,
    /// The SPIFFE ID of a pod of the mesh.
    pub identity: Option<String>,
    /// The UID of a pod of the mesh.
    pub uid: Option<String>,
}

#[cfg(test)]
pub(super) mod tests {
    use serde_json::Value;

    use super::*;
    use time::Duration;

    /// An agent with one pod, about which there is nothing to complain.
    pub(in crate::admin) fn healthy() -> Status {
        let time = OffsetDateTime::from_unix_timestamp(1_800_000_000).unwrap();
        let certificate = Certificate {
            serial: "80000f".to_owned(),
            issued: Some(time - Duration::minutes(10)),
            not_after: time + Duration::hours(4),
            next_rotation: time + Duration::hours(2),
        };
        let pod = Pod {
            uid: "u1".to_owned(),
            name: Some("shop/cart-0".to_owned()),
            workload: Some("StatefulSet/cart".to_owned()),
            identity: Some("spiffe://td/ns/shop/sa/cart".to_owned()),
            addresses: vec!["10.1.0.1".parse().unwrap()],
            netns: "/run/netns/cart".into(),
            udp: Udp::Allow,
            listening: true,
            guard: vec![GuardLayer {
                layer: "device".to_owned(),
                active: true,
                devices: vec!["eth0".to_owned()],
            }],
            problem: None,
            certificate: Some(certificate.clone()),
            certificate_problem: None,
            connections: vec![Connections {
                direction: "outbound".to_owned(),
                kind: "mtls".to_owned(),
                open: 3,
                opened: 120,
                from_client: 1024,
                from_server: 2048,
            }],
            denied: vec![Denied {
                direction: "outbound".to_owned(),
                reason: "unknown-in-cluster".to_owned(),
                count: 2,
            }],
            handshakes: vec![Handshakes {
                direction: "outbound".to_owned(),
                result: "ok".to_owned(),
                count: 7,
            }],
            drops: vec![Drops {
                layer: "device".to_owned(),
                reason: "plaintext".to_owned(),
                count: 12,
            }],
            datagrams: 5,
            idle_tunnels: 1,
            shared_tunnels: 2,
            repairs: 0,
            aborted: 4,
            revoked: 2,
        };
        Status {
            schema: SCHEMA,
            node: "node-1".to_owned(),
            version: "0.1.0".to_owned(),
            time,
            started: time - Duration::minutes(192),
            ready: true,
            degraded: Vec::new(),
            control_plane: ControlPlane {
                state: ControlPlaneState::Connected,
                endpoint: Some("mesh-control:9464".to_owned()),
                since: Some(time - Duration::minutes(192)),
                last_sync: Some(time - Duration::seconds(12)),
                snapshot_version: 42,
                problem: None,
                certificate: Some(Certificate { issued: None, ..certificate }),
            },
            programs: vec![Program { name: "connect4".to_owned(), attached: true }],
            kernel_tls: "off".to_owned(),
            pods_synced: true,
            pods: vec![pod],
            unguarded: Vec::new(),
            pod_files: Vec::new(),
            problems: vec![Problem {
                message: "something\u{1b}[31m else".to_owned(),
                count: 3,
                first: time - Duration::minutes(5),
                last: time - Duration::minutes(1),
            }],
        }
    }

    #[test]
    fn the_documented_example_is_what_is_printed() {
        let documented = include_str!("../../../docs/operations.md");
        let (_, rest) = documented.split_once("```json\n").unwrap();
        let (json, _) = rest.split_once("```").unwrap();
        let documented: Value = serde_json::from_str(json).unwrap();
        let parsed: Status = serde_json::from_value(documented.clone()).unwrap();
        assert_eq!(serde_json::to_value(&parsed).unwrap(), documented, "every field is there");
        assert_eq!(parsed.schema, SCHEMA);
    }

    #[test]
    fn what_is_printed_can_be_read() {
        let text = serde_json::to_string(&healthy()).unwrap();
        assert_eq!(serde_json::from_str::<Status>(&text).unwrap(), healthy());
    }

    /// Whether `all` has everything that `part` has; of lists, each has as many.
    fn has(all: &Value, part: &Value) -> bool {
        match (all, part) {
            (Value::Object(all), Value::Object(part)) => {
                part.iter().all(|(key, part)| all.get(key).is_some_and(|all| has(all, part)))
            }
            (Value::Array(all), Value::Array(part)) => {
                all.len() == part.len() && all.iter().zip(part).all(|(all, part)| has(all, part))
            }
            (all, part) => all == part,
        }
    }

    fn add_to_everything(value: &mut Value) {
        match value {
            Value::Object(fields) => {
                fields.values_mut().for_each(add_to_everything);
                fields.insert("later".to_owned(), Value::Bool(true));
            }
            Value::Array(values) => values.iter_mut().for_each(add_to_everything),
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
        }
    }

    #[test]
    fn what_the_last_release_printed_is_read_and_all_of_it_is_still_printed() {
        let released: Value = serde_json::from_str(include_str!("released/status.json")).unwrap();
        let parsed: Status = serde_json::from_value(released.clone()).unwrap();
        let mut printed = serde_json::to_value(parsed).unwrap();
        assert!(has(&printed, &released), "{printed}");
        let pod = printed["pods"][0].as_object_mut().unwrap();
        pod.remove("listening");
        assert!(!has(&printed, &released), "the same check fires");
    }

    #[test]
    fn what_a_later_release_adds_is_passed_over() {
        let mut later = serde_json::to_value(healthy()).unwrap();
        add_to_everything(&mut later);
        assert_eq!(serde_json::from_value::<Status>(later).unwrap(), healthy());
    }
}
