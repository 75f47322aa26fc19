//! Section 2: everything that makes pods.

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use super::expect;
use super::kubectl::{merged, until};
use super::objects;
use super::report::Report;
use super::stage::{Pod, Stage, has_condition};

/// Checks that each kind of container and of controller can ask a server through the mesh.
pub(super) fn check(stage: &Stage, report: &mut Report) {
    let mut server = None;
    report.check("2", "a pod in the mesh starts and is ready", || {
        server = Some(stage.server(&stage.mesh, "kinds", 1)?);
        Ok(())
    });
    let server = || server.as_ref().context("there is no server");
    report.check("2", "init containers talk through the mesh", || {
        let spec = json!({
            "initContainers": [asker(stage, server()?, "init")],
            "containers": [objects::server(&stage.image)],
        });
        stage.start(&stage.mesh, "with-init", on_first(stage, spec))?;
        stage.ready(&stage.mesh, "with-init").map(drop)
    });
    report.check("2", "native sidecars are served, and serve the container beside them", || {
        let sidecar = json!({ "name": "sidecar", "restartPolicy": "Always" });
        let loopback = ["ask", "127.0.0.1:7000", "--patience", "60"];
        let beside =
            merged(objects::container(&stage.image, &loopback), json!({ "name": "beside" }));
        let spec = json!({
            "restartPolicy": "Never",
            "initContainers": [merged(objects::server(&stage.image), sidecar), beside],
            "containers": [asker(stage, server()?, "main")],
        });
        stage.start(&stage.mesh, "with-sidecar", on_first(stage, spec))?;
        until("the pod to succeed", || {
            let pod = stage.kubectl.get(&stage.mesh, "pod", "with-sidecar")?;
            expect(pod["status"]["phase"] == "Succeeded", || pod["status"].to_string())?;
            Ok(Some(()))
        })
    });
    report.check("2", "a Job completes", || {
        stage.kubectl.apply(vec![json!({
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": { "name": "job", "namespace": stage.mesh },
            "spec": job(stage, server()?),
        })])?;
        completes(stage, "job")
    });
    report.check("2", "a CronJob's Job completes", || {
        stage.kubectl.apply(vec![json!({
            "apiVersion": "batch/v1",
            "kind": "CronJob",
            "metadata": { "name": "cron", "namespace": stage.mesh },
            "spec": { "schedule": "0 0 1 1 *", "jobTemplate": { "spec": job(stage, server()?) } },
        })])?;
        let create = ["-n", &stage.mesh, "create", "job", "of-cron", "--from=cronjob/cron"];
        stage.kubectl.output(&create)?;
        completes(stage, "of-cron")
    });
    report.check(
        "2",
        "a StatefulSet's pod comes back under its name after a forced deletion",
        || force_delete(stage, server()?),
    );
    let all = ["-n", &stage.mesh, "delete", "job,cronjob,statefulset", "--all"];
    stage.kubectl.output(&all).map_or_else(|error| eprintln!("{error:#}"), drop);
    stage
        .delete(&stage.mesh, &["kinds", "with-init", "with-sidecar"])
        .unwrap_or_else(|error| eprintln!("{error:#}"));
}

fn asker(stage: &Stage, server: &Pod, name: &str) -> Value {
    let tool = ["ask", &server.echo().to_string(), "--patience", "60"];
    merged(objects::container(&stage.image, &tool), json!({ "name": name }))
}

fn on_first(stage: &Stage, spec: Value) -> Value {
    merged(objects::pod_spec(&stage.nodes[0], &Value::Null), spec)
}

fn job(stage: &Stage, server: &Pod) -> Value {
    let spec = json!({ "restartPolicy": "Never", "containers": [asker(stage, server, "main")] });
    json!({ "backoffLimit": 0, "template": objects::template("job", &on_first(stage, spec)) })
}

fn completes(stage: &Stage, name: &str) -> Result<()> {
    until(&format!("{name} to complete"), || {
        let job = stage.kubectl.get(&stage.mesh, "job", name)?;
        expect(has_condition(&job, "Complete"), || job["status"].to_string())?;
        Ok(Some(()))
    })
}

fn force_delete(stage: &Stage, server: &Pod) -> Result<()> {
    let spec = objects::pod_spec(&stage.nodes[0], &objects::server(&stage.image));
    stage.kubectl.apply(vec![json!({
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "metadata": { "name": "stateful", "namespace": stage.mesh },
        "spec": {
            "serviceName": "stateful",
            "replicas": 1,
            "selector": { "matchLabels": { "app": "stateful" } },
            "template": objects::template("stateful", &spec),
        },
    })])?;
    let first = stage.all_ready(&stage.mesh, "stateful", 1)?.pop().context("no pod")?;
    stage.in_mesh(&first)?;
    let delete = ["-n", &stage.mesh, "delete", "pod", &first.name, "--force", "--grace-period=0"];
    stage.kubectl.output(&delete)?;
    let second = until("another pod of that name", || {
        let pod = stage.ready(&stage.mesh, &first.name)?;
        Ok((pod.uid != first.uid).then_some(pod))
    })?;
    stage.in_mesh(&second)?;
    stage.ask_patiently(&second, server.echo(), "again")?;
    until("the deleted pod to be forgotten", || stage.outside(&first).map(Some))
}
