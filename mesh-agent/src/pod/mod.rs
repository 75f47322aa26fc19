//! The pods of this node.
//!
//! * [`source`]: which pods there shall be.
//! * [`manager`], [`enrolled`], [`ledger`]: how they come under guard, stay there, and are let go.
//! * [`netns`], [`sockets`], [`routing`], [`settings`], [`abort`]: a pod's network namespace, and what
//!   the agent does in it.

pub mod abort;
pub mod enrolled;
pub mod inventory;
pub mod ledger;
pub mod manager;
pub mod netns;
pub mod routing;
pub mod settings;
pub mod sockets;
pub mod source;
