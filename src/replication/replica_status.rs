//! What the replica task publishes about itself, for metrics, health and the tasks next to it.

use std::sync::{
    Mutex, PoisonError,
    atomic::{AtomicU64, Ordering},
};

use crate::domain::lease::{ReplicaId, replica::ReplicaState};

use super::{
    ack_tracker::{AckTracker, MAX_NOTIFYING_REPLICAS},
    clock_offset::ClockOffset,
};

/// What is to be seen of a replica from outside.
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
    /// The row that this process holds.
    #[must_use]
    pub fn replica_id(&self) -> Option<ReplicaId> {
        *self.replica_id.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How it stands with the database.
    #[must_use]
    pub fn state(&self) -> Option<ReplicaState> {
        *self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many renewals were answered, how many requests failed, and how often the clock stood still.
    #[must_use]
    pub fn counters(&self) -> [u64; 3] {
        [&self.renewals, &self.failures, &self.clock_stall_count].map(|count| count.load(Ordering::Relaxed))
    }

    /// How many replicas there are, as the newest renewal said.
    #[must_use]
    pub fn replica_count(&self) -> u64 {
        self.replica_count.load(Ordering::Relaxed)
    }

    /// How far this machine's wall clock is from the database's.
    #[must_use]
    pub fn clock_offset(&self) -> &ClockOffset {
        &self.clock_offset
    }

    /// What the others have told of their acknowledgments.
    pub(super) fn ack_tracker(&self) -> &AckTracker {
        &self.ack_tracker
    }

    /// Whether replicas tell what they acknowledge.
    pub(super) fn has_ack_notifications(&self) -> bool {
        self.replica_count() <= MAX_NOTIFYING_REPLICAS
    }

    pub(super) fn set_replica_id(&self, id: Option<ReplicaId>) {
        *self.replica_id.lock().unwrap_or_else(PoisonError::into_inner) = id;
    }
}
