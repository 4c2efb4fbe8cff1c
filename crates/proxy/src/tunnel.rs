//! Two byte streams joined: TCP through the mesh, and WebSockets once their handshake is done. Each direction ends by
//! itself (half-close); a side that breaks off breaks the other. At most one chunk is held per direction.

use std::rc::Rc;

use bytes::{Bytes, BytesMut};
use h2::{Reason, RecvStream, SendStream};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::TcpStream,
};

use crate::{
    flow::Account,
    live::{Cut, Exchange},
    websocket::Frames,
};

/// Most bytes taken from a socket at a time.
const CHUNK_BYTES: usize = 32 * 1024;

/// One end of a tunnel.
pub(crate) struct Wire {
    reader: Reader,
    writer: Writer,
}

enum Reader {
    Http2(RecvStream),
    Io(Box<dyn AsyncRead + Unpin>, BytesMut),
}

enum Writer {
    Http2(SendStream<Bytes>),
    Io(Box<dyn AsyncWrite + Unpin>),
}

/// What the bytes of a tunnel are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sort {
    /// Not ours to know.
    Opaque,
    /// WebSocket frames: a cut is said with a Close frame, between two frames.
    WebSocket,
}

/// The other side is gone.
pub(crate) struct Broken;

impl Wire {
    pub(crate) fn http2(reader: RecvStream, writer: SendStream<Bytes>) -> Self {
        Self { reader: Reader::Http2(reader), writer: Writer::Http2(writer) }
    }

    pub(crate) fn tcp(stream: TcpStream) -> Self {
        let (reader, writer) = stream.into_split();
        Self { reader: Reader::io(reader), writer: Writer::Io(Box::new(writer)) }
    }

    pub(crate) fn io(stream: impl AsyncRead + AsyncWrite + Unpin + 'static) -> Self {
        let (reader, writer) = tokio::io::split(stream);
        Self { reader: Reader::io(reader), writer: Writer::Io(Box::new(writer)) }
    }
}

impl Reader {
    fn io(io: impl AsyncRead + Unpin + 'static) -> Self {
        Self::Io(Box::new(io), BytesMut::new())
    }

    /// The next bytes; `None` at the end.
    async fn read(&mut self) -> Result<Option<Bytes>, Broken> {
        match self {
            Self::Http2(stream) => match stream.data().await {
                Some(Ok(bytes)) => {
                    stream.flow_control().release_capacity(bytes.len()).map_err(|_| Broken)?;
                    Ok(Some(bytes))
                }
                // RFC 9113 8.5: a stream that is reset is a TCP connection that is reset; NO_ERROR is a plain end.
                Some(Err(e)) if e.reason() == Some(Reason::NO_ERROR) => Ok(None),
                Some(Err(_)) => Err(Broken),
                None => Ok(None),
            },
            Self::Io(io, buffer) => {
                buffer.reserve(CHUNK_BYTES);
                let count = io.read_buf(buffer).await.map_err(|_| Broken)?;
                Ok((count > 0).then(|| buffer.split().freeze()))
            }
        }
    }
}

impl Writer {
    /// Writes some of `bytes`, as soon as the other side takes any, and removes that from `bytes`. Nothing is lost when the
    /// future is dropped.
    async fn write_some(&mut self, bytes: &mut Bytes) -> Result<Bytes, Broken> {
        match self {
            Self::Http2(stream) => {
                stream.reserve_capacity(bytes.len());
                let room = match stream.capacity() {
                    0 => match std::future::poll_fn(|cx| stream.poll_capacity(cx)).await {
                        Some(Ok(room)) => room,
                        Some(Err(_)) | None => return Err(Broken),
                    },
                    room => room,
                };
                let now = bytes.split_to(room.min(bytes.len()));
                stream.send_data(now.clone(), false).map_err(|_| Broken)?;
                Ok(now)
            }
            Self::Io(io) => {
                let count = io.write(bytes).await.map_err(|_| Broken)?;
                if count == 0 { Err(Broken) } else { Ok(bytes.split_to(count)) }
            }
        }
    }

    async fn finish(&mut self) -> Result<(), Broken> {
        match self {
            Self::Http2(stream) => stream.send_data(Bytes::new(), true).map_err(|_| Broken),
            Self::Io(io) => io.shutdown().await.map_err(|_| Broken),
        }
    }

