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

pub mod database;
pub mod replicas;
mod root_key;
mod rules;
mod sockets;
pub mod upkeep;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use anyhow::Context as _;
use tokio::{
    sync::{oneshot, watch},
    task::{AbortHandle, JoinError, JoinHandle},
    time::MissedTickBehavior,
};
use tonic_health::server::HealthReporter;

use replicas::Place;
pub use root_key::{Descendant, Reset, RightsChange, reset_root_key};
use rules::Rules;
use sockets::{Addresses, Listeners, Sockets};

use crate::{
    accounts::Accounts,
    admin,
    audit::head::Teller,
    clock::{Clock, Entropy, random},
    config::server::Settings,
    decisions::{Decisions, Keeper},
    domain::token::Token,
    engine::{
        Engine,
        index::Index,
        lease::Lease,
        usage::{Pace, Usage},
    },
    forward,
    gateway::Gateway,
    grpc::{
        self, Parts,
        serve::{Capacity, Opened, Workers},
    },
    keys::Keys,
    metrics,
    people::People,
    replication::{feed, follow::Follow, propagation::Propagation},
    store::{
        Hour, Loader, Store,
        writer::{Commits, Writer},
    },
    trace::Tracing,
    transport::{budget::MemoryBudget, descriptors, socket::Bound},
};

const FLUSH_EVERY: Duration = Duration::from_secs(5);
const FORGET_EVERY: Duration = Duration::from_secs(60 * 60);
/// How long counts of use are kept.
const USAGE_KEPT: Duration = Duration::from_secs(90 * 24 * 60 * 60);
/// How long clients wait for the index before they hear that it is loading.
const QUIET_START: Duration = Duration::from_secs(1);
/// How long calls in flight have to end.
const DRAIN: Duration = Duration::from_secs(4);
/// How long all has that comes after: what hangs then is left.
const LAST_WORK: Duration = Duration::from_secs(3);
/// How much longer for each key whose uses wait to be written, which takes some 6 microseconds.
const LAST_USE: Duration = Duration::from_micros(10);
/// But not longer than this: whoever stops a process kills it before long.
const LAST_USES: Duration = Duration::from_secs(10);

/// A running server.
#[derive(Debug)]
pub struct Server {
    /// Where gRPC is served; of several listeners, the first.
    pub address: Bound,
    /// Every gRPC listener: its name, where it is, whether it speaks TLS.
    pub listeners: Vec<(String, Bound, bool)>,
    /// Where the admin pages are served.
    pub admin_address: SocketAddr,
    /// Where Envoy alone is served.
    pub envoy_address: Option<SocketAddr>,
    /// Where proxies are served that ask over HTTP.
    pub forward_auth_address: Option<SocketAddr>,
    /// The root key's token, of a first start without a file for it.
    pub root_token: Option<Token>,
    running: Running,
}

struct Running {
    store: Arc<dyn Store>,
    usage: Arc<Usage>,
    head: Arc<Teller>,
    reporter: HealthReporter,
    ready: watch::Sender<bool>,
    stopping: watch::Sender<bool>,
    /// Turns true when nothing is left to tell of.
    closing: watch::Sender<bool>,
    serving: JoinHandle<()>,
    background: Vec<JoinHandle<()>>,
    writer: JoinHandle<()>,
    replica: Option<feed::Running>,
    /// Tells health what the replica says.
    telling: JoinHandle<()>,
    propagation: Propagation,
    /// Asks for files to be read again.
    rereading: watch::Sender<()>,
    /// Writes decisions down.
    keeper: Option<Keeper>,
    shutdown_delay: Duration,
}

impl std::fmt::Debug for Running {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Running")
    }
}

