//! Who gets a certificate, for how long it is good, and who is refused.

#[path = "support/thief.rs"]
mod thief;

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;
use tonic::Code;
use xtask::lab::mesh::{Settings, pods, serials};
use xtask::lab::traffic::{exchange, expect_refusal};
use xtask::lab::{Canary, Load, Mesh, Pod, span, until};

const PORT: u16 = 8080;

/// `svid_lifetime` in seconds.
fn mesh(title: &str, svid_lifetime: u64) -> Result<Mesh> {
    let control = format!("svid_lifetime: {}s", span(svid_lifetime));
    Mesh::with(title, 2, Settings { control: &control, ..Settings::default() })
}

fn certificates(mesh: &Mesh) -> Result<Vec<String>> {
    let mut all = Vec::new();
    for agent in &mesh.agents {
        all.extend(serials(&agent.status()?).into_iter().map(str::to_owned));
    }
    Ok(all)
}

/// Waits until no certificate is one of these any more.
fn wait_replaced(mesh: &Mesh, old: &[String]) -> Result<()> {
    until("every certificate to be replaced", || {
        let now = certificates(mesh).ok()?;
        let replaced = now.iter().all(|serial| !old.contains(serial));
        (replaced && now.len() == old.len()).then_some(())
    })
}

fn refusals(mesh: &Mesh) -> Result<u64> {
    let status = mesh.control.status()?;
    let refused = status["refused"].as_object().context("the status counts no refusals")?;
    Ok(refused.values().filter_map(Value::as_u64).sum())
}

#[test]
fn certificates_of_ten_seconds_for_two_minutes() -> Result<()> {
    let mut mesh = mesh("certificates_of_ten_seconds_for_two_minutes", 10)?;
    let (client, server) = (mesh.pod(0, "client")?, mesh.pod(1, "server")?);
    let load = Load::new(&client, &server, PORT)?;
    let end = Instant::now() + Duration::from_secs(120);
    let mut generations = 0;
    let mut long_lived = client.connect(server.sockets(PORT)[0])?;
    load.during(|| {
        while Instant::now() < end {
            let old = certificates(&mesh)?;
            wait_replaced(&mesh, &old)?;
            generations += 1;
            // A live connection does not notice.
            long_lived.write_all(&[generations])?;
            let mut answer = [0];
            long_lived.read_exact(&mut answer)?;
            ensure!(answer == [generations], "the live connection answers {answer:?}");
        }
        Ok(())
    })?;
    // Renewed at half of that time, give or take a tenth of it.
    let most = 120 / (span(10) / 2);
    ensure!(
        8 * u64::from(generations) >= 5 * most,
        "only {generations} generations of certificates"
    );
    load.expect_no_failures()
}

/// The tunnels of before end with either certificate: one that is there was made in advance.
#[test]
fn tunnels_are_made_anew_with_certificates() -> Result<()> {
    let mut mesh = mesh("tunnels_are_made_anew_with_certificates", 16)?;
    let (client, server) = (mesh.pod(0, "client")?, mesh.pod(1, "server")?);
    let _echo = server.echo(PORT)?;
    let to = server.sockets(PORT)[0];
    exchange(client.connect(to)?, b"a habit")?;
    for _ in 0..2 {
        let old = certificates(&mesh)?;
        wait_replaced(&mesh, &old)?;
        until("a tunnel in advance", || {
            let status = mesh.status_of(&client).ok()?;
            (status["idle_tunnels"].as_u64()? > 0).then_some(())
        })?;
    }
    exchange(client.connect(to)?, b"hello")
}

#[test]
fn the_control_plane_away_for_half_a_lifetime() -> Result<()> {
    let mut mesh = mesh("the_control_plane_away_for_half_a_lifetime", 24)?;
    let (client, server) = (mesh.pod(0, "client")?, mesh.pod(1, "server")?);
    let load = Load::new(&client, &server, PORT)?;
    load.during(|| {
        let old = certificates(&mesh)?;
        mesh.control.process().kill9()?;
        until("both agents to have tried to renew", || {
            let trying = |pod: &Value| pod["certificate_problem"].is_string();
            mesh.agents
                .iter()
                .all(|agent| agent.status().is_ok_and(|status| pods(&status).all(trying)))
                .then_some(())
        })?;
        load.wait_for_successes(20)?;
        ensure!(certificates(&mesh)? == old, "certificates from nowhere");
        mesh.control.start()?;
        wait_replaced(&mesh, &old)
    })?;
    load.expect_no_failures()
}

