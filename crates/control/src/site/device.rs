//! How a command on another machine is signed in (RFC 8628): it asks and shows a short code; an operator who has just signed in to the
//! dashboard sees what asks and says yes or no; the command gets a session of that operator, bound to its key.
//!
//! Somebody can send an operator a code of their own command. So the page says what asks, from where and with which key, wants the
//! code compared, and takes a yes only soon after a factor was shown; what the command then gets still needs a factor for
//! whatever the gate asks one for.
//!
//! INVARIANT (device-answered-once): a code is answered once, by an operator whose session began within [`FRESH_MS`], and its session
//! is given once, to the key that asked.

use std::{net::IpAddr, sync::Arc};

use askama::Template;
use axum::{
    Extension, Json,
    extract::{Query, State},
    response::{IntoResponse, Response},
};
use http::{HeaderMap, StatusCode, Uri, header};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use countersign_api::{
    device::{Authorization, CLIENT_ID, GRANT_TYPE, Granted, OAuthError, PAGE_PATH, TOKEN_PATH},
    local::Problem,
};
use countersign_core::canonical::Digest;

use super::{
    guard::{network_of, text},
    pages::{Frame, page, problem_page},
    serve::From,
    session::{self, Beginning, Session, Who},
    words::When,
};
use crate::{
    Plane,
    local_api::{Refusal, problem, store_problem},
    proof::Proof,
    store::{Document, StoreError},
};

/// The kind of its documents, which are found by the hash of the code that the command asks with.
const KIND: &str = "device";
/// How long a code is good.
pub const CODE_LIFETIME_MS: u64 = 10 * 60 * 1000;
/// How long a command waits between two questions, in seconds, and how much longer each time that it did not (RFC 8628, 3.5).
pub const INTERVAL_SECONDS: u64 = 5;
/// How long before an answer its operator has to have shown a factor.
pub const FRESH_MS: u64 = 5 * 60 * 1000;
/// Codes that wait at the same time.
pub const WAITING_MAX: u32 = 256;
/// Codes of one network that wait at the same time.
pub const WAITING_FROM_ONE_MAX: usize = 8;
/// "the character set … BCDFGHJKLMNPQRSTVWXZ" (RFC 8628, 6.1): no vowels, so no words, and nothing that looks like something else.
const LETTERS: &[u8; 20] = b"BCDFGHJKLMNPQRSTVWXZ";
/// Letters of a code: 20^8 of them are some 34 bits, for ten minutes, and whoever tries is counted.
const CODE_LETTERS: usize = 8;
/// What a command says of itself is kept up to here, in characters.
const NAME_CHARS_MAX: usize = 80;
/// Characters of a thumbprint.
const THUMBPRINT_CHARS: usize = 43;
/// Longest form, in bytes.
const FORM_BYTES_MAX: usize = 4 * 1024;
/// How often an answer is written again because the command asked at the same moment.
const ATTEMPTS_MAX: usize = 5;

/// A command that waits for an answer.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Waiting {
    user_code: String,
    /// The thumbprint of its key.
    key: String,
    /// What it calls its machine. Nobody has verified it.
    name: String,
    address: IpAddr,
    agent: String,
    asked_at_ms: u64,
    expires_at_ms: u64,
    /// When it last asked for an answer, and how far questions have to be apart.
    polled_at_ms: u64,
    interval_ms: u64,
    answer: Option<Answer>,
}

/// What an operator said.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Answer {
    Denied,
    /// And whose session it is to be.
    Allowed(Who),
}

impl Waiting {
    fn document(&self, key: &str) -> Document {
        Document {
            kind: KIND,
            key: key.to_owned(),
            bytes: serde_json::to_vec(self).expect("INVARIANT: it is JSON with string keys"),
            // Kept as long again: the command is told that its time is over.
            expires_at_ms: self.expires_at_ms + CODE_LIFETIME_MS,
        }
    }
}

/// Why a command gets nothing, or not yet.
pub(super) struct Refused {
    error: &'static str,
    why: String,
}

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        let body = OAuthError { error: self.error.to_owned(), error_description: Some(self.why) };
        (StatusCode::BAD_REQUEST, Json(body)).into_response()
    }
}

fn refused(error: &'static str, why: impl Into<String>) -> Response {
    Refused { error, why: why.into() }.into_response()
}

fn failed(error: &StoreError) -> Response {
    Refusal::from(store_problem(error)).into_response()
}

