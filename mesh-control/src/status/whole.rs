//! The whole mesh: what each replica says of its agents, put together.

use std::collections::{BTreeMap, BTreeSet};

use super::{AgentStatus, OutsidePod, PodState, PodStatus, ReplicaStatus, Status};
use crate::{control::View, replicas::Answer};

/// Puts together what this replica and the others know. `outside`: on Kubernetes, the pods that are
/// not in the mesh.
pub fn whole(
    own: Status,
    others: Vec<Answer>,
    view: &View,
    outside: Option<Vec<OutsidePod>>,
) -> Status {
    let mut status = own;
    let mut silent = false;
    for (address, answer) in others {
        match answer {
            Ok(other) => add(&mut status, other),
            Err(problem) => {
                silent = true;
                let name = address.to_string();
                status.degraded.push(format!("replica {name}: {problem}"));
                let (version, problem) = (None, Some(problem));
                let replica =
                    ReplicaStatus { name, version, uptime_seconds: 0, agents: 0, problem };
                status.replicas.push(replica);
            }
        }
    }
    let said = take_pods(&mut status.agents);
    status.pods = pods(view, said);
    let needed: BTreeSet<_> = view.registry.workloads().map(|w| w.node.as_str()).collect();
    let all: BTreeSet<_> = match &outside {
        Some(_) => view.services.nodes.iter().map(|node| node.name.as_str()).collect(),
        None => needed.clone(),
    };
    let connected = |node: &&&str| status.agents.contains_key(**node);
    let without: Vec<_> =
        all.iter().filter(|node| !connected(node)).map(|node| (*node).to_owned()).collect();
    // An agent may be connected to the one that does not answer.
    if !silent {
        let needed = without.iter().filter(|node| needed.contains(node.as_str()));
        status.degraded.extend(needed.map(|node| {
            format!("node {node}: workloads are registered there, but its agent is not connected")
        }));
    }
    let troubled = status.pods.iter().filter_map(|pod| pod.state.as_ref()?.problem.as_ref());
    let troubled = troubled.count();
    if troubled > 0 {
        let line = format!("{troubled} pod(s) of the mesh are not as they should be: see --pods");
        status.degraded.push(line);
    }
    status.nodes_without_agent = without;
    status.outside = outside.unwrap_or_default();
    status
}

/// Adds what another replica knows.
fn add(status: &mut Status, other: Status) {
    let name = other.replicas.first().map(|replica| replica.name.clone()).unwrap_or_default();
    for reason in other.degraded {
        // Of files that all replicas read, all say the same.
        if !status.degraded.contains(&reason) {
            status.degraded.push(format!("replica {name}: {reason}"));
        }
    }
    for (node, agent) in other.agents {
        // Of an agent that has just changed over, the replica that it left may not know yet.
        match status.agents.get(&node) {
            Some(known) if known.connected_seconds <= agent.connected_seconds => {}
            Some(_) | None => {
                status.agents.insert(node, agent);
            }
        }
    }
    for (mine, theirs) in [(&mut status.issued, other.issued), (&mut status.refused, other.refused)]
    {
        for (what, count) in theirs {
            *mine.entry(what).or_default() += count;
        }
    }
    status.replicas.extend(other.replicas);
}

type Said = BTreeMap<String, BTreeMap<String, PodState>>;

/// What the agents say of their pods, by node.
fn take_pods(agents: &mut BTreeMap<String, AgentStatus>) -> Said {
    let taken =
        agents.iter_mut().filter_map(|(node, agent)| Some((node.clone(), agent.pods.take()?)));
    taken.collect()
}

/// The workloads, each with what the agent of its own node says of it.
fn pods(view: &View, mut said: Said) -> Vec<PodStatus> {
    let mut pods: Vec<_> = view
        .registry
        .workloads()
        .map(|workload| PodStatus {
            uid: workload.uid.clone(),
            namespace: workload.namespace.clone(),
            name: workload.name.clone(),
            node: workload.node.clone(),
            state: said.get_mut(&workload.node).map(|pods| {
                let nothing =
                    PodState { enrolled: false, certificate_not_after: None, problem: None };
                pods.remove(&workload.uid).unwrap_or(nothing)
            }),
        })
        .collect();
    pods.sort_by(|a, b| (&a.namespace, &a.name).cmp(&(&b.namespace, &b.name)));
    pods
}
