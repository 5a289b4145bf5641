//! One owner of an SQLite file, and no start from less than it holds: a second server under any name of the file, a file
//! that is taken away from its server, and a file without its WAL. Real processes, killed at each step too.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use keyward::{
    pb::{self, Reason},
    store::{self, CommitError, StoreError},
};
use tonic::Code;

use crate::{
    crash::SplitMix64,
    process::{AuthorizedClients, FinishedProcess, KeywardProcess, TestHome, plain_key_request, wait_for},
    sqlite_file::preload_library,
};

fn wal(home: &TestHome) -> PathBuf {
    home.path("keyward.db-wal")
}

/// A server with a key of `acme`: its id and token.
async fn with_key(server: &KeywardProcess) -> (String, String) {
    server.root_caller().create_account("acme").await;
    server.root_caller().create_key(plain_key_request()).await.unwrap()
}

fn serve_on(home: &TestHome, database: &Path) -> Command {
    let url = format!("sqlite:{}", database.display());
    let ports = ["--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0"];
    let mut serve = home.command(["serve", "--database", &url]);
    serve.args(ports);
    serve
}

/// A file system whose locks do nothing.
const FLOCK_STUB_C: &str = "int flock(int fd, int operation) { (void)fd; (void)operation; return 0; }";

fn without_locks(home: &TestHome, mut serve: Command) -> Command {
    preload_library(home, FLOCK_STUB_C, &mut serve);
    serve
}

// One owner. -----------------------------------------------------------------------------------------------------------

#[tokio::test(flavor = "multi_thread")]
async fn a_second_server_is_refused_under_every_name_of_the_file() {
    let server = KeywardProcess::start();
    let home = server.home.clone();
    let elsewhere = TestHome::new();
    std::fs::hard_link(home.database(), elsewhere.database()).unwrap();
    std::os::unix::fs::symlink(home.database(), home.path("link.db")).unwrap();
    std::fs::remove_file(home.path("keyward.db-lock")).unwrap();
    for name in [home.database(), elsewhere.database(), home.path("link.db")] {
        let refused = home.run_expecting_failure(serve_on(&home, &name));
        assert!(refused.contains("in use by another keyward"), "{}: {refused}", name.display());
    }
    with_key(&server).await;
}

