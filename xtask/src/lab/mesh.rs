//! A laboratory with the mesh in it: a control plane, nodes with their agents, pods.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use serde_json::Value;

use super::{Agent, Control, Lab, Node, Pod, until};

/// Everything that a test of the mesh begins with.
#[derive(Debug)]
pub struct Mesh {
    /// The laboratory.
    pub lab: Lab,
    /// Its control plane.
    pub control: Control,
    /// The nodes, named `a`, `b` and so on.
    pub nodes: Vec<Node>,
    /// The agent of each node, in the same order.
    pub agents: Vec<Agent>,
}

/// More YAML for the configuration of each part of a [`Mesh`].
#[derive(Clone, Copy, Debug, Default)]
pub struct Settings<'a> {
    /// For the control plane.
    pub control: &'a str,
    /// For every agent.
    pub agent: &'a str,
}

impl Mesh {
    /// Two nodes with everything at its default.
    pub fn new(title: &str) -> Result<Self> {
        Self::with(title, 2, Settings::default())
    }

    /// So many nodes, with these settings.
    pub fn with(title: &str, nodes: usize, settings: Settings<'_>) -> Result<Self> {
        let mut lab = Lab::new(title)?;
        let control = lab.control(settings.control)?;
        let nodes = ["a", "b", "c", "d"]
            .get(..nodes)
            .context("a mesh has at most four nodes")?
            .iter()
            .map(|name| lab.node(name))
            .collect::<Result<Vec<_>>>()?;
        let agents = nodes
            .iter()
            .map(|node| lab.agent(node, &control, settings.agent))
            .collect::<Result<Vec<_>>>()?;
        Ok(Self { lab, control, nodes, agents })
    }

    /// Adds a pod to a node and to the mesh, and waits until every agent knows it and it has a
    /// certificate.
    pub fn pod(&mut self, node: usize, name: &str) -> Result<Pod> {
        let pod = self.plain_pod(node, name)?;
        self.enroll(&pod)?;
        Ok(pod)
    }

    /// Adds a pod to a node, and not to the mesh.
    pub fn plain_pod(&mut self, node: usize, name: &str) -> Result<Pod> {
        self.lab.pod(&self.nodes[node], name)
    }

    /// Registers a pod and enrols it on its node.
    pub fn enroll(&self, pod: &Pod) -> Result<()> {
        self.control.register(pod)?;
        self.wait_synced()?;
        let agent = self.agent_of(pod)?;
        agent.enroll(pod)?;
        self.wait_certified(pod)
    }

    /// The agent of a pod's node.
    pub fn agent_of(&self, pod: &Pod) -> Result<&Agent> {
        let node = self.nodes.iter().position(|node| node.node_name() == pod.node_name());
        self.agents.get(node.context("the pod is on no node of this mesh")?).context("no agent")
    }
}

impl Mesh {
    /// Waits until every agent has acknowledged the registry as it is now.
    pub fn wait_synced(&self) -> Result<()> {
        until("every agent to have the newest snapshot", || {
            let status = self.control.status().ok()?;
            let agents = status["agents"].as_object()?;
            let in_sync = agents.values().all(|agent| agent["in_sync"] == true);
            (in_sync && agents.len() == self.agents.len()).then_some(())
        })
    }

    /// Waits until every agent knows at least so many workloads.
    pub fn wait_registered(&self, count: usize) -> Result<()> {
        until("the workloads to be registered", || {
            let status = self.control.status().ok()?;
            (status["workloads"].as_u64()? >= count as u64).then_some(())
        })?;
        self.wait_synced()
    }

    /// Puts a service into force, or changes it, and waits until every agent knows.
    pub fn serve(&self, name: &str, text: &str) -> Result<()> {
        self.control.serve(name, text)?;
        self.wait_synced()
    }

    /// Waits until a pod has its certificate.
    pub fn wait_certified(&self, pod: &Pod) -> Result<()> {
        let agent = self.agent_of(pod)?;
        until("the pod to have a certificate", || {
            let status = agent.status().ok()?;
            let entry = pods(&status).find(|entry| entry["uid"] == *pod.uid())?;
            entry["certificate"]["serial"].is_string().then_some(())
        })
    }

    /// What the agent of a pod says about it.
    pub fn status_of(&self, pod: &Pod) -> Result<Value> {
        let status = self.agent_of(pod)?.status()?;
        let entry = pods(&status).find(|entry| entry["uid"] == *pod.uid()).cloned();
        entry.context("the status does not list the pod")
    }

    /// What the guard has dropped of a pod: how many, by layer and reason.
    pub fn drops(&self, pod: &Pod) -> Result<BTreeMap<(String, String), u64>> {
        let status = self.status_of(pod)?;
        let text = |value: &Value| Some(value.as_str()?.to_owned());
        let drops = status["drops"].as_array().context("the status counts no drops")?.iter();
        drops
            .map(|entry| {
                let key = (text(&entry["layer"])?, text(&entry["reason"])?);
                Some((key, entry["count"].as_u64()?))
            })
            .collect::<Option<_>>()
            .context("a drop has a layer, a reason and a count")
    }

    /// How often the guard has dropped something of a pod at this layer for this reason.
    pub fn dropped(&self, pod: &Pod, layer: &str, reason: &str) -> Result<u64> {
        let key = (layer.to_owned(), reason.to_owned());
        Ok(self.drops(pod)?.remove(&key).unwrap_or(0))
    }

    /// How many connections of a kind, `mtls` or `plaintext`, an agent has let through.
    pub fn opened(&self, node: usize, kind: &str) -> Result<u64> {
        let status = self.agents[node].status()?;
        let of_kind = |entry: &&Value| entry["kind"] == *kind;
        let entries = pods(&status).filter_map(|pod| pod["connections"].as_array()).flatten();
        Ok(entries.filter(of_kind).filter_map(|entry| entry["opened"].as_u64()).sum())
    }

    /// How many connections an agent has refused.
    pub fn denied(&self, node: usize) -> Result<u64> {
        let status = self.agents[node].status()?;
        let entries = pods(&status).filter_map(|pod| pod["denied"].as_array()).flatten();
        Ok(entries.filter_map(|entry| entry["count"].as_u64()).sum())
    }
}

/// The layer of the guard that stops what a pod's sockets send: the first, or the second where the
/// kernel does not tell the first whose a packet is (before Linux 6.12).
pub fn socket_guard() -> &'static str {
    if super::kernel_before((6, 12)) { "device" } else { "cgroup" }
}

/// The pods in an agent's status.
pub fn pods(status: &Value) -> impl Iterator<Item = &Value> {
    status["pods"].as_array().into_iter().flatten()
}

/// What an agent has counted for all its pods in a list of its status (`handshakes`, `denied`,
/// `drops`), of the entries in which `key` is `value`.
pub fn counted(status: &Value, list: &str, key: &str, value: &str) -> u64 {
    let entries = pods(status).filter_map(|pod| pod[list].as_array()).flatten();
    entries.filter(|entry| entry[key] == *value).filter_map(|entry| entry["count"].as_u64()).sum()
}

/// The serial number of each pod's certificate, out of an agent's status.
pub fn serials(status: &Value) -> Vec<&str> {
    pods(status).filter_map(|pod| pod["certificate"]["serial"].as_str()).collect()
}
