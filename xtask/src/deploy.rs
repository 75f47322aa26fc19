//! `cargo xtask manifests`: the chart as plain manifests, for `kubectl apply`.
//!
//! Helm renders them, and not everybody has it: so they are in the repository, and say what they
//! were rendered from. A test compares.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};
use sha2::{Digest as _, Sha256};

const CHART: &str = "deploy/chart/nodemesh";
const VALUES: &str = "deploy/manifests/values.yaml";
const NAMESPACE: &str = "nodemesh-system";

/// The ranges of [`VALUES`], and what whoever applies the manifests finds in their place: no agent
/// starts with it, while with a wrong range it would let plaintext out.
const RANGES: [(&str, &str); 2] =
    [("192.0.2.0/24", "POD-CIDR"), ("198.51.100.0/24", "SERVICE-CIDR")];

/// A file of rendered manifests.
struct Manifests {
    path: &'static str,
    arguments: &'static [&'static str],
    about: &'static str,
}

const MANIFESTS: [Manifests; 2] = [
    Manifests {
        path: "deploy/manifests/nodemesh.yaml",
        arguments: &[],
        about: "nodemesh. Put your cluster's ranges in the place of POD-CIDR and SERVICE-CIDR.",
    },
    Manifests {
        path: "deploy/manifests/uninstall.yaml",
        arguments: &["--set", "uninstall=true", "--show-only", "templates/agent/daemonset.yaml"],
        about: "Turns the agents of nodemesh.yaml into what removes them from the nodes.",
    },
];

/// Renders all of them. Needs `helm` on the `PATH`.
pub(crate) fn render(root: &Path) -> Result<()> {
    for Manifests { path, arguments, about } in &MANIFESTS {
        let output = Command::new("helm")
            .current_dir(root)
            .args(["template", "nodemesh", CHART, "--namespace", NAMESPACE, "--values", VALUES])
            .args(*arguments)
            .output()
            .context("running helm: install it (https://helm.sh)")?;
        ensure!(
            output.status.success(),
            "helm template: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        let mut text = String::from_utf8(output.stdout).context("what helm wrote")?;
        for (range, placeholder) in RANGES {
            text = text.replace(range, placeholder);
        }
        let text = format!("# {about}\n{}\n{text}", source(root)?);
        fs::write(root.join(path), text).with_context(|| format!("writing {path}"))?;
        println!("{path}");
    }
    Ok(())
}

/// The line that says what manifests were rendered from.
fn source(root: &Path) -> Result<String> {
    let mut files = vec![root.join(VALUES)];
    collect(&root.join(CHART), &mut files)?;
    files.sort();
    let mut digest = Sha256::new();
    for path in files {
        let content = fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
        digest.update(path.strip_prefix(root)?.as_os_str().as_encoded_bytes());
        digest.update([0]);
        digest.update(content.len().to_le_bytes());
        digest.update(content);
    }
    let hex: String = digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(format!("# Rendered by `cargo xtask manifests`; do not edit. The chart's SHA-256: {hex}"))
}

fn collect(directory: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    let reading = || format!("reading {}", directory.display());
    for entry in fs::read_dir(directory).with_context(reading)? {
        let path = entry.with_context(reading)?.path();
        if path.is_dir() {
            collect(&path, files)?;
        } else if path.is_file() {
            files.push(path);
        } else {
            bail!("{} is neither a file nor a directory", path.display());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
