//! The agent's sockets in a pod.
//!
//! Every one that faces the network carries the agent's tag; every one that faces an application
//! resets when it is closed, so that an agent that dies never looks like an orderly end.

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
use crate::{bpf::Datapath, sys::socket::limit_ports};

/// Connections that the kernel holds until they are accepted; it cuts to `net.core.somaxconn`.
const BACKLOG: i32 = 4096;

/// When a silent connection is probed, and how often: `TCP_USER_TIMEOUT` then decides.
const KEEPALIVE: Duration = Duration::from_secs(60);

/// The ports of the agent's two kinds of dialling sockets, each a half of the kernel's default
/// range. A tunnel arrives in the server's pod from the client's address, and the agent dials the
/// application there from the same address: with the same port, the kernel would take the packets
/// of one connection for those of the other.
const NETWORK_PORTS: RangeInclusive<u16> = 32_768..=46_883;
const APPLICATION_PORTS: RangeInclusive<u16> = 46_884..=60_999;

/// Makes sockets in one pod.
#[derive(Clone)]
pub struct PodSockets {
    netns: Arc<Netns>,
    datapath: Arc<Datapath>,
    unacknowledged: Duration,
}

impl PodSockets {
    /// Sockets of the pod in `netns`. Data unacknowledged for longer than `unacknowledged` ends a
    /// connection.
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
        self.patience(&socket)?;
        if facing == Facing::Application {
            reset_on_close(&socket)?;
        }
        self.datapath.tag(&socket).map_err(io::Error::other)?;
        socket.bind(&SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)).into())?;
        socket.listen(BACKLOG)?;
        TcpListener::from_std(socket.into())
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
    ) -> io::Result<tokio::net::TcpStream> {
        let socket = self.socket(Domain::for_address(destination))?;
        socket.set_tcp_nodelay(true)?;
        self.patience(&socket)?;
        self.datapath.tag(&socket).map_err(io::Error::other)?;
        connect(socket, source, &NETWORK_PORTS, destination).await
    }

    /// Dials an application in the pod over loopback, as if from `client`.
    ///
    /// # Errors
    ///
    /// What the kernel answers.
    pub async fn dial_application(
        &self,
        client: IpAddr,
        destination: SocketAddr,
    ) -> io::Result<tokio::net::TcpStream> {
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
        connect(socket, client, &APPLICATION_PORTS, destination).await
    }

    fn socket(&self, domain: Domain) -> io::Result<Socket> {
        let new = || Socket::new(domain, Type::STREAM.nonblocking().cloexec(), None);
        self.netns.try_run(new)?
    }

    fn patience(&self, socket: &Socket) -> io::Result<()> {
        socket.set_tcp_user_timeout(Some(self.unacknowledged))?;
        socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(KEEPALIVE).with_interval(KEEPALIVE))
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
    TcpSocket::from_std_stream(TcpStream::from(socket)).connect(destination).await
}

fn reset_on_close(socket: &Socket) -> io::Result<()> {
    socket.set_linger(Some(Duration::ZERO))
}
