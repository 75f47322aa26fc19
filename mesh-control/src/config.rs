//! The configuration file: strict YAML, turned into typed values before anything starts.
//!
//! `config.example.yaml` names every key with its default.

use std::{
    fs, io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

use mesh_common::{log::Log, spiffe::TrustDomain};
use serde::{Deserialize, Deserializer, de};

use crate::{registry::segment, yaml};

/// Where the admin socket is when neither the configuration nor the command line says otherwise.
pub const DEFAULT_ADMIN_SOCKET: &str = "/run/nodemesh-control/admin.sock";

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

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
    /// The file's content is not a configuration, or two values do not go together.
    #[error("the configuration {path} is invalid: {reason}", path = path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// Which key, where and why.
        reason: String,
    },
}

/// Everything the operator decides about the control plane.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The authority of every name in the mesh. The only key without a default.
    #[serde(deserialize_with = "trust_domain")]
    pub trust_domain: TrustDomain,
    /// The CA's keys, the join tokens and the counters that must survive a restart. 0700.
    #[serde(default = "state_dir", deserialize_with = "absolute")]
    pub state_dir: PathBuf,
    #[serde(default, deserialize_with = "some_absolute")]
    registry_dir: Option<PathBuf>,
    #[serde(default, deserialize_with = "some_absolute")]
    services_dir: Option<PathBuf>,
    #[serde(default, deserialize_with = "some_absolute")]
    bundle_dir: Option<PathBuf>,
    /// Where agents connect: gRPC over mutual TLS.
    #[serde(default = "listen")]
    pub listen: SocketAddr,
    /// The unix socket that the other commands talk to. 0600, root only.
    #[serde(default = "admin_socket", deserialize_with = "absolute")]
    pub admin_socket: PathBuf,
    /// Where `/metrics`, `/healthz` and `/readyz` are served.
    #[serde(default = "http_listen")]
    pub http_listen: SocketAddr,
    /// A CA that the operator supplies. Default: one is made in `state_dir`.
    #[serde(default)]
    pub ca: Option<OperatorCa>,
    /// Present: the registry, the nodes and the CA's key are those of a Kubernetes cluster.
    #[serde(default)]
    pub kubernetes: Option<Kubernetes>,
    /// How long workloads' certificates live.
    #[serde(default = "svid_lifetime", deserialize_with = "lifetime")]
    pub svid_lifetime: Duration,
    /// How long nodes' certificates live, and the control plane's own.
    #[serde(default = "node_lifetime", deserialize_with = "lifetime")]
    pub node_lifetime: Duration,
    /// How long the issuing CA made here lives; renewed at half of it.
    #[serde(default = "intermediate_lifetime", deserialize_with = "lifetime")]
    pub intermediate_lifetime: Duration,
    /// How long the root made here on first start lives.
    #[serde(default = "root_lifetime", deserialize_with = "lifetime")]
    pub root_lifetime: Duration,
    /// How far back `NotBefore` is set, for clocks that run behind.
    #[serde(default = "clock_skew", with = "humantime_serde")]
    pub clock_skew: Duration,
    /// How much the agents may use.
    #[serde(default)]
    pub limits: Limits,
    /// The server's own log, on standard error.
    #[serde(default)]
    pub log: Log,
}

impl Config {
    /// Reads and checks a configuration file. Nothing is created or changed.
    ///
    /// # Errors
    ///
    /// Every [`ConfigError`].
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = fs::read_to_string(path)
            .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        yaml::parse(&text)
            .and_then(|config: Self| config.check_lifetimes().map(|()| config))
            .map_err(|reason| ConfigError::Invalid { path: path.to_owned(), reason })
    }

    /// An issuer is renewed at half of its life, so with these rules no certificate is ever cut
    /// short because its issuer ends first.
    fn check_lifetimes(&self) -> Result<(), String> {
        let intermediate = ("intermediate_lifetime", self.intermediate_lifetime);
        let rules = [
            (("svid_lifetime", self.svid_lifetime), intermediate),
            (("node_lifetime", self.node_lifetime), intermediate),
            (intermediate, ("root_lifetime", self.root_lifetime)),
        ];
        for ((short_key, short), (long_key, long)) in rules {
            if short.checked_mul(2).is_none_or(|twice| twice > long) {
                return Err(format!("{long_key} must be at least twice {short_key}"));
            }
        }
        Ok(())
    }

    /// The directory of workload files.
    pub fn registry_dir(&self) -> PathBuf {
        self.registry_dir.clone().unwrap_or_else(|| self.state_dir.join("registry"))
    }

    /// The directory of service files.
    pub fn services_dir(&self) -> PathBuf {
        self.services_dir.clone().unwrap_or_else(|| self.state_dir.join("services"))
    }

    /// The directory of further roots.
    pub fn bundle_dir(&self) -> PathBuf {
        self.bundle_dir.clone().unwrap_or_else(|| self.state_dir.join("bundle"))
    }

    /// The operator's directories, of which every change counts.
    pub fn watched_dirs(&self) -> [PathBuf; 3] {
        [self.registry_dir(), self.services_dir(), self.bundle_dir()]
    }
}

/// PEM files of a CA that exists already.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OperatorCa {
    /// The issuing CA's certificate, followed by those between it and the root, if any.
    #[serde(deserialize_with = "absolute")]
    pub cert: PathBuf,
    /// The issuing CA's private key.
    #[serde(deserialize_with = "absolute")]
    pub key: PathBuf,
    /// The root that the mesh is to trust.
    #[serde(deserialize_with = "absolute")]
    pub root: PathBuf,
}

