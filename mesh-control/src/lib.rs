//! The control plane of nodemesh.
