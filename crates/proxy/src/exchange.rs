//! The story of one exchange, in both directions.
//!
//! ```text
//! from the mesh   admit -> route -> register -> authenticate -> authorize -> forward to the workload -> answer
//! to the mesh     admit -> route (rule, limits, target) -> forward to an instance -> answer
//! ```
//!
//! Every exit passes through one place per direction, where the outcome becomes an answer and is counted.

use std::{rc::Rc, sync::Arc, time::Instant};

use countersign_core::{
    identity::ServiceName,
    path::{Authority, NormalPath},
    service::{FirstContact, Protocol, Tokens},
};
use h2::ext::Protocol as ConnectProtocol;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header, uri::PathAndQuery};

use crate::{
    answer::{Refusal, answer, says},
    authenticate::{PresentedToken, authenticate},
    authorize::authorize,
    contact,
    counts::{Counts, Direction},
    decided::TraceId,
    flow::{Account, Flow, Watched},
    forward, hygiene,
    identify::Peer,
    live::{Asked, Exchange, Kind},
    pool::Outgoing,
    route::Rule,
    shared::Door,
    trace::{self, Trace},
    tunnel::{Sort, Wire},
    view::Compiled,
    workers::Worker,
};

/// What goes back to the caller.
pub(crate) enum Reply {
    /// A response.
    Whole(Response<Watched>),
    /// A response after whose head both sides exchange bytes.
    Tunnel { head: Response<()>, callee: Wire, account: Account, sort: Sort },
}

/// What a request is for, as its head says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Intent {
    /// A request and its response.
    Message,
    /// A WebSocket.
    WebSocket,
    /// A TCP connection.
    Tunnel,
}

/// A request from the mesh, for our workload, well-formed and for the right service.
///
/// Made only by [`route_inbound`]; the path judged is the path forwarded.
pub(crate) struct Routed {
    pub(crate) intent: Intent,
    pub(crate) protocol: Protocol,
    pub(crate) method: Method,
    pub(crate) path_and_query: PathAndQuery,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Flow,
    token: PresentedToken,
}

impl Routed {
    fn take_token(&mut self) -> PresentedToken {
        std::mem::replace(&mut self.token, PresentedToken::Nothing)
    }
}

/// An exchange from the mesh to our workload.
pub(crate) async fn inbound(worker: &Rc<Worker>, peer: &Rc<Peer>, request: Request<Flow>) -> Reply {
    let began = Instant::now();
    let kind = kind_of(request.headers());
    let probe = probe_of(worker, peer, request.headers());
    let trace = match probe {
        Some(nonce) => Trace::of_probe(nonce),
        None => Trace::of(request.headers(), worker.sampling()),
    };
    let admitted = admit(worker, |counts| &counts.inbound, 0);
    let routed = admitted.and_then(|view| route_inbound(worker, peer, view, trace, probe.is_some(), request));
    let (view, mut routed, asked) = match routed {
        Ok(routed) => routed,
        Err(refusal) => {
            worker.counts.inbound.started.add(1);
            worker.counts.inbound.open.add(1);
            worker.counts.inbound.end(refusal.row().status.as_u16(), 0, 0, 0);
            worker.tell_refused(&trace, kind, began, refusal.row().status.as_u16(), refusal.row().reason);
            return refused(worker, refusal, kind);
        }
    };
    let exchange = worker.live.register(worker, peer, asked, began); // before the first judgement
    if exchange.asked.is_probe {
        return probed(worker, &exchange, &view).await;
    }
    let outcome = async {
        let caller = authenticate(worker, &exchange, &view, routed.take_token())?;
        let permit = authorize(caller, &exchange, &view).await?;
        limit(worker, peer, &exchange, &view, &routed.headers)?;
        forward::to_app(worker, permit, routed).await
    };
    match outcome.await {
        Ok(reply) => {
            exchange.status.set(reply.status());
            reply
        }
        Err(refusal) => {
            exchange.status.set(refusal.row().status.as_u16());
            exchange.refusal.set(refusal.row().reason);
            refused(worker, refusal, kind)
        }
    }
}

