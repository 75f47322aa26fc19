//! Compiles the eBPF programs and leaves the object in `OUT_DIR`, where `bpf` embeds it.

use std::{
    collections::HashMap,
    env, fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, anyhow};
use aya_build::{Package, Toolchain};
use object::{
    build::elf::{Builder, SectionData},
    elf::SHT_STRTAB,
};

const TOOLCHAIN: &str = "target/ebpf-toolchain.env";

fn main() -> Result<()> {
    let manifest = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?);
    let root = manifest.parent().context("the workspace root")?;
    println!("cargo::rerun-if-env-changed=RUSTUP_TOOLCHAIN");
    for path in [TOOLCHAIN, "mesh-common/src/abi.rs", "Cargo.lock"] {
        println!("cargo::rerun-if-changed={}", root.join(path).display());
    }
    let toolchain = toolchain(root.join(TOOLCHAIN))?;
    let get = |key: &str| {
        toolchain.get(key).with_context(|| format!("{TOOLCHAIN} lacks {key}: run scripts/setup.sh"))
    };
    // SAFETY: a build script has one thread.
    #[expect(unsafe_code, reason = "aya-build takes its compiler and linker from the environment")]
    unsafe {
        env::set_var("CARGO_BUILD_RUSTC", get("NODEMESH_EBPF_RUSTC")?);
        env::set_var("CARGO_TARGET_BPFEL_UNKNOWN_NONE_LINKER", get("NODEMESH_BPF_LINKER")?);
        // Building `core` is an unstable feature of cargo, and aya-ebpf uses one of rustc.
        env::set_var("RUSTC_BOOTSTRAP", "1");
    }
    let root_dir = root.join("mesh-ebpf");
    let root_dir = root_dir.to_str().context("the workspace's path is not UTF-8")?;
    aya_build::build_ebpf(
        [Package { name: "mesh-ebpf", root_dir, ..Default::default() }],
        // A rustup proxy tells which toolchain it chose; its cargo serves, the compiler is another.
        Toolchain::Custom(env::var("RUSTUP_TOOLCHAIN").as_deref().unwrap_or("stable")),
    )?;
    strip(&PathBuf::from(env::var("OUT_DIR")?).join("mesh-ebpf"))
}

/// Takes out the debug information, of which the linker has made BTF. It is five sixths of the object,
/// and the loader goes through all of it for each pod.
fn strip(path: &Path) -> Result<()> {
    let bytes = fs::read(path)?;
    let mut object = Builder::read(&*bytes).context("reading the eBPF object")?;
    for section in &mut object.sections {
        let name = section.name.as_slice();
        section.delete = name.starts_with(b".debug") || name.starts_with(b".rel.debug");
    }
    // The linker has one table for the names of sections and of symbols, which `object` cannot write.
    let names = object.sections.add();
    names.name = b".shstrtab".as_slice().into();
    names.sh_type = SHT_STRTAB;
    names.data = SectionData::SectionString;
    let mut stripped = Vec::new();
    object.write(&mut stripped).context("writing the eBPF object")?;
    Ok(fs::write(path, stripped)?)
}

fn toolchain(path: PathBuf) -> Result<HashMap<String, String>> {
    let text = fs::read_to_string(&path).map_err(|error| {
        anyhow!("{}: {error}: run scripts/setup.sh build, which installs it", path.display())
    })?;
    Ok(text
        .lines()
        .filter_map(|line| line.split_once('='))
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .collect())
}
