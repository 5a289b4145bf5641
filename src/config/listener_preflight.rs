//! Checks what a listener needs to start: addresses that resolve, socket files that can be created, and TLS files that
//! can be read and fit together. No socket is opened.

use std::{io, os::unix::fs::FileTypeExt as _, path::Path};

use crate::{
    domain::credential_mask::mask_value,
    private_file,
    transport::{
        ListenAddress, ListenerSettings,
        socket::{BindError, find_exposed_address},
        tls::{self, TlsFiles},
    },
};

use super::{
    error::{invalid_redacted_setting, invalid_setting},
    problems::ProblemCollector,
};

/// The maximum length of a socket file's path in bytes: `sun_path` of unix(7) without its final NUL.
const MAX_SOCKET_PATH_LEN: usize = 107;

/// Checks a `[[listener]]` of the file.
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

/// Rejects a host name that does not resolve and, unless `may_be_exposed`, an address that other machines reach.
pub(super) fn check_tcp_address(
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

/// Rejects a socket file that cannot be created.
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

/// Why no file can be created or opened at a path.
pub(super) fn file_problem(path: &Path) -> Option<String> {
    if path.is_dir() {
        return Some("it is a folder; name a file in it".to_owned());
    }
    directory_problem(path)
}

/// Why no file can be created in the folder of a path.
pub(super) fn directory_problem(path: &Path) -> Option<String> {
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

/// Checks each TLS file of a listener, then all of them together.
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
