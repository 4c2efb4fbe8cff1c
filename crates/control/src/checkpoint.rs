//! The newest checkpoint of the ledger, and who cosigned it: signed when the ledger has grown, then shown to each witness.
//!
//! A checkpoint names entries only that the store has fsynced. A witness that is away delays nobody: it is asked again, and `status`
//! says so. What a witness answers is verified by the key that the operator gave, so the way to it need not be trusted.

use std::{
    str::FromStr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures_util::future::join_all;
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::rt::TokioIo;
use tokio::{net::TcpStream, sync::watch, time::timeout};

use countersign_api::local::{CheckpointView, WitnessView};
use countersign_core::{
    change::Revision,
    ledger::{AddCheckpoint, Note, Signature, SignatureKind, VerifierKey},
};

use crate::{
    Plane,
    authority::log_key::SignError,
    ledger::{self, Ledger},
};

/// Witnesses of one ledger at most.
pub const WITNESSES_MAX: usize = 16;
/// How long a witness may take for one answer.
const WITHIN: Duration = Duration::from_secs(5);
/// How long whoever asks for a checkpoint waits for its witnesses.
const COSIGNED_WITHIN: Duration = Duration::from_secs(2);
/// How soon a witness that was away is asked again, and how late at most.
const AGAIN_AFTER: Duration = Duration::from_secs(2);
const AGAIN_AFTER_MAX: Duration = Duration::from_secs(60);
/// Longest answer of a witness, in bytes.
const ANSWER_BYTES_MAX: usize = 16 * 1024;
/// A witness that names another size is asked again from there; one that never ends doing so is not followed.
const ATTEMPTS_MAX: usize = 3;

/// Where a witness is, and the key that it cosigns with: `URL=VKEY`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WitnessAddress {
    authority: http::uri::Authority,
    prefix: String, // of its paths, without a slash at its end
    key: VerifierKey,
}

/// Why text names no witness.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{given}` names no witness: {why}")]
pub struct WitnessAddressError {
    given: String,
    why: String,
}

/// Who is asked to cosign, and how many must.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Witnesses {
    /// All of them.
    pub asked: Vec<WitnessAddress>,
    /// How many must have cosigned for a checkpoint to be called witnessed.
    pub quorum: usize,
}

/// The checkpoints of one ledger.
pub struct Checkpoints {
    witnesses: Vec<Watched>,
    quorum: usize,
    newest: watch::Sender<Option<Arc<Signed>>>,
}

/// A witness, with the size that it held when it was last heard.
struct Watched {
    address: WitnessAddress,
    held: AtomicU64,
}

/// A checkpoint that the log signed.
struct Signed {
    size: u64,
    note: Note,
    /// What each witness said of it; nothing yet at first.
    answers: Vec<Option<Result<Signature, String>>>,
}

impl FromStr for WitnessAddress {
    type Err = WitnessAddressError;

    fn from_str(given: &str) -> Result<Self, WitnessAddressError> {
        let wrong = |why: String| WitnessAddressError { given: given.chars().take(200).collect(), why };
        let (url, vkey) = given.split_once('=').ok_or_else(|| wrong("write `URL=VKEY`".into()))?;
        let key = VerifierKey::parse(vkey).map_err(|error| wrong(error.to_string()))?;
        if key.kind() != SignatureKind::Cosignature {
            return Err(wrong("its key is one of a log; a witness prints its own when it starts".into()));
        }
        let url: http::Uri = url.parse().map_err(|error: http::uri::InvalidUri| wrong(error.to_string()))?;
        let (Some("http"), Some(authority), None) = (url.scheme_str(), url.authority(), url.query()) else {
            return Err(wrong("its address is `http://HOST:PORT`; what it answers is verified by its key".into()));
        };
        Ok(Self { authority: authority.clone(), prefix: url.path().trim_end_matches('/').to_owned(), key })
    }
}

impl WitnessAddress {
    /// The public key that it cosigns with. It tells witnesses apart, whatever they are called.
    pub fn public(&self) -> &[u8; 32] {
        self.key.public()
    }
}

impl std::fmt::Display for WitnessAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "http://{}{}", self.authority, self.prefix)
    }
}

impl Checkpoints {
    /// Nothing is signed and nobody asked yet.
    pub fn new(witnesses: Witnesses) -> Self {
        let Witnesses { asked, quorum } = witnesses;
        let watched = |address| Watched { address, held: AtomicU64::new(0) };
        Self { witnesses: asked.into_iter().map(watched).collect(), quorum, newest: watch::Sender::new(None) }
    }

