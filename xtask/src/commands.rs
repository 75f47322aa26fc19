//! What the verbs run: `scripts/setup.sh` for the tools, then cargo.

use std::collections::BTreeMap;
use std::env;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail, ensure};

use crate::vm;

/// The part of the tools that `scripts/setup.sh` is to install.
#[derive(Clone, Copy)]
enum Tools {
    /// What compiling needs.
    Build,
    /// What the laboratory and the demo need too.
    All,
    /// And what the bench compares with.
    Bench,
    /// What the laboratory needs, and a virtual machine with a kernel for it.
    Vm,
}

/// Builds the binaries for the laboratory.
pub(crate) fn build() -> Result<()> {
    setup(Tools::Build)?;
    build_binaries(cargo().arg("build"))
}

/// Builds the binaries for other machines, and says in which directory they are. They are linked
/// statically: the agent copies itself to its node as CNI plugin, whatever libraries are there.
/// `with_xtask` builds this program, too.
pub(crate) fn build_static(release: bool, with_xtask: bool) -> Result<PathBuf> {
    setup(Tools::Build)?;
    let host = host()?;
    let flags = format!("CARGO_TARGET_{}_RUSTFLAGS", host.replace('-', "_").to_uppercase());
    let mut cargo = cargo();
    // Naming the target keeps the flags away from build scripts and procedural macros.
    cargo.env(flags, "-C target-feature=+crt-static").args(["build", "--target", &host]);
    let xtask = if with_xtask { &["--package", "xtask"][..] } else { &[] };
    build_binaries(cargo.args(release.then_some("--release")).args(xtask))?;
    let profile = if release { "release" } else { "debug" };
    Ok(root()?.join("target").join(host).join(profile))
}

/// The target that rustc compiles for unless told otherwise.
fn host() -> Result<String> {
    let output = Command::new("rustc").arg("-vV").output().context("running rustc -vV")?;
    let text = String::from_utf8(output.stdout).context("reading rustc -vV")?;
    let host = text.lines().find_map(|line| line.strip_prefix("host: "));
    host.map(str::to_owned).context("rustc -vV names no host")
}

/// Runs every test, or only the laboratory tests with `lab` in their name; `threads` at a time.
pub(crate) fn test(lab: Option<&str>, threads: u8) -> Result<()> {
    ensure_root()?;
    setup(Tools::All)?;
    // The laboratory runs the binaries that lie beside its tests. They are built as part of what
    // the tests are built of, so that no dependency is built twice.
    run(cargo().args(["build", "--workspace", "--bins", "--tests"]))?;
    let packages: &[&str] = match lab {
        // Selecting a package would select other features of what it depends on.
        Some(_) => &["--workspace", "--test", "*"],
        None => &["--workspace"],
    };
    let threads = format!("--test-threads={threads}");
    run(cargo().args(["test", "--no-fail-fast"]).args(packages).args(["--", &threads]).args(lab))?;
    if lab.is_none() { replay_corpora() } else { Ok(()) }
}

/// Which ends of tunnels the kernel of the virtual machine encrypts: see `kernel_tls` in the agent's
/// configuration. Of the laboratory's agents, all do or none.
const KERNEL_TLS: [&str; 4] = ["", "client", "server", "client,server"];

/// Runs the laboratory tests with `filter` in their name on another kernel, without and with TLS in
/// the kernel. If there is no filter, the tunnel's own tests as well.
pub(crate) fn test_in_vm(filter: &str, threads: u8) -> Result<()> {
    setup(Tools::Vm)?;
    run(cargo().args(["build", "--workspace", "--bins", "--tests"]))?;
    let mut commands = Vec::new();
    if filter.is_empty() {
        for (ends, test) in product(&KERNEL_TLS, &test_programs("mesh-agent", "lib")?) {
            commands.push(format!("{ends} {test} --include-ignored tunnel:: tls::kernel::"));
        }
    }
    for (ends, test) in product(&[KERNEL_TLS[0], KERNEL_TLS[3]], &test_programs("xtask", "test")?) {
        commands.push(format!("{ends} {test} --test-threads={threads} {filter}"));
    }
    vm::run(&root()?.join("target/vm"), &commands)
}

