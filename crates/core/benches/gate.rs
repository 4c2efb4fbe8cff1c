//! What the change gate's decision costs, by what is asked: the shipped gate, one core. Prints a table, and one JSON object on its
//! last line.
//!
//! | case | is |
//! |---|---|
//! | `permitted` | an editor with a fresh passkey changes a policy |
//! | `step_up` | the same without a factor |
//! | `needs_countersign` | a pipeline asks for it |
//! | `large` | an editor with a fresh passkey changes 100 policies in one change-set |

use std::{
    collections::{BTreeMap, BTreeSet},
    hint::black_box,
    time::Instant,
};

use countersign_core::{
    assurance::{
        Assurance, FactorKind, Proof,
        webauthn::{PublicKey, RelyingParty},
    },
    canonical::Digest,
    change::{Change, ChangeSet, Revision},
    gate::{Asked, Author, ChangeGate, Origin, Pipeline},
    identity::{FactorId, OperatorName, TrustDomain},
    operator::{EnrolledFactor, SigningKey},
    state::MeshState,
};

const NOW: i64 = 1_795_365_000;
/// An Ed25519 key in its COSE form.
const KEY: &str = "a4010103272006215820d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a";
const ROUNDS: usize = 31;
const ROUND_MS: u128 = 20;

fn operator(given: &str) -> OperatorName {
    OperatorName::parse(given).expect("a name")
}

/// A mesh with an owner and an editor, who have passkeys.
fn mesh() -> MeshState {
    let mut changes = vec![Change::CreateMesh { trust_domain: TrustDomain::parse("shop.example").expect("a name") }];
    for (name, role) in [("alice", "owner"), ("bob", "editor")] {
        let relying_party = RelyingParty { id: "localhost".into(), origins: vec!["http://localhost:1".into()] };
        let key = PublicKey::parse(&hex::decode(KEY).expect("digits")).expect("a key");
        let factor = EnrolledFactor::Platform(SigningKey { key, backup_eligible: false, relying_party, model: None });
        let id = FactorId::parse(&format!("factor-{name}")).expect("an id");
        changes.push(Change::InviteOperator { name: operator(name), roles: [role.into()].into() });
        changes.push(Change::EnrollOperator { name: operator(name), id, factor });
    }
    MeshState::default().apply_all(&ChangeSet { base: Revision(0), changes }).expect("it folds")
}

fn policies(count: usize) -> ChangeSet {
    let policy = |n: usize| {
        let text = format!("text {n}");
        Change::SetPolicy {
            id: format!("p{n}").as_str().into(),
            file: "p.cedar".into(),
            body: Digest::of(text.as_bytes()),
        }
    };
    ChangeSet { base: Revision(1), changes: (0..count).map(policy).collect() }
}

fn passkey() -> Assurance {
    let mut shown = Assurance::default();
    shown.add(Proof { kind: FactorKind::Platform, at_seconds: NOW, user_verified: true, device_bound: true });
    shown
}

fn main() {
    let (gate, state) = (ChangeGate::shipped(), mesh());
    let bob = Author::Operator(operator("bob"));
    let pipeline = Author::Pipeline(Pipeline {
        name: "deploy".into(),
        issuer: "https://ci.example".into(),
        subject: "repo-1".into(),
        claims: ["ref=main".into()].into(),
    });
    let (one, hundred) = (policies(1), policies(100));
    let cases: [(&str, &Author, &ChangeSet, Assurance); 4] = [
        ("permitted", &bob, &one, passkey()),
        ("step_up", &bob, &one, Assurance::default()),
        ("needs_countersign", &pipeline, &one, Assurance::default()),
        ("large", &bob, &hundred, passkey()),
    ];
    let mut results: BTreeMap<String, f64> = BTreeMap::new();
    println!("{:>18} {:>14} {:>16}", "case", "microseconds", "decisions/s");
    for (name, author, change_set, assurance) in &cases {
        let approvals = BTreeSet::new();
        let asked = Asked {
            author,
            change_set,
            state: &state,
            assurance,
            asked_at_seconds: NOW,
            approvals: &approvals,
            origin: Origin::Socket,
            risk: 0,
            now_seconds: NOW,
        };
        let answer = format!("{:?}", gate.decide(&asked));
        let expected = match *name {
            "step_up" => "StepUp",
            "needs_countersign" => "NeedsCountersign",
            _ => "Permit",
        };
        assert!(answer.starts_with(expected), "{name}: {answer}");
        let seconds = measure(|| {
            black_box(gate.decide(&asked));
        });
        println!("{name:>18} {:>14.1} {:>16.0}", seconds * 1e6, 1.0 / seconds);
        results.insert(format!("{name}_us"), seconds * 1e6);
        results.insert(format!("{name}_per_second"), 1.0 / seconds);
    }
    println!("{}", serde_json::to_string(&results).expect("numbers by name"));
}

/// The median of several rounds, in seconds for each call.
fn measure(mut act: impl FnMut()) -> f64 {
    let mut rounds: Vec<f64> = (0..ROUNDS)
        .map(|_| {
            let (began, mut count) = (Instant::now(), 0u32);
            while began.elapsed().as_millis() < ROUND_MS {
                act();
                count += 1;
            }
            began.elapsed().as_secs_f64() / f64::from(count)
        })
        .collect();
    rounds.sort_by(f64::total_cmp);
    rounds[ROUNDS / 2]
}
