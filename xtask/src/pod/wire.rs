//! The sniffer of the laboratory, on a node.

use std::net::IpAddr;
use std::path::Path;

use anyhow::Result;
use serde_json::json;
use xtask::lab::{Canary, Capture, Netns};

/// Captures until standard input ends.
pub(super) fn capture(canary: &Canary, pods: &[IpAddr]) -> Result<()> {
    let capture =
        Capture::start(&Netns::open(Path::new("/proc/thread-self/ns/net"))?, None, Path::new("/"))?;
    super::until_stdin_ends()?;
    let recording = capture.stop()?;
    // What was open before cannot be judged.
    let tls = recording.expect_tls13(|stream| {
        let ends = [stream.source.ip(), stream.destination.ip()];
        stream.from_start && ends.iter().all(|end| pods.contains(end))
    });
    let seen = json!({
        "frames": recording.len(),
        "canary": recording.contains(canary),
        "not_tls13": tls.err().map(|error| format!("{error:#}")),
    });
    println!("{seen}");
    Ok(())
}