/// A form, which is a query string in a body.
pub(super) fn form<T: DeserializeOwned>(headers: &HeaderMap, body: &str, bytes_max: usize) -> Result<T, Refused> {
    let no = |why: &str| Refused { error: "invalid_request", why: why.to_owned() };
    let media = text(headers, header::CONTENT_TYPE).and_then(|media| media.split(';').next()).unwrap_or_default();
    if !media.trim().eq_ignore_ascii_case("application/x-www-form-urlencoded") || body.len() > bytes_max {
        return Err(no(&format!("send a form: application/x-www-form-urlencoded, of at most {bytes_max} bytes")));
    }
    let uri: Uri = format!("/?{body}").parse().map_err(|_| no("the form cannot be read"))?;
    let Query(form) = Query::try_from_uri(&uri).map_err(|error| no(&error.to_string()))?;
    Ok(form)
}

/// What a command asks with (RFC 8628, 3.1; `dpop_jkt` as in RFC 9449, 10).
#[derive(Deserialize)]
struct AuthorizeForm {
    client_id: String,
    dpop_jkt: String,
    #[serde(default)]
    device_name: String,
}

/// A command asks to be signed in.
pub async fn authorize(
    State(plane): State<Arc<Plane>>,
    Extension(From(address)): Extension<From>,
    headers: HeaderMap,
    body: String,
) -> Result<Response, Response> {
    let AuthorizeForm { client_id, dpop_jkt, device_name } =
        form(&headers, &body, FORM_BYTES_MAX).map_err(Refused::into_response)?;
    if client_id != CLIENT_ID {
        return Err(refused("invalid_client", "the only client is `countersign`"));
    }
    let is_base64url = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_');
    if dpop_jkt.len() != THUMBPRINT_CHARS || !dpop_jkt.bytes().all(is_base64url) {
        return Err(refused("invalid_request", "`dpop_jkt` is no SHA-256 thumbprint"));
    }
    let site = plane.site.as_ref().ok_or_else(|| Refusal::from(super::sign_in::no_site()).into_response())?;
    let now_ms = plane.clock.now_ms();
    let waiting = all(&plane).await.map_err(|error| failed(&error))?;
    let is_from_there =
        |other: &Waiting| now_ms < other.expires_at_ms && network_of(other.address) == network_of(address);
    let from_one = waiting.iter().filter(|(.., other)| is_from_there(other)).count();
    let too_many = || {
        plane.metrics.refused("too-many-attempts");
        let help = "answer those that wait on the dashboard, or wait ten minutes";
        Refusal::from(problem(429, "too many commands wait to be signed in", None, Some(help))).into_response()
    };
    if from_one >= WAITING_FROM_ONE_MAX {
        return Err(too_many());
    }
    let user_code = loop {
        let code = user_code();
        if waiting.iter().all(|(.., other)| other.user_code != code) {
            break code;
        }
    };
    let asked = Waiting {
        user_code,
        key: dpop_jkt,
        name: shown(&device_name),
        address,
        agent: shown(text(&headers, header::USER_AGENT).unwrap_or("unknown")),
        asked_at_ms: now_ms,
        expires_at_ms: now_ms + CODE_LIFETIME_MS,
        polled_at_ms: 0,
        interval_ms: INTERVAL_SECONDS * 1000,
        answer: None,
    };
    let device_code = session::random();
    let document = asked.document(&id_of(&device_code));
    let kept = plane.storage.run("put_device", move |store| store.put_document(&document, now_ms, WAITING_MAX)).await;
    if !kept.map_err(|error| failed(&error))? {
        return Err(too_many());
    }
    let page = format!("{}{PAGE_PATH}", site.origin);
    Ok(Json(Authorization {
        device_code,
        verification_uri_complete: format!("{page}?code={}", asked.user_code),
        verification_uri: page,
        user_code: asked.user_code,
        expires_in: CODE_LIFETIME_MS / 1000,
        interval: INTERVAL_SECONDS,
    })
    .into_response())
}

/// What a command asks again and again (RFC 8628, 3.4).
#[derive(Deserialize)]
struct TokenForm {
    grant_type: String,
    client_id: String,
    device_code: String,
}

