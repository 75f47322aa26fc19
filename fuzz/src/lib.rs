//! The agent's tunnel protocol, compiled from its sources so that fuzzing needs none of what else an
//! agent is built from, and what is checked of it.

pub mod tunnel;

pub mod checks;
