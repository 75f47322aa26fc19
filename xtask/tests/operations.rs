//! What an operator sees and relies on, as `docs/operations.md` and `docs/control.md` promise it.

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, UdpSocket};
use std::path::Path;
use std::process::Command;
use std::thread;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use xtask::lab::mesh::{Settings, counted, pods, serials};
use xtask::lab::topology::OUTSIDE_ADDRESSES;
use xtask::lab::traffic::{accept, exchange, expect_refusal};
use xtask::lab::{Agent, Canary, Mesh, Netns, Pod, patience, until};

const PORT: u16 = 8080;
const NOBODY: u16 = 8081;

/// What a command printed on both outputs, and its exit status.
fn outcome(mut command: Command) -> Result<(i32, String)> {
    let output = command.output()?;
    let text = [output.stdout, output.stderr].concat();
    let code = output.status.code().context("ended by a signal")?;
    Ok((code, String::from_utf8(text)?))
}

/// Waits until `status` ends with this exit status and says that.
fn wait_status(command: impl Fn() -> Result<Command>, code: i32, says: &str) -> Result<()> {
    let mut last = None;
    let found = until("the status to change", || {
        let now = outcome(command().ok()?).ok()?;
        let matches = now.0 == code && now.1.contains(says);
        last = Some(now);
        matches.then_some(())
    });
    found.with_context(|| format!("wanted {code} and {says:?}, got {last:?}"))
}

#[test]
fn exit_statuses_say_how_it_is() -> Result<()> {
    let mut mesh = Mesh::with("exit_statuses_say_how_it_is", 1, Settings::default())?;
    mesh.pod(0, "pod")?;
    {
        let agent = &mesh.agents[0];
        let of_agent = || agent.command(&["status"]);
        let of_control = || mesh.control.command(&["status"]);
        wait_status(of_agent, 0, "healthy")?;
        wait_status(of_control, 0, "1 connected")?;

        let broken = agent.pods_dir().join("broken.yaml");
        fs::write(&broken, "uid: x\nnetns: /run/netns/there-is-none\n")?;
        wait_status(of_agent, 1, "broken.yaml")?;
        let (code, json) = outcome(agent.command(&["status", "--json"])?)?;
        let status: Value = serde_json::from_str(&json)?;
        let reasons = status["degraded"].to_string();
        ensure!(code == 1 && reasons.contains("broken.yaml"), "{code}: {reasons}");
        fs::remove_file(&broken)?;
        wait_status(of_agent, 0, "healthy")?;
    }

    mesh.control.process().kill9()?;
    let of_control = mesh.control.command(&["status"])?;
    ensure!(outcome(of_control)?.0 == 2, "mesh-control status without mesh-control");
    wait_status(|| mesh.agents[0].command(&["status"]), 1, "control plane")?;
    mesh.control.start()?;
    wait_status(|| mesh.agents[0].command(&["status"]), 0, "healthy")?;

    mesh.agents[0].kill9()?;
    for arguments in [&["status"][..], &["status", "--json"], &["status", "connections"]] {
        let (code, text) = outcome(mesh.agents[0].command(arguments)?)?;
        ensure!(code == 2 && text.contains("agent.sock"), "{arguments:?}: {code}, {text}");
    }
    // The control plane misses it, since it has a pod to serve.
    wait_status(|| mesh.control.command(&["status"]), 1, "node a")?;
    let status = mesh.control.status()?;
    ensure!(status["nodes_without_agent"] == serde_json::json!(["a"]), "{status:#}");
    Ok(())
}

#[test]
fn a_node_that_cannot_join_is_not_ready_and_says_so() -> Result<()> {
    let title = "a_node_that_cannot_join_is_not_ready_and_says_so";
    let mut mesh = Mesh::with(title, 1, Settings::default())?;
    let node = mesh.lab.node("b")?;
    let agent = mesh.lab.agent_with_token(&node, "this is no token", "")?;
    wait_status(|| agent.command(&["status"]), 1, "join token")?;
    let ready = agent.http("/readyz")?;
    let body = ready.split("\r\n\r\n").nth(1).unwrap_or_default();
    ensure!(ready.starts_with("HTTP/1.1 503") && !body.trim().is_empty(), "{ready}");
    ensure!(agent.http("/healthz")?.starts_with("HTTP/1.1 200"), "it does answer");
    ensure!(mesh.agents[0].http("/readyz")?.starts_with("HTTP/1.1 200"), "the other is ready");
    Ok(())
}

