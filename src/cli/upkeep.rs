//! `keyward migrate`, `keyward backup` and `keyward accept-lost-wal`: with the database at hand, like `root-key` and `replicas`.

use std::{path::PathBuf, process::ExitCode};

use clap::Args;

use crate::{
    clock::SystemClock,
    config::server::{DatabaseArgs, Settings},
    domain::token::Hex,
    server::upkeep,
};

use super::{
    console::{Console, say},
    serve::exit,
    table::clean,
};

/// `keyward migrate`.
#[derive(Clone, Debug, Args)]
pub(super) struct MigrateArgs {
    /// Say what would be done, and do nothing
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    database: DatabaseArgs,
}

/// `keyward backup`.
#[derive(Clone, Debug, Args)]
pub(super) struct BackupArgs {
    /// The new file (mode 0600)
    #[arg(long, value_name = "FILE")]
    to: PathBuf,
    #[command(flatten)]
    database: DatabaseArgs,
}

/// `keyward accept-lost-wal`.
#[derive(Clone, Debug, Args)]
pub(super) struct AcceptLostWalArgs {
    /// Do not ask first
    #[arg(long, short)]
    yes: bool,
    #[command(flatten)]
    database: DatabaseArgs,
}

fn on_runtime<T>(work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(work)
}

/// Runs `keyward migrate`.
pub(super) fn migrate(args: &MigrateArgs) -> ExitCode {
    let migrate = || {
        let settings = Settings::load_database(&args.database)?;
        upkeep::require_database(&settings)?;
        let steps = on_runtime(upkeep::migrate(&settings, args.dry_run))?;
        let done = if args.dry_run { "would be taken" } else { "taken" };
        let lines = steps.iter().map(|step| format!("{:04} {}: {done}\n", step.version, step.name));
        say(if steps.is_empty() { "The schema is up to date.\n".to_owned() } else { lines.collect() }
            .as_str())?;
        Ok(())
    };
    exit(migrate())
}

/// Runs `keyward backup`.
pub(super) fn backup(args: &BackupArgs) -> ExitCode {
    let backup = || {
        let settings = Settings::load_database(&args.database)?;
        let head = on_runtime(upkeep::backup(&settings, &args.to))?;
        let (revision, hash) = (head.revision, Hex(&head.hash));
        let to = clean(&args.to.display().to_string());
        say(&format!(
            "{to} holds everything up to {revision}:{hash}\n\
             Should it be restored: keyward serve --require-revision {revision}\n"
        ))?;
        Ok(())
    };
    exit(backup())
}

/// Runs `keyward accept-lost-wal`.
pub(super) fn accept_lost_wal(args: &AcceptLostWalArgs) -> ExitCode {
    let accept = || {
        let settings = Settings::load_database(&args.database)?;
        upkeep::require_database(&settings)?;
        let question = format!(
            "Give up for ever the changes of {} that its lost -wal file held?",
            settings.database.shown()
        );
        Console::system().confirm(&question, args.yes)?;
        let head = on_runtime(upkeep::accept_lost_wal(&settings, &SystemClock))?;
        let (revision, hash) = (head.revision, Hex(&head.hash));
        say(&format!(
            "The database holds everything up to {revision}:{hash} and starts again.\n\
             What was changed after that is lost: look at the collected logs for it, and revoke again what was revoked.\n"
        ))?;
        Ok(())
    };
    exit(accept())
}
