//! `ledger verify --offline`: an export against public keys alone. It needs no mesh, no control plane and no network.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
};

use clap::Args;
use serde::Serialize;

use countersign_core::{
    assurance::webauthn::PublicKey,
    canonical::Digest,
    identity::OperatorName,
    ledger::{AuditError, Audited, Exported, KNOWN_BYTES_MAX, Known, SignatureKind, Trust, VerifierKey, audit},
};

use crate::{
    error::{Done, Failure},
    render::{self, Output},
};

/// What is verified, and by which keys.
#[derive(Debug, Args)]
pub struct VerifyArguments {
    /// Verify an export, with the given keys alone and without any control plane
    #[arg(long, value_name = "DIR", requires = "log_key")]
    pub offline: Option<PathBuf>,
    /// The key of the log, as `authority show` prints it where the ledger is
    #[arg(long, value_name = "VKEY", requires = "offline")]
    pub log_key: Option<VerifierKey>,
    /// A file of the operators' public keys: lines `<operator> <key>`, and `anchor <digest>` to know the mesh by
    #[arg(long, value_name = "FILE", requires = "offline")]
    pub operators: Option<PathBuf>,
    /// The key of a witness that may have cosigned the checkpoint; may be repeated
    #[arg(long, value_name = "VKEY", requires = "offline")]
    pub witness: Vec<VerifierKey>,
    /// How many of them must have [default: all]
    #[arg(long, value_name = "K", requires = "witness")]
    pub quorum: Option<usize>,
    /// The code that your authenticator app shows now, where the gate asks for one: only from another machine does it
    #[arg(long, value_name = "CODE", conflicts_with = "offline")]
    pub otp: Option<String>,
}

/// An export that holds.
#[derive(Debug, Serialize)]
struct Verified {
    origin: String,
    size: u64,
    root: Digest,
    state: Digest,
    anchor: Option<Digest>,
    quorum: Option<u32>,
    protected: u64,
    countersigned: u64,
    operators: BTreeMap<OperatorName, BTreeSet<PublicKey>>,
    witnesses: Vec<Cosigned>,
}

#[derive(Debug, Serialize)]
struct Cosigned {
    name: String,
    at_seconds: u64,
}

/// Verifies the export below `dir`.
pub fn verify(dir: &Path, arguments: &VerifyArguments, output: Output) -> Done {
    let log_key = arguments.log_key.clone().ok_or_else(|| Failure::usage("`--offline` needs `--log-key`"))?;
    if log_key.kind() != SignatureKind::Ed25519 {
        return Err(Failure::usage(format!("`{log_key}` is the key of a witness, not of a log")));
    }
    let quorum = arguments.quorum.unwrap_or(arguments.witness.len());
    let trust = Trust { witnesses: arguments.witness.clone(), quorum, ..Trust::log(log_key) };
    let known = arguments.operators.as_deref().map(known).transpose()?;
    let audited = audit(&trust, known.as_ref(), |what| read(dir, what)).map_err(|error| failed(dir, &error))?;
    render::answer(output, &verified(audited), |verified, paint| {
        let mut text = format!(
            "{} {} entries of {} follow from each other, up to what the log signed\n",
            paint.good("verified:"),
            verified.size,
            verified.origin
        );
        let mut line = |label: &str, value: String| text.push_str(&format!("{} {value}\n", paint.dim(label)));
        line("root     ", verified.root.to_string());
        line("state    ", verified.state.to_string());
        match verified.anchor {
            None => line("anchor   ", "none: no operator has enrolled, nobody countersigned".to_owned()),
            Some(anchor) => {
                line("anchor   ", anchor.to_string());
                let (signed, of) = (verified.countersigned, verified.protected);
                line("signed   ", format!("{signed} of the {of} entries from the anchor on, by operators' own keys"));
                let seal = |quorum| format!("every change needs {quorum} operators' signatures");
                line("seal     ", verified.quorum.map_or_else(|| "none".to_owned(), seal));
            }
        }
        for (operator, keys) in &verified.operators {
            keys.iter().for_each(|key| line("operator ", format!("{operator} {}", String::from(key.clone()))));
        }
        for witness in &verified.witnesses {
            line("witness  ", format!("{} at {}", witness.name, render::moment_full(witness.at_seconds * 1000)));
        }
        text
    })
}

fn verified(audited: Audited) -> Verified {
    let Audited { checkpoint, state, anchor, seal, keys, protected, countersigned } = audited;
    let cosigned = checkpoint.cosigned_by().iter();
    Verified {
        origin: checkpoint.checkpoint().origin().to_string(),
        size: checkpoint.checkpoint().size(),
        root: checkpoint.checkpoint().root(),
        state,
        anchor,
        quorum: seal.map(|seal| seal.quorum),
        protected,
        countersigned,
        operators: keys,
        witnesses: cosigned.map(|(name, at)| Cosigned { name: name.to_string(), at_seconds: *at }).collect(),
    }
}

fn known(path: &Path) -> Result<Known, Failure> {
    let unread = || Failure::new(format!("could not read the operators' keys in `{}`", path.display()));
    let bytes = read_bounded(path, KNOWN_BYTES_MAX).map_err(|e| unread().because(&e))?;
    Known::parse(&String::from_utf8_lossy(&bytes)).map_err(|e| {
        unread().because(&e).help(
            "`countersign ledger verify --offline …` without it prints such lines; compare them with the operators",
        )
    })
}

fn read(dir: &Path, what: Exported) -> io::Result<Vec<u8>> {
    read_bounded(&dir.join(what.to_string()), what.bytes_max())
}

fn read_bounded(path: &Path, bytes_max: usize) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(bytes_max as u64 + 1).read_to_end(&mut bytes)?;
    if bytes.len() > bytes_max {
        return Err(io::Error::other(format!("it is longer than {bytes_max} bytes")));
    }
    Ok(bytes)
}

fn failed(dir: &Path, error: &AuditError<io::Error>) -> Failure {
    let help = match error {
        AuditError::Read { .. } => "the export is not whole; export it again, and compare who is asked to believe it",
        AuditError::Checkpoint(_) => "the keys are those that you were given by people, not by the export?",
        _ => "keep the export as it is: it is evidence; compare it with what others hold of this ledger",
    };
    Failure::new(format!("the export in `{}` does not hold", dir.display())).because(error).help(help)
}
