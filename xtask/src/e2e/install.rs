//! Section 1, and what runs before the mesh does.

use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use xtask::lab::Canary;

use super::chart::NAMESPACE;
use super::expect;
use super::kubectl::merged;
use super::load::Held;
use super::objects;
use super::report::Report;
use super::stage::{Pod, Stage};

/// Pods that run while there is no mesh yet, in a namespace that is to be in it, with an open
/// connection.
struct Early {
    client: Pod,
    server: Pod,
    held: Held,
    /// A server, of a process that has a network namespace of its own.
    unshared: Pod,
    held_by_it: Held,
}

/// Installs. Returns whether there is anything to check.
pub(super) fn check(stage: &Stage, report: &mut Report) -> bool {
    let mut early = None;
    report.check("4", "without the mesh the canary is on the wire: the sniffer sees it", || {
        early = Some(start(stage)?);
        Ok(())
    });
    let before = report.failures();
    report.check("1", "installed: control plane and agents are ready", || {
        stage.kubectl.apply_text(&stage.chart.render(&[])?)?;
        stage.rolled_out(NAMESPACE, "deployment/nodemesh-control")?;
        stage.agents_ready()
    });
    if report.failures() > before {
        return false;
    }
    if let Some(early) = early {
        check_early(stage, early, report);
    }
    true
}

fn start(stage: &Stage) -> Result<Early> {
    let client = stage.server(&stage.mesh, "early-client", 0)?;
    let server = stage.server(&stage.mesh, "early-server", 1)?;
    let unshared = unshared(stage)?;
    let hold = |server: &Pod| {
        let canary = Canary::random();
        let capture = stage.capture(&canary, &[])?;
        stage.ask(&client, server.echo(), canary.text())?;
        capture.expect_plaintext()?;
        Held::open(stage, &client, server)
    };
    let (held, held_by_it) = (hold(&server)?, hold(&unshared)?);
    Ok(Early { client, server, held, unshared, held_by_it })
}

/// What is run in it is where its process is, in a network namespace without any device that is up.
fn unshared(stage: &Stage) -> Result<Pod> {
    let server = merged(
        objects::server(&stage.image),
        json!({
            "args": ["pod", "serve", "--unshare"],
            "securityContext": { "capabilities": { "add": ["SYS_ADMIN"] } },
        }),
    );
    let spec = objects::pod_spec(&stage.nodes[1], &server);
    stage.start(&stage.mesh, "early-unshared", spec)?;
    let pod = stage.ready(&stage.mesh, "early-unshared")?;
    let seen = format!("{:?}", stage.ask(&pod, pod.echo(), "nobody"));
    ensure!(seen.contains("unreachable"), "its process is in the pod's network namespace: {seen}");
    Ok(pod)
}

fn check_early(stage: &Stage, early: Early, report: &mut Report) {
    let Early { client, server, held, unshared, held_by_it } = early;
    report.check("2", "pods that ran before the install are in the mesh, not restarted", || {
        for pod in [&client, &server, &unshared] {
            stage.in_mesh(pod)?;
            let record = stage.kubectl.get(&pod.namespace, "pod", &pod.name)?;
            let restarts = &record["status"]["containerStatuses"][0]["restartCount"];
            expect(record["metadata"]["uid"] == pod.uid.as_str() && restarts == 0, || {
                format!("{} was restarted: {}", pod.name, record["status"])
            })?;
        }
        Ok(())
    });
    report.measure("2", "their connections from before are aborted, and counted", || {
        held.expect_cut(true)?;
        // Whose pod comes first resets the other's end before that one is looked at.
        let counted = |pod| stage.entry(pod)?["aborted"].as_u64().context("no count");
        let aborted = counted(&client)? + counted(&server)?;
        expect(aborted > 0, || "nothing was counted".to_owned())?;
        Ok(format!("{aborted} of both"))
    });
    let talk = |server: &Pod| {
        let canary = Canary::random();
        let capture = stage.capture(&canary, &[&client, server])?;
        stage.ask_patiently(&client, server.echo(), canary.text())?;
        capture.expect_tls13()
    };
    report.check("2", "they talk to each other through the mesh", || talk(&server));
    report.check(
        "2",
        "nor does a process escape that has made a network namespace for itself",
        || {
            held_by_it.expect_cut(true)?;
            talk(&unshared)
        },
    );
}