impl Server {
    /// Starts a server; it serves when this returns. Management runs on the current runtime.
    ///
    /// # Errors
    /// When the store does not open, an address cannot be bound, or the root key cannot be kept.
    pub async fn start(
        settings: Settings,
        clock: Arc<dyn Clock>,
        entropy: Arc<dyn Entropy>,
    ) -> anyhow::Result<Server> {
        let rules = settings.rules.as_deref().map(|path| Rules::read(path, &settings)).transpose()?;
        let store = database::open(&settings).await?;
        // The addresses are ours before a root key is made: one that no start shows would be lost. Nobody can
        // connect before it is kept.
        let sockets = Sockets::bind(&settings).await?;
        replicas::first_lease(&store, &settings).await?;
        let root_token = root_key::first_start(&*store, &settings, &*clock, &*entropy).await?;
        let mut listeners = sockets.listen()?;
        let addresses = listeners.addresses()?;

        let index = Arc::new(Index::default());
        let place = Place::on(&store, index.clone(), clock.clone());
        let decided = settings.telemetry.decisions.as_ref();
        let decided =
            decided.map(|settings| Decisions::open(settings, clock.clone(), &*entropy)).transpose()?;
        let (decisions, keeper) = decided.unzip();
        let decisions = decisions.unwrap_or_default();
        let (parts, Writing { task: writer, commits }) =
            parts(&settings, store.clone(), &place, clock.clone(), entropy.clone(), decisions.clone());
        let tracing = parts.tracing;
        let (engine, gateway, memory) = (parts.engine.clone(), parts.gateway.clone(), parts.memory.clone());
        // In force before anybody is served.
        if let Some(rules) = &rules {
            rules.apply(&gateway);
        }
        let reporter = HealthReporter::new();
        grpc::report_health(&reporter, false).await;
        let (stopping, is_stopping) = watch::channel(false);
        let overload = settings.overload;
        let services = Arc::new(grpc::services(parts, reporter.clone(), overload, is_stopping.clone())?);
        let (ready, is_ready) = watch::channel(false);
        let (closing, is_closing) = watch::channel(false);

        let replica = place.start(&store, &settings, addresses.port(), clock.clone(), entropy).await?;
        let mut loading = match &replica {
            Some(replica) => tokio::spawn(until_serving(replica.serving.clone())),
            None => tokio::spawn(load(
                store.clone(),
                place.follow.clone(),
                clock.clone(),
                settings.retention,
                ready.clone(),
            )),
        };
        let loaded = tokio::time::timeout(QUIET_START, &mut loading).await;
        let loading = match loaded {
            Ok(loaded) => {
                loaded??;
                None
            }
            Err(_) => Some(loading),
        };
        let told =
            tell(reporter.clone(), ready.clone(), replica.as_ref().map(|replica| replica.serving.clone()));
        let gave_up = replica.as_ref().map(|replica| replica.failed.clone());
        let telling = tokio::spawn(told);
        // Whoever has waited for the start finds it said.
        if loading.is_none() {
            ready.send_replace(true);
            grpc::report_health(&reporter, true).await;
        }
        let (counting, tried) = count_limits(engine.clone());
        // A Redis that is there counts from the first Check on; one that is not holds nobody up.
        let _ = tokio::time::timeout(QUIET_START, tried).await;
        let workers = Workers::start(capacity(&settings, &listeners), &services).with_context(|| {
            format!(
                "threads = {} cannot be started; lower it, or raise the limits on files and processes (ulimit -n, ulimit -u)",
                settings.threads
            )
        })?;
        listeners.report.add_shed(workers.shed());
        listeners.report.add_shed(services.shed());
        let calls = services.calls().clone();
        drop(services);
        let (rereading, is_rereading) = watch::channel(());
        let watching = listeners.watch(&is_rereading);
        let Listeners { grpc: opened, admin: admin_listener, forward, report, .. } = listeners;
        let forwarding = forward.map(|listener| {
            tokio::spawn(forward::serve(
                listener,
                memory.clone(),
                gateway.clone(),
                tracing,
                clock.clone(),
                is_stopping.clone(),
            ))
        });
        let serving = tokio::spawn(serve(opened, workers, forwarding, is_stopping));
        let usage = engine.usage.clone();
        let head = Arc::new(Teller::default());
        let sources = metrics::Sources {
            engine,
            gateway: gateway.clone(),
            calls,
            commits,
            waits: place.propagation.waits().clone(),
            decisions,
            ready: is_ready,
            replica: replica.as_ref().map(|_| place.sight.clone()),
            clock: clock.clone(),
            transport: report,
            memory: memory.clone(),
        };
        let mut background = vec![
            tokio::spawn(admin::serve(admin_listener, memory, sources, is_closing)),
            counting,
            tokio::spawn(flush_usage(store.clone(), usage.clone())),
            tokio::spawn(head.clone().keep_telling(store.clone())),
            tokio::spawn(draw_quotas(store.clone(), usage.clone())),
            tokio::spawn(forget(store.clone(), index, clock, settings.retention)),
            tokio::spawn(watch_loading(loading, stopping.clone())),
            tokio::spawn(watch_database(gave_up, store.clone(), place.lease.clone(), stopping.clone())),
        ];
        background.extend(rules.map(|rules| tokio::spawn(rules.watch(gateway, is_rereading))));
        background.extend(watching);
        let running = Running {
            store,
            usage,
            head,
            reporter,
            ready,
            stopping,
            closing,
            serving,
            background,
            writer,
            replica,
            telling,
            propagation: place.propagation,
            rereading,
            keeper,
            shutdown_delay: settings.lifecycle.shutdown_delay,
        };
        let envoy_address = addresses.envoy();
        let Addresses { grpc: listeners, admin: admin_address, forward: forward_auth_address } = addresses;
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
    pub async fn failed(&self) {
        let mut stopping = self.running.stopping.subscribe();
        // The sender lives as long as `self`.
        let _ = stopping.wait_for(|stop| *stop).await;
    }

    /// Has certificates and rules read again at once; they are looked at by themselves, too.
    pub fn reread(&self) {
        self.running.rereading.send_replace(());
    }

    /// Stops in order: nothing acknowledged is lost, and calls in flight are answered if they end in time.
    pub async fn stop(self) {
        let Running {
            store,
            usage,
            head,
            reporter,
            ready,
            stopping,
            closing,
            serving,
            background,
            writer,
            replica,
            telling,
            propagation,
            rereading: _,
            keeper,
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
                keeper.stop(LAST_WORK).await;
            }
        };
        let uses = usage.waiting();
        let last = async {
            // One that is given up while it writes uses would have them written twice.
            let between = usage.between_writes().await;
            abort();
            futures_util::future::join_all(background).await;
            drop(between);
            // The services are gone with the workers, and the writer ends when its queue is empty.
            if let Err(error) = writer.await {
                tracing::error!(error = &error as &dyn std::error::Error, "the writer ended badly");
            }
            if let Err(error) = usage.flush(&*store, Pace::AtOnce).await {
                tracing::warn!(error = &error as &dyn std::error::Error, "the last uses were not written");
            }
            head.tell(&*store).await;
            if let Some(replica) = replica {
                replica.stop().await;
            }
            store.close().await;
        };
        let waiting = u32::try_from(uses).unwrap_or(u32::MAX);
        let patience = LAST_WORK + LAST_USE.saturating_mul(waiting).min(LAST_USES);
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
pub struct Writing {
    /// The task. It ends when nobody can ask it any more.
    pub task: JoinHandle<()>,
    /// What it has committed.
    pub commits: Arc<Commits>,
}

/// The use cases over one store and one index, and the task that writes for them. Nothing is loaded yet.
pub fn parts(
    settings: &Settings,
    store: Arc<dyn Store>,
    place: &Place,
    clock: Arc<dyn Clock>,
    entropy: Arc<dyn Entropy>,
    decisions: Decisions,
) -> (Parts, Writing) {
    let index = place.follow.index().clone();
    let usage = Arc::new(Usage::default());
    let engine = Engine::new(index, usage, place.lease.clone(), &settings.limits, clock.clone());
    let engine = Arc::new(engine);
    let follower = decisions.watching(place.follow.clone(), place.follow.index().clone());
    let now = clock.clone();
    let (writer, task) = Writer::spawn(store.clone(), follower, move || now.now());
    let writing = Writing { task, commits: writer.commits().clone() };
    let environments = Arc::new(settings.keys.environments.clone());
    let keys = Arc::new(Keys::new(
        store.clone(),
        writer.clone(),
        engine.clone(),
        clock.clone(),
        entropy.clone(),
        settings.keys.clone(),
    ));
    let people = People::new(store.clone(), writer.clone(), engine.clone(), keys.clone(), clock.clone());
    // Names of calls need not be secret: where there is no chance, the time will do.
    let seed = random(&*entropy).map_or_else(|_| clock.now().as_millis(), u64::from_be_bytes);
    let tracing = Tracing::new(seed, settings.telemetry.sampling);
    let accounts = Accounts::new(store.clone(), writer, engine.clone(), clock.clone(), entropy);
    let gateway =
        Gateway::new(engine.clone(), environments.clone(), settings.gateway.clone(), decisions.clone());
    let parts = Parts {
        engine,
        keys,
        accounts: Arc::new(accounts),
        people: Arc::new(people),
        gateway: Arc::new(gateway),
        store,
        propagation: place.propagation.clone(),
        news: place.news.clone(),
        environments,
        decisions,
        tracing,
        memory: MemoryBudget::new(settings.overload.request_bytes, clock),
    };
    (parts, writing)
}

/// As many connections as the listeners take, and file descriptors allow.
fn capacity(settings: &Settings, listeners: &Listeners) -> Capacity {
    let wanted = listeners.grpc.iter().map(|opened| opened.listener.limits.connections).sum();
    Capacity {
        threads: settings.threads,
        connections: descriptors::room_for(wanted),
        queued: settings.overload.queued_checks,
        drain: DRAIN,
    }
}

/// Serves until it is told to stop, and calls in flight have ended or had their time.
async fn serve(
    opened: Vec<Opened>,
    workers: Workers,
    forwarding: Option<JoinHandle<()>>,
    is_stopping: watch::Receiver<bool>,
) {
    let accepting =
        opened.into_iter().map(|opened| grpc::serve::accept(opened, &workers, is_stopping.clone()));
    futures_util::future::join_all(accepting).await;
    // This blocks; the workers have their own deadline.
    let joined = tokio::task::spawn_blocking(move || workers.finish());
    let (joined, forwarded) = tokio::join!(joined, within(DRAIN, forwarding));
    for ended in [joined, forwarded.unwrap_or(Ok(()))] {
        if let Err(error) = ended {
            tracing::error!(error = &error as &dyn std::error::Error, "serving ended badly");
        }
    }
}

/// Waits for a task so long, and ends it then.
async fn within(patience: Duration, task: Option<JoinHandle<()>>) -> Option<Result<(), JoinError>> {
    let mut task = task?;
    let ended = tokio::time::timeout(patience, &mut task).await.ok();
    task.abort();
    ended
}

/// Fills the index from a store that this process owns.
async fn load(
    store: Arc<dyn Store>,
    follow: Arc<Follow>,
    clock: Arc<dyn Clock>,
    retention: Duration,
    ready: watch::Sender<bool>,
) -> anyhow::Result<()> {
    let forget_before = clock.now().minus(retention);
    let index = follow.index();
    let loader: Arc<dyn Loader> = index.clone();
    let head = store.snapshot(forget_before, &loader).await.context("the keys could not be loaded")?;
    index.forget(forget_before);
    follow.loaded(head);
    tracing::info!(keys = index.len(), revision = head.revision.0, "the index is loaded");
    ready.send_replace(true);
    Ok(())
}

/// Waits for a replica's first lease.
async fn until_serving(mut serving: watch::Receiver<bool>) -> anyhow::Result<()> {
    // The sender goes with the replica, at the stop.
    let _ = serving.wait_for(|serving| *serving).await;
    Ok(())
}

/// Tells health whether Checks are answered, each time that it changes: as a replica's lease comes and goes, or once.
async fn tell(reporter: HealthReporter, ready: watch::Sender<bool>, serving: Option<watch::Receiver<bool>>) {
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
    lease: Arc<Lease>,
    stopping: watch::Sender<bool>,
) {
    tokio::select! {
        () = replicas::gave_up(failed) => {}
        () = store.lost() => lease.stop_allowing(),
    }
    tracing::error!("the database is no longer to be trusted; the server stops");
    stopping.send_replace(true);
}

async fn flush_usage(store: Arc<dyn Store>, usage: Arc<Usage>) {
    let mut due = tokio::time::interval(FLUSH_EVERY);
    due.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        due.tick().await;
        if let Err(error) = usage.flush(&*store, Pace::Gentle).await {
            tracing::warn!(error = &error as &dyn std::error::Error, "uses were not written; they are kept");
        }
    }
}

/// Has quotas counted that others draw from too, when they cannot wait.
async fn draw_quotas(store: Arc<dyn Store>, usage: Arc<Usage>) {
    usage.keep_drawing(&*store).await;
}

/// Connects to where rate limits are counted. The second tells when that was tried once.
fn count_limits(engine: Arc<Engine>) -> (JoinHandle<()>, oneshot::Receiver<()>) {
    let (told, tried) = oneshot::channel();
    (tokio::spawn(async move { engine.limiter.keep_connected(told).await }), tried)
}

async fn forget(store: Arc<dyn Store>, index: Arc<Index>, clock: Arc<dyn Clock>, retention: Duration) {
    loop {
        tokio::time::sleep(FORGET_EVERY).await;
        let now = clock.now();
        let forgotten = index.forget(now.minus(retention));
        tracing::debug!(forgotten, "digests past the retention left the index");
        if let Err(error) = store.forget_usage(Hour::of(now.minus(USAGE_KEPT))).await {
            tracing::warn!(error = &error as &dyn std::error::Error, "old counts of use were not dropped");
        }
    }
}
