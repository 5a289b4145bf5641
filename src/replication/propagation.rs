//! Waits until a restriction is in force everywhere: until no replica can allow what it forbids.
//!
//! Each wait drives a propagation tracker of `domain::lease`, and reports its progress. One reading of the replicas'
//! rows serves every change that waited before it. The acknowledgment of this process needs no reading.

use std::{collections::HashMap, sync::Arc, time::Duration};

use tokio::{
    sync::{mpsc, oneshot, watch},
    time::{Instant, sleep, sleep_until},
};

use crate::{
    clock::Clock,
    domain::{
        lease::{
            AttemptId, BootInstant, LogPosition, PropagationTracker, ReplicaId,
            propagation_tracker::{
                PropagationAction, PropagationEvent, PropagationOutcome, PropagationStatus as Progress,
            },
        },
        log::ChainHash,
        time::{Revision, Timestamp},
    },
    metrics_core::{HistogramSnapshot, ShardedCounters, ShardedHistograms},
    store::{
        StoreError,
        replica_registry::{ReplicaRegistry, ReplicaSnapshot},
    },
    trace::{self, CallPhase},
};

use super::{log_applier::LogApplier, replica_status::ReplicaStatus};

/// The maximum wait if a replica's lease never expires.
const MAX_WAIT: Duration = Duration::from_secs(300);
/// The delay after a commit before the replicas' rows are read.
const FIRST_POLL_DELAY: Duration = Duration::from_millis(1);
/// The delay if notifications of acknowledgments arrive: they usually make the reading unnecessary.
const NOTIFIED_POLL_DELAY: Duration = Duration::from_millis(10);
/// The maximum number of changes that wait for a reading; more wait for room in the queue.
const MAX_WAITING_READS: usize = 1024;

/// The progress of a change, with the names of the replicas.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PropagationReport {
    /// The revision of the change.
    pub(crate) revision: Revision,
    /// Whether no replica can allow any more what the change forbids.
    pub(crate) complete: bool,
    /// The names of the replicas that have acknowledged the change.
    pub(crate) confirmed: Vec<String>,
    /// The replicas that have not acknowledged it.
    pub(crate) unconfirmed: Vec<LaggingReplica>,
    /// When the change will be complete at the latest; `None` if that is unknown or depends on
    /// replicas that must renew first.
    pub(crate) complete_by: Option<Timestamp>,
    /// Whether a synchronous standby of the database has the change too.
    pub(crate) sync_replicated: bool,
}

/// The effect of a change on Checks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ChangeEffect {
    /// The change restricts nothing, so there is nothing to wait for.
    #[default]
    Grants,
    /// A Check that was allowed before the change may be denied after it.
    Restricts {
        /// The change was made before: the repeated call waits as the first one did.
        is_repeat: bool,
    },
}

/// A replica that has not acknowledged a change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LaggingReplica {
    /// The name of the replica.
    pub(crate) replica: String,
    /// Its last renewal, by the database's clock.
    pub(crate) last_seen: Timestamp,
    /// When its lease has expired at the latest; `None`: never.
    pub(crate) lease_ends_by: Option<Timestamp>,
}

/// Why a change is not known to be in force everywhere.
#[derive(Clone, Debug)]
pub enum PropagationError {
    /// The deadline passed first; the report has the lagging replicas.
    TimedOut(Box<PropagationReport>),
    /// The database has lost the change.
    Lost(Revision),
    /// The database did not answer.
    DatabaseUnavailable,
    /// The server is stopping, and no longer waits.
    Stopping(Revision),
}

/// Metrics of the waits for propagation.
#[derive(Debug)]
pub struct PropagationMetrics {
    durations: ShardedHistograms<11>,
    incomplete_count: ShardedCounters,
}

impl PropagationMetrics {
    /// From 1 ms (a change within one process) to 2 min (beyond the usual lease), in nanoseconds.
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

    /// How long restrictions took until they were in force everywhere.
    #[must_use]
    pub(crate) fn durations(&self) -> HistogramSnapshot {
        self.durations.snapshot(0)
    }

    /// How many restrictions were not known to be in force when the call returned.
    #[must_use]
    pub(crate) fn incomplete_count(&self) -> u64 {
        self.incomplete_count.get(0)
    }
}

impl Default for PropagationMetrics {
    fn default() -> Self {
        PropagationMetrics {
            durations: ShardedHistograms::new(1, &Self::BOUNDS),
            incomplete_count: ShardedCounters::new(1),
        }
    }
}

/// Waits for changes to be in force on every replica.
#[derive(Clone)]
pub struct PropagationWaiter {
    clock: Arc<dyn Clock>,
    replica_access: Option<ReplicaAccess>,
    stopping: watch::Sender<bool>,
    metrics: Arc<PropagationMetrics>,
}

