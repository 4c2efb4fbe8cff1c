//! The listener for agents: TLS 1.3 where a client certificate is optional, because a newcomer has none. Such a
//! connection reaches [`Enrolment`] and nothing else; everything of [`mesh::mesh_server::Mesh`] demands the verified SVID of an agent.
//!
//! What an agent may ask for follows from its SVID alone: it speaks for its own host.

use std::{
    convert::Infallible,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::{Buf, BufMut, Bytes};
use futures_util::{StreamExt, stream};
use prost::Message;
use rustls_pki_types::{CertificateDer, UnixTime};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::{Semaphore, mpsc, watch},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Request, Response, Status, Streaming,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
    server::{Grpc, NamedService, StreamingService},
    transport::server::Connected,
};

use countersign_api::{
    local::IdentityFilter,
    mesh::{self, follow_event::Event, follow_request::Message as Said},
    signals,
    svid::{Bundle, ClientCertificate, PeerSide, TlsIdentity, VerifiedPeer, verify_peer},
};
use countersign_core::{
    change::Revision,
    identity::{InstanceId, ServiceName},
    jwt_svid,
    signal::{Serial, statement::Subject},
};

use crate::{
    Plane,
    audit::{self, Identity},
    authority::{AuthorityError, SigningRequest, jwt_key::SignedJwtSvid},
    decisions::Taken,
    enrol::Enrolment,
    ledger::{Ledger, PAGE_ENTRIES},
    publish::Joined,
    registry,
    signals::{Noticed, notice},
    store::StoreError,
    tokens::{self, Leaf},
};

/// Handshakes that are under way at the same time at most.
const HANDSHAKES_MAX: usize = 256;
/// How long a handshake may take.
const HANDSHAKE_WITHIN: Duration = Duration::from_secs(10);
/// How long a connection without an SVID may stay: it enrols or it goes.
const STRANGER_STAYS: Duration = Duration::from_secs(30);
/// Connections without an SVID at the same time at most.
const STRANGERS_MAX: usize = 256;
/// How long an agent may take to say hello on a new stream.
const HELLO_WITHIN: Duration = Duration::from_secs(10);
/// Longest message an agent can send, in bytes.
const MESSAGE_BYTES_MAX: usize = 4 * 1024 * 1024;

/// Serves agents until `stop` says so.
pub async fn serve(
    plane: Arc<Plane>,
    listener: TcpListener,
    identity: Arc<TlsIdentity>,
    mut stop: watch::Receiver<bool>,
) {
    let (accepted, incoming) = mpsc::channel(HANDSHAKES_MAX);
    let accepting = tokio::spawn(accept(listener, identity, accepted));
    let service = Agents(plane.clone());
    let done = tonic::transport::Server::builder()
        .http2_keepalive_interval(Some(Duration::from_secs(5)))
        .http2_keepalive_timeout(Some(Duration::from_secs(5)))
        .http2_max_header_list_size(16 * 1024)
        .http2_max_pending_accept_reset_streams(Some(20))
        .max_concurrent_streams(64)
        .initial_stream_window_size(1024 * 1024)
        .initial_connection_window_size(4 * 1024 * 1024)
        .add_service(MeshDoor { follow: service.clone(), rest: mesh::mesh_server::MeshServer::new(service) })
        .add_service(mesh::enrolment_server::EnrolmentServer::new(Enrolment(plane)))
        .serve_with_incoming_shutdown(ReceiverStream::new(incoming).map(Ok::<_, Infallible>), async move {
            // The sender lives as long as the control plane; its end means the same.
            let _ = stop.wait_for(|stop| *stop).await;
        })
        .await;
    accepting.abort();
    if let Err(error) = done {
        tracing::error!(%error, "the listener for agents ended");
    }
}

async fn accept(listener: TcpListener, identity: Arc<TlsIdentity>, accepted: mpsc::Sender<Connection>) {
    let acceptor = TlsAcceptor::from(identity.server_config(ClientCertificate::Optional, &[b"h2"]));
    let handshakes = Arc::new(Semaphore::new(HANDSHAKES_MAX));
    let strangers = Arc::new(Semaphore::new(STRANGERS_MAX));
    loop {
        let Ok(permit) = handshakes.clone().acquire_owned().await else { return };
        let (stream, origin) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of descriptors, or the client left already: neither is a reason to spin.
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let (acceptor, accepted, strangers) = (acceptor.clone(), accepted.clone(), strangers.clone());
        // From before the handshake: it is looked at again if this one is not in force any more.
        let bundle = identity.bundle();
        tokio::spawn(async move {
            let _ = stream.set_nodelay(true);
            let handshake = tokio::time::timeout(HANDSHAKE_WITHIN, acceptor.accept(stream)).await;
            drop(permit);
            let stream = match handshake {
                Ok(Ok(stream)) => stream,
                Ok(Err(error)) => return tracing::info!(%origin, %error, "a handshake was refused"),
                Err(_) => return tracing::info!(%origin, "a handshake took too long"),
            };
            let peer = VerifiedPeer::of_connection(stream.get_ref().1).map(|verified| {
                let chain = stream.get_ref().1.peer_certificates().unwrap_or_default().to_vec();
                Arc::new(Proven::new(verified, chain, bundle))
            });
            let leaves = match &peer {
                Some(_) => None,
                None => match strangers.try_acquire_owned() {
                    Ok(permit) => Some((Box::pin(tokio::time::sleep(STRANGER_STAYS)), permit)),
                    Err(_) => return tracing::info!(%origin, "too many connections without an SVID"),
                },
            };
            // The server is gone when nobody takes it.
            let _ = accepted.send(Connection { stream, peer, leaves }).await;
        });
    }
}

