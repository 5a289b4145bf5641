//! Runs a replica: executes the actions of its state machine, and feeds the results back as events.
//!
//! One task drives one machine. Requests run in separate tasks and answer through the channel, so that none delays
//! the clock. The rules are in `domain::lease`.

use std::{
    sync::{Arc, PoisonError, atomic::Ordering},
    time::Duration,
};

use tokio::{
    sync::{mpsc, watch},
    task::{AbortHandle, JoinHandle},
    time::sleep,
};
use uuid::Uuid;

use crate::{
    clock::random_bytes,
    domain::{
        lease::{
            AttemptId, LogPosition, RenewalRequest, Replica, ReplicaId,
            replica::{ReplicaAction, ReplicaEvent, ReplicaState},
        },
        log::LogEntry,
        time::Revision,
    },
    store::{
        LogHead, SnapshotLoader, StoreError,
        replica_registry::{LeaseConfig, RenewalOutcome, ReplicaRegistry},
    },
};

pub(crate) use super::replica_dependencies::ReplicaDependencies;
pub use super::replica_status::ReplicaStatus;

use super::{
    log_applier::ApplyError,
    log_tailer, reaper, regression,
    replica_input::{ReplicaTaskInput, failed_input, log_failure},
};

/// The maximum number of queued inputs. Each request has one, and there are few.
const EVENT_QUEUE: usize = 64;
/// The time limit for deleting the row at the stop. If it fails, others wait until the lease expires.
const DEREGISTER_TIMEOUT: Duration = Duration::from_secs(2);

/// The handle of a running replica.
#[derive(Debug)]
pub(crate) struct RunningReplica {
    /// Whether the lease is valid, so that Checks may allow.
    pub(crate) serving: watch::Receiver<bool>,
    /// Becomes true when the replica has failed permanently.
    pub(crate) failed: watch::Receiver<bool>,
    stop_sender: watch::Sender<bool>,
    task: JoinHandle<()>,
    helper_tasks: Vec<JoinHandle<()>>,
}

impl RunningReplica {
    /// Ends the lease, and then deletes the row.
    pub(crate) async fn stop(self) {
        self.stop_sender.send_replace(true);
        if tokio::time::timeout(DEREGISTER_TIMEOUT, self.task).await.is_err() {
            tracing::warn!(
                "the replica's row was not deleted in time: revocations wait until its lease expires"
            );
        }
        self.helper_tasks.iter().for_each(JoinHandle::abort);
    }
}

/// Starts a replica with the database's lease settings.
#[must_use]
pub(crate) fn start_replica(
    dependencies: ReplicaDependencies,
    LeaseConfig { lease, epoch, .. }: LeaseConfig,
) -> RunningReplica {
    let (stop_sender, stopping) = watch::channel(false);
    let (serving, is_serving) = watch::channel(false);
    let (failed, has_failed) = watch::channel(false);
    let (input_sender, inputs) = mpsc::channel(EVENT_QUEUE);
    let helper_tasks = vec![
        tokio::spawn(reaper::run_reaper(
            dependencies.registry.clone(),
            dependencies.clock.clone(),
            dependencies.status.clone(),
            lease,
        )),
        tokio::spawn(log_tailer::tail_log(
            dependencies.registry.clone(),
            dependencies.log_applier.clone(),
            dependencies.status.clone(),
            input_sender.clone(),
        )),
        tokio::spawn(log_tailer::forward_positions(dependencies.log_applier.clone(), input_sender.clone())),
        tokio::spawn(log_tailer::forward_divergences(dependencies.log_applier.clone(), input_sender.clone())),
    ];
    let driver = ReplicaDriver {
        state_machine: Replica::new(lease),
        status: dependencies.status.clone(),
        dependencies,
        input_sender,
        requests: Vec::new(),
        load_lock: Arc::default(),
        load_abort: None,
        epoch,
        announced_epoch: epoch,
        renewal_entries: None,
        serving,
        failed,
    };
    let task = tokio::spawn(driver.run(inputs, stopping));
    RunningReplica { serving: is_serving, failed: has_failed, stop_sender, task, helper_tasks }
}

