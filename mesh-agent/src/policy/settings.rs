//! What the operator configures of the policy.

use std::{
    net::{IpAddr, Ipv6Addr},
    num::NonZeroU16,
};

use ipnet::IpNet;
use serde::{Deserialize, Deserializer, de};

/// Plaintext to destinations that are neither registered nor inside the cluster's ranges. An
/// unregistered destination inside them is always denied.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Egress {
    /// Dialled as it is, counted as plaintext.
    #[default]
    Allow,
    /// Refused.
    Deny,
}

/// Plaintext that is let into enrolled pods.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlaintextIngress {
    /// Where it may come from.
    pub ranges: AddressRanges,
    /// To which ports of the pod.
    pub ports: Ports,
}

/// One or more TCP ports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ports(Vec<NonZeroU16>);

impl Ports {
    /// Whether `port` is one of them.
    pub fn contains(&self, port: u16) -> bool {
        self.0.iter().any(|p| p.get() == port)
    }
}

impl<'de> Deserialize<'de> for Ports {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let ports = Vec::deserialize(deserializer)?;
        if ports.is_empty() {
            return Err(de::Error::custom("the list of ports is empty"));
        }
        Ok(Self(ports))
    }
}

/// One or more ranges of addresses, IPv4 and IPv6.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AddressRanges(Vec<IpNet>);

impl AddressRanges {
    /// Whether `address` is in one of them. An IPv4-mapped address counts as the IPv4 one.
    pub fn contains(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        self.0.iter().any(|range| range.contains(&address))
    }
}

impl TryFrom<Vec<IpNet>> for AddressRanges {
    type Error = String;

    fn try_from(ranges: Vec<IpNet>) -> Result<Self, String> {
        if ranges.is_empty() {
            return Err("the list of ranges is empty".to_owned());
        }
        for range in &ranges {
            if range.trunc() != *range {
                return Err(format!("{range} has bits set behind its prefix: {}?", range.trunc()));
            }
            if let IpNet::V6(v6) = range
                && v6.network().to_ipv4_mapped().is_some()
                && v6.network() != Ipv6Addr::UNSPECIFIED
            {
                return Err(format!("{range} is IPv4-mapped: write it as an IPv4 range"));
            }
        }
        Ok(Self(ranges))
    }
}

impl<'de> Deserialize<'de> for AddressRanges {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Vec::<IpNet>::deserialize(deserializer)?.try_into().map_err(de::Error::custom)
    }
}
