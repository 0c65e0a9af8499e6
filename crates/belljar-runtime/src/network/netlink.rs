//! A small blocking rtnetlink client: the kernel answers at once, so a thread that waits costs less than a task would.
//!
//! A netlink socket stays in the namespace that its thread was in when it was opened.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, OwnedFd};

use ipnet::Ipv4Net;
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage,
    NetlinkPayload,
};
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage};
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags, LinkInfo, LinkMessage, State,
};
use netlink_packet_route::neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use nix::sys::socket::{AddressFamily as SocketFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket};

use super::error::NetworkError;
use super::namespace::Namespace;

/// The kernel never fills more than 32 KiB of a dump at once.
const RECEIVE_BUFFER_BYTES: usize = 64 * 1024;

/// The interface group of what belljar makes in a namespace. Every other interface is in group 0.
const OWN_GROUP: u32 = 1;

/// One end of a veth pair to be made.
pub(super) struct VethEnd<'a> {
    pub(super) interface: &'a str,
    pub(super) link_address: [u8; 6],
}

/// An interface as a listing shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Link {
    pub(super) index: u32,
    pub(super) name: String,
    pub(super) alias: Option<String>,
    pub(super) mtu: Option<u32>,
}

/// A unicast IPv4 route of the main table, once per interface it leads out of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Route {
    pub(super) destination: Ipv4Net,
    pub(super) interface_index: u32,
    pub(super) metric: u32,
}

