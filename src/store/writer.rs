//! Group commit: one task per process takes the writes that wait for it, commits them in one transaction, lets
//! the index see them, and only then answers. So creates scale past one disk sync each, and an acknowledged
//! change is in force before its caller hears of it.

use std::{cell::Cell, error::Error, sync::Arc};

use tokio::{
    sync::{OwnedRwLockReadGuard, OwnedRwLockWriteGuard, RwLock, mpsc, oneshot},
    time::Instant,
};

use super::{CommitError, Committed, Outcome, Rejection, Store, StoreError, Write};
use crate::{
    domain::{
        log::{Action, Change, LogRow},
        time::{Revision, Timestamp},
    },
    instruments::{Counters, Distribution, Histograms},
    trace::{self, Step},
};

/// How many writes go into one transaction at the most.
const BATCH: usize = 256;
/// How many writes may wait; past that callers wait for a place.
const QUEUE: usize = 4096;
/// How often a change that stops something is attempted beside others.
const SHARED_ATTEMPTS: u32 = 2;

tokio::task_local! {
    static CALL: Call;
}

/// A call in whose course something may be committed.
struct Call {
    began: Instant,
    done: Cell<Recorded>,
}

/// What a call has recorded.
#[derive(Clone, Copy, Debug, Default)]
pub struct Recorded {
    /// It has committed a change.
    pub changed: bool,
    /// A commit has shown that what it read was the newest there was: a commit on the server that all of it came from.
    /// The answer of a call without one rests on what it read.
    pub proven: bool,
}

/// Does a call's work, and says what it has recorded.
pub async fn in_call<T>(began: Instant, work: impl Future<Output = T>) -> (T, Recorded) {
    let call = Call { began, done: Cell::default() };
    CALL.scope(call, async {
        let done = work.await;
        (done, CALL.with(|call| call.done.get()))
    })
    .await
}

/// Why a write did not happen.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// The store has something against it.
    #[error("the change was rejected: {0:?}")]
    Rejected(Rejection),
    /// Certainly not recorded; shared by the writes of a batch.
    #[error("the change was not recorded")]
    NotRecorded(#[source] Arc<StoreError>),
    /// Perhaps recorded; shared by the writes of a batch.
    #[error("whether the change was recorded is unknown")]
    Unknown(#[source] Arc<StoreError>),
    /// The server is stopping.
    #[error("the server is stopping")]
    Stopping,
}

/// What follows the writes: sees every committed change in revision order, before its caller is answered.
pub trait Follower: Send + Sync + 'static {
    /// The newest revision it has seen.
    fn revision(&self) -> Revision;
    /// Takes newly committed changes.
    fn applied(&self, rows: &[(LogRow, Change)]);
    /// The same of changes that others have committed, or may have.
    fn followed(&self, rows: &[(LogRow, Change)]) {
        self.applied(rows);
    }
    /// A change was asked for and may or may not be recorded: until the log decides, refuse what it refuses.
    fn in_doubt(&self, write: &Write);
    /// The log has decided. What it does not hold was not recorded; a change that stops a key or an account
    /// stays in force in this process all the same, since somebody wanted it stopped.
    fn decided(&self);
}

/// What of a commit is counted: how it ended, how long it took, how many changes it brought.
#[derive(Debug)]
pub struct Commits {
    ended: Counters,
    took: Histograms<11>,
}

impl Commits {
    const RESULTS: [&str; 3] = ["committed", "not_recorded", "unknown"];
    /// From 250 µs, a commit that waits for no disk, to 10 s. In nanoseconds.
    const BOUNDS: [u64; 11] = [
        250_000,
        500_000,
        1_000_000,
        2_500_000,
        5_000_000,
        10_000_000,
        25_000_000,
        100_000_000,
        500_000_000,
        2_500_000_000,
        10_000_000_000,
    ];

