//! The composition root: builds a server, and starts and stops its parts in order.
//!
//! Start: read the settings · wait for the database · read the rules · open, migrate and check the store, including the
//! required revision · bind the addresses · on a first start, create the root key · listen · apply the rules · load the
//! index, or take a replica's lease · serve. While the index loads, a client that connects waits for up to a second.
//! Then it is served and gets UNAVAILABLE, and health is NOT_SERVING.
//!
//! Stop: health turns NOT_SERVING · serve for `shutdown_delay`, so that load balancers notice · accept no new
//! connections · finish calls in flight · write usage · publish the head of the log · release the lease and the
//! replica's row, write pending decisions · close the store. With the default delay, a stop takes at most 10 s,
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
/// Retention of usage counts.
const USAGE_RETENTION: Duration = Duration::from_secs(90 * 24 * 60 * 60);
/// Clients that connect while the index loads wait this long before they get UNAVAILABLE.
const INDEX_LOAD_GRACE_PERIOD: Duration = Duration::from_secs(1);
/// Time limit for calls in flight at a stop.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(4);
/// Time limit for the remaining shutdown steps; whatever still hangs is abandoned.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(3);
/// Additional time for each key with unwritten usage; writing one takes some 6 microseconds.
const SHUTDOWN_TIME_PER_KEY: Duration = Duration::from_micros(10);
/// Limit of that additional time, because a service manager soon kills a process that does not stop.
const MAX_USAGE_FLUSH_TIME: Duration = Duration::from_secs(10);

/// A running server; call [`stop`](Server::stop) to end it in order.
#[derive(Debug)]
pub struct Server {
    /// Address of the first gRPC listener.
    pub address: LocalAddress,
    /// Every gRPC listener: name, address, whether it uses TLS.
    pub listeners: Vec<(String, LocalAddress, bool)>,
    /// Address of the admin pages.
    pub admin_address: SocketAddr,
    /// Address of the listener for Envoy, if there is one.
    pub envoy_address: Option<SocketAddr>,
    /// Address of the HTTP listener for proxies, if there is one.
    pub forward_auth_address: Option<SocketAddr>,
    /// The root key's token, if this is a first start that wrote no root key file.
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
    /// Turns true when the admin pages may stop.
    admin_stopping: watch::Sender<bool>,
    serving_task: JoinHandle<()>,
    background_tasks: Vec<JoinHandle<()>>,
    writer_task: JoinHandle<()>,
    replica: Option<replica_task::RunningReplica>,
    /// Updates the health service.
    health_task: JoinHandle<()>,
    propagation: PropagationWaiter,
    /// Triggers a reload of the watched files.
    reload_requests: watch::Sender<()>,
    decision_log_writer: Option<DecisionLogWriter>,
    shutdown_delay: Duration,
}

impl std::fmt::Debug for RunningServer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("RunningServer")
    }
}

