//! Two nodes, with nothing on them but pods.

use anyhow::Result;
use xtask::lab::{Lab, Node, Pod};

use super::ready;

/// A client on the first node, a server on the second.
pub(crate) struct Bare {
    pub(crate) lab: Lab,
    pub(crate) nodes: [Node; 2],
    pub(crate) client: Pod,
    pub(crate) far: Pod,
}

impl Bare {
    /// Makes them.
    pub(crate) fn new(title: &str) -> Result<Self> {
        let mut lab = Lab::new(title)?;
        let nodes = [lab.node("a")?, lab.node("b")?];
        let client = lab.pod(&nodes[0], "client")?;
        ready(&client)?;
        let far = lab.pod(&nodes[1], "far")?;
        Ok(Self { lab, nodes, client, far })
    }
}
