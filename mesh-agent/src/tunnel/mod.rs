//! `nodemesh/1`, the wire protocol between two agents, and the relays that speak it.
//!
//! A tunnel is a mutual TLS 1.3 connection with the ALPN name [`ALPN`], dialled from the client's
//! pod to the original destination. It carries one application connection at a time, and the next
//! one when that has ended; `docs/tunnel.md` specifies the bytes.
//!
//! * [`frame`]: values and bytes. Pure.
//! * [`relay`](relay()): one connection over one tunnel, for either agent. [`relay_plain`]: the
//!   same without a tunnel.
//! * [`server`]: what a server does with an idle tunnel. [`pool`]: where a client keeps its own.
//!
//! The client's agent, for a connection that an application has opened:
//!
//! ```no_run
//! use mesh_agent::tunnel::{
//!     AppSocket, End, Header, Outcome, Pool, Role, TraceId, Traffic,
//!     pool::{Key, Proof, Tunnel},
//!     relay,
//! };
//! use tokio::net::TcpStream;
//! # use std::io::Result;
//! # use mesh_agent::tls::Stream;
//! # async fn dial(key: &Key, proof: Proof) -> Result<Tunnel<Stream>> { unimplemented!() }
//!
//! async fn carry(accepted: TcpStream, pool: &Pool<Stream>, key: Key, proof: Proof) -> Result<()> {
//!     let header = Header::new(accepted.peer_addr()?, TraceId([7; 16]));
//!     let mut app = AppSocket::new(accepted)?; // from here on, dropping it resets it
//!     let traffic = Traffic::default();
//!     loop {
//!         let pooled = pool.take(&key, proof);
//!         let fresh = pooled.is_none();
//!         let mut tunnel = match pooled {
//!             Some(tunnel) => tunnel,
//!             None => dial(&key, proof).await?,
//!         };
//!         let Outcome { end, reusable, untouched } =
//!             relay(app, &mut tunnel.stream, Role::Client(header), &traffic).await;
//!         if reusable {
//!             pool.put(tunnel);
//!         }
//!         match untouched {
//!             // A pooled tunnel was dead, and nothing is lost: another one may do.
//!             Some(again) if !fresh && matches!(end, End::TunnelLost(_)) => app = again,
//!             _ => return Ok(println!("{} bytes, {end}", traffic.from_client())),
//!         }
//!     }
//! }
//! ```
//!
//! And the server's, for a tunnel that has been accepted and authenticated:
//!
//! ```no_run
//! use mesh_agent::tunnel::{
//!     AppSocket, Header, Reason, Refusal, Role, Traffic, relay,
//!     server::{next_open, refuse},
//! };
//! # use mesh_agent::tls::Stream;
//! # use tokio::net::TcpStream;
//! # async fn connect_application(_: Header) -> std::io::Result<TcpStream> { unimplemented!() }
//!
//! async fn serve(mut tunnel: Stream) -> Result<(), Box<dyn std::error::Error>> {
//!     while let Some(header) = next_open(&mut tunnel).await? {
//!         let reusable = match connect_application(header).await {
//!             Ok(application) => {
//!                 let app = AppSocket::new(application)?;
//!                 relay(app, &mut tunnel, Role::Server, &Traffic::default()).await.reusable
//!             }
//!             Err(error) => {
//!                 let why = Refusal::new(Reason::ConnectionRefused, &error.to_string());
//!                 refuse(&mut tunnel, why).await
//!             }
//!         };
//!         if !reusable {
//!             break;
//!         }
//!     }
//!     Ok(())
//! }
//! ```

mod app;
pub mod buffer;
mod coalescing;
pub mod frame;
mod plain;
pub mod pool;
mod pump;
mod relay;
pub mod server;
pub mod shared;
pub mod sharing;

pub use app::{App, AppSocket};
pub use coalescing::Coalescing;
pub use frame::{Header, Malformed, Reason, Refusal, TraceId};
pub use plain::relay_plain;
pub use pool::{Pool, PoolLimits};
pub use relay::{End, Outcome, Role, Traffic, Transport, relay};
pub use shared::Shared;
pub use sharing::Sharing;

/// The protocol's name in the TLS handshake. A connection that negotiated neither this nor
/// [`SHARED_ALPN`] is none.
pub const ALPN: &[u8] = b"nodemesh/1";
/// The name of the protocol in which connections share a tunnel.
pub const SHARED_ALPN: &[u8] = b"nodemesh/2";

#[cfg(test)]
pub(crate) mod tests;
