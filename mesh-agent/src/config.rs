//! The agent's configuration file: strict YAML, turned into typed values before anything starts.
//!
//! `config.example.yaml` names every key with its default; `docs/operations.md` explains them.

mod kubernetes;

use std::{
    env, fmt, fs, io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    num::{NonZeroU16, NonZeroU32, NonZeroUsize},
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _},
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use mesh_common::{
    log::Log,
    spiffe::{SpiffeError, check_segment},
};
use serde::{
    Deserialize, Deserializer, Serialize,
    de::{self, DeserializeOwned},
};

pub use self::kubernetes::Kubernetes;
use crate::{
    identity::Credential,
    policy::{AddressRanges, Egress, PlaintextIngress, Policy},
};

/// Where the admin socket is when neither the configuration nor the command line says otherwise.
pub const DEFAULT_ADMIN_SOCKET: &str = "/run/nodemesh/agent.sock";

/// What exit status the agent ends with when its configuration is unusable: `EX_USAGE` of
/// sysexits(3).
pub const EXIT_BAD_CONFIG: u8 = 64;

/// Why the configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {path}: {source}", path = path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The file's content is not a configuration. The message names the key, line and column.
    #[error("the configuration {path} is invalid: {source}", path = path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: Box<serde_saphyr::Error>,
    },
    /// `node` is not given and what would stand for it cannot.
    #[error("{found} cannot be this node's name, set `node` in the configuration: {source}")]
    NodeName {
        /// Where the name was found.
        found: &'static str,
        /// What is wrong with it.
        source: SpiffeError,
    },
    /// `control_plane` is not given, and nothing stands for it.
    #[error("the configuration {path} has no `control_plane`: {reason}", path = path.display())]
    NoControlPlane {
        /// The file.
        path: PathBuf,
        /// What to do about it.
        reason: String,
    },
    /// The runtime directory cannot be made.
    #[error("cannot create runtime_dir {path} with mode 0700: {source}", path = path.display())]
    RuntimeDir {
        /// The directory.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The runtime directory exists and others than its owner can reach into it.
    #[error(
        "runtime_dir {path} holds private keys, but is owned by uid {owner} with mode {mode:04o}: \
         make it a directory of uid {expected} with mode 0700, or name another one",
        path = path.display()
    )]
    RuntimeDirOpen {
        /// The directory.
        path: PathBuf,
        /// Its owner.
        owner: u32,
        /// Its permission bits.
        mode: u32,
        /// The user the agent runs as.
        expected: u32,
    },
}

/// Everything the operator decides about one agent.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// This node's name, as in its join token and in the registry. Default: the host name.
    #[serde(default, deserialize_with = "segment")]
    pub node: String,
    /// Where the control plane listens, tried in this order.
    #[serde(default, deserialize_with = "non_empty")]
    pub control_plane: Vec<Endpoint>,
    /// The agent is a pod of a Kubernetes cluster.
    #[serde(default)]
    pub kubernetes: Option<Kubernetes>,
    /// Every range of the cluster's pod and service addresses: an address inside that is not
    /// registered is never dialled in plaintext.
    pub cluster_ranges: AddressRanges,
    /// The join token, read only while the node has no certificate.
    #[serde(default = "join_token_file", deserialize_with = "absolute")]
    pub join_token_file: PathBuf,
    /// Keys, certificates and the last snapshot. Wants to be a tmpfs; 0700.
    #[serde(default = "runtime_dir", deserialize_with = "absolute")]
    pub runtime_dir: PathBuf,
    /// The directory of pod files.
    #[serde(default = "pods_dir", deserialize_with = "absolute")]
    pub pods_dir: PathBuf,
    #[serde(default, deserialize_with = "some_absolute")]
    admin_socket: Option<PathBuf>,
    /// Where `/metrics`, `/healthz` and `/readyz` are served.
    #[serde(default = "http_listen")]
    pub http_listen: SocketAddr,
    /// The BPF file system that holds the pins, mounted here if it is not.
    #[serde(default = "bpffs", deserialize_with = "absolute")]
    pub bpffs: PathBuf,
    /// The cgroup2 directory to attach to. Default: the root, found through the mount table.
    #[serde(default, deserialize_with = "some_absolute")]
    pub cgroup: Option<PathBuf>,
    /// Whether pods of one node have TLS between them too, though they share no wire.
    #[serde(default)]
    pub encrypt_same_node: bool,
    /// Whether the kernel encrypts tunnels once they are made, if it can.
    #[serde(default)]
    pub kernel_tls: bool,
    /// Plaintext to destinations outside `cluster_ranges`.
    #[serde(default)]
    pub egress: Egress,
    /// Plaintext from outside the mesh to enrolled pods.
    #[serde(default)]
    pub ingress: Ingress,
    /// UDP of pods whose pod file does not say otherwise.
    #[serde(default)]
    pub udp: Udp,
    /// How much one pod may use.
    #[serde(default)]
    pub limits: Limits,
    /// How long things may take.
    #[serde(default)]
    pub timeouts: Timeouts,
    /// The agent's own log, on standard error.
    #[serde(default)]
    pub log: Log,
    /// Worker threads. Default: one per CPU.
    #[serde(default)]
    pub workers: Option<NonZeroUsize>,
}

