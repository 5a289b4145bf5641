//! Publishes the state of the replica task, for metrics, health and its neighbor tasks.

use std::sync::{
    Mutex, PoisonError,
    atomic::{AtomicU64, Ordering},
};

use crate::domain::lease::{ReplicaId, replica::ReplicaState};

use super::{
    ack_tracker::{AckTracker, MAX_NOTIFYING_REPLICAS},
    clock_offset::ClockOffset,
};

/// The published state of a replica.
#[derive(Debug, Default)]
pub struct ReplicaStatus {
    replica_id: Mutex<Option<ReplicaId>>,
    pub(super) state: Mutex<Option<ReplicaState>>,
    pub(super) renewals: AtomicU64,
    pub(super) failures: AtomicU64,
    pub(super) clock_stall_count: AtomicU64,
    pub(super) replica_count: AtomicU64,
    ack_tracker: AckTracker,
    pub(super) clock_offset: ClockOffset,
}

impl ReplicaStatus {
    /// The ID of this process's row, once it is registered.
    #[must_use]
    pub(crate) fn replica_id(&self) -> Option<ReplicaId> {
        *self.replica_id.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The state of the replica's protocol.
    #[must_use]
    pub(crate) fn state(&self) -> Option<ReplicaState> {
        *self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The number of renewals, of failed requests, and of clock stalls.
    #[must_use]
    pub(crate) fn counters(&self) -> [u64; 3] {
        [&self.renewals, &self.failures, &self.clock_stall_count].map(|count| count.load(Ordering::Relaxed))
    }

    /// The number of replicas by the newest renewal.
    #[must_use]
    pub(crate) fn replica_count(&self) -> u64 {
        self.replica_count.load(Ordering::Relaxed)
    }

    /// The offset of this machine's wall clock from the database's.
    #[must_use]
    pub(crate) fn clock_offset(&self) -> &ClockOffset {
        &self.clock_offset
    }

    /// The acknowledgments that other replicas have notified.
    pub(super) fn ack_tracker(&self) -> &AckTracker {
        &self.ack_tracker
    }

    /// Returns whether replicas notify their acknowledgments.
    pub(super) fn has_ack_notifications(&self) -> bool {
        self.replica_count() <= MAX_NOTIFYING_REPLICAS
    }

    pub(super) fn set_replica_id(&self, id: Option<ReplicaId>) {
        *self.replica_id.lock().unwrap_or_else(PoisonError::into_inner) = id;
    }
}
