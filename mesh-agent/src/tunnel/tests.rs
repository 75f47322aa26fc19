//! Tunnels over loopback TCP and real TLS, and the relays between real sockets.

mod bounds;
mod connection;
mod corpus;
mod hostile;
pub(crate) mod lab;
mod plain;
mod shared;
