//! What a privileged pod, with the node's files under [`HOST`], does on its node.

use std::collections::BTreeSet;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use aya::programs::{SchedClassifier, TcAttachType};
use nix::sys::signal::{Signal, kill as send};
use nix::unistd::Pid;
use serde_json::{Map, Value, json};
use xtask::lab::Netns;

/// Where the node's files are.
const HOST: &str = "/host";

/// Kills what is in these cgroups and below them: with the UID of a pod all of it, with the ID of a
/// container that one.
pub(super) fn kill(names: &[String]) -> Result<()> {
    // systemd's names have no dashes of their own.
    let names: Vec<_> =
        names.iter().flat_map(|name| [name.clone(), name.replace('-', "_")]).collect();
    let mut found = BTreeSet::new();
    collect(&Path::new(HOST).join("sys/fs/cgroup"), &names, false, &mut found);
    ensure!(!found.is_empty(), "no process in a cgroup named like {names:?}");
    for pid in &found {
        // It may have ended since.
        send(Pid::from_raw(*pid), Signal::SIGKILL).ok();
    }
    println!("{}", found.len());
    Ok(())
}

fn collect(cgroup: &Path, names: &[String], within: bool, found: &mut BTreeSet<i32>) {
    // It may be gone by now.
    let Ok(entries) = fs::read_dir(cgroup) else { return };
    if within {
        let processes = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
        found.extend(processes.lines().filter_map(|line| line.parse::<i32>().ok()));
    }
    for entry in entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
    {
        let name = entry.file_name().to_string_lossy().into_owned();
        let within = within || names.iter().any(|wanted| name.contains(wanted));
        collect(&entry.path(), names, within, found);
    }
}

/// Prints each of the node's files as its text, each directory as what is in it, and what is not
/// there as null.
pub(super) fn look(paths: &[PathBuf]) -> Result<()> {
    let mut seen = Map::new();
    for path in paths {
        seen.insert(path.display().to_string(), contents(&on_host(path))?);
    }
    println!("{}", Value::from(seen));
    Ok(())
}

/// Writes one of the node's files, as somebody who does not know the mesh.
pub(super) fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(on_host(path), text).with_context(|| format!("writing {}", path.display()))
}

/// Removes one of the node's files.
pub(super) fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(on_host(path)) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        done => done.with_context(|| format!("removing {}", path.display())),
    }
}

fn on_host(path: &Path) -> PathBuf {
    Path::new(HOST).join(path.strip_prefix("/").unwrap_or(path))
}

fn contents(path: &Path) -> Result<Value> {
    if !path.exists() {
        return Ok(Value::Null);
    }
    if path.is_dir() {
        let mut seen = Map::new();
        for entry in fs::read_dir(path).with_context(|| format!("reading {}", path.display()))? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            let text = fs::read_to_string(entry.path()).ok();
            seen.insert(name, json!(text));
        }
        return Ok(seen.into());
    }
    let text = fs::read(path).with_context(|| format!("reading {}", path.display()))?;
    Ok(json!(String::from_utf8_lossy(&text)))
}

/// Prints which tcx programs there are on the devices of the node and of its pods.
pub(super) fn tcx() -> Result<()> {
    let mut namespaces = vec![PathBuf::from("/proc/thread-self/ns/net")];
    if let Ok(entries) = fs::read_dir(on_host(Path::new("/run/netns"))) {
        namespaces.extend(entries.flatten().map(|entry| entry.path()));
    }
    let mut names = BTreeSet::new();
    for path in namespaces {
        // It may be gone by now, or a file that nothing is mounted on.
        let Ok(netns) = Netns::open(&path) else { continue };
        names.extend(netns.run(programs)?);
    }
    println!("{}", json!(names));
    Ok(())
}

fn programs() -> Result<BTreeSet<String>> {
    let mut names = BTreeSet::new();
    for device in nix::net::if_::if_nameindex()?.iter() {
        let device = device.name().to_string_lossy();
        for direction in [TcAttachType::Ingress, TcAttachType::Egress] {
            let (_, programs) = SchedClassifier::query_tcx(&device, direction)?;
            names.extend(
                programs.iter().filter_map(|program| Some(program.name_as_str()?.to_owned())),
            );
        }
    }
    Ok(names)
}
