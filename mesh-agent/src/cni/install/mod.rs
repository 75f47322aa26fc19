//! Installing the plugin on a node, from a pod that sees the node's directories at their own paths.

mod access;
mod files;
mod network;
mod token;
mod turn;
mod watch;

use std::{
    fs, io,
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
    time::SystemTime,
};

use clap::Args;
use serde_json::Value;

pub use self::network::NetworkError;
use self::{access::Account, files::Files, token::Tokens, turn::Turn};
use super::{PLUGIN_NAME, durable, protocol::Settings};
use crate::config::DEFAULT_ADMIN_SOCKET;

const DEFAULT_STATE_DIR: &str = "/var/lib/nodemesh/cni";

/// Where the kubelet puts it in every pod.
const DEFAULT_SERVICE_ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

/// Why the plugin is not installed, or not removed.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    /// A file or directory cannot be used.
    #[error("cannot use {path}: {source}", path = path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A file has nothing in it.
    #[error("{} is empty", .0.display())]
    Empty(PathBuf),
    /// There is nothing to chain the plugin to.
    #[error("no network configuration in {}: install the cluster's CNI plugin first", .0.display())]
    NoNetwork(PathBuf),
    /// The network that the runtime uses cannot be changed.
    #[error("{path} is left as it is: {source}", path = path.display())]
    Network {
        /// Its file.
        path: PathBuf,
        /// Why.
        source: NetworkError,
    },
    /// Two networks would have one name.
    #[error("{} and {} are two networks: remove one", .0.display(), .1.display())]
    Ambiguous(PathBuf, PathBuf),
    /// The plugin is named where it cannot be taken out.
    #[error(
        "{} still names nodemesh-cni: take it out by hand and run this again. The binary stays \
         until then, for no pod would start without it", .0.display()
    )]
    StillNamed(PathBuf),
    /// Another process has the turn.
    #[error(
        "another cni-install or cni-uninstall is at work on {}: end it first. cni-install --watch \
         runs in the mesh-agent pod of the node", .0.display()
    )]
    Busy(PathBuf),
    /// Nothing says where the API is.
    #[error("the address of the Kubernetes API is not known: set --api-server https://HOST:PORT")]
    NoServer,
    /// The API cannot be asked for a token.
    #[error("cannot use the service account of this pod: {0}")]
    Client(String),
    /// There is no token for the plugin.
    #[error(
        "no token of the service account nodemesh-cni for the plugin: {0}. The chart makes the \
         account, and lets mesh-agent ask for tokens that are bound to its own node"
    )]
    Token(#[source] Box<kube::Error>),
    /// There is none yet.
    #[error("the Kubernetes API did not answer with a token for the plugin")]
    NoAnswer,
    /// Nothing could end the program.
    #[error("cannot wait for signals: {0}")]
    Signals(#[source] io::Error),
    /// The directories cannot be watched.
    #[error("cannot watch {path}: {source}", path = path.display())]
    Watch {
        /// Which.
        path: PathBuf,
        /// Why.
        source: notify::Error,
    },
}

fn failed(path: &Path) -> impl Fn(io::Error) -> InstallError {
    move |source| InstallError::File { path: path.to_owned(), source }
}

/// A path that other programs can use as well.
fn absolute(text: &str) -> Result<PathBuf, String> {
    let path = PathBuf::from(text);
    if path.is_absolute() { Ok(path) } else { Err(format!("{text} is not an absolute path")) }
}

/// The network configuration in `conf_dir` that the container runtime uses, to which the plugin
/// can be added. Nothing is changed.
///
/// # Errors
///
/// [`InstallError`], as an installation would end with.
pub fn network(conf_dir: &Path) -> Result<PathBuf, InstallError> {
    Files { networks: conf_dir.to_owned(), originals: PathBuf::new() }.first()
}

/// Where things are on the node.
#[derive(Clone, Debug, Args)]
pub struct Places {
    /// Where the container runtime finds plugins
    #[arg(long, value_name = "DIR", value_parser = absolute, default_value = "/opt/cni/bin")]
    bin_dir: PathBuf,
    /// Where it finds network configurations
    #[arg(long, value_name = "DIR", value_parser = absolute, default_value = "/etc/cni/net.d")]
    conf_dir: PathBuf,
    /// What the plugin needs and remembers
    #[arg(long, value_name = "DIR", value_parser = absolute, default_value = DEFAULT_STATE_DIR)]
    state_dir: PathBuf,
}

/// How the plugin is installed.
#[derive(Clone, Debug, Args)]
pub struct Installation {
    #[command(flatten)]
    places: Places,
    /// The agent's admin socket, as the node sees it
    #[arg(long, value_name = "PATH", value_parser = absolute, default_value = DEFAULT_ADMIN_SOCKET)]
    admin_socket: PathBuf,
    /// The Kubernetes API, as the node sees it [default: that of the pod's environment]
    #[arg(long, value_name = "URL")]
    api_server: Option<String>,
    /// The credentials of this pod, and the namespace of nodemesh
    #[arg(long, value_name = "DIR", default_value = DEFAULT_SERVICE_ACCOUNT)]
    service_account: PathBuf,
    /// Give the plugin a token that is bound to this Node, not the one of this pod
    #[arg(long, value_name = "NAME")]
    node: Option<String>,
    /// Go on: put back what something overwrites or removes, and renew the credentials
    #[arg(long)]
    watch: bool,
}

impl Places {
    fn binary(&self) -> PathBuf {
        self.bin_dir.join(PLUGIN_NAME)
    }

    fn kubeconfig(&self) -> PathBuf {
        self.state_dir.join("kubeconfig")
    }

    fn files(&self) -> Files {
        Files { networks: self.conf_dir.clone(), originals: self.state_dir.join("originals") }
    }

    /// Removes what [`Installation::install`] made: pods start without the mesh from then on.
    ///
    /// # Errors
    ///
    /// [`InstallError`]; what was there before is given back first, and nothing is removed while a
    /// network configuration names the plugin.
    pub fn uninstall(&self) -> Result<(), InstallError> {
        let _turn = match Turn::take(&self.bin_dir) {
            Err(error) if is_missing(&error, &self.bin_dir) => None,
            turn => Some(turn?),
        };
        match self.files().remove() {
            Err(error) if is_missing(&error, &self.conf_dir) => {}
            done => done?,
        }
        for directory in [&self.conf_dir, &self.state_dir] {
            match durable::sweep(directory).map_err(failed(directory)) {
                Err(error) if is_missing(&error, directory) => {}
                done => done?,
            }
        }
        remove(&self.binary(), fs::remove_file)?;
        // By name: a mistyped --state-dir costs nothing.
        for name in ["kubeconfig", "ca.crt"] {
            remove(&self.state_dir.join(name), fs::remove_file)?;
        }
        for name in ["originals", "outside", "attachments", "ended"] {
            remove(&self.state_dir.join(name), fs::remove_dir_all)?;
        }
        remove(&self.state_dir, fs::remove_dir)?;
        // Made for the plugin alone, unless somebody else has something there or mounts it.
        match self.state_dir.parent().map(|parent| (parent, fs::remove_dir(parent))) {
            Some((parent, Err(error)))
                if !matches!(
                    error.kind(),
                    io::ErrorKind::DirectoryNotEmpty
                        | io::ErrorKind::NotFound
                        | io::ErrorKind::ResourceBusy
                ) =>
            {
                Err(failed(parent)(error))
            }
            Some(_) | None => Ok(()),
        }
    }
}

fn is_missing(error: &InstallError, directory: &Path) -> bool {
    matches!(error, InstallError::File { path, source }
        if path == directory && source.kind() == io::ErrorKind::NotFound)
}

fn remove(path: &Path, how: fn(PathBuf) -> io::Result<()>) -> Result<(), InstallError> {
    match how(path.to_owned()) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed(path)(error)),
        Ok(()) | Err(_) => Ok(()),
    }
}

