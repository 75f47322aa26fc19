//! The pods of this node: where the agent learns of them, and what it does in them.

pub mod source;
