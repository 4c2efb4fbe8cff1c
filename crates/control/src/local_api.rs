//! The local API: JSON over `control.sock` for commands of the mesh's own uid. What each request means is decided in the
//! other rooms; here it becomes HTTP, and every failure a [`Problem`] that says what to do.

use std::{collections::BTreeSet, fs, io, os::unix::fs::PermissionsExt, path::Path, sync::Arc, time::Duration};

use axum::{
    Extension, Json, Router,
    body::Body,
    extract::{DefaultBodyLimit, Path as UrlPath, Query, State},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use bytes::Bytes;
use futures_util::{Stream, StreamExt, stream};
use http::{HeaderMap, StatusCode, header};
use tokio::{
    net::{UnixListener, UnixStream},
    sync::broadcast::error::RecvError,
};

use countersign_api::local::{
    AcceptAbove, AcceptedAbove, AnsweredProposal, Applied, ApplyAs, AskAbove, AskedAbove, AuthorityView, Caller,
    Ceremony, ChangeDetail, ChangeSummary, Checked, CheckpointView, ClearSignalsAs, Confirm, ContractView,
    DecisionDetail, EdgeView, EndSessions, Enrol, Enrolled, Enrolment, EnrolmentLink, EvictAs, Evicted, GateOutcome,
    GateRefusal, IdentityFilter, IdentityView, InspectToken, InstanceView, Invitation, InviteAs, KeyReplaced,
    LedgerLine, Mesh, OPERATOR_HEADER, Opened, Problem, ProofView, Proposal, ProposalDetail, ProxyRevision,
    RECOVERED_HEADER, RecordFilter, ReplaceKeyAs, Reseal, RevokeAs, RevokeTokensAs, Revoked, RiskFilter, RiskView,
    SealedAnew, SendSignalAs, ServiceView, SessionView, SessionsEnded, Shown, SignalFilter, SignalSent, SignalView,
    SignalWaited, Status, StepAs, Stepped, TailEvent, TokenFilter, TokenInspected, TokenView, TokensRevoked, Waited,
};
use countersign_core::{
    canonical::Digest,
    change::{Bodies, ChangeSet, Revision},
    gate::{Answer, Author, act::Act},
    identity::{OperatorName, ServiceName},
    ledger::{AddCheckpoint, Entry, EntryProof, Note},
    signal::SignalSeq,
    state::Barred,
};

use crate::{
    Plane,
    acts::{self, By},
    audit,
    authority::log_key::SignError,
    ceremony, decisions, edges, enrol, gate, hosts, identities,
    ledger::{AppendError, Head, PAGE_ENTRIES},
    mfa::{self, CodeRefused, EnrolsFrom},
    onboarding,
    proposals::{self, Answering},
    recover, rotation, sealing, signals,
    site::{
        self,
        session::{self, Session, Who},
    },
    store::{StoreError, StoredEntry},
    tokens,
};

/// Longest request body, in bytes: a change-set of the largest mesh with all its texts.
pub const BODY_BYTES_MAX: usize = 64 * 1024 * 1024;
/// Longest time one request can wait for a revision.
const WAIT_MAX: Duration = Duration::from_secs(10 * 60);
/// Revisions of one list at most.
const CHANGES_MAX: u32 = 1_000;
/// Callers of a service that are told at most, the most permitted.
const CALLERS_MAX: u32 = 1_000;

type Answered<T> = Result<Json<T>, Refusal>;

/// A [`Problem`] as an answer.
#[derive(Debug)]
pub struct Refusal(Problem);

impl From<Problem> for Refusal {
    fn from(problem: Problem) -> Self {
        Self(problem)
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.0.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        (status, [(header::CONTENT_TYPE, "application/problem+json")], Json(self.0)).into_response()
    }
}

/// Builds a problem.
pub fn problem(status: u16, title: impl Into<String>, detail: Option<String>, help: Option<&str>) -> Problem {
    Problem { title: title.into(), status, detail, help: help.map(str::to_owned), refusal: None }
}

/// The problem of a store that did not do what was asked.
pub fn store_problem(error: &StoreError) -> Problem {
    let status = match error {
        StoreError::Full(_) | StoreError::ReadOnly(_) => 507,
        StoreError::Taken(_) => 409,
        StoreError::Away { .. } => 503,
        _ => 500,
    };
    problem(status, error.to_string(), None, Some(error.help()))
}

fn stored(error: StoreError) -> Refusal {
    Refusal(store_problem(&error))
}

fn not_found(what: String, help: &str) -> Refusal {
    Refusal(problem(404, what, None, Some(help)))
}

/// All requests, for whoever owns the socket.
pub fn router(plane: Arc<Plane>) -> Router {
    routes()
        .fallback(async || not_found("there is no such request".into(), "is this command of another version?"))
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .layer(axum::middleware::map_response_with_state(plane.clone(), told_of_recovery))
        .with_state(plane)
}

/// All requests. What of it is asked for from other machines is decided in [`site::command`].
pub fn routes() -> Router<Arc<Plane>> {
    Router::new()
        .route("/v1/status", get(status))
        .route("/v1/mesh", get(mesh))
        .route("/v1/changes", get(changes).post(apply))
        .route("/v1/changes/{revision}", get(change))
        .route("/v1/changes/{revision}/wait", get(wait))
        .route("/v1/acts/{act}", post(open))
        .route("/v1/decisions", get(list_decisions))
        .route("/v1/decisions/tail", get(tail))
        .route("/v1/decisions/{id}", get(decision))
        .route("/v1/services/{service}/callers", get(callers))
        .route("/v1/services/{service}/checklist", get(checklist))
        .route("/v1/edges", get(list_edges))
        .route("/v1/authority", get(authority))
        .route("/v1/authority/steps", post(step_authority))
        .route("/v1/authority/keys", post(replace_key))
        .route("/v1/authority/request", post(ask_above))
        .route("/v1/authority/accept", post(accept_above))
        .route("/v1/authority/reseal", post(reseal))
        .route("/v1/identities", get(list_identities))
        .route("/v1/identities/revoke", post(revoke_identities))
        .route("/v1/tokens", get(list_tokens))
        .route("/v1/tokens/inspect", post(inspect_token))
        .route("/v1/tokens/revoke", post(revoke_tokens))
        .route("/v1/signals", get(list_signals).post(send_signal))
        .route("/v1/signals/clear", post(clear_signals))
        .route("/v1/signals/{number}/wait", get(wait_for_signal))
        .route("/v1/risks", get(list_risks))
        .route("/v1/ledger", get(ledger))
        .route("/v1/ledger/bodies", get(ledger_bodies))
        .route("/v1/ledger/checkpoint", get(checkpoint))
        .route("/v1/ledger/proofs/{index}", get(proof))
        .route("/v1/ledger/consistency/{size}", get(consistency))
        .route("/v1/proposals", get(list_proposals))
        .route("/v1/proposals/{id}", get(proposal))
        .route("/v1/proposals/{id}/wait", get(wait_for_proposal))
        .route("/v1/proposals/{id}/ceremony", post(begin_ceremony))
        .route("/v1/proposals/{id}/apply", post(apply_proposal))
        .route("/v1/proposals/{id}/countersign", post(countersign))
        .route("/v1/proposals/{id}/reject", post(reject))
        .route("/v1/proposals/{id}/withdraw", post(withdraw))
        .route("/v1/enrolments", post(begin_enrolment))
        .route("/v1/enrolments/link", post(enrolment_link))
        .route("/v1/enrolments/{id}", post(confirm_enrolment))
        .route("/v1/sessions", get(sessions))
        .route("/v1/sessions/end", post(end_sessions))
        .route("/v1/hosts/invitations", post(invite))
        .route("/v1/hosts/evict", post(evict_host))
}

/// While a recovery is recent, every answer names it.
pub async fn told_of_recovery(State(plane): State<Arc<Plane>>, mut response: Response) -> Response {
    let head = plane.ledger.head();
    let state = head.follower.state();
    if let Some(recovery) = &state.recovery
        && recover::told(state, mfa::seconds(plane.clock.now_ms())).is_some()
        && let Ok(operator) = header::HeaderValue::from_str(recovery.operator.as_str())
    {
        response.headers_mut().insert(RECOVERED_HEADER, operator);
    }
    response
}

/// Binds the socket, with mode 0600 from its first moment on. A socket left by a process that is gone is replaced: the
/// lock on the data directory says that it is gone.
pub fn bind(path: &Path) -> io::Result<UnixListener> {
    match fs::remove_file(path) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    // Bound under another name and renamed: nobody can connect before the mode is set.
    let new = path.with_extension("sock.new");
    let _ = fs::remove_file(&new);
    let listener = UnixListener::bind(&new)?;
    fs::set_permissions(&new, fs::Permissions::from_mode(0o600))?;
    fs::rename(&new, path)?;
    Ok(listener)
}

/// Serves until the task is dropped.
pub async fn serve(listener: UnixListener, plane: Arc<Plane>) {
    if let Err(error) = axum::serve(OwnUid(listener), router(plane)).await {
        tracing::error!(%error, "the local API ended");
    }
}

/// Takes connections of this process's own uid only: the mode of the socket says so already, and root is not us.
struct OwnUid(UnixListener);

impl axum::serve::Listener for OwnUid {
    type Io = UnixStream;
    type Addr = tokio::net::unix::SocketAddr;

    async fn accept(&mut self) -> (UnixStream, Self::Addr) {
        loop {
            let (stream, address) = axum::serve::Listener::accept(&mut self.0).await;
            let own = rustix::process::geteuid().as_raw();
            match stream.peer_cred() {
                Ok(peer) if peer.uid() == own => return (stream, address),
                Ok(peer) => tracing::warn!(peer.uid = peer.uid(), "a connection of another user was closed"),
                Err(error) => tracing::warn!(%error, "a connection without credentials was closed"),
            }
        }
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        self.0.local_addr()
    }
}

async fn status(State(plane): State<Arc<Plane>>) -> Json<Status> {
    let head = plane.ledger.head();
    let follower = &head.follower;
    let state = follower.state();
    let policies = plane.gate.policies(&head);
    let services = state.services.iter().filter_map(|(name, service)| {
        let concerns = policies.iter().filter(|policy| policy.concerns(name, &service.spec));
        Some(ServiceView {
            name: name.clone(),
            id: state.trust_domain.as_ref()?.workload(name),
            protocol: service.spec.protocol.to_string(),
            state: match state.barred.get(name) {
                None => "active".to_owned(),
                Some(Barred::Quarantined) => "quarantined".to_owned(),
                Some(Barred::Suspended { reason }) => format!("suspended: {reason}"),
            },
            instances: instances_of(&plane, name),
            waiting: plane.publisher.waiting_of(name),
            deployments: state.deployments.get(name).cloned().unwrap_or_default(),
            policies: concerns.map(|policy| policy.id().to_string()).collect(),
            upstreams: service.spec.upstreams.iter().cloned().collect(),
            contract: service.spec.contract.map(|digest| ContractView {
                digest,
                operations: plane.gate.contract(&digest, &head).map_or(0, |contract| contract.operations().len()),
            }),
        })
    });
    Json(Status {
        trust_domain: state.trust_domain.clone(),
        revision: follower.revision(),
        root: follower.root(),
        protected: state.is_protected(),
        version: env!("CARGO_PKG_VERSION").into(),
        started_at_ms: plane.started_at_ms,
        hosts: plane.publisher.hosts(),
        services: services.collect(),
        warnings: plane.warnings(),
    })
}

/// The instances of a service, with what arrives of their telemetry.
fn instances_of(plane: &Plane, service: &ServiceName) -> Vec<InstanceView> {
    let (instances, now_ms) = (plane.publisher.instances_of(service), plane.clock.now_ms());
    let told = |of: InstanceView| InstanceView { telemetry: plane.telemetry.of(&of.instance, now_ms), ..of };
    instances.into_iter().map(told).collect()
}

fn mesh_of(head: &Head) -> Mesh {
    let follower = &head.follower;
    Mesh { revision: follower.revision(), state: follower.state().clone(), bodies: follower.bodies().clone() }
}

async fn mesh(State(plane): State<Arc<Plane>>) -> Json<Mesh> {
    Json(mesh_of(&plane.ledger.head()))
}

async fn apply(State(plane): State<Arc<Plane>>, session: Option<Extension<Session>>, body: Bytes) -> Answered<Applied> {
    let asked: ApplyAs = serde_json::from_slice(&body).map_err(|error| {
        let help = "is the command of the same version as the control plane?";
        Refusal(problem(400, "the request is no change-set", Some(error.to_string()), Some(help)))
    })?;
    if let Some(Extension(Session { who: Who::Person { person, .. }, address, .. })) = session {
        let Proposal { id, digest, requires, .. } =
            proposals::propose_as(&plane, asked.apply, Author::Person(person), address).await?;
        return Err(proposals::refusal(&plane, &Answer::NeedsCountersign(requires), digest, Some(id), None).into());
    }
    Ok(Json(proposals::apply(&plane, asked).await?))
}

/// What the gate's refusal says to the operator.
pub fn gate_problem(refused: gate::Refused) -> Problem {
    match refused {
        gate::Refused::Moved { base, held } => moved(base, held),
        gate::Refused::Unlawful(mistakes) => {
            let help = "nothing was changed; correct the mesh directory and apply again";
            problem(422, "the change-set is refused", Some(mistakes.join("\n")), Some(help))
        }
        gate::Refused::Gate { answer, digest } => refusal(&answer, digest, None, None),
    }
}

/// What the gate's answer says to the operator. `change` is the pending change that waits for what is missing; `why` is what
/// was wrong with what they showed.
pub fn refusal(answer: &Answer, digest: Digest, change: Option<String>, why: Option<&CodeRefused>) -> Problem {
    let (outcome, requires) = match answer {
        Answer::StepUp(requires) => (GateOutcome::StepUp, Some(*requires)),
        Answer::NeedsCountersign(requires) => (GateOutcome::NeedsCountersign, Some(*requires)),
        Answer::Deny(_) | Answer::Permit => (GateOutcome::Denied, None),
    };
    let (title, detail, help) = match (answer, why) {
        (_, Some(why)) => (why.to_string(), None, why.help()),
        (Answer::Deny(denied), None) => (
            "the change gate denies the change".to_owned(),
            Some(denied.join("\n")),
            "nothing was changed; `countersign operator list` shows who may do what, docs/gate.md why".to_owned(),
        ),
        (Answer::NeedsCountersign(requires), None) => (
            format!("the change waits for {requires}"),
            None,
            change.as_ref().map_or_else(String::new, |id| {
                format!("another operator runs `countersign change countersign {id} --otp CODE`")
            }),
        ),
        (Answer::StepUp(requires), None) => {
            let help = match requires.accepts_code() {
                true => "give the code of your authenticator app: `--otp CODE`",
                false => "nothing was changed; a code does not do here",
            };
            (format!("the change needs {requires}"), None, help.to_owned())
        }
        (Answer::Permit, None) => ("the change is permitted".to_owned(), None, String::new()),
    };
    let status = if matches!(why, Some(CodeRefused::Throttled { .. })) { 429 } else { 403 };
    let refusal = GateRefusal { outcome, change, digest: Some(digest), act: None, requires, url: None };
    Problem { refusal: Some(Box::new(refusal)), ..problem(status, title, detail, Some(&help)) }
}

/// What a failed append says to the operator.
pub fn append_problem(error: AppendError) -> Problem {
    match error {
        AppendError::Moved { base, held } => moved(base, held),
        AppendError::Draft(ref cause) => {
            let help = "nothing was changed; correct the mesh directory and apply again";
            problem(422, "the change-set is refused", Some(cause.to_string()), Some(help))
        }
        AppendError::Store(ref error @ StoreError::Away { .. }) => Problem {
            title: "the store is away; look at the revision when it is back before asking for the change again".into(),
            detail: Some(error.to_string()),
            ..store_problem(error)
        },
        AppendError::Forked(_) => {
            let help = "stop this control plane and look at its log; the others go on";
            problem(500, error.to_string(), None, Some(help))
        }
        AppendError::Store(error) => Problem {
            title: "the change could not be written; nothing was changed".into(),
            detail: Some(error.to_string()),
            ..store_problem(&error)
        },
        AppendError::Unsigned(_) => {
            let help = "nothing was changed; in a sealed mesh each change is signed, with `countersign apply`";
            problem(403, "the mesh is sealed, and agents would refuse the change", Some(error.to_string()), Some(help))
        }
        AppendError::Countersignature(why) => ceremony::refused(&why),
        AppendError::Clock { .. } => {
            problem(500, error.to_string(), None, Some("set this machine's clock; nothing was changed"))
        }
        AppendError::Stopping => problem(503, error.to_string(), None, Some("start it again and look at the revision")),
    }
}

fn moved(base: Revision, held: Revision) -> Problem {
    let title = format!("planned on revision {base}, but the mesh is at revision {held}");
    problem(409, title, None, Some("someone changed the mesh in between; plan and apply again"))
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Limit {
    limit: Option<u32>,
}

async fn changes(
    State(plane): State<Arc<Plane>>,
    Query(Limit { limit }): Query<Limit>,
) -> Answered<Vec<ChangeSummary>> {
    let size = plane.ledger.head().follower.revision().0;
    let limit = limit.unwrap_or(50).min(CHANGES_MAX);
    let entries = plane.ledger.stored(size.saturating_sub(limit.into()), limit).await.map_err(stored)?;
    let proxies = plane.publisher.proxies();
    let summary = |entry: &StoredEntry| read(&plane, entry, &proxies).map(|(summary, _)| summary);
    Ok(Json(entries.iter().rev().map(summary).collect::<Result<_, _>>()?))
}

fn read(plane: &Plane, stored: &StoredEntry, proxies: &[ProxyRevision]) -> Result<(ChangeSummary, ChangeSet), Refusal> {
    let unread = |what: String| {
        let path = plane.storage.place().to_owned();
        Refusal(store_problem(&StoreError::Damaged { path, what }))
    };
    let entry = Entry::parse(&stored.entry).map_err(|e| unread(e.to_string()))?;
    let change_set: ChangeSet = serde_json::from_slice(&stored.change_set).map_err(|e| unread(e.to_string()))?;
    let revision = entry.revision();
    let summary = ChangeSummary {
        revision,
        at_ms: entry.at_ms,
        actor: entry.actor,
        digest: entry.digest,
        changes: change_set.changes.iter().map(|change| format!("{} {}", change.kind(), change.subject())).collect(),
        acknowledged: proxies.iter().filter(|proxy| proxy.revision >= revision).count() as u32,
        connected: proxies.len() as u32,
    };
    Ok((summary, change_set))
}

fn revision_of(given: &str) -> Result<Revision, Refusal> {
    let wrong =
        || Refusal(problem(400, format!("`{given}` is not a revision"), None, Some("give a number, for example 4")));
    given.parse().map(Revision).map_err(|_| wrong())
}

async fn change(State(plane): State<Arc<Plane>>, UrlPath(given): UrlPath<String>) -> Answered<ChangeDetail> {
    let revision = revision_of(&given)?;
    let help = "`countersign change list` shows those that are there";
    let missing = || not_found(format!("there is no revision {revision}"), help);
    let index = revision.0.checked_sub(1).ok_or_else(missing)?;
    let entries = plane.ledger.stored(index, 1).await.map_err(stored)?;
    let entry = entries.first().ok_or_else(missing)?;
    let proxies = plane.publisher.proxies();
    let (summary, change_set) = read(&plane, entry, &proxies)?;
    let digests: Vec<_> = change_set.changes.iter().filter_map(|change| change.body()).collect();
    let texts = plane.storage.run("bodies", move |store| store.bodies(&digests)).await.map_err(stored)?;
    let mut bodies = Bodies::default();
    for (_, text) in texts {
        bodies.insert(text);
    }
    let entry = String::from_utf8_lossy(&entry.entry).into_owned();
    Ok(Json(ChangeDetail { summary, change_set, bodies, entry, proxies }))
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Timeout {
    timeout_ms: Option<u64>,
}

async fn wait(
    State(plane): State<Arc<Plane>>,
    UrlPath(given): UrlPath<String>,
    Query(Timeout { timeout_ms }): Query<Timeout>,
) -> Answered<Waited> {
    let revision = revision_of(&given)?;
    let within = Duration::from_millis(timeout_ms.unwrap_or(10_000)).min(WAIT_MAX);
    let deadline = tokio::time::Instant::now() + within;
    let (missing, connected) = plane.publisher.enforced(revision, deadline).await;
    let reached = plane.ledger.head().follower.revision() >= revision;
    Ok(Json(Waited { enforced: reached && missing.is_empty(), revision, connected: connected as u32, missing }))
}

/// The operator whom a request names.
fn named_in(headers: &HeaderMap) -> Result<Option<OperatorName>, Problem> {
    let Some(given) = headers.get(OPERATOR_HEADER) else { return Ok(None) };
    let given = given.to_str().unwrap_or_default();
    OperatorName::parse(given).map(Some).map_err(|error| problem(400, error.to_string(), None, None))
}

/// Opens something for reading, for as long as what was shown is good.
async fn open(
    State(plane): State<Arc<Plane>>,
    UrlPath(act): UrlPath<String>,
    session: Option<Extension<Session>>,
    Json(shown): Json<Shown>,
) -> Answered<Opened> {
    let act = act.parse().ok().filter(|act: &Act| act.only_reads());
    let act = act.ok_or_else(|| not_found("there is no such act".into(), "is this command of another version?"))?;
    Ok(Json(acts::pass(&plane, act, by(session.as_deref(), shown.operator.as_ref()), &shown).await?))
}

/// What was opened before, by [`open`].
async fn reads(plane: &Plane, act: Act, session: Option<&Session>, headers: &HeaderMap) -> Result<Opened, Problem> {
    let operator = named_in(headers)?;
    acts::pass(plane, act, by(session, operator.as_ref()), &Shown::default()).await
}

/// Who asks: from afar whoever is signed in, for whom nothing is open that was opened at the socket.
fn by<'a>(session: Option<&'a Session>, named: Option<&'a OperatorName>) -> By<'a> {
    session.map_or(By::Socket(named), By::Session)
}

async fn list_decisions(
    State(plane): State<Arc<Plane>>,
    headers: HeaderMap,
    session: Option<Extension<Session>>,
    Query(filter): Query<RecordFilter>,
) -> Answered<Vec<countersign_core::record::DecisionRecord>> {
    reads(&plane, Act::ReadDecisions, session.as_deref(), &headers).await?;
    Ok(Json(plane.decisions.list(filter).await.map_err(stored)?))
}

async fn decision(
    State(plane): State<Arc<Plane>>,
    headers: HeaderMap,
    session: Option<Extension<Session>>,
    UrlPath(id): UrlPath<String>,
) -> Answered<DecisionDetail> {
    reads(&plane, Act::ReadDecisions, session.as_deref(), &headers).await?;
    let record = decisions::one(&plane.decisions, &id).await?;
    let help = "compare the ledger of this control plane with that of the mesh: `countersign ledger verify`";
    let head = plane.ledger.at(record.revision).await.map_err(stored)?;
    let head = head.ok_or_else(|| {
        not_found(format!("the decision names revision {}, which this ledger does not have", record.revision), help)
    })?;
    Ok(Json(DecisionDetail { record, mesh: mesh_of(&head) }))
}

async fn tail(
    State(plane): State<Arc<Plane>>,
    headers: HeaderMap,
    session: Option<Extension<Session>>,
    Query(filter): Query<RecordFilter>,
) -> Result<Response, Refusal> {
    let until_ms = reads(&plane, Act::ReadDecisions, session.as_deref(), &headers).await?.until_ms;
    let left = until_ms.map(|until_ms| Duration::from_millis(until_ms.saturating_sub(plane.clock.now_ms())));
    // It ends with what was opened.
    let over = async move {
        match left {
            Some(left) => tokio::time::sleep(left).await,
            None => std::future::pending().await,
        }
    };
    let events = stream::unfold(plane.decisions.tail(), |mut events| async {
        match events.recv().await {
            Ok(event) => Some((event, events)),
            // A reader that does not keep up is told how much it missed.
            Err(RecvError::Lagged(missed)) => Some((TailEvent::Shed(missed), events)),
            Err(RecvError::Closed) => None,
        }
    });
    let shown = events.filter(move |event| std::future::ready(decisions::shows(&filter, event)));
    Ok(lines(shown.map(Ok).take_until(Box::pin(over))))
}

async fn callers(State(plane): State<Arc<Plane>>, UrlPath(given): UrlPath<String>) -> Answered<Vec<Caller>> {
    let help = "`countersign service list` shows those that are there";
    let service = ServiceName::parse(&given).map_err(|e| problem(400, e.to_string(), None, Some(help)))?;
    let callers = plane.storage.run("callers", move |store| store.callers(&service, CALLERS_MAX)).await;
    Ok(Json(callers.map_err(stored)?))
}

async fn list_edges(State(plane): State<Arc<Plane>>) -> Answered<Vec<EdgeView>> {
    Ok(Json(edges::list(&plane).await.map_err(stored)?))
}

async fn authority(State(plane): State<Arc<Plane>>) -> Answered<AuthorityView> {
    let help = "apply a mesh directory first: `countersign apply DIR`";
    let authority = plane.authority().ok_or_else(|| not_found("there is no mesh yet".into(), help))?;
    let view = authority.view().map_err(|e| problem(500, e.to_string(), None, None))?;
    Ok(Json(view))
}

async fn step_authority(
    State(plane): State<Arc<Plane>>,
    session: Option<Extension<Session>>,
    Json(asked): Json<StepAs>,
) -> Answered<Stepped> {
    let operator = asked.shown.operator.clone();
    Ok(Json(rotation::step(&plane, asked, by(session.as_deref(), operator.as_ref())).await?))
}

async fn replace_key(
    State(plane): State<Arc<Plane>>,
    session: Option<Extension<Session>>,
    Json(asked): Json<ReplaceKeyAs>,
) -> Answered<KeyReplaced> {
    let operator = asked.shown.operator.clone();
    Ok(Json(rotation::keys::replace(&plane, asked, by(session.as_deref(), operator.as_ref())).await?))
}

async fn ask_above(
    State(plane): State<Arc<Plane>>,
    session: Option<Extension<Session>>,
    Json(asked): Json<AskAbove>,
) -> Answered<AskedAbove> {
    let operator = asked.shown.operator.clone();
    Ok(Json(rotation::ask_above(&plane, asked, by(session.as_deref(), operator.as_ref())).await?))
}

async fn accept_above(
    State(plane): State<Arc<Plane>>,
    session: Option<Extension<Session>>,
    Json(asked): Json<AcceptAbove>,
) -> Answered<AcceptedAbove> {
    let operator = asked.shown.operator.clone();
    Ok(Json(rotation::accept_above(&plane, asked, by(session.as_deref(), operator.as_ref())).await?))
}

async fn reseal(State(plane): State<Arc<Plane>>, Json(asked): Json<Reseal>) -> Answered<SealedAnew> {
    Ok(Json(sealing::reseal(&plane, asked).await?))
}

async fn ledger(State(plane): State<Arc<Plane>>) -> Response {
    let head = plane.ledger.head();
    let (size, root) = (head.follower.revision().0, head.follower.root());
    let pages = stream::try_unfold(0, move |from| {
        let plane = plane.clone();
        async move {
            if from >= size {
                return Ok::<_, StoreError>(None);
            }
            let limit = (size - from).min(u64::from(PAGE_ENTRIES)) as u32;
            let page = plane.ledger.stored(from, limit).await?;
            let next = from + page.len().max(1) as u64;
            Ok(Some((page, next)))
        }
    });
    let lines_of = move |page: Vec<StoredEntry>| {
        let line = move |stored: StoredEntry| LedgerLine {
            entry: String::from_utf8_lossy(&stored.entry).into_owned(),
            change_set: String::from_utf8_lossy(&stored.change_set).into_owned(),
            root: (stored.index + 1 == size).then_some(root),
        };
        stream::iter(page.into_iter().map(line).map(Ok::<_, io::Error>).collect::<Vec<_>>())
    };
    let entries = pages.map(move |page| page.map_err(io::Error::other).map(lines_of)).flat_map(|page| match page {
        Ok(lines) => lines.left_stream(),
        Err(error) => stream::iter([Err(error)]).right_stream(),
    });
    lines(entries)
}

/// Every text that the change-sets refer to, or referred to once.
async fn ledger_bodies(State(plane): State<Arc<Plane>>) -> Response {
    let size = plane.ledger.head().follower.revision().0;
    let pages = stream::try_unfold((0, BTreeSet::new()), move |(from, mut told)| {
        let plane = plane.clone();
        async move {
            if from >= size {
                return Ok::<_, StoreError>(None);
            }
            let limit = (size - from).min(u64::from(PAGE_ENTRIES)) as u32;
            let page = plane.ledger.stored(from, limit).await?;
            let mut texts = plane.ledger.texts(&page).await?;
            texts.retain(|digest, _| told.insert(*digest));
            Ok(Some((texts, (from + page.len().max(1) as u64, told))))
        }
    });
    let texts = pages.map(|page| page.map_err(io::Error::other)).flat_map(|page| match page {
        Ok(texts) => stream::iter(texts.into_values().map(Ok).collect::<Vec<_>>()),
        Err(error) => stream::iter(vec![Err(error)]),
    });
    lines(texts)
}

async fn newest(plane: &Plane) -> Result<CheckpointView, Refusal> {
    let newest = plane.checkpoints.newest(plane).await.map_err(|error| {
        if let SignError::Store(error) = &error {
            return Refusal(store_problem(error));
        }
        let help = "compare the data directory with a backup and with what agents hold before anything else";
        Refusal(problem(500, error.to_string(), None, Some(help)))
    })?;
    let help = "apply a mesh directory first: `countersign apply DIR`";
    newest.ok_or_else(|| not_found("there is no mesh yet".into(), help))
}

async fn checkpoint(State(plane): State<Arc<Plane>>) -> Answered<CheckpointView> {
    Ok(Json(newest(&plane).await?))
}

fn number(given: &str) -> Result<u64, Refusal> {
    given.parse().map_err(|_| problem(400, format!("`{given}` is not a number"), None, None).into())
}

fn note_of(checkpoint: &CheckpointView) -> Result<Note, Refusal> {
    Note::parse(checkpoint.note.as_bytes()).map_err(|error| problem(500, error.to_string(), None, None).into())
}

async fn proof(State(plane): State<Arc<Plane>>, UrlPath(given): UrlPath<String>) -> Answered<ProofView> {
    let index = number(&given)?;
    let newest = newest(&plane).await?;
    let help = "entries are counted from 0: the entry of revision 4 is entry 3";
    let missing = || not_found(format!("the ledger has {} entries, and none at {index}", newest.size), help);
    let hashes = plane.ledger.inclusion(index, newest.size).ok_or_else(missing)?;
    let entry = plane.ledger.stored(index, 1).await.map_err(stored)?.pop().ok_or_else(missing)?;
    let proof = EntryProof { extra: None, index, hashes, checkpoint: note_of(&newest)? };
    let entry = String::from_utf8_lossy(&entry.entry).into_owned();
    Ok(Json(ProofView { proof: proof.encode(), entry: Some(entry) }))
}

async fn consistency(State(plane): State<Arc<Plane>>, UrlPath(given): UrlPath<String>) -> Answered<ProofView> {
    let old_size = number(&given)?;
    let newest = newest(&plane).await?;
    let help = "give a size that the ledger had: the revision of an older checkpoint";
    let missing = || not_found(format!("the ledger has {} entries, not {old_size}", newest.size), help);
    let proof = plane.ledger.consistency(old_size, newest.size).ok_or_else(missing)?;
    let proof = AddCheckpoint { old_size, proof, checkpoint: note_of(&newest)? };
    Ok(Json(ProofView { proof: proof.encode(), entry: None }))
}

/// Newline-delimited JSON, until the stream ends or the client leaves.
fn lines<T: serde::Serialize>(items: impl Stream<Item = io::Result<T>> + Send + 'static) -> Response {
    let encoded = items.map(|item| {
        let mut line = serde_json::to_vec(&item?)?;
        line.push(b'\n');
        io::Result::Ok(Bytes::from(line))
    });
    ([(header::CONTENT_TYPE, "application/x-ndjson")], Body::from_stream(encoded)).into_response()
}

async fn invite(State(plane): State<Arc<Plane>>, Json(asked): Json<InviteAs>) -> Answered<Invitation> {
    let InviteAs { invite, shown } = asked;
    // What is wrong with the request is said before a factor is used up for it.
    enrol::mistake(&plane, &invite)?;
    acts::pass(&plane, Act::InviteHost, By::Socket(shown.operator.as_ref()), &shown).await?;
    Ok(Json(enrol::invite(&plane, invite).await?))
}

async fn evict_host(
    State(plane): State<Arc<Plane>>,
    session: Option<Extension<Session>>,
    Json(asked): Json<EvictAs>,
) -> Answered<Evicted> {
    let operator = asked.shown.operator.clone();
    Ok(Json(hosts::evict(&plane, asked, by(session.as_deref(), operator.as_ref())).await?))
}

async fn checklist(State(plane): State<Arc<Plane>>, UrlPath(service): UrlPath<ServiceName>) -> Answered<Vec<Checked>> {
    Ok(Json(onboarding::checklist(&plane, &service).await?))
}

async fn list_identities(
    State(plane): State<Arc<Plane>>,
    Query(filter): Query<IdentityFilter>,
) -> Answered<Vec<IdentityView>> {
    Ok(Json(identities::list(&plane, filter).await.map_err(stored)?))
}

async fn revoke_identities(
    State(plane): State<Arc<Plane>>,
    session: Option<Extension<Session>>,
    Json(asked): Json<RevokeAs>,
) -> Answered<Revoked> {
    let operator = asked.shown.operator.clone();
    Ok(Json(identities::revoke(&plane, asked, by(session.as_deref(), operator.as_ref())).await?))
}

async fn list_tokens(
    State(plane): State<Arc<Plane>>,
    headers: HeaderMap,
    session: Option<Extension<Session>>,
    Query(filter): Query<TokenFilter>,
) -> Answered<Vec<TokenView>> {
    reads(&plane, Act::ReadTokens, session.as_deref(), &headers).await?;
    Ok(Json(tokens::list(&plane, filter).await.map_err(stored)?))
}

async fn inspect_token(
    State(plane): State<Arc<Plane>>,
    headers: HeaderMap,
    session: Option<Extension<Session>>,
    Json(InspectToken { token }): Json<InspectToken>,
) -> Answered<TokenInspected> {
    reads(&plane, Act::ReadTokens, session.as_deref(), &headers).await?;
    Ok(Json(tokens::inspect(&plane, &token).await?))
}

async fn revoke_tokens(
    State(plane): State<Arc<Plane>>,
    session: Option<Extension<Session>>,
    Json(asked): Json<RevokeTokensAs>,
) -> Answered<TokensRevoked> {
    let operator = asked.shown.operator.clone();
    Ok(Json(tokens::revoke(&plane, asked, by(session.as_deref(), operator.as_ref())).await?))
}

async fn list_signals(
    State(plane): State<Arc<Plane>>,
    headers: HeaderMap,
    session: Option<Extension<Session>>,
    Query(filter): Query<SignalFilter>,
) -> Answered<Vec<SignalView>> {
    reads(&plane, Act::ReadSignals, session.as_deref(), &headers).await?;
    Ok(Json(signals::list(&plane, filter).await.map_err(stored)?))
}

async fn send_signal(
    State(plane): State<Arc<Plane>>,
    session: Option<Extension<Session>>,
    Json(asked): Json<SendSignalAs>,
) -> Answered<SignalSent> {
    let operator = asked.shown.operator.clone();
    Ok(Json(signals::send(&plane, asked, by(session.as_deref(), operator.as_ref())).await?))
}

async fn clear_signals(
    State(plane): State<Arc<Plane>>,
    session: Option<Extension<Session>>,
    Json(asked): Json<ClearSignalsAs>,
) -> Answered<SignalSent> {
    let operator = asked.shown.operator.clone();
    Ok(Json(signals::clear(&plane, asked, by(session.as_deref(), operator.as_ref())).await?))
}

async fn list_risks(
    State(plane): State<Arc<Plane>>,
    headers: HeaderMap,
    session: Option<Extension<Session>>,
    Query(RiskFilter { subject }): Query<RiskFilter>,
) -> Answered<Vec<RiskView>> {
    reads(&plane, Act::ReadSignals, session.as_deref(), &headers).await?;
    Ok(Json(signals::risks(&plane, subject)))
}

async fn wait_for_signal(
    State(plane): State<Arc<Plane>>,
    UrlPath(number): UrlPath<u64>,
    Query(Timeout { timeout_ms }): Query<Timeout>,
) -> Answered<SignalWaited> {
    let signal = SignalSeq(number);
    let within = Duration::from_millis(timeout_ms.unwrap_or(10_000)).min(WAIT_MAX);
    let deadline = tokio::time::Instant::now() + within;
    let (missing, connected) = plane.publisher.heeded(signal, deadline).await;
    let reached = plane.publisher.signals().sequence() >= signal;
    Ok(Json(SignalWaited { enforced: reached && missing.is_empty(), signal, connected: connected as u32, missing }))
}

async fn list_proposals(State(plane): State<Arc<Plane>>) -> Answered<Vec<Proposal>> {
    Ok(Json(proposals::list(&plane).await?))
}

async fn proposal(State(plane): State<Arc<Plane>>, UrlPath(id): UrlPath<String>) -> Answered<ProposalDetail> {
    Ok(Json(proposals::show(&plane, &id).await?))
}

async fn wait_for_proposal(
    State(plane): State<Arc<Plane>>,
    UrlPath(id): UrlPath<String>,
    Query(Timeout { timeout_ms }): Query<Timeout>,
) -> Answered<Proposal> {
    let within = Duration::from_millis(timeout_ms.unwrap_or(10_000)).min(WAIT_MAX);
    Ok(Json(proposals::wait(&plane, &id, tokio::time::Instant::now() + within).await?))
}

async fn begin_ceremony(
    State(plane): State<Arc<Plane>>,
    UrlPath(id): UrlPath<String>,
    Json(shown): Json<Shown>,
) -> Answered<Ceremony> {
    Ok(Json(proposals::begin_ceremony(&plane, &id, &shown).await?))
}

async fn apply_proposal(
    State(plane): State<Arc<Plane>>,
    UrlPath(id): UrlPath<String>,
    Json(shown): Json<Shown>,
) -> Answered<Applied> {
    Ok(Json(proposals::apply_pending(&plane, &id, shown).await?))
}

async fn countersign(
    State(plane): State<Arc<Plane>>,
    UrlPath(id): UrlPath<String>,
    Json(shown): Json<Shown>,
) -> Answered<AnsweredProposal> {
    Ok(Json(proposals::countersign(&plane, &id, shown).await?))
}

async fn reject(
    State(plane): State<Arc<Plane>>,
    UrlPath(id): UrlPath<String>,
    session: Option<Extension<Session>>,
    Json(shown): Json<Shown>,
) -> Answered<Proposal> {
    Ok(Json(proposals::reject(&plane, &id, answering(session, shown)).await?))
}

async fn withdraw(
    State(plane): State<Arc<Plane>>,
    UrlPath(id): UrlPath<String>,
    session: Option<Extension<Session>>,
    Json(shown): Json<Shown>,
) -> Answered<Proposal> {
    Ok(Json(proposals::withdraw(&plane, &id, answering(session, shown)).await?))
}

/// Whoever is signed in need not show anything for what ends without any effect, as in a browser.
fn answering(session: Option<Extension<Session>>, shown: Shown) -> Answering {
    match session {
        Some(Extension(session)) => Answering::signed_in(session.who),
        None => Answering::Shows(shown),
    }
}

async fn begin_enrolment(State(plane): State<Arc<Plane>>, Json(asked): Json<Enrol>) -> Answered<Enrolment> {
    Ok(Json(mfa::begin(&plane, asked, EnrolsFrom::Socket).await?))
}

async fn enrolment_link(State(plane): State<Arc<Plane>>) -> Answered<EnrolmentLink> {
    if plane.site.is_none() {
        return Err(site::sign_in::no_site().into());
    }
    let help = "an owner invites others: `countersign operator invite NAME`";
    let url = mfa::enrolment_link(&plane).await.map_err(stored)?;
    let url = url.ok_or_else(|| problem(409, "the mesh is protected already", None, Some(help)))?;
    Ok(Json(EnrolmentLink { url }))
}

async fn sessions(State(plane): State<Arc<Plane>>, session: Option<Extension<Session>>) -> Answered<Vec<SessionView>> {
    let seen = session::seen_by(&plane, session.as_deref()).await.map_err(stored)?;
    Ok(Json(seen.iter().map(Session::view).collect()))
}

/// Ending a session gives nobody anything: the mesh's own user needs no factor for it.
async fn end_sessions(
    State(plane): State<Arc<Plane>>,
    session: Option<Extension<Session>>,
    Json(which): Json<EndSessions>,
) -> Answered<SessionsEnded> {
    let seen = session::seen_by(&plane, session.as_deref()).await.map_err(stored)?;
    let sessions = seen.into_iter().filter(|session| {
        which.who.as_ref().is_none_or(|who| *who == session.author().to_string())
            && which.id.as_ref().is_none_or(|id| session.id.starts_with(id.as_str()))
    });
    let sessions: Vec<Session> = sessions.collect();
    if sessions.is_empty() {
        return Err(not_found(
            "there is no such session".into(),
            "`countersign session list` shows those that are open",
        ));
    }
    let ended = sessions.len();
    let by = session.as_ref().map_or(audit::By::Socket, |session| audit::By::SignedIn(session.author().to_string()));
    session::end(&plane, &sessions, by).await.map_err(stored)?;
    tracing::info!(ended, "sessions were ended");
    Ok(Json(SessionsEnded { ended }))
}

async fn confirm_enrolment(
    State(plane): State<Arc<Plane>>,
    UrlPath(id): UrlPath<String>,
    Json(asked): Json<Confirm>,
) -> Answered<Enrolled> {
    Ok(Json(mfa::confirm(&plane, &id, asked).await?))
}
