//! Group commit: one task per process takes the writes that wait for it, commits them in one transaction, lets
//! the index see them, and only then answers. So creates scale past one disk sync each, and an acknowledged
//! change is in force before its caller hears of it.

use std::{cell::Cell, error::Error, sync::Arc};

use tokio::{
    sync::{OwnedRwLockReadGuard, OwnedRwLockWriteGuard, RwLock, mpsc, oneshot},
    time::Instant,
};

use super::{CommitError, CommittedBatch, Store, StoreError, WriteOutcome, WriteRejection, WriteRequest};
use crate::{
    domain::{
        log::{AuditAction, LogEntry, RecordChange},
        time::{Revision, Timestamp},
    },
    metrics_core::{HistogramSnapshot, ShardedCounters, ShardedHistograms},
    trace::{self, CallPhase},
};

/// How many writes go into one transaction at the most.
const MAX_BATCH: usize = 256;
/// How many writes may wait; past that callers wait for a place.
const QUEUE_CAPACITY: usize = 4096;
/// How often a change that stops something is attempted beside others.
const MAX_SHARED_ATTEMPTS: u32 = 2;

tokio::task_local! {
    static CURRENT_CALL: CallScope;
}

/// A call in whose course something may be committed.
struct CallScope {
    started_at: Instant,
    recorded: Cell<CallWrites>,
}

/// What a call has recorded.
#[derive(Clone, Copy, Debug, Default)]
pub struct CallWrites {
    /// It has committed a change.
    pub has_committed: bool,
    /// A commit has shown that what it read was the newest there was: a commit on the server that all of it came from.
    /// The answer of a call without one rests on what it read.
    pub is_linearizable: bool,
}

/// Does a call's work, and says what it has recorded.
pub async fn track_call_writes<T>(began: Instant, work: impl Future<Output = T>) -> (T, CallWrites) {
    let call = CallScope { started_at: began, recorded: Cell::default() };
    CURRENT_CALL
        .scope(call, async {
            let done = work.await;
            (done, CURRENT_CALL.with(|call| call.recorded.get()))
        })
        .await
}

/// Why a write did not happen.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// The store has something against it.
    #[error("the change was rejected: {0:?}")]
    Rejected(WriteRejection),
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
pub trait ChangeListener: Send + Sync + 'static {
    /// The newest revision it has seen.
    fn applied_revision(&self) -> Revision;
    /// Takes newly committed changes.
    fn apply_local(&self, rows: &[(LogEntry, RecordChange)]);
    /// The same of changes that others have committed, or may have.
    fn apply_remote(&self, rows: &[(LogEntry, RecordChange)]) {
        self.apply_local(rows);
    }
    /// A change was asked for and may or may not be recorded: until the log decides, refuse what it refuses.
    fn mark_uncertain(&self, write: &WriteRequest);
    /// The log has decided. What it does not hold was not recorded; a change that stops a key or an account
    /// stays in force in this process all the same, since somebody wanted it stopped.
    fn resolve_uncertain(&self);
}

/// What of a commit is counted: how it ended, how long it took, how many changes it brought.
#[derive(Debug)]
pub struct CommitMetrics {
    results: ShardedCounters,
    durations: ShardedHistograms<11>,
}

impl CommitMetrics {
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

    fn record(&self, committed: &Result<CommittedBatch, CommitError>, begun: Instant) {
        self.durations.record(0, begun.elapsed());
        let result = match committed {
            Ok(committed) => {
                self.results.add(Self::RESULTS.len(), committed.entries.len() as u64);
                0
            }
            Err(CommitError::NotRecorded(_)) => 1,
            Err(CommitError::Unknown(_)) => 2,
        };
        self.results.add(result, 1);
    }

    /// How many commits ended how: `committed`, `not_recorded` or `unknown`.
    pub fn results(&self) -> impl Iterator<Item = (&'static str, u64)> {
        Self::RESULTS.into_iter().enumerate().map(|(at, result)| (result, self.results.get(at)))
    }

