//! What happens to traffic when the agent, the control plane or the pod's own configuration goes
//! wrong: it stops, it never becomes plaintext, and it comes back by itself.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::thread;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;
use xtask::lab::mesh::pods;
use xtask::lab::traffic::{accept, exchange};
use xtask::lab::{Canary, Load, Mesh, Pod, until};

const PORT: u16 = 8080;

struct Pair {
    mesh: Mesh,
    client: Pod,
    server: Pod,
}

fn pair(title: &str) -> Result<Pair> {
    let mut mesh = Mesh::new(title)?;
    let (client, server) = (mesh.pod(0, "client")?, mesh.pod(1, "server")?);
    Ok(Pair { mesh, client, server })
}

fn connection(client: &Pod, server: &Pod) -> Result<(TcpStream, TcpStream)> {
    let listener = server.listen(PORT + 1)?;
    let outgoing = client.connect(server.sockets(PORT + 1)[0])?;
    let (incoming, _) = accept(&listener)?;
    Ok((outgoing, incoming))
}

fn expect_error(mut stream: &TcpStream, expected: ErrorKind) -> Result<()> {
    match stream.read(&mut [0; 16]) {
        Ok(count) => bail!("read {count} bytes instead of failing with {expected}"),
        Err(error) => {
            ensure!(error.kind() == expected, "{error} instead of {expected}");
            Ok(())
        }
    }
}

#[test]
fn without_its_agent_a_pod_is_refused_at_once() -> Result<()> {
    let Pair { mut mesh, client, server } = pair("without_its_agent_a_pod_is_refused_at_once")?;
    let _echo = server.echo(PORT)?;
    let [v4, v6] = server.sockets(PORT);
    let IpAddr::V4(address) = v4.ip() else { bail!("the first address is IPv4") };
    let mapped = SocketAddr::new(address.to_ipv6_mapped().into(), PORT);
    for address in [v4, v6, mapped] {
        exchange(client.connect(address)?, b"with the agent")?;
    }
    mesh.agents[0].kill9()?;
    for address in [v4, v6, mapped] {
        let Err(error) = client.connect(address) else { bail!("connected to {address}") };
        ensure!(error.kind() == ErrorKind::ConnectionRefused, "{address}: {error}");
    }
    Ok(())
}

#[test]
fn a_stream_cut_by_a_killed_agent_is_reset() -> Result<()> {
    for (victim, title) in [(0, "killed_at_the_client"), (1, "killed_at_the_server")] {
        let Pair { mut mesh, client, server } = pair(title)?;
        let (mut outgoing, mut incoming) = connection(&client, &server)?;
        outgoing.write_all(b"half a mess")?;
        incoming.read_exact(&mut [0; 11])?;
        mesh.agents[victim].kill9()?;
        expect_error(&outgoing, ErrorKind::ConnectionReset)
            .with_context(|| format!("{title}: client"))?;
        expect_error(&incoming, ErrorKind::ConnectionReset)
            .with_context(|| format!("{title}: server"))?;
    }
    Ok(())
}

#[test]
fn killed_under_load_nothing_is_in_the_clear() -> Result<()> {
    let Pair { mut mesh, client, server } = pair("killed_under_load_nothing_is_in_the_clear")?;
    let load = Load::new(&client, &server, PORT)?;
    let wire = mesh.lab.capture()?;
    load.during(|| {
        load.wait_for_successes(50)?;
        for victim in [0, 1] {
            mesh.agents[victim].kill9()?;
            load.wait_for_failures(50)?;
            mesh.agents[victim].start()?;
            load.wait_for_successes(50)?;
        }
        Ok(())
    })?;
    wire.stop()?.expect_absent(load.canary())
}

#[test]
fn an_agent_comes_back_without_the_control_plane() -> Result<()> {
    let Pair { mut mesh, client, server } = pair("an_agent_comes_back_without_the_control_plane")?;
    let load = Load::new(&client, &server, PORT)?;
    mesh.control.process().kill9()?;
    let wire = mesh.lab.capture()?;
    load.during(|| {
        load.wait_for_successes(50)?;
        for victim in [0, 1] {
            mesh.agents[victim].kill9()?;
            mesh.agents[victim].start()?;
            load.wait_for_successes(50)?;
        }
        Ok(())
    })?;
    wire.stop()?.expect_absent(load.canary())
}

#[test]
fn a_stopped_agent_makes_wait_and_goes_on() -> Result<()> {
    let Pair { mesh, client, server } = pair("a_stopped_agent_makes_wait_and_goes_on")?;
    let _echo = server.echo(PORT)?;
    let canary = Canary::random();
    let (mut outgoing, mut incoming) = connection(&client, &server)?;
    let wire = mesh.lab.capture()?;
    mesh.agents[0].stop()?;
    let waiting = server.sockets(PORT).map(|address| {
        let (client, canary) = (client.clone(), canary.clone());
        thread::spawn(move || exchange(client.connect(address)?, canary.bytes()))
    });
    outgoing.write_all(canary.bytes())?;
    incoming.set_read_timeout(Some(std::time::Duration::from_millis(200)))?;
    expect_error(&incoming, ErrorKind::WouldBlock)?;
    for thread in &waiting {
        ensure!(!thread.is_finished(), "answered without an agent");
    }
    mesh.agents[0].cont()?;
    for thread in waiting {
        thread.join().expect("the client does not panic")?;
    }
    incoming.set_read_timeout(Some(xtask::lab::PATIENCE))?;
    let mut received = [0; 32];
    incoming.read_exact(&mut received)?;
    ensure!(received == canary.bytes(), "what was sent meanwhile arrives");
    wire.stop()?.expect_absent(&canary)
}

