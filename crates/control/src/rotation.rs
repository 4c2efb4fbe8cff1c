//! One root follows another while the mesh runs: prepare, activate, taint, revoke. Steps that operators ask for are judged by the gate;
//! those that are due by themselves are only written down. What an authority above signed is prepared, or takes the place of what it signed
//! before, in the same way. What would cut the mesh is refused before anything is asked of the gate.
//!
//! | a crash | leaves |
//! |---|---|
//! | before a step is in the store | the roots as they were |
//! | after it, before anybody is told | the roots after it: whoever starts publishes them, and other control planes find them within a second |

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use countersign_api::local::{
    AcceptAbove, AcceptedAbove, AskAbove, AskedAbove, AuthorityState, AuthorityStep, AuthorityView, CertificateView,
    IdentityFilter, Problem, RootView, StepAs, Stepped,
};
use countersign_core::{
    canonical::Digest,
    gate::act::Act,
    identity::{OperatorName, ServiceName},
};
use serde::{Deserialize, Serialize};

use crate::{
    Plane,
    acts::{self, By},
    audit::Event,
    authority::{Authority, AuthorityError, UpstreamRefused},
    enrol::INVITATION_LIFETIME_MAX,
    identities,
    local_api::{problem, store_problem},
    replicas::ALIVE_MS,
    store::{Document, Store, StoreError},
};

pub mod keys;

/// How long a root that is due is known to everybody before it signs.
const OVERLAP: Duration = Duration::from_secs(24 * 60 * 60);
/// How long a root that signed before leads to its successor: no join token lives longer, and no host that was away.
const OLD_LEADS: Duration = INVITATION_LIFETIME_MAX;
/// A root is followed when less than this part of its life is left.
const FOLLOWED_AT: u64 = 3;
/// Hosts that a refusal names.
const NAMED_MAX: usize = 8;
/// The kind of the documents that say which hosts of a control plane lack a root.
const LACK_KIND: &str = "root-lack";
/// Control planes of one store at most that are remembered so.
const LACKS_MAX: u32 = 64;
/// How long one is believed, by clocks that agree to within seconds; it is said anew every second.
const LACK_LIFETIME_MS: u64 = 15_000;

/// Which of the agents that follow one control plane lack a root.
#[derive(Serialize, Deserialize)]
struct Lack {
    root: Digest,
    hosts: BTreeSet<ServiceName>,
}

/// Takes a step, if nothing rests on its not being taken and the gate lets whoever asks.
pub async fn step(plane: &Plane, asked: StepAs, by: By<'_>) -> Result<Stepped, Problem> {
    let StepAs { step, force, shown } = asked;
    let authority = authority_of(plane)?;
    let view = authority.view().map_err(failed)?;
    let is_above = in_state(&view.roots, AuthorityState::Active).is_some_and(|active| !active.above.is_empty());
    let step = match (step, in_state(&view.roots, AuthorityState::Prepared)) {
        (AuthorityStep::Next, Some(prepared)) => AuthorityStep::Activate(prepared.number),
        (AuthorityStep::Next, None) if is_above => {
            let help = "ask it for another with `countersign authority request`, or go back to a root of the mesh's own with `countersign authority prepare`";
            return Err(problem(409, "the root that signs is that of an authority above", None, Some(help)));
        }
        (AuthorityStep::Next, None) => AuthorityStep::Prepare,
        (step, _) => step,
    };
    // What is wrong is said before a factor is used up for it.
    authority.may(step).map_err(|refused| failed(refused.into()))?;
    let cut = examine(plane, &view, step, force).await?;
    let opened = acts::pass(plane, Act::RotateAuthority, by, &shown).await?;
    let actor = name_of_actor(opened.operator);
    take(plane, &authority, step, &actor, cut).await.map_err(failed)
}

/// Asks an authority above to sign a key that is made for it here; nothing changes by that. What was asked for and not answered is shown again.
pub async fn ask_above(plane: &Plane, asked: AskAbove, by: By<'_>) -> Result<AskedAbove, Problem> {
    let authority = authority_of(plane)?;
    if let Some(csr_pem) = authority.requested().filter(|_| !asked.fresh) {
        return Ok(AskedAbove { csr_pem, is_new: false });
    }
    let opened = acts::pass(plane, Act::RotateAuthority, by, &asked.shown).await?;
    let csr_pem = authority.request(asked.fresh).await.map_err(failed)?;
    let (by, sha256) = (name_of_actor(opened.operator), Digest::of(csr_pem.as_bytes()));
    tracing::warn!(by, request = %sha256, "an authority above is asked to sign a key");
    plane.tell(Event::AuthorityStepped { by, step: "request", number: 0, sha256, cut: 0 });
    Ok(AskedAbove { csr_pem, is_new: true })
}

