//! The composition root: puts a server together, starts it in order, and takes it down in order.
//!
//! Start: read the settings · wait for a database that is away · read the rules · open, migrate and check the store, and
//! hold it against the revision required · take the addresses · make the root key of a first start · listen · put the
//! rules in force · load the index, and as a replica take a lease · serve. A client that connects while the index loads
//! waits; after a second it is served and hears UNAVAILABLE, and health says NOT_SERVING.
//!
//! Stop: health says NOT_SERVING · serve on for `shutdown_delay`, so that whoever looks at health sends no more here · no
//! new connections · calls in flight end · usage is written · the head of the log is told · the lease and the replica's
//! row are given up, decisions are written down · the store is closed. With the usual delay all that ends within 10 s,
//! whatever hangs.

pub(crate) mod database_startup;
pub(crate) mod maintenance;
pub mod replicas;
mod root_key;
mod rules_file;
mod sockets;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use anyhow::Context as _;
use tokio::{
    sync::{oneshot, watch},
    task::{AbortHandle, JoinError, JoinHandle},
    time::MissedTickBehavior,
};
use tonic_health::server::HealthReporter;

use replicas::ReplicationRuntime;
pub(crate) use root_key::{DescendantKey, RightsChange, RootKeyReset, reset_root_key};
use rules_file::RulesFile;
use sockets::{BoundSockets, ListenAddresses, OpenListeners};

use crate::{
    accounts::AccountOperations,
    admin,
    audit::head_publisher::HeadPublisher,
    clock::{Clock, EntropySource, random_bytes},
    config::server::ServerSettings,
    decision_log::{DecisionLog, DecisionLogWriter},
    domain::token::Token,
    engine::{
        Engine,
        index::Index,
        serving_lease::ServingLease,
        usage::{FlushMode, UsageRecorder},
    },
    forward_auth,
    gateway::Gateway,
    grpc::{
        self, ServiceParts,
        serve::{BoundListener, WorkerCapacity, WorkerPool},
    },
    keys::KeyOperations,
    membership::MembershipOperations,
    metrics,
    replication::{log_applier::LogApplier, propagation::PropagationWaiter, replica_task},
    store::{
        SnapshotLoader, Store, UsageHour,
        group_commit::{CommitHandle, CommitMetrics},
    },
    trace::CallTracer,
    transport::{fd_limit, memory_budget::MemoryBudget, socket::LocalAddress},
};

const USAGE_FLUSH_INTERVAL: Duration = Duration::from_secs(5);
const EVICTION_INTERVAL: Duration = Duration::from_secs(60 * 60);
/// How long counts of use are kept.
const USAGE_RETENTION: Duration = Duration::from_secs(90 * 24 * 60 * 60);
/// How long clients wait for the index before they hear that it is loading.
const INDEX_LOAD_GRACE_PERIOD: Duration = Duration::from_secs(1);
/// How long calls in flight have to end.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(4);
/// How long all has that comes after: what hangs then is left.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(3);
/// How much longer for each key whose uses wait to be written, which takes some 6 microseconds.
const SHUTDOWN_TIME_PER_KEY: Duration = Duration::from_micros(10);
/// But not longer than this: whoever stops a process kills it before long.
const MAX_USAGE_FLUSH_TIME: Duration = Duration::from_secs(10);

/// A running server.
#[derive(Debug)]
pub struct Server {
    /// Where gRPC is served; of several listeners, the first.
    pub address: LocalAddress,
    /// Every gRPC listener: its name, where it is, whether it speaks TLS.
    pub listeners: Vec<(String, LocalAddress, bool)>,
    /// Where the admin pages are served.
    pub admin_address: SocketAddr,
    /// Where Envoy alone is served.
    pub envoy_address: Option<SocketAddr>,
    /// Where proxies are served that ask over HTTP.
    pub forward_auth_address: Option<SocketAddr>,
    /// The root key's token, of a first start without a file for it.
    pub root_token: Option<Token>,
    running: RunningServer,
}

