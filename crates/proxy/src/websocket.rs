//! WebSocket at its edges: the HTTP/1.1 handshake on the application's side, extended CONNECT (RFC 8441) between
//! sidecars, and where one frame ends and the next begins, so that a cut can be said with a Close frame (RFC 6455).
//! Payloads are passed on as they are.

use aws_lc_rs::digest;
use base64::{Engine, engine::general_purpose::STANDARD};
use bytes::{BufMut, Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, header};

use crate::live::Cut;

/// RFC 6455, section 7.4.1: the exchange violates the policy.
const POLICY_VIOLATION: u16 = 1008;
/// RFC 6455, section 7.4.1: the endpoint is going away.
const GOING_AWAY: u16 = 1001;
// RFC 6455, section 1.3.
const ACCEPT_GUID: &[u8] = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11";
const CLOSE: u8 = 8;

/// Finds the boundaries of the frames that passed in one direction.
#[derive(Default)]
pub(crate) struct Frames {
    header: [u8; 14],
    have: usize, // bytes of the header so far
    payload_left: u64,
    closed: bool,
}

impl Frames {
    /// Takes note of bytes that passed.
    pub(crate) fn pass(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            if self.have == 0 && self.payload_left > 0 {
                let taken = self.payload_left.min(bytes.len() as u64);
                self.payload_left -= taken;
                bytes = &bytes[taken as usize..];
                continue;
            }
            self.header[self.have] = bytes[0];
            self.have += 1;
            bytes = &bytes[1..];
            if let Some(payload) = self.payload_of_header() {
                self.closed |= self.header[0] & 0x0f == CLOSE;
                self.payload_left = payload;
                self.have = 0;
            }
        }
    }

    /// How many of `bytes`, which follow, belong to the frame that has begun.
    pub(crate) fn until_boundary(&self, bytes: &[u8]) -> usize {
        let mut after = Self { header: self.header, have: self.have, payload_left: self.payload_left, closed: false };
        let mut taken = 0;
        while !after.at_boundary() && taken < bytes.len() {
            let step = if after.have == 0 { after.payload_left.min((bytes.len() - taken) as u64) as usize } else { 1 };
            after.pass(&bytes[taken..taken + step]);
            taken += step;
        }
        taken
    }

    pub(crate) fn at_boundary(&self) -> bool {
        self.have == 0 && self.payload_left == 0
    }

    /// Whether a Close frame passed: after it nothing may be sent.
    pub(crate) fn closed(&self) -> bool {
        self.closed
    }

    // RFC 6455, section 5.2; `None` while the header is incomplete.
    fn payload_of_header(&self) -> Option<u64> {
        if self.have < 2 {
            return None;
        }
        let extended = match self.header[1] & 0x7f {
            126 => 2,
            127 => 8,
            _ => 0,
        };
        let mask = if self.header[1] & 0x80 != 0 { 4 } else { 0 };
        if self.have < 2 + extended + mask {
            return None;
        }
        let length = self.header[2..2 + extended].iter().fold(0u64, |sum, byte| sum << 8 | u64::from(*byte));
        Some(if extended == 0 { u64::from(self.header[1] & 0x7f) } else { length })
    }
}

/// The Close frame that says `cut`; frames to a server are masked.
pub(crate) fn close_frame(cut: Cut, masked: bool) -> Bytes {
    let (code, reason) = match cut {
        Cut::Denied(id) => (POLICY_VIOLATION, format!("denied; decision {id}")),
        Cut::Stale => (POLICY_VIOLATION, "stale".to_owned()),
        Cut::Unproven => (POLICY_VIOLATION, "unproven".to_owned()),
        Cut::Closing => (GOING_AWAY, "draining".to_owned()),
    };
    let mut frame = BytesMut::with_capacity(64);
    frame.put_u8(0x80 | CLOSE);
    let length = 2 + reason.len() as u8; // at most 51: a control frame holds 125
    frame.put_u8(length | if masked { 0x80 } else { 0 });
    let mask: [u8; 4] = if masked { fastrand::u32(..).to_be_bytes() } else { [0; 4] };
    if masked {
        frame.put_slice(&mask);
    }
    let payload = code.to_be_bytes().into_iter().chain(reason.into_bytes());
    frame.extend(payload.zip(mask.iter().cycle()).map(|(byte, mask)| byte ^ mask));
    frame.freeze()
}

