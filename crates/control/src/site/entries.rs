//! The ledger in a browser: its entries, and for each the proof that it stands in the signed checkpoint, made and verified here.

use std::{collections::BTreeMap, sync::Arc};

use askama::Template;
use axum::{
    extract::{Path, Query, State},
    response::{IntoResponse, Response},
};
use http::header;
use serde::Deserialize;

use countersign_api::local::Problem;
use countersign_core::{
    assurance::challenge::Purpose,
    change::{Bodies, ChangeSet, Revision},
    gate::{Answer, act::Act},
    ledger::{Entry, EntryProof, Note, Trust, VerifierKey},
};

use super::{
    acts,
    overview::Checkpoint,
    pages::{Frame, page, problem_page},
    session::Session,
    standing::Stands,
    words::{self, When},
};
use crate::{
    Plane,
    local_api::{problem, store_problem},
    store::{StoreError, StoredEntry},
};

/// Entries of one page.
const PAGE: u64 = 50;

/// One entry, in a list.
pub struct EntryRow {
    /// The revision that it made.
    pub revision: u64,
    /// What it did.
    pub title: String,
    /// Who asked for it.
    pub actor: String,
    /// When.
    pub at: When,
    /// Whose signatures count.
    pub signed: String,
}

fn read(plane: &Plane, stored: &StoredEntry) -> Result<(Entry, ChangeSet), Problem> {
    let damaged = |what: String| store_problem(&StoreError::Damaged { path: plane.storage.place().to_owned(), what });
    let entry = Entry::parse(&stored.entry).map_err(|error| damaged(error.to_string()))?;
    let change_set = serde_json::from_slice(&stored.change_set).map_err(|error| damaged(error.to_string()))?;
    Ok((entry, change_set))
}

fn row(plane: &Plane, entry: &Entry, change_set: &ChangeSet, stands: &Stands) -> EntryRow {
    let named: Vec<String> =
        change_set.changes.iter().map(|change| format!("{} {}", change.kind(), change.subject())).collect();
    EntryRow {
        revision: entry.revision().0,
        title: words::title(&named),
        actor: entry.actor.clone(),
        at: When::of(entry.at_ms, plane.clock.now_ms()),
        signed: match stands {
            Stands::Behind(signers) if signers.is_empty() => "nobody".to_owned(),
            Stands::Behind(signers) => signers.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "),
            Stands::Refused(why) => format!("refused: {why}"),
            Stands::Unjudged => "not judged yet, load again".to_owned(),
        },
    }
}

/// The newest entries, or none where the gate does not open the ledger to who is signed in.
pub async fn newest(plane: &Plane, session: &Session, count: u32) -> Result<Vec<EntryRow>, Problem> {
    if crate::acts::may(plane, Act::ReadLedger, session).await? != Answer::Permit {
        return Ok(Vec::new());
    }
    let size = plane.ledger.head().follower.revision().0;
    rows(plane, size.saturating_sub(count.into()), size).await
}

/// The entries `from..to`, newest first.
async fn rows(plane: &Plane, from: u64, to: u64) -> Result<Vec<EntryRow>, Problem> {
    let count = u32::try_from(to.saturating_sub(from)).unwrap_or(u32::MAX);
    let entries = plane.ledger.stored(from, count).await.map_err(|error| store_problem(&error))?;
    let stands = plane.standing.of(plane, from, to).await.map_err(|error| store_problem(&error))?;
    let mut rows = Vec::with_capacity(entries.len());
    for (stored, stands) in entries.iter().zip(&stands).rev() {
        let (entry, change_set) = read(plane, stored)?;
        rows.push(row(plane, &entry, &change_set, stands));
    }
    Ok(rows)
}

/// From which revision a page of the list begins, newest first.
#[derive(Deserialize)]
pub struct From {
    from: Option<u64>,
}

#[derive(Template)]
#[template(path = "ledger.html")]
struct LedgerPage {
    frame: Frame,
    checkpoint: Result<Option<Checkpoint>, String>,
    rows: Vec<EntryRow>,
    newer: Option<u64>,
    older: Option<u64>,
}

/// All entries, a page at a time.
pub async fn ledger(State(plane): State<Arc<Plane>>, session: Session, Query(From { from }): Query<From>) -> Response {
    if let Err(instead) = acts::passes(&plane, &session, Act::ReadLedger, "/ledger").await {
        return instead;
    }
    let size = plane.ledger.head().follower.revision().0;
    let to = from.unwrap_or(size).min(size);
    let rows = match rows(&plane, to.saturating_sub(PAGE), to).await {
        Ok(rows) => rows,
        Err(problem) => return problem_page(&plane, Some(&session), &problem),
    };
    page(&LedgerPage {
        frame: Frame::of(&plane, Some(&session), "/ledger"),
        checkpoint: Checkpoint::newest(&plane).await,
        rows,
        newer: (to < size).then(|| (to + PAGE).min(size)),
        older: (to > PAGE).then(|| to - PAGE),
    })
}

/// That an entry stands in a checkpoint, verified.
struct Proven {
    size: u64,
    witnesses: usize,
    /// As others verify it: a C2SP tlog-proof.
    text: String,
}