struct RunningServer {
    store: Arc<dyn Store>,
    usage: Arc<UsageRecorder>,
    head_publisher: Arc<HeadPublisher>,
    health_reporter: HealthReporter,
    ready: watch::Sender<bool>,
    stopping: watch::Sender<bool>,
    /// Turns true when nothing is left to tell of.
    admin_stopping: watch::Sender<bool>,
    serving_task: JoinHandle<()>,
    background_tasks: Vec<JoinHandle<()>>,
    writer_task: JoinHandle<()>,
    replica: Option<replica_task::RunningReplica>,
    /// Tells health what the replica says.
    health_task: JoinHandle<()>,
    propagation: PropagationWaiter,
    /// Asks for files to be read again.
    reload_requests: watch::Sender<()>,
    /// Writes decisions down.
    decision_log_writer: Option<DecisionLogWriter>,
    shutdown_delay: Duration,
}

impl std::fmt::Debug for RunningServer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("RunningServer")
    }
}

impl Server {
    /// Starts a server; it serves when this returns. Management runs on the current runtime.
    ///
    /// # Errors
    /// When the store does not open, an address cannot be bound, or the root key cannot be kept.
    pub async fn start(
        settings: ServerSettings,
        clock: Arc<dyn Clock>,
        entropy: Arc<dyn EntropySource>,
    ) -> anyhow::Result<Server> {
        let rules =
            settings.rules_file.as_deref().map(|path| RulesFile::load(path, &settings)).transpose()?;
        let store = database_startup::open_store(&settings).await?;
        // The addresses are ours before a root key is made: one that no start shows would be lost. Nobody can
        // connect before it is kept.
        let sockets = BoundSockets::bind(&settings).await?;
        replicas::set_initial_lease(&store, &settings).await?;
        let root_token = root_key::create_first_root_key(&*store, &settings, &*clock, &*entropy).await?;
        let mut listeners = sockets.listen()?;
        let addresses = listeners.addresses()?;

        let index = Arc::new(Index::default());
        let place = ReplicationRuntime::new(&store, index.clone(), clock.clone());
        let decided = settings.telemetry.decision_log.as_ref();
        let decided =
            decided.map(|settings| DecisionLog::open(settings, clock.clone(), &*entropy)).transpose()?;
        let (decisions, keeper) = decided.unzip();
        let decisions = decisions.unwrap_or_default();
        let (parts, CommitTask { task: writer, commits }) = build_services(
            &settings,
            store.clone(),
            &place,
            clock.clone(),
            entropy.clone(),
            decisions.clone(),
        );
        let tracing = parts.tracing;
        let (engine, gateway, memory) =
            (parts.engine.clone(), parts.gateway.clone(), parts.memory_budget.clone());
        // In force before anybody is served.
        if let Some(rules) = &rules {
            rules.apply(&gateway);
        }
        let reporter = HealthReporter::new();
        grpc::report_health(&reporter, false).await;
        let (stopping, is_stopping) = watch::channel(false);
        let overload = settings.overload;
        let services = Arc::new(grpc::build_router(parts, reporter.clone(), overload, is_stopping.clone())?);
        let (ready, is_ready) = watch::channel(false);
        let (closing, is_closing) = watch::channel(false);

        let replica = place
            .start_replica(&store, &settings, addresses.advertised_port(), clock.clone(), entropy)
            .await?;
        let mut loading = match &replica {
            Some(replica) => tokio::spawn(wait_until_serving(replica.serving.clone())),
            None => tokio::spawn(load_index(
                store.clone(),
                place.log_applier.clone(),
                clock.clone(),
                settings.retention,
                ready.clone(),
            )),
        };
        let loaded = tokio::time::timeout(INDEX_LOAD_GRACE_PERIOD, &mut loading).await;
        let loading = match loaded {
            Ok(loaded) => {
                loaded??;
                None
            }
            Err(_) => Some(loading),
        };
        let told = publish_health(
            reporter.clone(),
            ready.clone(),
            replica.as_ref().map(|replica| replica.serving.clone()),
        );
        let gave_up = replica.as_ref().map(|replica| replica.failed.clone());
        let telling = tokio::spawn(told);
        // Whoever has waited for the start finds it said.
        if loading.is_none() {
            ready.send_replace(true);
            grpc::report_health(&reporter, true).await;
        }
        let (counting, tried) = connect_limiter(engine.clone());
        // A Redis that is there counts from the first Check on; one that is not holds nobody up.
        let _ = tokio::time::timeout(INDEX_LOAD_GRACE_PERIOD, tried).await;
        let workers = WorkerPool::start(connection_capacity(&settings, &listeners), &services).with_context(|| {
            format!(
                "threads = {} cannot be started; lower it, or raise the limits on files and processes (ulimit -n, ulimit -u)",
                settings.threads
            )
        })?;
        listeners.report.add_shed_counter(workers.shed_counter());
        listeners.report.add_shed_counter(services.shed_counter());
        let calls = services.rpc_metrics().clone();
        drop(services);
        let (rereading, is_rereading) = watch::channel(());
        let watching = listeners.watch_certificates(&is_rereading);
        let OpenListeners { grpc: opened, admin: admin_listener, forward_auth: forward, report, .. } =
            listeners;
        let forwarding = forward.map(|listener| {
            tokio::spawn(forward_auth::serve(
                listener,
                memory.clone(),
                gateway.clone(),
                tracing,
                clock.clone(),
                is_stopping.clone(),
            ))
        });
        let serving = tokio::spawn(serve_listeners(opened, workers, forwarding, is_stopping));
        let usage = engine.usage.clone();
        let head = Arc::new(HeadPublisher::default());
        let sources = metrics::MetricsSources {
            engine,
            gateway: gateway.clone(),
            calls,
            commits,
            waits: place.propagation.metrics().clone(),
            decisions,
            ready: is_ready,
            replica: replica.as_ref().map(|_| place.replica_status.clone()),
            clock: clock.clone(),
            transport: report,
            memory: memory.clone(),
        };
        let mut background = vec![
            tokio::spawn(admin::serve(admin_listener, memory, sources, is_closing)),
            counting,
            tokio::spawn(flush_usage(store.clone(), usage.clone())),
            tokio::spawn(head.clone().run(store.clone())),
            tokio::spawn(flush_quotas(store.clone(), usage.clone())),
            tokio::spawn(evict_expired(store.clone(), index, clock, settings.retention)),
            tokio::spawn(watch_loading(loading, stopping.clone())),
            tokio::spawn(watch_database(gave_up, store.clone(), place.lease.clone(), stopping.clone())),
        ];
        background.extend(rules.map(|rules| tokio::spawn(rules.watch(gateway, is_rereading))));
        background.extend(watching);
        let running = RunningServer {
            store,
            usage,
            head_publisher: head,
            health_reporter: reporter,
            ready,
            stopping,
            admin_stopping: closing,
            serving_task: serving,
            background_tasks: background,
            writer_task: writer,
            replica,
            health_task: telling,
            propagation: place.propagation,
            reload_requests: rereading,
            decision_log_writer: keeper,
            shutdown_delay: settings.lifecycle.shutdown_delay,
        };
        let envoy_address = addresses.envoy_address();
        let ListenAddresses { grpc: listeners, admin: admin_address, forward_auth: forward_auth_address } =
            addresses;
        let address = listeners.first().map(|(_, bound, _)| bound.clone()).context("there is no listener")?;
        Ok(Server {
            address,
            listeners,
            admin_address,
            envoy_address,
            forward_auth_address,
            root_token,
            running,
        })
    }

