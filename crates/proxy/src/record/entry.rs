//! One kept record as bytes: compact, checksummed, readable without allocation as far as filtering and counting need.
//! Nothing here touches a file. The form is known to this version only, which each segment's header names.
//!
//! ```text
//! entry    = length u32 · CRC-32 of the payload u32 · payload            (numbers little-endian)
//! payload  = 0 · instance                                                 the first of a segment: whose it is
//!          | 1 · head · edge · rest · end · operation · token · signals   a decision
//!          | 2 · id [16] · end                                            what became of one written earlier
//! head     = outcome u8 · reason u8 · judged u8 · protocol u8 · first contact u8 · id [16] · at_ms u64 · revision u64
//! edge     = length u16 · principal · service · action                    (a string: length, then UTF-8)
//! rest     = path · host · method · 0 | 1 + trace id [16] · judge_ns · now i64 · 4 + ip [4] | 6 + ip [16] · size + 1 · policies
//! token    = 0 | 1 + fault + 1 u8 · 0 | 1 + id [16] · scope · issued i64
//! signals  = the number of the last · risk u8 · compliant u8 · managed u8 · contained u8   (0: nobody says, 1: no, 2: yes)
//! end      = 0 | 1 + how u8 · status · duration_us · bytes_in · bytes_out
//! ```

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use countersign_core::{
    change::Revision,
    identity::{InstanceId, ServiceName, SpiffeId},
    policy::Action,
    record::{DecisionRecord, EdgeCount, End, Ended, Inputs, Judged, Outcome, Reason},
    risk::{Condition, Posture},
    service::Protocol,
    token::{Scope, ShownToken, TokenFault, TokenId},
};

use crate::decided::{Decided, DecisionId, TraceId};

/// Length and checksum before each payload.
pub(super) const FRAME_BYTES: usize = 8;
/// Longest entry, in bytes. A longer one is shed: paths and hosts that long are refused before they are judged.
pub(super) const ENTRY_BYTES_MAX: usize = 64 * 1024;

const SEGMENT: u8 = 0;
const DECISION: u8 = 1;
const END: u8 = 2;
const HEAD_BYTES: usize = 1 + 5 + 16 + 8 + 8;

/// The first entry of a segment, sealed.
pub(super) fn encode_segment(instance: &InstanceId) -> Vec<u8> {
    let mut entry = vec![0; FRAME_BYTES];
    entry.push(SEGMENT);
    text(&mut entry, instance.as_str());
    frame(&mut entry);
    seal(&mut entry);
    entry
}

/// Appends a decision, unsealed.
pub(super) fn encode_decision(to: &mut Vec<u8>, decided: &Decided<'_>) {
    let query = &decided.query;
    let begin = to.len();
    to.extend_from_slice(&[0; FRAME_BYTES]);
    to.push(DECISION);
    to.push(outcome_code(decided.decision.outcome));
    to.push(decided.decision.reason.place() as u8);
    to.push(match decided.judged {
        Judged::AtStart => 0,
        Judged::WhileOpen => 1,
        Judged::AsProbe => 2,
    });
    to.push(match query.context.protocol {
        Protocol::Http => 0,
        Protocol::Grpc => 1,
        Protocol::Tcp => 2,
    });
    to.push(u8::from(query.context.first_contact));
    to.extend_from_slice(&decided.id.0.to_be_bytes());
    to.extend_from_slice(&decided.at_ms.to_le_bytes());
    to.extend_from_slice(&decided.revision.0.to_le_bytes());
    let edge_at = to.len();
    to.extend_from_slice(&[0; 2]);
    text(to, query.principal.as_str());
    text(to, query.service.as_str());
    match query.action {
        Action::Http(method) => {
            number(to, 5 + method.len() as u64);
            to.extend_from_slice(b"http:");
            to.extend_from_slice(method.as_bytes());
        }
        Action::GrpcCall => text(to, "grpc:call"),
        Action::TcpConnect => text(to, "tcp:connect"),
    }
    // A SPIFFE ID has at most 2048 bytes, a service 63 and a method what a head can hold; a longer edge is cut off by
    // the bound on the whole entry, so its length is never read back.
    let edge_bytes = u16::try_from(to.len() - edge_at - 2).unwrap_or(u16::MAX);
    to[edge_at..edge_at + 2].copy_from_slice(&edge_bytes.to_le_bytes());
    text(to, query.path);
    text(to, query.context.host);
    text(to, query.context.method);
    match decided.trace_id {
        Some(id) => {
            to.push(1);
            to.extend_from_slice(&id.0.to_be_bytes());
        }
        None => to.push(0),
    }
    number(to, decided.judge_ns);
    to.extend_from_slice(&query.context.now.to_le_bytes());
    match query.context.origin {
        IpAddr::V4(ip) => {
            to.push(4);
            to.extend_from_slice(&ip.octets());
        }
        IpAddr::V6(ip) => {
            to.push(6);
            to.extend_from_slice(&ip.octets());
        }
    }
    number(to, query.context.size.map_or(0, |size| size.saturating_add(1)));
    number(to, decided.decision.policies.len() as u64);
    for policy in &*decided.decision.policies {
        text(to, policy);
    }
    ended(to, decided.ended.as_ref());
    text(to, decided.decision.operation.as_deref().unwrap_or_default());
    token(to, query.context.token);
    number(to, decided.signals.0);
    let Condition { risk, posture, contained } = query.context.condition;
    to.extend([risk, said(posture.compliant), said(posture.managed), u8::from(contained)]);
    frame(&mut to[begin..]);
}