/// Each with each, the former as an assignment to the environment of the latter.
fn product(kernel_tls: &[&str], tests: &[PathBuf]) -> Vec<(String, String)> {
    let with = |ends: &&str| {
        let ends = format!("NODEMESH_TEST_KERNEL_TLS={ends}");
        tests.iter().map(move |test| (ends.clone(), test.display().to_string())).collect::<Vec<_>>()
    };
    kernel_tls.iter().flat_map(with).collect()
}

/// The test programs of a package that are made of one kind of its targets.
fn test_programs(package: &str, kind: &str) -> Result<Vec<PathBuf>> {
    let mut build = cargo();
    build.args(["test", "--no-run", "--workspace", "--lib", "--test", "*"]);
    let output = build.args(["--message-format", "json"]).stderr(Stdio::inherit()).output();
    let output = output.context("asking cargo for the tests")?;
    ensure!(output.status.success(), "cargo test --no-run: {}", output.status);
    let tests: Vec<PathBuf> = output
        .stdout
        .split(|byte| *byte == b'\n')
        .filter_map(|line| serde_json::from_slice::<serde_json::Value>(line).ok())
        .filter(|message| message["package_id"].as_str().is_some_and(|id| id.contains(package)))
        .filter(|message| message["target"]["kind"][0] == kind)
        .filter_map(|message| Some(message["executable"].as_str()?.into()))
        .collect();
    ensure!(!tests.is_empty(), "cargo names no tests of {package}");
    Ok(tests)
}

const FUZZ_MANIFEST: &str = "fuzz/Cargo.toml";

/// Builds the fuzz targets and runs each over its corpus.
fn replay_corpora() -> Result<()> {
    let root = root()?;
    let target = root.join("target/fuzz");
    let mut build = cargo();
    build.current_dir(root).args(["build", "--locked", "--manifest-path", FUZZ_MANIFEST]);
    run(build.arg("--target-dir").arg(&target))?;
    let mut replayed = 0;
    for corpus in fs::read_dir(root.join("fuzz/corpus"))? {
        let corpus = corpus?;
        let inputs = fs::read_dir(corpus.path())?
            .map(|input| Ok(input?.path()))
            .collect::<Result<Vec<_>>>()?;
        ensure!(!inputs.is_empty(), "{} is empty", corpus.path().display());
        replayed += inputs.len();
        // Silent unless it finds something: each input is a line otherwise.
        let output = Command::new(target.join("debug").join(corpus.file_name()))
            .args(inputs)
            .output()
            .with_context(|| format!("running the fuzz target of {}", corpus.path().display()))?;
        ensure!(
            output.status.success(),
            "{}: {}",
            corpus.path().display(),
            String::from_utf8_lossy(&output.stderr)
        );
    }
    eprintln!("xtask: {replayed} inputs of the fuzz targets' corpora replayed");
    Ok(())
}

/// Installs what the demo needs, and builds the binaries that it shows.
pub(crate) fn prepare_demo() -> Result<()> {
    ensure_root()?;
    setup(Tools::All)?;
    build_binaries(cargo().arg("build"))
}

/// Installs what the bench needs, builds the binaries that it measures and this program as they are
/// deployed, and becomes the latter: what generates load must not be what limits it.
pub(crate) fn become_bench() -> Result<()> {
    ensure_root()?;
    setup(Tools::Bench)?;
    build_binaries(cargo().args(["build", "--release", "--package", "xtask"]))?;
    let mut command = Command::new(root()?.join("target/release/xtask"));
    command.args(env::args_os().skip(1)).arg("--built");
    Err(command.exec()).context("running the release build of xtask")
}

fn ensure_root() -> Result<()> {
    ensure!(
        nix::unistd::geteuid().is_root(),
        "the laboratory makes network namespaces and loads eBPF: run this as root"
    );
    Ok(())
}

