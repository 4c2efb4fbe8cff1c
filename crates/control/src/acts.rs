//! What operators do without changing anything: reading what the mesh recorded, taking the ledger along, letting a host in. Who asks,
//! what they show for it, what that opens and for how long. No answer of the gate is given here, and nothing is read.
//!
//! What was shown for reading is kept as a grant: for one act of one operator in one session, for minutes, and only while the operator's
//! factors are what they were. The gate is asked anew each time, with the age of what was shown. What was shown
//! for anything else is good once. Grants are documents of the store: every control plane of the mesh knows them.
//!
//! INVARIANT (granted-to-one): what a factor opened is open to nobody else, for nothing else, in no other session, and not for longer.

use serde::{Deserialize, Serialize};

use countersign_api::local::{
    GateOutcome, GateRefusal, KeyChallenge, Opened, Problem, SessionKind, Shown, SignedChallenge,
};
use countersign_core::{
    assurance::{Assurance, Proof, challenge::Acting},
    canonical::Digest,
    gate::{
        Answer, Author, Origin, Requires,
        act::{Act, AskedTo},
    },
    identity::OperatorName,
    policy::Factor,
    state::MeshState,
};

use crate::{
    Plane,
    audit::{self, Event},
    ceremony::{self, CEREMONY_LIFETIME_MS},
    local_api::{problem, store_problem},
    mfa::{self, CodeRefused, ShownFactor, key},
    site::{
        Site,
        session::{Session, Who},
    },
    store::Document,
};

/// How long what was shown for reading is good, whatever the gate says.
pub const GRANT_LIFETIME_MS: u64 = 15 * 60 * 1000;
/// The kind of the documents of grants.
const GRANT_KIND: &str = "grant";
const GRANTS_MAX: u32 = 4_096;
/// The kind of the documents of acts that a key is to open from a page.
const ASKED_KIND: &str = "asked-act";
const ASKED_LIFETIME_MS: u64 = 5 * 60 * 1000;
const ASKED_MAX: u32 = 256;
const CEREMONY_KIND: &str = "act-ceremony";
/// Longest reason that somebody gives for an act, in characters.
const REASON_CHARS_MAX: usize = 256;

/// Who asks.
#[derive(Debug, Clone, Copy)]
pub enum By<'a> {
    /// A process of the mesh's own user, for the operator whom it names.
    Socket(Option<&'a OperatorName>),
    /// Somebody who is signed in.
    Session(&'a Session),
}

/// An act that somebody wants to open: for whom, what, and in which session; in none at the socket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Asked {
    /// For whom.
    pub operator: OperatorName,
    /// What.
    pub act: Act,
    /// The session that it is opened in.
    pub session: Option<String>,
}

/// What a factor opened.
#[derive(Serialize, Deserialize)]
struct Grant {
    shown: ShownFactor,
    /// The operator's factors when it was shown.
    factors: Digest,
}

impl Asked {
    fn of(act: Act, by: By<'_>, state: &MeshState) -> Result<Self, Problem> {
        Ok(match by {
            By::Socket(operator) => Self { operator: mfa::named(state, operator)?, act, session: None },
            By::Session(session) => {
                Self { operator: session.as_operator()?.clone(), act, session: Some(session.id.clone()) }
            }
        })
    }

    /// What its grant is kept under.
    fn key(&self) -> String {
        let session = self.session.as_deref().unwrap_or("socket");
        Digest::of(format!("{}\n{}\n{session}", self.operator, self.act.as_str()).as_bytes()).to_string()
    }
}

/// Whether a reason says something that people can read.
pub(crate) fn is_a_reason(reason: &str) -> Result<(), Problem> {
    if reason.is_empty() || reason.chars().count() > REASON_CHARS_MAX || reason.chars().any(char::is_control) {
        let help = format!("say why in one line of 1 to {REASON_CHARS_MAX} characters: `--reason \"laptop stolen\"`");
        return Err(problem(422, "the reason is no line of text", None, Some(&help)));
    }
    Ok(())
}

