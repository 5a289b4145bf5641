//! What a server that starts here needs beside right values: files that can be read and fit together, and addresses that
//! plaintext may be served on. Everything is looked at before anything is opened.

use std::path::Path;

use crate::{
    domain::connection_url::ConnectionUrl,
    transport::{
        Address, Listener,
        socket::{BindError, first_exposed},
        tls::{self, TlsFiles},
    },
};

use super::{
    problems::Problems,
    rules::{self, RulesError},
    server::{Settings, invalid, unshown},
};

/// Examines what is not a listener of the file.
pub(super) fn examine(settings: &Settings, problems: &mut Problems<'_>) {
    if settings.main_listener {
        exposure("listen", &settings.listen, settings.insecure, problems);
    }
    for (setting, address) in
        [("envoy_listen", &settings.envoy_listen), ("forward_auth_listen", &settings.forward_auth_listen)]
    {
        if let Some(address) = address {
            exposure(setting, address, settings.insecure, problems);
        }
    }
    if settings.root_key_file.as_deref() == Some(Path::new("-")) {
        let problem = "is standard output, which a log may keep: name a new file";
        problems.add(invalid("root_key_file", "-", problem));
    }
    database_files(settings, problems);
    rules_file(settings, problems);
}

/// Examines a listener of the file.
pub(super) fn listener(listener: &Listener, insecure: bool, problems: &mut Problems<'_>) {
    match (&listener.tls, &listener.address) {
        (Some(files), _) => certificates(&listener.name, files, problems),
        (None, Address::Tcp(address)) => exposure("listener.address", address, insecure, problems),
        (None, Address::Unix { .. }) => {}
    }
}

/// Refuses plaintext that other machines reach. A name without an address is refused when it is bound.
fn exposure(setting: &'static str, address: &str, insecure: bool, problems: &mut Problems<'_>) {
    if insecure || !problems.is_sound(setting) {
        return;
    }
    if let Ok(Some(exposed)) = first_exposed(address) {
        problems.add(invalid(
            setting,
            address,
            format!("cannot be bound: {}", BindError::Plaintext(exposed)),
        ));
    }
}

/// The files of a listener's TLS, each read, and then all together.
fn certificates(name: &str, files: &TlsFiles, problems: &mut Problems<'_>) {
    let client_ca = files.clients.as_ref().map(|(path, _)| path);
    let mut are_readable = true;
    for (setting, path) in [
        ("listener.tls.certificate", Some(&files.certificate)),
        ("listener.tls.key", Some(&files.key)),
        ("listener.tls.client_ca", client_ca),
    ] {
        let Some(path) = path.filter(|_| problems.is_sound(setting)) else { continue };
        if let Err(error) = std::fs::File::open(path).and_then(|file| file.metadata()) {
            let path = path.display();
            let problem = format!(
                "cannot be used: the listener {name:?} cannot speak TLS: {path} cannot be read: {error}"
            );
            problems.add(unshown(setting, problem));
            are_readable = false;
        }
    }
    let sound = ["listener.tls.certificate", "listener.tls.key", "listener.tls.client_ca"];
    if are_readable
        && sound.iter().all(|setting| problems.is_sound(setting))
        && let Err(error) = tls::check(files)
    {
        problems.add(unshown(
            "listener.tls",
            format!("cannot be used: the listener {name:?} cannot speak TLS: {error}"),
        ));
    }
}

/// The files that a PostgreSQL URL names for TLS.
fn database_files(settings: &Settings, problems: &mut Problems<'_>) {
    let Ok(parts) = ConnectionUrl::parse(&settings.database) else { return };
    for (name, value) in
        parts.options().filter(|(name, _)| ["sslrootcert", "sslcert", "sslkey"].contains(name))
    {
        let path = percent_encoding::percent_decode_str(value).decode_utf8_lossy();
        if let Err(error) = std::fs::File::open(&*path) {
            problems.add(unshown("database", format!("has {name}={value:?}, which cannot be read: {error}")));
        }
    }
}

fn rules_file(settings: &Settings, problems: &mut Problems<'_>) {
    let Some(path) = settings.rules.as_deref().filter(|_| problems.is_sound("environments")) else { return };
    match rules::read(path, &settings.keys.environments) {
        Ok(_) => {}
        Err(RulesError::Unreadable { path, source }) => {
            problems.add(invalid("rules", &path, format!("cannot be read: {source}")));
        }
        Err(RulesError::Wrong { path, problems: found }) => {
            let texts = found.iter().map(|problem| format!("rules = {path:?} is wrong: {problem}"));
            problems.add_all("rules", texts);
        }
    }
}
