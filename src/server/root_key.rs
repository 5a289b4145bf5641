//! The root key: made at the first start of a database, and made anew when it is lost. A token that no key has, or a key
//! whose token nobody has seen, is never left behind.

use std::{
    fs::{File, OpenOptions},
    io::Write as _,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context as _, bail};

use crate::{
    accounts,
    clock::{Clock, Entropy},
    config::server::Settings,
    domain::{
        key::{Revocation, RevokeReason, State},
        log::{Action, Actor, Change},
        name::{AccountId, KeyId},
        time::Revision,
        token::Token,
    },
    keys,
    store::{self, CommitError, KeyFilter, OwnerFilter, ReadSet, Store, Write},
};

use super::replicas::Place;

/// On the first start of a database: the operator account and its root key. Gives the token, unless it went to
/// a file.
pub(super) async fn first_start(
    store: &dyn Store,
    settings: &Settings,
    clock: &dyn Clock,
    entropy: &dyn Entropy,
) -> anyhow::Result<Option<Token>> {
    if store.head().await?.revision != Revision::default() {
        return Ok(None);
    }
    let root = keys::root::root_key(clock, entropy, &settings.keys, "keyward serve")?;
    let account = accounts::operator_account(clock.now()).context("the operator account has no name")?;
    let kept = KeptToken::keep(settings.root_key_file.as_deref(), &root.token)?;
    let committed =
        store.commit(&[account, root.write]).await.inspect_err(|error| kept.discard_after(error))?;
    let made = committed.outcomes.iter().all(Result::is_ok);
    if !made {
        // Another replica was first, and has shown its key.
        kept.discard();
        return Ok(None);
    }
    Ok(settings.root_key_file.is_none().then_some(root.token))
}

/// A token's file: written whole and on disk before the key is recorded, so that no key is lost in between.
struct KeptToken(Option<PathBuf>);

impl KeptToken {
    fn keep(path: Option<&Path>, token: &Token) -> anyhow::Result<KeptToken> {
        let Some(path) = path else {
            return Ok(KeptToken(None));
        };
        let created = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
        let mut file = match created {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => bail!(
                "the root key file {} exists already and is not overwritten; move it away, or name another one",
                path.display()
            ),
            Err(error) => {
                return Err(error)
                    .with_context(|| format!("the root key file {} cannot be made", path.display()));
            }
        };
        let kept = KeptToken(Some(path.to_owned()));
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let written = file
            .write_all(token.reveal().as_bytes())
            .and_then(|()| file.sync_all())
            .and_then(|()| File::open(folder)?.sync_all());
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

/// Makes a new root key and revokes the ones before it, also where servers run on the database. A file must belong to
/// no running server.
///
/// # Errors
/// When the store does not open or has never been started, or the key cannot be kept.
pub async fn reset_root_key(
    settings: &Settings,
    clock: Arc<dyn Clock>,
    entropy: &dyn Entropy,
) -> anyhow::Result<Option<Token>> {
    const METHOD: &str = "keyward root-key reset";
    let store = store::open(&settings.database).await?;
    if store.head().await?.revision == Revision::default() {
        bail!("this database is new and has no root key yet; 'keyward serve' makes one at its first start");
    }
    let root = keys::root::root_key(&*clock, entropy, &settings.keys, METHOD)?;
    let new = root.write.change.key_id();
    let mut batch = revoke_roots(&*store, &*clock, METHOD, new).await?;
    batch.push(root.write);
    let kept = KeptToken::keep(settings.root_key_file.as_deref(), &root.token)?;
    let committed = store.commit(&batch).await.inspect_err(|error| kept.discard_after(error))?;
    if let Some(Err(rejection)) = committed.outcomes.last() {
        kept.discard();
        bail!("the root key was not recorded: {rejection:?}; try again");
    }
    // A running server may have changed one of them meanwhile.
    let mut left = committed.outcomes.iter().any(Result::is_err);
    while left {
        let batch = revoke_roots(&*store, &*clock, METHOD, new).await?;
        left = store.commit(&batch).await?.outcomes.iter().any(Result::is_err);
    }
    // Running replicas may still hold the old ones for good.
    let place = Place::on(&store, Arc::default(), clock.clone());
    let revision = store.head().await?.revision;
    if let Err(incomplete) = place.propagation.wait(revision, false, None).await {
        tracing::error!(?incomplete, "the old root keys are revoked, and may not be refused everywhere yet");
    }
    store.close().await;
    Ok(settings.root_key_file.is_none().then_some(root.token))
}

/// Writes that revoke every root key but one that is not revoked yet.
async fn revoke_roots(
    store: &dyn Store,
    clock: &dyn Clock,
    method: &'static str,
    but: Option<KeyId>,
) -> anyhow::Result<Vec<Write>> {
    let now = clock.now();
    let filter = KeyFilter {
        owner: OwnerFilter::Account(AccountId::operator()),
        environment: None,
        states: vec![State::Active, State::Disabled, State::Expired],
        name_prefix: String::new(),
        unused_since: None,
        expires_before: None,
        created_before: None,
        now,
    };
    let mut writes = Vec::new();
    let (mut found, mut before) = (Vec::new(), None);
    loop {
        let page = store.keys(&filter, before, 1000).await?;
        let Some(last) = page.last() else { break };
        before = Some(last.key.id);
        found.extend(page);
    }
    for stored in found {
        let mut key = stored.key;
        // Whatever it is called by now: nothing else is made by the system.
        let root = key.created_by == Actor::SYSTEM.to_string();
        if !root || Some(key.id) == but {
            continue;
        }
        let expect = Some(key.revision);
        let comment = "replaced by root-key reset".to_owned();
        key.revocation = Some(Revocation { at: now, reason: RevokeReason::Superseded, comment });
        key.updated_at = now;
        writes.push(Write {
            change: Change::Key(Arc::new(key)),
            expect,
            action: Action::KeyRevoked,
            actor: Actor::SYSTEM,
            method,
            at: now,
            idempotency: None,
            reads: ReadSet::default(),
            limits: None,
        });
    }
    Ok(writes)
}
