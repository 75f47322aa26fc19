//! The agent's sockets in a pod.
//!
//! Every one carries a tag that says what it may put on the wire; every one that faces an
//! application resets when it is closed, so that an agent that dies never looks like an orderly end.

use std::{
    io,
    net::{IpAddr, Ipv6Addr, SocketAddr, TcpStream},
    ops::RangeInclusive,
    os::fd::AsFd as _,
    sync::Arc,
    time::Duration,
};

use mesh_common::abi::CAPTURE_MARK;
use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Socket, TcpKeepalive, Type};
use tokio::net::{TcpListener, TcpSocket};

use super::netns::Netns;
use crate::{
    bpf::{Datapath, Tag},
    stats::Direction,
    sys::socket::{limit_backoff, limit_ports},
    tunnel::AppSocket,
};

/// Connections that the kernel holds until they are accepted; it cuts to `net.core.somaxconn`.
const BACKLOG: i32 = 4096;

/// How often the kernel sends something again before it gives up: `net.ipv4.tcp_retries2`.
const RETRANSMISSIONS: u32 = 15;

/// How often a silent peer is asked whether it is there, before it is taken for dead.
const PROBES: u32 = 6;

/// The ports of the agent's two kinds of dialling sockets, each a half of the kernel's default
/// range. A tunnel arrives in the server's pod from the client's address, and the agent dials the
/// application there from the same address: with the same port, the kernel would take the packets
/// of one connection for those of the other.
const NETWORK_PORTS: RangeInclusive<u16> = 32_768..=46_883;
const APPLICATION_PORTS: RangeInclusive<u16> = 46_884..=60_999;

/// The ports for dialling an application in the name of a client outside of the mesh, whose own
/// port may be any of those above.
const PLAINTEXT_PORTS: RangeInclusive<u16> = 61_000..=65_535;

/// How many of those are tried before the application counts as unreachable.
const PLAINTEXT_ATTEMPTS: usize = 64;

/// Why the kernel would not keep these halves apart in a pod with this
/// `net.ipv4.ip_local_port_range`, if so.
pub fn port_problem(range: &str) -> Option<String> {
    let mut bounds = range.split_whitespace().map_while(|bound| bound.parse::<u16>().ok());
    let separates = bounds.next().zip(bounds.next()).is_some_and(|(low, high)| {
        low <= *NETWORK_PORTS.end() && *APPLICATION_PORTS.start() <= high
    });
    (!separates).then(|| {
        format!(
            "net.ipv4.ip_local_port_range in the pod is {:?}, which does not contain {} and {}: \
             some of its connections will fail",
            range,
            NETWORK_PORTS.end(),
            APPLICATION_PORTS.start()
        )
    })
}

/// Makes sockets in one pod.
#[derive(Clone)]
pub struct PodSockets {
    netns: Arc<Netns>,
    datapath: Arc<Datapath>,
    unacknowledged: Duration,
}

impl PodSockets {
    /// Sockets of the pod in `netns`. A peer that leaves something unacknowledged for about
    /// `unacknowledged` is taken for dead.
    pub fn new(netns: Arc<Netns>, datapath: Arc<Datapath>, unacknowledged: Duration) -> Self {
        Self { netns, datapath, unacknowledged }
    }

