//! Requests that do not come whole: announced, a byte at a time, and without an end; of every kind of call, with a
//! credential and without, over gRPC and over HTTP/1.1. The server runs with 512 MiB of memory where the machine can
//! hold it to that, as in the shipped pod.

use std::{
    io::Write as _,
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
};

use keyward::pb;
use prost::Message as _;

use super::*;
use crate::{forward_auth::ForwardAuthServer, raw_http::RawRequest, support::error_reason};

/// How much more memory all of them together may cost, in KiB: the budget of 64 MiB, and what each connection has.
const MAX_MEMORY_KIB: u64 = 144 * 1024;
/// The memory of the shipped pod.
const POD: u64 = 512 << 20;

/// A kind of call: its path, the largest message that it takes, and a message that it takes.
type CallKind = (&'static str, u32, Vec<u8>);

fn kinds() -> Vec<CallKind> {
    let check = check_request("kw_live_x").encode_to_vec();
    let batch = pb::BatchCheckRequest { checks: vec![check_request("kw_live_x")] }.encode_to_vec();
    // `list_services`.
    let services = vec![0x3a, 1, b'*'];
    vec![
        (CHECK, 16 << 10, check.clone()),
        ("/keyward.v1.AuthzService/BatchCheck", 128 << 10, batch),
        ("/keyward.v1.AuthzService/StreamCheck", 16 << 10, check),
        (EXT_AUTHZ, 128 << 10, Vec::new()),
        ("/keyward.v1.KeyService/Create", 4 << 20, plain_key_request().encode_to_vec()),
        ("/keyward.v1.KeyService/Import", 4 << 20, Vec::new()),
        ("/keyward.v1.KeyService/Revoke", 4 << 20, Vec::new()),
        ("/keyward.v1.KeyService/WatchPropagation", 4 << 20, Vec::new()),
        ("/keyward.v1.KeyService/WhoAmI", 16 << 10, Vec::new()),
        ("/keyward.v1.KeyService/RevokeSelf", 16 << 10, Vec::new()),
        ("/keyward.v1.AccountService/List", 4 << 20, Vec::new()),
        ("/keyward.v1.AuditService/List", 4 << 20, Vec::new()),
        ("/grpc.health.v1.Health/Check", 16 << 10, Vec::new()),
        ("/grpc.health.v1.Health/Watch", 16 << 10, Vec::new()),
        (REFLECTION, 16 << 10, services),
        ("/keyward.v1.KeyService/NoSuchCall", 4 << 20, Vec::new()),
    ]
}

/// The start of a message: its prefix, which announces so many bytes.
fn message_prefix(bytes: u32) -> Vec<u8> {
    [&[0], &bytes.to_be_bytes()[..]].concat()
}

fn framed_message(message: &[u8]) -> Vec<u8> {
    [&message_prefix(u32::try_from(message.len()).unwrap()), message].concat()
}

/// Tokens to attack with: none, a tenant's that may do much, and one that is revoked.
async fn tokens(keyward: &KeywardProcess) -> Vec<Option<String>> {
    let mut root = keyward.root_caller();
    let scopes = ["keyward:check", "keyward:keys:read", "keyward:keys:write", "keyward:audit:read"];
    let manager = pb::CreateKeyRequest { scopes: scopes.map(str::to_owned).to_vec(), ..plain_key_request() };
    let (_, living) = root.create_key(manager).await.unwrap();
    let (id, dead) = root.create_key(plain_key_request()).await.unwrap();
    root.revoke_key(&id).await.unwrap();
    vec![None, Some(living), Some(dead)]
}

fn headers(path: &str, token: Option<&str>) -> Vec<u8> {
    let bearer = token.map(|token| encode_header("authorization", &format!("Bearer {token}")));
    [encode_call_headers(path), bearer.unwrap_or_default()].concat()
}

/// Every kind of call with every credential, `streams` of each over a connection of its own, which have sent `begin`.
fn begin_calls(
    to: SocketAddr,
    tokens: &[Option<String>],
    streams: usize,
    begin: impl Fn(&CallKind) -> Vec<u8>,
) -> Vec<(AttackConnection, &'static str)> {
    let mut crowd = Vec::new();
    for kind in kinds() {
        for token in tokens {
            let mut attacker = AttackConnection::connect(to, &[]);
            let headers = headers(kind.0, token.as_deref());
            for _ in 0..streams {
                let stream = attacker.next_stream_id();
                let frames =
                    [frame(HEADERS, END_HEADERS, stream, &headers), frame(DATA, 0, stream, &begin(&kind))];
                attacker.send(&frames.concat());
            }
            crowd.push((attacker, kind.0));
        }
    }
    crowd
}

/// What the server may be held to here: `/sys/fs/cgroup/memory` of the first version, or the second's only tree.
fn cgroup() -> Option<PathBuf> {
    static GROUPS: AtomicUsize = AtomicUsize::new(0);
    let number = GROUPS.fetch_add(1, Ordering::Relaxed);
    let name = format!("keyward-test-{}-{number}", std::process::id());
    [("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")].iter().find_map(
        |(tree, limit)| {
            let group = Path::new(tree).join(&name);
            std::fs::create_dir(&group).ok()?;
            if std::fs::write(group.join(limit), POD.to_string()).is_ok() {
                return Some(group);
            }
            let _ = std::fs::remove_dir(group);
            None
        },
    )
}

/// Holds a process to the memory of a pod, if the machine can.
struct MemoryLimit {
    group: Option<PathBuf>,
    process: u32,
}

impl MemoryLimit {
    fn apply_to(keyward: &KeywardProcess) -> MemoryLimit {
        let process = keyward.process.id();
        let group =
            cgroup().filter(|group| std::fs::write(group.join("cgroup.procs"), process.to_string()).is_ok());
        if group.is_none() {
            println!("this machine holds no process to {POD} bytes; its memory is looked at alone");
        }
        MemoryLimit { group, process }
    }
}

impl Drop for MemoryLimit {
    fn drop(&mut self) {
        let Some(group) = &self.group else { return };
        // A group goes when it is empty: the process has ended, or goes back where it was.
        let _ = std::fs::write(group.with_file_name("cgroup.procs"), self.process.to_string());
        let _ = std::fs::remove_dir(group);
    }
}

/// An operator who connects now makes a key and stops it. A new connection may have to ask again, as its status says.
async fn operate(mut root: AuthorizedClients) {
    let end = Instant::now() + WAIT_TIMEOUT;
    let id = loop {
        match root.create_key(plain_key_request()).await {
            Ok((id, _)) => break id,
            Err(status) => {
                assert!(error_reason(&status) == "OVERLOADED" && Instant::now() < end, "{status:?}");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    };
    root.revoke_key(&id).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_announced_and_not_sent_costs_no_memory_and_keeps_nobody_out() {
    let keyward = start_server("").await;
    let (to, tokens, _pod) = (keyward.address, tokens(&keyward).await, MemoryLimit::apply_to(&keyward));
    let (runtime, root) = (tokio::runtime::Handle::current(), keyward.root_caller());
    assert_withstands_within(MAX_MEMORY_KIB, "12,000 messages announced", &keyward, move || {
        let _crowd = begin_calls(to, &tokens, 250, |kind| message_prefix(kind.1));
        runtime.block_on(operate(root));
    })
    .await;
    operate(keyward.root_caller()).await;
    keyward.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_does_not_end_in_time_is_answered_whatever_it_calls() {
    let keyward = start_server("").await;
    let (to, tokens, _pod) = (keyward.address, tokens(&keyward).await, MemoryLimit::apply_to(&keyward));
    assert_withstands_within(
        MAX_MEMORY_KIB,
        "960 requests a byte at a time, 960 without an end",
        &keyward,
        move || {
            let slow = begin_calls(to, &tokens, 20, |_| message_prefix(4096));
            let endless = begin_calls(to, &tokens, 20, |kind| framed_message(&kind.2));
            let mut crowd: Vec<_> = slow.into_iter().chain(endless).collect();
            wait_for("every request to be answered", || {
                crowd.retain_mut(|(attacker, _)| {
                    let bytes: Vec<_> = (0..20).flat_map(|at| frame(DATA, 0, 2 * at + 1, &[0])).collect();
                    attacker.counters.answers.load(Ordering::Relaxed) < 20 && attacker.send(&bytes)
                });
                std::thread::sleep(Duration::from_millis(50));
                crowd.is_empty().then_some(())
            });
        },
    )
    .await;
    operate(keyward.root_caller()).await;
    keyward.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_connection_took_goes_back_when_it_closes() {
    let keyward = start_server("[overload]\nrequest_bytes = 33554432\n").await;
    let held = || -> u64 {
        let page = keyward.fetch_admin_page("/metrics").1;
        page.lines()
            .find_map(|line| line.strip_prefix("keyward_request_memory_bytes "))
            .unwrap()
            .parse()
            .unwrap()
    };
    let crowd: Vec<_> = (0..8)
        .map(|_| {
            let mut attacker = AttackConnection::connect(keyward.address, &[]);
            for _ in 0..40 {
                let stream = attacker.next_stream_id();
                attacker.send(&frame(HEADERS, END_HEADERS, stream, &encode_call_headers(EXT_AUTHZ)));
                attacker.send(&frame(DATA, 0, stream, &message_prefix(128 << 10)));
                attacker.send(&frame(DATA, 0, stream, &[0; 1 << 10]));
            }
            attacker
        })
        .collect();
    wait_for("memory to be held", || (held() >= 320 * (9 << 10)).then_some(()));
    assert!(held() <= 16 << 20, "anonymous callers have half of it");
    drop(crowd);
    wait_for("it to go back", || (held() == 0).then_some(()));
    keyward.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn heads_without_an_end_take_no_more_than_the_budget_and_pages_are_served() {
    let ForwardAuthServer { keyward, address: forward } = ForwardAuthServer::start().await;
    let (_pod, admin) = (MemoryLimit::apply_to(&keyward), keyward.admin_address);
    assert_withstands_within(MAX_MEMORY_KIB, "1,600 large heads over HTTP/1.1", &keyward, move || {
        let head = [&b"GET /auth/nginx HTTP/1.1\r\nhost: x\r\n"[..], &[b'x'; 100 << 10]].concat();
        let crowd: Vec<_> = [forward, admin]
            .iter()
            .flat_map(|to| std::iter::repeat_with(move || TcpStream::connect(to).unwrap()).take(800))
            .map(|mut stream| {
                // The server may have had enough before.
                let _ = stream.write_all(&head);
                stream
            })
            .collect();
        assert_eq!(RawRequest::get("/healthz").send(admin).status, 200);
        crowd.iter().for_each(read_until_closed);
    })
    .await;
    keyward.stop();
}
