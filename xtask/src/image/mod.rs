//! `cargo xtask image`: the container images, made without a container engine.
//!
//! An image holds one binary, which needs no library, and nothing else: no shell, no package manager,
//! no file that an intruder could use.

mod oci;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use self::oci::{File, Image};

/// Whom the control plane runs as: no user of any node.
const NOBODY: &str = "65532:65532";

/// Writes both images into one archive, which `ctr -n k8s.io images import` takes.
pub(crate) fn write(binaries: &Path, tag: &str, to: &Path) -> Result<()> {
    let images = [
        // Entering pods' namespaces takes root's capabilities.
        image(binaries, "mesh-agent", tag, "0:0")?,
        image(binaries, "mesh-control", tag, NOBODY)?,
    ];
    fs::write(to, oci::archive(&images)?).with_context(|| format!("writing {}", to.display()))?;
    for Image { name, .. } in &images {
        println!("{name}");
    }
    println!("in {}", to.display());
    Ok(())
}

fn image(binaries: &Path, program: &str, tag: &str, user: &str) -> Result<Image> {
    let binary = binaries.join(program);
    let place = PathBuf::from("/bin").join(program);
    let content = fs::read(&binary).with_context(|| format!("reading {}", binary.display()))?;
    Ok(Image {
        name: format!("nodemesh.io/{program}:{tag}"),
        entrypoint: place.clone(),
        user: user.to_owned(),
        files: vec![File { place, content }],
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_binary_is_named() {
        let error = image(Path::new("/nonexistent"), "mesh-agent", "1", "0:0").unwrap_err();
        assert!(format!("{error:#}").contains("/nonexistent/mesh-agent"), "{error:#}");
    }
}
