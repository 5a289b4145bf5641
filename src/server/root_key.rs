//! The root key: created at the first start of a database, and replaced by `keyward root-key reset`. A token that no key
//! has, or a key whose token nobody has seen, is never left behind.

mod reset;

use std::{
    fs::File,
    io::{ErrorKind, Write as _},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};

pub use reset::{Descendant, Reset, RightsChange, reset_root_key};

use crate::{
    accounts,
    clock::{Clock, Entropy},
    config::server::Settings,
    domain::{time::Revision, token::Token},
    keys, private_file,
    store::{self, CommitError, Store},
};

/// The root key file of a first start whose standard output is no terminal: a log collector may read that.
const DEFAULT_FILE: &str = "keyward-root.key";

/// On the first start of a database: creates the operator account and its root key. Gives the token, unless it went to
/// a file.
pub(super) async fn first_start(
    store: &dyn Store,
    settings: &Settings,
    clock: &dyn Clock,
    entropy: &dyn Entropy,
) -> anyhow::Result<Option<Token>> {
    let is_new = async || Ok::<_, anyhow::Error>(store.head().await?.revision == Revision::default());
    if !is_new().await? {
        return Ok(None);
    }
    let root = keys::root::root_key(clock, entropy, &settings.keys, "keyward serve")?;
    let account = accounts::operator_account(clock.now()).context("the operator account has no name")?;
    let file = first_file(settings)?;
    let kept = match KeptToken::keep(file.as_deref(), &root.token) {
        // Another replica was first; a file of the same name is its file.
        Err(_) if !is_new().await? => return Ok(None),
        kept => kept?,
    };
    let committed =
        store.commit(&[account, root.write]).await.inspect_err(|error| kept.discard_after(error))?;
    let made = committed.outcomes.iter().all(Result::is_ok);
    if !made {
        // Another replica was first, and has shown its key.
        kept.discard();
        return Ok(None);
    }
    if let Some(file) = &file {
        tracing::info!(path = %file.display(), "the root key was created, and its token is in a file");
    }
    Ok(file.is_none().then_some(root.token))
}

/// Where the token of a first start goes; none = to standard output.
fn first_file(settings: &Settings) -> anyhow::Result<Option<PathBuf>> {
    let file = match &settings.root_key_file {
        Some(file) => file.clone(),
        None if settings.shows_root_key => return Ok(None),
        None => match store::file(&settings.database) {
            Some(database) => private_file::folder_of(&database).join(DEFAULT_FILE),
            None => PathBuf::from(DEFAULT_FILE),
        },
    };
    Ok(Some(std::path::absolute(file)?))
}

/// A token's file: written whole and on disk before the key is recorded, so that no key is lost in between.
struct KeptToken(Option<PathBuf>);

impl KeptToken {
    fn keep(path: Option<&Path>, token: &Token) -> anyhow::Result<KeptToken> {
        let Some(path) = path else {
            return Ok(KeptToken(None));
        };
        let mut file = create_file(path)?;
        let kept = KeptToken(Some(path.to_owned()));
        let written =
            file.write_all(token.reveal().as_bytes()).and_then(|()| private_file::sync(&file, path));
        if let Err(error) = written {
            kept.discard();
            return Err(error).context("the root key file cannot be written");
        }
        Ok(kept)
    }

    /// Takes the file away after a commit that certainly failed. While it may have been recorded it stays.
    fn discard_after(&self, error: &CommitError) {
        match error {
            CommitError::NotRecorded(_) => self.discard(),
            CommitError::Unknown(_) => {
                tracing::warn!(
                    "whether the root key was recorded is unknown; its file, if one was named, stays"
                );
            }
        }
    }

    /// Takes the file away again: its token is no key.
    fn discard(&self) {
        if let Some(path) = &self.0
            && let Err(error) = std::fs::remove_file(path)
        {
            tracing::warn!(error = &error as &dyn std::error::Error, path = %path.display(), "a file was left");
        }
    }
}

fn create_file(path: &Path) -> anyhow::Result<File> {
    match private_file::create_new(path) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => bail!(
            "the root key file {} exists already and is not overwritten, and no root key was created; move it away, \
             or name another one with --root-key-file",
            path.display()
        ),
        created => created.with_context(|| {
            let path = path.display();
            format!("the root key file {path} cannot be created; name another one with --root-key-file")
        }),
    }
}
