//! Sections 5 and 8: agents and control plane go away in turn, under load.

use std::time::Duration;

use anyhow::{Context as _, Result};
use xtask::lab::Canary;

use super::chart::NAMESPACE;
use super::control::CONTROL;
use super::kubectl::until;
use super::load::{Load, Seen};
use super::objects;
use super::report::Report;
use super::stage::{Pod, Stage};

/// Checks with a client on the first node, and a server on the second.
pub(super) fn check(stage: &Stage, report: &mut Report) {
    let mut pair = None;
    report.check("8", "two pods talk over new connections all the time, without an error", || {
        let client = stage.server(&stage.mesh, "loaded-client", 0)?;
        let server = stage.server(&stage.mesh, "loaded-server", 1)?;
        let (client, server) = pair.insert((client, server));
        stage.ask_patiently(client, server.echo(), "begin")?;
        let load = Load::start(stage, client, server)?;
        stage.ask(client, server.echo(), "meanwhile")?;
        load.finish(|seen| seen.gap == Duration::ZERO || seen.failed == 0).map(drop)
    });
    let pair = || pair.as_ref().context("there are no pods");

    report.measure("8", "the agents are killed (SIGKILL) in turn under load", || {
        let (client, server) = pair()?;
        let load = Load::start(stage, client, server)?;
        for node in &stage.nodes {
            let agent = stage.agent(node)?;
            let container = container_id(stage, &agent)?;
            stage.on(node, &["kill", &container])?;
            until("another container of the agent", || {
                Ok((container_id(stage, &agent)? != container).then_some(()))
            })?;
            stage.agents_ready()?;
            stage.ask_patiently(client, server.echo(), "recovered")?;
        }
        load.finish(Seen::is_bounded)
    });
    report.measure("5", "kubectl rollout restart of the agents under load", || {
        let (client, server) = pair()?;
        let load = Load::start(stage, client, server)?;
        let restart = ["-n", NAMESPACE, "rollout", "restart", "daemonset/nodemesh-agent"];
        stage.kubectl.output(&restart)?;
        stage.agents_ready()?;
        stage.ask_patiently(client, server.echo(), "recovered")?;
        load.finish(Seen::is_bounded)
    });
    report.measure(
        "3",
        "each pod of the control plane is deleted in turn: no connection fails",
        || {
            let (client, server) = pair()?;
            let load = Load::start(stage, client, server)?;
            for pod in stage.kubectl.list("pods", &["-n", NAMESPACE, "-l", CONTROL])? {
                let name = pod["metadata"]["name"].as_str().context("no name")?;
                stage.kubectl.output(&[
                    "-n",
                    NAMESPACE,
                    "delete",
                    "pod",
                    name,
                    "--grace-period=0",
                    "--force",
                ])?;
                stage.rolled_out(NAMESPACE, "deployment/nodemesh-control")?;
            }
            load.finish(|seen| seen.failed == 0)
        },
    );
    report.check("3", "and a new pod gets its certificate afterwards", || {
        let pod = stage.server(&stage.mesh, "late", 0)?;
        stage.in_mesh(&pod)?;
        stage.ask_patiently(&pod, pair()?.1.echo(), "late")?;
        stage.delete(&stage.mesh, &["late"])
    });
    report.measure("8", "agents absent: nothing leaks, and probes go on", || {
        let (client, server) = pair()?;
        let load = Load::start(stage, client, server)?;
        stage.without_agents(|| {
            stage.expect_refusal(client, server.echo(), "nobody")?;
            // Longer than the probes need to fail.
            std::thread::sleep(Duration::from_secs(3));
            stage.ready(&stage.mesh, &client.name).map(drop)
        })?;
        stage.ask_patiently(client, server.echo(), "recovered")?;
        load.finish(|seen| seen.failed > 0)
    });
    let mut listener = None;
    report.check(
        "8",
        "all containers of a node's pods restart, agents absent: nothing leaks",
        || {
            let (client, server) = pair()?;
            let listener = listener.insert(stage.server(&stage.plain, "listener", 1)?);
            restart_containers(stage, client, server, listener)
        },
    );
    let listener = || listener.as_ref().context("there is no listener");
    report.check("8", "without the mesh the same pods are on the wire", || {
        restart_containers_outside(stage, listener()?)
    });
    report.check(
        "2",
        "pods whose sandboxes are lost, agents absent: they wait, nothing leaks",
        || {
            let (client, server) = pair()?;
            lose_sandboxes(stage, client, server, listener()?)
        },
    );
    for (namespace, pods) in [
        (&stage.mesh, &["loaded-client", "loaded-server", "shouter"][..]),
        (&stage.plain, &["shouter", "listener"]),
    ] {
        stage.delete(namespace, pods).unwrap_or_else(|error| eprintln!("{error:#}"));
    }
}

