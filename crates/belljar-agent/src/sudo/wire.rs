//! What client and broker say to each other, over a stream socket:
//!
//! ```text
//! broker:  Reply::Ready            (only from now on is it told who sent what)
//! client:  length of the order     + stdin, stdout, stderr, working directory as SCM_RIGHTS
//! client:  the order
//! client:  one byte per signal     …
//! broker:  Reply::Ended or Reply::Refused
//! ```

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use rustix::process::Signal;
use tokio::io::{AsyncRead, AsyncReadExt};

use crate::process::{Exit, Whom};

/// As much as Linux lets a program have as arguments and environment, pointers included.
pub(super) const MAX_ORDER_BYTES: usize = 2 << 20;

/// Arguments and variables; each costs the broker some fifty bytes beyond its own length.
const MAX_STRINGS: usize = 128 << 10;

/// The length of an order, before it.
pub(super) const HEADER_BYTES: usize = 4;

/// Standard streams, and the working directory.
pub(super) const FILES: usize = 4;

const MAX_REFUSAL_BYTES: usize = 4096;

/// What the client wants run, apart from the files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Order {
    pub(super) umask: u32,
    /// Whether stdin is a terminal made for this command alone, to become its controlling one.
    pub(super) has_terminal: bool,
    pub(super) arguments: Vec<OsString>,
    pub(super) environment: Vec<(OsString, OsString)>,
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum OrderError {
    #[error("Argument list too long")]
    TooLong,
    #[error("malformed request")]
    Malformed,
}