/// One TLS connection with who is at its other end.
struct Connection {
    stream: TlsStream<TcpStream>,
    peer: Option<Arc<Proven>>,
    leaves: Option<(Pin<Box<tokio::time::Sleep>>, tokio::sync::OwnedSemaphorePermit)>,
}

/// Who is at the other end of the connection that a request came on.
#[derive(Clone)]
struct Peer(Option<Arc<Proven>>);

/// By what the other end proved who it is.
pub(crate) struct Proven {
    verified: VerifiedPeer,
    chain: Vec<CertificateDer<'static>>,
    /// What verified it.
    bundle: Arc<Bundle>,
}

impl Proven {
    /// What a handshake proved by `bundle`.
    pub(crate) fn new(verified: VerifiedPeer, chain: Vec<CertificateDer<'static>>, bundle: Arc<Bundle>) -> Self {
        Self { verified, chain, bundle }
    }

    /// Who.
    pub(crate) fn verified(&self) -> &VerifiedPeer {
        &self.verified
    }

    /// Why it proves nothing any more: a connection outlives the handshake that verified it.
    pub(crate) fn refused(&self, plane: &Plane) -> Option<&'static str> {
        if u64::try_from(self.verified.not_after()).unwrap_or(0) * 1000 < plane.clock.now_ms() {
            return Some("the SVID of this connection has expired; connect again with a new one");
        }
        if self.verified.serial().is_some_and(|serial| plane.publisher.is_revoked(&serial)) {
            return Some("the SVID of this connection is revoked; the host has to be invited again");
        }
        let lost = "the SVID of this connection rests on a root that is revoked; connect again with a new one";
        (!self.holds(plane)).then_some(lost)
    }

    /// Whether it is proven by what is trusted now.
    fn holds(&self, plane: &Plane) -> bool {
        let Some(identity) = plane.identity.borrow().clone() else { return false };
        let trusted = identity.bundle();
        let now = UnixTime::since_unix_epoch(Duration::from_millis(plane.clock.now_ms()));
        Arc::ptr_eq(&trusted, &self.bundle) || verify_peer(&self.chain, &trusted, now, PeerSide::Client).is_ok()
    }

    /// Returns once it is not.
    async fn lost(&self, plane: &Plane) {
        let mut trusted = plane.trusted.subscribe();
        while self.holds(plane) {
            // It cannot fail: the sender lies in `plane`.
            let _ = trusted.changed().await;
        }
    }
}

