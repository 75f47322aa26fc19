//! The replicas of the control plane.

use anyhow::{Context as _, Result};
use serde_json::Value;

use super::chart::NAMESPACE;
use super::stage::Stage;

/// The label of their pods.
pub(super) const CONTROL: &str = "app.kubernetes.io/component=control";

/// What each replica says of the cluster, by the name of its pod.
pub(super) fn statuses(stage: &Stage) -> Result<Vec<(String, Value)>> {
    let pods = stage.kubectl.list("pods", &["-n", NAMESPACE, "-l", CONTROL])?;
    let status = |pod: &Value| {
        let name = pod["metadata"]["name"].as_str().context("no name")?;
        // Degraded is a status as well; kubectl adds its complaint to that.
        let exec = ["-n", NAMESPACE, "exec", name, "--", "mesh-control", "status", "--json"];
        let text = stage.kubectl.output(&exec).unwrap_or_else(|error| format!("{error:#}"));
        let json = text.find('{').map_or("", |at| &text[at..]);
        let mut values = serde_json::Deserializer::from_str(json).into_iter();
        let status = values.next().with_context(|| text.clone())?.with_context(|| text.clone())?;
        Ok((name.to_owned(), status))
    };
    pods.iter().map(status).collect()
}
