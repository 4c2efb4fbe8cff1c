//! `recover`: an owner is appointed past the gate, by whoever has the stopped control plane's files and what opens them. Loud, and
//! in the ledger for good.

use std::io::{self, BufRead};

use clap::Args;
use serde_json::json;

use countersign_control::{
    clock::Clock,
    recover::{self, RecoverConfig, RecoverError, Recovered},
};
use countersign_core::identity::OperatorName;

use crate::{
    control::{self, AuditArguments},
    error::{Done, Failure},
    mesh_finder::Place,
    qr,
    render::{self, Output, Paint},
    sealing_key::SealingKeyArguments,
    serve,
};

/// Codes that are read until it is given up.
const CODES_MAX: usize = 5;

/// Whom, and why.
#[derive(Debug, Args)]
pub struct Recover {
    /// Who becomes owner: an operator who lost their factors, or somebody new
    #[arg(long, value_name = "NAME")]
    pub operator: OperatorName,
    /// What happened, for the ledger; everyone can read it
    #[arg(long, value_name = "TEXT")]
    pub reason: String,
    /// The PostgreSQL database of several control planes: `postgres://USER@HOST/DATABASE` [default: the file in the data directory]
    #[arg(long, value_name = "URL", env = "COUNTERSIGN_STORE", hide_env_values = true)]
    pub store: Option<String>,
    /// What seals the mesh's keys
    #[command(flatten)]
    pub key: SealingKeyArguments,
    /// Where the control plane writes what operators do: the recovery is written there too
    #[command(flatten)]
    pub audit: AuditArguments,
}

/// Recovers the mesh at `place`, which does not run.
pub async fn recover(arguments: Recover, place: &Place, output: Output) -> Done {
    serve::shut_to_debuggers()?;
    let failed = |error: RecoverError| {
        Failure::new(format!("could not recover the mesh in `{}`", place.data_dir.display()))
            .because(&error)
            .help(error.help())
    };
    let config = RecoverConfig {
        data_dir: place.data_dir.clone(),
        store: control::store(arguments.store.as_deref())?,
        key: arguments.key.place()?,
        operator: arguments.operator.clone(),
        reason: arguments.reason,
        audit: arguments.audit.file(place),
    };
    let begun = recover::begin(config, Clock::system()).await.map_err(failed)?;
    let paint = Paint::stderr();
    render::print_error(&format!(
        "{} this goes past the change gate. `{}` becomes owner with one new factor and loses every other one; the ledger, and for a week \
         every command, will say so\n",
        paint.warn("warning:"),
        arguments.operator
    ));
    match output {
        Output::Json => {
            render::print(&render::json_line(&json!({ "operator": arguments.operator, "otpauth": begun.otpauth() })))
        }
        Output::Text => render::print(&format!(
            "add this to the authenticator app of {}; it is a secret and is not shown again\n\n{}\n{}\n\nthe code that the app shows now: ",
            arguments.operator,
            qr::for_terminal(begun.otpauth()),
            begun.otpauth()
        )),
    }
    let mut last = Failure::new("no code came on standard input").help("run it again, and type the code of the app");
    for line in io::stdin().lock().lines().take(CODES_MAX) {
        let line = line.map_err(|e| Failure::new("could not read the code").because(&e))?;
        match begun.confirm(line.trim()).await {
            Ok(recovered) => return render::answer(output, &recovered, said),
            Err(error @ RecoverError::Code) => {
                last = failed(error);
                if output == Output::Text {
                    render::print("the code is wrong, or of another time; again: ");
                }
            }
            Err(error) => return Err(failed(error)),
        }
    }
    Err(last)
}

fn said(recovered: &Recovered, paint: Paint) -> String {
    let sealed = match recovered.sealed {
        true => format!(
            "{} the mesh was sealed: its agents do not follow this entry and hold what they have; each has to join again, with a new \
             token (docs/decisions/recovery.md)\n",
            paint.warn("warning:")
        ),
        false => String::new(),
    };
    let gate = match recovered.own_gate_stays {
        true => String::new(),
        false => format!(
            "{} the mesh's own change gate would have let nobody mend it and is removed: the shipped one is in force\n",
            paint.warn("warning:")
        ),
    };
    format!(
        "{} {} is owner since revision {}, with the new app alone; {} older factors were removed\n{sealed}{gate}start the mesh, look at \
         `countersign change list` and `operator list`, and add a second factor: `countersign factor add --totp --otp CODE`\n",
        paint.good("recovered:"),
        recovered.operator,
        recovered.revision,
        recovered.removed.len(),
    )
}
