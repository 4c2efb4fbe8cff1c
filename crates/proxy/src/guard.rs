//! Stands before the HTTP/1.1 parser and reads every head as bytes: what two parsers could read in two ways does not get
//! through. hyper repairs some of it silently (it drops `Content-Length` beside `Transfer-Encoding`, it accepts the same
//! length twice), and a repaired request is one that somebody else may have read differently.
//!
//! Strict where RFC 9112 lets a recipient choose. It follows the framing itself, so it always knows where a head begins;
//! because nothing ambiguous passes, the parser behind it must come to the same framing.
//!
//! A refused head is replaced by a harmless one that closes the connection; the verdict travels beside it, so that the
//! refusal is answered in its turn.

use std::{
    collections::VecDeque,
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Buf, BytesMut};
use parking_lot::Mutex;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Instant, Sleep},
};

use crate::{answer::Refusal, pool::HEADERS_MAX};

/// Longest head, in bytes.
pub(crate) const HEAD_BYTES_MAX: usize = 64 * 1024;
/// Longest time from the first byte of a head to its last.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest time between two requests.
const IDLE_TIMEOUT: Duration = Duration::from_secs(600);
/// Longest line that begins a chunk, and longest trailer section, in bytes.
const CHUNK_LINE_BYTES_MAX: usize = 1024;
const TRAILERS_BYTES_MAX: usize = 8 * 1024;
/// Bytes read and thrown away after a refusal, so that the answer is not lost in a reset.
const DISCARDED_BYTES_MAX: usize = 256 * 1024;
const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const REFUSED_HEAD: &[u8] = b"GET /refused HTTP/1.1\r\nhost: refused\r\nconnection: close\r\n\r\n";
const READ_BYTES: usize = 8 * 1024;

/// The version a connection begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Http {
    One,
    Two,
}

/// A connection of which only well-framed HTTP/1.1 requests come through.
pub(crate) struct Guard<T> {
    io: T,
    buffer: BytesMut,
    cleared: usize, // of `buffer`: examined and good
    scanned: usize, // of `buffer` after `cleared`: looked at for the end of a head or line
    state: State,
    verdicts: Verdicts,
    ended: bool,
    discarded: usize,
    timer: Option<Pin<Box<Sleep>>>,
    lingering: Option<Pin<Box<Sleep>>>,
    since: Instant, // when the wait that `timer` bounds began
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Head,
    Body(u64),
    ChunkLine,
    ChunkData(u64), // with its CRLF
    Trailers,
    /// Not HTTP/1.1 any more, or to be.
    Opaque,
    Refused,
}

/// What the guard found, in the order of the requests: whether the connection may switch protocols after this one.
#[derive(Clone, Default)]
pub(crate) struct Verdicts(Arc<Mutex<VecDeque<Result<bool, Refusal>>>>);

/// How the body after a head is framed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Framing {
    Length(u64),
    Chunked,
    Opaque,
}

impl Verdicts {
    /// The verdict on the next request.
    pub(crate) fn next(&self) -> Result<bool, Refusal> {
        self.0.lock().pop_front().unwrap_or(Err(Refusal::Malformed("framing")))
    }
}

#[cfg(any(test, fuzzing))]
impl Verdicts {
    /// Every verdict that was not asked for yet.
    pub(crate) fn all(&self) -> Vec<Result<bool, Refusal>> {
        self.0.lock().drain(..).collect()
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin> Guard<T> {
    pub(crate) fn new(io: T) -> Self {
        Self {
            io,
            buffer: BytesMut::new(),
            cleared: 0,
            scanned: 0,
            state: State::Head,
            verdicts: Verdicts::default(),
            ended: false,
            discarded: 0,
            timer: None,
            lingering: None,
            since: Instant::now(),
        }
    }

    pub(crate) fn verdicts(&self) -> Verdicts {
        self.verdicts.clone()
    }

    /// Reads until it is clear which version is spoken. HTTP/2 is framed by lengths alone and passes from here on.
    pub(crate) async fn which(&mut self) -> io::Result<Http> {
        std::future::poll_fn(|cx| {
            loop {
                let seen = self.buffer.len().min(PREFACE.len());
                if self.buffer[..seen] != PREFACE[..seen] {
                    return Poll::Ready(Ok(Http::One));
                }
                if seen == PREFACE.len() {
                    self.state = State::Opaque;
                    self.cleared = self.buffer.len();
                    return Poll::Ready(Ok(Http::Two));
                }
                ready!(self.poll_fill(cx))?;
                if self.ended {
                    return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into()));
                }
            }
        })
        .await
    }

