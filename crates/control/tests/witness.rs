//! A witness and the control planes that it watches: what it cosigns, what it never does, and that nobody waits for it.

mod support;

use std::{path::Path, time::Duration};

use bytes::Bytes;
use countersign_api::local::{CheckpointView, ProofView};
use countersign_control::{
    Control, ControlConfig,
    authority::note_key::NoteKey,
    checkpoint::Witnesses,
    clock::Clock,
    start,
    witness::{self, Witness, WitnessConfig, WitnessError},
};
use countersign_core::{
    canonical::Digest,
    ledger::{
        AddCheckpoint, Checkpoint, EntryProof, Frontier, Note, SignatureKind, Trust, VerifierKey, consistency_proof,
        hash_leaf,
    },
};
use http_body_util::{BodyExt, Full};
use hyper_util::rt::TokioIo;
use support::{Plane, config, declare};
use tokio::net::TcpStream;

const ORIGIN: &str = "countersign/shop.example";

fn log() -> NoteKey {
    NoteKey::from_seed(ORIGIN, SignatureKind::Ed25519, &[7; 32]).unwrap()
}

fn leaves(history: &str, count: u64) -> Vec<Digest> {
    (0..count).map(|n| hash_leaf(if n < 2 { n.to_string() } else { format!("{history}{n}") }.as_bytes())).collect()
}

/// What a log with `history` sends to a witness that holds `old_size`.
fn request(key: &NoteKey, history: &str, old_size: u64, size: u64) -> AddCheckpoint {
    let leaves = leaves(history, size);
    let text = Checkpoint::new(ORIGIN, size, Frontier::of(&leaves).root()).unwrap().encode();
    let checkpoint = Note::new(text.clone(), vec![key.sign(&text)]).unwrap();
    AddCheckpoint { old_size, proof: consistency_proof(&leaves, old_size).unwrap_or_default(), checkpoint }
}

async fn watch(dir: &Path, listen: &str, logs: Vec<VerifierKey>) -> Result<Witness, WitnessError> {
    let config = WitnessConfig { dir: dir.into(), listen: listen.parse().unwrap(), name: "beta".into(), logs };
    witness::start(config, Clock::system()).await
}

async fn send(witness: &Witness, method: &str, path: &str, body: impl Into<Bytes>) -> (u16, String) {
    let stream = TcpStream::connect(witness.listen).await.unwrap();
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    let request = http::Request::builder().method(method).uri(path).header("host", "witness");
    let response = sender.send_request(request.body(Full::new(body.into())).unwrap()).await.unwrap();
    let status = response.status().as_u16();
    (status, String::from_utf8(response.into_body().collect().await.unwrap().to_bytes().into()).unwrap())
}

async fn add(witness: &Witness, request: &AddCheckpoint) -> (u16, String) {
    send(witness, "POST", "/add-checkpoint", request.encode()).await
}