fn said(of_host: Option<bool>) -> u8 {
    of_host.map_or(0, |holds| 1 + u8::from(holds))
}

fn token(to: &mut Vec<u8>, shown: Option<&ShownToken>) {
    let Some(shown) = shown else { return to.push(0) };
    to.push(1);
    to.push(shown.fault.map_or(0, |fault| fault.place() as u8 + 1));
    match shown.id {
        Some(id) => {
            to.push(1);
            to.extend_from_slice(id.as_bytes());
        }
        None => to.push(0),
    }
    text(to, &shown.scope.to_string());
    to.extend_from_slice(&shown.issued_at.to_le_bytes());
}

/// Appends what became of the decision of `id`, unsealed.
pub(super) fn encode_end(to: &mut Vec<u8>, id: DecisionId, how: &Ended) {
    let begin = to.len();
    to.extend_from_slice(&[0; FRAME_BYTES]);
    to.push(END);
    to.extend_from_slice(&id.0.to_be_bytes());
    ended(to, Some(how));
    frame(&mut to[begin..]);
}

fn ended(to: &mut Vec<u8>, ended: Option<&Ended>) {
    let Some(ended) = ended else { return to.push(0) };
    to.push(1);
    to.push(match ended.how {
        End::Completed => 0,
        End::Cut => 1,
        End::Abandoned => 2,
    });
    number(to, u64::from(ended.status));
    number(to, ended.duration_us);
    number(to, ended.bytes_in);
    number(to, ended.bytes_out);
}

/// Writes the length of a whole entry before its payload.
fn frame(entry: &mut [u8]) {
    let payload_bytes = (entry.len() - FRAME_BYTES) as u32;
    entry[..4].copy_from_slice(&payload_bytes.to_le_bytes());
}

/// Writes the checksum of a framed entry: the writer's work, so that no exchange waits for it.
pub(super) fn seal(entry: &mut [u8]) {
    let checksum = crc32fast::hash(&entry[FRAME_BYTES..]);
    entry[4..FRAME_BYTES].copy_from_slice(&checksum.to_le_bytes());
}

/// The payload's length, from the frame before it; `None` when no entry is that long.
pub(super) fn payload_bytes(frame: &[u8; FRAME_BYTES]) -> Option<usize> {
    let bytes = u32::from_le_bytes([frame[0], frame[1], frame[2], frame[3]]) as usize;
    (bytes <= ENTRY_BYTES_MAX).then_some(bytes)
}

/// Whether `payload` is what was sealed.
pub(super) fn is_whole(frame: &[u8; FRAME_BYTES], payload: &[u8]) -> bool {
    frame[4..] == crc32fast::hash(payload).to_le_bytes()
}

/// A payload, looked at in place.
pub(super) enum Payload<'a> {
    /// The instance whose proxy wrote the segment.
    Segment(&'a str),
    /// A decision.
    Decision(DecisionView<'a>),
    /// What became of one written earlier.
    End(DecisionId, Ended),
}

/// What can be read of a decision without decoding all of it.
pub(super) struct DecisionView<'a> {
    pub outcome: Outcome,
    pub reason: Reason,
    pub judged: Judged,
    pub id: DecisionId,
    pub at_ms: u64,
    pub revision: Revision,
    /// Principal, service and action: the same bytes for the same edge.
    pub edge: &'a [u8],
    protocol: Protocol,
    pub first_contact: bool,
    rest: &'a [u8],
}

