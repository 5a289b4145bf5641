//! `keyward migrate`, `keyward backup` and `keyward accept-lost-wal`: maintenance of the database, without a server.

use std::{path::PathBuf, process::ExitCode};

use clap::Args;

use crate::{
    clock::SystemClock,
    config::server::{DatabaseArgs, ServerSettings},
    domain::token::HexBytes,
    server::maintenance,
};

use super::{
    console::{Console, print_escaped},
    serve::to_exit_code,
    table::escape_terminal,
};

#[derive(Clone, Debug, Args)]
pub(super) struct MigrateArgs {
    /// List the steps without taking them
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    database: DatabaseArgs,
}

#[derive(Clone, Debug, Args)]
pub(super) struct BackupArgs {
    /// The new file, created with mode 0600
    #[arg(long, value_name = "FILE")]
    to: PathBuf,
    #[command(flatten)]
    database: DatabaseArgs,
}

#[derive(Clone, Debug, Args)]
pub(super) struct AcceptLostWalArgs {
    /// Do not ask for confirmation
    #[arg(long, short)]
    yes: bool,
    #[command(flatten)]
    database: DatabaseArgs,
}

fn block_on<T>(work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(work)
}

pub(super) fn migrate(args: &MigrateArgs) -> ExitCode {
    let migrate = || {
        let settings = ServerSettings::load_for_database(&args.database)?;
        maintenance::require_existing_database(&settings)?;
        let steps = block_on(maintenance::migrate(&settings, args.dry_run))?;
        let done = if args.dry_run { "would be taken" } else { "taken" };
        let lines = steps.iter().map(|step| format!("{:04} {}: {done}\n", step.version, step.name));
        print_escaped(
            if steps.is_empty() { "The schema is up to date.\n".to_owned() } else { lines.collect() }
                .as_str(),
        )?;
        Ok(())
    };
    to_exit_code(migrate())
}

pub(super) fn backup(args: &BackupArgs) -> ExitCode {
    let backup = || {
        let settings = ServerSettings::load_for_database(&args.database)?;
        let head = block_on(maintenance::backup(&settings, &args.to))?;
        let (revision, hash) = (head.revision, HexBytes(&head.hash));
        let to = escape_terminal(&args.to.display().to_string());
        print_escaped(&format!(
            "{to} holds everything up to {revision}:{hash}\n\
             To serve from this backup: keyward serve --require-revision {revision}\n"
        ))?;
        Ok(())
    };
    to_exit_code(backup())
}

pub(super) fn accept_lost_wal(args: &AcceptLostWalArgs) -> ExitCode {
    let accept = || {
        let settings = ServerSettings::load_for_database(&args.database)?;
        maintenance::require_existing_database(&settings)?;
        let question = format!(
            "Permanently give up the changes of {} that its lost -wal file held?",
            settings.database.redacted()
        );
        Console::with_stdio().confirm(&question, args.yes)?;
        let head = block_on(maintenance::accept_lost_wal(&settings, &SystemClock))?;
        let (revision, hash) = (head.revision, HexBytes(&head.hash));
        print_escaped(&format!(
            "The database holds everything up to {revision}:{hash} and starts again.\n\
             Later changes are lost: find them in the collected logs, and repeat the revocations.\n"
        ))?;
        Ok(())
    };
    to_exit_code(accept())
}
