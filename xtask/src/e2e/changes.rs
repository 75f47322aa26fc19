//! Section 5: what changes is applied to connections that are open.

use anyhow::{Context as _, Result};
use serde_json::json;

use super::kubectl::{merged, until};
use super::load::Held;
use super::objects::{self, MESH};
use super::report::Report;
use super::stage::{Pod, Stage};
use super::strict::event;

/// Checks a pod that leaves the mesh, and a policy that says something else.
pub(super) fn check(stage: &Stage, report: &mut Report) {
    let mut cast = None;
    report.check("5", "a pod that is taken out of the mesh: its open connections are cut", || {
        let (pair, others) = cast.insert((two(stage, "changed")?, two(stage, "unchanged")?));
        let held = [Held::open(stage, &pair[0], &pair[1])?, Held::open(stage, &pair[1], &pair[0])?];
        let unaffected = Held::open(stage, &others[0], &others[1])?;
        annotate(stage, &pair[1], "disabled")?;
        until("the pod to leave the mesh", || stage.outside(&pair[1]).map(Some))?;
        stage.expect_refusal(&pair[0], pair[1].echo(), "outside")?;
        for held in held {
            held.expect_cut(true)?;
        }
        unaffected.expect_cut(false)
    });
    report.check("5", "it comes back: what it has open from outside is cut, and it talks", || {
        let (pair, _) = cast.as_ref().context("there are no pods")?;
        let plain = stage.server(&stage.plain, "unmeshed", 0)?;
        let held = Held::open(stage, &pair[1], &plain)?;
        let remove = format!("{MESH}-");
        stage.kubectl.output(&["-n", &stage.mesh, "annotate", "pod", &pair[1].name, &remove])?;
        stage.in_mesh(&pair[1])?;
        held.expect_cut(true)?;
        stage.ask_patiently(&pair[0], pair[1].echo(), "back").map(drop)
    });
    report.check(
        "5",
        "a policy that forbids what it allowed: cut, refused, an Event; and back",
        || {
            let (pair, _) = cast.as_ref().context("there are no pods")?;
            forbid_egress(stage, &pair[0])
        },
    );
    for (namespace, pods) in [
        (&stage.mesh, &["changed-a", "changed-b", "unchanged-a", "unchanged-b"][..]),
        (&stage.plain, &["unmeshed", "beyond"]),
    ] {
        stage.delete(namespace, pods).unwrap_or_else(|error| eprintln!("{error:#}"));
    }
}

fn two(stage: &Stage, name: &str) -> Result<[Pod; 2]> {
    let pod = |letter, node| stage.server(&stage.mesh, &format!("{name}-{letter}"), node);
    let pods = [pod("a", 0)?, pod("b", 1)?];
    for pod in &pods {
        stage.in_mesh(pod)?;
    }
    Ok(pods)
}

fn annotate(stage: &Stage, pod: &Pod, value: &str) -> Result<()> {
    let annotation = format!("{MESH}={value}");
    let annotate = ["-n", &pod.namespace, "annotate", "--overwrite", "pod", &pod.name, &annotation];
    stage.kubectl.output(&annotate).map(drop)
}

/// A node's own address is outside of the cluster's ranges: plaintext to it is for `egress` to allow.
fn forbid_egress(stage: &Stage, client: &Pod) -> Result<()> {
    let spec = merged(
        objects::pod_spec(&stage.nodes[1], &objects::server(&stage.image)),
        json!({ "hostNetwork": true }),
    );
    stage.start(&stage.plain, "beyond", spec)?;
    let beyond = stage.ready(&stage.plain, "beyond")?;
    let held = Held::open(stage, client, &beyond)?;
    let set = |value: &str| -> Result<()> {
        stage.kubectl.apply_text(&stage.chart.render(&[value])?)?;
        stage.agents_ready()
    };
    set("egress=deny")?;
    let outcome = || -> Result<()> {
        held.expect_cut(true)?;
        stage.in_mesh(client)?;
        stage.expect_refusal(client, beyond.echo(), "forbidden")?;
        event(stage, client, "EgressDenied", &beyond.node)
    }();
    set("egress=allow")?;
    outcome?;
    stage.ask_patiently(client, beyond.echo(), "allowed again").map(drop)
}
