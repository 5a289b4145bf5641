//! What `keyward audit verify` takes of the server's processor, for each entry of the log, where nearly every entry made a
//! key that the tables still have.
//!
//! `cargo bench --bench verify -- [KEYS] [postgres] [BINARY]`: 1,000,000 keys in an SQLite file of its own unless given;
//! `postgres` is a PostgreSQL server of its own. With BINARY, another build of keyward verifies the same log in turns, and
//! the ratio of both is printed.

#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::disallowed_methods,
    unreachable_pub,
    missing_docs,
    reason = "a benchmark prints and stops, and uses a part of what the tests are made with"
)]

#[path = "shared/fill.rs"]
mod fill;
#[path = "shared/goal.rs"]
mod goal;
#[path = "../tests/it/postgres.rs"]
mod postgres;
#[path = "../tests/it/process.rs"]
mod process;
#[path = "shared/sample.rs"]
mod sample;

use std::{
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use postgres::PostgresServer;

/// How often each build verifies.
const ROUNDS: usize = 3;
/// How long a start, or what a server does behind it, may take.
const DEADLINE: Duration = Duration::from_secs(600);
/// What a million entries took before, in seconds of a processor, on the machine of `docs/performance.md`; the goal is a
/// tenth of it.
const BASELINE_SECONDS: f64 = 163.0;

fn main() {
    // Cargo says `--bench` to every benchmark.
    let words: Vec<_> = std::env::args().skip(1).filter(|word| !word.starts_with("--")).collect();
    let keys: u64 = words.iter().find_map(|word| word.parse().ok()).unwrap_or(1_000_000);
    let other = words.iter().find(|word| word.contains('/')).map(PathBuf::from);
    let folder = tempfile::tempdir().unwrap();
    let cluster;
    let (kind, url) = if words.iter().any(|word| word == "postgres") {
        cluster = PostgresServer::start(&["shared_buffers=512MB", "max_wal_size=4GB"]);
        cluster.sql("postgres", "CREATE DATABASE keys OWNER keyward TEMPLATE template0");
        ("PostgreSQL", postgres::url(cluster.socket(), 5432, "keys"))
    } else {
        ("SQLite", format!("sqlite:{}", folder.path().join("keys.db").display()))
    };
    let own = PathBuf::from(env!("CARGO_BIN_EXE_keyward"));
    // A root key is made for an empty database alone.
    drop(ServerProcess::start(&own, folder.path(), &url));
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(fill::fill(&url, keys));
    drop(runtime);
    let (mut taken, mut others) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        taken.push(verify(&own, folder.path(), &url, keys));
        others.extend(other.iter().map(|other| verify(other, folder.path(), &url, keys)));
    }
    let of_a_million = goal::median(taken.iter().map(|taken| taken * 1e6));
    let what = format!("seconds of a processor to verify a million entries, {kind}");
    goal::at_most(&what, BASELINE_SECONDS / 10.0, of_a_million, &format!("median of {ROUNDS}, {keys} keys"));
    if other.is_some() {
        let ratio = goal::median(taken.iter().zip(&others).map(|(own, other)| own / other));
        let note = format!("{:.1} us an entry there, in turns", goal::median(others) * 1e6);
        goal::at_most(&format!("the same to the other build, {kind}"), 0.1, ratio, &note);
    }
}

/// A server that ends with this value.
struct ServerProcess {
    child: Child,
    binary: PathBuf,
    url: String,
    root_key: PathBuf,
}

impl Drop for ServerProcess {
    fn drop(&mut self) {
        let _ = Command::new("kill").arg(self.child.id().to_string()).status();
        let _ = self.child.wait();
    }
}

impl ServerProcess {
    /// Starts this build, and waits until it serves.
    fn start(binary: &Path, folder: &Path, url: &str) -> ServerProcess {
        // Free a moment ago: good enough where nobody else looks for one.
        let free = || TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
        let (address, admin) = (free(), free());
        let log_path = folder.join("log");
        let log = std::fs::File::options().create(true).append(true).open(&log_path).unwrap();
        let root_key = folder.join("root.key");
        let child = Command::new(binary)
            .args(["serve", "--listen", &address, "--database", url, "--root-key-file"])
            .arg(&root_key)
            .envs([("KEYWARD_SHUTDOWN_DELAY", "0s"), ("KEYWARD_ADMIN_LISTEN", &admin)])
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        let mut server =
            ServerProcess { child, binary: binary.to_owned(), url: format!("http://{address}"), root_key };
        let began = Instant::now();
        while !server.call(&["whoami"]).status.success() {
            let ended = server.child.try_wait().unwrap();
            let log = || std::fs::read_to_string(&log_path).unwrap();
            assert!(ended.is_none() && began.elapsed() < DEADLINE, "no server: {}", log());
            std::thread::sleep(Duration::from_millis(200));
        }
        server
    }

    fn call(&self, words: &[&str]) -> Output {
        let mut command = Command::new(&self.binary);
        command.args(words).args(["--server", &self.url, "--token-file"]).arg(&self.root_key);
        command.output().unwrap()
    }

    /// Seconds of a processor that its process has taken, to a hundredth.
    fn cpu_seconds(&self) -> f64 {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap();
        let ticks = stat.rsplit(") ").next().unwrap().split(' ').skip(11).take(2);
        ticks.map(|ticks| ticks.parse::<f64>().unwrap()).sum::<f64>() / 100.0
    }

    /// Waits until it does nothing: it checks a large SQLite file behind its start, which takes as long as a verification.
    fn wait_until_idle(&self) {
        let began = Instant::now();
        let mut before = self.cpu_seconds();
        loop {
            std::thread::sleep(Duration::from_secs(2));
            let now = self.cpu_seconds();
            if now - before < 0.03 {
                return;
            }
            assert!(began.elapsed() < DEADLINE, "the server is never idle");
            before = now;
        }
    }
}

/// Verifies the whole log once with this build: seconds of the server's processor for each key.
fn verify(binary: &Path, folder: &Path, url: &str, keys: u64) -> f64 {
    let server = ServerProcess::start(binary, folder, url);
    server.wait_until_idle();
    let (before, began) = (server.cpu_seconds(), Instant::now());
    let verified = server.call(&["audit", "verify"]);
    let (worked, lasted) = (server.cpu_seconds() - before, began.elapsed().as_secs_f64());
    assert!(verified.status.success(), "{}", String::from_utf8_lossy(&verified.stderr));
    println!("{}: {worked:.2} s of a processor in {lasted:.2} s, {keys} keys", binary.display());
    worked / keys as f64
}
