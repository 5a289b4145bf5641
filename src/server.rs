//! The composition root: puts a server together, starts it in order, and takes it down in order.
//!
//! Start: read the rules · open and check the store · take the addresses · make the root key of a first start ·
//! listen · put the rules in force · load the index, and as a replica take a lease · serve. A client that connects
//! while the index loads waits; after a second it is served and hears UNAVAILABLE, and health says NOT_SERVING. Stop:
//! health says NOT_SERVING · no new connections · calls in flight end · usage is written · the lease and the replica's
//! row are given up, decisions are written down · the store is closed.

pub mod replicas;
mod rules;
mod sockets;

use std::{
    fs::{File, OpenOptions},
    io::Write as _,
    net::SocketAddr,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, bail};
use tokio::{
    sync::{oneshot, watch},
    task::{JoinError, JoinHandle},
};
use tonic_health::server::HealthReporter;

use replicas::Place;
use rules::Rules;
use sockets::{Addresses, Listeners, Sockets};

use crate::{
    accounts::{self, Accounts},
    admin,
    clock::{Clock, Entropy, random},
    config::server::Settings,
    decisions::{Decisions, Keeper},
    domain::{
        key::{Revocation, RevokeReason, State},
        log::{Action, Actor, Change},
        name::{AccountId, KeyId},
        time::Revision,
        token::Token,
    },
    engine::{Engine, index::Index, usage::Usage},
    forward,
    gateway::Gateway,
    grpc::{
        self, Parts,
        serve::{Capacity, Opened, Workers},
    },
    keys::{self, Keys},
    metrics,
    people::People,
    replication::{feed, follow::Follow, propagation::Propagation},
    store::{
        self, CommitError, Hour, KeyFilter, OwnerFilter, Store, Write,
        writer::{Commits, Writer},
    },
    trace::Tracing,
    transport::{descriptors, socket::Bound},
};

const FLUSH_EVERY: Duration = Duration::from_secs(5);
const FORGET_EVERY: Duration = Duration::from_secs(60 * 60);
/// How long counts of use are kept.
const USAGE_KEPT: Duration = Duration::from_secs(90 * 24 * 60 * 60);
/// How long clients wait for the index before they hear that it is loading.
const QUIET_START: Duration = Duration::from_secs(1);
/// How long calls in flight have to end.
const DRAIN: Duration = Duration::from_secs(5);
/// How long the last writes have to end.
const LAST_WRITES: Duration = Duration::from_secs(2);

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
        let store = store::open(&settings.database).await?;
        // The addresses are ours before a root key is made: one that no start shows would be lost. Nobody can
        // connect before it is kept.
        let sockets = Sockets::bind(&settings).await?;
        replicas::first_lease(&store, &settings).await?;
        let root_token = first_start(&*store, &settings, &*clock, &*entropy).await?;
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
        let (engine, gateway) = (parts.engine.clone(), parts.gateway.clone());
        // In force before anybody is served.
        if let Some(rules) = &rules {
            rules.apply(&gateway);
        }
        let reporter = HealthReporter::new();
        grpc::report_health(&reporter, false).await;
        let services = Arc::new(grpc::services(parts, reporter.clone(), settings.overload)?);
        let (ready, is_ready) = watch::channel(false);
        let (stopping, is_stopping) = watch::channel(false);
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
        let workers = Workers::start(capacity(&settings, &listeners), &services, &is_stopping)?;
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
                gateway.clone(),
                tracing,
                clock.clone(),
                is_stopping.clone(),
            ))
        });
        let serving = tokio::spawn(serve(opened, workers, forwarding, is_stopping));
        let usage = engine.usage.clone();
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
        };
        let mut background = vec![
            tokio::spawn(admin::serve(admin_listener, sources, is_closing)),
            counting,
            tokio::spawn(flush_usage(store.clone(), usage.clone())),
            tokio::spawn(draw_quotas(store.clone(), usage.clone())),
            tokio::spawn(forget(store.clone(), index, clock, settings.retention)),
            tokio::spawn(watch_loading(loading, stopping.clone())),
            tokio::spawn(watch_database(gave_up, store.clone(), stopping.clone())),
        ];
        background.extend(rules.map(|rules| tokio::spawn(rules.watch(gateway, is_rereading))));
        background.extend(watching);
        let running = Running {
            store,
            usage,
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
        } = self.running;
        // Before health is told for the last time.
        telling.abort();
        propagation.stop();
        grpc::report_health(&reporter, false).await;
        ready.send_replace(false);
        stopping.send_replace(true);
        if let Err(error) = serving.await {
            tracing::error!(error = &error as &dyn std::error::Error, "serving ended badly");
        }
        closing.send_replace(true);
        for task in &background {
            task.abort();
        }
        // The services are gone with the workers, and the writer ends when its queue is empty.
        if tokio::time::timeout(LAST_WRITES, writer).await.is_err() {
            tracing::warn!("the last writes did not end in time; their callers were not answered");
        }
        if let Err(error) = usage.flush(&*store).await {
            tracing::warn!(error = &error as &dyn std::error::Error, "the last uses were not written");
        }
        let replica = async {
            if let Some(replica) = replica {
                replica.stop().await;
            }
        };
        let decisions = async {
            if let Some(keeper) = keeper {
                keeper.stop(LAST_WRITES).await;
            }
        };
        tokio::join!(replica, decisions);
        store.close().await;
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
    let (writer, task) = Writer::spawn(store.clone(), follower);
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
    // Joining blocks; the workers have their own deadline.
    let joined = tokio::task::spawn_blocking(move || workers.join());
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
    let head = store
        .snapshot(forget_before, &mut |item| index.load(item))
        .await
        .context("the keys could not be loaded")?;
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