    /// Waits until the server gives up by itself: its index cannot be loaded.
    pub(crate) async fn wait_for_failure(&self) {
        let mut stopping = self.running.stopping.subscribe();
        // The sender lives as long as `self`.
        let _ = stopping.wait_for(|stop| *stop).await;
    }

    /// Has certificates and rules read again at once; they are looked at by themselves, too.
    pub fn reload_files(&self) {
        self.running.reload_requests.send_replace(());
    }

    /// Stops in order: nothing acknowledged is lost, and calls in flight are answered if they end in time.
    pub async fn stop(self) {
        let RunningServer {
            store,
            usage,
            head_publisher: head,
            health_reporter: reporter,
            ready,
            stopping,
            admin_stopping: closing,
            serving_task: serving,
            background_tasks: background,
            writer_task: writer,
            replica,
            health_task: telling,
            propagation,
            reload_requests: _,
            decision_log_writer: keeper,
            shutdown_delay,
        } = self.running;
        // Before health is told for the last time.
        telling.abort();
        grpc::report_health(&reporter, false).await;
        ready.send_replace(false);
        // Whoever looks at health sends no more calls here, and until all have looked they are answered.
        if !*stopping.borrow() {
            tokio::time::sleep(shutdown_delay).await;
        }
        propagation.stop();
        stopping.send_replace(true);
        if let Err(error) = serving.await {
            tracing::error!(error = &error as &dyn std::error::Error, "serving ended badly");
        }
        closing.send_replace(true);
        let ends: Vec<_> = background.iter().map(JoinHandle::abort_handle).collect();
        let abort = || ends.iter().for_each(AbortHandle::abort);
        let decisions = async {
            if let Some(keeper) = keeper {
                keeper.stop(SHUTDOWN_TIMEOUT).await;
            }
        };
        let uses = usage.pending_keys();
        let last = async {
            // One that is given up while it writes uses would have them written twice.
            let between = usage.pause_writes().await;
            abort();
            futures_util::future::join_all(background).await;
            drop(between);
            // The services are gone with the workers, and the writer ends when its queue is empty.
            if let Err(error) = writer.await {
                tracing::error!(error = &error as &dyn std::error::Error, "the writer ended badly");
            }
            if let Err(error) = usage.flush(&*store, FlushMode::Immediate).await {
                tracing::warn!(error = &error as &dyn std::error::Error, "the last uses were not written");
            }
            head.publish(&*store).await;
            if let Some(replica) = replica {
                replica.stop().await;
            }
            store.close().await;
        };
        let waiting = u32::try_from(uses).unwrap_or(u32::MAX);
        let patience =
            SHUTDOWN_TIMEOUT + SHUTDOWN_TIME_PER_KEY.saturating_mul(waiting).min(MAX_USAGE_FLUSH_TIME);
        let (last, ()) = tokio::join!(tokio::time::timeout(patience, last), decisions);
        abort();
        if last.is_err() {
            tracing::warn!(
                "the database did not answer in time: the last writes and uses may be lost, and the replica's row stays"
            );
        }
        tracing::info!("stopped");
    }
}

