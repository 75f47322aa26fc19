//! `cargo xtask demo`: what the mesh does, seen with a real web server, curl and a sniffer.

use std::fs;
use std::io::{self, IsTerminal as _, Read as _, Write as _};
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Instant;

use anyhow::{Context as _, Result, bail, ensure};
use tempfile::TempDir;
use xtask::lab::mesh::Settings;
use xtask::lab::packet::Segment;
use xtask::lab::{self, Canary, Mesh, Pod, Process, Recording, until};

/// Short, so that a rotation is soon to be seen.
const LIFETIMES: &str = "svid_lifetime: 16s";
const HTTP: u16 = 80;
const LOADERS: u64 = 4;

/// Two pods on each of two nodes: a client and a web server.
struct Stage {
    mesh: Mesh,
    clients: [Pod; 2],
    servers: [Pod; 2],
    _apaches: Vec<Apache>,
}

/// Plays the whole demonstration, and cleans up after itself.
pub(crate) fn run() -> Result<()> {
    lab::clean_up_on_interrupt(|| {
        for directory in own_directories() {
            fs::remove_dir_all(directory).ok();
        }
    })?;
    let began = Instant::now();
    let stage = set_up()?;
    let ready = began.elapsed();
    say(&format!(
        "two nodes, two pods on each, a control plane, no sidecars: up in {:.1} s",
        ready.as_secs_f64()
    ));
    let request = Canary::random();

    heading("1. The same request, without the mesh and with it, on the wire between the nodes");
    let (before, _) = stage.request(&request)?;
    before.expect_present(&request)?;
    for pod in stage.pods() {
        stage.mesh.enroll(pod)?;
    }
    let (after, seen) = stage.request(&request)?;
    after.expect_absent(&request)?;
    after.expect_tls13(|stream| stream.from_start)?;
    side_by_side(&stage, &before, &after);
    say("the header X-Secret of the request: found on the left, nowhere in any byte on the right");

    heading("2. Nobody noticed");
    for line in seen.lines() {
        say(line);
    }

    heading("3. Who the pods are, by the agents of both nodes");
    for (node, agent) in stage.mesh.nodes.iter().zip(&stage.mesh.agents) {
        say(&format!("mesh-agent status, on node {}:", node.node_name()));
        let output = agent.command(&["status"])?.output()?;
        print!("{}", indent(&String::from_utf8_lossy(&output.stdout)));
    }

    heading("4. New keys and certificates for every pod, under load");
    rotation(&stage)?;

    heading("5. kill -9 of the agent of node a, under load");
    let mut stage = stage;
    sigkill(&mut stage)?;

    drop(stage);
    println!();
    say(&format!("all of it gone again; {:.1} s in all", began.elapsed().as_secs_f64()));
    Ok(())
}

fn set_up() -> Result<Stage> {
    let settings = Settings { control: LIFETIMES, ..Settings::default() };
    let mut mesh = Mesh::with("demo", 2, settings)?;
    let clients = [mesh.plain_pod(0, "client-a")?, mesh.plain_pod(1, "client-b")?];
    let servers = [mesh.plain_pod(0, "web-a")?, mesh.plain_pod(1, "web-b")?];
    let apaches = servers.iter().map(Apache::start).collect::<Result<_>>()?;
    Ok(Stage { mesh, clients, servers, _apaches: apaches })
}

impl Stage {
    fn pods(&self) -> impl Iterator<Item = &Pod> {
        self.clients.iter().chain(&self.servers)
    }

    /// curl from `client-a` to `web-b` with a capture on the wire: what it saw, and what the two
    /// ends saw of each other.
    fn request(&self, secret: &Canary) -> Result<(Recording, String)> {
        let (client, server) = (&self.clients[0], &self.servers[1]);
        let url = format!("http://{}/", server.v4());
        let header = format!("X-Secret: {}", secret.text());
        let format = "client-a dialled %{remote_ip}:%{remote_port} from %{local_ip}\\n\
                      web-b was dialled by %header{x-client}, and answered %{http_code}\\n";
        let wire = self.mesh.lab.capture()?;
        let seen = client
            .output("curl", &["-sS", "-o", "/dev/null", "-H", &header, "-w", format, &url])?;
        Ok((wire.stop()?, seen))
    }
}

