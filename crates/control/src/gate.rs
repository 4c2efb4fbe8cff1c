//! The change gate: the only room that makes an [`Admitted`]. What an operator's own tools found correct is examined
//! again from nothing: whoever can reach the socket may send anything.
//!
//! Until an owner is enrolled the mesh is unprotected: whoever owns the data directory acts as operator `local`, and
//! every change-set that is lawful passes. From the first enrolment on, `local` may change nothing. Nothing is written here.

use std::{collections::BTreeSet, sync::Arc};

use parking_lot::Mutex;

use countersign_api::local::Apply;
use countersign_core::{
    change::{Bodies, Change, ChangeSet, Member, Revision},
    identity::TrustDomain,
    policy::{self, Library, ParsedPolicy},
    state::MeshState,
};

use crate::ledger::Head;

/// Changes of one change-set at most.
pub const CHANGES_MAX: usize = 100_000;
/// Mistakes that one answer names at most.
const MISTAKES_MAX: usize = 50;
/// The operator of an unprotected mesh: whoever owns the data directory.
pub const LOCAL: &str = "local";

/// Judges change-sets. Remembers parsed policies, so that a change costs what changed.
#[derive(Default)]
pub struct Gate {
    library: Mutex<Library>,
}

/// A change-set that passed the gate, on the base it names.
///
/// INVARIANT (admitted-before-append): only [`Gate::admit`] makes one, and the ledger takes nothing else.
#[derive(Debug)]
pub struct Admitted {
    change_set: ChangeSet,
    bodies: Bodies,
    actor: String,
}

/// Why a change-set does not pass.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refused {
    /// It was planned on another revision.
    Moved {
        /// The revision it was planned on.
        base: Revision,
        /// The revision now.
        held: Revision,
    },
    /// It would break the law; every mistake found, at most 50.
    Unlawful(Vec<String>),
    /// The mesh is protected, and nobody has proven to be one of its operators.
    Unproven,
}

impl Admitted {
    /// The change-set, the texts it brings, and who asked for it.
    pub fn into_parts(self) -> (ChangeSet, Bodies, String) {
        (self.change_set, self.bodies, self.actor)
    }
}

impl Gate {
    /// Examines `asked` against the mesh at `head`. `own` is the trust domain that the authority speaks for, once there
    /// is one.
    pub fn admit(&self, asked: Apply, head: &Head, own: Option<&TrustDomain>) -> Result<Admitted, Refused> {
        let Apply { change_set, bodies } = asked;
        let held = head.follower.revision();
        if change_set.base != held {
            return Err(Refused::Moved { base: change_set.base, held });
        }
        if head.follower.state().is_protected() {
            return Err(Refused::Unproven);
        }
        let mut mistakes = mistakes_of_texts(&change_set, &bodies, head);
        for change in &change_set.changes {
            if let (Change::CreateMesh { trust_domain }, Some(own)) = (change, own)
                && trust_domain != own
            {
                mistakes.push(format!("the mesh is `{trust_domain}`, but this control plane's keys speak for `{own}`"));
            }
        }
        match head.follower.state().apply_all(&change_set) {
            Ok(next) if mistakes.is_empty() => {
                mistakes = mistakes_of_references(&next);
                mistakes.extend(self.mistakes_of_policies(&next, &bodies, head));
            }
            Ok(_) => {}
            Err(error) => mistakes.push(error.to_string()),
        }
        if mistakes.is_empty() {
            return Ok(Admitted { change_set, bodies, actor: LOCAL.into() });
        }
        let more = mistakes.len().saturating_sub(MISTAKES_MAX);
        mistakes.truncate(MISTAKES_MAX);
        if more > 0 {
            mistakes.push(format!("and {more} more"));
        }
        Err(Refused::Unlawful(mistakes))
    }

    /// The policies in force at `head`, parsed.
    pub fn policies(&self, head: &Head) -> Vec<Arc<ParsedPolicy>> {
        let mut library = self.library.lock();
        let follower = &head.follower;
        let texts = follower.state().policies.values().filter_map(|p| Some((p.body, follower.bodies().get(&p.body)?)));
        texts.filter_map(|(digest, text)| library.insert(digest, text).ok()).collect()
    }

    /// Every policy that does not parse, does not validate strictly, or names what does not exist in `next`.
    fn mistakes_of_policies(&self, next: &MeshState, brought: &Bodies, head: &Head) -> Vec<String> {
        let mut library = self.library.lock();
        let mut mistakes = Vec::new();
        for (id, policy) in &next.policies {
            let text = brought.get(&policy.body).or_else(|| head.follower.bodies().get(&policy.body));
            if let Some(Err(what)) = text.map(|text| library.insert(policy.body, text)) {
                mistakes.push(format!("policy `{id}` ({}): {what}", policy.file));
            }
        }
        if mistakes.is_empty() {
            mistakes.extend(policy::mistakes_of_state(next, &library).iter().map(ToString::to_string));
        }
        // What was refused, and what is not in force any more, is not kept.
        let in_force: BTreeSet<_> = head.follower.state().bodies().chain(next.bodies()).collect();
        library.retain(|digest| in_force.contains(digest));
        mistakes
    }
}

fn mistakes_of_texts(change_set: &ChangeSet, bodies: &Bodies, head: &Head) -> Vec<String> {
    let mut mistakes = Vec::new();
    if change_set.changes.is_empty() {
        mistakes.push("it holds no change".into());
    }
    if change_set.changes.len() > CHANGES_MAX {
        mistakes.push(format!("it holds {} changes; at most {CHANGES_MAX} are taken", change_set.changes.len()));
    }
    for digest in bodies.forged() {
        mistakes.push(format!("a text that came as {} does not hash to it", digest.short()));
    }
    let named: BTreeSet<_> = change_set.changes.iter().filter_map(Change::body).collect();
    for (digest, _) in bodies.iter().filter(|(digest, _)| !named.contains(digest)) {
        mistakes.push(format!("text {} belongs to no change", digest.short()));
    }
    for change in &change_set.changes {
        let Some(digest) = change.body() else { continue };
        if bodies.get(&digest).is_none() && head.follower.bodies().get(&digest).is_none() {
            mistakes.push(format!("{}: its text {} did not come with it", change.subject(), digest.short()));
        }
    }
    mistakes
}

/// Every name in the state that the changes lead to which stands for nothing there.
fn mistakes_of_references(next: &MeshState) -> Vec<String> {
    let mut mistakes = Vec::new();
    let declared = |service| next.services.contains_key(service);
    for (name, service) in &next.services {
        for upstream in service.spec.upstreams.iter().filter(|upstream| !declared(upstream)) {
            mistakes.push(format!("service `{name}` names upstream `{upstream}`, which is not declared"));
        }
    }
    for (role, members) in &next.roles {
        for member in members {
            if let Member::Service(service) = member
                && !declared(service)
            {
                mistakes.push(format!("role `{role}` has member `{service}`, which is not declared"));
            }
        }
    }
    for (name, route) in &next.routes {
        for service in std::iter::once(&route.service).chain(route.split.keys()).filter(|service| !declared(service)) {
            mistakes.push(format!("route `{name}` names service `{service}`, which is not declared"));
        }
    }
    mistakes
}
