//! Who is signed in. A session is a random token that a browser holds in a cookie no script can read, or a command in a file beside
//! the key that the session is bound to; here only its hash is kept.
//! It says who asks and approves nothing: what the gate asks for is shown for each change anew.
//!
//! INVARIANT (session-of-somebody): an operator's session is good only while they are one and have the factor that it began with; that
//! of a person whom a provider vouched for only while their groups mean something here, and a command's only as long as the
//! browser's that allowed it.
//!
//! INVARIANT (session-with-its-key): the token of a command's session is good only with a proof of its key, and never as a cookie;
//! a browser's is good only as a cookie.

use std::{collections::BTreeSet, net::IpAddr, sync::Arc};

use axum::{
    extract::FromRequestParts,
    response::{IntoResponse, Redirect, Response},
};
use http::{HeaderMap, HeaderName, HeaderValue, Method, header, request::Parts};
use serde::{Deserialize, Serialize};

use countersign_api::local::{Problem, SessionKind, SessionView};
use countersign_core::{
    assurance::FactorKind,
    canonical::Digest,
    gate::{Author, OWNER},
    identity::{FactorId, OperatorName},
    sign_in::Person,
    state::MeshState,
};

use crate::{
    Plane,
    audit::{self, Event},
    local_api::{Refusal, problem, store_problem},
    proposals,
    site::{guard::text, logout},
    store::{Document, StoreError},
};

/// The kind of its documents.
const KIND: &str = "session";
/// Sessions that there are at the same time.
const SESSIONS_MAX: u32 = 1_024;
/// Sessions of people whom providers vouched for, and of one of them: the others are left to operators.
const VOUCHED_MAX: usize = 512;
const VOUCHED_OF_ONE_MAX: usize = 16;
/// A session ends so long after its last request (NIST SP 800-63B-4, AAL2: at most an hour).
pub const IDLE_MS: u64 = 60 * 60 * 1000;
/// A session ends so long after it began, whatever is done with it (AAL2: at most 24 hours).
pub const LIFETIME_MS: u64 = 12 * 60 * 60 * 1000;
/// The session of a person whom a provider vouched for ends so long after it began: then the provider is asked again.
pub const VOUCHED_LIFETIME_MS: u64 = 60 * 60 * 1000;
/// Its last request is written down when the one that is written is so old.
const WRITE_EVERY_MS: u64 = 60 * 1000;
/// What a browser says of itself is kept up to here, in characters.
const AGENT_CHARS_MAX: usize = 160;
/// Characters of a token.
pub const TOKEN_CHARS: usize = 64;
/// The header in which a page's script shows that it can read the page.
pub const CSRF: HeaderName = HeaderName::from_static("x-countersign-csrf");

/// The header with which htmx asks.
const HX_REQUEST: HeaderName = HeaderName::from_static("hx-request");
/// The header that sends htmx to another page.
const HX_REDIRECT: HeaderName = HeaderName::from_static("hx-redirect");

/// One session.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Session {
    /// The hash of its token, in hexadecimal: what it is called.
    #[serde(skip)]
    pub id: String,
    /// Who.
    #[serde(flatten)]
    pub who: Who,
    /// When it began, in milliseconds since 1970.
    pub began_at_ms: u64,
    /// When it was last used, in milliseconds since 1970; a minute may be missing.
    pub used_at_ms: u64,
    /// Where it began.
    pub address: IpAddr,
    /// What its browser or command said of itself.
    pub agent: String,
    /// What its pages send back with whatever changes something.
    pub csrf: String,
    /// The thumbprint of the key that it is bound to: a command's, in place of a cookie.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
}

/// Whose session it is, and what it rests on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Who {
    /// Of an operator, who showed a factor.
    Operator {
        /// Who.
        operator: OperatorName,
        /// The factor that it began with.
        factor: FactorId,
        /// Its kind.
        kind: FactorKind,
    },
    /// Of somebody whom a provider vouched for.
    Person {
        /// Who.
        person: Person,
        /// What the provider calls its own session of theirs, if it does.
        sid: Option<String>,
        /// When it vouched for them, in seconds since 1970.
        vouched_at_seconds: i64,
        /// The browser's session that allowed it, of a command's.
        allowed_by: Option<String>,
    },
}

