//! Access tokens for workloads: which each instance is issued, which there are, and taking them back. Only what a token says is kept;
//! the token itself goes to the agent that asked and nowhere else, and is in no log.
//!
//! INVARIANT (token-follows-policy): a token is for the services that its caller declares, and for no operation that no policy in force
//! may permit it.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use countersign_api::{
    local::{Problem, RevokeTokensAs, RevokedBy, TokenFilter, TokenInspected, TokenView, TokensRevoked},
    mesh::IssuedToken,
};
use countersign_core::{
    canonical::Digest,
    change::Revision,
    gate::act::Act,
    identity::{InstanceId, ServiceName, SpiffeId},
    jws::TOKEN_BYTES_MAX,
    oauth,
    policy::{Grants, Library},
    record::DecisionRecord,
    signal::{Serial, Signal, SignalSeq, TokenRevocation, TokensMeant, statement::Subject},
    token::{self, Claims, Confirmation, Scope, Thumbprint, TokenFault, TokenId},
};
use parking_lot::Mutex;
use serde_json::Value;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::{
    Plane,
    acts::{self, By},
    audit::{self, Event},
    authority::Authority,
    identities::catch_up,
    ledger::Head,
    local_api::{problem, store_problem},
    signals::{self, Noticed},
    store::{Store, StoreError, StoredSignal, StoredToken},
};

/// How long a token lives, as long as the certificate that it is bound to does.
pub const TOKEN_LIFETIME: Duration = Duration::from_secs(5 * 60);
/// Revocations of tokens that hold at the same time. With more, every token that was issued until then is revoked instead: nothing
/// that was taken back is good again.
pub const TOKENS_REVOKED_MAX: u32 = 65_536;
/// Tokens that one question is answered with at most.
pub const TOKENS_MAX: u32 = 10_000;
/// How long after its revocation a token may still be on its way, in milliseconds.
const ON_ITS_WAY_MS: u64 = 30_000;
/// Tokens that were told to be stolen and are remembered, so that each is told once.
const THEFTS_MAX: usize = 1_024;

/// What the tokens of each service are for, at one revision.
#[derive(Default)]
pub struct Granted {
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    revision: Revision,
    library: Library,
    grants: Grants,
    by_caller: BTreeMap<ServiceName, Arc<BTreeMap<ServiceName, Scope>>>,
}

/// A sign that somebody shows a token that is not theirs.
#[derive(Debug, Clone)]
pub struct Theft {
    /// The token.
    pub id: TokenId,
    /// What was wrong with it.
    pub fault: TokenFault,
    /// The decision that says so.
    pub decision: String,
    /// Who showed it.
    pub shown_by: String,
    /// From where.
    pub origin: String,
    /// When, in milliseconds since 1970.
    pub at_ms: u64,
}

/// The stolen tokens that were told last.
#[derive(Default)]
pub struct Thefts(Mutex<BTreeSet<TokenId>>);

impl Thefts {
    /// Whether it is told for the first time.
    fn is_new(&self, id: TokenId) -> bool {
        let mut told = self.0.lock();
        while told.len() >= THEFTS_MAX {
            told.pop_first(); // the oldest has expired first
        }
        told.insert(id)
    }

    fn forget(&self, id: TokenId) {
        self.0.lock().remove(&id);
    }
}

/// The certificate that tokens are asked to be bound to, as far as it is looked at.
pub struct Leaf {
    /// SHA-256 of its DER.
    pub thumbprint: Thumbprint,
    /// When it expires, in seconds since 1970.
    pub not_after: i64,
}

impl Leaf {
    /// Reads a certificate: its serial number, the SHA-256 of its key's SubjectPublicKeyInfo, and the rest.
    pub fn read(der: &[u8]) -> Option<(Serial, Digest, Self)> {
        let (_, certificate) = X509Certificate::from_der(der).ok()?;
        let serial = Serial::from_der(certificate.raw_serial())?;
        let key = Digest::of(certificate.public_key().raw);
        let not_after = certificate.validity().not_after.timestamp();
        Some((serial, key, Self { thumbprint: Thumbprint::of_certificate(der), not_after }))
    }
}

impl Granted {
    /// What the tokens of `caller` are for, by the service that demands them.
    fn of(&self, head: &Head, caller: &ServiceName) -> Arc<BTreeMap<ServiceName, Scope>> {
        let follower = &head.follower;
        let mut inner = self.inner.lock();
        let Inner { library, grants, by_caller, .. } = inner.at(head);
        let known = by_caller.entry(caller.clone());
        known.or_insert_with(|| Arc::new(grants.of(follower.state(), library, caller))).clone()
    }

