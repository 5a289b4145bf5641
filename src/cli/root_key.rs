//! `keyward root-key reset`: the way back when the root key is lost. It needs the database at hand.

use std::{io::Write as _, process::ExitCode};

use anyhow::bail;

use crate::{
    clock::{SystemClock, SystemEntropy},
    config::server::{RootKeyArgs, Settings},
    domain::{key::Owner, lineage::LinkKind, name::KeyId},
    server::{Descendant, Reset, RightsChange, reset_root_key},
};

use super::{
    replicas::instant,
    serve::{exit, write_root_key},
    table::{Rows, text},
};

/// Runs the command.
pub fn run(args: RootKeyArgs) -> ExitCode {
    exit(reset(&args))
}

fn reset(args: &RootKeyArgs) -> anyhow::Result<()> {
    let mut settings = Settings::load_database(&args.database)?;
    settings.root_key_file.clone_from(&args.root_key_file);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let clock = std::sync::Arc::new(SystemClock);
    let reset = runtime.block_on(reset_root_key(&settings, args, clock, &SystemEntropy))?;
    let mut out = std::io::stdout().lock();
    // The token comes last, where it is not scrolled away, and comes also when the rest cannot be written.
    let reported = out.write_all(report(&reset).as_bytes());
    match (&reset.token, &settings.root_key_file) {
        (Some(token), _) => write_root_key(&mut out, token)?,
        (None, Some(path)) => {
            writeln!(out, "The new root key is in {}; the ones before it are revoked.", path.display())?;
        }
        (None, None) => {}
    }
    reported?;
    if let Some(unconfirmed) = reset.unconfirmed {
        bail!(
            "the new root key works and the revocations are recorded, but a replica may not refuse the old keys yet \
             ({unconfirmed}): see 'keyward replicas list'"
        );
    }
    Ok(())
}

/// What descends from the lost key, and what to do about it.
fn report(reset: &Reset) -> String {
    let Reset { lost, descendants, changes, .. } = reset;
    let mut report = String::new();
    let count = match descendants.len() {
        1 => "1 key".to_owned(),
        count => format!("{count} keys"),
    };
    if !descendants.is_empty() {
        report += &(keys(descendants) + "\n");
    }
    report += &match (reset.revoked, descendants.is_empty()) {
        (_, true) => format!("No living key descends from the root key {lost}.\n"),
        (true, false) => format!("Revoked: {count} that descended from the root key {lost}.\n"),
        (false, false) => format!(
            "Not revoked: {count} that descended from the root key {lost}. To revoke them too:\n  \
             keyward root-key reset --revoke-descendants --lost {lost}\n"
        ),
    };
    if descendants.is_empty() && !reset.earlier.is_empty() {
        let earlier: Vec<_> = reset.earlier.iter().map(KeyId::to_string).collect();
        report += &format!("Earlier root keys, for --lost: {}.\n", earlier.join(", "));
    }
    if !changes.is_empty() {
        report += &format!(
            "\nThe root key and its descendants also made these changes, which stay. Check each:\n{}",
            rights(changes)
        );
    }
    report + "\n"
}

fn keys(descendants: &[Descendant]) -> String {
    let mut table = Rows::new(&["KEY", "OWNER", "ENVIRONMENT", "NAME", "CREATED", "BY"], false);
    for Descendant { owner, environment, name, created_at, link } in descendants {
        let owner = match owner {
            Owner::Account(account) => format!("account {account}"),
            Owner::User(user) => format!("user {user}"),
        };
        let by = match link.kind {
            LinkKind::Created => link.by.to_string(),
            LinkKind::Rotated => format!("{}, which rotated it on {}", link.by, instant(link.at)),
        };
        let name = name.as_ref().map(ToString::to_string).unwrap_or_default();
        let (key, environment) = (link.child.to_string(), environment.to_string());
        table.row([key, owner, environment, name, instant(*created_at), by].map(text));
    }
    table.show("")
}

fn rights(changes: &[RightsChange]) -> String {
    let mut table = Rows::new(&["REVISION", "WHEN", "ACTION", "ACCOUNT", "ABOUT", "BY"], false);
    for RightsChange { entry, role } in changes {
        let key = entry.key_id.map(|key| format!("key {key}"));
        let user = entry.user.as_ref().map(|user| format!("user {user}"));
        let role = role.as_ref().map(|role| format!("role {role}"));
        let about: Vec<_> = [key, user, role].into_iter().flatten().collect();
        let account = entry.account.as_ref().map(ToString::to_string).unwrap_or_default();
        let (revision, action) = (entry.revision.to_string(), entry.action.clone());
        table.row(
            [revision, instant(entry.at), action, account, about.join(", "), entry.actor.clone()].map(text),
        );
    }
    table.show("")
}