impl Server {
    /// Starts a server, which serves when this returns. Management RPCs run on the current runtime.
    ///
    /// # Errors
    /// If the store does not open, an address cannot be bound, or the root key cannot be stored.
    pub async fn start(
        settings: ServerSettings,
        clock: Arc<dyn Clock>,
        entropy: Arc<dyn EntropySource>,
    ) -> anyhow::Result<Server> {
        let rules =
            settings.rules_file.as_deref().map(|path| RulesFile::load(path, &settings)).transpose()?;
        let store = database_startup::open_store(&settings).await?;
        // Bind the addresses before a root key is created: a start that fails afterwards would lose the key's token.
        // Nobody can connect before the token is stored.
        let sockets = BoundSockets::bind(&settings).await?;
        replicas::set_initial_lease(&store, &settings).await?;
        let root_token = root_key::create_first_root_key(&*store, &settings, &*clock, &*entropy).await?;
        let mut listeners = sockets.listen()?;
        let addresses = listeners.addresses()?;

        let index = Arc::new(Index::default());
        let replication = ReplicationRuntime::new(&store, index.clone(), clock.clone());
        let opened = settings.telemetry.decision_log.as_ref();
        let opened =
            opened.map(|settings| DecisionLog::open(settings, clock.clone(), &*entropy)).transpose()?;
        let (decisions, decision_log_writer) = opened.unzip();
        let decisions = decisions.unwrap_or_default();
        let (parts, CommitTask { task: writer, commits }) = build_services(
            &settings,
            store.clone(),
            &replication,
            clock.clone(),
            entropy.clone(),
            decisions.clone(),
        );
        let tracing = parts.tracing;
        let (engine, gateway, memory) =
            (parts.engine.clone(), parts.gateway.clone(), parts.memory_budget.clone());
        // The rules are in force before the first request.
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

        let replica = replication
            .start_replica(&store, &settings, addresses.advertised_port(), clock.clone(), entropy)
            .await?;
        let mut loading = match &replica {
            Some(replica) => tokio::spawn(wait_until_serving(replica.serving.clone())),
            None => tokio::spawn(load_index(
                store.clone(),
                replication.log_applier.clone(),
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
        let health = publish_health(
            reporter.clone(),
            ready.clone(),
            replica.as_ref().map(|replica| replica.serving.clone()),
        );
        let failed = replica.as_ref().map(|replica| replica.failed.clone());
        let health_task = tokio::spawn(health);
        // A caller of `start` finds health up to date.
        if loading.is_none() {
            ready.send_replace(true);
            grpc::report_health(&reporter, true).await;
        }
        let (limiter_task, first_attempt) = connect_limiter(engine.clone());
        // An available Redis counts from the first Check on; an unavailable one delays the start only this long.
        let _ = tokio::time::timeout(INDEX_LOAD_GRACE_PERIOD, first_attempt).await;
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
            waits: replication.propagation.metrics().clone(),
            decisions,
            ready: is_ready,
            replica: replica.as_ref().map(|_| replication.replica_status.clone()),
            clock: clock.clone(),
            transport: report,
            memory: memory.clone(),
        };
        let mut background = vec![
            tokio::spawn(admin::serve(admin_listener, memory, sources, is_closing)),
            limiter_task,
            tokio::spawn(flush_usage(store.clone(), usage.clone())),
            tokio::spawn(head.clone().run(store.clone())),
            tokio::spawn(flush_quotas(store.clone(), usage.clone())),
            tokio::spawn(evict_expired(store.clone(), index, clock, settings.retention)),
            tokio::spawn(watch_loading(loading, stopping.clone())),
            tokio::spawn(watch_database(failed, store.clone(), replication.lease.clone(), stopping.clone())),
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
            health_task,
            propagation: replication.propagation,
            reload_requests: rereading,
            decision_log_writer,
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

    /// Waits until the server stops by itself, because its index cannot be loaded or its database is lost.
    pub(crate) async fn wait_for_failure(&self) {
        let mut stopping = self.running.stopping.subscribe();
        let _ = stopping.wait_for(|stop| *stop).await;
    }

    /// Reloads certificates and rules at once. They are also polled.
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
            health_task,
            propagation,
            reload_requests: _,
            decision_log_writer,
            shutdown_delay,
        } = self.running;
        // No update may follow the last one.
        health_task.abort();
        grpc::report_health(&reporter, false).await;
        ready.send_replace(false);
        // Serve until load balancers have noticed, so that they route no call to a closed port.
        if !*stopping.borrow() {
            tokio::time::sleep(shutdown_delay).await;
        }
        propagation.stop();
        stopping.send_replace(true);
        if let Err(error) = serving.await {
            tracing::error!(error = &error as &dyn std::error::Error, "serving task failed");
        }
        closing.send_replace(true);
        let ends: Vec<_> = background.iter().map(JoinHandle::abort_handle).collect();
        let abort = || ends.iter().for_each(AbortHandle::abort);
        let decisions = async {
            if let Some(writer) = decision_log_writer {
                writer.stop(SHUTDOWN_TIMEOUT).await;
            }
        };
        let uses = usage.pending_keys();
        let last = async {
            // A usage write that is aborted halfway would be repeated.
            let between = usage.pause_writes().await;
            abort();
            futures_util::future::join_all(background).await;
            drop(between);
            // The workers have dropped the services, so the writer ends when its queue is empty.
            if let Err(error) = writer.await {
                tracing::error!(error = &error as &dyn std::error::Error, "writer task failed");
            }
            if let Err(error) = usage.flush(&*store, FlushMode::Immediate).await {
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "last usage counts were not written"
                );
            }
            head.publish(&*store).await;
            if let Some(replica) = replica {
                replica.stop().await;
            }
            store.close().await;
        };
        let waiting = u32::try_from(uses).unwrap_or(u32::MAX);
        let timeout =
            SHUTDOWN_TIMEOUT + SHUTDOWN_TIME_PER_KEY.saturating_mul(waiting).min(MAX_USAGE_FLUSH_TIME);
        let (last, ()) = tokio::join!(tokio::time::timeout(timeout, last), decisions);
        abort();
        if last.is_err() {
            tracing::warn!(
                "the database did not answer in time: the last writes and usage counts may be lost, and the replica's row stays"
            );
        }
        tracing::info!("stopped");
    }
}

/// The task that commits changes.
#[derive(Debug)]
pub struct CommitTask {
    /// The task; it ends when the last commit handle is dropped.
    pub(crate) task: JoinHandle<()>,
    /// The task's counters and durations.
    pub(crate) commits: Arc<CommitMetrics>,
}

/// Builds the use cases over one store and one index, and the task that commits for them. Loads nothing.
pub fn build_services(
    settings: &ServerSettings,
    store: Arc<dyn Store>,
    replication: &ReplicationRuntime,
    clock: Arc<dyn Clock>,
    entropy: Arc<dyn EntropySource>,
    decisions: DecisionLog,
) -> (ServiceParts, CommitTask) {
    let index = replication.log_applier.index().clone();
    let usage = Arc::new(UsageRecorder::default());
    let engine = Engine::new(index, usage, replication.lease.clone(), &settings.limits, clock.clone());
    let engine = Arc::new(engine);
    let listener =
        decisions.wrap_listener(replication.log_applier.clone(), replication.log_applier.index().clone());
    let now = clock.clone();
    let (writer, task) = CommitHandle::spawn(store.clone(), listener, move || now.now());
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
    let membership =
        MembershipOperations::new(store.clone(), writer.clone(), engine.clone(), keys.clone(), clock.clone());
    // Ids of calls need not be secret: without entropy, the time suffices.
    let seed = random_bytes(&*entropy).map_or_else(|_| clock.now().as_millis(), u64::from_be_bytes);
    let tracing = CallTracer::new(seed, settings.telemetry.sampling);
    let accounts = AccountOperations::new(store.clone(), writer, engine.clone(), clock.clone(), entropy);
    let gateway =
        Gateway::new(engine.clone(), environments.clone(), settings.gateway.clone(), decisions.clone());
    let parts = ServiceParts {
        engine,
        keys,
        accounts: Arc::new(accounts),
        membership: Arc::new(membership),
        gateway: Arc::new(gateway),
        store,
        propagation: replication.propagation.clone(),
        freshness: replication.freshness.clone(),
        environments,
        decisions,
        tracing,
        memory_budget: MemoryBudget::new(settings.overload.request_bytes, clock),
    };
    (parts, writing)
}

/// The total of the listeners' connection limits, as far as file descriptors allow.
fn connection_capacity(settings: &ServerSettings, listeners: &OpenListeners) -> WorkerCapacity {
    let wanted = listeners.grpc.iter().map(|opened| opened.settings.limits.max_connections).sum();
    WorkerCapacity {
        threads: settings.threads,
        max_connections: fd_limit::raise_for_connections(wanted),
        max_queued: settings.overload.queued_checks,
        drain_timeout: DRAIN_TIMEOUT,
    }
}

/// Serves until `is_stopping`, and until calls in flight have ended or timed out.
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
    // Blocks; the workers have their own deadline.
    let joined = tokio::task::spawn_blocking(move || workers.drain_and_join());
    let (joined, forwarded) = tokio::join!(joined, join_with_timeout(DRAIN_TIMEOUT, forwarding));
    for ended in [joined, forwarded.unwrap_or(Ok(()))] {
        if let Err(error) = ended {
            tracing::error!(error = &error as &dyn std::error::Error, "serving task failed");
        }
    }
}