    /// What a token of `principal` for `service` is for; `None` where the service has no law.
    pub(crate) fn at(&self, head: &Head, principal: &SpiffeId, service: &ServiceName) -> Option<Scope> {
        let mut inner = self.inner.lock();
        let Inner { library, grants, .. } = inner.at(head);
        grants.at(head.follower.state(), library, principal, service)
    }
}

impl Inner {
    /// The same, at the revision of `head`.
    fn at(&mut self, head: &Head) -> &mut Self {
        let follower = &head.follower;
        let Self { revision, library, grants, by_caller } = self;
        if *revision != follower.revision() {
            *revision = follower.revision();
            by_caller.clear();
            // A text that cannot be read was not admitted; a law that needs one is not made.
            let _ = library.take_up(follower.state(), |digest| follower.bodies().get(digest));
            library.retain(|digest| follower.bodies().get(digest).is_some());
            grants.retain(follower.state());
        }
        self
    }
}

/// Signs the tokens that `instance`, which runs on `host`, needs now, bound to its certificate.
pub async fn issue(
    plane: &Plane,
    authority: &Authority,
    host: &ServiceName,
    instance: &InstanceId,
    leaf: &Leaf,
) -> Result<Vec<IssuedToken>, StoreError> {
    let granted = plane.granted.of(&plane.ledger.head(), &instance.service());
    if granted.is_empty() {
        return Ok(Vec::new());
    }
    let now_ms = plane.clock.now_ms();
    let of_instance = TokenFilter { instance: Some(instance.clone()), ..TokenFilter::default() };
    let held = plane.storage.run("tokens", move |store| store.tokens(&of_instance, now_ms, TOKENS_MAX)).await?;
    let (subject, issuer) = (authority.trust_domain().workload(&instance.service()), authority.token_issuer());
    let issued_at = (now_ms / 1000).cast_signed();
    let expires_at = (issued_at + TOKEN_LIFETIME.as_secs().cast_signed()).min(leaf.not_after);
    let (mut stored, mut issued) = (Vec::new(), Vec::new());
    for (service, scope) in &*granted {
        let audience = authority.trust_domain().workload(service);
        let id = new_id(now_ms);
        let bound = Confirmation::Certificate(leaf.thumbprint);
        let same = |claims: &&Claims| claims.audience == audience && claims.confirmation == bound;
        let family = held.iter().map(|one| &one.claims).find(same).map_or(id, |claims| claims.family);
        let claims = Claims {
            issuer: issuer.clone(),
            subject: subject.clone(),
            audience,
            client_id: subject.clone(),
            issued_at,
            expires_at,
            id,
            scope: scope.clone(),
            confirmation: bound,
            instance: Some(instance.clone()),
            family,
            actor: None,
        };
        let (token, expires_at_ms) = (authority.sign_token(&claims), expires_at.unsigned_abs() * 1000);
        issued.push(IssuedToken { service: service.to_string(), token, expires_at_ms });
        stored.push(StoredToken { claims, host: Some(host.clone()) });
    }
    let count = stored.len() as u64;
    plane.storage.run("put_tokens", move |store| store.put_tokens(&stored, now_ms)).await?;
    plane.metrics.tokens_issued.inc_by(count);
    Ok(issued)
}

/// 80 random bits after the time: nobody guesses the id of a token.
pub(crate) fn new_id(now_ms: u64) -> TokenId {
    let mut random = [0; 10];
    aws_lc_rs::rand::fill(&mut random).expect("INVARIANT: the system's random source does not fail");
    TokenId::new(now_ms, random)
}

/// Those that `filter` means, the newest first.
pub async fn list(plane: &Plane, filter: TokenFilter) -> Result<Vec<TokenView>, StoreError> {
    let now_ms = plane.clock.now_ms();
    let found = plane.storage.run("tokens", move |store| store.tokens(&filter, now_ms, TOKENS_MAX)).await?;
    let signals = plane.publisher.signals();
    let view = |StoredToken { claims, host }: StoredToken| {
        let revoked = signals.is_token_revoked(&claims);
        Some(TokenView {
            id: claims.id,
            family: claims.family,
            service: claims.audience.service()?,
            subject: claims.subject,
            instance: claims.instance,
            host,
            scope: claims.scope,
            certificate: claims.confirmation.certificate().copied(),
            key: claims.confirmation.key().copied(),
            issued_at_ms: claims.id.issued_at_ms(),
            expires_at_ms: claims.expires_at.unsigned_abs() * 1000,
            revoked,
        })
    };
    Ok(found.into_iter().filter_map(view).collect())
}

