//! Waits, for each narrowing change, until no replica can allow any more what it narrowed: drives a revoker, and tells
//! how far the change has come.
//!
//! One reading of the replicas' rows serves every change that waited before it was begun. What this process itself has
//! applied needs no reading.

use std::{collections::HashMap, sync::Arc, time::Duration};

use tokio::{
    sync::{mpsc, oneshot, watch},
    time::{Instant, sleep, sleep_until},
};

use crate::{
    clock::Clock,
    domain::{
        lease::{
            Attempt, Boottime, Position, ReplicaId, Revoker,
            revoker::{Action, Event, Outcome, Propagation as Progress},
        },
        log::Hash,
        time::{Revision, Timestamp},
    },
    instruments::{Counters, Distribution, Histograms},
    store::{
        StoreError,
        fleet::{Fleet, Roster},
    },
    trace::{self, Step},
};

use super::{feed::Sight, follow::Follow};

/// The longest that anybody waits where no lease ever runs out.
const LONGEST: Duration = Duration::from_secs(300);
/// How long after a commit others are asked about it at the earliest.
const FIRST_LOOK: Duration = Duration::from_millis(1);
/// The same where they tell that they have acknowledged it, and that is heard: then only if it is not.
const UNTOLD_LOOK: Duration = Duration::from_millis(10);
/// How many changes may wait for a reading; those beyond wait for a place.
const QUEUE: usize = 1024;

/// How far a change has come, in words for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// The change.
    pub revision: Revision,
    /// Whether no replica can allow any more what it narrowed.
    pub complete: bool,
    /// The names of the replicas that have acknowledged it.
    pub confirmed: Vec<String>,
    /// Those that have not.
    pub unconfirmed: Vec<Unconfirmed>,
    /// When it will be complete at the latest. None = not before all of them have spoken, or it is not known yet.
    pub complete_by: Option<Timestamp>,
    /// Whether the change is on a synchronous standby of the database too.
    pub sync_replicated: bool,
}

/// What a change means to Checks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Reach {
    /// It takes nothing away: there is nothing to wait for.
    #[default]
    Widens,
    /// Some Check that was allowed before it could be refused after it.
    Narrows {
        /// It had been made before: a call that makes it again waits as the first did.
        again: bool,
    },
}

/// A replica that has not acknowledged a change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unconfirmed {
    /// Its name.
    pub replica: String,
    /// When it renewed last, by the database's clock.
    pub last_seen: Timestamp,
    /// When its lease has run out at the latest; None = never.
    pub lease_ends_by: Option<Timestamp>,
}

/// Why a change is not known to be in force everywhere.
#[derive(Clone, Debug)]
pub enum Incomplete {
    /// Not in the time that there was.
    InTime(Box<Report>),
    /// The database has lost the change.
    Lost(Revision),
    /// The database did not answer.
    Unanswered,
    /// The server stops, and waits for nothing any more.
    Stopping(Revision),
}

/// What of the waits is counted.
#[derive(Debug)]
pub struct Waits {
    took: Histograms<11>,
    incomplete: Counters,
}

impl Waits {
    /// From 1 ms, a change in one process, to 2 min, beyond the usual lease. In nanoseconds.
    const BOUNDS: [u64; 11] = [
        1_000_000,
        5_000_000,
        10_000_000,
        25_000_000,
        50_000_000,
        100_000_000,
        500_000_000,
        2_000_000_000,
        10_000_000_000,
        60_000_000_000,
        120_000_000_000,
    ];

    /// How long changes that take something away took until they were in force everywhere.
    #[must_use]
    pub fn took(&self) -> Distribution {
        self.took.get(0)
    }

    /// How many were not known to be so when their caller was answered.
    #[must_use]
    pub fn incomplete(&self) -> u64 {
        self.incomplete.get(0)
    }
}

impl Default for Waits {
    fn default() -> Self {
        Waits { took: Histograms::new(1, &Self::BOUNDS), incomplete: Counters::new(1) }
    }
}

