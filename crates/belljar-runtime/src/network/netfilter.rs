//! Just enough of the nf_tables netlink protocol to read a packet filter out of the kernel and to put it in again.
//!
//! Attributes are copied, not understood: what the kernel tells about a chain, a set or a rule is, but for a few
//! fields, what it takes to make one.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::libc;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket};

const MESSAGE_HEADER_BYTES: usize = 16;
/// Behind the netlink header: the protocol family, a version, and the subsystem of a batch.
const FAMILY_HEADER_BYTES: usize = 4;
const ATTRIBUTE_HEADER_BYTES: usize = 4;

/// The `inet` family: IPv4 and IPv6 in one table.
const FAMILY_INET: u8 = 1;
const FAMILY_NONE: u8 = 0;

/// The upper two bits of an attribute's type are flags.
const ATTRIBUTE_TYPE_BITS: u16 = 0x3fff;

const RECEIVE_BUFFER_BYTES: usize = 64 * 1024;

/// What a message makes or asks for; the numbers are those of `linux/netfilter/nf_tables.h`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    NewTable = 0,
    DeleteTable = 2,
    NewChain = 3,
    GetChain = 4,
    NewRule = 6,
    GetRule = 7,
    NewSet = 9,
    GetSet = 10,
    NewElements = 12,
    GetElements = 13,
}

/// A list of netlink attributes, as bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Attributes(Vec<u8>);

