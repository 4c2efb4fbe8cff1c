//! `ledger verify`: reads the whole ledger, computes every state and the Merkle root again here, and compares them with
//! what the control plane says it holds. Trusts nothing but the law.
//!
//! | furniture | does |
//! |---|---|
//! | `prove` | prints checkpoints and proofs |
//! | `export` | writes the ledger as files |
//! | `offline` | verifies such files with public keys alone |
//! | `witness` | serves a witness; names those that a control plane asks |

use serde::Serialize;

use countersign_api::local::{LedgerLine, Mesh, Status};
use countersign_core::{
    canonical::Digest,
    change::Revision,
    gate::act::Act,
    ledger::{Batch, Follower},
};

use crate::{
    cli,
    client::Client,
    error::{Done, Failure},
    mesh_finder::Place,
    operator::Asker,
    render::{self, Output},
};

mod export;
mod offline;
mod prove;
mod witness;

pub use export::export;
pub use offline::VerifyArguments;
pub use prove::{ProveArguments, checkpoint, prove};
pub use witness::{WitnessArguments, WitnessServer, witness};

/// The mesh may change while it is read; then it is read again, so often.
const ATTEMPTS_MAX: usize = 5;

/// A ledger that holds.
#[derive(Debug, Serialize)]
struct Verified {
    revision: Revision,
    root: Digest,
    /// The digest of the state that all entries add up to.
    state: Digest,
    policies: usize,
    services: usize,
}

/// Verifies an export, or the ledger of the mesh that `place` finds.
pub fn verify(arguments: &VerifyArguments, place: impl FnOnce() -> Result<Place, Failure>, output: Output) -> Done {
    match &arguments.offline {
        Some(dir) => offline::verify(dir, arguments, output),
        None => cli::ask(verify_here(&place()?, arguments.otp.clone(), output)),
    }
}

async fn verify_here(place: &Place, otp: Option<String>, output: Output) -> Done {
    let control = match otp {
        None => Client::control(place),
        Some(_) => Asker { operator: None, otp }.opens(Client::control(place), Act::ExportLedger).await?,
    };
    for _ in 0..ATTEMPTS_MAX {
        let before: Mesh = control.get("/v1/mesh").await?;
        let lines = lines(&control).await?;
        let after: Status = control.get("/v1/status").await?;
        if lines.len() as u64 == before.revision.0 && after.revision == before.revision {
            let verified = follow(&lines, &before, after.root)?;
            return render::answer(output, &verified, |verified, paint| {
                format!(
                    "{} {} entries follow from each other and add up to the mesh in force\n{} {}\n{} {}\n",
                    paint.good("verified:"),
                    verified.revision,
                    paint.dim("root "),
                    verified.root,
                    paint.dim("state"),
                    verified.state,
                )
            });
        }
    }
    Err(Failure::new("the mesh changed each time the ledger was read")
        .help("run it again when nothing is being applied"))
}

async fn lines(control: &Client) -> Result<Vec<LedgerLine>, Failure> {
    let mut lines = control.lines("/v1/ledger").await?;
    let mut all = Vec::new();
    while let Some(line) = lines.next().await? {
        all.push(line);
    }
    Ok(all)
}

fn follow(lines: &[LedgerLine], mesh: &Mesh, root: Digest) -> Result<Verified, Failure> {
    let help =
        "stop the mesh and keep its data directory as it is; compare it with a backup or with what an agent holds";
    let broken = || Failure::new("the ledger does not hold").help(help);
    let entries: Vec<&str> = lines.iter().map(|line| line.entry.as_str()).collect();
    let change_sets: Vec<&str> = lines.iter().map(|line| line.change_set.as_str()).collect();
    let claimed = lines.last().map_or(Some(root), |line| line.root);
    if claimed != Some(root) {
        return Err(broken().cause("the control plane claims one root with its entries and another in its status"));
    }
    let mut follower = Follower::default();
    let batch = Batch {
        first_index: 0,
        entries: &entries,
        change_sets: &change_sets,
        bodies: &mesh.bodies,
        size: entries.len() as u64,
        root,
    };
    follower.extend(&batch).map_err(|e| broken().because(&e))?;
    if *follower.state() != mesh.state {
        return Err(broken().cause(format!(
            "the entries add up to the state {}, the control plane enforces {}",
            follower.state().digest().short(),
            mesh.state.digest().short()
        )));
    }
    Ok(Verified {
        revision: follower.revision(),
        root: follower.root(),
        state: follower.state().digest(),
        policies: mesh.state.policies.len(),
        services: mesh.state.services.len(),
    })
}

#[cfg(test)]
mod tests {
    use countersign_core::change::{Bodies, Change, ChangeSet};

    use super::*;

    fn ledger() -> (Vec<LedgerLine>, Mesh, Digest) {
        let create = Change::CreateMesh { trust_domain: "shop.example".parse().unwrap() };
        let role = Change::SetRole { name: "staff".into(), members: ["web".to_owned().try_into().unwrap()].into() };
        let mut follower = Follower::default();
        let mut lines = Vec::new();
        for change in [create, role] {
            let set = ChangeSet { base: follower.revision(), changes: vec![change] };
            let draft = follower.draft(1, "local", &set, &Bodies::default()).unwrap();
            let text = |bytes| String::from_utf8(bytes).unwrap();
            lines.push(LedgerLine { entry: text(draft.bytes), change_set: text(draft.change_set), root: None });
            follower = draft.next;
        }
        lines.last_mut().unwrap().root = Some(follower.root());
        let mesh = Mesh { revision: follower.revision(), state: follower.state().clone(), bodies: Bodies::default() };
        (lines, mesh, follower.root())
    }

    #[test]
    fn an_edited_ledger_is_refused_and_an_honest_one_holds() {
        let (honest, mesh, root) = ledger();
        assert_eq!(follow(&honest, &mesh, root).unwrap().revision, Revision(2));

        let mut edited = honest.clone();
        edited[1].entry = edited[1].entry.replace("\"local\"", "\"loca1\"");
        let mut cut = honest.clone();
        cut.remove(0);
        let mut other_change = honest.clone();
        other_change[1].change_set = other_change[1].change_set.replace("web", "wes");
        let mut other_root = honest.clone();
        other_root[1].root = Some(Digest::default());
        for (name, lines) in
            [("edited", edited), ("cut", cut), ("other change", other_change), ("other root", other_root)]
        {
            assert!(follow(&lines, &mesh, root).is_err(), "{name}");
        }
        let mut other_state = mesh.clone();
        other_state.state.roles.clear();
        assert!(follow(&honest, &other_state, root).is_err(), "a control plane that enforces another state");
    }

    #[test]
    fn an_empty_ledger_holds() {
        let mesh = Mesh { revision: Revision(0), state: Default::default(), bodies: Bodies::default() };
        assert_eq!(follow(&[], &mesh, Follower::default().root()).unwrap().revision, Revision(0));
    }
}