/// Lets an act pass, or says what the gate asks for. What `shown` holds is used up only where the gate asks for it.
///
/// Whoever passes is written down.
pub async fn pass(plane: &Plane, act: Act, by: By<'_>, shown: &Shown) -> Result<Opened, Problem> {
    let head = plane.ledger.head();
    let state = head.follower.state();
    if !state.is_protected() {
        return Ok(Opened { operator: None, act, until_ms: None });
    }
    if let By::Session(session @ Session { who: Who::Person { .. }, .. }) = by {
        return pass_vouched(plane, act, session);
    }
    let asked = Asked::of(act, by, state)?;
    let granted = granted(plane, &asked, state).await?;
    let mut until_ms = granted.map(|(_, until_ms)| until_ms);
    let mut answer = judge(plane, &asked, by, granted.map(|(proof, _)| proof));
    let mut why = None;
    if let (Answer::StepUp(requires), Some(otp)) = (&answer, &shown.otp)
        && requires.accepts_code()
    {
        let shown = Shown { otp: Some(otp.clone()), ..Shown::default() };
        match mfa::prove(plane, &asked.operator, &shown).await {
            Ok(proof) => {
                answer = judge(plane, &asked, by, proof);
                if let (Answer::Permit, Some(proof), true) = (&answer, proof, act.only_reads()) {
                    until_ms = Some(grant(plane, &asked, proof).await?);
                }
            }
            Err(CodeRefused::Store(error)) => return Err(store_problem(&error)),
            Err(refused) => why = Some(refused),
        }
    } else if answer == Answer::Permit && !act.only_reads() && granted.is_some() {
        spend(plane, &asked).await?;
    }
    if answer != Answer::Permit {
        tracing::info!(operator = %asked.operator, act = act.as_str(), "an act was not let pass");
        let refused = refusal(plane, &asked, by, &answer, why.as_ref()).await;
        let (who, why) = (asked.operator.to_string(), audit::cut(&*refused.title));
        plane.tell(Event::NotPassed { who, act, from: by.into(), why });
        return Err(refused);
    }
    tell(plane, &asked, by).await?;
    Ok(Opened { operator: Some(asked.operator), act, until_ms })
}

/// What the gate says to somebody whom a provider vouched for: nothing that they could show opens more.
fn judge_vouched(plane: &Plane, act: Act, session: &Session) -> Answer {
    let (head, author) = (plane.ledger.head(), session.author());
    let asked = AskedTo {
        author: &author,
        act,
        state: head.follower.state(),
        assurance: &Assurance::default(),
        signed_in: true,
        origin: Origin::Network(session.address),
        risk: 0,
        now_seconds: mfa::seconds(plane.clock.now_ms()),
    };
    plane.gate.answer_act(&asked, &head)
}

fn pass_vouched(plane: &Plane, act: Act, session: &Session) -> Result<Opened, Problem> {
    let denied = match judge_vouched(plane, act, session) {
        Answer::Permit => return Ok(Opened { operator: None, act, until_ms: None }),
        Answer::Deny(denied) => denied,
        Answer::StepUp(_) | Answer::NeedsCountersign(_) => Vec::new(),
    };
    tracing::info!(who = %session.author(), act = act.as_str(), "an act was not let pass");
    let help = "an owner can invite you as an operator: you enrol a passkey or a security key, and show it";
    let refusal = GateRefusal {
        outcome: GateOutcome::Denied,
        change: None,
        digest: None,
        act: Some(act),
        requires: None,
        url: None,
    };
    let title = format!("{act} is closed to whom a provider vouched for");
    let (who, why) = (session.author().to_string(), audit::cut(&*title));
    plane.tell(Event::NotPassed { who, act, from: By::Session(session).into(), why });
    Err(Problem { refusal: Some(Box::new(refusal)), ..problem(403, title, Some(denied.join("\n")), Some(help)) })
}

