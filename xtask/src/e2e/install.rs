//! Section 1, and what runs before the mesh does.

use anyhow::{Context as _, Result};
use xtask::lab::Canary;

use super::chart::NAMESPACE;
use super::expect;
use super::kubectl::Session;
use super::report::Report;
use super::stage::{Pod, Stage};

/// Pods that run while there is no mesh yet, in a namespace that is to be in it, with an open
/// connection.
struct Early {
    client: Pod,
    server: Pod,
    held: Session,
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
    let canary = Canary::random();
    let capture = stage.capture(&canary, &[])?;
    stage.ask(&client, server.echo(), canary.text())?;
    capture.expect_plaintext()?;
    let address = server.echo().to_string();
    let held = stage.kubectl.session(&client.namespace, &client.name, &["hold", &address])?;
    Ok(Early { client, server, held })
}

fn check_early(stage: &Stage, early: Early, report: &mut Report) {
    let Early { client, server, held } = early;
    report.check("2", "pods that ran before the install are in the mesh, not restarted", || {
        for pod in [&client, &server] {
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
        let seen = held.finish()?;
        expect(seen["cut"] == true, || format!("the connection goes on: {seen}"))?;
        // Whose pod comes first resets the other's end before that one is looked at.
        let counted = |pod| stage.entry(pod)?["aborted"].as_u64().context("no count");
        let aborted = counted(&client)? + counted(&server)?;
        expect(aborted > 0, || "nothing was counted".to_owned())?;
        Ok(format!("{aborted} of both"))
    });
    report.check("2", "they talk to each other through the mesh", || {
        let canary = Canary::random();
        let capture = stage.capture(&canary, &[&client, &server])?;
        stage.ask_patiently(&client, server.echo(), canary.text())?;
        capture.expect_tls13()
    });
}
