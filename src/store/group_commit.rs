//! Commits waiting writes in groups: one task per process.
//!
//! The task commits all waiting writes in one transaction, lets the index apply them, and only then replies. So the
//! rate of creates is not limited by one disk sync each.
//!
//! Invariant: an acknowledged change is in force in this process before its caller receives the reply.

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

/// The maximum number of writes in one transaction.
const MAX_BATCH: usize = 256;
/// The maximum number of queued writes; beyond it, callers wait for space in the queue.
const QUEUE_CAPACITY: usize = 4096;
/// How often a restriction is attempted concurrently with other changes, before it gets an exclusive turn.
const MAX_SHARED_ATTEMPTS: u32 = 2;

tokio::task_local! {
    static CURRENT_CALL: CallScope;
}

/// A call during which something may be committed.
struct CallScope {
    started_at: Instant,
    recorded: Cell<CallWrites>,
}

/// The commits that were made during a call.
#[derive(Clone, Copy, Debug, Default)]
pub struct CallWrites {
    /// The call has committed a change.
    pub has_committed: bool,
    /// A commit has proven that everything the call read was current: it went to the server that all reads came from.
    /// Without a commit, the reply of the call depends on what it read.
    pub is_linearizable: bool,
}

/// Runs the work of a call, and returns what it committed.
pub async fn track_call_writes<T>(started_at: Instant, work: impl Future<Output = T>) -> (T, CallWrites) {
    let call = CallScope { started_at, recorded: Cell::default() };
    CURRENT_CALL
        .scope(call, async {
            let done = work.await;
            (done, CURRENT_CALL.with(|call| call.recorded.get()))
        })
        .await
}

/// The reason why a write was not made, or may not have been.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// The store rejected the write; nothing is recorded.
    #[error("the change was rejected: {0:?}")]
    Rejected(WriteRejection),
    /// The commit failed, and nothing is recorded. All writes of a batch share the error.
    #[error("the change was not recorded")]
    NotRecorded(#[source] Arc<StoreError>),
    /// The write may be recorded. All writes of a batch share the error.
    #[error("whether the change was recorded is unknown")]
    Unknown(#[source] Arc<StoreError>),
    /// The server is stopping and accepts no more writes.
    #[error("the server is stopping")]
    Stopping,
}

/// Applies committed changes, such as the index does. It receives each change in the order of revisions, before the
/// caller gets its reply.
pub trait ChangeListener: Send + Sync + 'static {
    /// The newest revision that the listener has applied.
    fn applied_revision(&self) -> Revision;
    /// Applies changes that this process has just committed.
    fn apply_local(&self, rows: &[(LogEntry, RecordChange)]);
    /// Applies changes that other processes have committed, or may have.
    fn apply_remote(&self, rows: &[(LogEntry, RecordChange)]) {
        self.apply_local(rows);
    }
    /// Reports a change that may or may not be recorded. Until the log decides, the listener denies whatever the change
    /// denies.
    fn mark_uncertain(&self, write: &WriteRequest);
    /// Reports that the log has decided: what it does not contain was not recorded. A restriction stays in force in
    /// this process anyway, since a caller asked for it.
    fn resolve_uncertain(&self);
}

/// Metrics of commits: their results, durations and numbers of changes.
#[derive(Debug)]
pub struct CommitMetrics {
    results: ShardedCounters,
    durations: ShardedHistograms<11>,
}

impl CommitMetrics {
    const RESULTS: [&str; 3] = ["committed", "not_recorded", "unknown"];
    /// Bucket bounds in nanoseconds: from 250 µs, a commit without a disk sync, to 10 s.
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

