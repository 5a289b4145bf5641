//! Ten million keys: what each holds in memory, and how much longer a Check takes than with 10,000. It would take a
//! server longer to be given them than all else that is measured, so the engine has them in this process.
//!
//! `cargo bench --bench many_keys -- [KEYS]`. What a Check costs a server, from the wire to the wire, `keyward bench`
//! measures first with 10,000 keys; the engine's part of it is timed here with few keys and with many, in alternating
//! rounds, uses noted and then written. The ratio is of the whole Check to the whole Check with that difference added.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::disallowed_methods,
    reason = "a benchmark talks and stops"
)]

#[path = "shared/goal.rs"]
mod goal;
#[path = "shared/load.rs"]
mod load;
#[path = "shared/sample.rs"]
mod sample;

use std::sync::Arc;

use keyward::{
    clock::{Clock as _, SystemClock},
    domain::{
        name::{AccountId, EnvironmentName, TokenPrefix, TokenTag},
        scope::Scope,
        time::Revision,
        token::Token,
    },
    engine::{
        CheckInput, Engine, LocalDecision, Requester,
        index::Index,
        limiter::LimitSettings,
        serving_lease::ServingLease,
        usage::{FlushMode, UsageRecorder},
    },
    store::{self, SnapshotRecord},
};
use load::{CPU, ONE_CORE, run_bench};
use rustix::time::{ClockId, clock_gettime};

/// The server's allocator.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const BASELINE_KEYS: u64 = 10_000;
const ROUNDS: usize = 7;
/// How many keys are asked about, as by `keyward bench`.
const CHECKED_KEYS: u64 = 65_536;
/// How often each is asked about until its uses are written: in a busy server that is every five seconds.
const PASSES: usize = 10;

fn main() {
    // Cargo says `--bench` to every benchmark.
    let mut words = std::env::args().skip(1).filter(|word| !word.starts_with("--"));
    let keys: u64 = words.next().map_or(10_000_000, |word| word.parse().unwrap());
    let on_the_wire =
        1e9 / run_bench(&["check", "--keys", &BASELINE_KEYS.to_string()], &ONE_CORE).median(CPU);

    let few = engine(BASELINE_KEYS);
    let before = resident();
    let many = engine(keys);
    let bytes = (resident() - before) as f64 / keys as f64;
    let [few, many] = measure(&[EngineUnderTest::new(few, BASELINE_KEYS), EngineUnderTest::new(many, keys)]);
    println!(
        "a Check in the engine: {few:.0} ns of {BASELINE_KEYS} keys, {many:.0} ns of {keys}; over gRPC it costs the server \
         {on_the_wire:.0} ns"
    );
    let ratio = on_the_wire / (on_the_wire + many - few);
    let what = format!("Check, {} keys to 10,000, the engine's part in process", format_count(keys));
    goal::at_least(&what, 0.95, ratio, &format!("{:.0} ns more of {on_the_wire:.0}", many - few));
    let what = format!("resident bytes per key, {} keys, engine in process", format_count(keys));
    goal::at_most(&what, 100.0, bytes, "");
}

fn format_count(keys: u64) -> String {
    if keys.is_multiple_of(1_000_000) { format!("{} M", keys / 1_000_000) } else { keys.to_string() }
}

/// What this process holds in memory, in bytes.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

/// What this thread has taken of a processor, in nanoseconds: others may want it too.
fn thread_cpu_nanos() -> f64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    time.tv_sec as f64 * 1e9 + time.tv_nsec as f64
}

/// An engine, and what it is asked: a token, its environment, its set of scopes.
struct EngineUnderTest {
    engine: Engine,
    asked: Vec<(Token, usize, usize)>,
}

fn token(number: u64) -> Token {
    let mut random = [7; 32];
    random[..8].copy_from_slice(&number.to_be_bytes());
    Token::generate(&TokenPrefix::parse("kw").unwrap(), &TokenTag::parse("live").unwrap(), &random)
}

fn engine(keys: u64) -> Engine {
    let (index, sets, now) = (Arc::new(Index::default()), sample::scope_sets(), SystemClock.now());
    for number in 0..sample::ACCOUNTS {
        index.load_record(SnapshotRecord::Account(sample::account(number, now)));
    }
    for number in 0..keys {
        let key = sample::key(number, token(number).digest(), &sets, now);
        index.load_record(SnapshotRecord::Key(Arc::new(key), Vec::new()));
    }
    index.finish_load(Revision(1));
    let (lease, limits) = (Arc::new(ServingLease::for_sole_owner()), LimitSettings::default());
    Engine::new(index, Arc::new(UsageRecorder::default()), lease, &limits, Arc::new(SystemClock))
}

impl EngineUnderTest {
    fn new(engine: Engine, keys: u64) -> EngineUnderTest {
        // Spread over the keys, so that a call's key is not in a processor's cache by chance.
        let numbers = (0..CHECKED_KEYS).map(|at| at.wrapping_mul(0x9e37_79b9_7f4a_7c15) % keys);
        let asked = numbers
            .map(|number| (token(number), sample::environment(number), sample::scope_set(number)))
            .collect();
        EngineUnderTest { engine, asked }
    }

    /// What a Check takes, in nanoseconds of a processor.
    fn round(&self, environments: &[EnvironmentName], scopes: &[[Scope; 1]]) -> f64 {
        let asker = AccountId::operator();
        let began = thread_cpu_nanos();
        for _ in 0..PASSES {
            for (token, environment, set) in &self.asked {
                let question = CheckInput {
                    token: token.reveal(),
                    environment: &environments[*environment],
                    scopes: &scopes[*set],
                    account: None,
                    customer: None,
                    client_ip: None,
                    cost: 1,
                    dry_run: false,
                    min_revision: None,
                    dedup_id: None,
                    refuse_management_keys: false,
                };
                match self.engine.decide_locally(Requester::always_authorized(&asker), &question).unwrap() {
                    LocalDecision::Complete(answer) => assert_eq!(answer.failures.iter().next(), None),
                    LocalDecision::NeedsLimits(_) => unreachable!("no key has limits"),
                }
            }
        }
        (thread_cpu_nanos() - began) / (PASSES * self.asked.len()) as f64
    }
}

/// What a Check takes in the engine of each, in nanoseconds.
fn measure(subjects: &[EngineUnderTest; 2]) -> [f64; 2] {
    let environments = sample::ENVIRONMENTS.map(|name| EnvironmentName::parse(name).unwrap());
    let scopes: Vec<_> = (0..sample::SCOPE_SETS)
        .map(|set| [Scope::parse_required(&sample::own_scope(set)).unwrap()])
        .collect();
    let folder = tempfile::tempdir().unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let url = format!("sqlite:{}", folder.path().join("uses.db").display());
    let store = runtime.block_on(store::open(&url)).unwrap();
    let mut times = [Vec::new(), Vec::new()];
    // The first round warms up.
    for round in 0..=ROUNDS {
        for (subject, times) in subjects.iter().zip(&mut times) {
            let took = subject.round(&environments, &scopes);
            runtime.block_on(subject.engine.usage.flush(&*store, FlushMode::Immediate)).unwrap();
            if round > 0 {
                times.push(took);
            }
        }
    }
    runtime.block_on(store.close());
    times.map(goal::median)
}
