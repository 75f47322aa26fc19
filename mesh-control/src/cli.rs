//! The command line.

use std::{
    io::IsTerminal as _,
    net::IpAddr,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use anyhow::Context as _;
use axum::http::Method;
use clap::{Args, Parser, Subcommand};
use mesh_common::log::{Log, LogFormat};

use crate::{
    admin::{TokenRequest, TokenResponse},
    client::{ClientError, request},
    config::{Config, DEFAULT_ADMIN_SOCKET},
    kubernetes::preflight::{self, Verdict},
    registry::{self, Workload},
    run::run,
    status::{Status, Text},
};

/// What exit status a bad command line or configuration ends with: `EX_USAGE` of sysexits(3).
const EXIT_USAGE: u8 = 64;

/// What exit status `status` ends with if nobody answers.
const EXIT_UNREACHABLE: u8 = 2;

/// The control plane of nodemesh: certificate authority and registry of workloads.
///
/// `run` is the server. The other commands talk to it over its admin socket, as root.
#[derive(Debug, Parser)]
#[command(name = "mesh-control", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the server in the foreground until SIGTERM or SIGINT.
    ///
    /// On first start it makes a CA in its state directory, unless the configuration names one.
    /// Exit status: 0 stopped, 1 failed, 64 the configuration is unusable.
    Run {
        /// The configuration, YAML; every key is explained in config.example.yaml.
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
    },
    /// Register a workload, or change one registered by this command before.
    ///
    /// It is in force when the command returns. Files in the registry directory do the same.
    Register {
        #[command(flatten)]
        server: ServerArgs,
        #[command(flatten)]
        workload: WorkloadArgs,
    },
    /// Remove a workload: its node gets no certificate for it any more, and peers refuse it.
    Deregister {
        #[command(flatten)]
        server: ServerArgs,
        /// The workload's UID.
        uid: String,
    },
    /// Join tokens, by which a new node proves its name.
    #[command(subcommand)]
    Token(TokenCommand),
    /// Say whether a Kubernetes cluster can run nodemesh, and change nothing.
    ///
    /// It asks the cluster of KUBECONFIG, with your rights. What only a node knows, `mesh-agent
    /// check-node` says there. Exit status: 0 it can, 1 it cannot, or the cluster does not answer.
    InstallCheck {
        /// Where nodemesh is to be installed.
        #[arg(long, default_value = "nodemesh-system")]
        namespace: String,
    },
    /// Show the whole mesh: replicas, nodes, pods, certificates and everything that is wrong.
    ///
    /// Exit status: 0 healthy, 1 degraded (the output says why), 2 the server does not answer.
    Status {
        #[command(flatten)]
        server: ServerArgs,
        /// Show each pod, and not only how many there are in each namespace.
        #[arg(long)]
        pods: bool,
        /// Print JSON, with each pod, as documented in docs/control.md.
        #[arg(long, conflicts_with = "pods")]
        json: bool,
    },
}

#[derive(Debug, Subcommand)]
enum TokenCommand {
    /// Make a join token for a node and print it: it is shown only once and can be used once.
    ///
    /// When the node joins with it, every certificate it had before becomes void.
    Create {
        #[command(flatten)]
        server: ServerArgs,
        /// The node's name, as in its agent's configuration.
        #[arg(long)]
        node: String,
        /// How long the token can be used, for example 10m.
        #[arg(long, default_value = "1h", value_parser = humantime::parse_duration)]
        ttl: Duration,
    },
}

#[derive(Debug, Args)]
struct ServerArgs {
    /// The server's admin socket.
    #[arg(
        long,
        value_name = "PATH",
        default_value = DEFAULT_ADMIN_SOCKET,
        env = "NODEMESH_CONTROL_SOCKET"
    )]
    admin_socket: PathBuf,
}

#[derive(Debug, Args)]
struct WorkloadArgs {
    /// Take the workload from a YAML file as it would stand in the registry directory.
    #[arg(
        long,
        value_name = "FILE",
        required_unless_present = "uid",
        conflicts_with_all = ["uid", "name", "namespace", "service_account", "node", "addresses"]
    )]
    file: Option<PathBuf>,
    /// This incarnation of the pod; never used for another.
    #[arg(long, requires_all = ["name", "namespace", "service_account", "node", "addresses"])]
    uid: Option<String>,
    /// The pod's name.
    #[arg(long)]
    name: Option<String>,
    /// Its namespace.
    #[arg(long)]
    namespace: Option<String>,
    /// Its service account.
    #[arg(long)]
    service_account: Option<String>,
    /// The node it runs on, the only one that gets its certificate.
    #[arg(long)]
    node: Option<String>,
    /// One of its addresses; give the option several times for several.
    #[arg(long = "address", value_name = "IP")]
    addresses: Vec<IpAddr>,
}

