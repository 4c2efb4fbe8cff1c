//! What must hold for whatever bytes arrive: the property tests below ask it of random ones, the fuzzer of chosen ones.
//! Not part of the proxy: compiled for tests and for fuzzing alone.

use std::{
    io,
    net::Ipv4Addr,
    pin::Pin,
    task::{Context, Poll, Waker},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::{dns, guard::Guard, websocket::Frames};

/// A connection that delivers at most `piece` bytes at a time, then ends.
struct Arriving<'a> {
    bytes: &'a [u8],
    piece: usize,
}

impl AsyncRead for Arriving<'_> {
    fn poll_read(mut self: Pin<&mut Self>, _: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let (now, later) = self.bytes.split_at(self.piece.min(self.bytes.len()).min(out.remaining()));
        out.put_slice(now);
        self.bytes = later;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Arriving<'_> {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Poll::Ready(Ok(bytes.len()))
    }
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// What the guard lets through, and its verdict on each head: may the connection switch protocols, or is it refused.
fn guarded(bytes: &[u8], piece: usize) -> (Vec<u8>, Vec<Option<bool>>) {
    let mut guard = Guard::new(Arriving { bytes, piece });
    let verdicts = guard.verdicts();
    let mut passed = Vec::new();
    let mut context = Context::from_waker(Waker::noop());
    loop {
        let mut space = [0; 512];
        let mut out = ReadBuf::new(&mut space);
        match Pin::new(&mut guard).poll_read(&mut context, &mut out) {
            Poll::Ready(Ok(())) if !out.filled().is_empty() => passed.extend_from_slice(out.filled()),
            _ => break,
        }
    }
    (passed, verdicts.all().into_iter().map(Result::ok).collect())
}

/// How bytes are cut into packets says nothing: the same heads get the same verdicts. What passed passes again, and the
/// parser that reads it next finds a head where the guard found one.
pub fn guard(bytes: &[u8], piece: usize) {
    let (at_once, verdicts) = guarded(bytes, usize::MAX);
    let (in_pieces, verdicts_in_pieces) = guarded(bytes, piece.max(1));
    assert_eq!(verdicts, verdicts_in_pieces);
    // A body that breaks off has passed as far as it had come by then.
    let common = at_once.len().min(in_pieces.len());
    assert_eq!(at_once[..common], in_pieces[..common]);

    let (again, verdicts_again) = guarded(&at_once, usize::MAX);
    assert_eq!(again, at_once);
    assert!(!verdicts_again.contains(&None), "what passed is not refused");
    if verdicts.first().is_some_and(Option::is_some) {
        let mut headers = [httparse::EMPTY_HEADER; 1024];
        let mut request = httparse::Request::new(&mut headers);
        assert!(matches!(request.parse(&at_once), Ok(httparse::Status::Complete(_))));
        let framing = |header: &&httparse::Header<'_>| {
            ["content-length", "transfer-encoding"].iter().any(|name| header.name.eq_ignore_ascii_case(name))
        };
        assert!(request.headers.iter().filter(framing).count() <= 1, "one length, said once");
    }
}

/// Where WebSocket frames end does not hang on how their bytes are cut.
pub fn frames(bytes: &[u8], piece: usize) {
    let (mut whole, mut pieces) = (Frames::default(), Frames::default());
    whole.pass(bytes);
    for piece in bytes.chunks(piece.max(1)) {
        assert!(pieces.until_boundary(piece) <= piece.len());
        pieces.pass(piece);
    }
    assert_eq!((whole.at_boundary(), whole.closed()), (pieces.at_boundary(), pieces.closed()));
}

/// No DNS message makes the answer anything but a datagram that can be sent.
pub fn dns(message: &[u8]) {
    let answer = dns::answer(message, |service| (service == "ledger").then_some(Ipv4Addr::new(127, 81, 1, 7)));
    assert!(answer.is_none_or(|answer| answer.len() <= usize::from(u16::MAX)));
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    /// Requests as they come, whole and broken.
    fn requests() -> impl Strategy<Value = Vec<u8>> {
        let part = prop_oneof![
            Just("GET / HTTP/1.1\r\nhost: a\r\n\r\n"),
            Just("POST /x HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\n\r\nhello"),
            Just("POST /x HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"),
            Just("POST /x HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n"),
            Just("3;x=y\r\nabc\r\n"),
            Just("0\r\ntrailer: t\r\n\r\n"),
            Just("GET /ws HTTP/1.1\r\nhost: a\r\nupgrade: websocket\r\n\r\n"),
            Just("content-length: 5\r\n"),
            Just("\r\n"),
            Just("\n"),
            Just("\r"),
            Just(" "),
        ];
        proptest::collection::vec(part, 0..6).prop_map(|parts| parts.concat().into_bytes())
    }

    proptest! {
        #[test]
        fn the_guard_decides_by_bytes_and_not_by_packets(requests in requests(), piece in 1usize..40) {
            super::guard(&requests, piece);
        }

        #[test]
        fn no_bytes_confuse_the_guard(bytes in proptest::collection::vec(any::<u8>(), 0..300), piece in 1usize..40) {
            super::guard(&bytes, piece);
        }

        #[test]
        fn frames_end_where_they_end(bytes in proptest::collection::vec(any::<u8>(), 0..300), piece in 1usize..40) {
            super::frames(&bytes, piece);
        }

        #[test]
        fn no_question_makes_the_dns_panic(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            super::dns(&bytes);
        }
    }
}