impl Connected for Connection {
    type ConnectInfo = Peer;
    fn connect_info(&self) -> Peer {
        Peer(self.peer.clone())
    }
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<std::io::Result<()>> {
        if let Some((leaves, _)) = &mut self.leaves
            && leaves.as_mut().poll(cx).is_ready()
        {
            return Poll::Ready(Err(std::io::ErrorKind::TimedOut.into()));
        }
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[derive(Clone)]
struct Agents(Arc<Plane>);

impl Agents {
    /// The host whose agent sent this request.
    ///
    /// INVARIANT (agent-speaks-for-its-host): every request of the mesh service passes here, and what it may touch is
    /// decided by the host this returns.
    fn host_of<T>(&self, request: &Request<T>) -> Result<ServiceName, Status> {
        let peer = request.extensions().get::<Peer>().and_then(|peer| peer.0.clone());
        let refuse = |what: &str| {
            self.0.metrics.refused("peer");
            Status::unauthenticated(what)
        };
        let proven = peer.ok_or_else(|| refuse("show the agent's SVID; without one a host can only join"))?;
        let peer = &proven.verified;
        if let Some(why) = proven.refused(&self.0) {
            return Err(refuse(why));
        }
        peer.id().agent_host().ok_or_else(|| {
            self.0.metrics.refused("peer");
            Status::permission_denied(format!("`{}` is not an agent", peer.id()))
        })
    }

    fn refuse(&self, status: Status) -> Status {
        self.0.metrics.refused("issue");
        status
    }

    /// The instance called `instance`, if `host` may have identities of it issued: its service is declared, what it runs is
    /// admitted, and it is this host's.
    fn entitled(&self, host: &ServiceName, instance: &str, artifact: &[u8]) -> Result<InstanceId, Status> {
        let plane = &self.0;
        let instance = InstanceId::parse(instance).map_err(|e| self.refuse(Status::invalid_argument(e.to_string())))?;
        let service = instance.service();
        let head = plane.ledger.head();
        let state = head.follower.state();
        if !state.services.contains_key(&service) {
            let what = format!("service `{service}` is not declared in this mesh; declare it in mesh.toml and apply");
            return Err(self.refuse(Status::permission_denied(what)));
        }
        let artifact =
            registry::artifact(artifact).map_err(|e| self.refuse(Status::invalid_argument(e.to_string())))?;
        if !registry::is_admitted(&state.deployments, &instance, artifact) {
            let what = match artifact {
                Some(artifact) => format!("artifact {artifact} is no deployment of service `{service}`"),
                None => format!("service `{service}` has deployments, and the agent did not say what it runs"),
            };
            return Err(self.refuse(Status::permission_denied(what)));
        }
        plane
            .publisher
            .registry(|registry| registry.issuing(host, &instance))
            .map_err(|e| self.refuse(Status::permission_denied(e.to_string())))?;
        Ok(instance)
    }

    async fn follow(&self, request: Request<Streaming<mesh::FollowRequest>>) -> Result<Response<EventStream>, Status> {
        let host = self.host_of(&request)?;
        let proven = request.extensions().get::<Peer>().and_then(|peer| peer.0.clone());
        let proven = proven.ok_or_else(|| Status::unauthenticated("show the agent's SVID"))?;
        let (expires_at_ms, serial) = (expiry_of(&request), serial_of(&request));
        let mut said = request.into_inner();
        let first = tokio::time::timeout(HELLO_WITHIN, said.message())
            .await
            .map_err(|_| Status::deadline_exceeded("no hello came"))??;
        let Some(mesh::FollowRequest { message: Some(Said::Hello(hello)) }) = first else {
            return Err(Status::invalid_argument("the first message of a stream is a hello"));
        };
        if hello.host != host.as_str() {
            return Err(Status::permission_denied(format!(
                "this SVID speaks for host `{host}`, not for `{}`",
                hello.host
            )));
        }
        let plane = self.0.clone();
        // It may come from another control plane of this store, and know what that one wrote a moment ago.
        if plane.ledger.root_at(Revision(hello.revision)).is_none()
            && let Err(error) = plane.ledger.catch_up().await
        {
            return Err(Status::unavailable(format!("the ledger cannot be read: {error}")));
        }
        same_history(&plane, &hello).inspect_err(|refused| {
            plane.publisher.registry(|registry| registry.refuse(&host, refused.message()));
        })?;
        let joined = plane.publisher.join(&hello, &host, serial, plane.clock.now_ms());
        // Revoked between the first look and the place in the broadcast: nobody would cut it any more.
        if serial.is_some_and(|serial| plane.publisher.is_revoked(&serial)) {
            plane.publisher.leave(&host, joined.number, plane.clock.now_ms());
            return Err(Status::unauthenticated("the SVID of this connection is revoked"));
        }
        let number = joined.number;
        let leaving = Leaving { plane: plane.clone(), host: host.clone(), number };
        let cut = joined.cut.clone();
        note_host(&plane, &joined);
        let (welcome, events) = match welcome(&plane.ledger, hello.revision, joined).await {
            Ok(welcome) => welcome,
            Err(error) => return Err(Status::unavailable(format!("the ledger cannot be read: {error}"))),
        };
        tracing::info!(host = %host, revision = hello.revision, version = hello.version, "agent follows");
        let expires_in = Duration::from_millis(expires_at_ms.saturating_sub(plane.clock.now_ms()));
        tokio::spawn(async move {
            tokio::select! {
                () = hear(said, &leaving) => {}
                () = cut.cancelled() => {}
                // Its root is revoked.
                () = proven.lost(&leaving.plane) => {}
                // What the handshake proved holds no longer than the SVID; by then the agent has a new one.
                () = tokio::time::sleep(expires_in) => {}
            }
        });
        let events = ReceiverStream::new(events).map(Ok);
        // The queue closes only when the agent did not keep up, when another stream of its host took over, or at the end.
        let cut =
            stream::once(async { Err(Status::aborted("this stream is cut off; follow again from what is held")) });
        Ok(Response::new(Box::pin(stream::iter(welcome).map(Ok).chain(events).chain(cut))))
    }
}

type EventStream = Pin<Box<dyn futures_util::Stream<Item = Result<Bytes, Status>> + Send>>;

/// Ends an agent's stream in the registry, however it ends.
struct Leaving {
    plane: Arc<Plane>,
    host: ServiceName,
    number: u64,
}

impl Drop for Leaving {
    fn drop(&mut self) {
        self.plane.publisher.leave(&self.host, self.number, self.plane.clock.now_ms());
        tracing::info!(host = %self.host, "agent left");
    }
}

/// When the SVID of the connection expires, in milliseconds since 1970.
fn expiry_of<T>(request: &Request<T>) -> u64 {
    let peer = request.extensions().get::<Peer>().and_then(|peer| peer.0.clone());
    peer.map_or(0, |peer| u64::try_from(peer.verified.not_after()).unwrap_or(0) * 1000)
}

fn serial_of<T>(request: &Request<T>) -> Option<Serial> {
    request.extensions().get::<Peer>()?.0.as_ref()?.verified.serial()
}

/// Whether what the agent holds is a beginning of our ledger.
fn same_history(plane: &Plane, hello: &mesh::FollowHello) -> Result<(), Status> {
    if hello.revision == 0 {
        return Ok(());
    }
    let held = Revision(hello.revision);
    let ours = plane.ledger.root_at(held);
    if ours.is_some_and(|root| root.0[..] == hello.root[..]) {
        return Ok(());
    }
    plane.metrics.refused("history");
    let own = plane.ledger.head().follower.revision();
    tracing::error!(
        host = hello.host,
        revision = hello.revision,
        own_revision = own.0,
        "an agent holds another history than this ledger: either was rolled back or forged"
    );
    Err(Status::failed_precondition(match ours {
        None => format!(
            "the agent holds revision {held}, this ledger ends at {own}: it was rolled back or is another mesh's"
        ),
        Some(_) => format!("the agent holds another history up to revision {held} than this ledger"),
    }))
}

/// The encoded events that bring an agent up to where its queue begins.
async fn welcome(
    ledger: &Ledger,
    held: u64,
    joined: Joined,
) -> Result<(Vec<Bytes>, mpsc::Receiver<Bytes>), StoreError> {
    let follower = &joined.head.follower;
    let size = follower.revision().0;
    let nothing_new = || mesh::Entries {
        first_index: size,
        size,
        root: Bytes::copy_from_slice(&follower.root().0),
        ..mesh::Entries::default()
    };
    let mut pages = Vec::new();
    let mut snapshot = None;
    // From the anchor on nobody has to take our word for the operators: a cold agent folds all entries itself.
    if held == 0 && !follower.state().is_protected() {
        snapshot = follower.snapshot().map(|snapshot| mesh::Snapshot {
            revision: snapshot.revision.0,
            state_json: snapshot.state.into(),
            bodies: snapshot.bodies.iter().map(|(_, text)| text.to_string()).collect(),
            frontier: snapshot.frontier.into_iter().map(Bytes::from).collect(),
            last_entry: snapshot.last_entry.into(),
            keyring_json: Bytes::new(),
        });
    } else {
        let mut from = held;
        while from < size {
            let page = ledger.entries(from, size.min(from + u64::from(PAGE_ENTRIES))).await?;
            from = page.size;
            pages.push(page);
        }
    }
    let signals = signals::all(&joined.signals);
    let (discovery_sequence, signal_sequence) = (joined.discovery.sequence, signals.sequence);
    let head = mesh::Head { size, discovery_sequence, signal_sequence };
    let mut pages = pages.into_iter();
    let welcome = mesh::Welcome {
        head: Some(head),
        snapshot,
        entries: Some(pages.next().unwrap_or_else(nothing_new)),
        discovery: Some(joined.discovery),
        bundle: joined.bundle,
        signals: Some(signals),
    };
    let events = [Event::Welcome(welcome)].into_iter().chain(pages.map(Event::Entries));
    let encoded = events.map(|event| mesh::FollowEvent { event: Some(event) }.encode_to_vec().into()).collect();
    Ok((encoded, joined.events))
}

/// Writes the host down; the stream does not wait for it.
fn note_host(plane: &Arc<Plane>, joined: &Joined) {
    let (storage, host) = (plane.storage.clone(), joined.host.clone());
    tokio::spawn(async move {
        if let Err(error) = storage.run("put_host", move |store| store.put_host(&host)).await {
            tracing::warn!(%error, "a host could not be written down");
        }
    });
}

/// Hears what an agent says until it leaves.
async fn hear(mut said: Streaming<mesh::FollowRequest>, leaving: &Leaving) {
    let Leaving { plane, host, .. } = leaving;
    loop {
        let message = match said.message().await {
            Ok(Some(mesh::FollowRequest { message: Some(message) })) => message,
            Ok(Some(_)) => continue, // a kind of message that a later version knows
            Ok(None) | Err(_) => return,
        };
        let message = match message {
            Said::Report(report) => {
                let (authority, now_ms) = (plane.authority(), plane.clock.now_ms());
                let own = authority.as_ref().map(|authority| authority.trust_domain());
                let Taken { probes, thefts, trying } = plane.decisions.take(report, own, now_ms);
                for (authority, record) in authority.iter().flat_map(|one| probes.iter().map(move |p| (one, p))) {
                    plane.telemetry.hear_record(authority.trust_domain(), host, record, now_ms);
                }
                for workload in trying {
                    let plane = plane.clone();
                    let subject = Subject::Workload(workload);
                    tokio::spawn(async move { notice(&plane, subject, Noticed::ManyDenials).await });
                }
                for theft in thefts {
                    let plane = plane.clone();
                    tokio::spawn(async move { tokens::answer_theft(&plane, theft).await });
                }
                continue;
            }
            Said::Probed(probed) => {
                if let Some(authority) = plane.authority() {
                    plane.telemetry.hear_probed(authority.trust_domain(), host, &probed, plane.clock.now_ms());
                }
                continue;
            }
            message => message,
        };
        if let Err(refused) = plane.publisher.hear(host, message, plane.clock.now_ms()) {
            plane.metrics.refused("message");
            tracing::warn!(host = %host, %refused, "what an agent said is not taken");
        }
    }
}

#[tonic::async_trait]
impl mesh::mesh_server::Mesh for Agents {
    type FollowStream = Pin<Box<dyn futures_util::Stream<Item = Result<mesh::FollowEvent, Status>> + Send>>;

    async fn follow(&self, _: Request<Streaming<mesh::FollowRequest>>) -> Result<Response<Self::FollowStream>, Status> {
        // Follow is answered by `MeshDoor`, which sends bytes that were encoded once for all.
        Err(Status::internal("follow is answered elsewhere"))
    }

    async fn read_head(&self, request: Request<mesh::ReadHeadRequest>) -> Result<Response<mesh::Head>, Status> {
        let host = self.host_of(&request)?;
        let roots = request.into_inner().x509_authorities_sha256;
        self.0.publisher.registry(|registry| registry.holds(&host, &roots));
        Ok(Response::new(self.0.publisher.head()))
    }

    async fn issue_x509_svid(
        &self,
        request: Request<mesh::IssueX509SvidRequest>,
    ) -> Result<Response<mesh::IssueX509SvidResponse>, Status> {
        let host = self.host_of(&request)?;
        let asked = request.into_inner();
        let plane = &self.0;
        let instance = self.entitled(&host, &asked.instance, &asked.artifact)?;
        let signing_request = SigningRequest::parse(&asked.csr_der).map_err(|e| self.refuse(refused(&e)))?;
        let authority = plane.authority().ok_or_else(|| Status::unavailable("there is no mesh yet"))?;
        let issued = authority.issue_workload(&host, &instance, &signing_request).await.map_err(|e| refused(&e))?;
        plane.publisher.registry(|registry| registry.issued(&host, &instance, issued.expires_at_ms));
        plane.metrics.issued("workload");
        tracing::info!(instance = %instance, host = %host, expires_at_ms = issued.expires_at_ms, "svid issued");
        plane.tell(audit::Event::Issued {
            what: Identity::Workload,
            name: instance.to_string(),
            host: host.to_string(),
            expires_at_ms: issued.expires_at_ms,
        });
        Ok(Response::new(authority.to_message(issued)))
    }

    async fn issue_jwt_svid(
        &self,
        request: Request<mesh::IssueJwtSvidRequest>,
    ) -> Result<Response<mesh::IssueJwtSvidResponse>, Status> {
        let host = self.host_of(&request)?;
        let asked = request.into_inner();
        let instance = self.entitled(&host, &asked.instance, &asked.artifact)?;
        if !jwt_svid::are_audiences(&asked.audience) {
            let what = "a JWT-SVID is for 1 to 8 audiences of at most 512 bytes";
            return Err(self.refuse(Status::invalid_argument(what)));
        }
        let authority = self.0.authority().ok_or_else(|| Status::unavailable("there is no mesh yet"))?;
        let signed = authority.issue_jwt(&instance, &asked.audience);
        self.0.metrics.issued("jwt");
        let audience = asked.audience.join(" ");
        tracing::info!(instance = %instance, host = %host, audience, expires_at_ms = signed.expires_at_ms, "jwt-svid issued");
        let SignedJwtSvid { token, issued_at_ms, expires_at_ms } = signed;
        self.0.tell(audit::Event::Issued {
            what: Identity::Jwt,
            name: instance.to_string(),
            host: host.to_string(),
            expires_at_ms,
        });
        Ok(Response::new(mesh::IssueJwtSvidResponse { token, issued_at_ms, expires_at_ms }))
    }

    async fn probe_telemetry(
        &self,
        request: Request<mesh::ProbeTelemetryRequest>,
    ) -> Result<Response<mesh::ProbeTelemetryResponse>, Status> {
        let host = self.host_of(&request)?;
        let plane = &self.0;
        let instance = request.into_inner().instance;
        let instance =
            InstanceId::parse(&instance).map_err(|e| self.refuse(Status::invalid_argument(e.to_string())))?;
        if !plane.publisher.registry(|registry| registry.runs(&host, &instance)) {
            return Err(Status::failed_precondition(format!("`{instance}` is not announced by host `{host}`")));
        }
        let mut nonce = [0; 16];
        aws_lc_rs::rand::fill(&mut nonce).expect("INVARIANT: the system's random source does not fail");
        let nonce = plane.telemetry.begin(&host, &instance, nonce, plane.clock.now_ms())?;
        Ok(Response::new(mesh::ProbeTelemetryResponse { nonce }))
    }

    async fn issue_tokens(
        &self,
        request: Request<mesh::IssueTokensRequest>,
    ) -> Result<Response<mesh::IssueTokensResponse>, Status> {
        let host = self.host_of(&request)?;
        let asked = request.into_inner();
        let plane = &self.0;
        let instance = self.entitled(&host, &asked.instance, &asked.artifact)?;
        let leaf = self.leaf_of(&host, &instance, &asked.leaf_der).await?;
        let authority = plane.authority().ok_or_else(|| Status::unavailable("there is no mesh yet"))?;
        let issued = tokens::issue(plane, &authority, &host, &instance, &leaf).await;
        let tokens = issued.map_err(|error| {
            tracing::error!(%error, "access tokens could not be written down");
            Status::unavailable("the tokens could not be written down")
        })?;
        tracing::debug!(instance = %instance, host = %host, count = tokens.len(), "access tokens issued");
        Ok(Response::new(mesh::IssueTokensResponse { tokens }))
    }

    async fn renew_agent(
        &self,
        request: Request<mesh::RenewAgentRequest>,
    ) -> Result<Response<mesh::IssueX509SvidResponse>, Status> {
        let host = self.host_of(&request)?;
        let signing_request = SigningRequest::parse(&request.into_inner().csr_der).map_err(|e| refused(&e))?;
        let authority = self.0.authority().ok_or_else(|| Status::unavailable("there is no mesh yet"))?;
        let issued = authority.issue_agent(&host, &signing_request).await.map_err(|e| refused(&e))?;
        self.0.metrics.issued("agent");
        let (name, expires_at_ms) = (host.to_string(), issued.expires_at_ms);
        self.0.tell(audit::Event::Issued { what: Identity::Agent, name: name.clone(), host: name, expires_at_ms });
        Ok(Response::new(authority.to_message(issued)))
    }
}

impl Agents {
    /// The certificate that tokens are to be bound to, if it is one that was issued for this very instance and is still good.
    async fn leaf_of(&self, host: &ServiceName, instance: &InstanceId, der: &[u8]) -> Result<Leaf, Status> {
        let no = |what: &str| self.refuse(Status::permission_denied(what.to_owned()));
        let Some((serial, key, leaf)) = Leaf::read(der) else { return Err(no("the certificate cannot be read")) };
        let (filter, now_ms) = (IdentityFilter { serial: Some(serial), ..Default::default() }, self.0.clock.now_ms());
        let found = self.0.storage.run("serials", move |store| store.serials(&filter, now_ms, 1)).await;
        let found = found.map_err(|_| Status::unavailable("the store does not answer"))?.into_iter().next();
        let is_its_own = found.is_some_and(|issued| {
            issued.instance.as_ref() == Some(instance) && issued.host.as_ref() == Some(host) && issued.key == Some(key)
        });
        if !is_its_own {
            return Err(no("the certificate was not issued for this instance, or has expired"));
        }
        if self.0.publisher.is_revoked(&serial) {
            return Err(no("the certificate is revoked"));
        }
        Ok(leaf)
    }
}

fn refused(error: &AuthorityError) -> Status {
    match error {
        AuthorityError::Request(_) => Status::invalid_argument(error.to_string()),
        _ => {
            tracing::error!(%error, "an SVID could not be signed");
            Status::unavailable("the SVID could not be signed")
        }
    }
}

/// The mesh service, with one difference to the generated one: `Follow` sends events that are encoded already.
#[derive(Clone)]
struct MeshDoor {
    follow: Agents,
    rest: mesh::mesh_server::MeshServer<Agents>,
}

impl NamedService for MeshDoor {
    const NAME: &'static str = <mesh::mesh_server::MeshServer<Agents> as NamedService>::NAME;
}

impl tower::Service<http::Request<tonic::body::Body>> for MeshDoor {
    type Response = http::Response<tonic::body::Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<tonic::body::Body>) -> Self::Future {
        if request.uri().path() != "/countersign.v1.Mesh/Follow" {
            return tower::Service::call(&mut self.rest, request);
        }
        let follow = Follow(self.follow.clone());
        Box::pin(async move {
            let mut grpc = Grpc::new(EncodedEvents).max_decoding_message_size(MESSAGE_BYTES_MAX);
            Ok(grpc.streaming(follow, request).await)
        })
    }
}

struct Follow(Agents);

impl StreamingService<mesh::FollowRequest> for Follow {
    type Response = Bytes;
    type ResponseStream = EventStream;
    type Future = Pin<Box<dyn Future<Output = Result<Response<EventStream>, Status>> + Send>>;

