//! After the database has lost changes (a backup was restored, a standby took over that lacked some), a replica that
//! knows more keeps denying what is dead and waits for people. When they accept the loss, what it knows to be revoked
//! is revoked in the database again, and then it loads what there is.

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

/// How often it looks whether the loss was accepted.
const POLL_INTERVAL: Duration = Duration::from_secs(1);
const METHOD: &str = "keyward replicas accept-regression";

/// Returns when people have accepted the loss and everything known to be revoked is revoked again. `known` is the
/// epoch of the history that this replica holds.
pub(super) async fn wait_for_acceptance(dependencies: ReplicaDependencies, known_epoch: u64) {
    let accepted = async || matches!(dependencies.registry.lease_config().await, Ok(config) if config.epoch > known_epoch);
    while !accepted().await {
        sleep(POLL_INTERVAL).await;
    }
    dependencies.registry.forget_known_head();
    loop {
        match reapply_revocations(&dependencies).await {
            Ok(count) => {
                tracing::warn!(count, "the loss was accepted; keys known to be revoked were revoked again");
                return;
            }
            Err(error) => {
                tracing::error!(
                    error = &error as &dyn std::error::Error,
                    "what is known to be revoked could not be revoked again; it is tried again"
                );
                sleep(POLL_INTERVAL).await;
            }
        }
    }
}

/// How many keys were revoked that the database held for alive.
async fn reapply_revocations(dependencies: &ReplicaDependencies) -> Result<u64, StoreError> {
    let mut count = 0;
    for (id, at) in dependencies.log_applier.index().revoked_keys() {
        let comment = "revoked again: the database had lost it".to_owned();
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
        // Made after the state that the database went back to: it is gone, and its token with it.
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
        // Else it was changed meanwhile.
        if committed.outcomes.iter().all(Result::is_ok) {
            return Ok(true);
        }
    }
}