/// An exchange from our workload into the mesh.
pub(crate) async fn outbound(worker: &Rc<Worker>, door: &Door, intent: Intent, request: Request<Flow>) -> Reply {
    let kind = kind_of(request.headers());
    let trace = Trace::of(request.headers(), worker.sampling());
    let outgoing = Outgoing::new(worker, trace, kind, request.method());
    let admitted = admit(worker, |counts| &counts.outbound, 1);
    let outcome = match admitted.and_then(|view| route_outbound(worker, &outgoing, &view, door, intent, request)) {
        Ok(sending) => forward::to_mesh(worker, &outgoing, sending).await,
        Err(refusal) => Err(refusal),
    };
    match outcome {
        Ok(reply) => {
            outgoing.status.set(reply.status());
            reply
        }
        Err(refusal) => {
            outgoing.status.set(refusal.row().status.as_u16());
            outgoing.refusal.set(refusal.row().reason);
            refused(worker, refusal, kind)
        }
    }
}

/// The nonce of an exchange of this sidecar with itself, which is used up. Of nobody else, whatever they send: neither another
/// instance of the service nor its workload, which may have its SVID, knows the nonce.
///
/// INVARIANT (probes-only-itself): made only for the nonce that the agent gave last, once, and for a peer with our own SPIFFE ID.
fn probe_of(worker: &Worker, peer: &Peer, headers: &HeaderMap) -> Option<TraceId> {
    if !worker.shared.expects_probe() {
        return None;
    }
    let given = headers.get(hygiene::PROBE)?.to_str().ok().filter(|given| given.len() == 32)?;
    let nonce = TraceId(u128::from_str_radix(given, 16).ok()?);
    let own = worker.shared.identity()?.svid().id() == peer.id();
    (own && worker.shared.spend_probe(nonce)).then_some(nonce)
}

/// A probe is judged and recorded as every exchange, and goes no further, whatever the answer.
async fn probed(worker: &Worker, exchange: &Rc<Exchange>, view: &Arc<Compiled>) -> Reply {
    let judged =
        async { authorize(authenticate(worker, exchange, view, PresentedToken::Nothing)?, exchange, view).await };
    let status = match judged.await {
        Ok(_permit) => StatusCode::NO_CONTENT,
        Err(refusal) => refusal.row().status,
    };
    exchange.status.set(status.as_u16());
    let mut response = Response::new(Watched::own(""));
    *response.status_mut() = status;
    Reply::Whole(response)
}

/// Holds a caller to the limits of the rule that its request matches here. A denied request takes nothing of them.
fn limit(
    worker: &Worker,
    peer: &Peer,
    exchange: &Exchange,
    view: &Compiled,
    headers: &HeaderMap,
) -> Result<(), Refusal> {
    let asked = &exchange.asked;
    let routes = view.routes.get(&view.view.service);
    if let Some(rule) = routes.and_then(|routes| routes.find(&asked.method, &asked.path, headers)) {
        *exchange.place.borrow_mut() = rule.enter_as(peer.id(), worker.steady_ns()).map_err(Refusal::of_limit)?;
    }
    Ok(())
}

fn refused(worker: &Worker, refusal: Refusal, kind: Kind) -> Reply {
    Reply::Whole(answer(worker, refusal, kind))
}

/// Whether anything may be judged or forwarded now. Fail closed: what cannot be judged by a fresh view is not served.
/// `counted`: how many of the open ones of this direction are the exchange itself.
fn admit(worker: &Worker, direction: fn(&Counts) -> &Direction, counted: u64) -> Result<Arc<Compiled>, Refusal> {
    let view = worker.view().ok_or(Refusal::NoView)?;
    let Some(spec) = &view.view.spec else { return Ok(view) }; // the law denies with its own reason
    if worker.shared.staleness().as_secs() >= u64::from(spec.max_staleness_seconds) {
        return Err(Refusal::Stale);
    }
    let open: u64 = worker.shared.counts.iter().map(|counts| direction(counts).open.get()).sum();
    if open >= u64::from(spec.exchanges_max) + counted {
        return Err(Refusal::Overloaded);
    }
    Ok(view)
}

