//! Damage to the SQLite file: flipped bytes, cut files, a full disk, a disk that fails, files that are none of
//! ours. What is acknowledged is either there, whole, or the start says what to do; no changed record is served.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::Duration,
};

use keyward::{
    domain::{
        account::Account,
        key::{ApiKey, KeyOwner, KeySecret, KeySpec, Revocation, RevokeReason},
        log::{Actor, AuditAction, GENESIS_HASH, LogEntry, RecordChange},
        name::{AccountId, DisplayName, EnvironmentName, KeyId, KeyName},
        scope::{Scope, ScopeSet},
        time::{Revision, Timestamp},
        token::TokenDigest,
    },
    pb::Reason,
    store::{
        self, KeyFilter, LogFilter, OwnerFilter, ReadSet, SnapshotRecord, Store, WriteOutcome, WriteRequest,
    },
};
use sqlx::{Connection as _, SqliteConnection};
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use crate::{
    crash::SplitMix64,
    process::{TestHome, plain_key_request},
    snapshot_loader,
};

fn at(seconds: i64) -> Timestamp {
    Timestamp::from_micros((1_800_000_000 + seconds) * 1_000_000)
}

fn account() -> RecordChange {
    RecordChange::Account(Arc::new(Account {
        id: AccountId::parse("acme").unwrap(),
        name: DisplayName::parse("Acme Inc").unwrap(),
        suspended_at: None,
        longest_life: None,
        created_at: at(0),
        updated_at: at(0),
        revision: Revision(0),
    }))
}

fn key(number: u8) -> ApiKey {
    ApiKey {
        id: KeyId::generate(at(i64::from(number)), [number; 10]),
        owner: KeyOwner::Account(AccountId::parse("acme").unwrap()),
        environment: EnvironmentName::parse("production").unwrap(),
        spec: KeySpec {
            name: Some(KeyName::parse(&format!("key number {number}")).unwrap()),
            scopes: [Scope::parse_grant("monitors:read").unwrap()].into_iter().collect(),
            roles: vec![],
            expires_at: Some(at(1_000_000)),
            customers: vec![],
            allowed_cidrs: vec![],
            rate_limits: vec![],
            quota: None,
            metadata: BTreeMap::from([("team".to_owned(), "core".to_owned())]),
        },
        created_at: at(0),
        created_by: "system".to_owned(),
        updated_at: at(0),
        disabled_at: None,
        revocation: None,
        secrets: vec![KeySecret {
            version: 1,
            digest: TokenDigest::from_token(&format!("token {number}")),
            hint: "kw_live_0000".to_owned(),
            created_at: at(0),
            expires_at: None,
        }],
        revision: Revision(0),
    }
}

async fn commit(store: &Arc<dyn Store>, change: RecordChange, expect: Option<Revision>) -> RecordChange {
    let write = WriteRequest {
        change,
        expected_revision: expect,
        action: AuditAction::KeyUpdated,
        actor: Actor::SYSTEM,
        method: "test",
        at: at(0),
        idempotency: None,
        read_set: ReadSet::default(),
        limits: None,
    };
    match store.commit(&[write]).await.unwrap().outcomes.pop() {
        Some(Ok(WriteOutcome::Applied(change))) => change,
        outcome => panic!("{outcome:?}"),
    }
}

/// Makes keys; every third is rotated, every fifth revoked.
async fn fill(store: &Arc<dyn Store>, numbers: std::ops::Range<u8>) {
    for number in numbers {
        let made = commit(store, RecordChange::Key(Arc::new(key(number))), None).await;
        let RecordChange::Key(mut made) = made else { unreachable!() };
        let revision = made.revision;
        let changed = Arc::make_mut(&mut made);
        if number % 3 == 0 {
            changed.rotate(
                TokenDigest::from_token(&format!("new {number}")),
                "kw_live_1111".to_owned(),
                Duration::ZERO,
                at(5),
            );
        } else if number % 5 == 0 {
            changed.revocation =
                Some(Revocation { at: at(5), reason: RevokeReason::Compromised, comment: "seen".to_owned() });
        } else {
            continue;
        }
        commit(store, RecordChange::Key(made), Some(revision)).await;
    }
}

