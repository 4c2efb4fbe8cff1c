//! Signing in with a provider of `[sign_in.*]`: a browser is sent there with a question, and comes back with an answer to it. What that
//! opens is a session of a person without a factor here: it reads what the gate lets them read, and what it asks for is countersigned.
//!
//! | request | answer |
//! |---|---|
//! | `GET /sign-in/with/{name}` | sends the browser to the provider, and gives it a cookie that only comes back with it |
//! | `GET /sign-in/with/{name}/answer` | where the provider sends it back: a session, and a page that leads on |
//!
//! The page is there because the way back begins at another site, from where the browser does not send the cookie of the session along.
//!
//! INVARIANT (answer-to-a-question): a provider's answer opens a session only in the browser that was sent there, once, within
//! [`QUESTION_LIFETIME_MS`], when it comes from the provider that was asked and its token says the number that was sent along.

use std::{fs, io, net::IpAddr, path::Path as FilePath, sync::Arc};

use askama::Template;
use axum::{
    Extension,
    extract::{Path, Query, State},
    response::{IntoResponse, Redirect, Response},
};
use http::{HeaderMap, HeaderName, HeaderValue, header};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use countersign_api::local::Problem;
use countersign_core::{
    canonical::Digest,
    sign_in::{Person, SignIn, is_subject},
};

use super::{
    guard::{network_of, text},
    pages::{Frame, Next, page, problem_page},
    place::Site,
    serve::From,
    session::{self, Beginning, Who},
    sign_in::no_site,
};
use crate::{
    Plane,
    audit::{self, Event},
    ledger::Head,
    local_api::{problem, store_problem},
    oidc::{
        TokenRefused, VerifiedToken,
        code::{self, AnswerRefused, CODE_BYTES_MAX, Question},
        keys::Endpoints,
    },
    store::{Document, StoreError},
};

/// The kind of the documents of questions, which are found by what the provider sends back and the browser's cookie together.
const KIND: &str = "sign-in-question";
/// How long a question waits for its answer.
pub const QUESTION_LIFETIME_MS: u64 = 10 * 60 * 1000;
/// Questions that wait at the same time.
const WAITING_MAX: u32 = 4_096;
/// Questions from one network that wait at the same time: an office may be one.
pub const WAITING_FROM_ONE_MAX: usize = 64;
/// Longest client secret, in bytes.
const SECRET_BYTES_MAX: u64 = 4 * 1024;
/// Longest name that a provider gives a session or a token, in bytes.
pub const NAMES_BYTES_MAX: usize = 1_024;
/// Longest path that a sign-in leads on to, in bytes.
const NEXT_BYTES_MAX: usize = 1_024;
/// Groups that a refusal names.
const GROUPS_SHOWN_MAX: usize = 20;

const FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");

/// A question that waits for its answer.
#[derive(Serialize, Deserialize)]
struct Asked {
    sign_in: String,
    /// Who was asked: the URL, whatever the name stands for when the answer comes.
    issuer: String,
    client_id: String,
    nonce: String,
    verifier: String,
    next: String,
    address: IpAddr,
}

/// A sign-in of the mesh as it is, and where its provider answers.
struct Provider<'p> {
    name: &'p str,
    sign_in: SignIn,
    issuer: String,
    redirect_uri: String,
}

impl<'p> Provider<'p> {
    fn named(site: &Site, head: &Head, name: &'p str) -> Result<Self, Problem> {
        let state = head.follower.state();
        let none =
            || problem(404, "this mesh has no such sign-in", None, Some("go back, and choose one that is shown"));
        if !state.is_protected() {
            let help = "enrol one first, by the link that the control plane printed when it started";
            return Err(problem(409, "this mesh has no operator yet", None, Some(help)));
        }
        let sign_in = state.sign_ins.get(name).cloned().ok_or_else(none)?;
        let issuer = state.issuers.get(&sign_in.issuer).ok_or_else(none)?.url.clone();
        // An address of its own for each provider: an answer of one is not taken for an answer of another (RFC 9700, 4.4.2.2).
        let redirect_uri = format!("{}/sign-in/with/{name}/answer", site.origin);
        Ok(Self { name, sign_in, issuer, redirect_uri })
    }