    fn note(&self, committed: &Result<Committed, CommitError>, begun: Instant) {
        self.took.note(0, begun.elapsed());
        let result = match committed {
            Ok(committed) => {
                self.ended.add(Self::RESULTS.len(), committed.rows.len() as u64);
                0
            }
            Err(CommitError::NotRecorded(_)) => 1,
            Err(CommitError::Unknown(_)) => 2,
        };
        self.ended.add(result, 1);
    }

    /// How many commits ended how: `committed`, `not_recorded` or `unknown`.
    pub fn ended(&self) -> impl Iterator<Item = (&'static str, u64)> {
        Self::RESULTS.into_iter().enumerate().map(|(at, result)| (result, self.ended.get(at)))
    }

    /// How many changes were committed.
    #[must_use]
    pub fn changes(&self) -> u64 {
        self.ended.get(Self::RESULTS.len())
    }

    /// How long commits took, those that failed too.
    #[must_use]
    pub fn took(&self) -> Distribution {
        self.took.get(0)
    }
}

impl Default for Commits {
    fn default() -> Self {
        Commits { ended: Counters::new(Self::RESULTS.len() + 1), took: Histograms::new(1, &Self::BOUNDS) }
    }
}

enum Job {
    Write(Box<Write>, Answer),
    /// Nothing to write: says when what came before is in force, up to this revision at least.
    Barrier(Revision, oneshot::Sender<Result<(), WriteError>>),
}

/// A turn to attempt a change, until this is dropped.
#[derive(Debug)]
pub enum Turn {
    /// Beside others.
    Shared(OwnedRwLockReadGuard<()>),
    /// While no other change of this process is attempted.
    Alone(OwnedRwLockWriteGuard<()>),
}

/// The way to the writer task; clones lead to the same one.
#[derive(Clone)]
pub struct Writer {
    jobs: mpsc::Sender<Job>,
    turns: Arc<RwLock<()>>,
    follower: Arc<dyn Follower>,
    store: Arc<dyn Store>,
    commits: Arc<Commits>,
}

impl std::fmt::Debug for Writer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Writer").field("room", &self.jobs.capacity()).finish_non_exhaustive()
    }
}

impl Writer {
    /// Starts the task on the current runtime. It ends when the last `Writer` is gone and its queue is empty. By `now` it
    /// sees that an authorization has run out before its change is committed.
    #[must_use]
    pub fn spawn(
        store: Arc<dyn Store>,
        follower: Arc<dyn Follower>,
        now: impl Fn() -> Timestamp + Send + Sync + 'static,
    ) -> (Writer, tokio::task::JoinHandle<()>) {
        let (sender, mut jobs) = mpsc::channel(QUEUE);
        let commits = Arc::new(Commits::default());
        let mut committer = Committer {
            store: store.clone(),
            follower: follower.clone(),
            commits: commits.clone(),
            unsure: false,
            now: Box::new(now),
        };
        let task = tokio::spawn(async move {
            let mut batch = Vec::with_capacity(BATCH);
            while jobs.recv_many(&mut batch, BATCH).await > 0 {
                committer.take(std::mem::take(&mut batch)).await;
            }
        });
        (Writer { jobs: sender, turns: Arc::default(), follower, store, commits }, task)
    }

    /// What was committed, and how that went.
    #[must_use]
    pub fn commits(&self) -> &Arc<Commits> {
        &self.commits
    }

    /// The turn of an attempt at a change, to be held from when it is authorized until it is answered. A change that stops
    /// something and has lost to others gets a turn alone: whatever others change meanwhile, it does not lose again to
    /// this process.
    pub async fn turn(&self, action: Action, attempt: u32) -> Turn {
        match action.stops() && attempt >= SHARED_ATTEMPTS {
            true => Turn::Alone(self.turns.clone().write_owned().await),
            false => Turn::Shared(self.turns.clone().read_owned().await),
        }
    }

