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
pub struct ReplicaDependencies {
    /// Stores the keys and the log.
    pub store: Arc<dyn Store>,
    /// Stores the rows of the replicas.
    pub registry: Arc<dyn ReplicaRegistry>,
    /// Applies log entries to the index.
    pub log_applier: Arc<LogApplier>,
    /// The lease that Checks read.
    pub lease: Arc<ServingLease>,
    /// What the replica publishes about itself.
    pub status: Arc<ReplicaStatus>,
    /// The clock of this process.
    pub clock: Arc<dyn Clock>,
    /// The source of random IDs.
    pub entropy: Arc<dyn EntropySource>,
    /// The name of this replica, for operators.
    pub name: String,
    /// How long revoked keys stay in the index.
    pub retention: Duration,
}
