//! The protocol between a container runtime and a plugin, as far as a chained plugin needs it:
//! parameters in the environment and on standard input, one JSON document on standard output.
//!
//! Specified at <https://www.cni.dev/docs/spec/>.

use std::{collections::BTreeSet, ffi::OsString, fmt, io, path::PathBuf};

use mesh_common::spiffe::check_segment;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::admin::ClientError;

/// Every version since results are handed from plugin to plugin. What differs between them is in
/// the result, which passes through.
pub(super) const VERSIONS: [&str; 5] = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];

/// What the runtime may add to the name of an interface: the longest is 15 bytes.
const MAX_INTERFACE: usize = 15;

/// Why the plugin did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub(super) enum CniError {
    #[error(
        "cniVersion {0:?} is not supported, set one of {versions} in the network configuration",
        versions = VERSIONS.join(", ")
    )]
    Version(String),
    #[error("the environment variable {name} {problem}")]
    Environment { name: &'static str, problem: String },
    #[error("standard input is not what the CNI specification wants: {0}")]
    Decode(#[from] serde_json::Error),
    #[error("the configuration of nodemesh-cni is invalid: {0}")]
    Config(String),
    #[error("cannot use {path}: {source}", path = path.display())]
    State { path: PathBuf, source: io::Error },
    #[error("cannot start: {0}")]
    Start(#[source] io::Error),
    #[error("{0}")]
    Later(#[from] Later),
    #[error("{0}")]
    Unavailable(String),
    #[error("the pod {0} should be in the mesh and is not: restart it")]
    NotEnrolled(String),
}

/// Why the pod cannot start now, and perhaps can when the runtime tries again.
#[derive(Debug, thiserror::Error)]
pub(super) enum Later {
    #[error("it is not known whether the pod {pod} is in the mesh: {reason}")]
    Unknown { pod: PodRef, reason: String },
    #[error("the API has no pod {0}: it was deleted, or is not there yet")]
    NoSuchPod(PodRef),
    #[error("the API's pod of the name {0} has another UID: it was replaced")]
    OtherPod(PodRef),
    #[error("the pod cannot be put under guard: {0}")]
    Agent(#[from] ClientError),
    #[error("the mesh-agent did not answer within {0} s")]
    AgentTimeout(u64),
}

impl CniError {
    /// By the specification's table; from 100 on the plugin's own.
    const fn code(&self) -> u32 {
        match self {
            Self::Version(_) => 1,
            Self::Environment { .. } => 4,
            Self::State { .. } | Self::Start(_) => 5,
            Self::Decode(_) => 6,
            Self::Config(_) => 7,
            Self::Later(_) => 11,
            Self::Unavailable(_) => 50,
            Self::NotEnrolled(_) => 100,
        }
    }

    /// What is printed.
    pub(super) fn to_json(&self, stdin: &[u8]) -> String {
        let version = version(stdin).unwrap_or_else(|_| newest());
        serde_json::json!({ "cniVersion": version, "code": self.code(), "msg": self.to_string() })
            .to_string()
    }
}

/// A container's interface.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(super) struct AttachmentId {
    #[serde(rename = "containerID")]
    container: String,
    #[serde(rename = "ifname")]
    interface: String,
}

impl fmt::Display for AttachmentId {
    /// Neither part can have a colon, or a slash.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.container, self.interface)
    }
}

/// A pod as the kubelet names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct PodRef {
    pub(super) namespace: String,
    pub(super) name: String,
    pub(super) uid: String,
}

impl fmt::Display for PodRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{} ({})", self.namespace, self.name, self.uid)
    }
}

/// A container that gets, or has, its interface.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Attachment {
    pub(super) id: AttachmentId,
    pub(super) netns: PathBuf,
    /// `None`: of no Kubernetes pod.
    pub(super) pod: Option<PodRef>,
    /// What the plugins before this one made.
    pub(super) result: Value,
}

/// What the plugin is asked to do.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Command {
    Add(Attachment),
    Check(Attachment),
    Del(AttachmentId),
    /// With the attachments that are still in use.
    Gc(BTreeSet<AttachmentId>),
    Status,
}