/// What writes.
#[derive(Debug)]
pub struct CommitTask {
    /// The task. It ends when nobody can ask it any more.
    pub(crate) task: JoinHandle<()>,
    /// What it has committed.
    pub(crate) commits: Arc<CommitMetrics>,
}

/// The use cases over one store and one index, and the task that writes for them. Nothing is loaded yet.
pub fn build_services(
    settings: &ServerSettings,
    store: Arc<dyn Store>,
    place: &ReplicationRuntime,
    clock: Arc<dyn Clock>,
    entropy: Arc<dyn EntropySource>,
    decisions: DecisionLog,
) -> (ServiceParts, CommitTask) {
    let index = place.log_applier.index().clone();
    let usage = Arc::new(UsageRecorder::default());
    let engine = Engine::new(index, usage, place.lease.clone(), &settings.limits, clock.clone());
    let engine = Arc::new(engine);
    let follower = decisions.wrap_listener(place.log_applier.clone(), place.log_applier.index().clone());
    let now = clock.clone();
    let (writer, task) = CommitHandle::spawn(store.clone(), follower, move || now.now());
    let writing = CommitTask { task, commits: writer.commits().clone() };
    let environments = Arc::new(settings.key_settings.environments.clone());
    let keys = Arc::new(KeyOperations::new(
        store.clone(),
        writer.clone(),
        engine.clone(),
        clock.clone(),
        entropy.clone(),
        settings.key_settings.clone(),
    ));
    let people =
        MembershipOperations::new(store.clone(), writer.clone(), engine.clone(), keys.clone(), clock.clone());
    // Names of calls need not be secret: where there is no chance, the time will do.
    let seed = random_bytes(&*entropy).map_or_else(|_| clock.now().as_millis(), u64::from_be_bytes);
    let tracing = CallTracer::new(seed, settings.telemetry.sampling);
    let accounts = AccountOperations::new(store.clone(), writer, engine.clone(), clock.clone(), entropy);
    let gateway =
        Gateway::new(engine.clone(), environments.clone(), settings.gateway.clone(), decisions.clone());
    let parts = ServiceParts {
        engine,
        keys,
        accounts: Arc::new(accounts),
        membership: Arc::new(people),
        gateway: Arc::new(gateway),
        store,
        propagation: place.propagation.clone(),
        freshness: place.freshness.clone(),
        environments,
        decisions,
        tracing,
        memory_budget: MemoryBudget::new(settings.overload.request_bytes, clock),
    };
    (parts, writing)
}

