//! What the capture rests on in a pod's network namespace: a policy rule and a route per family
//! that deliver marked packets to loopback, and the settings that let marks travel.
//!
//! [`Routing::ensure`] compares before it writes, so that its own changes do not look like others'.
#![expect(clippy::wildcard_enum_match_arm, reason = "foreign enums that grow")]

use std::{
    io,
    net::{IpAddr, Ipv6Addr},
    sync::Arc,
    time::Duration,
};

use futures::{StreamExt as _, TryStreamExt as _};
use mesh_common::abi::{CAPTURE_MARK, CAPTURE_RULE_PRIORITY, CAPTURE_TABLE};
use netlink_packet_route::{
    AddressFamily,
    route::{RouteAddress, RouteAttribute, RouteMessage, RouteProtocol, RouteScope, RouteType},
    rule::{RuleAction, RuleAttribute, RuleFlags, RuleMessage},
};
use rtnetlink::{Handle, IpVersion, MulticastGroup, RouteMessageBuilder};
use tokio::{sync::watch, time::timeout};
use tokio_util::task::AbortOnDropHandle;

use super::{inventory::Inventory, netns::Netns, settings::Settings};

pub(super) const LOOPBACK_IFINDEX: u32 = 1;

/// `RT_TABLE_LOCAL`.
const LOCAL_TABLE: u32 = 255;

/// An address that is nobody's: of those to discard, RFC 6666.
const NOBODY: Ipv6Addr = Ipv6Addr::new(0x100, 0, 0, 0, 0, 0, 0, 1);

/// How long the kernel may take to answer. It loses an answer only if it is out of memory.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);

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
    /// Netlink's silence.
    #[error("{what} in the pod's network namespace: the kernel does not answer")]
    NoAnswer {
        /// What was tried.
        what: &'static str,
    },
    /// A setting.
    #[error("{path} in the pod's network namespace: {source}")]
    Setting {
        /// Which one.
        path: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// The namespace itself.
    #[error("entering the pod's network namespace: {0}")]
    Netns(io::Error),
}

impl RoutingError {
    pub(super) fn netlink(what: &'static str) -> impl FnOnce(rtnetlink::Error) -> Self {
        move |source| Self::Netlink { what, source }
    }
}

/// The kernel's answer to a request.
pub(super) async fn answered<T>(
    what: &'static str,
    request: impl Future<Output = Result<T, rtnetlink::Error>>,
) -> Result<T, RoutingError> {
    let answer = timeout(ANSWER_WITHIN, request).await;
    answer.map_err(|_| RoutingError::NoAnswer { what })?.map_err(RoutingError::netlink(what))
}

/// A netlink connection into one namespace, for requests.
pub struct Routing {
    netns: Arc<Netns>,
    settings: Arc<Settings>,
    handle: Handle,
    _connection: AbortOnDropHandle<()>,
}

/// Tells that something has changed in a namespace. Apart from [`Routing`], whose answers a flood
/// of changes must not crowd out.
pub struct Changes {
    seen: watch::Receiver<()>,
    _forwarder: AbortOnDropHandle<()>,
}

impl Changes {
    /// Watches everything that [`Routing`] and [`Inventory`] look at. Must be called in a tokio
    /// runtime.
    ///
    /// # Errors
    ///
    /// When the namespace cannot be entered or has no netlink.
    pub fn watch(netns: &Netns) -> Result<Self, RoutingError> {
        let groups = [
            MulticastGroup::Link,
            MulticastGroup::Ipv4Ifaddr,
            MulticastGroup::Ipv6Ifaddr,
            MulticastGroup::Ipv4Route,
            MulticastGroup::Ipv6Route,
            MulticastGroup::Ipv4Rule,
            MulticastGroup::Ipv6Rule,
        ];
        let (connection, handle, mut messages) = netns
            .try_run(|| rtnetlink::new_multicast_connection(&groups))
            .and_then(|connected| connected)
            .map_err(RoutingError::Netns)?;
        let (tell, seen) = watch::channel(());
        let forwarder = async move {
            let _connection = AbortOnDropHandle::new(tokio::spawn(connection));
            let _keeps_it_open = handle;
            // However many there are: one is enough to look, and none is kept.
            while messages.next().await.is_some() {
                tell.send_replace(());
            }
        };
        Ok(Self { seen, _forwarder: AbortOnDropHandle::new(tokio::spawn(forwarder)) })
    }

    /// Waits until something changed. False when the connection is gone.
    pub async fn next(&mut self) -> bool {
        self.seen.changed().await.is_ok()
    }
}

