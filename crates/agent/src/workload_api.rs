//! The SPIFFE Workload API: workloads of this host ask for their identities, and for what verifies those of others, on a unix socket.
//! Software written for SPIFFE works unchanged, and so does an Envoy, which asks on the same socket in its own way.
//!
//! Standards: SPIFFE Workload Endpoint (sections 3 to 6) and SPIFFE Workload API (sections 4 and 5). Who asks is told by the kernel and
//! decided at the [`Door`] of each socket, for every request and again while a stream is open: an identity ends with what earned it.
//!
//! | furniture | holds |
//! |---|---|
//! | [`attest`] | what can be told of a process that the agent did not start |
//! | [`authority`] | what clients on a unix socket call the other end |
//! | [`peer`] | the process at the other end of a connection |
//! | [`registered`] | the socket for processes that the agent did not start |
//! | [`material`] | the identities of one instance, fetched when somebody asks |
//! | [`sds`] | the same identities for an Envoy: its Secret Discovery Service |

use std::{
    collections::BTreeMap,
    convert::Infallible,
    io,
    os::fd::OwnedFd,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use countersign_api::{
    mesh,
    sds::secret_discovery_service_server::SecretDiscoveryServiceServer,
    svid::Bundle,
    workload::{
        JwtBundlesRequest, JwtBundlesResponse, Jwtsvid, JwtsvidRequest, JwtsvidResponse, SECURITY_HEADER,
        ValidateJwtsvidRequest, ValidateJwtsvidResponse, X509BundlesRequest, X509BundlesResponse, X509svid,
        X509svidRequest, X509svidResponse,
        spiffe_workload_api_server::{SpiffeWorkloadApi, SpiffeWorkloadApiServer},
    },
};
use countersign_core::{change::Revision, identity::ServiceName, jwt_svid, ledger::Follower, state::Barred};
use futures_util::{Stream, StreamExt};
use parking_lot::Mutex;
use rustls_pki_types::CertificateDer;
use tokio::{
    net::UnixListener,
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch},
    time::Sleep,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Response, Status, metadata::MetadataMap, transport::server::Connected};

use crate::{
    host::Host,
    identity,
    join::Issued,
    workload_api::{
        authority::WithAuthority,
        material::{Material, X509},
        peer::Peer,
    },
};

mod attest;
mod authority;
pub(crate) mod material;
pub(crate) mod peer;
pub(crate) mod registered;
mod sds;

/// Connections to one socket at the same time at most: a local user that opens more waits.
const CONNECTIONS_MAX: usize = 256;
/// How long whoever has no identity may keep a connection.
const STRANGER_WITHIN: Duration = Duration::from_secs(10);
/// Requests of one connection at the same time at most.
const STREAMS_MAX: u32 = 32;
/// Longest request, in bytes.
const MESSAGE_BYTES_MAX: usize = 64 * 1024;
/// How long the first identity of an instance may take before whoever asks is told to come again.
const FIRST_WITHIN: Duration = Duration::from_secs(10);
/// How often who holds a stream open is looked at again.
const ATTEST_EVERY: Duration = Duration::from_secs(1);

/// Who may come through one socket.
#[tonic::async_trait]
pub(crate) trait Door: Send + Sync + 'static {
    /// Connections of one user at the same time at most.
    fn connections_per_user_max(&self) -> usize {
        CONNECTIONS_MAX
    }

    /// Looks at who has connected, before anything is read of it.
    async fn meet(&self, _peer: &Arc<Peer>) {}

    /// What `peer` may have now; `PERMISSION_DENIED` when it has no identity.
    fn admit(&self, peer: &Arc<Peer>) -> Result<Arc<Material>, Status>;
}

/// Whether processes of `service` have an identity at all, as far as this host knows.
pub(crate) fn has_identity(follower: &Follower, service: &ServiceName) -> Result<(), Status> {
    let state = follower.state();
    match (state.services.contains_key(service), state.barred.get(service)) {
        (true, Some(Barred::Suspended { reason })) => {
            Err(Status::permission_denied(format!("service `{service}` is suspended: {reason}")))
        }
        (true, _) => Ok(()),
        (false, _) if follower.revision() == Revision(0) => {
            Err(Status::unavailable("this host does not know its mesh yet; ask again"))
        }
        (false, _) => Err(Status::permission_denied(format!("service `{service}` is not declared in this mesh"))),
    }
}

