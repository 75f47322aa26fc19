//! Ends the TCP connections that a pod opened before it was enrolled.
//!
//! The guards drop what they send; without this they would hang until they time out. `SOCK_DESTROY`
//! gives the application `ECONNABORTED` at once. Since 4.9, with `CONFIG_INET_DIAG_DESTROY`.
#![expect(clippy::wildcard_enum_match_arm, reason = "foreign enums that grow")]

use std::{io, net::IpAddr};

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_sock_diag::{
    SockDiagMessage,
    inet::{ExtensionFlags, InetRequest, SocketId, StateFlags},
};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_SOCK_DIAG};
use nix::libc::{AF_INET, AF_INET6, IPPROTO_TCP};

use super::netns::Netns;

/// `SOCK_DESTROY`, `linux/sock_diag.h`.
const SOCK_DESTROY: u16 = 21;

/// Aborts every TCP connection of the namespace that leads out of it, `own` being its addresses;
/// tells how many there were.
///
/// # Errors
///
/// What netlink answers. `EOPNOTSUPP` where the kernel cannot abort sockets: they then hang.
pub fn abort_connections(netns: &Netns, own: &[IpAddr]) -> io::Result<u32> {
    let mut socket = netns.try_run(|| Socket::new(NETLINK_SOCK_DIAG))??;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    let mut aborted = 0;
    for family in [AF_INET as u8, AF_INET6 as u8] {
        for id in connections(&socket, family)? {
            if !is_local(&id, own) && destroy(&socket, family, id)? {
                aborted += 1;
            }
        }
    }
    Ok(aborted)
}

fn is_local(id: &SocketId, own: &[IpAddr]) -> bool {
    let peer = id.destination_address.to_canonical();
    peer.is_loopback() || own.contains(&peer)
}

fn connections(socket: &Socket, family: u8) -> io::Result<Vec<SocketId>> {
    let request = InetRequest {
        family,
        protocol: IPPROTO_TCP as u8,
        extensions: ExtensionFlags::empty(),
        // Neither listeners nor what no longer has a socket.
        states: StateFlags::all() - StateFlags::LISTEN - StateFlags::TIME_WAIT - StateFlags::CLOSE,
        socket_id: if family == AF_INET as u8 { SocketId::new_v4() } else { SocketId::new_v6() },
    };
    send(socket, request, NLM_F_REQUEST | NLM_F_DUMP, None)?;
    let mut found = Vec::new();
    loop {
        for message in receive(socket)? {
            match message.payload {
                NetlinkPayload::Done(_) => return Ok(found),
                NetlinkPayload::Error(error) => return Err(error.to_io()),
                NetlinkPayload::InnerMessage(SockDiagMessage::InetResponse(response)) => {
                    found.push(response.header.socket_id);
                }
                _ => {}
            }
        }
    }
}

fn destroy(socket: &Socket, family: u8, socket_id: SocketId) -> io::Result<bool> {
    let request = InetRequest {
        family,
        protocol: IPPROTO_TCP as u8,
        extensions: ExtensionFlags::empty(),
        states: StateFlags::all(),
        socket_id,
    };
    send(socket, request, NLM_F_REQUEST | NLM_F_ACK, Some(SOCK_DESTROY))?;
    for message in receive(socket)? {
        if let NetlinkPayload::Error(error) = message.payload {
            return match error.code {
                None => Ok(true),
                // Gone by itself meanwhile.
                Some(code) if code.get() == -nix::libc::ENOENT => Ok(false),
                Some(_) => Err(error.to_io()),
            };
        }
    }
    Ok(false)
}

fn send(socket: &Socket, request: InetRequest, flags: u16, kind: Option<u16>) -> io::Result<()> {
    let mut header = NetlinkHeader::default();
    header.flags = flags;
    let mut message = NetlinkMessage::new(header, SockDiagMessage::InetRequest(request).into());
    message.finalize();
    if let Some(kind) = kind {
        message.header.message_type = kind;
    }
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    socket.send(&bytes, 0).map(|_| ())
}

fn receive(socket: &Socket) -> io::Result<Vec<NetlinkMessage<SockDiagMessage>>> {
    let (bytes, _) = socket.recv_from_full()?;
    let mut messages = Vec::new();
    let mut rest = bytes.as_slice();
    while !rest.is_empty() {
        let message = NetlinkMessage::<SockDiagMessage>::deserialize(rest)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        // Messages are padded to four bytes.
        let length = (message.header.length as usize).next_multiple_of(4);
        if length == 0 {
            break;
        }
        rest = rest.get(length..).unwrap_or_default();
        messages.push(message);
    }
    Ok(messages)
}
