//! Drives the replica: does what the machine asks, and tells it what came of it. One task, one machine; requests run
//! beside it and answer through its channel, so that no request holds up the clock.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::{mpsc, watch},
    task::{AbortHandle, JoinHandle},
    time::sleep,
};
use uuid::Uuid;

use crate::{
    clock::{Clock, Entropy, random},
    domain::{
        lease::{
            Attempt, Position, Renewal, Replica, ReplicaId,
            replica::{Action, Event, Standing},
        },
        log::LogRow,
        time::Revision,
    },
    engine::lease::Lease,
    store::{
        Head, Loader, Store, StoreError,
        fleet::{Fleet, Renewed, Terms},
    },
};

use super::{
    acks::{Acks, TELLING},
    changes,
    clock_offset::ClockOffset,
    collect,
    follow::{Broken, Follow},
    regression,
};

/// How many answers may wait for the machine. Each request has one, and there are few.
const ANSWERS: usize = 64;
/// How long the row's deletion may take at the stop; if it fails, others wait its lease out.
const LEAVING: Duration = Duration::from_secs(2);

/// What a replica is made of.
#[derive(Clone)]
pub struct Parts {
    /// The keys and the log.
    pub store: Arc<dyn Store>,
    /// The replicas' rows.
    pub fleet: Arc<dyn Fleet>,
    /// The way into the index.
    pub follow: Arc<Follow>,
    /// What Checks ask.
    pub lease: Arc<Lease>,
    /// What is to be seen of it.
    pub sight: Arc<Sight>,
    /// Tells the time.
    pub clock: Arc<dyn Clock>,
    /// Gives ids.
    pub entropy: Arc<dyn Entropy>,
    /// What people call this replica.
    pub name: String,
    /// How long revoked keys stay known.
    pub retention: Duration,
}

/// What is to be seen of a replica from outside.
#[derive(Debug, Default)]
pub struct Sight {
    id: Mutex<Option<ReplicaId>>,
    standing: Mutex<Option<Standing>>,
    renewals: AtomicU64,
    failures: AtomicU64,
    frozen: AtomicU64,
    replicas: AtomicU64,
    acks: Acks,
    clock_offset: ClockOffset,
}