/// Load from both clients to both servers until every pod's certificate has been replaced.
fn rotation(stage: &Stage) -> Result<()> {
    let serials = |stage: &Stage| -> Result<Vec<String>> {
        let mut serials = Vec::new();
        for agent in &stage.mesh.agents {
            let status = agent.status()?;
            serials.extend(lab::mesh::serials(&status).into_iter().map(str::to_owned));
        }
        Ok(serials)
    };
    let first = serials(stage)?;
    let load = Load::default();
    let replaced = load.during(stage, || {
        until("every certificate to be replaced", || {
            let now = serials(stage).ok()?;
            now.iter().all(|serial| !first.contains(serial)).then_some(now.len())
        })
    })??;
    let (requests, failures) = (load.requests(), load.failures());
    say(&format!("{replaced} certificates replaced during {requests} requests, {failures} failed"));
    ensure!(failures == 0, "requests failed during the rotation: {}", load.first_error());
    Ok(())
}

/// Kills an agent under load: nothing leaves its pods until it is back.
fn sigkill(stage: &mut Stage) -> Result<()> {
    let secret = Canary::random();
    let wire = stage.mesh.lab.capture()?;
    let load = Load { secret: Some(secret.clone()), ..Load::default() };
    let (mut agents, rest) = (std::mem::take(&mut stage.mesh.agents), &*stage);
    let outcome = load.during(rest, || -> Result<_> {
        until("the load to run", || (load.requests() > 100).then_some(()))?;
        let agent = agents.first_mut().context("node a has an agent")?;
        agent.kill9()?;
        let client = &rest.clients[0];
        let refused = Instant::now();
        let Err(error) = client.connect(SocketAddr::new(rest.servers[1].v4(), HTTP)) else {
            bail!("a pod without an agent connected");
        };
        let refused = refused.elapsed();
        until("the load to fail", || (load.failures() > 10).then_some(()))?;
        let back = Instant::now();
        agent.start()?;
        until("a request to succeed", || load.get(client, &rest.servers[1]).ok())?;
        Ok((error, refused, back.elapsed()))
    })?;
    stage.mesh.agents = agents;
    let (error, refused, back) = outcome?;
    let recording = wire.stop()?;
    recording.expect_absent(&secret)?;
    say(&format!(
        "connect() in a pod of the dead agent: {error}, after {:.1} ms",
        refused.as_secs_f64() * 1e3
    ));
    say(&format!(
        "{} requests, {} failed; of {} frames on the wire none has a byte of plaintext",
        load.requests(),
        load.failures(),
        recording.len()
    ));
    say(&format!("restarted: requests succeed again after {:.1} s", back.as_secs_f64()));
    Ok(())
}

/// Clients that send one request after the other, and count.
#[derive(Default)]
struct Load {
    secret: Option<Canary>,
    requests: AtomicU64,
    failures: AtomicU64,
    first_error: std::sync::Mutex<Option<String>>,
    stop: AtomicBool,
}

impl Load {
    /// Runs `work` with clients on both nodes talking to the servers on both.
    fn during<T>(&self, stage: &Stage, work: impl FnOnce() -> T) -> Result<T> {
        Ok(thread::scope(|scope| {
            for number in 0..LOADERS {
                let client = &stage.clients[usize::from(number % 2 == 1)];
                let server = &stage.servers[usize::from(number < 2)];
                scope.spawn(move || {
                    while !self.stop.load(Ordering::Relaxed) {
                        self.count(self.get(client, server));
                    }
                });
            }
            let outcome = work();
            self.stop.store(true, Ordering::Relaxed);
            outcome
        }))
    }

    fn get(&self, client: &Pod, server: &Pod) -> Result<()> {
        let mut stream = client.connect(SocketAddr::new(server.v4(), HTTP))?;
        let secret = self.secret.as_ref().map_or("none", Canary::text);
        write!(
            stream,
            "GET / HTTP/1.1\r\nHost: web\r\nX-Secret: {secret}\r\nConnection: close\r\n\r\n"
        )?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        ensure!(answer.starts_with("HTTP/1.1 200") && answer.ends_with(PAGE), "{answer:?}");
        Ok(())
    }

    fn count(&self, outcome: Result<()>) {
        self.requests.fetch_add(1, Ordering::Relaxed);
        if let Err(error) = outcome {
            self.failures.fetch_add(1, Ordering::Relaxed);
            let mut first = self.first_error.lock().unwrap_or_else(|poison| poison.into_inner());
            first.get_or_insert_with(|| format!("{error:#}"));
        }
    }

    fn requests(&self) -> u64 {
        self.requests.load(Ordering::Relaxed)
    }

    fn failures(&self) -> u64 {
        self.failures.load(Ordering::Relaxed)
    }

    fn first_error(&self) -> String {
        let first = self.first_error.lock().unwrap_or_else(|poison| poison.into_inner());
        first.clone().unwrap_or_default()
    }
}

