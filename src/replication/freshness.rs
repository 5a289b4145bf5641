//! Hearing what other replicas have committed, before a change is judged here: who makes an account on one replica
//! finds it on another. And seeing, before something is said not to be there, that it was looked for in the newest
//! state. The guarantee does not rest on it: what takes rights away has been waited for. That a fault is no verdict does.

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::{mpsc, oneshot},
    time::Instant,
};

use crate::store::{
    StoreError,
    replica_registry::{MAX_CHANGES_PER_REPLY, ReplicaRegistry},
};

use super::{log_applier::LogApplier, replica_status::ReplicaStatus};

/// How many may wait for one reading; those beyond wait for a place.
const MAX_WAITING_REQUESTS: usize = 1024;

/// How long a reading is waited for. A database that says nothing is not asked the whole time that a call has.
const CATCH_UP_TIMEOUT: Duration = Duration::from_secs(2);

/// The way to the newest changes.
#[derive(Clone)]
pub struct FreshnessBarrier(Option<FreshnessSource>);

#[derive(Clone)]
struct FreshnessSource {
    requests: mpsc::Sender<oneshot::Sender<bool>>,
    registry: Arc<dyn ReplicaRegistry>,
    status: Arc<ReplicaStatus>,
}

impl std::fmt::Debug for FreshnessBarrier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FreshnessBarrier").field("from_others", &self.0.is_some()).finish_non_exhaustive()
    }
}

impl FreshnessBarrier {
    /// Where nobody else commits.
    #[must_use]
    pub const fn for_single_process() -> FreshnessBarrier {
        FreshnessBarrier(None)
    }

    /// Where others do. Readings run on the current runtime for as long as anybody may ask.
    #[must_use]
    pub fn for_replicas(
        registry: Arc<dyn ReplicaRegistry>,
        log_applier: Arc<LogApplier>,
        status: Arc<ReplicaStatus>,
    ) -> FreshnessBarrier {
        let (requests, receiver) = mpsc::channel(MAX_WAITING_REQUESTS);
        tokio::spawn(serve_catch_ups(registry.clone(), log_applier, receiver));
        FreshnessBarrier(Some(FreshnessSource { requests, registry, status }))
    }

    /// Whether everything is in the index that was committed before: else the database has failed to tell, and what
    /// is not there may be there all the same.
    pub async fn catch_up(&self) -> bool {
        let Some(FreshnessSource { requests, .. }) = &self.0 else { return true };
        let (reply, received) = oneshot::channel();
        let receiver = async {
            match requests.send(reply).await {
                Ok(()) => received.await.unwrap_or(false),
                Err(_) => false,
            }
        };
        tokio::time::timeout(CATCH_UP_TIMEOUT, receiver).await.unwrap_or(false)
    }

    /// Whether what was read from the database since then was the newest there was: else it may be one that another has
    /// replaced, and what is not there may be in the other.
    pub async fn confirm_linearizable(&self, since: Instant) -> bool {
        let Some(FreshnessSource { registry, status, .. }) = &self.0 else { return true };
        let Some(id) = status.replica_id() else { return false };
        let confirmed = tokio::time::timeout(CATCH_UP_TIMEOUT, registry.confirm_primary(id, since)).await;
        matches!(confirmed, Ok(Ok(true)))
    }
}

/// One reading for all who asked before it was begun.
async fn serve_catch_ups(
    registry: Arc<dyn ReplicaRegistry>,
    log_applier: Arc<LogApplier>,
    mut receiver: mpsc::Receiver<oneshot::Sender<bool>>,
) {
    let mut waiting = Vec::new();
    while receiver.recv_many(&mut waiting, MAX_WAITING_REQUESTS).await > 0 {
        let received = apply_new_entries(&*registry, &log_applier).await.unwrap_or_else(|error| {
            tracing::warn!(error = &error as &dyn std::error::Error, "the newest changes were not read");
            false
        });
        for reply in waiting.drain(..) {
            // Whoever has gone away does not hear of it.
            let _ = reply.send(received);
        }
    }
}

/// Reads what was there when it began. What does not fit is the feed's to deal with.
async fn apply_new_entries(
    registry: &dyn ReplicaRegistry,
    log_applier: &LogApplier,
) -> Result<bool, StoreError> {
    while let Some(at) = log_applier.position() {
        let entries = registry.fetch_changes_after(at.revision).await?;
        let last = entries.len() < MAX_CHANGES_PER_REPLY as usize;
        if log_applier.apply_and_request_ack(entries)?.is_err() {
            return Ok(false);
        }
        if last {
            return Ok(true);
        }
    }
    Ok(false)
}