/// Whether an HTTP/1.1 request asks for a WebSocket: then its key.
pub(crate) fn key_of<B>(request: &Request<B>) -> Option<HeaderValue> {
    let headers = request.headers();
    let wants = request.method() == Method::GET
        && has_token(headers, &header::UPGRADE, "websocket")
        && has_token(headers, &header::CONNECTION, "upgrade")
        && headers.get(header::SEC_WEBSOCKET_VERSION).is_some_and(|version| version == "13");
    headers.get(header::SEC_WEBSOCKET_KEY).filter(|_| wants).cloned()
}

fn has_token(headers: &HeaderMap, name: &HeaderName, token: &str) -> bool {
    let values = headers.get_all(name).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).any(|given| given.trim().eq_ignore_ascii_case(token))
}

/// A fresh key for a handshake of our own.
pub(crate) fn new_key() -> HeaderValue {
    let key = STANDARD.encode(fastrand::u128(..).to_be_bytes()); // RFC 6455 4.1: it proves understanding, not identity
    HeaderValue::try_from(key).expect("INVARIANT: base64")
}

/// The answer to `key` (RFC 6455, section 4.2.2).
pub(crate) fn accept_of(key: &HeaderValue) -> HeaderValue {
    let mut sha1 = digest::Context::new(&digest::SHA1_FOR_LEGACY_USE_ONLY);
    sha1.update(key.as_bytes());
    sha1.update(ACCEPT_GUID);
    HeaderValue::try_from(STANDARD.encode(sha1.finish().as_ref())).expect("INVARIANT: base64")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decided::DecisionId;

    #[test]
    fn the_accept_of_the_standards_example_is_the_standards() {
        let key = HeaderValue::from_static("dGhlIHNhbXBsZSBub25jZQ==");
        assert_eq!(accept_of(&key), "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
    }

    #[test]
    fn boundaries_are_found_however_the_bytes_are_cut() {
        let mut stream = vec![0x81, 0x03, b'a', b'b', b'c'];
        stream.extend([0x82, 0xfe, 0x01, 0x00, 1, 2, 3, 4].into_iter().chain([7; 256]));
        stream.extend([0x82, 0x7f, 0, 0, 0, 0, 0, 1, 0, 0].into_iter().chain([7; 65_536]));
        let boundaries = [0, 5, 5 + 8 + 256, stream.len()];
        for piece in [1, 2, 3, 7, 100, stream.len()] {
            let (mut frames, mut at) = (Frames::default(), 0);
            for bytes in stream.chunks(piece) {
                assert_eq!(frames.at_boundary(), boundaries.contains(&at), "at {at} in pieces of {piece}");
                let next = boundaries.iter().find(|b| **b > at).unwrap();
                if !frames.at_boundary() {
                    assert_eq!(frames.until_boundary(&stream[at..]), next - at, "at {at}");
                }
                frames.pass(bytes);
                at += bytes.len();
            }
            assert!(frames.at_boundary() && !frames.closed());
        }
    }

    #[test]
    fn a_cut_is_a_policy_violation() {
        let frame = close_frame(Cut::Denied(DecisionId(7)), false);
        assert_eq!(frame[..4], [0x88, frame.len() as u8 - 2, 0x03, 0xf0]);
        assert!(frame.ends_with(b"7"));
        let masked = close_frame(Cut::Denied(DecisionId(7)), true);
        assert_eq!((masked[0], masked[1]), (0x88, 0x80 | (masked.len() as u8 - 6)));
        let unmasked: Vec<u8> = masked[6..].iter().zip(masked[2..6].iter().cycle()).map(|(b, m)| b ^ m).collect();
        assert_eq!(unmasked, frame[2..]);
        let mut frames = Frames::default();
        frames.pass(&masked);
        assert!(frames.closed() && frames.at_boundary());
    }
}
