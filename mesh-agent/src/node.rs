//! What the node offers: limits, mounts, kernel features.

use std::{fs, os::unix::fs::MetadataExt as _, path::PathBuf};

use anyhow::{Context as _, Result};
use nix::{
    mount::{MsFlags, mount},
    sys::{
        resource::{Resource, getrlimit, setrlimit},
        statvfs::{FsFlags, statvfs},
    },
};

/// The inode of the root of a cgroup hierarchy, and of no other cgroup.
const CGROUP_ROOT_INODE: u64 = 1;

/// Where the kernel's settings are.
const SETTINGS: &str = "/proc/sys";

/// The root of the cgroup2 hierarchy, by the mount table: `/sys/fs/cgroup`, or beside the first
/// version's controllers where both are in use. A container may see a part of it only, in which
/// programs would miss the pods.
///
/// # Errors
///
/// When the mount table cannot be read or has no such root.
pub fn cgroup2_root() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").context("reading the mount table")?;
    let is_root =
        |path: &PathBuf| fs::metadata(path).is_ok_and(|found| found.ino() == CGROUP_ROOT_INODE);
    cgroup2_mounts(&mounts).find(is_root).context(
        "the root of the cgroup2 hierarchy is not mounted here: mount it (in a container, the \
         host's), or set `cgroup` to its directory",
    )
}

/// Where cgroup2 is mounted, of a mount table as in proc_pid_mounts(5).
fn cgroup2_mounts(mounts: &str) -> impl Iterator<Item = PathBuf> {
    mounts.lines().filter_map(|line| {
        let mut fields = line.split(' ');
        let (_device, path, kind) = (fields.next()?, fields.next()?, fields.next()?);
        (kind == "cgroup2").then(|| path.replace("\\040", " ").into())
    })
}

/// Makes the kernel's settings writable: container runtimes mount them read-only, and pods need
/// some in their network namespaces. Only this process's container sees the difference.
///
/// # Errors
///
/// When the kernel refuses.
pub fn make_settings_writable() -> Result<()> {
    let found = statvfs(SETTINGS).with_context(|| format!("looking at {SETTINGS}"))?;
    if !found.flags().contains(FsFlags::ST_RDONLY) {
        return Ok(());
    }
    let none = None::<&str>;
    let flags = MsFlags::MS_REMOUNT
        | MsFlags::MS_BIND
        | MsFlags::MS_NOSUID
        | MsFlags::MS_NODEV
        | MsFlags::MS_NOEXEC;
    mount(none, SETTINGS, none, flags, none)
        .with_context(|| format!("making {SETTINGS} writable in this container (CAP_SYS_ADMIN)"))
}

/// Raises the limit of open files to what the kernel allows: a connection takes two.
///
/// # Errors
///
/// When the kernel refuses.
pub fn raise_file_limit() -> Result<u64> {
    let (_soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).context("reading the file limit")?;
    let wanted = hard.max(file_limit_ceiling());
    if setrlimit(Resource::RLIMIT_NOFILE, wanted, wanted).is_ok() {
        return Ok(wanted);
    }
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).context("raising the file limit")?;
    Ok(hard)
}

/// The most that any process may ask for, from `/proc/sys/fs/nr_open`.
fn file_limit_ceiling() -> u64 {
    let ceiling = fs::read_to_string("/proc/sys/fs/nr_open").ok();
    ceiling.and_then(|text| text.trim().parse().ok()).unwrap_or(1 << 20)
}

#[cfg(test)]
mod tests {
    use nix::sched::{CloneFlags, unshare};

    use super::*;

    /// A setting that every network namespace has for itself.
    const OWN_SETTING: &str = "/proc/sys/net/ipv4/ip_default_ttl";

    #[test]
    fn settings_can_be_written_where_a_runtime_forbids_it() {
        let thread = std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET).unwrap();
            let none = None::<&str>;
            let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
            mount(none, "/", none, private, none).unwrap();
            mount(Some(SETTINGS), SETTINGS, none, MsFlags::MS_BIND, none).unwrap();
            let read_only = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
            mount(none, SETTINGS, none, read_only, none).unwrap();
            assert!(fs::write(OWN_SETTING, "63").is_err());
            make_settings_writable().unwrap();
            make_settings_writable().unwrap();
            fs::write(OWN_SETTING, "63").unwrap();
        });
        thread.join().unwrap();
    }

    #[test]
    fn cgroup2_is_found_beside_the_first_version() {
        let table = "tmpfs /sys/fs/cgroup tmpfs rw 0 0\n\
                     cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n\
                     cgroup2 /sys/fs/cgroup/uni\\040fied cgroup2 rw 0 0\n";
        let found: Vec<_> = cgroup2_mounts(table).collect();
        assert_eq!(found, [PathBuf::from("/sys/fs/cgroup/uni fied")]);
    }
}
