//! The root key: created at the first start of a database, and replaced by `keyward root-key reset`. A token that no key
//! has, or a key whose token nobody has seen, is never left behind.

mod reset;

use std::{
    fs::File,
    io::{ErrorKind, Write as _},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};
use zeroize::Zeroizing;

pub use reset::{DescendantKey, RightsChange, RootKeyReset, reset_root_key};

use crate::{
    accounts,
    clock::{Clock, EntropySource},
    config::server::ServerSettings,
    domain::{
        key::ApiKeyState,
        name::AccountId,
        time::{Revision, Timestamp},
        token::{Token, TokenDigest},
    },
    keys, private_file,
    store::{self, CommitError, KeyFilter, OwnerFilter, Store},
};

/// The root key file of a first start whose standard output is no terminal: a log collector may read that.
const DEFAULT_ROOT_KEY_FILE: &str = "keyward-root.key";
/// How many of the operator account's newest keys are looked at for the root key of a start that was killed.
const MAX_ROOT_KEYS: u32 = 100;

/// On the first start of a database: creates the operator account and its root key. Gives the token, unless it went to
/// a file.
pub(super) async fn create_first_root_key(
    store: &dyn Store,
    settings: &ServerSettings,
    clock: &dyn Clock,
    entropy: &dyn EntropySource,
) -> anyhow::Result<Option<Token>> {
    let is_new = async || Ok::<_, anyhow::Error>(store.log_head().await?.revision == Revision::default());
    let file = root_key_path(settings)?;
    if !is_new().await? {
        if let Some(file) = &file {
            recover_first_root_key(store, file).await?;
        }
        return Ok(None);
    }
    let root = keys::root_key::create_root_key(clock, entropy, &settings.key_settings, "keyward serve")?;
    let account =
        accounts::build_operator_account(clock.now()).context("the operator account has no name")?;
    let kept = match RootKeyFile::write(file.as_deref(), &root.token) {
        // Another replica was first; a file of the same name is its file.
        Err(_) if !is_new().await? => return Ok(None),
        kept => kept?,
    };
    let committed = store
        .commit(&[account, root.write])
        .await
        .inspect_err(|error| kept.discard_unless_recorded(error))?;
    let made = committed.outcomes.iter().all(Result::is_ok);
    if !made {
        // Another replica was first, and has shown its key.
        kept.discard();
        return Ok(None);
    }
    kept.commit()?;
    if let Some(file) = &file {
        tracing::info!(path = %file.display(), "the root key was created, and its token is in a file");
    }
    Ok(file.is_none().then_some(root.token))
}

/// Where the token of a first start goes; none = to standard output.
fn root_key_path(settings: &ServerSettings) -> anyhow::Result<Option<PathBuf>> {
    let file = match &settings.root_key_file {
        Some(file) => file.clone(),
        None if settings.may_print_root_key => return Ok(None),
        None => match store::sqlite_file(&settings.database) {
            Some(database) => private_file::parent_dir(&database).join(DEFAULT_ROOT_KEY_FILE),
            None => PathBuf::from(DEFAULT_ROOT_KEY_FILE),
        },
    };
    Ok(Some(std::path::absolute(file)?))
}

/// A token's file. The token is on disk under another name before the key is recorded, and gets its own name after that:
/// a start that is killed in between loses no key, and the next one is not in its way.
struct RootKeyFile(Option<PendingTokenFile>);

struct PendingTokenFile {
    path: PathBuf,
    /// The token under the name for a start that is not over. It is locked by that start.
    temporary_path: PathBuf,
    file: File,
}

impl PendingTokenFile {
    fn create(path: &Path) -> anyhow::Result<PendingTokenFile> {
        if path.symlink_metadata().is_ok() {
            bail!(
                "the root key file {} exists already and is not overwritten, and no root key was created; move it \
                 away, or name another one with --root-key-file",
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
            format!("the root key file {path} cannot be created; name another one with --root-key-file")
        })?;
        Ok(PendingTokenFile { path: path.to_owned(), temporary_path: new, file })
    }
}

impl RootKeyFile {
    fn write(path: Option<&Path>, token: &Token) -> anyhow::Result<RootKeyFile> {
        let Some(path) = path else {
            return Ok(RootKeyFile(None));
        };
        let mut pending = PendingTokenFile::create(path)?;
        let kept = pending.file.write_all(token.reveal().as_bytes());
        match kept.and_then(|()| private_file::sync_to_disk(&pending.file, &pending.temporary_path)) {
            Ok(()) => Ok(RootKeyFile(Some(pending))),
            Err(error) => {
                RootKeyFile(Some(pending)).discard();
                Err(error).context("the root key file cannot be written")
            }
        }
    }

    /// Gives the file its name, once the key is recorded.
    fn commit(&self) -> anyhow::Result<()> {
        let Some(PendingTokenFile { path, temporary_path: new, .. }) = &self.0 else { return Ok(()) };
        std::fs::rename(new, path)
            .with_context(|| format!("the root key is in {}, which cannot be renamed", new.display()))
    }

    /// Takes the file away after a commit that certainly failed. While it may have been recorded it stays.
    fn discard_unless_recorded(&self, error: &CommitError) {
        match (error, &self.0) {
            (CommitError::NotRecorded(_), _) => self.discard(),
            (CommitError::Unknown(_), Some(PendingTokenFile { temporary_path: new, .. })) => {
                let path = new.display();
                tracing::warn!(%path, "whether the root key was recorded is unknown; its file stays");
            }
            (CommitError::Unknown(_), None) => {}
        }
    }

    /// Takes the file away again: its token is no key.
    fn discard(&self) {
        if let Some(PendingTokenFile { temporary_path: new, .. }) = &self.0
            && let Err(error) = std::fs::remove_file(new)
        {
            tracing::warn!(error = &error as &dyn std::error::Error, path = %new.display(), "a file was left");
        }
    }
}

/// Removes the file of a start that was killed. Gives it locked, as long as which no other start removes one.
fn remove_abandoned(new: &Path) -> std::io::Result<Option<File>> {
    let left = match private_file::open_existing(new) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        left => left?,
    };
    left.try_lock()?;
    let inode = |found: std::fs::Metadata| (found.dev(), found.ino());
    if inode(left.metadata()?) != inode(std::fs::symlink_metadata(new)?) {
        return Err(std::io::Error::other("another start creates it at the same time"));
    }
    std::fs::remove_file(new)?;
    Ok(Some(left))
}

/// Gives the file of a first start its name, if that start was killed after its root key was recorded.
async fn recover_first_root_key(store: &dyn Store, file: &Path) -> anyhow::Result<()> {
    let new = private_file::append_suffix(file, ".new");
    if file.symlink_metadata().is_ok() || new.symlink_metadata().is_err() {
        return Ok(());
    }
    let text = std::fs::read_to_string(&new).map(Zeroizing::new).unwrap_or_default();
    let digest = TokenDigest::from_token(text.trim());
    let roots = KeyFilter {
        owner: OwnerFilter::Account(AccountId::operator()),
        environment: None,
        states: vec![ApiKeyState::Active],
        name_prefix: String::new(),
        unused_since: None,
        expires_before: None,
        created_before: None,
        now: Timestamp::from_micros(0),
    };
    let recorded = store.list_keys(&roots, None, MAX_ROOT_KEYS).await?;
    if recorded.iter().any(|stored| stored.key.secrets.iter().any(|secret| secret.digest == digest)) {
        std::fs::rename(&new, file)?;
        tracing::info!(path = %file.display(), "the token of the root key is in a file");
    }
    Ok(())
}
