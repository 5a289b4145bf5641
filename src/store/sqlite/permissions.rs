//! Refuses a database that every user of the machine can change, and warns of one that a group can change.
//!
//! Write access to the file is enough to plant keys, and write access to its folder to put another file in its place.

use std::{
    fs::{self, Metadata},
    io::{self, ErrorKind},
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::Path,
};

use crate::{
    private_file::{append_suffix, parent_dir},
    store::OpenError,
};

const OTHERS_WRITE: u32 = 0o002;
const GROUP_WRITE: u32 = 0o020;
/// In a folder with this bit, users can rename and remove only their own files.
const STICKY: u32 = 0o1000;

/// Checks the file at `real`, which must not be a symbolic link, the files that SQLite keeps next to it, and its folder.
pub(super) fn check_permissions(real: &Path) -> Result<(), OpenError> {
    let refusal =
        |what: String, fix| OpenError::Unsuitable { database: real.display().to_string(), what, fix };
    let other =
        |error: io::Error| OpenError::Other { path: real.display().to_string(), source: error.into() };
    let database = fs::metadata(real).map_err(other)?;
    let folder = fs::metadata(parent_dir(real)).map_err(other)?;
    let beside = ["-wal", "-shm", "-journal"].map(|suffix| append_suffix(real, suffix));
    for file in [real].into_iter().chain(beside.iter().map(AsRef::as_ref)) {
        let found = match fs::symlink_metadata(file) {
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            found => found.map_err(other)?,
        };
        if found.is_symlink() {
            let what = format!("{} is a symbolic link", file.display());
            return Err(refusal(what, "Remove the link: SQLite keeps a regular file there"));
        }
        if has_mode_bit(&found, OTHERS_WRITE) {
            let what =
                format!("every user of this machine can change {} ({})", file.display(), format_mode(&found));
            return Err(refusal(
                what,
                "Run chmod 600 on it, start, and run 'keyward audit verify': a key may be planted",
            ));
        }
        if found.uid() != database.uid() {
            let what = format!("{} belongs to another user than the database", file.display());
            return Err(refusal(
                what,
                "Give it to the database's user if a server of yours has left it; otherwise remove it",
            ));
        }
    }
    if has_mode_bit(&folder, OTHERS_WRITE) && !has_mode_bit(&folder, STICKY) {
        let what =
            format!("every user of this machine can replace it: its folder has {}", format_mode(&folder));
        return Err(refusal(
            what,
            "Run chmod o-w on the folder, or move the database into a separate folder with mode 0700",
        ));
    }
    if database.uid() != rustix::process::geteuid().as_raw() {
        if has_mode_bit(&folder, OTHERS_WRITE) {
            let what = "it belongs to another user, in a folder where each user can create files".to_owned();
            return Err(refusal(
                what,
                "Give it to the user of the server, or move it into a separate folder",
            ));
        }
        tracing::warn!(path = %real.display(), "another user owns the database, and can change its keys");
    }
    for (found, what) in [(&database, "file"), (&folder, "folder")] {
        if has_mode_bit(found, GROUP_WRITE) && !has_mode_bit(found, STICKY) {
            tracing::warn!(
                path = %real.display(),
                what,
                mode = format_mode(found),
                "a group can change the database: run chmod g-w unless each of its members may plant keys"
            );
        }
    }
    Ok(())
}

fn has_mode_bit(found: &Metadata, right: u32) -> bool {
    found.permissions().mode() & right != 0
}

fn format_mode(found: &Metadata) -> String {
    format!("mode {:04o}", found.permissions().mode() & 0o7777)
}