/// The plugin's own keys of the network configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Settings {
    /// The agent's admin socket.
    pub(super) admin_socket: PathBuf,
    /// How to read pods and namespaces.
    pub(super) kubeconfig: PathBuf,
    /// Where nodemesh is installed.
    pub(super) namespace: String,
    /// What the plugin remembers.
    pub(super) state_dir: PathBuf,
}

/// What was read.
#[derive(Debug, PartialEq, Eq)]
#[expect(clippy::large_enum_variant, reason = "a process has one")]
pub(super) enum Request {
    /// Which versions there are, in the words of one.
    Version(String),
    Do(Command, Settings),
}

/// The network configuration.
#[derive(Debug, Deserialize)]
struct Network {
    #[serde(flatten)]
    settings: Settings,
    #[serde(rename = "prevResult")]
    result: Option<Value>,
    #[serde(rename = "cni.dev/valid-attachments")]
    valid: Option<BTreeSet<AttachmentId>>,
}

/// The version of a network configuration that is perhaps nothing else that it should be.
fn version(stdin: &[u8]) -> Result<String, CniError> {
    #[derive(Deserialize)]
    struct Versioned {
        #[serde(default, rename = "cniVersion")]
        version: String,
    }
    let Versioned { version } = serde_json::from_slice(stdin)?;
    if VERSIONS.contains(&version.as_str()) { Ok(version) } else { Err(CniError::Version(version)) }
}

fn newest() -> String {
    VERSIONS[VERSIONS.len() - 1].to_owned()
}

/// Reads what the runtime wants.
pub(super) fn read(
    environment: &dyn Fn(&str) -> Option<OsString>,
    stdin: &[u8],
) -> Result<Request, CniError> {
    let environment = Environment(environment);
    let command = environment.required("CNI_COMMAND")?;
    let version = version(stdin);
    if command == "VERSION" {
        // A runtime of the future asks in a version of the future.
        return Ok(Request::Version(version.unwrap_or_else(|_| newest())));
    }
    version?;
    let network: Network = serde_json::from_slice(stdin)?;
    let settings = network.settings;
    settings.check()?;
    let attachment = || {
        let missing = || CniError::Config("it needs a plugin before it: no prevResult".to_owned());
        Ok::<_, CniError>(Attachment {
            id: environment.attachment()?,
            netns: environment.required("CNI_NETNS")?.into(),
            pod: pod(&environment.optional("CNI_ARGS")?.unwrap_or_default())?,
            result: network.result.ok_or_else(missing)?,
        })
    };
    let command =
        match command.as_str() {
            "ADD" => Command::Add(attachment()?),
            "CHECK" => Command::Check(attachment()?),
            "DEL" => Command::Del(environment.attachment()?),
            // Without the list everything would be taken for unused.
            "GC" => Command::Gc(network.valid.ok_or_else(|| {
                CniError::Config("GC without cni.dev/valid-attachments".to_owned())
            })?),
            "STATUS" => Command::Status,
            other => {
                let problem = format!("is {other:?}: no command of the CNI specification");
                return Err(CniError::Environment { name: "CNI_COMMAND", problem });
            }
        };
    Ok(Request::Do(command, settings))
}

/// What is printed when the runtime asks for versions.
pub(super) fn versions(version: &str) -> Value {
    serde_json::json!({ "cniVersion": version, "supportedVersions": VERSIONS })
}

impl Settings {
    fn check(&self) -> Result<(), CniError> {
        let Self { admin_socket, kubeconfig, namespace, state_dir } = self;
        for (key, path) in
            [("admin_socket", admin_socket), ("kubeconfig", kubeconfig), ("state_dir", state_dir)]
        {
            if !path.is_absolute() {
                let path = path.display();
                return Err(CniError::Config(format!("{key} {path} is not an absolute path")));
            }
        }
        check_segment(namespace).map_err(|error| CniError::Config(format!("namespace: {error}")))
    }
}

/// The parameters in the environment.
struct Environment<'a>(&'a dyn Fn(&str) -> Option<OsString>);

