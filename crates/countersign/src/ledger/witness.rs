//! `ledger witness`: a second machine that cosigns checkpoints, and which witnesses a control plane asks.

use std::{collections::BTreeSet, net::SocketAddr, path::PathBuf};

use clap::Args;
use serde::Serialize;

use countersign_control::{
    checkpoint::{WITNESSES_MAX, WitnessAddress, Witnesses},
    clock::Clock,
    witness::{self, WitnessConfig},
};
use countersign_core::ledger::VerifierKey;

use crate::{
    error::{Done, Failure},
    render::{self, Output},
    serve,
};

/// Which ledgers it watches, and where it keeps what it has seen.
#[derive(Debug, Args)]
pub struct WitnessServer {
    /// Where it keeps its key and what it cosigned; made when it is missing
    #[arg(value_name = "DIR")]
    pub memory: PathBuf,
    /// Where control planes find it
    #[arg(long, value_name = "IP:PORT", default_value = "127.0.0.1:7448")]
    pub listen: SocketAddr,
    /// The name of its key, when it has none yet [default: the name of this host]
    #[arg(long)]
    pub name: Option<String>,
    /// The key of a log that it watches, as `authority show` prints it; may be repeated
    #[arg(long, value_name = "VKEY", required = true)]
    pub log: Vec<VerifierKey>,
}

/// Who cosigns the ledger's checkpoints.
#[derive(Debug, Clone, Args)]
pub struct WitnessArguments {
    /// A witness that is asked to cosign each checkpoint, as `ledger witness` prints it; may be repeated
    #[arg(long, value_name = "URL=VKEY")]
    pub witness: Vec<WitnessAddress>,
    /// How many of them must have, for a checkpoint to be called witnessed [default: all]
    #[arg(long, value_name = "K", requires = "witness")]
    pub witness_quorum: Option<usize>,
}

#[derive(Debug, Serialize)]
struct Started {
    url: String,
    key: String,
}

impl WitnessArguments {
    /// Who is asked.
    pub fn witnesses(&self) -> Result<Witnesses, Failure> {
        let (asked, quorum) = (self.witness.clone(), self.witness_quorum.unwrap_or(self.witness.len()));
        if asked.len() > WITNESSES_MAX {
            return Err(Failure::usage(format!("at most {WITNESSES_MAX} witnesses can be asked, not {}", asked.len())));
        }
        if asked.iter().map(WitnessAddress::public).collect::<BTreeSet<_>>().len() < asked.len() {
            return Err(Failure::usage("two of the witnesses have the same key: they are one"));
        }
        if quorum > asked.len() {
            return Err(Failure::usage(format!("{quorum} witnesses shall cosign, and {} are named", asked.len())));
        }
        Ok(Witnesses { asked, quorum })
    }
}

/// Runs until it is told to stop.
pub async fn witness(arguments: WitnessServer, output: Output) -> Done {
    serve::shut_to_debuggers()?;
    let told = serve::until_told()?;
    let name = arguments.name.unwrap_or_else(|| serve::host_name().to_string());
    let (dir, listen) = (arguments.memory, arguments.listen);
    let shown = dir.display().to_string();
    let config = WitnessConfig { dir, listen, name, logs: arguments.log };
    let started = witness::start(config, Clock::system()).await;
    let failed = |e: witness::WitnessError| {
        Failure::new(format!("could not start a witness in `{shown}`")).because(&e).help(e.help())
    };
    let mut running = started.map_err(failed)?;
    let said = Started { url: format!("http://{}", running.listen), key: running.key.to_string() };
    render::answer(output, &said, |said, paint| {
        let ask = "a control plane asks it with";
        format!(
            "{} {}\n{}\n  --witness '{}={}'\n",
            paint.good("witness:"),
            said.url,
            paint.dim(ask),
            said.url,
            said.key
        )
    })?;
    tokio::select! {
        () = told.cancelled() => Ok(()),
        () = running.wait_failed() => Err(Failure::new("the witness failed")),
    }
}