    /// Reads more into the buffer, within the time that the state allows.
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.buffer.reserve(READ_BYTES);
        let before = self.buffer.len();
        match tokio_util::io::poll_read_buf(Pin::new(&mut self.io), cx, &mut self.buffer) {
            Poll::Ready(read) => {
                self.ended = read? == 0;
                if before == 0 || self.state != State::Head {
                    self.since = Instant::now();
                }
                Poll::Ready(Ok(()))
            }
            Poll::Pending => self.poll_patience(cx),
        }
    }

    // One timer, moved only when it fires too early: a request costs no timer.
    fn poll_patience(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let patience = match self.state {
            State::Head if !self.buffer.is_empty() => HEAD_TIMEOUT,
            State::Head => IDLE_TIMEOUT,
            _ => return Poll::Pending, // bodies are as slow as their senders
        };
        let due = self.since + patience;
        let timer = self.timer.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(due)));
        if timer.deadline() > due {
            timer.as_mut().reset(due);
        }
        while timer.as_mut().poll(cx).is_ready() {
            if Instant::now() >= due {
                self.ended = true;
                return Poll::Ready(Ok(()));
            }
            timer.as_mut().reset(due);
        }
        Poll::Pending
    }

    /// Examines what is buffered; whether anything more can pass.
    fn examine(&mut self) -> bool {
        let outcome = match self.state {
            State::Head => self.examine_head(),
            State::Body(left) => {
                let now = left.min((self.buffer.len() - self.cleared) as u64);
                self.clear(now as usize);
                self.state = if left == now { State::Head } else { State::Body(left - now) };
                Ok(now > 0)
            }
            State::ChunkLine => self.examine_chunk_line(),
            State::ChunkData(left) => self.examine_chunk_data(left),
            State::Trailers => self.examine_trailers(),
            State::Opaque => {
                self.clear(self.buffer.len() - self.cleared);
                Ok(self.cleared > 0)
            }
            State::Refused => Ok(false),
        };
        outcome.unwrap_or_else(|refusal| {
            self.refuse(refusal);
            self.cleared > 0
        })
    }

    fn clear(&mut self, count: usize) {
        self.cleared += count;
        self.scanned = 0;
    }

    fn refuse(&mut self, refusal: Refusal) {
        let at_head = self.state == State::Head;
        self.state = State::Refused;
        self.buffer.truncate(self.cleared);
        if at_head {
            self.verdicts.0.lock().push_back(Err(refusal));
            self.buffer.extend_from_slice(REFUSED_HEAD);
            self.cleared = self.buffer.len();
        } else {
            self.ended = true; // the parser sees a body cut short
        }
    }

    fn examine_head(&mut self) -> Result<bool, Refusal> {
        let bytes = &self.buffer[self.cleared..];
        // A line ends with CRLF and in no other way: neither byte may stand alone.
        let mut at = self.scanned;
        while at < bytes.len() {
            match bytes[at] {
                b'\n' => return Err(Refusal::Malformed("bare-lf")),
                b'\r' => match bytes.get(at + 1) {
                    None => break,
                    Some(b'\n') if bytes[..at].ends_with(b"\r\n") || at == 0 => {
                        let framing = framing_of(&bytes[..at])?;
                        self.verdicts.0.lock().push_back(Ok(framing == Framing::Opaque));
                        self.state = match framing {
                            Framing::Length(0) => State::Head,
                            Framing::Length(length) => State::Body(length),
                            Framing::Chunked => State::ChunkLine,
                            Framing::Opaque => State::Opaque,
                        };
                        self.clear(at + 2);
                        return Ok(true);
                    }
                    Some(b'\n') => at += 2,
                    Some(_) => return Err(Refusal::Malformed("bare-cr")),
                },
                _ => at += 1,
            }
        }
        self.scanned = at;
        if bytes.len() > HEAD_BYTES_MAX { Err(Refusal::HeadTooLarge) } else { Ok(false) }
    }

    fn examine_chunk_line(&mut self) -> Result<bool, Refusal> {
        let broken = Err(Refusal::Malformed("chunk"));
        let bytes = &self.buffer[self.cleared..];
        let Some(end) = bytes.windows(2).position(|pair| pair == b"\r\n") else {
            return if bytes.len() > CHUNK_LINE_BYTES_MAX { broken } else { Ok(false) };
        };
        let line = &bytes[..end];
        let digits = line.iter().take_while(|byte| byte.is_ascii_hexdigit()).count();
        let extension = &line[digits..];
        // RFC 9112, 7.1.1: extensions are ignored, but they hide smuggled requests when they hold line ends.
        let plain = extension.iter().all(|byte| (0x20..0x7f).contains(byte) || *byte == b'\t');
        if !(1..=15).contains(&digits) || !plain || !(extension.is_empty() || extension[0] == b';') {
            return broken;
        }
        let text = std::str::from_utf8(&line[..digits]).expect("INVARIANT: hexadecimal digits");
        let size = u64::from_str_radix(text, 16).map_err(|_| Refusal::Malformed("chunk"))?;
        self.clear(end + 2);
        self.state = if size == 0 { State::Trailers } else { State::ChunkData(size + 2) };
        Ok(true)
    }

    fn examine_chunk_data(&mut self, left: u64) -> Result<bool, Refusal> {
        let bytes = &self.buffer[self.cleared..];
        let now = left.min(bytes.len() as u64);
        // The last two bytes of `left` are CR and LF.
        for (index, byte) in bytes[..now as usize].iter().enumerate().skip(left.saturating_sub(2) as usize) {
            let expected = if left - index as u64 == 2 { b'\r' } else { b'\n' };
            if *byte != expected {
                return Err(Refusal::Malformed("chunk"));
            }
        }
        self.clear(now as usize);
        self.state = if now == left { State::ChunkLine } else { State::ChunkData(left - now) };
        Ok(now > 0)
    }

    fn examine_trailers(&mut self) -> Result<bool, Refusal> {
        let bytes = &self.buffer[self.cleared..];
        let end = if bytes.starts_with(b"\r\n") {
            Some(0)
        } else {
            bytes.windows(4).position(|four| four == b"\r\n\r\n").map(|at| at + 2)
        };
        let Some(end) = end else {
            let too_long = bytes.len() > TRAILERS_BYTES_MAX;
            return if too_long { Err(Refusal::Malformed("trailers")) } else { Ok(false) };
        };
        for line in lines(&bytes[..end]) {
            let (name, _) = field(line)?;
            let frames = ["content-length", "transfer-encoding", "host"];
            if frames.iter().any(|framing| name.eq_ignore_ascii_case(framing.as_bytes())) {
                return Err(Refusal::Malformed("trailers"));
            }
        }
        self.clear(end + 2);
        self.state = State::Head;
        Ok(true)
    }
}

