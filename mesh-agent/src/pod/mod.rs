//! The pods of this node.
//!
//! * [`source`]: which pods there shall be.
//! * [`netns`], [`sockets`], [`routing`], [`abort`]: a pod's network namespace, and what the agent
//!   does in it.

pub mod abort;
pub mod netns;
pub mod routing;
pub mod sockets;
pub mod source;
