//! What the capture rests on in a pod's network namespace: a policy rule and a route per family
//! that deliver marked packets to loopback, and the settings that let marks travel.
//!
//! [`Routing::ensure`] compares before it writes, so that its own changes do not look like others'.
#![expect(clippy::wildcard_enum_match_arm, reason = "foreign enums that grow")]

use std::{fs, io, net::IpAddr, sync::Arc};

use futures::{StreamExt as _, TryStreamExt as _, channel::mpsc::UnboundedReceiver};
use mesh_common::abi::{CAPTURE_MARK, CAPTURE_RULE_PRIORITY, CAPTURE_TABLE, MAX_POD_ADDRESSES};
use netlink_packet_core::NetlinkMessage;
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    address::AddressAttribute,
    link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage},
    route::{RouteAddress, RouteAttribute, RouteMessage, RouteProtocol, RouteScope, RouteType},
    rule::{RuleAction, RuleAttribute, RuleMessage},
};
use rtnetlink::{Handle, IpVersion, MulticastGroup, RouteMessageBuilder};
use tokio_util::task::AbortOnDropHandle;

use super::netns::Netns;
use crate::bpf::{Device, DeviceLink};

const LOOPBACK_IFINDEX: u32 = 1;

/// Settings of the namespace, below `/proc/sys/net`, and the values that the capture needs:
/// accepted sockets inherit the mark of their SYN, and the kernel's own resets carry the mark of
/// what they answer. Since 3.15.
const SETTINGS: [(&str, &str); 3] = [
    ("/proc/sys/net/ipv4/tcp_fwmark_accept", "1"),
    ("/proc/sys/net/ipv4/fwmark_reflect", "1"),
    ("/proc/sys/net/ipv6/fwmark_reflect", "1"),
];

/// Why a pod's namespace cannot be prepared.
#[derive(Debug, thiserror::Error)]
pub enum RoutingError {
    /// Netlink's answer.
    #[error("{what} in the pod's network namespace: {source}")]
    Netlink {
        /// What was tried.
        what: &'static str,
        /// What the kernel said.
        source: rtnetlink::Error,
    },
    /// A setting.
    #[error("{path} in the pod's network namespace: {source}")]
    Setting {
        /// Which one.
        path: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// The namespace itself.
    #[error("entering the pod's network namespace: {0}")]
    Netns(io::Error),
}

/// The state of a pod's namespace that the agent needs to know.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Inventory {
    /// Its addresses, loopback's left out, sorted.
    pub addresses: Vec<IpAddr>,
    /// Its devices, loopback left out.
    pub devices: Vec<Device>,
    /// The host-side indices that its veths name, each with the device's own index.
    pub peers: Vec<PeerIndex>,
}

/// One end of a veth, as the other tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerIndex {
    /// The index of the other end, in its namespace.
    pub peer: u32,
    /// The index of this end.
    pub device: u32,
}

/// A netlink connection into one namespace.
pub struct Routing {
    netns: Arc<Netns>,
    handle: Handle,
    _connection: AbortOnDropHandle<()>,
}

/// What changes in a namespace: one item for anything that [`Routing`] looks at.
pub struct Changes(UnboundedReceiver<(NetlinkMessage<RouteNetlinkMessage>, NetlinkAddress)>);

type NetlinkAddress = netlink_sys::SocketAddr;

impl Changes {
    /// Waits until something changed. False when the connection is gone.
    pub async fn next(&mut self) -> bool {
        if self.0.next().await.is_none() {
            return false;
        }
        // Whatever else has come is looked at in the same go.
        while self.0.try_recv().is_ok() {}
        true
    }
}

impl Routing {
    /// Connects, in the namespace. Must be called in a tokio runtime.
    ///
    /// # Errors
    ///
    /// When the namespace cannot be entered or has no netlink.
    pub fn connect(netns: Arc<Netns>) -> Result<(Self, Changes), RoutingError> {
        let groups = [
            MulticastGroup::Link,
            MulticastGroup::Ipv4Ifaddr,
            MulticastGroup::Ipv6Ifaddr,
            MulticastGroup::Ipv4Route,
            MulticastGroup::Ipv6Route,
            MulticastGroup::Ipv4Rule,
            MulticastGroup::Ipv6Rule,
        ];
        let (connection, handle, changes) = netns
            .try_run(|| rtnetlink::new_multicast_connection(&groups))
            .and_then(|connected| connected)
            .map_err(RoutingError::Netns)?;
        let connection = AbortOnDropHandle::new(tokio::spawn(connection));
        Ok((Self { netns, handle, _connection: connection }, Changes(changes)))
    }

