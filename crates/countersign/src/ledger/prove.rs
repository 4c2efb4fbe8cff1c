//! `ledger checkpoint` and `ledger prove`: what others need to hold this ledger to. A proof is verified here before it is printed.

use clap::Args;

use countersign_api::local::{AuthorityView, CheckpointView, ProofView};
use countersign_core::ledger::{AddCheckpoint, EntryProof, Trust, VerifierKey};

use crate::{
    client::Client,
    error::{Done, Failure},
    mesh_finder::Place,
    render::{self, Output},
};

/// What is to be proven.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub struct ProveArguments {
    /// The index of an entry, from 0: the revision that it made, less one. Prints a C2SP tlog-proof that it stands in the newest
    /// checkpoint
    #[arg(value_name = "N")]
    pub index: Option<u64>,
    /// The size of an older checkpoint. Prints the proof that the newest one continues it, as a C2SP add-checkpoint request
    #[arg(long, value_name = "M")]
    pub from: Option<u64>,
}

/// Prints the newest checkpoint as it is: a file that others verify.
pub async fn checkpoint(place: &Place, output: Output) -> Done {
    let view: CheckpointView = Client::control(place).get("/v1/ledger/checkpoint").await?;
    let cosigned = view.witnesses.iter().filter(|witness| witness.cosigned).count();
    if cosigned < view.quorum && output == Output::Text {
        render::print_error(&format!("warning: {cosigned} of {} witnesses have cosigned it\n", view.quorum));
        for witness in view.witnesses.iter().filter(|witness| !witness.cosigned) {
            let why = witness.error.as_deref().unwrap_or("it has not answered yet");
            render::print_error(&format!("  {} at {}: {}\n", witness.name, witness.url, render::tame(why)));
        }
    }
    render::answer(output, &view, |view, _| view.note.clone())
}

/// Prints a proof.
pub async fn prove(place: &Place, arguments: ProveArguments, output: Output) -> Done {
    let control = Client::control(place);
    let proof: ProofView = match (arguments.index, arguments.from) {
        (Some(index), _) => control.get(&format!("/v1/ledger/proofs/{index}")).await?,
        (None, from) => control.get(&format!("/v1/ledger/consistency/{}", from.unwrap_or_default())).await?,
    };
    let authority: AuthorityView = control.get("/v1/authority").await?;
    let wrong = || Failure::new("the control plane gave a proof that proves nothing");
    let key = VerifierKey::parse(&authority.log_key).map_err(|e| wrong().because(&e))?;
    match &proof.entry {
        Some(entry) => {
            let parsed = EntryProof::parse(proof.proof.as_bytes()).map_err(|e| wrong().because(&e))?;
            parsed.verify(entry.as_bytes(), &Trust::log(key)).map_err(|e| wrong().because(&e))?;
        }
        None => {
            let parsed = AddCheckpoint::parse(proof.proof.as_bytes()).map_err(|e| wrong().because(&e))?;
            Trust::log(key).verify(&parsed.checkpoint).map_err(|e| wrong().because(&e))?;
        }
    }
    render::answer(output, &proof, |proof, _| proof.proof.clone())
}