/// Runs the simulated measurement of a large cluster.
pub(crate) fn scale(arguments: &[String]) -> Result<()> {
    setup(Tools::Build)?;
    let bench = ["bench", "--package", "mesh-agent", "--bench", "scale", "--"];
    run(cargo().args(bench).args(arguments))
}

/// Checks formatting and runs clippy with every warning denied.
pub(crate) fn lint() -> Result<()> {
    setup(Tools::Build)?;
    run(cargo().args(["fmt", "--all", "--check"]))?;
    run(cargo().args(["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]))?;
    let fuzz = ["--manifest-path", FUZZ_MANIFEST];
    run(cargo().current_dir(root()?).arg("fmt").args(fuzz).arg("--check"))?;
    let target = ["--target-dir", "target/fuzz", "--", "-D", "warnings"];
    run(cargo().current_dir(root()?).arg("clippy").args(fuzz).args(target))?;
    lint_ebpf()?;
    lint_scripts()
}

/// Clippy for the eBPF programs is the one of the rustc that builds them: it must be the same
/// compiler that built `core`.
fn lint_ebpf() -> Result<()> {
    let toolchain = ebpf_toolchain()?;
    let rustc = Path::new(toolchain.get("NODEMESH_EBPF_RUSTC").context("no rustc is named")?);
    let beside = |name: &str| Some(rustc.with_file_name(name)).filter(|path| path.exists());
    let Some(clippy) = beside("cargo-clippy") else {
        bail!(
            "{} has no cargo-clippy beside it: add it (rustup component add clippy, or Debian's \
             rust-web-clippy)",
            rustc.display()
        );
    };
    let cargo = beside("cargo").unwrap_or_else(|| PathBuf::from(cargo().get_program()));
    let mut command = Command::new(clippy);
    command
        .current_dir(root()?)
        .args(["clippy", "--package", "mesh-ebpf", "--target", "bpfel-unknown-none"])
        .args(["-Z", "build-std=core", "--", "-D", "warnings"])
        .env("CARGO", cargo)
        .env("CARGO_BUILD_RUSTC", rustc)
        // Building `core` is unstable in cargo, and aya-ebpf uses an unstable feature.
        .env("RUSTC_BOOTSTRAP", "1")
        // A rustup proxy tells its choice to its children.
        .env_remove("RUSTC")
        .env_remove("RUSTUP_TOOLCHAIN");
    run(&mut command)
}

fn lint_scripts() -> Result<()> {
    let scripts = ["scripts/setup.sh", ".ci/run"];
    if Command::new("shellcheck").arg("--version").output().is_err() {
        eprintln!("xtask: shellcheck is not installed: {} not checked", scripts.join(", "));
        return Ok(());
    }
    run(Command::new("shellcheck").current_dir(root()?).args(scripts))
}

/// The keys and values of the file that `scripts/setup.sh` leaves.
fn ebpf_toolchain() -> Result<BTreeMap<String, String>> {
    let path = root()?.join("target/ebpf-toolchain.env");
    let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    Ok(text
        .lines()
        .filter_map(|line| line.split_once('='))
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .collect())
}

fn build_binaries(build: &mut Command) -> Result<()> {
    run(build.args(["--package", "mesh-agent", "--package", "mesh-control"]))
}

fn setup(tools: Tools) -> Result<()> {
    let what = match tools {
        Tools::Build => "build",
        Tools::All => "all",
        Tools::Bench => "bench",
        Tools::Vm => "vm",
    };
    run(Command::new(root()?.join("scripts/setup.sh")).arg(what))
}

fn cargo() -> Command {
    Command::new(env::var_os("CARGO").as_deref().unwrap_or(OsStr::new("cargo")))
}

/// Where the workspace is.
pub(crate) fn root() -> Result<&'static Path> {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("xtask is in the workspace")
}

fn run(command: &mut Command) -> Result<()> {
    let line = [command.get_program()]
        .into_iter()
        .chain(command.get_args())
        .map(|word| word.to_string_lossy())
        .collect::<Vec<_>>()
        .join(" ");
    let status = command.status().with_context(|| format!("running {line}"))?;
    ensure!(status.success(), "{line}: {status}");
    Ok(())
}
