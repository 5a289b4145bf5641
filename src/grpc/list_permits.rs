//! Limits the lists that are made or wait to be sent at the same time, per process and per account.
//!
//! Single responses of ordinary size are limited by `send_budget.rs` alone.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError, Weak},
    time::Duration,
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tonic::{Response, Status};

use crate::domain::name::AccountId;

use super::status::overloaded;

/// Concurrent lists of all connections, from their creation until they are sent. Each briefly takes some 10 MB.
const MAX_LISTS: usize = 8;
/// Concurrent lists of one account.
const MAX_ACCOUNT_LISTS: usize = 4;
/// How long a list waits for its permit.
const LIST_TIMEOUT: Duration = Duration::from_secs(10);

/// Permits for responses of several MiB, each held from before the response is made until it is sent.
#[derive(Clone, Debug)]
pub(super) struct ListPermits {
    shared_lists: Arc<Semaphore>,
    /// Reserved for the operator account.
    operator_lists: Arc<Semaphore>,
    /// Shares of the accounts that have lists now.
    account_shares: Arc<Mutex<HashMap<AccountId, Weak<Semaphore>>>>,
}

impl Default for ListPermits {
    fn default() -> Self {
        ListPermits {
            shared_lists: Arc::new(Semaphore::new(MAX_LISTS)),
            operator_lists: Arc::new(Semaphore::new(MAX_ACCOUNT_LISTS)),
            account_shares: Arc::default(),
        }
    }
}

/// A permit that travels with its response.
#[derive(Clone, Debug)]
pub(super) struct ListPermit(
    #[expect(dead_code, reason = "dropping them releases the permit")] Arc<[OwnedSemaphorePermit; 2]>,
);

impl ListPermits {
    pub(super) fn is_exhausted(&self) -> bool {
        self.shared_lists.available_permits() == 0
    }

    /// Waits for a permit for a caller of this account. Fails if none is free in time.
    pub(super) async fn acquire(&self, account: &AccountId) -> Result<ListPermit, Status> {
        let share = self.account_share(account);
        let acquired = async {
            let share = share.acquire_owned().await.ok()?;
            let all = if account.is_operator() { &self.operator_lists } else { &self.shared_lists };
            let list_permit = all.clone().acquire_owned().await.ok()?;
            Some(ListPermit(Arc::new([share, list_permit])))
        };
        tokio::time::timeout(LIST_TIMEOUT, acquired).await.ok().flatten().ok_or_else(overloaded)
    }

    fn account_share(&self, account: &AccountId) -> Arc<Semaphore> {
        let mut shares = self.account_shares.lock().unwrap_or_else(PoisonError::into_inner);
        shares.retain(|_, share| share.strong_count() > 0);
        let existing = shares.get(account).and_then(Weak::upgrade);
        existing.unwrap_or_else(|| {
            let share = Arc::new(Semaphore::new(MAX_ACCOUNT_LISTS));
            shares.insert(account.clone(), Arc::downgrade(&share));
            share
        })
    }
}

impl ListPermit {
    /// Wraps the response, which holds the permit until it is sent.
    pub(super) fn attach<T>(self, message: T) -> Response<T> {
        let mut response = Response::new(message);
        response.extensions_mut().insert(self);
        response
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::grpc::send_budget::{ConnectionSendBudget, MessageSplitter};

    #[tokio::test]
    async fn a_list_has_its_place_until_its_answer_is_sent_and_no_account_has_all_places() {
        let (permits, [first, other]) =
            (ListPermits::default(), ["one", "other"].map(|id| AccountId::parse(id).unwrap()));
        let mut held: Vec<ListPermit> = Vec::new();
        for _ in 0..MAX_ACCOUNT_LISTS {
            held.push(permits.acquire(&first).await.unwrap());
        }
        assert_eq!(permits.account_share(&first).available_permits(), 0);
        for _ in 0..MAX_ACCOUNT_LISTS {
            held.push(permits.acquire(&other).await.unwrap());
        }
        assert!(permits.is_exhausted());
        let mut response = held.pop().unwrap().attach(());
        let permit = response.extensions_mut().remove::<ListPermit>();
        let budget = ConnectionSendBudget::new(Arc::default());
        let piece = MessageSplitter::default().start(Bytes::from_static(b"x"), &budget, permit);
        assert!(permits.is_exhausted());
        drop(piece);
        assert!(!permits.is_exhausted());
        drop(held);
        assert_eq!(permits.account_share(&first).available_permits(), MAX_ACCOUNT_LISTS);
    }
}