/// Reads the head of a request from the mesh. What it says is judged and, unchanged, forwarded.
fn route_inbound(
    worker: &Worker,
    peer: &Peer,
    view: Arc<Compiled>,
    trace: Trace,
    is_probe: bool,
    request: Request<Flow>,
) -> Result<(Arc<Compiled>, Routed, Asked), Refusal> {
    let (parts, body) = request.into_parts();
    let service = &view.view.service;
    let host = agreed_authority(parts.uri.authority().map(|a| a.as_str()), &parts.headers)?;
    let own_host = worker.host_name(service);
    // Sidecars write it in its normal form, which needs no parsing.
    if *host != *own_host {
        let host = Authority::parse(host).map_err(|_| Refusal::Malformed("host"))?;
        if host.service().as_ref() != Some(service) {
            return Err(Refusal::WrongAuthority);
        }
    }
    let protocol = view.view.spec.as_ref().map_or(Protocol::Http, |spec| spec.protocol);
    let upgrade = parts.extensions.get::<ConnectProtocol>();
    let intent = match (&parts.method, upgrade) {
        (&Method::CONNECT, Some(upgrade)) if upgrade.as_str() == "websocket" => Intent::WebSocket,
        (&Method::CONNECT, None) => Intent::Tunnel,
        (&Method::CONNECT, Some(_)) => return Err(Refusal::WrongProtocol),
        _ => Intent::Message,
    };
    if (intent == Intent::Tunnel) != (protocol == Protocol::Tcp) && !is_probe {
        return Err(Refusal::WrongProtocol);
    }
    let (path, path_and_query) = match parts.uri.path_and_query().filter(|_| intent != Intent::Tunnel) {
        Some(raw) => normal(raw)?,
        None => ("/".into(), PathAndQuery::from_static("/")),
    };
    let mut headers = parts.headers;
    let size = size_of(&headers)?;
    let token = PresentedToken::take(&mut headers);
    hygiene::request(&mut headers);
    trace.write(&mut headers);
    // The handshake of a WebSocket is a GET (RFC 8441, section 5): that is what is judged.
    let method = if intent == Intent::WebSocket { Method::GET } else { parts.method };
    let kind = match protocol {
        Protocol::Http => Kind::Http,
        Protocol::Grpc => Kind::Grpc,
        Protocol::Tcp => Kind::Tcp,
    };
    let operation = view.law.operation(method.as_str(), &path);
    let unknown = match is_probe {
        false => worker.unknown_edge(peer.id(), operation.map(|name| &**name), method.as_str(), &path),
        true => None,
    };
    let inspects = view.view.spec.as_ref().is_some_and(|spec| spec.first_contact == FirstContact::Inspect);
    // What is refused here leaves the edge unknown: the next exchange is the first again.
    if inspects
        && unknown.is_some_and(|edge| worker.shared.edges.is_new(edge))
        && let Some(defect) = contact::defect(kind, &headers, size, !body.is_end_stream())
    {
        return Err(Refusal::FirstContact(defect));
    }
    let first_contact = unknown.is_some_and(|edge| worker.note_edge(edge));
    let asked = Asked { kind, method: method.clone(), path, host: own_host, size, first_contact, trace, is_probe };
    let routed = Routed { intent, protocol, method, path_and_query, headers, body, token };
    Ok((view, routed, asked))
}

/// A request of our workload with the way it takes.
pub(crate) struct Sending {
    pub(crate) intent: Intent,
    pub(crate) kind: Kind,
    pub(crate) target: ServiceName,
    /// It is declared, demands a token, and none is there.
    pub(crate) lacks_token: bool,
    pub(crate) rule: Option<Arc<Rule>>,
    pub(crate) method: Method,
    pub(crate) path_and_query: PathAndQuery,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Flow,
}

