//! The kernel as the standard: the same check without the mesh and with it.

use std::io::{ErrorKind, Read as _};
use std::net::TcpStream;

use anyhow::{Context as _, Result, bail, ensure};

use super::traffic::accept;
use super::{Mesh, Pod};

/// Where the servers of these checks listen.
pub const PORT: u16 = 8080;

/// Checks one behaviour over IPv4 and IPv6 between pods of two nodes and of one, with the mesh
/// and also without it: what the mesh is compared with is the kernel.
pub fn as_without_mesh(title: &str, check: impl Fn(&Pod, &Pod, usize) -> Result<()>) -> Result<()> {
    let mut mesh = Mesh::new(title)?;
    let plain = (mesh.plain_pod(0, "plain1")?, mesh.plain_pod(1, "plain2")?);
    let client = mesh.pod(0, "client")?;
    let (far, near) = (mesh.pod(1, "far")?, mesh.pod(0, "near")?);
    let pairs = [
        ("without the mesh", &plain.0, &plain.1),
        ("to another node", &client, &far),
        ("on one node", &client, &near),
    ];
    for (what, client, server) in pairs {
        for (family, name) in ["IPv4", "IPv6"].into_iter().enumerate() {
            check(client, server, family).with_context(|| format!("{what}, over {name}"))?;
        }
    }
    Ok(())
}

/// A connection from one pod to the other, both ends.
pub fn pair(client: &Pod, server: &Pod, family: usize) -> Result<(TcpStream, TcpStream)> {
    let listener = server.listen(PORT)?;
    let outgoing = client.connect(server.sockets(PORT)[family])?;
    let (incoming, _) = accept(&listener)?;
    Ok((outgoing, incoming))
}

/// Reads up to an orderly end, before which nothing comes.
pub fn expect_end(stream: &mut TcpStream) -> Result<()> {
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).context("waiting for the end")?;
    ensure!(rest.is_empty(), "{} bytes came before the end", rest.len());
    Ok(())
}

/// Reads a reset, before which nothing comes.
pub fn expect_reset(stream: &mut TcpStream) -> Result<()> {
    match stream.read(&mut [0; 16]) {
        Ok(0) => bail!("a clean end instead of a reset"),
        Ok(count) => bail!("{count} bytes instead of a reset"),
        Err(error) if error.kind() == ErrorKind::ConnectionReset => Ok(()),
        Err(error) => Err(error).context("waiting for a reset"),
    }
}
