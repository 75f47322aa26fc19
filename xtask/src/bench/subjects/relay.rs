//! What somebody could put on the nodes by hand: a relay on each, and mutual TLS 1.3 between them.
//!
//! Unlike the mesh it is not transparent: the client connects to the relay of its node, and a node,
//! not a pod, is who is authenticated.

use std::fmt::Write as _;
use std::fs;
use std::net::IpAddr;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result};
use xtask::lab::{Netns, Process};

use super::bare::Bare;
use super::{Endpoint, PORTS, Subject, certificates};

/// Programs of Debian's.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Program {
    Haproxy,
    Stunnel,
}

/// The ports between the nodes are those of the servers and this.
const OFFSET: u16 = 10_000;

/// One end of the way between the nodes.
struct End<'a> {
    /// Of the relay's node.
    name: &'a str,
    listen: IpAddr,
    connect: IpAddr,
    /// Whether it is the client of the TLS connection.
    is_client: bool,
}

impl Program {
    pub(crate) const ALL: [Self; 2] = [Self::Haproxy, Self::Stunnel];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Haproxy => "haproxy",
            Self::Stunnel => "stunnel",
        }
    }

    /// Sets it up on both nodes.
    pub(crate) fn up(self) -> Result<Subject> {
        let bare = Bare::new(&format!("bench-{}", self.name()))?;
        let directory = bare.lab.directory(self.name())?;
        certificates::write(&directory, &["a", "b"])?;
        let [a, b] = &bare.nodes;
        let dialled = a.address_to_pods();
        let ends = [
            (a, End { name: "a", listen: dialled, connect: b.address(), is_client: true }),
            (b, End { name: "b", listen: b.address(), connect: bare.far.v4(), is_client: false }),
        ];
        let mut relays = Vec::new();
        for (node, end) in ends {
            relays.push(self.start(node, &end, &directory, bare.lab.logs())?);
        }
        Ok(Subject {
            name: self.name().into(),
            proxies: relays.iter().map(Process::pid).collect(),
            client: bare.client.clone(),
            far: Endpoint::start(&bare.lab, &bare.far, dialled)?,
            near: None,
            _rest: Box::new((relays, bare)),
        })
    }

    fn start(self, node: &Netns, end: &End<'_>, directory: &Path, logs: &Path) -> Result<Process> {
        let file = directory.join(format!("{}.conf", end.name));
        let config = match self {
            Self::Haproxy => haproxy(end, directory),
            Self::Stunnel => stunnel(end, directory),
        };
        fs::write(&file, config?)?;
        let mut command = match self {
            Self::Haproxy => Command::new("haproxy"),
            Self::Stunnel => Command::new("stunnel4"),
        };
        if matches!(self, Self::Haproxy) {
            command.arg("-f");
        }
        let log = logs.join(format!("{}-{}.log", self.name(), end.name));
        Process::spawn(node, command.arg(file), &log)
            .with_context(|| format!("{} (Debian has it)", self.name()))
    }
}

fn haproxy(end: &End<'_>, directory: &Path) -> Result<String> {
    let mut text = String::from(
        "defaults\n  mode tcp\n  timeout connect 5s\n  timeout client 1h\n\
         \x20 timeout server 1h\n",
    );
    let tls = format!(
        "ssl crt {directory}/{}.pem ca-file {directory}/ca.pem verify required ssl-min-ver TLSv1.3",
        end.name,
        directory = directory.display(),
    );
    let (bind, server) = if end.is_client { ("", &*tls) } else { (&*tls, "") };
    for (listen, connect) in end.ports() {
        writeln!(text, "listen port{listen}\n  bind {}:{listen} {bind}", end.listen)?;
        writeln!(text, "  server next {}:{connect} {server}", end.connect)?;
    }
    Ok(text)
}

fn stunnel(end: &End<'_>, directory: &Path) -> Result<String> {
    let mut text = format!(
        "foreground = yes\npid =\ndebug = warning\nsslVersionMin = TLSv1.3\nverifyChain = yes\n\
         cert = {directory}/{}.pem\nCAfile = {directory}/ca.pem\nclient = {}\n",
        end.name,
        if end.is_client { "yes" } else { "no" },
        directory = directory.display(),
    );
    for (listen, connect) in end.ports() {
        writeln!(text, "[port{listen}]\naccept = {}:{listen}", end.listen)?;
        writeln!(text, "connect = {}:{connect}", end.connect)?;
    }
    Ok(text)
}

impl End<'_> {
    /// The pairs of ports that it listens on and connects to.
    fn ports(&self) -> impl Iterator<Item = (u16, u16)> {
        PORTS.into_iter().map(|port| {
            let between = port + OFFSET;
            if self.is_client { (port, between) } else { (between, port) }
        })
    }
}
