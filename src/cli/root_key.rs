//! `keyward root-key reset`: replaces the root key, for example after it was lost. It opens the database itself.

use std::{
    io::{IsTerminal as _, Write as _},
    path::Path,
    process::ExitCode,
};

use anyhow::{Context as _, bail};

use crate::{
    clock::{SystemClock, SystemEntropy},
    config::server::{RootKeyArgs, ServerSettings},
    domain::{connection_url::SECRET_MASK, key::KeyOwner, lineage::LineageLinkKind, name::KeyId},
    server::{DescendantKey, RightsChange, RootKeyReset, maintenance, reset_root_key},
};

use super::{
    console::Console,
    error::CliError,
    replicas::format_instant,
    serve::{to_exit_code, write_root_key},
    table::{ListTable, plain_cell},
};

pub(super) fn run(args: RootKeyArgs) -> ExitCode {
    to_exit_code(reset(&args))
}

fn reset(args: &RootKeyArgs) -> anyhow::Result<()> {
    let mut settings = ServerSettings::load_for_database(&args.database)?;
    settings.root_key_file = token_destination(args)?.map(Path::to_owned);
    maintenance::require_existing_database(&settings)?;
    let more = if args.revoke_descendants { " and every key that descends from it" } else { "" };
    let question = format!("Permanently revoke the root key of {}{more}?", settings.database.redacted());
    Console::with_stdio().confirm(&question, args.yes)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let clock = std::sync::Arc::new(SystemClock);
    let reset = runtime.block_on(reset_root_key(&settings, args, clock, &SystemEntropy))?;
    let mut out = std::io::stdout().lock();
    // The token comes last, so that it is not scrolled away, and is written even if the report cannot be written.
    let reported = out.write_all(format_report(&reset, &format_database_flag(args, &settings)).as_bytes());
    match (&reset.token, &settings.root_key_file) {
        (Some(token), _) => write_root_key(&mut out, token).and_then(|()| out.flush()).context(
            "the old root key is revoked, but the token of the new one could not be written to standard output: repeat \
             the command",
        )?,
        (None, Some(path)) => {
            let done = format!("The new root key is in {}; the previous ones are revoked.\n", path.display());
            // The file exists even if this message cannot be written.
            let _ = out.write_all(done.as_bytes());
        }
        (None, None) => {}
    }
    match reported {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => return Err(error.into()),
        _ => {}
    }
    if let Some(unconfirmed) = reset.unconfirmed_reason {
        bail!(
            "the new root key works and the revocations are recorded, but a replica may still accept the old keys \
             ({unconfirmed}): see 'keyward replicas list'"
        );
    }
    Ok(())
}

/// Returns the file for the new token; `None` is stdout, if it is a terminal or was requested.
fn token_destination(args: &RootKeyArgs) -> Result<Option<&Path>, CliError> {
    match args.root_key_file.as_deref() {
        Some(file) if file == Path::new("-") => Ok(None),
        Some(file) => Ok(Some(file)),
        None if std::io::stdout().is_terminal() => Ok(None),
        None => Err(CliError::new(
            "standard output is not a terminal, so the new root key is not written to it",
        )
        .with_hint(
            "name a new file with --root-key-file FILE, or request standard output with --root-key-file -",
        )),
    }
}

/// Formats the flags that name the same database in the next command, without its password.
fn format_database_flag(args: &RootKeyArgs, settings: &ServerSettings) -> String {
    let quoted = |text: &str| format!("'{}'", text.replace('\'', "'\\''"));
    let given = args.database.database.as_ref();
    let database = match (given, &args.database.config) {
        (None, Some(config)) => format!("--config {}", quoted(&config.display().to_string())),
        // The password is shown as ***; the report asks the user to fill it in.
        _ => format!("--database {}", quoted(&given.unwrap_or(&settings.database).redacted())),
    };
    match &args.database.database_password_file {
        Some(file) => format!("{database} --database-password-file {}", quoted(&file.display().to_string())),
        None => database,
    }
}

/// Reports the descendants of the lost key, what was done with them, and what to check.
fn format_report(reset: &RootKeyReset, database: &str) -> String {
    let RootKeyReset { lost, descendants, rights_changes: changes, .. } = reset;
    let mut report = String::new();
    let count = match descendants.len() {
        1 => "1 key".to_owned(),
        count => format!("{count} keys"),
    };
    if !descendants.is_empty() {
        report += &(render_descendants(descendants) + "\n");
    }
    report += &match (reset.descendants_revoked, descendants.is_empty()) {
        (_, true) => format!("No active key descends from the root key {lost}.\n"),
        (true, false) => format!("Revoked: {count} that descended from the root key {lost}.\n"),
        (false, false) => format!(
            "Not revoked: {count} that descended from the root key {lost}. To revoke them too:\n  \
             keyward root-key reset --revoke-descendants --lost {lost} {database}\n{}",
            if database.contains(SECRET_MASK) { "Replace *** with the password.\n" } else { "" }
        ),
    };
    if descendants.is_empty() && !reset.earlier_root_keys.is_empty() {
        let earlier: Vec<_> = reset.earlier_root_keys.iter().map(KeyId::to_string).collect();
        report += &format!("Earlier root keys, for --lost: {}.\n", earlier.join(", "));
    }
    if !changes.is_empty() {
        report += &format!(
            "\nThe root key and its descendants also made these changes, which stay in force. Check each:\n{}",
            render_rights_changes(changes)
        );
    }
    report + "\n"
}

fn render_descendants(descendants: &[DescendantKey]) -> String {
    let mut table = ListTable::new(&["KEY", "OWNER", "ENVIRONMENT", "NAME", "CREATED", "BY"], false);
    for DescendantKey { owner, environment, name, created_at, link } in descendants {
        let owner = match owner {
            KeyOwner::Account(account) => format!("account {account}"),
            KeyOwner::User(user) => format!("user {user}"),
        };
        let by = match link.kind {
            LineageLinkKind::Created => link.parent.to_string(),
            LineageLinkKind::Rotated => {
                format!("{}, which rotated it on {}", link.parent, format_instant(link.at))
            }
        };
        let name = name.as_ref().map(ToString::to_string).unwrap_or_default();
        let (key, environment) = (link.child.to_string(), environment.to_string());
        table.add_row([key, owner, environment, name, format_instant(*created_at), by].map(plain_cell));
    }
    table.render("")
}

fn render_rights_changes(changes: &[RightsChange]) -> String {
    let mut table = ListTable::new(&["REVISION", "WHEN", "ACTION", "ACCOUNT", "ABOUT", "BY"], false);
    for RightsChange { entry, role } in changes {
        let key = entry.key_id.map(|key| format!("key {key}"));
        let user = entry.user.as_ref().map(|user| format!("user {user}"));
        let role = role.as_ref().map(|role| format!("role {role}"));
        let about: Vec<_> = [key, user, role].into_iter().flatten().collect();
        let account = entry.account.as_ref().map(ToString::to_string).unwrap_or_default();
        let (revision, action) = (entry.revision.to_string(), entry.action.clone());
        table.add_row(
            [revision, format_instant(entry.at), action, account, about.join(", "), entry.actor.clone()]
                .map(plain_cell),
        );
    }
    table.render("")
}