/// Answers on `listener` until dropped.
pub(crate) async fn serve(listener: OwnedFd, host: Arc<Host>, door: Arc<dyn Door>) {
    let listener = std::os::unix::net::UnixListener::from(listener);
    let listener = match listener.set_nonblocking(true).and_then(|()| UnixListener::from_std(listener)) {
        Ok(listener) => listener,
        Err(error) => return tracing::error!(%error, "the socket for workloads cannot be used"),
    };
    let (accepted, incoming) = mpsc::channel(1);
    let accepting = accept(listener, door.clone(), accepted);
    let api = Api { host, door };
    let secrets = SecretDiscoveryServiceServer::new(api.clone()).max_decoding_message_size(sds::MESSAGE_BYTES_MAX);
    let api = SpiffeWorkloadApiServer::new(api).max_decoding_message_size(MESSAGE_BYTES_MAX);
    let serving = tonic::transport::Server::builder()
        .http2_keepalive_interval(Some(Duration::from_secs(30)))
        .http2_max_header_list_size(16 * 1024)
        .http2_max_pending_accept_reset_streams(Some(20))
        .max_concurrent_streams(STREAMS_MAX)
        .add_service(api)
        .add_service(secrets)
        .serve_with_incoming(ReceiverStream::new(incoming).map(Ok::<_, Infallible>));
    tokio::select! {
        () = accepting => {}
        served = serving => if let Err(error) = served {
            tracing::error!(%error, "the Workload API ended");
        },
    }
}

async fn accept(listener: UnixListener, door: Arc<dyn Door>, accepted: mpsc::Sender<Connection>) {
    let open = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let users = Arc::new(Users { open: Mutex::default(), max: door.connections_per_user_max() });
    loop {
        let Ok(permit) = open.clone().acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "a workload's connection could not be accepted");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let peer = match Peer::of(&stream) {
            Ok(peer) => Arc::new(peer),
            // It has ended already, or the kernel does not say who it is.
            Err(error) => {
                tracing::info!(%error, "who opened a connection cannot be told; it is closed");
                continue;
            }
        };
        let Some(seat) = Seat::take(&users, peer.uid()) else {
            tracing::debug!(uid = peer.uid(), "a user has too many connections; another is closed");
            continue;
        };
        let (door, accepted) = (door.clone(), accepted.clone());
        tokio::spawn(async move {
            door.meet(&peer).await;
            let is_stranger = door.admit(&peer).is_err_and(|status| status.code() == Code::PermissionDenied);
            let until = is_stranger.then(|| Box::pin(tokio::time::sleep(STRANGER_WITHIN)));
            let stream = WithAuthority::new(stream);
            let _ = accepted.send(Connection { stream, peer, until, _seat: seat, _open: permit }).await;
        });
    }
}

/// The connections that each user has open.
struct Users {
    open: Mutex<BTreeMap<u32, usize>>,
    max: usize,
}

/// One connection of a user.
struct Seat {
    users: Arc<Users>,
    uid: u32,
}

impl Seat {
    /// None: the user has as many as it may.
    fn take(users: &Arc<Users>, uid: u32) -> Option<Self> {
        let mut open = users.open.lock();
        let taken = open.entry(uid).or_default();
        if *taken >= users.max {
            return None;
        }
        *taken += 1;
        Some(Self { users: users.clone(), uid })
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut open = self.users.open.lock();
        if let Some(taken) = open.get_mut(&self.uid) {
            *taken -= 1;
            if *taken == 0 {
                open.remove(&self.uid);
            }
        }
    }
}

/// A connection with the process that opened it.
struct Connection {
    stream: WithAuthority<tokio::net::UnixStream>,
    peer: Arc<Peer>,
    /// When it ends whatever is open on it: whoever opened it had no identity then.
    until: Option<Pin<Box<Sleep>>>,
    _seat: Seat,
    _open: OwnedSemaphorePermit,
}

impl Connected for Connection {
    type ConnectInfo = Arc<Peer>;
    fn connect_info(&self) -> Arc<Peer> {
        self.peer.clone()
    }
}