/// The identities of the two ends of a connection.
fn identities(client: &Pod, server: &Pod) -> [String; 2] {
    [client, server].map(|pod| format!("spiffe://lab.test/ns/default/sa/{}", pod.pod_name()))
}

#[test]
fn a_live_connection_is_seen_at_both_ends() -> Result<()> {
    let mut mesh = Mesh::new("a_live_connection_is_seen_at_both_ends")?;
    let (client, server) = (mesh.pod(0, "client")?, mesh.pod(1, "server")?);
    let listener = server.listen(PORT)?;
    let mut outgoing = client.connect(server.sockets(PORT)[0])?;
    let (mut incoming, _) = accept(&listener)?;
    outgoing.write_all(b"hello")?;
    incoming.read_exact(&mut [0; 5])?;
    incoming.write_all(b"yes")?;
    outgoing.read_exact(&mut [0; 3])?;

    let names = identities(&client, &server);
    let ends = [("outbound", &client), ("inbound", &server)];
    let mut traces = BTreeSet::new();
    for (agent, (direction, pod)) in mesh.agents.iter().zip(ends) {
        let list = |agent: &Agent| -> Result<Value> {
            let json = agent.cli(&["status", "connections", "--json"])?;
            Ok(serde_json::from_str(&json)?)
        };
        // The bytes are counted when they have been passed on.
        let entry = until("the bytes to be counted", || {
            let entry = list(agent).ok()?["connections"][0].clone();
            (entry["from_client"] == 5 && entry["from_server"] == 3).then_some(entry)
        })
        .with_context(|| format!("{:#}", list(agent).unwrap_or_default()))?;
        let to = server.sockets(PORT)[0].to_string();
        for (key, expected) in [
            ("/pod", pod.uid()),
            ("/direction", direction.to_owned()),
            ("/kind", "mtls".to_owned()),
            ("/client/address", outgoing.local_addr()?.to_string()),
            ("/client/identity", names[0].clone()),
            ("/client/uid", client.uid()),
            ("/server/address", to),
            ("/server/identity", names[1].clone()),
            ("/server/uid", server.uid()),
        ] {
            let found = entry.pointer(key).context(key)?;
            ensure!(*found == expected, "{key} is {found}, not {expected}");
        }
        traces.insert(entry["trace"].to_string());

        let text = agent.cli(&["status", "connections"])?;
        ensure!(names.iter().all(|name| text.contains(name)), "status connections: {text}");
        let text = agent.cli(&["status", "pods"])?;
        ensure!(text.contains(&pod.uid()), "status pods: {text}");
        let text = agent.cli(&["status", "certs"])?;
        let status = agent.status()?;
        let serial = *serials(&status).first().context("no certificate")?;
        ensure!(text.contains(serial), "status certs without {serial}: {text}");
    }
    ensure!(traces.len() == 1, "one connection with two traces: {traces:?}");

    drop((outgoing, incoming));
    until("the connection to be gone", || {
        let json = mesh.agents[0].cli(&["status", "connections", "--json"]).ok()?;
        let status: Value = serde_json::from_str(&json).ok()?;
        (status["connections"] == serde_json::json!([])).then_some(())
    })
}