    fn call(&mut self, request: Request<Streaming<mesh::FollowRequest>>) -> Self::Future {
        let agents = self.0.clone();
        Box::pin(async move { agents.follow(request).await })
    }
}

/// Sends bytes as they are; reads [`mesh::FollowRequest`]s.
#[derive(Clone, Copy)]
struct EncodedEvents;

impl Codec for EncodedEvents {
    type Encode = Bytes;
    type Decode = mesh::FollowRequest;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        *self
    }
    fn decoder(&mut self) -> Self {
        *self
    }
}

impl Encoder for EncodedEvents {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, event: Bytes, to: &mut EncodeBuf<'_>) -> Result<(), Status> {
        to.put(event);
        Ok(())
    }
}

impl Decoder for EncodedEvents {
    type Item = mesh::FollowRequest;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<mesh::FollowRequest>, Status> {
        let message = from.copy_to_bytes(from.remaining());
        mesh::FollowRequest::decode(message).map(Some).map_err(|e| Status::invalid_argument(e.to_string()))
    }
}

#[cfg(test)]
mod tests {
    //! Publish and acknowledge while streams break, events are lost and acknowledgements overtake each other: one
    //! schedule for each seed, the same every time.

    use std::collections::VecDeque;

    use countersign_api::local::Apply;
    use countersign_core::{
        canonical::Digest,
        change::{Bodies, Change, ChangeSet},
        identity::TrustDomain,
        ledger::{Batch, Follower, Snapshot},
        service::{Protocol, ServiceSpec},
    };

