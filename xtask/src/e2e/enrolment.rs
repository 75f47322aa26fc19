//! Section 2: who is in the mesh, from when on, and until when.

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use xtask::lab::Canary;

use super::chart::NAMESPACE;
use super::expect;
use super::kubectl::{merged, until};
use super::load::Held;
use super::objects::{self, MESH};
use super::report::Report;
use super::stage::{Pod, Stage};

/// Checks labels, the first moment of a pod, and a node without agent.
pub(super) fn check(stage: &Stage, report: &mut Report) {
    report.check(
        "2",
        "label the namespace and roll out: its pods are in the mesh, by name",
        || label_and_roll_out(stage),
    );
    report.check("2", "a label on the pod opts in, alone in its namespace", || {
        let labels = json!({ "metadata": { "labels": { MESH: "enabled" } } });
        let pod = start_with(stage, &stage.plain, "opted-in", labels)?;
        stage.in_mesh(&pod).map(drop)
    });
    report.check("2", "an annotation on the pod opts out", || {
        let annotations = json!({ "metadata": { "annotations": { MESH: "disabled" } } });
        let pod = start_with(stage, &stage.mesh, "opted-out", annotations)?;
        stage.outside(&pod)?;
        talks_in_plaintext(stage, &pod.namespace, "opted-out")
    });
    report.check("2", "hostNetwork is left alone", || {
        let spec = json!({ "spec": {
            "hostNetwork": true,
            "containers": [objects::container(&stage.image, &["sleep"])],
        } });
        let pod = start_with(stage, &stage.mesh, "host-network", spec)?;
        stage.outside(&pod)
    });
    delete(stage, &stage.plain, &["opted-in"]);
    delete(stage, &stage.mesh, &["opted-out", "host-network"]);

    report.check("2", "what an init container sends at once never is on the wire", || {
        let canary = shout(stage, &stage.mesh)?;
        canary.0.expect_secret()
    });
    report.check("2", "without the mesh it is", || {
        let canary = shout(stage, &stage.plain)?;
        canary.0.expect_plaintext()
    });
    let mut bystander = None;
    report.check(
        "2",
        "a namespace that is labelled while its pods run: they are in the mesh, and cut off",
        || {
            let pod = |namespace, name, node| stage.server(namespace, name, node);
            let others = [pod(&stage.mesh, "bystander-a", 0)?, pod(&stage.mesh, "bystander-b", 1)?];
            bystander = Some(Held::open(stage, &others[0], &others[1])?);
            let pods =
                [pod(&stage.plain, "relabelled-a", 0)?, pod(&stage.plain, "relabelled-b", 1)?];
            let held = Held::open(stage, &pods[0], &pods[1])?;
            label(stage, &stage.plain, Some("enabled"))?;
            relabelled(stage, true)?;
            held.expect_cut(true)
        },
    );
    report.check(
        "2",
        "a namespace whose label goes: its pods leave, not restarted, cut off, and talk",
        || {
            let pod = |name| stage.ready(&stage.plain, name);
            let held = pod("relabelled-a")
                .and_then(|client| Held::open(stage, &client, &pod("relabelled-b")?));
            label(stage, &stage.plain, None)?;
            relabelled(stage, false)?;
            held?.expect_cut(true)
        },
    );
    report.check("2", "meanwhile the connections of others go on", || {
        bystander.context("nothing is held")?.expect_cut(false)
    });
    delete(stage, &stage.plain, &["relabelled-a", "relabelled-b"]);
    delete(stage, &stage.mesh, &["bystander-a", "bystander-b"]);

    report.check("2", "the CNI configuration is put right when something overwrites it", || {
        overwrite_configuration(stage)
    });
    report.check("2", "agent away: a pod of the mesh waits, and says why; others start", || {
        stage.without_agents(|| start_without_agents(stage))?;
        let pod = stage.ready(&stage.mesh, "waits")?;
        stage.in_mesh(&pod).map(drop)
    });
    delete(stage, &stage.mesh, &["waits"]);
    delete(stage, &stage.plain, &["starts"]);
}

fn delete(stage: &Stage, namespace: &str, pods: &[&str]) {
    stage.delete(namespace, pods).unwrap_or_else(|error| eprintln!("{error:#}"));
}

fn label_and_roll_out(stage: &Stage) -> Result<()> {
    let spec = objects::pod_spec(&stage.nodes[0], &objects::server(&stage.image));
    stage.kubectl.apply(vec![objects::deployment(&stage.plain, "shop", 2, &spec)])?;
    let before = stage.all_ready(&stage.plain, "shop", 2)?;
    for pod in &before {
        stage.outside(pod)?;
    }
    label(stage, &stage.plain, Some("enabled"))?;
    let outcome = || -> Result<()> {
        let restart = ["-n", &stage.plain, "rollout", "restart", "deployment/shop"];
        stage.kubectl.output(&restart)?;
        stage.rolled_out(&stage.plain, "deployment/shop")?;
        for pod in stage.all_ready(&stage.plain, "shop", 2)? {
            let entry = stage.in_mesh(&pod)?;
            let name = format!("{}/{}", pod.namespace, pod.name);
            let identity = format!("/ns/{}/sa/default", pod.namespace);
            let right = entry["name"] == name
                && entry["identity"].as_str().is_some_and(|id| id.ends_with(&identity));
            expect(right, || entry.to_string())?;
        }
        Ok(())
    }();
    label(stage, &stage.plain, None)?;
    stage.kubectl.output(&["-n", &stage.plain, "delete", "deployment", "shop"])?;
    outcome
}

