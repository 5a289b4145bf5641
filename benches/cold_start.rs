//! How long a server with many keys takes from its start to `/readyz`, and what each key costs in memory: resident
//! bytes above a server without keys, now and at the worst moment of the start.
//!
//! `cargo bench --bench cold_start -- [KEYS] [URL|postgres]`: 1,000,000 keys in an SQLite file of its own unless said;
//! `postgres` is a PostgreSQL server of its own. The database of a URL must be empty, or filled by an earlier run:
//! filling it takes longer than all that is measured. Next to a PostgreSQL database the schema `keyward_empty` is used
//! for the server without keys.

#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::disallowed_methods,
    unreachable_pub,
    missing_docs,
    reason = "a benchmark talks and stops, and uses a part of what the tests are made with"
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
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use postgres::PostgresServer;

const STARTS: usize = 3;

fn main() {
    // Cargo says `--bench` to every benchmark.
    let mut words = std::env::args().skip(1).filter(|word| !word.starts_with("--"));
    let keys: u64 = words.next().map_or(1_000_000, |word| word.parse().unwrap());
    let folder = tempfile::tempdir().unwrap();
    let cluster;
    let url = match words.next().as_deref() {
        None => format!("sqlite:{}", folder.path().join("full.db").display()),
        Some("postgres") => {
            // Its usual settings are for a few rows, and make the filling a matter of checkpoints.
            cluster = PostgresServer::start(&["shared_buffers=512MB", "max_wal_size=4GB"]);
            cluster.sql("postgres", "CREATE DATABASE keys OWNER keyward TEMPLATE template0");
            postgres::url(cluster.socket(), 5432, "keys")
        }
        Some(url) => url.to_owned(),
    };
    let (kind, goal) = if url.starts_with("sqlite:") { ("SQLite", 0.8) } else { ("PostgreSQL", 1.0) };
    let empty = match url.strip_prefix("sqlite:") {
        Some(_) => format!("sqlite:{}", folder.path().join("empty.db").display()),
        None => format!("{url}{}schema=keyward_empty", if url.contains('?') { '&' } else { '?' }),
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(fill::fill(&url, keys));
    drop(runtime);

    let bare = measure_start(folder.path(), &empty);
    println!("without keys: ready in {:.2} s, {} kB resident", bare.ready.as_secs_f64(), bare.resident);
    let mut taken = Vec::new();
    for _ in 0..STARTS {
        let full = measure_start(folder.path(), &url);
        let each = |kilobytes: u64| kilobytes.saturating_sub(bare.resident) as f64 * 1024.0 / keys as f64;
        println!(
            "{keys} keys: ready in {:.2} s ({:.2} s of a processor), {:.0} bytes a key resident, {:.0} at the peak of \
             the start",
            full.ready.as_secs_f64(),
            full.worked,
            each(full.resident),
            each(full.peak)
        );
        taken.push(full.ready.as_secs_f64());
    }
    let note = format!("median of {STARTS} starts");
    goal::at_most(&format!("seconds to SERVING, {keys} keys, {kind}"), goal, goal::median(taken), &note);
}

/// What one start took; memory in kB.
struct StartMeasurement {
    ready: Duration,
    /// Seconds of a processor, of the server's process alone.
    worked: f64,
    resident: u64,
    peak: u64,
}

/// A child process that ends with this value.
struct ChildProcess(Child);

impl Drop for ChildProcess {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn measure_start(folder: &Path, url: &str) -> StartMeasurement {
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
    let mut running = ChildProcess(child);
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
    StartMeasurement { ready, worked, resident: memory("VmRSS:"), peak: memory("VmHWM:") }
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
