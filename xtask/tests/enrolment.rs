//! Pods that are hard to enrol.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail, ensure};
use xtask::lab::mesh::{Settings, pods};
use xtask::lab::raw::{PacketSocket, frame, gateway_address, tcp_packet};
use xtask::lab::traffic::exchange;
use xtask::lab::{Canary, Mesh, Pod, kernel_before, until, volume};

const PORT: u16 = 8080;
const IPV4: u16 = 0x0800;

/// Sends plaintext past every socket that the agent could capture.
fn send_frame(mesh: &Mesh, from: &Pod, to: &Pod, canary: &Canary) -> Result<()> {
    let packet = tcp_packet(from.sockets(PORT)[0], to.sockets(PORT)[0], canary.bytes())?;
    let socket = PacketSocket::open(from, "eth0", false)?;
    socket.send(&frame(gateway_address(&mesh.nodes[0])?, &[], IPV4, &packet))
}

/// The first of its two listeners takes the only port there is.
#[test]
fn a_pod_that_cannot_be_enrolled_anew_stays_under_guard() -> Result<()> {
    const PORTS: &str = "net/ipv4/ip_local_port_range";
    let mut mesh = Mesh::new("a_pod_that_cannot_be_enrolled_anew_stays_under_guard")?;
    let (client, server) = (mesh.pod(0, "client")?, mesh.pod(1, "server")?);
    let _echo = server.echo(PORT)?;
    let ports = client.sysctl_value(PORTS)?;

    mesh.agents[0].kill9()?;
    client.sysctl(PORTS, "40000 40000")?;
    mesh.agents[0].start()?;
    let agent = &mesh.agents[0];
    let complains = || {
        let status = agent.status().ok()?;
        let failed = status["pod_files"].as_array().is_some_and(|files| !files.is_empty());
        (failed && pods(&status).count() == 0).then_some(())
    };
    until("the enrolment to have failed", complains)?;
    let canary = Canary::random();
    let wire = mesh.lab.capture()?;
    send_frame(&mesh, &client, &server, &canary)?;
    ensure!(client.connect(server.sockets(PORT)[0]).is_err(), "connected past the agent");
    wire.stop()?.expect_absent(&canary)?;

    client.sysctl(PORTS, ports.trim())?;
    mesh.wait_certified(&client)?;
    exchange(client.connect(server.sockets(PORT)[0])?, canary.bytes())?;

    // The same frame, where it must be seen.
    agent.unenroll(&client)?;
    let wire = mesh.lab.capture()?;
    send_frame(&mesh, &client, &server, &canary)?;
    wire.stop()?.expect_present(&canary)
}

/// It has a link-local address of the other family all the same, as every device has.
#[test]
fn pods_of_one_address_family() -> Result<()> {
    for (family, other, route) in [(0, 1, "-6"), (1, 0, "-4")] {
        let mut mesh = Mesh::new(&format!("pods_of_one_address_family{route}"))?;
        let (client, server) = (mesh.plain_pod(0, "client")?, mesh.pod(1, "server")?);
        let gone = client.addresses()[other];
        client.ip(&[format!("addr flush dev eth0 to {gone}")])?;
        mesh.enroll(&client)?;
        let _echo = server.echo(PORT)?;
        let canary = Canary::random();
        let wire = mesh.lab.capture()?;
        exchange(client.connect(server.sockets(PORT)[family])?, canary.bytes())?;
        let Err(error) = client.connect(server.sockets(PORT)[other]) else {
            bail!("connected from no address");
        };
        ensure!(error.kind() == ErrorKind::ConnectionRefused, "{error}");
        wire.stop()?.expect_absent(&canary)?;
    }
    Ok(())
}

/// The CNI plugin lets a pod start on this answer. Nothing tells the agent that a guard was taken
/// away.
#[test]
fn who_enrols_an_enrolled_pod_is_told_how_it_is_now() -> Result<()> {
    let mut mesh = Mesh::new("who_enrols_an_enrolled_pod_is_told_how_it_is_now")?;
    let client = mesh.pod(0, "client")?;
    let pins = mesh.agents[0].bpffs().join("nodemesh/v1");
    if kernel_before((6, 6)) {
        let filters = |what| client.output("tc", &["filter", what, "dev", "eth0", "egress"]);
        ensure!(filters("show")?.contains("device"), "there is no filter");
        filters("del")?;
        mesh.enroll(&client)?;
        ensure!(filters("show")?.contains("device"), "the filter was not put back");
    } else {
        let guards = device_guards(&pins.join("pods"))?;
        ensure!(!guards.is_empty(), "nothing was pinned");
        for guard in &guards {
            fs::remove_file(guard)?;
        }
        mesh.enroll(&client)?;
        let renewed = device_guards(&pins.join("pods"))?;
        ensure!(renewed.len() == guards.len(), "{renewed:?} in place of {guards:?}");
    }

    fs::remove_file(pins.join("links/connect4"))?;
    let Err(error) = mesh.enroll(&client) else { bail!("enrolled without a program") };
    ensure!(format!("{error:#}").contains("connect4 is not attached"), "{error:#}");
    mesh.agents[0].restart()?;
    mesh.enroll(&client)
}

fn device_guards(pods: &Path) -> Result<Vec<PathBuf>> {
    let mut guards = Vec::new();
    for pod in fs::read_dir(pods)? {
        for pin in fs::read_dir(pod?.path())? {
            let pin = pin?;
            if pin.file_name().as_encoded_bytes().starts_with(b"device-") {
                guards.push(pin.path());
            }
        }
    }
    Ok(guards)
}

/// What an enrolment costs must not grow with the pods that are there already: with fifty of them
/// the kernel no longer answered in time.
#[test]
fn a_crowd_of_pods_is_enrolled() -> Result<()> {
    let size = volume(100);
    let mut mesh = Mesh::with("a_crowd_of_pods_is_enrolled", 1, Settings::default())?;
    let node = mesh.nodes[0].clone();
    let crowd =
        (0..size).map(|number| mesh.lab.pod_of_crowd(&node, number)).collect::<Result<Vec<_>>>()?;
    crowd.iter().try_for_each(|pod| mesh.control.register(pod))?;
    mesh.wait_synced()?;
    let agent = &mesh.agents[0];
    crowd.iter().try_for_each(|pod| agent.enroll(pod))?;
    let status = agent.status()?;
    let guards = pods(&status).flat_map(|pod| pod["guard"].as_array().into_iter().flatten());
    let peers = guards.filter(|guard| guard["layer"] == "peer").count();
    ensure!(peers == usize::from(size), "{peers} of {size} pods are guarded on the host's side");
    Ok(())
}
