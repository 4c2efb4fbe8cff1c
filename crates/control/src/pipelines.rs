//! How pipelines propose changes: JSON over HTTPS, on a listener that faces the machines of the CI system. Whoever asks shows a token
//! of an issuer that `mesh.toml` names, or the JWT-SVID of a workload of this mesh; which pipeline it is of is decided here, and what it may ask for by the gate.
//!
//! | request | body | answer |
//! |---|---|---|
//! | `GET /v1/pipeline/mesh` | | [`Mesh`], without its operators: what planning needs |
//! | `POST /v1/pipeline/proposals` | [`Apply`] | 403 with the id of the pending change that waits, or why there is none |
//! | `GET /v1/pipeline/proposals/{id}` | | [`Proposal`], of the pipeline's own |
//! | `GET /v1/pipeline/proposals/{id}/wait?timeout_ms=N` | | [`Proposal`], once it is decided or the time is over |
//!
//! Each takes `?pipeline=NAME`, for a token that several pipelines fit. Nothing is applied here, and no body is read before the token
//! was verified.

use std::{
    collections::BTreeSet,
    fs, io,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use axum::{
    Json, Router,
    body::Body,
    extract::{Path as UrlPath, Query, Request, State},
    response::IntoResponse,
    routing::{get, post},
};
use http::{HeaderMap, header};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use rustls::ServerConfig;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpListener,
    sync::Semaphore,
};
use tokio_rustls::TlsAcceptor;

use countersign_api::{
    https::{Https, HttpsError},
    local::{Apply, Mesh, Problem, Proposal, ProposalState},
    svid,
};
use countersign_core::{
    canonical::Digest,
    gate::{Answer, Author, Pipeline},
    pipeline::{IssuerName, MESH_ISSUER},
    state::MeshState,
};

use crate::{
    Plane,
    local_api::{BODY_BYTES_MAX, Refusal, problem, store_problem},
    oidc::{self, TokenRefused, VerifiedToken},
    proposals,
    store::Document,
};

/// Connections that are open at the same time at most.
const CONNECTIONS_MAX: usize = 256;
/// How long a stranger has for a handshake, and for the head of a request.
const HEAD_WITHIN: Duration = Duration::from_secs(10);
/// How long a connection lasts: a wait and what comes before and after it.
const CONNECTION_WITHIN: Duration = Duration::from_secs(5 * 60);
/// How long one request waits for a decision at most.
const WAIT_MAX: Duration = Duration::from_secs(60);
/// How often the certificate is read again.
const CERTIFICATE_EVERY: Duration = Duration::from_secs(60);
/// The kind of the documents that say which proposal a token made.
const TOKEN_KIND: &str = "pipeline-token";
const TOKENS_MAX: u32 = 100_000;
/// What an operator is shown of a token at most: claims, and bytes of each.
const CLAIMS_SHOWN_MAX: usize = 64;
const CLAIM_SHOWN_BYTES_MAX: usize = 512;

/// Where pipelines find the control plane, and whom it trusts when it asks issuers for their keys.
#[derive(Debug, Clone, Default)]
pub struct Settings {
    /// Where pipelines connect; nowhere unless given.
    pub listen: Option<SocketAddr>,
    /// PEM files of the certificate chain and of its key. Without them only this machine itself is served.
    pub certificate: Option<(PathBuf, PathBuf)>,
    /// A PEM file of certificates that issuers are verified with, beside those that the system trusts.
    pub issuer_ca: Option<PathBuf>,
}

/// Why pipelines cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// Tokens would go over the network in the clear.
    #[error("`{0}` is on the network, and there is no certificate for it")]
    InTheClear(SocketAddr),
    /// The certificate or its key cannot be used.
    #[error("could not use the certificate `{path}`")]
    Certificate {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The certificates that issuers are verified with cannot be used.
    #[error(transparent)]
    IssuerCa(#[from] HttpsError),
}

impl SettingsError {
    /// What to do about it.
    pub fn help(&self) -> &'static str {
        match self {
            Self::InTheClear(_) => "give --api-cert and --api-key, or listen on 127.0.0.1",
            Self::Certificate { .. } => "give PEM files: the chain with --api-cert, its key with --api-key",
            Self::IssuerCa(_) => "give a PEM file of certificates with --issuer-ca",
        }
    }
}

