//! The control plane of nodemesh: certificate authority and registry of workloads.
//!
//! [`control::Control`] is the whole of it without a socket; [`server`], [`admin`] and [`http`] are
//! its doors, [`run`] puts them together, [`cli`] is the command line.

pub mod admin;
pub mod bundle;
pub mod ca;
pub mod cli;
pub mod client;
pub mod config;
pub mod control;
pub mod feed;
pub mod files;
pub mod http;
pub mod keyed;
pub mod kubernetes;
pub mod metrics;
pub mod refusal;
pub mod registry;
pub mod replicas;
pub mod reports;
pub mod run;
pub mod server;
pub mod service;
pub mod services;
pub mod sessions;
pub mod snapshot;
pub mod status;
pub mod tokens;
pub mod watch;
pub mod yaml;