/// Where things are in the cluster.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Kubernetes {
    /// The namespace in which nodemesh is installed.
    #[serde(deserialize_with = "segment")]
    pub namespace: String,
    /// The agents' service account there.
    #[serde(deserialize_with = "segment")]
    pub agent_service_account: String,
    /// The audience of the tokens that agents join with.
    pub audience: String,
    /// The Secret of the CA. Made if there is none.
    #[serde(deserialize_with = "segment")]
    pub ca_secret: String,
    /// The ConfigMap in which the roots are published.
    #[serde(deserialize_with = "segment")]
    pub bundle_config_map: String,
}

impl Default for Kubernetes {
    fn default() -> Self {
        Self {
            namespace: "nodemesh-system".to_owned(),
            agent_service_account: "nodemesh-agent".to_owned(),
            audience: "nodemesh-control".to_owned(),
            ca_secret: "nodemesh-ca".to_owned(),
            bundle_config_map: "nodemesh-bundle".to_owned(),
        }
    }
}

/// How much the agents may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Open connections, handshakes included. Further ones wait to be accepted.
    #[serde(deserialize_with = "non_zero")]
    pub connections: usize,
    /// The TLS handshake, from the accepted connection on.
    #[serde(deserialize_with = "lifetime")]
    pub handshake: Duration,
    /// The whole connection of a client that shows no certificate, which is only good to join.
    #[serde(deserialize_with = "lifetime")]
    pub join: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 16384,
            handshake: Duration::from_secs(10),
            join: Duration::from_secs(30),
        }
    }
}

fn state_dir() -> PathBuf {
    "/var/lib/nodemesh-control".into()
}

fn admin_socket() -> PathBuf {
    DEFAULT_ADMIN_SOCKET.into()
}

fn listen() -> SocketAddr {
    (Ipv6Addr::UNSPECIFIED, 8443).into()
}

fn http_listen() -> SocketAddr {
    (Ipv4Addr::LOCALHOST, 9464).into()
}

const fn svid_lifetime() -> Duration {
    Duration::from_secs(4 * 60 * 60)
}

const fn node_lifetime() -> Duration {
    DAY
}

fn intermediate_lifetime() -> Duration {
    90 * DAY
}

fn root_lifetime() -> Duration {
    3650 * DAY
}

const fn clock_skew() -> Duration {
    Duration::from_secs(60)
}

fn trust_domain<'de, D: Deserializer<'de>>(deserializer: D) -> Result<TrustDomain, D::Error> {
    String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
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

/// Certificates count in whole seconds, and in years that calendars have.
fn lifetime<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    let duration: Duration = humantime_serde::deserialize(deserializer)?;
    if (Duration::from_secs(1)..=36_500 * DAY).contains(&duration) {
        Ok(duration)
    } else {
        Err(de::Error::custom("must be at least 1s and at most 100 years"))
    }
}

fn non_zero<'de, D: Deserializer<'de>>(deserializer: D) -> Result<usize, D::Error> {
    match usize::deserialize(deserializer)? {
        0 => Err(de::Error::custom("must be at least 1")),
        n => Ok(n),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(text: &str) -> Result<Config, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.yaml");
        fs::write(&path, text).unwrap();
        Config::load(&path).map_err(|error| error.to_string())
    }

    #[test]
    fn the_example_shows_the_defaults() {
        let example = include_str!("../config.example.yaml");
        let expected = load("trust_domain: mesh.example").unwrap();
        assert_eq!(load(example).unwrap(), expected);
        let uncommented: String = example
            .lines()
            .map(|line| line.strip_prefix("#= ").unwrap_or(line))
            .fold(String::new(), |text, line| text + line + "\n");
        let mut all = load(&uncommented).unwrap();
        assert!(all.ca.take().is_some(), "the example shows an operator's CA");
        assert_eq!(all.kubernetes.take(), Some(Kubernetes::default()));
        assert_eq!(all.watched_dirs(), expected.watched_dirs());
        (all.registry_dir, all.services_dir, all.bundle_dir) = (None, None, None);
        assert_eq!(all, expected);
    }

    #[test]
    fn mistakes_are_named_with_key_and_place() {
        for (text, key, place) in [
            ("trust_domain: a\nsvid_lifetme: 4h", "svid_lifetme", "line 2"),
            ("trust_domain: a\nsvid_lifetime: 4", "svid_lifetime", "line 2"),
            ("trust_domain: a\nsvid_lifetime: 0s", "1s", "line 2"),
            ("trust_domain: UPPER", "UPPER", "line 1"),
            ("trust_domain: a\nstate_dir: here", "here", "line 2"),
            ("trust_domain: a\nlisten: nowhere", "nowhere", "line 2"),
            ("trust_domain: a\nlimits: {connections: 0}", "at least 1", "line 2"),
            ("trust_domain: a\nlog: {level: loud=x=y}", "log level", "line 2"),
            ("trust_domain: a\nca: {cert: /a, key: /b}", "root", "line 2"),
            ("trust_domain: a\nkubernetes: {namespace: a/b}", "a/b", "line 2"),
            ("{}", "trust_domain", "config.yaml"),
            ("", "end of input", "config.yaml"),
            ("trust_domain: a\nsvid_lifetime: 60d", "svid_lifetime", "config.yaml"),
            ("trust_domain: a\nroot_lifetime: 100d", "root_lifetime", "config.yaml"),
        ] {
            let error = load(text).unwrap_err();
            assert!(error.contains(key) && error.contains(place), "{text:?}: {error}");
        }
    }

    #[test]
    fn lifetimes_of_seconds_are_accepted() {
        let config = load("trust_domain: a\nsvid_lifetime: 10s\nnode_lifetime: 20s").unwrap();
        assert_eq!(config.svid_lifetime, Duration::from_secs(10));
    }
}
