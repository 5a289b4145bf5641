//! How long a server with many keys takes from its start to `/readyz`, and what each key costs in memory: resident
//! bytes above a server without keys, now and at the worst moment of the start.
//!
//! `cargo bench --bench cold_start -- [KEYS] [URL]`: 1,000,000 keys in an SQLite file of its own unless said. The
//! database must be empty, or filled by an earlier run: filling it takes longer than all that is measured. Next to
//! a PostgreSQL database the schema `keyward_empty` is used for the server without keys.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::disallowed_methods,
    reason = "a benchmark talks and stops"
)]

use std::{
    collections::BTreeMap,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    path::Path,
    process::{Child, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use keyward::{
    clock::{Clock as _, SystemClock},
    domain::{
        account::Account,
        key::{Key, Owner, Secret, Terms},
        log::{Action, Actor, Change},
        name::{AccountId, DisplayName, EnvironmentName, KeyId, KeyName},
        scope::{Scope, ScopeSet},
        time::{Revision, Timestamp},
        token::Digest,
    },
    store::{self, Store, Write},
};

const STARTS: usize = 3;
const ACCOUNTS: u64 = 1000;
const SCOPE_SETS: u64 = 20;
const BATCH: u64 = 1000;

fn main() {
    // Cargo says `--bench` to every benchmark.
    let mut words = std::env::args().skip(1).filter(|word| !word.starts_with("--"));
    let keys: u64 = words.next().map_or(1_000_000, |word| word.parse().unwrap());
    let folder = tempfile::tempdir().unwrap();
    let url = words.next().unwrap_or_else(|| format!("sqlite:{}", folder.path().join("full.db").display()));
    let empty = match url.strip_prefix("sqlite:") {
        Some(_) => format!("sqlite:{}", folder.path().join("empty.db").display()),
        None => format!("{url}{}schema=keyward_empty", if url.contains('?') { '&' } else { '?' }),
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(fill(&url, keys));
    drop(runtime);

    let bare = start(folder.path(), &empty);
    println!("without keys: ready in {:.2} s, {} kB resident", bare.ready.as_secs_f64(), bare.resident);
    for _ in 0..STARTS {
        let full = start(folder.path(), &url);
        let each = |kilobytes: u64| kilobytes.saturating_sub(bare.resident) as f64 * 1024.0 / keys as f64;
        println!(
            "{keys} keys: ready in {:.2} s ({:.2} s of a processor), {:.0} bytes a key resident, {:.0} at the peak of \
             the start",
            full.ready.as_secs_f64(),
            full.worked,
            each(full.resident),
            each(full.peak)
        );
    }
}

/// SplitMix64.
fn mixed(number: u64) -> u64 {
    let z = number.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Puts accounts and keys into an empty store.
async fn fill(url: &str, keys: u64) {
    let store = store::open(url).await.unwrap();
    if store.head().await.unwrap().revision == Revision(0) {
        let began = Instant::now();
        let now = SystemClock.now();
        let accounts: Vec<_> = (0..ACCOUNTS).map(|number| account(number, now)).collect();
        commit(&*store, accounts).await;
        let sets: Vec<ScopeSet> = (0..SCOPE_SETS).map(scopes).collect();
        for first in (0..keys).step_by(usize::try_from(BATCH).unwrap()) {
            let batch = (first..keys.min(first + BATCH)).map(|number| key(number, &sets, now)).collect();
            commit(&*store, batch).await;
        }
        println!("filled in {:.0} s", began.elapsed().as_secs_f64());
    }
    store.close().await;
}

async fn commit(store: &dyn Store, changes: Vec<Change>) {
    let write = |change| Write {
        change,
        expect: None,
        action: Action::KeyImported,
        actor: Actor::SYSTEM,
        method: "bench",
        at: SystemClock.now(),
        idempotency: None,
    };
    let batch: Vec<_> = changes.into_iter().map(write).collect();
    let committed = store.commit(&batch).await.unwrap();
    assert!(committed.outcomes.iter().all(Result::is_ok));
}

fn account(number: u64, now: Timestamp) -> Change {
    Change::Account(Arc::new(Account {
        id: AccountId::parse(&format!("account-{number}")).unwrap(),
        name: DisplayName::parse(&format!("Account {number}")).unwrap(),
        suspended_at: None,
        longest_life: None,
        created_at: now,
        updated_at: now,
        revision: Revision(0),
    }))
}

fn scopes(number: u64) -> ScopeSet {
    let things = ["monitors", "alerts", "billing", "reports", "users"];
    let grant = |at: u64| {
        let thing = things[usize::try_from(mixed(number * 8 + at) % 5).unwrap()];
        Scope::parse_grant(&format!("{thing}:{}", if at == 0 { "*" } else { "read" })).unwrap()
    };
    let own = Scope::parse_grant(&format!("product-{number}:write")).unwrap();
    (0..=number % 4).map(grant).chain([own]).collect()
}

/// A key as products have them: every name and digest is another, half of them expire.
fn key(number: u64, sets: &[ScopeSet], now: Timestamp) -> Change {
    let chance = mixed(number);
    let mut random = [0; 10];
    random[..8].copy_from_slice(&chance.to_be_bytes());
    let environment = ["production", "staging", "development"][usize::try_from(chance % 3).unwrap()];
    Change::Key(Arc::new(Key {
        id: KeyId::generate(now.plus(Duration::from_micros(number * 100)), random),
        owner: Owner::Account(AccountId::parse(&format!("account-{}", chance % ACCOUNTS)).unwrap()),
        environment: EnvironmentName::parse(environment).unwrap(),
        terms: Terms {
            name: Some(KeyName::parse(&format!("deploy-agent-{number:07}")).unwrap()),
            scopes: sets[usize::try_from(chance / 3 % SCOPE_SETS).unwrap()].clone(),
            roles: Vec::new(),
            expires_at: (chance & 1 == 0).then(|| now.plus(Duration::from_secs(90 * 86_400 + number))),
            customers: Vec::new(),
            allowed_cidrs: Vec::new(),
            rate_limits: Vec::new(),
            quota: None,
            metadata: BTreeMap::new(),
        },
        created_at: now,
        created_by: "system".to_owned(),
        updated_at: now,
        disabled_at: None,
        revocation: None,
        secrets: vec![Secret {
            version: 1,
            digest: Digest::of(&format!("token {number}")),
            hint: "kw_live_a1b2".to_owned(),
            created_at: now,
            expires_at: None,
        }],
        revision: Revision(0),
    }))
}

/// What one start took; memory in kB.
struct Start {
    ready: Duration,
    /// Seconds of a processor, of the server's process alone.
    worked: f64,
    resident: u64,
    peak: u64,
}

/// A child process that ends with this value.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn start(folder: &Path, url: &str) -> Start {
    // Free a moment ago: good enough where nobody else looks for one.
    let admin = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let log = std::fs::File::options().create(true).append(true).open(folder.join("log")).unwrap();
    let root_key = folder.join("root.key");
    let _ = std::fs::remove_file(&root_key);
    let began = Instant::now();
    let child = Command::new(env!("CARGO_BIN_EXE_keyward"))
        .args(["serve", "--listen", "127.0.0.1:0", "--admin-listen", &admin.to_string()])
        .args(["--database", url, "--root-key-file"])
        .arg(&root_key)
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .unwrap();
    let mut running = Running(child);
    while !is_ready(admin) {
        if running.0.try_wait().unwrap().is_some() {
            panic!("it ended: {}", std::fs::read_to_string(folder.join("log")).unwrap());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let ready = began.elapsed();
    let status = std::fs::read_to_string(format!("/proc/{}/status", running.0.id())).unwrap();
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", running.0.id())).unwrap();
    // In hundredths of a second.
    let ticks = stat.rsplit(") ").next().unwrap().split(' ').skip(11).take(2);
    let worked = ticks.map(|ticks| ticks.parse::<f64>().unwrap()).sum::<f64>() / 100.0;
    let memory = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    };
    Start { ready, worked, resident: memory("VmRSS:"), peak: memory("VmHWM:") }
}

fn is_ready(admin: SocketAddr) -> bool {
    let ask = || -> std::io::Result<String> {
        let mut stream = TcpStream::connect(admin)?;
        stream.write_all(b"GET /readyz HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    };
    ask().is_ok_and(|answer| answer.starts_with("HTTP/1.1 200"))
}