/// Whether an act would pass now. It is not done by that, and not written down.
pub async fn may(plane: &Plane, act: Act, session: &Session) -> Result<Answer, Problem> {
    if let Who::Person { .. } = session.who {
        return Ok(judge_vouched(plane, act, session));
    }
    let asked = Asked::of(act, By::Session(session), plane.ledger.head().follower.state())?;
    needed(plane, &asked, session).await
}

/// Whoever reads what is sensitive, or lets a host in, is written down before it is done. What takes something away does not wait
/// for a disk.
async fn tell(plane: &Plane, asked: &Asked, by: By<'_>) -> Result<(), Problem> {
    let passed = Event::Passed { operator: asked.operator.clone(), act: asked.act, from: by.into() };
    match asked.act {
        Act::ReadLedger => return Ok(()),
        Act::RevokeIdentity | Act::RevokeToken | Act::EvictHost | Act::SendSignal | Act::RotateAuthority => {
            plane.tell(passed);
        }
        Act::ReadDecisions | Act::ExportLedger | Act::ReadTokens | Act::ReadSignals | Act::InviteHost => {
            plane.audit.keep(plane.clock.now_ms(), passed).await?;
        }
    }
    let (operator, act) = (&asked.operator, asked.act.as_str());
    match by {
        By::Socket(_) => tracing::info!(%operator, act, origin = "socket", "an act passed the gate"),
        By::Session(session) => {
            tracing::info!(%operator, act, origin = %session.address, session = &session.id[..12], "an act passed the gate");
        }
    }
    Ok(())
}

impl From<By<'_>> for audit::From {
    fn from(by: By<'_>) -> Self {
        match by {
            By::Socket(_) => Self::Socket,
            By::Session(session) => Self::Session { address: session.address, session: audit::short(&session.id) },
        }
    }
}

fn judge(plane: &Plane, asked: &Asked, by: By<'_>, proof: Option<Proof>) -> Answer {
    let head = plane.ledger.head();
    let mut assurance = Assurance::default();
    proof.into_iter().for_each(|proof| assurance.add(proof));
    let author = Author::Operator(asked.operator.clone());
    let now_seconds = mfa::seconds(plane.clock.now_ms());
    let asked = AskedTo {
        author: &author,
        act: asked.act,
        state: head.follower.state(),
        assurance: &assurance,
        signed_in: matches!(by, By::Session(_)),
        origin: match by {
            By::Socket(_) => Origin::Socket,
            By::Session(Session { address, .. }) => Origin::Network(*address),
        },
        risk: plane.gate.risk_of(&author, now_seconds),
        now_seconds,
    };
    plane.gate.answer_act(&asked, &head)
}

/// What was shown for it, if it is still good, and until when.
async fn granted(plane: &Plane, asked: &Asked, state: &MeshState) -> Result<Option<(Proof, u64)>, Problem> {
    let (key, now_ms) = (asked.key(), plane.clock.now_ms());
    let found = plane.storage.run("grant", move |store| store.document(GRANT_KIND, &key, now_ms)).await;
    let found = found.map_err(|error| store_problem(&error))?;
    let grant = found.and_then(|bytes| serde_json::from_slice::<Grant>(&bytes).ok());
    let grant = grant.filter(|grant| factors_of(state, &asked.operator) == Some(grant.factors));
    Ok(grant.map(|Grant { shown, .. }| {
        let began_ms = u64::try_from(shown.at_seconds).unwrap_or(0) * 1000;
        (shown.into(), began_ms + lifetime_ms(asked.act))
    }))
}

fn lifetime_ms(act: Act) -> u64 {
    if act.only_reads() { GRANT_LIFETIME_MS } else { ASKED_LIFETIME_MS }
}

