//! One connection, served: HTTP/2 from the mesh; HTTP/1.1, HTTP/2 by prior knowledge or plain bytes from the workload.
//!
//! Limits are set here on purpose, not by default.

use std::{
    cell::Cell,
    convert::Infallible,
    rc::Rc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use countersign_core::{identity::ServiceName, service::Protocol};
use h2::{Reason, RecvStream, server::SendResponse};
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::TlsAcceptor;

use crate::{
    accept::Accepted,
    answer::{Refusal, answer},
    exchange::{self, Intent, Reply},
    flow::{Flow, Pipe, Watched},
    guard::{Guard, Http},
    identify::{Peer, identify},
    live::{Cut, Kind},
    pool::{CONNECTION_WINDOW_BYTES, HEADER_LIST_BYTES_MAX, HEADERS_MAX, SEND_BUFFER_BYTES, STREAM_WINDOW_BYTES},
    shared::Door,
    tunnel::{self, Wire},
    websocket,
    workers::{LAST_WORDS, Worker},
};

/// Streams one connection may have open.
const STREAMS_MAX: u32 = 256;
/// Streams that were reset by the peer before we looked at them; more, and the connection is closed (CVE-2023-44487).
const PENDING_RESETS_MAX: usize = 32;
/// A stream whose caller leaves sooner than any time-out cost us work and the caller nothing; so many more of them than of
/// others, and the connection is closed.
const RAPID: Duration = Duration::from_millis(20);
const RAPID_RESETS_MAX: u32 = 512;
/// Errors of the peer's own making that we answer with resets before the connection is closed.
const LOCAL_RESETS_MAX: usize = 64;
/// Longest wait for the first bytes of HTTP/2.
const PREFACE_TIMEOUT: Duration = Duration::from_secs(5);

/// Serves what came in by `door` until it ends.
pub(crate) async fn connection(worker: &Rc<Worker>, door: &Door, accepted: Accepted) {
    match door {
        Door::Inbound => {
            let (Some(tls), Some(identity)) = (worker.server_config(), worker.shared.identity()) else { return };
            let (shared, doubts) = (worker.shared.clone(), worker.doubts());
            let own = identity.svid().id().clone();
            let Some((stream, peer)) = identify(accepted, &TlsAcceptor::from(tls), &own).await else {
                worker.counts.handshakes_failed.add(1);
                return;
            };
            let proven = peer.clone();
            let lost = async move { proven.proof().lost(&shared, doubts).await };
            http2(worker, stream, Side::Mesh(peer), lost).await;
        }
        Door::ForwardProxy => from_app(worker, door, accepted.into_parts().0).await,
        Door::Upstream(service) => {
            let (stream, _) = accepted.into_parts();
            let view = worker.view();
            let protocol = view.as_ref().and_then(|view| view.visible(service)).map(|visible| visible.protocol);
            match protocol {
                Some(Protocol::Tcp) => tcp(worker, door, service, stream).await,
                // Without a view or the service, an HTTP client can at least be told so.
                Some(Protocol::Http | Protocol::Grpc) | None => from_app(worker, door, stream).await,
            }
        }
    }
}

/// From whom a connection's requests are.
#[derive(Clone)]
enum Side {
    Mesh(Rc<Peer>),
    App(Door),
}

/// HTTP from our workload: HTTP/1.1, or HTTP/2 by prior knowledge.
async fn from_app<T>(worker: &Rc<Worker>, door: &Door, io: T)
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let mut guard = Guard::new(io);
    match guard.which().await {
        Ok(Http::Two) => {
            http2(worker, guard, Side::App(door.clone()), std::future::pending()).await;
        }
        Ok(Http::One) => http1(worker, door, guard).await,
        Err(_) => {} // it left without saying anything
    }
}

async fn http1<T>(worker: &Rc<Worker>, door: &Door, guard: Guard<T>)
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let verdicts = guard.verdicts();
    let service = service_fn(|request: Request<Incoming>| {
        let verdict = verdicts.next();
        async move {
            Ok::<_, Infallible>(match verdict {
                Ok(opaque) => {
                    let mut response = http1_exchange(worker, door, request).await;
                    // What follows a request to switch protocols was let through unread: if we do not switch, it ends here.
                    let switched =
                        response.status() == StatusCode::SWITCHING_PROTOCOLS || response.status().is_success();
                    if opaque && !(switched && response.extensions().get::<Switched>().is_some()) {
                        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
                    }
                    response
                }
                Err(refusal) => {
                    let mut response = answer(worker, refusal, Kind::Http);
                    response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
                    response
                }
            })
        }
    });
    let connection = http1::Builder::new()
        .auto_date_header(false) // the workload's own Date is passed on
        .max_headers(HEADERS_MAX)
        .max_buf_size(SEND_BUFFER_BYTES)
        .serve_connection(TokioIo::new(guard), service)
        .with_upgrades();
    let mut connection = std::pin::pin!(connection);
    let mut drain = worker.drain.subscribe();
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = drain.begun() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "connection from the workload ended");
    }
}