/// Takes the server down when its replica cannot go on, or the database was found damaged.
async fn watch_database(
    failed: Option<watch::Receiver<bool>>,
    store: Arc<dyn Store>,
    stopping: watch::Sender<bool>,
) {
    tokio::select! {
        () = replicas::gave_up(failed) => {}
        () = store.lost() => {}
    }
    tracing::error!("the database is no longer to be trusted; the server stops");
    stopping.send_replace(true);
}

async fn flush_usage(store: Arc<dyn Store>, usage: Arc<Usage>) {
    loop {
        tokio::time::sleep(FLUSH_EVERY).await;
        if let Err(error) = usage.flush(&*store).await {
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

/// On the first start of a database: the operator account and its root key. Gives the token, unless it went to
/// a file.
async fn first_start(
    store: &dyn Store,
    settings: &Settings,
    clock: &dyn Clock,
    entropy: &dyn Entropy,
) -> anyhow::Result<Option<Token>> {
    if store.head().await?.revision != Revision::default() {
        return Ok(None);
    }
    let root = keys::root::root_key(clock, entropy, &settings.keys, "keyward serve")?;
    let account = accounts::operator_account(clock.now()).context("the operator account has no name")?;
    let kept = KeptToken::keep(settings.root_key_file.as_deref(), &root.token)?;
    let committed =
        store.commit(&[account, root.write]).await.inspect_err(|error| kept.discard_after(error))?;
    let made = committed.outcomes.iter().all(Result::is_ok);
    if !made {
        // Another replica was first, and has shown its key.
        kept.discard();
        return Ok(None);
    }
    Ok(settings.root_key_file.is_none().then_some(root.token))
}

/// A token's file: written whole and on disk before the key is recorded, so that no key is lost in between.
struct KeptToken(Option<PathBuf>);

impl KeptToken {
    fn keep(path: Option<&Path>, token: &Token) -> anyhow::Result<KeptToken> {
        let Some(path) = path else {
            return Ok(KeptToken(None));
        };
        let created = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
        let mut file = match created {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => bail!(
                "the root key file {} exists already and is not overwritten; move it away, or name another one",
                path.display()
            ),
            Err(error) => {
                return Err(error)
                    .with_context(|| format!("the root key file {} cannot be made", path.display()));
            }
        };
        let kept = KeptToken(Some(path.to_owned()));
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let written = file
            .write_all(token.reveal().as_bytes())
            .and_then(|()| file.sync_all())
            .and_then(|()| File::open(folder)?.sync_all());
        if let Err(error) = written {
            kept.discard();
            return Err(error).context("the root key file cannot be written");
        }
        Ok(kept)
    }

    /// Takes the file away after a commit that certainly failed. While it may have been recorded it stays.
    fn discard_after(&self, error: &CommitError) {
        match error {
            CommitError::NotRecorded(_) => self.discard(),
            CommitError::Unknown(_) => {
                tracing::warn!(
                    "whether the root key was recorded is unknown; its file, if one was named, stays"
                );
            }
        }
    }

    /// Takes the file away again: its token is no key.
    fn discard(&self) {
        if let Some(path) = &self.0
            && let Err(error) = std::fs::remove_file(path)
        {
            tracing::warn!(error = &error as &dyn std::error::Error, path = %path.display(), "a file was left");
        }
    }
}

/// Makes a new root key and revokes the ones before it, also where servers run on the database. A file must belong to
/// no running server.
///
/// # Errors
/// When the store does not open or has never been started, or the key cannot be kept.
pub async fn reset_root_key(
    settings: &Settings,
    clock: Arc<dyn Clock>,
    entropy: &dyn Entropy,
) -> anyhow::Result<Option<Token>> {
    const METHOD: &str = "keyward root-key reset";
    let store = store::open(&settings.database).await?;
    if store.head().await?.revision == Revision::default() {
        bail!("this database is new and has no root key yet; 'keyward serve' makes one at its first start");
    }
    let root = keys::root::root_key(&*clock, entropy, &settings.keys, METHOD)?;
    let new = root.write.change.key_id();
    let mut batch = revoke_roots(&*store, &*clock, METHOD, new).await?;
    batch.push(root.write);
    let kept = KeptToken::keep(settings.root_key_file.as_deref(), &root.token)?;
    let committed = store.commit(&batch).await.inspect_err(|error| kept.discard_after(error))?;
    if let Some(Err(rejection)) = committed.outcomes.last() {
        kept.discard();
        bail!("the root key was not recorded: {rejection:?}; try again");
    }
    // A running server may have changed one of them meanwhile.
    let mut left = committed.outcomes.iter().any(Result::is_err);
    while left {
        let batch = revoke_roots(&*store, &*clock, METHOD, new).await?;
        left = store.commit(&batch).await?.outcomes.iter().any(Result::is_err);
    }
    // Running replicas may still hold the old ones for good.
    let place = Place::on(&store, Arc::default(), clock.clone());
    let revision = store.head().await?.revision;
    if let Err(incomplete) = place.propagation.wait(revision, false, None).await {
        tracing::error!(?incomplete, "the old root keys are revoked, and may not be refused everywhere yet");
    }
    store.close().await;
    Ok(settings.root_key_file.is_none().then_some(root.token))
}

/// Writes that revoke every root key but one that is not revoked yet.
async fn revoke_roots(
    store: &dyn Store,
    clock: &dyn Clock,
    method: &'static str,
    but: Option<KeyId>,
) -> anyhow::Result<Vec<Write>> {
    let now = clock.now();
    let filter = KeyFilter {
        owner: OwnerFilter::Account(AccountId::operator()),
        environment: None,
        states: vec![State::Active, State::Disabled, State::Expired],
        name_prefix: String::new(),
        unused_since: None,
        expires_before: None,
        created_before: None,
        now,
    };
    let mut writes = Vec::new();
    let (mut found, mut before) = (Vec::new(), None);
    loop {
        let page = store.keys(&filter, before, 1000).await?;
        let Some(last) = page.last() else { break };
        before = Some(last.key.id);
        found.extend(page);
    }
    for stored in found {
        let mut key = stored.key;
        // Whatever it is called by now: nothing else is made by the system.
        let root = key.created_by == Actor::SYSTEM.to_string();
        if !root || Some(key.id) == but {
            continue;
        }
        let expect = Some(key.revision);
        let comment = "replaced by root-key reset".to_owned();
        key.revocation = Some(Revocation { at: now, reason: RevokeReason::Superseded, comment });
        key.updated_at = now;
        writes.push(Write {
            change: Change::Key(Arc::new(key)),
            expect,
            action: Action::KeyRevoked,
            actor: Actor::SYSTEM,
            method,
            at: now,
            idempotency: None,
        });
    }
    Ok(writes)
}
