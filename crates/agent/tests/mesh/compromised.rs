//! A control plane in an attacker's hands: it has the whole database and every key but the operators', signs SVIDs that verify, and
//! says what it likes. Its mesh is sealed. After each attack the proxies hold what they held, the refusal says why, and the true
//! history goes on.

use std::{sync::atomic::Ordering, time::Duration};

use countersign_agent::start;
use countersign_api::mesh::follow_request::Message;
use countersign_core::{
    assurance::{
        challenge::{Challenge, Purpose},
        webauthn::RelyingParty,
    },
    canonical::Digest,
    change::{Change, ChangeSet},
    countersignature::Countersignature,
    identity::OperatorName,
};
use countersign_testkit::security_key::SecurityKey;

use crate::{
    Ground, config,
    control::{Ledger, declare, name},
    event, ground, history_refused, idle, until,
};

fn operator(given: &str) -> OperatorName {
    OperatorName::parse(given).unwrap()
}

fn relying_party() -> RelyingParty {
    RelyingParty { id: "localhost".into(), origins: vec!["http://localhost:7449".into()] }
}

fn remove(service: &str) -> Change {
    Change::RemoveService { name: name(service) }
}

fn set(ledger: &Ledger, changes: Vec<Change>) -> ChangeSet {
    ChangeSet { base: ledger.follower.revision(), changes }
}

/// The first enrolment of `who`, with this key.
fn enrolment(who: &str, key: &SecurityKey) -> Vec<Change> {
    let (name, id, factor) = (operator(who), key.factor_id(), key.enrolled(&relying_party()));
    vec![
        Change::InviteOperator { name: name.clone(), roles: ["owner".into()].into() },
        Change::EnrollOperator { name, id, factor },
    ]
}

/// What alice signs for a change-set of hers, on the history that she verified.
fn sign(alice: &mut SecurityKey, ledger: &Ledger, set: &ChangeSet) -> Countersignature {
    let challenge = Challenge {
        anchor: ledger.keyring.anchor().unwrap(),
        purpose: Purpose::StepUp,
        base: set.base,
        root: ledger.keyring.root_at(set.base).unwrap(),
        change_set: set.digest(),
        nonce: Digest::of(b"nonce"),
    };
    alice.countersign(&operator("alice"), &relying_party(), &challenge)
}

/// Appends what alice asked for and signed.
fn append_signed(ledger: &mut Ledger, alice: &mut SecurityKey, changes: Vec<Change>) -> u64 {
    let set = set(ledger, changes);
    let signed = sign(alice, ledger, &set);
    ledger.append("alice", &set, &[signed]);
    assert_eq!(ledger.keyring.revision(), ledger.follower.revision(), "the operators stand behind it");
    ledger.follower.revision().0
}

/// A mesh of alice with one service, anchored and then sealed for her signature. Returns its size before the seal.
fn sealed(ground: &Ground, alice: &mut SecurityKey) -> u64 {
    let mut ledger = ground.control.ledger();
    let anchoring = set(&ledger, enrolment("alice", alice));
    ledger.append("local", &anchoring, &[]);
    let before = ledger.follower.revision().0;
    let sealing = set(&ledger, vec![Change::SealSettings { quorum: 1 }]);
    ledger.append("alice", &sealing, &[]);
    append_signed(&mut ledger, alice, vec![declare("web")]);
    ground.control.show(ledger);
    before
}

/// What the sidecar of `web` was shown last: the revision, and the services there.
fn view(ground: &Ground) -> String {
    ground.words_of("web", "view").last().cloned().unwrap_or_default()
}

