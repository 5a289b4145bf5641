//! The decision log: what was decided about whom and why, and what was taken away by whom. Each line has an id, by
//! which other logs can name it. No line ever holds a token.
//!
//! Of decisions some are written down, as the settings say; of changes that take something away, all. Whoever decides
//! hands a record over and goes on: what waits is bounded, and what finds no room is lost and counted. Here: which
//! are written down, and what of them. `write`: where to. `narrowing`: which changes take something away.

mod narrowing;
mod record;
mod write;

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
    clock::{Clock, Entropy, random},
    domain::{decision::Reason, name::CustomerId, name::EnvironmentName, scope::Scope},
    engine::{Answer, index::Index},
    quiet::Quiet,
    store::writer::Follower,
    trace::{Ids, threshold},
};

use record::Record;
use write::{Item, Writing};

/// How many records may wait, about 1 KB each.
const QUEUE: usize = 4096;

/// Where records go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// To the log, as target `keyward::decision`.
    Log,
    /// To this file, as JSON, one a line.
    File(PathBuf),
}

/// Which decisions are written down, and where.
#[derive(Clone, Debug, PartialEq)]
pub struct DecisionSettings {
    /// The share of denials, 0 to 1.
    pub denials: f64,
    /// How many denials in one second at the most.
    pub denials_per_second: u32,
    /// The share of allowed requests, 0 to 1.
    pub allowed: f64,
    /// Whether changes that take something away are.
    pub narrowing_changes: bool,
    /// Where records go.
    pub place: Place,
}

/// Who asked for the decision.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A service, by Check.
    Check,
    /// Envoy, over gRPC.
    ExtAuthz,
    /// A proxy, over HTTP.
    ForwardAuth,
}

impl Kind {
    const fn as_str(self) -> &'static str {
        match self {
            Kind::Check => "check",
            Kind::ExtAuthz => "ext_authz",
            Kind::ForwardAuth => "forward_auth",
        }
    }
}

/// What is known of a decision.
#[derive(Clone, Debug)]
pub struct Facts<'a> {
    /// Who asked.
    pub kind: Kind,
    /// Whether the request may pass.
    pub allowed: bool,
    /// Why; one word of a closed set.
    pub reason: &'static str,
    /// What the engine said, where it was asked.
    pub answer: Option<&'a Answer>,
    /// Where the call is made.
    pub environment: Option<&'a EnvironmentName>,
    /// The scopes that are needed.
    pub needed: &'a [Scope],
    /// Whom the call is about.
    pub customer: Option<&'a CustomerId>,
    /// The end client's address.
    pub client_ip: Option<IpAddr>,
    /// The proxy's number for the request.
    pub http_id: Option<&'a str>,
    /// Whether a denial stops the request, or is only told.
    pub shadow: bool,
}

/// The way to the decision log; clones lead to the same one.
#[derive(Clone, Default)]
pub struct Decisions(Option<Arc<Log>>);

struct Log {
    records: mpsc::Sender<Item>,
    dropped: AtomicU64,
    denials: u64,
    allowed: u64,
    cap: Quiet,
    narrowing_changes: bool,
    ids: Ids,
    clock: Arc<dyn Clock>,
}

impl std::fmt::Debug for Decisions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Decisions").field("on", &self.0.is_some()).finish_non_exhaustive()
    }
}

impl Decisions {
    /// None is written down.
    #[must_use]
    pub fn off() -> Decisions {
        Decisions(None)
    }

    /// Opens the log. The second is to be ended last.
    ///
    /// # Errors
    /// When the file cannot be opened, or the system gives no random number or no thread.
    pub fn open(
        settings: &DecisionSettings,
        clock: Arc<dyn Clock>,
        entropy: &dyn Entropy,
    ) -> anyhow::Result<(Decisions, Keeper)> {
        let (records, waiting) = mpsc::channel(QUEUE);
        let log = Arc::new(Log {
            records,
            dropped: AtomicU64::new(0),
            denials: threshold(settings.denials),
            allowed: threshold(settings.allowed),
            cap: Quiet::new(settings.denials_per_second),
            narrowing_changes: settings.narrowing_changes,
            ids: Ids::seeded(u64::from_be_bytes(random(entropy)?)),
            clock,
        });
        let writing = Writing::start(&settings.place, waiting, Arc::downgrade(&log))?;
        Ok((Decisions(Some(log.clone())), Keeper { log, writing }))
    }

    /// Writes a decision down, if it is one of those that are. Gives its id then.
    pub fn note<'a>(&self, reason: Reason, facts: impl FnOnce() -> Facts<'a>) -> Option<Uuid> {
        self.note_if(reason == Reason::Ok, facts)
    }

    /// The same of what the engine was not asked about.
    pub fn note_if<'a>(&self, allowed: bool, facts: impl FnOnce() -> Facts<'a>) -> Option<Uuid> {
        let log = self.0.as_ref()?;
        let threshold = if allowed { log.allowed } else { log.denials };
        // Most are not, and pay for nothing else.
        if threshold == 0 || !log.ids.next().other().is_below(threshold) {
            return None;
        }
        let now = log.clock.now();
        if !allowed && !log.cap.may(now) {
            return None;
        }
        let id = log.ids.next().uuid(now.as_millis());
        log.hand_over(Record::of_decision(id, now, &facts())).then_some(id)
    }

    /// What follows this process's commits, writing down what they take away before `follower` hears of them.
    #[must_use]
    pub fn watching(&self, follower: Arc<dyn Follower>, index: Arc<Index>) -> Arc<dyn Follower> {
        match &self.0 {
            Some(log) if log.narrowing_changes => {
                Arc::new(narrowing::Watching::new(log.clone(), follower, index))
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

impl Log {
    fn hand_over(&self, record: Record) -> bool {
        let taken = self.records.try_send(Item::Record(Box::new(record))).is_ok();
        if !taken {
            self.lose(1);
        }
        taken
    }

    fn lose(&self, records: u64) {
        self.dropped.fetch_add(records, Ordering::Relaxed);
    }
}

/// What ends the log.
pub struct Keeper {
    log: Arc<Log>,
    writing: Writing,
}

impl std::fmt::Debug for Keeper {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Keeper")
    }
}

impl Keeper {
    /// Writes down what waits, as far as there is time.
    pub async fn stop(self, patience: Duration) {
        let Keeper { log, writing } = self;
        let ended = async {
            // The writer may have ended already: then there is nothing to tell it.
            let _ = log.records.send(Item::End).await;
            writing.ended().await;
        };
        if tokio::time::timeout(patience, ended).await.is_err() {
            tracing::warn!("the last decisions were not written down in time");
        }
    }
}