/// Waits for a task until the timeout, then aborts it.
async fn join_with_timeout(timeout: Duration, task: Option<JoinHandle<()>>) -> Option<Result<(), JoinError>> {
    let mut task = task?;
    let ended = tokio::time::timeout(timeout, &mut task).await.ok();
    task.abort();
    ended
}

/// Loads the index from a store that this process alone owns.
async fn load_index(
    store: Arc<dyn Store>,
    log_applier: Arc<LogApplier>,
    clock: Arc<dyn Clock>,
    retention: Duration,
    ready: watch::Sender<bool>,
) -> anyhow::Result<()> {
    let evict_before = clock.now().saturating_sub(retention);
    let index = log_applier.index();
    let loader: Arc<dyn SnapshotLoader> = index.clone();
    let head = store.stream_snapshot(evict_before, &loader).await.context("the keys cannot be loaded")?;
    index.evict(evict_before);
    log_applier.finish_load(head);
    tracing::info!(keys = index.len(), revision = head.revision.0, "index loaded");
    ready.send_replace(true);
    Ok(())
}

/// Waits until the replica holds its first lease.
async fn wait_until_serving(mut serving: watch::Receiver<bool>) -> anyhow::Result<()> {
    let _ = serving.wait_for(|serving| *serving).await;
    Ok(())
}