impl Who {
    /// Who asks for what is asked for in it.
    pub fn author(&self) -> Author {
        match self {
            Self::Operator { operator, .. } => Author::Operator(operator.clone()),
            Self::Person { person, .. } => Author::Person(person.clone()),
        }
    }

    /// How long it lasts at most.
    pub fn lifetime_ms(&self) -> u64 {
        match self {
            Self::Operator { .. } => LIFETIME_MS,
            Self::Person { .. } => VOUCHED_LIFETIME_MS,
        }
    }

    /// What it began with, in a word.
    pub fn with(&self) -> &'static str {
        match self {
            Self::Operator { kind, .. } => kind.as_str(),
            Self::Person { .. } => "provider",
        }
    }

    /// The same, for a command that is allowed in the session called `session`.
    pub fn of_command(self, session: &str) -> Self {
        match self {
            Self::Person { person, sid, vouched_at_seconds, .. } => {
                Self::Person { person, sid, vouched_at_seconds, allowed_by: Some(session.to_owned()) }
            }
            operator @ Self::Operator { .. } => operator,
        }
    }
}

/// Whom a session begins for.
#[derive(Debug)]
pub struct Beginning {
    /// Who.
    pub who: Who,
    /// Where.
    pub address: IpAddr,
    /// What the browser or command said of itself.
    pub agent: String,
    /// The thumbprint of the key that it is bound to, for a command.
    pub key: Option<String>,
}

impl Session {
    /// When it ends unless it is used, in milliseconds since 1970.
    pub fn expires_at_ms(&self) -> u64 {
        (self.used_at_ms + IDLE_MS).min(self.began_at_ms + self.who.lifetime_ms())
    }

    /// Who asks for what is asked for in it.
    pub fn author(&self) -> Author {
        self.who.author()
    }

    /// The operator, if it is of one.
    pub fn operator(&self) -> Option<&OperatorName> {
        match &self.who {
            Who::Operator { operator, .. } => Some(operator),
            Who::Person { .. } => None,
        }
    }

    /// The operator; what is said to everybody else.
    pub fn as_operator(&self) -> Result<&OperatorName, Problem> {
        match &self.who {
            Who::Operator { operator, .. } => Ok(operator),
            Who::Person { person, .. } => Err(proposals::no_operator(person)),
        }
    }

    /// Whether `author` is the one.
    pub fn is_author(&self, author: &Author) -> bool {
        match (&self.who, author) {
            (Who::Operator { operator, .. }, Author::Operator(author)) => operator == author,
            (Who::Person { person, .. }, Author::Person(author)) => person.is(author),
            _ => false,
        }
    }

    /// Whether `other` is of the same one.
    pub fn is_of_same(&self, other: &Self) -> bool {
        self.is_author(&other.author())
    }

    /// What holds it.
    pub fn held_by(&self) -> SessionKind {
        if self.key.is_some() { SessionKind::CommandLine } else { SessionKind::Browser }
    }

    /// As it is told.
    pub fn view(&self) -> SessionView {
        SessionView {
            id: self.id.clone(),
            who: self.author().to_string(),
            kind: self.held_by(),
            factor: self.who.with().into(),
            address: self.address.to_string(),
            agent: self.agent.clone(),
            began_at_ms: self.began_at_ms,
            used_at_ms: self.used_at_ms,
            expires_at_ms: self.expires_at_ms(),
        }
    }

    fn document(&self) -> Document {
        Document {
            kind: KIND,
            key: self.id.clone(),
            bytes: serde_json::to_vec(self).expect("INVARIANT: a session is JSON with string keys"),
            expires_at_ms: self.expires_at_ms(),
        }
    }

    fn read(id: String, bytes: &[u8]) -> Option<Self> {
        Some(Self { id, ..serde_json::from_slice(bytes).ok()? })
    }
}

