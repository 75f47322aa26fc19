//! Servers that say who they are and whom they see.

use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Ipv6Addr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use anyhow::{Context as _, Result};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{SigSet, Signal};
use serde_json::{Value, json};
use xtask::lab::traffic::canonical;

/// Answers when the client has said everything.
pub(crate) const ECHO: u16 = 7000;
/// Speaks first.
pub(crate) const GREETING: u16 = 7001;
/// `/ready` is 200 until somebody gets `/unready`. The body says what was asked.
pub(crate) const HTTP: u16 = 7002;
/// The health service of gRPC.
pub(crate) const GRPC: u16 = 7003;

static UNREADY: AtomicBool = AtomicBool::new(false);

/// Serves until SIGTERM.
pub(super) fn run(unshared: bool) -> Result<()> {
    let signals = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM]);
    signals.thread_block().context("blocking the signals")?;
    listen(ECHO, echo)?;
    listen(GREETING, greet)?;
    listen(HTTP, http)?;
    listen(GRPC, super::grpc::serve)?;
    if unshared {
        // The sockets stay where they are, and this thread stands for the process.
        unshare(CloneFlags::CLONE_NEWNET).context("making a network namespace")?;
    }
    signals.wait().context("waiting for a signal")?;
    Ok(())
}

fn listen(port: u16, handler: fn(&TcpStream) -> io::Result<()>) -> Result<()> {
    let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, port))
        .with_context(|| format!("listening on port {port}"))?;
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            thread::spawn(move || handler(&stream).inspect_err(|error| eprintln!("{error}")));
        }
    });
    Ok(())
}

/// Who this is, and whom it sees.
fn introduce(stream: &TcpStream, received: &str) -> io::Result<Value> {
    let name = nix::unistd::gethostname()?;
    Ok(json!({
        "pod": name.to_string_lossy(),
        "peer": canonical(stream.peer_addr()?),
        "received": received,
    }))
}

fn echo(mut stream: &TcpStream) -> io::Result<()> {
    let mut received = String::new();
    stream.read_to_string(&mut received)?;
    writeln!(stream, "{}", introduce(stream, &received)?)
}

fn greet(mut stream: &TcpStream) -> io::Result<()> {
    writeln!(stream, "{}", introduce(stream, "")?)
}

fn http(mut stream: &TcpStream) -> io::Result<()> {
    let mut lines = BufReader::new(stream).lines();
    let request = lines.next().transpose()?.unwrap_or_default();
    // The headers: what is unread when the connection is closed makes the close a reset.
    while lines.next().transpose()?.is_some_and(|line| !line.is_empty()) {}
    let path = request.split(' ').nth(1).unwrap_or_default();
    match path {
        "/unready" => UNREADY.store(true, Ordering::Relaxed),
        "/ready-again" => UNREADY.store(false, Ordering::Relaxed),
        _ => {}
    }
    let unready = path == "/ready" && UNREADY.load(Ordering::Relaxed);
    let status = if unready { "503 Service Unavailable" } else { "200 OK" };
    write!(stream, "HTTP/1.0 {status}\r\n\r\n{}\n", introduce(stream, path)?)
}
