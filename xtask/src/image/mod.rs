//! `cargo xtask image`: the container images, made without a container engine.
//!
//! An image holds one binary, which needs no library, and nothing else: no shell, no package manager,
//! no file that an intruder could use.

mod oci;

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};

use self::oci::{File, Image};

/// What the images' names begin with.
pub(crate) const REPOSITORY: &str = "nodemesh.io";

/// Whom the control plane runs as: no user of any node.
const NOBODY: &str = "65532:65532";

/// The image of what `cargo xtask e2e` runs in its pods: this program.
pub(crate) const E2E: &str = "e2e";

/// Writes the images into one archive, which `ctr -n k8s.io images import` takes.
pub(crate) fn write(binaries: &Path, with_e2e: bool, tag: &str, to: &Path) -> Result<()> {
    let mut images = vec![
        // Entering pods' namespaces takes root's capabilities.
        image("mesh-agent", &binaries.join("mesh-agent"), tag, "0:0")?,
        image("mesh-control", &binaries.join("mesh-control"), tag, NOBODY)?,
    ];
    if with_e2e {
        // Some of its pods look at the node.
        images.push(image(E2E, &binaries.join("xtask"), tag, "0:0")?);
    }
    fs::write(to, oci::archive(&images)?).with_context(|| format!("writing {}", to.display()))?;
    for Image { name, .. } in &images {
        println!("{name}");
    }
    println!("in {}", to.display());
    Ok(())
}

fn image(name: &str, binary: &Path, tag: &str, user: &str) -> Result<Image> {
    let place = Path::new("/bin").join(binary.file_name().context("a binary has a name")?);
    let content = fs::read(binary).with_context(|| format!("reading {}", binary.display()))?;
    Ok(Image {
        name: format!("{REPOSITORY}/{name}:{tag}"),
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
        let error =
            image("mesh-agent", Path::new("/nonexistent/mesh-agent"), "1", "0:0").unwrap_err();
        assert!(format!("{error:#}").contains("/nonexistent/mesh-agent"), "{error:#}");
    }
}
