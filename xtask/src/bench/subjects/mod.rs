//! What is compared: for each subject two nodes, a client, and servers, on a laboratory of its own.

use std::any::Any;
use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, Result};
use xtask::lab::{Lab, Pod, Process, until};

use super::load::bulk::{self, Sink};
use super::load::{churn, server};
use super::plan::{Load, Route};

mod bare;
mod certificates;
pub(crate) mod nodemesh;
pub(crate) mod plain;
pub(crate) mod relay;
pub(crate) mod script;

/// What a proxy must carry.
const PORTS: [u16; 2] = [server::PORT, bulk::PORT];

/// Something that carries connections from a client to servers.
pub(crate) struct Subject {
    pub(crate) name: String,
    pub(crate) client: Pod,
    /// The processes whose memory is its cost.
    pub(crate) proxies: Vec<u32>,
    pub(crate) far: Endpoint,
    /// None: it does not carry what stays on a node.
    pub(crate) near: Option<Endpoint>,
    /// What must live as long: proxies, and last the laboratory.
    _rest: Box<dyn Any>,
}

/// A server.
pub(crate) struct Endpoint {
    /// The address that the client connects to.
    pub(crate) dialled: IpAddr,
    pub(crate) sink: Sink,
    _nginx: Process,
}

impl Subject {
    /// Where the server is, if there is one.
    pub(crate) fn endpoint(&self, route: Route) -> Option<&Endpoint> {
        match route {
            Route::Far => Some(&self.far),
            Route::Near => self.near.as_ref(),
        }
    }

    /// Whether it has what this load needs.
    pub(crate) fn has(&self, route: Route, load: Load) -> bool {
        let is_able = if load == Load::Held {
            !self.proxies.is_empty()
        } else {
            !load.is_of_mesh() || self.name == nodemesh::NAME
        };
        is_able && self.endpoint(route).is_some()
    }

    /// Waits until requests are answered.
    pub(crate) fn wait(&self) -> Result<()> {
        for endpoint in [Some(&self.far), self.near.as_ref()].into_iter().flatten() {
            let to = SocketAddr::new(endpoint.dialled, server::PORT);
            let mut last = String::new();
            until("an answer through it", || {
                churn::once(&self.client, to).map_err(|error| last = format!("{error:#}")).ok()
            })
            .context(last)?;
        }
        Ok(())
    }
}

impl Endpoint {
    /// Starts the servers of a pod.
    fn start(lab: &Lab, pod: &Pod, dialled: IpAddr) -> Result<Self> {
        let nginx = server::start(lab, pod)?;
        let sink = Sink::start(pod).context("starting the sink")?;
        Ok(Self { dialled, sink, _nginx: nginx })
    }
}

/// A pod for clients. Who makes thousands of connections a second, each with a port of its own,
/// must be allowed to use ports again: with or without a mesh there are not enough for a minute.
fn ready(client: &Pod) -> Result<()> {
    client.sysctl("net/ipv4/tcp_tw_reuse", "1")
}