#[derive(Debug)]
pub(super) struct Netlink {
    socket: OwnedFd,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Netlink {
    /// A connection to the calling thread's namespace.
    pub(super) fn open() -> Result<Self, NetworkError> {
        let socket =
            socket(SocketFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkRoute)
                .map_err(|errno| NetworkError::Netlink { step: "open a socket".to_owned(), source: errno.into() })?;
        Ok(Self { socket, sequence: 0, buffer: vec![0; RECEIVE_BUFFER_BYTES] })
    }

    /// A veth pair: `here` in this namespace, `there` in another.
    pub(super) fn create_veth(
        &mut self,
        here: &VethEnd<'_>,
        there: &VethEnd<'_>,
        there_in: &Namespace,
        mtu: u32,
    ) -> Result<(), NetworkError> {
        let mut peer = end_message(there, mtu);
        peer.attributes.push(LinkAttribute::NetNsFd(there_in.file().as_raw_fd()));
        let mut message = end_message(here, mtu);
        message.attributes.push(LinkAttribute::Group(OWN_GROUP));
        message.attributes.push(LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Veth),
            LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(peer))),
        ]));
        self.request(
            || format!("create the interfaces {} and {}", here.interface, there.interface),
            RouteNetlinkMessage::NewLink(message),
            NLM_F_CREATE | NLM_F_EXCL,
        )
    }

    /// The number of an interface; ENODEV if there is none of that name.
    pub(super) fn index(&mut self, interface: &str) -> Result<u32, NetworkError> {
        Ok(self.find(interface)?.header.index)
    }

    /// Whether an interface sends. After both ends of a veth pair are set up, the one that was first still drops all
    /// packets until the kernel's link watch, in its own time, has seen the carrier.
    pub(super) fn is_operational(&mut self, interface: &str) -> Result<bool, NetworkError> {
        Ok(self.find(interface)?.attributes.contains(&LinkAttribute::OperState(State::Up)))
    }

    fn find(&mut self, interface: &str) -> Result<LinkMessage, NetworkError> {
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::IfName(interface.to_owned()));
        let failed = |source| NetworkError::Netlink { step: format!("find {interface}"), source };
        let answers = self.exchange(RouteNetlinkMessage::GetLink(message), NLM_F_ACK).map_err(failed)?;
        answers
            .into_iter()
            .find_map(|answer| match answer {
                RouteNetlinkMessage::NewLink(link) => Some(link),
                _ => None,
            })
            .ok_or_else(|| failed(io::ErrorKind::UnexpectedEof.into()))
    }

    pub(super) fn set_up(&mut self, index: u32) -> Result<(), NetworkError> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.header.flags = LinkFlags::Up;
        message.header.change_mask = LinkFlags::Up;
        self.request(|| format!("set interface {index} up"), RouteNetlinkMessage::SetLink(message), 0)
    }

    /// A free text that the kernel keeps with the interface: here, whose it is.
    pub(super) fn set_alias(&mut self, index: u32, alias: &str) -> Result<(), NetworkError> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.attributes.push(LinkAttribute::IfAlias(alias.to_owned()));
        self.request(|| format!("label interface {index}"), RouteNetlinkMessage::SetLink(message), 0)
    }

    /// Both ends of a veth pair go, before this returns. An interface that is not there is no error.
    pub(super) fn delete_link(&mut self, interface: &str) -> Result<(), NetworkError> {
        self.delete(|| format!("delete {interface}"), LinkAttribute::IfName(interface.to_owned()))
    }

    /// All pairs that [`create_veth`](Self::create_veth) made from this namespace, at once: the kernel waits for its
    /// readers once, not once for each.
    pub(super) fn delete_own_links(&mut self) -> Result<(), NetworkError> {
        self.delete(|| "delete a sandbox's interfaces".to_owned(), LinkAttribute::Group(OWN_GROUP))
    }

    fn delete(&mut self, step: impl Fn() -> String, which: LinkAttribute) -> Result<(), NetworkError> {
        let mut message = LinkMessage::default();
        message.attributes.push(which);
        match self.request(step, RouteNetlinkMessage::DelLink(message), 0) {
            Err(error) if error.raw_os_error() == Some(nix::libc::ENODEV) => Ok(()),
            other => other,
        }
    }

    /// Adds or replaces an address. `with_route` says whether the kernel may add the route to the prefix by itself.
    pub(super) fn set_address(
        &mut self,
        index: u32,
        address: Ipv4Addr,
        prefix_length: u8,
        with_route: bool,
    ) -> Result<(), NetworkError> {
        let mut message = AddressMessage::default();
        message.header.family = AddressFamily::Inet;
        message.header.prefix_len = prefix_length;
        message.header.index = index;
        message.attributes.push(AddressAttribute::Local(address.into()));
        message.attributes.push(AddressAttribute::Address(address.into()));
        if !with_route {
            message.attributes.push(AddressAttribute::Flags(AddressFlags::Noprefixroute));
        }
        self.request(
            || format!("give interface {index} the address {address}/{prefix_length}"),
            RouteNetlinkMessage::NewAddress(message),
            NLM_F_CREATE | NLM_F_REPLACE,
        )
    }

    /// Adds or replaces the default route.
    pub(super) fn set_default_route(&mut self, index: u32, gateway: Ipv4Addr) -> Result<(), NetworkError> {
        let mut message = route_message(index, RouteScope::Universe);
        message.attributes.push(RouteAttribute::Gateway(RouteAddress::Inet(gateway)));
        self.request(
            || format!("route by default through {gateway}"),
            RouteNetlinkMessage::NewRoute(message),
            NLM_F_CREATE | NLM_F_REPLACE,
        )
    }

    /// Adds the route to one address, and fails with EEXIST if any interface has it already.
    pub(super) fn claim_host_route(
        &mut self,
        index: u32,
        destination: Ipv4Addr,
        source: Ipv4Addr,
    ) -> Result<(), NetworkError> {
        let mut message = route_message(index, RouteScope::Link);
        message.header.destination_prefix_length = 32;
        message.attributes.push(RouteAttribute::Destination(RouteAddress::Inet(destination)));
        message.attributes.push(RouteAttribute::PrefSource(RouteAddress::Inet(source)));
        self.request(
            || format!("route to {destination}"),
            RouteNetlinkMessage::NewRoute(message),
            NLM_F_CREATE | NLM_F_EXCL,
        )
    }

    /// Fixes the link address of a neighbour, so that nobody is asked for it and nobody can claim it.
    pub(super) fn set_neighbour(
        &mut self,
        index: u32,
        address: Ipv4Addr,
        link_address: [u8; 6],
    ) -> Result<(), NetworkError> {
        let mut message = NeighbourMessage::default();
        message.header.family = AddressFamily::Inet;
        message.header.ifindex = index;
        message.header.state = NeighbourState::Permanent;
        message.attributes.push(NeighbourAttribute::Destination(NeighbourAddress::Inet(address)));
        message.attributes.push(NeighbourAttribute::LinkLayerAddress(link_address.to_vec()));
        self.request(
            || format!("set the neighbour {address}"),
            RouteNetlinkMessage::NewNeighbour(message),
            NLM_F_CREATE | NLM_F_REPLACE,
        )
    }

    pub(super) fn links(&mut self) -> Result<Vec<Link>, NetworkError> {
        let messages = self.dump("list the interfaces", RouteNetlinkMessage::GetLink(LinkMessage::default()))?;
        let links = messages.into_iter().filter_map(|message| match message {
            RouteNetlinkMessage::NewLink(link) => link_of(&link),
            _ => None,
        });
        Ok(links.collect())
    }

    /// All IPv4 addresses, each with the index of its interface.
    pub(super) fn addresses(&mut self) -> Result<Vec<(u32, Ipv4Addr)>, NetworkError> {
        let mut request = AddressMessage::default();
        request.header.family = AddressFamily::Inet;
        let messages = self.dump("list the addresses", RouteNetlinkMessage::GetAddress(request))?;
        let addresses = messages.into_iter().filter_map(|message| match message {
            RouteNetlinkMessage::NewAddress(address) => {
                let local = address.attributes.iter().find_map(|attribute| match attribute {
                    AddressAttribute::Local(std::net::IpAddr::V4(local)) => Some(*local),
                    _ => None,
                })?;
                Some((address.header.index, local))
            }
            _ => None,
        });
        Ok(addresses.collect())
    }

    pub(super) fn routes(&mut self) -> Result<Vec<Route>, NetworkError> {
        let mut request = RouteMessage::default();
        request.header.address_family = AddressFamily::Inet;
        let messages = self.dump("list the routes", RouteNetlinkMessage::GetRoute(request))?;
        let routes = messages.into_iter().flat_map(|message| match message {
            RouteNetlinkMessage::NewRoute(route) => routes_of(&route),
            _ => Vec::new(),
        });
        Ok(routes.collect())
    }

    fn request(
        &mut self,
        step: impl Fn() -> String,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> Result<(), NetworkError> {
        self.exchange(message, flags | NLM_F_ACK)
            .map(|_| ())
            .map_err(|source| NetworkError::Netlink { step: step(), source })
    }

    fn dump(&mut self, step: &str, message: RouteNetlinkMessage) -> Result<Vec<RouteNetlinkMessage>, NetworkError> {
        self.exchange(message, NLM_F_DUMP).map_err(|source| NetworkError::Netlink { step: step.to_owned(), source })
    }

    /// Sends one request and collects what comes back until the kernel acknowledges, refuses or ends the listing.
    fn exchange(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<Vec<RouteNetlinkMessage>> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | flags;
        header.sequence_number = self.sequence;
        let mut request = NetlinkMessage::new(header, NetlinkPayload::from(message));
        request.finalize();
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        send(self.socket.as_raw_fd(), &bytes, MsgFlags::empty())?;

        let mut answers = Vec::new();
        loop {
            let received = recv(self.socket.as_raw_fd(), &mut self.buffer, MsgFlags::empty())?;
            let mut rest = &self.buffer[..received];
            while !rest.is_empty() {
                let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest)
                    .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
                // Answers are padded to four bytes; one that claims no length would keep us here for ever.
                let length = (answer.header.length as usize).next_multiple_of(4).max(16);
                rest = rest.get(length..).unwrap_or_default();
                if answer.header.sequence_number != self.sequence {
                    continue;
                }
                match answer.payload {
                    NetlinkPayload::InnerMessage(inner) => answers.push(inner),
                    NetlinkPayload::Error(error) if error.code.is_some() => return Err(error.to_io()),
                    NetlinkPayload::Error(_) | NetlinkPayload::Done(_) => return Ok(answers),
                    _ => {}
                }
            }
        }
    }
}

