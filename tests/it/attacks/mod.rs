//! Attacks on the real binary, beside callers who go on: HTTP/2 frames made by hand over raw sockets. Each must leave
//! the server's memory bounded and the callers' answers right. What it cost is printed: `--nocapture` shows the table
//! that stands in `docs/reliability.md`. Here is what they share; the attacks are by what they use up: what HTTP/2 lets
//! a peer do, the server's patience, its room for connections, its permits, the memory of requests.

mod http2;
mod patience;
mod permits;
mod requests;
mod room;
mod unread;

use std::{
    io::{self, Read as _, Write as _},
    net::{Shutdown, SocketAddr, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use keyward::pb;

use crate::process::{
    AuthorizedClients, KeywardProcess, TestHome, WAIT_TIMEOUT, check_request, plain_key_request, wait_for,
};

/// How much more memory an attack may cost, in KiB. The worst of them cost a default server 830 MB.
const MAX_MEMORY_KIB: u64 = 64 * 1024;

/// How HTTP/2 begins.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;
const END_STREAM: u8 = 1;
const ACK: u8 = 1;
const END_HEADERS: u8 = 4;

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut frame = u32::try_from(payload.len()).unwrap().to_be_bytes()[1..].to_vec();
    frame.extend([kind, flags]);
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

/// A header field that no table holds (RFC 7541, section 6.2.2).
fn encode_header(name: &str, value: &str) -> Vec<u8> {
    let text = |text: &str| [&[u8::try_from(text.len()).unwrap()], text.as_bytes()].concat();
    [&[0], &text(name)[..], &text(value)].concat()
}

/// The headers of a call, of somebody without a credential.
fn encode_call_headers(path: &str) -> Vec<u8> {
    // `:method: POST` and `:scheme: http` are in the static table.
    let mut block = vec![0x83, 0x86];
    for (name, value) in
        [(":path", path), (":authority", "x"), ("content-type", "application/grpc"), ("te", "trailers")]
    {
        block.extend(encode_header(name, value));
    }
    block
}

const CHECK: &str = "/keyward.v1.AuthzService/Check";
/// Envoy's question, which the main listener takes from strangers.
const EXT_AUTHZ: &str = "/envoy.service.auth.v3.Authorization/Check";
const REFLECTION: &str = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo";

/// A connection of somebody who means harm. What comes back is read and counted by a thread of its own, which answers
/// pings and settings so that the server takes it for alive.
struct AttackConnection {
    stream: TcpStream,
    counters: Arc<ReceivedCounters>,
    next: u32,
}

#[derive(Default)]
struct ReceivedCounters {
    resets: AtomicUsize,
    answers: AtomicUsize,
    closed: AtomicBool,
}

impl AttackConnection {
    fn connect(to: SocketAddr, settings: &[u8]) -> AttackConnection {
        let mut stream = TcpStream::connect(to).unwrap();
        stream.set_write_timeout(Some(WAIT_TIMEOUT)).unwrap();
        stream.write_all(PREFACE).unwrap();
        stream.write_all(&frame(SETTINGS, 0, 0, settings)).unwrap();
        let heard = Arc::new(ReceivedCounters::default());
        let (reader, told) = (stream.try_clone().unwrap(), heard.clone());
        std::thread::spawn(move || {
            let _ = count_frames(reader, &told);
            told.closed.store(true, Ordering::Relaxed);
        });
        AttackConnection { stream, counters: heard, next: 1 }
    }

    /// Sends, until the server has had enough.
    fn send(&mut self, bytes: &[u8]) -> bool {
        !self.is_closed() && self.stream.write_all(bytes).is_ok()
    }

    fn is_closed(&self) -> bool {
        self.counters.closed.load(Ordering::Relaxed)
    }

    /// The id of a stream that was never used.
    fn next_stream_id(&mut self) -> u32 {
        self.next += 2;
        self.next - 2
    }

    fn wait_until_answered(&self, calls: usize) {
        let answered = || self.counters.answers.load(Ordering::Relaxed) >= calls;
        wait_for("the calls to be answered", || answered().then_some(()));
    }

    fn wait_until_closed(&self) {
        wait_for("the server to close the connection", || self.is_closed().then_some(()));
    }
}

impl Drop for AttackConnection {
    fn drop(&mut self) {
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

fn count_frames(mut stream: TcpStream, heard: &ReceivedCounters) -> io::Result<()> {
    let mut head = [0; 9];
    loop {
        stream.read_exact(&mut head)?;
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
        let mut payload = vec![0; length];
        stream.read_exact(&mut payload)?;
        match (head[3], head[4] & ACK) {
            (RST_STREAM, _) => drop(heard.resets.fetch_add(1, Ordering::Relaxed)),
            (HEADERS, _) => drop(heard.answers.fetch_add(1, Ordering::Relaxed)),
            (PING, 0) => stream.write_all(&frame(PING, ACK, 0, &payload))?,
            (SETTINGS, 0) => stream.write_all(&frame(SETTINGS, ACK, 0, &[]))?,
            _ => {}
        }
    }
}

/// Reads until the server closes the connection. One that it leaves open is no closed one.
#[track_caller]
fn read_until_closed(mut stream: &TcpStream) {
    stream.set_read_timeout(Some(WAIT_TIMEOUT)).unwrap();
    loop {
        match stream.read(&mut [0; 4096]) {
            Ok(0) => return,
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return,
            Err(error) => panic!("the server leaves the connection open: {error}"),
        }
    }
}

/// Callers who ask and ask, and hold every answer to be right.
struct RegularCallers {
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicU64>,
    callers: Vec<tokio::task::JoinHandle<Vec<Duration>>>,
}

impl RegularCallers {
    async fn start(keyward: &KeywardProcess) -> RegularCallers {
        let mut root = keyward.root_caller();
        let (_, token) = root.create_key(plain_key_request()).await.unwrap();
        let (revoked, dead) = root.create_key(plain_key_request()).await.unwrap();
        root.revoke_key(&revoked).await.unwrap();
        let (stop, answered) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let callers = (0..4).map(|_| {
            let (token, dead, caller) = (token.clone(), dead.clone(), keyward.root_caller());
            tokio::spawn(check_until_stopped(caller, token, dead, stop.clone(), answered.clone()))
        });
        RegularCallers { callers: callers.collect(), stop, answered }
    }

    /// Waits until so many more calls were answered.
    fn wait_for_answers(&self, calls: u64) {
        let end = self.answered.load(Ordering::Relaxed) + calls;
        wait_for("the callers to go on", || (self.answered.load(Ordering::Relaxed) >= end).then_some(()));
    }

    /// How many calls were answered, and the p99.
    async fn stop(self) -> (usize, Duration) {
        self.stop.store(true, Ordering::Relaxed);
        let mut times = Vec::new();
        for caller in self.callers {
            times.extend(caller.await.unwrap());
        }
        times.sort_unstable();
        (times.len(), times[times.len() * 99 / 100])
    }
}

async fn check_until_stopped(
    mut caller: AuthorizedClients,
    token: String,
    dead: String,
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicU64>,
) -> Vec<Duration> {
    let mut times = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        for (token, expected) in [(&token, pb::Reason::Ok), (&dead, pb::Reason::Revoked)] {
            let begun = Instant::now();
            let answer = caller.authz.check(check_request(token)).await.unwrap().into_inner();
            times.push(begun.elapsed());
            assert_eq!((answer.reason(), answer.allowed), (expected, expected == pb::Reason::Ok));
        }
        answered.fetch_add(2, Ordering::Relaxed);
    }
    times
}

/// A figure of the process's status, in KiB.
fn memory_kib(process: u32, what: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with(what)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// Runs an attack beside callers. It must not cost much memory, nor any answer.
async fn assert_withstands(name: &str, keyward: &KeywardProcess, attack: impl FnOnce() + Send + 'static) {
    assert_withstands_within(MAX_MEMORY_KIB, name, keyward, attack).await;
}

/// The same for so many KiB at the most.
async fn assert_withstands_within(
    most: u64,
    name: &str,
    keyward: &KeywardProcess,
    attack: impl FnOnce() + Send + 'static,
) {
    let process = keyward.process.id();
    let victims = RegularCallers::start(keyward).await;
    victims.wait_for_answers(50);
    let before = memory_kib(process, "VmRSS:");
    // The highest from now on.
    std::fs::write(format!("/proc/{process}/clear_refs"), "5").unwrap();
    tokio::task::spawn_blocking(attack).await.unwrap();
    victims.wait_for_answers(50);
    let (during, after) = (memory_kib(process, "VmHWM:"), memory_kib(process, "VmRSS:"));
    let (calls, p99) = victims.stop().await;
    let mb = |kib: u64| format!("{:.1}", kib as f64 / 1024.0);
    println!(
        "| {name} | {} | {} | {} | {calls} | {:.1} ms |",
        mb(before),
        mb(during),
        mb(after),
        p99.as_secs_f64() * 1e3
    );
    assert!(during < before + most, "{name}: {before} KiB before, {during} KiB at most");
}

async fn start_server(tables: &str) -> KeywardProcess {
    let home = TestHome::new();
    std::fs::write(home.path("keyward.toml"), tables).unwrap();
    let mut command = home.serve_command();
    command.args(["--config", "keyward.toml"]);
    let keyward = home.start_with(command).unwrap_or_else(|ended| panic!("{ended:?}"));
    keyward.root_caller().create_account("acme").await;
    keyward
}