impl Settings {
    /// What asks issuers for their keys.
    pub(crate) fn providers(&self) -> Result<oidc::Providers, SettingsError> {
        Ok(oidc::Providers::new(Https::new(self.issuer_ca.as_deref())?))
    }

    /// The certificate, if there is one; an error when there has to be.
    pub(crate) fn tls(&self) -> Result<Option<Certificate>, SettingsError> {
        match (&self.certificate, self.listen) {
            (Some((chain, key)), _) => Certificate::read(chain, key).map(Some),
            (None, Some(listen)) if !listen.ip().is_loopback() => Err(SettingsError::InTheClear(listen)),
            (None, _) => Ok(None),
        }
    }
}

/// The certificate that pipelines see, read again when it was renewed.
pub(crate) struct Certificate {
    chain: PathBuf,
    key: PathBuf,
    config: parking_lot::RwLock<Arc<ServerConfig>>,
}

impl Certificate {
    fn read(chain: &Path, key: &Path) -> Result<Self, SettingsError> {
        let config = parking_lot::RwLock::new(server_config(chain, key)?);
        Ok(Self { chain: chain.to_owned(), key: key.to_owned(), config })
    }

    async fn follow(&self) {
        loop {
            tokio::time::sleep(CERTIFICATE_EVERY).await;
            match server_config(&self.chain, &self.key) {
                Ok(config) => *self.config.write() = config,
                Err(error) => {
                    tracing::warn!(error = %crate::error_chain(&error), "the certificate could not be read again");
                }
            }
        }
    }
}

fn server_config(chain: &Path, key: &Path) -> Result<Arc<ServerConfig>, SettingsError> {
    let unfit = |path: &Path, source| SettingsError::Certificate { path: path.to_owned(), source };
    let text = fs::read(chain).map_err(|error| unfit(chain, error))?;
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&text).collect();
    let certificates = certificates.map_err(|error| unfit(chain, io::Error::other(error)))?;
    let text = zeroize::Zeroizing::new(fs::read(key).map_err(|error| unfit(key, error))?);
    let private = PrivateKeyDer::from_pem_slice(&text).map_err(|error| unfit(key, io::Error::other(error)))?;
    let mut config = ServerConfig::builder_with_provider(svid::provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("INVARIANT: the provider has TLS 1.3")
        .with_no_client_auth()
        .with_single_cert(certificates, private)
        .map_err(|error| unfit(chain, io::Error::other(error)))?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

/// Serves until the task is dropped.
pub(crate) async fn serve(plane: Arc<Plane>, listener: TcpListener, certificate: Option<Certificate>) {
    let router = router(plane);
    let room = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let accept = async {
        loop {
            let permit = room.clone().acquire_owned().await.expect("INVARIANT: the semaphore is never closed");
            let (stream, peer) = match listener.accept().await {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "a pipeline's connection could not be accepted");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let acceptor = certificate.as_ref().map(|held| TlsAcceptor::from(held.config.read().clone()));
            let router = router.clone();
            tokio::spawn(async move {
                match acceptor {
                    None => connection(stream, peer.ip(), router).await,
                    Some(acceptor) => {
                        if let Ok(Ok(stream)) = tokio::time::timeout(HEAD_WITHIN, acceptor.accept(stream)).await {
                            connection(stream, peer.ip(), router).await;
                        }
                    }
                }
                drop(permit);
            });
        }
    };
    match &certificate {
        None => accept.await,
        Some(held) => {
            tokio::select! {
                () = accept => {}
                () = held.follow() => {}
            }
        }
    }
}

async fn connection(stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static, from: IpAddr, router: Router) {
    let service = TowerToHyperService::new(router.layer(axum::Extension(From(from))));
    let serving = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_WITHIN)
        .max_buf_size(64 * 1024)
        .serve_connection(TokioIo::new(stream), service);
    // A stranger's broken connection is nobody's business.
    let _ = tokio::time::timeout(CONNECTION_WITHIN, serving).await;
}

/// Where a request came from.
#[derive(Debug, Clone, Copy)]
struct From(IpAddr);

/// All requests.
fn router(plane: Arc<Plane>) -> Router {
    let help = "is this command of another version?";
    Router::new()
        .route("/v1/pipeline/mesh", get(mesh))
        .route("/v1/pipeline/proposals", post(propose))
        .route("/v1/pipeline/proposals/{id}", get(proposal))
        .route("/v1/pipeline/proposals/{id}/wait", get(wait))
        .fallback(async move || Refusal::from(problem(404, "there is no such request", None, Some(help))))
        .with_state(plane)
}

