//! `store`: where the control plane keeps everything.

use std::path::PathBuf;

use clap::Subcommand;

use countersign_control::store::{
    migrate::{Migrated, migrate},
    postgres::{PostgresStore, PostgresUrl},
};

use crate::{
    error::{Done, Failure},
    render,
};

/// What to do with it.
#[derive(Debug, Subcommand)]
pub enum StoreCommand {
    /// Copy a stopped control plane's file into an empty database, whole or not at all
    Migrate {
        /// The file `control.db` of a data directory
        #[arg(long, value_name = "FILE")]
        from: PathBuf,
        /// The PostgreSQL database: postgres://USER@HOST/DATABASE
        #[arg(long, value_name = "URL", env = "COUNTERSIGN_STORE", hide_env_values = true)]
        to: String,
    },
}

/// Runs one.
pub async fn store(command: StoreCommand) -> Done {
    let StoreCommand::Migrate { from, to } = command;
    let to = PostgresUrl::parse(&to).map_err(|e| Failure::usage("could not use --to").because(&e))?;
    let dir = from.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(std::path::Path::new("."));
    // Nobody writes to the file meanwhile.
    let _held = countersign_control::lock(dir)
        .map_err(|e| Failure::new("the control plane of that file must be stopped").because(&e))?;
    let file = from.clone();
    let migrated = tokio::task::spawn_blocking(move || migrate(&file, &mut PostgresStore::open(to)?)).await;
    let migrated = migrated.map_err(|e| Failure::new("the migration ended").because(&e))?;
    let Migrated { entries, root, rows } = migrated.map_err(|e| {
        Failure::new(format!("could not migrate `{}`; nothing was kept", from.display())).because(&e).help(e.help())
    })?;
    render::print_error(&format!(
        "{entries} ledger entries are copied, and add up to the same root {root}; {rows} rows in all\n\
         start `countersign control --store URL` with the same key; do not start on `{}` again\n",
        from.display()
    ));
    Ok(())
}