impl Sight {
    /// The row that this process holds.
    #[must_use]
    pub fn id(&self) -> Option<ReplicaId> {
        *self.id.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How it stands with the database.
    #[must_use]
    pub fn standing(&self) -> Option<Standing> {
        *self.standing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many renewals were answered, how many requests failed, and how often the clock stood still.
    #[must_use]
    pub fn counts(&self) -> [u64; 3] {
        [&self.renewals, &self.failures, &self.frozen].map(|count| count.load(Ordering::Relaxed))
    }

    /// How many replicas there are, as the newest renewal said.
    #[must_use]
    pub fn replicas(&self) -> u64 {
        self.replicas.load(Ordering::Relaxed)
    }

    /// How far this machine's wall clock is from the database's.
    #[must_use]
    pub fn clock_offset(&self) -> &ClockOffset {
        &self.clock_offset
    }

    /// What the others have told of their acknowledgments.
    pub(super) fn acks(&self) -> &Acks {
        &self.acks
    }

    /// Whether replicas tell what they acknowledge.
    pub(super) fn are_few(&self) -> bool {
        self.replicas() <= TELLING
    }

    fn set_id(&self, id: Option<ReplicaId>) {
        *self.id.lock().unwrap_or_else(PoisonError::into_inner) = id;
    }
}

/// What comes to the task.
pub(super) enum Input {
    /// An event of the machine's.
    Event(Event),
    /// A renewal's answer.
    Renewed(Attempt, Box<Renewed>),
    /// A snapshot is in the index.
    Loaded(Attempt, Head),
    /// The database is damaged, which no other try mends.
    Damaged(StoreError),
}

/// A running replica.
#[derive(Debug)]
pub struct Running {
    /// Whether Checks may allow.
    pub serving: watch::Receiver<bool>,
    /// Turns true when it has given up for good.
    pub failed: watch::Receiver<bool>,
    stop: watch::Sender<bool>,
    task: JoinHandle<()>,
    beside: Vec<JoinHandle<()>>,
}

impl Running {
    /// Gives up the lease, and then the row.
    pub async fn stop(self) {
        self.stop.send_replace(true);
        if tokio::time::timeout(LEAVING, self.task).await.is_err() {
            tracing::warn!(
                "the replica's row was not deleted in time: revocations wait for its lease to run out"
            );
        }
        self.beside.iter().for_each(JoinHandle::abort);
    }
}

/// Starts a replica of a database that says so.
#[must_use]
pub fn start(parts: Parts, Terms { lease, epoch, .. }: Terms) -> Running {
    let (stop, stopping) = watch::channel(false);
    let (serving, is_serving) = watch::channel(false);
    let (failed, has_failed) = watch::channel(false);
    let (answers, inputs) = mpsc::channel(ANSWERS);
    let beside = vec![
        tokio::spawn(collect::run(parts.fleet.clone(), parts.clock.clone(), parts.sight.clone(), lease)),
        tokio::spawn(changes::listen(
            parts.fleet.clone(),
            parts.follow.clone(),
            parts.sight.clone(),
            answers.clone(),
        )),
        tokio::spawn(changes::moves(parts.follow.clone(), answers.clone())),
        tokio::spawn(changes::divergences(parts.follow.clone(), answers.clone())),
    ];
    let feed = Feed {
        machine: Replica::new(lease),
        sight: parts.sight.clone(),
        parts,
        answers,
        requests: Vec::new(),
        loads: Arc::default(),
        loading: None,
        epoch,
        heard_epoch: epoch,
        rows: None,
        serving,
        failed,
    };
    let task = tokio::spawn(feed.run(inputs, stopping));
    Running { serving: is_serving, failed: has_failed, stop, task, beside }
}

struct Feed {
    machine: Replica,
    parts: Parts,
    sight: Arc<Sight>,
    answers: mpsc::Sender<Input>,
    requests: Vec<(Attempt, JoinHandle<()>)>,
    /// One load at a time: the one before has ended when the next begins.
    loads: Arc<tokio::sync::Mutex<()>>,
    loading: Option<AbortHandle>,
    /// Of the history that the map is of; and what the newest renewal said.
    epoch: u64,
    heard_epoch: u64,
    /// The changes of the newest renewal, until they are applied.
    rows: Option<(Attempt, Vec<LogRow>)>,
    serving: watch::Sender<bool>,
    failed: watch::Sender<bool>,
}

impl Feed {
    async fn run(mut self, mut inputs: mpsc::Receiver<Input>, mut stopping: watch::Receiver<bool>) {
        let mut event = Event::Tick;
        loop {
            self.take(event).await;
            if self.machine.standing() == Standing::Following {
                self.epoch = self.heard_epoch;
            }
            self.tell();
            if self.machine.standing() == Standing::Stopped {
                self.requests.iter().for_each(|(_, request)| request.abort());
                return;
            }
            event = tokio::select! {
                () = stopped(&mut stopping) => Event::Stop,
                Some(input) = inputs.recv() => match self.read(input) {
                    Some(event) => event,
                    None => continue_after_damage(&self.failed).await,
                },
                () = sleep(self.idle()) => Event::Tick,
            };
            #[cfg(keyward_breakable)]
            if event == Event::Tick
                && let Some(waited) = self.answered_before(&mut inputs).await
            {
                event = waited;
            }
        }
    }

    /// An answer that waited with the process is taken before it is seen to be late, as happens now and then: without the
    /// rule that a lease counts from the sending, that must show.
    #[cfg(keyward_breakable)]
    async fn answered_before(&mut self, inputs: &mut mpsc::Receiver<Input>) -> Option<Event> {
        use crate::domain::lease::{Kept, Rule, Rules as _};
        if Kept.keep(Rule::LeaseCountsFromSending) {
            return None;
        }
        let input = tokio::time::timeout(Duration::from_millis(20), inputs.recv()).await.ok()??;
        self.read(input)
    }

    /// How long nothing is due: the machine's next request, or the end of the lease, which health is to tell.
    fn idle(&self) -> Duration {
        const AT_MOST: Duration = Duration::from_secs(3600);
        let now = self.parts.clock.boottime();
        let deadline = self.parts.lease.deadline();
        let ends = (*self.serving.borrow()).then_some(deadline);
        [self.machine.wake_at(), ends].into_iter().flatten().map(|at| at.since(now)).min().unwrap_or(AT_MOST)
    }

    /// What an input means to the machine, once what came with it is put by.
    fn read(&mut self, input: Input) -> Option<Event> {
        Some(match input {
            Input::Event(event) => {
                if let Event::Failed { .. } = event {
                    self.sight.failures.fetch_add(1, Ordering::Relaxed);
                }
                // What did not fit a map that was replaced meanwhile says nothing of the new one.
                match event {
                    Event::Diverged { ours, .. } if self.parts.follow.at() != Some(ours) => Event::Tick,
                    event => event,
                }
            }
            Input::Renewed(attempt, renewed) => {
                self.sight.renewals.fetch_add(1, Ordering::Relaxed);
                let Renewed { reply, rows, epoch, replicas } = *renewed;
                self.parts.lease.set_shared(replicas > 1);
                self.sight.replicas.store(replicas, Ordering::Relaxed);
                self.heard_epoch = epoch;
                self.rows = Some((attempt, rows));
                Event::Renewed { attempt, reply }
            }
            Input::Loaded(attempt, Head { revision, hash }) => {
                Event::Loaded { attempt, at: Position { revision, hash } }
            }
            Input::Damaged(error) => {
                tracing::error!(error = &error as &dyn std::error::Error, "the keys cannot be loaded");
                return None;
            }
        })
    }

    /// Gives the machine an event, and does what it asks for.
    async fn take(&mut self, event: Event) {
        let mut events = vec![event];
        while let Some(event) = events.pop() {
            let now = self.parts.clock.boottime();
            let actions = self.machine.on(event, now);
            self.sight.set_id(self.machine.row());
            for action in actions {
                if let Err(broken) = self.act(action).await {
                    // What was to follow rested on these changes.
                    self.parts.lease.stop_allowing();
                    events.extend(diverged(broken, &self.parts.follow));
                    break;
                }
            }
        }
    }

    async fn act(&mut self, action: Action) -> Result<(), Broken> {
        match action {
            Action::Register { attempt } => self.register(attempt),
            Action::Load { attempt } => self.load(attempt),
            Action::Renew(renewal) => self.renew(renewal),
            Action::Abandon { attempt } => self.abandon(attempt),
            Action::Adopt { .. } => {
                let forget_before = self.parts.clock.now().minus(self.parts.retention);
                let index = self.parts.follow.index();
                index.forget(forget_before);
                tracing::info!(keys = index.len(), replica = self.parts.name, "the index is loaded");
            }
            Action::Apply { attempt } => {
                #[cfg(keyward_breakable)]
                changes::stall().await;
                self.apply(attempt)?;
            }
            Action::Publish { deadline, as_of } => self.parts.lease.publish(deadline, as_of),
            Action::StopAllowing => self.parts.lease.stop_allowing(),
            Action::EnterRegressed { ours, link, head } => self.regressed(ours, link.is_some(), head.0),
            Action::ReportFrozenClock { missing } => {
                self.sight.frozen.fetch_add(1, Ordering::Relaxed);
                tracing::warn!(
                    ?missing,
                    "this machine's clock stood still, or the database's was set forward; the lease is shortened by \
                     as much. What was revoked in that time may have been allowed here. Keep the machine from being \
                     suspended, snapshotted or moved while Keyward serves on it"
                );
            }
            Action::Leave { id } => self.leave(id).await,
        }
        Ok(())
    }

    /// Runs a request beside the machine.
    fn request(&mut self, attempt: Attempt, request: impl Future<Output = Input> + Send + 'static) {
        let answers = self.answers.clone();
        self.requests.retain(|(_, request)| !request.is_finished());
        let task = tokio::spawn(async move {
            // Nobody listens any more once the replica has stopped.
            let _ = answers.send(request.await).await;
        });
        self.requests.push((attempt, task));
    }

    fn register(&mut self, attempt: Attempt) {
        let Parts { fleet, entropy, name, .. } = self.parts.clone();
        self.request(attempt, async move {
            let Ok(random) = random(&*entropy) else { return failed(attempt) };
            let id = ReplicaId(Uuid::from_bytes(random));
            match fleet.register(id, &name).await {
                Ok(()) => Input::Event(Event::Registered { attempt, id }),
                Err(error) => said_failed(attempt, "registration", &error),
            }
        });
    }

    fn renew(&mut self, renewal: Renewal) {
        let Parts { fleet, clock, sight, .. } = self.parts.clone();
        let attempt = renewal.attempt;
        let told = renewal.applied.filter(|at| self.parts.follow.is_to_tell(at.revision));
        let told = told.filter(|_| self.sight.are_few());
        self.request(attempt, async move {
            let before = clock.now();
            match fleet.renew(&renewal).await {
                Ok(renewed) => {
                    sight.clock_offset.note(before, renewed.reply.db_now, clock.now());
                    if let Some(at) = told.filter(|_| renewed.reply.renewed) {
                        tokio::spawn(tell(fleet, renewal.id, at.revision));
                    }
                    Input::Renewed(attempt, Box::new(renewed))
                }
                Err(error) => said_failed(attempt, "renewal", &error),
            }
        });
    }

    /// Loads straight into the index: before it is loaded, and after a regression, nobody finds anything there.
    fn load(&mut self, attempt: Attempt) {
        let Parts { store, follow, clock, retention, .. } = self.parts.clone();
        if let Some(before) = self.loading.take() {
            before.abort();
        }
        let loads = self.loads.clone();
        self.request(attempt, async move {
            let _one = loads.lock_owned().await;
            follow.reset();
            let forget_before = clock.now().minus(retention);
            let loader: Arc<dyn Loader> = follow.index().clone();
            match store.snapshot(forget_before, &loader).await {
                Ok(head) => {
                    follow.loaded(head);
                    Input::Loaded(attempt, head)
                }
                Err(error @ StoreError::Damaged(_)) => Input::Damaged(error),
                Err(error) => said_failed(attempt, "loading", &error),
            }
        });
        self.loading = self.requests.last().map(|(_, request)| request.abort_handle());
    }

    fn abandon(&mut self, attempt: Attempt) {
        self.requests.retain(|(of, request)| {
            if *of == attempt {
                request.abort();
            }
            *of != attempt
        });
        self.sight.failures.fetch_add(1, Ordering::Relaxed);
        tracing::warn!("the database did not answer a renewal in time");
    }

    fn apply(&mut self, attempt: Attempt) -> Result<(), Broken> {
        let rows = self.rows.take_if(|(of, _)| *of == attempt).map(|(_, rows)| rows).unwrap_or_default();
        match self.parts.follow.take_rows(rows) {
            Ok(taken) => taken.map(drop),
            Err(error) => {
                tracing::error!(error = &error as &dyn std::error::Error, "a change cannot be read");
                Err(Broken::Gap)
            }
        }
    }

    fn regressed(&mut self, ours: Position, same_place: bool, head: u64) {
        tracing::error!(
            ours = ours.revision.0,
            database = head,
            same_place,
            "the database has another history than this replica: was a backup restored, or did a standby take over \
             that lacked commits? This replica goes on denying what it knows to be dead, and allows nothing once its \
             lease has run out. See 'keyward replicas accept-regression'"
        );
        let regression = regression::wait(self.parts.clone(), self.epoch);
        let answers = self.answers.clone();
        let task = tokio::spawn(async move {
            regression.await;
            let _ = answers.send(Input::Event(Event::RegressionAccepted)).await;
        });
        self.requests.push((Attempt(0), task));
    }

    async fn leave(&mut self, id: ReplicaId) {
        if let Err(error) = self.parts.fleet.remove(id, None).await {
            tracing::warn!(error = &error as &dyn std::error::Error, "the replica's row was not deleted");
        }
    }

    /// Tells whoever watches how it stands.
    fn tell(&self) {
        let standing = Some(self.machine.standing());
        *self.sight.standing.lock().unwrap_or_else(PoisonError::into_inner) = standing;
        let holds = self.parts.lease.holds(|| self.parts.clock.boottime());
        self.serving.send_if_modified(|serving| {
            if *serving && !holds && standing == Some(Standing::Stopped) {
                tracing::info!(replica = self.parts.name, "the lease is given up");
            } else if *serving && !holds {
                tracing::error!("the lease has run out: nothing is allowed until the database answers");
            } else if holds && !*serving {
                tracing::info!(replica = self.parts.name, "the lease holds");
            }
            std::mem::replace(serving, holds) != holds
        });
    }
}

/// Tells up to where this replica has acknowledged. Whoever waits reads the rows by and by anyway: it is not told again
/// where that fails.
async fn tell(fleet: Arc<dyn Fleet>, id: ReplicaId, upto: Revision) {
    if let Err(error) = fleet.tell(id, upto).await {
        tracing::debug!(error = &error as &dyn std::error::Error, "an acknowledgment was not told");
    }
}

/// Returns when it is to stop, or nobody is left who could say so.
async fn stopped(stopping: &mut watch::Receiver<bool>) {
    let _ = stopping.wait_for(|stop| *stop).await;
}

/// After this nothing comes of the replica: the server stops.
async fn continue_after_damage(failed: &watch::Sender<bool>) -> Event {
    failed.send_replace(true);
    std::future::pending().await
}

fn failed(attempt: Attempt) -> Input {
    Input::Event(Event::Failed { attempt })
}

fn said_failed(attempt: Attempt, what: &str, error: &StoreError) -> Input {
    tracing::warn!(
        error = error as &dyn std::error::Error,
        what,
        "a request to the database failed; it is tried again"
    );
    failed(attempt)
}

/// What changes that do not fit mean to the machine.
pub(super) fn diverged(broken: Broken, follow: &Follow) -> Option<Event> {
    let ours = follow.at()?;
    let head = match broken {
        Broken::OtherHistory { head, .. } => head,
        // What came between is missing, or cannot be read: the map cannot be trusted to be whole any more.
        Broken::Gap => ours.revision,
        Broken::NotLoaded => return None,
    };
    Some(Event::Diverged { ours, head })
}