impl Order {
    /// Umask, terminal, number of arguments; then arguments and environment, each string ended by a null byte.
    pub(super) fn encode(&self) -> Result<Vec<u8>, OrderError> {
        if self.arguments.len() + self.environment.len() > MAX_STRINGS {
            return Err(OrderError::TooLong);
        }
        let count = u32::try_from(self.arguments.len()).map_err(|_| OrderError::TooLong)?;
        let mut bytes = Vec::new();
        bytes.extend(self.umask.to_le_bytes());
        bytes.push(u8::from(self.has_terminal));
        bytes.extend(count.to_le_bytes());
        for argument in &self.arguments {
            bytes.extend(argument.as_bytes());
            bytes.push(0);
        }
        for (name, value) in &self.environment {
            bytes.extend([name.as_bytes(), b"=", value.as_bytes(), b"\0"].concat());
        }
        if bytes.len() > MAX_ORDER_BYTES { Err(OrderError::TooLong) } else { Ok(bytes) }
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Self, OrderError> {
        let (umask, rest) = bytes.split_first_chunk().ok_or(OrderError::Malformed)?;
        let (has_terminal, rest) = rest.split_first().ok_or(OrderError::Malformed)?;
        let (count, rest) = rest.split_first_chunk().ok_or(OrderError::Malformed)?;
        let count = usize::try_from(u32::from_le_bytes(*count)).map_err(|_| OrderError::Malformed)?;
        // Every string ends with a null byte, so that nothing follows the last.
        let mut strings = rest.split(|byte| *byte == 0);
        if strings.next_back().is_none_or(|after| !after.is_empty()) {
            return Err(OrderError::Malformed);
        }
        let total = rest.iter().filter(|byte| **byte == 0).count();
        if total > MAX_STRINGS || count > total {
            return Err(OrderError::Malformed);
        }
        let arguments = strings.by_ref().take(count).map(|bytes| OsString::from_vec(bytes.to_vec())).collect();
        Ok(Self {
            umask: u32::from_le_bytes(*umask),
            has_terminal: *has_terminal != 0,
            arguments,
            environment: strings.filter_map(variable).collect(),
        })
    }
}

/// `name=value`. What has no name is nothing that a program could look up.
fn variable(bytes: &[u8]) -> Option<(OsString, OsString)> {
    let end = bytes.iter().position(|byte| *byte == b'=').filter(|end| *end > 0)?;
    Some((OsStr::from_bytes(&bytes[..end]).to_owned(), OsStr::from_bytes(&bytes[end + 1..]).to_owned()))
}

/// The signals that the client passes on, and whom they are for.
///
/// `sudo` relays to its command, and to that alone, what it is sent. What usually goes to a whole process group, by a
/// terminal or by the agent, goes to everybody but `sudo` here; nobody gets it twice.
const RELAYED: [(Signal, Whom); 10] = [
    (Signal::HUP, Whom::Leader),
    (Signal::ALARM, Whom::Leader),
    (Signal::USR1, Whom::Leader),
    (Signal::USR2, Whom::Leader),
    (Signal::TERM, Whom::Followers),
    (Signal::INT, Whom::Followers),
    (Signal::QUIT, Whom::Followers),
    (Signal::WINCH, Whom::Followers),
    (Signal::TSTP, Whom::Everyone),
    (Signal::CONT, Whom::Everyone),
];

pub(super) fn relayed_signals() -> impl Iterator<Item = Signal> {
    RELAYED.into_iter().map(|(signal, _)| signal)
}

/// What is to be done for one byte of the client's: the signal to send, and to whom.
pub(super) fn relayed(byte: u8) -> Option<(Signal, Whom)> {
    let (signal, whom) = RELAYED.into_iter().find(|(signal, _)| signal.as_raw() == i32::from(byte))?;
    // In a session of its own the command can't be stopped by a terminal's signal: nobody there could continue it.
    Some((if signal == Signal::TSTP { Signal::STOP } else { signal }, whom))
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Reply {
    Ready,
    Ended(Exit),
    /// To be shown to the caller after `sudo: `.
    Refused(String),
}

impl Reply {
    const READY: u8 = 0;
    const EXITED: u8 = 1;
    const SIGNALLED: u8 = 2;
    const REFUSED: u8 = 3;

    /// A tag, a number, and for a refusal as many bytes of text.
    pub(super) fn encode(&self) -> Vec<u8> {
        let (tag, number, text) = match self {
            Self::Ready => (Self::READY, 0, ""),
            Self::Ended(Exit::Code(code)) => (Self::EXITED, *code, ""),
            Self::Ended(Exit::Signal { number, .. }) => (Self::SIGNALLED, *number, ""),
            Self::Refused(text) => {
                let text = &text[..text.floor_char_boundary(MAX_REFUSAL_BYTES)];
                (Self::REFUSED, i32::try_from(text.len()).unwrap_or(0), text)
            }
        };
        [&[tag][..], &number.to_le_bytes(), text.as_bytes()].concat()
    }

    pub(super) async fn read(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Self> {
        let invalid = || io::Error::new(io::ErrorKind::InvalidData, "malformed answer");
        let tag = stream.read_u8().await?;
        let number = stream.read_i32_le().await?;
        Ok(match tag {
            Self::READY => Self::Ready,
            Self::EXITED => Self::Ended(Exit::Code(number)),
            Self::SIGNALLED => Self::Ended(Exit::Signal { number, core_dumped: false }),
            Self::REFUSED => {
                let length = usize::try_from(number).ok().filter(|length| *length <= MAX_REFUSAL_BYTES);
                let mut text = vec![0; length.ok_or_else(invalid)?];
                stream.read_exact(&mut text).await?;
                Self::Refused(String::from_utf8_lossy(&text).into_owned())
            }
            _ => return Err(invalid()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order() -> Order {
        Order {
            umask: 0o027,
            has_terminal: true,
            arguments: ["-n", "", "a b"].map(OsString::from).into(),
            environment: vec![("A".into(), "b=c".into()), ("EMPTY".into(), "".into())],
        }
    }

    #[test]
    fn an_order_arrives_as_it_was_given() {
        let nothing = Order { arguments: Vec::new(), environment: Vec::new(), ..order() };
        for order in [order(), nothing] {
            assert_eq!(Order::decode(&order.encode().expect("short")), Ok(order));
        }
    }

    #[test]
    fn no_part_of_an_order_passes_for_a_whole_one() {
        let bytes = order().encode().expect("short");
        // Between two variables a cut is not visible; before those it is.
        let arguments = 9 + b"-n\0\0a b\0".len();
        for length in 0..arguments {
            assert_eq!(Order::decode(&bytes[..length]), Err(OrderError::Malformed), "{length} bytes");
        }
        assert_eq!(Order::decode(&[&bytes[..], b"x"].concat()), Err(OrderError::Malformed));
    }

    #[test]
    fn an_order_can_not_be_made_of_too_many_strings() {
        let mut order = order();
        order.arguments = vec![OsString::new(); MAX_STRINGS];
        assert_eq!(order.encode(), Err(OrderError::TooLong));
        let bytes = [&[0; 9][..], &vec![0; MAX_STRINGS + 1]].concat();
        assert_eq!(Order::decode(&bytes), Err(OrderError::Malformed));
        order.arguments = vec!["x".repeat(MAX_ORDER_BYTES).into()];
        assert_eq!(order.encode(), Err(OrderError::TooLong));
    }

    #[test]
    fn nameless_variables_are_left_out() {
        let bytes = [&[0; 9][..], b"=a\0b\0C=d\0"].concat();
        assert_eq!(Order::decode(&bytes).expect("valid").environment, [("C".into(), "d".into())]);
    }

    #[test]
    fn only_what_a_client_relays_is_sent() {
        assert_eq!(relayed(15), Some((Signal::TERM, Whom::Followers)));
        assert_eq!(relayed(20), Some((Signal::STOP, Whom::Everyone)));
        for byte in [0, 9, 17, 19, 255] {
            assert_eq!(relayed(byte), None, "{byte}");
        }
    }

    #[tokio::test]
    async fn replies_arrive_as_they_were_given() {
        for reply in [
            Reply::Ready,
            Reply::Ended(Exit::Code(7)),
            Reply::Ended(Exit::Signal { number: 15, core_dumped: false }),
            Reply::Refused("no — not you".into()),
        ] {
            assert_eq!(Reply::read(&mut &reply.encode()[..]).await.expect("readable"), reply);
        }
        let long = Reply::Refused("é".repeat(MAX_REFUSAL_BYTES)).encode();
        assert!(matches!(Reply::read(&mut &long[..]).await, Ok(Reply::Refused(text)) if text.len() <= 4096));
        for broken in [&[9, 0, 0, 0, 0][..], &[3, 255, 255, 255, 255], &[1, 0]] {
            assert!(Reply::read(&mut &broken[..]).await.is_err(), "{broken:?}");
        }
    }
}