/// Marks the response after which the connection speaks another protocol.
#[derive(Clone)]
struct Switched;

async fn http1_exchange(worker: &Rc<Worker>, door: &Door, mut request: Request<Incoming>) -> Response<Watched> {
    let is_connect = request.method() == Method::CONNECT;
    if is_connect && let Some(service) = worker.http_service_of(&request, door) {
        return tunnel_of_http(worker, request, service);
    }
    let key = websocket::key_of(&request);
    let intent = match (&key, is_connect) {
        (_, true) => Intent::Tunnel,
        (Some(_), false) => Intent::WebSocket,
        (None, false) => Intent::Message,
    };
    let upgrade = (intent != Intent::Message).then(|| hyper::upgrade::on(&mut request));
    let request = request.map(|body| Flow::of_http1(body, None));
    match (exchange::outbound(worker, door, intent, request).await, upgrade) {
        (Reply::Whole(response), _) => response,
        (Reply::Tunnel { head, callee, account, sort }, Some(upgrade)) => {
            tokio::task::spawn_local(async move {
                if let Ok(upgraded) = upgrade.await {
                    tunnel::join(Wire::io(TokioIo::new(upgraded)), callee, account, sort).await;
                }
            });
            let mut response = head.map(|()| Watched::own(""));
            if let Some(key) = key {
                *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
                let headers = response.headers_mut();
                headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
                headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
                headers.insert(header::SEC_WEBSOCKET_ACCEPT, websocket::accept_of(&key));
            }
            response.extensions_mut().insert(Switched);
            response
        }
        (Reply::Tunnel { .. }, None) => answer(worker, Refusal::UpstreamBroke, Kind::Http),
    }
}

/// CONNECT to a service that speaks HTTP: inside the tunnel is an ordinary connection of our workload to that service.
fn tunnel_of_http(worker: &Rc<Worker>, mut request: Request<Incoming>, service: ServiceName) -> Response<Watched> {
    let upgrade = hyper::upgrade::on(&mut request);
    let worker = worker.clone();
    tokio::task::spawn_local(async move {
        if let Ok(upgraded) = upgrade.await {
            // Boxed: this is a connection within a connection.
            Box::pin(from_app(&worker, &Door::Upstream(service), TokioIo::new(upgraded))).await;
        }
    });
    let mut response = Response::new(Watched::own(""));
    response.extensions_mut().insert(Switched);
    response
}

/// Plain bytes from our workload to a `tcp` service.
async fn tcp(worker: &Rc<Worker>, door: &Door, service: &ServiceName, stream: tokio::net::TcpStream) {
    let mut request = Request::new(Flow::Empty);
    *request.method_mut() = Method::CONNECT;
    let host = worker.host_name(service);
    *request.uri_mut() = host.parse().expect("INVARIANT: a service's name is a host");
    match exchange::outbound(worker, door, Intent::Tunnel, request).await {
        Reply::Tunnel { callee, account, sort, .. } => tunnel::join(Wire::tcp(stream), callee, account, sort).await,
        Reply::Whole(_) => {
            // There are no words for a refusal in plain bytes: a reset, at least, is no orderly end.
            let _ = socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO));
        }
    }
}

