//! Removes the rows of dead replicas: drives the collector of `domain::lease`.

use std::{sync::Arc, time::Duration};

use tokio::time::sleep;

use super::replica_status::ReplicaStatus;
use crate::{
    clock::Clock,
    domain::lease::{
        BootInstant, LeaseDuration, ReplicaCollector, ReplicaId,
        collector::{CollectorAction, CollectorEvent},
    },
    store::replica_registry::ReplicaRegistry,
};

/// Runs until the task is aborted.
pub(super) async fn run_reaper(
    registry: Arc<dyn ReplicaRegistry>,
    clock: Arc<dyn Clock>,
    status: Arc<ReplicaStatus>,
    lease: LeaseDuration,
) {
    let mut collector = ReplicaCollector::new(lease);
    loop {
        let mut actions = collector.handle(CollectorEvent::Tick, clock.boottime());
        while let Some(action) = actions.pop() {
            match action {
                CollectorAction::ListRows { attempt } => {
                    let event = match registry.list_replicas(&[]).await {
                        Ok(snapshot) => {
                            status.ack_tracker().update_replicas(&snapshot);
                            CollectorEvent::Listed { attempt, listing: snapshot.listing }
                        }
                        Err(_) => CollectorEvent::Failed { attempt },
                    };
                    actions.extend(collector.handle(event, clock.boottime()));
                }
                CollectorAction::RemoveRow { id, renew_seq } => {
                    remove_dead_replica(&*registry, id, renew_seq).await
                }
            }
        }
        let due =
            collector.wake_at().unwrap_or(BootInstant::FOREVER).saturating_duration_since(clock.boottime());
        sleep(due.max(Duration::from_millis(10))).await;
    }
}

async fn remove_dead_replica(registry: &dyn ReplicaRegistry, id: ReplicaId, renew_seq: u64) {
    match registry.deregister(id, Some(renew_seq)).await {
        Ok(true) => tracing::warn!(replica = %id.0, "dead replica removed: silent for four leases"),
        // The replica has renewed meanwhile, or another process has removed it.
        Ok(false) => {}
        Err(error) => {
            tracing::debug!(error = &error as &dyn std::error::Error, "removing a dead replica failed");
        }
    }
}
