//! The chart, rendered by helm and applied with kubectl.

use std::env;
use std::ffi::OsString;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use crate::commands;

/// Where it is installed.
pub(super) const NAMESPACE: &str = "nodemesh-system";

/// The chart with the values of this cluster.
pub(super) struct Chart {
    values: Vec<String>,
}

/// What a run changes unless it is told otherwise.
const DEFAULTS: [&str; 4] = [
    "namespace.create=true",
    // The access log is read.
    "log.format=json",
    // Agents that are replaced shall not wait for the connections that a run holds.
    "agent.drainSeconds=3",
    // Certificates are replaced all the time, whatever else happens.
    "svidLifetime=4m",
];

impl Chart {
    /// With these values, each `KEY=VALUE`. Fails if helm does not take them.
    pub(super) fn new(values: &[String]) -> Result<Self> {
        let values = DEFAULTS.iter().map(|value| (*value).to_owned()).chain(values.to_owned());
        let chart = Self { values: values.collect() };
        chart.render(&[])?;
        Ok(chart)
    }

    /// A value that was set.
    pub(super) fn value(&self, key: &str) -> Option<&str> {
        self.values.iter().rev().find_map(|value| value.strip_prefix(key)?.strip_prefix('='))
    }

    /// The manifests, with some values more.
    pub(super) fn render(&self, more: &[&str]) -> Result<String> {
        let helm = env::var_os("HELM").unwrap_or_else(|| OsString::from("helm"));
        let values = self.values.iter().map(String::as_str).chain(more.iter().copied());
        let output = Command::new(&helm)
            .current_dir(commands::root()?)
            .args(["template", "nodemesh", "deploy/chart/nodemesh", "--namespace", NAMESPACE])
            .args(values.flat_map(|value| ["--set", value]))
            .output()
            .with_context(|| format!("running {} (or set HELM)", helm.display()))?;
        ensure!(
            output.status.success(),
            "helm template: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8(output.stdout).context("what helm wrote")
    }
}
