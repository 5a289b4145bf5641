//! What a server that starts here needs beside right values: files that can be read and fit together, folders that exist,
//! and addresses that can be looked up and that plaintext may be served on. No socket and no database is opened.

use std::{io, os::unix::fs::FileTypeExt as _, path::Path};

use crate::{
    decision_log::DecisionLogTarget,
    domain::{connection_url::ConnectionUrl, credential_mask::mask_value},
    private_file, store,
    transport::{
        ListenAddress, ListenerSettings,
        socket::{BindError, find_exposed_address},
        tls::{self, TlsFiles},
    },
};

use super::{
    problems::ProblemCollector,
    rules::{self, RulesFileError},
    server::{ServerSettings, invalid_redacted_setting, invalid_setting},
};

/// The most bytes of a socket file's path (`sun_path` of unix(7), without its final NUL).
const MAX_SOCKET_PATH_LEN: usize = 107;

/// Examines what is not a listener of the file.
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

/// Examines a listener of the file.
pub(super) fn check_listener(
    listener: &ListenerSettings,
    insecure: bool,
    problems: &mut ProblemCollector<'_>,
) {
    match &listener.address {
        ListenAddress::Tcp(address) => {
            check_tcp_address("listener.address", address, insecure || listener.tls.is_some(), problems);
        }
        ListenAddress::Unix { path, .. } => check_socket_file(path, problems),
    }
    if let Some(files) = &listener.tls {
        check_tls_files(&listener.name, files, problems);
    }
}

/// Refuses a host name without an address and, unless it is allowed, plaintext that other machines reach.
fn check_tcp_address(
    setting: &'static str,
    address: &str,
    may_be_exposed: bool,
    problems: &mut ProblemCollector<'_>,
) {
    if !problems.is_valid(setting) {
        return;
    }
    let problem = match find_exposed_address(address) {
        Err(error) => BindError::Lookup(error),
        Ok(Some(exposed)) if !may_be_exposed => BindError::PlaintextExposed(exposed),
        Ok(_) => return,
    };
    problems.add(invalid_setting(setting, address, format!("cannot be bound: {problem}")));
}

/// Refuses a socket file that cannot be created.
fn check_socket_file(path: &Path, problems: &mut ProblemCollector<'_>) {
    let problem = match std::fs::symlink_metadata(path) {
        _ if path.as_os_str().len() > MAX_SOCKET_PATH_LEN => {
            Some(format!("the path of a socket file has at most {MAX_SOCKET_PATH_LEN} bytes"))
        }
        Ok(found) if !found.file_type().is_socket() => Some(BindError::NotASocket.to_string()),
        _ => directory_problem(path),
    };
    if let Some(problem) = problem {
        let address = format!("unix:{}", path.display());
        problems.add(invalid_setting("listener.address", &address, format!("cannot be bound: {problem}")));
    }
}

/// Refuses a root key file that a first start cannot create. Later starts create none. Only a missing SQLite file shows
/// a first start before anything is opened.
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

/// Refuses an SQLite file that can be neither there nor created.
fn check_sqlite_file(settings: &ServerSettings, problems: &mut ProblemCollector<'_>) {
    let Some(path) = store::sqlite_file(&settings.database) else { return };
    if let Some(problem) = file_problem(&path) {
        let shown = settings.database.redacted();
        problems.add(invalid_setting("database", &shown, format!("cannot be opened: {problem}")));
    }
}

/// Refuses a file of the decision log that cannot be written.
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

/// Why there can be no file at a path.
fn file_problem(path: &Path) -> Option<String> {
    if path.is_dir() {
        return Some("it is a folder; name a file in it".to_owned());
    }
    directory_problem(path)
}

/// Why a path's folder can hold no file.
fn directory_problem(path: &Path) -> Option<String> {
    let folder = private_file::parent_dir(path);
    match std::fs::metadata(folder) {
        Ok(found) if found.is_dir() => None,
        Ok(_) => Some(format!("{} is no folder; name another path", folder.display())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Some(format!("the folder {} does not exist; create it, or name another path", folder.display()))
        }
        Err(error) => Some(format!("the folder {} cannot be used: {error}", folder.display())),
    }
}

/// The files of a listener's TLS, each read, and then all together.
fn check_tls_files(name: &str, files: &TlsFiles, problems: &mut ProblemCollector<'_>) {
    let client_ca = files.client_ca.as_ref().map(|(path, _)| path);
    let mut are_readable = true;
    for (setting, path) in [
        ("listener.tls.certificate", Some(&files.certificate)),
        ("listener.tls.key", Some(&files.key)),
        ("listener.tls.client_ca", client_ca),
    ] {
        let Some(path) = path.filter(|_| problems.is_valid(setting)) else { continue };
        if let Err(error) = std::fs::File::open(path).and_then(|file| file.metadata()) {
            let path = path.display().to_string();
            let path = mask_value(&path);
            let problem = format!(
                "cannot be used: the listener {name:?} cannot speak TLS: {path} cannot be read: {error}"
            );
            problems.add(invalid_redacted_setting(setting, problem));
            are_readable = false;
        }
    }
    let sound = ["listener.tls.certificate", "listener.tls.key", "listener.tls.client_ca"];
    if are_readable
        && sound.iter().all(|setting| problems.is_valid(setting))
        && let Err(error) = tls::check_files(files)
    {
        problems.add(invalid_redacted_setting(
            "listener.tls",
            format!("cannot be used: the listener {name:?} cannot speak TLS: {error}"),
        ));
    }
}

/// The files that a PostgreSQL URL names for TLS.
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