    use super::*;
    use crate::{
        authority::seal::Sealer,
        clock::Clock,
        gate::Gate,
        metrics::StoreLatency,
        publish::Publisher,
        registry::Registry,
        store::{Storage, sqlite::SqliteStore},
    };

    struct Agent {
        host: ServiceName,
        instance: String,
        held: Follower,
        stream: Option<(u64, VecDeque<Bytes>, mpsc::Receiver<Bytes>)>,
        /// Said, and on its way.
        said: Vec<mesh::Acknowledgement>,
    }

    struct Simulation {
        ledger: Arc<Ledger>,
        publisher: Arc<Publisher>,
        gate: Gate,
        agents: Vec<Agent>,
        chance: fastrand::Rng,
    }

    fn bodies_of(texts: &[String]) -> Bodies {
        let mut bodies = Bodies::default();
        for text in texts {
            bodies.insert(text.clone());
        }
        bodies
    }

    impl Agent {
        fn take(&mut self, event: &Bytes) {
            match mesh::FollowEvent::decode(event.clone()).unwrap().event.unwrap() {
                Event::Welcome(welcome) => {
                    if let Some(snapshot) = welcome.snapshot {
                        self.held = Follower::from_snapshot(&Snapshot {
                            revision: Revision(snapshot.revision),
                            state: snapshot.state_json.to_vec(),
                            frontier: snapshot.frontier.iter().map(|part| part.to_vec()).collect(),
                            last_entry: snapshot.last_entry.to_vec(),
                            bodies: bodies_of(&snapshot.bodies),
                        })
                        .unwrap();
                    }
                    self.extend(&welcome.entries.unwrap());
                }
                Event::Entries(entries) => self.extend(&entries),
                _ => {}
            }
        }