impl Config {
    /// Reads and checks a configuration file. Nothing is created or changed.
    ///
    /// # Errors
    ///
    /// [`ConfigError::Read`], [`ConfigError::Invalid`], [`ConfigError::NodeName`] and
    /// [`ConfigError::NoControlPlane`].
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        Self::load_in(path, &|name| env::var(name).ok())
    }

    fn load_in(
        path: &Path,
        environment: &dyn Fn(&str) -> Option<String>,
    ) -> Result<Self, ConfigError> {
        let text = fs::read_to_string(path)
            .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        let mut config: Self = parse_yaml(&text).map_err(|source| ConfigError::Invalid {
            path: path.to_owned(),
            source: source.into(),
        })?;
        let on_kubernetes = config.kubernetes.is_some();
        if config.node.is_empty() {
            config.node = kubernetes::node_name(on_kubernetes, environment)?;
        }
        if config.control_plane.is_empty() {
            let found = kubernetes::control_plane(on_kubernetes, environment);
            let missing = |reason| ConfigError::NoControlPlane { path: path.to_owned(), reason };
            config.control_plane = vec![found.map_err(missing)?];
        }
        Ok(config)
    }

    /// The unix socket that `status`, `enroll` and `unenroll` talk to.
    pub fn admin_socket(&self) -> PathBuf {
        self.admin_socket.clone().unwrap_or_else(|| self.runtime_dir.join("agent.sock"))
    }

    /// The part of the configuration that decides who may talk to whom.
    pub fn policy(&self) -> Policy {
        Policy {
            cluster: self.cluster_ranges.clone(),
            egress: self.egress,
            plaintext_ingress: self.ingress.plaintext.clone(),
        }
    }

    /// What the node joins with.
    pub fn credential(&self) -> Credential {
        match &self.kubernetes {
            None => Credential::JoinToken { file: self.join_token_file.clone() },
            Some(kubernetes) => Credential::ServiceAccount {
                token_file: kubernetes.service_account_token_file.clone(),
                bundle_file: kubernetes.bundle_file.clone(),
            },
        }
    }

    /// Creates the runtime directory, or checks that only the agent's user can enter it.
    ///
    /// # Errors
    ///
    /// [`ConfigError::RuntimeDir`] and [`ConfigError::RuntimeDirOpen`].
    pub fn prepare_runtime_dir(&self) -> Result<(), ConfigError> {
        let path = &self.runtime_dir;
        let failed = |source| ConfigError::RuntimeDir { path: path.clone(), source };
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(failed)?;
        }
        match fs::DirBuilder::new().mode(0o700).create(path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(failed(error)),
            Ok(()) | Err(_) => {
                // Not following a link: whoever can replace it decides where the keys go.
                let found = fs::symlink_metadata(path).map_err(failed)?;
                let expected = nix::unistd::geteuid().as_raw();
                let mode = found.mode() & 0o7777;
                if found.is_dir() && found.uid() == expected && mode == 0o700 {
                    Ok(())
                } else {
                    let owner = found.uid();
                    Err(ConfigError::RuntimeDirOpen { path: path.clone(), owner, mode, expected })
                }
            }
        }
    }
}

/// A host and a TCP port, `name:port`, `192.0.2.1:port` or `[2001:db8::1]:port`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Endpoint {
    host: String,
    port: NonZeroU16,
}

impl Endpoint {
    /// The name or address, without brackets.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The TCP port.
    pub const fn port(&self) -> u16 {
        self.port.get()
    }
}

impl FromStr for Endpoint {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        let error =
            || format!("{s:?} is not of the form name:port, 192.0.2.1:port or [2001:db8::1]:port");
        let (host, port) = s.rsplit_once(':').ok_or_else(error)?;
        let port = port.parse().map_err(|_| error())?;
        let host = match host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
            Some(address) => {
                address.parse::<Ipv6Addr>().map_err(|_| error())?;
                address
            }
            None => {
                let digits_only = host.bytes().all(|b| b.is_ascii_digit() || b == b'.');
                if digits_only {
                    host.parse::<Ipv4Addr>().map_err(|_| error())?;
                } else {
                    check_segment(host).map_err(|_| error())?;
                }
                host
            }
        };
        Ok(Self { host: host.to_owned(), port })
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { host, port } = self;
        if host.contains(':') { write!(f, "[{host}]:{port}") } else { write!(f, "{host}:{port}") }
    }
}