/// Keeps what was shown; returns until when.
async fn grant(plane: &Plane, asked: &Asked, proof: Proof) -> Result<u64, Problem> {
    let head = plane.ledger.head();
    let factors = factors_of(head.follower.state(), &asked.operator).unwrap_or_default();
    let (now_ms, key) = (plane.clock.now_ms(), asked.key());
    let document = Document {
        kind: GRANT_KIND,
        key: key.clone(),
        bytes: serde_json::to_vec(&Grant { shown: proof.into(), factors }).expect("INVARIANT: a grant is JSON"),
        expires_at_ms: now_ms + lifetime_ms(asked.act),
    };
    let until_ms = document.expires_at_ms;
    let kept = plane.storage.run("put_grant", move |store| {
        store.forget_documents(GRANT_KIND, &[key])?;
        store.put_document(&document, now_ms, GRANTS_MAX)
    });
    match kept.await.map_err(|error| store_problem(&error))? {
        true => Ok(until_ms),
        false => Err(problem(429, "too much is open for reading", None, Some("wait a quarter of an hour"))),
    }
}

/// Uses a grant up: of several who ask at the same moment, one passes.
async fn spend(plane: &Plane, asked: &Asked) -> Result<(), Problem> {
    let (key, now_ms) = (asked.key(), plane.clock.now_ms());
    let taken = plane.storage.run("take_grant", move |store| store.take_document(GRANT_KIND, &key, now_ms)).await;
    let taken = taken.map_err(|error| store_problem(&error))?;
    taken
        .map(drop)
        .ok_or_else(|| problem(409, "what was shown was used at the same moment", None, Some("show it again")))
}

fn factors_of(state: &MeshState, operator: &OperatorName) -> Option<Digest> {
    let ids = state.operators.get(operator)?.factors.keys();
    Some(Digest::of(ids.map(|id| id.as_str()).collect::<Vec<_>>().join("\n").as_bytes()))
}

/// What the gate's answer says to the operator. To a command it names the page where a key can be shown.
pub async fn refusal(plane: &Plane, asked: &Asked, by: By<'_>, answer: &Answer, why: Option<&CodeRefused>) -> Problem {
    let act = asked.act;
    let (outcome, requires) = match answer {
        Answer::StepUp(requires) => (GateOutcome::StepUp, Some(*requires)),
        _ => (GateOutcome::Denied, None),
    };
    let url = match (by, requires) {
        (By::Socket(_), Some(_)) => page_for(plane, asked).await,
        (By::Session(session), Some(_)) if session.held_by() == SessionKind::CommandLine => {
            page_for(plane, asked).await
        }
        _ => None,
    };
    let (title, detail, help) = match (answer, why) {
        (_, Some(why)) => (why.to_string(), None, why.help()),
        (Answer::Deny(denied), None) => (
            format!("the change gate denies {act}"),
            Some(denied.join("\n")),
            "`countersign operator list` shows who may do what, docs/gate.md why".to_owned(),
        ),
        _ => {
            let requires = requires.unwrap_or(Requires { factor: Some(Factor::Mfa), ..Requires::default() });
            let help = match (requires.accepts_code(), &url) {
                (true, _) => "give the code of your authenticator app: `--otp CODE`".to_owned(),
                (false, Some(url)) => format!("show your passkey or security key at {url}, and run this again"),
                (false, None) => "a code does not do here".to_owned(),
            };
            (format!("{act} needs {requires}"), None, help)
        }
    };
    let status = if matches!(why, Some(CodeRefused::Throttled { .. })) { 429 } else { 403 };
    let refusal = GateRefusal { outcome, change: None, digest: None, act: Some(act), requires, url };
    Problem { refusal: Some(Box::new(refusal)), ..problem(status, title, detail, Some(&help)) }
}

/// The page where the operator shows a key for it. None when there are no pages, or too many wait already.
async fn page_for(plane: &Plane, asked: &Asked) -> Option<String> {
    let site = plane.site.as_ref()?;
    let id = mfa::random_hex::<16>();
    let now_ms = plane.clock.now_ms();
    let document = Document {
        kind: ASKED_KIND,
        key: id.clone(),
        bytes: serde_json::to_vec(asked).ok()?,
        expires_at_ms: now_ms + ASKED_LIFETIME_MS,
    };
    let kept = plane.storage.run("put_asked", move |store| store.put_document(&document, now_ms, ASKED_MAX)).await;
    kept.is_ok_and(|kept| kept).then(|| format!("{}/acts/{id}", site.origin))
}