/// The revocations that hold, the newest first, with who asked for each and why.
pub async fn revocations(plane: &Plane) -> Result<Vec<(TokenRevocation, RevokedBy)>, StoreError> {
    let signals = plane.storage.run("signals", |store| store.signals(SignalSeq(0))).await?;
    let of_tokens = |one: StoredSignal| match one.signal {
        Signal::Tokens(revoked) => Some((revoked, one.by)),
        Signal::Certificate(_) | Signal::Stated(_) => None,
    };
    Ok(signals.into_iter().rev().filter_map(of_tokens).collect())
}

/// Says what a token says of itself, and whether it would be believed now.
pub async fn inspect(plane: &Plane, token: &str) -> Result<TokenInspected, Problem> {
    let help = "apply a mesh directory first: `countersign apply DIR`";
    let authority = plane.authority().ok_or_else(|| problem(409, "there is no mesh yet", None, Some(help)))?;
    let authorities = authority.bundle().token_authorities().ready();
    let now_seconds = (plane.clock.now_ms() / 1000).cast_signed();
    let mut parts = token.split('.').take(2).map(as_json);
    let (header, claims) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    let audience = claims["aud"].as_str().and_then(|audience| SpiffeId::parse(audience).ok());
    let audience = audience.unwrap_or_else(|| authority.trust_domain().control());
    let of_service = claims["iss"].as_str().filter(|issuer| **issuer != *authorities.issuer);
    let of_service = of_service.and_then(|issuer| oauth::verify(token, issuer, &authorities.keys, now_seconds));
    let verified = match of_service {
        Some(claims) => Ok(claims),
        None => token::verify(token, &authorities, &audience, now_seconds).map(|verified| verified.claims().clone()),
    };
    let (fault, id) = match verified {
        Err((fault, id)) => (Some(fault), id),
        Ok(claims) => {
            let head = plane.ledger.head();
            let is_nobodys = !oauth::is_client(head.follower.state(), &claims.client_id);
            let is_revoked = is_nobodys || plane.publisher.signals().is_token_revoked(&claims);
            (is_revoked.then_some(TokenFault::Revoked), Some(claims.id))
        }
    };
    let issued = match id {
        None => None,
        Some(id) => {
            let filter = TokenFilter { id: Some(id), ..TokenFilter::default() };
            list(plane, filter).await.map_err(|error| store_problem(&error))?.into_iter().next()
        }
    };
    Ok(TokenInspected { header, claims, fault, issued })
}

fn as_json(part: &str) -> Value {
    let bytes = URL_SAFE_NO_PAD.decode(part).ok().filter(|_| part.len() <= TOKEN_BYTES_MAX);
    bytes.and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default()
}

/// Makes the tokens that are meant and were issued until now good for nothing, if the gate lets whoever asks.
pub async fn revoke(plane: &Plane, asked: RevokeTokensAs, by: By<'_>) -> Result<TokensRevoked, Problem> {
    let RevokeTokensAs { meant, reason, shown } = asked;
    acts::is_a_reason(&reason)?;
    let opened = acts::pass(plane, Act::RevokeToken, by, &shown).await?;
    let actor = opened.operator.map_or_else(|| "local".to_owned(), |operator| operator.to_string());
    put_revocation(plane, meant, actor, reason).await.map_err(|error| store_problem(&error))
}