/// A command asks whether it was answered, with a proof of its key.
pub async fn token(
    State(plane): State<Arc<Plane>>,
    Extension(From(address)): Extension<From>,
    headers: HeaderMap,
    body: String,
) -> Result<Response, Response> {
    let TokenForm { grant_type, client_id, device_code } =
        form(&headers, &body, FORM_BYTES_MAX).map_err(Refused::into_response)?;
    if grant_type != GRANT_TYPE {
        return Err(refused("unsupported_grant_type", format!("the only one is `{GRANT_TYPE}`")));
    }
    if client_id != CLIENT_ID {
        return Err(refused("invalid_client", "the only client is `countersign`"));
    }
    let url = format!("{}{TOKEN_PATH}", plane.site.as_ref().map_or("", |site| site.origin.as_str()));
    let now_ms = plane.clock.now_ms();
    let proof = Proof::verify(&headers, "POST", &url, None, now_ms)
        .map_err(|why| refused("invalid_dpop_proof", why.to_string()))?;
    let id = id_of(&device_code);
    let key = id.clone();
    let found = plane.storage.run("device", move |store| store.document(KIND, &key, now_ms)).await;
    let seen = found.map_err(|error| failed(&error))?;
    let waiting = seen.as_deref().and_then(|bytes| serde_json::from_slice::<Waiting>(bytes).ok());
    let (Some(seen), Some(mut waiting)) = (seen, waiting) else {
        return Err(refused("invalid_grant", "there is no such code, or it was used"));
    };
    if waiting.key != proof.key {
        return Err(refused("invalid_grant", "another key asked with this code"));
    }
    if now_ms >= waiting.expires_at_ms {
        return Err(refused("expired_token", "nobody has answered in time"));
    }
    let is_early = now_ms < waiting.polled_at_ms + waiting.interval_ms;
    match waiting.answer {
        Some(Answer::Denied) => Err(refused("access_denied", "an operator said no")),
        // "the interval MUST be increased by 5 seconds for this and all subsequent requests" (RFC 8628, 3.5).
        _ if is_early => {
            waiting.interval_ms += INTERVAL_SECONDS * 1000;
            poll(&plane, &id, seen, waiting, now_ms).await?;
            Err(refused("slow_down", "ask less often"))
        }
        None => {
            poll(&plane, &id, seen, waiting, now_ms).await?;
            Err(refused("authorization_pending", "nobody has answered yet"))
        }
        Some(Answer::Allowed(_)) => {
            // Of several who ask, one gets it.
            let taken = plane.storage.run("take_device", move |store| store.take_document(KIND, &id, now_ms)).await;
            let taken = taken.map_err(|error| failed(&error))?;
            let taken = taken.and_then(|bytes| serde_json::from_slice::<Waiting>(&bytes).ok());
            let Some(Waiting { answer: Some(Answer::Allowed(who)), name, agent, .. }) = taken else {
                return Err(refused("invalid_grant", "the code was used"));
            };
            let agent = if name.is_empty() { agent } else { format!("{name}, {agent}") };
            let (expires_in, named) = (who.lifetime_ms() / 1000, who.author().to_string());
            let beginning = Beginning { who, address, agent, key: Some(proof.key) };
            let access_token =
                session::begin(&plane, beginning).await.map_err(|problem| Refusal::from(problem).into_response())?;
            Ok(Json(Granted { access_token, token_type: "DPoP".into(), expires_in, who: named }).into_response())
        }
    }
}

/// Writes down that the command asked. An answer that came at the same moment stays.
async fn poll(plane: &Plane, id: &str, seen: Vec<u8>, mut waiting: Waiting, now_ms: u64) -> Result<(), Response> {
    waiting.polled_at_ms = now_ms;
    let document = waiting.document(id);
    let swapped =
        plane.storage.run("poll_device", move |store| store.swap_document(KIND, &document.key, &seen, &document));
    swapped.await.map(drop).map_err(|error| failed(&error))
}

#[derive(Template)]
#[template(path = "device.html")]
struct DevicePage {
    frame: Frame,
    /// As it was typed.
    typed: String,
    asks: Option<Asks>,
    /// Where to sign in again first.
    again: Option<String>,
}

/// What asks, for people.
struct Asks {
    code: String,
    name: String,
    address: String,
    agent: String,
    key: String,
    asked: When,
}

/// Which code.
#[derive(Deserialize)]
pub struct Typed {
    code: Option<String>,
}

/// The page on which an operator sees what asks.
pub async fn device(
    State(plane): State<Arc<Plane>>,
    Extension(From(address)): Extension<From>,
    session: Session,
    Query(Typed { code }): Query<Typed>,
) -> Response {
    let typed = code.unwrap_or_default();
    let mut found = None;
    if !typed.trim().is_empty() {
        if !plane.attempts.count(address) {
            let too_many = problem(429, "too many codes were tried from here", None, Some("wait a minute"));
            return problem_page(&plane, Some(&session), &too_many);
        }
        found = match waiting_for(&plane, &typed).await {
            Ok(found) => Some(found),
            Err(refused) => return problem_page(&plane, Some(&session), &refused),
        };
    }
    let now_ms = plane.clock.now_ms();
    let asks = found.map(|(.., waiting)| Asks {
        code: waiting.user_code,
        name: waiting.name,
        address: waiting.address.to_string(),
        agent: waiting.agent,
        key: waiting.key,
        asked: When::of(waiting.asked_at_ms, now_ms),
    });
    let is_fresh = now_ms < session.began_at_ms + FRESH_MS;
    let again = asks.as_ref().filter(|_| !is_fresh).map(|asks| format!("/sign-in?next=/device%3Fcode%3D{}", asks.code));
    page(&DevicePage { frame: Frame::of(&plane, Some(&session), "/account"), typed, asks, again })
}

