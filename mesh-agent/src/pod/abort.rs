//! Ends the TCP connections that a pod opened before it was enrolled.
//!
//! The guards drop what they send; without this they would hang until they time out. `SOCK_DESTROY`
//! gives the application `ECONNABORTED` at once. Since 4.9, with `CONFIG_INET_DIAG_DESTROY`.
#![expect(clippy::wildcard_enum_match_arm, reason = "foreign enums that grow")]

use std::{fs, io, net::IpAddr};

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
    let open = || may_have_sockets().then(|| Socket::new(NETLINK_SOCK_DIAG)).transpose();
    let Some(mut socket) = netns.try_run(open)?? else { return Ok(0) };
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

/// Whether the calling thread's namespace may have TCP sockets; one that has just been made has none.
/// To list them the kernel looks at all connections of the machine, which takes milliseconds.
fn may_have_sockets() -> bool {
    let count = |file| fs::read_to_string(format!("/proc/thread-self/net/{file}"));
    let none_of_v6 = match count("sockstat6") {
        Ok(text) => has_line(&text, "TCP6: inuse 0"),
        // A kernel without IPv6.
        Err(error) => error.kind() == io::ErrorKind::NotFound,
    };
    !none_of_v6 || !count("sockstat").is_ok_and(|text| has_line(&text, "TCP: inuse 0"))
}

/// Whether one of the lines says this, and perhaps more.
fn has_line(text: &str, words: &str) -> bool {
    text.lines().any(|line| {
        line.strip_prefix(words).is_some_and(|more| more.is_empty() || more.starts_with(' '))
    })
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

#[cfg(test)]
mod tests {
    use std::{net::TcpListener, thread};

    use nix::sched::{CloneFlags, unshare};

    use super::*;

    #[test]
    fn a_namespace_without_sockets_is_known() {
        let thread = thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            assert!(!may_have_sockets());
            for address in ["0.0.0.0:0", "[::]:0"] {
                let socket = TcpListener::bind(address).unwrap();
                assert!(may_have_sockets(), "{address}");
                drop(socket);
                assert!(!may_have_sockets());
            }
        });
        thread.join().unwrap();
    }

    #[test]
    fn ten_are_not_none() {
        assert!(has_line("sockets: used 3\nTCP: inuse 0 orphan 0\n", "TCP: inuse 0"));
        assert!(!has_line("TCP: inuse 01", "TCP: inuse 0"));
        assert!(has_line("TCP6: inuse 0\nUDP6: inuse 4", "TCP6: inuse 0"));
        assert!(!has_line("TCP6: inuse 10\n", "TCP6: inuse 0"));
    }
}
