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
pub(super) async fn forward_positions(follow: Arc<LogApplier>, answers: mpsc::Sender<ReplicaTaskInput>) {
    let (mut moves, mut hearings) = (follow.subscribe_position(), follow.subscribe_ack_requests());
    loop {
        let (at, heard) = tokio::select! {
            moved = moves.changed() => match moved {
                Ok(()) => (*moves.borrow_and_update(), false),
                Err(_) => return,
            },
            heard = hearings.changed() => match heard {
                Ok(()) => (*hearings.borrow_and_update(), true),
                Err(_) => return,
            },
        };
        let Some(to) = at else { continue };
        let hint = heard.then_some(ReplicaEvent::Hint);
        for event in [ReplicaEvent::Advanced { to }].into_iter().chain(hint) {
            if answers.send(ReplicaTaskInput::Event(event)).await.is_err() {
                return;
            }
        }
    }
}

/// Tells the machine when one of this process's own commits has met another history.
pub(super) async fn forward_divergences(follow: Arc<LogApplier>, answers: mpsc::Sender<ReplicaTaskInput>) {
    let mut broken = follow.subscribe_divergence();
    while broken.changed().await.is_ok() {
        let met = *broken.borrow_and_update();
        if let Some(event) = met.and_then(|broken| follow.divergence_event(broken))
            && answers.send(ReplicaTaskInput::Event(event)).await.is_err()
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
    fleet: Arc<dyn ReplicaRegistry>,
    follow: Arc<LogApplier>,
    sight: Arc<ReplicaStatus>,
    answers: mpsc::Sender<ReplicaTaskInput>,
) {
    #[cfg(keyward_breakable)]
    if are_notifications_disabled() {
        return std::future::pending().await;
    }
    let (hinted, hears) = (Notify::new(), AtomicBool::new(false));
    tokio::join!(
        receive_notifications(&*fleet, &follow, &sight, &hinted, &hears),
        poll_log(&*fleet, &follow, &answers, &hinted, &hears)
    );
}

async fn receive_notifications(
    fleet: &dyn ReplicaRegistry,
    follow: &LogApplier,
    sight: &ReplicaStatus,
    hinted: &Notify,
    hears: &AtomicBool,
) {
    let mut backoff = INITIAL_BACKOFF;
    let hear = |does: bool| {
        hears.store(does, Ordering::Relaxed);
        sight.ack_tracker().set_receiving(does);
    };
    loop {
        let hint = fleet.next_notification().await;
        hear(hint.is_ok());
        match hint {
            Ok(hint) => {
                backoff = INITIAL_BACKOFF;
                match hint {
                    ReplicaNotification::Acknowledged { replica, up_to: upto } => {
                        sight.ack_tracker().record_ack(replica, upto);
                        continue;
                    }
                    // Whoever commits takes it in without a reading.
                    ReplicaNotification::OwnCommit => continue,
                    // Another hint, or a renewal, has brought it.
                    ReplicaNotification::Committed(Some(upto))
                        if upto <= ChangeListener::applied_revision(follow) =>
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
        hinted.notify_one();
    }
}

async fn poll_log(
    fleet: &dyn ReplicaRegistry,
    follow: &LogApplier,
    answers: &mpsc::Sender<ReplicaTaskInput>,
    hinted: &Notify,
    hears: &AtomicBool,
) {
    loop {
        if hears.load(Ordering::Relaxed) {
            hinted.notified().await;
        } else {
            // A hint or the time: both are reasons to look.
            let _ = timeout(POLL_INTERVAL, hinted.notified()).await;
        }
        match read_new_entries(fleet, follow).await {
            Ok(event) => {
                if let Some(event) = event
                    && answers.send(ReplicaTaskInput::Event(event)).await.is_err()
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
    fleet: &dyn ReplicaRegistry,
    follow: &LogApplier,
) -> Result<Option<ReplicaEvent>, StoreError> {
    let Some(at) = follow.position() else { return Ok(None) };
    let rows = fleet.fetch_changes_after(at.revision).await?;
    Ok(follow.apply_and_request_ack(rows)?.err().and_then(|broken| follow.divergence_event(broken)))
}