impl Routing {
    /// Connects, in the namespace. Must be called in a tokio runtime.
    ///
    /// # Errors
    ///
    /// When the namespace cannot be entered or has no netlink.
    pub fn connect(netns: Arc<Netns>) -> Result<Self, RoutingError> {
        let (connection, handle, _) = netns
            .try_run(rtnetlink::new_connection)
            .and_then(|connected| connected)
            .map_err(RoutingError::Netns)?;
        let connection = AbortOnDropHandle::new(tokio::spawn(connection));
        let settings = Arc::new(Settings::open(&netns)?);
        Ok(Self { netns, settings, handle, _connection: connection })
    }

    /// The pod's network namespace.
    pub const fn netns(&self) -> &Arc<Netns> {
        &self.netns
    }

    /// The settings of the pod's network namespace.
    pub const fn settings(&self) -> &Arc<Settings> {
        &self.settings
    }

    /// What is there.
    ///
    /// # Errors
    ///
    /// See [`RoutingError`].
    pub async fn inventory(&self) -> Result<Inventory, RoutingError> {
        Inventory::take(&self.handle).await
    }

    /// Makes the rules, routes and settings what they have to be; tells how many were not.
    ///
    /// # Errors
    ///
    /// See [`RoutingError`].
    pub async fn ensure(&self, inventory: &Inventory) -> Result<u32, RoutingError> {
        let mut changed = self.settings.ensure()?;
        for version in [IpVersion::V4, IpVersion::V6] {
            // Without an address nothing of this family can be dialled.
            let Some(source) = inventory.source(version == IpVersion::V4) else { continue };
            let put_back = self.ensure_route(version.clone(), source).await?
                + self.ensure_rule(version.clone()).await?;
            if put_back > 0 && version == IpVersion::V6 {
                self.forget_old_routes().await?;
            }
            changed += put_back;
        }
        Ok(changed)
    }

    /// Has open IPv6 sockets look for their route anew. IPv4's do with every change of a table or a
    /// rule; IPv6's only if it concerns the very route that they found meanwhile, or when an address
    /// comes or goes.
    async fn forget_old_routes(&self) -> Result<(), RoutingError> {
        let what = "having IPv6 sockets look for their routes";
        let addresses = self.handle.address();
        let mut addition = addresses.add(LOOPBACK_IFINDEX, IpAddr::V6(NOBODY), 128).replace();
        let address = addition.message_mut().clone();
        answered(what, addition.execute()).await?;
        answered(what, addresses.del(address).execute()).await
    }

    async fn ensure_route(&self, version: IpVersion, source: IpAddr) -> Result<u32, RoutingError> {
        let routes = self.routes(version).await?;
        let (ours, rest): (Vec<_>, _) =
            routes.into_iter().partition(|route| table(route) == CAPTURE_TABLE);
        let mut changed = 0;
        for route in rest.into_iter().filter(passes_by) {
            let removal = self.handle.route().del(route).execute();
            answered("removing a route from the table of local ones", removal).await?;
            changed += 1;
        }
        if ours.len() == 1 && ours.iter().all(|route| same_route(route, source)) {
            return Ok(changed);
        }
        for route in ours {
            let removal = self.handle.route().del(route).execute();
            answered("removing a route", removal).await?;
        }
        let addition = self.handle.route().add(capture_route(source)).replace().execute();
        answered("adding the capture's route", addition).await?;
        Ok(changed + 1)
    }

    async fn routes(&self, version: IpVersion) -> Result<Vec<RouteMessage>, RoutingError> {
        let mut filter = RouteMessage::default();
        filter.header.address_family = family(&version);
        let routes = self.handle.route().get(filter).execute().try_collect();
        answered("listing routes", routes).await
    }

    /// Ours is to be the first but for `local`: whatever is looked up before it could lead marked
    /// packets elsewhere.
    async fn ensure_rule(&self, version: IpVersion) -> Result<u32, RoutingError> {
        let mut changed = 0;
        let mut ours = false;
        for rule in self.rules(version.clone()).await? {
            if is_capture_rule(&rule) {
                ours = true;
                break;
            }
            if priority(&rule) > CAPTURE_RULE_PRIORITY {
                break;
            }
            if !is_local_rule(&rule) {
                let removal = self.handle.rule().del(rule).execute();
                answered("removing a rule before the capture's", removal).await?;
                changed += 1;
            }
        }
        if !ours {
            let rule = self
                .handle
                .rule()
                .add()
                .table_id(CAPTURE_TABLE)
                .priority(CAPTURE_RULE_PRIORITY)
                .fw_mark(CAPTURE_MARK)
                .action(RuleAction::ToTable);
            let what = "adding the capture's rule";
            match version {
                IpVersion::V4 => answered(what, rule.v4().execute()).await?,
                IpVersion::V6 => answered(what, rule.v6().execute()).await?,
            }
            changed += 1;
        }
        Ok(changed)
    }