/// Takes up what an authority above signed, if the mesh's own verifiers take what rests on it and the gate lets whoever asks.
pub async fn accept_above(plane: &Plane, asked: AcceptAbove, by: By<'_>) -> Result<AcceptedAbove, Problem> {
    let authority = authority_of(plane)?;
    // What is wrong is said before a factor is used up for it.
    authority.may_accept(&asked.chain_pem).await.map_err(failed)?;
    let opened = acts::pass(plane, Act::RotateAuthority, by, &asked.shown).await?;
    let (number, renewed) = authority.accept(&asked.chain_pem).await.map_err(failed)?;
    let roots = authority.view().map_err(failed)?.roots;
    let sha256 = roots.iter().find(|one| one.number == number).map(|one| one.root.sha256).unwrap_or_default();
    let (by, step) = (name_of_actor(opened.operator), if renewed { "renew" } else { "accept" });
    tracing::warn!(by, step, number, root = %sha256, "what an authority above signed was taken up");
    plane.tell(Event::AuthorityStepped { by, step, number, sha256, cut: 0 });
    plane.show_authority(&authority).await.map_err(failed)?;
    Ok(AcceptedAbove { number, renewed, roots })
}

fn authority_of(plane: &Plane) -> Result<Arc<Authority>, Problem> {
    let help = "apply a mesh directory first: `countersign apply DIR`";
    plane.authority().ok_or_else(|| problem(409, "there is no mesh yet", None, Some(help)))
}

fn name_of_actor(operator: Option<OperatorName>) -> String {
    operator.map_or_else(|| "local".to_owned(), |operator| operator.to_string())
}

fn failed(error: AuthorityError) -> Problem {
    match error {
        AuthorityError::Upstream(refused) => {
            let status = match refused {
                UpstreamRefused::NothingRequested | UpstreamRefused::KnownRoot(_) => 409,
                _ => 422,
            };
            problem(status, refused.to_string(), None, Some(refused.help()))
        }
        AuthorityError::Step(refused) => problem(409, refused.to_string(), None, Some(&refused.help())),
        AuthorityError::Store(error) => store_problem(&error),
        AuthorityError::TooSoon(refused) => {
            let help = format!("ask again in {} seconds", refused.seconds);
            problem(409, refused.to_string(), None, Some(&help))
        }
        other => problem(500, other.to_string(), std::error::Error::source(&other).map(ToString::to_string), None),
    }
}

fn in_state(roots: &[RootView], state: AuthorityState) -> Option<&RootView> {
    roots.iter().find(|one| one.state == state)
}

/// Says what the step would cut; how many identities it does cut, where it may.
///
/// INVARIANT (nothing-rests-on-a-step): a root signs only when every agent that is connected anywhere holds it, and one on which
/// identities rest leaves the bundle only when somebody said that they are to be cut.
async fn examine(plane: &Plane, view: &AuthorityView, step: AuthorityStep, force: bool) -> Result<usize, Problem> {
    let root = |number| view.roots.iter().find(|one| one.number == number);
    match step {
        AuthorityStep::Next | AuthorityStep::Prepare | AuthorityStep::Taint(_) => Ok(0),
        AuthorityStep::Activate(number) => {
            let Some(root) = root(number) else { return Ok(0) };
            let lacking = lacking(plane, root.root.sha256).await.map_err(|error| store_problem(&error))?;
            if lacking.is_empty() {
                return Ok(0);
            }
            let title = format!("{} hosts do not hold root {number} yet: {}", lacking.len(), named(&lacking));
            let help = "ask again in a moment; an agent that stays behind is of an earlier version, or does not follow (`countersign host list`)";
            Err(problem(409, title, None, Some(help)))
        }
        AuthorityStep::Revoke(number) => {
            let resting = resting(plane, number).await.map_err(|error| store_problem(&error))?;
            let Some(last_ms) = resting.iter().max() else { return Ok(0) };
            if force {
                return Ok(resting.len());
            }
            let minutes = last_ms.saturating_sub(plane.clock.now_ms()).div_ceil(60_000);
            let title = format!(
                "{} identities that rest on root {number} have not expired; the last one does in {minutes} minutes",
                resting.len()
            );
            let help = "wait until then, or cut what still uses one of them now: `--force`";
            Err(problem(409, title, None, Some(help)))
        }
    }
}

