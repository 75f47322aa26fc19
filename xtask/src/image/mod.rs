//! `cargo xtask image`: the container images, made without a container engine.
//!
//! An image holds one binary, the libraries that it is linked to, and nothing else: no shell, no
//! package manager, no file that an intruder could use.

mod oci;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

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
    let mut files = libraries(&binary)?
        .into_iter()
        .map(|path| file(&path, &path))
        .collect::<Result<Vec<_>>>()?;
    let place = PathBuf::from("/bin").join(program);
    files.push(file(&binary, &place)?);
    Ok(Image {
        name: format!("nodemesh.io/{program}:{tag}"),
        entrypoint: place,
        user: user.to_owned(),
        files,
    })
}

fn file(from: &Path, place: &Path) -> Result<File> {
    let content = fs::read(from).with_context(|| format!("reading {}", from.display()))?;
    Ok(File { place: place.to_owned(), content })
}

/// What the dynamic linker loads for a binary, itself included, by the paths that it uses.
fn libraries(binary: &Path) -> Result<Vec<PathBuf>> {
    let output = Command::new("ldd").arg(binary).output().context("running ldd")?;
    ensure!(
        output.status.success(),
        "ldd {}: {}",
        binary.display(),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(paths(&String::from_utf8_lossy(&output.stdout)))
}

/// The files in the output of `ldd`: `name => path (address)`, or `path (address)`. The vDSO has
/// no path.
fn paths(ldd: &str) -> Vec<PathBuf> {
    let path = |line: &str| {
        let line = line.split_once("=>").map_or(line, |(_, path)| path);
        line.split_whitespace().next().filter(|word| word.starts_with('/')).map(PathBuf::from)
    };
    ldd.lines().filter_map(path).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_what_ldd_names_with_a_path() {
        let ldd = "\tlinux-vdso.so.1 (0x00007f)\n\tlibm.so.6 => /lib/libm.so.6 (0x00007f)\n\t\
                   /lib64/ld-linux-x86-64.so.2 (0x00007f)\n";
        let expected = ["/lib/libm.so.6", "/lib64/ld-linux-x86-64.so.2"].map(PathBuf::from);
        assert_eq!(paths(ldd), expected);
    }

    #[test]
    fn a_missing_binary_is_named() {
        let error = image(Path::new("/nonexistent"), "mesh-agent", "1", "0:0").unwrap_err();
        assert!(format!("{error:#}").contains("/nonexistent/mesh-agent"), "{error:#}");
    }
}
