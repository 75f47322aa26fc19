//! Section 5: nothing is left behind.

use xtask::lab::Canary;

use super::chart::NAMESPACE;
use super::expect;
use super::kubectl::until;
use super::report::Report;
use super::stage::Stage;

/// Removes the mesh from under two pods that talk.
pub(super) fn check(stage: &Stage, report: &mut Report) {
    let mut pods = None;
    report.check("5", "two pods in the mesh, to take it from", || {
        let two = [
            stage.server(&stage.mesh, "remains-a", 0)?,
            stage.server(&stage.mesh, "remains-b", 1)?,
        ];
        for pod in pods.insert(two) {
            stage.in_mesh(pod)?;
        }
        Ok(())
    });
    report.check("5", "the agents become what removes them, and the nodes are as before", || {
        stage.kubectl.apply_text(&stage.chart.render(&["uninstall=true"])?)?;
        stage.agents_ready()?;
        until("the nodes to be as before", || {
            for (now, before) in stage.look_at_nodes()?.iter().zip(&stage.untouched) {
                expect(now == before, || format!("before {before}\nnow {now}"))?;
            }
            Ok(Some(()))
        })
    });
    report.check(
        "5",
        "pods have lost the mesh, but not the network, and were not restarted",
        || {
            let Some([client, server]) = &pods else { anyhow::bail!("there are no pods") };
            let canary = Canary::random();
            let capture = stage.capture(&canary, &[])?;
            stage.ask(client, server.echo(), canary.text())?;
            capture.expect_plaintext()?;
            for pod in [client, server] {
                let record = stage.kubectl.get(&pod.namespace, "pod", &pod.name)?;
                expect(record["status"]["containerStatuses"][0]["restartCount"] == 0, || {
                    record["status"].to_string()
                })?;
            }
            Ok(())
        },
    );
    report.check("5", "a pod of the labelled namespace starts without the mesh", || {
        stage.server(&stage.mesh, "afterwards", 0).map(drop)
    });
    report.check("5", "everything of the chart is gone from the cluster", || {
        let delete = ["delete", "--ignore-not-found", "--timeout=120s", "-f", "-"];
        stage.kubectl.output_given(&delete, &stage.chart.render(&[])?)?;
        let namespaces = stage.kubectl.list("namespaces", &[])?;
        expect(namespaces.iter().all(|found| found["metadata"]["name"] != NAMESPACE), || {
            format!("{NAMESPACE} is still there")
        })
    });
}