async fn prove(plane: &Plane, index: u64, entry: &[u8]) -> Result<Proven, String> {
    let checkpoint = Checkpoint::newest(plane).await?.ok_or("there is no checkpoint yet")?;
    let hashes = plane.ledger.inclusion(index, checkpoint.size).ok_or("the checkpoint does not reach it yet")?;
    let note = Note::parse(checkpoint.note.as_bytes()).map_err(|error| error.to_string())?;
    let proof = EntryProof { extra: None, index, hashes, checkpoint: note };
    let key = VerifierKey::parse(&checkpoint.log_key).map_err(|error| error.to_string())?;
    let witnesses = checkpoint.witnesses.iter().filter_map(|witness| VerifierKey::parse(&witness.key).ok()).collect();
    let trust = Trust { witnesses, ..Trust::log(key) };
    let verified = proof.verify(entry, &trust).map_err(|error| error.to_string())?;
    Ok(Proven { size: checkpoint.size, witnesses: verified.cosigned_by().len(), text: proof.encode() })
}

struct SignatureRow {
    operator: String,
    purpose: &'static str,
    credential: String,
    /// Nothing while it is not known.
    counts: Option<bool>,
}

#[derive(Template)]
#[template(path = "entry.html")]
struct EntryPage {
    frame: Frame,
    row: EntryRow,
    digest: String,
    enforced: usize,
    connected: usize,
    proof: Result<Proven, String>,
    signatures: Vec<SignatureRow>,
    differences: Vec<words::Shown>,
    more_differences: usize,
    /// The exact bytes.
    entry: String,
    canonical: String,
    older: Option<u64>,
    newer: Option<u64>,
}

fn missing() -> Problem {
    problem(404, "the ledger has no such revision", None, Some("look at the list of all entries"))
}

async fn stored(plane: &Plane, revision: u64) -> Result<StoredEntry, Problem> {
    let index = revision.checked_sub(1).ok_or_else(missing)?;
    let found = plane.ledger.stored(index, 1).await.map_err(|error| store_problem(&error))?;
    found.into_iter().next().ok_or_else(missing)
}

/// One entry.
pub async fn entry(State(plane): State<Arc<Plane>>, session: Session, Path(revision): Path<u64>) -> Response {
    if let Err(instead) = acts::passes(&plane, &session, Act::ReadLedger, "/ledger").await {
        return instead;
    }
    match shown(&plane, &session, revision).await {
        Ok(shown) => page(&shown),
        Err(problem) => problem_page(&plane, Some(&session), &problem),
    }
}

async fn shown(plane: &Plane, session: &Session, revision: u64) -> Result<EntryPage, Problem> {
    let stored = stored(plane, revision).await?;
    let (entry, change_set) = read(plane, &stored)?;
    let failed = |error: StoreError| store_problem(&error);
    let stands = plane.standing.of(plane, stored.index, stored.index + 1).await.map_err(failed)?;
    let stands = stands.into_iter().next().unwrap_or(Stands::Unjudged);
    let before = plane.ledger.at(Revision(stored.index)).await.map_err(failed)?;
    let texts: BTreeMap<_, _> = plane.ledger.texts(std::slice::from_ref(&stored)).await.map_err(failed)?;
    let mut bodies = Bodies::default();
    for text in texts.into_values() {
        bodies.insert(text);
    }
    let signatures = entry.countersignatures.iter().map(|signature| SignatureRow {
        operator: signature.operator.to_string(),
        purpose: match signature.purpose {
            Purpose::Countersign => "countersigned",
            _ => "asked for it",
        },
        credential: short(signature.credential.as_str()),
        counts: match &stands {
            Stands::Behind(signers) => Some(signers.contains(&signature.operator)),
            Stands::Refused(_) => Some(false),
            Stands::Unjudged => None,
        },
    });
    let proxies = plane.publisher.proxies();
    let size = plane.ledger.head().follower.revision().0;
    let compared = before.as_ref().map(|head| (head.follower.state(), head.follower.bodies()));
    Ok(EntryPage {
        frame: Frame::of(plane, Some(session), "/ledger"),
        row: row(plane, &entry, &change_set, &stands),
        digest: entry.digest.to_string(),
        enforced: proxies.iter().filter(|proxy| proxy.revision.0 >= revision).count(),
        connected: proxies.len(),
        proof: prove(plane, stored.index, &stored.entry).await,
        signatures: signatures.collect(),
        differences: words::difference(&change_set.changes, compared, &bodies),
        more_differences: change_set.changes.len().saturating_sub(words::CHANGES_MAX),
        entry: String::from_utf8_lossy(&stored.entry).into_owned(),
        canonical: String::from_utf8_lossy(&stored.change_set).into_owned(),
        older: (revision > 1).then(|| revision - 1),
        newer: (revision < size).then(|| revision + 1),
    })
}

/// The first characters of an id that is long.
pub fn short(id: &str) -> String {
    id.chars().take(12).collect()
}

/// The proof, to be kept and verified elsewhere.
pub async fn proof(State(plane): State<Arc<Plane>>, session: Session, Path(revision): Path<u64>) -> Response {
    if let Err(instead) = acts::passes(&plane, &session, Act::ReadLedger, "/ledger").await {
        return instead;
    }
    let proven = match stored(&plane, revision).await {
        Ok(stored) => prove(&plane, stored.index, &stored.entry)
            .await
            .map_err(|why| problem(500, "the entry could not be proven", Some(why), None)),
        Err(problem) => Err(problem),
    };
    match proven {
        Ok(proven) => {
            let named = format!("attachment; filename=\"revision-{revision}.tlog-proof\"");
            let headers =
                [(header::CONTENT_TYPE, "text/plain; charset=utf-8".to_owned()), (header::CONTENT_DISPOSITION, named)];
            (headers, proven.text).into_response()
        }
        Err(problem) => problem_page(&plane, Some(&session), &problem),
    }
}
