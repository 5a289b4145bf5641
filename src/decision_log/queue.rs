//! The bounded queue between the tasks that decide and the thread that writes, and the state that they share.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use tokio::sync::mpsc;

use crate::{clock::Clock, log_throttle::LogThrottle, trace::RandomIds};

use super::record::DecisionRecord;

/// Records that may wait, about 1 KB each.
pub(super) const QUEUE_CAPACITY: usize = 4096;

pub(super) enum WriterMessage {
    Record(Box<DecisionRecord>),
    Stop,
}

pub(super) struct DecisionLogState {
    pub(super) records: mpsc::Sender<WriterMessage>,
    pub(super) dropped: AtomicU64,
    pub(super) denial_threshold: u64,
    pub(super) allowed_threshold: u64,
    pub(super) denial_throttle: LogThrottle,
    pub(super) log_restricting_changes: bool,
    pub(super) ids: RandomIds,
    pub(super) clock: Arc<dyn Clock>,
}

impl DecisionLogState {
    pub(super) fn enqueue(&self, record: DecisionRecord) -> bool {
        let taken = self.records.try_send(WriterMessage::Record(Box::new(record))).is_ok();
        if !taken {
            self.add_dropped(1);
        }
        taken
    }

    pub(super) fn add_dropped(&self, records: u64) {
        self.dropped.fetch_add(records, Ordering::Relaxed);
    }
}