    fn record(&self, committed: &Result<CommittedBatch, CommitError>, started_at: Instant) {
        self.durations.record(0, started_at.elapsed());
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

    /// The number of commits by result: `committed`, `not_recorded` or `unknown`.
    pub fn results(&self) -> impl Iterator<Item = (&'static str, u64)> {
        Self::RESULTS.into_iter().enumerate().map(|(at, result)| (result, self.results.get(at)))
    }

    /// The number of committed changes.
    #[must_use]
    pub fn committed_changes(&self) -> u64 {
        self.results.get(Self::RESULTS.len())
    }

    /// The durations of commits, including those that failed.
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
    /// Writes nothing. The reply comes when everything queued before is in force, at least up to this revision.
    Barrier(Revision, oneshot::Sender<Result<(), WriteError>>),
}

/// Permission to attempt a change, until it is dropped.
#[derive(Debug)]
pub enum ChangeTurn {
    /// Other changes may be attempted at the same time.
    Shared(OwnedRwLockReadGuard<()>),
    /// No other change of this process is attempted meanwhile.
    Exclusive(OwnedRwLockWriteGuard<()>),
}

/// A handle to the commit task. Clones share the same task.
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
    /// Starts the commit task on the current runtime. It ends when the last [`CommitHandle`] is dropped and the queue
    /// is empty. `now` is used to reject a change whose authorization has expired before the commit.
    #[must_use]
    pub fn spawn(
        store: Arc<dyn Store>,
        listener: Arc<dyn ChangeListener>,
        now: impl Fn() -> Timestamp + Send + Sync + 'static,
    ) -> (CommitHandle, tokio::task::JoinHandle<()>) {
        let (sender, mut jobs) = mpsc::channel(QUEUE_CAPACITY);
        let commits = Arc::new(CommitMetrics::default());
        let mut committer = GroupCommitter {
            store: store.clone(),
            listener: listener.clone(),
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
        (CommitHandle { jobs: sender, change_lock: Arc::default(), listener, store, commits }, task)
    }

    /// The metrics of the commit task.
    #[must_use]
    pub fn commits(&self) -> &Arc<CommitMetrics> {
        &self.commits
    }

    /// Waits for a turn to attempt a change; the caller holds it from the authorization to the reply. A restriction
    /// that has lost to other changes gets an exclusive turn: it cannot lose again to this process.
    pub async fn lock_for_change(&self, action: AuditAction, attempt: u32) -> ChangeTurn {
        match action.is_restriction() && attempt >= MAX_SHARED_ATTEMPTS {
            true => ChangeTurn::Exclusive(self.change_lock.clone().write_owned().await),
            false => ChangeTurn::Shared(self.change_lock.clone().read_owned().await),
        }
    }

    /// Makes one change. Returns when it is durable and the listener has applied it.
    ///
    /// # Errors
    /// If the store rejects it or fails, or the outcome is unknown.
    pub async fn write(&self, write: WriteRequest) -> Result<WriteOutcome, WriteError> {
        let (reply, outcome) = oneshot::channel();
        let written = async {
            self.jobs
                .send(CommitJob::Write(Box::new(write), reply))
                .await
                .map_err(|_| WriteError::Stopping)?;
            outcome.await.map_err(|_| WriteError::Stopping)?
        };
        let outcome = trace::in_phase_span(CallPhase::Commit, written).await?;
        if matches!(outcome, WriteOutcome::Applied(_)) {
            // Outside of a call, nothing evaluates it.
            let _ = CURRENT_CALL.try_with(|call| {
                let proven = self.store.is_single_server_since(call.started_at);
                call.recorded.set(CallWrites { has_committed: true, is_linearizable: proven });
            });
        }
        Ok(outcome)
    }

    /// Returns when everything recorded up to `revision` is in force. A record that was read from the store may be
    /// newer than what the listener has applied.
    ///
    /// # Errors
    /// If the log cannot be read.
    pub async fn wait_applied(&self, revision: Revision) -> Result<(), WriteError> {
        if self.listener.applied_revision() >= revision { Ok(()) } else { self.send_barrier(revision).await }
    }

    /// Returns when everything is in force that any process recorded before this call.
    ///
    /// # Errors
    /// If the log cannot be read.
    pub async fn wait_caught_up(&self) -> Result<(), WriteError> {
        self.send_barrier(Revision(u64::MAX)).await
    }

    async fn send_barrier(&self, revision: Revision) -> Result<(), WriteError> {
        let (reply, done) = oneshot::channel();
        self.jobs.send(CommitJob::Barrier(revision, reply)).await.map_err(|_| WriteError::Stopping)?;
        done.await.map_err(|_| WriteError::Stopping)?
    }
}

type WriteReplySender = oneshot::Sender<Result<WriteOutcome, WriteError>>;

struct GroupCommitter {
    store: Arc<dyn Store>,
    listener: Arc<dyn ChangeListener>,
    commits: Arc<CommitMetrics>,
    /// The outcome of a commit is unknown, and the log has not been read since.
    has_unknown_outcome: bool,
    now: Box<dyn Fn() -> Timestamp + Send + Sync>,
}

impl GroupCommitter {
    async fn process_jobs(&mut self, jobs: Vec<CommitJob>) {
        let (mut writes, mut replies, mut barriers) = (Vec::new(), Vec::new(), Vec::new());
        let (mut wanted, now) = (Revision::default(), (self.now)());
        for job in jobs {
            match job {
                CommitJob::Write(write, reply) if write.read_set.is_expired(now) => {
                    let _ = reply.send(Err(WriteError::Rejected(WriteRejection::AuthorizationChanged)));
                }
                CommitJob::Write(write, reply) => {
                    writes.push(*write);
                    replies.push(reply);
                }
                CommitJob::Barrier(revision, reply) => {
                    wanted = wanted.max(revision);
                    barriers.push(reply);
                }
            }
        }
        if !writes.is_empty() {
            self.commit(writes, replies).await;
        }
        if barriers.is_empty() {
            return;
        }
        let behind = self.has_unknown_outcome || self.listener.applied_revision() < wanted;
        let known = if behind { self.catch_up().await } else { Ok(()) };
        let failed = known.map_err(Arc::new).err();
        for reply in barriers {
            let _ = reply.send(failed.clone().map_or(Ok(()), |error| Err(WriteError::Unknown(error))));
        }
    }

