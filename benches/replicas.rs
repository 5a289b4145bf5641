//! What several replicas on one PostgreSQL promise, measured with real processes on a database of their own.
//!
//! - `cargo bench --bench replicas -- revoke [N]`: how long Revoke takes over three healthy replicas (default 10,000
//!   times), and whether the first Check on each other replica after it is refused.
//! - `cargo bench --bench replicas -- outage [SECONDS]`: Checks on two replicas with the default lease while PostgreSQL
//!   is killed and stays away (default 30 s).
//! - `cargo bench --bench replicas -- writes [N]`: renewals and single writes that one PostgreSQL takes, by how many
//!   replicas and callers.
//!
//! It needs PostgreSQL's server programs. Server, database and client share the machine.

#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::disallowed_methods,
    unreachable_pub,
    missing_docs,
    reason = "a benchmark talks and stops, and uses a part of what the tests are made with"
)]

#[path = "shared/goal.rs"]
mod goal;
#[path = "../tests/it/postgres.rs"]
mod postgres;
#[path = "../tests/it/process.rs"]
mod process;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use keyward::pb;
use postgres::{PostgresServer, url};
use process::{AuthorizedClients, KeywardProcess, TestHome, plain_key_request, wait_for};

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let number = arguments.get(1).map(|number| number.parse().unwrap());
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    match arguments.first().map(String::as_str) {
        Some("revoke") => runtime.block_on(revoke(number.unwrap_or(10_000))),
        Some("outage") => runtime.block_on(outage(Duration::from_secs(number.unwrap_or(30)))),
        Some("writes") => runtime.block_on(writes(number.unwrap_or(2_000))),
        // Whoever runs all benchmarks has not asked for this one.
        _ => println!("replicas: say revoke, outage or writes"),
    }
}

struct BenchCluster {
    replicas: Vec<KeywardProcess>,
    home: TestHome,
    cluster: PostgresServer,
}

impl BenchCluster {
    async fn start(count: usize, lease: &str) -> BenchCluster {
        let cluster = PostgresServer::start(&[]);
        cluster.sql("postgres", "CREATE DATABASE keys OWNER keyward TEMPLATE template0");
        let home = TestHome::with_database_url(url(cluster.socket(), 5432, "keys"));
        let replica = |number: usize| {
            let mut serve = home.serve_command();
            serve.args(["--replica-name", &format!("r{number}"), "--lease", lease, "--threads", "1"]);
            let replica = home.start_with(serve).unwrap();
            wait_for("a replica", || (replica.fetch_admin_page("/readyz").0 == 200).then_some(()));
            replica
        };
        let replicas: Vec<_> = (0..count).map(replica).collect();
        replicas[0].root_caller().create_account("acme").await;
        BenchCluster { replicas, home, cluster }
    }

    fn callers(&self) -> Vec<AuthorizedClients> {
        self.replicas.iter().map(KeywardProcess::root_caller).collect()
    }
}

/// Shows these times; gives their median and 99th percentile, in ms.
fn show(what: &str, mut times: Vec<Duration>) -> (f64, f64) {
    times.sort();
    let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize].as_secs_f64() * 1e3;
    println!(
        "{what}: {} times, median {:.2} ms, p90 {:.2}, p99 {:.2}, p99.9 {:.2}, max {:.2}",
        times.len(),
        at(0.5),
        at(0.9),
        at(0.99),
        at(0.999),
        at(1.0)
    );
    (at(0.5), at(0.99))
}

async fn revoke(count: u64) {
    let fleet = BenchCluster::start(3, "default").await;
    let mut callers = fleet.callers();
    let (mut times, mut checks, mut refused) = (Vec::new(), 0_u64, 0_u64);
    for turn in 0..count {
        let here = (turn % 3) as usize;
        let (id, token) = callers[here].create_key(plain_key_request()).await.unwrap();
        let begun = Instant::now();
        callers[here].revoke_key(&id).await.unwrap();
        times.push(begun.elapsed());
        for there in (0..3).filter(|there| *there != here) {
            checks += 1;
            refused += u64::from(callers[there].check_token(&token).await.unwrap() == pb::Reason::Revoked);
        }
    }
    let (median, p99) = show("Revoke over three replicas", times);
    println!("first Checks on the other replicas: {refused} of {checks} refused");
    assert_eq!(refused, checks);
    let note = format!("of {count}; every first Check on the others refused");
    goal::at_most("ms, Revoke over three replicas, PostgreSQL, median", 5.0, median, &note);
    goal::at_most("ms, the same, p99", 25.0, p99, "");
}

async fn outage(length: Duration) {
    let mut fleet = BenchCluster::start(2, "default").await;
    let (_, token) = fleet.callers()[0].create_key(plain_key_request()).await.unwrap();
    // A new key is known everywhere within milliseconds, and not before.
    for mut caller in fleet.callers() {
        while !matches!(caller.check_token(&token).await, Ok(pb::Reason::Ok)) {}
    }
    let (stop, allowed, other) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
    let shared = Arc::new((stop, allowed, other));
    let clients: Vec<_> = fleet
        .callers()
        .into_iter()
        .map(|mut caller| {
            let (shared, token) = (shared.clone(), token.clone());
            tokio::spawn(async move {
                let (stop, allowed, other) = &*shared;
                let mut slowest = Duration::ZERO;
                while !stop.load(Ordering::Relaxed) {
                    let begun = Instant::now();
                    let good = matches!(caller.check_token(&token).await, Ok(pb::Reason::Ok));
                    slowest = slowest.max(begun.elapsed());
                    if good { allowed } else { other }.fetch_add(1, Ordering::Relaxed);
                }
                slowest
            })
        })
        .collect();
    tokio::time::sleep(Duration::from_secs(1)).await;
    let cluster = &mut fleet.cluster;
    tokio::task::block_in_place(|| cluster.crash(|| std::thread::sleep(length)));
    tokio::time::sleep(Duration::from_secs(5)).await;
    shared.0.store(true, Ordering::Relaxed);
    let mut slowest = Duration::ZERO;
    for client in clients {
        slowest = slowest.max(client.await.unwrap());
    }
    let (allowed, other) = (shared.1.load(Ordering::Relaxed), shared.2.load(Ordering::Relaxed));
    println!(
        "PostgreSQL killed for {} s: {allowed} Checks allowed, {other} not; slowest {:.1} ms",
        length.as_secs(),
        slowest.as_secs_f64() * 1e3
    );
    assert_eq!(other, 0);
}

async fn writes(count: u64) {
    for replicas in [1, 3, 6] {
        let fleet = BenchCluster::start(replicas, "default").await;
        for callers in [1, 16, 64] {
            let begun = Instant::now();
            let each = count / callers;
            let tasks: Vec<_> = (0..callers)
                .map(|at| {
                    let mut caller = fleet.replicas[at as usize % replicas].root_caller();
                    tokio::spawn(async move {
                        for _ in 0..each {
                            caller.create_key(plain_key_request()).await.unwrap();
                        }
                    })
                })
                .collect();
            for task in tasks {
                task.await.unwrap();
            }
            let rate = (each * callers) as f64 / begun.elapsed().as_secs_f64();
            println!("{replicas} replicas, {callers} callers: {rate:.0} creates/s");
        }
        let renewals = || {
            fleet.cluster.sql("keys", "SELECT sum(renew_seq) FROM keyward.replicas").parse::<f64>().unwrap()
        };
        let before = renewals();
        tokio::time::sleep(Duration::from_secs(5)).await;
        println!("{replicas} replicas at rest: {:.1} renewals/s", (renewals() - before) / 5.0);
    }
}
