//! Entries of the log about what was done to the log or the database itself.

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

/// Writes an entry about the operator account, which stays as it is. False = there is no such account.
///
/// # Errors
/// When the database fails.
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
        // Else it was changed meanwhile.
        if store.commit(&[write]).await?.outcomes.iter().all(Result::is_ok) {
            return Ok(true);
        }
    }
}
