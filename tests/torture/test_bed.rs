//! Everything that a run starts, and how it hangs together: clients → replicas → links → pgbouncer → database.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    path::Path,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::runtime::{Builder, Runtime};

use crate::{
    audit::LogAudit,
    bouncer::PgBouncer,
    breakable_proxy::{BreakableProxy, NetworkCondition},
    cluster::PrimaryAndStandby,
    faults::FaultRecord,
    judge::{JudgeRule, Nanos, Violation},
    namespaces::NamespaceLinks,
    replicas::{ReplicaConfig, ReplicaProcess},
    shared_state::SharedState,
};

/// How a run is made.
#[derive(Clone, Debug)]
pub(crate) struct TestBedConfig {
    pub(crate) replicas: usize,
    pub(crate) setup: ReplicaConfig,
    /// How fast each replica's clock runs, in thousandths; only a breakable build can be told. Empty = all alike.
    pub(crate) clocks: Vec<u32>,
}

impl TestBedConfig {
    fn setup(&self, replica: usize) -> ReplicaConfig {
        let mut setup = self.setup.clone();
        if let Some(rate) = self.clocks.get(replica) {
            setup.environment.push(("KEYWARD_CLOCK_RATE".to_owned(), rate.to_string()));
        }
        setup
    }
}

/// It.
pub(crate) struct TestBed {
    pub(crate) field: Arc<SharedState>,
    pub(crate) lease: Duration,
    /// From each replica to the database, or to pgbouncer.
    pub(crate) links: Vec<BreakableProxy>,
    /// Where there are namespaces.
    pub(crate) cables: Option<Vec<NamespaceLinks>>,
    /// From pgbouncer to the database.
    bouncer_link: BreakableProxy,
    bouncer: Mutex<PgBouncer>,
    cluster: Mutex<PrimaryAndStandby>,
    strikes: Mutex<Vec<FaultRecord>>,
    remarks: Mutex<BTreeMap<String, u64>>,
    violations: Mutex<Vec<Violation>>,
    audit: Mutex<LogAudit>,
    calm: AtomicBool,
    pub(crate) runtime: Runtime,
    /// The links have threads of their own: the clients' must not slow them.
    _network: Runtime,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn runtime(name: &str, threads: usize) -> Runtime {
    Builder::new_multi_thread().worker_threads(threads).thread_name(name).enable_all().build().unwrap()
}

/// A port that was free a moment ago.
fn unused_address() -> SocketAddr {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap()
}

const ANY: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

/// Every third replica reaches the database through pgbouncer.
fn is_bounced(replica: usize) -> bool {
    replica % 3 == 2
}

impl TestBed {
    /// Starts a database and replicas, all of them at once.
    pub(crate) fn start(plan: &TestBedConfig) -> TestBed {
        let began = Instant::now();
        let cables = NamespaceLinks::create_all(plan.replicas);
        let (network, runtime) = (runtime("links", 1), runtime("clients", 2));
        let cluster = PrimaryAndStandby::start();
        let bouncer_link = BreakableProxy::open(network.handle(), ANY, cluster.socket());
        let bouncer = PgBouncer::start(bouncer_link.address);
        let mut links = Vec::new();
        let mut replicas = Vec::new();
        for at in 0..plan.replicas {
            let target = if is_bounced(at) { bouncer.socket() } else { cluster.socket() };
            let mut setup = plan.setup(at);
            let (database, (address, admin)) = match cables.as_ref().map(|cables| cables[at]) {
                None => (ANY, (unused_address(), unused_address())),
                Some(cables) => {
                    setup.wrapper = cables.wrapper();
                    (cables.database(), cables.replica())
                }
            };
            let link = BreakableProxy::open(network.handle(), database, target);
            let url = PrimaryAndStandby::url(link.address);
            replicas.push(ReplicaProcess::new(&format!("replica-{at}"), address, admin, url, setup));
            links.push(link);
        }
        std::thread::scope(|scope| {
            for replica in &replicas {
                scope.spawn(|| replica.start());
            }
        });
        let root = replicas.iter().find_map(ReplicaProcess::root_key).expect("one of them made the root key");
        let field = Arc::new(SharedState::new(replicas, root.trim().to_owned(), began));
        TestBed {
            audit: Mutex::default(),
            field,
            lease: plan.setup.lease,
            links,
            cables,
            bouncer_link,
            bouncer: Mutex::new(bouncer),
            cluster: Mutex::new(cluster),
            strikes: Mutex::default(),
            remarks: Mutex::default(),
            violations: Mutex::default(),
            calm: AtomicBool::new(false),
            runtime,
            _network: network,
        }
    }

    pub(crate) fn cluster(&self) -> MutexGuard<'_, PrimaryAndStandby> {
        lock(&self.cluster)
    }

    pub(crate) fn bouncer(&self) -> MutexGuard<'_, PgBouncer> {
        lock(&self.bouncer)
    }

    /// Every way to the database leads there from now on, but that of one replica.
    pub(crate) fn retarget_all(&self, primary: &Path, but: Option<usize>) {
        if !but.is_some_and(is_bounced) {
            self.bouncer_link.retarget(primary);
        }
        for (at, link) in self.links.iter().enumerate() {
            if !is_bounced(at) && but != Some(at) {
                link.retarget(primary);
            }
        }
    }

    /// Breaks or mends the way from a replica to the database.
    pub(crate) fn cut(&self, replica: usize, weather: NetworkCondition) {
        let Some(cables) = &self.cables else { return self.links[replica].set(weather) };
        cables[replica].cut(weather.cut_there, weather.cut_back);
        self.links[replica].set(NetworkCondition { cut_there: false, cut_back: false, ..weather });
    }

    /// No more faults from now on.
    pub(crate) fn stop_faults(&self) {
        self.calm.store(true, Ordering::Relaxed);
    }

    pub(crate) fn are_faults_stopped(&self) -> bool {
        self.calm.load(Ordering::Relaxed)
    }

    pub(crate) fn record_fault(&self, strike: FaultRecord) {
        lock(&self.strikes).push(strike);
    }

    pub(crate) fn strikes(&self) -> Vec<FaultRecord> {
        lock(&self.strikes).clone()
    }

    /// Something that people should know of, which breaks no rule.
    pub(crate) fn remark(&self, what: String) {
        *lock(&self.remarks).entry(what).or_default() += 1;
    }

    pub(crate) fn remarks(&self) -> BTreeMap<String, u64> {
        lock(&self.remarks).clone()
    }

    /// A violation that no Check shows.
    pub(crate) fn report_violation(&self, rule: JudgeRule, at: Nanos, story: String) {
        lock(&self.violations).push(Violation { rule, at, story });
    }

    pub(crate) fn take_found(&self) -> Vec<Violation> {
        std::mem::take(&mut *lock(&self.violations))
    }

    /// Holds what was acknowledged lately against the log.
    pub(crate) fn audit_newest(&self) {
        let lost = self.runtime.block_on(lock(&self.audit).newest(&self.field));
        self.lost(lost);
    }

    /// Holds everything that was acknowledged against the log and the keys.
    pub(crate) fn audit_all(&self) {
        let lost = self.runtime.block_on(lock(&self.audit).everything(&self.field));
        self.lost(lost);
    }

    fn lost(&self, lost: Vec<String>) {
        for story in lost {
            self.report_violation(JudgeRule::Lost, self.field.now(), story);
        }
    }
}