impl Environment<'_> {
    fn optional(&self, name: &'static str) -> Result<Option<String>, CniError> {
        let text = |value: OsString| {
            let problem = "is not UTF-8".to_owned();
            value.into_string().map_err(|_| CniError::Environment { name, problem })
        };
        Ok((self.0)(name).map(text).transpose()?.filter(|value| !value.is_empty()))
    }

    fn required(&self, name: &'static str) -> Result<String, CniError> {
        let problem = "is missing: container runtimes set it for CNI plugins".to_owned();
        self.optional(name)?.ok_or(CniError::Environment { name, problem })
    }

    /// Checked, for they become a file's name.
    fn attachment(&self) -> Result<AttachmentId, CniError> {
        let container = self.required("CNI_CONTAINERID")?;
        let starts_well = container.starts_with(|c: char| c.is_ascii_alphanumeric());
        if !starts_well || check_segment(&container).is_err() {
            let problem = format!("is {container:?}: no container ID");
            return Err(CniError::Environment { name: "CNI_CONTAINERID", problem });
        }
        let interface = self.required("CNI_IFNAME")?;
        let bad = |c: char| c == '/' || c == ':' || c.is_whitespace() || c.is_control();
        if interface.len() > MAX_INTERFACE || interface.contains(bad) {
            let problem = format!("is {interface:?}: no interface's name");
            return Err(CniError::Environment { name: "CNI_IFNAME", problem });
        }
        Ok(AttachmentId { container, interface })
    }
}

