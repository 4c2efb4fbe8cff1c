//! What clients say of whom they ask. On a unix socket HTTP/2's `:authority` means nothing, so clients put there what they have: many
//! (C++, Python and all that is built on them, Java) the path of the socket, which is no authority; the HTTP/2 library here then resets
//! the stream before anybody sees the request. So the headers of what arrives are read in front of it, and what is no authority becomes
//! `localhost`, as the other clients (Go, Rust) say. Nothing else is changed.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::{Buf, BufMut, BytesMut};
use loona_hpack::Decoder;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// What a connection of HTTP/2 begins with (RFC 9113, 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const FRAME_HEADER_BYTES: usize = 9;
/// Longest payload of a frame, in bytes: nobody was told that it may be more (RFC 9113, 4.2).
const FRAME_BYTES_MAX: usize = 16 * 1024;
/// Longest block of headers, and all of them together when they are read, each with the 32 bytes that the standard counts for it: so they
/// fit one frame when they are written out.
const HEADERS_BYTES_MAX: usize = 16 * 1024;
/// What a client's table may hold: nobody was told that it may be more (RFC 7541, 4.2).
const TABLE_BYTES_MAX: usize = 4096;

const HEADERS: u8 = 0x1;
const CONTINUATION: u8 = 0x9;
const END_STREAM: u8 = 0x1;
const END_HEADERS: u8 = 0x4;
const PADDED: u8 = 0x8;
const PRIORITY: u8 = 0x20;

/// A connection on which every `:authority` is one.
pub(super) struct WithAuthority<S> {
    stream: S,
    arrived: BytesMut,
    rewritten: BytesMut,
    rewrite: Rewrite,
}

struct Rewrite {
    decoder: Decoder<'static>,
    has_begun: bool,
    /// A block of headers of which more is to come.
    block: Option<Block>,
}

struct Block {
    stream: u32,
    ends_stream: bool,
    bytes: Vec<u8>,
}

impl<S> WithAuthority<S> {
    pub(super) fn new(stream: S) -> Self {
        let mut decoder = Decoder::new();
        decoder.set_max_allowed_table_size(TABLE_BYTES_MAX);
        let rewrite = Rewrite { decoder, has_begun: false, block: None };
        Self { stream, arrived: BytesMut::new(), rewritten: BytesMut::new(), rewrite }
    }
}

