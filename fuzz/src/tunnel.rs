//! The protocol without the TLS under it.

#[path = "../../mesh-agent/src/tunnel/app.rs"]
mod app;
#[path = "../../mesh-agent/src/tunnel/buffer.rs"]
mod buffer;
#[path = "../../mesh-agent/src/tunnel/frame.rs"]
pub mod frame;
#[path = "../../mesh-agent/src/tunnel/plain.rs"]
mod plain;
#[path = "../../mesh-agent/src/tunnel/pool.rs"]
pub mod pool;
#[path = "../../mesh-agent/src/tunnel/pump.rs"]
mod pump;
#[path = "../../mesh-agent/src/tunnel/relay.rs"]
mod relay;
#[path = "../../mesh-agent/src/tunnel/server.rs"]
pub mod server;

pub use app::{App, AppSocket};
pub use buffer::ReadAhead;
pub use frame::{Header, Malformed, Reason, Refusal, TraceId};
pub use plain::relay_plain;
pub use relay::{End, Outcome, Role, Traffic, Transport, relay};