/// Begins a session and returns its token, which is told once.
pub async fn begin(plane: &Plane, beginning: Beginning) -> Result<String, Problem> {
    let Beginning { who, address, mut agent, key } = beginning;
    if let Some((end, _)) = agent.char_indices().nth(AGENT_CHARS_MAX) {
        agent.truncate(end);
    }
    let (token, now_ms) = (random(), plane.clock.now_ms());
    let session = Session {
        id: id_of(&token),
        who,
        began_at_ms: now_ms,
        used_at_ms: now_ms,
        address,
        agent,
        csrf: random(),
        key,
    };
    if let Who::Person { .. } = session.who {
        has_room(plane, &session).await?;
    }
    let document = session.document();
    let kept = plane.storage.run("put_session", move |store| store.put_document(&document, now_ms, SESSIONS_MAX)).await;
    if !kept.map_err(|error| store_problem(&error))? {
        return Err(problem(429, "too many sessions are open", None, Some("sign out somewhere, or wait")));
    }
    // What it rests on may have ended while it began.
    let stands = stands(plane, &session).await.map_err(|error| store_problem(&error))?;
    if !stands || logout::is_over(plane, &session.who).await.map_err(|error| store_problem(&error))? {
        forget(plane, vec![session.id]).await.map_err(|error| store_problem(&error))?;
        let help = "sign in again, if you still can";
        return Err(problem(403, "the session ended at the moment it began", None, Some(help)));
    }
    let (who, with) = (session.author().to_string(), session.who.with());
    tracing::info!(who, session = &session.id[..12], with, %address, "somebody signed in");
    plane.tell(Event::SignedIn { who, session: audit::short(&session.id), with, address, held_by: session.held_by() });
    Ok(token)
}

/// Whether there is room for one more session of a person whom a provider vouched for. Some more may begin at the same moment.
async fn has_room(plane: &Plane, session: &Session) -> Result<(), Problem> {
    let open = list(plane).await.map_err(|error| store_problem(&error))?;
    let vouched = open.iter().filter(|other| other.operator().is_none());
    let help = Some("sign out somewhere, or wait: each ends within the hour");
    if vouched.clone().filter(|other| other.is_of_same(session)).count() >= VOUCHED_OF_ONE_MAX {
        return Err(problem(429, "too many sessions of yours are open", None, help));
    }
    if vouched.count() >= VOUCHED_MAX {
        return Err(problem(429, "too many sessions are open", None, help));
    }
    Ok(())
}

/// The session of a browser's `token`, if it is good now. `is_used` is false for what a page asks by itself: nobody has to sit before it.
pub async fn find(plane: &Plane, token: &str, is_used: bool) -> Result<Option<Session>, StoreError> {
    find_held(plane, token, None, is_used).await
}

/// The session of a command's `token`, if it is good now and bound to the key with this thumbprint, of which a proof was shown.
pub async fn find_bound(plane: &Plane, token: &str, key: &str) -> Result<Option<Session>, StoreError> {
    find_held(plane, token, Some(key), true).await
}

async fn find_held(
    plane: &Plane,
    token: &str,
    key: Option<&str>,
    is_used: bool,
) -> Result<Option<Session>, StoreError> {
    let (id, now_ms) = (id_of(token), plane.clock.now_ms());
    let asked = id.clone();
    let found = plane.storage.run("session", move |store| store.document(KIND, &asked, now_ms)).await?;
    let Some((bytes, mut session)) = found.and_then(|bytes| Session::read(id, &bytes).map(|session| (bytes, session)))
    else {
        return Ok(None);
    };
    if session.key.as_deref() != key {
        return Ok(None);
    }
    if !stands(plane, &session).await? {
        forget(plane, vec![session.id]).await?;
        return Ok(None);
    }
    if is_used && now_ms >= session.used_at_ms + WRITE_EVERY_MS {
        session.used_at_ms = now_ms;
        let document = session.document();
        // Somebody else may have written the same at the same moment.
        let _ = plane
            .storage
            .run("use_session", move |store| store.swap_document(KIND, &document.key, &bytes, &document))
            .await?;
    }
    Ok(Some(session))
}

