//! The little of a DNS message that a forwarder has to understand: the header and the one question.
//!
//! ```text
//!  0       2       4         6         8         10        12
//!  ┌───────┬───────┬─────────┬─────────┬─────────┬─────────┬───────────────┬──────────────
//!  │ id    │ flags │ QDCOUNT │ ANCOUNT │ NSCOUNT │ ARCOUNT │ the question  │ records ...
//!  └───────┴───────┴─────────┴─────────┴─────────┴─────────┴───────────────┴──────────────
//! ```

/// Longest query that is forwarded. A question takes at most 271 bytes; the rest is room for EDNS options.
pub(super) const QUERY_BYTES_MAX: usize = 4096;

const HEADER_BYTES: usize = 12;
const NAME_BYTES_MAX: usize = 255;
const LABEL_BYTES_MAX: u8 = 63;

const RESPONSE_BIT: u8 = 0x80;
const OPCODE_BITS: u8 = 0x78;
const RECURSION_DESIRED_BIT: u8 = 0x01;
const RECURSION_AVAILABLE_BIT: u8 = 0x80;
const RESPONSE_CODE_BITS: u8 = 0x0f;

const TYPE_IXFR: u16 = 251;
const TYPE_AXFR: u16 = 252;

/// RFC 1035, section 4.1.1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum ResponseCode {
    FormatError = 1,
    ServerFailure = 2,
    NotImplemented = 4,
    Refused = 5,
}

/// Why a message is not forwarded.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Rejection {
    /// Not a query at all. Answering could make two servers talk to each other for ever.
    Silent,
    Answer(Vec<u8>),
}

/// A well-formed query with one question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Query {
    bytes: Vec<u8>,
    question_end: usize,
}

impl Query {
    /// Admits what a stub resolver sends. A host's resolvers may take orders from the host's address that they would
    /// not take from a stranger, and the guest speaks with the host's address here: so no dynamic updates, no
    /// notifications (any opcode but QUERY) and no zone transfers.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, Rejection> {
        if bytes.len() < HEADER_BYTES || bytes[2] & RESPONSE_BIT != 0 {
            return Err(Rejection::Silent);
        }
        let reject = |code| Err(Rejection::Answer(response(bytes, &[], code)));
        if bytes[2] & OPCODE_BITS != 0 {
            return reject(ResponseCode::NotImplemented);
        }
        if bytes.len() > QUERY_BYTES_MAX || u16_at(bytes, 4) != Some(1) {
            return reject(ResponseCode::FormatError);
        }
        let Some(question_end) = question_end(bytes) else {
            return reject(ResponseCode::FormatError);
        };
        let query = Self { bytes: bytes.to_vec(), question_end };
        match u16_at(bytes, question_end - 4) {
            Some(TYPE_AXFR | TYPE_IXFR) => Err(Rejection::Answer(query.response(ResponseCode::Refused))),
            _ => Ok(query),
        }
    }

    /// The query as it is sent on, under an identifier that the guest does not know.
    pub(super) fn with_id(&self, id: u16) -> Vec<u8> {
        let mut bytes = self.bytes.clone();
        bytes[..2].copy_from_slice(&id.to_be_bytes());
        bytes
    }

    /// Whether `answer` belongs to this query as sent under `id`: a response with that identifier and question.
    pub(super) fn is_answered_by(&self, answer: &[u8], id: u16) -> bool {
        if answer.len() < HEADER_BYTES || answer[2] & RESPONSE_BIT == 0 || u16_at(answer, 0) != Some(id) {
            return false;
        }
        match u16_at(answer, 4) {
            // A server that could not read the query has no question to repeat, only an error.
            Some(0) => answer[3] & RESPONSE_CODE_BITS != 0,
            Some(1) => answer
                .get(HEADER_BYTES..self.question_end)
                .is_some_and(|question| question.eq_ignore_ascii_case(self.question())),
            _ => false,
        }
    }

    /// Gives an answer from upstream the identifier that the guest waits for.
    pub(super) fn restore_id(&self, answer: &mut [u8]) {
        answer[..2].copy_from_slice(&self.bytes[..2]);
    }

    /// An answer of our own: the question and a code.
    pub(super) fn response(&self, code: ResponseCode) -> Vec<u8> {
        response(&self.bytes, self.question(), code)
    }

    fn question(&self) -> &[u8] {
        &self.bytes[HEADER_BYTES..self.question_end]
    }
}

/// Whether another server might know better than the one that gave this answer.
pub(super) fn is_inconclusive(answer: &[u8]) -> bool {
    let code = answer[3] & RESPONSE_CODE_BITS;
    [ResponseCode::ServerFailure, ResponseCode::NotImplemented, ResponseCode::Refused]
        .iter()
        .any(|inconclusive| *inconclusive as u8 == code)
}