impl Attributes {
    pub(super) fn with(mut self, kind: u16, value: &[u8]) -> Self {
        let length = u16::try_from(ATTRIBUTE_HEADER_BYTES + value.len()).expect("attributes are short");
        self.0.extend_from_slice(&length.to_ne_bytes());
        self.0.extend_from_slice(&kind.to_ne_bytes());
        self.0.extend_from_slice(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    /// A name: the kernel wants the zero byte.
    pub(super) fn with_text(self, kind: u16, text: &str) -> Self {
        self.with(kind, &[text.as_bytes(), &[0]].concat())
    }

    pub(super) fn get(&self, kind: u16) -> Option<&[u8]> {
        self.iter().find(|(found, _)| found & ATTRIBUTE_TYPE_BITS == kind).map(|(_, value)| value)
    }

    /// Those of the given kinds, in their order, flags and all.
    pub(super) fn keep(&self, kinds: &[u16]) -> Self {
        self.iter()
            .filter(|(kind, _)| kinds.contains(&(kind & ATTRIBUTE_TYPE_BITS)))
            .fold(Self::default(), |kept, (kind, value)| kept.with(kind, value))
    }

    fn iter(&self) -> impl Iterator<Item = (u16, &[u8])> {
        let mut rest = self.0.as_slice();
        std::iter::from_fn(move || {
            let length = usize::from(u16::from_ne_bytes([*rest.first()?, *rest.get(1)?]));
            let kind = u16::from_ne_bytes([*rest.get(2)?, *rest.get(3)?]);
            let value = rest.get(ATTRIBUTE_HEADER_BYTES..length)?;
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
            Some((kind, value))
        })
    }
}

/// A connection to the packet filter of the calling thread's namespace.
#[derive(Debug)]
pub(super) struct Netfilter {
    socket: OwnedFd,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Netfilter {
    pub(super) fn open() -> io::Result<Self> {
        let socket =
            socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkNetFilter)?;
        Ok(Self { socket, sequence: 0, buffer: vec![0; RECEIVE_BUFFER_BYTES] })
    }

    /// Asks for all objects of a kind.
    pub(super) fn dump(&mut self, kind: Kind, request: &Attributes) -> io::Result<Vec<Attributes>> {
        let mut bytes = Vec::new();
        let flags = libc::NLM_F_REQUEST | libc::NLM_F_DUMP;
        let sequence = self.append(&mut bytes, subsystem_type(kind), flags, FAMILY_INET, 0, request);
        send(self.socket.as_raw_fd(), &bytes, MsgFlags::empty())?;
        let mut objects = Vec::new();
        self.receive(|message_sequence, message_type, body| {
            if message_sequence != sequence {
                return Ok(false);
            }
            if message_type == libc::NLMSG_DONE {
                return Ok(true);
            }
            objects.push(Attributes(body.get(FAMILY_HEADER_BYTES..).unwrap_or_default().to_vec()));
            Ok(false)
        })?;
        Ok(objects)
    }

    /// Carries out all of the changes, or none.
    pub(super) fn transact(&mut self, changes: &[(Kind, Attributes)]) -> io::Result<()> {
        let mut bytes = Vec::new();
        let nothing = Attributes::default();
        let subsystem = u16::try_from(libc::NFNL_SUBSYS_NFTABLES).expect("a small number").to_be();
        let request = libc::NLM_F_REQUEST;
        self.append(&mut bytes, libc::NFNL_MSG_BATCH_BEGIN, request, FAMILY_NONE, subsystem, &nothing);
        let mut last = 0;
        for (position, (kind, attributes)) in changes.iter().enumerate() {
            let mut flags = request;
            if *kind != Kind::DeleteTable {
                flags |= libc::NLM_F_CREATE | libc::NLM_F_APPEND;
            }
            if position + 1 == changes.len() {
                flags |= libc::NLM_F_ACK;
            }
            last = self.append(&mut bytes, subsystem_type(*kind), flags, FAMILY_INET, 0, attributes);
        }
        self.append(&mut bytes, libc::NFNL_MSG_BATCH_END, request, FAMILY_NONE, subsystem, &nothing);
        send(self.socket.as_raw_fd(), &bytes, MsgFlags::empty())?;
        // Refusals come for the messages they belong to or for the first; the last is acknowledged behind all of them.
        self.receive(|sequence, _, _| Ok(sequence == last))
    }

    fn append(
        &mut self,
        bytes: &mut Vec<u8>,
        message_type: libc::c_int,
        flags: libc::c_int,
        family: u8,
        resource: u16,
        attributes: &Attributes,
    ) -> u32 {
        self.sequence = self.sequence.wrapping_add(1);
        let length = MESSAGE_HEADER_BYTES + FAMILY_HEADER_BYTES + attributes.0.len();
        bytes.extend_from_slice(&u32::try_from(length).expect("messages are short").to_ne_bytes());
        bytes.extend_from_slice(&u16::try_from(message_type).expect("a small number").to_ne_bytes());
        bytes.extend_from_slice(&u16::try_from(flags).expect("16 flags").to_ne_bytes());
        bytes.extend_from_slice(&self.sequence.to_ne_bytes());
        bytes.extend_from_slice(&0u32.to_ne_bytes());
        bytes.extend_from_slice(&[family, 0]);
        bytes.extend_from_slice(&resource.to_ne_bytes());
        bytes.extend_from_slice(&attributes.0);
        self.sequence
    }

    /// Passes messages (sequence number, type, body) to `handle` until it is done. An error from the kernel ends it.
    fn receive(&mut self, mut handle: impl FnMut(u32, libc::c_int, &[u8]) -> io::Result<bool>) -> io::Result<()> {
        loop {
            let received = recv(self.socket.as_raw_fd(), &mut self.buffer, MsgFlags::empty())?;
            let mut rest = &self.buffer[..received];
            while let Some((length, message_type, sequence)) = message_header(rest) {
                let body = rest.get(MESSAGE_HEADER_BYTES..length).ok_or(io::ErrorKind::InvalidData)?;
                if message_type == libc::NLMSG_ERROR {
                    let code = body.first_chunk().map_or(-libc::EPROTO, |code| i32::from_ne_bytes(*code));
                    if code != 0 {
                        return Err(io::Error::from_raw_os_error(-code));
                    }
                }
                if handle(sequence, message_type, body)? {
                    return Ok(());
                }
                rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
            }
        }
    }
}

fn subsystem_type(kind: Kind) -> libc::c_int {
    (libc::NFNL_SUBSYS_NFTABLES << 8) | kind as libc::c_int
}

fn message_header(bytes: &[u8]) -> Option<(usize, libc::c_int, u32)> {
    let header: &[u8; MESSAGE_HEADER_BYTES] = bytes.first_chunk()?;
    let length = u32::from_ne_bytes([header[0], header[1], header[2], header[3]]) as usize;
    let message_type = libc::c_int::from(u16::from_ne_bytes([header[4], header[5]]));
    let sequence = u32::from_ne_bytes([header[8], header[9], header[10], header[11]]);
    (length >= MESSAGE_HEADER_BYTES).then_some((length, message_type, sequence))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn attributes_are_found_and_kept_with_their_flags() {
        const NESTED: u16 = 0x8000;
        let attributes = Attributes::default().with_text(1, "name").with(4 | NESTED, &[1, 2, 3]).with(9, &[]);
        assert_eq!(attributes.get(1), Some(&b"name\0"[..]));
        assert_eq!(attributes.get(4), Some(&[1, 2, 3][..]));
        assert_eq!(attributes.get(2), None);
        let kept = attributes.keep(&[9, 4]);
        assert_eq!(kept, Attributes::default().with(4 | NESTED, &[1, 2, 3]).with(9, &[]));
    }

    proptest! {
        #[test]
        fn reading_attributes_never_panics_and_ends(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(Attributes(bytes).iter().take(300).count() < 300);
        }
    }
}