#[test]
fn finished_connections_are_one_line_in_the_access_log() -> Result<()> {
    let settings = Settings { agent: "log: {format: json}", ..Settings::default() };
    let title = "finished_connections_are_one_line_in_the_access_log";
    let mut mesh = Mesh::with(title, 2, settings)?;
    let (client, server) = (mesh.pod(0, "client")?, mesh.pod(1, "server")?);
    let unknown = mesh.plain_pod(0, "unknown")?;
    let _server = server.serve(PORT, |mut stream| {
        // A connection that breaks is the client's to notice.
        stream.read_to_end(&mut Vec::new()).and_then(|_| stream.write_all(b"yes")).ok();
    })?;
    let mut stream = client.connect(server.sockets(PORT)[0])?;
    let own = stream.local_addr()?.to_string();
    stream.write_all(b"hello")?;
    stream.shutdown(std::net::Shutdown::Write)?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    expect_refusal(&client, unknown.sockets(PORT)[0], b"")?;

    let names = identities(&client, &server);
    let mut traces = BTreeSet::new();
    for (agent, direction) in mesh.agents.iter_mut().zip(["outbound", "inbound"]) {
        let lines = until("the access log to have a line", || {
            let lines = access_log(agent, "mtls").ok()?;
            (!lines.is_empty()).then_some(lines)
        })?;
        ensure!(lines.len() == 1, "{} lines: {lines:#?}", lines.len());
        let line = &lines[0];
        for (key, expected) in [
            ("direction", direction),
            ("client", &own),
            ("client_id", &names[0]),
            ("client_uid", &client.uid()),
            ("server", &server.sockets(PORT)[0].to_string()),
            ("server_id", &names[1]),
            ("server_uid", &server.uid()),
            ("end", "finished"),
        ] {
            ensure!(line[key] == *expected, "{key} is {}, not {expected}", line[key]);
        }
        ensure!(line["from_client"] == 5 && line["from_server"] == 3, "bytes: {line:#}");
        ensure!(line["duration_ms"].is_u64(), "duration: {line:#}");
        traces.insert(line["trace"].to_string());
    }
    ensure!(traces.len() == 1, "one connection with two traces: {traces:?}");

    let denied = until("the refusal to be logged", || {
        let lines = access_log(&mut mesh.agents[0], "denied").ok()?;
        (!lines.is_empty()).then_some(lines)
    })?;
    ensure!(denied.len() == 1, "{denied:#?}");
    ensure!(denied[0]["reason"] == "unknown-in-cluster", "{:#}", denied[0]);
    ensure!(denied[0]["client_id"] == *names[0] && denied[0]["server_id"].is_null(), "{denied:?}");
    Ok(())
}

/// The lines of a kind in an agent's access log.
fn access_log(agent: &mut Agent, kind: &str) -> Result<Vec<Value>> {
    let log = agent.process().log()?;
    let lines = log.lines().map(serde_json::from_str::<Value>).collect::<Result<Vec<_>, _>>()?;
    let wanted = |line: &Value| line["target"] == "access" && line["kind"] == *kind;
    Ok(lines.into_iter().filter(wanted).collect())
}