    async fn commit(&mut self, writes: Vec<WriteRequest>, replies: Vec<WriteReplySender>) {
        // Nothing may be committed on top of an unknown state.
        if self.has_unknown_outcome
            && let Err(error) = self.catch_up().await
        {
            return self.handle_failed_commit(&writes, replies, CommitError::NotRecorded(error)).await;
        }
        match self.commit_to_store(&writes).await {
            Ok(committed) => self.publish_committed(&writes, committed, replies).await,
            // One bad write must not fail the others.
            Err(CommitError::NotRecorded(error @ StoreError::Unavailable(_))) if writes.len() > 1 => {
                tracing::warn!(
                    error = &error as &dyn Error,
                    "batch failed: committing its writes one by one"
                );
                for (write, reply) in writes.into_iter().zip(replies) {
                    self.commit_single(write, reply).await;
                }
            }
            Err(error) => self.handle_failed_commit(&writes, replies, error).await,
        }
    }

    async fn commit_single(&mut self, write: WriteRequest, reply: WriteReplySender) {
        let writes = [write];
        if self.has_unknown_outcome
            && let Err(error) = self.catch_up().await
        {
            return self.handle_failed_commit(&writes, vec![reply], CommitError::NotRecorded(error)).await;
        }
        match self.commit_to_store(&writes).await {
            Ok(committed) => self.publish_committed(&writes, committed, vec![reply]).await,
            Err(error) => self.handle_failed_commit(&writes, vec![reply], error).await,
        }
    }

    async fn commit_to_store(&self, writes: &[WriteRequest]) -> Result<CommittedBatch, CommitError> {
        let started_at = Instant::now();
        let committed = self.store.commit(writes).await;
        self.commits.record(&committed, started_at);
        committed
    }

    async fn publish_committed(
        &mut self,
        writes: &[WriteRequest],
        committed: CommittedBatch,
        replies: Vec<WriteReplySender>,
    ) {
        if let Some((first, _)) = committed.entries.first()
            && let Err(error) = self.apply_missing_before(first.revision).await
        {
            // Recorded, but it cannot be in force here before the changes of other processes are.
            return self.handle_failed_commit(writes, replies, CommitError::Unknown(error)).await;
        }
        self.listener.apply_local(&committed.entries);
        for (reply, outcome) in replies.into_iter().zip(committed.outcomes) {
            // The caller may be gone; the change is recorded anyway.
            let _ = reply.send(outcome.map_err(WriteError::Rejected));
        }
    }

    /// Applies what other processes have committed before this revision.
    async fn apply_missing_before(&mut self, before: Revision) -> Result<(), StoreError> {
        while self.listener.applied_revision().next() < before {
            let seen = self.listener.applied_revision();
            let mut rows = self.store.list_log_after(seen, 1000).await?;
            rows.retain(|row| row.revision < before);
            self.listener.apply_remote(&decode_changes(rows)?);
            if self.listener.applied_revision() == seen {
                let what = format!("the log does not continue from entry {seen} as this process knows it");
                return Err(StoreError::Damaged(what));
            }
        }
        Ok(())
    }

    /// Marks the writes as uncertain, reads the log to decide them if possible, and replies to the callers.
    async fn handle_failed_commit(
        &mut self,
        writes: &[WriteRequest],
        replies: Vec<WriteReplySender>,
        error: CommitError,
    ) {
        tracing::error!(error = &error as &dyn Error, writes = writes.len(), "commit failed");
        for write in writes {
            self.listener.mark_uncertain(write);
        }
        let (error, unknown) = match error {
            CommitError::NotRecorded(error) => (Arc::new(error), false),
            CommitError::Unknown(error) => (Arc::new(error), true),
        };
        self.has_unknown_outcome |= unknown;
        if let Err(error) = self.catch_up().await {
            // The writes stay uncertain until the log can be read.
            self.has_unknown_outcome = true;
            tracing::error!(error = &error as &dyn Error, "reading the log after a failed commit failed");
        }
        for reply in replies {
            let error = error.clone();
            let _ = reply.send(Err(if unknown {
                WriteError::Unknown(error)
            } else {
                WriteError::NotRecorded(error)
            }));
        }
    }

    /// Applies everything of the log that the listener lacks. After an unknown outcome, the log decides.
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
                let what = format!("the log does not continue from entry {seen} as this process knows it");
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