#[test]
fn expired_certificates_are_worth_nothing() -> Result<()> {
    let mut mesh = mesh("expired_certificates_are_worth_nothing", 4)?;
    let (client, server) = (mesh.pod(0, "client")?, mesh.pod(1, "server")?);
    let load = Load::new(&client, &server, PORT)?;
    let wire = mesh.lab.capture()?;
    load.during(|| {
        load.wait_for_successes(10)?;
        mesh.control.process().kill9()?;
        load.wait_for_failures(3)?;
        mesh.control.start()?;
        load.wait_for_successes(10)
    })?;
    let recording = wire.stop()?;
    load.canaries().iter().try_for_each(|canary| recording.expect_absent(canary))
}

#[test]
fn deregistered_pods_are_refused() -> Result<()> {
    for (title, client_goes) in [("deregistered_client", true), ("deregistered_server", false)] {
        let mut mesh = Mesh::new(title)?;
        let (client, server) = (mesh.pod(0, "client")?, mesh.pod(1, "server")?);
        let _echo = server.echo(PORT)?;
        let canary = Canary::random();
        let to = server.sockets(PORT)[0];
        exchange(client.connect(to)?, canary.bytes())?;
        let wire = mesh.lab.capture()?;
        mesh.control.deregister(if client_goes { &client } else { &server })?;
        mesh.wait_synced()?;
        expect_refusal(&client, to, canary.bytes()).context(title)?;
        wire.stop()?.expect_absent(&canary)?;
    }
    Ok(())
}

/// Enough connections of one pair that most of them share tunnels: none notices a rotation, and all
/// end with the registration.
#[test]
fn connections_that_share_tunnels_outlive_certificates_and_not_the_registration() -> Result<()> {
    const CONNECTIONS: usize = 40;
    let mut mesh = mesh("connections_that_share_tunnels", 16)?;
    let (client, server) = (mesh.pod(0, "client")?, mesh.pod(1, "server")?);
    let _echo = server.echo(PORT)?;
    let to = server.sockets(PORT)[0];
    let canary = Canary::random();
    let wire = mesh.lab.capture()?;
    let open = || (0..CONNECTIONS).map(|_| client.connect(to)).collect::<std::io::Result<Vec<_>>>();
    let exchange = |connections: &mut [TcpStream]| -> Result<()> {
        for connection in &mut *connections {
            connection.write_all(canary.bytes())?;
        }
        for (n, connection) in connections.iter_mut().enumerate() {
            let mut answer = vec![0; canary.bytes().len()];
            connection.read_exact(&mut answer).with_context(|| format!("connection {n}"))?;
            ensure!(answer == canary.bytes(), "connection {n} answers {answer:?}");
        }
        Ok(())
    };
    let handshakes = |mesh: &Mesh| -> Result<u64> {
        let status = mesh.status_of(&server)?;
        let counted = status["handshakes"].as_array().context("no handshakes")?;
        let ok = counted.iter().filter(|it| it["result"] == "ok" && it["direction"] == "inbound");
        Ok(ok.filter_map(|it| it["count"].as_u64()).sum())
    };
    let mut first = open()?;
    exchange(&mut first)?;
    let shaken = handshakes(&mesh)?;
    // Four alone, two tunnels per processor pair, and what was made in advance.
    ensure!(shaken < CONNECTIONS as u64 / 2, "{shaken} handshakes for {CONNECTIONS} connections");
    let shared = mesh.status_of(&client)?["shared_tunnels"].as_u64();
    ensure!(shared >= Some(2), "{shared:?} tunnels are shared");
    let old = certificates(&mesh)?;
    wait_replaced(&mesh, &old)?;
    exchange(&mut first).context("after the rotation")?;
    let mut second = open()?;
    exchange(&mut second).context("opened after the rotation")?;
    ensure!(handshakes(&mesh)? > shaken, "new connections rest on an old certificate");
    mesh.control.deregister(&server)?;
    for connection in first.iter_mut().chain(&mut second) {
        let end = connection.read(&mut [0]).map_err(|error| error.kind());
        ensure!(end == Err(ErrorKind::ConnectionReset), "after the registration: {end:?}");
    }
    wire.stop()?.expect_absent(&canary)
}

