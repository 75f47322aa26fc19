//! Sections 3 and 4: who is refused, and what a node may ask for.

use std::net::SocketAddr;

use anyhow::{Context as _, Result};
use serde_json::Value;
use xtask::lab::Canary;

use super::chart::NAMESPACE;
use super::expect;
use super::kubectl::until;
use super::report::Report;
use super::stage::Stage;

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
                ("nodemesh-control", "get", "secret/nodemesh-ca", true),
                ("nodemesh-control", "list", "secrets", false),
            ] {
                may(stage, account, verb, what, allowed)?;
            }
            Ok(())
        },
    );
    report.check("3", "the replicas of the control plane have one CA", || {
        let label = "app.kubernetes.io/component=control";
        let mut roots = Vec::new();
        for pod in stage.kubectl.list("pods", &["-n", NAMESPACE, "-l", label])? {
            let name = pod["metadata"]["name"].as_str().context("no name")?;
            let exec = ["-n", NAMESPACE, "exec", name, "--", "mesh-control", "status", "--json"];
            roots.push(stage.kubectl.json(&exec)?["ca"]["root_fingerprint"].clone());
        }
        let one = roots.len() > 1 && roots.iter().all(|root| root.is_string() && *root == roots[0]);
        expect(one, || format!("{roots:?}"))
    });
    stage.delete(&stage.mesh, &["inside"]).unwrap_or_else(|error| eprintln!("{error:#}"));
    stage.delete(&stage.plain, &["outside"]).unwrap_or_else(|error| eprintln!("{error:#}"));
}

fn may(stage: &Stage, account: &str, verb: &str, what: &str, allowed: bool) -> Result<()> {
    let account = format!("--as=system:serviceaccount:{NAMESPACE}:{account}");
    // It ends with status 1 to say no.
    let answer = stage.kubectl.output(&["-n", NAMESPACE, "auth", "can-i", verb, what, &account]);
    let answer = answer.unwrap_or_else(|error| format!("{error:#}"));
    let said = answer.lines().any(|line| line.trim().ends_with(if allowed { "yes" } else { "no" }));
    expect(said, || format!("{account} {verb} {what}: {answer}"))
}
