//! Connections to where requests go: HTTP/2 over mutual TLS to other sidecars, HTTP/1.1 or HTTP/2 to the workload. Each
//! worker has its own; a connection never changes its worker.
//!
//! Which instance to use is `balance`'s; what a failure means is `forward`'s.

use std::{
    cell::{Cell, RefCell},
    io,
    rc::Rc,
    task::{Context, Poll, Waker},
    time::{Duration, Instant},
};

use bytes::Bytes;
use countersign_api::{
    sidecar::Span,
    svid::{PeerSide, server_name},
};
use countersign_core::token::Thumbprint;
use h2::client::SendRequest;
use http::{Method, Request, Response};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use rustls::AlertDescription;
use tokio::{
    io::{AsyncBufReadExt, AsyncRead, AsyncWrite},
    net::TcpStream,
};
use tokio_rustls::{TlsConnector, client::TlsStream};

use crate::{
    accept::tune,
    balance::{Instance, Load},
    flow::Watched,
    identify::Proof,
    live::Kind,
    route::Place,
    trace::Trace,
    workers::Worker,
};

/// Longest time to connect and shake hands.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// Streams on one connection before another is opened beside it.
const STREAMS_PER_CONNECTION: u32 = 200;
/// Connections to one instance, per worker.
const CONNECTIONS_PER_INSTANCE: usize = 16;
/// Idle HTTP/1.1 connections to the workload, per worker.
const APP_IDLE_MAX: usize = 256;

/// What one stream may have in flight before its receiver took it: a slow reader costs no more memory than this.
pub(crate) const STREAM_WINDOW_BYTES: u32 = 256 * 1024;
/// What all streams of a connection may have in flight. Sixty-four slow readers do not stop the others.
pub(crate) const CONNECTION_WINDOW_BYTES: u32 = 16 * 1024 * 1024;
/// What one stream may have queued for sending.
pub(crate) const SEND_BUFFER_BYTES: usize = 128 * 1024;
/// Largest list of headers, in bytes (RFC 9113, 6.5.2).
pub(crate) const HEADER_LIST_BYTES_MAX: u32 = 64 * 1024;

/// An HTTP/2 connection that takes more requests.
pub(crate) struct Http2 {
    sender: SendRequest<Bytes>,
    streams: Rc<Cell<u32>>,
    closed: Rc<Cell<bool>>,
    certificate: Option<Thumbprint>, // that it was opened with
}

/// HTTP/2 connections to one place.
#[derive(Default)]
pub(crate) struct Http2Pool {
    connections: RefCell<Vec<Http2>>,
    connecting: tokio::sync::Mutex<()>,
    failed: RefCell<Option<(Instant, Rc<ConnectError>)>>,
}

/// One open stream on a pooled connection; given back on drop.
pub(crate) struct Stream {
    pub(crate) sender: SendRequest<Bytes>,
    streams: Rc<Cell<u32>>,
    /// The certificate that its connection was opened with.
    pub(crate) certificate: Option<Thumbprint>,
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectError {
    #[error("this sidecar has no identity yet")]
    NoIdentity,
    #[error("it took longer than {CONNECT_TIMEOUT:?}")]
    TimedOut,
    #[error("{0}")]
    Io(io::Error),
    #[error("{0}")]
    Http2(h2::Error),
    #[error("{0}")]
    Http1(hyper::Error),
    #[error("it did not prove who it is")]
    Unproven,
    #[error("this sidecar got another identity meanwhile")]
    Renewed,
    #[error("it refused our certificate: {0:?}")]
    CertificateRefused(AlertDescription),
}

impl Http2Pool {
    /// A stream's worth of room on a connection, opened with `connect` when there is none. At most one connection is
    /// being opened at a time; who waited for one that failed fails with it, so that a dead instance costs its callers
    /// one time-out and not one after the other.
    pub(crate) async fn stream<F>(&self, connect: impl Fn() -> F) -> Result<Stream, Rc<ConnectError>>
    where
        F: Future<Output = Result<Http2, ConnectError>>,
    {
        if let Some(stream) = self.open_stream() {
            return Ok(stream);
        }
        let asked_at = Instant::now();
        let _turn = self.connecting.lock().await;
        if let Some(stream) = self.open_stream() {
            return Ok(stream);
        }
        if let Some((at, error)) = &*self.failed.borrow()
            && *at > asked_at
        {
            return Err(error.clone());
        }
        let connected = tokio::time::timeout(CONNECT_TIMEOUT, async {
            loop {
                match connect().await {
                    Err(ConnectError::Renewed) => {}
                    connected => return connected,
                }
            }
        });
        match connected.await.unwrap_or(Err(ConnectError::TimedOut)) {
            Ok(connection) => {
                let stream = connection.stream();
                self.connections.borrow_mut().push(connection);
                Ok(stream)
            }
            Err(error) => {
                let error = Rc::new(error);
                *self.failed.borrow_mut() = Some((Instant::now(), error.clone()));
                Err(error)
            }
        }
    }