/// The ID of a pod's first container.
pub(super) fn container_id(stage: &Stage, pod: &Pod) -> Result<String> {
    let record = stage.kubectl.get(&pod.namespace, "pod", &pod.name)?;
    let statuses = record["status"]["containerStatuses"].as_array().context("no containers")?;
    let main = statuses.iter().find(|status| status["name"] == "agent" || status["name"] == "main");
    let id = main.context("no such container")?["containerID"].as_str();
    let id = id.filter(|id| !id.is_empty()).context("the container does not run yet")?;
    // containerd://0123…
    Ok(id.rsplit('/').next().unwrap_or_default().to_owned())
}

/// A pod that does nothing but send the canary to another node, from its first moment on.
pub(super) fn shout(
    stage: &Stage,
    namespace: &str,
    listener: &Pod,
    canary: &Canary,
) -> Result<Pod> {
    let tool = ["load", &listener.echo().to_string(), canary.text(), "--count", "1000000"];
    let container = objects::container(&stage.image, &tool);
    stage.start(namespace, "shouter", objects::pod_spec(&stage.nodes[0], &container))?;
    stage.ready(namespace, "shouter")
}

/// The canary is for a pod outside of the mesh: one of the mesh would not take it in the clear.
fn restart_containers(stage: &Stage, client: &Pod, server: &Pod, listener: &Pod) -> Result<()> {
    let canary = Canary::random();
    let shouter = shout(stage, &stage.mesh, listener, &canary)?;
    stage.in_mesh(&shouter)?;
    let pods = [client.clone(), shouter];
    let capture = stage.capture(&canary, &[])?;
    stage.without_agents(|| {
        kill_containers(stage, &pods)?;
        stage.expect_refusal(client, listener.echo(), canary.text())
    })?;
    stage.ask_patiently(client, server.echo(), "recovered")?;
    capture.expect_secret()
}

/// The negative twin: the same, of pods that are not in the mesh.
fn restart_containers_outside(stage: &Stage, listener: &Pod) -> Result<()> {
    let canary = Canary::random();
    let pods = [shout(stage, &stage.plain, listener, &canary)?];
    let capture = stage.capture(&canary, &[])?;
    stage.without_agents(|| kill_containers(stage, &pods))?;
    capture.expect_plaintext()?;
    stage.delete(&stage.plain, &["shouter"])
}

/// Kills the containers of these pods of the first node, and waits until others run.
fn kill_containers(stage: &Stage, pods: &[Pod]) -> Result<()> {
    let before: Vec<_> = pods.iter().map(|pod| container_id(stage, pod)).collect::<Result<_>>()?;
    let names: Vec<_> = before.iter().map(String::as_str).collect();
    stage.on(&stage.nodes[0], &[&["kill"], &names[..]].concat())?;
    for (pod, before) in pods.iter().zip(&before) {
        until(&format!("{} to be restarted", pod.name), || {
            Ok((container_id(stage, pod)? != *before).then_some(()))
        })?;
        stage.ready(&pod.namespace, &pod.name)?;
    }
    Ok(())
}

fn lose_sandboxes(stage: &Stage, client: &Pod, server: &Pod, listener: &Pod) -> Result<()> {
    stage.delete(&stage.mesh, &["shouter"])?;
    let canary = Canary::random();
    let shouter = shout(stage, &stage.mesh, listener, &canary)?;
    stage.in_mesh(&shouter)?;
    let pods = [client.clone(), shouter];
    let capture = stage.capture(&canary, &[])?;
    stage.without_agents(|| {
        let uids = pods.each_ref().map(|pod| pod.uid.as_str());
        stage.on(&stage.nodes[0], &[&["kill"], &uids[..]].concat())?;
        until("the pods to wait for an agent", || {
            let which = "involvedObject.name=shouter,reason=FailedCreatePodSandBox";
            let events =
                stage.kubectl.list("events", &["-n", &stage.mesh, "--field-selector", which])?;
            Ok((!events.is_empty()).then_some(()))
        })
    })?;
    let client = stage.ready(&client.namespace, &client.name)?;
    stage.in_mesh(&client)?;
    stage.ask_patiently(&client, server.echo(), canary.text())?;
    capture.expect_secret()
}