/// As many connections as the listeners take, and file descriptors allow.
fn connection_capacity(settings: &ServerSettings, listeners: &OpenListeners) -> WorkerCapacity {
    let wanted = listeners.grpc.iter().map(|opened| opened.settings.limits.max_connections).sum();
    WorkerCapacity {
        threads: settings.threads,
        max_connections: fd_limit::raise_for_connections(wanted),
        max_queued: settings.overload.queued_checks,
        drain_timeout: DRAIN_TIMEOUT,
    }
}

/// Serves until it is told to stop, and calls in flight have ended or had their time.
async fn serve_listeners(
    opened: Vec<BoundListener>,
    workers: WorkerPool,
    forwarding: Option<JoinHandle<()>>,
    is_stopping: watch::Receiver<bool>,
) {
    let accepting = opened
        .into_iter()
        .map(|opened| grpc::serve::accept_connections(opened, &workers, is_stopping.clone()));
    futures_util::future::join_all(accepting).await;
    // This blocks; the workers have their own deadline.
    let joined = tokio::task::spawn_blocking(move || workers.drain_and_join());
    let (joined, forwarded) = tokio::join!(joined, join_with_timeout(DRAIN_TIMEOUT, forwarding));
    for ended in [joined, forwarded.unwrap_or(Ok(()))] {
        if let Err(error) = ended {
            tracing::error!(error = &error as &dyn std::error::Error, "serving ended badly");
        }
    }
}

/// Waits for a task so long, and ends it then.
async fn join_with_timeout(
    patience: Duration,
    task: Option<JoinHandle<()>>,
) -> Option<Result<(), JoinError>> {
    let mut task = task?;
    let ended = tokio::time::timeout(patience, &mut task).await.ok();
    task.abort();
    ended
}

/// Fills the index from a store that this process owns.
async fn load_index(
    store: Arc<dyn Store>,
    follow: Arc<LogApplier>,
    clock: Arc<dyn Clock>,
    retention: Duration,
    ready: watch::Sender<bool>,
) -> anyhow::Result<()> {
    let forget_before = clock.now().saturating_sub(retention);
    let index = follow.index();
    let loader: Arc<dyn SnapshotLoader> = index.clone();
    let head = store.stream_snapshot(forget_before, &loader).await.context("the keys could not be loaded")?;
    index.evict(forget_before);
    follow.finish_load(head);
    tracing::info!(keys = index.len(), revision = head.revision.0, "the index is loaded");
    ready.send_replace(true);
    Ok(())
}