    /// Makes one change. Returns once it is durable and the follower has applied it.
    ///
    /// # Errors
    /// When the store rejects it, fails, or its answer was lost.
    pub async fn write(&self, write: Write) -> Result<Outcome, WriteError> {
        let (answer, outcome) = oneshot::channel();
        let written = async {
            self.jobs.send(Job::Write(Box::new(write), answer)).await.map_err(|_| WriteError::Stopping)?;
            outcome.await.map_err(|_| WriteError::Stopping)?
        };
        let outcome = trace::step(Step::Commit, written).await?;
        if matches!(outcome, Outcome::Applied(_)) {
            // Outside of a call nobody asks.
            let _ = CALL.try_with(|call| {
                let proven = self.store.read_from_one(call.began);
                call.done.set(Recorded { changed: true, proven });
            });
        }
        Ok(outcome)
    }

    /// Returns once everything is in force that is recorded up to `revision`: a record that was read from the store
    /// may be newer than what the follower has seen.
    ///
    /// # Errors
    /// When what is recorded cannot be found out.
    pub async fn applied(&self, revision: Revision) -> Result<(), WriteError> {
        if self.follower.revision() >= revision { Ok(()) } else { self.barrier(revision).await }
    }

    /// Returns once everything is in force that was recorded before, by whomever.
    ///
    /// # Errors
    /// When what is recorded cannot be found out.
    pub async fn caught_up(&self) -> Result<(), WriteError> {
        self.barrier(Revision(u64::MAX)).await
    }

    async fn barrier(&self, revision: Revision) -> Result<(), WriteError> {
        let (answer, done) = oneshot::channel();
        self.jobs.send(Job::Barrier(revision, answer)).await.map_err(|_| WriteError::Stopping)?;
        done.await.map_err(|_| WriteError::Stopping)?
    }
}

type Answer = oneshot::Sender<Result<Outcome, WriteError>>;

struct Committer {
    store: Arc<dyn Store>,
    follower: Arc<dyn Follower>,
    commits: Arc<Commits>,
    /// An outcome is unknown, and the log has not been read since.
    unsure: bool,
    now: Box<dyn Fn() -> Timestamp + Send + Sync>,
}

impl Committer {
    async fn take(&mut self, jobs: Vec<Job>) {
        let (mut writes, mut answers, mut barriers) = (Vec::new(), Vec::new(), Vec::new());
        let (mut wanted, now) = (Revision::default(), (self.now)());
        for job in jobs {
            match job {
                Job::Write(write, answer) if write.reads.is_over(now) => {
                    let _ = answer.send(Err(WriteError::Rejected(Rejection::AuthorizationMoved)));
                }
                Job::Write(write, answer) => {
                    writes.push(*write);
                    answers.push(answer);
                }
                Job::Barrier(revision, answer) => {
                    wanted = wanted.max(revision);
                    barriers.push(answer);
                }
            }
        }
        if !writes.is_empty() {
            self.commit(writes, answers).await;
        }
        if barriers.is_empty() {
            return;
        }
        let behind = self.unsure || self.follower.revision() < wanted;
        let known = if behind { self.catch_up().await } else { Ok(()) };
        let failed = known.map_err(Arc::new).err();
        for answer in barriers {
            let _ = answer.send(failed.clone().map_or(Ok(()), |error| Err(WriteError::Unknown(error))));
        }
    }

    async fn commit(&mut self, writes: Vec<Write>, answers: Vec<Answer>) {
        // Nothing is built on a state that is not known.
        if self.unsure
            && let Err(error) = self.catch_up().await
        {
            return self.fail(&writes, answers, CommitError::NotRecorded(error)).await;
        }
        match self.recorded(&writes).await {
            Ok(committed) => self.settle(&writes, committed, answers).await,
            // One bad write must not take the others with it.
            Err(CommitError::NotRecorded(error @ StoreError::Unavailable(_))) if writes.len() > 1 => {
                tracing::warn!(error = &error as &dyn Error, "a batch failed; its writes go one by one");
                for (write, answer) in writes.into_iter().zip(answers) {
                    self.commit_one(write, answer).await;
                }
            }
            Err(error) => self.fail(&writes, answers, error).await,
        }
    }