fn end_message(end: &VethEnd<'_>, mtu: u32) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.attributes = vec![
        LinkAttribute::IfName(end.interface.to_owned()),
        LinkAttribute::Address(end.link_address.to_vec()),
        LinkAttribute::Mtu(mtu),
    ];
    message
}

fn route_message(index: u32, scope: RouteScope) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = AddressFamily::Inet;
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    message.header.protocol = RouteProtocol::Static;
    message.header.scope = scope;
    message.header.kind = RouteType::Unicast;
    message.attributes.push(RouteAttribute::Oif(index));
    message
}

fn link_of(message: &LinkMessage) -> Option<Link> {
    let mut link = Link { index: message.header.index, name: String::new(), alias: None, mtu: None };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::IfAlias(alias) => link.alias = Some(alias.clone()),
            LinkAttribute::Mtu(mtu) => link.mtu = Some(*mtu),
            _ => {}
        }
    }
    (!link.name.is_empty()).then_some(link)
}

fn routes_of(message: &RouteMessage) -> Vec<Route> {
    if message.header.table != RouteHeader::RT_TABLE_MAIN || message.header.kind != RouteType::Unicast {
        return Vec::new();
    }
    let mut destination = Ipv4Addr::UNSPECIFIED;
    let mut metric = 0;
    let mut interfaces = Vec::new();
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(RouteAddress::Inet(address)) => destination = *address,
            RouteAttribute::Priority(priority) => metric = *priority,
            RouteAttribute::Oif(index) => interfaces.push(*index),
            RouteAttribute::MultiPath(hops) => interfaces.extend(hops.iter().map(|hop| hop.interface_index)),
            _ => {}
        }
    }
    let Ok(destination) = Ipv4Net::new(destination, message.header.destination_prefix_length) else {
        return Vec::new();
    };
    interfaces.into_iter().map(|interface_index| Route { destination, interface_index, metric }).collect()
}
