//! The decision log: what was decided about whom and why, and what was taken away by whom. Each line has an id, by
//! which other logs can name it. No line ever holds a token.
//!
//! Of decisions some are written down, as the settings say; of changes that take something away, all. Whoever decides
//! hands a record over and goes on: what waits is bounded, and what finds no room is lost and counted. Here: which
//! are written down, and what of them. `write`: where to. `narrowing`: which changes take something away.

mod record;
mod restrictions;
mod writer;

use std::{
    net::IpAddr,
    path::PathBuf,
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
    domain::{name::CustomerId, name::EnvironmentName, policy_decision::Reason, scope::Scope},
    engine::{CheckOutcome, index::Index},
    log_throttle::LogThrottle,
    store::group_commit::ChangeListener,
    trace::{RandomIds, sampling_threshold},
};

use record::DecisionRecord;
use writer::{WriterMessage, WriterThread};

/// How many records may wait, about 1 KB each.
const QUEUE_CAPACITY: usize = 4096;

/// Where records go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DecisionLogTarget {
    /// To the log, as target `keyward::decision`.
    Log,
    /// To this file, as JSON, one a line.
    File(PathBuf),
}

/// Which decisions are written down, and where.
#[derive(Clone, Debug, PartialEq)]
pub struct DecisionLogSettings {
    /// The share of denials, 0 to 1.
    pub denial_ratio: f64,
    /// How many denials in one second at the most.
    pub denials_per_second: u32,
    /// The share of allowed requests, 0 to 1.
    pub allowed_ratio: f64,
    /// Whether changes that take something away are.
    pub log_restricting_changes: bool,
    /// Where records go.
    pub target: DecisionLogTarget,
}

/// Who asked for the decision.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DecisionSource {
    /// A service, by Check.
    Check,
    /// Envoy, over gRPC.
    ExtAuthz,
    /// A proxy, over HTTP.
    ForwardAuth,
}

impl DecisionSource {
    const fn as_str(self) -> &'static str {
        match self {
            DecisionSource::Check => "check",
            DecisionSource::ExtAuthz => "ext_authz",
            DecisionSource::ForwardAuth => "forward_auth",
        }
    }
}

/// What is known of a decision.
#[derive(Clone, Debug)]
pub struct DecisionInput<'a> {
    /// Who asked.
    pub source: DecisionSource,
    /// Whether the request may pass.
    pub allowed: bool,
    /// Why; one word of a closed set.
    pub reason: &'static str,
    /// What the engine said, where it was asked.
    pub check_outcome: Option<&'a CheckOutcome>,
    /// Where the call is made.
    pub environment: Option<&'a EnvironmentName>,
    /// The scopes that are needed.
    pub required_scopes: &'a [Scope],
    /// Whom the call is about.
    pub customer: Option<&'a CustomerId>,
    /// The end client's address.
    pub client_ip: Option<IpAddr>,
    /// The proxy's number for the request.
    pub proxy_request_id: Option<&'a str>,
    /// Whether a denial stops the request, or is only told.
    pub is_shadow: bool,
}

/// The way to the decision log; clones lead to the same one.
#[derive(Clone, Default)]
pub struct DecisionLog(Option<Arc<DecisionLogState>>);

struct DecisionLogState {
    records: mpsc::Sender<WriterMessage>,
    dropped: AtomicU64,
    denial_threshold: u64,
    allowed_threshold: u64,
    denial_throttle: LogThrottle,
    log_restricting_changes: bool,
    ids: RandomIds,
    clock: Arc<dyn Clock>,
}

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
    pub fn record_if_sampled<'a>(
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
    pub fn wrap_listener(
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
    pub fn dropped(&self) -> u64 {
        self.0.as_ref().map_or(0, |log| log.dropped.load(Ordering::Relaxed))
    }
}

impl DecisionLogState {
    fn enqueue(&self, record: DecisionRecord) -> bool {
        let taken = self.records.try_send(WriterMessage::Record(Box::new(record))).is_ok();
        if !taken {
            self.add_dropped(1);
        }
        taken
    }

    fn add_dropped(&self, records: u64) {
        self.dropped.fetch_add(records, Ordering::Relaxed);
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