/// Lines that end with CRLF; the scan before has made sure that CR and LF stand nowhere else.
fn lines(head: &[u8]) -> impl Iterator<Item = &[u8]> {
    let head = head.strip_suffix(b"\r\n").unwrap_or(head);
    let count = if head.is_empty() { 0 } else { usize::MAX };
    head.split(|byte| *byte == b'\n').map(|line| line.strip_suffix(b"\r").unwrap_or(line)).take(count)
}

/// Reads a head without its empty line.
fn framing_of(head: &[u8]) -> Result<Framing, Refusal> {
    let malformed = |what| Err(Refusal::Malformed(what));
    let mut lines = lines(head);
    let request_line = lines.next().unwrap_or_default();
    let mut parts = request_line.split(|byte| *byte == b' ');
    let (Some(method), Some(target), Some(version), None) = (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return malformed("request-line");
    };
    let old = match version {
        b"HTTP/1.1" => false,
        b"HTTP/1.0" => true,
        _ => return malformed("version"),
    };
    if !is_token(method) || target.is_empty() || !target.iter().all(|byte| (0x21..0x7f).contains(byte)) {
        return malformed("request-line");
    }
    let (mut length, mut chunked, mut host_count, mut switches) = (None, false, 0, false);
    for (count, line) in lines.enumerate() {
        if count >= HEADERS_MAX {
            return Err(Refusal::HeadTooLarge);
        }
        let (name, value) = field(line)?;
        // Of all headers only these four frame anything; their lengths differ, so one comparison rules most out.
        match name.len() {
            14 if name.eq_ignore_ascii_case(b"content-length") => {
                let digits = !value.is_empty() && value.len() <= 18 && value.iter().all(u8::is_ascii_digit);
                if !digits || length.is_some() {
                    return malformed("content-length");
                }
                length = Some(value.iter().fold(0u64, |sum, digit| sum * 10 + u64::from(digit - b'0')));
            }
            17 if name.eq_ignore_ascii_case(b"transfer-encoding") => {
                if chunked || old || !value.eq_ignore_ascii_case(b"chunked") {
                    return malformed("transfer-encoding");
                }
                chunked = true;
            }
            4 if name.eq_ignore_ascii_case(b"host") => host_count += 1,
            7 if name.eq_ignore_ascii_case(b"upgrade") => {
                switches |= value.windows(9).any(|word| word.eq_ignore_ascii_case(b"websocket"));
            }
            _ => {}
        }
    }
    if host_count > 1 || (host_count == 0 && !old) {
        return malformed("host"); // RFC 9112, section 3.2
    }
    let opaque = switches || method == b"CONNECT";
    match (length, chunked) {
        (Some(_), true) => malformed("content-length-and-transfer-encoding"),
        (None | Some(0), false) if opaque => Ok(Framing::Opaque),
        _ if opaque => malformed("body"),
        (_, true) => Ok(Framing::Chunked),
        (length, false) => Ok(Framing::Length(length.unwrap_or(0))),
    }
}