/// Publishes to the health service whether Checks are answered, on each change.
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

/// Stops the server if its index cannot be loaded.
async fn watch_loading(loading: Option<JoinHandle<anyhow::Result<()>>>, stopping: watch::Sender<bool>) {
    let Some(loading) = loading else { return };
    let failure = match loading.await {
        Ok(Ok(())) => return,
        Ok(Err(error)) => error,
        Err(error) => error.into(),
    };
    tracing::error!(error = format!("{failure:#}"), "the index cannot be loaded; the server stops");
    stopping.send_replace(true);
}

/// Stops the server if its replica fails for good, or the database is damaged or has another owner. From then on
/// nothing is allowed, not even by calls in flight.
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
    tracing::error!("the database cannot be trusted any more; the server stops");
    stopping.send_replace(true);
}

async fn flush_usage(store: Arc<dyn Store>, usage: Arc<UsageRecorder>) {
    let mut due = tokio::time::interval(USAGE_FLUSH_INTERVAL);
    due.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        due.tick().await;
        if let Err(error) = usage.flush(&*store, FlushMode::Throttled).await {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "usage counts were not written; they are kept in memory"
            );
        }
    }
}

/// Writes quota counts that other replicas draw from too, when they cannot wait for the next flush.
async fn flush_quotas(store: Arc<dyn Store>, usage: Arc<UsageRecorder>) {
    usage.run_quota_flusher(&*store).await;
}

/// Starts the connection to the Redis that counts rate limits. The receiver resolves after the first attempt.
fn connect_limiter(engine: Arc<Engine>) -> (JoinHandle<()>, oneshot::Receiver<()>) {
    let (attempted, first_attempt) = oneshot::channel();
    (tokio::spawn(async move { engine.limiter.maintain_connection(attempted).await }), first_attempt)
}

async fn evict_expired(store: Arc<dyn Store>, index: Arc<Index>, clock: Arc<dyn Clock>, retention: Duration) {
    loop {
        tokio::time::sleep(EVICTION_INTERVAL).await;
        let now = clock.now();
        let removed = index.evict(now.saturating_sub(retention));
        tracing::debug!(removed, "expired digests removed from the index");
        if let Err(error) =
            store.prune_usage(UsageHour::from_timestamp(now.saturating_sub(USAGE_RETENTION))).await
        {
            tracing::warn!(error = &error as &dyn std::error::Error, "expired usage counts were not deleted");
        }
    }
}