/// Whether the mesh, as it is, still knows whose session it is.
fn is_known(state: &MeshState, session: &Session) -> bool {
    match &session.who {
        Who::Operator { operator, factor, .. } => {
            state.operators.get(operator).is_some_and(|operator| operator.factors.contains_key(factor))
        }
        Who::Person { person, .. } => !person.roles(state).is_empty(),
    }
}

/// Whether all that a session rests on is there.
async fn stands(plane: &Plane, session: &Session) -> Result<bool, StoreError> {
    if !is_known(plane.ledger.head().follower.state(), session) {
        return Ok(false);
    }
    match &session.who {
        Who::Person { allowed_by: Some(id), .. } => Ok(read(plane, id).await?.is_some()),
        Who::Operator { .. } | Who::Person { .. } => Ok(true),
    }
}

async fn read(plane: &Plane, id: &str) -> Result<Option<Session>, StoreError> {
    let (key, now_ms) = (id.to_owned(), plane.clock.now_ms());
    let found = plane.storage.run("session", move |store| store.document(KIND, &key, now_ms)).await?;
    Ok(found.and_then(|bytes| Session::read(id.to_owned(), &bytes)))
}

/// Whether the session called `id` has ended. Asking does not use it.
pub async fn has_ended(plane: &Plane, id: &str) -> Result<bool, StoreError> {
    match read(plane, id).await? {
        Some(session) => Ok(!stands(plane, &session).await?),
        None => Ok(true),
    }
}

/// All sessions that are good now.
pub async fn list(plane: &Plane) -> Result<Vec<Session>, StoreError> {
    let now_ms = plane.clock.now_ms();
    let found = plane.storage.run("sessions", move |store| store.documents(KIND, now_ms)).await?;
    let mut sessions: Vec<_> = found.into_iter().filter_map(|(id, bytes)| Session::read(id, &bytes)).collect();
    let head = plane.ledger.head();
    let ids: BTreeSet<String> = sessions.iter().map(|session| session.id.clone()).collect();
    sessions.retain(|session| {
        let is_allowed = match &session.who {
            Who::Person { allowed_by: Some(id), .. } => ids.contains(id),
            Who::Operator { .. } | Who::Person { .. } => true,
        };
        is_allowed && is_known(head.follower.state(), session)
    });
    Ok(sessions)
}

/// Those that may be seen and ended by who asks: one's own, those of everybody by an owner, and by whoever has the socket.
pub async fn seen_by(plane: &Plane, asks: Option<&Session>) -> Result<Vec<Session>, StoreError> {
    let mut sessions = list(plane).await?;
    if let Some(own) = asks {
        let head = plane.ledger.head();
        let is_owner = is_owner(head.follower.state(), own);
        sessions.retain(|session| is_owner || session.is_of_same(own));
    }
    Ok(sessions)
}

/// Whether who is signed in may see and end the sessions of others: an operator who is an owner.
pub fn is_owner(state: &MeshState, session: &Session) -> bool {
    let operator = session.operator().and_then(|name| state.operators.get(name));
    operator.is_some_and(|operator| operator.roles.contains(OWNER))
}

/// Ends sessions, as `by` asks.
pub async fn end(plane: &Plane, sessions: &[Session], by: audit::By) -> Result<(), StoreError> {
    forget(plane, sessions.iter().map(|session| session.id.clone()).collect()).await?;
    for session in sessions {
        let (who, session) = (session.author().to_string(), audit::short(&session.id));
        plane.tell(Event::SignedOut { who, session, by: by.clone() });
    }
    Ok(())
}

async fn forget(plane: &Plane, ids: Vec<String>) -> Result<(), StoreError> {
    plane.storage.run("end_sessions", move |store| store.forget_documents(KIND, &ids)).await
}

fn id_of(token: &str) -> String {
    Digest::of(token.as_bytes()).to_string()
}

/// 256 random bits, in hexadecimal.
pub fn random() -> String {
    let mut bytes = [0; 32];
    aws_lc_rs::rand::fill(&mut bytes).expect("INVARIANT: the system's random source does not fail");
    hex::encode(bytes)
}

