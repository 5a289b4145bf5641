//! What a replica is made of: passed once at the start, shared by its tasks.

use std::{sync::Arc, time::Duration};

use crate::{
    clock::{Clock, EntropySource},
    engine::serving_lease::ServingLease,
    store::{Store, replica_registry::ReplicaRegistry},
};

use super::{log_applier::LogApplier, replica_status::ReplicaStatus};

/// What a replica is made of.
#[derive(Clone)]
pub struct ReplicaDependencies {
    /// The keys and the log.
    pub store: Arc<dyn Store>,
    /// The replicas' rows.
    pub registry: Arc<dyn ReplicaRegistry>,
    /// The way into the index.
    pub log_applier: Arc<LogApplier>,
    /// What Checks ask.
    pub lease: Arc<ServingLease>,
    /// What is to be seen of it.
    pub status: Arc<ReplicaStatus>,
    /// Tells the time.
    pub clock: Arc<dyn Clock>,
    /// Gives ids.
    pub entropy: Arc<dyn EntropySource>,
    /// What people call this replica.
    pub name: String,
    /// How long revoked keys stay known.
    pub retention: Duration,
}
