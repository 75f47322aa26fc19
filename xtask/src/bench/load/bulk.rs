//! Streams that send as much as goes through.
//!
//! Not iperf3: Debian's runs all streams of a client in one thread, which then is what is measured,
//! and the CPU time is to be that of the very seconds in which the bytes are counted.

use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use anyhow::{Context as _, Result};
use xtask::lab::load::Stop;
use xtask::lab::{Netns, Server};

pub(crate) const PORT: u16 = 5201;
const BUFFER: usize = 128 * 1024;

/// A server that counts what it receives.
pub(crate) struct Sink {
    received: Arc<AtomicU64>,
    _server: Server,
}

impl Sink {
    pub(crate) fn start(netns: &Netns) -> Result<Self> {
        let received = Arc::new(AtomicU64::new(0));
        let counter = Arc::clone(&received);
        let server = netns.serve(PORT, move |mut stream| {
            let mut buffer = vec![0; BUFFER];
            // A connection that breaks is the sender's to notice.
            while let Ok(length @ 1..) = stream.read(&mut buffer) {
                counter.fetch_add(length as u64, Ordering::Relaxed);
            }
        })?;
        Ok(Self { received, _server: server })
    }

    /// Bytes, by now.
    pub(crate) fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }
}

/// Does `work` while so many streams send, and ends when all of it has arrived.
pub(crate) fn during<T>(
    client: &Netns,
    to: IpAddr,
    streams: u8,
    work: impl FnOnce() -> Result<T>,
) -> Result<T> {
    let to = SocketAddr::new(to, PORT);
    let streams = (0..streams).map(|_| client.connect(to)).collect::<io::Result<Vec<_>>>();
    let (streams, stop) = (streams.context("connecting a bulk stream")?, AtomicBool::new(false));
    thread::scope(|scope| {
        let senders: Vec<_> =
            streams.iter().map(|stream| scope.spawn(|| send(stream, &stop))).collect();
        let outcome = {
            let _stop = Stop(&stop);
            work()
        };
        for sender in senders {
            sender.join().expect("the sender does not panic").context("a bulk stream")?;
        }
        outcome
    })
}

fn send(mut stream: &TcpStream, stop: &AtomicBool) -> io::Result<()> {
    let buffer = vec![0x5a; BUFFER];
    while !stop.load(Ordering::Relaxed) {
        stream.write_all(&buffer)?;
    }
    stream.shutdown(Shutdown::Write)?;
    // Nothing comes but the end, when the server has everything.
    stream.read_to_end(&mut Vec::new()).map(drop)
}
