//! Plain TCP: what everything is compared with.

use anyhow::Result;

use super::bare::Bare;
use super::{Endpoint, Subject};

pub(crate) const NAME: &str = "plain";

/// Sets it up.
pub(crate) fn up() -> Result<Subject> {
    let mut bare = Bare::new("bench-plain")?;
    let near = bare.lab.pod(&bare.nodes[0], "near")?;
    Ok(Subject {
        name: NAME.into(),
        client: bare.client.clone(),
        proxies: Vec::new(),
        far: Endpoint::start(&bare.lab, &bare.far, bare.far.v4())?,
        near: Some(Endpoint::start(&bare.lab, &near, near.v4())?),
        _rest: Box::new(bare),
    })
}