impl WorkloadArgs {
    /// Goes through the YAML, so that what a file may say is checked in one place.
    fn workload(self) -> anyhow::Result<Workload> {
        let text = match self.file {
            Some(path) => std::fs::read_to_string(&path)
                .with_context(|| format!("reading {}", path.display()))?,
            None => serde_saphyr::to_string(&Workload {
                uid: self.uid.unwrap_or_default(),
                name: self.name.unwrap_or_default(),
                namespace: self.namespace.unwrap_or_default(),
                service_account: self.service_account.unwrap_or_default(),
                node: self.node.unwrap_or_default(),
                addresses: self.addresses,
                owner: String::new(),
            })?,
        };
        registry::parse(&text).map_err(anyhow::Error::msg)
    }
}

/// Runs the command that the process was started with.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let code = if error.use_stderr() { EXIT_USAGE } else { 0 };
            return error.print().map_or(ExitCode::FAILURE, |()| code.into());
        }
    };
    match cli.command {
        Command::Run { config } => serve(&config),
        Command::Register { server, workload } => finish(async {
            let workload = workload.workload()?;
            let socket = &server.admin_socket;
            request(socket, Method::PUT, "/v1/workloads", Some(&workload)).await?;
            Ok(ExitCode::SUCCESS)
        }),
        Command::Deregister { server, uid } => finish(async {
            mesh_common::spiffe::check_segment(&uid)?;
            let path = format!("/v1/workloads/{uid}");
            request::<()>(&server.admin_socket, Method::DELETE, &path, None).await?;
            Ok(ExitCode::SUCCESS)
        }),
        Command::Token(TokenCommand::Create { server, node, ttl }) => finish(async {
            let body = TokenRequest { node, ttl };
            let socket = &server.admin_socket;
            let answer = request(socket, Method::POST, "/v1/tokens", Some(&body)).await?;
            println!("{}", serde_json::from_slice::<TokenResponse>(&answer)?.token);
            Ok(ExitCode::SUCCESS)
        }),
        Command::InstallCheck { namespace } => finish(async {
            let client = kube::Client::try_default().await.context("finding the cluster")?;
            let findings = preflight::check(&client, &namespace).await?;
            findings.iter().for_each(|finding| println!("{finding}"));
            let can = findings.iter().all(|finding| finding.verdict != Verdict::Problem);
            Ok(if can { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }),
        Command::Status { server, pods, json } => finish(async {
            let socket = &server.admin_socket;
            let answer = request::<()>(socket, Method::GET, "/v1/status", None).await?;
            let status: Status = serde_json::from_slice(&answer)?;
            if json {
                println!("{}", serde_json::to_string_pretty(&status)?);
            } else {
                print!("{}", Text { status: &status, pods });
            }
            Ok(if status.degraded.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }),
    }
}

fn serve(path: &Path) -> ExitCode {
    let config = match Config::load(path) {
        Ok(config) => config,
        Err(error) => {
            eprintln!("mesh-control: {error}");
            return EXIT_USAGE.into();
        }
    };
    start_log(&config.log);
    finish(async { run(config).await.map(|()| ExitCode::SUCCESS) })
}

fn start_log(log: &Log) {
    let builder = tracing_subscriber::fmt()
        .with_env_filter(log.level.filter())
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr);
    match log.format {
        LogFormat::Text => builder.init(),
        LogFormat::Json => builder.json().init(),
    }
}

fn finish(command: impl Future<Output = anyhow::Result<ExitCode>>) -> ExitCode {
    let result = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("starting threads")
        .and_then(|runtime| runtime.block_on(command));
    result.unwrap_or_else(|error| {
        eprintln!("mesh-control: {error:#}");
        match error.downcast_ref::<ClientError>() {
            Some(ClientError::Unreachable { .. }) => EXIT_UNREACHABLE.into(),
            Some(ClientError::Refused(_)) | None => ExitCode::FAILURE,
        }
    })
}