fn named(hosts: &BTreeSet<String>) -> String {
    let named: Vec<&str> = hosts.iter().take(NAMED_MAX).map(String::as_str).collect();
    match hosts.len().saturating_sub(NAMED_MAX) {
        0 => named.join(", "),
        more => format!("{} and {more} more", named.join(", ")),
    }
}

/// When each identity that rests on a root expires, if it is good for something.
async fn resting(plane: &Plane, number: u32) -> Result<Vec<u64>, StoreError> {
    let of_root = IdentityFilter { authority: Some(number), ..IdentityFilter::default() };
    let identities = identities::list(plane, of_root).await?;
    Ok(identities.iter().filter(|one| one.revoked.is_none()).map(|one| one.expires_at_ms).collect())
}

/// The connected hosts whose agents do not verify by `root`; those of another control plane as it says of them itself.
async fn lacking(plane: &Plane, root: Digest) -> Result<BTreeSet<String>, StoreError> {
    let own = plane.publisher.registry(|registry| registry.lacking(&root));
    let mut lacking: BTreeSet<String> = own.iter().map(ToString::to_string).collect();
    if !plane.storage.is_shared() {
        return Ok(lacking);
    }
    let (replica, now_ms) = (plane.replica.clone(), plane.clock.now_ms());
    let read = move |store: &mut dyn Store| Ok((store.beat(&replica, ALIVE_MS)?, store.documents(LACK_KIND, now_ms)?));
    let (others, said) = plane.storage.run("root_lacks", read).await?;
    for other in others {
        let lack = said.iter().find(|(key, _)| *key == other).map(|(_, bytes)| serde_json::from_slice::<Lack>(bytes));
        match lack {
            Some(Ok(lack)) if lack.root == root => lacking.extend(lack.hosts.iter().map(ToString::to_string)),
            _ => drop(lacking.insert(format!("those of control plane {other}"))),
        }
    }
    Ok(lacking)
}

/// Tells the other control planes which of the hosts that follow this one lack the root that is prepared.
pub(crate) async fn say_who_lacks(plane: &Plane) -> Result<(), StoreError> {
    let Some(prepared) = plane.authority().and_then(|authority| authority.prepared_sha256()) else { return Ok(()) };
    let hosts = plane.publisher.registry(|registry| registry.lacking(&prepared));
    let (lack, now_ms) = (Lack { root: prepared, hosts }, plane.clock.now_ms());
    let document = Document {
        kind: LACK_KIND,
        key: plane.replica.clone(),
        bytes: serde_json::to_vec(&lack).expect("INVARIANT: it is plain JSON"),
        expires_at_ms: now_ms + LACK_LIFETIME_MS,
    };
    let put = move |store: &mut dyn Store| match store.document(LACK_KIND, &document.key, now_ms)? {
        Some(seen) => store.swap_document(LACK_KIND, &document.key, &seen, &document),
        None => store.put_document(&document, now_ms, LACKS_MAX),
    };
    plane.storage.run("root_lacks", put).await.map(drop)
}

async fn take(
    plane: &Plane,
    authority: &Authority,
    step: AuthorityStep,
    actor: &str,
    cut: usize,
) -> Result<Stepped, AuthorityError> {
    let before = authority.view()?.roots;
    let number = match step {
        AuthorityStep::Next | AuthorityStep::Prepare => authority.prepare().await?,
        AuthorityStep::Activate(number) => authority.activate(number).await.map(|()| number)?,
        AuthorityStep::Taint(number) => authority.taint(number).await.map(|()| number)?,
        AuthorityStep::Revoke(number) => authority.revoke(number).await.map(|()| number)?,
    };
    let roots = authority.view()?.roots;
    let root = roots.iter().chain(&before).find(|one| one.number == number);
    let sha256 = root.map(|one| one.root.sha256).unwrap_or_default();
    tracing::warn!(by = actor, step = name_of(step), number, root = %sha256, cut, "a root of the trust domain moved on");
    plane.tell(Event::AuthorityStepped { by: actor.to_owned(), step: name_of(step), number, sha256, cut });
    plane.show_authority(authority).await?;
    Ok(Stepped { step, number, cut, roots })
}

fn name_of(step: AuthorityStep) -> &'static str {
    match step {
        AuthorityStep::Next | AuthorityStep::Prepare => "prepare",
        AuthorityStep::Activate(_) => "activate",
        AuthorityStep::Taint(_) => "taint",
        AuthorityStep::Revoke(_) => "revoke",
    }
}