/// What `given` names for who is signed in: an act in this very session, or what a command asked for in their name.
pub async fn asked(plane: &Plane, given: &str, session: &Session) -> Result<Asked, Problem> {
    if let Ok(act) = given.parse::<Act>() {
        return Asked::of(act, By::Session(session), plane.ledger.head().follower.state());
    }
    let (key, now_ms) = (given.to_owned(), plane.clock.now_ms());
    let found = plane.storage.run("asked", move |store| store.document(ASKED_KIND, &key, now_ms)).await;
    let found = found.map_err(|error| store_problem(&error))?;
    let asked = found.and_then(|bytes| serde_json::from_slice::<Asked>(&bytes).ok());
    // Whoever it is not for is not told that it is there.
    asked.filter(|asked| session.operator() == Some(&asked.operator)).ok_or_else(|| {
        let help = "it waits for five minutes, for the operator whom the command named: run the command again";
        problem(404, "nothing of yours waits here", None, Some(help))
    })
}

/// What the gate asks of who is signed in, to open it. A permit means that nothing is missing.
pub async fn needed(plane: &Plane, asked: &Asked, session: &Session) -> Result<Answer, Problem> {
    let head = plane.ledger.head();
    let granted = granted(plane, asked, head.follower.state()).await?;
    Ok(judge(plane, asked, By::Session(session), granted.map(|(proof, _)| proof)))
}

/// Opens it with a code, where the gate takes one.
pub async fn open_with_code(plane: &Plane, asked: &Asked, session: &Session, shown: &Shown) -> Result<(), Problem> {
    let by = By::Session(session);
    let answer = needed(plane, asked, session).await?;
    match &answer {
        Answer::StepUp(requires) if requires.accepts_code() => {}
        Answer::Permit => return Ok(()),
        _ => return Err(refusal(plane, asked, by, &answer, None).await),
    }
    let shown = Shown { otp: shown.otp.clone(), ..Shown::default() };
    let proof = mfa::prove(plane, &asked.operator, &shown).await.map_err(|why| why.problem())?;
    opened(plane, asked, session, proof).await
}

/// Hands out what a key is to sign to open it.
pub async fn challenge(plane: &Plane, site: &Site, asked: &Asked) -> Result<KeyChallenge, Problem> {
    let head = plane.ledger.head();
    let anchor = head.keyring.anchor().ok_or_else(|| problem(409, "the mesh is unprotected", None, None))?;
    let nonce = ceremony::put(plane, CEREMONY_KIND, CEREMONY_LIFETIME_MS, asked).await?;
    let challenge = Acting { anchor, act: asked.act, nonce }.encode();
    let keys = key::keys_of(head.follower.state(), &asked.operator);
    let ids: Vec<_> = keys.map(|(id, _)| id.as_str().to_owned()).collect();
    Ok(KeyChallenge { nonce, options: key::request_options(site, &challenge, &ids) })
}

/// Opens it with what a key signed.
pub async fn open_with_key(
    plane: &Plane,
    asked: &Asked,
    session: &Session,
    signed: &SignedChallenge,
) -> Result<(), Problem> {
    let waiting: Option<Asked> = ceremony::take(plane, CEREMONY_KIND, &signed.nonce.to_string()).await?;
    if waiting.as_ref() != Some(asked) {
        return Err(ceremony::none_waits("challenge"));
    }
    let proof = key::prove_act(plane, &asked.operator, asked.act, signed).await?;
    opened(plane, asked, session, Some(proof)).await
}

async fn opened(plane: &Plane, asked: &Asked, session: &Session, proof: Option<Proof>) -> Result<(), Problem> {
    let by = By::Session(session);
    match (judge(plane, asked, by, proof), proof) {
        (Answer::Permit, Some(proof)) => {
            grant(plane, asked, proof).await?;
            tracing::info!(operator = %asked.operator, act = asked.act.as_str(), "an act was opened");
            Ok(())
        }
        (Answer::Permit, None) => Ok(()),
        (answer, _) => Err(refusal(plane, asked, by, &answer, None).await),
    }
}