/// PROVES (sealed-history)
/// PROVES (pinned-history)
pub async fn a_compromised_control_plane_changes_nothing_that_the_operators_did_not_sign() {
    let ground = ground().await;
    let (mut alice, mallory) = (SecurityKey::new(), SecurityKey::new());
    sealed(&ground, &mut alice);
    let agent = ground.start(vec![idle("web")]).await;
    let mut events = agent.events();
    let mut good = ground.control.ledger();
    // An old change of alice's, which she took back later, with the signature that she gave for it.
    let old = set(&good, vec![declare("old")]);
    let old_signature = sign(&mut alice, &good, &old);
    good.append("alice", &old, std::slice::from_ref(&old_signature));
    append_signed(&mut good, &mut alice, vec![remove("old")]);
    ground.control.show(good.clone());
    ground.enforced("web", good.follower.revision().0).await;

    type Attack<'a> = &'a dyn Fn(&mut Ledger, &mut SecurityKey);
    let unsigned = |changes: Vec<Change>| {
        move |ledger: &mut Ledger, _: &mut SecurityKey| {
            let set = set(ledger, changes.clone());
            ledger.append("alice", &set, &[]);
        }
    };
    let own_key = Change::AddFactor {
        operator: operator("alice"),
        id: mallory.factor_id(),
        factor: mallory.enrolled(&relying_party()),
    };
    let forged_service = unsigned(vec![declare("evil")]);
    let forged_key = unsigned(vec![own_key]);
    let unsealed =
        unsigned(vec![Change::SetOperatorRoles { name: operator("alice"), roles: ["auditor".into()].into() }]);
    let replayed = |ledger: &mut Ledger, _: &mut SecurityKey| {
        ledger.append("alice", &old, std::slice::from_ref(&old_signature));
    };
    let shown_otherwise = |ledger: &mut Ledger, alice: &mut SecurityKey| {
        // The page said `friendly`; alice signed what it had her browser sign.
        let on_the_page = set(ledger, vec![declare("friendly")]);
        let signed = sign(alice, ledger, &on_the_page);
        let evil = set(ledger, vec![declare("evil")]);
        ledger.append("alice", &evil, &[signed]);
    };
    let under_her_name = |ledger: &mut Ledger, _: &mut SecurityKey| {
        let evil = set(ledger, vec![declare("evil")]);
        let mut key = SecurityKey::new();
        let signed = sign(&mut key, ledger, &evil);
        ledger.append("alice", &evil, &[signed]);
    };
    let truncated = |ledger: &mut Ledger, _: &mut SecurityKey| *ledger = ledger.cut(ledger.follower.revision().0 - 1);
    let rewritten = |ledger: &mut Ledger, _: &mut SecurityKey| {
        *ledger = ledger.cut(ledger.follower.revision().0 - 1);
        let evil = set(ledger, vec![declare("evil")]);
        ledger.append("alice", &evil, &[]);
    };
    let attacks: [(&str, Attack<'_>, &str); 8] = [
        ("a change that nobody signed", &forged_service, "was signed by 0 of 1 operators"),
        ("a key of its own, for an operator", &forged_key, "was signed by 0 of 1 operators"),
        ("roles that nobody signed", &unsealed, "was signed by 0 of 1 operators"),
        ("an old change, with its old signature", &replayed, "what they signed was voided by revision"),
        ("a page that showed something else", &shown_otherwise, "it answers another challenge"),
        ("a signature under an operator's name", &under_her_name, "operator `alice` has no such factor"),
        ("a ledger that was cut", &truncated, "the ledger was cut"),
        ("another end of the ledger", &rewritten, "there are two histories"),
    ];
    for (case, attack, expected) in attacks {
        let before = view(&ground);
        let mut evil = good.clone();
        attack(&mut evil, &mut alice);
        ground.control.show(evil);
        let why = event(&mut events, |event| history_refused(event).filter(|why| why.contains(expected))).await;
        assert!(why.contains(expected), "{case}: {why}");
        assert_eq!(view(&ground), before, "{case}");
        let told = || {
            let said = ground.control.said.lock();
            said.iter().any(|said| matches!(said, Message::Hello(hello) if hello.refused.contains(expected)))
        };
        until(&format!("{case}: control is told why"), told).await;
        if case == "a ledger that was cut" {
            until("what is held ages", || ground.age_ms().is_some_and(|age| age >= 1_500)).await;
        }
        // The true history goes on where it was.
        let next = if view(&ground).contains("more") { remove("more") } else { declare("more") };
        ground.control.show(good.clone());
        let revision = append_signed(&mut good, &mut alice, vec![next]);
        ground.control.show(good.clone());
        ground.enforced("web", revision).await;
        let healed = || {
            let said = ground.control.said.lock();
            let hellos = said.iter().filter_map(|said| match said {
                Message::Hello(hello) => Some(hello.refused.is_empty()),
                _ => None,
            });
            hellos.last() == Some(true)
        };
        until(&format!("{case}: control is told that it is over"), healed).await;
    }
    let orders = ground.orders("web");
    assert!(!orders.iter().any(|line| line.contains("evil") || line.contains("friendly")), "{orders:?}");
    agent.stop(Duration::ZERO).await;
}

/// PROVES (sealed-history)
pub async fn two_hosts_that_are_shown_two_histories_part_at_the_next_signature() {
    let ground = ground().await;
    let mut alice = SecurityKey::new();
    sealed(&ground, &mut alice);
    let one = ground.start(vec![idle("web")]).await;
    let elsewhere = tempfile::tempdir().unwrap();
    let mut other = config(elsewhere.path().join("d"), ground.address(), Some(ground.control.token()), vec![]);
    other.host = name("h2");
    let other = start(other).await.unwrap();
    let good = ground.control.ledger();
    ground.enforced("web", good.follower.revision().0).await;
    until("both follow", || ground.control.stream_count() == 2).await;
    // Alice signed both, and withdrew one of them: each is hers, on this base.
    let (mut left, mut right) = (good.clone(), good.clone());
    append_signed(&mut left, &mut alice, vec![declare("left")]);
    append_signed(&mut right, &mut alice, vec![declare("right")]);
    let mut events = other.events();
    ground.control.show_to("h2", right.clone());
    ground.control.show(left.clone());
    ground.enforced("web", left.follower.revision().0).await;
    // What she signs next, she signs on the history that she sees.
    let next = set(&left, vec![declare("next")]);
    let signed = sign(&mut alice, &left, &next);
    for ledger in [&mut left, &mut right] {
        ledger.append("alice", &next, std::slice::from_ref(&signed));
    }
    ground.control.show_to("h2", right);
    ground.control.show(left.clone());
    ground.enforced("web", left.follower.revision().0).await;
    let why = event(&mut events, history_refused).await;
    assert!(why.contains("of another history"), "{why}");
    one.stop(Duration::ZERO).await;
    other.stop(Duration::ZERO).await;
}

/// PROVES (pinned-history)
pub async fn a_cold_host_is_given_no_operators_but_the_pinned_ones() {
    let ground = ground().await;
    let (mut alice, mut mallory) = (SecurityKey::new(), SecurityKey::new());
    let before_the_seal = sealed(&ground, &mut alice);
    let good = ground.control.ledger();
    let token = ground.control.token();
    let seal = |ledger: &mut Ledger| {
        let sealing = set(ledger, vec![Change::SealSettings { quorum: 1 }]);
        ledger.append("alice", &sealing, &[]);
    };
    let own_mesh = {
        let mut ledger = good.cut(1);
        let anchoring = set(&ledger, enrolment("alice", &mallory));
        ledger.append("local", &anchoring, &[]);
        seal(&mut ledger);
        append_signed(&mut ledger, &mut mallory, vec![declare("web"), declare("evil")]);
        ledger
    };
    let own_seal = {
        let mut ledger = good.cut(before_the_seal);
        let (id, factor) = (mallory.factor_id(), mallory.enrolled(&relying_party()));
        let adding = set(&ledger, vec![Change::AddFactor { operator: operator("alice"), id, factor }]);
        ledger.append("alice", &adding, &[]);
        seal(&mut ledger);
        append_signed(&mut ledger, &mut mallory, vec![declare("web"), declare("evil")]);
        ledger
    };
    let never_sealed = {
        let mut ledger = good.cut(before_the_seal);
        let evil = set(&ledger, vec![declare("web"), declare("evil")]);
        ledger.append("alice", &evil, &[]);
        ledger
    };
    ground.control.show(own_mesh);
    let agent = start(ground.config(Some(token), vec![idle("web")])).await.unwrap();
    let mut events = agent.events();
    let refused = async |events: &mut _, expected: &str| {
        let why = event(events, |event| history_refused(event).filter(|why| why.contains(expected))).await;
        assert_eq!(view(&ground), "", "{why}");
    };
    refused(&mut events, "it is another mesh").await;
    ground.control.show(own_seal);
    refused(&mut events, "it is another history").await;
    ground.control.show(never_sealed);
    refused(&mut events, "ends before the entry that protected or sealed the mesh").await;
    ground.control.show(good.clone());
    ground.control.sends_snapshots.store(true, Ordering::Relaxed);
    refused(&mut events, "a state without its entries").await;
    ground.control.sends_snapshots.store(false, Ordering::Relaxed);
    ground.enforced("web", good.follower.revision().0).await;
    agent.stop(Duration::ZERO).await;
}

/// PROVES (pinned-history)
pub async fn a_host_that_joined_before_the_anchor_pins_it_and_keeps_it() {
    let mut ground = ground().await;
    let mut alice = SecurityKey::new();
    let revision = ground.control.append(vec![declare("early")], &[]);
    let agent = ground.start(vec![idle("web")]).await;
    let file = ground.data_dir().join("agent/anchor.json");
    until("it follows", || ground.control.stream_count() == 1).await;
    let pinned = || std::fs::read_to_string(&file).unwrap_or_default();
    assert_eq!((revision, pinned().as_str()), (2, "{}"), "there is nothing to pin yet");
    sealed(&ground, &mut alice);
    let good = ground.control.ledger();
    ground.enforced("web", good.follower.revision().0).await;
    let pins = good.keyring.pins();
    assert_eq!(serde_json::from_str::<countersign_core::keyring::Pins>(&pinned()).unwrap(), pins);
    agent.stop(Duration::ZERO).await;

    // Also after a restart, and when what it held is lost.
    let address = ground.address();
    ground.served = None;
    ground.control.said.lock().clear();
    std::fs::remove_file(ground.data_dir().join("agent/mesh.snapshot")).unwrap();
    let mut forged = good.clone();
    let evil = set(&forged, vec![declare("evil")]);
    forged.append("alice", &evil, &[]);
    ground.control.show(forged);
    ground.served = Some(ground.control.serve(address).await);
    let agent = start(ground.config(None, vec![idle("web")])).await.unwrap();
    let mut events = agent.events();
    let why = event(&mut events, history_refused).await;
    assert!(why.contains("was signed by 0 of 1 operators"), "{why}");
    ground.control.show(good.clone());
    ground.enforced("web", good.follower.revision().0).await;
    agent.stop(Duration::ZERO).await;

    // And what was verified once serves without control, keys and all.
    let config = ground.config(None, vec![idle("web")]);
    ground.served = None;
    let agent = start(config).await.unwrap();
    let mut events = agent.events();
    let mut forged = good.clone();
    forged.append("alice", &set(&good, vec![declare("evil")]), &[]);
    ground.control.show(forged);
    ground.served = Some(ground.control.serve(address).await);
    let why = event(&mut events, history_refused).await;
    assert!(why.contains("was signed by 0 of 1 operators"), "{why}");
    agent.stop(Duration::ZERO).await;
}
