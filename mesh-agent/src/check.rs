//! `mesh-agent check-node`: whether this node can run the agent, before it is installed.

use std::path::{Path, PathBuf};

use crate::{bpf, cni::install, node};

/// What was looked at: how it is, or what stands against the mesh and what to do about it.
pub type Finding = Result<String, String>;

/// Looks at the node, whose root directory is `root`, and changes nothing. `conf_dir`, as the node
/// sees it, is where the container runtime finds network configurations.
pub fn node(root: &Path, conf_dir: &Path) -> Vec<Finding> {
    vec![kernel(&bpf::missing()), cgroup(), bpffs(root), network(root, conf_dir)]
}

fn kernel(missing: &[&str]) -> Finding {
    if missing.is_empty() {
        Ok("the kernel has everything".to_owned())
    } else {
        Err(format!("the kernel lacks {}", missing.join(", ")))
    }
}

fn cgroup() -> Finding {
    let root = node::cgroup2_root().map_err(|error| format!("{error:#}"))?;
    Ok(format!("the root of cgroup2 is {}", root.display()))
}

fn bpffs(root: &Path) -> Finding {
    let path = below(root, Path::new("/sys/fs/bpf"));
    if bpf::is_bpffs(&path).unwrap_or(false) {
        Ok(format!("a BPF file system is at {}", path.display()))
    } else {
        Err(format!(
            "no BPF file system is at {}: mount one on the node (mount -t bpf bpf /sys/fs/bpf), \
             and see that it is there after a reboot",
            path.display()
        ))
    }
}

fn network(root: &Path, conf_dir: &Path) -> Finding {
    let found = install::network(&below(root, conf_dir)).map_err(|error| error.to_string())?;
    Ok(format!("the CNI plugin can be chained into {}", found.display()))
}

fn below(root: &Path, path: &Path) -> PathBuf {
    root.join(path.strip_prefix("/").unwrap_or(path))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn what_a_node_lacks_is_said() {
        let root = tempfile::tempdir().unwrap();
        let conf_dir = Path::new("/etc/cni/net.d");
        let directory = below(root.path(), conf_dir);
        assert!(kernel(&["tcx", "BTF"]).unwrap_err().contains("tcx, BTF"));
        assert!(bpffs(root.path()).unwrap_err().contains("mount -t bpf"));
        assert!(network(root.path(), conf_dir).unwrap_err().contains("net.d"));
        fs::create_dir_all(&directory).unwrap();
        assert!(network(root.path(), conf_dir).unwrap_err().contains("no network"));
        fs::write(directory.join("10-a.conflist"), "{").unwrap();
        assert!(network(root.path(), conf_dir).unwrap_err().contains("JSON"));
        let text = r#"{"cniVersion": "1.0.0", "name": "a", "plugins": [{"type": "bridge"}]}"#;
        fs::write(directory.join("10-a.conflist"), text).unwrap();
        assert!(network(root.path(), conf_dir).unwrap().contains("10-a.conflist"));
        assert_eq!(fs::read_to_string(directory.join("10-a.conflist")).unwrap(), text);
    }

    #[test]
    fn this_machine_can_run_it() {
        assert_eq!(kernel(&bpf::missing()), Ok("the kernel has everything".to_owned()));
        cgroup().unwrap();
    }
}
