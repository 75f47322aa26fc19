//! Which network namespace is a pod's, of a pod that nobody has enrolled: one that ran before the
//! agent did. Pure; beyond doubt, or not at all.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

use super::processes::{Pin, Scene};

/// What containerd calls the namespaces that it made for pods.
const RUNTIME_S_OWN: &str = "cni-";

/// Why a pod's namespace is not known.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Doubt {
    /// Nothing of it runs here.
    #[error("no process of it was found: does the agent see the node's processes (hostPID)?")]
    NoProcess,
    /// Its processes do not agree.
    #[error("its processes are in several network namespaces: start it anew")]
    Several,
    /// The namespace is the node's.
    #[error("a process of it is in the node's own network namespace: start it anew")]
    Host,
    /// The namespace is another pod's, too.
    #[error("the pod {0} has processes in its network namespace: start it anew")]
    Shared(String),
    /// There is no path to it that lasts.
    #[error(
        "its network namespace {0} is not mounted below /run/netns, or the agent does not see that: \
         start it anew"
    )]
    NotMounted(u64),
}

/// Finds where the network namespaces of these pods are mounted.
pub(super) fn find(
    wanted: &BTreeSet<String>,
    scene: &Scene,
) -> BTreeMap<String, Result<PathBuf, Doubt>> {
    wanted.iter().map(|uid| (uid.clone(), find_one(uid, scene))).collect()
}

fn find_one(uid: &str, scene: &Scene) -> Result<PathBuf, Doubt> {
    let Scene { processes, pins, host } = scene;
    let own = processes.iter().filter(|process| process.pods.contains(uid));
    let namespaces: BTreeSet<_> = own.map(|process| process.netns).collect();
    if namespaces.contains(host) {
        return Err(Doubt::Host);
    }
    let mounted = |netns: &&u64| pins.iter().any(|pin| pin.netns == **netns);
    let mut sandboxes = namespaces.iter().filter(mounted);
    let netns = match (sandboxes.next(), sandboxes.next(), namespaces.first()) {
        // Others its processes have made for themselves, and lead nowhere but through this one, unless
        // a privileged one has moved devices there.
        (Some(netns), None, _) => *netns,
        (None, _, None) => return Err(Doubt::NoProcess),
        (None, _, Some(netns)) if namespaces.len() == 1 => return Err(Doubt::NotMounted(*netns)),
        (_, _, _) => return Err(Doubt::Several),
    };
    let inside = processes.iter().filter(|process| namespaces.contains(&process.netns));
    if let Some(other) = inside.flat_map(|process| &process.pods).find(|other| *other != uid) {
        return Err(Doubt::Shared(other.clone()));
    }
    let here = pins.iter().filter(|pin| pin.netns == netns).map(|Pin { path, .. }| path);
    // The runtime's own lasts as long as the pod does.
    let best = here.min_by_key(|path| (!is_the_runtime_s(path), *path));
    best.cloned().ok_or(Doubt::NotMounted(netns))
}

fn is_the_runtime_s(path: &Path) -> bool {
    path.file_name()
        .is_some_and(|name| name.as_encoded_bytes().starts_with(RUNTIME_S_OWN.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::{super::processes::Process, *};

    const HOST: u64 = 1;

    /// Processes as (pods, namespace), mounts as (namespace, name).
    fn scene(processes: &[(&[&str], u64)], pins: &[(u64, &str)]) -> Scene {
        let process = |(pods, netns): &(&[&str], u64)| Process {
            pods: pods.iter().map(|uid| (*uid).to_owned()).collect(),
            netns: *netns,
        };
        let path = |name: &str| Path::new("/run/netns").join(name);
        Scene {
            processes: processes.iter().map(process).collect(),
            pins: pins
                .iter()
                .map(|(netns, name)| Pin { netns: *netns, path: path(name) })
                .collect(),
            host: HOST,
        }
    }

    #[test]
    fn a_namespace_is_a_pod_s_beyond_doubt_or_not_at_all() {
        type Case =
            (&'static str, &'static [(&'static [&'static str], u64)], Result<&'static str, Doubt>);
        let pins = [(2, "cni-a"), (3, "cni-b"), (5, "attached"), (5, "cni-c")];
        let cases: [Case; 13] = [
            ("its own", &[(&["a"], 2), (&["a"], 2), (&["b"], 3)], Ok("cni-a")),
            ("the runtime's mount is the one", &[(&["a"], 5)], Ok("cni-c")),
            ("nothing runs", &[(&["b"], 3)], Err(Doubt::NoProcess)),
            ("they disagree", &[(&["a"], 2), (&["a"], 3)], Err(Doubt::Several)),
            ("one has made its own", &[(&["a"], 2), (&["a"], 9), (&["a"], 8)], Ok("cni-a")),
            ("which is the host's", &[(&["a"], 2), (&["a"], 9), (&["a"], HOST)], Err(Doubt::Host)),
            (
                "which another is in, too",
                &[(&["a"], 2), (&["a"], 9), (&["b"], 9)],
                Err(Doubt::Shared("b".to_owned())),
            ),
            ("they disagree, not mounted", &[(&["a"], 8), (&["a"], 9)], Err(Doubt::Several)),
            ("the host's", &[(&["a"], HOST)], Err(Doubt::Host)),
            ("the host's, one of them", &[(&["a"], 2), (&["a"], HOST)], Err(Doubt::Host)),
            ("another's too", &[(&["a"], 2), (&["b"], 2)], Err(Doubt::Shared("b".to_owned()))),
            ("two cgroups", &[(&["a", "b"], 2)], Err(Doubt::Shared("b".to_owned()))),
            ("nowhere mounted", &[(&["a"], 4)], Err(Doubt::NotMounted(4))),
        ];
        for (name, processes, expected) in cases {
            let found = find(&BTreeSet::from(["a".to_owned()]), &scene(processes, &pins));
            let expected = expected.map(|file| Path::new("/run/netns").join(file));
            assert_eq!(found, BTreeMap::from([("a".to_owned(), expected)]), "{name}");
        }
    }

    #[test]
    fn one_pod_s_doubt_is_not_another_s() {
        let pins = [(2, "cni-a"), (3, "cni-b"), (4, "cni-c")];
        let scene = scene(&[(&["a"], 2), (&["b"], 3), (&["b"], 4)], &pins);
        let found = find(&["a", "b"].map(str::to_owned).into(), &scene);
        assert_eq!(found["a"], Ok("/run/netns/cni-a".into()));
        assert_eq!(found["b"], Err(Doubt::Several));
    }
}
