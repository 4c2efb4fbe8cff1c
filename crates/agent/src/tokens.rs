//! The access tokens that the proxies of this host attach: asked for with each new identity, before it is used; renewed at half life,
//! and at once when what they are to be for has changed or control has revoked one. No workload sees any, and none is written down.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use countersign_api::{mesh::IssuedToken, sidecar::Tokens};
use countersign_core::{
    change::Revision,
    identity::ServiceName,
    jws::{Presented, Typ},
    signal::Signals,
    token::{Claims, Scope},
};
use serde_json::Value;
use tokio::{sync::watch, time::Instant};

use crate::{
    backoff::{Backoff, half_life},
    host::Host,
    identity::{issue_tokens, now},
    join::Issued,
    link::chain,
    workloads::instance::Instance,
};

/// However short a token lives, renewals are at least so far apart.
const RENEW_APART: Duration = Duration::from_millis(500);

/// How long it is waited for the tokens that follow from a revision.
pub(crate) const FOLLOW_WITHIN: Duration = Duration::from_secs(1);

/// What each token is for, by the service that demands it.
type Scopes = BTreeMap<ServiceName, Scope>;

/// The tokens that a proxy should hold at a revision.
#[derive(Debug, Clone, Default)]
pub(crate) struct Wanted {
    pub(crate) revision: Revision,
    pub(crate) scopes: Arc<Scopes>,
}

/// An identity with the tokens that are bound to it.
pub(crate) struct Identified {
    pub(crate) issued: Arc<Issued>,
    tokens: Vec<Held>, // in the order of their services
    renew_at: Option<Instant>,
}

/// One token, and what this agent reads of it. Who believes it verifies it.
#[derive(Clone)]
struct Held {
    service: ServiceName,
    claims: Claims,
    message: IssuedToken,
}

impl Identified {
    /// Its tokens as they travel.
    pub(crate) fn tokens(&self) -> Tokens {
        Tokens {
            certificate_sha256: self.issued.svid.leaf_sha256().0.to_vec().into(),
            tokens: self.tokens.iter().map(|held| held.message.clone()).collect(),
        }
    }

    /// Whether it is the identity of `other` as well: only the tokens may differ.
    pub(crate) fn is_same_identity(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.issued, &other.issued)
    }

    /// Whether these are the tokens to have now.
    fn is_as_wanted(&self, scopes: &Scopes, signals: &Signals) -> bool {
        self.are_for(scopes) && !self.tokens.iter().any(|held| signals.is_token_revoked(&held.claims))
    }

    fn are_for(&self, scopes: &Scopes) -> bool {
        self.tokens.iter().map(|held| (&held.service, &held.claims.scope)).eq(scopes)
    }

    /// When they should be renewed, if they are as wanted.
    fn renewal(tokens: &[Held]) -> Option<Instant> {
        let now = now().as_secs().cast_signed();
        let left = |held: &Held| held.claims.expires_at.saturating_sub(now).max(0).unsigned_abs();
        let left = tokens.iter().map(left).min()?;
        Some(Instant::now() + half_life(Duration::from_secs(left)).max(RENEW_APART))
    }
}

impl Held {
    fn read(message: IssuedToken) -> Option<Self> {
        let service = ServiceName::parse(&message.service).ok()?;
        let presented = Presented::parse_as(&message.token, Typ::Access).ok()?;
        let claims = serde_json::from_value(Value::Object(presented.into_signed().0)).ok()?;
        Some(Self { service, claims, message })
    }

    fn is_good(&self, signals: &Signals) -> bool {
        self.claims.expires_at > now().as_secs().cast_signed() && !signals.is_token_revoked(&self.claims)
    }
}