fn malformed(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

impl Rewrite {
    /// Moves every whole frame of `arrived` to `rewritten`.
    fn take(&mut self, arrived: &mut BytesMut, rewritten: &mut BytesMut) -> io::Result<()> {
        if !self.has_begun {
            if !PREFACE.starts_with(&arrived[..arrived.len().min(PREFACE.len())]) {
                return Err(malformed("it does not speak HTTP/2"));
            }
            if arrived.len() < PREFACE.len() {
                return Ok(());
            }
            rewritten.put(arrived.split_to(PREFACE.len()));
            self.has_begun = true;
        }
        while let Some(head) = arrived.first_chunk::<FRAME_HEADER_BYTES>() {
            let [l0, l1, l2, kind, flags, s0, s1, s2, s3] = *head;
            let length = u32::from_be_bytes([0, l0, l1, l2]) as usize;
            let stream = u32::from_be_bytes([s0, s1, s2, s3]) & 0x7fff_ffff;
            if length > FRAME_BYTES_MAX {
                return Err(malformed("a frame is longer than was agreed"));
            }
            if arrived.len() < FRAME_HEADER_BYTES + length {
                return Ok(());
            }
            let frame = arrived.split_to(FRAME_HEADER_BYTES + length);
            let payload = &frame[FRAME_HEADER_BYTES..];
            match (kind, self.block.take()) {
                (HEADERS, None) => {
                    let bytes = fragment(payload, flags).ok_or_else(|| malformed("the padding of headers"))?.to_vec();
                    self.add(Block { stream, ends_stream: flags & END_STREAM != 0, bytes }, flags, rewritten)?;
                }
                (CONTINUATION, Some(mut block)) if block.stream == stream => {
                    block.bytes.extend_from_slice(payload);
                    self.add(block, flags, rewritten)?;
                }
                (CONTINUATION, _) | (_, Some(_)) => return Err(malformed("headers that were interrupted")),
                (_, None) => rewritten.put(frame),
            }
        }
        Ok(())
    }

    fn add(&mut self, block: Block, flags: u8, rewritten: &mut BytesMut) -> io::Result<()> {
        if block.bytes.len() > HEADERS_BYTES_MAX {
            return Err(malformed("headers that are too long"));
        }
        if flags & END_HEADERS == 0 {
            self.block = Some(block);
            return Ok(());
        }
        let (mut encoded, mut size) = (Vec::new(), 0usize);
        let decoded = self.decoder.decode_with_cb(&block.bytes, |name, value| {
            size += name.len() + value.len() + 32;
            if size > HEADERS_BYTES_MAX {
                return;
            }
            let is_authority = |value: &[u8]| http::uri::Authority::try_from(value).is_ok();
            let value = if *name == *b":authority" && !is_authority(&value) { b"localhost" } else { &*value };
            // "Literal Header Field without Indexing -- New Name" (RFC 7541, 6.2.2): leaves the table of the reader empty.
            encoded.push(0);
            for text in [&*name, value] {
                length(&mut encoded, text.len());
                encoded.extend_from_slice(text);
            }
        });
        decoded.map_err(|_| malformed("headers that cannot be read"))?;
        if size > HEADERS_BYTES_MAX {
            return Err(malformed("headers that are too long"));
        }
        rewritten.put_uint(encoded.len() as u64, 3);
        rewritten.put_u8(HEADERS);
        rewritten.put_u8(END_HEADERS | if block.ends_stream { END_STREAM } else { 0 });
        rewritten.put_u32(block.stream);
        rewritten.put_slice(&encoded);
        Ok(())
    }
}

/// The headers of a frame, without padding and priority (RFC 9113, 6.2).
fn fragment(payload: &[u8], flags: u8) -> Option<&[u8]> {
    let (padding, rest) = match flags & PADDED {
        0 => (0, payload),
        _ => payload.split_first().map(|(padding, rest)| (usize::from(*padding), rest))?,
    };
    let rest = if flags & PRIORITY == 0 { rest } else { rest.get(5..)? };
    rest.get(..rest.len().checked_sub(padding)?)
}

/// The length of a text that is not compressed: an integer with a prefix of 7 bits (RFC 7541, 5.1).
fn length(to: &mut Vec<u8>, length: usize) {
    if length < 127 {
        return to.push(length as u8);
    }
    to.push(127);
    let mut rest = length - 127;
    while rest >= 128 {
        to.push((rest % 128) as u8 | 128);
        rest /= 128;
    }
    to.push(rest as u8);
}

impl<S: AsyncRead + Unpin> AsyncRead for WithAuthority<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        while this.rewritten.is_empty() {
            let mut chunk = [0; 4096];
            let mut read = ReadBuf::new(&mut chunk);
            ready!(Pin::new(&mut this.stream).poll_read(cx, &mut read))?;
            if read.filled().is_empty() {
                return Poll::Ready(Ok(()));
            }
            this.arrived.extend_from_slice(read.filled());
            this.rewrite.take(&mut this.arrived, &mut this.rewritten)?;
        }
        let length = this.rewritten.len().min(buf.remaining());
        buf.put_slice(&this.rewritten[..length]);
        this.rewritten.advance(length);
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for WithAuthority<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use loona_hpack::Encoder;
    use tokio::io::AsyncReadExt;

    use super::*;

    fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
        let mut frame = (payload.len() as u32).to_be_bytes()[1..].to_vec();
        frame.extend([kind, flags]);
        frame.extend(stream.to_be_bytes());
        frame.extend(payload);
        frame
    }

    /// What comes out of these bytes, in pieces of `piece`; the headers of each frame that has any, and the other frames as they are.
    async fn through(bytes: &[u8], piece: usize) -> io::Result<(Vec<Vec<(String, String)>>, Vec<u8>)> {
        let mut mock = tokio_test_stream(bytes, piece);
        let mut out = Vec::new();
        WithAuthority::new(&mut mock).read_to_end(&mut out).await?;
        let mut rest = out.strip_prefix(PREFACE).unwrap();
        let (mut headers, mut others) = (Vec::new(), Vec::new());
        let mut reader = Decoder::new();
        while let Some(head) = rest.first_chunk::<9>() {
            let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
            let payload = &rest[9..9 + length];
            if head[3] == HEADERS {
                assert_eq!(head[4] & END_HEADERS, END_HEADERS);
                let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
                let read = reader.decode(payload).unwrap().into_iter();
                headers.push(read.map(|(name, value)| (text(name), text(value))).collect());
            } else {
                others.extend_from_slice(&rest[..9 + length]);
            }
            rest = &rest[9 + length..];
        }
        Ok((headers, others))
    }

    /// A stream that gives `bytes` in pieces of `piece`.
    fn tokio_test_stream(bytes: &[u8], piece: usize) -> impl AsyncRead + Unpin {
        let pieces: Vec<_> = bytes.chunks(piece).map(|piece| Ok::<_, io::Error>(piece.to_vec().into())).collect();
        tokio_util::io::StreamReader::<_, bytes::Bytes>::new(futures_util::stream::iter(pieces))
    }

    #[tokio::test]
    async fn the_path_of_a_socket_becomes_localhost_and_everything_else_stays() {
        let mut encoder = Encoder::new();
        let path = "%2Ftmp%2Fworkload.sock";
        let request = |authority: &str| {
            [(":method", "POST"), (":path", "/x"), (":authority", authority), ("workload.spiffe.io", "true")]
                .map(|(name, value)| (name.to_owned(), value.to_owned()))
        };
        let mut encode = |authority: &str| {
            let request = request(authority);
            encoder.encode(request.iter().map(|(name, value)| (name.as_bytes(), value.as_bytes())))
        };
        // The second block refers to what the first put into the table.
        let (first, second, third) = (encode(path), encode(path), encode("127.0.0.1:80"));
        let settings = frame(4, 0, 0, &[]);
        let data = frame(0, END_STREAM, 1, b"hello");
        let padded = [&[3, 0, 0, 0, 0, 16][..], &second[..2], &[0; 3]].concat();
        let sent = [
            PREFACE,
            &settings,
            &frame(HEADERS, END_HEADERS, 1, &first),
            &data,
            &frame(HEADERS, PADDED | PRIORITY | END_STREAM, 3, &padded),
            &frame(CONTINUATION, END_HEADERS, 3, &second[2..]),
            &frame(HEADERS, END_HEADERS, 5, &third),
        ]
        .concat();
        for piece in [1, 7, 4096, sent.len()] {
            let (headers, others) = through(&sent, piece).await.unwrap();
            assert_eq!(headers, [request("localhost"), request("localhost"), request("127.0.0.1:80")]);
            assert_eq!(others, [&settings[..], &data].concat());
        }
    }

    #[tokio::test]
    async fn what_is_no_http2_or_asks_for_too_much_memory_ends_the_connection() {
        let long: Vec<u8> = Encoder::new().encode([(&b"x"[..], &[b'a'; 4000][..])]);
        // One byte each that stands for four thousand.
        let bomb = [long, vec![0xbe; 1000]].concat();
        let with = |frames: Vec<Vec<u8>>| [PREFACE.to_vec(), frames.concat()].concat();
        for (case, bytes) in [
            ("HTTP/1.1", b"GET / HTTP/1.1\r\n\r\n".to_vec()),
            ("a long frame", with(vec![frame(0, 0, 1, &vec![0; FRAME_BYTES_MAX + 1])])),
            ("a bomb", with(vec![frame(HEADERS, END_HEADERS, 1, &bomb)])),
            ("no headers", with(vec![frame(HEADERS, END_HEADERS, 1, &[0xff; 9])])),
            ("padding without end", with(vec![frame(HEADERS, END_HEADERS | PADDED, 1, &[200, 0])])),
            ("interrupted", with(vec![frame(HEADERS, 0, 1, &[]), frame(0, 0, 1, b"x")])),
            ("of another stream", with(vec![frame(HEADERS, 0, 1, &[]), frame(CONTINUATION, END_HEADERS, 3, &[])])),
            (
                "never ending",
                with(vec![[frame(HEADERS, 0, 1, &[])].concat(), frame(CONTINUATION, 0, 1, &[0; 9000]).repeat(2)]),
            ),
        ] {
            let refused = through(&bytes, 4096).await.unwrap_err();
            assert_eq!(refused.kind(), io::ErrorKind::InvalidData, "{case}");
        }
    }
}
