//! The input of the replica task: events of its state machine, and the results of its requests.

use crate::{
    domain::lease::{AttemptId, replica::ReplicaEvent},
    store::{LogHead, StoreError, replica_registry::RenewalOutcome},
};

/// An input of the replica task.
pub(super) enum ReplicaTaskInput {
    /// An event of the state machine.
    Event(ReplicaEvent),
    /// The result of a renewal.
    Renewed(AttemptId, Box<RenewalOutcome>),
    /// A snapshot was loaded into the index.
    Loaded(AttemptId, LogHead),
    /// The database is damaged; retrying does not help.
    Damaged(StoreError),
}

pub(super) fn failed_input(attempt: AttemptId) -> ReplicaTaskInput {
    ReplicaTaskInput::Event(ReplicaEvent::Failed { attempt })
}

pub(super) fn log_failure(attempt: AttemptId, what: &str, error: &StoreError) -> ReplicaTaskInput {
    tracing::warn!(error = error as &dyn std::error::Error, what, "database request failed: retrying");
    failed_input(attempt)
}