    /// A listener for captured connections to any address and port, IPv4 and IPv6.
    ///
    /// # Errors
    ///
    /// What the kernel answers.
    pub fn listen(&self, facing: Facing) -> io::Result<TcpListener> {
        let socket = self.socket(Domain::IPV6)?;
        socket.set_only_v6(false)?;
        // Accepted sockets inherit it. They hold the applications' own ports, and without it an
        // application could not listen again while a tunnel to its port is idle.
        socket.set_reuse_address(true)?;
        socket.set_ip_transparent_v6(true)?;
        socket.set_tcp_nodelay(true)?;
        match facing {
            Facing::Application => {
                reset_on_close(&socket)?;
                self.tag(&socket, Tag::Application)?;
            }
            Facing::Network => {
                self.patience(&socket)?;
                self.tag(&socket, Tag::Tunnel)?;
            }
        }
        socket.bind(&SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)).into())?;
        socket.listen(BACKLOG)?;
        TcpListener::from_std(socket.into())
    }

    /// Says of an accepted connection that the policy lets it be plaintext.
    ///
    /// # Errors
    ///
    /// What the kernel answers.
    pub fn allow_plaintext(&self, stream: &tokio::net::TcpStream) -> io::Result<()> {
        self.datapath.tag(stream, Tag::Plaintext).map_err(io::Error::other)
    }

    /// Dials another pod's agent, or an allowed plaintext destination, from the pod's own address
    /// `source`.
    ///
    /// # Errors
    ///
    /// What the kernel answers.
    pub async fn dial_network(
        &self,
        source: IpAddr,
        destination: SocketAddr,
        tag: Tag,
    ) -> io::Result<tokio::net::TcpStream> {
        let socket = self.socket(Domain::for_address(destination))?;
        socket.set_tcp_nodelay(true)?;
        self.patience(&socket)?;
        self.tag(&socket, tag)?;
        connect(socket, source, &NETWORK_PORTS, destination).await
    }

    /// Dials an application in the pod over loopback, as if from `client`, a pod of the mesh.
    ///
    /// # Errors
    ///
    /// What the kernel answers.
    pub async fn dial_application(
        &self,
        client: IpAddr,
        destination: SocketAddr,
    ) -> io::Result<AppSocket> {
        let socket = self.application_socket(destination)?;
        connect(socket, client, &APPLICATION_PORTS, destination).await.map(AppSocket::prepared)
    }

    /// The same for a `client` outside of the mesh.
    ///
    /// # Errors
    ///
    /// What the kernel answers.
    pub async fn dial_application_in_plaintext(
        &self,
        client: IpAddr,
        destination: SocketAddr,
    ) -> io::Result<AppSocket> {
        // The kernel chooses no port outside of its range, so that it must be asked for each.
        for _ in 0..PLAINTEXT_ATTEMPTS {
            let socket = self.application_socket(destination)?;
            socket.set_reuse_address(true)?;
            let source = SocketAddr::new(client, rand::random_range(PLAINTEXT_PORTS));
            let dialled = match socket.bind(&source.into()) {
                Ok(()) => dial(socket, destination).await,
                Err(error) => Err(error),
            };
            let taken = [io::ErrorKind::AddrInUse, io::ErrorKind::AddrNotAvailable];
            match dialled {
                Err(error) if taken.contains(&error.kind()) => {}
                result => return result.map(AppSocket::prepared),
            }
        }
        Err(io::ErrorKind::AddrInUse.into())
    }

    fn application_socket(&self, destination: SocketAddr) -> io::Result<Socket> {
        let socket = self.socket(Domain::for_address(destination))?;
        socket.set_tcp_nodelay(true)?;
        if destination.is_ipv4() {
            socket.set_ip_transparent_v4(true)?;
        } else {
            socket.set_ip_transparent_v6(true)?;
        }
        socket.set_mark(CAPTURE_MARK)?;
        // Makes the pod's `sk_lookup` see loopback, and the kernel reuse ports at once.
        socket.bind_device(Some(b"lo"))?;
        reset_on_close(&socket)?;
        Ok(socket)
    }

    fn socket(&self, domain: Domain) -> io::Result<Socket> {
        let new = || Socket::new(domain, Type::STREAM.nonblocking().cloexec(), None);
        self.netns.try_run(new)?
    }

    fn tag(&self, socket: &Socket, tag: Tag) -> io::Result<()> {
        self.datapath.tag(socket, tag).map_err(io::Error::other)
    }

    /// Finds peers that are gone. Not by `TCP_USER_TIMEOUT`, which also ends the connection of a
    /// peer that answers but whose application does not read for a while.
    fn patience(&self, socket: &Socket) -> io::Result<()> {
        let seconds = |time: Duration| time.max(Duration::from_secs(1));
        let (time, interval) =
            (seconds(self.unacknowledged), seconds(self.unacknowledged / PROBES));
        let keepalive = TcpKeepalive::new().with_time(time).with_interval(interval);
        socket.set_tcp_keepalive(&keepalive.with_retries(PROBES))?;
        match limit_backoff(socket.as_fd(), self.unacknowledged / RETRANSMISSIONS) {
            // Before 6.15 it takes the kernel a quarter of an hour.
            Err(error) if error.raw_os_error() == Some(nix::libc::ENOPROTOOPT) => Ok(()),
            result => result,
        }
    }
}

/// What is at the other end of a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Facing {
    /// An application in the pod.
    Application,
    /// Something outside the pod.
    Network,
}

impl Facing {
    /// Where the connections come from that are accepted here.
    pub const fn direction(self) -> Direction {
        match self {
            Self::Application => Direction::Outbound,
            Self::Network => Direction::Inbound,
        }
    }
}

/// Connects from an address, and a port that is free towards this destination: chosen only now, so
/// that it may be in use towards others.
async fn connect(
    socket: Socket,
    source: IpAddr,
    ports: &RangeInclusive<u16>,
    destination: SocketAddr,
) -> io::Result<tokio::net::TcpStream> {
    setsockopt(&socket, sockopt::IpBindAddressNoPort, &true)?;
    limit_ports(socket.as_fd(), ports)?;
    socket.bind(&SocketAddr::new(source, 0).into())?;
    dial(socket, destination).await
}

async fn dial(socket: Socket, destination: SocketAddr) -> io::Result<tokio::net::TcpStream> {
    TcpSocket::from_std_stream(TcpStream::from(socket)).connect(destination).await
}

fn reset_on_close(socket: &Socket) -> io::Result<()> {
    socket.set_linger(Some(Duration::ZERO))
}
