//! The status for a person: readable also of a big cluster.

use std::{
    collections::BTreeMap,
    fmt::{self, Write as _},
    time::Duration,
};

use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use super::{AgentStatus, PodState, PodStatus, Status};

/// The status as text.
#[derive(Debug)]
pub struct Text<'a> {
    /// What to show.
    pub status: &'a Status,
    /// Each pod, and not only how many there are in each namespace.
    pub pods: bool,
}

impl fmt::Display for Text<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let status = self.status;
        head(f, status)?;
        replicas(f, status)?;
        agents(f, status)?;
        if self.pods { each_pod(f, status) } else { namespaces(f, status) }
    }
}

fn age(seconds: u64) -> String {
    humantime::format_duration(Duration::from_secs(seconds)).to_string()
}

fn time(time: OffsetDateTime) -> String {
    time.format(&Rfc3339).unwrap_or_default()
}

fn head(f: &mut fmt::Formatter<'_>, status: &Status) -> fmt::Result {
    let list = |counts: &BTreeMap<String, u64>| {
        let items: Vec<_> = counts.iter().map(|(what, n)| format!("{what} {n}")).collect();
        if items.is_empty() { "none".to_owned() } else { items.join(", ") }
    };
    writeln!(f, "mesh-control {}  up {}", status.version, age(status.uptime_seconds))?;
    let health = if status.degraded.is_empty() { "healthy" } else { "DEGRADED" };
    writeln!(f, "state         {health}")?;
    for reason in &status.degraded {
        writeln!(f, "  ! {reason}")?;
    }
    writeln!(f, "trust domain  {}", status.trust_domain)?;
    writeln!(f, "root          {}", status.ca.root_fingerprint)?;
    writeln!(f, "              until {}", time(status.ca.root_not_after))?;
    let by = if status.ca.issuer_renews_itself { "itself" } else { "the operator" };
    writeln!(f, "issuing CA    until {}, renewed by {by}", time(status.ca.issuer_not_after))?;
    writeln!(f, "trust bundle  {} root(s)", status.trust_bundle.len())?;
    let Status { snapshot_version, workloads, services, .. } = status;
    writeln!(
        f,
        "snapshot      {snapshot_version}, {workloads} workload(s), {services} service(s)"
    )?;
    writeln!(f, "issued        {}", list(&status.issued))?;
    writeln!(f, "refused       {}", list(&status.refused))?;
    writeln!(f, "join tokens   {} open", status.open_tokens)
}

fn replicas(f: &mut fmt::Formatter<'_>, status: &Status) -> fmt::Result {
    writeln!(f, "replicas      {}", status.replicas.len())?;
    for replica in &status.replicas {
        match (&replica.version, &replica.problem) {
            (Some(version), _) => {
                let (up, agents) = (age(replica.uptime_seconds), replica.agents);
                writeln!(f, "  {}  {version}  up {up}  {agents} agent(s)", replica.name)?;
            }
            (None, problem) => {
                let problem = problem.as_deref().unwrap_or_default();
                writeln!(f, "  {}  NO ANSWER: {problem}", replica.name)?;
            }
        }
    }
    Ok(())
}

fn agents(f: &mut fmt::Formatter<'_>, status: &Status) -> fmt::Result {
    writeln!(f, "agents        {} connected", status.agents.len())?;
    for (node, agent) in &status.agents {
        let AgentStatus { address, agent_version, connected_seconds, .. } = agent;
        let mut line =
            format!("  {node}  {address}  {agent_version}  up {}", age(*connected_seconds));
        if status.replicas.len() > 1 {
            write!(line, "  at {}", agent.replica)?;
        }
        match (&agent.last_error, agent.acknowledged_version) {
            (Some(error), _) => write!(line, "  REFUSES THE SNAPSHOT: {error}")?,
            (None, Some(version)) => {
                let sync = if agent.in_sync { "in sync" } else { "OUT OF SYNC" };
                write!(line, "  snapshot {version} ({sync})")?;
            }
            (None, None) => line.push_str("  no snapshot yet"),
        }
        if let Some(not_after) = agent.certificate_not_after {
            write!(line, "  certificate until {}", time(not_after))?;
        }
        writeln!(f, "{line}")?;
    }
    for node in &status.nodes_without_agent {
        writeln!(f, "  {node}  NO AGENT")?;
    }
    Ok(())
}

/// How many pods of a namespace are how.
#[derive(Default)]
struct Namespace<'a> {
    members: usize,
    states: BTreeMap<&'static str, usize>,
    outside: BTreeMap<&'a str, usize>,
}

fn namespaces(f: &mut fmt::Formatter<'_>, status: &Status) -> fmt::Result {
    let mut namespaces: BTreeMap<&str, Namespace<'_>> = BTreeMap::new();
    for pod in &status.pods {
        let namespace = namespaces.entry(&pod.namespace).or_default();
        namespace.members += 1;
        if let Some(complaint) = complaint(pod) {
            *namespace.states.entry(complaint).or_default() += 1;
        }
    }
    for pod in &status.outside {
        let namespace = namespaces.entry(&pod.namespace).or_default();
        *namespace.outside.entry(&pod.why).or_default() += 1;
    }
    writeln!(
        f,
        "pods          {} in the mesh, {} outside",
        status.pods.len(),
        status.outside.len()
    )?;
    for (name, Namespace { members, states, outside }) in namespaces {
        let mut parts = Vec::new();
        if members > 0 {
            parts.push(format!("{members} in the mesh"));
        }
        parts.extend(states.iter().map(|(state, count)| format!("{count} {state}")));
        parts.extend(outside.iter().map(|(why, count)| format!("{count} outside: {why}")));
        writeln!(f, "  {name}  {}", parts.join("; "))?;
    }
    Ok(())
}

/// What is not as it should be with a pod of the mesh, in few words.
fn complaint(pod: &PodStatus) -> Option<&'static str> {
    match &pod.state {
        None => Some("UNKNOWN"),
        Some(PodState { enrolled: false, .. }) => Some("NOT UNDER GUARD"),
        Some(PodState { certificate_not_after: None, .. }) => Some("WITHOUT CERTIFICATE"),
        Some(PodState { problem: Some(_), .. }) => Some("WITH A PROBLEM"),
        Some(_) => None,
    }
}

fn each_pod(f: &mut fmt::Formatter<'_>, status: &Status) -> fmt::Result {
    writeln!(
        f,
        "pods          {} in the mesh, {} outside",
        status.pods.len(),
        status.outside.len()
    )?;
    for pod in &status.pods {
        let PodStatus { namespace, name, node, state, .. } = pod;
        let mut line = format!("  {namespace}/{name}  {node}");
        if let Some(complaint) = complaint(pod) {
            write!(line, "  {complaint}")?;
        }
        if let Some(problem) = state.as_ref().and_then(|state| state.problem.as_ref()) {
            write!(line, ": {problem}")?;
        }
        if let Some(not_after) = state.as_ref().and_then(|state| state.certificate_not_after) {
            write!(line, "  certificate until {}", time(not_after))?;
        }
        writeln!(f, "{line}")?;
    }
    for pod in &status.outside {
        writeln!(f, "  {}/{}  {}  outside: {}", pod.namespace, pod.name, pod.node, pod.why)?;
    }
    Ok(())
}