/// Serves a connection until it ends, or shortly after `lost`: nothing on it outlives the proof of who is at its other end.
async fn http2<T>(worker: &Rc<Worker>, io: T, side: Side, lost: impl Future<Output = ()>)
where
    T: AsyncRead + AsyncWrite + Unpin + 'static,
{
    let handshake = h2::server::Builder::new()
        .initial_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_send_buffer_size(SEND_BUFFER_BYTES)
        .max_header_list_size(HEADER_LIST_BYTES_MAX)
        .max_frame_size(32 * 1024)
        .max_concurrent_streams(STREAMS_MAX)
        .max_pending_accept_reset_streams(PENDING_RESETS_MAX)
        .max_local_error_reset_streams(Some(LOCAL_RESETS_MAX))
        .enable_connect_protocol()
        .handshake::<_, Bytes>(io);
    let Ok(Ok(mut connection)) = tokio::time::timeout(PREFACE_TIMEOUT, handshake).await else { return };
    let mut drain = worker.drain.subscribe();
    let mut rotation = worker.rotation.subscribe();
    let peer = match &side {
        Side::Mesh(peer) => Some(peer.clone()),
        Side::App(_) => None,
    };
    let valid_for = peer.as_ref().map(|peer| peer.proof().valid_for()).unwrap_or_default();
    let leave = async {
        tokio::select! {
            () = drain.begun() => {}
            _ = rotation.changed(), if peer.is_some() => {}
            () = tokio::time::sleep(valid_for), if peer.is_some() => {}
        }
    };
    let (mut leave, mut lost) = (std::pin::pin!(leave), std::pin::pin!(lost));
    let mut leaving = false;
    let rapid = Rc::new(Cell::new(0));
    loop {
        let accepted = tokio::select! {
            biased;
            accepted = connection.accept() => accepted,
            () = leave.as_mut(), if !leaving => {
                // GOAWAY first says that all is accepted, then, a round trip later, where we stopped (RFC 9113, 6.8).
                connection.graceful_shutdown();
                leaving = true;
                continue;
            }
            () = lost.as_mut() => {
                if let Some(peer) = &peer {
                    worker.live.cut_of_peer(peer, Cut::Unproven);
                }
                connection.graceful_shutdown();
                let last_words = async {
                    while let Some(Ok((_, mut respond))) = connection.accept().await {
                        respond.send_reset(Reason::REFUSED_STREAM);
                    }
                };
                let _ = tokio::time::timeout(LAST_WORDS, last_words).await; // what is not said by then stays unsaid
                return;
            }
        };
        match accepted {
            Some(Ok(_)) if rapid.get() > RAPID_RESETS_MAX => {
                tracing::warn!("connection closed: its streams are reset as fast as they are opened");
                connection.abrupt_shutdown(Reason::ENHANCE_YOUR_CALM);
            }
            Some(Ok((request, respond))) => {
                tokio::task::spawn_local(stream(worker.clone(), side.clone(), rapid.clone(), request, respond));
            }
            Some(Err(error)) => {
                tracing::debug!(%error, "connection ended");
                return;
            }
            None => return,
        }
    }
}

/// One stream of HTTP/2.
async fn stream(
    worker: Rc<Worker>,
    side: Side,
    rapid: Rc<Cell<u32>>,
    request: Request<RecvStream>,
    mut respond: SendResponse<Bytes>,
) {
    let began = Instant::now();
    let (parts, body) = request.into_parts();
    let upgrade = parts.extensions.get::<h2::ext::Protocol>();
    let intent = match (&parts.method, upgrade.map(|upgrade| upgrade.as_str())) {
        (&Method::CONNECT, Some("websocket")) => Intent::WebSocket,
        (&Method::CONNECT, _) => Intent::Tunnel,
        _ => Intent::Message,
    };
    let (flow, kept) = if intent == Intent::Message { (Flow::of_http2(body), None) } else { (Flow::Empty, Some(body)) };
    let request = Request::from_parts(parts, flow);
    let exchange = async {
        match &side {
            Side::Mesh(peer) => exchange::inbound(&worker, peer, request).await,
            Side::App(door) => exchange::outbound(&worker, door, intent, request).await,
        }
    };
    // The caller may lose interest while it waits: dropping the exchange tells everyone behind it.
    let reply = tokio::select! {
        biased;
        reply = exchange => reply,
        _ = std::future::poll_fn(|cx| respond.poll_reset(cx)) => {
            if began.elapsed() < RAPID {
                rapid.set(rapid.get() + 1);
            }
            return;
        }
    };
    rapid.set(rapid.get().saturating_sub(1));
    match (reply, kept) {
        (Reply::Whole(response), _) => {
            let (parts, body) = response.into_parts();
            let end = http_body::Body::is_end_stream(&body);
            if let Ok(send) = respond.send_response(Response::from_parts(parts, ()), end)
                && !end
            {
                Pipe::new(body, send).await;
            }
        }
        (Reply::Tunnel { head, callee, account, sort }, Some(body)) => {
            if let Ok(send) = respond.send_response(head, false) {
                tunnel::join(Wire::http2(body, send), callee, account, sort).await;
            }
        }
        (Reply::Tunnel { .. }, None) => respond.send_reset(Reason::INTERNAL_ERROR),
    }
}