/// All that a database holds and a server may serve.
#[derive(Debug, PartialEq)]
struct DatabaseContent {
    log: Vec<LogEntry>,
    accounts: Vec<Account>,
    keys: Vec<ApiKey>,
    /// The ids that a List tells, which come by way of an index.
    listed: Vec<KeyId>,
    /// The revisions that the audit log tells of the account.
    audited: Vec<Revision>,
}

impl DatabaseContent {
    /// A difference is named, not shown with everything around it.
    #[track_caller]
    fn assert_equals(&self, expected: &DatabaseContent, when: &str) {
        assert_eq!(self.log.len(), expected.log.len(), "{when}");
        assert_eq!(self.keys.len(), expected.keys.len(), "{when}");
        for (found, expected) in self.keys.iter().zip(&expected.keys) {
            assert_eq!(found, expected, "{when}");
        }
        assert_eq!(self.listed, expected.listed, "{when}");
        assert_eq!(self.audited, expected.audited, "{when}");
        assert!(self == expected, "{when}");
    }

    /// What stands after the first rows of a log.
    fn from_log(log: &[LogEntry]) -> DatabaseContent {
        let (mut accounts, mut keys) = (BTreeMap::new(), BTreeMap::new());
        for row in log {
            match serde_json::from_str(&row.payload).unwrap() {
                RecordChange::Account(account) => {
                    drop(accounts.insert(account.id.clone(), (*account).clone()))
                }
                RecordChange::Key(key) => {
                    let mut key = Arc::unwrap_or_clone(key);
                    // A start has no use for them.
                    key.secrets.iter_mut().for_each(|secret| secret.hint.clear());
                    if key.revocation.is_some() {
                        key.spec = nothing();
                    }
                    keys.insert(key.id, key);
                }
                other => panic!("{other:?}"),
            }
        }
        DatabaseContent {
            log: log.to_vec(),
            accounts: accounts.into_values().collect(),
            listed: keys.keys().rev().copied().collect(),
            keys: keys.into_values().collect(),
            audited: log.iter().rev().map(|row| row.revision).collect(),
        }
    }
}

/// What a start reads of the terms of a revoked key.
fn nothing() -> KeySpec {
    KeySpec {
        name: None,
        scopes: ScopeSet::default(),
        roles: Vec::new(),
        expires_at: None,
        customers: Vec::new(),
        allowed_cidrs: Vec::new(),
        rate_limits: Vec::new(),
        quota: None,
        metadata: BTreeMap::default(),
    }
}

/// Opens a database and reads it as a start does; or what the start would say.
async fn serve_content(path: &Path) -> Result<DatabaseContent, String> {
    let store =
        store::open(&format!("sqlite:{}", path.display())).await.map_err(|error| error.to_string())?;
    let content = read(&store).await;
    store.close().await;
    content
}

async fn read(store: &Arc<dyn Store>) -> Result<DatabaseContent, String> {
    let (mut accounts, mut keys) = (Vec::new(), Vec::new());
    let (head, items) =
        snapshot_loader::load_snapshot(store, at(0)).await.map_err(|error| error.to_string())?;
    for item in items {
        match item {
            SnapshotRecord::Account(account) => accounts.push(account),
            SnapshotRecord::Key(key, _) => keys.push(Arc::unwrap_or_clone(key)),
            _ => {}
        }
    }
    keys.sort_by_key(|key| key.id);
    let log = store.list_log_after(Revision(0), u32::MAX).await.map_err(|error| error.to_string())?;
    let (mut revision, mut hash) = (Revision(0), GENESIS_HASH);
    for row in &log {
        assert!(row.follows(revision, &hash), "a broken chain is served");
        (revision, hash) = (row.revision, row.hash);
    }
    assert_eq!(head, store::LogHead { revision, hash });
    let acme = AccountId::parse("acme").unwrap();
    let filter = KeyFilter {
        owner: OwnerFilter::Account(acme.clone()),
        environment: None,
        states: vec![],
        name_prefix: String::new(),
        unused_since: None,
        expires_before: None,
        created_before: None,
        now: at(0),
    };
    let listed = store.list_keys(&filter, None, 1000).await.map_err(|error| error.to_string())?;
    let of_acme = LogFilter { account: Some(acme), ..LogFilter::default() };
    let audited = store.list_log(&of_acme, None, 1000).await.map_err(|error| error.to_string())?;
    Ok(DatabaseContent {
        log,
        accounts,
        keys,
        listed: listed.into_iter().map(|stored| stored.key.id).collect(),
        audited: audited.into_iter().map(|row| row.revision).collect(),
    })
}

