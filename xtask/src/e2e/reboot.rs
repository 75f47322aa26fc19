//! Section 2: a node that loses all that it has in its memory. Only who runs the cluster can do that
//! to it, by a command.

use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use xtask::lab::Canary;

use super::expect;
use super::failures::{container_id, shout};
use super::kubectl::until;
use super::report::Report;
use super::stage::{Capture, Pod, Stage, has_condition};

/// Reboots the first node twice: its agent comes back with its pods, and does not.
pub(super) fn check(stage: &Stage, report: &mut Report) {
    const FIRST: &str = "a node reboots: its pods come back in the mesh, nothing leaks meanwhile";
    let Some(command) = &stage.reboot else {
        return report.skip("2", FIRST, "there is no --reboot");
    };
    let mut cast = None;
    report.check("2", FIRST, || {
        let cast = cast.insert(Cast::start(stage)?);
        let capture = cast.capture(stage, &cast.secret, &[])?;
        cast.reboot(stage, command)?;
        cast.come_back(stage)?;
        capture.expect_secret()
    });
    report.check("2", "it reboots, agents absent: pods of the mesh wait, others talk", || {
        let cast = cast.as_mut().context("there are no pods")?;
        let capture = cast.capture(stage, &cast.secret, &[])?;
        stage.without_agents(|| {
            let refused = refusals(stage, &cast.client.pod)?;
            cast.reboot(stage, command)?;
            until("the pods of the mesh to wait for an agent", || {
                ensure!(refusals(stage, &cast.client.pod)? > refused, "nothing was refused");
                for pod in [&cast.client.pod, &cast.shouter.pod] {
                    let record = stage.kubectl.get(&pod.namespace, "pod", &pod.name)?;
                    let state = &record["status"]["containerStatuses"][0]["state"];
                    expect(state["running"].is_null(), || format!("{} runs: {state}", pod.name))?;
                }
                Ok(Some(()))
            })
        })?;
        cast.come_back(stage)?;
        capture.expect_secret()
    });
    for (namespace, pods) in [
        (&stage.mesh, &["rebooted", "shouter", "steady"][..]),
        (&stage.plain, &["shouter", "listener"]),
    ] {
        stage.delete(namespace, pods).unwrap_or_else(|error| eprintln!("{error:#}"));
    }
}

/// Pods of the node that reboots, and two of the other one.
struct Cast {
    client: Ran,
    /// In the mesh, and does nothing but send [`Self::secret`] to the listener.
    shouter: Ran,
    /// The same with [`Self::open`], outside of the mesh.
    outsider: Ran,
    /// In the mesh.
    server: Pod,
    /// Outside of the mesh, and takes what it gets.
    listener: Pod,
    secret: Canary,
    open: Canary,
}

impl Cast {
    fn start(stage: &Stage) -> Result<Self> {
        let server = stage.server(&stage.mesh, "steady", 1)?;
        let listener = stage.server(&stage.plain, "listener", 1)?;
        let (secret, open) = (Canary::random(), Canary::random());
        let client = stage.server(&stage.mesh, "rebooted", 0)?;
        let shouter = shout(stage, &stage.mesh, &listener, &secret)?;
        let outsider = shout(stage, &stage.plain, &listener, &open)?;
        for pod in [&server, &client, &shouter] {
            stage.in_mesh(pod)?;
        }
        let [client, shouter, outsider] =
            [client, shouter, outsider].map(|pod| Ran::of(stage, pod));
        Ok(Self {
            client: client?,
            shouter: shouter?,
            outsider: outsider?,
            server,
            listener,
            secret,
            open,
        })
    }

    /// On the other node, which sees all that comes from this one.
    fn capture(&self, stage: &Stage, canary: &Canary, pods: &[&Pod]) -> Result<Capture> {
        stage.capture_on(&stage.nodes[1..], canary, pods)
    }

    /// Reboots the node. The sniffer sees what comes from the pod outside of the mesh.
    fn reboot(&mut self, stage: &Stage, command: &Path) -> Result<()> {
        reboot(stage, &stage.nodes[0], command)?;
        self.outsider.again(stage)?;
        let capture = self.capture(stage, &self.open, &[])?;
        stage.ask_patiently(&self.outsider.pod, self.listener.echo(), "outside")?;
        capture.expect_plaintext()
    }

    /// The pods of the mesh run again, are in it, and talk.
    fn come_back(&mut self, stage: &Stage) -> Result<()> {
        stage.agents_ready()?;
        for ran in [&mut self.client, &mut self.shouter] {
            ran.again(stage)?;
            stage.in_mesh(&ran.pod)?;
        }
        // What looks at the node is a pod of it, too.
        until("the node's watcher", || stage.on(&stage.nodes[0], &["look"]).map(Some))?;
        let client = &self.client.pod;
        let canary = Canary::random();
        let capture = self.capture(stage, &canary, &[client, &self.server])?;
        stage.ask_patiently(client, self.server.echo(), canary.text())?;
        stage.ask_patiently(&self.server, client.echo(), canary.text())?;
        stage.expect_refusal(client, self.listener.echo(), canary.text())?;
        capture.expect_tls13()
    }
}

/// A pod, and the container of it that ran when it was last looked at.
struct Ran {
    pod: Pod,
    container: String,
}

impl Ran {
    fn of(stage: &Stage, pod: Pod) -> Result<Self> {
        Ok(Self { container: container_id(stage, &pod)?, pod })
    }

    /// Waits until another container of it is ready; it may have another address.
    fn again(&mut self, stage: &Stage) -> Result<()> {
        let container = until(&format!("{} to run again", self.pod.name), || {
            let container = container_id(stage, &self.pod)?;
            Ok((container != self.container).then_some(container))
        })?;
        let pod = stage.ready(&self.pod.namespace, &self.pod.name)?;
        ensure!(pod.uid == self.pod.uid, "{} was replaced", pod.name);
        *self = Self { pod, container };
        Ok(())
    }
}

/// Reboots a node, beyond doubt.
fn reboot(stage: &Stage, node: &str, command: &Path) -> Result<()> {
    let boot = |record: &Value| record["status"]["nodeInfo"]["bootID"].clone();
    let get = || stage.kubectl.json(&["get", "node", node, "-o", "json"]);
    let before = boot(&get()?);
    let status = Command::new(command)
        .arg(node)
        .status()
        .with_context(|| format!("running {}", command.display()))?;
    ensure!(status.success(), "{} {node}: {status}", command.display());
    until(&format!("{node} to be ready, with another boot ID than {before}"), || {
        let record = get()?;
        Ok((has_condition(&record, "Ready") && boot(&record) != before).then_some(()))
    })
}

/// How often a node could not make a sandbox for a pod.
fn refusals(stage: &Stage, pod: &Pod) -> Result<u64> {
    let which = format!("involvedObject.name={},reason=FailedCreatePodSandBox", pod.name);
    let events =
        stage.kubectl.list("events", &["-n", &pod.namespace, "--field-selector", &which])?;
    Ok(events.iter().map(|event| event["count"].as_u64().unwrap_or(1)).sum())
}
