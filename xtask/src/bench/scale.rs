//! What only nodemesh has: how long it takes a pod to be in the mesh, and how many there may be.

use std::fmt::Write as _;
use std::fs;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use xtask::lab::mesh::Settings;
use xtask::lab::{Mesh, Pod};

use super::load::{churn, server};
use super::memory::resident;

/// How many pods are enrolled, one after the other, to see when they talk.
const FIRST_BYTES: u8 = 10;
/// How many pods a crowded node has, and of how many at a time the mean is taken.
const CROWD: u16 = 1000;
const CROWD_PART: usize = 100;
/// How many workloads the rest of a large cluster has.
const REMOTE: u16 = 10_000;

/// From the command to enrol a registered pod to the first byte that a server on the other node
/// answers it.
pub(crate) fn first_bytes() -> Result<Vec<Duration>> {
    let mut mesh = Mesh::new("bench-enrolment")?;
    let far = mesh.pod(1, "far")?;
    let _nginx = server::start(&mesh.lab, &far)?;
    let to = SocketAddr::new(far.v4(), server::PORT);
    let mut took = Vec::new();
    for number in 0..FIRST_BYTES {
        let pod = mesh.plain_pod(0, &format!("client{number}"))?;
        mesh.control.register(&pod)?;
        mesh.wait_synced()?;
        let begin = Instant::now();
        mesh.agents[0].enroll(&pod)?;
        churn::once(&pod, to)?;
        took.push(begin.elapsed());
    }
    Ok(took)
}

/// The time that each enrolment of a crowd takes, certificate included, by parts of the crowd.
pub(crate) fn crowd() -> Result<Vec<Duration>> {
    let mut mesh = Mesh::with("bench-crowd", 1, Settings::default())?;
    let node = mesh.nodes[0].clone();
    let pods = (0..CROWD)
        .map(|number| mesh.lab.pod_of_crowd(&node, number))
        .collect::<Result<Vec<Pod>>>()?;
    let workloads = pods.iter().map(|pod| Workload {
        name: pod.pod_name().to_owned(),
        node: pod.node_name().to_owned(),
        addresses: pod.addresses().map(|address| address.to_string()),
    });
    register(&mesh, workloads)?;
    let agent = &mesh.agents[0];
    let parts = pods.chunks(CROWD_PART).map(|part| {
        let begin = Instant::now();
        part.iter().try_for_each(|pod| agent.enroll(pod))?;
        Ok(begin.elapsed() / u32::try_from(part.len())?)
    });
    parts.collect()
}

/// The memory that an agent needs to know the workloads of other nodes, in bytes.
pub(crate) fn remote_workloads() -> Result<u64> {
    let mut mesh = Mesh::with("bench-registry", 1, Settings::default())?;
    let pid = mesh.agents[0].process().pid();
    let [before] = resident(&[pid])?[..] else { return Ok(0) };
    let workloads = (0..REMOTE).map(|number| Workload {
        name: format!("remote-{number}"),
        node: "elsewhere".into(),
        addresses: [
            format!("10.77.{}.{}", 100 + number / 250, number % 250),
            format!("fd77:9::{number:x}"),
        ],
    });
    register(&mesh, workloads)?;
    let [after] = resident(&[pid])?[..] else { return Ok(0) };
    Ok(after.saturating_sub(before))
}

struct Workload {
    name: String,
    node: String,
    addresses: [String; 2],
}

/// Writes the files of many workloads, and waits until the agents know them all.
fn register(mesh: &Mesh, workloads: impl Iterator<Item = Workload>) -> Result<()> {
    let registry = mesh.control.state_dir().join("registry");
    // Prepared elsewhere: the control plane sees them appear, all of them soon after each other.
    let prepared = mesh.lab.directory("prepared")?;
    let mut names = Vec::new();
    for Workload { name, node, addresses: [v4, v6] } in workloads {
        let mut text = String::new();
        writeln!(
            text,
            "uid: uid-{name}\nname: {name}\nnamespace: default\nservice_account: {name}"
        )?;
        writeln!(text, "node: {node}\naddresses: [{v4}, \"{v6}\"]")?;
        let file = format!("{name}.yaml");
        fs::write(prepared.join(&file), text)?;
        names.push(file);
    }
    for name in &names {
        fs::rename(prepared.join(name), registry.join(name)).context("registering")?;
    }
    mesh.wait_registered(names.len())
}