/// What a start says of damage must help.
#[track_caller]
fn assert_helpful(message: &str) {
    assert!(message.contains("Restore the newest backup"), "{message}");
}

/// A database after a clean stop.
async fn stopped_database() -> (Vec<u8>, DatabaseContent) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("keyward.db");
    let store = store::open(&format!("sqlite:{}", path.display())).await.unwrap();
    commit(&store, account(), None).await;
    fill(&store, 0..60).await;
    let content = read(&store).await.unwrap();
    store.close().await;
    assert!(!folder.path().join("keyward.db-wal").exists(), "a clean stop leaves one file");
    assert_eq!(content, DatabaseContent::from_log(&content.log));
    (std::fs::read(&path).unwrap(), content)
}

/// Runs each case on a file of its own, a few at a time: SQLite works on threads of its own.
async fn run_each_case<T, F: Future<Output = ()>>(
    cases: impl IntoIterator<Item = T>,
    run: impl Fn(PathBuf, T) -> F,
) {
    let cases = std::cell::RefCell::new(cases.into_iter());
    let worker = async || {
        loop {
            let Some(case) = cases.borrow_mut().next() else {
                break;
            };
            let folder = tempfile::tempdir().unwrap();
            run(folder.path().join("keyward.db"), case).await;
        }
    };
    futures_util::future::join_all((0..4).map(|_| worker())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flipped_byte_is_noticed_or_changes_nothing() {
    const FLIPS: usize = 1000;
    let mut chance = SplitMix64::from_environment();
    let (bytes, content) = stopped_database().await;
    let content = Arc::new(content);
    let step = bytes.len() / FLIPS;
    let cases: Vec<_> = (0..FLIPS).map(|at| (at * step + chance.below(step), 1 << chance.below(8))).collect();
    run_each_case(cases, move |path, (place, bit)| {
        let (mut bytes, content) = (bytes.clone(), content.clone());
        async move {
            bytes[place] ^= bit;
            std::fs::write(&path, &bytes).unwrap();
            match serve_content(&path).await {
                Ok(found) => found.assert_equals(&content, &format!("bit {bit} of byte {place}")),
                Err(message) => assert!(!message.is_empty()),
            }
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cut_file_is_refused_with_the_way_out() {
    let (bytes, _) = stopped_database().await;
    // SQLite takes a file of one byte for an empty one.
    let cuts: Vec<_> = (2..bytes.len()).step_by(bytes.len() / 150).collect();
    run_each_case(cuts, move |path, length| {
        let bytes = bytes.clone();
        async move {
            std::fs::write(&path, &bytes[..length]).unwrap();
            let message = serve_content(&path).await.expect_err("half a database is served");
            assert!(message.contains("is damaged"), "{length}: {message}");
            assert_helpful(&message);
        }
    })
    .await;
}

/// A database with a write-ahead log that holds its last changes, as a power cut leaves them.
async fn with_wal() -> (Vec<u8>, Vec<u8>, Vec<LogEntry>) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("keyward.db");
    let url = format!("sqlite:{}", path.display());
    let store = store::open(&url).await.unwrap();
    commit(&store, account(), None).await;
    fill(&store, 0..4).await;
    store.close().await;
    drop(store);
    let store = store::open(&url).await.unwrap();
    fill(&store, 4..10).await;
    let log = store.list_log_after(Revision(0), u32::MAX).await.unwrap();
    (std::fs::read(&path).unwrap(), std::fs::read(folder.path().join("keyward.db-wal")).unwrap(), log)
}

/// Sees that what is served is what stood after some number of changes; returns how many.
async fn served_prefix(path: &Path, log: &[LogEntry]) -> usize {
    let found = serve_content(path).await.unwrap();
    let length = found.log.len();
    found.assert_equals(&DatabaseContent::from_log(&log[..length]), &format!("after {length} changes"));
    length
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_ahead_log_cut_anywhere_leaves_whole_changes() {
    let (bytes, wal, log) = with_wal().await;
    let lengths = Arc::new(std::sync::Mutex::new(BTreeMap::new()));
    let (seen, all) = (lengths.clone(), log.len());
    let cuts: Vec<_> = (0..wal.len()).step_by(512).chain([wal.len()]).collect();
    run_each_case(cuts, move |path, cut| {
        let (bytes, wal, log, seen) = (bytes.clone(), wal[..cut].to_vec(), log.clone(), seen.clone());
        async move {
            std::fs::write(&path, &bytes).unwrap();
            std::fs::write(path.with_extension("db-wal"), &wal).unwrap();
            // A header and no frame is no more than nothing.
            if wal.len() < 32 + 24 + 512 {
                let message = serve_content(&path).await.expect_err("an older state is served");
                assert!(
                    message.contains("was not closed") && message.contains("restore the newest"),
                    "{message}"
                );
                return;
            }
            let length = served_prefix(&path, &log).await;
            seen.lock().unwrap().insert(cut, length);
        }
    })
    .await;
    let lengths: Vec<_> = lengths.lock().unwrap().values().copied().collect();
    assert!(lengths.is_sorted(), "a longer log holds more: {lengths:?}");
    assert_eq!(lengths.last(), Some(&all), "the whole log holds everything");
    let different: std::collections::BTreeSet<_> = lengths.iter().collect();
    assert!(different.len() > 6, "the cuts fell between changes: {different:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flipped_byte_of_the_write_ahead_log_leaves_whole_changes() {
    let mut chance = SplitMix64::from_environment();
    let (bytes, wal, log) = with_wal().await;
    let places: Vec<_> = (0..200).map(|_| (chance.below(wal.len()), 1 << chance.below(8))).collect();
    run_each_case(places, move |path, (place, bit)| {
        let (bytes, mut wal, log) = (bytes.clone(), wal.clone(), log.clone());
        async move {
            wal[place] ^= bit;
            std::fs::write(&path, &bytes).unwrap();
            std::fs::write(path.with_extension("db-wal"), &wal).unwrap();
            match store::open(&format!("sqlite:{}", path.display())).await {
                Err(error) => assert!(!error.to_string().is_empty()),
                Ok(store) => {
                    store.close().await;
                    drop(store);
                    served_prefix(&path, &log).await;
                }
            }
        }
    })
    .await;
}

/// Changes a stopped server's database behind its back.
async fn tamper(home: &TestHome, sql: &'static str) {
    let url = format!("sqlite://{}", home.database().display());
    let mut connection = SqliteConnection::connect(&url).await.unwrap();
    let done = sqlx::query(sql).execute(&mut connection).await.unwrap();
    assert_eq!(done.rows_affected(), 1, "{sql}");
    connection.close().await.unwrap();
}

/// A stopped server's database, with a key in it.
async fn stopped() -> TestHome {
    let server = crate::process::KeywardProcess::start();
    let mut root = server.root_caller();
    root.create_account("acme").await;
    root.create_key(plain_key_request()).await.unwrap();
    server.stop()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_record_stops_the_start_and_the_message_says_what_to_do() {
    for (sql, said) in [
        ("UPDATE keys SET scopes = 'keyward:*' WHERE account = 'acme'", "checksum"),
        ("UPDATE keys SET expires_at = 1 WHERE account = 'acme'", "checksum"),
        (
            "UPDATE secrets SET expires_at = NULL, version = 7 WHERE digest = (SELECT max(digest) FROM secrets)",
            "checksum",
        ),
        ("UPDATE accounts SET suspended_at = 1 WHERE id = 'acme'", "checksum"),
        ("UPDATE log SET actor = 'nobody' WHERE revision = 2", "chain breaks at entry 2"),
        ("DELETE FROM log WHERE revision = 2", "chain breaks at entry 2"),
        ("DELETE FROM log WHERE revision = 4", "ends at 3, and should end at 4"),
        ("UPDATE meta SET head = 3", "ends at 4, and should end at 3"),
    ] {
        let home = stopped().await;
        tamper(&home, sql).await;
        let message = home.run_expecting_failure(home.serve_command());
        assert!(message.contains(said), "{sql}: {message}");
        assert_helpful(&message);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_without_its_secret_stops_the_start() {
    let home = stopped().await;
    tamper(&home, "DELETE FROM secrets WHERE digest = (SELECT max(digest) FROM secrets)").await;
    assert_helpful(&home.run_expecting_failure(home.serve_command()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_of_a_newer_version_is_refused_and_left_alone() {
    let home = stopped().await;
    let sql = "INSERT INTO _sqlx_migrations VALUES (9999, 'later', CURRENT_TIMESTAMP, 1, x'00', 1)";
    tamper(&home, sql).await;
    let before = std::fs::read(home.database()).unwrap();
    let message = home.run_expecting_failure(home.serve_command());
    for said in ["schema version 9999", "versions up to", "start the newer keyward"] {
        assert!(message.contains(said), "{said}: {message}");
    }
    assert!(std::fs::read(home.database()).unwrap() == before);
}

#[test]
fn what_is_no_database_is_refused_and_left_alone() {
    let mut chance = SplitMix64::from_environment();
    let noise: Vec<u8> = (0..16_384).map(|_| chance.next_u64().to_le_bytes()[0]).collect();
    for content in [noise, b"Dear diary,\n".repeat(100)] {
        let home = TestHome::new();
        std::fs::write(home.database(), &content).unwrap();
        assert_helpful(&home.run_expecting_failure(home.serve_command()));
        assert!(std::fs::read(home.database()).unwrap() == content);
        assert!(!home.root_key_file().exists());
    }
}

#[test]
fn a_folder_that_is_not_there_is_named() {
    let home = TestHome::new();
    let message =
        home.run_expecting_failure(home.command(["serve", "--database", "sqlite:nowhere/keyward.db"]));
    assert!(message.contains("nowhere"), "{message}");
}

/// Stands between the server and the disk: while a file says so, writes to the database find no room, or what
/// was written cannot be made durable.
const FAILING_DISK_C: &str = r#"
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

static int bad(const char *flag, int fd) {
    char path[64], name[4096];
    const char *file = getenv(flag);
    if (!file || access(file, F_OK)) return 0;
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(path, name, sizeof name - 1);
    if (length < 0) return 0;
    name[length] = 0;
    return strstr(name, "keyward.db") != NULL;
}
#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define FULL(fd) if (bad("BAD_DISK_FULL", fd)) { errno = ENOSPC; return -1; }
#define FAULT(fd) if (bad("BAD_DISK_FAULT", fd)) { errno = EIO; return -1; }
ssize_t write(int fd, const void *b, size_t n) { FULL(fd) return REAL(write)(fd, b, n); }
ssize_t pwrite(int fd, const void *b, size_t n, off_t o) { FULL(fd) return REAL(pwrite)(fd, b, n, o); }
ssize_t pwrite64(int fd, const void *b, size_t n, off64_t o) { FULL(fd) return REAL(pwrite64)(fd, b, n, o); }
int fsync(int fd) { FAULT(fd) return REAL(fsync)(fd); }
int fdatasync(int fd) { FAULT(fd) return REAL(fdatasync)(fd); }
"#;

/// Puts a library before the C library of a command. The linker's own compiler builds it: where Rust links, it is there.
pub(crate) fn preload_library(home: &TestHome, source: &str, command: &mut Command) {
    let (file, library) = (home.path("preload.c"), home.path("preload.so"));
    std::fs::write(&file, source).unwrap();
    let mut compile = Command::new("cc");
    compile.args(["-shared", "-fPIC", "-o"]).arg(&library).arg(&file).arg("-ldl");
    assert!(compile.status().unwrap().success());
    command.env("LD_PRELOAD", &library);
}

/// `keyward serve` on such a disk.
fn serve_on_bad_disk(home: &TestHome) -> Command {
    let mut serve = home.serve_command();
    preload_library(home, FAILING_DISK_C, &mut serve);
    serve.env("BAD_DISK_FULL", home.path("full")).env("BAD_DISK_FAULT", home.path("fault"));
    serve
}

#[track_caller]
fn reason(status: &Status) -> String {
    status.get_details_error_info().unwrap().reason
}

#[tokio::test(flavor = "multi_thread")]
async fn on_a_full_disk_a_revocation_is_in_force_here_and_a_retry_makes_it_last() {
    let home = TestHome::new();
    let server = home.start_with(serve_on_bad_disk(&home)).unwrap();
    let mut root = server.root_caller();
    root.create_account("acme").await;
    let (id, token) = root.create_key(plain_key_request()).await.unwrap();
    let (_, other) = root.create_key(plain_key_request()).await.unwrap();
    let full = home.path("full");
    std::fs::write(&full, "").unwrap();
    for _ in 0..2 {
        let refused = root.revoke_key(&id).await.unwrap_err();
        assert_eq!(
            (refused.code(), &*reason(&refused)),
            (Code::ResourceExhausted, "STORE_FULL"),
            "{refused:?}"
        );
        assert_eq!(root.check_token(&token).await.unwrap(), Reason::Revoked, "refused here at once");
        assert_eq!(root.check_token(&other).await.unwrap(), Reason::Ok, "Checks go on");
    }
    assert_eq!(root.create_key(plain_key_request()).await.unwrap_err().code(), Code::ResourceExhausted);
    std::fs::remove_file(full).unwrap();
    root.revoke_key(&id).await.unwrap();
    root.create_key(plain_key_request()).await.unwrap();
    assert_eq!(root.check_token(&token).await.unwrap(), Reason::Revoked);
    server.stop();

    let server = home.start();
    assert_eq!(server.root_caller().check_token(&token).await.unwrap(), Reason::Revoked, "it lasts");
}

#[tokio::test(flavor = "multi_thread")]
async fn when_a_commit_may_have_failed_a_revocation_is_in_force_and_a_retry_makes_it_last() {
    let home = TestHome::new();
    let server = home.start_with(serve_on_bad_disk(&home)).unwrap();
    let mut root = server.root_caller();
    root.create_account("acme").await;
    let (id, token) = root.create_key(plain_key_request()).await.unwrap();
    let (rotated_id, old) = root.create_key(plain_key_request()).await.unwrap();
    let fault = home.path("fault");
    std::fs::write(&fault, "").unwrap();
    let refused = root.revoke_key(&id).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable, "{refused:?}");
    assert_eq!(root.check_token(&token).await.unwrap(), Reason::Revoked);
    assert_eq!(root.rotate_key(&rotated_id).await.unwrap_err().code(), Code::Unavailable);
    std::fs::remove_file(fault).unwrap();
    root.revoke_key(&id).await.unwrap();
    let new = root.rotate_key(&rotated_id).await.unwrap();
    assert_eq!(root.check_token(&token).await.unwrap(), Reason::Revoked);
    server.stop();

    let server = home.start();
    let mut root = server.root_caller();
    for (token, reason) in [(&token, Reason::Revoked), (&old, Reason::Rotated), (&new, Reason::Ok)] {
        assert_eq!(root.check_token(token).await.unwrap(), reason);
    }
}
