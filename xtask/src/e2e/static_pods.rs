//! Section 2: pods that a node makes by itself. The API has only a stand-in of each, and somebody may
//! delete that.

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use xtask::lab::Canary;

use super::expect;
use super::kubectl::{merged, until};
use super::objects;
use super::report::Report;
use super::stage::{Pod, Stage};

const NAME: &str = "static";
const MIRROR: &str = "kubernetes.io/config.mirror";

/// Checks with a static pod on the first node, and a server on the second.
pub(super) fn check(stage: &Stage, report: &mut Report) {
    const FIRST: &str = "a static pod is in the mesh, by the UID that its node knows";
    let node = &stage.nodes[0];
    let path = match manifests(stage, node) {
        Ok(Some(directory)) => format!("{directory}/nodemesh-{}.yaml", stage.mesh),
        Ok(None) => {
            return report.skip("2", FIRST, &format!("the kubelet of {node} has no staticPodPath"));
        }
        Err(error) => return report.check("2", FIRST, || Err(error)),
    };
    let mut pods = None;
    report.check("2", FIRST, || {
        let server = stage.server(&stage.mesh, "static-server", 1)?;
        let spec = objects::pod_spec(node, &objects::server(&stage.image));
        // The scheduler has no part in it.
        let spec = merged(spec, json!({ "nodeSelector": null }));
        let manifest = objects::pod(&stage.mesh, NAME, spec).to_string();
        stage.on(node, &["write", &path, &manifest])?;
        let found = stand_in(stage, None)?;
        let (pod, _) = pods.insert((found, server));
        let entry = stage.in_mesh(&pod.known)?;
        // The node made it by itself: no service account's name is for the node to take.
        let identity = format!("/ns/{}/sa/static_{node}", stage.mesh);
        let right = entry["identity"].as_str().is_some_and(|id| id.ends_with(&identity));
        expect(right, || entry.to_string())
    });
    let pods = || pods.as_ref().context("there is no static pod");
    report.check("2", "it talks through the mesh, and is talked to", || {
        let (StandIn { known, .. }, server) = pods()?;
        let canary = Canary::random();
        let capture = stage.capture(&canary, &[known, server])?;
        stage.ask_patiently(known, server.echo(), canary.text())?;
        stage.ask_patiently(server, known.echo(), canary.text())?;
        capture.expect_tls13()
    });
    report.check("2", "its stand-in is deleted: it runs on in the mesh, and nothing leaks", || {
        let (before, server) = pods()?;
        let canary = Canary::random();
        let capture = stage.capture(&canary, &[])?;
        let held = ["load", &server.echo().to_string(), canary.text()];
        let load = stage.kubectl.session(&stage.mesh, &before.known.name, &held)?;
        let delete = ["-n", &stage.mesh, "delete", "pod", &before.known.name, "--wait=false"];
        stage.kubectl.output(&delete)?;
        let after = stand_in(stage, Some(&before.in_api))?;
        ensure!(after.known.uid == before.known.uid, "the node made another pod");
        ensure!(after.container == before.container, "its container was restarted");
        stage.in_mesh(&after.known)?;
        stage.ask_patiently(&after.known, server.echo(), canary.text())?;
        stage.ask_patiently(server, after.known.echo(), canary.text())?;
        let seen = load.finish()?;
        expect(seen["succeeded"] != 0, || seen.to_string())?;
        capture.expect_secret()
    });
    report.check("2", "its manifest is removed: the agent forgets it", || {
        stage.on(node, &["remove", &path])?;
        let (StandIn { known, .. }, _) = pods()?;
        until("the static pod to be forgotten", || stage.outside(known).map(Some))
    });
    // Also if it was never in the mesh.
    stage.on(node, &["remove", &path]).map_or_else(|error| eprintln!("{error:#}"), drop);
    stage.delete(&stage.mesh, &["static-server"]).unwrap_or_else(|error| eprintln!("{error:#}"));
}

/// Where the kubelet of a node looks for static pods, by what it says itself.
fn manifests(stage: &Stage, node: &str) -> Result<Option<String>> {
    let path = format!("/api/v1/nodes/{node}/proxy/configz");
    let config = stage.kubectl.json(&["get", "--raw", &path])?;
    let config = config.get("kubeletconfig").context("the kubelet says nothing of itself")?;
    let directory = config["staticPodPath"].as_str().filter(|path| !path.is_empty());
    Ok(directory.map(|path| path.trim_end_matches('/').to_owned()))
}

/// The stand-in of the static pod in the API.
struct StandIn {
    in_api: String,
    container: Value,
    /// The pod, with the UID that its node knows.
    known: Pod,
}

/// The stand-in, once it is ready and another one than `before`.
fn stand_in(stage: &Stage, before: Option<&str>) -> Result<StandIn> {
    let name = format!("{NAME}-{}", stage.nodes[0]);
    until("the static pod's stand-in", || {
        let mut known = stage.ready(&stage.mesh, &name)?;
        let record = stage.kubectl.get(&stage.mesh, "pod", &name)?;
        ensure!(record["metadata"]["uid"] == known.uid.as_str(), "it was replaced just now");
        if before == Some(&known.uid) {
            return Ok(None);
        }
        let uid = record["metadata"]["annotations"][MIRROR].as_str();
        let uid = uid.with_context(|| format!("no {MIRROR}"))?.to_owned();
        let in_api = std::mem::replace(&mut known.uid, uid);
        let container = record["status"]["containerStatuses"][0]["containerID"].clone();
        Ok(Some(StandIn { in_api, container, known }))
    })
}
