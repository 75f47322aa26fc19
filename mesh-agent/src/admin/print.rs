//! The status for people: terse, aligned, and safe to show on a terminal whatever a peer has put
//! into a name.

mod text;

use std::collections::BTreeMap;

use time::OffsetDateTime;

pub use self::text::{Style, printable};
use self::text::{Table, ago, bytes, clean, until};
use super::status::{
    Certificate, Connections, ControlPlaneState, OpenConnections, Party, Pod, Status,
};

/// What `mesh-agent status` prints.
pub fn print_status(status: &Status, style: Style) -> String {
    let now = status.time;
    let mut lines = vec![format!(
        "mesh-agent {} on {}, up {}: {}",
        clean(&status.version),
        clean(&status.node),
        until(status.started, now),
        health(status, style)
    )];
    lines.extend(status.degraded.iter().map(|reason| format!("  ! {}", clean(reason))));
    lines.push(String::new());

    let mut facts = Table::new(&[]);
    facts.row(["control plane".to_owned(), control_plane(status)]);
    let certificate = status.control_plane.certificate.as_ref();
    let certificate = certificate.map_or("none".to_owned(), |c| certificate_line(c, now));
    facts.row(["node certificate".to_owned(), certificate]);
    let programs: Vec<_> = status
        .programs
        .iter()
        .map(|program| match program.attached {
            true => clean(&program.name),
            false => style.bad(&format!("{} (not attached)", clean(&program.name))),
        })
        .collect();
    facts.row(["eBPF programs".to_owned(), programs.join(", ")]);
    facts.row(["kernel TLS".to_owned(), clean(&status.kernel_tls)]);
    lines.push(facts.render(style));

    for pod in &status.pods {
        lines.push(pod_block(pod, now, style));
    }
    if status.pods.is_empty() {
        lines.push("no pods are enrolled\n".to_owned());
    }
    if !status.problems.is_empty() {
        let mut problems = Table::new(&["LAST", "TIMES", "PROBLEM"]);
        for problem in status.problems.iter().rev() {
            let times = problem.count.to_string();
            problems.row([ago(problem.last, now), times, clean(&problem.message)]);
        }
        lines.push(problems.render(style));
    }
    lines.join("\n")
}

/// What `mesh-agent status pods` prints.
pub fn print_pods(status: &Status, style: Style) -> String {
    let mut table = Table::new(&[
        "POD",
        "UID",
        "CERTIFICATE",
        "GUARD",
        "MTLS",
        "LOCAL",
        "PLAINTEXT",
        "DENIED",
        "SENT",
        "RECEIVED",
        "DROPS",
        "REPAIRS",
    ]);
    for pod in &status.pods {
        let certificate = match &pod.certificate {
            Some(certificate) => format!("{} left", until(status.time, certificate.not_after)),
            None => style.bad("none"),
        };
        let inactive: Vec<_> = pod
            .guard
            .iter()
            .filter(|guard| !guard.active)
            .map(|guard| clean(&guard.layer))
            .collect();
        let guard = match (pod.listening, inactive.is_empty()) {
            (true, true) => "ok".to_owned(),
            (false, true) => style.bad("no listeners"),
            (_, false) => style.bad(&format!("no {}", inactive.join(", no "))),
        };
        let (sent, received) = sent_and_received(pod);
        table.row([
            clean(pod.label()),
            clean(&pod.uid),
            certificate,
            guard,
            open_and_total(pod, "mtls"),
            open_and_total(pod, "local"),
            open_and_total(pod, "plaintext"),
            pod.denied.iter().map(|denied| denied.count).sum::<u64>().to_string(),
            bytes(sent),
            bytes(received),
            pod.drops.iter().map(|drops| drops.count).sum::<u64>().to_string(),
            pod.repairs.to_string(),
        ]);
    }
    table.render(style)
}