/// Name and value of one header line.
fn field(line: &[u8]) -> Result<(&[u8], &[u8]), Refusal> {
    if matches!(line.first(), Some(b' ' | b'\t')) {
        return Err(Refusal::Malformed("obs-fold")); // RFC 9112, section 5.2
    }
    let colon = line.iter().position(|byte| *byte == b':').ok_or(Refusal::Malformed("header"))?;
    let (name, value) = (&line[..colon], line[colon + 1..].trim_ascii());
    // RFC 9112, section 5.1: no whitespace between name and colon; a token has none.
    let good = is_token(name) && value.iter().all(|byte| *byte == b'\t' || (*byte >= 0x20 && *byte != 0x7f));
    if good { Ok((name, value)) } else { Err(Refusal::Malformed("header")) }
}

fn is_token(bytes: &[u8]) -> bool {
    let tchar = |byte: &u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(byte);
    !bytes.is_empty() && bytes.iter().all(tchar)
}

impl<T: AsyncRead + AsyncWrite + Unpin> AsyncRead for Guard<T> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        loop {
            if this.cleared > 0 {
                let count = this.cleared.min(out.remaining());
                out.put_slice(&this.buffer[..count]);
                this.buffer.advance(count);
                this.cleared -= count;
                return Poll::Ready(Ok(()));
            }
            if this.examine() {
                continue;
            }
            if this.ended {
                return Poll::Ready(Ok(()));
            }
            if this.state == State::Refused {
                // Nothing more comes, but an end here would be taken for a caller who left before the answer. The parser
                // wakes by itself: it has a request in hand that closes the connection.
                return Poll::Pending;
            }
            match this.state {
                // Bytes that need no examination are not copied through the buffer.
                State::Opaque if this.buffer.is_empty() => return Pin::new(&mut this.io).poll_read(cx, out),
                State::Body(left) if this.buffer.is_empty() => {
                    let room =
                        out.initialize_unfilled_to(out.remaining().min(usize::try_from(left).unwrap_or(usize::MAX)));
                    let mut part = ReadBuf::new(room);
                    ready!(Pin::new(&mut this.io).poll_read(cx, &mut part))?;
                    let count = part.filled().len();
                    out.advance(count);
                    this.state = if left == count as u64 { State::Head } else { State::Body(left - count as u64) };
                    return Poll::Ready(Ok(()));
                }
                _ => ready!(this.poll_fill(cx))?,
            }
        }
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Guard<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, bytes)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(Pin::new(&mut self.io).poll_shutdown(cx))?;
        // Closing over unread bytes resets the connection, and the reset may overtake the refusal.
        while self.state == State::Refused && !self.ended && self.discarded < DISCARDED_BYTES_MAX {
            let this = &mut *self;
            this.buffer.clear();
            this.buffer.reserve(READ_BYTES);
            match tokio_util::io::poll_read_buf(Pin::new(&mut this.io), cx, &mut this.buffer) {
                Poll::Ready(Ok(count)) => {
                    this.discarded += count;
                    this.ended = count == 0;
                }
                Poll::Ready(Err(_)) => this.ended = true,
                Poll::Pending => {
                    let due = Instant::now() + Duration::from_secs(1);
                    let timer = this.lingering.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(due)));
                    ready!(timer.as_mut().poll(cx));
                    this.ended = true;
                }
            }
        }
        Poll::Ready(Ok(()))
    }
}
