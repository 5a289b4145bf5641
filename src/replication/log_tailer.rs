//! Applies changes faster than renewals do: tails the log when another process seems to have committed,
//! and forwards the new positions.
//!
//! Correctness does not depend on it: each renewal brings what is missing.
//!
//! Notifications may never arrive, because a pooler can drop them. So the log is polled four times
//! a second until one arrives.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::{Notify, mpsc},
    time::{sleep, timeout},
};

use crate::{
    domain::lease::replica::ReplicaEvent,
    store::{
        StoreError,
        group_commit::ChangeListener,
        replica_registry::{ReplicaNotification, ReplicaRegistry},
    },
};

use super::{log_applier::LogApplier, replica_input::ReplicaTaskInput, replica_status::ReplicaStatus};

/// How often the log is polled while no notifications arrive.
const POLL_INTERVAL: Duration = Duration::from_millis(250);
/// The pause after a failure; it doubles up to the maximum.
const INITIAL_BACKOFF: Duration = Duration::from_millis(100);
const MAX_BACKOFF: Duration = Duration::from_secs(5);

/// Forwards the positions of the index to the state machine, and requests acknowledgments that others may wait for.
pub(super) async fn forward_positions(log_applier: Arc<LogApplier>, inputs: mpsc::Sender<ReplicaTaskInput>) {
    let (mut positions, mut ack_requests) =
        (log_applier.subscribe_position(), log_applier.subscribe_ack_requests());
    loop {
        let (at, needs_ack) = tokio::select! {
            moved = positions.changed() => match moved {
                Ok(()) => (*positions.borrow_and_update(), false),
                Err(_) => return,
            },
            requested = ack_requests.changed() => match requested {
                Ok(()) => (*ack_requests.borrow_and_update(), true),
                Err(_) => return,
            },
        };
        let Some(to) = at else { continue };
        let hint = needs_ack.then_some(ReplicaEvent::Hint);
        for event in [ReplicaEvent::Advanced { to }].into_iter().chain(hint) {
            if inputs.send(ReplicaTaskInput::Event(event)).await.is_err() {
                return;
            }
        }
    }
}

/// Forwards the errors of own commits that met another history.
pub(super) async fn forward_divergences(
    log_applier: Arc<LogApplier>,
    inputs: mpsc::Sender<ReplicaTaskInput>,
) {
    let mut divergence = log_applier.subscribe_divergence();
    while divergence.changed().await.is_ok() {
        let error = *divergence.borrow_and_update();
        if let Some(event) = error.and_then(|divergence| log_applier.divergence_event(divergence))
            && inputs.send(ReplicaTaskInput::Event(event)).await.is_err()
        {
            return;
        }
    }
}

/// Returns whether fault injection disables one of these invariants.
#[cfg(keyward_breakable)]
fn is_any_disabled(rules: &[crate::domain::lease::LeaseInvariant]) -> bool {
    use crate::domain::lease::{AllInvariants, InvariantSet as _};
    rules.iter().any(|rule| !AllInvariants.enforces(*rule))
}

/// Delays the entries of a renewal if fault injection disables an invariant, so that tests
/// hit a window of microseconds.
#[cfg(keyward_breakable)]
pub(super) async fn delay_apply() {
    use crate::domain::lease::LeaseInvariant;
    if is_any_disabled(&[LeaseInvariant::ApplyBeforeAck, LeaseInvariant::MapBeforeDeadline]) {
        sleep(Duration::from_millis(60)).await;
    }
}

/// Returns whether only renewals may deliver changes, as if every notification was lost:
/// some invariants matter only then.
#[cfg(keyward_breakable)]
fn are_notifications_disabled() -> bool {
    use crate::domain::lease::LeaseInvariant;
    is_any_disabled(&[
        LeaseInvariant::ApplyBeforeAck,
        LeaseInvariant::MapBeforeDeadline,
        LeaseInvariant::DeadlineBeforeLookUp,
    ])
}

/// Tails the log: reads it after notifications, and polls it while there are none.
pub(super) async fn tail_log(
    registry: Arc<dyn ReplicaRegistry>,
    log_applier: Arc<LogApplier>,
    status: Arc<ReplicaStatus>,
    inputs: mpsc::Sender<ReplicaTaskInput>,
) {
    #[cfg(keyward_breakable)]
    if are_notifications_disabled() {
        return std::future::pending().await;
    }
    let (poll_now, is_receiving) = (Notify::new(), AtomicBool::new(false));
    tokio::join!(
        receive_notifications(&*registry, &log_applier, &status, &poll_now, &is_receiving),
        poll_log(&*registry, &log_applier, &inputs, &poll_now, &is_receiving)
    );
}

async fn receive_notifications(
    registry: &dyn ReplicaRegistry,
    log_applier: &LogApplier,
    status: &ReplicaStatus,
    poll_now: &Notify,
    is_receiving: &AtomicBool,
) {
    let mut backoff = INITIAL_BACKOFF;
    let set_receiving = |receiving: bool| {
        is_receiving.store(receiving, Ordering::Relaxed);
        status.ack_tracker().set_receiving(receiving);
    };
    loop {
        let hint = registry.next_notification().await;
        set_receiving(hint.is_ok());
        match hint {
            Ok(hint) => {
                backoff = INITIAL_BACKOFF;
                match hint {
                    ReplicaNotification::Acknowledged { replica, up_to } => {
                        status.ack_tracker().record_ack(replica, up_to);
                        continue;
                    }
                    // The committing process applies its own entry.
                    ReplicaNotification::OwnCommit => continue,
                    // Another notification or a renewal has delivered it.
                    ReplicaNotification::Committed(Some(up_to))
                        if up_to <= ChangeListener::applied_revision(log_applier) =>
                    {
                        continue;
                    }
                    ReplicaNotification::Committed(_) => {}
                }
            }
            Err(error) => {
                tracing::debug!(
                    error = &error as &dyn std::error::Error,
                    "no notifications: polling the log"
                );
                sleep(backoff).await;
                backoff = (backoff * 2).min(MAX_BACKOFF);
            }
        }
        poll_now.notify_one();
    }
}

async fn poll_log(
    registry: &dyn ReplicaRegistry,
    log_applier: &LogApplier,
    inputs: &mpsc::Sender<ReplicaTaskInput>,
    poll_now: &Notify,
    is_receiving: &AtomicBool,
) {
    loop {
        if is_receiving.load(Ordering::Relaxed) {
            poll_now.notified().await;
        } else {
            // A notification or the timeout: both are reasons to read.
            let _ = timeout(POLL_INTERVAL, poll_now.notified()).await;
        }
        match read_new_entries(registry, log_applier).await {
            Ok(event) => {
                if let Some(event) = event
                    && inputs.send(ReplicaTaskInput::Event(event)).await.is_err()
                {
                    return;
                }
            }
            // The next renewal fails too, and logs it.
            Err(error) => tracing::debug!(error = &error as &dyn std::error::Error, "reading the log failed"),
        }
    }
}

/// Applies the newest entries of the log. Returns an event if they do not follow the applied ones.
async fn read_new_entries(
    registry: &dyn ReplicaRegistry,
    log_applier: &LogApplier,
) -> Result<Option<ReplicaEvent>, StoreError> {
    let Some(at) = log_applier.position() else { return Ok(None) };
    let entries = registry.fetch_changes_after(at.revision).await?;
    Ok(log_applier
        .apply_and_request_ack(entries)?
        .err()
        .and_then(|divergence| log_applier.divergence_event(divergence)))
}