/// Waits for changes to be in force on every replica.
#[derive(Clone)]
pub struct Propagation {
    clock: Arc<dyn Clock>,
    replicas: Option<Replicas>,
    stopping: watch::Sender<bool>,
    waits: Arc<Waits>,
}

#[derive(Clone)]
struct Replicas {
    fleet: Arc<dyn Fleet>,
    follow: Arc<Follow>,
    sight: Arc<Sight>,
    readings: mpsc::Sender<Wanted>,
}

type Wanted = (Revision, oneshot::Sender<Result<Arc<Roster>, Arc<StoreError>>>);

impl std::fmt::Debug for Propagation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Propagation").field("alone", &self.replicas.is_none()).finish_non_exhaustive()
    }
}

impl Propagation {
    /// Where one process owns the database: a change that is in force here is in force everywhere.
    #[must_use]
    pub fn alone(clock: Arc<dyn Clock>) -> Propagation {
        Propagation { clock, replicas: None, stopping: watch::Sender::new(false), waits: Arc::default() }
    }

    /// Where there are replicas. Readings run on the current runtime for as long as anybody may wait.
    #[must_use]
    pub fn over(
        fleet: Arc<dyn Fleet>,
        follow: Arc<Follow>,
        sight: Arc<Sight>,
        clock: Arc<dyn Clock>,
    ) -> Propagation {
        let (readings, wanted) = mpsc::channel(QUEUE);
        tokio::spawn(read(fleet.clone(), sight.clone(), wanted));
        let replicas = Some(Replicas { fleet, follow, sight, readings });
        Propagation { clock, replicas, stopping: watch::Sender::new(false), waits: Arc::default() }
    }

    /// What was waited for, and how that went.
    #[must_use]
    pub fn waits(&self) -> &Arc<Waits> {
        &self.waits
    }

    /// What is said of a change that takes nothing away: there is nothing to wait for.
    #[must_use]
    pub fn in_force(&self, revision: Revision) -> Report {
        Report {
            revision,
            complete: true,
            confirmed: Vec::new(),
            unconfirmed: Vec::new(),
            complete_by: Some(self.clock.now()),
            sync_replicated: false,
        }
    }

    /// Whether there is a change of this revision, in the log or in its archive. `newest`: the newest that is known
    /// here.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn is_recorded(&self, revision: Revision, newest: Revision) -> Result<bool, Incomplete> {
        let known = revision <= newest;
        match &self.replicas {
            Some(replicas) if !known => match replicas.link(revision).await {
                Err(Incomplete::Lost(_)) => Ok(false),
                found => found.map(|_| true),
            },
            _ => Ok(known),
        }
    }

    /// Waits until the change is in force everywhere, at most until `until`. It is committed and applied here.
    /// `again`: it was so before this call, which waits all the same, for the first may not have ended.
    ///
    /// # Errors
    /// When it is not in force everywhere by then, or is not in the database any more.
    pub async fn wait(
        &self,
        revision: Revision,
        again: bool,
        until: Option<Instant>,
    ) -> Result<Report, Incomplete> {
        let (committed, begun) = (self.clock.boottime(), Instant::now());
        let each = &mut |_| ();
        let followed = self.follow_up(revision, again, committed, until, each);
        let ended = trace::step(Step::Propagation, followed).await;
        match &ended {
            Ok(_) => self.waits.took.note(0, begun.elapsed()),
            Err(_) => self.waits.incomplete.add(0, 1),
        }
        ended
    }

    /// Waits, if the change takes anything away.
    ///
    /// # Errors
    /// As [`Propagation::wait`].
    pub async fn reached(
        &self,
        revision: Revision,
        reach: Reach,
        until: Option<Instant>,
    ) -> Result<Report, Incomplete> {
        match reach {
            Reach::Widens => Ok(self.in_force(revision)),
            Reach::Narrows { again } => self.wait(revision, again, until).await,
        }
    }

    /// The same, telling `each` how far it has come after each reading.
    ///
    /// # Errors
    /// As [`Propagation::wait`].
    pub async fn watch(
        &self,
        revision: Revision,
        each: &mut (dyn FnMut(Report) + Send),
    ) -> Result<Report, Incomplete> {
        self.follow_up(revision, true, self.clock.boottime(), None, each).await
    }

    async fn follow_up(
        &self,
        revision: Revision,
        again: bool,
        committed: Boottime,
        until: Option<Instant>,
        each: &mut (dyn FnMut(Report) + Send),
    ) -> Result<Report, Incomplete> {
        let Some(replicas) = &self.replicas else { return Ok(self.in_force(revision)) };
        let hash = match replicas.follow.link(revision) {
            Some(hash) => hash,
            None => match replicas.link(revision).await? {
                Some(hash) => hash,
                // Archived: every replica had acknowledged it.
                None => return Ok(self.in_force(revision)),
            },
        };
        let change = Position { revision, hash };
        let mut wait = Wait {
            clock: &*self.clock,
            replicas,
            revoker: Revoker::after(change, again, committed),
            hash,
            names: HashMap::new(),
            sync_replicated: false,
            until,
            give_up: committed.plus(LONGEST),
            told: false,
        };
        let mut stopping = self.stopping.subscribe();
        let ended = async {
            // Others have not heard of it yet: who asks at once takes time from those who are to acknowledge.
            if !again && replicas.sight.replicas() > 1 {
                let told = replicas.sight.are_few() && replicas.sight.acks().hears();
                tokio::select! {
                    () = sleep(if told { UNTOLD_LOOK } else { FIRST_LOOK }) => {}
                    () = wait.until_told() => {}
                }
            }
            wait.run(each).await
        };
        tokio::select! {
            ended = ended => ended,
            _ = stopping.wait_for(|stop| *stop) => Err(Incomplete::Stopping(revision)),
        }
    }

    /// Ends all waiting.
    pub fn stop(&self) {
        self.stopping.send_replace(true);
    }
}