    fn open_stream(&self) -> Option<Stream> {
        let mut connections = self.connections.borrow_mut();
        // A closed connection or one that said GOAWAY takes nothing new; letting its last handle go lets it finish.
        connections.retain_mut(|connection| connection.takes_more());
        let least = connections.iter().min_by_key(|connection| connection.streams.get())?;
        let full = least.streams.get() >= STREAMS_PER_CONNECTION && connections.len() < CONNECTIONS_PER_INSTANCE;
        (!full).then(|| least.stream())
    }

    /// Forgets the connections: streams on them finish, then they close.
    pub(crate) fn rotate(&self) {
        self.connections.borrow_mut().clear();
    }
}

impl Http2 {
    /// Speaks HTTP/2 on `io` and drives the connection until it ends, or until `lost`: then what is open on it breaks.
    pub(crate) async fn over<T>(io: T, lost: impl Future<Output = ()> + 'static) -> Result<Self, ConnectError>
    where
        T: AsyncRead + AsyncWrite + Unpin + 'static,
    {
        let (sender, connection) = h2::client::Builder::new()
            .enable_push(false)
            .initial_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .max_send_buffer_size(SEND_BUFFER_BYTES)
            .max_header_list_size(HEADER_LIST_BYTES_MAX)
            .max_frame_size(32 * 1024)
            .handshake(io)
            .await
            .map_err(ConnectError::Http2)?;
        let closed = Rc::new(Cell::new(false));
        let closes = closed.clone();
        tokio::task::spawn_local(async move {
            tokio::select! {
                ended = connection => if let Err(error) = ended {
                    tracing::debug!(%error, "connection ended");
                },
                () = lost => {}
            }
            closes.set(true);
        });
        Ok(Self { sender, streams: Rc::default(), closed, certificate: None })
    }

    fn takes_more(&mut self) -> bool {
        let mut cx = Context::from_waker(Waker::noop());
        !self.closed.get() && !matches!(self.sender.poll_ready(&mut cx), Poll::Ready(Err(_)))
    }

    fn stream(&self) -> Stream {
        self.streams.set(self.streams.get() + 1);
        Stream { sender: self.sender.clone(), streams: self.streams.clone(), certificate: self.certificate }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.streams.set(self.streams.get() - 1);
    }
}

/// Opens a connection to another sidecar and proves that it stands for the service of `instance`.
pub(crate) async fn connect_mesh(worker: &Worker, instance: &Instance) -> Result<Http2, ConnectError> {
    let config = worker.client_config(&instance.service).ok_or(ConnectError::NoIdentity)?;
    let certificate = own_certificate(worker);
    let tcp = TcpStream::connect(instance.address).await.map_err(ConnectError::Io)?;
    tune(&tcp);
    let (shared, doubts) = (worker.shared.clone(), worker.doubts());
    let mut tls = TlsConnector::from(config).connect(server_name(), tcp).await.map_err(ConnectError::Io)?;
    let proof = Proof::of_connection(tls.get_ref().1, PeerSide::Server).ok_or(ConnectError::Unproven)?;
    accepted(&mut tls).await?;
    // Another one may have been shown than was looked at before: then tokens of neither would be sent for sure on the right one.
    if own_certificate(worker) != certificate {
        return Err(ConnectError::Renewed);
    }
    worker.counts.mesh_connections.add(1);
    let connection = Http2::over(tls, async move { proof.lost(&shared, doubts).await }).await?;
    Ok(Http2 { certificate, ..connection })
}

fn own_certificate(worker: &Worker) -> Option<Thumbprint> {
    worker.shared.identity().map(|identity| Thumbprint(identity.svid().leaf_sha256().0))
}

/// Waits for the first word of the other sidecar, its HTTP/2 SETTINGS: it accepts us. Our handshake is done before it has
/// looked at our certificate (RFC 8446, section 2), so nothing is sent before that: what it refuses, it did not process.
async fn accepted(tls: &mut TlsStream<TcpStream>) -> Result<(), ConnectError> {
    match tls.fill_buf().await {
        Ok([]) => Err(ConnectError::Io(io::ErrorKind::UnexpectedEof.into())),
        Ok(_) => Ok(()),
        Err(error) => match error.get_ref().and_then(|error| error.downcast_ref::<rustls::Error>()) {
            Some(rustls::Error::AlertReceived(alert)) => Err(ConnectError::CertificateRefused(*alert)),
            _ => Err(ConnectError::Io(error)),
        },
    }
}

/// Opens a TCP connection to the workload, in its namespace.
pub(crate) async fn connect_app(worker: &Worker) -> Result<TcpStream, ConnectError> {
    let app = worker.shared.setup.app.as_ref();
    let app = app.ok_or_else(|| ConnectError::Io(io::Error::from(io::ErrorKind::AddrNotAvailable)))?;
    let connect = async {
        let socket = (app.socket)()?;
        socket.set_nonblocking(true)?;
        let socket = tokio::net::TcpSocket::from_std_stream(socket.into());
        socket.connect(app.address).await
    };
    let connected = tokio::time::timeout(CONNECT_TIMEOUT, connect).await;
    let connected = connected.map_err(|_| ConnectError::TimedOut).and_then(|stream| stream.map_err(ConnectError::Io));
    let stream = connected.inspect_err(|_| worker.shared.doubt_app())?;
    tune(&stream);
    worker.counts.app_connections.add(1);
    Ok(stream)
}

/// HTTP/1.1 connections to the workload that wait for a request.
#[derive(Default)]
pub(crate) struct AppPool {
    idle: RefCell<Vec<http1::SendRequest<Watched>>>,
    pub(crate) http2: Http2Pool,
}

/// A connection to the workload in use; on drop it goes back to the pool, whose next user sees whether it is still good.
pub(crate) struct AppLease {
    sender: Option<http1::SendRequest<Watched>>,
    worker: Rc<Worker>,
}

/// The workload did not answer.
pub(crate) enum AppError {
    /// Nothing of the request was sent.
    Unreachable(ConnectError),
    /// It broke off before its answer began.
    Broke(hyper::Error),
}

impl AppPool {
    fn take(&self) -> Option<http1::SendRequest<Watched>> {
        let mut idle = self.idle.borrow_mut();
        idle.retain(|sender| !sender.is_closed());
        let ready = idle.iter().rposition(http1::SendRequest::is_ready)?;
        Some(idle.swap_remove(ready))
    }
}

/// Sends a request to the workload over HTTP/1.1. A kept connection that the workload closed in the meantime is replaced
/// as long as nothing was sent on it.
pub(crate) async fn send_to_app(
    worker: &Rc<Worker>,
    mut request: Request<Watched>,
) -> Result<(Response<hyper::body::Incoming>, AppLease), AppError> {
    loop {
        let kept = worker.app.take();
        let was_kept = kept.is_some();
        let mut sender = match kept {
            Some(sender) => sender,
            None => open_http1(worker).await.map_err(AppError::Unreachable)?,
        };
        match sender.try_send_request(request).await {
            Ok(response) => return Ok((response, AppLease { sender: Some(sender), worker: worker.clone() })),
            Err(mut error) => match error.take_message() {
                Some(unsent) if was_kept => request = unsent,
                _ => return Err(AppError::Broke(error.into_error())),
            },
        }
    }
}

async fn open_http1(worker: &Rc<Worker>) -> Result<http1::SendRequest<Watched>, ConnectError> {
    let stream = connect_app(worker).await?;
    let (sender, connection) = http1::Builder::new()
        .max_headers(HEADERS_MAX)
        .max_buf_size(SEND_BUFFER_BYTES)
        .handshake(TokioIo::new(stream))
        .await
        .map_err(ConnectError::Http1)?;
    tokio::task::spawn_local(async move {
        if let Err(error) = connection.with_upgrades().await {
            tracing::debug!(%error, "connection to the workload ended");
        }
    });
    Ok(sender)
}

/// Headers of one HTTP/1.1 message.
pub(crate) const HEADERS_MAX: usize = 128;

impl Drop for AppLease {
    fn drop(&mut self) {
        let mut idle = self.worker.app.idle.borrow_mut();
        if let Some(sender) = self.sender.take().filter(|sender| !sender.is_closed() && idle.len() < APP_IDLE_MAX) {
            idle.push(sender);
        }
    }
}

/// An exchange of our own workload, judged at its destination: what must be given back when it ends.
pub(crate) struct Outgoing {
    pub(crate) worker: Rc<Worker>,
    pub(crate) began: Instant,
    pub(crate) status: Cell<u16>,
    pub(crate) refusal: Cell<&'static str>, // why the mesh answered; empty: it did not, or not this end of it
    pub(crate) trace: Trace,
    span: RefCell<Option<Box<Span>>>, // what will be told of it, as far as it is known; of a trace that is kept
    pub(crate) bytes_in: Cell<u64>,
    pub(crate) bytes_out: Cell<u64>,
    pub(crate) stream: RefCell<Option<(Stream, Load)>>,
    pub(crate) place: RefCell<Option<Place>>,
    pub(crate) instance: RefCell<Option<Rc<Instance>>>, // the one tried last
}

impl Outgoing {
    pub(crate) fn new(worker: &Rc<Worker>, trace: Trace, kind: Kind, method: &Method) -> Rc<Self> {
        worker.counts.outbound.started.add(1);
        worker.counts.outbound.open.add(1);
        Rc::new(Self {
            worker: worker.clone(),
            began: Instant::now(),
            status: Cell::new(0),
            refusal: Cell::new(""),
            trace,
            span: RefCell::new(trace.is_kept().then(|| {
                let (protocol, method) = (kind.as_str().into(), method.to_string());
                Box::new(Span { protocol, method, ..Span::default() })
            })),
            bytes_in: Cell::new(0),
            bytes_out: Cell::new(0),
            stream: RefCell::default(),
            place: RefCell::default(),
            instance: RefCell::default(),
        })
    }

    /// Adds what has become known to the span, if there will be one.
    pub(crate) fn describe(&self, add: impl FnOnce(&mut Span)) {
        if let Some(span) = &mut *self.span.borrow_mut() {
            add(span);
        }
    }
}

impl Drop for Outgoing {
    fn drop(&mut self) {
        let took = self.began.elapsed();
        let (status, bytes_in, bytes_out) = (self.status.get(), self.bytes_in.get(), self.bytes_out.get());
        self.worker.counts.outbound.end(status, took.as_micros() as u64, bytes_in, bytes_out);
        if let Some(known) = self.span.take() {
            let Span { protocol, method, path, service, .. } = *known;
            let (status, refusal) = (status.into(), self.refusal.get().into());
            let end = if status == 0 { "abandoned" } else { "completed" }.into();
            let at = self.trace.span(took);
            self.worker.tell(Span { protocol, method, path, service, status, refusal, end, ..at });
        }
    }
}
