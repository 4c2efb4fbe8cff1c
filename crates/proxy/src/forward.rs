//! The request goes on: to our workload, which takes a [`Permit`]; or to an instance of another service, whose sidecar will
//! judge it. Tried again only where that is safe.

use std::{
    rc::Rc,
    time::{Duration, Instant},
};

use countersign_core::{
    identity::{InstanceId, ServiceName},
    service::Protocol,
};
use h2::{Reason, ext::Protocol as ConnectProtocol};
use http::{
    HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Uri, Version, header,
    uri::{Authority, PathAndQuery, Scheme},
};
use smallvec::SmallVec;

use crate::{
    answer::{Refusal, says, unprocessed},
    authorize::Permit,
    balance::{Instance, Upstream},
    exchange::{Intent, Reply, Routed, Sending},
    flow::{Account, Flow, Pipe, Watched, Way},
    hygiene,
    live::{Exchange, Kind},
    pool::{AppError, ConnectError, Http2, Outgoing, Stream, connect_app, connect_mesh, send_to_app},
    tunnel::{Sort, Wire},
    websocket,
    workers::Worker,
};

/// Longest time to the head of an answer when no rule says otherwise. A gRPC call brings its own deadline.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);
/// Attempts beyond the first, when no rule says otherwise: only for what was certainly not processed.
const RETRIES: u32 = 2;
/// Retries as a share of requests, in percent, when no rule says otherwise.
const RETRY_BUDGET_PERCENT: u32 = 20;

/// How often a connection is given up for one request because its certificate was replaced meanwhile.
const REPLACED_MEANWHILE_MAX: usize = 5;

/// Forwards a permitted exchange to the workload.
///
/// INVARIANT (permit-before-forward): the permit is taken by value; without one nothing reaches the workload.
pub(crate) async fn to_app(worker: &Rc<Worker>, permit: Permit, mut routed: Routed) -> Result<Reply, Refusal> {
    routed.headers.insert(hygiene::CALLER, permit.caller_header());
    let exchange = permit.exchange().clone();
    let forwarded = async {
        match (routed.intent, routed.protocol) {
            (Intent::Tunnel, _) => tcp_to_app(worker, &exchange).await,
            (Intent::WebSocket, _) => websocket_to_app(worker, &exchange, routed).await,
            (Intent::Message, Protocol::Grpc) => http2_to_app(worker, &exchange, routed).await,
            (Intent::Message, Protocol::Http | Protocol::Tcp) => http1_to_app(worker, &exchange, routed).await,
        }
    };
    exchange.until_cut(forwarded).await.unwrap_or_else(|cut| Err(Refusal::of_cut(cut)))
}

async fn tcp_to_app(worker: &Rc<Worker>, exchange: &Rc<Exchange>) -> Result<Reply, Refusal> {
    let stream = connect_app(worker).await.map_err(|_| Refusal::AppUnreachable)?;
    let account = Account::Inbound(exchange.clone());
    Ok(Reply::Tunnel { head: Response::new(()), callee: Wire::tcp(stream), account, sort: Sort::Opaque })
}

async fn http1_to_app(worker: &Rc<Worker>, exchange: &Rc<Exchange>, routed: Routed) -> Result<Reply, Refusal> {
    let account = Account::Inbound(exchange.clone());
    let request = http1_request(exchange, routed.method, routed.path_and_query, routed.headers, routed.body);
    let (response, lease) = send_to_app(worker, request).await.map_err(app_refusal)?;
    let (mut parts, body) = response.into_parts();
    hygiene::response_of_app(&mut parts.headers);
    parts.version = Version::HTTP_2;
    parts.extensions.clear();
    let body = Watched::new(Flow::of_http1(body, Some(lease)), account, Way::Response);
    Ok(Reply::Whole(Response::from_parts(parts, body)))
}

