//! Clients that count.

use std::io::{self, ErrorKind, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use serde_json::json;

/// How long one step of one conversation may take.
const PATIENCE: Duration = Duration::from_secs(5);
/// A steady client, not a flood.
const PAUSE: Duration = Duration::from_millis(10);

/// Sends a text and prints what comes back, as often as asked.
pub(super) fn ask(address: SocketAddr, text: &str, times: u32, patience: u64) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(patience);
    for _ in 0..times {
        let answer = loop {
            match converse(address, text) {
                Err(_) if Instant::now() < deadline => thread::sleep(PAUSE),
                answer => break answer,
            }
        };
        print!("{}", answer.with_context(|| format!("asking {address}"))?);
    }
    Ok(())
}

/// One conversation over a new connection. No answer is an error.
fn converse(address: SocketAddr, text: &str) -> io::Result<String> {
    let mut stream = connect(address)?;
    stream.write_all(text.as_bytes())?;
    match stream.shutdown(Shutdown::Write) {
        // It was reset already: the read says so.
        Err(error) if error.kind() == ErrorKind::NotConnected => {}
        outcome => outcome?,
    }
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    if answer.is_empty() {
        return Err(io::Error::new(ErrorKind::UnexpectedEof, "closed without an answer"));
    }
    Ok(answer)
}

fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&address, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// Talks until standard input ends, or so many times.
pub(super) fn load(address: SocketAddr, text: &str, count: Option<u64>) -> Result<()> {
    let stop = Arc::new(AtomicBool::new(false));
    if count.is_none() {
        let stop = Arc::clone(&stop);
        thread::spawn(move || {
            super::until_stdin_ends().ok();
            stop.store(true, Ordering::Relaxed);
        });
    }
    let (mut succeeded, mut refused, mut broken) = (0_u64, 0_u64, 0_u64);
    let mut last_success = Instant::now();
    let mut longest_gap = Duration::ZERO;
    let mut first_failure = None;
    while !stop.load(Ordering::Relaxed)
        && count.is_none_or(|all| succeeded + refused + broken < all)
    {
        match converse(address, text) {
            Ok(_) => {
                succeeded += 1;
                longest_gap = longest_gap.max(last_success.elapsed());
                last_success = Instant::now();
            }
            Err(error) => {
                if error.kind() == ErrorKind::ConnectionRefused {
                    refused += 1;
                } else {
                    broken += 1;
                }
                first_failure.get_or_insert_with(|| error.to_string());
            }
        }
        thread::sleep(PAUSE);
    }
    let longest_gap = longest_gap.max(last_success.elapsed());
    let seen = json!({
        "succeeded": succeeded,
        "refused": refused,
        "broken": broken,
        "longest_gap_ms": longest_gap.as_millis() as u64,
        "first_failure": first_failure,
    });
    println!("{seen}");
    Ok(())
}

/// Holds a connection until standard input ends, or until it is cut.
pub(super) fn hold(address: SocketAddr) -> Result<()> {
    let mut stream = TcpStream::connect_timeout(&address, PATIENCE)
        .with_context(|| format!("connecting to {address}"))?;
    stream.write_all(b"hold")?;
    let (sender, ended) = mpsc::channel();
    let asked = sender.clone();
    thread::spawn(move || super::until_stdin_ends().is_ok_and(|()| asked.send(false).is_ok()));
    thread::spawn(move || {
        // The server says nothing before the client has ended.
        stream.read_exact(&mut [0]).ok();
        sender.send(true)
    });
    println!("{}", json!({ "cut": ended.recv()? }));
    Ok(())
}