struct ReplicaDriver {
    state_machine: Replica,
    dependencies: ReplicaDependencies,
    status: Arc<ReplicaStatus>,
    input_sender: mpsc::Sender<ReplicaTaskInput>,
    requests: Vec<(AttemptId, JoinHandle<()>)>,
    /// One load at a time: a new one starts after the previous one has ended.
    load_lock: Arc<tokio::sync::Mutex<()>>,
    load_abort: Option<AbortHandle>,
    /// The epoch of the index's history, and the one that the newest renewal announced.
    epoch: u64,
    announced_epoch: u64,
    /// The entries of the newest renewal, until they are applied.
    renewal_entries: Option<(AttemptId, Vec<LogEntry>)>,
    serving: watch::Sender<bool>,
    failed: watch::Sender<bool>,
}

impl ReplicaDriver {
    async fn run(
        mut self,
        mut inputs: mpsc::Receiver<ReplicaTaskInput>,
        mut stopping: watch::Receiver<bool>,
    ) {
        let mut event = ReplicaEvent::Tick;
        loop {
            self.handle_event(event).await;
            if self.state_machine.state() == ReplicaState::Following {
                self.epoch = self.announced_epoch;
            }
            self.publish_status();
            if self.state_machine.state() == ReplicaState::Stopped {
                self.requests.iter().for_each(|(_, request)| request.abort());
                return;
            }
            event = tokio::select! {
                () = wait_for_stop(&mut stopping) => ReplicaEvent::Stop,
                Some(input) = inputs.recv() => match self.interpret_input(input) {
                    Some(event) => event,
                    None => fail_permanently(&self.failed).await,
                },
                () = sleep(self.time_until_due()) => ReplicaEvent::Tick,
            };
            #[cfg(keyward_breakable)]
            if event == ReplicaEvent::Tick
                && let Some(waited) = self.receive_late_input(&mut inputs).await
            {
                event = waited;
            }
        }
    }

    /// Sometimes takes a waiting input before the clock shows that it is late.
    ///
    /// Without the invariant that a lease counts from the sending, that must become visible in tests.
    #[cfg(keyward_breakable)]
    async fn receive_late_input(
        &mut self,
        inputs: &mut mpsc::Receiver<ReplicaTaskInput>,
    ) -> Option<ReplicaEvent> {
        use crate::domain::lease::{AllInvariants, InvariantSet as _, LeaseInvariant};
        if AllInvariants.enforces(LeaseInvariant::LeaseCountsFromSending) {
            return None;
        }
        let input = tokio::time::timeout(Duration::from_millis(20), inputs.recv()).await.ok()??;
        self.interpret_input(input)
    }

    /// How long nothing is due: until the next request, or until the lease ends, which health must show.
    fn time_until_due(&self) -> Duration {
        const AT_MOST: Duration = Duration::from_secs(3600);
        let now = self.dependencies.clock.boottime();
        let deadline = self.dependencies.lease.deadline();
        let ends = (*self.serving.borrow()).then_some(deadline);
        [self.state_machine.wake_at(), ends]
            .into_iter()
            .flatten()
            .map(|at| at.saturating_duration_since(now))
            .min()
            .unwrap_or(AT_MOST)
    }

    /// Stores the results of a request, and translates the input to an event.
    fn interpret_input(&mut self, input: ReplicaTaskInput) -> Option<ReplicaEvent> {
        Some(match input {
            ReplicaTaskInput::Event(event) => {
                if let ReplicaEvent::Failed { .. } = event {
                    self.status.failures.fetch_add(1, Ordering::Relaxed);
                }
                // A divergence from an index that was replaced meanwhile does not concern the new one.
                match event {
                    ReplicaEvent::Diverged { local_position, .. }
                        if self.dependencies.log_applier.position() != Some(local_position) =>
                    {
                        ReplicaEvent::Tick
                    }
                    event => event,
                }
            }
            ReplicaTaskInput::Renewed(attempt, renewed) => {
                self.status.renewals.fetch_add(1, Ordering::Relaxed);
                let RenewalOutcome { reply, entries, epoch, replica_count: replicas } = *renewed;
                self.dependencies.lease.set_shared(replicas > 1);
                self.status.replica_count.store(replicas, Ordering::Relaxed);
                self.announced_epoch = epoch;
                self.renewal_entries = Some((attempt, entries));
                ReplicaEvent::Renewed { attempt, reply }
            }
            ReplicaTaskInput::Loaded(attempt, LogHead { revision, hash }) => {
                ReplicaEvent::Loaded { attempt, at: LogPosition { revision, hash } }
            }
            ReplicaTaskInput::Damaged(error) => {
                tracing::error!(
                    error = &error as &dyn std::error::Error,
                    "loading the keys failed: the database is damaged"
                );
                return None;
            }
        })
    }

