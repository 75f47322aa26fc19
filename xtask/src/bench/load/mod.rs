//! What clients do in a measurement, and the servers that they do it to.

pub(crate) mod bulk;
pub(crate) mod churn;
pub(crate) mod server;
pub(crate) mod wrk;