impl<'a> Payload<'a> {
    /// Reads a payload; `None` when it is not one of this version.
    pub fn read(from: &'a [u8]) -> Option<Self> {
        match *from.first()? {
            SEGMENT => Some(Self::Segment(Cursor(from.get(1..)?).text()?)),
            DECISION => {
                let (head, after) = from.split_at_checked(HEAD_BYTES)?;
                let (length, after) = after.split_first_chunk::<2>()?;
                let (edge, rest) = after.split_at_checked(usize::from(u16::from_le_bytes(*length)))?;
                Some(Self::Decision(DecisionView {
                    outcome: [Outcome::Permit, Outcome::StepUp, Outcome::Deny].get(usize::from(head[1])).copied()?,
                    reason: Reason::ALL.get(usize::from(head[2])).copied()?,
                    judged: [Judged::AtStart, Judged::WhileOpen, Judged::AsProbe].get(usize::from(head[3])).copied()?,
                    protocol: [Protocol::Http, Protocol::Grpc, Protocol::Tcp].get(usize::from(head[4])).copied()?,
                    first_contact: head[5] == 1,
                    id: DecisionId(u128::from_be_bytes(*head[6..].first_chunk()?)),
                    at_ms: u64::from_le_bytes(*head[22..].first_chunk()?),
                    revision: Revision(u64::from_le_bytes(*head[30..].first_chunk()?)),
                    edge,
                    rest,
                }))
            }
            END => {
                let mut from = Cursor(from.get(1..)?);
                let id = DecisionId(u128::from_be_bytes(*from.take(16)?.first_chunk()?));
                Some(Self::End(id, from.ended()??))
            }
            _ => None,
        }
    }
}

impl<'a> DecisionView<'a> {
    /// Principal, service and action.
    pub fn edge_names(&self) -> Option<(&'a str, &'a str, &'a str)> {
        edge_names(self.edge)
    }

    /// The record in full.
    pub fn record(&self, instance: &InstanceId) -> Option<DecisionRecord> {
        let (principal, service, action) = self.edge_names()?;
        let mut rest = Cursor(self.rest);
        let (path, host, method) = (rest.text()?, rest.text()?, rest.text()?);
        let trace_id = match rest.take(1)? {
            [0] => None,
            _ => Some(TraceId(u128::from_be_bytes(*rest.take(16)?.first_chunk()?))),
        };
        let judge_ns = rest.number()?;
        let now = i64::from_le_bytes(*rest.take(8)?.first_chunk()?);
        let origin = match rest.take(1)? {
            [4] => IpAddr::V4(Ipv4Addr::from(*rest.take(4)?.first_chunk::<4>()?)),
            [6] => IpAddr::V6(Ipv6Addr::from(*rest.take(16)?.first_chunk::<16>()?)),
            _ => return None,
        };
        let size = rest.number()?.checked_sub(1);
        let count = usize::try_from(rest.number()?).ok()?;
        let policies = (0..count).map(|_| rest.text().map(Into::into)).collect::<Option<Vec<_>>>()?;
        let ended = rest.ended()?;
        // A record of a version without contracts ends before it.
        let operation = rest.text().filter(|name| !name.is_empty()).map(Into::into);
        let token = rest.token();
        // A record of a version without statements ends before it.
        let (signal_seq, condition) = rest.signals().unwrap_or_default();
        Some(DecisionRecord {
            id: self.id.to_string().into(),
            at_ms: self.at_ms,
            instance: instance.clone(),
            revision: self.revision,
            signal_seq,
            outcome: self.outcome,
            reason: self.reason,
            policies: policies.into(),
            inputs: Inputs {
                principal: SpiffeId::parse(principal).ok()?,
                action: action.into(),
                service: ServiceName::parse(service).ok()?,
                path: path.into(),
                host: host.into(),
                method: method.into(),
                protocol: self.protocol,
                size,
                origin,
                now,
                first_contact: self.first_contact,
                operation,
                token,
                condition,
            },
            judged: self.judged,
            ended,
            trace_id: trace_id.map(|id| id.to_string().into()),
            judge_ns,
        })
    }
}

/// The count of an edge, from the bytes that name it.
pub(super) fn edge_count(edge: &[u8], permits: u64, revision: Revision) -> Option<EdgeCount> {
    let (principal, service, action) = edge_names(edge)?;
    Some(EdgeCount {
        principal: SpiffeId::parse(principal).ok()?,
        service: ServiceName::parse(service).ok()?,
        action: action.into(),
        permits,
        revision,
    })
}

fn edge_names(edge: &[u8]) -> Option<(&str, &str, &str)> {
    let mut edge = Cursor(edge);
    Some((edge.text()?, edge.text()?, edge.text()?))
}

fn outcome_code(outcome: Outcome) -> u8 {
    match outcome {
        Outcome::Permit => 0,
        Outcome::StepUp => 1,
        Outcome::Deny => 2,
    }
}

/// LEB128: seven bits at a time, the lowest first.
fn number(to: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        to.push(value as u8 | 0x80);
        value >>= 7;
    }
    to.push(value as u8);
}