#[test]
fn open_connections_of_deregistered_pods_are_cut() -> Result<()> {
    for (title, client_goes) in [("cut_with_the_client", true), ("cut_with_the_server", false)] {
        let mut mesh = Mesh::new(title)?;
        let (client, server) = (mesh.pod(0, "client")?, mesh.pod(1, "server")?);
        let (other, stays) = (mesh.pod(0, "other")?, mesh.pod(1, "stays")?);
        let _echoes = (server.echo(PORT)?, stays.echo(PORT)?);
        let say = |connection: &mut TcpStream| -> Result<()> {
            let mut answer = [0];
            connection.write_all(&[7])?;
            connection.read_exact(&mut answer)?;
            ensure!(answer == [7], "it answers {answer:?}");
            Ok(())
        };
        let mut cut = client.connect(server.sockets(PORT)[0])?;
        let mut kept = other.connect(stays.sockets(PORT)[0])?;
        say(&mut cut)?;
        say(&mut kept)?;

        mesh.control.deregister(if client_goes { &client } else { &server })?;
        let end = cut.read(&mut [0]).map_err(|error| error.kind());
        ensure!(end == Err(ErrorKind::ConnectionReset), "{title}: {end:?}");
        say(&mut kept).context("of pods that stay")?;
        // By one agent at least: where the other one was first, the tunnel has told of it.
        let revoked = || -> Result<u64> {
            let counts = mesh.agents.iter().map(|agent| {
                let status = agent.status()?;
                Ok(pods(&status).filter_map(|pod| pod["revoked"].as_u64()).sum::<u64>())
            });
            counts.sum()
        };
        until("the cut to be counted", || revoked().is_ok_and(|count| count > 0).then_some(()))?;
    }
    Ok(())
}

/// As in a cluster, where pods run before the registry knows them.
#[test]
fn a_pod_that_has_just_started_waits_to_be_registered() -> Result<()> {
    let mut mesh = Mesh::new("a_pod_that_has_just_started_waits_to_be_registered")?;
    let server = mesh.pod(1, "server")?;
    let (early, nobody) = (mesh.plain_pod(0, "early")?, mesh.plain_pod(0, "nobody")?);
    for pod in [&early, &nobody] {
        let path = pod.path().display().to_string();
        mesh.agents[0].cli(&["enroll", "--uid", &pod.uid(), "--netns", &path, "--wait", "0"])?;
    }
    let _echo = server.echo(PORT)?;
    let wire = mesh.lab.capture()?;
    let canary = Canary::random();
    for to in server.sockets(PORT) {
        expect_refusal(&nobody, to, canary.bytes())?;
    }
    let to = server.sockets(PORT);
    let waiting = [early.connect(to[0])?, early.connect(to[1])?];
    mesh.control.register(&early)?;
    for stream in waiting {
        exchange(stream, canary.bytes())?;
    }
    wire.stop()?.expect_absent(&canary)?;
    ensure!(mesh.denied(0)? == 2, "somebody else was refused");
    Ok(())
}

#[test]
fn a_token_is_good_once_and_for_one_node() -> Result<()> {
    let mut mesh = Mesh::with("a_token_is_good_once_and_for_one_node", 1, Settings::default())?;
    let (node_b, node_c) = (mesh.lab.node("b")?, mesh.lab.node("c")?);
    let token = mesh.control.token("b")?;
    let refused = |mesh: &Mesh, before: u64| {
        until("the token to be refused", || (refusals(mesh).ok()? > before).then_some(()))
    };

    // Stolen by another node. It is not used up by that.
    let before = refusals(&mesh)?;
    let thief = mesh.lab.agent_with_token(&node_c, &token, "")?;
    until("the thief to give up or be refused", || {
        let refused = refusals(&mesh).ok()? > before;
        let status = thief.status().ok();
        let complains = status.is_some_and(|status| status["control_plane"]["problem"].is_string());
        (refused || complains).then_some(())
    })?;
    ensure!(!joined(&mesh, "c")?, "joined with a token for another node");
    drop(thief);

    let mut rightful = mesh.lab.agent_with_token(&node_b, &token, "")?;
    rightful.wait_ready()?;
    ensure!(joined(&mesh, "b")?, "the token was good for this node");
    rightful.kill9()?;

    // Used again, by somebody who copied it from the node.
    std::fs::remove_dir_all(rightful.runtime_dir())?;
    let before = refusals(&mesh)?;
    let again = mesh.lab.agent_with_token(&node_b, &token, "")?;
    refused(&mesh, before)?;
    ensure!(!joined(&mesh, "b")?, "joined twice with one token");
    drop(again);
    Ok(())
}

fn joined(mesh: &Mesh, node: &str) -> Result<bool> {
    let status = mesh.control.status()?;
    Ok(status["agents"][node].is_object())
}