impl Installation {
    /// Installs the plugin, and with `--watch` keeps it installed until the process is told to
    /// end, which leaves it where it is.
    ///
    /// # Errors
    ///
    /// [`InstallError`]. A network configuration that cannot be changed is left as it is.
    pub async fn install(&self) -> Result<(), InstallError> {
        if self.watch {
            return watch::keep(self).await;
        }
        let token = self.token(&mut Tokens::default()).await?;
        self.apply(&mut Turn::take(&self.places.bin_dir)?, Some(&token))
    }

    /// What the plugin is to show to the API.
    async fn token(&self, tokens: &mut Tokens) -> Result<String, InstallError> {
        let account = Account(&self.service_account);
        let Some(node) = &self.node else { return account.token() };
        let client = async || account.client(&self.server()?).await;
        tokens.of_node(client, &account.namespace()?, node, SystemTime::now()).await
    }

    /// Makes everything what it should be. The network configuration comes last: whoever is named
    /// there must be able to run. Without a new `token` the plugin keeps the one it has.
    fn apply(&self, turn: &mut Turn, token: Option<&str>) -> Result<(), InstallError> {
        turn.copy_binary(&self.places.binary())?;
        let directory = &self.places.state_dir;
        let mut builder = fs::DirBuilder::new();
        builder.recursive(true).mode(0o700).create(directory).map_err(failed(directory))?;
        let account = Account(&self.service_account);
        let kubeconfig = self.places.kubeconfig();
        if let Some(token) = token {
            if account.write_kubeconfig(&self.server()?, token, &kubeconfig)? {
                tracing::info!(kubeconfig = %kubeconfig.display(), "the plugin has new credentials");
            }
        } else if !kubeconfig.exists() {
            return Ok(());
        }
        let settings = Settings {
            admin_socket: self.admin_socket.clone(),
            kubeconfig,
            namespace: account.namespace()?,
            state_dir: self.places.state_dir.clone(),
        };
        if let Some(network) = self.places.files().add(&entry(&settings))? {
            tracing::info!(network = %network.display(), "the plugin is in the network");
        }
        Ok(())
    }

    fn server(&self) -> Result<String, InstallError> {
        let variable = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
        let from_environment = || {
            let (host, port) =
                (variable("KUBERNETES_SERVICE_HOST")?, variable("KUBERNETES_SERVICE_PORT")?);
            let host = if host.contains(':') { format!("[{host}]") } else { host };
            Some(format!("https://{host}:{port}"))
        };
        self.api_server.clone().or_else(from_environment).ok_or(InstallError::NoServer)
    }
}

/// The plugin in a list of plugins.
fn entry(settings: &Settings) -> Value {
    let Settings { admin_socket, kubeconfig, namespace, state_dir } = settings;
    serde_json::json!({
        "type": PLUGIN_NAME,
        "admin_socket": admin_socket,
        "kubeconfig": kubeconfig,
        "namespace": namespace,
        "state_dir": state_dir,
    })
}

#[cfg(test)]
mod tests;