/// What `mesh-agent status certs` prints.
pub fn print_certs(status: &Status, style: Style) -> String {
    let mut table =
        Table::new(&["OF", "IDENTITY", "SERIAL", "AGE", "EXPIRES IN", "ROTATES IN", "PROBLEM"]);
    let now = status.time;
    let node = &status.control_plane;
    let node_name = format!("node {}", clean(&status.node));
    let node = (node_name, String::new(), node.certificate.as_ref(), None);
    let pods = status.pods.iter().map(|pod| {
        let identity = pod.identity.as_deref().map(clean).unwrap_or_default();
        let problem = pod.certificate_problem.as_deref();
        (format!("pod {}", clean(pod.label())), identity, pod.certificate.as_ref(), problem)
    });
    for (of, identity, certificate, problem) in std::iter::once(node).chain(pods) {
        let problem = problem.map(|problem| style.bad(&clean(problem))).unwrap_or_default();
        let [serial, age, expires, rotates] = match certificate {
            None => [style.bad("none"), String::new(), String::new(), String::new()],
            Some(certificate) => [
                clean(&certificate.serial),
                certificate.issued.map(|issued| until(issued, now)).unwrap_or_default(),
                until(now, certificate.not_after),
                until(now, certificate.next_rotation),
            ],
        };
        table.row([of, identity, serial, age, expires, rotates, problem]);
    }
    table.render(style)
}

/// What `mesh-agent status connections` prints.
pub fn print_connections(open: &OpenConnections, style: Style) -> String {
    let mut table = Table::new(&[
        "CLIENT",
        "SERVER",
        "DIRECTION",
        "KIND",
        "AGE",
        "FROM CLIENT",
        "FROM SERVER",
        "TRACE",
    ]);
    for connection in &open.connections {
        table.row([
            party(&connection.client),
            party(&connection.server),
            clean(&connection.direction),
            clean(&connection.kind),
            until(connection.since, open.time),
            bytes(connection.from_client),
            bytes(connection.from_server),
            connection.trace.as_deref().map(clean).unwrap_or_default(),
        ]);
    }
    table.render(style)
}

fn party(party: &Party) -> String {
    match &party.identity {
        Some(identity) => format!("{} {}", party.address, clean(identity)),
        None => party.address.to_string(),
    }
}

fn health(status: &Status, style: Style) -> String {
    match (status.degraded.is_empty(), status.ready) {
        (true, _) => style.good("healthy"),
        (false, true) => style.bad("degraded"),
        (false, false) => style.bad("degraded, not ready"),
    }
}

fn control_plane(status: &Status) -> String {
    let control_plane = &status.control_plane;
    let state = match control_plane.state {
        ControlPlaneState::Starting => "not connected yet",
        ControlPlaneState::AwaitingToken => "waiting for a join token",
        ControlPlaneState::Disconnected => "disconnected",
        ControlPlaneState::Connected => "connected",
    };
    let mut text = state.to_owned();
    if let Some(endpoint) = &control_plane.endpoint {
        text += &format!(" to {}", clean(endpoint));
    }
    if let Some(since) = control_plane.since {
        text += &format!(" for {}", until(since, status.time));
    }
    text += &match (control_plane.snapshot_version, control_plane.last_sync) {
        (0, _) => ", no snapshot".to_owned(),
        (version, Some(sync)) => format!(", snapshot {version}, synced {}", ago(sync, status.time)),
        (version, None) => format!(", snapshot {version} from before the start"),
    };
    text
}

fn certificate_line(certificate: &Certificate, now: OffsetDateTime) -> String {
    let Certificate { serial, issued, not_after, next_rotation } = certificate;
    let age = issued.map(|issued| format!("issued {}, ", ago(issued, now))).unwrap_or_default();
    let (expires, rotates) = (until(now, *not_after), until(now, *next_rotation));
    format!("serial {}, {age}expires in {expires}, rotates in {rotates}", clean(serial))
}