/// The cookie that holds the token: only a page of this very host can set one of this name where there is TLS.
fn cookie_name(plane: &Plane) -> &'static str {
    match plane.site.as_ref().is_some_and(|site| site.is_https) {
        true => "__Host-countersign",
        false => "countersign",
    }
}

/// Sets the cookie, or takes it away.
pub fn set_cookie(plane: &Plane, token: Option<&str>) -> HeaderValue {
    let secure = if cookie_name(plane).starts_with("__Host-") { "; Secure" } else { "" };
    // A shorter session ends by itself.
    let (value, age) = token.map_or(("", 0), |token| (token, LIFETIME_MS / 1000));
    let text = format!("{}={value}; Path=/; Max-Age={age}; HttpOnly; SameSite=Strict{secure}", cookie_name(plane));
    HeaderValue::from_str(&text).expect("INVARIANT: a token is hexadecimal")
}

/// The token in the request's cookies.
pub fn token_of<'a>(plane: &Plane, headers: &'a HeaderMap) -> Option<&'a str> {
    token_named(cookie_name(plane), headers)
}

/// The token in the request's cookie of this name.
pub fn token_named<'a>(cookie: &str, headers: &'a HeaderMap) -> Option<&'a str> {
    let cookies = headers.get_all(header::COOKIE).iter().filter_map(|value| value.to_str().ok());
    let mut pairs = cookies.flat_map(|line| line.split(';')).filter_map(|pair| pair.trim().split_once('='));
    let (_, token) = pairs.find(|(name, _)| *name == cookie)?;
    (token.len() == TOKEN_CHARS).then_some(token)
}

/// Whether a page asks to be brought up to date, as htmx says it, or listens for news.
fn asks_by_itself(headers: &HeaderMap) -> bool {
    headers.contains_key(HX_REQUEST) || text(headers, header::ACCEPT) == Some("text/event-stream")
}

/// Whoever is signed in, if anybody is. Pages that strangers may see take this.
pub struct Visitor(pub Option<Session>);

impl FromRequestParts<Arc<Plane>> for Visitor {
    type Rejection = Response;

    async fn from_request_parts(parts: &mut Parts, plane: &Arc<Plane>) -> Result<Self, Response> {
        let Some(token) = token_of(plane, &parts.headers) else { return Ok(Self(None)) };
        match find(plane, token, !asks_by_itself(&parts.headers)).await {
            Ok(session) => Ok(Self(session)),
            Err(error) => Err(Refusal::from(store_problem(&error)).into_response()),
        }
    }
}

/// Without a session a page is not shown, and the way to one is; a request that changes something also shows that a page of this
/// session sent it.
impl FromRequestParts<Arc<Plane>> for Session {
    type Rejection = Response;

    async fn from_request_parts(parts: &mut Parts, plane: &Arc<Plane>) -> Result<Self, Response> {
        let Visitor(session) = Visitor::from_request_parts(parts, plane).await?;
        let is_safe = matches!(parts.method, Method::GET | Method::HEAD);
        let Some(session) = session else {
            if is_safe {
                let path = parts.uri.path_and_query().map_or("/", |path| path.as_str());
                let next: String =
                    path.bytes().flat_map(|byte| format!("%{byte:02X}").into_bytes()).map(char::from).collect();
                if parts.headers.contains_key(HX_REQUEST) {
                    let refused = Refusal::from(problem(401, "nobody is signed in", None, None));
                    return Err(([(HX_REDIRECT, format!("/sign-in?next={next}"))], refused).into_response());
                }
                return Err(Redirect::to(&format!("/sign-in?next={next}")).into_response());
            }
            let help = "sign in again; nothing was changed";
            return Err(Refusal::from(problem(401, "nobody is signed in", None, Some(help))).into_response());
        };
        let shown = text(&parts.headers, CSRF).unwrap_or_default();
        if !is_safe
            && aws_lc_rs::constant_time::verify_slices_are_equal(shown.as_bytes(), session.csrf.as_bytes()).is_err()
        {
            plane.metrics.refused("csrf");
            let help = "load the page again";
            return Err(Refusal::from(problem(403, "a page of this session has to send this", None, Some(help)))
                .into_response());
        }
        Ok(session)
    }
}