impl Replicas {
    async fn roster(&self, revision: Revision) -> Result<Arc<Roster>, ()> {
        let (answer, read) = oneshot::channel();
        self.readings.send((revision, answer)).await.map_err(drop)?;
        read.await.map_err(drop)?.map_err(|error| {
            tracing::debug!(error = &*error as &dyn std::error::Error, "the replicas' rows were not read");
        })
    }

    /// The log's link at a revision; None = it was archived.
    async fn link(&self, revision: Revision) -> Result<Option<Hash>, Incomplete> {
        let roster = self.fleet.roster(&[revision]).await.map_err(|error| {
            tracing::error!(error = &error as &dyn std::error::Error, "the log was not read");
            Incomplete::Unanswered
        })?;
        match roster.links.get(&revision) {
            Some(hash) => Ok(Some(*hash)),
            None if revision <= roster.archived => Ok(None),
            None => Err(Incomplete::Lost(revision)),
        }
    }
}

/// One change's wait.
struct Wait<'a> {
    clock: &'a dyn Clock,
    replicas: &'a Replicas,
    revoker: Revoker,
    hash: Hash,
    names: HashMap<ReplicaId, String>,
    sync_replicated: bool,
    until: Option<Instant>,
    give_up: Boottime,
    /// All that are known seemed to have acknowledged it. That is listened to once.
    told: bool,
}