    async fn endpoints(&self, plane: &Plane) -> Result<Endpoints, Problem> {
        let found = plane.providers.endpoints(&self.issuer, plane.clock.now_ms()).await;
        found.map_err(|why| {
            let help = "try again in a minute; meanwhile operators sign in with their passkeys";
            problem(503, "the provider cannot be asked", Some(why.to_string()), Some(help))
        })
    }

    fn question<'a>(&'a self, asked: &'a Asked, state: &'a str) -> Question<'a> {
        Question {
            client_id: &self.sign_in.client_id,
            redirect_uri: &self.redirect_uri,
            groups_claim: &self.sign_in.groups_claim,
            state,
            nonce: &asked.nonce,
            verifier: &asked.verifier,
        }
    }
}

/// Sends a browser to a provider.
pub async fn ask(
    State(plane): State<Arc<Plane>>,
    Extension(From(address)): Extension<From>,
    Path(name): Path<String>,
    Query(next): Query<Next>,
    headers: HeaderMap,
) -> Response {
    // A page of somebody else's signs nobody in.
    if matches!(text(&headers, FETCH_SITE), Some("cross-site" | "same-site")) {
        return Redirect::to("/sign-in").into_response();
    }
    match sent(&plane, address, &name, next.own()).await {
        Ok((cookie, url)) => ([(header::SET_COOKIE, cookie)], Redirect::to(&url)).into_response(),
        Err(refused) => problem_page(&plane, None, &refused),
    }
}

async fn sent(plane: &Plane, address: IpAddr, name: &str, next: String) -> Result<(HeaderValue, String), Problem> {
    let site = plane.site.as_ref().ok_or_else(no_site)?;
    let provider = Provider::named(site, &plane.ledger.head(), name)?;
    let endpoints = provider.endpoints(plane).await?;
    let (state, browser) = (session::random(), session::random());
    let asked = Asked {
        sign_in: name.to_owned(),
        issuer: provider.issuer.clone(),
        client_id: provider.sign_in.client_id.clone(),
        nonce: session::random(),
        verifier: session::random(),
        next: if next.len() <= NEXT_BYTES_MAX { next } else { "/".to_owned() },
        address,
    };
    if !keep(plane, &asked, key_of(&state, &browser)).await.map_err(|error| store_problem(&error))? {
        plane.metrics.refused("too-many-attempts");
        let help = "finish what you began in another window, or wait ten minutes";
        return Err(problem(429, "too many sign-ins wait for their provider", None, Some(help)));
    }
    let url = code::url(&endpoints, &provider.question(&asked, &state));
    Ok((set_cookie(site, Some(&browser)), url))
}

/// False when too many wait.
async fn keep(plane: &Plane, asked: &Asked, key: String) -> Result<bool, StoreError> {
    let now_ms = plane.clock.now_ms();
    let waiting = plane.storage.run("questions", move |store| store.documents(KIND, now_ms)).await?;
    let waiting = waiting.iter().filter_map(|(_, bytes)| serde_json::from_slice::<Asked>(bytes).ok());
    let from_one = waiting.filter(|other| network_of(other.address) == network_of(asked.address)).count();
    if from_one >= WAITING_FROM_ONE_MAX {
        return Ok(false);
    }
    let bytes = serde_json::to_vec(asked).expect("INVARIANT: it is JSON with string keys");
    let document = Document { kind: KIND, key, bytes, expires_at_ms: now_ms + QUESTION_LIFETIME_MS };
    plane.storage.run("put_question", move |store| store.put_document(&document, now_ms, WAITING_MAX)).await
}

/// What a provider sends a browser back with.
#[derive(Deserialize)]
pub struct Answer {
    state: Option<String>,
    code: Option<String>,
    error: Option<String>,
    iss: Option<String>,
}

#[derive(Template)]
#[template(path = "signed_in.html")]
struct SignedInPage {
    frame: Frame,
    name: String,
    next: String,
}