fn label(stage: &Stage, namespace: &str, value: Option<&str>) -> Result<()> {
    let label = value.map_or_else(|| format!("{MESH}-"), |value| format!("{MESH}={value}"));
    stage.kubectl.output(&["label", "--overwrite", "namespace", namespace, &label]).map(drop)
}

/// A pod that is a little different from others.
fn start_with(stage: &Stage, namespace: &str, name: &str, different: Value) -> Result<Pod> {
    let spec = objects::pod_spec(&stage.nodes[0], &objects::server(&stage.image));
    let pod = merged(objects::pod(namespace, name, spec), different);
    stage.kubectl.apply(vec![pod])?;
    stage.ready(namespace, name)
}

/// A pod and a server outside of the mesh, with the canary on the wire.
fn talks_in_plaintext(stage: &Stage, namespace: &str, name: &str) -> Result<()> {
    let client = stage.ready(namespace, name)?;
    let server = stage.server(&stage.plain, "plain-server", 1)?;
    let canary = Canary::random();
    let capture = stage.capture(&canary, &[])?;
    stage.ask(&client, server.echo(), canary.text())?;
    capture.expect_plaintext()?;
    stage.delete(&stage.plain, &["plain-server"])
}

/// A pod whose init container does nothing but send the canary to another node.
fn shout(stage: &Stage, namespace: &str) -> Result<(super::stage::Capture, Canary)> {
    let listener = stage.server(&stage.plain, "listener", 1)?;
    let canary = Canary::random();
    let address = listener.echo().to_string();
    let tool = ["load", &address, canary.text(), "--count", "50"];
    let init = merged(objects::container(&stage.image, &tool), json!({ "name": "init" }));
    let mut spec = objects::pod_spec(&stage.nodes[0], &objects::server(&stage.image));
    spec["initContainers"] = json!([init]);
    let capture = stage.capture(&canary, &[])?;
    stage.start(namespace, "shouts", spec)?;
    stage.ready(namespace, "shouts")?;
    stage.delete(namespace, &["shouts"])?;
    stage.delete(&stage.plain, &["listener"])?;
    Ok((capture, canary))
}

/// The two pods are in the mesh or not, have never been restarted, and talk accordingly.
fn relabelled(stage: &Stage, in_mesh: bool) -> Result<()> {
    let client = stage.ready(&stage.plain, "relabelled-a")?;
    let server = stage.ready(&stage.plain, "relabelled-b")?;
    for pod in [&client, &server] {
        if in_mesh {
            stage.in_mesh(pod)?;
        } else {
            until(&format!("{} to leave the mesh", pod.name), || stage.outside(pod).map(Some))?;
        }
        let record = stage.kubectl.get(&pod.namespace, "pod", &pod.name)?;
        let restarts = &record["status"]["containerStatuses"][0]["restartCount"];
        ensure!(restarts == 0, "{} was restarted", pod.name);
    }
    let canary = Canary::random();
    let capture = stage.capture(&canary, &[&client, &server])?;
    stage.ask_patiently(&client, server.echo(), canary.text())?;
    if in_mesh { capture.expect_tls13() } else { capture.expect_plaintext() }
}

/// Somebody writes the configuration as it was before.
fn overwrite_configuration(stage: &Stage) -> Result<()> {
    let node = &stage.nodes[0];
    let [directory, _] = stage.cni_directories();
    let untouched = &stage.untouched[0]["files"][directory];
    let (name, text) = untouched
        .as_object()
        .context("no network configurations")?
        .iter()
        .find(|(name, _)| name.ends_with(".conflist"))
        .context("no conflist")?;
    let path = format!("{directory}/{name}");
    stage.on(node, &["write", &path, text.as_str().context("no text")?])?;
    until("the plugin to be back in the configuration", || {
        let seen = stage.on(node, &["look", &path])?;
        expect(seen.contains("nodemesh-cni"), || seen.clone())?;
        Ok(Some(()))
    })
}

fn start_without_agents(stage: &Stage) -> Result<()> {
    let spec = || objects::pod_spec(&stage.nodes[0], &objects::server(&stage.image));
    stage.start(&stage.mesh, "waits", spec())?;
    stage.server(&stage.plain, "starts", 0)?;
    // Of this namespace the node has never heard: it asks the API, without the agent's pod.
    let unheard = stage.another_namespace("unheard")?;
    stage.server(&unheard, "starts", 0)?;
    let event = until("an event on the pod that waits", || {
        let which = "involvedObject.name=waits,reason=FailedCreatePodSandBox";
        let events =
            stage.kubectl.list("events", &["-n", &stage.mesh, "--field-selector", which])?;
        Ok(events.first().and_then(|event| event["message"].as_str().map(str::to_owned)))
    })?;
    expect(event.contains("nodemesh"), || format!("the event does not say why: {event}"))?;
    let pod = stage.kubectl.get(&stage.mesh, "pod", "waits")?;
    expect(pod["status"]["phase"] == "Pending", || pod["status"].to_string())?;
    // Nothing of nodemesh itself waits for the mesh.
    stage.rolled_out(NAMESPACE, "deployment/nodemesh-control")
}
