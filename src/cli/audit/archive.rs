//! `keyward audit archive`: the oldest entries leave the log for a file. Like `root-key` and `replicas`, it needs the
//! database at hand: no server's role may take anything out of the log.

use std::{io::Write as _, path::PathBuf, process::ExitCode};

use clap::Args;

use crate::{
    cli::{serve::exit, values::Past},
    clock::SystemClock,
    config::server::{DatabaseArgs, Settings},
    domain::time::Timestamp,
    server::upkeep,
};

/// Flags of `keyward audit archive`.
#[derive(Debug, Args)]
pub(in crate::cli) struct ArchiveArgs {
    /// Archive what was done before then: an instant (RFC 3339), or a duration ago (365d)
    #[arg(long, value_name = "WHEN", value_parser = Past::parse)]
    before: Past,
    /// The new file (mode 0600); 'keyward audit verify --file' verifies it
    #[arg(long, value_name = "FILE")]
    to: PathBuf,
    #[command(flatten)]
    database: DatabaseArgs,
}

/// Runs the command.
pub(in crate::cli) fn run(args: &ArchiveArgs) -> ExitCode {
    exit(archive(args))
}

fn archive(args: &ArchiveArgs) -> anyhow::Result<()> {
    let settings = Settings::load_database(&args.database)?;
    let before = args.before.resolve(&SystemClock);
    let before = Timestamp::from_micros(before.seconds * 1_000_000 + i64::from(before.nanos / 1000));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let archived = runtime.block_on(upkeep::archive(&settings, before, &args.to, &SystemClock))?;
    let mut out = std::io::stdout().lock();
    match archived {
        None => {
            writeln!(out, "There is nothing to archive: no entry is as old, or a replica still needs it.")?
        }
        Some(archived) => {
            let (first, last) = (archived.first, archived.last);
            writeln!(out, "{} entries, {first} to {last}, are in {}.", archived.entries, args.to.display())?;
            if archived.held_back {
                writeln!(
                    out,
                    "Later ones that are as old stay: they are the newest, or a replica still needs them."
                )?;
            }
        }
    }
    Ok(())
}
