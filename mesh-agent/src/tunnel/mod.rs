//! `nodemesh/1`, the wire protocol between two agents, and the relays that speak it.
//!
//! A tunnel is a mutual TLS 1.3 connection with the ALPN name [`ALPN`], dialled from the client's
//! pod to the original destination. It carries one application connection at a time, and the next
//! one when that has ended; `docs/tunnel.md` specifies the bytes.
//!
//! * [`frame`]: values and bytes. Pure.
//! * [`relay`](relay()): one connection over one tunnel, for either agent. [`relay_plain`]: the
//!   same without a tunnel.
//! * [`server`]: what a server does with an idle tunnel. [`Pool`]: where a client keeps its own.

mod app;
pub mod frame;
mod plain;
pub mod pool;
mod pump;
mod relay;
pub mod server;

pub use app::{App, AppSocket};
pub use frame::{Header, Malformed, Reason, Refusal, TraceId};
pub use plain::relay_plain;
pub use pool::{Pool, PoolLimits};
pub use relay::{End, Outcome, Role, Traffic, Transport, relay};

/// The protocol's name in the TLS handshake. A connection that negotiated anything else is none.
pub const ALPN: &[u8] = b"nodemesh/1";
