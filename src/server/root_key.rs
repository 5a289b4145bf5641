//! Creates the root key at the first start of a database; `reset` replaces it.
//!
//! Invariant: no crash leaves a token without a key, or a key whose token nobody has.

mod reset;
mod token_file;

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use zeroize::Zeroizing;

pub(crate) use reset::{DescendantKey, RightsChange, RootKeyReset, reset_root_key};
use token_file::RootKeyFile;

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
    store::{self, KeyFilter, OwnerFilter, Store},
};

/// The default root key file, used if standard output is no terminal: a log collector may read that.
const DEFAULT_ROOT_KEY_FILE: &str = "keyward-root.key";
/// The number of the operator account's newest keys that are searched for the root key of a killed start.
const MAX_ROOT_KEYS: u32 = 100;

/// On the first start of a database, creates the operator account and its root key. Returns the token unless it went to
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
    let token_file = match RootKeyFile::write(file.as_deref(), &root.token) {
        // Another replica was first, and the existing file is its file.
        Err(_) if !is_new().await? => return Ok(None),
        written => written?,
    };
    let committed = store
        .commit(&[account, root.write])
        .await
        .inspect_err(|error| token_file.discard_unless_recorded(error))?;
    let made = committed.outcomes.iter().all(Result::is_ok);
    if !made {
        // Another replica was first and has its own key.
        token_file.discard();
        return Ok(None);
    }
    token_file.commit()?;
    if let Some(file) = &file {
        tracing::info!(path = %file.display(), "root key created; its token is in a file");
    }
    Ok(file.is_none().then_some(root.token))
}

/// The file for the token of a first start; `None` = standard output.
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

/// Renames the token file of a first start that was killed after its root key was recorded.
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
        tracing::info!(path = %file.display(), "the root key's token is in a file");
    }
    Ok(())
}
