//! The body of a message on its way, whichever protocol it came by, frame by frame: nothing is collected, and a chunk is
//! taken from the sender only when the receiver has room for it.

use std::{
    fmt,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use h2::{Reason, RecvStream, SendStream};
use http::{HeaderMap, HeaderValue};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;

use crate::{
    hygiene,
    live::{Cut, Exchange},
    pool::{AppLease, Outgoing},
};

/// A body as it arrives.
pub(crate) enum Flow {
    /// No body.
    Empty,
    /// An answer of our own.
    Full(Bytes),
    /// A body that was handed over: it cannot be sent a second time.
    Sent,
    /// HTTP/1.1. The lease returns the workload's connection to its pool when the body is done with.
    Http1(Incoming, #[expect(dead_code, reason = "held for its drop")] Option<AppLease>),
    /// HTTP/2.
    Http2(RecvStream),
}

/// Why a body ended before its end.
#[derive(Debug)]
pub(crate) enum FlowError {
    /// The HTTP/1.1 side broke off, or lied about its length.
    Http1(hyper::Error),
    /// The HTTP/2 side was reset.
    Http2(h2::Error),
    /// The law's answer turned, or we are closing.
    Cut(Cut),
}

/// To whose account a body goes. Dropping the last one closes the account.
#[derive(Clone)]
pub(crate) enum Account {
    /// An exchange that is judged here.
    Inbound(Rc<Exchange>),
    /// An exchange of our own workload, judged elsewhere.
    Outbound(Rc<Outgoing>),
    /// An answer of our own.
    Own,
}

/// Which way a body flows.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    /// From the caller.
    Request,
    /// To the caller.
    Response,
    /// To a caller who speaks gRPC: it learns the reason in trailers.
    GrpcResponse,
}

/// A body under watch: counted, and cut when its exchange is.
pub(crate) struct Watched {
    flow: Flow,
    account: Account,
    way: Way,
    cut: bool,
}

impl Watched {
    pub(crate) fn new(flow: Flow, account: Account, way: Way) -> Self {
        Self { flow, account, way, cut: false }
    }

    pub(crate) fn own(body: impl Into<Bytes>) -> Self {
        Self::new(Flow::Full(body.into()), Account::Own, Way::Response)
    }

    fn poll_cut(&self, cx: &mut Context<'_>) -> Poll<Cut> {
        match &self.account {
            Account::Inbound(exchange) => exchange.poll_cut(cx),
            // Cut where it is judged: the callee's sidecar ends the stream.
            Account::Outbound(_) | Account::Own => Poll::Pending,
        }
    }

    fn count(&self, bytes: usize) {
        let (bytes_in, bytes_out) = match &self.account {
            Account::Inbound(exchange) => (&exchange.bytes_in, &exchange.bytes_out),
            Account::Outbound(outgoing) => (&outgoing.bytes_in, &outgoing.bytes_out),
            Account::Own => return,
        };
        let way = if self.way == Way::Request { bytes_in } else { bytes_out };
        way.set(way.get() + bytes as u64);
    }
}

impl Body for Watched {
    type Data = Bytes;
    type Error = FlowError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, FlowError>>> {
        if self.cut {
            return Poll::Ready(None);
        }
        if let Poll::Ready(cut) = self.poll_cut(cx) {
            self.cut = true;
            self.flow = Flow::Empty; // lets go of the other side at once
            return Poll::Ready(Some(match self.way {
                Way::GrpcResponse => Ok(Frame::trailers(cut.grpc_trailers())),
                Way::Request | Way::Response => Err(FlowError::Cut(cut)),
            }));
        }
        let frame = ready!(self.flow.poll_frame(cx));
        match &frame {
            Some(Ok(frame)) => self.count(frame.data_ref().map_or(0, Bytes::len)),
            Some(Err(_)) => {
                if let Account::Inbound(exchange) = &self.account {
                    exchange.broke.set(true);
                }
            }
            None => {}
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.cut || self.flow.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        match &self.flow {
            Flow::Empty | Flow::Sent => SizeHint::with_exact(0),
            Flow::Full(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Flow::Http1(body, _) => body.size_hint(),
            Flow::Http2(_) => SizeHint::default(),
        }
    }
}

impl Flow {
    pub(crate) fn of_http2(body: RecvStream) -> Self {
        if body.is_end_stream() { Self::Empty } else { Self::Http2(body) }
    }

    pub(crate) fn of_http1(body: Incoming, lease: Option<AppLease>) -> Self {
        if body.is_end_stream() { Self::Empty } else { Self::Http1(body, lease) }
    }

    pub(crate) fn is_end_stream(&self) -> bool {
        match self {
            Self::Empty | Self::Sent => true,
            Self::Full(bytes) => bytes.is_empty(),
            Self::Http1(body, _) => body.is_end_stream(),
            Self::Http2(body) => body.is_end_stream(),
        }
    }

    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, FlowError>>> {
        Poll::Ready(match self {
            Self::Empty | Self::Sent => None,
            Self::Full(bytes) if bytes.is_empty() => None,
            Self::Full(bytes) => Some(Ok(Frame::data(std::mem::take(bytes)))),
            Self::Http1(body, _) => ready!(Pin::new(body).poll_frame(cx)).map(|frame| frame.map_err(FlowError::Http1)),
            Self::Http2(body) => match ready!(body.poll_data(cx)) {
                Some(Ok(bytes)) => {
                    // The sender may send as much again. At most this one chunk is held between the two sides.
                    let released = body.flow_control().release_capacity(bytes.len());
                    Some(released.map(|()| Frame::data(bytes)).map_err(FlowError::Http2))
                }
                Some(Err(e)) => Some(Err(FlowError::Http2(e))),
                None => match ready!(body.poll_trailers(cx)) {
                    Ok(trailers) => trailers.map(|trailers| Ok(Frame::trailers(trailers))),
                    Err(e) => Some(Err(FlowError::Http2(e))),
                },
            },
        })
    }
}

impl FlowError {
    /// The code with which the other side's HTTP/2 stream is reset.
    pub(crate) fn reset_reason(&self) -> Reason {
        match self {
            Self::Http1(_) => Reason::INTERNAL_ERROR,
            // A reset is passed on as it came, except the one that would invite a retry of what was half done.
            Self::Http2(e) => match e.reason() {
                Some(Reason::REFUSED_STREAM) | None => Reason::INTERNAL_ERROR,
                Some(reason) => reason,
            },
            Self::Cut(_) => Reason::CANCEL,
        }
    }
}

/// Sends a body on an HTTP/2 stream, as fast as its receiver takes it; a body that breaks off resets the stream. Ends when
/// the body is handed over or the receiver is gone.
pub(crate) struct Pipe {
    body: Watched,
    to: SendStream<Bytes>,
    chunk: Bytes,
}

impl Pipe {
    pub(crate) fn new(body: Watched, to: SendStream<Bytes>) -> Self {
        Self { body, to, chunk: Bytes::new() }
    }
}

impl Future for Pipe {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let Self { body, to, chunk } = &mut *self;
        match ready!(poll_pipe(body, to, chunk, cx)) {
            Ok(()) => {}
            Err(reason) => to.send_reset(reason),
        }
        Poll::Ready(())
    }
}

fn poll_pipe(
    body: &mut Watched,
    to: &mut SendStream<Bytes>,
    chunk: &mut Bytes,
    cx: &mut Context<'_>,
) -> Poll<Result<(), Reason>> {
    loop {
        if let Poll::Ready(reset) = to.poll_reset(cx) {
            return Poll::Ready(Err(reset.unwrap_or(Reason::CANCEL)));
        }
        if !chunk.is_empty() {
            if let Poll::Ready(cut) = body.poll_cut(cx) {
                // What waits for room is not sent any more.
                chunk.clear();
                body.cut = true;
                if body.way == Way::GrpcResponse {
                    to.reserve_capacity(0);
                    let sent = to.send_trailers(cut.grpc_trailers());
                    return Poll::Ready(sent.map_err(|_| Reason::CANCEL));
                }
                return Poll::Ready(Err(Reason::CANCEL));
            }
            to.reserve_capacity(chunk.len());
            if to.capacity() == 0 {
                match ready!(to.poll_capacity(cx)) {
                    Some(Ok(_)) => continue,
                    Some(Err(e)) => return Poll::Ready(Err(e.reason().unwrap_or(Reason::CANCEL))),
                    None => return Poll::Ready(Err(Reason::CANCEL)),
                }
            }
            let room = to.capacity().min(chunk.len());
            let now = chunk.split_to(room);
            let end = chunk.is_empty() && body.is_end_stream();
            if to.send_data(now, end).is_err() {
                return Poll::Ready(Err(Reason::CANCEL));
            }
            if end {
                return Poll::Ready(Ok(()));
            }
            continue;
        }
        match ready!(Pin::new(&mut *body).poll_frame(cx)) {
            Some(Ok(frame)) => match frame.into_data() {
                Ok(data) => *chunk = data,
                Err(frame) => {
                    let Ok(mut trailers) = frame.into_trailers() else { continue };
                    hygiene::trailers(&mut trailers);
                    return Poll::Ready(to.send_trailers(trailers).map_err(|_| Reason::CANCEL));
                }
            },
            Some(Err(e)) => return Poll::Ready(Err(e.reset_reason())),
            None => return Poll::Ready(to.send_data(Bytes::new(), true).map_err(|_| Reason::CANCEL)),
        }
    }
}

impl Cut {
    fn grpc_trailers(&self) -> HeaderMap {
        let mut trailers = HeaderMap::with_capacity(2);
        let (status, message) = match self {
            Self::Denied(id) => ("7", format!("denied; decision {id}")), // PERMISSION_DENIED
            Self::Stale => ("14", "stale".to_owned()),                   // UNAVAILABLE
            Self::Unproven => ("16", "unproven".to_owned()),             // UNAUTHENTICATED
            Self::Closing => ("14", "draining".to_owned()),
        };
        trailers.insert("grpc-status", HeaderValue::from_static(status));
        trailers.insert("grpc-message", message.try_into().expect("INVARIANT: hexadecimal digits and words"));
        trailers
    }
}

impl fmt::Display for FlowError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Http1(_) => f.write_str("the HTTP/1.1 side broke off"),
            Self::Http2(_) => f.write_str("the HTTP/2 stream was reset"),
            Self::Cut(cut) => write!(f, "the exchange was cut: {cut:?}"),
        }
    }
}

impl std::error::Error for FlowError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Http1(e) => Some(e),
            Self::Http2(e) => Some(e),
            Self::Cut(_) => None,
        }
    }
}