    async fn commit_one(&mut self, write: Write, answer: Answer) {
        let writes = [write];
        if self.unsure
            && let Err(error) = self.catch_up().await
        {
            return self.fail(&writes, vec![answer], CommitError::NotRecorded(error)).await;
        }
        match self.recorded(&writes).await {
            Ok(committed) => self.settle(&writes, committed, vec![answer]).await,
            Err(error) => self.fail(&writes, vec![answer], error).await,
        }
    }

    async fn recorded(&self, writes: &[Write]) -> Result<Committed, CommitError> {
        let begun = Instant::now();
        let committed = self.store.commit(writes).await;
        self.commits.note(&committed, begun);
        committed
    }

    async fn settle(&mut self, writes: &[Write], committed: Committed, answers: Vec<Answer>) {
        if let Some((first, _)) = committed.rows.first()
            && let Err(error) = self.fill(first.revision).await
        {
            // Recorded, and not in force here before others' changes are.
            return self.fail(writes, answers, CommitError::Unknown(error)).await;
        }
        self.follower.applied(&committed.rows);
        for (answer, outcome) in answers.into_iter().zip(committed.outcomes) {
            // A caller that went away does not hear of it; the change stands.
            let _ = answer.send(outcome.map_err(WriteError::Rejected));
        }
    }

    /// Gives the follower what others have committed before this revision.
    async fn fill(&mut self, before: Revision) -> Result<(), StoreError> {
        while self.follower.revision().next() < before {
            let seen = self.follower.revision();
            let mut rows = self.store.log_after(seen, 1000).await?;
            rows.retain(|row| row.revision < before);
            self.follower.followed(&with_changes(rows)?);
            if self.follower.revision() == seen {
                let what = format!("the log does not go on from entry {seen} as this process knows it");
                return Err(StoreError::Damaged(what));
            }
        }
        Ok(())
    }

    /// Tells the callers, after the follower has learnt what is in doubt and, if it can be read, what the log
    /// says of it.
    async fn fail(&mut self, writes: &[Write], answers: Vec<Answer>, error: CommitError) {
        tracing::error!(error = &error as &dyn Error, writes = writes.len(), "a commit failed");
        for write in writes {
            self.follower.in_doubt(write);
        }
        let (error, unknown) = match error {
            CommitError::NotRecorded(error) => (Arc::new(error), false),
            CommitError::Unknown(error) => (Arc::new(error), true),
        };
        self.unsure |= unknown;
        if let Err(error) = self.catch_up().await {
            // The doubts stay until it can be read.
            self.unsure = true;
            tracing::error!(error = &error as &dyn Error, "the log could not be read after a failed commit");
        }
        for answer in answers {
            let error = error.clone();
            let _ = answer.send(Err(if unknown {
                WriteError::Unknown(error)
            } else {
                WriteError::NotRecorded(error)
            }));
        }
    }

    /// Gives the follower whatever of the log it lacks: after an unknown outcome, the log decides.
    async fn catch_up(&mut self) -> Result<(), StoreError> {
        self.store.settle().await?;
        loop {
            let seen = self.follower.revision();
            let rows = self.store.log_after(seen, 1000).await?;
            if rows.is_empty() {
                break;
            }
            let newest = rows.last().map_or(seen, |row| row.revision);
            self.follower.followed(&with_changes(rows)?);
            if self.follower.revision() < newest {
                let what = format!("the log does not go on from entry {seen} as this process knows it");
                return Err(StoreError::Damaged(what));
            }
        }
        self.unsure = false;
        self.follower.decided();
        Ok(())
    }
}

fn with_changes(rows: Vec<LogRow>) -> Result<Vec<(LogRow, Change)>, StoreError> {
    let rows = rows.into_iter().map(LogRow::with_change).collect::<Result<_, _>>();
    rows.map_err(|error| StoreError::Damaged(error.to_string()))
}
