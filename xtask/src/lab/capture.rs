//! The sniffer: an AF_PACKET socket that sees every frame of a namespace.
//!
//! A capture that missed something proves nothing, so it must show that it was alive from its
//! first moment to its last (it sees a marker of its own at both) and that the kernel dropped
//! nothing on the way to it; else every question to it is answered with an error.

use std::fs;
use std::io::IoSliceMut;
use std::net::UdpSocket;
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, bail, ensure};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType,
    recvmsg, setsockopt, socket, sockopt,
};
use nix::sys::time::TimeVal;

use super::packet::{Segment, segment};
use super::stream::{Stream, assemble};
use super::tls::{Hello, TLS13, inspect};
use super::{Canary, Netns};

/// What the kernel may queue for the sniffer, in bytes: seconds of bulk traffic.
const QUEUE: usize = 512 << 20;
/// A frame may be a whole segment before offload splits it.
const LARGEST_FRAME: usize = 128 << 10;
/// `PACKET_OUTGOING` of packet(7).
const OUTGOING: u8 = 4;

/// A running capture.
#[derive(Debug)]
pub struct Capture {
    netns: Netns,
    directory: PathBuf,
    /// The last marker, once it was sent.
    stop: Arc<OnceLock<Canary>>,
    sniffer: JoinHandle<Result<Sniffed>>,
    first_marker: Canary,
}

/// What a capture saw.
#[derive(Debug)]
pub struct Recording {
    frames: Vec<Frame>,
    pcap: PathBuf,
}

#[derive(Debug)]
struct Frame {
    at: SystemTime,
    bytes: Vec<u8>,
}

#[derive(Debug, Default)]
struct Sniffed {
    frames: Vec<Frame>,
    /// Everything on loopback too small to be anything but a marker.
    marks: Vec<Vec<u8>>,
    dropped: u32,
}

impl Capture {
    /// Starts to capture: the frames of one device, both ways, or else what comes in over any
    /// device. When this returns, whatever is sent is seen. `directory` gets what proves a failure.
    pub fn start(netns: &Netns, device: Option<&str>, directory: &Path) -> Result<Self> {
        let index = device.map(|device| netns.ifindex(device)).transpose()?;
        let loopback = netns.ifindex("lo")?;
        let stop = Arc::<OnceLock<Canary>>::default();
        let socket = netns.run(|| {
            socket(
                AddressFamily::Packet,
                SockType::Raw,
                SockFlag::SOCK_CLOEXEC,
                SockProtocol::EthAll,
            )
        })?;
        setsockopt(&socket, sockopt::RcvBufForce, &QUEUE)?;
        setsockopt(&socket, sockopt::RxqOvfl, &1)?;
        setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::new(0, 20_000))?;
        let stopped = Arc::clone(&stop);
        let sniffer = std::thread::spawn(move || {
            let mut sniffed = Sniffed::default();
            let mut buffer = vec![0; LARGEST_FRAME];
            let mut looked_at = 0;
            loop {
                // Before the read: what was sent before the stop is in the queue by now.
                let last = stopped.get();
                let is_quiet = !sniffed.read(socket.as_raw_fd(), &mut buffer, index, loopback)?;
                let Some(last) = last else { continue };
                let seen = sniffed.marks[looked_at..].iter().any(|mark| last.is_in(mark));
                looked_at = sniffed.marks.len();
                // On a busy wire it never is quiet.
                if seen || is_quiet {
                    return Ok(sniffed);
                }
            }
        });
        let first_marker = mark(netns)?;
        let directory = directory.to_owned();
        Ok(Self { netns: netns.clone(), directory, stop, sniffer, first_marker })
    }

    /// Ends the capture, and fails if it did not see everything.
    pub fn stop(self) -> Result<Recording> {
        let last_marker = mark(&self.netns)?;
        // Nobody else sets it.
        self.stop.set(last_marker.clone()).ok();
        let sniffed =
            self.sniffer.join().map_err(|_| anyhow::anyhow!("the sniffer panicked"))??;
        for (marker, moment) in [(&self.first_marker, "start"), (&last_marker, "end")] {
            let seen = sniffed.marks.iter().any(|mark| marker.is_in(mark));
            ensure!(seen, "inconclusive: the capture was not alive at its {moment}");
        }
        ensure!(sniffed.dropped == 0, "inconclusive: {} frames were dropped", sniffed.dropped);
        let name = format!("{}-{}.pcap", self.netns.name(), first_digits(&self.first_marker));
        Ok(Recording { frames: sniffed.frames, pcap: self.directory.join(name) })
    }
}

