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
    audit::Audit,
    bouncer::Bouncer,
    cables::Cables,
    cluster::Cluster,
    faults::Strike,
    field::Field,
    judge::{Nanos, Rule, Violation},
    link::{Link, Weather},
    replicas::{Replica, Setup},
};

/// How a run is made.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) replicas: usize,
    pub(crate) setup: Setup,
    /// How fast each replica's clock runs, in thousandths; only a breakable build can be told. Empty = all alike.
    pub(crate) clocks: Vec<u32>,
}

impl Plan {
    fn setup(&self, replica: usize) -> Setup {
        let mut setup = self.setup.clone();
        if let Some(rate) = self.clocks.get(replica) {
            setup.environment.push(("KEYWARD_CLOCK_RATE".to_owned(), rate.to_string()));
        }
        setup
    }
}

/// It.
pub(crate) struct World {
    pub(crate) field: Arc<Field>,
    pub(crate) lease: Duration,
    /// From each replica to the database, or to pgbouncer.
    pub(crate) links: Vec<Link>,
    /// Where there are namespaces.
    pub(crate) cables: Option<Vec<Cables>>,
    /// From pgbouncer to the database.
    bouncer_link: Link,
    bouncer: Mutex<Bouncer>,
    cluster: Mutex<Cluster>,
    strikes: Mutex<Vec<Strike>>,
    remarks: Mutex<BTreeMap<String, u64>>,
    found: Mutex<Vec<Violation>>,
    audit: Mutex<Audit>,
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
fn free() -> SocketAddr {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap()
}

const ANY: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

/// Every third replica reaches the database through pgbouncer.
fn is_bounced(replica: usize) -> bool {
    replica % 3 == 2
}

impl World {
    /// Starts a database and replicas, all of them at once.
    pub(crate) fn start(plan: &Plan) -> World {
        let began = Instant::now();
        let cables = Cables::lay(plan.replicas);
        let (network, runtime) = (runtime("links", 1), runtime("clients", 2));
        let cluster = Cluster::start();
        let bouncer_link = Link::open(network.handle(), ANY, cluster.socket());
        let bouncer = Bouncer::start(bouncer_link.address);
        let mut links = Vec::new();
        let mut replicas = Vec::new();
        for at in 0..plan.replicas {
            let target = if is_bounced(at) { bouncer.socket() } else { cluster.socket() };
            let mut setup = plan.setup(at);
            let (database, (address, admin)) = match cables.as_ref().map(|cables| cables[at]) {
                None => (ANY, (free(), free())),
                Some(cables) => {
                    setup.wrapper = cables.wrapper();
                    (cables.database(), cables.replica())
                }
            };
            let link = Link::open(network.handle(), database, target);
            let url = Cluster::url(link.address);
            replicas.push(Replica::new(&format!("replica-{at}"), address, admin, url, setup));
            links.push(link);
        }
        std::thread::scope(|scope| {
            for replica in &replicas {
                scope.spawn(|| replica.start());
            }
        });
        let root = replicas.iter().find_map(Replica::root_key).expect("one of them made the root key");
        let field = Arc::new(Field::new(replicas, root.trim().to_owned(), began));
        World {
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
            found: Mutex::default(),
            calm: AtomicBool::new(false),
            runtime,
            _network: network,
        }
    }

    pub(crate) fn cluster(&self) -> MutexGuard<'_, Cluster> {
        lock(&self.cluster)
    }

    pub(crate) fn bouncer(&self) -> MutexGuard<'_, Bouncer> {
        lock(&self.bouncer)
    }

    /// Every way to the database leads there from now on, but that of one replica.
    pub(crate) fn lead_all_to(&self, primary: &Path, but: Option<usize>) {
        if !but.is_some_and(is_bounced) {
            self.bouncer_link.lead_to(primary);
        }
        for (at, link) in self.links.iter().enumerate() {
            if !is_bounced(at) && but != Some(at) {
                link.lead_to(primary);
            }
        }
    }

    /// Breaks or mends the way from a replica to the database.
    pub(crate) fn cut(&self, replica: usize, weather: Weather) {
        let Some(cables) = &self.cables else { return self.links[replica].set(weather) };
        cables[replica].cut(weather.cut_there, weather.cut_back);
        self.links[replica].set(Weather { cut_there: false, cut_back: false, ..weather });
    }

    /// No more faults from now on.
    pub(crate) fn calm_down(&self) {
        self.calm.store(true, Ordering::Relaxed);
    }

    pub(crate) fn is_calm(&self) -> bool {
        self.calm.load(Ordering::Relaxed)
    }

    pub(crate) fn note(&self, strike: Strike) {
        lock(&self.strikes).push(strike);
    }

    pub(crate) fn strikes(&self) -> Vec<Strike> {
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
    pub(crate) fn found(&self, rule: Rule, at: Nanos, story: String) {
        lock(&self.found).push(Violation { rule, at, story });
    }

    pub(crate) fn take_found(&self) -> Vec<Violation> {
        std::mem::take(&mut *lock(&self.found))
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
            self.found(Rule::Lost, self.field.now(), story);
        }
    }
}
