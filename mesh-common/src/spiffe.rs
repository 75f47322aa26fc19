//! SPIFFE names: <https://github.com/spiffe/spiffe/blob/main/standards/SPIFFE-ID.md>.

use std::{fmt, str::FromStr, sync::Arc};

/// Why a name was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpiffeError {
    /// Not the name of a trust domain.
    #[error("{0:?} is no trust domain: use 1 to 255 of a-z, 0-9, '.', '-', '_'")]
    TrustDomain(String),
    /// Not usable as one segment of a path.
    #[error("{0:?} is no name: use 1 to 253 of a-z, A-Z, 0-9, '.', '-', '_', but not '.' or '..'")]
    Segment(String),
    /// Not the identity of a workload.
    #[error("{0:?} is not of the form spiffe://<trust domain>/ns/<namespace>/sa/<service account>")]
    NotAWorkload(String),
}

/// The authority of every SPIFFE ID of one mesh. Clones share it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TrustDomain(Arc<str>);

impl TrustDomain {
    /// The name, as between `spiffe://` and the path.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for TrustDomain {
    type Err = SpiffeError;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        let ok = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-._".contains(&b);
        if (1..=255).contains(&s.len()) && s.bytes().all(ok) {
            Ok(Self(s.into()))
        } else {
            Err(SpiffeError::TrustDomain(s.to_owned()))
        }
    }
}

impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Checks one segment of a SPIFFE path: a namespace, a service account, a node's name.
///
/// # Errors
///
/// [`SpiffeError::Segment`].
pub fn check_segment(s: &str) -> Result<(), SpiffeError> {
    let ok = |b: u8| b.is_ascii_alphanumeric() || b"-._".contains(&b);
    if (1..=253).contains(&s.len()) && s.bytes().all(ok) && s != "." && s != ".." {
        Ok(())
    } else {
        Err(SpiffeError::Segment(s.to_owned()))
    }
}

/// The identity of a workload: `spiffe://<trust domain>/ns/<namespace>/sa/<service account>`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct WorkloadId {
    trust_domain: TrustDomain,
    namespace: String,
    service_account: String,
}

impl WorkloadId {
    /// Puts an identity together.
    ///
    /// # Errors
    ///
    /// [`SpiffeError::Segment`] for a namespace or service account that cannot stand in a path.
    pub fn new(
        trust_domain: TrustDomain,
        namespace: &str,
        service_account: &str,
    ) -> Result<Self, SpiffeError> {
        check_segment(namespace)?;
        check_segment(service_account)?;
        Ok(Self {
            trust_domain,
            namespace: namespace.to_owned(),
            service_account: service_account.to_owned(),
        })
    }

    /// The trust domain.
    pub const fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// The Kubernetes namespace, or what stands for it.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// The Kubernetes service account, or what stands for it.
    pub fn service_account(&self) -> &str {
        &self.service_account
    }
}

impl FromStr for WorkloadId {
    type Err = SpiffeError;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        let not_a_workload = || SpiffeError::NotAWorkload(s.to_owned());
        let rest = s.strip_prefix("spiffe://").ok_or_else(not_a_workload)?;
        let parts: Vec<&str> = rest.split('/').collect();
        let [trust_domain, "ns", namespace, "sa", service_account] = parts[..] else {
            return Err(not_a_workload());
        };
        Self::new(trust_domain.parse()?, namespace, service_account)
    }
}

impl fmt::Display for WorkloadId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { trust_domain, namespace, service_account } = self;
        write!(f, "spiffe://{trust_domain}/ns/{namespace}/sa/{service_account}")
    }
}

/// Who a certificate of the mesh speaks for. The three never overlap: a workload's path starts
/// with `ns`, the mesh's own parts' with `nodemesh`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum SpiffeId {
    /// A pod's service account.
    Workload(WorkloadId),
    /// A node's agent: `spiffe://<trust domain>/nodemesh/node/<name>`.
    Node(TrustDomain, String),
    /// The control plane: `spiffe://<trust domain>/nodemesh/control`.
    Control(TrustDomain),
}

impl SpiffeId {
    /// The trust domain.
    pub const fn trust_domain(&self) -> &TrustDomain {
        match self {
            Self::Workload(id) => id.trust_domain(),
            Self::Node(trust_domain, _) | Self::Control(trust_domain) => trust_domain,
        }
    }
}

impl FromStr for SpiffeId {
    type Err = SpiffeError;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        let rest = s.strip_prefix("spiffe://").unwrap_or_default();
        let parts: Vec<&str> = rest.split('/').collect();
        match parts[..] {
            [trust_domain, "nodemesh", "node", name] => {
                check_segment(name)?;
                Ok(Self::Node(trust_domain.parse()?, name.to_owned()))
            }
            [trust_domain, "nodemesh", "control"] => Ok(Self::Control(trust_domain.parse()?)),
            _ => s.parse().map(Self::Workload),
        }
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Workload(id) => id.fmt(f),
            Self::Node(trust_domain, name) => {
                write!(f, "spiffe://{trust_domain}/nodemesh/node/{name}")
            }
            Self::Control(trust_domain) => write!(f, "spiffe://{trust_domain}/nodemesh/control"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn workload_ids_round_trip() {
        let text = "spiffe://prod.example/ns/shop/sa/cart";
        let id: WorkloadId = text.parse().unwrap();
        assert_eq!((id.namespace(), id.service_account()), ("shop", "cart"));
        assert_eq!(id.to_string(), text);
        assert_eq!(text.parse(), Ok(SpiffeId::Workload(id)));
    }

    #[test]
    fn the_mesh_s_own_names_are_no_workloads() {
        for text in ["spiffe://td/nodemesh/node/a", "spiffe://td/nodemesh/control"] {
            assert!(text.parse::<WorkloadId>().is_err());
            assert_eq!(text.parse::<SpiffeId>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn foreign_shapes_are_refused() {
        for text in [
            "",
            "spiffe://",
            "spiffe://td",
            "https://td/ns/a/sa/b",
            "spiffe:///ns/a/sa/b",
            "spiffe://TD/ns/a/sa/b",
            "spiffe://td/ns//sa/b",
            "spiffe://td/ns/../sa/b",
            "spiffe://td/ns/a/sa/b/",
            "spiffe://td/ns/a/sa/b?x",
            "spiffe://td/ns/a%2f/sa/b",
            "spiffe://td:80/ns/a/sa/b",
            "spiffe://td/sa/a/ns/b",
        ] {
            assert!(text.parse::<SpiffeId>().is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn what_parses_prints_the_same(text in "spiffe://[a-z.]{1,9}/(ns|nodemesh)/[a-z./-]{1,30}") {
            if let Ok(id) = text.parse::<SpiffeId>() {
                prop_assert_eq!(id.to_string(), text);
            }
        }
    }
}
