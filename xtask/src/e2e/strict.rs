//! Sections 3 and 4: who is refused, and what a node may ask for.

use std::net::SocketAddr;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;
use xtask::lab::Canary;

use super::chart::NAMESPACE;
use super::kubectl::until;
use super::report::Report;
use super::stage::{Pod, Stage};
use super::{control, expect};

/// Checks a pod outside of the mesh with one inside, and permissions.
pub(super) fn check(stage: &Stage, report: &mut Report) {
    let pods = || -> Result<_> {
        Ok((stage.server(&stage.mesh, "inside", 0)?, stage.server(&stage.plain, "outside", 1)?))
    };
    let mut both = None;
    report.check(
        "8",
        "a pod in the mesh refuses plaintext from a pod outside, and logs it",
        || {
            let (inside, outside) = both.insert(pods()?);
            stage.in_mesh(inside)?;
            stage.expect_refusal(outside, inside.echo(), "plaintext")?;
            until("a refusal in the access log", || {
                let lines = stage.access_log(&inside.node)?;
                let refused = |line: &Value| {
                    line["reason"] == "plaintext-refused"
                        && line["client"]
                            .as_str()
                            .and_then(|client| client.parse().ok())
                            .is_some_and(|client: SocketAddr| client.ip() == outside.ip)
                };
                Ok(lines.iter().any(refused).then_some(()))
            })
        },
    );
    report.check("8", "its owner sees an Event that names who it was", || {
        let (inside, outside) = both.as_ref().context("there are no pods")?;
        stage.expect_refusal(outside, inside.echo(), "plaintext")?;
        let peer = format!("{}/{}", outside.namespace, outside.name);
        event(stage, inside, "PlaintextRefused", &format!("refused: STRICT, plaintext from {peer}"))
    });
    report.check("4", "a pod in the mesh says nothing to a pod outside", || {
        let (inside, outside) = both.as_ref().context("there are no pods")?;
        let canary = Canary::random();
        let capture = stage.capture(&canary, &[])?;
        stage.expect_refusal(inside, outside.echo(), canary.text())?;
        capture.expect_secret()
    });
    report.check("8", "the node itself is let in, as its probes are", || {
        let (inside, _) = both.as_ref().context("there are no pods")?;
        stage.ask(&stage.watcher(&inside.node)?, inside.echo(), "probe").map(drop)
    });
    report.check("8", "another node is not", || {
        let (inside, outside) = both.as_ref().context("there are no pods")?;
        stage.expect_refusal(&stage.watcher(&outside.node)?, inside.echo(), "probe")
    });
    report.check(
        "3",
        "agents may read no secret and list no pods, the control plane its own key",
        || {
            for (account, verb, what, allowed) in [
                ("nodemesh-agent", "get", "secret/nodemesh-ca", false),
                ("nodemesh-agent", "list", "pods", false),
                ("nodemesh-agent", "create", "events.events.k8s.io", false),
                ("nodemesh-control", "create", "events.events.k8s.io", true),
                ("nodemesh-control", "delete", "events.events.k8s.io", false),
                ("nodemesh-control", "get", "secret/nodemesh-ca", true),
                ("nodemesh-control", "list", "secrets", false),
            ] {
                may(stage, account, verb, what, allowed)?;
            }
            Ok(())
        },
    );
    report.check(
        "3",
        "agents get no token but one of the CNI plugin's that is bound to their node",
        || {
            // kubectl cannot pretend to be on a node: so not even that one.
            let node = ["--bound-object-kind=Node", "--bound-object-name", &stage.nodes[0]];
            no_token(stage, "nodemesh-agent", &node, "cannot create")?;
            no_token(stage, "nodemesh-control", &node, "cannot create")?;
            no_token(stage, "nodemesh-cni", &[], "bound to their own node")?;
            no_token(stage, "nodemesh-cni", &node, "bound to their own node")
        },
    );
    report.check(
        "8",
        "`mesh-control status` shows the cluster, whichever replica is asked",
        || {
            let (inside, outside) = both.as_ref().context("there are no pods")?;
            until("every replica to know everything", || whole(stage, inside, outside).map(Some))
        },
    );
    report.check("3", "the replicas of the control plane have one CA", || {
        let roots: Vec<_> = control::statuses(stage)?
            .into_iter()
            .map(|(_, status)| status["ca"]["root_fingerprint"].clone())
            .collect();
        let one = roots.len() > 1 && roots.iter().all(|root| root.is_string() && *root == roots[0]);
        expect(one, || format!("{roots:?}"))
    });
    stage.delete(&stage.mesh, &["inside"]).unwrap_or_else(|error| eprintln!("{error:#}"));
    stage.delete(&stage.plain, &["outside"]).unwrap_or_else(|error| eprintln!("{error:#}"));
}