/// Waits for a replica's first lease.
async fn wait_until_serving(mut serving: watch::Receiver<bool>) -> anyhow::Result<()> {
    // The sender goes with the replica, at the stop.
    let _ = serving.wait_for(|serving| *serving).await;
    Ok(())
}

/// Tells health whether Checks are answered, each time that it changes: as a replica's lease comes and goes, or once.
async fn publish_health(
    reporter: HealthReporter,
    ready: watch::Sender<bool>,
    serving: Option<watch::Receiver<bool>>,
) {
    let mut source = serving.unwrap_or_else(|| ready.subscribe());
    loop {
        let answers = *source.borrow_and_update();
        grpc::report_health(&reporter, answers).await;
        ready.send_if_modified(|ready| std::mem::replace(ready, answers) != answers);
        if source.changed().await.is_err() {
            return;
        }
    }
}

/// Takes the server down if its index cannot be loaded after all.
async fn watch_loading(loading: Option<JoinHandle<anyhow::Result<()>>>, stopping: watch::Sender<bool>) {
    let Some(loading) = loading else { return };
    let failure = match loading.await {
        Ok(Ok(())) => return,
        Ok(Err(error)) => error,
        Err(error) => error.into(),
    };
    tracing::error!(error = format!("{failure:#}"), "the index was not loaded; the server stops");
    stopping.send_replace(true);
}

/// Takes the server down when its replica cannot go on, or the database was found damaged or has another owner: then
/// nothing more is allowed, not even by calls in flight.
async fn watch_database(
    failed: Option<watch::Receiver<bool>>,
    store: Arc<dyn Store>,
    lease: Arc<ServingLease>,
    stopping: watch::Sender<bool>,
) {
    tokio::select! {
        () = replicas::wait_for_replica_failure(failed) => {}
        () = store.wait_until_unusable() => lease.expire_now(),
    }
    tracing::error!("the database is no longer to be trusted; the server stops");
    stopping.send_replace(true);
}

async fn flush_usage(store: Arc<dyn Store>, usage: Arc<UsageRecorder>) {
    let mut due = tokio::time::interval(USAGE_FLUSH_INTERVAL);
    due.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        due.tick().await;
        if let Err(error) = usage.flush(&*store, FlushMode::Throttled).await {
            tracing::warn!(error = &error as &dyn std::error::Error, "uses were not written; they are kept");
        }
    }
}

/// Has quotas counted that others draw from too, when they cannot wait.
async fn flush_quotas(store: Arc<dyn Store>, usage: Arc<UsageRecorder>) {
    usage.run_quota_flusher(&*store).await;
}

/// Connects to where rate limits are counted. The second tells when that was tried once.
fn connect_limiter(engine: Arc<Engine>) -> (JoinHandle<()>, oneshot::Receiver<()>) {
    let (told, tried) = oneshot::channel();
    (tokio::spawn(async move { engine.limiter.maintain_connection(told).await }), tried)
}

async fn evict_expired(store: Arc<dyn Store>, index: Arc<Index>, clock: Arc<dyn Clock>, retention: Duration) {
    loop {
        tokio::time::sleep(EVICTION_INTERVAL).await;
        let now = clock.now();
        let forgotten = index.evict(now.saturating_sub(retention));
        tracing::debug!(forgotten, "digests past the retention left the index");
        if let Err(error) =
            store.prune_usage(UsageHour::from_timestamp(now.saturating_sub(USAGE_RETENTION))).await
        {
            tracing::warn!(error = &error as &dyn std::error::Error, "old counts of use were not dropped");
        }
    }
}
