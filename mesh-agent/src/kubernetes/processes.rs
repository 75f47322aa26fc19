//! What runs on the node: whose pod a process is of, and which network namespace it is in.

use std::{
    collections::BTreeSet,
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

/// Where container runtimes keep the network namespaces that they made.
const PINS: &str = "/run/netns/";

/// What the kubelet puts before a pod's UID in the name of the pod's cgroup.
const POD: &str = "pod";

/// The number of a namespace on nsfs.
pub(super) type Inode = u64;

/// A process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Process {
    /// The UIDs of the pods whose it is, by its cgroups: one, unless somebody plays tricks.
    pub(super) pods: BTreeSet<String>,
    pub(super) netns: Inode,
}

/// A place where a network namespace is mounted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Pin {
    pub(super) netns: Inode,
    pub(super) path: PathBuf,
}

/// Everything that says which namespace is a pod's.
#[derive(Clone, Debug, Default)]
pub(super) struct Scene {
    /// The processes of pods.
    pub(super) processes: Vec<Process>,
    pub(super) pins: Vec<Pin>,
    /// The node's own namespace: the agent's.
    pub(super) host: Inode,
}

impl Scene {
    /// Looks around. Needs the host's process IDs, and `CAP_SYS_PTRACE`.
    ///
    /// # Errors
    ///
    /// When a process cannot be looked at that is there.
    pub(super) fn read() -> io::Result<Self> {
        let proc = Path::new("/proc");
        let mut scene = Self {
            processes: Vec::new(),
            pins: pins(&fs::read_to_string("/proc/thread-self/mountinfo")?),
            host: netns(&proc.join("thread-self"))?,
        };
        for entry in fs::read_dir(proc)? {
            let entry = entry?;
            let is_process = entry.file_name().as_encoded_bytes().iter().all(u8::is_ascii_digit);
            if is_process && let Some(process) = unless_gone(process(&entry.path()))? {
                scene.processes.push(process);
            }
        }
        scene.processes.retain(|process| !process.pods.is_empty());
        Ok(scene)
    }
}

fn process(directory: &Path) -> io::Result<Process> {
    let read = || fs::read_to_string(directory.join("cgroup")).map(|text| pods(&text));
    loop {
        let pods = read()?;
        if pods.is_empty() {
            return Ok(Process { pods, netns: 0 });
        }
        let netns = netns(directory)?;
        // Meanwhile its number may have become that of another process.
        if read()? == pods {
            return Ok(Process { pods, netns });
        }
    }
}

fn netns(directory: &Path) -> io::Result<Inode> {
    Ok(fs::metadata(directory.join("ns/net"))?.ino())
}

