//! The laboratory that the tests and the demo of nodemesh run in.

pub mod lab;
