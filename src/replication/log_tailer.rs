//! What is quicker than renewals: this process's own commits, and reading the log when somebody else seems to have
//! committed. A hint may never come, where a pooler drops notifications; so until one has been heard, the log is read
//! four times a second. The truth never depends on either: each renewal brings what is lacking.

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

/// How often the log is read where hints do not come.
const POLL_INTERVAL: Duration = Duration::from_millis(250);
/// The pause after a failure; it doubles with each that follows.
const INITIAL_BACKOFF: Duration = Duration::from_millis(100);
const MAX_BACKOFF: Duration = Duration::from_secs(5);

/// Tells the machine how far the map has come by other ways than its renewals, and what of it others wait to hear.
pub(super) async fn forward_positions(log_applier: Arc<LogApplier>, inputs: mpsc::Sender<ReplicaTaskInput>) {
    let (mut positions, mut ack_requests) =
        (log_applier.subscribe_position(), log_applier.subscribe_ack_requests());
    loop {
        let (at, heard) = tokio::select! {
            moved = positions.changed() => match moved {
                Ok(()) => (*positions.borrow_and_update(), false),
                Err(_) => return,
            },
            heard = ack_requests.changed() => match heard {
                Ok(()) => (*ack_requests.borrow_and_update(), true),
                Err(_) => return,
            },
        };
        let Some(to) = at else { continue };
        let hint = heard.then_some(ReplicaEvent::Hint);
        for event in [ReplicaEvent::Advanced { to }].into_iter().chain(hint) {
            if inputs.send(ReplicaTaskInput::Event(event)).await.is_err() {
                return;
            }
        }
    }
}

/// Tells the machine when one of this process's own commits has met another history.
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

/// Whether one of these rules is left out.
#[cfg(keyward_breakable)]
fn is_any_disabled(rules: &[crate::domain::lease::LeaseInvariant]) -> bool {
    use crate::domain::lease::{AllInvariants, InvariantSet as _};
    rules.iter().any(|rule| !AllInvariants.enforces(*rule))
}

/// Waits before a renewal's changes are applied, where that is to be late: a window of microseconds becomes wide enough to
/// be hit.
#[cfg(keyward_breakable)]
pub(super) async fn delay_apply() {
    use crate::domain::lease::LeaseInvariant;
    if is_any_disabled(&[LeaseInvariant::ApplyBeforeAck, LeaseInvariant::MapBeforeDeadline]) {
        sleep(Duration::from_millis(60)).await;
    }
}

/// Whether nothing but renewals is to bring changes, as where every hint is lost: some rules matter only there.
#[cfg(keyward_breakable)]
fn are_notifications_disabled() -> bool {
    use crate::domain::lease::LeaseInvariant;
    is_any_disabled(&[
        LeaseInvariant::ApplyBeforeAck,
        LeaseInvariant::MapBeforeDeadline,
        LeaseInvariant::DeadlineBeforeLookUp,
    ])
}

/// Reads the log when others commit, or seem to.
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
                    // Whoever commits takes it in without a reading.
                    ReplicaNotification::OwnCommit => continue,
                    // Another hint, or a renewal, has brought it.
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
                    "no notifications; the log is polled"
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
            // A hint or the time: both are reasons to look.
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
            // The next renewal finds out too, and says so.
            Err(error) => tracing::debug!(error = &error as &dyn std::error::Error, "the log was not read"),
        }
    }
}

/// Takes what the log has more. What does not fit is an event.
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
