//! The access log: one line per finished or refused connection, target `access`.

use std::net::SocketAddr;

use tracing::{
    field::{DisplayValue, display},
    info,
};

use super::{Connection, Parties, Party};
use crate::{policy::DenyReason, tunnel::TraceId};

/// The target of the access log's lines, to filter by.
const TARGET: &str = "access";

struct Fields<'a> {
    direction: &'static str,
    client: &'a Party,
    server: &'a Party,
    endpoint: Option<DisplayValue<SocketAddr>>,
    trace: Option<DisplayValue<TraceId>>,
}

impl<'a> From<&'a Parties> for Fields<'a> {
    fn from(Parties { direction, client, server, endpoint, trace }: &'a Parties) -> Self {
        let (endpoint, trace) = (endpoint.map(display), trace.map(display));
        Self { direction: direction.name(), client, server, endpoint, trace }
    }
}

fn identity(party: &Party) -> Option<DisplayValue<&mesh_common::spiffe::WorkloadId>> {
    party.workload.as_ref().map(|workload| display(&workload.id))
}

fn uid(party: &Party) -> Option<&str> {
    party.workload.as_ref().map(|workload| workload.uid.as_str())
}

pub(super) fn log_finished(connection: &Connection, end: &str) {
    let Fields { direction, client, server, endpoint, trace } = Fields::from(&connection.parties);
    info!(
        target: TARGET,
        direction,
        kind = connection.kind.name(),
        client = %client.address,
        client_id = identity(client),
        client_uid = uid(client),
        server = %server.address,
        server_id = identity(server),
        server_uid = uid(server),
        endpoint,
        from_client = connection.traffic.from_client(),
        from_server = connection.traffic.from_server(),
        duration_ms = u64::try_from(connection.started.elapsed().as_millis()).unwrap_or(u64::MAX),
        end,
        trace,
    );
}

pub(super) fn log_denied(parties: &Parties, reason: DenyReason) {
    let Fields { direction, client, server, endpoint, trace } = Fields::from(parties);
    info!(
        target: TARGET,
        direction,
        kind = "denied",
        client = %client.address,
        client_id = identity(client),
        client_uid = uid(client),
        server = %server.address,
        server_id = identity(server),
        server_uid = uid(server),
        endpoint,
        reason = reason.name(),
        end = %reason,
        trace,
    );
}
