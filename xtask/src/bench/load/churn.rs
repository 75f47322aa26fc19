//! A connection for each request, by threads that block: wrk cannot close first.

use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use xtask::lab::Netns;

use crate::bench::plan::End;
use crate::bench::stats::percentile;

/// How many connections are open at a time.
const AT_ONCE: usize = 16;
/// Longer than anything but a lost packet, after all its retransmissions.
const TIMEOUT: Duration = Duration::from_secs(10);

/// What was seen.
pub(crate) struct Churn {
    pub(crate) connections: usize,
    pub(crate) elapsed: Duration,
    /// From connect() to the close, in µs.
    pub(crate) p50: u32,
    pub(crate) p99: u32,
    /// Connections that ended in each second.
    pub(crate) by_second: Vec<u32>,
}

/// Connects, again and again, for this long. The first failure is one of the whole.
pub(crate) fn run(client: &Netns, to: SocketAddr, closes: End, length: Duration) -> Result<Churn> {
    let begin = Instant::now();
    let finished = client.run(|| {
        // These threads are where their maker is: in the client's namespace.
        thread::scope(|scope| {
            let threads: Vec<_> =
                (0..AT_ONCE).map(|_| scope.spawn(|| repeat(to, closes, begin, length))).collect();
            threads.into_iter().map(join).collect::<Result<Vec<_>>>()
        })
    })?;
    let elapsed = begin.elapsed();
    let finished = finished.concat();
    let mut by_second = vec![0; length.as_secs() as usize];
    for (second, _) in &finished {
        if let Some(count) = by_second.get_mut(*second as usize) {
            *count += 1;
        }
    }
    let mut took: Vec<u32> = finished.iter().map(|(_, took)| *took).collect();
    took.sort_unstable();
    let at = |percent| percentile(&took, percent).context("no connection was made");
    Ok(Churn { connections: took.len(), elapsed, p50: at(50)?, p99: at(99)?, by_second })
}

/// A single request.
pub(crate) fn once(client: &Netns, to: SocketAddr) -> Result<()> {
    client.run(|| request(to, End::Server, &mut [0; 1024]))
}

/// Makes about so many connections, and uses each once.
pub(crate) fn hold(client: &Netns, to: SocketAddr, count: u64) -> Result<Vec<TcpStream>> {
    let connect = |_| -> Result<TcpStream> {
        let mut stream = TcpStream::connect_timeout(&to, TIMEOUT).context("connecting")?;
        ask(&mut stream, End::Client, &mut [0; 1024])?;
        Ok(stream)
    };
    client.run(|| {
        thread::scope(|scope| {
            let part = || (0..count / AT_ONCE as u64).map(connect).collect::<Result<Vec<_>>>();
            let threads: Vec<_> = (0..AT_ONCE).map(|_| scope.spawn(part)).collect();
            let parts = threads.into_iter().map(join).collect::<Result<Vec<_>>>()?;
            Ok(parts.into_iter().flatten().collect())
        })
    })
}

fn join<T>(thread: thread::ScopedJoinHandle<'_, T>) -> T {
    thread.join().expect("a client does not panic")
}

/// The second in which each connection ended, and what it took, in µs.
fn repeat(
    to: SocketAddr,
    closes: End,
    begin: Instant,
    length: Duration,
) -> Result<Vec<(u32, u32)>> {
    let mut finished = Vec::new();
    let mut buffer = [0; 1024];
    while begin.elapsed() < length {
        let before = Instant::now();
        request(to, closes, &mut buffer)
            .with_context(|| format!("connection {} of one of {AT_ONCE}", finished.len()))?;
        finished.push((begin.elapsed().as_secs() as u32, before.elapsed().as_micros() as u32));
    }
    Ok(finished)
}

fn request(to: SocketAddr, closes: End, buffer: &mut [u8]) -> Result<()> {
    let mut stream = TcpStream::connect_timeout(&to, TIMEOUT).context("connecting")?;
    ask(&mut stream, closes, buffer)?;
    if matches!(closes, End::Server) {
        let more = stream.read(buffer).context("waiting for the server to close")?;
        ensure!(more == 0, "{more} bytes after the answer");
    }
    Ok(())
}

fn ask(stream: &mut TcpStream, closes: End, buffer: &mut [u8]) -> Result<()> {
    stream.set_read_timeout(Some(TIMEOUT))?;
    let connection = match closes {
        End::Client => "keep-alive",
        End::Server => "close",
    };
    let request = format!("GET / HTTP/1.1\r\nHost: bench\r\nConnection: {connection}\r\n\r\n");
    stream.write_all(request.as_bytes()).context("sending the request")?;
    let answer = answer(stream, buffer).context("reading the answer")?;
    ensure!(answer.starts_with(b"HTTP/1.1 200"), "{:?}", String::from_utf8_lossy(answer));
    Ok(())
}

/// An answer that is known by its last bytes.
fn answer<'a>(stream: &mut TcpStream, buffer: &'a mut [u8]) -> io::Result<&'a [u8]> {
    let mut length = 0;
    while !buffer[..length].ends_with(super::server::BODY.as_bytes()) {
        match stream.read(&mut buffer[length..])? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            more => length += more,
        }
    }
    Ok(&buffer[..length])
}