/// Processes end while they are looked at, and a dead one has no namespace.
fn unless_gone<T>(found: io::Result<T>) -> io::Result<Option<T>> {
    match found {
        Ok(found) => Ok(Some(found)),
        Err(error)
            if error.kind() == io::ErrorKind::NotFound
                || error.raw_os_error() == Some(nix::libc::ESRCH) =>
        {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// The pods that a process is of: what proc_pid_cgroup(5) shows, one line for each hierarchy.
fn pods(cgroups: &str) -> BTreeSet<String> {
    let path = |line: &str| line.splitn(3, ':').nth(2).and_then(pod_of).map(str::to_lowercase);
    cgroups.lines().filter_map(path).map(|uid| uid.replace('_', "-")).collect()
}

/// The UID in a path of cgroups. Of several the outermost, which alone is the kubelet's: below it
/// the pod may have made its own.
fn pod_of(path: &str) -> Option<&str> {
    // A runtime that does not talk to systemd while the kubelet does uses colons.
    path.split(['/', ':']).find_map(|name| {
        let name = name.strip_suffix(".slice").unwrap_or(name);
        let uid = name.rsplit('-').next().filter(|last| last.starts_with(POD));
        let uid = uid.or(Some(name)).and_then(|name| name.strip_prefix(POD));
        uid.filter(|uid| is_uid(uid))
    })
}

/// A UUID, also with the underscores that systemd needs, or an MD5 sum: the kubelet makes those up
/// for static pods.
fn is_uid(text: &str) -> bool {
    let parts: Vec<&str> = text.split(['-', '_']).collect();
    let lengths: Vec<_> = parts.iter().map(|part| part.len()).collect();
    let is_hex = |part: &&str| part.bytes().all(|byte| byte.is_ascii_hexdigit());
    matches!(*lengths, [8, 4, 4, 4, 12] | [32]) && parts.iter().all(is_hex)
}

/// The network namespaces that a mount table as in proc_pid_mountinfo(5) shows below [`PINS`].
fn pins(mounts: &str) -> Vec<Pin> {
    let pin = |line: &str| {
        let (fields, rest) = line.split_once(" - ")?;
        let mut fields = fields.split(' ').skip(3);
        let (root, path) = (fields.next()?, fields.next()?);
        let inode = root.strip_prefix("net:[")?.strip_suffix(']')?;
        let is_pin = rest.starts_with("nsfs ") && path.starts_with(PINS) && !path.contains('\\');
        is_pin.then_some(Pin { netns: inode.parse().ok()?, path: path.into() })
    };
    mounts.lines().filter_map(pin).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const UID: &str = "0b9c5d0e-6a0f-4a54-9e0c-3f8f3c1f7a11";
    const OTHER: &str = "7c9e6679-7425-40de-944b-e07fc1f90ae7";
    const STATIC: &str = "7fc14ba5a0e1cdb2a5b2d3e1f2f4a6b8";

    #[test]
    fn a_static_pod_is_found_by_what_the_kubelet_calls_it() {
        for path in [
            format!("/kubepods/burstable/pod{STATIC}/0123abcd"),
            format!("/kubepods.slice/kubepods-pod{STATIC}.slice/cri-containerd-01.scope"),
        ] {
            assert_eq!(
                pods(&format!("0::{path}\n")),
                BTreeSet::from([STATIC.to_owned()]),
                "{path}"
            );
        }
    }

    #[test]
    fn a_pod_is_found_in_every_form_of_its_cgroup() {
        let systemd = UID.replace('-', "_");
        for path in [
            format!("/kubepods/pod{UID}/0123abcd"),
            format!("/kubepods/burstable/pod{UID}/0123abcd"),
            format!("/../../pod{UID}/0123abcd"),
            format!("/kubepods.slice/kubepods-pod{systemd}.slice/cri-containerd-01.scope"),
            format!(
                "/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice/\
                 kubelet-kubepods-burstable-pod{systemd}.slice/crio-01.scope"
            ),
            format!(
                "/system.slice/containerd.service/kubepods-pod{systemd}.slice:cri-containerd:01"
            ),
            format!("/kubepods/pod{UID}/01/kubepods/pod{OTHER}/02"),
        ] {
            let unified = format!("0::{path}\n");
            assert_eq!(pods(&unified), BTreeSet::from([UID.to_owned()]), "{path}");
            let hybrid = format!("5:cpu,cpuacct:{path}\n1:name=systemd:{path}\n0::/system.slice\n");
            assert_eq!(pods(&hybrid), BTreeSet::from([UID.to_owned()]), "{path}");
        }
    }

    #[test]
    fn what_is_no_pod_s_cgroup_names_none() {
        for path in [
            "/",
            "/system.slice/kubelet.service",
            "/kubepods/burstable",
            "/kubepods/pod",
            "/kubepods/podx",
            "/kubepods/pod7fc14ba5a0e1cdb2a5b2d3e1f2f4a6b",
            "/machine.slice/libpod-0b9c5d0e6a0f4a549e0c3f8f3c1f7a110b9c5d0e6a0f4a549e0c3f8f3c1f7a11.scope",
            "/user.slice/0b9c5d0e-6a0f-4a54-9e0c-3f8f3c1f7a11",
        ] {
            assert_eq!(pods(&format!("0::{path}\n")), BTreeSet::new(), "{path}");
        }
    }

    #[test]
    fn hierarchies_that_disagree_are_told() {
        let text = format!("2:cpu:/kubepods/pod{UID}/1\n0::/kubepods/pod{OTHER}/1\n");
        assert_eq!(pods(&text), BTreeSet::from([UID.to_owned(), OTHER.to_owned()]));
    }

    #[test]
    fn namespaces_are_found_where_they_are_mounted() {
        let table = "25 1 0:4 net:[4026531840] /proc/x rw - nsfs nsfs rw\n\
                     26 1 0:24 / /run/netns rw shared:2 - tmpfs tmpfs rw\n\
                     27 26 0:4 net:[4026532281] /run/netns/cni-1 rw shared:9 - nsfs nsfs rw\n\
                     28 26 0:4 mnt:[4026532282] /run/netns/mnt rw - nsfs nsfs rw\n\
                     29 26 0:4 net:[4026532283] /run/netns/a\\040b rw - nsfs nsfs rw\n\
                     30 26 8:1 net:[4026532284] /run/netns/file rw - ext4 /dev/sda rw\n";
        let pin = Pin { netns: 4_026_532_281, path: "/run/netns/cni-1".into() };
        assert_eq!(pins(table), [pin]);
    }
}