    /// The checkpoint of the ledger as it is now; signed now if it was not. `None` while there is no mesh. Its witnesses have a
    /// moment to cosign it.
    pub async fn newest(&self, plane: &Plane) -> Result<Option<CheckpointView>, SignError> {
        let Some(size) = self.sign(plane).await? else { return Ok(None) };
        let mut newest = self.newest.subscribe();
        let cosigned = newest.wait_for(|newest| {
            newest.as_ref().is_some_and(|newest| newest.size > size || newest.answers.iter().all(Option::is_some))
        });
        let _ = timeout(COSIGNED_WITHIN, cosigned).await;
        Ok(self.newest.borrow().as_ref().map(|signed| self.view(signed, plane)))
    }

    /// Signs the checkpoint of the ledger as it is now, and returns its size.
    async fn sign(&self, plane: &Plane) -> Result<Option<u64>, SignError> {
        let Some(authority) = plane.authority() else { return Ok(None) };
        // Another control plane may have signed what is not taken up here yet. What cannot be read now is not signed either.
        if let Err(ledger::AppendError::Store(error)) = plane.ledger.catch_up().await {
            return Err(error.into());
        }
        let size = plane.ledger.head().follower.revision().0;
        if self.newest.borrow().as_ref().is_some_and(|newest| newest.size >= size) {
            return Ok(Some(size));
        }
        // The mark first: a store that is restored from a copy older than a signed checkpoint is to be noticed.
        plane.mark().await;
        let note = authority.log().sign(size, |size| plane.ledger.root_at(Revision(size))).await?;
        self.newest.send_if_modified(|newest| {
            let grown = newest.as_ref().is_none_or(|newest| newest.size < size);
            if grown {
                *newest = Some(Arc::new(Signed { size, note, answers: vec![None; self.witnesses.len()] }));
            }
            grown
        });
        Ok(Some(size))
    }

    /// Asks those witnesses that have not cosigned the newest checkpoint; says what is missing.
    async fn ask(&self, plane: &Plane) -> Option<String> {
        let signed = self.newest.borrow().clone()?;
        let asked = self.witnesses.iter().zip(&signed.answers).enumerate().map(|(at, (witness, answer))| {
            let signed = &signed;
            async move {
                if !matches!(answer, Some(Ok(_))) {
                    let said = witness.ask(signed, &plane.ledger).await;
                    self.told(signed.size, at, said);
                }
            }
        });
        join_all(asked).await;
        let newest = self.newest.borrow().clone()?;
        let (mut cosigned, mut missing) = (0, Vec::new());
        for (witness, answer) in self.witnesses.iter().zip(&newest.answers) {
            match answer {
                Some(Ok(_)) => cosigned += 1,
                Some(Err(why)) => missing.push(format!("{} at {}: {why}", witness.address.key.name(), witness.address)),
                None => {}
            }
        }
        let short = if cosigned < self.quorum { format!(" of {} asked for", self.quorum) } else { String::new() };
        (!missing.is_empty()).then(|| {
            format!("{cosigned} witnesses{short} cosigned the checkpoint of {}: {}", newest.size, missing.join("; "))
        })
    }

    fn told(&self, size: u64, at: usize, said: Result<Signature, String>) {
        self.newest.send_if_modified(|newest| match newest {
            Some(newest) if newest.size == size => {
                let mut answers = newest.answers.clone();
                answers[at] = Some(said);
                *newest = Arc::new(Signed { size, note: newest.note.clone(), answers });
                true
            }
            _ => false,
        });
    }

    fn view(&self, signed: &Signed, plane: &Plane) -> CheckpointView {
        let cosignatures = signed.answers.iter().flatten().flatten();
        let note = cosignatures
            .fold(signed.note.clone(), |note, cosignature| note.clone().with(cosignature.clone()).unwrap_or(note));
        let witnesses = self.witnesses.iter().zip(&signed.answers).map(|(witness, answer)| WitnessView {
            name: witness.address.key.name().to_owned(),
            url: witness.address.to_string(),
            key: witness.address.key.to_string(),
            cosigned: matches!(answer, Some(Ok(_))),
            error: answer.as_ref().and_then(|answer| answer.as_ref().err().cloned()),
        });
        let log_key = plane.authority().map(|authority| authority.log().verifier().to_string());
        CheckpointView {
            note: note.encode(),
            size: signed.size,
            log_key: log_key.unwrap_or_default(),
            quorum: self.quorum,
            witnesses: witnesses.collect(),
        }
    }
}