/// Which of the pipelines that a token fits.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Asked {
    pipeline: Option<String>,
    timeout_ms: Option<u64>,
}

/// A pipeline that has shown who it is.
struct SignedIn {
    pipeline: Pipeline,
    token: VerifiedToken,
}

/// INVARIANT (pipeline-proven): what a pipeline is told or proposes rests on a token that was verified in the same request, and that
/// says everything that the mesh, as it is now, matches that pipeline by.
async fn sign_in(plane: &Plane, headers: &HeaderMap, named: Option<&str>) -> Result<SignedIn, Problem> {
    let mut given = headers.get_all(header::AUTHORIZATION).iter();
    let token = match (given.next().map(|value| value.to_str()), given.next()) {
        (Some(Ok(value)), None) => bearer(value),
        _ => None,
    };
    let token = token.ok_or_else(|| {
        let help = "send the CI system's OpenID Connect token: `Authorization: Bearer …`";
        problem(401, "no token was shown", None, Some(help))
    })?;
    let head = plane.ledger.head();
    let state = head.follower.state();
    plane.providers.retain(|url| state.issuers.values().any(|issuer| issuer.url == url));
    let now_ms = plane.clock.now_ms();
    let verified = match plane.authority().filter(|authority| oidc::is_svid_of(authority.trust_domain(), token)) {
        Some(authority) => oidc::verify_svid(&authority.bundle(), token, now_ms),
        None => oidc::verify(&plane.providers, state.issuers.values(), token, now_ms).await,
    };
    let token = verified.map_err(|why| {
        tracing::info!(%why, "a pipeline's token was refused");
        let status = if matches!(why, TokenRefused::Keys(_)) { 503 } else { 401 };
        problem(status, "the token is refused", Some(why.to_string()), Some(why.help()))
    })?;
    let name = matched(state, &token, named)?;
    let shown = |(name, value): (&str, String)| {
        let of_every_token = matches!(name, "iss" | "aud" | "exp" | "nbf" | "iat" | "jti");
        (!of_every_token && value.len() <= CLAIM_SHOWN_BYTES_MAX).then(|| format!("{name}={value}"))
    };
    let claims: BTreeSet<String> = token.claims().filter_map(shown).take(CLAIMS_SHOWN_MAX).collect();
    let subject = token.claim("sub").unwrap_or_default().chars().take(CLAIM_SHOWN_BYTES_MAX).collect();
    let pipeline = Pipeline { name, issuer: token.issuer().to_owned(), subject, claims };
    Ok(SignedIn { pipeline, token })
}

/// "Bearer" and one token (RFC 6750, 2.1); the scheme in any case (RFC 9110, 11.1).
fn bearer(value: &str) -> Option<&str> {
    let (scheme, token) = value.split_once(' ')?;
    (scheme.eq_ignore_ascii_case("bearer") && !token.is_empty() && !token.contains(' ')).then_some(token)
}

/// The one pipeline of the mesh that the token is of.
fn matched(state: &MeshState, token: &VerifiedToken, named: Option<&str>) -> Result<Arc<str>, Problem> {
    let mesh = state.trust_domain.as_ref().map(|trust_domain| trust_domain.id().to_string());
    let url = |name: &IssuerName| match state.issuers.get(name) {
        Some(issuer) => Some(&*issuer.url),
        None if **name == *MESH_ISSUER => mesh.as_deref(),
        None => None,
    };
    let is_of = |pipeline: &countersign_core::pipeline::Pipeline| {
        url(&pipeline.issuer) == Some(token.issuer())
            && !pipeline.claims.is_empty()
            && pipeline.claims.iter().all(|(claim, value)| token.claim(claim).as_ref() == Some(value))
    };
    let fits = state.pipelines.iter().filter(|(_, pipeline)| is_of(pipeline)).map(|(name, _)| name);
    let fits: Vec<_> = fits.filter(|name| named.is_none_or(|named| named == &***name)).collect();
    match fits[..] {
        [one] => Ok(one.clone()),
        [] => {
            let help = "compare the token's claims with [pipelines.*] of mesh.toml; each has to be there, exactly";
            let detail = named.map(|named| format!("asked for as `{}`", named.chars().take(64).collect::<String>()));
            Err(problem(403, "the token is of no pipeline of this mesh", detail, Some(help)))
        }
        [..] => {
            let names: Vec<_> = fits.iter().map(|name| format!("`{name}`")).collect();
            let detail = format!("it fits {}", names.join(", "));
            Err(problem(400, "the token is of several pipelines", Some(detail), Some("name one: `--pipeline NAME`")))
        }
    }
}