#[test]
fn a_node_gets_no_certificate_for_a_pod_of_another() -> Result<()> {
    let mut mesh = Mesh::new("a_node_gets_no_certificate_for_a_pod_of_another")?;
    let victim = mesh.plain_pod(0, "victim")?;
    mesh.control.register(&victim)?;
    mesh.wait_synced()?;
    // The agent of node b claims the UID for a namespace of its own.
    let impostor = mesh.plain_pod(1, "impostor")?;
    let path = impostor.path();
    let path = path.to_str().context("a path is text")?;
    let before = refusals(&mesh)?;
    let mut enroll = mesh.agents[1].command(&[
        "enroll",
        "--wait",
        "0",
        "--uid",
        &victim.uid(),
        "--netns",
        path,
    ])?;
    // Whether the agent asks or knows better: there is no certificate.
    enroll.output()?;
    let status = mesh.agents[1].status()?;
    ensure!(serials(&status).is_empty(), "a certificate for another node's pod: {status:#}");
    until("the agent or the control plane to refuse", || {
        let status = mesh.agents[1].status().ok()?;
        let told = pods(&status).any(|pod| pod["certificate_problem"].is_string());
        (told || pods(&status).count() == 0 || refusals(&mesh).ok()? > before).then_some(())
    })
}

/// The agent of node b would not even ask; whoever has stolen its key does.
#[test]
fn a_stolen_node_key_is_good_for_its_own_pods_only() -> Result<()> {
    let mut mesh = Mesh::new("a_stolen_node_key_is_good_for_its_own_pods_only")?;
    let (own, other) = (mesh.plain_pod(1, "own")?, mesh.plain_pod(0, "other")?);
    for pod in [&own, &other] {
        mesh.control.register(pod)?;
    }
    let refused = |reason: &str| -> Result<u64> {
        Ok(mesh.control.status()?["refused"][reason].as_u64().unwrap_or(0))
    };
    let ask = |uid: &str| thief::issue_svid(&mesh.agents[1], &mesh.nodes[1], uid);

    let leaf = ask(&own.uid())?.context("for the node's own pod")?;
    ensure!(leaf.pod.is_some_and(|pod| pod.uid == own.uid()), "for another pod");
    let mut texts = Vec::new();
    for (uid, reason) in [(other.uid(), "pod-foreign"), ("uid-nowhere".to_owned(), "pod-unknown")] {
        let before = refused(reason)?;
        let Err(status) = ask(&uid)? else { bail!("a certificate for {uid}") };
        ensure!(status.code() == Code::PermissionDenied, "{uid}: {status}");
        ensure!(refused(reason)? == before + 1, "{uid}: not counted as {reason}");
        texts.push(status.message().replace(&uid, "UID"));
    }
    // A thief does not learn which pods there are.
    ensure!(texts[0] == texts[1], "told apart: {texts:?}");
    Ok(())
}

#[test]
fn the_next_pod_with_an_address_is_somebody_else() -> Result<()> {
    let mut mesh = Mesh::new("the_next_pod_with_an_address_is_somebody_else")?;
    let (client, server) = (mesh.pod(0, "client")?, mesh.pod(1, "server")?);
    let to = server.sockets(PORT)[0];
    {
        let _echo = server.echo(PORT)?;
        exchange(client.connect(to)?, b"the first one")?;
    }
    let canary = Canary::random();
    let wire = mesh.lab.capture()?;
    let node = mesh.nodes[1].clone();
    mesh.lab.delete_pod(&server)?;
    let heir = mesh.lab.pod_in_place_of(&node, &server, "heir")?;
    {
        // Not in the mesh, under an address that still is.
        let _echo = heir.echo(PORT)?;
        expect_refusal(&client, to, canary.bytes()).context("before it is registered")?;
    }
    wait_unenrolled(&mesh, &server)?;
    mesh.control.deregister(&server)?;
    mesh.enroll(&heir)?;
    let _echo = heir.echo(PORT)?;
    exchange(client.connect(to)?, canary.bytes()).context("once it is in the mesh")?;
    wire.stop()?.expect_absent(&canary)
}

fn wait_unenrolled(mesh: &Mesh, pod: &Pod) -> Result<()> {
    let agent = mesh.agent_of(pod)?;
    until("the agent to drop the pod that is gone", || {
        let status = agent.status().ok()?;
        (!pods(&status).any(|entry| entry["uid"] == *pod.uid())).then_some(())
    })
}
