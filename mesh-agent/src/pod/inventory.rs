//! What a pod has: its addresses, its devices, and their other ends on the host.
#![expect(clippy::wildcard_enum_match_arm, reason = "foreign enums that grow")]

use std::{
    net::IpAddr,
    os::fd::{AsFd as _, AsRawFd as _},
};

use futures::{StreamExt as _, TryStreamExt as _};
use mesh_common::abi::MAX_POD_ADDRESSES;
use netlink_packet_core::{NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::{
    RouteNetlinkMessage,
    address::{AddressAttribute, AddressHeaderFlags, AddressMessage, AddressScope},
    link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage},
    nsid::{NsidAttribute, NsidMessage},
};
use nix::libc;
use rtnetlink::Handle;
use tokio_util::task::AbortOnDropHandle;

use super::{
    netns::Netns,
    routing::{LOOPBACK_IFINDEX, RoutingError, answered},
};
use crate::bpf::{Device, DeviceLink};

/// The state of a pod's namespace that the agent needs to know.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Inventory {
    /// Its addresses, those of 127.0.0.0/8 and `::1` left out, sorted.
    pub addresses: Vec<IpAddr>,
    /// Its addresses from which it can talk to others, as the kernel lists them.
    pub sources: Vec<IpAddr>,
    /// Its devices, loopback left out.
    pub devices: Vec<Device>,
    /// The indices of their other ends, where those are.
    pub(super) other_ends: Vec<u32>,
}

impl Inventory {
    pub(super) async fn take(handle: &Handle) -> Result<Self, RoutingError> {
        let mut inventory = Self::default();
        for link in links(handle).await? {
            if link.header.flags.contains(LinkFlags::Loopback) {
                continue;
            }
            let framing = if link.header.link_layer_type == LinkLayerType::Ether {
                DeviceLink::Ethernet
            } else {
                DeviceLink::None
            };
            let LinkFacts { name, other, .. } = LinkFacts::of(&link);
            let device = |name| Device { index: link.header.index, name, link: framing };
            inventory.devices.extend(name.map(device));
            inventory.other_ends.extend(other);
        }
        let listed = handle.address().get().execute().try_collect::<Vec<_>>();
        for message in answered("listing addresses", listed).await? {
            let Some(address) = address(&message).filter(|address| !address.is_loopback()) else {
                continue;
            };
            inventory.addresses.push(address);
            if can_be_source(&message) {
                inventory.sources.push(address);
            }
        }
        // The pod's routable addresses first, should there be more than fit.
        inventory.addresses.sort_by_key(|address| (is_link_local(*address), *address));
        inventory.addresses.dedup();
        inventory.addresses.truncate(MAX_POD_ADDRESSES);
        Ok(inventory)
    }

    /// The address from which the pod talks to others of a family.
    pub(super) fn source(&self, ipv4: bool) -> Option<IpAddr> {
        self.sources.iter().copied().find(|address| address.is_ipv4() == ipv4)
    }
}

/// A point-to-point address names the local end apart.
fn address(message: &AddressMessage) -> Option<IpAddr> {
    let of =
        |pick: fn(&AddressAttribute) -> Option<IpAddr>| message.attributes.iter().find_map(pick);
    let local = of(|attribute| match attribute {
        AddressAttribute::Local(address) => Some(*address),
        _ => None,
    });
    local.or_else(|| {
        of(|attribute| match attribute {
            AddressAttribute::Address(address) => Some(*address),
            _ => None,
        })
    })
}

/// The kernel takes no other address as the source of a route.
fn can_be_source(message: &AddressMessage) -> bool {
    let unusable = AddressHeaderFlags::Tentative | AddressHeaderFlags::Dadfailed;
    message.header.index != LOOPBACK_IFINDEX
        && message.header.scope == AddressScope::Universe
        && !message.header.flags.intersects(unusable)
}

/// The devices of the calling thread's namespace that are the other ends of a pod's veths. Each is
/// asked for by its index: the kernel lists all devices in time that grows with the square of the
/// pods, and every pod asks.
///
/// # Errors
///
/// See [`RoutingError`].
pub async fn host_peers(netns: &Netns, pod: &Inventory) -> Result<Vec<Device>, RoutingError> {
    let (connection, mut handle, _) = rtnetlink::new_connection().map_err(RoutingError::Netns)?;
    let _connection = AbortOnDropHandle::new(tokio::spawn(connection));
    let Some(nsid) = nsid(&mut handle, netns).await? else { return Ok(Vec::new()) };
    let mut peers = Vec::new();
    for index in &pod.other_ends {
        let found = link(&handle, *index).await?;
        peers.extend(found.and_then(|link| as_peer(&link, nsid, &pod.devices)));
    }
    Ok(peers)
}

