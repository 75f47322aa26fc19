//! This project.

use anyhow::Result;
use xtask::lab::Mesh;

use super::{Endpoint, Subject, ready};

pub(crate) const NAME: &str = "nodemesh";

/// Sets it up.
pub(crate) fn up() -> Result<Subject> {
    let mut mesh = Mesh::new("bench-nodemesh")?;
    let client = mesh.pod(0, "client")?;
    ready(&client)?;
    let (far, near) = (mesh.pod(1, "far")?, mesh.pod(0, "near")?);
    Ok(Subject {
        name: NAME.into(),
        client,
        proxies: mesh.agents.iter_mut().map(|agent| agent.process().pid()).collect(),
        far: Endpoint::start(&mesh.lab, &far, far.v4())?,
        near: Some(Endpoint::start(&mesh.lab, &near, near.v4())?),
        _rest: Box::new(mesh),
    })
}
