//! The decision log: what was decided about whom and why, and what was taken away by whom. Each line has an id, by
//! which other logs can name it. No line ever holds a token.
//!
//! Of decisions some are written down, as the settings say; of changes that take something away, all. Whoever decides
//! hands a record over and goes on: what waits is bounded, and what finds no room is lost and counted. Here: which
//! are written down, and what of them. `write`: where to. `narrowing`: which changes take something away.

mod queue;
mod record;
mod restrictions;
mod settings;
mod writer;

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::sync::mpsc;
use uuid::Uuid;

use crate::{
    clock::{Clock, EntropySource, random_bytes},
    domain::policy_decision::Reason,
    engine::index::Index,
    log_throttle::LogThrottle,
    store::group_commit::ChangeListener,
    trace::{RandomIds, sampling_threshold},
};

use queue::{DecisionLogState, QUEUE_CAPACITY, WriterMessage};
use record::DecisionRecord;
pub use record::{DecisionInput, DecisionSource};
pub use settings::{DecisionLogSettings, DecisionLogTarget};
use writer::WriterThread;

/// The way to the decision log; clones lead to the same one.
#[derive(Clone, Default)]
pub struct DecisionLog(Option<Arc<DecisionLogState>>);

impl std::fmt::Debug for DecisionLog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DecisionLog").field("on", &self.0.is_some()).finish_non_exhaustive()
    }
}

impl DecisionLog {
    /// None is written down.
    #[must_use]
    pub fn disabled() -> DecisionLog {
        DecisionLog(None)
    }

    /// Opens the log. The second is to be ended last.
    ///
    /// # Errors
    /// When the file cannot be opened, or the system gives no random number or no thread.
    pub fn open(
        settings: &DecisionLogSettings,
        clock: Arc<dyn Clock>,
        entropy: &dyn EntropySource,
    ) -> anyhow::Result<(DecisionLog, DecisionLogWriter)> {
        let (records, waiting) = mpsc::channel(QUEUE_CAPACITY);
        let log = Arc::new(DecisionLogState {
            records,
            dropped: AtomicU64::new(0),
            denial_threshold: sampling_threshold(settings.denial_ratio),
            allowed_threshold: sampling_threshold(settings.allowed_ratio),
            denial_throttle: LogThrottle::per_second(settings.denials_per_second),
            log_restricting_changes: settings.log_restricting_changes,
            ids: RandomIds::with_seed(u64::from_be_bytes(random_bytes(entropy)?)),
            clock,
        });
        let writing = WriterThread::start(&settings.target, waiting, Arc::downgrade(&log))?;
        Ok((DecisionLog(Some(log.clone())), DecisionLogWriter { log, writer_thread: writing }))
    }

    /// Writes a decision down, if it is one of those that are. Gives its id then.
    pub fn record_check<'a>(
        &self,
        reason: Reason,
        facts: impl FnOnce() -> DecisionInput<'a>,
    ) -> Option<Uuid> {
        self.record_if_sampled(reason == Reason::Ok, facts)
    }

    /// The same of what the engine was not asked about.
    pub(crate) fn record_if_sampled<'a>(
        &self,
        allowed: bool,
        facts: impl FnOnce() -> DecisionInput<'a>,
    ) -> Option<Uuid> {
        let log = self.0.as_ref()?;
        let threshold = if allowed { log.allowed_threshold } else { log.denial_threshold };
        // Most are not, and pay for nothing else.
        if threshold == 0 || !log.ids.next_id().derive_independent().is_below(threshold) {
            return None;
        }
        let now = log.clock.now();
        if !allowed && !log.denial_throttle.allow(now) {
            return None;
        }
        let id = log.ids.next_id().uuid(now.as_millis());
        log.enqueue(DecisionRecord::from_decision(id, now, &facts())).then_some(id)
    }

    /// What follows this process's commits, writing down what they take away before `follower` hears of them.
    #[must_use]
    pub(crate) fn wrap_listener(
        &self,
        follower: Arc<dyn ChangeListener>,
        index: Arc<Index>,
    ) -> Arc<dyn ChangeListener> {
        match &self.0 {
            Some(log) if log.log_restricting_changes => {
                Arc::new(restrictions::RestrictionListener::new(log.clone(), follower, index))
            }
            _ => follower,
        }
    }

    /// How many records were not written down for want of room, or since they could not be.
    #[must_use]
    pub(crate) fn dropped(&self) -> u64 {
        self.0.as_ref().map_or(0, |log| log.dropped.load(Ordering::Relaxed))
    }
}

/// What ends the log.
pub struct DecisionLogWriter {
    log: Arc<DecisionLogState>,
    writer_thread: WriterThread,
}

impl std::fmt::Debug for DecisionLogWriter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("DecisionLogWriter")
    }
}

impl DecisionLogWriter {
    /// Writes down what waits, as far as there is time.
    pub async fn stop(self, patience: Duration) {
        let DecisionLogWriter { log, writer_thread: writing } = self;
        let ended = async {
            // The writer may have ended already: then there is nothing to tell it.
            let _ = log.records.send(WriterMessage::Stop).await;
            writing.join().await;
        };
        if tokio::time::timeout(patience, ended).await.is_err() {
            tracing::warn!("the last decisions were not written down in time");
        }
    }
}