        fn extend(&mut self, entries: &mesh::Entries) {
            let batch = Batch {
                first_index: entries.first_index,
                entries: &entries.entries,
                change_sets: &entries.change_sets,
                bodies: &bodies_of(&entries.bodies),
                size: entries.size,
                root: Digest(entries.root[..].try_into().unwrap()),
            };
            self.held.extend(&batch).expect("an open stream has no gap and no fork");
            let revision = self.held.revision().0;
            let enforces = mesh::InstanceRevision { instance: self.instance.clone(), revision, ..Default::default() };
            self.said.push(mesh::Acknowledgement { instances: vec![enforces] });
        }
    }

    impl Simulation {
        async fn new(seed: u64, dir: &std::path::Path) -> Self {
            let store = SqliteStore::open(&dir.join("control.db")).unwrap();
            let storage = Storage::start(Box::new(store), StoreLatency::default()).unwrap();
            let publisher = Arc::new(Publisher::new(Registry::default()));
            let publish = publisher.clone();
            let clock = Clock::from_fn(|| 1_700_000_000_000);
            let sealer = Arc::new(Sealer::open(&dir.join("kek"), true).unwrap());
            let ledger = Ledger::open(storage, clock, sealer, move |head, entries| publish.entries(head, entries))
                .await
                .unwrap();
            let agents = (0..4)
                .map(|n| Agent {
                    host: ServiceName::parse(&format!("h{n}")).unwrap(),
                    instance: format!("web/{n}"),
                    held: Follower::default(),
                    stream: None,
                    said: Vec::new(),
                })
                .collect();
            let chance = fastrand::Rng::with_seed(seed);
            Self { ledger: Arc::new(ledger), publisher, gate: Gate::default(), agents, chance }
        }