/// Answers a theft: what was stolen, and all that was or will be renewed from it until its holder has asked for another, is revoked.
pub async fn answer_theft(plane: &Plane, theft: Theft) {
    let filter = TokenFilter { id: Some(theft.id), ..TokenFilter::default() };
    let now_ms = plane.clock.now_ms();
    let found = plane.storage.run("tokens", move |store| store.tokens(&filter, now_ms, 1)).await;
    let claims = match found {
        Ok(found) => found.into_iter().next().map(|one| one.claims),
        Err(error) => return tracing::error!(%error, token.id = %theft.id, "a stolen token could not be looked up"),
    };
    // One that has expired is worth nothing to anybody. One that is revoked may still be on its way, from its own holder.
    let Some(claims) = claims else { return };
    let Theft { id, fault, decision, shown_by, origin, at_ms } = theft;
    let revoked_at_ms = plane.publisher.signals().token_revoked_at_ms(&claims);
    let is_late = revoked_at_ms.is_some_and(|revoked_at_ms| at_ms > revoked_at_ms + ON_ITS_WAY_MS);
    let is_sign = if fault == TokenFault::Revoked { is_late } else { is_late || revoked_at_ms.is_none() };
    if !is_sign || !plane.thefts.is_new(id) {
        return;
    }
    // A partner's workload may be called as one of ours is.
    let ours = |id: &SpiffeId| id.trust_domain() == claims.subject.trust_domain();
    let thief = SpiffeId::parse(&shown_by).ok().filter(ours).and_then(|id| id.service());
    plane.metrics.thefts.inc();
    let reason = format!("shown by {shown_by}: {}", fault.as_str());
    tracing::error!(
        token.id = %id, token.family = %claims.family, fault = fault.as_str(), shown_by, origin, decision,
        "a stolen access token was shown"
    );
    plane.tell(Event::TokenStolen {
        id: id.to_string(),
        subject: claims.subject.to_string(),
        shown_by: audit::cut(shown_by),
        origin,
        fault: fault.as_str(),
        decision,
    });
    if revoked_at_ms.is_none() {
        let family = TokensMeant::Family(claims.family);
        if let Err(error) = put_revocation(plane, family, "countersign".to_owned(), reason).await {
            plane.thefts.forget(id); // the next who shows it is answered
            tracing::error!(%error, token.id = %id, "a stolen token could not be revoked");
        }
    }
    for subject in [claims.instance.map(Subject::Instance), thief.map(Subject::Workload)].into_iter().flatten() {
        signals::notice(plane, subject, Noticed::Theft(fault)).await;
    }
}

/// Makes the tokens of an instance that runs no more good for nothing. Those of one that is not there are bound to a certificate that
/// is revoked as well; so where revocations are many, those of people go first.
pub async fn retire(plane: &Plane, host: &ServiceName, instance: &InstanceId) -> Result<(), StoreError> {
    let of = TokenFilter { host: Some(host.clone()), instance: Some(instance.clone()), ..TokenFilter::default() };
    let now_ms = plane.clock.now_ms();
    let held = plane.storage.run("tokens", move |store| store.tokens(&of, now_ms, 1)).await?;
    if held.is_empty() || plane.publisher.signals().tokens_revoked().len() > TOKENS_REVOKED_MAX as usize / 2 {
        return Ok(());
    }
    let reason = "its instance ended".to_owned();
    put_revocation(plane, TokensMeant::Instance(instance.clone()), "countersign".to_owned(), reason).await?;
    Ok(())
}

/// The sign of a theft that a record may show. That somebody shows a token that was revoked is one when its holder cannot have sent it.
pub fn theft_of(record: &DecisionRecord) -> Option<Theft> {
    let token = record.inputs.token.as_ref()?;
    let fault = token.fault.filter(|fault| fault.is_theft() || *fault == TokenFault::Revoked)?;
    Some(Theft {
        id: token.id?,
        fault,
        decision: record.id.to_string(),
        shown_by: record.inputs.principal.to_string(),
        origin: record.inputs.origin.to_string(),
        at_ms: record.at_ms,
    })
}

pub(crate) async fn put_revocation(
    plane: &Plane,
    meant: TokensMeant,
    by: String,
    reason: String,
) -> Result<TokensRevoked, StoreError> {
    let by = RevokedBy { at_ms: plane.clock.now_ms(), by, reason };
    // Clocks of control planes may differ by as much as a token may come from the future.
    let expires_at_ms = by.at_ms + TOKEN_LIFETIME.as_millis() as u64 + 60_000;
    let (given, told) = (meant.clone(), by.clone());
    let put = move |store: &mut dyn Store| store.put_token_revocation(&given, expires_at_ms, &by, TOKENS_REVOKED_MAX);
    let (signal, in_force) = plane.storage.run("put_token_revocation", put).await?;
    catch_up(plane).await?;
    plane.metrics.token_revocations.inc();
    tracing::warn!(by = told.by, reason = told.reason, signal = signal.0, meant = %in_force, "access tokens were revoked");
    let (by, reason, meant) = (told.by, audit::cut(told.reason), in_force.to_string());
    plane.tell(Event::TokensRevoked { by, reason, signal: signal.0, meant });
    Ok(TokensRevoked { signal, meant: in_force })
}