    /// Passes an event to the state machine, and executes its actions.
    async fn handle_event(&mut self, event: ReplicaEvent) {
        let mut events = vec![event];
        while let Some(event) = events.pop() {
            let now = self.dependencies.clock.boottime();
            let actions = self.state_machine.handle(event, now);
            self.status.set_replica_id(self.state_machine.row_id());
            for action in actions {
                if let Err(error) = self.execute(action).await {
                    // The remaining actions assume that these changes are applied.
                    self.dependencies.lease.expire_now();
                    events.extend(self.dependencies.log_applier.divergence_event(error));
                    break;
                }
            }
        }
    }

    async fn execute(&mut self, action: ReplicaAction) -> Result<(), ApplyError> {
        match action {
            ReplicaAction::Register { attempt } => self.register(attempt),
            ReplicaAction::Load { attempt } => self.load(attempt),
            ReplicaAction::Renew(renewal) => self.renew(renewal),
            ReplicaAction::Abandon { attempt } => self.abandon(attempt),
            ReplicaAction::InstallSnapshot { .. } => {
                let cutoff = self.dependencies.clock.now().saturating_sub(self.dependencies.retention);
                let index = self.dependencies.log_applier.index();
                index.evict(cutoff);
                tracing::info!(keys = index.len(), replica = self.dependencies.name, "the index is loaded");
            }
            ReplicaAction::ApplyChanges { attempt } => {
                #[cfg(keyward_breakable)]
                log_tailer::delay_apply().await;
                self.apply_renewal(attempt)?;
            }
            ReplicaAction::PublishDeadline { deadline, as_of } => {
                self.dependencies.lease.publish(deadline, as_of)
            }
            ReplicaAction::DenyAll => self.dependencies.lease.expire_now(),
            ReplicaAction::EnterRegressed { local_position, database_hash, head } => {
                self.enter_regression(local_position, database_hash.is_some(), head.0)
            }
            ReplicaAction::ReportClockStall { stall } => {
                self.status.clock_stall_count.fetch_add(1, Ordering::Relaxed);
                tracing::warn!(
                    missing = ?stall,
                    "this machine's clock stood still, or the database's was set forward; the lease is shortened by as \
                     much. Keys revoked meanwhile may have been allowed here. Do not suspend, snapshot or move the \
                     machine while Keyward serves on it"
                );
            }
            ReplicaAction::Deregister { id } => self.deregister(id).await,
        }
        Ok(())
    }

    /// Runs a request in a separate task.
    fn spawn_request(
        &mut self,
        attempt: AttemptId,
        request: impl Future<Output = ReplicaTaskInput> + Send + 'static,
    ) {
        let input_sender = self.input_sender.clone();
        self.requests.retain(|(_, request)| !request.is_finished());
        let task = tokio::spawn(async move {
            // The receiver is gone once the replica has stopped.
            let _ = input_sender.send(request.await).await;
        });
        self.requests.push((attempt, task));
    }

    fn register(&mut self, attempt: AttemptId) {
        let ReplicaDependencies { registry, entropy, name, .. } = self.dependencies.clone();
        self.spawn_request(attempt, async move {
            let Ok(random) = random_bytes(&*entropy) else { return failed_input(attempt) };
            let id = ReplicaId(Uuid::from_bytes(random));
            match registry.register(id, &name).await {
                Ok(()) => ReplicaTaskInput::Event(ReplicaEvent::Registered { attempt, id }),
                Err(error) => log_failure(attempt, "registration", &error),
            }
        });
    }

    fn renew(&mut self, renewal: RenewalRequest) {
        let ReplicaDependencies { registry, clock, status, .. } = self.dependencies.clone();
        let attempt = renewal.attempt;
        let ack_position =
            renewal.applied.filter(|at| self.dependencies.log_applier.take_due_ack(at.revision));
        let ack_position = ack_position.filter(|_| self.status.has_ack_notifications());
        self.spawn_request(attempt, async move {
            let before = clock.now();
            match registry.renew_lease(&renewal).await {
                Ok(renewed) => {
                    status.clock_offset.record(before, renewed.reply.database_time, clock.now());
                    if let Some(at) = ack_position.filter(|_| renewed.reply.was_renewed) {
                        tokio::spawn(notify_ack(registry, renewal.id, at.revision));
                    }
                    ReplicaTaskInput::Renewed(attempt, Box::new(renewed))
                }
                Err(error) => log_failure(attempt, "renewal", &error),
            }
        });
    }