fn text(to: &mut Vec<u8>, value: &str) {
    number(to, value.len() as u64);
    to.extend_from_slice(value.as_bytes());
}

struct Cursor<'a>(&'a [u8]);

impl<'a> Cursor<'a> {
    fn take(&mut self, bytes: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(bytes)?;
        self.0 = rest;
        Some(taken)
    }

    fn number(&mut self) -> Option<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.take(1)?[0];
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Some(value);
            }
        }
        None
    }

    fn text(&mut self) -> Option<&'a str> {
        let bytes = usize::try_from(self.number()?).ok()?;
        std::str::from_utf8(self.take(bytes)?).ok()
    }

    /// What came as a token; a record of a version without tokens ends before it.
    fn token(&mut self) -> Option<ShownToken> {
        if *self.take(1)? == [0] {
            return None;
        }
        let fault = match self.take(1)?[0] {
            0 => None,
            place => Some(TokenFault::ALL.get(usize::from(place - 1)).copied()?),
        };
        let id = match self.take(1)? {
            [0] => None,
            _ => TokenId::from_bytes(self.take(16)?),
        };
        let scope = Scope::parse(self.text()?);
        let issued_at = i64::from_le_bytes(*self.take(8)?.first_chunk()?);
        Some(ShownToken { id, fault, scope, issued_at })
    }

    fn signals(&mut self) -> Option<(u64, Condition)> {
        let sequence = self.number()?;
        let &[risk, compliant, managed, contained] = self.take(4)?.first_chunk()?;
        let said = |of_host: u8| [None, Some(false), Some(true)].get(usize::from(of_host)).copied();
        let posture = Posture { compliant: said(compliant)?, managed: said(managed)? };
        Some((sequence, Condition { risk, posture, contained: contained == 1 }))
    }

    fn ended(&mut self) -> Option<Option<Ended>> {
        if *self.take(1)? == [0] {
            return Some(None);
        }
        let how = [End::Completed, End::Cut, End::Abandoned].get(usize::from(self.take(1)?[0])).copied()?;
        Some(Some(Ended {
            how,
            status: u16::try_from(self.number()?).ok()?,
            duration_us: self.number()?,
            bytes_in: self.number()?,
            bytes_out: self.number()?,
        }))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::record::tests::{Asked, instance, permitted};

    #[test]
    fn a_record_reads_back_as_it_was_written() {
        let decision = permitted(&["web-reads-catalog", "b"]);
        let ended = Ended { status: 200, duration_us: 1 << 40, bytes_in: 0, bytes_out: u64::MAX, how: End::Cut };
        for ended in [None, Some(ended)] {
            let asked = Asked::new("/items/4");
            let mut given = asked.decided(&decision, 1_700_000_000_123);
            given.trace_id = Some(TraceId(0x0af7_6519_16cd_43dd_8448_eb21_1c80_319c));
            given.ended = ended.clone();
            let mut entry = Vec::new();
            encode_decision(&mut entry, &given);
            seal(&mut entry);
            let (frame, payload) = entry.split_first_chunk::<FRAME_BYTES>().unwrap();
            assert_eq!(payload_bytes(frame), Some(payload.len()));
            assert!(is_whole(frame, payload));
            let Some(Payload::Decision(view)) = Payload::read(payload) else { panic!("not a decision") };
            let record = view.record(&instance()).unwrap();
            assert_eq!(&*record.id, &given.id.to_string());
            assert_eq!(record.ended, ended);
            assert_eq!(record.policies.iter().map(|p| &**p).collect::<Vec<_>>(), ["web-reads-catalog", "b"]);
            assert_eq!(record.inputs.principal, *given.query.principal);
            assert_eq!(&*record.inputs.action, "http:GET");
            assert_eq!(record.inputs.size, given.query.context.size);
            assert_eq!(record.inputs.origin, given.query.context.origin);
            assert_eq!(record.inputs.now, given.query.context.now);
            assert_eq!(record.trace_id.as_deref(), Some("0af7651916cd43dd8448eb211c80319c"));
            assert_eq!((record.at_ms, record.judge_ns), (given.at_ms, given.judge_ns));
            assert_eq!((record.signal_seq, record.inputs.condition), (9, given.query.context.condition));
            assert_eq!(record.inputs.condition.posture.compliant, Some(false));
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_reader_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), kind in 0u8..4) {
            let mut bytes = bytes;
            if let Some(first) = bytes.first_mut() { *first = kind; }
            if let Some(Payload::Decision(view)) = Payload::read(&bytes) {
                let _ = view.record(&instance());
                let _ = edge_count(view.edge, 1, Revision(1));
            }
        }
    }
}
