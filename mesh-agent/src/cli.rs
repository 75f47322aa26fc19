//! The command line: what can be asked of the binary, and its exit statuses.

use std::{
    fmt,
    io::{IsTerminal as _, Write as _, stdout},
    path::PathBuf,
    process::ExitCode,
};

use clap::{Args, Parser, Subcommand, ValueEnum};
use mesh_common::{ending::Ending, log::Log, spiffe::check_segment};
use serde::Serialize;

use crate::{
    admin::{
        Client, ClientError, Style, print_certs, print_connections, print_pods, print_status,
        printable, status::Status,
    },
    check,
    cni::{
        self,
        install::{Installation, Places},
    },
    config::{Config, ConfigError, DEFAULT_ADMIN_SOCKET, EXIT_BAD_CONFIG, Udp},
    logging,
};

/// `status` found something wrong, or a command failed.
const EXIT_FAILED: u8 = 1;

/// No agent answers.
const EXIT_UNREACHABLE: u8 = 2;

/// The node agent of nodemesh: captures the TCP of pods with eBPF and carries it in mutual TLS.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the agent of this node, in the foreground
    ///
    /// Ends with status 64 and one message if the configuration is unusable. SIGTERM lets open
    /// connections finish for `timeouts.drain`. The pods stay under guard while no agent runs.
    Run {
        /// The configuration; config.example.yaml names every key
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
    },
    /// Show what the running agent does
    ///
    /// Exit status: 0 healthy, 1 degraded (the output says why), 2 the agent is not reachable.
    Status {
        /// What to show
        #[arg(value_enum, default_value_t = View::Summary, hide_default_value = true)]
        view: View,
        /// Print JSON, as specified in docs/operations.md
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        agent: Agent,
    },
    /// Bind a registered pod to a network namespace and capture its traffic
    ///
    /// Writes a pod file and waits until the pod is under guard and has a certificate. If the pod
    /// cannot be put under guard nothing is changed.
    Enroll {
        /// The pod's UID, as registered with `mesh-control register`
        #[arg(long, value_parser = segment)]
        uid: String,
        /// Where the pod's network namespace is mounted, for example /run/netns/NAME
        #[arg(long, value_name = "PATH")]
        netns: PathBuf,
        /// Whether the pod's UDP may pass [default: `udp` of the configuration]
        #[arg(long)]
        udp: Option<Udp>,
        /// How many seconds to wait for the certificate; 0: not at all
        #[arg(long, value_name = "SECONDS", default_value_t = 10)]
        wait: u64,
        #[command(flatten)]
        agent: Agent,
    },
    /// Let a pod's traffic pass without the mesh again
    ///
    /// Removes the pod's file and waits until everything the agent made in it is gone.
    Unenroll {
        /// The pod's UID
        #[arg(long, value_parser = segment)]
        uid: String,
        #[command(flatten)]
        agent: Agent,
    },
    /// Say whether this node can run the agent, and change nothing
    ///
    /// Before anything is installed: kubectl debug node/NAME --profile=sysadmin -it
    /// --image=nodemesh.io/mesh-agent:VERSION -- /bin/mesh-agent check-node --root /host
    CheckNode {
        /// Where the node's root directory is
        #[arg(long, value_name = "DIR", default_value = "/")]
        root: PathBuf,
        /// Where the node's container runtime finds network configurations
        #[arg(long, value_name = "DIR", default_value = "/etc/cni/net.d")]
        conf_dir: PathBuf,
    },
    /// Do nothing until SIGTERM or SIGINT
    ///
    /// For a container that has to stay when its work is done, as those of a DaemonSet.
    Pause,
    /// Answer a container runtime as the CNI plugin nodemesh-cni
    ///
    /// Also what the binary does under that name. Parameters come from the environment and from
    /// standard input, as the CNI specification has it; docs/kubernetes.md says what it does.
    Cni,
    /// Install the CNI plugin nodemesh-cni on this node
    ///
    /// Copies this binary, writes its kubeconfig, and puts it into the network configuration that
    /// the container runtime uses. What was there before is kept, and given back by cni-uninstall.
    CniInstall(Installation),
    /// Remove the CNI plugin from this node
    ///
    /// Pods that start from then on are outside the mesh.
    CniUninstall(Places),
    /// Remove everything the agent ever made on this node: programs, maps, rules and routes
    ///
    /// The agent must not be running. Pods then talk without the mesh, in plaintext.
    Uninstall {
        /// The configuration the agent ran with
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum View {
    /// Everything, in words
    Summary,
    /// One line per pod
    Pods,
    /// One line per open connection
    Connections,
    /// One line per certificate
    Certs,
}

/// How to find the agent.
#[derive(Debug, Args)]
struct Agent {
    /// The agent's admin socket
    #[arg(long, value_name = "PATH", default_value = DEFAULT_ADMIN_SOCKET, conflicts_with = "config")]
    socket: PathBuf,
    /// The agent's configuration, which names its admin socket
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

impl Agent {
    fn client(&self) -> Result<Client, Failure> {
        match &self.config {
            None => Ok(Client::new(&self.socket)),
            Some(config) => Ok(Client::new(&Config::load(config)?.admin_socket())),
        }
    }
}

/// A message on standard error and an exit status.
struct Failure {
    status: u8,
    message: String,
}

impl From<ConfigError> for Failure {
    fn from(error: ConfigError) -> Self {
        Self { status: EXIT_BAD_CONFIG, message: error.to_string() }
    }
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        let status = match error {
            ClientError::Unreachable { .. } | ClientError::HungUp { .. } => EXIT_UNREACHABLE,
            ClientError::Answer(_) | ClientError::Refused(_) => EXIT_FAILED,
        };
        Self { status, message: error.to_string() }
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self { status: EXIT_FAILED, message: format!("{error:#}") }
    }
}

fn failed(error: impl fmt::Display) -> Failure {
    Failure { status: EXIT_FAILED, message: error.to_string() }
}

fn segment(text: &str) -> Result<String, String> {
    check_segment(text).map_err(|error| error.to_string())?;
    Ok(text.to_owned())
}

impl Cli {
    /// Does what the command line says. `run` and `uninstall` get a configuration that is valid,
    /// whose runtime directory exists.
    pub fn execute(
        self,
        run: impl FnOnce(Config) -> anyhow::Result<()>,
        uninstall: impl FnOnce(Config) -> anyhow::Result<()>,
    ) -> ExitCode {
        let done = match self.command {
            Command::Run { config } => load(config).and_then(|config| Ok(run(config)?)),
            Command::Uninstall { config } => load(config).and_then(|config| Ok(uninstall(config)?)),
            Command::Status { view, json, agent } => return status(view, json, &agent),
            Command::CheckNode { root, conf_dir } => {
                let findings = check::node(&root, &conf_dir);
                for finding in &findings {
                    match finding {
                        Ok(text) => println!("ok       {text}"),
                        Err(text) => println!("PROBLEM  {text}"),
                    }
                }
                return ExitCode::from(if findings.iter().all(Result::is_ok) {
                    0
                } else {
                    EXIT_FAILED
                });
            }
            Command::Pause => ask(async {
                Ending::listen().map_err(failed)?.told().await;
                Ok(())
            }),
            Command::Cni => return cni::run(),
            Command::CniInstall(installation) => logging::init(&Log::default())
                .map_err(failed)
                .and_then(|_problems| ask(async { installation.install().await.map_err(failed) })),
            Command::CniUninstall(places) => places.uninstall().map_err(failed),
            Command::Enroll { uid, netns, udp, wait, agent } => ask(async {
                let client = agent.client()?;
                client.enroll(&uid, &netns, udp).await?;
                // It is under guard already; without a certificate its connections are refused.
                if wait > 0 {
                    client.certified(&uid, wait).await?;
                }
                Ok(())
            }),
            Command::Unenroll { uid, agent } => {
                ask(async { Ok(agent.client()?.unenroll(&uid, None).await?) })
            }
        };
        done.map_or_else(report, |()| ExitCode::SUCCESS)
    }
}

fn report(Failure { status, message }: Failure) -> ExitCode {
    eprintln!("mesh-agent: {}", printable(&message));
    ExitCode::from(status)
}

fn load(path: PathBuf) -> Result<Config, Failure> {
    let config = Config::load(&path)?;
    config.prepare_runtime_dir()?;
    Ok(config)
}

fn ask<T>(question: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(failed)?
        .block_on(question)
}

fn status(view: View, json: bool, agent: &Agent) -> ExitCode {
    let colour = stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let style = if colour { Style::Colour } else { Style::Plain };
    let shown = ask(async {
        let client = agent.client()?;
        let status = client.status().await?;
        let text = match (view, json) {
            (View::Connections, _) => {
                let open = client.connections().await?;
                if json { to_json(&open)? } else { print_connections(&open, style) }
            }
            (View::Summary | View::Pods | View::Certs, true) => to_json(&status)?,
            (View::Summary, false) => print_status(&status, style),
            (View::Pods, false) => print_pods(&status, style),
            (View::Certs, false) => print_certs(&status, style),
        };
        // Whoever reads may have read enough.
        drop(stdout().write_all(text.as_bytes()));
        Ok(status)
    });
    match shown {
        Ok(Status { degraded, .. }) if degraded.is_empty() => ExitCode::SUCCESS,
        Ok(Status { degraded, .. }) => {
            if view != View::Summary && !json {
                degraded.iter().for_each(|reason| eprintln!("degraded: {}", printable(reason)));
            }
            ExitCode::from(EXIT_FAILED)
        }
        Err(failure) => report(failure),
    }
}

fn to_json(value: &impl Serialize) -> Result<String, Failure> {
    let mut text = serde_json::to_string_pretty(value).map_err(failed)?;
    text.push('\n');
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn commands_are_understood() {
        for line in [
            "run --config a.yaml",
            "status",
            "status pods --json",
            "status connections --socket /run/s",
            "status --json --config a.yaml",
            "enroll --uid u1 --netns /run/netns/a --udp deny --wait 0",
            "unenroll --uid u1 --socket /run/s",
            "check-node --root /host",
            "pause",
            "cni",
            "cni-install --watch --api-server https://192.0.2.1:6443",
            "cni-uninstall --conf-dir /etc/cni/net.d",
            "uninstall --config a.yaml",
        ] {
            let words = std::iter::once("mesh-agent").chain(line.split(' '));
            assert!(Cli::try_parse_from(words).is_ok(), "{line}");
        }
        for line in [
            "run",
            "status all",
            "status --socket a --config b",
            "enroll --uid a/b --netns /run/netns/a",
            "enroll --uid u1",
            "enroll --uid u1 --netns a --udp maybe",
            "unenroll",
            "cni-install --state-dir state",
        ] {
            let words = std::iter::once("mesh-agent").chain(line.split(' '));
            assert!(Cli::try_parse_from(words).is_err(), "{line}");
        }
    }

    #[test]
    fn an_unusable_configuration_ends_with_64_before_anything_starts() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("config.yaml");
        let runtime = directory.path().join("run");
        let run = |text: &str| {
            std::fs::write(&path, text).unwrap();
            let words = ["mesh-agent", "run", "--config", path.to_str().unwrap()];
            let mut started = false;
            let code = Cli::try_parse_from(words).unwrap().execute(
                |_| {
                    started = true;
                    Ok(())
                },
                |_| Ok(()),
            );
            (code, started)
        };
        let good = format!(
            "control_plane: [c:1]\ncluster_ranges: [10.0.0.0/8]\nruntime_dir: {}\n",
            runtime.display()
        );
        let (code, started) = run(&format!("{good}surprise: 1\n"));
        assert!(code == ExitCode::from(EXIT_BAD_CONFIG) && !started && !runtime.exists());
        let (code, started) = run(&good);
        assert!(code == ExitCode::SUCCESS && started && runtime.exists());
    }

    #[test]
    fn an_agent_that_is_not_there_is_status_2() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("agent.sock");
        let words = ["mesh-agent", "status", "--socket", socket.to_str().unwrap()];
        let code = Cli::try_parse_from(words).unwrap().execute(|_| Ok(()), |_| Ok(()));
        assert_eq!(code, ExitCode::from(EXIT_UNREACHABLE));
    }
}