impl Wait<'_> {
    async fn until_told(&mut self) {
        if self.told {
            return std::future::pending().await;
        }
        let (own, revision) = (self.replicas.sight.id(), self.revoker.propagation().revision);
        self.replicas.sight.acks().all(own, revision).await;
        self.told = true;
    }

    async fn run(&mut self, each: &mut (dyn FnMut(Report) + Send)) -> Result<Report, Incomplete> {
        let mut event = Event::Tick;
        loop {
            let now = self.clock.boottime();
            let read = matches!(event, Event::Listed { .. });
            let actions = self.revoker.on(event, now);
            if read {
                each(self.report(self.revoker.propagation()));
            }
            let wake = match actions.into_iter().next() {
                Some(Action::Return(Outcome::Complete(progress))) => return Ok(self.report(progress)),
                Some(Action::Return(Outcome::Lost)) => {
                    return Err(Incomplete::Lost(self.revoker.propagation().revision));
                }
                Some(Action::List { attempt }) => {
                    event = self.list(attempt).await?;
                    continue;
                }
                None => self.revoker.wake_at().unwrap_or(self.give_up),
            };
            if now >= self.give_up && self.revoker.propagation().complete_by.is_none() {
                return Err(self.in_time());
            }
            let until = self.until;
            event = tokio::select! {
                () = sleep(wake.since(now)) => Event::Tick,
                () = self.until_told() => Event::Hint,
                () = patience(until) => return Err(self.in_time()),
            };
        }
    }

    /// Reads the rows, unless time is up before.
    async fn list(&mut self, attempt: Attempt) -> Result<Event, Incomplete> {
        let progress = self.revoker.propagation();
        // Whatever the list says, by then it is complete; and a database that is away need not be waited for.
        let by = progress.complete_by.unwrap_or(self.give_up);
        let left = by.since(self.clock.boottime());
        let roster = tokio::select! {
            roster = self.replicas.roster(progress.revision) => roster,
            () = sleep(left) => return Ok(Event::Failed { attempt }),
            () = patience(self.until) => return Err(self.in_time()),
        };
        let Ok(roster) = roster else { return Ok(Event::Failed { attempt }) };
        self.names.clone_from(&roster.names);
        self.sync_replicated = roster.sync_replicated;
        let mut listing = roster.listing.clone();
        // What is in force here needs no acknowledgment: the change itself, not another of the same number.
        if self.replicas.follow.link(progress.revision) == Some(self.hash) {
            let own = self.replicas.sight.id();
            for row in listing.rows.iter_mut().filter(|row| Some(row.id) == own && row.applied.is_some()) {
                row.applied = row.applied.max(Some(progress.revision));
            }
        }
        let archived = (progress.revision <= roster.archived).then_some(self.hash);
        let link = roster.links.get(&progress.revision).copied().or(archived);
        Ok(Event::Listed { attempt, listing, link })
    }

    fn in_time(&self) -> Incomplete {
        Incomplete::InTime(Box::new(self.report(self.revoker.propagation())))
    }

    fn report(&self, progress: Progress) -> Report {
        let now = (self.clock.boottime(), self.clock.now());
        let wall = |at: Boottime| now.1.plus(at.since(now.0)).minus(now.0.since(at));
        let name = |id: &ReplicaId| self.names.get(id).cloned().unwrap_or_else(|| id.0.to_string());
        let unconfirmed = progress.unconfirmed.iter().map(|silent| Unconfirmed {
            replica: name(&silent.replica),
            last_seen: silent.last_seen,
            lease_ends_by: silent.lease_ends_by.map(wall),
        });
        let complete_by = if progress.complete { Some(now.1) } else { progress.complete_by.map(wall) };
        Report {
            revision: progress.revision,
            complete: progress.complete,
            confirmed: progress.confirmed.iter().map(name).collect(),
            unconfirmed: unconfirmed.collect(),
            complete_by,
            sync_replicated: self.sync_replicated,
        }
    }
}

async fn patience(until: Option<Instant>) {
    match until {
        Some(until) => sleep_until(until).await,
        None => std::future::pending().await,
    }
}

/// Reads the rows for whoever waits: one reading for all who asked before it.
async fn read(fleet: Arc<dyn Fleet>, sight: Arc<Sight>, mut wanted: mpsc::Receiver<Wanted>) {
    let mut waiting = Vec::new();
    while wanted.recv_many(&mut waiting, QUEUE).await > 0 {
        let revisions: Vec<_> = waiting.iter().map(|(revision, _)| *revision).collect();
        let read = fleet.roster(&revisions).await.map(Arc::new).map_err(Arc::new);
        if let Ok(roster) = &read {
            sight.acks().listed(roster);
        }
        for (_, answer) in waiting.drain(..) {
            // Whoever has given up does not hear of it.
            let _ = answer.send(read.clone());
        }
    }
}
