//! The file of a root key's token: written under a temporary name, and renamed once the key is recorded.

use std::{
    fs::File,
    io::{ErrorKind, Write as _},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};

use crate::{domain::token::Token, private_file, store::CommitError};

/// The file of a root key's token. The token is on disk under a temporary name before the key is recorded, and is
/// renamed afterwards. A start that is killed in between loses no key and does not block the next start.
pub(super) struct RootKeyFile(Option<PendingTokenFile>);

struct PendingTokenFile {
    path: PathBuf,
    /// Name of the file until the key is recorded. The start holds a lock on it.
    temporary_path: PathBuf,
    file: File,
}

impl PendingTokenFile {
    fn create(path: &Path) -> anyhow::Result<PendingTokenFile> {
        if path.symlink_metadata().is_ok() {
            bail!(
                "the root key file {} exists already and is not overwritten, so no root key was created; move it away, or \
                 name another file with --root-key-file",
                path.display()
            );
        }
        let new = private_file::append_suffix(path, ".new");
        let created = remove_abandoned(&new).and_then(|_left| {
            let file = private_file::create_new(&new)?;
            file.try_lock()?;
            Ok(file)
        });
        let file = created.with_context(|| {
            let path = path.display();
            format!("the root key file {path} cannot be created; name another file with --root-key-file")
        })?;
        Ok(PendingTokenFile { path: path.to_owned(), temporary_path: new, file })
    }
}

impl RootKeyFile {
    /// Checks that the file can be created, and leaves nothing behind.
    pub(super) fn check_creatable(path: &Path) -> anyhow::Result<()> {
        RootKeyFile(Some(PendingTokenFile::create(path)?)).discard();
        Ok(())
    }

    pub(super) fn write(path: Option<&Path>, token: &Token) -> anyhow::Result<RootKeyFile> {
        let Some(path) = path else {
            return Ok(RootKeyFile(None));
        };
        let mut pending = PendingTokenFile::create(path)?;
        let written = pending.file.write_all(token.reveal().as_bytes());
        match written.and_then(|()| private_file::sync_to_disk(&pending.file, &pending.temporary_path)) {
            Ok(()) => Ok(RootKeyFile(Some(pending))),
            Err(error) => {
                RootKeyFile(Some(pending)).discard();
                Err(error).context("the root key file cannot be written")
            }
        }
    }

    /// Renames the file, once the key is recorded.
    pub(super) fn commit(&self) -> anyhow::Result<()> {
        let Some(PendingTokenFile { path, temporary_path: new, .. }) = &self.0 else { return Ok(()) };
        std::fs::rename(new, path)
            .with_context(|| format!("the root key is in {}, which cannot be renamed", new.display()))
    }

    /// Removes the file after a commit that certainly failed. If the key may be recorded, the file stays.
    pub(super) fn discard_unless_recorded(&self, error: &CommitError) {
        match (error, &self.0) {
            (CommitError::NotRecorded(_), _) => self.discard(),
            (CommitError::Unknown(_), Some(PendingTokenFile { temporary_path: new, .. })) => {
                let path = new.display();
                tracing::warn!(%path, "it is unknown whether the root key was recorded; its file stays");
            }
            (CommitError::Unknown(_), None) => {}
        }
    }

    /// Removes the file, whose token belongs to no key.
    pub(super) fn discard(&self) {
        if let Some(PendingTokenFile { temporary_path: new, .. }) = &self.0
            && let Err(error) = std::fs::remove_file(new)
        {
            tracing::warn!(error = &error as &dyn std::error::Error, path = %new.display(), "the file cannot be removed");
        }
    }
}

/// Removes the file of a killed start. Returns it locked: while it is, no other start removes a file of this name.
fn remove_abandoned(new: &Path) -> std::io::Result<Option<File>> {
    let left = match private_file::open_existing(new) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        left => left?,
    };
    left.try_lock()?;
    let inode = |found: std::fs::Metadata| (found.dev(), found.ino());
    if inode(left.metadata()?) != inode(std::fs::symlink_metadata(new)?) {
        return Err(std::io::Error::other("another start is creating it"));
    }
    std::fs::remove_file(new)?;
    Ok(Some(left))
}