const PAGE: &str = "hello from a pod that knows nothing of any mesh\n";

/// A real web server in a pod.
struct Apache {
    _process: Process,
    _directory: TempDir,
}

impl Apache {
    fn start(pod: &Pod) -> Result<Self> {
        // Its workers are not root, and must reach the page.
        let directory = tempfile::Builder::new()
            .prefix(&directory_prefix())
            .permissions(fs::Permissions::from_mode(0o755))
            .tempdir()?;
        let path = directory.path();
        let root = path.display();
        fs::write(path.join("index.html"), PAGE)?;
        let modules: String = ["mpm_event", "authz_core", "dir", "headers"]
            .map(|name| {
                format!("LoadModule {name}_module /usr/lib/apache2/modules/mod_{name}.so\n")
            })
            .concat();
        let config = format!(
            "{modules}ServerRoot {root}\nDefaultRuntimeDir {root}\nPidFile {root}/pid\n\
             ErrorLog {root}/error.log\nDocumentRoot {root}\nServerName {name}\nListen {HTTP}\n\
             User nobody\nGroup nogroup\nHeader set X-Client expr=%{{REMOTE_ADDR}}\n",
            name = pod.pod_name(),
        );
        fs::write(path.join("httpd.conf"), config)?;
        let mut command = Command::new("apache2");
        command.arg("-f").arg(path.join("httpd.conf")).arg("-DFOREGROUND");
        let process = Process::spawn(pod, &mut command, &path.join("output.log"))?;
        let address = SocketAddr::new(pod.v4(), HTTP);
        until("the web server to listen", || pod.connect(address).ok())
            .with_context(|| process.log_tail())?;
        Ok(Self { _process: process, _directory: directory })
    }
}

fn side_by_side(stage: &Stage, before: &Recording, after: &Recording) {
    const ROWS: usize = 7;
    let column = |recording: &Recording| -> Vec<String> {
        let ends = [stage.clients[0].v4(), stage.servers[1].v4()];
        let of_interest = |segment: &Segment<'_>| {
            !segment.payload.is_empty()
                && ends.contains(&segment.source.ip())
                && ends.contains(&segment.destination.ip())
        };
        recording
            .segments()
            .filter(of_interest)
            .flat_map(|segment| {
                let arrow = if segment.source.ip() == ends[0] { "->" } else { "<-" };
                describe(segment.payload).into_iter().map(move |line| format!("{arrow} {line}"))
            })
            .take(ROWS)
            .collect()
    };
    let (left, right) = (column(before), column(after));
    println!("    {:46}| with the mesh", "without the mesh");
    println!("    {:-<46}+{:-<46}", "", "");
    let cell = |column: &[String], row: usize| column.get(row).cloned().unwrap_or_default();
    for row in 0..left.len().max(right.len()) {
        println!("    {:46}| {}", cell(&left, row), cell(&right, row));
    }
}

/// What a payload is to somebody who reads along.
fn describe(payload: &[u8]) -> Vec<String> {
    let size = payload.len();
    match payload {
        [22, 3, _, _, _, 1, ..] => vec![format!("TLS ClientHello, {size} bytes")],
        [22, 3, _, _, _, 2, ..] => vec![format!("TLS ServerHello, {size} bytes")],
        [20..=23, 3, 3, ..] => vec![format!("TLS records, {size} bytes: {}", hex(&payload[5..]))],
        _ => match std::str::from_utf8(payload) {
            Ok(text) => text
                .lines()
                .filter(|line| !line.is_empty())
                .map(|line| line.chars().take(42).collect())
                .collect(),
            Err(_) => vec![format!("{size} bytes: {}", hex(payload))],
        },
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().take(6).map(|byte| format!("{byte:02x} ")).collect::<String>() + "..."
}

fn heading(text: &str) {
    let (bold, plain) = if io::stdout().is_terminal() { ("\x1b[1m", "\x1b[0m") } else { ("", "") };
    println!("\n{bold}{text}{plain}");
}

fn say(text: &str) {
    println!("    {text}");
}

fn indent(text: &str) -> String {
    text.lines().map(|line| format!("        {line}\n")).collect()
}

/// What the names of this process's directories begin with.
fn directory_prefix() -> String {
    format!("nodemesh-demo-{}-", std::process::id())
}

fn own_directories() -> Vec<PathBuf> {
    let is_own = |path: &PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str());
        name.is_some_and(|name| name.starts_with(&directory_prefix()))
    };
    let Ok(entries) = fs::read_dir(std::env::temp_dir()) else { return Vec::new() };
    entries.flatten().map(|entry| entry.path()).filter(is_own).collect()
}
