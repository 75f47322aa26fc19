//! The control plane's gRPC API, generated from `proto/nodemesh.proto`.
#![allow(
    missing_docs,
    unreachable_pub,
    clippy::allow_attributes_without_reason,
    clippy::wildcard_enum_match_arm,
    clippy::clone_on_ref_ptr,
    clippy::let_underscore_must_use,
    unused_qualifications,
    clippy::allow_attributes,
    reason = "generated code: the schema carries the documentation"
)]

use prost::{
    DecodeError, Message,
    bytes::{Buf, BufMut, Bytes},
    encoding::{DecodeContext, WireType, skip_field},
};

tonic::include_proto!("nodemesh.v1");
include!(concat!(env!("OUT_DIR"), "/server/nodemesh.v1.rs"));

/// The protocol that TLS negotiates for this API.
pub const ALPN: &[u8] = b"h2";

/// The longest snapshot that an agent takes, all parts together: a third of it is one of 200 000
/// pods, each also an endpoint of a service. In bytes.
pub const MAX_SNAPSHOT_BYTES: usize = 192 << 20;

/// A [`Snapshot`] as it travels. Clones share it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Encoded(Bytes);

impl From<Vec<u8>> for Encoded {
    fn from(bytes: Vec<u8>) -> Self {
        Self(bytes.into())
    }
}

impl From<&Snapshot> for Encoded {
    fn from(snapshot: &Snapshot) -> Self {
        Self(snapshot.encode_to_vec().into())
    }
}

impl AsRef<[u8]> for Encoded {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

/// For sending only: what is received is a [`Snapshot`].
impl Message for Encoded {
    fn encode_raw(&self, buf: &mut impl BufMut) {
        buf.put_slice(&self.0);
    }

    fn merge_field(
        &mut self,
        tag: u32,
        wire_type: WireType,
        buf: &mut impl Buf,
        ctx: DecodeContext,
    ) -> Result<(), DecodeError> {
        skip_field(wire_type, tag, buf, ctx)
    }

    fn encoded_len(&self) -> usize {
        self.0.len()
    }

    fn clear(&mut self) {
        self.0.clear();
    }
}

impl Snapshot {
    /// Adds what comes after a part that says `more`.
    pub fn append(&mut self, next: Self) {
        let Self {
            version,
            bundle,
            workloads,
            settings,
            services,
            endpoint_slices,
            nodes,
            base_version,
            removed,
            more,
        } = next;
        (self.version, self.base_version, self.more) = (version, base_version, more);
        self.bundle = bundle.or(self.bundle.take());
        self.settings = settings.or(self.settings.take());
        self.workloads.extend(workloads);
        self.services.extend(services);
        self.endpoint_slices.extend(endpoint_slices);
        self.nodes.extend(nodes);
        if let Some(removed) = removed {
            let Removed { workload_uids, services, endpoint_slices, nodes } = removed;
            let all = self.removed.get_or_insert_default();
            all.workload_uids.extend(workload_uids);
            all.services.extend(services);
            all.endpoint_slices.extend(endpoint_slices);
            all.nodes.extend(nodes);
        }
    }
}
