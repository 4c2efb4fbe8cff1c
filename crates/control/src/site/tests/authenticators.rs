//! Which authenticators are enrolled where the mesh names those that may be.

use countersign_core::assurance::authenticators::{Aaguid, Authenticators};
use countersign_testkit::{maker::Maker, security_key::Attestation};

use super::*;
use crate::store::Document;

const NOT_PROVEN: &str = "the authenticator did not prove which model it is";

fn model(last: u8) -> Aaguid {
    Aaguid::parse(&format!("ee882879-721c-4913-9775-3dfcce9707{last:02x}")).unwrap()
}

fn only(maker: &Maker, models: &[Aaguid]) -> Change {
    let (models, roots) = (models.iter().copied().collect(), [maker.root()].into());
    Change::SetAuthenticators { authenticators: Authenticators { models, roots } }
}

/// A key of `model` that `maker` vouches for.
fn key_of(maker: &Maker, model: Aaguid) -> SecurityKey {
    SecurityKey::of(model, Attestation::Maker(maker.vouches_for(model)))
}

impl Mesh {
    /// The setting of a mesh that nobody has enrolled in.
    async fn sets(&self, change: Change) {
        self.plane().enter(self.asked(vec![change]), Petitioner::default()).await.unwrap();
    }

    fn model_of(&self, operator: &str, key: &SecurityKey) -> Option<Aaguid> {
        let head = self.plane().ledger.head();
        let operator = &head.follower.state().operators[&OperatorName::parse(operator).unwrap()];
        operator.factors[&key.factor_id()].signing_key().unwrap().model
    }
}

/// PROVES (authenticators-held)
#[tokio::test]
async fn a_key_is_enrolled_only_in_an_authenticator_that_proves_to_be_of_a_model_that_may_be() {
    let mesh = Mesh::start().await;
    let (maker, other) = (Maker::new("Keys"), Maker::new("Keys"));
    mesh.sets(only(&maker, &[model(1), model(2)])).await;
    let link = mesh.link().await;
    let mut alice = mesh.browser();
    let of_another_maker = "nobody whom the mesh believes vouches for this authenticator";
    let mut copied = key_of(&maker, model(1));
    copied.backed_up = true;
    for (case, key, expected) in [
        ("says nothing", SecurityKey::new(), NOT_PROVEN),
        ("says the model and shows nothing", SecurityKey::of(model(1), Attestation::None), NOT_PROVEN),
        ("vouches for itself", SecurityKey::of(model(1), Attestation::Own), NOT_PROVEN),
        ("is of another model", key_of(&maker, model(3)), "an authenticator of this model may not be enrolled"),
        ("is of another maker", key_of(&other, model(1)), of_another_maker),
        (
            "says another model than its certificate",
            SecurityKey::of(model(1), Attestation::Maker(maker.vouches_for(model(3)))),
            "what the authenticator said of the new key is refused",
        ),
        ("may be copied", copied, "a passkey that may be copied to other devices may not be enrolled"),
    ] {
        alice.key = key;
        assert_eq!(alice.enrols("alice", Some(&link)).await.unwrap_err(), (403, expected.to_owned()), "{case}");
        assert!(!mesh.plane().ledger.head().follower.state().is_protected(), "{case}");
    }
    alice.key = key_of(&maker, model(2));
    let begun = alice.begins("alice", Some(&link)).await.unwrap();
    assert_eq!(begun["options"]["attestation"], "direct", "the browser is asked for it");
    alice.finishes(&begun).await.unwrap();
    assert_eq!(mesh.model_of("alice", &alice.key), Some(model(2)));
    alice.signs_in(json!({})).await.unwrap();
    let (_, page) = alice.get("/account").await;
    assert!(page.contains(&model(2).to_string()), "{page}");
}

#[tokio::test]
async fn an_enrolment_is_held_to_the_list_in_force_when_it_ends_and_keys_from_before_it_stay() {
    let mesh = Mesh::start().await;
    let maker = Maker::new("Keys");
    let changed = (409, "which authenticators may be enrolled has changed since this began".to_owned());
    let link = mesh.link().await;
    let mut alice = mesh.browser();
    let begun = alice.begins("alice", Some(&link)).await.unwrap();
    mesh.sets(only(&maker, &[model(1)])).await;
    assert_eq!(alice.finishes(&begun).await.unwrap_err(), changed, "begun when any would do");
    alice.key = key_of(&maker, model(1));
    let begun = alice.begins("alice", Some(&link)).await.unwrap();
    mesh.sets(only(&maker, &[model(2)])).await;
    assert_eq!(alice.finishes(&begun).await.unwrap_err(), changed, "begun under another list");
    alice.key = key_of(&maker, model(2));
    let begun = alice.begins("alice", Some(&link)).await.unwrap();
    mesh.sets(Change::RemoveAuthenticators {}).await;
    alice.finishes(&begun).await.unwrap();
    assert_eq!(mesh.model_of("alice", &alice.key), Some(model(2)), "it was proven all the same");
    alice.signs_in(json!({})).await.unwrap();

    // What waits to be signed is judged by the list that holds when it is signed.
    let first = std::mem::replace(&mut alice.key, SecurityKey::new());
    let waits = alice.enrols("alice", None).await.unwrap()["change"].as_str().unwrap().to_owned();
    alice.key = first;
    let id = propose(&mesh, only(&maker, &[model(1)])).await;
    alice.signs_change(&id, &mesh.origin()).await.unwrap();
    let (status, _) = alice.signs_change(&waits, &mesh.origin()).await.unwrap_err();
    assert!(matches!(status, 409 | 410), "{status}");
    assert_eq!(mesh.plane().ledger.head().follower.state().operators.len(), 1);
    alice.signs_in(json!({})).await.unwrap();
    let id = mesh.proposed("alice", "web").await;
    alice.signs_change(&id, &mesh.origin()).await.unwrap();
}

#[tokio::test]
async fn an_enrolment_that_an_earlier_version_began_is_read() {
    let mesh = Mesh::start().await;
    let link = mesh.link().await;
    let mut alice = mesh.browser();
    let begun = alice.begins("alice", Some(&link)).await.unwrap();
    let id = begun["id"].as_str().unwrap().to_owned();
    let (kind, now_ms) = ("key-enrolment", mesh.plane().clock.now_ms());
    let taken = mesh.plane().storage.run("test", move |store| store.take_document(kind, &id, now_ms)).await;
    let kept: Value = serde_json::from_slice(&taken.unwrap().unwrap()).unwrap();
    // As it was kept before there were lists, member by member.
    assert_eq!(kept.as_object().unwrap().len(), 3);
    let before = json!({ "operator": kept["operator"], "way": kept["way"], "registration": { "rs": kept["registration"]["rs"] } });
    let document = Document {
        kind,
        key: begun["id"].as_str().unwrap().to_owned(),
        bytes: serde_json::to_vec(&before).unwrap(),
        expires_at_ms: now_ms + 1,
    };
    let put = mesh.plane().storage.run("test", move |store| store.put_document(&document, now_ms, 16)).await;
    assert!(put.unwrap());
    alice.finishes(&begun).await.unwrap();
}