#[test]
fn a_second_server_is_refused_on_another_mount_of_the_file() {
    let server = KeywardProcess::start();
    let elsewhere = TestHome::new();
    let serve = elsewhere.serve_command();
    let mut mounted = Command::new("unshare");
    mounted.args(["--mount", "--map-root-user", "sh", "-c"]);
    mounted.arg("touch \"$1\" && mount --bind \"$0\" \"$1\" || exit 77; shift; exec \"$@\"");
    mounted.arg(server.home.database()).arg(elsewhere.database());
    mounted.arg(serve.get_program()).args(serve.get_args());
    let Err(ended) = elsewhere.start_with(mounted) else { panic!("it serves") };
    if ended.code == Some(77) || ended.err.contains("unshare") {
        println!("this machine mounts nothing; other names of the file stand for it: {ended:?}");
        return;
    }
    assert!(ended.code == Some(1) && ended.err.contains("in use by another keyward"), "{ended:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_another_has_displaced_acknowledges_and_allows_nothing_more_and_ends() {
    let home = TestHome::new();
    let mut first = home.start_with(without_locks(&home, home.serve_command())).unwrap();
    let (id, token) = with_key(&first).await;
    assert_eq!(first.root_caller().check_token(&token).await.unwrap(), Reason::Ok);
    let second = home.start_with(without_locks(&home, home.serve_command())).unwrap();
    let refused = first.root_caller().create_key(plain_key_request()).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable, "{refused:?}");
    second.root_caller().revoke_key(&id).await.unwrap();
    let mut caller = first.root_caller();
    while let Ok(reason) = caller.check_token(&token).await {
        assert!([Reason::Ok, Reason::Revoked].contains(&reason));
    }
    wait_for("the first one to end", || first.process.has_ended().then_some(()));
    let ended = first.process.wait_until_ended();
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(ended.err.contains("no longer owns the database file"), "{ended:?}");
    assert_eq!(second.root_caller().check_token(&token).await.unwrap(), Reason::Revoked);
    second.root_caller().create_key(plain_key_request()).await.unwrap();
    second.stop();
    let again = home.start();
    assert_eq!(again.root_caller().check_token(&token).await.unwrap(), Reason::Revoked);
    let found =
        again.root_caller().audit.verify(pb::VerifyAuditLogRequest::default()).await.unwrap().into_inner();
    assert!(found.valid && found.entries == found.head, "{found:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn another_name_of_an_open_file_has_not_its_wal_and_is_refused_where_locks_do_nothing() {
    let home = TestHome::new();
    let server = home.start_with(without_locks(&home, home.serve_command())).unwrap();
    let elsewhere = TestHome::new();
    std::fs::hard_link(home.database(), elsewhere.database()).unwrap();
    let refused = elsewhere.run_expecting_failure(without_locks(&elsewhere, elsewhere.serve_command()));
    assert!(refused.contains("was not closed"), "{refused}");
    with_key(&server).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_transaction_is_committed_in_a_term_that_is_over() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("keyward.db");
    let store = store::open(&format!("sqlite:{}", path.display())).await.unwrap();
    let other = rusqlite::Connection::open(&path).unwrap();
    other.execute_batch("UPDATE meta SET owner = randomblob(16)").unwrap();
    let lost = store.prune_usage(store::UsageHour(0)).await;
    assert!(matches!(lost, Err(StoreError::OwnershipLost(_))), "{lost:?}");
    let lost = store.commit(&[]).await;
    assert!(matches!(lost, Err(CommitError::NotRecorded(StoreError::OwnershipLost(_)))), "{lost:?}");
    store.wait_until_unusable().await;
}

/// What takes a file away from its server.
type TakeFileAway = fn(&TestHome);

const TAKEN: [(&str, TakeFileAway); 5] = [
    ("removed", |home| std::fs::remove_file(home.database()).unwrap()),
    ("renamed", |home| std::fs::rename(home.database(), home.path("old.db")).unwrap()),
    ("replaced", |home| std::fs::rename(home.path("backup.db"), home.database()).unwrap()),
    ("overwritten", |home| {
        std::fs::copy(home.path("backup.db"), home.database()).unwrap();
    }),
    ("its WAL removed", |home| std::fs::remove_file(wal(home)).unwrap()),
];

fn backup(home: &TestHome, to: &Path) -> FinishedProcess {
    home.run_to_end(home.command(["backup", "--database", &home.url(), "--to", to.to_str().unwrap()]))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_whose_file_is_taken_away_acknowledges_nothing_more_and_ends() {
    for (how, take) in TAKEN {
        let mut server = KeywardProcess::start();
        let (_, token) = with_key(&server).await;
        let home = server.home.clone();
        let copied = backup(&home, &home.path("backup.db"));
        assert_eq!(copied.code, Some(0), "{copied:?}");
        let (_, newest) = server.root_caller().create_key(plain_key_request()).await.unwrap();
        take(&home);
        let refused = server.root_caller().create_key(plain_key_request()).await.unwrap_err();
        assert!(matches!(refused.code(), Code::Unavailable | Code::Internal), "{how}: {refused:?}");
        wait_for("the server to end", || server.process.has_ended().then_some(()));
        let ended = server.process.wait_until_ended();
        assert_eq!(ended.code, Some(1), "{how}: {ended:?}");
        assert!(ended.err.contains("no longer owns the database file"), "{how}: {ended:?}");
        if how == "renamed" {
            std::fs::rename(home.path("old.db"), home.database()).unwrap();
        }
        if ["renamed", "its WAL removed"].contains(&how) {
            let again = home.start();
            for token in [&token, &newest] {
                assert_eq!(again.root_caller().check_token(token).await.unwrap(), Reason::Ok, "{how}");
            }
        }
    }
}

// A file without its WAL. ----------------------------------------------------------------------------------------------

#[track_caller]
fn refused_without_wal(refused: &str) {
    for said in [
        "was not closed",
        "keyward.db-wal is missing or damaged",
        "Nothing was changed",
        "restore the newest backup",
    ] {
        assert!(refused.contains(said), "{said}: {refused}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_of_a_running_servers_file_alone_is_refused_and_with_its_wal_it_starts() {
    let server = KeywardProcess::start();
    let (_, token) = with_key(&server).await;
    let (root_key, copy) = (server.home.root_key(), TestHome::new());
    std::fs::copy(server.home.database(), copy.database()).unwrap();
    let before = std::fs::read(copy.database()).unwrap();
    refused_without_wal(&copy.run_expecting_failure(copy.serve_command()));
    assert!(std::fs::read(copy.database()).unwrap() == before, "it is left alone");
    assert!(!copy.root_key_file().exists(), "it is no new database");
    std::fs::copy(wal(&server.home), wal(&copy)).unwrap();
    let copied = copy.start_with(copy.serve_command()).unwrap_or_else(|ended| panic!("{ended:?}"));
    assert_eq!(copied.caller(&root_key).check_token(&token).await.unwrap(), Reason::Ok);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_servers_file_starts_with_its_wal_and_not_without_until_the_loss_is_accepted_and_logged() {
    let server = KeywardProcess::start();
    let (_, kept) = with_key(&server).await;
    let home = server.stop();
    let server = home.start();
    let (_, lost) = server.root_caller().create_key(plain_key_request()).await.unwrap();
    server.process.kill();
    let url = home.url();
    let run = |arguments: &[&str]| home.run_to_end(home.command([arguments, &["--database", &url]].concat()));
    let accept = || run(&["accept-lost-wal", "--yes"]);
    let refused = accept();
    assert!(refused.code == Some(1) && refused.err.contains("no loss to accept"), "{refused:?}");
    // What only reads leaves the WAL there.
    let copied = backup(&home, &home.path("backup.db"));
    assert_eq!(copied.code, Some(0), "{copied:?}");
    let restored = TestHome::new();
    std::fs::rename(home.path("backup.db"), restored.database()).unwrap();
    let restored = restored
        .start_with(restored.serve_command_without_root_key_file())
        .unwrap_or_else(|e| panic!("{e:?}"));
    assert_eq!(restored.caller(&home.root_key()).check_token(&lost).await.unwrap(), Reason::Ok);
    let server = home.start();
    assert_eq!(
        server.root_caller().check_token(&lost).await.unwrap(),
        Reason::Ok,
        "with its WAL it is whole"
    );
    server.process.kill();

    std::fs::remove_file(wal(&home)).unwrap();
    refused_without_wal(&home.run_expecting_failure(home.serve_command()));
    for command in [
        &["migrate"][..],
        &["root-key", "reset", "--yes", "--root-key-file", "never.key"],
        &["backup", "--to", "never.db"],
    ] {
        let refused = run(command);
        assert_eq!(refused.code, Some(1), "{command:?}: {refused:?}");
        refused_without_wal(&refused.err);
    }
    let accepted = accept();
    assert_eq!(accepted.code, Some(0), "{accepted:?}");
    assert!(accepted.out.contains("repeat the revocations"), "{accepted:?}");
    let server = home.start();
    let mut root = server.root_caller();
    assert_eq!(root.check_token(&kept).await.unwrap(), Reason::Ok);
    let log = root.audit.list(pb::ListAuditEntriesRequest::default()).await.unwrap().into_inner();
    let newest = &log.entries[0];
    assert_eq!((&*newest.action, &*newest.method), ("database.loss_accepted", "keyward accept-lost-wal"));
}

#[test]
fn a_first_start_that_is_killed_and_loses_its_wal_is_not_taken_for_a_new_database() {
    let server = KeywardProcess::start();
    let home = server.home.clone();
    server.process.kill();
    std::fs::remove_file(wal(&home)).unwrap();
    refused_without_wal(&home.run_expecting_failure(home.serve_command_without_root_key_file()));
}

#[test]
fn a_wal_whose_database_is_gone_is_not_taken_for_a_new_one() {
    let server = KeywardProcess::start();
    let home = server.home.clone();
    server.process.kill();
    std::fs::remove_file(home.database()).unwrap();
    let before = std::fs::read(wal(&home)).unwrap();
    let refused = home.run_expecting_failure(home.serve_command_without_root_key_file());
    assert!(
        refused.contains("is missing or empty") && refused.contains("Put the database file back"),
        "{refused}"
    );
    assert!(std::fs::read(wal(&home)).unwrap() == before, "it is left alone");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wal_that_cannot_be_read_is_a_lost_one() {
    let server = KeywardProcess::start();
    with_key(&server).await;
    let home = server.home.clone();
    server.process.kill();
    let whole = std::fs::read(wal(&home)).unwrap();
    let zeros = vec![0; whole.len()];
    let mut flipped = whole.clone();
    flipped[20] ^= 1;
    for damaged in [&zeros[..], &whole[..32], &flipped[..]] {
        std::fs::write(wal(&home), damaged).unwrap();
        refused_without_wal(&home.run_expecting_failure(home.serve_command()));
    }
    std::fs::write(wal(&home), whole).unwrap();
    home.start();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_older_closed_file_is_not_mixed_with_the_wal_of_its_later_life() {
    let server = KeywardProcess::start();
    let (id, _) = with_key(&server).await;
    let home = server.stop();
    std::fs::copy(home.database(), home.path("copy.db")).unwrap();
    let server = home.start();
    server.root_caller().keys.disable(pb::DisableKeyRequest { id }).await.unwrap();
    let home = server.stop();
    let server = home.start();
    server.root_caller().create_key(plain_key_request()).await.unwrap();
    let home = server.home.clone();
    server.process.kill();
    std::fs::copy(home.path("copy.db"), home.database()).unwrap();
    let refused = home.run_expecting_failure(home.serve_command());
    assert!(refused.contains("keyward.db-wal does not belong to"), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restored_backup_is_not_mixed_with_the_wal_of_the_file_before() {
    let server = KeywardProcess::start();
    let (_, token) = with_key(&server).await;
    let home = server.home.clone();
    backup(&home, &home.path("backup.db"));
    for _ in 0..50 {
        server.root_caller().create_key(plain_key_request()).await.unwrap();
    }
    server.process.kill();
    std::fs::rename(home.path("backup.db"), home.database()).unwrap();
    let refused = home.run_expecting_failure(home.serve_command());
    assert!(refused.contains("keyward.db-wal does not belong to"), "{refused}");
    std::fs::remove_file(wal(&home)).unwrap();
    assert_eq!(home.start().root_caller().check_token(&token).await.unwrap(), Reason::Ok);
}

/// Kills the process before its nth change of a database file, or of the files beside it.
const KILL_AT_STEP_C: &str = r#"
#define _GNU_SOURCE
#include <dlfcn.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

static int seen;
static void step(const char *name) {
    const char *at = getenv("KILL_AT");
    if (at && strstr(name, "keyward.db") && __sync_add_and_fetch(&seen, 1) == atoi(at)) kill(getpid(), SIGKILL);
}
static void of(int fd) {
    char path[64], name[4096];
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(path, name, sizeof name - 1);
    if (length < 0) return;
    name[length] = 0;
    step(name);
}
#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
ssize_t write(int fd, const void *b, size_t n) { of(fd); return REAL(write)(fd, b, n); }
ssize_t pwrite(int fd, const void *b, size_t n, off_t o) { of(fd); return REAL(pwrite)(fd, b, n, o); }
ssize_t pwrite64(int fd, const void *b, size_t n, off64_t o) { of(fd); return REAL(pwrite64)(fd, b, n, o); }
int fsync(int fd) { of(fd); return REAL(fsync)(fd); }
int fdatasync(int fd) { of(fd); return REAL(fdatasync)(fd); }
int ftruncate(int fd, off_t n) { of(fd); return REAL(ftruncate)(fd, n); }
int ftruncate64(int fd, off64_t n) { of(fd); return REAL(ftruncate64)(fd, n); }
int unlink(const char *name) { step(name); return REAL(unlink)(name); }
"#;

async fn assert_all_tokens_work(server: &KeywardProcess, root_key: &str, tokens: &[String], when: &str) {
    let mut root: AuthorizedClients = server.caller(root_key);
    root.keys.who_am_i(pb::WhoAmIRequest {}).await.unwrap_or_else(|status| panic!("{when}: {status:?}"));
    for token in tokens {
        assert_eq!(root.check_token(token).await.unwrap(), Reason::Ok, "{when}");
    }
}

/// Starts a server that is killed before its nth change of the files, makes a key, and stops it. Everything that was
/// acknowledged holds at the next start. The file without its WAL is refused, or holds as much. Whether it came so far.
async fn killed_at(
    step: usize,
    library: &Path,
    database: Option<&[u8]>,
    known: Option<(&str, &str)>,
) -> bool {
    let (home, when) = (TestHome::new(), format!("killed at step {step}"));
    if let Some(database) = database {
        std::fs::write(home.database(), database).unwrap();
    }
    let mut serve = home.serve_command_without_root_key_file();
    serve.env("LD_PRELOAD", library).env("KILL_AT", step.to_string());
    let mut tokens: Vec<_> = known.iter().map(|(_, token)| (*token).to_owned()).collect();
    let ended = match home.start_with(serve) {
        Err(ended) => ended,
        Ok(server) => {
            if let Some((root_key, _)) = known {
                tokens.extend(
                    server
                        .caller(root_key)
                        .create_key(plain_key_request())
                        .await
                        .ok()
                        .map(|(_, token)| token),
                );
            }
            server.process.terminate();
            server.process.wait_until_ended()
        }
    };
    let alone = TestHome::new();
    if home.database().exists() {
        std::fs::copy(home.database(), alone.database()).unwrap();
    }
    let again = home.start_with(home.serve_command_without_root_key_file());
    let again = again.unwrap_or_else(|refused| panic!("{when}: {refused:?}"));
    let of_first_start = |home: &TestHome| std::fs::read_to_string(home.path("keyward-root.key"));
    let root_key = known.map_or_else(|| of_first_start(&home).unwrap(), |(root_key, _)| root_key.to_owned());
    assert_all_tokens_work(&again, &root_key, &tokens, &when).await;
    match alone.start_with(alone.serve_command_without_root_key_file()) {
        // Nothing was in the file: it is new.
        Ok(_) if of_first_start(&alone).is_ok() => assert!(tokens.is_empty(), "{when}"),
        Ok(server) => {
            assert_all_tokens_work(&server, &root_key, &tokens, &format!("{when}, without its WAL")).await
        }
        Err(refused) => refused_without_wal(&refused.err),
    }
    ended.code != Some(0)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_killed_at_any_step_starts_again_and_its_file_alone_is_whole_or_refused() {
    let server = KeywardProcess::start();
    let (_, token) = with_key(&server).await;
    let home = server.stop();
    preload_library(&home, KILL_AT_STEP_C, &mut Command::new("true"));
    let (library, root_key) = (home.path("preload.so"), home.root_key());
    let database = std::fs::read(home.database()).unwrap();
    let mut chance = SplitMix64::from_environment();
    let cases = [(None, None), (Some(&*database), Some((&*root_key, &*token)))];
    for (database, known) in cases {
        let (mut step, mut kills) = (1, 0);
        while killed_at(step, &library, database, known).await {
            step += 1 + chance.below(3);
            kills += 1;
        }
        assert!(kills > 5, "it was killed {kills} times");
    }
}