/// PROVES (cosigned-is-remembered)
#[tokio::test]
async fn a_witness_cosigns_one_history_and_no_restart_makes_it_forget() {
    let dir = tempfile::tempdir().unwrap();
    let mut witness = watch(dir.path(), "127.0.0.1:0", vec![log().verifier().clone()]).await.unwrap();
    let key = witness.key.clone();
    let stranger = NoteKey::from_seed(ORIGIN, SignatureKind::Ed25519, &[8; 32]).unwrap();
    for (case, given, expected) in [
        ("signed by a stranger", request(&stranger, "honest", 0, 3), (403, "the log did not sign it\n")),
        ("from a size that is not held", request(&log(), "honest", 1, 3), (409, "0\n")),
    ] {
        assert_eq!(add(&witness, &given).await, (expected.0, expected.1.to_owned()), "{case}");
    }
    let first = request(&log(), "honest", 0, 3);
    let (status, line) = add(&witness, &first).await;
    let cosigned = countersign_core::ledger::Signature::parse(line.trim_end()).unwrap();
    let note = first.checkpoint.clone().with(cosigned).unwrap();
    let trust = Trust { witnesses: vec![key.clone()], quorum: 1, ..Trust::log(log().verifier().clone()) };
    assert_eq!((status, trust.verify(&note).unwrap().checkpoint().size()), (200, 3));
    assert!(matches!(watch(dir.path(), "127.0.0.1:0", vec![key.clone()]).await, Err(WitnessError::Logs)));
    let second = watch(dir.path(), "127.0.0.1:0", vec![log().verifier().clone()]).await;
    assert!(matches!(second, Err(WitnessError::Running(_))), "two processes with one memory");
    for _ in 0..2 {
        for (case, given, expected) in [
            ("the same again", request(&log(), "honest", 3, 3), 200),
            ("an older one", request(&log(), "honest", 3, 2), 400),
            ("from before what it holds", request(&log(), "honest", 0, 2), 409),
            ("another of the same size", request(&log(), "forged", 3, 3), 422),
            ("a larger one of another history", request(&log(), "forged", 3, 5), 422),
        ] {
            let (status, said) = add(&witness, &given).await;
            assert_eq!(status, expected, "{case}: {said}");
        }
        drop(witness);
        witness = watch(dir.path(), "127.0.0.1:0", vec![log().verifier().clone()]).await.unwrap();
        assert_eq!(witness.key, key);
    }
    let monitor = format!("/{}/checkpoint", Digest::of(ORIGIN.as_bytes()));
    let (status, held) = send(&witness, "GET", &monitor, "").await;
    assert_eq!((status, trust.verify(&Note::parse(held.as_bytes()).unwrap()).is_ok()), (200, true), "{held}");
    assert_eq!(send(&witness, "GET", "/abc/checkpoint", "").await.0, 404);
    assert_eq!(send(&witness, "POST", "/add-checkpoint", "old 1\n").await.0, 400);
    assert_eq!(send(&witness, "POST", "/add-checkpoint", vec![b'a'; 1 << 20]).await.0, 400);
    drop(witness);
    std::fs::remove_file(dir.path().join("witness.json")).unwrap();
    let forgot = watch(dir.path(), "127.0.0.1:0", vec![log().verifier().clone()]).await;
    assert!(matches!(forgot, Err(WitnessError::Forgot(_))), "a witness without a memory");
}

async fn witnessed(witnesses: &[String], quorum: usize) -> Plane {
    let dir = tempfile::tempdir().unwrap();
    let asked = witnesses.iter().map(|witness| witness.parse().unwrap()).collect();
    let config = ControlConfig { witnesses: Witnesses { asked, quorum }, ..config(dir.path().into()) };
    let control: Control = start(config).await.unwrap();
    Plane { control, dir }
}