/// Waits until a proxy has the tokens that follow from `revision`, but not longer than `until`: control may issue none.
pub(crate) async fn follow(
    revision: Revision,
    until: Instant,
    mut wanted: watch::Receiver<Wanted>,
    mut identity: watch::Receiver<Option<Arc<Identified>>>,
) {
    let followed = async {
        loop {
            {
                let (wanted, identity) = (wanted.borrow_and_update(), identity.borrow_and_update());
                let are_for =
                    |scopes: &Scopes| identity.as_ref().map_or(scopes.is_empty(), |held| held.are_for(scopes));
                if wanted.revision >= revision && are_for(&wanted.scopes) {
                    return;
                }
            }
            let ended = tokio::select! {
                changed = wanted.changed() => changed,
                changed = identity.changed() => changed,
            };
            if ended.is_err() {
                return;
            }
        }
    };
    let _ = tokio::time::timeout_at(until, followed).await;
}

/// Puts tokens beside each identity of an instance's proxy until dropped, and hands on both.
pub(crate) async fn keep_tokens_fresh(
    host: Arc<Host>,
    of: Arc<Instance>,
    mut identities: watch::Receiver<Option<Arc<Issued>>>,
    out: watch::Sender<Option<Arc<Identified>>>,
) {
    let mut wanted = host.held.look(|follower| host.views.wanted(&of.spec.service, follower));
    let mut signals = host.signals.subscribe();
    let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(30));
    loop {
        let identity = identities.borrow_and_update().clone();
        let want = wanted.borrow_and_update().scopes.clone();
        let known = signals.borrow_and_update().clone();
        let again_at = match identity {
            None => None,
            Some(issued) => {
                let held = out.borrow().clone().filter(|held| Arc::ptr_eq(&held.issued, &issued));
                let is_due = |held: &Identified| held.renew_at.is_some_and(|at| at <= Instant::now());
                match held {
                    Some(held) if held.is_as_wanted(&want, &known) && !is_due(&held) => held.renew_at,
                    held => {
                        let next = renew(&host, &of, issued, held.as_deref(), &want, &known, &mut backoff).await;
                        let again_at = next.renew_at;
                        out.send_replace(Some(Arc::new(next)));
                        again_at
                    }
                }
            }
        };
        let again = async {
            match again_at {
                Some(at) => tokio::time::sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        // Of the three, only identities can end: the other senders lie in `host`.
        tokio::select! {
            changed = identities.changed() => if changed.is_err() { return },
            _ = wanted.changed() => {}
            _ = signals.changed() => {}
            () = again => {}
        }
    }
}

/// What the proxy has from now on: new tokens; or, when there are none to be had, the good ones of those it had.
async fn renew(
    host: &Host,
    of: &Instance,
    issued: Arc<Issued>,
    held: Option<&Identified>,
    want: &Scopes,
    signals: &Signals,
    backoff: &mut Backoff,
) -> Identified {
    if want.is_empty() {
        return Identified { issued, tokens: Vec::new(), renew_at: None };
    }
    let leaf = issued.svid.chain()[0].to_vec();
    match issue_tokens(host, &of.id, of.artifact(), leaf).await {
        Ok(answer) => {
            let mut tokens: Vec<Held> = answer.tokens.into_iter().filter_map(Held::read).collect();
            tokens.sort_by(|a, b| a.service.cmp(&b.service));
            let mut next = Identified { issued, renew_at: Identified::renewal(&tokens), tokens };
            if next.is_as_wanted(want, signals) {
                backoff.reset();
            } else {
                // Control is at another revision than this host: what it signs is asked for again.
                let again_at = Instant::now() + backoff.next_delay();
                next.renew_at = Some(next.renew_at.map_or(again_at, |at| at.min(again_at)));
            }
            tracing::debug!(instance = %of.id, count = next.tokens.len(), "access tokens were issued");
            next
        }
        Err(error) => {
            let retry_in = backoff.next_delay();
            tracing::warn!(instance = %of.id, error = chain(&error), ?retry_in, "access tokens could not be issued");
            let tokens = held.map(|held| held.tokens.iter().filter(|held| held.is_good(signals)).cloned().collect());
            Identified { issued, tokens: tokens.unwrap_or_default(), renew_at: Some(Instant::now() + retry_in) }
        }
    }
}