async fn websocket_to_app(worker: &Rc<Worker>, exchange: &Rc<Exchange>, routed: Routed) -> Result<Reply, Refusal> {
    let key = websocket::new_key();
    let mut headers = routed.headers;
    headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
    headers.insert(header::SEC_WEBSOCKET_KEY, key.clone());
    headers.insert(header::SEC_WEBSOCKET_VERSION, HeaderValue::from_static("13"));
    let request = http1_request(exchange, Method::GET, routed.path_and_query, headers, Flow::Empty);
    let (mut response, lease) = send_to_app(worker, request).await.map_err(app_refusal)?;
    let account = Account::Inbound(exchange.clone());
    if response.status() == StatusCode::SWITCHING_PROTOCOLS {
        if response.headers().get(header::SEC_WEBSOCKET_ACCEPT) != Some(&websocket::accept_of(&key)) {
            return Err(Refusal::AppBroke);
        }
        let upgraded = hyper::upgrade::on(&mut response).await.map_err(|_| Refusal::AppBroke)?;
        let mut head = Response::new(()); // RFC 8441, section 5: 200 where HTTP/1.1 says 101
        *head.headers_mut() = std::mem::take(response.headers_mut());
        hygiene::response_of_app(head.headers_mut());
        head.headers_mut().remove(header::SEC_WEBSOCKET_ACCEPT);
        let callee = Wire::io(hyper_util::rt::TokioIo::new(upgraded));
        return Ok(Reply::Tunnel { head, callee, account, sort: Sort::WebSocket });
    }
    if response.status().is_success() {
        return Err(Refusal::AppBroke); // a plain answer would look like an open WebSocket to the caller's sidecar
    }
    let (mut parts, body) = response.into_parts();
    hygiene::response_of_app(&mut parts.headers);
    parts.version = Version::HTTP_2;
    parts.extensions.clear();
    let body = Watched::new(Flow::of_http1(body, Some(lease)), account, Way::Response);
    Ok(Reply::Whole(Response::from_parts(parts, body)))
}

fn http1_request(
    exchange: &Rc<Exchange>,
    method: Method,
    path_and_query: PathAndQuery,
    mut headers: HeaderMap,
    body: Flow,
) -> Request<Watched> {
    let host = HeaderValue::from_str(&exchange.asked.host).expect("INVARIANT: a host in normal form");
    headers.insert(header::HOST, host);
    join_cookies(&mut headers);
    let body = Watched::new(body, Account::Inbound(exchange.clone()), Way::Request);
    let mut request = Request::new(body);
    *request.method_mut() = method;
    *request.uri_mut() = Uri::from(path_and_query);
    *request.headers_mut() = headers;
    request
}

// RFC 9113, section 8.2.3: crumbs of a cookie are joined before they leave HTTP/2.
fn join_cookies(headers: &mut HeaderMap) {
    let mut crumbs = headers.get_all(header::COOKIE).iter();
    if crumbs.next().is_none() || crumbs.next().is_none() {
        return;
    }
    let crumbs: Vec<&[u8]> = headers.get_all(header::COOKIE).iter().map(HeaderValue::as_bytes).collect();
    if let Ok(joined) = HeaderValue::from_bytes(&crumbs.join(&b"; "[..])) {
        headers.insert(header::COOKIE, joined);
    }
}

fn app_refusal(error: AppError) -> Refusal {
    match error {
        AppError::Unreachable(error) => {
            tracing::debug!(%error, "could not reach the workload");
            Refusal::AppUnreachable
        }
        AppError::Broke(error) => {
            tracing::debug!(%error, "the workload broke off");
            Refusal::AppBroke
        }
    }
}

async fn http2_to_app(worker: &Rc<Worker>, exchange: &Rc<Exchange>, routed: Routed) -> Result<Reply, Refusal> {
    let connect = || async { Http2::over(connect_app(worker).await?, std::future::pending()).await };
    let mut stream = worker.app.http2.stream(connect).await.map_err(|_| Refusal::AppUnreachable)?;
    let account = Account::Inbound(exchange.clone());
    let authority: Authority = exchange.asked.host.parse().expect("INVARIANT: a host in normal form");
    let mut request = Request::new(());
    *request.method_mut() = routed.method;
    *request.uri_mut() = uri(authority, Some(routed.path_and_query), Scheme::HTTP);
    *request.headers_mut() = routed.headers;
    request.headers_mut().remove(header::HOST);
    let end = routed.body.is_end_stream();
    let (response, send) = stream.sender.send_request(request, end).map_err(|_| Refusal::AppUnreachable)?;
    if !end {
        let body = Watched::new(routed.body, account.clone(), Way::Request);
        tokio::task::spawn_local(Pipe::new(body, send));
    }
    let response = response.await.map_err(|error| {
        tracing::debug!(%error, "the workload broke off");
        Refusal::AppBroke
    })?;
    exchange.hold(stream);
    let (mut parts, body) = response.into_parts();
    hygiene::response_of_app(&mut parts.headers);
    let body = Watched::new(Flow::of_http2(body), account, Way::GrpcResponse);
    Ok(Reply::Whole(Response::from_parts(parts, body)))
}

/// One attempt that failed, and whether another is safe.
struct Failed {
    refusal: Refusal,
    /// Nothing of the request was processed: any request may be tried again.
    unprocessed: bool,
}

