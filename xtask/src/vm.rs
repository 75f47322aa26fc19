//! Tests on another kernel: a virtual machine with the distribution's, emulated.
//!
//! Its root is this machine's file system, read-only, under a layer in memory: what the tests need
//! is there, and nothing that they do to it stays.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail, ensure};

/// What the first program needs to reach the root: modules are loaded in this order, after what they
/// depend on.
const BOOT_MODULES: [&str; 4] = ["virtio_pci", "9pnet_virtio", "9p", "overlay"];

const INIT: &str = include_str!("vm/init.sh");

const RESULT: &str = "nodemesh-vm: exit ";

/// Runs commands, one after the other; before the program there may be assignments to its
/// environment. `kernel` is where the package of a kernel is unpacked.
pub(crate) fn run(kernel: &Path, commands: &[String]) -> Result<()> {
    let modules = kernel.join("lib/modules");
    let version = fs::read_dir(&modules)
        .with_context(|| format!("reading {}", modules.display()))?
        .next()
        .context("the package has no modules")??
        .file_name();
    let version = version.to_str().context("a kernel's version is text")?;
    let dir = tempfile::tempdir()?;
    let initramfs = initramfs(dir.path(), kernel, version)?;

    let job = dir.path().join("job");
    fs::create_dir(&job)?;
    fs::write(job.join("commands"), commands.join("\n") + "\n")?;
    fs::write(job.join("modules"), modules.display().to_string())?;

    let share = |id: &str, path: &str| {
        let writes =
            format!("local,id={id},path={path},security_model=none,readonly=on,multidevs=remap");
        [
            "-fsdev".to_owned(),
            writes,
            "-device".to_owned(),
            format!("virtio-9p-pci,fsdev={id},mount_tag={id}"),
        ]
    };
    let mut child = Command::new("qemu-system-x86_64")
        // Emulated: the machine that this is may be a virtual one that cannot have its own.
        .args(["-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "6144"])
        .args(["-nodefaults", "-no-reboot", "-display", "none", "-serial", "stdio"])
        .arg("-kernel")
        .arg(kernel.join("boot").join(format!("vmlinuz-{version}")))
        .arg("-initrd")
        .arg(&initramfs)
        .args(["-append", "console=ttyS0 quiet panic=-1 random.trust_cpu=on"])
        .args(share("host", "/"))
        .args(share("job", &job.display().to_string()))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("starting qemu-system-x86_64")?;
    let output = child.stdout.take().context("its output is piped")?;
    let mut result = None;
    for line in BufReader::new(output).split(b'\n') {
        let line = line?;
        let line = String::from_utf8_lossy(&line);
        let line = line.trim_end_matches('\r');
        match line.split_once(RESULT) {
            Some((_, code)) => result = Some(code.to_owned()),
            None => println!("{line}"),
        }
    }
    let status = child.wait()?;
    match result.as_deref() {
        Some("0") => Ok(()),
        Some(code) => bail!("tests failed on Linux {version}: {code}"),
        None => bail!("the virtual machine with Linux {version} ended ({status}) before the tests"),
    }
}

/// Writes the archive that the kernel starts from.
fn initramfs(dir: &Path, kernel: &Path, version: &str) -> Result<PathBuf> {
    let (root, archive) = (dir.join("initramfs"), dir.join("initramfs.cpio"));
    for directory in ["bin", "modules", "proc", "sys", "dev", "host", "memory", "root"] {
        fs::create_dir_all(root.join(directory))?;
    }
    fs::copy("/bin/busybox", root.join("bin/busybox")).context("copying busybox")?;
    fs::write(root.join("init"), INIT)?;
    fs::set_permissions(root.join("init"), std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    let modules = kernel.join("lib/modules").join(version);
    let dependencies = fs::read_to_string(modules.join("modules.dep"))
        .context("reading modules.dep: scripts/setup.sh vm makes it")?;
    let mut order = Vec::new();
    for module in BOOT_MODULES {
        let file = format!("/{module}.ko");
        let line = dependencies
            .lines()
            .filter_map(|line| line.split_once(':'))
            .find(|(path, _)| path.ends_with(&file));
        let (path, needs) = line.with_context(|| format!("this kernel has no module {module}"))?;
        for path in needs.split_whitespace().rev().chain([path]) {
            if !order.contains(&path) {
                order.push(path);
            }
        }
    }
    for (place, path) in order.iter().enumerate() {
        fs::copy(modules.join(path), root.join(format!("modules/{place:03}.ko")))
            .with_context(|| format!("copying {path}"))?;
    }
    let pack = format!(
        "cd '{}' && find . | cpio --quiet -o -H newc > '{}'",
        root.display(),
        archive.display()
    );
    let status = Command::new("sh").args(["-ec", &pack]).status().context("running cpio")?;
    ensure!(status.success(), "cpio: {status}");
    Ok(archive)
}