/// The pod in `CNI_ARGS`: all of it or nothing.
fn pod(args: &str) -> Result<Option<PodRef>, CniError> {
    let bad = |problem: String| CniError::Environment { name: "CNI_ARGS", problem };
    let [mut namespace, mut name, mut uid] = [None, None, None];
    for entry in args.split(';').filter(|entry| !entry.is_empty()) {
        let (key, value) = entry
            .split_once('=')
            .ok_or_else(|| bad(format!("has {entry:?}, which is not of the form KEY=VALUE")))?;
        let place = match key {
            "K8S_POD_NAMESPACE" => &mut namespace,
            "K8S_POD_NAME" => &mut name,
            "K8S_POD_UID" => &mut uid,
            _ => continue,
        };
        if !value.is_empty() {
            // They become part of paths and of URLs.
            check_segment(value).map_err(|error| bad(format!("has a bad {key}: {error}")))?;
            *place = Some(value.to_owned());
        }
    }
    match (namespace, name, uid) {
        (None, None, None) => Ok(None),
        (Some(namespace), Some(name), Some(uid)) => Ok(Some(PodRef { namespace, name, uid })),
        (_, _, _) => Err(bad("names a pod without one of K8S_POD_NAMESPACE, K8S_POD_NAME and \
             K8S_POD_UID: update the container runtime (containerd 1.6 has them)"
            .to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    const NETWORK: &str = r#"{
        "cniVersion": "1.0.0", "name": "n", "type": "nodemesh-cni", "runtimeConfig": {},
        "admin_socket": "/s", "kubeconfig": "/k", "namespace": "mesh", "state_dir": "/d",
        "prevResult": { "cniVersion": "1.0.0", "z": 1, "ips": [] }
    }"#;
    const ARGS: &str = "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=cart-0;K8S_POD_UID=u1";

    fn ask(changes: &[(&str, &str)], network: &str) -> Result<Request, CniError> {
        let mut variables = BTreeMap::from([
            ("CNI_COMMAND", "ADD"),
            ("CNI_CONTAINERID", "c1"),
            ("CNI_IFNAME", "eth0"),
            ("CNI_NETNS", "/run/netns/a"),
            ("CNI_ARGS", ARGS),
        ]);
        variables.extend(changes.iter().copied());
        read(&|name| variables.get(name).map(Into::into), network.as_bytes())
    }

    fn code(changes: &[(&str, &str)], network: &str) -> u32 {
        ask(changes, network).expect_err("this is an error").code()
    }

    fn attached(changes: &[(&str, &str)]) -> Attachment {
        let Request::Do(Command::Add(attachment), _) = ask(changes, NETWORK).unwrap() else {
            panic!("this is ADD")
        };
        attachment
    }

    #[test]
    fn what_the_runtime_says_is_understood() {
        let attachment = attached(&[]);
        let pod = attachment.pod.unwrap();
        assert_eq!((pod.to_string().as_str(), pod.uid.as_str()), ("shop/cart-0 (u1)", "u1"));
        assert_eq!(attachment.id.to_string(), "c1:eth0");
        assert_eq!(attachment.result["z"], 1);
        let none = attached(&[("CNI_ARGS", "IgnoreUnknown=1;OTHER=x")]);
        assert_eq!(none.pod, None);

        let alone = NETWORK.replace("prevResult", "other");
        for command in ["DEL", "STATUS"] {
            assert!(ask(&[("CNI_COMMAND", command), ("CNI_NETNS", "")], &alone).is_ok());
        }
        let valid = r#""cni.dev/valid-attachments": [{"containerID": "c1", "ifname": "eth0"}],"#;
        let network = alone.replacen('{', &format!("{{{valid}"), 1);
        let Request::Do(Command::Gc(valid), _) = ask(&[("CNI_COMMAND", "GC")], &network).unwrap()
        else {
            panic!("this is GC")
        };
        assert_eq!(valid.first().unwrap().to_string(), "c1:eth0");
        for (asked, answered) in [("0.4.0", "0.4.0"), ("7.0.0", "1.1.0")] {
            let network = format!(r#"{{"cniVersion":"{asked}"}}"#);
            let version = ask(&[("CNI_COMMAND", "VERSION")], &network).unwrap();
            assert_eq!(version, Request::Version(answered.to_owned()));
        }
    }

    #[test]
    fn what_cannot_be_used_is_refused_with_the_specified_code() {
        for (name, value) in [
            ("CNI_COMMAND", "PUT"),
            ("CNI_COMMAND", ""),
            ("CNI_CONTAINERID", "../c"),
            ("CNI_CONTAINERID", ".c"),
            ("CNI_CONTAINERID", ""),
            ("CNI_IFNAME", "a/b"),
            ("CNI_IFNAME", "a:b"),
            ("CNI_IFNAME", "sixteen-letters!"),
            ("CNI_NETNS", ""),
            ("CNI_ARGS", "nonsense"),
            ("CNI_ARGS", "K8S_POD_NAMESPACE=shop;K8S_POD_NAME=cart-0"),
            ("CNI_ARGS", "K8S_POD_UID=u1"),
            ("CNI_ARGS", "K8S_POD_NAMESPACE=shop;K8S_POD_NAME=cart-0;K8S_POD_UID="),
            ("CNI_ARGS", "K8S_POD_NAMESPACE=../shop;K8S_POD_NAME=cart-0;K8S_POD_UID=u1"),
        ] {
            assert_eq!(code(&[(name, value)], NETWORK), 4, "{name}={value}");
        }
        for (from, to, expected) in [
            (r#""cniVersion": "1.0.0", "name""#, r#""cniVersion": "0.2.0", "name""#, 1),
            (r#""cniVersion": "1.0.0", "name""#, r#""name""#, 1),
            ("}", "", 6),
            (r#""state_dir": "/d""#, r#""other": 1"#, 6),
            (r#""state_dir": "/d""#, r#""state_dir": "d""#, 7),
            (r#""namespace": "mesh""#, r#""namespace": "a/b""#, 7),
            ("prevResult", "other", 7),
        ] {
            assert_eq!(code(&[], &NETWORK.replace(from, to)), expected, "{to}");
        }
        assert_eq!(code(&[("CNI_COMMAND", "GC")], NETWORK), 7);
    }

    #[test]
    fn an_error_is_json_in_the_version_of_the_question() {
        let error = CniError::NotEnrolled("a/b".to_owned());
        let json = |stdin: &str| -> Value {
            serde_json::from_str(&error.to_json(stdin.as_bytes())).unwrap()
        };
        assert_eq!(json(r#"{"cniVersion":"0.4.0"}"#)["cniVersion"], "0.4.0");
        assert_eq!(json("nonsense")["cniVersion"], "1.1.0");
        assert_eq!(json("")["code"], 100);
    }
}
