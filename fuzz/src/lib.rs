//! The agent's tunnel module, compiled from its source so that fuzzing needs none of what else an
//! agent is built from, and what is checked of it.

#[path = "../../mesh-agent/src/tunnel/mod.rs"]
pub mod tunnel;

pub mod checks;