#[tokio::test]
async fn a_checkpoint_is_shown_to_witnesses_and_one_that_is_away_stops_nobody() {
    let log_dir = tempfile::tempdir().unwrap();
    // The log's key is known only once there is a mesh; so it is made first, without a witness.
    let plane = Plane { control: start(config(log_dir.path().into())).await.unwrap(), dir: log_dir };
    plane.create(&["web"]).await;
    let log_key: VerifierKey = plane.get::<CheckpointView>("/v1/ledger/checkpoint").await.log_key.parse().unwrap();
    let Plane { control, dir } = plane;
    control.stop().await;

    let witness_dir = tempfile::tempdir().unwrap();
    let witness = watch(witness_dir.path(), "127.0.0.1:0", vec![log_key.clone()]).await.unwrap();
    let away = NoteKey::from_seed("gamma", SignatureKind::Cosignature, &[9; 32]).unwrap();
    let asked = [
        format!("http://{}={}", witness.listen, witness.key).parse().unwrap(),
        format!("http://127.0.0.1:1={}", away.verifier()).parse().unwrap(),
    ];
    let witnesses = Witnesses { asked: asked.into(), quorum: 1 };
    let plane = Plane { control: start(ControlConfig { witnesses, ..config(dir.path().into()) }).await.unwrap(), dir };
    for n in 1..4 {
        plane.apply(n, vec![declare(&format!("s{n}"))]).await.unwrap();
        let view: CheckpointView = plane.get("/v1/ledger/checkpoint").await;
        let trust = Trust { witnesses: vec![witness.key.clone()], quorum: 1, ..Trust::log(log_key.clone()) };
        let verified = trust.verify(&Note::parse(view.note.as_bytes()).unwrap()).unwrap();
        assert_eq!((view.size, verified.checkpoint().size(), view.quorum), (n + 1, n + 1, 1));
        let told: Vec<_> = view.witnesses.iter().map(|w| (&*w.name, w.cosigned, w.error.is_some())).collect();
        assert_eq!(told, [("beta", true, false), ("gamma", false, true)]);
    }
    let warned = async {
        loop {
            let warnings = plane.status().await.warnings;
            if warnings.iter().any(|warning| warning.contains("gamma at http://127.0.0.1:1: it cannot be reached")) {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(support::WITHIN, warned).await.expect("the witness that is away is said");
    plane.control.stop().await;
}

#[tokio::test]
async fn proofs_of_every_entry_and_from_every_size_hold() {
    let plane = witnessed(&[], 0).await;
    let (status, _) = plane.send("GET", "/v1/ledger/checkpoint", Vec::new()).await;
    assert_eq!(status, 200, "an empty ledger has a checkpoint, too");
    plane.create(&["web"]).await;
    for n in 1..5 {
        plane.apply(n, vec![declare(&format!("s{n}"))]).await.unwrap();
    }
    let view: CheckpointView = plane.get("/v1/ledger/checkpoint").await;
    let trust = Trust::log(view.log_key.parse().unwrap());
    let root = trust.verify(&Note::parse(view.note.as_bytes()).unwrap()).unwrap().checkpoint().root();
    let mut leaves = Vec::new();
    for index in 0..5 {
        let told: ProofView = plane.get(&format!("/v1/ledger/proofs/{index}")).await;
        let entry = told.entry.unwrap();
        let proof = EntryProof::parse(told.proof.as_bytes()).unwrap();
        assert_eq!(proof.verify(entry.as_bytes(), &trust).unwrap().checkpoint().root(), root, "{index}");
        leaves.push(hash_leaf(entry.as_bytes()));
    }
    for size in 0..=5 {
        let told: ProofView = plane.get(&format!("/v1/ledger/consistency/{size}")).await;
        let proof = AddCheckpoint::parse(told.proof.as_bytes()).unwrap();
        assert_eq!((proof.old_size, Some(proof.proof)), (size, consistency_proof(&leaves, size)), "{size}");
    }
    for path in ["proofs/5", "proofs/x", "proofs/18446744073709551615", "consistency/6"] {
        let (status, _) = plane.send("GET", &format!("/v1/ledger/{path}"), Vec::new()).await;
        assert!(matches!(status, 400 | 404), "{path}: {status}");
    }
    plane.control.stop().await;
}

#[test]
fn an_address_that_names_no_witness_is_refused_with_the_reason() {
    let key = NoteKey::from_seed("beta", SignatureKind::Cosignature, &[9; 32]).unwrap();
    let good = format!("http://beta:7448/at={}", key.verifier());
    assert!(good.parse::<countersign_control::checkpoint::WitnessAddress>().is_ok());
    for (given, expected) in [
        ("http://beta".to_owned(), "write `URL=VKEY`"),
        ("http://beta=abc".to_owned(), "a verifier key is"),
        (good.replace("http:", "https:"), "its address is `http://HOST:PORT`"),
        (good.replace("/at", "/at?x"), "its address is `http://HOST:PORT`"),
        (format!("http://beta={}", log().verifier()), "its key is one of a log"),
    ] {
        let said = given.parse::<countersign_control::checkpoint::WitnessAddress>().unwrap_err().to_string();
        assert!(said.contains(expected), "{given}: {said}");
    }
}