/// Takes a provider's answer.
pub async fn answer(
    State(plane): State<Arc<Plane>>,
    Extension(From(address)): Extension<From>,
    Path(name): Path<String>,
    Query(answer): Query<Answer>,
    headers: HeaderMap,
) -> Response {
    let Some(site) = &plane.site else { return problem_page(&plane, None, &no_site()) };
    let gone = set_cookie(site, None);
    match answered(&plane, site, &name, answer, &headers).await {
        Ok((who, next)) => {
            let agent = text(&headers, header::USER_AGENT).unwrap_or("unknown").to_owned();
            let name = who.author().to_string();
            match session::begin(&plane, Beginning { who, address, agent, key: None }).await {
                Ok(token) => {
                    let opened = page(&SignedInPage { frame: Frame::of(&plane, None, ""), name, next });
                    let mut response =
                        ([(header::SET_COOKIE, session::set_cookie(&plane, Some(&token)))], opened).into_response();
                    response.headers_mut().append(header::SET_COOKIE, gone);
                    response
                }
                Err(refused) => {
                    plane.tell(Event::SignInRefused { who: Some(name), address, why: audit::cut(&*refused.title) });
                    ([(header::SET_COOKIE, gone)], problem_page(&plane, None, &refused)).into_response()
                }
            }
        }
        Err(refused) => {
            let detail = refused.detail.as_deref().unwrap_or_default();
            let sign_in = name.chars().take(64).collect::<String>();
            tracing::info!(%sign_in, %address, why = refused.title, detail, "a sign-in with a provider was refused");
            plane.tell(Event::SignInRefused { who: None, address, why: audit::cut(&*refused.title) });
            ([(header::SET_COOKIE, gone)], problem_page(&plane, None, &refused)).into_response()
        }
    }
}

/// Whom the provider vouches for, and where they wanted to go.
async fn answered(
    plane: &Plane,
    site: &Site,
    name: &str,
    answer: Answer,
    headers: &HeaderMap,
) -> Result<(Who, String), Problem> {
    let again = "sign in again, in one window; an answer is good for ten minutes, and once";
    let refused = |what: &str, detail: Option<String>| problem(403, what, detail, Some(again));
    let unasked = || refused("nothing of this browser waits for this answer", None);
    let browser = session::token_named(cookie_name(site), headers).ok_or_else(unasked)?;
    let state = answer.state.as_deref().filter(|state| state.len() == session::TOKEN_CHARS).ok_or_else(unasked)?;
    let (key, now_ms) = (key_of(state, browser), plane.clock.now_ms());
    // Whatever comes of it, it is taken once.
    let taken = plane.storage.run("take_question", move |store| store.take_document(KIND, &key, now_ms)).await;
    let taken = taken.map_err(|error| store_problem(&error))?;
    let asked = taken.and_then(|bytes| serde_json::from_slice::<Asked>(&bytes).ok()).ok_or_else(unasked)?;
    let provider = Provider::named(site, &plane.ledger.head(), name)?;
    if (asked.sign_in.as_str(), &asked.issuer, &asked.client_id)
        != (name, &provider.issuer, &provider.sign_in.client_id)
    {
        return Err(refused("the answer comes from another provider than was asked", None));
    }
    let endpoints = provider.endpoints(plane).await?;
    // "clients MUST … compare the result to the issuer identifier", and reject what does not say it where it has to (RFC 9207, 2.4).
    let says_another = answer.iss.as_deref().is_some_and(|iss| iss != provider.issuer);
    if says_another || (endpoints.names_itself && answer.iss.is_none()) {
        return Err(refused("the answer does not say that it comes from the provider that was asked", None));
    }
    if let Some(error) = answer.error {
        let word: String = error.chars().filter(|c| c.is_ascii_graphic()).take(60).collect();
        return Err(refused("the provider did not sign you in", Some(format!("it says `{word}`"))));
    }
    let code = answer.code.filter(|code| (1..=CODE_BYTES_MAX).contains(&code.len()));
    let code = code.ok_or_else(|| refused("the answer brings no code", None))?;
    let secret = secret(site, name)?;
    let question = provider.question(&asked, state);
    let redeemed = code::redeem(&plane.providers, &endpoints, &provider.issuer, &question, &code, secret, now_ms).await;
    let token = redeemed.map_err(|why| {
        let status = if matches!(why, AnswerRefused::Token(TokenRefused::Keys(_))) { 503 } else { 403 };
        Problem { status, ..refused("the provider's answer signs nobody in", Some(why.to_string())) }
    })?;
    Ok((vouched(plane, &provider, &token)?, asked.next))
}

