//! Appends audit entries about operations on the log or the database itself.

use std::sync::Arc;

use crate::{
    clock::Clock,
    domain::{
        log::{Actor, AuditAction, RecordChange},
        log_payload::ChangeOrigin,
        name::AccountId,
    },
    store::{CommitError, Store, StoreError, WriteRequest},
};

/// Appends an entry about the operator account, which stays unchanged. Returns false if there is no such account.
pub(crate) async fn append_entry<E: From<StoreError> + From<CommitError>>(
    store: &dyn Store,
    action: AuditAction,
    via: ChangeOrigin,
    method: &'static str,
    clock: &dyn Clock,
) -> Result<bool, E> {
    loop {
        let Some(account) = store.get_account(&AccountId::operator()).await? else { return Ok(false) };
        let (expect, now) = (Some(account.revision), clock.now());
        let write = WriteRequest {
            actor: Actor { origin: via.clone(), ..Actor::SYSTEM },
            ..WriteRequest::from_system(RecordChange::Account(Arc::new(account)), expect, action, method, now)
        };
        // Otherwise the account was changed concurrently.
        if store.commit(&[write]).await?.outcomes.iter().all(Result::is_ok) {
            return Ok(true);
        }
    }
}