    async fn rules(&self, version: IpVersion) -> Result<Vec<RuleMessage>, RoutingError> {
        answered("listing rules", self.handle.rule().get(version).execute().try_collect()).await
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
                    let removal = self.handle.rule().del(rule).execute();
                    answered("removing a rule", removal).await?;
                }
            }
            let routes = self.routes(version).await?.into_iter();
            for route in routes.filter(|route| table(route) == CAPTURE_TABLE) {
                let removal = self.handle.route().del(route).execute();
                answered("removing a route", removal).await?;
            }
        }
        self.settings.reset()
    }
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
        IpAddr::V6(source) => route!(Ipv6Addr, source),
    }
}

fn table(route: &RouteMessage) -> u32 {
    let named = route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Table(table) => Some(*table),
        _ => None,
    });
    named.unwrap_or_else(|| route.header.table.into())
}

/// Whether a route leads elsewhere from the table of local routes, which is looked up before the
/// capture's.
fn passes_by(route: &RouteMessage) -> bool {
    let local = [RouteType::Local, RouteType::Broadcast, RouteType::Anycast, RouteType::Multicast];
    table(route) == LOCAL_TABLE && !local.contains(&route.header.kind)
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

/// Whether a rule is exactly the one that belongs there: it selects by the mark and by nothing else.
fn is_capture_rule(rule: &RuleMessage) -> bool {
    let wanted = [
        RuleAttribute::FwMark(CAPTURE_MARK),
        RuleAttribute::FwMask(u32::MAX),
        RuleAttribute::Table(CAPTURE_TABLE),
        RuleAttribute::Priority(CAPTURE_RULE_PRIORITY),
    ];
    is_plain(rule)
        && wanted.iter().all(|wanted| rule.attributes.contains(wanted))
        && rule.attributes.iter().all(|found| wanted.contains(found) || says_nothing(found))
}

/// The kernel's own rule for local addresses.
fn is_local_rule(rule: &RuleMessage) -> bool {
    is_plain(rule)
        && rule.attributes.contains(&RuleAttribute::Table(LOCAL_TABLE))
        && rule.attributes.iter().all(|found| {
            matches!(found, RuleAttribute::Table(LOCAL_TABLE) | RuleAttribute::Priority(0))
                || says_nothing(found)
        })
}

fn is_plain(rule: &RuleMessage) -> bool {
    let header = &rule.header;
    header.action == RuleAction::ToTable
        && (header.src_len, header.dst_len, header.tos) == (0, 0, 0)
        && !header.flags.contains(RuleFlags::Invert)
}

/// Attributes that select nothing: who made the rule, and no limit to the prefixes it may find.
fn says_nothing(attribute: &RuleAttribute) -> bool {
    matches!(attribute, RuleAttribute::Protocol(_) | RuleAttribute::SuppressPrefixLen(u32::MAX))
}

fn priority(rule: &RuleMessage) -> u32 {
    let named = rule.attributes.iter().find_map(|attribute| match attribute {
        RuleAttribute::Priority(priority) => Some(*priority),
        _ => None,
    });
    named.unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn capture_rule() -> RuleMessage {
        let mut rule = RuleMessage::default();
        rule.header.action = RuleAction::ToTable;
        rule.attributes = vec![
            RuleAttribute::Protocol(RouteProtocol::Static),
            RuleAttribute::Table(CAPTURE_TABLE),
            RuleAttribute::Priority(CAPTURE_RULE_PRIORITY),
            RuleAttribute::FwMark(CAPTURE_MARK),
            RuleAttribute::FwMask(u32::MAX),
            RuleAttribute::SuppressPrefixLen(u32::MAX),
        ];
        rule
    }

    #[test]
    fn a_rule_that_selects_more_is_not_ours() {
        assert!(is_capture_rule(&capture_rule()));
        for narrower in [
            RuleAttribute::Iifname("eth0".to_owned()),
            RuleAttribute::Source([10, 0, 0, 1].into()),
            RuleAttribute::SuppressPrefixLen(0),
        ] {
            let mut rule = capture_rule();
            rule.attributes.push(narrower);
            assert!(!is_capture_rule(&rule), "{rule:?}");
        }
        let mut inverted = capture_rule();
        inverted.header.flags = RuleFlags::Invert;
        assert!(!is_capture_rule(&inverted));
        let mut masked = capture_rule();
        masked.attributes.retain(|attribute| !matches!(attribute, RuleAttribute::FwMask(_)));
        masked.attributes.push(RuleAttribute::FwMask(1));
        assert!(!is_capture_rule(&masked));
    }

    #[test]
    fn the_kernel_s_local_rule_is_known() {
        let mut rule = RuleMessage::default();
        rule.header.action = RuleAction::ToTable;
        rule.attributes = vec![RuleAttribute::Table(255)];
        assert!(is_local_rule(&rule));
        assert_eq!(priority(&rule), 0);
        rule.attributes = vec![RuleAttribute::Table(254)];
        assert!(!is_local_rule(&rule));
    }
}
