//! The decision log: records decisions of Checks and the gateway, and changes that restrict rights.
//!
//! Each record has an id, by which other logs can refer to it. No record contains a token. Decisions are sampled by the
//! settings; restricting changes are always recorded.
//!
//! A caller queues a record and continues. The queue is bounded; records that do not fit are dropped and counted.
//! `writer` writes the records; `restrictions` finds the changes that restrict rights.

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

/// A handle to the decision log; clones share one log.
#[derive(Clone, Default)]
pub struct DecisionLog(Option<Arc<DecisionLogState>>);

impl std::fmt::Debug for DecisionLog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DecisionLog").field("on", &self.0.is_some()).finish_non_exhaustive()
    }
}

impl DecisionLog {
    /// A log that records nothing.
    #[must_use]
    pub fn disabled() -> DecisionLog {
        DecisionLog(None)
    }

    /// Opens the log. The writer must be stopped after everything that logs.
    ///
    /// # Errors
    /// If the file cannot be opened, or the system provides no random number or no thread.
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
        let writer_thread = WriterThread::start(&settings.target, waiting, Arc::downgrade(&log))?;
        Ok((DecisionLog(Some(log.clone())), DecisionLogWriter { log, writer_thread }))
    }

    /// Records the decision of a Check, if it is sampled. Returns the record's id.
    pub fn record_check<'a>(
        &self,
        reason: Reason,
        input: impl FnOnce() -> DecisionInput<'a>,
    ) -> Option<Uuid> {
        self.record_if_sampled(reason == Reason::Ok, input)
    }

    /// Records a decision that was made without the engine, if it is sampled. Returns the record's id.
    pub(crate) fn record_if_sampled<'a>(
        &self,
        allowed: bool,
        input: impl FnOnce() -> DecisionInput<'a>,
    ) -> Option<Uuid> {
        let log = self.0.as_ref()?;
        let threshold = if allowed { log.allowed_threshold } else { log.denial_threshold };
        // Most decisions are not sampled and must cost nothing else.
        if threshold == 0 || !log.ids.next_id().derive_independent().is_below(threshold) {
            return None;
        }
        let now = log.clock.now();
        if !allowed && !log.denial_throttle.allow(now) {
            return None;
        }
        let id = log.ids.next_id().uuid(now.as_millis());
        log.enqueue(DecisionRecord::from_decision(id, now, &input())).then_some(id)
    }

    /// Wraps the listener of this process's commits: restricting changes are recorded before `inner` applies them.
    #[must_use]
    pub(crate) fn wrap_listener(
        &self,
        inner: Arc<dyn ChangeListener>,
        index: Arc<Index>,
    ) -> Arc<dyn ChangeListener> {
        match &self.0 {
            Some(log) if log.log_restricting_changes => {
                Arc::new(restrictions::RestrictionListener::new(log.clone(), inner, index))
            }
            _ => inner,
        }
    }

    /// Number of records that were dropped because the queue was full or writing failed.
    #[must_use]
    pub(crate) fn dropped(&self) -> u64 {
        self.0.as_ref().map_or(0, |log| log.dropped.load(Ordering::Relaxed))
    }
}

/// Stops the log at the end of the process.
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
    /// Writes the queued records, within the time limit.
    pub async fn stop(self, timeout: Duration) {
        let DecisionLogWriter { log, writer_thread } = self;
        let ended = async {
            // The writer thread may have ended already.
            let _ = log.records.send(WriterMessage::Stop).await;
            writer_thread.join().await;
        };
        if tokio::time::timeout(timeout, ended).await.is_err() {
            tracing::warn!("the last decisions were not written in time");
        }
    }
}