        async fn apply(&mut self, step: usize) {
            let head = self.ledger.head();
            let base = head.follower.revision();
            let change = match base.0 {
                0 => Change::CreateMesh { trust_domain: TrustDomain::parse("shop.example").unwrap() },
                _ => Change::DeclareService {
                    name: ServiceName::parse(&format!("s{step}")).unwrap(),
                    spec: ServiceSpec::new(Protocol::Http),
                },
            };
            let asked = Apply { change_set: ChangeSet { base, changes: vec![change] }, bodies: Bodies::default() };
            self.ledger.append(self.gate.admit(asked, &head, None).unwrap()).await.unwrap();
        }

        async fn connect(&mut self, at: usize) {
            let Self { ledger, publisher, agents, .. } = self;
            let agent = &mut agents[at];
            let joined = publisher.join(&mesh::FollowHello::default(), &agent.host, None, 0);
            let number = joined.number;
            let (welcome, events) = welcome(ledger, agent.held.revision().0, joined).await.unwrap();
            agent.stream = Some((number, welcome.into(), events));
            // A new stream: nothing that was on its way on the old one arrives any more.
            agent.said.clear();
            let address = "127.0.0.1:1".to_owned();
            let up = mesh::InstanceUp { instance: agent.instance.clone(), address, ready: true, ..Default::default() };
            publisher.hear(&agent.host, Said::Up(up), 0).unwrap();
            let revision = agent.held.revision().0;
            let enforces = mesh::InstanceRevision { instance: agent.instance.clone(), revision, ..Default::default() };
            agent.said.push(mesh::Acknowledgement { instances: vec![enforces] });
        }