fn pod_block(pod: &Pod, now: OffsetDateTime, style: Style) -> String {
    let mut facts = Table::new(&[]);
    let mut fact = |name: &str, text: String| facts.row([format!("  {name}"), text]);
    let identity = pod.identity.as_deref().map_or_else(|| style.bad("not registered"), clean);
    fact("identity", identity);
    let certificate = match (&pod.certificate, pod.certificate_problem.as_deref()) {
        (Some(certificate), None) => certificate_line(certificate, now),
        (Some(certificate), Some(problem)) => {
            format!("{}; {}", certificate_line(certificate, now), style.bad(&clean(problem)))
        }
        (None, problem) => style.bad(&format!("none: {}", clean(problem.unwrap_or("requested")))),
    };
    fact("certificate", certificate);
    let layers = pod.guard.iter().map(|guard| {
        let devices = clean(&guard.devices.join(" "));
        let devices = if devices.is_empty() { devices } else { format!(" ({devices})") };
        let state = if guard.active { style.good("active") } else { style.bad("INACTIVE") };
        format!("{} {state}{devices}", clean(&guard.layer))
    });
    let mut guard: Vec<_> = layers.collect();
    if !pod.listening {
        guard.push(style.bad("listeners closed"));
    }
    if let Some(problem) = &pod.problem {
        guard.push(style.bad(&clean(problem)));
    }
    fact("guard", guard.join(", "));
    let denied = pod.denied.iter().map(|denied| (denied.reason.as_str(), denied.count));
    fact(
        "connections",
        format!(
            "mtls {}, local {}, plaintext {} (open/total), denied {}",
            open_and_total(pod, "mtls"),
            open_and_total(pod, "local"),
            open_and_total(pod, "plaintext"),
            sum_by_reason(denied)
        ),
    );
    let (sent, received) = sent_and_received(pod);
    fact("payload", format!("{} sent, {} received", bytes(sent), bytes(received)));
    let is_ok = |result: &str| result == "ok";
    let ok: u64 = pod.handshakes.iter().filter(|h| is_ok(&h.result)).map(|h| h.count).sum();
    let failed = pod.handshakes.iter().filter(|h| !is_ok(&h.result));
    let failed = sum_by_reason(failed.map(|h| (h.result.as_str(), h.count)));
    let (idle, shared) = (pod.idle_tunnels, pod.shared_tunnels);
    fact("handshakes", format!("{ok} ok, failed {failed}; tunnels {idle} idle, {shared} shared"));
    let drops: Vec<_> = pod
        .drops
        .iter()
        .map(|drops| format!("{}/{} {}", clean(&drops.layer), clean(&drops.reason), drops.count))
        .collect();
    fact("udp", format!("{:?}, {} datagrams left", pod.udp, pod.datagrams).to_lowercase());
    fact("drops", if drops.is_empty() { "none".to_owned() } else { drops.join(", ") });
    let (aborted, revoked) = (pod.aborted, pod.revoked);
    fact("cut", format!("{aborted} connections at enrolment, {revoked} no longer allowed"));
    fact("repairs", pod.repairs.to_string());
    format!(
        "pod {} ({}) at {}\n{}",
        style.strong(&clean(pod.label())),
        clean(&pod.uid),
        clean(&pod.netns.to_string_lossy()),
        facts.render(style)
    )
}

fn of_kind<'a>(pod: &'a Pod, kind: &'a str) -> impl Iterator<Item = &'a Connections> {
    pod.connections.iter().filter(move |connections| connections.kind == kind)
}

fn open_and_total(pod: &Pod, kind: &str) -> String {
    let open: u64 = of_kind(pod, kind).map(|connections| connections.open).sum();
    let total: u64 = of_kind(pod, kind).map(|connections| connections.opened).sum();
    format!("{open}/{total}")
}

/// What the pod's own applications sent and received.
fn sent_and_received(pod: &Pod) -> (u64, u64) {
    pod.connections.iter().fold((0, 0), |(sent, received), connections| {
        let Connections { direction, from_client, from_server, .. } = connections;
        if direction == "outbound" {
            (sent + from_client, received + from_server)
        } else {
            (sent + from_server, received + from_client)
        }
    })
}

/// A total, and in parentheses what it is made of.
fn sum_by_reason<'a>(counts: impl Iterator<Item = (&'a str, u64)>) -> String {
    let mut by_reason = BTreeMap::new();
    for (reason, count) in counts {
        *by_reason.entry(reason).or_insert(0) += count;
    }
    let total: u64 = by_reason.values().sum();
    let parts: Vec<_> =
        by_reason.iter().map(|(reason, count)| format!("{} {count}", clean(reason))).collect();
    if total == 0 { "0".to_owned() } else { format!("{total} ({})", parts.join(", ")) }
}

#[cfg(test)]
mod tests;