    /// What is there.
    ///
    /// # Errors
    ///
    /// See [`RoutingError`].
    pub async fn inventory(&self) -> Result<Inventory, RoutingError> {
        let links: Vec<LinkMessage> = self
            .handle
            .link()
            .get()
            .execute()
            .try_collect()
            .await
            .map_err(netlink("listing devices"))?;
        let mut inventory = Inventory::default();
        for link in links {
            if link.header.flags.contains(LinkFlags::Loopback) {
                continue;
            }
            let index = link.header.index;
            let (name, peer) = name_and_peer(&link);
            let framing = if link.header.link_layer_type == LinkLayerType::Ether {
                DeviceLink::Ethernet
            } else {
                DeviceLink::None
            };
            inventory.devices.extend(name.map(|name| Device { index, name, link: framing }));
            inventory.peers.extend(peer.map(|peer| PeerIndex { peer, device: index }));
        }
        let mut addresses = self.handle.address().get().execute();
        while let Some(message) =
            addresses.try_next().await.map_err(netlink("listing addresses"))?
        {
            if message.header.index == LOOPBACK_IFINDEX {
                continue;
            }
            // A point-to-point address names the local end apart.
            let of = |pick: fn(&AddressAttribute) -> Option<IpAddr>| {
                message.attributes.iter().find_map(pick)
            };
            let local = of(|attribute| match attribute {
                AddressAttribute::Local(address) => Some(*address),
                _ => None,
            });
            let address = of(|attribute| match attribute {
                AddressAttribute::Address(address) => Some(*address),
                _ => None,
            });
            inventory.addresses.extend(local.or(address));
        }
        // The pod's routable addresses first, should there be more than fit.
        inventory.addresses.sort_by_key(|address| (is_link_local(*address), *address));
        inventory.addresses.dedup();
        inventory.addresses.truncate(MAX_POD_ADDRESSES);
        Ok(inventory)
    }

    /// Makes the rules, routes and settings what they have to be; tells how many were not.
    ///
    /// # Errors
    ///
    /// See [`RoutingError`].
    pub async fn ensure(&self, addresses: &[IpAddr]) -> Result<u32, RoutingError> {
        let mut changed = self.ensure_settings()?;
        for version in [IpVersion::V4, IpVersion::V6] {
            let source = addresses
                .iter()
                .copied()
                .find(|address| address.is_ipv4() == (version == IpVersion::V4));
            // Without an address nothing of this family can be dialled.
            let Some(source) = source else { continue };
            changed += self.ensure_route(version.clone(), source).await?;
            changed += self.ensure_rule(version).await?;
        }
        Ok(changed)
    }

    fn ensure_settings(&self) -> Result<u32, RoutingError> {
        let ensure = || {
            let mut changed = 0;
            for (path, wanted) in SETTINGS {
                match fs::read_to_string(path) {
                    Ok(found) if found.trim() == wanted => {}
                    // A kernel without IPv6.
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                    Ok(_) => {
                        fs::write(path, wanted)
                            .map_err(|source| RoutingError::Setting { path, source })?;
                        changed += 1;
                    }
                    Err(source) => return Err(RoutingError::Setting { path, source }),
                }
            }
            Ok(changed)
        };
        self.netns.try_run(ensure).map_err(RoutingError::Netns)?
    }

    async fn ensure_route(&self, version: IpVersion, source: IpAddr) -> Result<u32, RoutingError> {
        let wanted = capture_route(source);
        let found = self.capture_routes(version).await?;
        if found.iter().any(|route| same_route(route, source)) && found.len() == 1 {
            return Ok(0);
        }
        for route in found {
            self.handle.route().del(route).execute().await.map_err(netlink("removing a route"))?;
        }
        self.handle
            .route()
            .add(wanted)
            .replace()
            .execute()
            .await
            .map_err(netlink("adding the capture's route"))?;
        Ok(1)
    }

    async fn capture_routes(&self, version: IpVersion) -> Result<Vec<RouteMessage>, RoutingError> {
        let mut filter = RouteMessage::default();
        filter.header.address_family = family(&version);
        let routes: Vec<RouteMessage> = self
            .handle
            .route()
            .get(filter)
            .execute()
            .try_collect()
            .await
            .map_err(netlink("listing routes"))?;
        Ok(routes.into_iter().filter(|route| table(route) == CAPTURE_TABLE).collect())
    }

    async fn ensure_rule(&self, version: IpVersion) -> Result<u32, RoutingError> {
        let rules = self.rules(version.clone()).await?;
        if rules.iter().any(is_capture_rule) {
            return Ok(0);
        }
        let rule = self
            .handle
            .rule()
            .add()
            .table_id(CAPTURE_TABLE)
            .priority(CAPTURE_RULE_PRIORITY)
            .fw_mark(CAPTURE_MARK)
            .action(RuleAction::ToTable);
        let added = match version {
            IpVersion::V4 => rule.v4().execute().await,
            IpVersion::V6 => rule.v6().execute().await,
        };
        added.map_err(netlink("adding the capture's rule"))?;
        Ok(1)
    }

    async fn rules(&self, version: IpVersion) -> Result<Vec<RuleMessage>, RoutingError> {
        self.handle
            .rule()
            .get(version)
            .execute()
            .try_collect()
            .await
            .map_err(netlink("listing rules"))
    }