    /// Loads directly into the index: before the first load and after a regression, nothing is found there.
    fn load(&mut self, attempt: AttemptId) {
        let ReplicaDependencies { store, log_applier, clock, retention, .. } = self.dependencies.clone();
        if let Some(before) = self.load_abort.take() {
            before.abort();
        }
        let loads = self.load_lock.clone();
        self.spawn_request(attempt, async move {
            let _one = loads.lock_owned().await;
            log_applier.reset();
            let cutoff = clock.now().saturating_sub(retention);
            let loader: Arc<dyn SnapshotLoader> = log_applier.index().clone();
            match store.stream_snapshot(cutoff, &loader).await {
                Ok(head) => {
                    log_applier.finish_load(head);
                    ReplicaTaskInput::Loaded(attempt, head)
                }
                Err(error @ StoreError::Damaged(_)) => ReplicaTaskInput::Damaged(error),
                Err(error) => log_failure(attempt, "loading", &error),
            }
        });
        self.load_abort = self.requests.last().map(|(_, request)| request.abort_handle());
    }

    fn abandon(&mut self, attempt: AttemptId) {
        self.requests.retain(|(of, request)| {
            if *of == attempt {
                request.abort();
            }
            *of != attempt
        });
        self.status.failures.fetch_add(1, Ordering::Relaxed);
        tracing::warn!("renewal timed out: the database did not answer");
    }

    fn apply_renewal(&mut self, attempt: AttemptId) -> Result<(), ApplyError> {
        let entries = self
            .renewal_entries
            .take_if(|(of, _)| *of == attempt)
            .map(|(_, entries)| entries)
            .unwrap_or_default();
        match self.dependencies.log_applier.decode_and_apply(entries) {
            Ok(taken) => taken.map(drop),
            Err(error) => {
                tracing::error!(
                    error = &error as &dyn std::error::Error,
                    "applying a renewal failed: an entry is damaged"
                );
                Err(ApplyError::Gap)
            }
        }
    }

    fn enter_regression(&mut self, local_position: LogPosition, same_place: bool, head: u64) {
        tracing::error!(
            ours = local_position.revision.0,
            database = head,
            same_place,
            "the database has another history than this replica: was a backup restored, or did a standby take over \
             that lacked commits? This replica keeps denying what it knows to be \
             dead, and allows nothing once its lease has expired. See 'keyward replicas accept-regression'"
        );
        let regression = regression::wait_for_acceptance(self.dependencies.clone(), self.epoch);
        let input_sender = self.input_sender.clone();
        let task = tokio::spawn(async move {
            regression.await;
            let _ = input_sender.send(ReplicaTaskInput::Event(ReplicaEvent::RegressionAccepted)).await;
        });
        self.requests.push((AttemptId(0), task));
    }

    async fn deregister(&mut self, id: ReplicaId) {
        if let Err(error) = self.dependencies.registry.deregister(id, None).await {
            tracing::warn!(error = &error as &dyn std::error::Error, "deleting the replica's row failed");
        }
    }

    /// Publishes the state, and logs when the lease starts or ends.
    fn publish_status(&self) {
        let state = Some(self.state_machine.state());
        *self.status.state.lock().unwrap_or_else(PoisonError::into_inner) = state;
        let is_valid = self.dependencies.lease.is_valid(|| self.dependencies.clock.boottime());
        self.serving.send_if_modified(|serving| {
            if *serving && !is_valid && state == Some(ReplicaState::Stopped) {
                tracing::info!(replica = self.dependencies.name, "lease released");
            } else if *serving && !is_valid {
                tracing::error!("lease expired: nothing is allowed until the database answers");
            } else if is_valid && !*serving {
                tracing::info!(replica = self.dependencies.name, "lease acquired");
            }
            std::mem::replace(serving, is_valid) != is_valid
        });
    }
}

/// Notifies the other replicas of an acknowledgment. A failure is not retried: waiting replicas also poll the rows.
async fn notify_ack(registry: Arc<dyn ReplicaRegistry>, id: ReplicaId, up_to: Revision) {
    if let Err(error) = registry.notify_ack(id, up_to).await {
        tracing::debug!(error = &error as &dyn std::error::Error, "notifying an acknowledgment failed");
    }
}

/// Returns when the replica must stop, or when its handle is gone.
async fn wait_for_stop(stopping: &mut watch::Receiver<bool>) {
    let _ = stopping.wait_for(|stop| *stop).await;
}

/// Reports the failure, which stops the server, and never returns.
async fn fail_permanently(failed: &watch::Sender<bool>) -> ReplicaEvent {
    failed.send_replace(true);
    std::future::pending().await
}