#[derive(Clone)]
struct ReplicaAccess {
    registry: Arc<dyn ReplicaRegistry>,
    log_applier: Arc<LogApplier>,
    status: Arc<ReplicaStatus>,
    read_requests: mpsc::Sender<SnapshotRequest>,
}

type SnapshotRequest = (Revision, oneshot::Sender<Result<Arc<ReplicaSnapshot>, Arc<StoreError>>>);

impl std::fmt::Debug for PropagationWaiter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PropagationWaiter")
            .field("alone", &self.replica_access.is_none())
            .finish_non_exhaustive()
    }
}

impl PropagationWaiter {
    /// For the only process on a database: a change that is in force here is in force everywhere.
    #[must_use]
    pub(crate) fn for_single_process(clock: Arc<dyn Clock>) -> PropagationWaiter {
        PropagationWaiter {
            clock,
            replica_access: None,
            stopping: watch::Sender::new(false),
            metrics: Arc::default(),
        }
    }

    /// For replicas. Starts a task on the current runtime that reads the replicas' rows.
    #[must_use]
    pub(crate) fn for_replicas(
        registry: Arc<dyn ReplicaRegistry>,
        log_applier: Arc<LogApplier>,
        status: Arc<ReplicaStatus>,
        clock: Arc<dyn Clock>,
    ) -> PropagationWaiter {
        let (read_requests, requests) = mpsc::channel(MAX_WAITING_READS);
        tokio::spawn(serve_snapshot_reads(registry.clone(), status.clone(), requests));
        let access = Some(ReplicaAccess { registry, log_applier, status, read_requests });
        PropagationWaiter {
            clock,
            replica_access: access,
            stopping: watch::Sender::new(false),
            metrics: Arc::default(),
        }
    }

    /// The metrics of all waits.
    #[must_use]
    pub(crate) fn metrics(&self) -> &Arc<PropagationMetrics> {
        &self.metrics
    }

    /// The report of a change that needs no wait.
    #[must_use]
    pub(crate) fn complete_report(&self, revision: Revision) -> PropagationReport {
        PropagationReport {
            revision,
            complete: true,
            confirmed: Vec::new(),
            unconfirmed: Vec::new(),
            complete_by: Some(self.clock.now()),
            sync_replicated: false,
        }
    }

    /// Returns whether the log or its archive contains a revision. `newest` is the newest one known here.
    ///
    /// # Errors
    /// The database does not answer.
    pub(crate) async fn is_recorded(
        &self,
        revision: Revision,
        newest: Revision,
    ) -> Result<bool, PropagationError> {
        let is_known = revision <= newest;
        match &self.replica_access {
            Some(access) if !is_known => match access.fetch_entry_hash(revision).await {
                Err(PropagationError::Lost(_)) => Ok(false),
                found => found.map(|_| true),
            },
            _ => Ok(is_known),
        }
    }

    /// Waits until a committed and applied change is in force everywhere, or until the deadline. A repetition
    /// (`is_repeat`) waits too, since the first call may not have finished.
    ///
    /// # Errors
    /// The change is not in force everywhere by then, or the database has lost it.
    pub(crate) async fn wait(
        &self,
        revision: Revision,
        is_repeat: bool,
        deadline: Option<Instant>,
    ) -> Result<PropagationReport, PropagationError> {
        let (committed, started) = (self.clock.boottime(), Instant::now());
        let on_report = &mut |_| ();
        let propagation = self.observe_propagation(revision, is_repeat, committed, deadline, on_report);
        let ended = trace::in_phase_span(CallPhase::Propagation, propagation).await;
        match &ended {
            Ok(_) => self.metrics.durations.record(0, started.elapsed()),
            Err(_) => self.metrics.incomplete_count.add(0, 1),
        }
        ended
    }

    /// Waits only if the change is a restriction.
    ///
    /// # Errors
    /// As [`PropagationWaiter::wait`].
    pub(crate) async fn wait_if_restricting(
        &self,
        revision: Revision,
        effect: ChangeEffect,
        deadline: Option<Instant>,
    ) -> Result<PropagationReport, PropagationError> {
        match effect {
            ChangeEffect::Grants => Ok(self.complete_report(revision)),
            ChangeEffect::Restricts { is_repeat } => self.wait(revision, is_repeat, deadline).await,
        }
    }