fn route_outbound(
    worker: &Worker,
    outgoing: &Outgoing,
    view: &Compiled,
    door: &Door,
    intent: Intent,
    request: Request<Flow>,
) -> Result<Sending, Refusal> {
    let (parts, body) = request.into_parts();
    let named = match door {
        Door::Upstream(service) => {
            agreed_authority(parts.uri.authority().map(|a| a.as_str()), &parts.headers)?;
            service.clone()
        }
        Door::ForwardProxy | Door::Inbound => {
            if parts.uri.scheme_str().is_some_and(|scheme| scheme != "http") {
                return Err(Refusal::Malformed("scheme"));
            }
            let host = agreed_authority(parts.uri.authority().map(|a| a.as_str()), &parts.headers)?;
            let host = Authority::parse(host).map_err(|_| Refusal::Malformed("host"))?;
            host.service().ok_or(Refusal::UnknownService)?
        }
    };
    outgoing.describe(|span| span.service = named.to_string());
    let visible = view.visible(&named).ok_or(Refusal::UnknownService)?;
    if (intent == Intent::Tunnel) != (visible.protocol == Protocol::Tcp) {
        return Err(Refusal::WrongProtocol);
    }
    let (path, path_and_query) = match parts.uri.path_and_query().filter(|_| intent != Intent::Tunnel) {
        Some(raw) => normal(raw)?,
        None => ("/".into(), PathAndQuery::from_static("/")),
    };
    outgoing.describe(|span| span.path = trace::shortened(&path));
    size_of(&parts.headers)?;
    // As at the callee: the handshake of a WebSocket is a GET, by whichever version of HTTP it came.
    let method = if intent == Intent::WebSocket { Method::GET } else { parts.method };
    let rule = view.routes.get(&named).and_then(|routes| routes.find(&method, &path, &parts.headers));
    if let Some(rule) = rule {
        *outgoing.place.borrow_mut() = rule.enter(worker.steady_ns()).map_err(Refusal::of_limit)?;
    }
    // Of what is declared a token is held; the callee says what it thinks of the rest.
    let is_declared = view.view.spec.as_ref().is_some_and(|spec| spec.upstreams.contains(&named));
    let target = rule.and_then(|rule| rule.pick(fastrand::u32(..))).cloned().unwrap_or(named);
    outgoing.describe(|span| span.service = target.to_string());
    let visible = view.visible(&target).ok_or(Refusal::UnknownService)?;
    if (intent == Intent::Tunnel) != (visible.protocol == Protocol::Tcp) {
        return Err(Refusal::WrongProtocol);
    }
    let kind = if visible.protocol == Protocol::Tcp { Kind::Tcp } else { kind_of(&parts.headers) };
    outgoing.describe(|span| {
        span.protocol = kind.as_str().into();
        span.method = method.to_string();
    });
    let lacks_token =
        is_declared && visible.tokens == Tokens::Required && !worker.shared.holds_token(&target, worker.now_ms());
    let mut headers = parts.headers;
    hygiene::request(&mut headers);
    headers.remove(header::HOST);
    outgoing.trace.write(&mut headers);
    Ok(Sending { intent, kind, target, lacks_token, rule: rule.cloned(), method, path_and_query, headers, body })
}

/// The host that the request line (or `:authority`) and `Host` agree on. RFC 9113, 8.3.1: they must not differ.
fn agreed_authority<'a>(target: Option<&'a str>, headers: &'a HeaderMap) -> Result<&'a str, Refusal> {
    let mut hosts = headers.get_all(header::HOST).iter();
    let host = hosts.next().map(|host| host.to_str().map_err(|_| Refusal::Malformed("host"))).transpose()?;
    if hosts.next().is_some() {
        return Err(Refusal::Malformed("host"));
    }
    match (target, host) {
        (Some(target), Some(host)) if !target.eq_ignore_ascii_case(host) => Err(Refusal::Malformed("host")),
        (Some(host), _) | (None, Some(host)) => Ok(host),
        (None, None) => Err(Refusal::Malformed("host")),
    }
}

/// The path in its one normal form, and what is forwarded for it.
fn normal(raw: &PathAndQuery) -> Result<(Arc<str>, PathAndQuery), Refusal> {
    let text = if raw.as_str() == "*" { return Err(Refusal::Malformed("path")) } else { raw.as_str() };
    let path = NormalPath::parse(text).map_err(|refused| Refusal::Malformed(refused.as_str()))?;
    let forwarded = match path.is_as_it_came() {
        true => raw.clone(),
        false => path.path_and_query().parse().map_err(|_| Refusal::Malformed("path"))?,
    };
    Ok((path.as_str().into(), forwarded))
}

/// The declared length of the body: one number, or none.
fn size_of(headers: &HeaderMap) -> Result<Option<u64>, Refusal> {
    let mut lengths = headers.get_all(header::CONTENT_LENGTH).iter();
    let Some(length) = lengths.next() else { return Ok(None) };
    let digits = length.as_bytes();
    let number = std::str::from_utf8(digits).ok().filter(|_| digits.iter().all(u8::is_ascii_digit));
    match (number.and_then(|number| number.parse().ok()), lengths.next()) {
        (Some(length), None) => Ok(Some(length)),
        _ => Err(Refusal::Malformed("content-length")),
    }
}

fn kind_of(headers: &HeaderMap) -> Kind {
    let grpc = |value: &HeaderValue| value.as_bytes().starts_with(b"application/grpc");
    if headers.get(header::CONTENT_TYPE).is_some_and(grpc) { Kind::Grpc } else { Kind::Http }
}

impl Reply {
    /// Whether the callee's sidecar says that its workload broke off.
    pub(crate) fn is_of_broken_app(&self) -> bool {
        matches!(self, Self::Whole(response) if says(response, Refusal::AppBroke))
    }

    fn status(&self) -> u16 {
        match self {
            Self::Whole(response) => response.status().as_u16(),
            Self::Tunnel { head, .. } => head.status().as_u16(),
        }
    }
}