/// A veth whose other end is a device of the pod, in the namespace known as `nsid`.
fn as_peer(link: &LinkMessage, nsid: i32, pod: &[Device]) -> Option<Device> {
    let LinkFacts { name, other, other_nsid, veth } = LinkFacts::of(link);
    let is_peer =
        veth && other_nsid == Some(nsid) && pod.iter().any(|device| Some(device.index) == other);
    let index = link.header.index;
    is_peer.then_some(Device { index, name: name?, link: DeviceLink::Ethernet })
}

/// The number by which the calling thread's namespace knows another; none if nothing in it has to
/// do with that one.
async fn nsid(handle: &mut Handle, netns: &Netns) -> Result<Option<i32>, RoutingError> {
    let mut question = NsidMessage::default();
    question.attributes = vec![NsidAttribute::Fd(netns.as_fd().as_raw_fd().unsigned_abs())];
    let mut message = NetlinkMessage::from(RouteNetlinkMessage::GetNsId(question));
    message.header.flags = NLM_F_REQUEST;
    let what = "asking for the pod's number";
    let mut answers = handle.request(message).map_err(RoutingError::netlink(what))?;
    let answer = answered(what, async { Ok(answers.next().await) }).await?;
    let Some(NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewNsId(answer))) =
        answer.map(|answer| answer.payload)
    else {
        return Ok(None);
    };
    let number = answer.attributes.iter().find_map(|attribute| match attribute {
        NsidAttribute::Id(number) => Some(*number),
        _ => None,
    });
    Ok(number.filter(|number| *number >= 0))
}

/// A device; none if there is none of this index.
async fn link(handle: &Handle, index: u32) -> Result<Option<LinkMessage>, RoutingError> {
    let what = "looking at the other end of a device";
    let mut answers = handle.link().get().match_index(index).execute();
    match answered(what, answers.try_next()).await {
        Err(RoutingError::Netlink { source: rtnetlink::Error::NetlinkError(error), .. })
            if error.raw_code() == -libc::ENODEV =>
        {
            Ok(None)
        }
        answer => answer,
    }
}

async fn links(handle: &Handle) -> Result<Vec<LinkMessage>, RoutingError> {
    answered("listing devices", handle.link().get().execute().try_collect()).await
}

#[derive(Debug, Default)]
struct LinkFacts {
    name: Option<String>,
    /// The index of the device at the other end.
    other: Option<u32>,
    /// Where that is, if not here.
    other_nsid: Option<i32>,
    veth: bool,
}

impl LinkFacts {
    fn of(link: &LinkMessage) -> Self {
        let mut facts = Self::default();
        for attribute in &link.attributes {
            match attribute {
                LinkAttribute::IfName(name) => facts.name = Some(name.clone()),
                LinkAttribute::Link(index) => facts.other = Some(*index),
                LinkAttribute::LinkNetNsId(nsid) => facts.other_nsid = Some(*nsid),
                LinkAttribute::LinkInfo(info) => {
                    let veth = |info: &LinkInfo| matches!(info, LinkInfo::Kind(InfoKind::Veth));
                    facts.veth = info.iter().any(veth);
                }
                _ => {}
            }
        }
        facts
    }
}

const fn is_link_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn veth(index: u32, other: u32, nsid: Option<i32>) -> LinkMessage {
        let mut link = LinkMessage::default();
        link.header.index = index;
        link.attributes = vec![
            LinkAttribute::IfName(format!("veth{index}")),
            LinkAttribute::Link(other),
            LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Veth)]),
        ];
        link.attributes.extend(nsid.map(LinkAttribute::LinkNetNsId));
        link
    }

    #[test]
    fn only_the_other_end_of_the_pod_s_own_device_is_its_peer() {
        let device = Device { index: 2, name: "eth0".to_owned(), link: DeviceLink::Ethernet };
        let is_peer = |link| as_peer(&link, 5, std::slice::from_ref(&device)).is_some();
        assert!(is_peer(veth(9, 2, Some(5))));
        // Every pod's eth0 may have the index 2.
        assert!(!is_peer(veth(9, 2, Some(6))));
        assert!(!is_peer(veth(9, 3, Some(5))));
        assert!(!is_peer(veth(9, 2, None)));
    }

    #[test]
    fn addresses_that_the_kernel_would_refuse_are_no_sources() {
        let mut message = AddressMessage::default();
        message.header.index = 2;
        assert!(can_be_source(&message));
        message.header.flags = AddressHeaderFlags::Permanent | AddressHeaderFlags::Tentative;
        assert!(!can_be_source(&message));
        message.header.flags = AddressHeaderFlags::Permanent;
        message.header.scope = AddressScope::Link;
        assert!(!can_be_source(&message));
        message.header.scope = AddressScope::Universe;
        message.header.index = LOOPBACK_IFINDEX;
        assert!(!can_be_source(&message));
    }
}
