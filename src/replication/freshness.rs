//! Makes this replica catch up with the commits of others before it answers from its own state.
//!
//! A change is validated only after the newest entries were applied: an account that was created on one replica exists
//! on all. "Not found" is answered only if the look-up used the newest state.
//!
//! The propagation guarantee does not depend on this: restrictions are waited for elsewhere. What depends on it is that
//! a fault never becomes a verdict.

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

/// The maximum number of requests that wait for one reading; more wait for room in the queue.
const MAX_WAITING_REQUESTS: usize = 1024;

/// The time limit for a reading: an unresponsive database must not use up the time of the call.
const CATCH_UP_TIMEOUT: Duration = Duration::from_secs(2);

/// Brings the index up to date before a look-up.
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
    /// For the only process on a database.
    #[must_use]
    pub(crate) const fn for_single_process() -> FreshnessBarrier {
        FreshnessBarrier(None)
    }

    /// For replicas. Starts a task on the current runtime that serves the readings.
    #[must_use]
    pub(crate) fn for_replicas(
        registry: Arc<dyn ReplicaRegistry>,
        log_applier: Arc<LogApplier>,
        status: Arc<ReplicaStatus>,
    ) -> FreshnessBarrier {
        let (requests, receiver) = mpsc::channel(MAX_WAITING_REQUESTS);
        tokio::spawn(serve_catch_ups(registry.clone(), log_applier, receiver));
        FreshnessBarrier(Some(FreshnessSource { requests, registry, status }))
    }

    /// Applies everything that was committed before this call. Returns false if the database did not answer; then
    /// a missing record may exist.
    pub(crate) async fn catch_up(&self) -> bool {
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

    /// Returns whether the database read since `since` was still the primary. If not, a promoted
    /// standby may have newer records.
    pub(crate) async fn confirm_linearizable(&self, since: Instant) -> bool {
        let Some(FreshnessSource { registry, status, .. }) = &self.0 else { return true };
        let Some(id) = status.replica_id() else { return false };
        let confirmed = tokio::time::timeout(CATCH_UP_TIMEOUT, registry.confirm_primary(id, since)).await;
        matches!(confirmed, Ok(Ok(true)))
    }
}

/// Serves all requests that arrived before a reading with that one reading.
async fn serve_catch_ups(
    registry: Arc<dyn ReplicaRegistry>,
    log_applier: Arc<LogApplier>,
    mut receiver: mpsc::Receiver<oneshot::Sender<bool>>,
) {
    let mut waiting = Vec::new();
    while receiver.recv_many(&mut waiting, MAX_WAITING_REQUESTS).await > 0 {
        let received = apply_new_entries(&*registry, &log_applier).await.unwrap_or_else(|error| {
            tracing::warn!(error = &error as &dyn std::error::Error, "catching up with the log failed");
            false
        });
        for reply in waiting.drain(..) {
            // The caller may have given up.
            let _ = reply.send(received);
        }
    }
}

/// Reads and applies the entries that exist at the start. An error to apply them is left to the replica task.
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
