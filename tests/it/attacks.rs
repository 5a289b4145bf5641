//! Attacks on the real binary, beside callers who go on: HTTP/2 frames made by hand over raw sockets. Each must leave
//! the server's memory bounded and the callers' answers right. What it cost is printed: `--nocapture` shows the table
//! that stands in `docs/reliability.md`.

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

use crate::{
    authority::Authority,
    process::{Caller, Home, Keyward, PATIENCE, plain_key, question, wait_for},
};

/// How much more memory an attack may cost, in KiB. The worst of them cost a default server 830 MB.
const MOST_MEMORY: u64 = 64 * 1024;

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
fn field(name: &str, value: &str) -> Vec<u8> {
    let text = |text: &str| [&[u8::try_from(text.len()).unwrap()], text.as_bytes()].concat();
    [&[0], &text(name)[..], &text(value)].concat()
}

/// The headers of a call, of somebody without a credential.
fn call(path: &str) -> Vec<u8> {
    // `:method: POST` and `:scheme: http` are in the static table.
    let mut block = vec![0x83, 0x86];
    for (name, value) in
        [(":path", path), (":authority", "x"), ("content-type", "application/grpc"), ("te", "trailers")]
    {
        block.extend(field(name, value));
    }
    block
}

const CHECK: &str = "/keyward.v1.AuthzService/Check";
/// Envoy's question, which the main listener takes from strangers.
const EXT_AUTHZ: &str = "/envoy.service.auth.v3.Authorization/Check";
const REFLECTION: &str = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo";

/// A connection of somebody who means harm. What comes back is read and counted by a thread of its own, which answers
/// pings and settings so that the server takes it for alive.
struct Attacker {
    stream: TcpStream,
    heard: Arc<Heard>,
    next: u32,
}

#[derive(Default)]
struct Heard {
    resets: AtomicUsize,
    closed: AtomicBool,
}

impl Attacker {
    fn connect(to: SocketAddr, settings: &[u8]) -> Attacker {
        let mut stream = TcpStream::connect(to).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").unwrap();
        stream.write_all(&frame(SETTINGS, 0, 0, settings)).unwrap();
        let heard = Arc::new(Heard::default());
        let (reader, told) = (stream.try_clone().unwrap(), heard.clone());
        std::thread::spawn(move || {
            let _ = listen(reader, &told);
            told.closed.store(true, Ordering::Relaxed);
        });
        Attacker { stream, heard, next: 1 }
    }

    /// Sends, until the server has had enough.
    fn send(&mut self, bytes: &[u8]) -> bool {
        !self.closed() && self.stream.write_all(bytes).is_ok()
    }

    fn closed(&self) -> bool {
        self.heard.closed.load(Ordering::Relaxed)
    }

    /// The id of a stream that was never used.
    fn stream(&mut self) -> u32 {
        self.next += 2;
        self.next - 2
    }

    fn until_closed(&self) {
        wait_for("the server to close the connection", || self.closed().then_some(()));
    }
}