impl tokio::io::AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut tokio::io::ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.until.as_mut().is_some_and(|until| until.as_mut().poll(cx).is_ready()) {
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl tokio::io::AsyncWrite for Connection {
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

/// What is served on one socket.
#[derive(Clone)]
struct Api {
    host: Arc<Host>,
    door: Arc<dyn Door>,
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

impl Api {
    /// Who asks, and what they may have.
    ///
    /// INVARIANT (asked-by-a-workload): every request for an identity passes here: from nobody without attestation; and of the Workload
    /// API, without the header of the standard it came from somebody who was made to send it.
    fn admit<T>(&self, request: &Request<T>) -> Result<Watched, Status> {
        has_security_header(request.metadata())?;
        self.attest(request)
    }

    fn attest<T>(&self, request: &Request<T>) -> Result<Watched, Status> {
        let peer = request.extensions().get::<Arc<Peer>>().cloned();
        let peer = peer.ok_or_else(|| Status::internal("the connection has no peer"))?;
        let material = self.door.admit(&peer)?;
        Ok(Watched {
            door: self.door.clone(),
            peer,
            material,
            svids: None,
            bundles: self.host.bundle.subscribe(),
            revisions: self.host.held.revisions(),
            host: self.host.clone(),
        })
    }
}

/// Who asked, and what they may have as long as they are admitted.
struct Watched {
    host: Arc<Host>,
    door: Arc<dyn Door>,
    peer: Arc<Peer>,
    material: Arc<Material>,
    svids: Option<watch::Receiver<X509>>,
    bundles: watch::Receiver<mesh::Bundle>,
    revisions: watch::Receiver<Revision>,
}

/// What may be told at one moment.
struct Facts {
    /// Good now; absent as long as nobody sought it.
    svid: Option<Arc<Issued>>,
    bundle: Arc<Bundle>,
}

impl Watched {
    /// Has an X.509-SVID issued from now on, and waits for the first.
    async fn seek_svid(&mut self) -> Result<(), Status> {
        let svids = self.svids.get_or_insert_with(|| self.material.x509());
        let known = svids.wait_for(|svid| !matches!(svid, X509::Sought));
        match tokio::time::timeout(FIRST_WITHIN, known).await {
            Ok(_) => Ok(()),
            Err(_) => Err(Status::unavailable("the control plane has not issued an identity yet; ask again")),
        }
    }

    /// Looks again at who asked, and at what there is for them.
    fn look(&mut self) -> Result<Facts, Status> {
        if !Arc::ptr_eq(&self.door.admit(&self.peer)?, &self.material) {
            return Err(Status::permission_denied("this process is another workload than the one that asked"));
        }
        let svid = match self.svids.as_mut().map(|svids| svids.borrow_and_update().clone()) {
            None => None,
            Some(X509::Held(issued)) => Some(issued),
            Some(X509::Refused(why)) => return Err(Status::permission_denied(why)),
            Some(X509::Sought) => return Err(Status::unavailable("there is no identity yet; ask again")),
        };
        let expires_at = svid.as_ref().map(|issued| issued.svid.not_after());
        if expires_at.is_some_and(|at| at <= identity::now().as_secs().cast_signed()) {
            return Err(Status::unavailable("the identity has expired, and the control plane cannot be reached"));
        }
        Ok(Facts { svid, bundle: self.host.tls.bundle() })
    }

    /// Returns when it is time to look again.
    async fn changed(&mut self) {
        let svids = self.svids.as_mut();
        let svid = async {
            match svids {
                Some(svids) => drop(svids.changed().await),
                None => std::future::pending().await,
            }
        };
        // None of them can fail: the senders lie in `host` and in `material`.
        tokio::select! {
            _ = self.bundles.changed() => {}
            _ = self.revisions.changed() => {}
            () = svid => {}
            () = tokio::time::sleep(ATTEST_EVERY) => {}
        }
    }

    /// Answers with what `make` makes, at once and whenever that changes, until who asked is not admitted any more.
    fn stream<T: Clone + PartialEq + Send + 'static>(
        mut self,
        make: impl Fn(&Facts) -> Result<T, Status> + Send + 'static,
    ) -> Response<Answers<T>> {
        let (tell, answers) = mpsc::channel(1);
        tokio::spawn(async move {
            if let Err(status) = self.tell_on(make, &tell).await {
                let _ = tell.send(Err(status)).await;
            }
        });
        Response::new(Box::pin(ReceiverStream::new(answers)))
    }

    /// Returns when nobody listens any more, or with why there is no more to tell.
    async fn tell_on<T: Clone + PartialEq>(
        &mut self,
        make: impl Fn(&Facts) -> Result<T, Status>,
        tell: &mpsc::Sender<Result<T, Status>>,
    ) -> Result<(), Status> {
        let mut last = None;
        loop {
            let now = make(&self.look()?)?;
            if last.as_ref() != Some(&now) {
                if tell.send(Ok(now.clone())).await.is_err() {
                    return Ok(());
                }
                last = Some(now);
            }
            tokio::select! {
                () = tell.closed() => return Ok(()),
                () = self.changed() => {}
            }
        }
    }
}

#[tonic::async_trait]
impl SpiffeWorkloadApi for Api {
    type FetchX509SVIDStream = Answers<X509svidResponse>;
    type FetchX509BundlesStream = Answers<X509BundlesResponse>;
    type FetchJWTBundlesStream = Answers<JwtBundlesResponse>;

    async fn fetch_x509svid(
        &self,
        request: Request<X509svidRequest>,
    ) -> Result<Response<Self::FetchX509SVIDStream>, Status> {
        let mut watched = self.admit(&request)?;
        watched.seek_svid().await?;
        Ok(watched.stream(|Facts { svid, bundle }| {
            let issued = svid.as_ref().ok_or_else(|| Status::internal("an identity was not sought"))?;
            let svid = X509svid {
                spiffe_id: issued.svid.id().to_string(),
                x509_svid: concatenated(issued.svid.chain()),
                x509_svid_key: Bytes::copy_from_slice(&issued.key_pkcs8_der),
                bundle: concatenated(bundle.authorities()),
                hint: String::new(),
            };
            Ok(X509svidResponse { svids: vec![svid], ..X509svidResponse::default() })
        }))
    }

    async fn fetch_x509_bundles(
        &self,
        request: Request<X509BundlesRequest>,
    ) -> Result<Response<Self::FetchX509BundlesStream>, Status> {
        Ok(self.admit(&request)?.stream(|Facts { bundle, .. }| {
            let own = (bundle.trust_domain().id().to_string(), concatenated(bundle.authorities()));
            Ok(X509BundlesResponse { bundles: [own].into(), ..X509BundlesResponse::default() })
        }))
    }

    async fn fetch_jwtsvid(&self, request: Request<JwtsvidRequest>) -> Result<Response<JwtsvidResponse>, Status> {
        let Watched { material, .. } = self.admit(&request)?;
        let JwtsvidRequest { audience, spiffe_id } = request.into_inner();
        if !jwt_svid::are_audiences(&audience) {
            return Err(Status::invalid_argument("name 1 to 8 audiences of 1 to 512 bytes"));
        }
        let own = material.id().to_string();
        if !spiffe_id.is_empty() && spiffe_id != own {
            return Err(Status::permission_denied(format!("this workload is `{own}`, not `{spiffe_id}`")));
        }
        let svid = material.jwt(audience).await?;
        Ok(Response::new(JwtsvidResponse { svids: vec![Jwtsvid { spiffe_id: own, svid, hint: String::new() }] }))
    }

    async fn fetch_jwt_bundles(
        &self,
        request: Request<JwtBundlesRequest>,
    ) -> Result<Response<Self::FetchJWTBundlesStream>, Status> {
        Ok(self.admit(&request)?.stream(|Facts { bundle, .. }| {
            let own = (bundle.trust_domain().id().to_string(), bundle.jwt_jwks().to_string().into());
            Ok(JwtBundlesResponse { bundles: [own].into() })
        }))
    }

    async fn validate_jwtsvid(
        &self,
        request: Request<ValidateJwtsvidRequest>,
    ) -> Result<Response<ValidateJwtsvidResponse>, Status> {
        self.admit(&request)?;
        let ValidateJwtsvidRequest { audience, svid } = request.into_inner();
        if audience.is_empty() || svid.is_empty() {
            return Err(Status::invalid_argument("give an audience and a JWT-SVID"));
        }
        let (bundle, now) = (self.host.tls.bundle(), identity::now().as_secs().cast_signed());
        let verified = jwt_svid::verify(&svid, bundle.trust_domain(), &bundle.jwt_keys(), &audience, now)
            .map_err(|refused| Status::invalid_argument(refused.to_string()))?;
        let claims = verified.claims().iter().map(|(name, value)| (name.clone(), protobuf(value))).collect();
        let claims = Some(prost_types::Struct { fields: claims });
        Ok(Response::new(ValidateJwtsvidResponse { spiffe_id: verified.id().to_string(), claims }))
    }
}

/// "the metadata key `workload.spiffe.io`, and a value of `true` (case sensitive)" (SPIFFE Workload Endpoint, 3): so that a workload
/// that can be made to send requests of its attacker's choice does not send this one.
fn has_security_header(metadata: &MetadataMap) -> Result<(), Status> {
    let mut given = metadata.get_all(SECURITY_HEADER).iter();
    match (given.next(), given.next()) {
        (Some(value), None) if value == "true" => Ok(()),
        _ => Err(Status::invalid_argument("the metadata `workload.spiffe.io: true` is missing")),
    }
}

fn concatenated(certificates: &[CertificateDer<'_>]) -> Bytes {
    certificates.iter().flat_map(|der| der.iter().copied()).collect()
}

/// JSON as protobuf has it (`google.protobuf.Value`).
fn protobuf(value: &serde_json::Value) -> prost_types::Value {
    use prost_types::value::Kind;
    use serde_json::Value;
    let kind = match value {
        Value::Null => Kind::NullValue(0),
        Value::Bool(given) => Kind::BoolValue(*given),
        Value::Number(given) => Kind::NumberValue(given.as_f64().unwrap_or(f64::NAN)),
        Value::String(given) => Kind::StringValue(given.clone()),
        Value::Array(given) => Kind::ListValue(prost_types::ListValue { values: given.iter().map(protobuf).collect() }),
        Value::Object(given) => Kind::StructValue(prost_types::Struct {
            fields: given.iter().map(|(name, value)| (name.clone(), protobuf(value))).collect(),
        }),
    };
    prost_types::Value { kind: Some(kind) }
}