type Answered<T> = Result<Json<T>, Refusal>;

async fn mesh(State(plane): State<Arc<Plane>>, Query(asked): Query<Asked>, headers: HeaderMap) -> Answered<Mesh> {
    sign_in(&plane, &headers, asked.pipeline.as_deref()).await?;
    let head = plane.ledger.head();
    let mut state = head.follower.state().clone();
    // Who may change the mesh, and with what, is nothing that a plan reads.
    state.operators.clear();
    state.seal = None;
    Ok(Json(Mesh { revision: head.follower.revision(), state, bodies: head.follower.bodies().clone() }))
}

async fn propose(State(plane): State<Arc<Plane>>, Query(asked): Query<Asked>, request: Request) -> impl IntoResponse {
    propose_as(&plane, asked.pipeline.as_deref(), request).await.map_err(Refusal::from)
}

/// The answer is a refusal in any case: nothing is applied before somebody countersigned.
async fn propose_as(plane: &Plane, named: Option<&str>, request: Request) -> Result<(), Problem> {
    let (parts, body) = request.into_parts();
    let signed_in = sign_in(plane, &parts.headers, named).await?;
    let from = parts.extensions.get::<From>().map(|From(ip)| *ip);
    let from = from.ok_or_else(|| problem(500, "the request came from nowhere", None, None))?;
    let apply = read(body).await?;
    let used = Used::of(plane, &signed_in, apply.change_set.digest()).await?;
    let proposal = proposals::propose_as(plane, apply, Author::Pipeline(signed_in.pipeline.clone()), from).await?;
    used.keep(plane, &proposal).await?;
    let answer = Answer::NeedsCountersign(proposal.requires);
    Err(proposals::refusal(plane, &answer, proposal.digest, Some(proposal.id), None))
}

async fn read(body: Body) -> Result<Apply, Problem> {
    let help = "is the command of the same version as the control plane?";
    let read = axum::body::to_bytes(body, BODY_BYTES_MAX);
    let bytes = tokio::time::timeout(CONNECTION_WITHIN, read).await.ok().and_then(Result::ok);
    let bytes = bytes.ok_or_else(|| problem(413, "the request broke off, or is too long", None, None))?;
    serde_json::from_slice(&bytes)
        .map_err(|error| problem(400, "the request is no change-set", Some(error.to_string()), Some(help)))
}

/// What a token was used for.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Made {
    digest: Digest,
    /// The proposal; absent while it is being made.
    proposal: Option<String>,
}

/// A token that is being used.
struct Used {
    document: Document,
    seen: Vec<u8>,
    digest: Digest,
}

impl Used {
    /// Uses a token up for a change-set.
    ///
    /// INVARIANT (token-once): a token makes one proposal. It makes another only of the same change-set, or when an entry that came
    /// first has voided the one before.
    async fn of(plane: &Plane, signed_in: &SignedIn, digest: Digest) -> Result<Self, Problem> {
        let key = signed_in.token.id().to_string();
        let bytes = encoded(&Made { digest, proposal: None });
        let expires_at_ms = u64::try_from(signed_in.token.void_at_seconds()).unwrap_or(0).saturating_mul(1000);
        let document = Document { kind: TOKEN_KIND, key: key.clone(), bytes: bytes.clone(), expires_at_ms };
        let (new, now_ms) = (document.clone(), plane.clock.now_ms());
        let kept = plane.storage.run("use_token", move |store| {
            Ok((store.put_document(&new, now_ms, TOKENS_MAX)?, store.document(TOKEN_KIND, &key, now_ms)?))
        });
        let (is_new, held) = kept.await.map_err(|error| store_problem(&error))?;
        if is_new {
            return Ok(Self { document, seen: bytes, digest });
        }
        let made: Option<Made> = held.as_deref().and_then(|bytes| serde_json::from_slice(bytes).ok());
        let (Some(seen), Some(made)) = (held, made) else {
            return Err(problem(429, "too many tokens were used", None, Some("wait until some have expired")));
        };
        let is_void = match &made.proposal {
            Some(id) => matches!(proposals::show(plane, id).await?.proposal.state, ProposalState::Void { .. }),
            None => false,
        };
        if made.digest != digest && !is_void {
            tracing::warn!(pipeline = %signed_in.pipeline.name, "a token was shown a second time, for another change");
            let help = "ask the CI system for a new token: each makes one proposal";
            return Err(problem(409, "the token was used already, for another change", None, Some(help)));
        }
        Ok(Self { document, seen, digest })
    }

