//! Decisions that would be the same again.
//!
//! A decision is remembered under the candidates it came from and every part of the query that their conditions read;
//! both are compared in full, never by hash alone: paths come from strangers. What depends on the second, the size
//! of a body or a token is not remembered. INVARIANT (remembered-equals-evaluated).

use std::{
    hash::{BuildHasher, Hash, Hasher},
    net::{IpAddr, Ipv4Addr},
    sync::Arc,
};

use hashbrown::{DefaultHashBuilder, HashTable};
use rustc_hash::FxHashMap;

use super::{
    Decision, Law, Query, Reads,
    law::{Candidates, Place, Standing},
};
use crate::{identity::SpiffeId, risk::Posture, service::Protocol};

/// Decisions that one [`Judge`] remembers; when it is full it forgets them all and begins again.
pub const MEMORY_ENTRIES_MAX: usize = 4_096;
/// Longest path, host and method together, in bytes, under which a decision is remembered.
const KEY_BYTES_MAX: usize = 512;
/// Places whose candidates are kept.
const PLACES_MAX: usize = 4_096;
/// Candidates kept, over all places.
const CANDIDATES_MAX: usize = 1_000_000;

/// A law and what one worker remembers of it. A new law needs a new judge, so no decision outlives its revision.
pub struct Judge {
    law: Arc<Law>,
    places: FxHashMap<Place, Kept>,
    candidate_count: usize,
    decisions: HashTable<Remembered>,
    hasher: DefaultHashBuilder,
}

struct Kept {
    candidates: Candidates,
    /// Set when they read nothing: then the place alone decides.
    decision: Option<Decision>,
}

struct Remembered {
    place: Place,
    read: Read<Arc<str>>,
    decision: Decision,
}

/// The parts of a query that were read; the others have one fixed value.
#[derive(Hash)]
struct Read<Text> {
    principal: Option<SpiffeId>,
    path: Text,
    method: Text,
    host: Text,
    protocol: Option<Protocol>,
    ip: IpAddr,
    hours: i64, // since 1970
    first_contact: bool,
    risk: u8,
    posture: Posture,
}

impl Judge {
    /// A judge who remembers nothing yet.
    pub fn new(law: Arc<Law>) -> Self {
        Self {
            law,
            places: FxHashMap::default(),
            candidate_count: 0,
            decisions: HashTable::new(),
            hasher: DefaultHashBuilder::default(),
        }
    }

    /// The law that is applied.
    pub fn law(&self) -> &Arc<Law> {
        &self.law
    }

    /// Judges one query, from memory when the answer cannot have changed. Same answers as [`Law::decide`].
    pub fn decide(&mut self, query: &Query<'_>) -> Decision {
        let standing = match self.law.stand(query) {
            Ok(standing) => standing,
            Err(refusal) => return refusal,
        };
        // Those of one place share a decision, whichever operation they are, and whatever token they come with.
        let decision = self.decide_at(standing, query);
        self.law.of_request(standing, query, decision)
    }

    fn decide_at(&mut self, standing: Standing, query: &Query<'_>) -> Decision {
        let place = standing.place;
        if !self.places.contains_key(&place) {
            self.keep(place);
        }
        let Some(kept) = self.places.get_mut(&place) else { return self.law.decide(query) };
        if let Some(decision) = &kept.decision {
            return Decision { remembered: true, ..decision.clone() };
        }
        let reads = kept.candidates.reads;
        if reads == Reads::NOTHING {
            let verdict = self.law.evaluate(&kept.candidates, standing, query);
            let decision = self.law.judge(&verdict, reads);
            kept.decision = Some(decision.clone());
            return decision;
        }
        let key = Self::key(reads, self.law.resource_name(standing, query), query);
        let Some(key) = key else {
            return self.law.judge(&self.law.evaluate(&kept.candidates, standing, query), reads);
        };
        let hash = self.hash(place, &key);
        let same = |known: &Remembered| known.place == place && known.read.is(&key);
        if let Some(known) = self.decisions.find(hash, same) {
            return Decision { remembered: true, ..known.decision.clone() };
        }
        let kept = &self.places[&place];
        let decision = self.law.judge(&self.law.evaluate(&kept.candidates, standing, query), reads);
        if self.decisions.len() >= MEMORY_ENTRIES_MAX {
            self.decisions.clear();
        }
        let remembered = Remembered { place, read: key.owned(), decision: decision.clone() };
        let hasher = &self.hasher;
        self.decisions.insert_unique(hash, remembered, |known| hash_of(hasher, known.place, &known.read));
        decision
    }