    /// How many changes were committed.
    #[must_use]
    pub fn committed_changes(&self) -> u64 {
        self.results.get(Self::RESULTS.len())
    }

    /// How long commits took, those that failed too.
    #[must_use]
    pub fn durations(&self) -> HistogramSnapshot {
        self.durations.snapshot(0)
    }
}

impl Default for CommitMetrics {
    fn default() -> Self {
        CommitMetrics {
            results: ShardedCounters::new(Self::RESULTS.len() + 1),
            durations: ShardedHistograms::new(1, &Self::BOUNDS),
        }
    }
}

enum CommitJob {
    Write(Box<WriteRequest>, WriteReplySender),
    /// Nothing to write: says when what came before is in force, up to this revision at least.
    Barrier(Revision, oneshot::Sender<Result<(), WriteError>>),
}

/// A turn to attempt a change, until this is dropped.
#[derive(Debug)]
pub enum ChangeTurn {
    /// Beside others.
    Shared(OwnedRwLockReadGuard<()>),
    /// While no other change of this process is attempted.
    Exclusive(OwnedRwLockWriteGuard<()>),
}

/// The way to the writer task; clones lead to the same one.
#[derive(Clone)]
pub struct CommitHandle {
    jobs: mpsc::Sender<CommitJob>,
    change_lock: Arc<RwLock<()>>,
    listener: Arc<dyn ChangeListener>,
    store: Arc<dyn Store>,
    commits: Arc<CommitMetrics>,
}

impl std::fmt::Debug for CommitHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CommitHandle").field("room", &self.jobs.capacity()).finish_non_exhaustive()
    }
}

impl CommitHandle {
    /// Starts the task on the current runtime. It ends when the last `CommitHandle` is gone and its queue is empty. By `now` it
    /// sees that an authorization has run out before its change is committed.
    #[must_use]
    pub fn spawn(
        store: Arc<dyn Store>,
        follower: Arc<dyn ChangeListener>,
        now: impl Fn() -> Timestamp + Send + Sync + 'static,
    ) -> (CommitHandle, tokio::task::JoinHandle<()>) {
        let (sender, mut jobs) = mpsc::channel(QUEUE_CAPACITY);
        let commits = Arc::new(CommitMetrics::default());
        let mut committer = GroupCommitter {
            store: store.clone(),
            listener: follower.clone(),
            commits: commits.clone(),
            has_unknown_outcome: false,
            now: Box::new(now),
        };
        let task = tokio::spawn(async move {
            let mut batch = Vec::with_capacity(MAX_BATCH);
            while jobs.recv_many(&mut batch, MAX_BATCH).await > 0 {
                committer.process_jobs(std::mem::take(&mut batch)).await;
            }
        });
        (CommitHandle { jobs: sender, change_lock: Arc::default(), listener: follower, store, commits }, task)
    }

    /// What was committed, and how that went.
    #[must_use]
    pub fn commits(&self) -> &Arc<CommitMetrics> {
        &self.commits
    }

    /// The turn of an attempt at a change, to be held from when it is authorized until it is answered. A change that stops
    /// something and has lost to others gets a turn alone: whatever others change meanwhile, it does not lose again to
    /// this process.
    pub async fn lock_for_change(&self, action: AuditAction, attempt: u32) -> ChangeTurn {
        match action.is_restriction() && attempt >= MAX_SHARED_ATTEMPTS {
            true => ChangeTurn::Exclusive(self.change_lock.clone().write_owned().await),
            false => ChangeTurn::Shared(self.change_lock.clone().read_owned().await),
        }
    }