        fn cut(&mut self, at: usize) {
            let agent = &mut self.agents[at];
            if let Some((number, ..)) = agent.stream.take() {
                self.publisher.leave(&agent.host, number, 0);
            }
        }

        /// Hands the agent its next event; false when none waits.
        fn deliver(&mut self, at: usize) -> bool {
            let agent = &mut self.agents[at];
            let Some((_, welcome, events)) = &mut agent.stream else { return false };
            let Some(event) = welcome.pop_front().or_else(|| events.try_recv().ok()) else { return false };
            agent.take(&event);
            true
        }

        /// One acknowledgement arrives, whichever; false when none is on its way.
        fn arrive(&mut self, at: usize) -> bool {
            let agent = &mut self.agents[at];
            if agent.stream.is_none() || agent.said.is_empty() {
                return false;
            }
            let which = self.chance.usize(..agent.said.len());
            let given = agent.said.swap_remove(which);
            self.publisher.hear(&agent.host, Said::Acknowledgement(given), 0).unwrap();
            true
        }

        /// What the registry claims of a proxy is true of it.
        fn holds(&self) {
            for proxy in self.publisher.proxies() {
                let agent = self.agents.iter().find(|agent| agent.instance == proxy.instance.as_str()).unwrap();
                assert!(proxy.revision <= agent.held.revision(), "claimed {proxy:?}");
            }
        }
    }

    #[tokio::test]
    async fn whatever_is_lost_or_overtaken_every_agent_ends_at_the_same_root_and_nothing_is_claimed_too_early() {
        for seed in 0..20 {
            let dir = tempfile::tempdir().unwrap();
            let mut simulation = Simulation::new(seed, dir.path()).await;
            for step in 0..150 {
                let at = simulation.chance.usize(..simulation.agents.len());
                match simulation.chance.u8(..10) {
                    0 | 1 => simulation.apply(step).await,
                    2 => simulation.cut(at),
                    3 => simulation.connect(at).await,
                    4..=6 => drop(simulation.deliver(at)),
                    _ => drop(simulation.arrive(at)),
                }
                simulation.holds();
            }
            for at in 0..simulation.agents.len() {
                simulation.connect(at).await;
                while simulation.deliver(at) {}
                while simulation.arrive(at) {}
            }
            let head = simulation.ledger.head();
            for agent in &simulation.agents {
                assert_eq!(agent.held.root(), head.follower.root(), "seed {seed}");
                assert_eq!(agent.held.state(), head.follower.state(), "seed {seed}");
            }
            let now = tokio::time::Instant::now();
            let (missing, connected) = simulation.publisher.enforced(head.follower.revision(), now).await;
            assert_eq!((missing.len(), connected), (0, 4), "seed {seed}");
        }
    }
}
