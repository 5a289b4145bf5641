//! Drives the collector: removes the rows of replicas that are dead.

use std::{sync::Arc, time::Duration};

use tokio::time::sleep;

use super::feed::Sight;
use crate::{
    clock::Clock,
    domain::lease::{
        Boottime, Collector, Lease, ReplicaId,
        collector::{Action, Event},
    },
    store::fleet::Fleet,
};

/// Watches over the rows for as long as it runs.
pub(super) async fn run(fleet: Arc<dyn Fleet>, clock: Arc<dyn Clock>, sight: Arc<Sight>, lease: Lease) {
    let mut machine = Collector::new(lease);
    loop {
        let mut actions = machine.on(Event::Tick, clock.boottime());
        while let Some(action) = actions.pop() {
            match action {
                Action::List { attempt } => {
                    let event = match fleet.roster(&[]).await {
                        Ok(roster) => {
                            sight.acks().listed(&roster);
                            Event::Listed { attempt, listing: roster.listing }
                        }
                        Err(_) => Event::Failed { attempt },
                    };
                    actions.extend(machine.on(event, clock.boottime()));
                }
                Action::Remove { id, renew_seq } => remove(&*fleet, id, renew_seq).await,
            }
        }
        let due = machine.wake_at().unwrap_or(Boottime::FOREVER).since(clock.boottime());
        sleep(due.max(Duration::from_millis(10))).await;
    }
}

async fn remove(fleet: &dyn Fleet, id: ReplicaId, renew_seq: u64) {
    match fleet.remove(id, Some(renew_seq)).await {
        Ok(true) => tracing::warn!(replica = %id.0, "a replica that was silent for four leases was removed"),
        // It has spoken, or another has removed it.
        Ok(false) => {}
        Err(error) => {
            tracing::debug!(error = &error as &dyn std::error::Error, "a dead replica's row was not removed");
        }
    }
}