    /// Notes which proposal it made.
    async fn keep(self, plane: &Plane, proposal: &Proposal) -> Result<(), Problem> {
        let Self { mut document, seen, digest } = self;
        document.bytes = encoded(&Made { digest, proposal: Some(proposal.id.clone()) });
        if document.bytes == seen {
            return Ok(());
        }
        let kept = plane
            .storage
            .run("keep_token", move |store| store.swap_document(TOKEN_KIND, &document.key, &seen, &document));
        match kept.await.map_err(|error| store_problem(&error))? {
            true => Ok(()),
            false => Err(problem(409, "the token was used at the same moment", None, Some("ask again"))),
        }
    }
}

fn encoded(made: &Made) -> Vec<u8> {
    serde_json::to_vec(made).expect("INVARIANT: a digest and a name are JSON")
}

async fn proposal(
    State(plane): State<Arc<Plane>>,
    UrlPath(id): UrlPath<String>,
    Query(asked): Query<Asked>,
    headers: HeaderMap,
) -> Answered<Proposal> {
    let SignedIn { pipeline, .. } = sign_in(&plane, &headers, asked.pipeline.as_deref()).await?;
    Ok(Json(own(&plane, &id, &pipeline).await?))
}

async fn wait(
    State(plane): State<Arc<Plane>>,
    UrlPath(id): UrlPath<String>,
    Query(asked): Query<Asked>,
    headers: HeaderMap,
) -> Answered<Proposal> {
    let SignedIn { pipeline, .. } = sign_in(&plane, &headers, asked.pipeline.as_deref()).await?;
    own(&plane, &id, &pipeline).await?;
    let within = Duration::from_millis(asked.timeout_ms.unwrap_or(10_000)).min(WAIT_MAX);
    Ok(Json(proposals::wait(&plane, &id, tokio::time::Instant::now() + within).await?))
}

/// A proposal of this pipeline. Others are not there for it.
async fn own(plane: &Plane, id: &str, pipeline: &Pipeline) -> Result<Proposal, Problem> {
    let proposal = proposals::show(plane, id).await?.proposal;
    match &proposal.author {
        Author::Pipeline(author) if author.name == pipeline.name => Ok(proposal),
        _ => Err(problem(404, format!("there is no pending change `{id}`"), None, None)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bearer_token_is_one_word_after_the_scheme() {
        for (given, expected) in [
            ("Bearer a.b.c", Some("a.b.c")),
            ("bearer a.b.c", Some("a.b.c")),
            ("Bearer  a.b.c", None),
            ("Bearer a.b.c d", None),
            ("Bearer ", None),
            ("Bearer", None),
            ("Basic a.b.c", None),
            ("DPoP a.b.c", None),
            ("", None),
        ] {
            assert_eq!(bearer(given), expected, "{given}");
        }
    }

    #[test]
    fn tokens_do_not_go_over_the_network_in_the_clear() {
        let of = |listen: &str| Settings { listen: Some(listen.parse().unwrap()), ..Settings::default() };
        assert!(of("127.0.0.1:0").tls().unwrap().is_none());
        assert!(of("[::1]:0").tls().unwrap().is_none());
        for listen in ["0.0.0.0:0", "10.0.0.1:443", "[::]:0"] {
            assert!(matches!(of(listen).tls(), Err(SettingsError::InTheClear(_))), "{listen}");
        }
        let nothing = Settings { certificate: Some(("nowhere".into(), "nowhere".into())), ..of("127.0.0.1:0") };
        assert!(matches!(nothing.tls(), Err(SettingsError::Certificate { .. })));
    }
}