/// Forwards an exchange of our workload to an instance of its target.
pub(crate) async fn to_mesh(worker: &Rc<Worker>, outgoing: &Rc<Outgoing>, sending: Sending) -> Result<Reply, Refusal> {
    if sending.lacks_token && !worker.shared.first_token(&sending.target, worker.now_ms()).await {
        return Err(Refusal::NoToken);
    }
    let timeout = match (&sending.rule, sending.kind) {
        (Some(rule), _) if rule.timeout.is_some() => rule.timeout,
        (_, Kind::Http) if sending.intent == Intent::Message => Some(ANSWER_TIMEOUT),
        _ => None,
    };
    match timeout {
        Some(timeout) => {
            let answered = tokio::time::timeout(timeout, attempts(worker, outgoing, sending)).await;
            answered.unwrap_or_else(|_| {
                if let Some(instance) = &*outgoing.instance.borrow() {
                    note_failure(worker, instance); // an instance that stalls is as ill as one that breaks off
                }
                Err(Refusal::TimedOut)
            })
        }
        None => attempts(worker, outgoing, sending).await,
    }
}

async fn attempts(worker: &Rc<Worker>, outgoing: &Rc<Outgoing>, mut sending: Sending) -> Result<Reply, Refusal> {
    let upstream = worker.balance.upstream(&sending.target, &worker.shared.endpoints.load());
    let retry = sending.rule.as_ref().and_then(|rule| rule.retry.as_ref());
    let (retries, percent) = retry.map_or((RETRIES, RETRY_BUDGET_PERCENT), |r| (r.attempts, r.budget_percent));
    // Idempotent requests (RFC 9110, 9.2.2) are tried again after they may have been processed only where a rule says so.
    let idempotent = retry.is_some() && sending.method.is_idempotent() && sending.kind == Kind::Http;
    upstream.deposit(percent);
    let mut tried = SmallVec::<[InstanceId; 2]>::new();
    loop {
        let now = Instant::now();
        let instance = upstream.pick(&tried, now).ok_or(Refusal::NoInstance)?;
        *outgoing.instance.borrow_mut() = Some(instance.clone());
        let failed = match attempt(worker, outgoing, &upstream, &instance, &mut sending, idempotent).await {
            Ok(reply) if reply.is_of_broken_app() => {
                note_failure(worker, &instance);
                return Ok(reply);
            }
            Ok(reply) => {
                instance.succeeded();
                return Ok(reply);
            }
            Err(failed) => failed,
        };
        note_failure(worker, &instance);
        let safe = failed.unprocessed || idempotent; // an attempt fails before any byte of its answer came
        if !safe || sending.sent() || tried.len() as u32 >= retries {
            return Err(failed.refusal);
        }
        if !upstream.withdraw() {
            worker.counts.retries_without_budget.add(1);
            return Err(failed.refusal);
        }
        worker.counts.retries.add(1);
        tried.push(instance.id.clone());
    }
}

fn note_failure(worker: &Worker, instance: &Instance) {
    if instance.failed(Instant::now()) {
        worker.counts.ejections.add(1);
        tracing::warn!(instance = %instance.id, "instance left out after failures in a row");
    }
}

/// A stream to `instance`, and the access token for `service` that goes with the certificate that its connection was opened with. When
/// that one was replaced more than once since, its tokens are gone: then a connection of the certificate of now is opened.
async fn with_token(
    worker: &Rc<Worker>,
    instance: &Rc<Instance>,
    service: &ServiceName,
) -> Result<(Stream, Option<HeaderValue>), Rc<ConnectError>> {
    for _ in 0..REPLACED_MEANWHILE_MAX {
        let stream = instance.pool.stream(|| connect_mesh(worker, instance)).await?;
        let token = stream.certificate.and_then(|own| worker.shared.token(&own, service));
        if token.is_some() || !worker.shared.holds_token(service, worker.now_ms()) {
            return Ok((stream, token));
        }
        instance.pool.rotate();
    }
    Err(Rc::new(ConnectError::Renewed))
}