/// The person of a token, if they are in a group that means something here.
fn vouched(plane: &Plane, provider: &Provider<'_>, token: &VerifiedToken) -> Result<Who, Problem> {
    let refused =
        |detail: String, help: &str| problem(403, "the provider's answer signs nobody in", Some(detail), Some(help));
    let (claim, help) = (&provider.sign_in.groups_claim, "tell whoever keeps the provider's client for this mesh");
    let subject = token.claim("sub").filter(|subject| is_subject(subject));
    let subject =
        subject.ok_or_else(|| refused("its `sub` is no name of 1 to 255 printable characters".to_owned(), help))?;
    if token.value(claim).is_none() && token.is_elsewhere(claim) {
        let help = "have the provider put only the groups into the token that are assigned to this mesh";
        return Err(refused(format!("you are in too many groups for its `{claim}`"), help));
    }
    let groups = token.list(claim).map_err(|why| refused(why, help))?;
    let person = Person {
        sign_in: provider.name.into(),
        issuer: provider.issuer.clone(),
        client_id: provider.sign_in.client_id.clone(),
        groups_claim: claim.clone(),
        subject,
        groups,
    };
    if person.roles(plane.ledger.head().follower.state()).is_empty() {
        let said = match token.value(claim) {
            None => format!("its token says nothing of `{claim}`"),
            Some(_) => {
                let shown =
                    person.groups.iter().take(GROUPS_SHOWN_MAX).map(|group| group.chars().take(80).collect::<String>());
                format!("its token says `{claim}`: {}", shown.collect::<Vec<_>>().join(", "))
            }
        };
        let help =
            "an owner maps groups to roles in [sign_in.*] of mesh.toml, or invites you as an operator with a passkey";
        return Err(problem(
            403,
            format!("`{person}` is in no group that means anything here"),
            Some(said),
            Some(help),
        ));
    }
    let sid = token.claim("sid").filter(|sid| sid.len() <= NAMES_BYTES_MAX);
    let vouched_at_seconds = token.issued_at_seconds().unwrap_or_default();
    Ok(Who::Person { person, sid, vouched_at_seconds, allowed_by: None })
}

/// What the provider gave the mesh to show, if it did. The file is read each time: it may have been replaced.
fn secret(site: &Site, name: &str) -> Result<Option<Zeroizing<String>>, Problem> {
    let Some(dir) = &site.sign_in_secrets else { return Ok(None) };
    match read_secret(&dir.join(name)) {
        Ok(secret) => Ok(Some(secret)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => {
            tracing::error!(sign_in = name, %error, "a client secret cannot be read");
            let help = "whoever runs the control plane reads its log, and the file in --sign-in-secrets";
            Err(problem(500, "the client secret of this mesh cannot be read", None, Some(help)))
        }
    }
}

fn read_secret(path: &FilePath) -> io::Result<Zeroizing<String>> {
    let no = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_owned());
    if fs::metadata(path)?.len() > SECRET_BYTES_MAX {
        return Err(no("it is too long for a client secret"));
    }
    let text = Zeroizing::new(fs::read_to_string(path)?);
    match text.trim_end_matches(['\r', '\n']) {
        "" => Err(no("it is empty")),
        secret => Ok(Zeroizing::new(secret.to_owned())),
    }
}

fn key_of(state: &str, browser: &str) -> String {
    Digest::of(format!("{state}\n{browser}").as_bytes()).to_string()
}

/// The cookie by which a browser shows that it was sent. It comes back from another site, so it is not as strict as that of a session.
fn cookie_name(site: &Site) -> &'static str {
    if site.is_https { "__Host-countersign-asked" } else { "countersign-asked" }
}

fn set_cookie(site: &Site, browser: Option<&str>) -> HeaderValue {
    let secure = if site.is_https { "; Secure" } else { "" };
    let (value, age) = browser.map_or(("", 0), |browser| (browser, QUESTION_LIFETIME_MS / 1000));
    let text = format!("{}={value}; Path=/; Max-Age={age}; HttpOnly; SameSite=Lax{secure}", cookie_name(site));
    HeaderValue::from_str(&text).expect("INVARIANT: what it holds is hexadecimal")
}