    fn reset(&mut self) {
        if let Self::Http2(stream) = self {
            stream.send_reset(Reason::CANCEL);
        }
    }
}

/// One direction, with what is in hand.
struct Half {
    reader: Reader,
    writer: Writer,
    pending: Bytes,
    frames: Option<Frames>,
    ended: bool,
}

impl Half {
    fn new(reader: Reader, writer: Writer, sort: Sort) -> Self {
        let frames = (sort == Sort::WebSocket).then(Frames::default);
        Self { reader, writer, pending: Bytes::new(), frames, ended: false }
    }

    /// Copies until the end. Can be dropped and resumed at any await.
    async fn copy(&mut self, count: impl Fn(usize)) -> Result<(), Broken> {
        loop {
            while !self.pending.is_empty() {
                let written = self.writer.write_some(&mut self.pending).await?;
                count(written.len());
                if let Some(frames) = &mut self.frames {
                    frames.pass(&written);
                }
            }
            match self.reader.read().await? {
                Some(bytes) => self.pending = bytes,
                None => {
                    self.ended = true;
                    return self.writer.finish().await;
                }
            }
        }
    }

    /// Ends this direction of a WebSocket with a Close frame: what of a frame is already out is completed first.
    async fn close(&mut self, close: Bytes) -> Result<(), Broken> {
        let Some(frames) = &mut self.frames else { return Err(Broken) };
        if self.ended || frames.closed() {
            return Ok(());
        }
        while !frames.at_boundary() {
            if self.pending.is_empty() {
                self.pending = self.reader.read().await?.ok_or(Broken)?;
            }
            let mut rest = self.pending.split_to(frames.until_boundary(&self.pending));
            while !rest.is_empty() {
                let written = self.writer.write_some(&mut rest).await?;
                frames.pass(&written);
            }
        }
        let mut close = close;
        while !close.is_empty() {
            self.writer.write_some(&mut close).await?;
        }
        self.writer.finish().await
    }
}

/// Joins `caller` and `callee` until both directions ended, one broke, or the exchange is cut.
pub(crate) async fn join(caller: Wire, callee: Wire, account: Account, sort: Sort) {
    let mut inwards = Half::new(caller.reader, callee.writer, sort);
    let mut outwards = Half::new(callee.reader, caller.writer, sort);
    let (bytes_in, bytes_out) = match &account {
        Account::Inbound(exchange) => (&exchange.bytes_in, &exchange.bytes_out),
        Account::Outbound(outgoing) => (&outgoing.bytes_in, &outgoing.bytes_out),
        Account::Own => return,
    };
    let both = async {
        tokio::try_join!(
            inwards.copy(|count| bytes_in.set(bytes_in.get() + count as u64)),
            outwards.copy(|count| bytes_out.set(bytes_out.get() + count as u64)),
        )
    };
    let ended = match &account {
        Account::Inbound(exchange) => exchange.until_cut(both).await,
        Account::Outbound(_) | Account::Own => Ok(both.await),
    };
    match ended {
        Ok(Ok(_)) => {}
        Ok(Err(Broken)) => {
            note_broken(&account);
            inwards.writer.reset();
            outwards.writer.reset();
        }
        Err(cut) => cut_off(cut, inwards, outwards, sort).await,
    }
}

fn note_broken(account: &Account) {
    if let Account::Inbound(exchange) = account {
        let exchange: &Rc<Exchange> = exchange;
        exchange.broke.set(true);
    }
}

async fn cut_off(cut: Cut, mut inwards: Half, mut outwards: Half, sort: Sort) {
    /// Longest wait for the rest of a frame that has begun.
    const FRAME_REST_TIMEOUT: std::time::Duration = std::time::Duration::from_millis(500);
    if sort == Sort::Opaque {
        inwards.writer.reset();
        outwards.writer.reset();
        return;
    }
    let close = |masked| crate::websocket::close_frame(cut, masked);
    let both = async { tokio::join!(inwards.close(close(true)), outwards.close(close(false))) };
    let ended = tokio::time::timeout(FRAME_REST_TIMEOUT, both).await;
    if !matches!(ended, Ok((Ok(()), _))) {
        inwards.writer.reset();
    }
    if !matches!(ended, Ok((_, Ok(())))) {
        outwards.writer.reset();
    }
}