impl Drop for Attacker {
    fn drop(&mut self) {
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

fn listen(mut stream: TcpStream, heard: &Heard) -> io::Result<()> {
    let mut head = [0; 9];
    loop {
        stream.read_exact(&mut head)?;
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
        let mut payload = vec![0; length];
        stream.read_exact(&mut payload)?;
        match (head[3], head[4] & ACK) {
            (RST_STREAM, _) => drop(heard.resets.fetch_add(1, Ordering::Relaxed)),
            (PING, 0) => stream.write_all(&frame(PING, ACK, 0, &payload))?,
            (SETTINGS, 0) => stream.write_all(&frame(SETTINGS, ACK, 0, &[]))?,
            _ => {}
        }
    }
}

/// Callers who ask and ask, and hold every answer to be right.
struct Victims {
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicU64>,
    callers: Vec<tokio::task::JoinHandle<Vec<Duration>>>,
}

impl Victims {
    async fn start(keyward: &Keyward) -> Victims {
        let mut root = keyward.root();
        let (_, token) = root.create(plain_key()).await.unwrap();
        let (revoked, dead) = root.create(plain_key()).await.unwrap();
        root.revoke(&revoked).await.unwrap();
        let (stop, answered) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let callers = (0..4).map(|_| {
            let (token, dead, caller) = (token.clone(), dead.clone(), keyward.root());
            tokio::spawn(ask(caller, token, dead, stop.clone(), answered.clone()))
        });
        Victims { callers: callers.collect(), stop, answered }
    }

    /// Waits until so many more calls were answered.
    fn go_on_for(&self, calls: u64) {
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

async fn ask(
    mut caller: Caller,
    token: String,
    dead: String,
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicU64>,
) -> Vec<Duration> {
    let mut times = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        for (token, expected) in [(&token, pb::Reason::Ok), (&dead, pb::Reason::Revoked)] {
            let begun = Instant::now();
            let answer = caller.authz.check(question(token)).await.unwrap().into_inner();
            times.push(begun.elapsed());
            assert_eq!((answer.reason(), answer.allowed), (expected, expected == pb::Reason::Ok));
        }
        answered.fetch_add(2, Ordering::Relaxed);
    }
    times
}

/// A figure of the process's status, in KiB.
fn memory(process: u32, what: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with(what)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// Runs an attack beside callers. It must not cost much memory, nor any answer.
async fn withstand(name: &str, keyward: &Keyward, attack: impl FnOnce() + Send + 'static) {
    let process = keyward.process.id();
    let victims = Victims::start(keyward).await;
    victims.go_on_for(50);
    let before = memory(process, "VmRSS:");
    // The highest from now on.
    std::fs::write(format!("/proc/{process}/clear_refs"), "5").unwrap();
    tokio::task::spawn_blocking(attack).await.unwrap();
    victims.go_on_for(50);
    let (during, after) = (memory(process, "VmHWM:"), memory(process, "VmRSS:"));
    let (calls, p99) = victims.stop().await;
    let mb = |kib: u64| format!("{:.1}", kib as f64 / 1024.0);
    println!(
        "| {name} | {} | {} | {} | {calls} | {:.1} ms |",
        mb(before),
        mb(during),
        mb(after),
        p99.as_secs_f64() * 1e3
    );
    assert!(during < before + MOST_MEMORY, "{name}: {before} KiB before, {during} KiB at most");
}

async fn started(tables: &str) -> Keyward {
    let home = Home::new();
    std::fs::write(home.path("keyward.toml"), tables).unwrap();
    let mut command = home.serve();
    command.args(["--config", "keyward.toml"]);
    let keyward = home.start_as(command).unwrap_or_else(|ended| panic!("{ended:?}"));
    keyward.root().make_account("acme").await;
    keyward
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_thousand_open_streams_are_refused() {
    let keyward = started("").await;
    let to = keyward.address;
    withstand("100,000 open streams", &keyward, move || {
        let mut attacker = Attacker::connect(to, &[]);
        let headers = call(EXT_AUTHZ);
        // The headers alone: each waits for its message.
        let mut open = 0;
        while open < 100_000 && {
            let stream = attacker.stream();
            attacker.send(&frame(HEADERS, END_HEADERS, stream, &headers))
        } {
            open += 1;
        }
        assert!(attacker.closed() || attacker.heard.resets.load(Ordering::Relaxed) > 50_000, "{open}");
    })
    .await;
    keyward.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_makes_the_server_reset_streams_loses_the_connection() {
    let keyward = started("").await;
    let to = keyward.address;
    withstand("MadeYouReset (window overflow)", &keyward, move || {
        let mut attacker = Attacker::connect(to, &[]);
        let (headers, overflow) = (call(EXT_AUTHZ), 0x7fff_ffff_u32.to_be_bytes());
        for _ in 0..20_000 {
            let stream = attacker.stream();
            let frames =
                [frame(HEADERS, END_HEADERS, stream, &headers), frame(WINDOW_UPDATE, 0, stream, &overflow)];
            if !attacker.send(&frames.concat()) {
                break;
            }
        }
        attacker.until_closed();
        assert!(attacker.heard.resets.load(Ordering::Relaxed) < 2_000);
    })
    .await;
    keyward.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_takes_every_call_back_loses_the_connection() {
    let keyward = started("").await;
    let to = keyward.address;
    withstand("Rapid Reset", &keyward, move || {
        let (headers, cancel) = (call(EXT_AUTHZ), 8_u32.to_be_bytes());
        for _ in 0..20 {
            let mut attacker = Attacker::connect(to, &[]);
            let mut burst = Vec::new();
            for _ in 0..1000 {
                let stream = attacker.stream();
                burst.extend(frame(HEADERS, END_HEADERS, stream, &headers));
                burst.extend(frame(RST_STREAM, 0, stream, &cancel));
            }
            while attacker.send(&burst) && attacker.next < 200_000 {
                for (at, bytes) in burst.chunks_exact_mut(headers.len() + 9 + 13).enumerate() {
                    let id = (attacker.next + 2 * u32::try_from(at).unwrap()).to_be_bytes();
                    bytes[5..9].copy_from_slice(&id);
                    bytes[headers.len() + 14..headers.len() + 18].copy_from_slice(&id);
                }
                attacker.next += 2000;
            }
            attacker.until_closed();
        }
    })
    .await;
    keyward.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn headers_without_an_end_lose_the_connection() {
    let keyward = started("").await;
    let to = keyward.address;
    withstand("CONTINUATION flood", &keyward, move || {
        for _ in 0..20 {
            let mut attacker = Attacker::connect(to, &[]);
            let stream = attacker.stream();
            attacker.send(&frame(HEADERS, 0, stream, &call(CHECK)));
            let more = frame(CONTINUATION, 0, stream, &field("x", &"y".repeat(120)).repeat(100));
            for _ in 0..10_000 {
                if !attacker.send(&more) {
                    break;
                }
            }
            attacker.until_closed();
        }
    })
    .await;
    keyward.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn who_says_nothing_or_little_is_let_go() {
    let keyward = started(
        "[[listener]]\nname = 'brief'\naddress = '127.0.0.1:0'\nservices = ['check', 'health']\n\
         handshake_timeout = '500ms'\nmax_connection_idle = '1s'\n",
    )
    .await;
    let to = keyward.process.listener("brief").unwrap().parse().unwrap();
    withstand("400 silent connections, 50 that only answer pings", &keyward, move || {
        let silent: Vec<_> = (0..200).map(|_| TcpStream::connect::<SocketAddr>(to).unwrap()).collect();
        let begun = (0..200).map(|_| {
            let mut stream = TcpStream::connect(to).unwrap();
            stream.write_all(b"PRI * HT").unwrap();
            stream
        });
        for mut stream in silent.into_iter().chain(begun.collect::<Vec<_>>()) {
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            assert_eq!(stream.read(&mut [0; 1]).unwrap_or(0), 0, "it was let go");
        }
        // These answer pings, and ask nothing.
        let alive: Vec<_> = (0..50).map(|_| Attacker::connect(to, &[])).collect();
        alive.iter().for_each(Attacker::until_closed);
    })
    .await;
    let (_, metrics) = keyward.page("/metrics");
    let refused = "keyward_connections_refused_total{listener=\"brief\",reason=\"timeout\"} 400";
    assert!(metrics.contains(refused), "{metrics}");
    keyward.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tls_handshake_that_does_not_go_on_is_let_go() {
    let (home, authority) = (Home::new(), Authority::new("ours"));
    authority.server(2040).write(&home.path("cert.pem"), &home.path("key.pem"));
    let table = "[[listener]]\nname = 'secure'\naddress = '127.0.0.1:0'\nservices = ['check']\nhandshake_timeout = '500ms'\n\
                 [listener.tls]\ncertificate = 'cert.pem'\nkey = 'key.pem'\n";
    std::fs::write(home.path("keyward.toml"), table).unwrap();
    let mut command = home.serve();
    command.args(["--config", "keyward.toml"]);
    let keyward = home.start_as(command).unwrap_or_else(|ended| panic!("{ended:?}"));
    keyward.root().make_account("acme").await;
    let to: SocketAddr = keyward.process.listener("secure").unwrap().parse().unwrap();
    withstand("400 unfinished TLS handshakes", &keyward, move || {
        let begun: Vec<_> = (0..400)
            .map(|_| {
                let mut stream = TcpStream::connect(to).unwrap();
                // The start of a record that never ends.
                stream.write_all(&[22, 3, 1, 2, 0, 1, 0]).unwrap();
                stream
            })
            .collect();
        for mut stream in begun {
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            while stream.read(&mut [0; 64]).unwrap_or(0) > 0 {}
        }
    })
    .await;
    keyward.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_table_of_file_descriptors_costs_neither_callers_nor_the_database() {
    let home = Home::new();
    let command = home.serve();
    let mut limited = std::process::Command::new("sh");
    limited
        .args(["-c", "ulimit -n 300; exec \"$0\" \"$@\""])
        .arg(command.get_program())
        .args(command.get_args());
    limited.current_dir(home.path("."));
    let keyward = home.start_as(limited).unwrap_or_else(|ended| panic!("{ended:?}"));
    keyward.root().make_account("acme").await;
    let to = keyward.address;
    withstand("more connections than file descriptors", &keyward, move || {
        let crowd: Vec<_> = (0..500).filter_map(|_| TcpStream::connect(to).ok()).collect();
        // The last of them was turned away, and not left waiting.
        let mut last = crowd.last().unwrap();
        last.set_read_timeout(Some(PATIENCE)).unwrap();
        assert_eq!(last.read(&mut [0; 1]).unwrap_or(0), 0);
    })
    .await;
    // A change is a transaction, and opens files.
    wait_for("room for a connection", || {
        let mut stream = TcpStream::connect(to).ok()?;
        stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").ok()?;
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        (stream.read(&mut [0; 9]).ok()? > 0).then_some(())
    });
    keyward.root().create(plain_key()).await.unwrap();
    let told = keyward.process.stderr().lines().filter(|line| line.contains("accepting failed")).count();
    assert!(told < 10, "the accept loop does not spin");
    keyward.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_that_claim_much_and_bring_nothing_cost_nothing() {
    let keyward = started("").await;
    let to = keyward.address;
    withstand("256 messages of 4 GiB announced", &keyward, move || {
        let headers = call(EXT_AUTHZ);
        for claimed in [u32::MAX, 3 << 20, 128 << 10] {
            let mut attacker = Attacker::connect(to, &[]);
            for _ in 0..256 {
                let stream = attacker.stream();
                let prefix = [&[0], &claimed.to_be_bytes()[..]].concat();
                let frames =
                    [frame(HEADERS, END_HEADERS, stream, &headers), frame(DATA, 0, stream, &prefix)].concat();
                assert!(attacker.send(&frames));
            }
        }
    })
    .await;
    keyward.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_that_nobody_reads_are_few() {
    let keyward = started("").await;
    let to = keyward.address;
    withstand("8,000 unread answers of reflection", &keyward, move || {
        // SETTINGS_INITIAL_WINDOW_SIZE = 0: no byte of an answer may be sent.
        let no_window = [0, 4, 0, 0, 0, 0];
        // `list_services`, and `file_containing_symbol` of the largest file.
        let symbol = b"keyward.v1.KeyService";
        let message = [&[0x22, u8::try_from(symbol.len()).unwrap()], &symbol[..]].concat();
        let message = [&[0, 0, 0, 0, u8::try_from(message.len()).unwrap()], &message[..]].concat();
        let headers = call(REFLECTION);
        let crowd: Vec<_> = (0..32)
            .map(|_| {
                let mut attacker = Attacker::connect(to, &no_window);
                for _ in 0..250 {
                    let stream = attacker.stream();
                    let frames = [
                        frame(HEADERS, END_HEADERS, stream, &headers),
                        frame(DATA, END_STREAM, stream, &message),
                    ];
                    attacker.send(&frames.concat());
                }
                attacker
            })
            .collect();
        assert_eq!(crowd.len(), 32);
    })
    .await;
    assert!(!keyward.page("/metrics").1.contains("keyward_calls_shed_total 0"), "most were turned away");
    keyward.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn floods_of_small_frames_are_borne_or_end_the_connection() {
    let keyward = started("").await;
    let to = keyward.address;
    withstand("floods of PING, SETTINGS, empty DATA", &keyward, move || {
        let ping = frame(PING, 0, 0, &[7; 8]).repeat(1000);
        let settings = frame(SETTINGS, 0, 0, &[0, 4, 0, 1, 0, 0]).repeat(1000);
        for flood in [ping, settings] {
            let mut attacker = Attacker::connect(to, &[]);
            let mut sent = 0;
            while sent < 300 && attacker.send(&flood) {
                sent += 1;
            }
        }
        let mut attacker = Attacker::connect(to, &[]);
        let stream = attacker.stream();
        attacker.send(&frame(HEADERS, END_HEADERS, stream, &call(EXT_AUTHZ)));
        let empty = frame(DATA, 0, stream, &[]).repeat(1000);
        let mut sent = 0;
        while sent < 300 && attacker.send(&empty) {
            sent += 1;
        }
    })
    .await;
    keyward.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_http2_is_closed() {
    let keyward = started("").await;
    let to = keyward.address;
    withstand("other protocols, broken frames", &keyward, move || {
        let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
        let oversize = [&preface[..], &frame(SETTINGS, 0, 0, &[]), &[0xff; 64]].concat();
        let self_dependent = {
            let mut block = 1_u32.to_be_bytes().to_vec();
            block.push(0);
            block.extend(call(CHECK));
            [&preface[..], &frame(SETTINGS, 0, 0, &[]), &frame(HEADERS, END_HEADERS | 0x20, 1, &block)]
                .concat()
        };
        for garbage in
            [b"GET / HTTP/1.1\r\nhost: x\r\n\r\n".to_vec(), vec![0; 1 << 16], vec![22, 3, 1, 0, 0], oversize]
        {
            for _ in 0..50 {
                let mut stream = TcpStream::connect(to).unwrap();
                stream.set_read_timeout(Some(PATIENCE)).unwrap();
                let _ = stream.write_all(&garbage);
                let _ = stream.shutdown(Shutdown::Write);
                while stream.read(&mut [0; 4096]).unwrap_or(0) > 0 {}
            }
        }
        let mut stream = TcpStream::connect(to).unwrap();
        stream.write_all(&self_dependent).unwrap();
    })
    .await;
    keyward.stop();
}