    /// Like [`PropagationWaiter::wait`], without a deadline; calls `on_report` after each reading.
    ///
    /// # Errors
    /// As [`PropagationWaiter::wait`].
    pub(crate) async fn watch(
        &self,
        revision: Revision,
        on_report: &mut (dyn FnMut(PropagationReport) + Send),
    ) -> Result<PropagationReport, PropagationError> {
        self.observe_propagation(revision, true, self.clock.boottime(), None, on_report).await
    }

    async fn observe_propagation(
        &self,
        revision: Revision,
        is_repeat: bool,
        committed: BootInstant,
        deadline: Option<Instant>,
        on_report: &mut (dyn FnMut(PropagationReport) + Send),
    ) -> Result<PropagationReport, PropagationError> {
        let Some(access) = &self.replica_access else { return Ok(self.complete_report(revision)) };
        let hash = match access.log_applier.entry_hash(revision) {
            Some(hash) => hash,
            None => match access.fetch_entry_hash(revision).await? {
                Some(hash) => hash,
                // Archived entries were acknowledged by every replica.
                None => return Ok(self.complete_report(revision)),
            },
        };
        let change = LogPosition { revision, hash };
        let mut wait = PropagationWait {
            clock: &*self.clock,
            replica_access: access,
            tracker: PropagationTracker::with_unknown_lease(change, is_repeat, committed),
            hash,
            replica_names: HashMap::new(),
            sync_replicated: false,
            deadline,
            give_up_at: committed.saturating_add(MAX_WAIT),
            has_seen_acks: false,
        };
        let mut stopping = self.stopping.subscribe();
        let ended = async {
            // The replicas have not received the change yet: reading at once only takes time from them.
            if !is_repeat && access.status.replica_count() > 1 {
                let expects_acks =
                    access.status.has_ack_notifications() && access.status.ack_tracker().is_receiving();
                tokio::select! {
                    () = sleep(if expects_acks { NOTIFIED_POLL_DELAY } else { FIRST_POLL_DELAY }) => {}
                    () = wait.wait_for_acks() => {}
                }
            }
            wait.run(on_report).await
        };
        tokio::select! {
            ended = ended => ended,
            _ = stopping.wait_for(|stop| *stop) => Err(PropagationError::Stopping(revision)),
        }
    }

    /// Ends all waits with [`PropagationError::Stopping`].
    pub(crate) fn stop(&self) {
        self.stopping.send_replace(true);
    }
}

impl ReplicaAccess {
    async fn read_snapshot(&self, revision: Revision) -> Result<Arc<ReplicaSnapshot>, ()> {
        let (reply, read) = oneshot::channel();
        self.read_requests.send((revision, reply)).await.map_err(drop)?;
        read.await.map_err(drop)?.map_err(|error| {
            tracing::debug!(error = &*error as &dyn std::error::Error, "reading the replicas' rows failed");
        })
    }

    /// The hash of an entry; `None` if it is archived.
    async fn fetch_entry_hash(&self, revision: Revision) -> Result<Option<ChainHash>, PropagationError> {
        let snapshot = self.registry.list_replicas(&[revision]).await.map_err(|error| {
            tracing::error!(error = &error as &dyn std::error::Error, "reading the log failed");
            PropagationError::DatabaseUnavailable
        })?;
        match snapshot.entry_hashes.get(&revision) {
            Some(hash) => Ok(Some(*hash)),
            None if revision <= snapshot.archived_up_to => Ok(None),
            None => Err(PropagationError::Lost(revision)),
        }
    }
}

/// The wait for one change.
struct PropagationWait<'a> {
    clock: &'a dyn Clock,
    replica_access: &'a ReplicaAccess,
    tracker: PropagationTracker,
    hash: ChainHash,
    replica_names: HashMap<ReplicaId, String>,
    sync_replicated: bool,
    deadline: Option<Instant>,
    give_up_at: BootInstant,
    /// All known replicas seem to have acknowledged it. This shortens the wait once.
    has_seen_acks: bool,
}

