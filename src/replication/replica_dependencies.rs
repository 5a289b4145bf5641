//! The dependencies of a replica: passed once at the start, shared by its tasks.

use std::{sync::Arc, time::Duration};

use crate::{
    clock::{Clock, EntropySource},
    engine::serving_lease::ServingLease,
    store::{Store, replica_registry::ReplicaRegistry},
};

use super::{log_applier::LogApplier, replica_status::ReplicaStatus};

/// The dependencies of a replica.
#[derive(Clone)]
pub(crate) struct ReplicaDependencies {
    /// Stores the keys and the log.
    pub(crate) store: Arc<dyn Store>,
    /// Stores the rows of the replicas.
    pub(crate) registry: Arc<dyn ReplicaRegistry>,
    /// Applies log entries to the index.
    pub(crate) log_applier: Arc<LogApplier>,
    /// The lease that Checks read.
    pub(crate) lease: Arc<ServingLease>,
    /// What the replica publishes about itself.
    pub(crate) status: Arc<ReplicaStatus>,
    /// The clock of this process.
    pub(crate) clock: Arc<dyn Clock>,
    /// The source of random IDs.
    pub(crate) entropy: Arc<dyn EntropySource>,
    /// The name of this replica, for operators.
    pub(crate) name: String,
    /// How long revoked keys stay in the index.
    pub(crate) retention: Duration,
}