    /// Makes one change. Returns once it is durable and the follower has applied it.
    ///
    /// # Errors
    /// When the store rejects it, fails, or its answer was lost.
    pub async fn write(&self, write: WriteRequest) -> Result<WriteOutcome, WriteError> {
        let (answer, outcome) = oneshot::channel();
        let written = async {
            self.jobs
                .send(CommitJob::Write(Box::new(write), answer))
                .await
                .map_err(|_| WriteError::Stopping)?;
            outcome.await.map_err(|_| WriteError::Stopping)?
        };
        let outcome = trace::in_phase_span(CallPhase::Commit, written).await?;
        if matches!(outcome, WriteOutcome::Applied(_)) {
            // Outside of a call nobody asks.
            let _ = CURRENT_CALL.try_with(|call| {
                let proven = self.store.is_single_server_since(call.started_at);
                call.recorded.set(CallWrites { has_committed: true, is_linearizable: proven });
            });
        }
        Ok(outcome)
    }

    /// Returns once everything is in force that is recorded up to `applied_revision`: a record that was read from the store
    /// may be newer than what the follower has seen.
    ///
    /// # Errors
    /// When what is recorded cannot be found out.
    pub async fn wait_applied(&self, revision: Revision) -> Result<(), WriteError> {
        if self.listener.applied_revision() >= revision { Ok(()) } else { self.send_barrier(revision).await }
    }

    /// Returns once everything is in force that was recorded before, by whomever.
    ///
    /// # Errors
    /// When what is recorded cannot be found out.
    pub async fn wait_caught_up(&self) -> Result<(), WriteError> {
        self.send_barrier(Revision(u64::MAX)).await
    }

    async fn send_barrier(&self, revision: Revision) -> Result<(), WriteError> {
        let (answer, done) = oneshot::channel();
        self.jobs.send(CommitJob::Barrier(revision, answer)).await.map_err(|_| WriteError::Stopping)?;
        done.await.map_err(|_| WriteError::Stopping)?
    }
}

type WriteReplySender = oneshot::Sender<Result<WriteOutcome, WriteError>>;

struct GroupCommitter {
    store: Arc<dyn Store>,
    listener: Arc<dyn ChangeListener>,
    commits: Arc<CommitMetrics>,
    /// An outcome is unknown, and the log has not been read since.
    has_unknown_outcome: bool,
    now: Box<dyn Fn() -> Timestamp + Send + Sync>,
}