impl PropagationWait<'_> {
    async fn wait_for_acks(&mut self) {
        if self.has_seen_acks {
            return std::future::pending().await;
        }
        let (own, revision) = (self.replica_access.status.replica_id(), self.tracker.status().revision);
        self.replica_access.status.ack_tracker().wait_for_all(own, revision).await;
        self.has_seen_acks = true;
    }

    async fn run(
        &mut self,
        on_report: &mut (dyn FnMut(PropagationReport) + Send),
    ) -> Result<PropagationReport, PropagationError> {
        let mut event = PropagationEvent::Tick;
        loop {
            let now = self.clock.boottime();
            let read = matches!(event, PropagationEvent::Listed { .. });
            let actions = self.tracker.handle(event, now);
            if read {
                on_report(self.report(self.tracker.status()));
            }
            let wake = match actions.into_iter().next() {
                Some(PropagationAction::Finish(PropagationOutcome::Complete(progress))) => {
                    return Ok(self.report(progress));
                }
                Some(PropagationAction::Finish(PropagationOutcome::Lost)) => {
                    return Err(PropagationError::Lost(self.tracker.status().revision));
                }
                Some(PropagationAction::ListRows { attempt }) => {
                    event = self.read_listing(attempt).await?;
                    continue;
                }
                None => self.tracker.wake_at().unwrap_or(self.give_up_at),
            };
            if now >= self.give_up_at && self.tracker.status().completes_by.is_none() {
                return Err(self.timeout_error());
            }
            let deadline = self.deadline;
            event = tokio::select! {
                () = sleep(wake.saturating_duration_since(now)) => PropagationEvent::Tick,
                () = self.wait_for_acks() => PropagationEvent::Hint,
                () = sleep_until_deadline(deadline) => return Err(self.timeout_error()),
            };
        }
    }

    /// Reads the rows, unless the deadline passes first.
    async fn read_listing(&mut self, attempt: AttemptId) -> Result<PropagationEvent, PropagationError> {
        let progress = self.tracker.status();
        // The change is complete by then regardless of the rows, so an unreachable database need not be waited for.
        let by = progress.completes_by.unwrap_or(self.give_up_at);
        let time_left = by.saturating_duration_since(self.clock.boottime());
        let snapshot = tokio::select! {
            snapshot = self.replica_access.read_snapshot(progress.revision) => snapshot,
            () = sleep(time_left) => return Ok(PropagationEvent::Failed { attempt }),
            () = sleep_until_deadline(self.deadline) => return Err(self.timeout_error()),
        };
        let Ok(snapshot) = snapshot else { return Ok(PropagationEvent::Failed { attempt }) };
        self.replica_names.clone_from(&snapshot.names);
        self.sync_replicated = snapshot.sync_replicated;
        let mut listing = snapshot.listing.clone();
        // This process need not acknowledge its own change, if it has applied exactly this one, not another of the
        // same number.
        if self.replica_access.log_applier.entry_hash(progress.revision) == Some(self.hash) {
            let own = self.replica_access.status.replica_id();
            for row in listing.rows.iter_mut().filter(|row| Some(row.id) == own && row.applied.is_some()) {
                row.applied = row.applied.max(Some(progress.revision));
            }
        }
        let archived = (progress.revision <= snapshot.archived_up_to).then_some(self.hash);
        let link = snapshot.entry_hashes.get(&progress.revision).copied().or(archived);
        Ok(PropagationEvent::Listed { attempt, listing, change_hash: link })
    }

    fn timeout_error(&self) -> PropagationError {
        PropagationError::TimedOut(Box::new(self.report(self.tracker.status())))
    }

    fn report(&self, progress: Progress) -> PropagationReport {
        let now = (self.clock.boottime(), self.clock.now());
        let wall = |at: BootInstant| {
            now.1
                .saturating_add(at.saturating_duration_since(now.0))
                .saturating_sub(now.0.saturating_duration_since(at))
        };
        let name = |id: &ReplicaId| self.replica_names.get(id).cloned().unwrap_or_else(|| id.0.to_string());
        let unconfirmed = progress.unacknowledged.iter().map(|lagging| LaggingReplica {
            replica: name(&lagging.id),
            last_seen: lagging.last_seen,
            lease_ends_by: lagging.lease_expires_by.map(wall),
        });
        let complete_by = if progress.is_complete { Some(now.1) } else { progress.completes_by.map(wall) };
        PropagationReport {
            revision: progress.revision,
            complete: progress.is_complete,
            confirmed: progress.acknowledged.iter().map(name).collect(),
            unconfirmed: unconfirmed.collect(),
            complete_by,
            sync_replicated: self.sync_replicated,
        }
    }
}

async fn sleep_until_deadline(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

/// Serves all requests that arrived before a reading with that one reading.
async fn serve_snapshot_reads(
    registry: Arc<dyn ReplicaRegistry>,
    status: Arc<ReplicaStatus>,
    mut requests: mpsc::Receiver<SnapshotRequest>,
) {
    let mut waiting = Vec::new();
    while requests.recv_many(&mut waiting, MAX_WAITING_READS).await > 0 {
        let revisions: Vec<_> = waiting.iter().map(|(revision, _)| *revision).collect();
        let read = registry.list_replicas(&revisions).await.map(Arc::new).map_err(Arc::new);
        if let Ok(snapshot) = &read {
            status.ack_tracker().update_replicas(snapshot);
        }
        for (_, reply) in waiting.drain(..) {
            // The caller may have given up.
            let _ = reply.send(read.clone());
        }
    }
}