/// An agent is refused a token of an account, and why.
fn no_token(stage: &Stage, account: &str, more: &[&str], why: &str) -> Result<()> {
    let agent = format!("--as=system:serviceaccount:{NAMESPACE}:nodemesh-agent");
    let create = ["-n", NAMESPACE, "create", "token", account, &agent];
    let Err(refusal) = stage.kubectl.output(&[&create, more].concat()) else {
        bail!("an agent got a token of {account} with {more:?}");
    };
    let said = format!("{refusal:#}");
    expect(said.contains(why), || said.clone())
}

/// Waits for a warning on a pod that says this.
pub(super) fn event(stage: &Stage, pod: &Pod, reason: &str, what: &str) -> Result<()> {
    let which = format!("involvedObject.name={},reason={reason}", pod.name);
    let which = ["-n", &pod.namespace, "--field-selector", &which];
    until("an Event on the pod", || {
        let events = stage.kubectl.list("events", &which)?;
        let right = |event: &Value| {
            event["message"].as_str().is_some_and(|message| message.contains(what))
                && event["type"] == "Warning"
                && event["involvedObject"]["uid"] == pod.uid
                && event["reportingComponent"] == "nodemesh.io/control"
        };
        expect(events.iter().any(right), || format!("{events:?}"))?;
        Ok(Some(()))
    })
}

/// Each replica knows all replicas, nodes and pods.
fn whole(stage: &Stage, inside: &Pod, outside: &Pod) -> Result<()> {
    let statuses = control::statuses(stage)?;
    expect(statuses.len() > 1, || "there is one replica".to_owned())?;
    for (name, status) in &statuses {
        let list = |key: &str| status[key].as_array().cloned().unwrap_or_default();
        for (other, _) in &statuses {
            let known = list("replicas")
                .iter()
                .any(|replica| replica["name"] == other.as_str() && replica["problem"].is_null());
            expect(known, || format!("{name} does not know {other}: {}", status["replicas"]))?;
        }
        for node in &stage.nodes {
            let agent = &status["agents"][node];
            let right = agent["in_sync"] == true
                && agent["certificate_not_after"].is_string()
                && statuses.iter().any(|(replica, _)| agent["replica"] == replica.as_str());
            expect(right, || format!("{name} of {node}: {agent}"))?;
        }
        let found = |list: Vec<Value>, pod: &Pod| {
            let is = |found: &Value| {
                found["namespace"] == pod.namespace.as_str() && found["name"] == pod.name.as_str()
            };
            list.into_iter().find(is).unwrap_or_default()
        };
        let member = found(list("pods"), inside);
        let state = &member["state"];
        let right = state["enrolled"] == true && state["certificate_not_after"].is_string();
        expect(right, || format!("{name} of {}: {member}", inside.name))?;
        let other = found(list("outside"), outside);
        let right = other["why"].as_str().is_some_and(|why| why.contains("label"));
        expect(right, || format!("{name} of {}: {other}", outside.name))?;
    }
    Ok(())
}

fn may(stage: &Stage, account: &str, verb: &str, what: &str, allowed: bool) -> Result<()> {
    let account = format!("--as=system:serviceaccount:{NAMESPACE}:{account}");
    // It ends with status 1 to say no.
    let answer = stage.kubectl.output(&["-n", NAMESPACE, "auth", "can-i", verb, what, &account]);
    let answer = answer.unwrap_or_else(|error| format!("{error:#}"));
    let said = answer.lines().any(|line| line.trim().ends_with(if allowed { "yes" } else { "no" }));
    expect(said, || format!("{account} {verb} {what}: {answer}"))
}
