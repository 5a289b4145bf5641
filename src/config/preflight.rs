//! Checks what a server needs to start besides valid values: readable files, existing folders, and addresses that
//! resolve. No socket and no database is opened.

use std::path::Path;

use crate::{
    decision_log::DecisionLogTarget,
    domain::{connection_url::ConnectionUrl, credential_mask::mask_value},
    store,
};

use super::{
    error::{invalid_redacted_setting, invalid_setting},
    listener_preflight::{check_tcp_address, directory_problem, file_problem},
    problems::ProblemCollector,
    rules::{self, RulesFileError},
    server::settings::ServerSettings,
};

/// Checks everything but the `[[listener]]` tables.
pub(super) fn check_settings(settings: &ServerSettings, problems: &mut ProblemCollector<'_>) {
    if settings.has_main_listener {
        check_tcp_address("listen", &settings.listen, settings.insecure, problems);
    }
    check_tcp_address("admin_listen", &settings.admin_listen, true, problems);
    for (setting, address) in
        [("envoy_listen", &settings.envoy_listen), ("forward_auth_listen", &settings.forward_auth_listen)]
    {
        if let Some(address) = address {
            check_tcp_address(setting, address, settings.insecure, problems);
        }
    }
    check_root_key_file(settings, problems);
    check_sqlite_file(settings, problems);
    check_database_tls_files(settings, problems);
    check_decision_log_file(settings, problems);
    check_rules_file(settings, problems);
}

/// Rejects a root key file that a first start cannot create; later starts create none. Before the database is opened, only a
/// missing SQLite file shows that this is a first start.
fn check_root_key_file(settings: &ServerSettings, problems: &mut ProblemCollector<'_>) {
    let Some(path) = settings.root_key_file.as_deref() else { return };
    let shown = path.display().to_string();
    if path == Path::new("-") {
        let problem = "is standard output, which a log may keep: name a new file";
        problems.add(invalid_setting("root_key_file", &shown, problem));
        return;
    }
    if store::sqlite_file(&settings.database).is_none_or(|database| database.exists()) {
        return;
    }
    let problem = if path.symlink_metadata().is_ok() {
        Some("it exists already and is not overwritten; move it away, or name a new file".to_owned())
    } else {
        directory_problem(path)
    };
    if let Some(problem) = problem {
        problems.add(invalid_setting("root_key_file", &shown, format!("cannot be created: {problem}")));
    }
}

/// Rejects an SQLite file that can be neither opened nor created.
fn check_sqlite_file(settings: &ServerSettings, problems: &mut ProblemCollector<'_>) {
    let Some(path) = store::sqlite_file(&settings.database) else { return };
    if let Some(problem) = file_problem(&path) {
        let shown = settings.database.redacted();
        problems.add(invalid_setting("database", &shown, format!("cannot be opened: {problem}")));
    }
}

/// Rejects a file of the decision log that cannot be written.
fn check_decision_log_file(settings: &ServerSettings, problems: &mut ProblemCollector<'_>) {
    let Some(DecisionLogTarget::File(path)) =
        settings.telemetry.decision_log.as_ref().map(|decisions| &decisions.target)
    else {
        return;
    };
    let problem = if path.is_symlink() {
        Some("it is a symbolic link; name the file that it leads to".to_owned())
    } else {
        file_problem(path)
    };
    if let Some(problem) = problem {
        let shown = path.display().to_string();
        problems.add(invalid_setting("decision_log.file", &shown, format!("cannot be written: {problem}")));
    }
}

/// Checks the TLS files that a PostgreSQL URL names.
fn check_database_tls_files(settings: &ServerSettings, problems: &mut ProblemCollector<'_>) {
    let Ok(parts) = ConnectionUrl::parse(&settings.database) else { return };
    for (name, value) in
        parts.options().filter(|(name, _)| ["sslrootcert", "sslcert", "sslkey"].contains(name))
    {
        let path = percent_encoding::percent_decode_str(value).decode_utf8_lossy();
        if let Err(error) = std::fs::File::open(&*path) {
            let value = mask_value(value);
            problems.add(invalid_redacted_setting(
                "database",
                format!("has {name}={value:?}, which cannot be read: {error}"),
            ));
        }
    }
}

fn check_rules_file(settings: &ServerSettings, problems: &mut ProblemCollector<'_>) {
    let Some(path) = settings.rules_file.as_deref().filter(|_| problems.is_valid("environments")) else {
        return;
    };
    match rules::load_rules(path, &settings.key_settings.environments) {
        Ok(_) => {}
        Err(RulesFileError::Unreadable { path, source }) => {
            problems.add(invalid_setting("rules", &path, format!("cannot be read: {source}")));
        }
        Err(RulesFileError::Invalid { path, problems: found }) => {
            let texts = found.iter().map(|problem| format!("rules = {path:?} is wrong: {problem}"));
            problems.add_all("rules", texts);
        }
    }
}