fn response(query: &[u8], question: &[u8], code: ResponseCode) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER_BYTES + question.len());
    bytes.extend_from_slice(&query[..2]);
    bytes.push(RESPONSE_BIT | (query[2] & (OPCODE_BITS | RECURSION_DESIRED_BIT)));
    bytes.push(RECURSION_AVAILABLE_BIT | code as u8);
    bytes.extend_from_slice(&u16::from(!question.is_empty()).to_be_bytes());
    bytes.extend_from_slice(&[0; 6]);
    bytes.extend_from_slice(question);
    bytes
}

fn u16_at(bytes: &[u8], position: usize) -> Option<u16> {
    let pair = bytes.get(position..position + 2)?;
    Some(u16::from_be_bytes([pair[0], pair[1]]))
}

/// The position after the first question: its name, uncompressed because nothing stands before it, type and class.
fn question_end(bytes: &[u8]) -> Option<usize> {
    let mut position = HEADER_BYTES;
    loop {
        let length = *bytes.get(position)?;
        if length > LABEL_BYTES_MAX {
            return None;
        }
        position += 1 + usize::from(length);
        if position - HEADER_BYTES > NAME_BYTES_MAX {
            return None;
        }
        if length == 0 {
            break;
        }
    }
    let end = position + 4;
    (end <= bytes.len()).then_some(end)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A query for `name`, as a resolver would send it.
    pub(in crate::network::dns) fn query_bytes(id: u16, name: &str, kind: u16) -> Vec<u8> {
        let mut bytes = id.to_be_bytes().to_vec();
        bytes.extend_from_slice(&[RECURSION_DESIRED_BIT, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
        for label in name.split('.') {
            bytes.push(u8::try_from(label.len()).expect("a short label"));
            bytes.extend_from_slice(label.as_bytes());
        }
        bytes.push(0);
        bytes.extend_from_slice(&kind.to_be_bytes());
        bytes.extend_from_slice(&[0, 1]);
        bytes
    }

    fn parse(bytes: &[u8]) -> Query {
        Query::parse(bytes).expect("a good query")
    }

    #[test]
    fn a_failure_repeats_id_and_question() {
        let bytes = query_bytes(0x1234, "example.org", 1);
        let failure = parse(&bytes).response(ResponseCode::ServerFailure);
        assert_eq!(failure[..4], [0x12, 0x34, 0x81, 0x82]);
        assert_eq!(failure[12..], bytes[12..]);
        assert!(parse(&bytes).is_answered_by(&failure, 0x1234));
        assert!(is_inconclusive(&failure));
    }

    #[test]
    fn orders_that_a_resolver_might_obey_are_not_forwarded() {
        let code = |bytes: &[u8]| match Query::parse(bytes) {
            Err(Rejection::Answer(answer)) => answer[3] & RESPONSE_CODE_BITS,
            other => panic!("{other:?}"),
        };
        let mut update = query_bytes(1, "example.org", 6);
        update[2] |= 5 << 3;
        assert_eq!(code(&update), ResponseCode::NotImplemented as u8);
        assert_eq!(code(&query_bytes(1, "example.org", TYPE_AXFR)), ResponseCode::Refused as u8);
        let mut two_questions = query_bytes(1, "example.org", 1);
        two_questions[5] = 2;
        assert_eq!(code(&two_questions), ResponseCode::FormatError as u8);
    }

    #[test]
    fn responses_are_never_answered() {
        let mut bytes = query_bytes(1, "example.org", 1);
        bytes[2] |= RESPONSE_BIT;
        assert_eq!(Query::parse(&bytes), Err(Rejection::Silent));
    }

    #[test]
    fn an_answer_must_match_id_and_question() {
        let query = parse(&query_bytes(1, "example.org", 1));
        let answer_to = |name: &str| {
            let mut bytes = query_bytes(7, name, 1);
            bytes[2] |= RESPONSE_BIT;
            bytes
        };
        assert!(query.is_answered_by(&answer_to("EXAMPLE.org"), 7));
        assert!(!query.is_answered_by(&answer_to("example.org"), 8));
        assert!(!query.is_answered_by(&answer_to("example.net"), 7));
        assert!(!query.is_answered_by(&query_bytes(7, "example.org", 1), 7));
        let mut restored = answer_to("example.org");
        query.restore_id(&mut restored);
        assert_eq!(restored[..2], [0, 1]);
    }

    proptest! {
        #[test]
        fn nothing_a_guest_sends_panics(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            if let Ok(query) = Query::parse(&bytes) {
                prop_assert!(query.response(ResponseCode::ServerFailure).len() <= bytes.len());
            }
        }

        #[test]
        fn nothing_an_upstream_sends_panics(
            bytes in proptest::collection::vec(any::<u8>(), 0..600),
            id in any::<u16>(),
        ) {
            let query = parse(&query_bytes(1, "example.org", 1));
            if query.is_answered_by(&bytes, id) {
                prop_assert!(bytes.len() >= HEADER_BYTES);
                is_inconclusive(&bytes);
            }
        }
    }
}
