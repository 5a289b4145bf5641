//! Recovers a replica after the database has lost changes, because a backup was restored or a standby took over.
//!
//! A replica that knows more keeps denying what is dead, and waits for an operator to accept the loss. It then revokes
//! again what it knows to be revoked, and loads the database's state.

use std::{sync::Arc, time::Duration};

use tokio::time::sleep;

use crate::{
    domain::{
        key::{ApiKey, Revocation, RevokeReason},
        log::{AuditAction, RecordChange},
        name::KeyId,
    },
    store::{CommitError, StoreError, WriteRequest},
};

use super::replica_dependencies::ReplicaDependencies;

/// How often the replica looks whether the loss was accepted.
const POLL_INTERVAL: Duration = Duration::from_secs(1);
const METHOD: &str = "keyward replicas accept-regression";

/// Returns once the loss is accepted and every known revocation is in the database again. `known_epoch` is the epoch of
/// the history that this replica holds.
pub(super) async fn wait_for_acceptance(dependencies: ReplicaDependencies, known_epoch: u64) {
    let registry = &dependencies.registry;
    let accepted = async || registry.lease_config().await.is_ok_and(|config| config.epoch > known_epoch);
    while !accepted().await {
        sleep(POLL_INTERVAL).await;
    }
    dependencies.registry.forget_known_head();
    loop {
        match reapply_revocations(&dependencies).await {
            Ok(count) => {
                tracing::warn!(count, "loss accepted: keys known to be revoked were revoked again");
                return;
            }
            Err(error) => {
                tracing::error!(
                    error = &error as &dyn std::error::Error,
                    "revoking known keys again failed: retrying"
                );
                sleep(POLL_INTERVAL).await;
            }
        }
    }
}

/// Revokes keys that the database lost the revocation of. Returns how many.
async fn reapply_revocations(dependencies: &ReplicaDependencies) -> Result<u64, StoreError> {
    let mut count = 0;
    for (id, at) in dependencies.log_applier.index().revoked_keys() {
        let comment = "revoked again: the database had lost the revocation".to_owned();
        let revocation = Revocation { at, reason: RevokeReason::Unspecified, comment };
        count += u64::from(reapply_revocation(dependencies, id, revocation).await?);
    }
    Ok(count)
}

async fn reapply_revocation(
    dependencies: &ReplicaDependencies,
    id: KeyId,
    revocation: Revocation,
) -> Result<bool, StoreError> {
    loop {
        // The key is younger than the restored state: it is gone, and its token is unknown.
        let Some(stored) = dependencies.store.get_key(id).await? else { return Ok(false) };
        if stored.key.revocation.is_some() {
            return Ok(false);
        }
        let now = dependencies.clock.now();
        let expect = Some(stored.key.revision);
        let key = ApiKey { revocation: Some(revocation.clone()), updated_at: now, ..stored.key };
        let write = WriteRequest::from_system(
            RecordChange::Key(Arc::new(key)),
            expect,
            AuditAction::KeyRevoked,
            METHOD,
            now,
        );
        let committed = dependencies.store.commit(&[write]).await.map_err(|error| match error {
            CommitError::NotRecorded(error) | CommitError::Unknown(error) => error,
        })?;
        // Otherwise the key was changed meanwhile: try again.
        if committed.outcomes.iter().all(Result::is_ok) {
            return Ok(true);
        }
    }
}
