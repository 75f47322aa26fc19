//! The kernel takes the programs, and gives them back.

use std::{fs, os::fd::AsFd, path::PathBuf, process};

use mesh_agent::bpf::Datapath;
use mesh_common::abi::{MAX_POD_ADDRESSES, PodConfig};
use nix::{
    mount::{MntFlags, umount2},
    sched::{CloneFlags, unshare},
};

/// A BPF file system of this test's own.
struct BpfFs(PathBuf);

impl BpfFs {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("nodemesh-{}-{name}", process::id()));
        fs::create_dir_all(&path).expect("a directory for a file system");
        Self(path)
    }
}

impl Drop for BpfFs {
    fn drop(&mut self) {
        umount2(&self.0, MntFlags::MNT_DETACH).ok();
        fs::remove_dir(&self.0).ok();
    }
}

fn cgroup2() -> PathBuf {
    mesh_agent::node::cgroup2_root().expect("a cgroup2 hierarchy")
}

#[tokio::test]
async fn programs_load_and_pins_come_and_go() {
    let bpffs = BpfFs::new("load");
    // No namespace has this cookie: nothing on this machine is captured, and nothing is let in.
    let cookie = u64::MAX;
    let (datapath, _events) = Datapath::open(&bpffs.0, &cgroup2(), Some(cookie)).unwrap();
    let attached =
        ["connect4", "connect6", "egress", "host_flows", "guards"].map(|name| (name, true));
    assert_eq!(datapath.programs(), attached);
    let config = PodConfig {
        addresses: [[0; 16]; MAX_POD_ADDRESSES],
        address_count: 0,
        flags: 0,
        listener_port: 0,
        reserved: 0,
    };
    datapath.configure(cookie, &config).unwrap();
    assert_eq!(datapath.configuration(cookie).unwrap(), Some(config));
    assert_eq!(datapath.counted(cookie).unwrap(), mesh_agent::bpf::Counted::default());
    std::thread::scope(|scope| {
        scope
            .spawn(|| {
                unshare(CloneFlags::CLONE_NEWNET).unwrap();
                let netns = fs::File::open("/proc/thread-self/ns/net").unwrap();
                let outbound = std::net::TcpListener::bind("[::]:0").unwrap();
                let inbound = std::net::TcpListener::bind("[::]:0").unwrap();
                datapath.tag(&outbound, mesh_agent::bpf::Tag::Application).unwrap();
                datapath.steer(cookie, netns.as_fd(), &outbound, &inbound).unwrap();
                let lo = mesh_agent::bpf::Device {
                    index: 1,
                    name: "lo".to_owned(),
                    link: mesh_agent::bpf::DeviceLink::Ethernet,
                };
                datapath.guard_devices(cookie, std::slice::from_ref(&lo)).unwrap();
                datapath.guard_devices(cookie, std::slice::from_ref(&lo)).unwrap();
                datapath.guard_peers(cookie, &[lo]).unwrap();
            })
            .join()
            .unwrap();
    });
    assert_eq!(datapath.guarded().unwrap(), [cookie]);
    // A second agent finds and takes over what the first one pinned.
    let (datapath, _events) = Datapath::open(&bpffs.0, &cgroup2(), None).unwrap();
    let attached = attached.into_iter().filter(|(name, _)| *name != "host_flows");
    assert_eq!(datapath.programs(), attached.collect::<Vec<_>>());
    assert_eq!(datapath.configuration(cookie).unwrap(), Some(config));
    datapath.release(cookie).unwrap();
    assert!(datapath.guarded().unwrap().is_empty());
    Datapath::uninstall(&bpffs.0).unwrap();
    assert!(!datapath.pin_directory().exists());
}
