//! `keyward root-key reset`: the way back when the root key is lost. It needs the database at hand.

use std::process::ExitCode;

use crate::{
    clock::{SystemClock, SystemEntropy},
    config::server::{RootKeyArgs, Settings},
    server::reset_root_key,
};

use super::serve::{exit, write_root_key};

/// Runs the command.
pub fn run(args: RootKeyArgs) -> ExitCode {
    exit(reset(args))
}

fn reset(args: RootKeyArgs) -> anyhow::Result<()> {
    let mut settings = Settings::load_database(&args.database)?;
    settings.root_key_file = args.root_key_file;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let token =
        runtime.block_on(reset_root_key(&settings, std::sync::Arc::new(SystemClock), &SystemEntropy))?;
    let mut out = std::io::stdout().lock();
    match (token, &settings.root_key_file) {
        (Some(token), _) => write_root_key(&mut out, &token)?,
        (None, Some(path)) => writeln_path(&mut out, path)?,
        (None, None) => {}
    }
    Ok(())
}

fn writeln_path(out: &mut impl std::io::Write, path: &std::path::Path) -> std::io::Result<()> {
    writeln!(out, "the new root key is in {}; the ones before it are revoked", path.display())
}