impl<'de> Deserialize<'de> for Endpoint {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

/// What enters an enrolled pod without the mesh.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Ingress {
    /// Plaintext that is let in: health checks.
    pub plaintext: Vec<PlaintextIngress>,
    /// Connections of the node itself reach applications as they are, past the agent: kubelet's
    /// health checks. Everything on the node's own network is the node.
    pub host_probes: bool,
}

/// What happens to a pod's UDP, which is not captured. Port 53 is always allowed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Udp {
    /// It passes, unencrypted.
    #[default]
    Allow,
    /// It is dropped and counted.
    Deny,
}

/// How much one pod may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Open connections of one pod, both directions. Further ones are reset.
    pub connections_per_pod: NonZeroU32,
    /// TLS handshakes in flight of one pod, each direction. Further ones wait for their turn.
    pub handshakes_per_pod: NonZeroU32,
    /// Idle tunnels kept for the next connection between the same two pods.
    pub idle_tunnels_per_peer: u32,
}

impl Default for Limits {
    fn default() -> Self {
        let limit = |n| NonZeroU32::new(n).expect("the defaults below are not zero");
        Self {
            connections_per_pod: limit(20_000),
            handshakes_per_pod: limit(256),
            idle_tunnels_per_peer: 32,
        }
    }
}

/// How long things may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Timeouts {
    /// TCP connection establishment by the agent.
    #[serde(deserialize_with = "positive")]
    pub dial: Duration,
    /// TLS handshake and the first tunnel header, from the accepted connection on.
    #[serde(deserialize_with = "positive")]
    pub handshake: Duration,
    /// About how long sent data may stay unacknowledged, before the peer is taken for dead. At
    /// least some 15 s, since 6.15; older kernels decide by `net.ipv4.tcp_retries2`.
    #[serde(deserialize_with = "positive")]
    pub unacknowledged: Duration,
    /// How long a tunnel without a connection is kept.
    #[serde(deserialize_with = "positive")]
    pub idle_tunnel: Duration,
    /// How long open connections may go on after SIGTERM.
    #[serde(with = "humantime_serde")]
    pub drain: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            dial: Duration::from_secs(5),
            handshake: Duration::from_secs(5),
            unacknowledged: Duration::from_secs(60),
            idle_tunnel: Duration::from_secs(300),
            drain: Duration::from_secs(25),
        }
    }
}

/// Reads strict YAML. The error is one line, with the place: also `status` and the log show it.
pub(crate) fn parse_yaml<T: DeserializeOwned>(text: &str) -> Result<T, serde_saphyr::Error> {
    serde_saphyr::from_str_with_options(text, serde_saphyr::options! { with_snippet: false })
}

fn join_token_file() -> PathBuf {
    "/etc/nodemesh/join-token".into()
}

fn runtime_dir() -> PathBuf {
    "/run/nodemesh".into()
}

fn pods_dir() -> PathBuf {
    "/etc/nodemesh/pods".into()
}

fn bpffs() -> PathBuf {
    "/sys/fs/bpf".into()
}

fn http_listen() -> SocketAddr {
    (Ipv4Addr::LOCALHOST, 9465).into()
}

fn segment<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let name = String::deserialize(deserializer)?;
    check_segment(&name).map_err(de::Error::custom)?;
    Ok(name)
}

fn absolute<'de, D: Deserializer<'de>>(deserializer: D) -> Result<PathBuf, D::Error> {
    let path = PathBuf::deserialize(deserializer)?;
    if path.is_absolute() {
        Ok(path)
    } else {
        Err(de::Error::custom(format!("{} is not an absolute path", path.display())))
    }
}

fn some_absolute<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<PathBuf>, D::Error> {
    absolute(deserializer).map(Some)
}

fn positive<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    let duration: Duration = humantime_serde::deserialize(deserializer)?;
    if duration.is_zero() {
        Err(de::Error::custom("a timeout of zero never lets anything happen"))
    } else {
        Ok(duration)
    }
}

fn non_empty<'de, D, T>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    let list = Vec::deserialize(deserializer)?;
    if list.is_empty() { Err(de::Error::custom("the list is empty")) } else { Ok(list) }
}

#[cfg(test)]
mod tests;
