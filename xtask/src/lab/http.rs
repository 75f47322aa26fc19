//! Just enough of HTTP to ask a local server something.

use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr};

use super::Netns;

/// Gets a page from loopback of the namespace: status line, headers and body.
pub fn get(netns: &Netns, port: u16, path: &str) -> io::Result<String> {
    let mut stream = netns.connect(SocketAddr::from((Ipv4Addr::LOCALHOST, port)))?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

/// Whether the answer is 200.
pub fn is_ok(netns: &Netns, port: u16, path: &str) -> bool {
    get(netns, port, path).is_ok_and(|answer| answer.starts_with("HTTP/1.1 200"))
}