/// What the pages of documentation name is there, and nothing that they do not name.
#[test]
fn probes_and_metrics_are_as_documented() -> Result<()> {
    let settings = Settings { agent: "udp: deny", ..Settings::default() };
    let mut mesh = Mesh::with("probes_and_metrics_are_as_documented", 2, settings)?;
    let (client, server) = (mesh.pod(0, "client")?, mesh.pod(1, "server")?);
    let unknown = mesh.plain_pod(0, "unknown")?;
    // So that everything that can be counted is.
    let _echo = server.echo(PORT)?;
    exchange(client.connect(server.sockets(PORT)[0])?, b"hello")?;
    expect_refusal(&client, unknown.sockets(PORT)[0], b"")?;
    client.run(|| UdpSocket::bind("0.0.0.0:0")?.send_to(b"hello", server.sockets(PORT)[0])).ok();

    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs");
    let of_agents = documented(&docs.join("operations.md"))?;
    let of_control = documented(&docs.join("control.md"))?;
    until("a refusal at the control plane", || {
        mesh.control.netns().run(|| {
            let mut stream = std::net::TcpStream::connect("127.0.0.1:8443").ok()?;
            stream.write_all(b"GET / HTTP/1.1\r\n\r\n").ok()?;
            stream.read_to_end(&mut Vec::new()).ok();
            Some(())
        })
    })?;

    for page in ["/healthz", "/readyz", "/metrics"] {
        for answer in [mesh.agents[0].http(page)?, mesh.control.http(page)?] {
            ensure!(answer.starts_with("HTTP/1.1 200"), "{page}: {answer}");
        }
    }
    let check = |what: &str, page: &dyn Fn() -> Result<String>, documented: &BTreeSet<String>| {
        let mut found = BTreeSet::new();
        until("every documented metric to be there", || {
            found = names(&page().ok()?);
            found.is_superset(documented).then_some(())
        })
        .with_context(|| {
            let missing: Vec<_> = documented.difference(&found).collect();
            format!("{what} does not have {missing:?}")
        })?;
        let more: Vec<_> = found.difference(documented).collect();
        ensure!(more.is_empty(), "{what} has {more:?}, which nobody has documented");
        Ok(())
    };
    check("mesh-agent", &|| mesh.agents[0].http("/metrics"), &of_agents)?;
    check("mesh-control", &|| mesh.control.http("/metrics"), &of_control)?;

    let page = mesh.agents[0].http("/metrics")?;
    let line = |name: &str, labels: &[&str]| {
        page.lines()
            .find(|line| line.starts_with(name) && labels.iter().all(|label| line.contains(label)))
            .and_then(|line| line.rsplit(' ').next())
            .map(str::to_owned)
    };
    let labels = ["pod=\"default/client\"", "direction=\"outbound\""];
    let mtls = [labels[0], labels[1], "kind=\"mtls\""];
    let opened = line("nodemesh_connections_total", &mtls);
    ensure!(opened.as_deref() == Some("1"), "connections: {opened:?}\n{page}");
    let denied = line("nodemesh_connections_denied_total", &labels);
    ensure!(denied.as_deref() == Some("1"), "denied: {denied:?}\n{page}");
    Ok(())
}

/// The names in the first column of a page's tables; three dots stand for what they all begin with.
fn documented(page: &Path) -> Result<BTreeSet<String>> {
    let text = fs::read_to_string(page)?;
    let cells = text.lines().filter_map(|line| line.strip_prefix("| ")?.split(" | ").next());
    let quoted = cells.flat_map(|cell| cell.split('`').skip(1).step_by(2));
    Ok(quoted
        .map(|name| name.split('{').next().unwrap_or_default())
        .map(|name| name.replace("...", "nodemesh_control"))
        .filter(|name| name.starts_with("nodemesh_"))
        .collect())
}

/// The names of the samples on a page of metrics.
fn names(page: &str) -> BTreeSet<String> {
    page.lines()
        .filter(|line| line.starts_with("nodemesh_"))
        .filter_map(|line| Some(line.split(['{', ' ']).next()?.to_owned()))
        .collect()
}

#[test]
fn udp_passes_where_it_may() -> Result<()> {
    const DNS: u16 = 53;
    let settings = Settings { agent: "udp: deny", ..Settings::default() };
    let mut mesh = Mesh::with("udp_passes_where_it_may", 1, settings)?;
    let denied = mesh.pod(0, "denied")?;
    let allowed = mesh.plain_pod(0, "allowed")?;
    mesh.control.register(&allowed)?;
    mesh.wait_synced()?;
    let path = allowed.path();
    let path = path.to_str().context("a namespace's path is text")?;
    mesh.agents[0].cli(&["enroll", "--uid", &allowed.uid(), "--netns", path, "--udp", "allow"])?;
    let outside = mesh.lab.outside()?;
    for (port, address) in [PORT, DNS]
        .into_iter()
        .flat_map(|port| OUTSIDE_ADDRESSES.into_iter().map(move |address| (port, address)))
    {
        echo_datagrams(&outside, SocketAddr::new(address.parse()?, port))?;
    }

    for (pod, passes) in [(&denied, false), (&allowed, true)] {
        let before = drops(&mesh, pod)?;
        for address in OUTSIDE_ADDRESSES {
            let canary = Canary::random();
            let wire = mesh.lab.capture()?;
            let to = |port| Ok::<_, anyhow::Error>(SocketAddr::new(address.parse()?, port));
            let socket = pod.run(|| UdpSocket::bind("[::]:0"))?;
            socket.set_read_timeout(Some(patience()))?;
            // The sender may be told, or not.
            let sent = socket.send_to(canary.bytes(), mapped(to(PORT)?));
            if passes {
                sent?;
                let mut answer = [0; 32];
                socket.recv(&mut answer).context("an answer to allowed UDP")?;
                ensure!(answer == *canary.bytes(), "{answer:02x?}");
            }
            // DNS passes for both, and after it whatever was sent before would have.
            socket.send_to(b"query", mapped(to(DNS)?))?;
            let mut answer = [0; 64];
            let length = socket.recv(&mut answer).context("an answer of DNS")?;
            ensure!(&answer[..length] == b"query", "{:02x?}", &answer[..length]);
            let recording = wire.stop()?;
            ensure!(recording.contains(&canary) == passes, "passes: {}", !passes);
        }
        let dropped = drops(&mesh, pod)? - before;
        ensure!(dropped == if passes { 0 } else { 2 }, "{dropped} dropped datagrams were counted");
        let status = mesh.agents[0].status()?;
        let policy = pods(&status).find(|entry| entry["uid"] == *pod.uid()).map(|pod| &pod["udp"]);
        let expected = if passes { "allow" } else { "deny" };
        ensure!(policy.is_some_and(|policy| policy == expected), "udp: {policy:?}");
    }
    Ok(())
}

