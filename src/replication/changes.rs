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
    domain::lease::replica::Event,
    store::{
        StoreError,
        fleet::{Fleet, Hint},
        writer::Follower,
    },
};

use super::{
    feed::{Input, Sight, diverged},
    follow::Follow,
};

/// How often the log is read where hints do not come.
const POLL: Duration = Duration::from_millis(250);
/// The pause after a failure; it doubles with each that follows.
const FIRST_BACKOFF: Duration = Duration::from_millis(100);
const LONGEST_BACKOFF: Duration = Duration::from_secs(5);

/// Tells the machine how far the map has come by other ways than its renewals, and what of it others wait to hear.
pub(super) async fn moves(follow: Arc<Follow>, answers: mpsc::Sender<Input>) {
    let (mut moves, mut hearings) = (follow.moves(), follow.hearings());
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
        let hint = heard.then_some(Event::Hint);
        for event in [Event::Advanced { to }].into_iter().chain(hint) {
            if answers.send(Input::Event(event)).await.is_err() {
                return;
            }
        }
    }
}

/// Tells the machine when one of this process's own commits has met another history.
pub(super) async fn divergences(follow: Arc<Follow>, answers: mpsc::Sender<Input>) {
    let mut broken = follow.divergences();
    while broken.changed().await.is_ok() {
        let met = *broken.borrow_and_update();
        if let Some(event) = met.and_then(|broken| diverged(broken, &follow))
            && answers.send(Input::Event(event)).await.is_err()
        {
            return;
        }
    }
}

/// Whether one of these rules is left out.
#[cfg(keyward_breakable)]
fn left_out(rules: &[crate::domain::lease::Rule]) -> bool {
    use crate::domain::lease::{Kept, Rules as _};
    rules.iter().any(|rule| !Kept.keep(*rule))
}

/// Waits before a renewal's changes are applied, where that is to be late: a window of microseconds becomes wide enough to
/// be hit.
#[cfg(keyward_breakable)]
pub(super) async fn stall() {
    use crate::domain::lease::Rule;
    if left_out(&[Rule::ApplyBeforeAck, Rule::MapBeforeDeadline]) {
        sleep(Duration::from_millis(60)).await;
    }
}

/// Whether nothing but renewals is to bring changes, as where every hint is lost: some rules matter only there.
#[cfg(keyward_breakable)]
fn is_deaf() -> bool {
    use crate::domain::lease::Rule;
    left_out(&[Rule::ApplyBeforeAck, Rule::MapBeforeDeadline, Rule::DeadlineBeforeLookUp])
}

/// Reads the log when others commit, or seem to.
pub(super) async fn listen(
    fleet: Arc<dyn Fleet>,
    follow: Arc<Follow>,
    sight: Arc<Sight>,
    answers: mpsc::Sender<Input>,
) {
    #[cfg(keyward_breakable)]
    if is_deaf() {
        return std::future::pending().await;
    }
    let (hinted, hears) = (Notify::new(), AtomicBool::new(false));
    tokio::join!(
        hear(&*fleet, &follow, &sight, &hinted, &hears),
        read(&*fleet, &follow, &answers, &hinted, &hears)
    );
}

async fn hear(fleet: &dyn Fleet, follow: &Follow, sight: &Sight, hinted: &Notify, hears: &AtomicBool) {
    let mut backoff = FIRST_BACKOFF;
    let hear = |does: bool| {
        hears.store(does, Ordering::Relaxed);
        sight.acks().set_hears(does);
    };
    loop {
        let hint = fleet.hint().await;
        hear(hint.is_ok());
        match hint {
            Ok(hint) => {
                backoff = FIRST_BACKOFF;
                match hint {
                    Hint::Acknowledged { replica, upto } => {
                        sight.acks().told(replica, upto);
                        continue;
                    }
                    // Whoever commits takes it in without a reading.
                    Hint::Own => continue,
                    // Another hint, or a renewal, has brought it.
                    Hint::Committed(Some(upto)) if upto <= Follower::revision(follow) => continue,
                    Hint::Committed(_) => {}
                }
            }
            Err(error) => {
                tracing::debug!(
                    error = &error as &dyn std::error::Error,
                    "no notifications; the log is polled"
                );
                sleep(backoff).await;
                backoff = (backoff * 2).min(LONGEST_BACKOFF);
            }
        }
        hinted.notify_one();
    }
}

async fn read(
    fleet: &dyn Fleet,
    follow: &Follow,
    answers: &mpsc::Sender<Input>,
    hinted: &Notify,
    hears: &AtomicBool,
) {
    loop {
        if hears.load(Ordering::Relaxed) {
            hinted.notified().await;
        } else {
            // A hint or the time: both are reasons to look.
            let _ = timeout(POLL, hinted.notified()).await;
        }
        match read_once(fleet, follow).await {
            Ok(event) => {
                if let Some(event) = event
                    && answers.send(Input::Event(event)).await.is_err()
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
async fn read_once(fleet: &dyn Fleet, follow: &Follow) -> Result<Option<Event>, StoreError> {
    let Some(at) = follow.at() else { return Ok(None) };
    let rows = fleet.follow(at.revision).await?;
    Ok(follow.hear(rows)?.err().and_then(|broken| diverged(broken, follow)))
}