#[test]
fn connections_from_before_the_enrolment_are_aborted() -> Result<()> {
    let mut mesh = Mesh::new("connections_from_before_the_enrolment_are_aborted")?;
    let (client, server) = (mesh.plain_pod(0, "client")?, mesh.plain_pod(1, "server")?);
    let (mut outgoing, mut incoming) = connection(&client, &server)?;
    outgoing.write_all(b"before")?;
    incoming.read_exact(&mut [0; 6])?;
    mesh.enroll(&client)?;
    expect_error(&outgoing, ErrorKind::ConnectionAborted)?;
    let entry = status_of(&mesh, &client)?;
    ensure!(entry["aborted"].as_u64() >= Some(1), "not counted: {entry:#}");
    Ok(())
}

fn status_of(mesh: &Mesh, pod: &Pod) -> Result<Value> {
    let status = mesh.agent_of(pod)?.status()?;
    let entry = pods(&status).find(|entry| entry["uid"] == *pod.uid()).cloned();
    entry.context("the status does not list the pod")
}

#[test]
fn tampering_inside_the_pod_is_repaired() -> Result<()> {
    let Pair { mesh, client, server } = pair("tampering_inside_the_pod_is_repaired")?;
    let _echo = server.echo(PORT)?;
    let intact = routing(&client)?;
    let (preference, table) = capture_rule(&client)?;
    let canary = Canary::random();
    let wire = mesh.lab.capture()?;
    for family in ["-4", "-6"] {
        for damage in
            [&["rule", "del", "pref", &preference][..], &["route", "flush", "table", &table]]
        {
            client.output("ip", &[&[family], damage].concat())?;
            until("the damage to be repaired", || (routing(&client).ok()? == intact).then_some(()))
                .with_context(|| format!("ip {family} {}", damage.join(" ")))?;
        }
    }
    client.sysctl("net/ipv4/tcp_fwmark_accept", "0")?;
    until("the sysctl to be put back", || (routing(&client).ok()? == intact).then_some(()))?;
    for address in server.sockets(PORT) {
        exchange(client.connect(address)?, canary.bytes())?;
    }
    wire.stop()?.expect_absent(&canary)?;
    let entry = status_of(&mesh, &client)?;
    ensure!(entry["repairs"].as_u64() >= Some(5), "not counted: {entry:#}");
    Ok(())
}

/// Everything that the agent configures in a pod.
fn routing(pod: &Pod) -> Result<String> {
    let mut listing = pod.sysctl_value("net/ipv4/tcp_fwmark_accept")?;
    for family in ["-4", "-6"] {
        listing += &pod.output("ip", &[family, "rule"])?;
        listing += &pod.output("ip", &[family, "route", "show", "table", "all"])?;
    }
    Ok(listing)
}

/// The preference of the rule for marked packets, and the routing table it selects.
fn capture_rule(pod: &Pod) -> Result<(String, String)> {
    let rules = pod.output("ip", &["rule"])?;
    let rule = rules.lines().find(|rule| rule.contains("fwmark")).context("there is no rule")?;
    let (preference, _) = rule.split_once(':').context("a rule begins with its preference")?;
    let table = rule.split_whitespace().skip_while(|word| *word != "lookup").nth(1);
    Ok((preference.to_owned(), table.context("the rule selects no table")?.to_owned()))
}

#[test]
fn an_uninstalled_agent_leaves_nothing() -> Result<()> {
    let mut mesh = Mesh::new("an_uninstalled_agent_leaves_nothing")?;
    let (client, server) = (mesh.plain_pod(0, "client")?, mesh.plain_pod(1, "server")?);
    let _echo = server.echo(PORT)?;
    let untouched = [routing(&client)?, routing(&server)?];
    for round in ["un-enrolled", "uninstalled"] {
        for pod in [&client, &server] {
            mesh.enroll(pod)?;
        }
        ensure!(routing(&client)? != untouched[0], "an enrolled pod looks like any other");
        exchange(client.connect(server.sockets(PORT)[0])?, b"meshed")?;
        if round == "un-enrolled" {
            for pod in [&client, &server] {
                mesh.agent_of(pod)?.unenroll(pod)?;
            }
        } else {
            for agent in &mut mesh.agents {
                agent.terminate()?;
                agent.uninstall()?;
                let pins = std::fs::read_dir(agent.bpffs())?.count();
                ensure!(pins == 0, "{pins} pins are left");
            }
        }
        for (pod, untouched) in [&client, &server].into_iter().zip(&untouched) {
            let now = routing(pod)?;
            ensure!(now == *untouched, "{round}, and still there: {now}");
        }
        let canary = Canary::random();
        let wire = mesh.lab.capture()?;
        exchange(client.connect(server.sockets(PORT)[1])?, canary.bytes())?;
        wire.stop()?.expect_present(&canary).context(round)?;
    }
    Ok(())
}