    fn keep(&mut self, place: Place) {
        let candidates = self.law.candidates(place);
        if self.places.len() >= PLACES_MAX || self.candidate_count + candidates.len() > CANDIDATES_MAX {
            self.places.clear();
            self.candidate_count = 0;
        }
        self.candidate_count += candidates.len();
        self.places.insert(place, Kept { candidates, decision: None });
    }

    /// The key of `query`, whose resource has this name, for candidates that read `reads`; `None` when it must not be remembered.
    fn key<'a>(reads: Reads, resource: &'a str, query: &Query<'a>) -> Option<Read<&'a str>> {
        if reads.any_of(Reads::NOW.and(Reads::SIZE).and(Reads::TOKEN)) {
            return None;
        }
        let text = |part: Reads, text: &'a str| if reads.any_of(part) { text } else { "" };
        let context = &query.context;
        let key = Read {
            principal: reads.any_of(Reads::PRINCIPAL.and(Reads::TRUST_DOMAIN)).then(|| query.principal.clone()),
            // Which operation it is follows from the path and, in the place, the action; not the other way round.
            path: if reads.any_of(Reads::REQUEST_PATH) {
                query.path
            } else {
                text(Reads::PATH.and(Reads::OPERATION), resource)
            },
            method: text(Reads::METHOD, context.method),
            host: text(Reads::HOST, context.host),
            protocol: reads.any_of(Reads::PROTOCOL).then_some(context.protocol),
            ip: if reads.any_of(Reads::IP) { context.origin } else { IpAddr::V4(Ipv4Addr::UNSPECIFIED) },
            hours: if reads.any_of(Reads::CLOCK) { context.now.div_euclid(3_600) } else { 0 },
            first_contact: reads.any_of(Reads::FIRST_CONTACT) && context.first_contact,
            risk: if reads.any_of(Reads::RISK) { context.condition.risk } else { 0 },
            posture: if reads.any_of(Reads::POSTURE) { context.condition.posture } else { Posture::default() },
        };
        (key.path.len() + key.method.len() + key.host.len() <= KEY_BYTES_MAX).then_some(key)
    }

    fn hash(&self, place: Place, key: &Read<&str>) -> u64 {
        hash_of(&self.hasher, place, key)
    }
}

fn hash_of<Text: Hash>(hasher: &DefaultHashBuilder, place: Place, read: &Read<Text>) -> u64 {
    let mut state = hasher.build_hasher();
    place.hash(&mut state);
    read.hash(&mut state);
    state.finish()
}

impl Read<&str> {
    fn owned(&self) -> Read<Arc<str>> {
        Read {
            principal: self.principal.clone(),
            path: self.path.into(),
            method: self.method.into(),
            host: self.host.into(),
            protocol: self.protocol,
            ip: self.ip,
            hours: self.hours,
            first_contact: self.first_contact,
            risk: self.risk,
            posture: self.posture,
        }
    }
}

impl Read<Arc<str>> {
    fn is(&self, other: &Read<&str>) -> bool {
        self.principal == other.principal
            && *self.path == *other.path
            && *self.method == *other.method
            && *self.host == *other.host
            && self.protocol == other.protocol
            && self.ip == other.ip
            && self.hours == other.hours
            && self.first_contact == other.first_contact
            && self.risk == other.risk
            && self.posture == other.posture
    }
}