    /// Removes what [`Self::ensure`] made and puts the settings back to the kernel's defaults.
    ///
    /// # Errors
    ///
    /// See [`RoutingError`].
    pub async fn remove(&self) -> Result<(), RoutingError> {
        for version in [IpVersion::V4, IpVersion::V6] {
            for rule in self.rules(version.clone()).await? {
                if is_capture_rule(&rule) {
                    self.handle
                        .rule()
                        .del(rule)
                        .execute()
                        .await
                        .map_err(netlink("removing a rule"))?;
                }
            }
            for route in self.capture_routes(version).await? {
                self.handle
                    .route()
                    .del(route)
                    .execute()
                    .await
                    .map_err(netlink("removing a route"))?;
            }
        }
        let reset = || {
            for (path, _) in SETTINGS {
                match fs::write(path, "0") {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => {
                        return Err(RoutingError::Setting { path, source: error });
                    }
                    Ok(()) | Err(_) => {}
                }
            }
            Ok(())
        };
        self.netns.try_run(reset).map_err(RoutingError::Netns)?
    }
}

/// The devices of the calling thread's namespace that are the other ends of a pod's veths.
///
/// # Errors
///
/// See [`RoutingError`].
pub async fn host_peers(pod: &Inventory) -> Result<Vec<Device>, RoutingError> {
    if pod.peers.is_empty() {
        return Ok(Vec::new());
    }
    let (connection, handle, _) = rtnetlink::new_connection().map_err(RoutingError::Netns)?;
    let _connection = AbortOnDropHandle::new(tokio::spawn(connection));
    let links: Vec<LinkMessage> = handle
        .link()
        .get()
        .execute()
        .try_collect()
        .await
        .map_err(netlink("listing host devices"))?;
    Ok(links.iter().filter_map(|link| as_peer(link, &pod.peers)).collect())
}

/// A host device that names a device of the pod as its other end, and is named by it.
fn as_peer(link: &LinkMessage, peers: &[PeerIndex]) -> Option<Device> {
    let (name, other) = name_and_peer(link);
    let index = link.header.index;
    let claim = PeerIndex { peer: index, device: other? };
    peers.contains(&claim).then_some(Device { index, name: name?, link: DeviceLink::Ethernet })
}

/// A link's name, and the index of its other end if it is a veth with that end elsewhere.
fn name_and_peer(link: &LinkMessage) -> (Option<String>, Option<u32>) {
    let (mut name, mut other, mut elsewhere, mut veth) = (None, None, false, false);
    for attribute in &link.attributes {
        match attribute {
            LinkAttribute::IfName(found) => name = Some(found.clone()),
            LinkAttribute::Link(index) => other = Some(*index),
            LinkAttribute::LinkNetNsId(_) => elsewhere = true,
            LinkAttribute::LinkInfo(info) => {
                veth = info.iter().any(|info| matches!(info, LinkInfo::Kind(InfoKind::Veth)));
            }
            _ => {}
        }
    }
    (name, other.filter(|_| veth && elsewhere))
}

fn netlink(what: &'static str) -> impl FnOnce(rtnetlink::Error) -> RoutingError {
    move |source| RoutingError::Netlink { what, source }
}

const fn family(version: &IpVersion) -> AddressFamily {
    match version {
        IpVersion::V4 => AddressFamily::Inet,
        IpVersion::V6 => AddressFamily::Inet6,
    }
}

fn capture_route(source: IpAddr) -> RouteMessage {
    macro_rules! route {
        ($kind:ty, $source:expr) => {
            RouteMessageBuilder::<$kind>::new()
                .table_id(CAPTURE_TABLE)
                .kind(RouteType::Local)
                .scope(RouteScope::Host)
                .protocol(RouteProtocol::Static)
                .output_interface(LOOPBACK_IFINDEX)
                .pref_source($source)
                .build()
        };
    }
    match source {
        IpAddr::V4(source) => route!(std::net::Ipv4Addr, source),
        IpAddr::V6(source) => route!(std::net::Ipv6Addr, source),
    }
}

fn table(route: &RouteMessage) -> u32 {
    let named = route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Table(table) => Some(*table),
        _ => None,
    });
    named.unwrap_or_else(|| route.header.table.into())
}

/// Whether a route of the capture's table is the one that belongs there.
fn same_route(route: &RouteMessage, source: IpAddr) -> bool {
    let loopback = route.attributes.contains(&RouteAttribute::Oif(LOOPBACK_IFINDEX));
    let wanted = match source {
        IpAddr::V4(source) => RouteAddress::Inet(source),
        IpAddr::V6(source) => RouteAddress::Inet6(source),
    };
    let sourced = route.attributes.contains(&RouteAttribute::PrefSource(wanted));
    let everything = route.header.destination_prefix_length == 0;
    route.header.kind == RouteType::Local && loopback && sourced && everything
}

fn is_capture_rule(rule: &RuleMessage) -> bool {
    let has = |wanted: RuleAttribute| rule.attributes.contains(&wanted);
    rule.header.action == RuleAction::ToTable
        && has(RuleAttribute::FwMark(CAPTURE_MARK))
        && has(RuleAttribute::Table(CAPTURE_TABLE))
        && has(RuleAttribute::Priority(CAPTURE_RULE_PRIORITY))
}

const fn is_link_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    }
}