/// What an operator says.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Said {
    code: String,
    allow: bool,
}

/// Takes what an operator says.
pub async fn answer(
    State(plane): State<Arc<Plane>>,
    session: Session,
    Json(Said { code, allow }): Json<Said>,
) -> Result<Json<serde_json::Value>, Refusal> {
    if allow && plane.clock.now_ms() >= session.began_at_ms + FRESH_MS {
        let help = "sign in again, and answer within five minutes";
        return Err(problem(403, "it is too long ago that you showed a factor", None, Some(help)).into());
    }
    let said = match allow {
        true => Answer::Allowed(session.who.clone().of_command(&session.id)),
        false => Answer::Denied,
    };
    for _ in 0..ATTEMPTS_MAX {
        let (id, seen, mut waiting) = waiting_for(&plane, &code).await?;
        waiting.answer = Some(said.clone());
        let document = waiting.document(&id);
        let swapped =
            plane.storage.run("answer_device", move |store| store.swap_document(KIND, &id, &seen, &document)).await;
        if swapped.map_err(|error| store_problem(&error))? {
            tracing::info!(who = %session.author(), allow, name = %waiting.name, address = %waiting.address, key = %waiting.key, "a command was answered");
            return Ok(Json(serde_json::json!({ "allowed": allow })));
        }
    }
    Err(problem(409, "the command asked at the same moment", None, Some("answer again")).into())
}

type Found = (String, Vec<u8>, Waiting);

async fn all(plane: &Plane) -> Result<Vec<Found>, StoreError> {
    let now_ms = plane.clock.now_ms();
    let found = plane.storage.run("devices", move |store| store.documents(KIND, now_ms)).await?;
    let read = |(id, bytes): (String, Vec<u8>)| serde_json::from_slice(&bytes).ok().map(|waiting| (id, bytes, waiting));
    Ok(found.into_iter().filter_map(read).collect())
}

/// The command that shows `typed` and waits for an answer.
async fn waiting_for(plane: &Plane, typed: &str) -> Result<Found, Problem> {
    let letters: String =
        typed.chars().filter(char::is_ascii_alphabetic).map(|letter| letter.to_ascii_uppercase()).collect();
    let now_ms = plane.clock.now_ms();
    let found = all(plane).await.map_err(|error| store_problem(&error))?.into_iter().find(|(.., waiting)| {
        waiting.user_code.replace('-', "") == letters && waiting.answer.is_none() && now_ms < waiting.expires_at_ms
    });
    let help = "compare the code with the one in the terminal; it is good for ten minutes, and once";
    found.ok_or_else(|| problem(404, "no command waits with this code", None, Some(help)))
}

fn id_of(device_code: &str) -> String {
    Digest::of(device_code.as_bytes()).to_string()
}

/// Eight letters, four and four. Bytes that would make some letters more likely than others are passed over.
fn user_code() -> String {
    let mut code = String::with_capacity(CODE_LETTERS + 1);
    let fair = u8::MAX - u8::MAX % LETTERS.len() as u8;
    while code.len() <= CODE_LETTERS {
        let mut byte = [0];
        aws_lc_rs::rand::fill(&mut byte).expect("INVARIANT: the system's random source does not fail");
        if code.len() == CODE_LETTERS / 2 {
            code.push('-');
        }
        if byte[0] < fair {
            code.push(char::from(LETTERS[usize::from(byte[0]) % LETTERS.len()]));
        }
    }
    code
}

/// What a command says of itself, as far as it is shown: a line of plain characters.
fn shown(given: &str) -> String {
    given.chars().filter(|c| c.is_ascii_graphic() || *c == ' ').take(NAME_CHARS_MAX).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_code_is_eight_letters_that_make_no_word_and_are_not_mistaken() {
        for _ in 0..200 {
            let code = user_code();
            let (first, second) = code.split_once('-').unwrap();
            assert!(first.len() == 4 && second.len() == 4, "{code}");
            assert!(first.bytes().chain(second.bytes()).all(|letter| LETTERS.contains(&letter)), "{code}");
        }
    }
}