fn drops(mesh: &Mesh, pod: &Pod) -> Result<u64> {
    let mut status = mesh.agents[0].status()?;
    let all = status["pods"].as_array_mut().context("no pods")?;
    all.retain(|entry| entry["uid"] == *pod.uid());
    Ok(counted(&status, "drops", "reason", "udp"))
}

/// As an address of a socket for both families.
fn mapped(address: SocketAddr) -> SocketAddr {
    match address.ip() {
        std::net::IpAddr::V4(v4) => SocketAddr::new(v4.to_ipv6_mapped().into(), address.port()),
        std::net::IpAddr::V6(_) => address,
    }
}

/// Answers datagrams as long as the process lives, which holds nothing but a thread.
fn echo_datagrams(netns: &Netns, at: SocketAddr) -> Result<()> {
    let socket = netns.run(|| UdpSocket::bind(at))?;
    thread::spawn(move || {
        let mut datagram = [0; 2048];
        while let Ok((length, from)) = socket.recv_from(&mut datagram) {
            if socket.send_to(&datagram[..length], from).is_err() {
                return;
            }
        }
    });
    Ok(())
}

/// Nothing of a pod stays in the kernel once its namespace is gone, and its neighbour's does.
#[test]
fn a_deleted_pod_is_swept() -> Result<()> {
    let mut mesh = Mesh::new("a_deleted_pod_is_swept")?;
    let (client, server) = (mesh.pod(0, "client")?, mesh.pod(1, "server")?);
    let neighbour = pinned(&mesh.agents[1])?;
    ensure!(neighbour.len() == 1, "pinned for one pod: {neighbour:?}");
    let doomed = mesh.pod(1, "doomed")?;
    ensure!(pinned(&mesh.agents[1])?.len() == 2, "pinned for two pods: {neighbour:?}");

    mesh.lab.delete_pod(&doomed)?;
    // Whoever holds its file keeps the namespace alive.
    drop(doomed);
    until("what was pinned for the pod to be gone", || {
        (pinned(&mesh.agents[1]).ok()? == neighbour).then_some(())
    })?;
    let status = mesh.agents[1].status()?;
    let left: Vec<_> = pods(&status).map(|pod| &pod["uid"]).collect();
    ensure!(left == [&Value::from(server.uid())], "enrolled: {left:?}");
    let _echo = server.echo(PORT)?;
    exchange(client.connect(server.sockets(PORT)[0])?, b"still here")?;
    expect_refusal(&client, server.sockets(NOBODY)[0], b"")
}

/// The pods for which an agent has pinned something.
fn pinned(agent: &Agent) -> Result<BTreeSet<String>> {
    let mut found = BTreeSet::new();
    for version in fs::read_dir(agent.bpffs().join("nodemesh"))? {
        for pod in fs::read_dir(version?.path().join("pods"))? {
            found.insert(pod?.path().display().to_string());
        }
    }
    Ok(found)
}
