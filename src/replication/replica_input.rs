//! What the replica task receives: events of its state machine, and the results of the requests that it has sent.

use crate::{
    domain::lease::{AttemptId, replica::ReplicaEvent},
    store::{LogHead, StoreError, replica_registry::RenewalOutcome},
};

/// What comes to the task.
pub(super) enum ReplicaTaskInput {
    /// An event of the machine's.
    Event(ReplicaEvent),
    /// A renewal's answer.
    Renewed(AttemptId, Box<RenewalOutcome>),
    /// A snapshot is in the index.
    Loaded(AttemptId, LogHead),
    /// The database is damaged, which no other try mends.
    Damaged(StoreError),
}

pub(super) fn failed_input(attempt: AttemptId) -> ReplicaTaskInput {
    ReplicaTaskInput::Event(ReplicaEvent::Failed { attempt })
}

pub(super) fn log_failure(attempt: AttemptId, what: &str, error: &StoreError) -> ReplicaTaskInput {
    tracing::warn!(
        error = error as &dyn std::error::Error,
        what,
        "a request to the database failed; it is tried again"
    );
    failed_input(attempt)
}