impl GroupCommitter {
    async fn process_jobs(&mut self, jobs: Vec<CommitJob>) {
        let (mut writes, mut answers, mut barriers) = (Vec::new(), Vec::new(), Vec::new());
        let (mut wanted, now) = (Revision::default(), (self.now)());
        for job in jobs {
            match job {
                CommitJob::Write(write, answer) if write.read_set.is_expired(now) => {
                    let _ = answer.send(Err(WriteError::Rejected(WriteRejection::AuthorizationChanged)));
                }
                CommitJob::Write(write, answer) => {
                    writes.push(*write);
                    answers.push(answer);
                }
                CommitJob::Barrier(revision, answer) => {
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
        let behind = self.has_unknown_outcome || self.listener.applied_revision() < wanted;
        let known = if behind { self.catch_up().await } else { Ok(()) };
        let failed = known.map_err(Arc::new).err();
        for answer in barriers {
            let _ = answer.send(failed.clone().map_or(Ok(()), |error| Err(WriteError::Unknown(error))));
        }
    }

    async fn commit(&mut self, writes: Vec<WriteRequest>, answers: Vec<WriteReplySender>) {
        // Nothing is built on a state that is not known.
        if self.has_unknown_outcome
            && let Err(error) = self.catch_up().await
        {
            return self.handle_failed_commit(&writes, answers, CommitError::NotRecorded(error)).await;
        }
        match self.commit_to_store(&writes).await {
            Ok(committed) => self.publish_committed(&writes, committed, answers).await,
            // One bad write must not take the others with it.
            Err(CommitError::NotRecorded(error @ StoreError::Unavailable(_))) if writes.len() > 1 => {
                tracing::warn!(error = &error as &dyn Error, "a batch failed; its writes go one by one");
                for (write, answer) in writes.into_iter().zip(answers) {
                    self.commit_single(write, answer).await;
                }
            }
            Err(error) => self.handle_failed_commit(&writes, answers, error).await,
        }
    }

    async fn commit_single(&mut self, write: WriteRequest, answer: WriteReplySender) {
        let writes = [write];
        if self.has_unknown_outcome
            && let Err(error) = self.catch_up().await
        {
            return self.handle_failed_commit(&writes, vec![answer], CommitError::NotRecorded(error)).await;
        }
        match self.commit_to_store(&writes).await {
            Ok(committed) => self.publish_committed(&writes, committed, vec![answer]).await,
            Err(error) => self.handle_failed_commit(&writes, vec![answer], error).await,
        }
    }

    async fn commit_to_store(&self, writes: &[WriteRequest]) -> Result<CommittedBatch, CommitError> {
        let begun = Instant::now();
        let committed = self.store.commit(writes).await;
        self.commits.record(&committed, begun);
        committed
    }

    async fn publish_committed(
        &mut self,
        writes: &[WriteRequest],
        committed: CommittedBatch,
        answers: Vec<WriteReplySender>,
    ) {
        if let Some((first, _)) = committed.entries.first()
            && let Err(error) = self.apply_missing_before(first.revision).await
        {
            // Recorded, and not in force here before others' changes are.
            return self.handle_failed_commit(writes, answers, CommitError::Unknown(error)).await;
        }
        self.listener.apply_local(&committed.entries);
        for (answer, outcome) in answers.into_iter().zip(committed.outcomes) {
            // A caller that went away does not hear of it; the change stands.
            let _ = answer.send(outcome.map_err(WriteError::Rejected));
        }
    }

    /// Gives the follower what others have committed before this revision.
    async fn apply_missing_before(&mut self, before: Revision) -> Result<(), StoreError> {
        while self.listener.applied_revision().next() < before {
            let seen = self.listener.applied_revision();
            let mut rows = self.store.list_log_after(seen, 1000).await?;
            rows.retain(|row| row.revision < before);
            self.listener.apply_remote(&decode_changes(rows)?);
            if self.listener.applied_revision() == seen {
                let what = format!("the log does not go on from entry {seen} as this process knows it");
                return Err(StoreError::Damaged(what));
            }
        }
        Ok(())
    }

    /// Tells the callers, after the follower has learnt what is in doubt and, if it can be read, what the log
    /// says of it.
    async fn handle_failed_commit(
        &mut self,
        writes: &[WriteRequest],
        answers: Vec<WriteReplySender>,
        error: CommitError,
    ) {
        tracing::error!(error = &error as &dyn Error, writes = writes.len(), "a commit failed");
        for write in writes {
            self.listener.mark_uncertain(write);
        }
        let (error, unknown) = match error {
            CommitError::NotRecorded(error) => (Arc::new(error), false),
            CommitError::Unknown(error) => (Arc::new(error), true),
        };
        self.has_unknown_outcome |= unknown;
        if let Err(error) = self.catch_up().await {
            // The doubts stay until it can be read.
            self.has_unknown_outcome = true;
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
        self.store.settle_pending_commits().await?;
        loop {
            let seen = self.listener.applied_revision();
            let rows = self.store.list_log_after(seen, 1000).await?;
            if rows.is_empty() {
                break;
            }
            let newest = rows.last().map_or(seen, |row| row.revision);
            self.listener.apply_remote(&decode_changes(rows)?);
            if self.listener.applied_revision() < newest {
                let what = format!("the log does not go on from entry {seen} as this process knows it");
                return Err(StoreError::Damaged(what));
            }
        }
        self.has_unknown_outcome = false;
        self.listener.resolve_uncertain();
        Ok(())
    }
}

fn decode_changes(rows: Vec<LogEntry>) -> Result<Vec<(LogEntry, RecordChange)>, StoreError> {
    let rows = rows.into_iter().map(LogEntry::decode_change).collect::<Result<_, _>>();
    rows.map_err(|error| StoreError::Damaged(error.to_string()))
}