/// Signs whenever the ledger has grown, and asks the witnesses until each has cosigned. It never ends and never stops anyone.
pub async fn follow(plane: Arc<Plane>) {
    let mut growth = plane.ledger.growth();
    plane.identity().await;
    let mut again_after = AGAIN_AFTER;
    loop {
        growth.borrow_and_update();
        let signed = plane.checkpoints.sign(&plane).await;
        if let Err(error) = &signed {
            tracing::error!(error = %crate::error_chain(error), "the checkpoint could not be signed");
        }
        let is_signed = signed.is_ok();
        plane.note("checkpoint", signed.err().map(|error| format!("no checkpoint: {}", crate::error_chain(&error))));
        let missing = plane.checkpoints.ask(&plane).await;
        if let Some(missing) = &missing {
            tracing::warn!(%missing, "a witness did not cosign");
        }
        let all_there = is_signed && missing.is_none();
        plane.note("witnesses", missing);
        let growing = async { growth.changed().await.expect("INVARIANT: the ledger lives in `plane`") };
        if all_there {
            growing.await;
            again_after = AGAIN_AFTER;
        } else if timeout(again_after, growing).await.is_err() {
            again_after = (again_after * 2).min(AGAIN_AFTER_MAX);
        }
    }
}

impl Watched {
    /// Shows it the checkpoint, with the proof that it follows from the one that the witness holds.
    async fn ask(&self, signed: &Signed, ledger: &Ledger) -> Result<Signature, String> {
        for _ in 0..ATTEMPTS_MAX {
            let old_size = self.held.load(Ordering::Relaxed);
            let proof = ledger.consistency(old_size, signed.size).ok_or_else(|| {
                format!("it has cosigned {old_size} entries, this ledger has {}: there are two histories", signed.size)
            })?;
            let request = AddCheckpoint { old_size, proof, checkpoint: signed.note.clone() };
            let answered = timeout(WITHIN, self.post(request.encode())).await;
            let (status, answer) = answered.map_err(|_| format!("no answer within {} s", WITHIN.as_secs()))??;
            match status {
                200 => {
                    let cosignature = self.cosignature(&answer, &signed.note)?;
                    self.held.store(signed.size, Ordering::Relaxed);
                    return Ok(cosignature);
                }
                409 => {
                    let held = answer.trim_end().parse().map_err(|_| "it named no size that it holds".to_owned())?;
                    self.held.store(held, Ordering::Relaxed);
                }
                status => {
                    let said: String = answer.chars().filter(|c| !c.is_control()).take(200).collect();
                    return Err(format!("it answered {status}: {said}"));
                }
            }
        }
        Err("it names another size each time".into())
    }

    async fn post(&self, body: String) -> Result<(u16, String), String> {
        let lost = |error: &dyn std::error::Error| format!("it cannot be reached: {}", crate::error_chain(error));
        let authority = &self.address.authority;
        let host = authority.host().trim_matches(['[', ']']);
        let stream = TcpStream::connect((host, authority.port_u16().unwrap_or(80))).await.map_err(|e| lost(&e))?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|e| lost(&e))?;
        // It ends when the answer was read, or with whoever asked.
        tokio::spawn(connection);
        let request = http::Request::post(format!("{}/add-checkpoint", self.address.prefix))
            .header(http::header::HOST, authority.as_str())
            .body(Full::new(Bytes::from(body)))
            .map_err(|e| lost(&e))?;
        let response = sender.send_request(request).await.map_err(|e| lost(&e))?;
        let status = response.status().as_u16();
        let answer = Limited::new(response.into_body(), ANSWER_BYTES_MAX).collect().await;
        let answer = answer.map_err(|_| "its answer broke off, or is too long".to_owned())?.to_bytes();
        Ok((status, String::from_utf8_lossy(&answer).into_owned()))
    }

    /// The one line of the answer that this witness's key made, verified.
    fn cosignature(&self, answer: &str, note: &Note) -> Result<Signature, String> {
        let key = &self.address.key;
        let lines = answer.lines().filter_map(Signature::parse);
        let own = lines.into_iter().find(|line| line.name() == key.name() && line.key_id() == key.id());
        let own = own.ok_or_else(|| format!("it answered without a cosignature of `{}`", key.name()))?;
        let alone = Note::new(note.text().to_owned(), vec![own.clone()]).map_err(|error| error.to_string())?;
        alone.verify([key]).map_err(|error| error.to_string())?;
        Ok(own)
    }
}
