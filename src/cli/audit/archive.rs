//! `keyward audit archive`: moves the oldest entries of the audit log to a file.
//!
//! It opens the database itself, like `root-key` and `replicas`: a server's database role cannot delete log entries.

use std::{path::PathBuf, process::ExitCode};

use clap::Args;

use crate::{
    cli::{
        console::{Console, print_escaped},
        serve::to_exit_code,
        table::escape_terminal,
        value_format::{PastInstantArg, format_rfc3339},
    },
    clock::SystemClock,
    config::server::{DatabaseArgs, ServerSettings},
    domain::time::Timestamp,
    server::maintenance,
};

#[derive(Debug, Args)]
pub(in crate::cli) struct AuditArchiveArgs {
    /// Archive the entries before then: an instant (RFC 3339), or a duration ago (365d)
    #[arg(long, value_name = "WHEN", value_parser = PastInstantArg::parse)]
    before: PastInstantArg,
    /// The new file (mode 0600); 'keyward audit verify --file' verifies it
    #[arg(long, value_name = "FILE")]
    to: PathBuf,
    /// Do not ask for confirmation
    #[arg(long, short)]
    yes: bool,
    #[command(flatten)]
    database: DatabaseArgs,
}

pub(in crate::cli) fn run(args: &AuditArchiveArgs) -> ExitCode {
    to_exit_code(archive_log(args))
}

fn archive_log(args: &AuditArchiveArgs) -> anyhow::Result<()> {
    let settings = ServerSettings::load_for_database(&args.database)?;
    let before = args.before.resolve(&SystemClock);
    maintenance::require_existing_database(&settings)?;
    let question = format!(
        "Permanently move every entry before {} from the audit log of {} to {}?",
        format_rfc3339(&before),
        settings.database.redacted(),
        args.to.display()
    );
    if args.to.symlink_metadata().is_ok() {
        let exists =
            format!("{} exists already: name a new file, because nothing is overwritten", args.to.display());
        return Err(anyhow::anyhow!(exists));
    }
    Console::with_stdio().confirm(&question, args.yes)?;
    let before = Timestamp::from_micros(before.seconds * 1_000_000 + i64::from(before.nanos / 1000));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let archived = runtime.block_on(maintenance::archive_log(&settings, before, &args.to, &SystemClock))?;
    print_escaped(&match archived {
        None => "Nothing to archive: no entry is old enough, or a replica still needs it.\n".to_owned(),
        Some(archived) => {
            let (entries, first, last) = (archived.entries, archived.first, archived.last);
            let to = escape_terminal(&args.to.display().to_string());
            let done = format!("Moved {entries} entries, {first} to {last}, to {to}.\n");
            let rest = "Some later entries that are old enough stay: they are the newest, or a replica still needs them.\n";
            done + if archived.is_held_back { rest } else { "" }
        }
    })?;
    Ok(())
}