impl Sniffed {
    /// Reads one frame; false if there is none for now.
    fn read(
        &mut self,
        socket: std::os::fd::RawFd,
        buffer: &mut [u8],
        device: Option<u32>,
        loopback: u32,
    ) -> Result<bool> {
        let mut control = nix::cmsg_space!(u32);
        let mut slices = [IoSliceMut::new(buffer)];
        let received =
            recvmsg::<LinkAddr>(socket, &mut slices, Some(&mut control), MsgFlags::empty());
        let message = match received {
            Ok(message) => message,
            Err(Errno::EAGAIN | Errno::EINTR) => return Ok(false),
            Err(error) => return Err(error).context("reading from the packet socket"),
        };
        ensure!(!message.flags.contains(MsgFlags::MSG_TRUNC), "a frame was larger than expected");
        for cmsg in message.cmsgs()? {
            if let ControlMessageOwned::RxqOvfl(dropped) = cmsg {
                self.dropped = dropped;
            }
        }
        let address = message.address.context("a frame without an address")?;
        let (index, length) = (u32::try_from(address.ifindex())?, message.bytes);
        let bytes = || buffer[..length].to_vec();
        if index == loopback && length < 200 {
            self.marks.push(bytes());
        }
        let wanted = match device {
            Some(device) => index == device,
            // Each frame of the wire is seen as it comes in, and again as it goes out.
            None => index != loopback && address.pkttype() != OUTGOING,
        };
        if wanted {
            self.frames.push(Frame { at: SystemTime::now(), bytes: bytes() });
        }
        Ok(true)
    }
}

/// Sends a datagram to nobody over loopback of the namespace.
fn mark(netns: &Netns) -> Result<Canary> {
    const DISCARD: &str = "127.0.0.1:9";
    let marker = Canary::random();
    netns
        .run(|| UdpSocket::bind("127.0.0.1:0")?.send_to(marker.bytes(), DISCARD))
        .context("marking the capture")?;
    Ok(marker)
}

fn first_digits(canary: &Canary) -> &str {
    &canary.text()[..8]
}

impl Recording {
    /// Fails if the canary is in any frame, or in any TCP stream across its segments.
    pub fn expect_absent(&self, canary: &Canary) -> Result<()> {
        if self.contains(canary) {
            bail!("the canary is in the clear: {}", self.keep());
        }
        Ok(())
    }

    /// Fails unless the canary is there: the same matcher, where it must fire.
    pub fn expect_present(&self, canary: &Canary) -> Result<()> {
        if !self.contains(canary) {
            bail!("the canary is not in the capture, which must have it: {}", self.keep());
        }
        Ok(())
    }

    /// Whether the canary is in any frame, or in any TCP stream across its segments.
    pub fn contains(&self, canary: &Canary) -> bool {
        self.frames.iter().any(|frame| canary.is_in(&frame.bytes))
            || self.streams().iter().flat_map(|stream| &stream.runs).any(|run| canary.is_in(run))
    }

    /// Fails unless every TCP stream that `wanted` selects is TLS 1.3 from its first byte, and
    /// there is at least one in each direction.
    pub fn expect_tls13(&self, wanted: impl Fn(&Stream) -> bool) -> Result<()> {
        let (mut clients, mut servers) = (0, 0);
        for stream in self.streams().iter().filter(|stream| wanted(stream)) {
            let name = format!("{} to {}", stream.source, stream.destination);
            let bytes = match stream.runs.as_slice() {
                [] => continue,
                [run] if stream.from_start => run,
                _ => bail!("inconclusive: a part of {name} was not seen: {}", self.keep()),
            };
            let hello =
                inspect(bytes).with_context(|| format!("{name} is not TLS: {}", self.keep()))?;
            match hello {
                Hello::Client => clients += 1,
                Hello::Server(TLS13) => servers += 1,
                Hello::Server(version) => bail!("{name} chose TLS version {version:#06x}"),
                Hello::Alert => {}
            }
        }
        ensure!(
            clients > 0 && servers > 0,
            "inconclusive: no TLS handshake in the capture: {}",
            self.keep()
        );
        Ok(())
    }

    /// Every TCP stream, one for each direction of a connection.
    pub fn streams(&self) -> Vec<Stream> {
        assemble(self.segments())
    }

    /// Every TCP segment.
    pub fn segments(&self) -> impl Iterator<Item = Segment<'_>> {
        self.frames.iter().filter_map(|frame| segment(&frame.bytes))
    }

    /// The number of frames.
    pub fn len(&self) -> usize {
        self.frames.len()
    }

    /// Whether it saw nothing at all.
    pub fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    /// Writes the capture beside the logs, and says where.
    fn keep(&self) -> String {
        match fs::write(&self.pcap, self.pcap_bytes()) {
            Ok(()) => format!("see {}", self.pcap.display()),
            Err(error) => format!("and cannot write {}: {error}", self.pcap.display()),
        }
    }

    /// The format of pcap-savefile(5), version 2.4.
    fn pcap_bytes(&self) -> Vec<u8> {
        const ETHERNET: u32 = 1;
        let longest = u32::try_from(LARGEST_FRAME).unwrap_or(u32::MAX);
        let words = |words: &[u32]| words.iter().flat_map(|word| word.to_le_bytes()).collect();
        let mut file: Vec<u8> = words(&[0xa1b2_c3d4, 0x0004_0002, 0, 0, longest, ETHERNET]);
        for Frame { at, bytes } in &self.frames {
            let at = at.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
            let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
            let seconds = (at.as_secs() & 0xffff_ffff) as u32;
            file.append(&mut words(&[seconds, at.subsec_micros(), length, length]));
            file.extend(bytes);
        }
        file
    }
}