async fn attempt(
    worker: &Rc<Worker>,
    outgoing: &Rc<Outgoing>,
    upstream: &Upstream,
    instance: &Rc<Instance>,
    sending: &mut Sending,
    idempotent: bool,
) -> Result<Reply, Failed> {
    let load = instance.load();
    let (mut stream, token) = with_token(worker, instance, &sending.target).await.map_err(|error| {
        tracing::debug!(instance = %instance.id, %error, "could not reach an instance");
        let refusal = match *error {
            ConnectError::CertificateRefused(_) => Refusal::CertificateRefused,
            _ => Refusal::Unreachable,
        };
        Failed { refusal, unprocessed: true }
    })?;
    let end = sending.intent == Intent::Message && sending.body.is_end_stream();
    let head = sending.head(&upstream.authority, token);
    let (response, send) = match stream.sender.send_request(head, end) {
        Ok(sent) => sent,
        Err(error) => {
            tracing::debug!(instance = %instance.id, %error, "could not send on a connection");
            if !end {
                sending.take_body(); // its head is gone
            }
            return Err(Failed { refusal: Refusal::Unreachable, unprocessed: true });
        }
    };
    let account = Account::Outbound(outgoing.clone());
    let mut kept = None; // the sending half of a tunnel
    let mut pipe = AbortOnDrop(None);
    if sending.intent != Intent::Message {
        kept = Some(send);
    } else if !end {
        let body = Watched::new(sending.take_body(), account.clone(), Way::Request);
        pipe.0 = Some(tokio::task::spawn_local(Pipe::new(body, send)).abort_handle());
    }
    let response = response.await.map_err(|error| {
        tracing::debug!(instance = %instance.id, %error, "an instance did not answer");
        // RFC 9113, section 8.7: REFUSED_STREAM, and streams above the last one of a GOAWAY, were not processed.
        let refused = error.is_remote() && error.reason() == Some(Reason::REFUSED_STREAM);
        let beyond = error.is_go_away() && error.is_remote() && error.reason() == Some(Reason::NO_ERROR);
        Failed { refusal: Refusal::UpstreamBroke, unprocessed: refused || beyond }
    })?;
    if let Some(refusal) = unprocessed(&response).filter(|_| !sending.sent()) {
        return Err(Failed { refusal, unprocessed: true });
    }
    if idempotent && !sending.sent() && says(&response, Refusal::AppBroke) {
        return Err(Failed { refusal: Refusal::AppBroke, unprocessed: false });
    }
    pipe.0 = None; // from here on the request's body ends by itself
    *outgoing.stream.borrow_mut() = Some((stream, load));
    let (mut parts, body) = response.into_parts();
    hygiene::response_of_mesh(&mut parts.headers);
    match kept {
        Some(send) if parts.status.is_success() => {
            let sort = if sending.intent == Intent::WebSocket { Sort::WebSocket } else { Sort::Opaque };
            let callee = Wire::http2(body, send);
            Ok(Reply::Tunnel { head: Response::from_parts(parts, ()), callee, account, sort })
        }
        _ => {
            let way = if sending.kind == Kind::Grpc { Way::GrpcResponse } else { Way::Response };
            let body = Watched::new(Flow::of_http2(body), account, way);
            Ok(Reply::Whole(Response::from_parts(parts, body)))
        }
    }
}

struct AbortOnDrop(Option<tokio::task::AbortHandle>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        if let Some(task) = &self.0 {
            task.abort();
        }
    }
}

impl Sending {
    /// Whether the body was handed over: then there is nothing to send a second time.
    fn sent(&self) -> bool {
        matches!(self.body, Flow::Sent)
    }

    fn take_body(&mut self) -> Flow {
        std::mem::replace(&mut self.body, Flow::Sent)
    }

    /// The head for the mesh. Headers are copied only when another attempt may need them.
    fn head(&mut self, authority: &Authority, token: Option<HeaderValue>) -> Request<()> {
        let mut request = Request::new(());
        *request.version_mut() = Version::HTTP_2;
        *request.method_mut() = if self.intent == Intent::Message { self.method.clone() } else { Method::CONNECT };
        let path = (self.intent != Intent::Tunnel).then(|| self.path_and_query.clone());
        *request.uri_mut() = uri(authority.clone(), path, Scheme::HTTPS);
        *request.headers_mut() =
            if self.body.is_end_stream() { self.headers.clone() } else { std::mem::take(&mut self.headers) };
        if let Some(token) = token {
            request.headers_mut().insert(hygiene::TOKEN, token);
        }
        if self.intent == Intent::WebSocket {
            request.headers_mut().remove(header::SEC_WEBSOCKET_KEY); // RFC 8441, section 5.1: of HTTP/1.1 alone
            request.extensions_mut().insert(ConnectProtocol::from_static("websocket"));
        }
        request
    }
}

fn uri(authority: Authority, path_and_query: Option<PathAndQuery>, scheme: Scheme) -> Uri {
    let mut parts = http::uri::Parts::default();
    parts.authority = Some(authority);
    parts.scheme = path_and_query.is_some().then_some(scheme); // CONNECT has neither (RFC 9113, section 8.5)
    parts.path_and_query = path_and_query;
    Uri::from_parts(parts).expect("INVARIANT: all of scheme, authority and path, or authority alone")
}