/// Takes the step that is due by itself, unless something still rests on its not being taken.
pub(crate) async fn tend(plane: &Plane, authority: &Authority) -> Result<(), AuthorityError> {
    let view = authority.view()?;
    let svid_lifetime = Duration::from_secs(view.svid_lifetime_seconds);
    let Some(step) = due(&view.roots, svid_lifetime, plane.clock.now_ms()) else { return Ok(()) };
    if authority.may(step).is_err() || examine(plane, &view, step, false).await.is_err() {
        return Ok(());
    }
    match take(plane, authority, step, "schedule", 0).await {
        // Another control plane took it.
        Ok(_) | Err(AuthorityError::Step(_)) => Ok(()),
        Err(error) => Err(error),
    }
}

/// The step that is due at `now_ms`.
fn due(roots: &[RootView], svid_lifetime: Duration, now_ms: u64) -> Option<AuthorityStep> {
    let since = |one: &RootView| Duration::from_millis(now_ms.saturating_sub(one.since_ms));
    if let Some(old) = in_state(roots, AuthorityState::Old) {
        return (since(old) >= OLD_LEADS).then_some(AuthorityStep::Taint(old.number));
    }
    if let Some(tainted) = in_state(roots, AuthorityState::Tainted) {
        return (since(tainted) >= svid_lifetime).then_some(AuthorityStep::Revoke(tainted.number));
    }
    let active = in_state(roots, AuthorityState::Active)?;
    let ends_soon = |one: &CertificateView| {
        one.not_after_ms.saturating_sub(now_ms) < one.not_after_ms.saturating_sub(one.not_before_ms) / FOLLOWED_AT
    };
    if !active.above.iter().chain([&active.root]).any(ends_soon) {
        return None;
    }
    match in_state(roots, AuthorityState::Prepared) {
        // Nobody leaves the authority that operators chose by themselves: `status` says that it is to be asked.
        None if !active.above.is_empty() => None,
        None => Some(AuthorityStep::Prepare),
        Some(prepared) => (since(prepared) >= OVERLAP).then_some(AuthorityStep::Activate(prepared.number)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use countersign_api::local::CertificateView;

    const HOUR_MS: u64 = 60 * 60 * 1000;
    const DAY_MS: u64 = 24 * HOUR_MS;
    const YEAR_MS: u64 = 365 * DAY_MS;

    fn root(number: u32, state: AuthorityState, since_ms: u64) -> RootView {
        let certificate = CertificateView {
            subject: String::new(),
            serial: String::new(),
            not_before_ms: 0,
            not_after_ms: 9 * YEAR_MS,
            sha256: Digest::default(),
        };
        RootView { number, state, since_ms, root: certificate.clone(), above: Vec::new(), issuing: certificate }
    }

    #[test]
    fn a_root_is_followed_before_its_last_third_is_over_and_goes_when_nothing_can_rest_on_it() {
        use AuthorityState::{Active, Old, Prepared, Tainted};
        use AuthorityStep::{Activate, Prepare, Revoke, Taint};
        let (late, active) = (6 * YEAR_MS + 1, root(1, Active, 0));
        let mut below = active.clone();
        below.above = vec![CertificateView { not_after_ms: 3 * YEAR_MS, ..active.root.clone() }];
        for (what, roots, now_ms, expected) in [
            ("young", vec![active.clone()], 6 * YEAR_MS, None),
            ("its last third begins", vec![active.clone()], late, Some(Prepare)),
            ("known for too short a time", vec![active.clone(), root(2, Prepared, late)], late + DAY_MS - 1, None),
            ("known for a day", vec![active.clone(), root(2, Prepared, late)], late + DAY_MS, Some(Activate(2))),
            ("prepared by hand, and not due", vec![active.clone(), root(2, Prepared, 5)], YEAR_MS, None),
            ("it leads for a day", vec![root(1, Old, late), root(2, Active, late)], late + DAY_MS - 1, None),
            ("and no longer", vec![root(1, Old, late), root(2, Active, late)], late + DAY_MS, Some(Taint(1))),
            ("what rests on it has an hour", vec![root(1, Tainted, 5), root(2, Active, 0)], 5 + HOUR_MS - 1, None),
            ("and no more", vec![root(1, Tainted, 5), root(2, Active, 0)], 5 + HOUR_MS, Some(Revoke(1))),
            ("of an authority above, nothing is prepared by itself", vec![below.clone()], late, None),
            ("what it signed is young", vec![below.clone(), root(2, Prepared, 0)], 2 * YEAR_MS, None),
            ("what it signed is due", vec![below, root(2, Prepared, 0)], 2 * YEAR_MS + 1, Some(Activate(2))),
            ("one after the other", vec![root(1, Old, late), active, root(3, Prepared, 5)], late + 5, None),
        ] {
            assert_eq!(due(&roots, Duration::from_millis(HOUR_MS), now_ms), expected, "{what}");
        }
    }
}
