//! Section 3: another root of the CA takes the place of the one before.

use anyhow::{Context as _, Result};
use serde_json::Value;

use super::chart::NAMESPACE;
use super::kubectl::until;
use super::load::Load;
use super::report::Report;
use super::stage::{Pod, Stage};
use super::{control, expect};

const SECRET: &str = "nodemesh-ca";

/// Checks with a client on the first node, and a server on the second.
pub(super) fn check(stage: &Stage, report: &mut Report) {
    report.measure(
        "3",
        "a root that is asked for takes over in three steps, under load: no connection fails",
        || rotate(stage),
    );
    stage
        .delete(&stage.mesh, &["rotated-client", "rotated-server"])
        .unwrap_or_else(|error| eprintln!("{error:#}"));
}

fn rotate(stage: &Stage) -> Result<String> {
    let client = stage.server(&stage.mesh, "rotated-client", 0)?;
    let server = stage.server(&stage.mesh, "rotated-server", 1)?;
    stage.ask_patiently(&client, server.echo(), "begin")?;
    let load = Load::start(stage, &client, &server)?;
    let old = trusted(stage, 1)?.1;

    annotate(stage, "nodemesh.io/rotate-root=")?;
    let both = trusted(stage, 2)?;
    expect(both.1 == old, || "the next root signs before it is trusted".to_owned())?;

    let before = [serial(stage, &client)?, serial(stage, &server)?];
    settled(stage)?;
    let new = until("the next root to sign", || {
        let (_, root) = trusted(stage, 2)?;
        Ok((root != old).then_some(root))
    })?;
    for (pod, before) in [&client, &server].into_iter().zip(&before) {
        until(&format!("{}'s next certificate", pod.name), || {
            Ok((serial(stage, pod)? != *before).then_some(()))
        })?;
    }

    settled(stage)?;
    let (roots, _) = trusted(stage, 1)?;
    expect(roots == [new.clone()], || format!("{new} should be trusted, but {roots:?} are"))?;
    stage.ask(&client, server.echo(), "afterwards")?;
    load.finish(|seen| seen.failed == 0)
}

/// Waits until so many roots are trusted, by all replicas and all agents, and one of them signs. Says
/// which they are.
fn trusted(stage: &Stage, count: usize) -> Result<(Vec<Value>, Value)> {
    until(&format!("everybody to trust {count} root(s)"), || {
        let mut found: Option<(Vec<Value>, Value)> = None;
        for (name, status) in control::statuses(stage)? {
            let mut roots = status["trust_bundle"].as_array().cloned().context("no bundle")?;
            roots.sort_by_key(Value::to_string);
            let signs = status["ca"]["root_fingerprint"].clone();
            expect(roots.len() == count, || format!("{name} trusts {roots:?}"))?;
            for node in &stage.nodes {
                let agent = &status["agents"][node];
                expect(agent["in_sync"] == true, || format!("{name} of {node}: {agent}"))?;
            }
            let same =
                found.replace((roots, signs)).is_none_or(|other| Some(&other) == found.as_ref());
            expect(same, || format!("{name} disagrees: {found:?}"))?;
        }
        Ok(found)
    })
}

/// Lets the control plane believe that the last step was done long ago: what waits for longer than any
/// certificate lives does not wait that long here. Whoever hurries so must see himself that everybody
/// has heard of it.
fn settled(stage: &Stage) -> Result<()> {
    annotate(stage, "nodemesh.io/rotated-at=2000-01-01T00:00:00Z")
}

fn annotate(stage: &Stage, annotation: &str) -> Result<()> {
    let annotate = ["-n", NAMESPACE, "annotate", "--overwrite", "secret", SECRET, annotation];
    stage.kubectl.output(&annotate).map(drop)
}

fn serial(stage: &Stage, pod: &Pod) -> Result<Value> {
    Ok(stage.in_mesh(pod)?["certificate"]["serial"].clone())
}
