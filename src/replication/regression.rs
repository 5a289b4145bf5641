//! After the database has lost changes (a backup was restored, a standby took over that lacked some), a replica that
//! knows more keeps denying what is dead and waits for people. When they accept the loss, what it knows to be revoked
//! is revoked in the database again, and then it loads what there is.

use std::{sync::Arc, time::Duration};

use tokio::time::sleep;

use crate::{
    domain::{
        key::{Key, Revocation, RevokeReason},
        log::{Action, Change},
        name::KeyId,
    },
    store::{CommitError, StoreError, Write},
};

use super::feed::Parts;

/// How often it looks whether the loss was accepted.
const LOOK_EVERY: Duration = Duration::from_secs(1);
const METHOD: &str = "keyward replicas accept-regression";

/// Returns when people have accepted the loss and everything known to be revoked is revoked again. `known` is the
/// epoch of the history that this replica holds.
pub(super) async fn wait(parts: Parts, known: u64) {
    let accepted = async || matches!(parts.fleet.terms().await, Ok(terms) if terms.epoch > known);
    while !accepted().await {
        sleep(LOOK_EVERY).await;
    }
    parts.fleet.start_over();
    loop {
        match revoke_again(&parts).await {
            Ok(count) => {
                tracing::warn!(count, "the loss was accepted; keys known to be revoked were revoked again");
                return;
            }
            Err(error) => {
                tracing::error!(
                    error = &error as &dyn std::error::Error,
                    "what is known to be revoked could not be revoked again; it is tried again"
                );
                sleep(LOOK_EVERY).await;
            }
        }
    }
}

/// How many keys were revoked that the database held for alive.
async fn revoke_again(parts: &Parts) -> Result<u64, StoreError> {
    let mut count = 0;
    for (id, at) in parts.follow.index().revoked() {
        let comment = "revoked again: the database had lost it".to_owned();
        let revocation = Revocation { at, reason: RevokeReason::Unspecified, comment };
        count += u64::from(revoke(parts, id, revocation).await?);
    }
    Ok(count)
}

async fn revoke(parts: &Parts, id: KeyId, revocation: Revocation) -> Result<bool, StoreError> {
    loop {
        // Made after the state that the database went back to: it is gone, and its token with it.
        let Some(stored) = parts.store.key(id).await? else { return Ok(false) };
        if stored.key.revocation.is_some() {
            return Ok(false);
        }
        let now = parts.clock.now();
        let expect = Some(stored.key.revision);
        let key = Key { revocation: Some(revocation.clone()), updated_at: now, ..stored.key };
        let write = Write::by_system(Change::Key(Arc::new(key)), expect, Action::KeyRevoked, METHOD, now);
        let committed = parts.store.commit(&[write]).await.map_err(|error| match error {
            CommitError::NotRecorded(error) | CommitError::Unknown(error) => error,
        })?;
        // Else it was changed meanwhile.
        if committed.outcomes.iter().all(Result::is_ok) {
            return Ok(true);
        }
    }
}
