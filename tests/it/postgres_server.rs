//! What only a PostgreSQL server can do to the store: sessions that end at any point, processes that start at once, a
//! server that cannot be trusted, tables that somebody touched.

use std::{
    path::Path,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use keyward::{
    domain::{
        account::Account,
        lease::{AttemptId, LogPosition, RenewalRequest, RenewalSequence, ReplicaId},
        log::{Actor, AuditAction, RecordChange},
        name::{AccountId, DisplayName},
        time::{Revision, Timestamp},
    },
    engine::index::Index,
    pb,
    store::{
        self, CommitError, OpenError, ReadSet, SnapshotLoader, Store, StoreError, WriteRequest,
        group_commit::{CommitHandle, WriteError},
    },
};

use sqlx::Connection as _;

use crate::{
    postgres::{PostgresDatabase, PostgresServer, run_checked, url},
    process::{TestHome, plain_key_request, wait_for},
    snapshot_loader,
};

async fn open(database: &PostgresDatabase) -> Arc<dyn Store> {
    open_at(&database.url()).await
}

async fn open_at(url: &str) -> Arc<dyn Store> {
    store::open(url).await.unwrap()
}

async fn refusal(url: &str) -> OpenError {
    match store::open(url).await {
        Ok(_) => panic!("it opened"),
        Err(error) => error,
    }
}

fn account(id: &str) -> WriteRequest {
    let account = Account {
        id: AccountId::parse(id).unwrap(),
        name: DisplayName::parse(id).unwrap(),
        suspended_at: None,
        longest_life: None,
        created_at: Timestamp::from_micros(0),
        updated_at: Timestamp::from_micros(0),
        revision: Revision::default(),
    };
    WriteRequest {
        change: RecordChange::Account(Arc::new(account)),
        expected_revision: None,
        action: AuditAction::AccountCreated,
        actor: Actor::SYSTEM,
        method: "test",
        at: Timestamp::from_micros(0),
        idempotency: None,
        read_set: ReadSet::default(),
        limits: None,
    }
}

async fn commit(store: &Arc<dyn Store>, id: &str) -> Result<(), CommitError> {
    let committed = store.commit(&[account(id)]).await?;
    assert!(committed.outcomes[0].is_ok());
    Ok(())
}

async fn head(store: &Arc<dyn Store>) -> Revision {
    store.log_head().await.unwrap().revision
}

// Processes. ---------------------------------------------------------------------------------------------------------

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_was_closed_or_dropped_opens_again() {
    let database = PostgresDatabase::new();
    let first = open(&database).await;
    commit(&first, "acme").await.unwrap();
    first.close().await;
    let second = open(&database).await;
    commit(&second, "globex").await.unwrap();
    drop(second);
    assert_eq!(head(&open(&database).await).await, Revision(2));
}

#[test]
fn two_servers_that_start_at_once_make_one_root_key() {
    let database = PostgresDatabase::new();
    let homes = [TestHome::with_database_url(database.url()), TestHome::with_database_url(database.url())];
    let started: Vec<_> = std::thread::scope(|scope| {
        let starts: Vec<_> =
            homes.iter().map(|home| scope.spawn(|| home.start_with(home.serve_command()))).collect();
        starts.into_iter().map(|start| start.join().unwrap()).collect()
    });
    let keys = homes.iter().filter(|home| home.root_key_file().exists()).count();
    assert_eq!((started.iter().filter(|start| start.is_ok()).count(), keys), (2, 1));
    assert_eq!(database.sql("SELECT count(*) FROM keyward.keys"), "1");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_server_is_there_again_with_all_that_it_acknowledged() {
    let database = PostgresDatabase::new();
    let home = TestHome::with_database_url(database.url());
    let server = home.start();
    server.root_caller().create_account("acme").await;
    let (id, token) = server.root_caller().create_key(plain_key_request()).await.unwrap();
    let (revoked, old) = server.root_caller().create_key(plain_key_request()).await.unwrap();
    server.root_caller().revoke_key(&revoked).await.unwrap();
    server.process.kill();
    let server = home.start();
    assert_eq!(server.root_caller().check_token(&token).await.unwrap(), pb::Reason::Ok);
    assert_eq!(server.root_caller().check_token(&old).await.unwrap(), pb::Reason::Revoked);
    assert_eq!(server.root_caller().get_key(&id).await.unwrap().id, id);
    server.stop();
}

// Sessions that end. -------------------------------------------------------------------------------------------------

/// Makes each commit wait or fail at the place where `when` has the trigger fire.
fn trigger(database: &PostgresDatabase, when: &str, action: &str) {
    database.sql(&format!(
        "CREATE FUNCTION public.get_in_the_way() RETURNS trigger LANGUAGE plpgsql AS \
         $$ BEGIN {action}; RETURN NULL; END $$; \
         CREATE CONSTRAINT TRIGGER in_the_way AFTER INSERT ON keyward.log {when} \
         FOR EACH ROW EXECUTE FUNCTION public.get_in_the_way()"
    ));
}

/// A transaction that stays open until it is dropped.
pub(crate) async fn holding(database: &PostgresDatabase, sql: &'static str) -> sqlx::PgConnection {
    let mut connection = sqlx::PgConnection::connect(&database.url()).await.unwrap();
    sqlx::raw_sql("BEGIN").execute(&mut connection).await.unwrap();
    sqlx::raw_sql(sql).execute(&mut connection).await.unwrap();
    connection
}

/// Ends the session that waits in the trigger.
fn end_waiting(database: &PostgresDatabase) {
    wait_for("a commit to wait", || {
        let ended = database.sql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity \
             WHERE wait_event = 'PgSleep' AND datname = current_database()",
        );
        (ended == "t").then_some(())
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_that_the_server_refuses_is_not_recorded() {
    let database = PostgresDatabase::new();
    let store = open(&database).await;
    trigger(&database, "DEFERRABLE INITIALLY DEFERRED", "RAISE EXCEPTION 'no'");
    let error = commit(&store, "acme").await.unwrap_err();
    assert!(matches!(error, CommitError::NotRecorded(_)), "{error:?}");
    assert_eq!(head(&store).await, Revision(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_whose_session_ends_is_unknown_and_the_next_one_works() {
    let database = PostgresDatabase::new();
    let store = open(&database).await;
    trigger(&database, "DEFERRABLE INITIALLY DEFERRED", "PERFORM pg_sleep(60)");
    let committing = tokio::spawn({
        let store = store.clone();
        async move { commit(&store, "acme").await }
    });
    end_waiting(&database);
    let error = committing.await.unwrap().unwrap_err();
    assert!(matches!(error, CommitError::Unknown(StoreError::Unavailable(_))), "{error:?}");
    database.sql("DROP TRIGGER in_the_way ON keyward.log");
    commit(&store, "acme").await.unwrap();
    assert_eq!(head(&store).await, Revision(1));
}

/// An index that follows a writer on this store.
async fn followed(store: &Arc<dyn Store>) -> (CommitHandle, Arc<Index>) {
    let index = Arc::new(Index::default());
    let loader: Arc<dyn SnapshotLoader> = index.clone();
    let head = store.stream_snapshot(Timestamp::from_micros(0), &loader).await.unwrap();
    index.finish_load(head.revision);
    (CommitHandle::spawn(store.clone(), index.clone(), || Timestamp::from_micros(0)).0, index)
}

fn known(index: &Index, id: &str) -> bool {
    index.account(&AccountId::parse(id).unwrap()).is_some()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_that_waits_for_a_frozen_standby_is_in_force_when_it_has_ended_after_all() {
    let cluster = PostgresServer::start(&[]);
    cluster.sql("postgres", "CREATE DATABASE keys OWNER keyward TEMPLATE template0");
    let store = store::open(&url(cluster.socket(), 5432, "keys")).await.unwrap();
    let (writer, index) = followed(&store).await;
    writer.write(account("acme")).await.unwrap();
    let standby = |names: &str| {
        cluster.sql("postgres", &format!("ALTER SYSTEM SET synchronous_standby_names = '{names}'"));
        cluster.sql("postgres", "SELECT pg_reload_conf()");
        wait_for("the server to know", || {
            (cluster.sql("postgres", "SHOW synchronous_standby_names") == names).then_some(())
        });
    };
    standby("nobody");
    let lost = writer.write(account("other")).await;
    assert!(matches!(lost, Err(WriteError::Unknown(_))), "{lost:?}");
    standby("");
    writer.wait_caught_up().await.unwrap();
    assert!(known(&index, "other"), "the log has decided, and it holds the change");
    writer.write(account("third")).await.unwrap();
    assert_eq!(index.revision(), Some(Revision(3)));
    store.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_recorded_is_in_force_before_it_is_told_of() {
    let database = PostgresDatabase::new();
    let store = open(&database).await;
    let (writer, index) = followed(&store).await;
    // As a commit whose answer is on its way.
    commit(&store, "acme").await.unwrap();
    assert!(!known(&index, "acme"));
    writer.wait_applied(Revision(1)).await.unwrap();
    assert!(known(&index, "acme"));
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_recorded_in_a_database_that_has_lost_what_was_acknowledged() {
    let database = PostgresDatabase::new();
    let store = open(&database).await;
    for id in ["one", "two", "three"] {
        commit(&store, id).await.unwrap();
    }
    // As after a standby took over that lacked the newest, or a backup was restored.
    database.sql(
        "BEGIN; DELETE FROM keyward.log WHERE revision = 3; DELETE FROM keyward.accounts WHERE id = 'three'; \
         UPDATE keyward.meta SET head = 2, head_hash = (SELECT hash FROM keyward.log WHERE revision = 2); COMMIT",
    );
    let error = commit(&store, "four").await.unwrap_err();
    assert!(matches!(error, CommitError::NotRecorded(_)), "{error:?}");
}

/// The database's server, and another that goes on from a copy of its data.
fn two_servers() -> (PostgresServer, PostgresServer) {
    let copy = |from: &Path, to: &Path| run_checked(Command::new("cp").arg("-a").arg(from).arg(to));
    let (mut replaced, mut now) = (PostgresServer::start(&[]), PostgresServer::start(&[]));
    replaced.sql("postgres", "CREATE DATABASE keys OWNER keyward TEMPLATE template0");
    replaced.restart(|old| {
        now.restart(|data| {
            std::fs::remove_dir_all(data).unwrap();
            copy(old, data);
        });
    });
    (replaced, now)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_replaced_server_has_said_is_not_proven_by_a_commit_on_another() {
    let (replaced, now) = two_servers();
    let way = replaced.socket().join("way");
    std::os::unix::fs::symlink(replaced.socket(), &way).unwrap();
    for cluster in [&replaced, &now] {
        open_at(&url(cluster.socket(), 5432, "keys")).await.close().await;
    }
    let store = open_at(&url(&way, 5432, "keys")).await;
    let fleet = store.clone().replica_registry().unwrap();
    // The pool's connections lead to the one that was replaced, and new ones to the other.
    head(&store).await;
    std::fs::remove_file(&way).unwrap();
    std::os::unix::fs::symlink(now.socket(), &way).unwrap();
    let id = ReplicaId(uuid::Uuid::from_u128(1));
    fleet.register(id, "r").await.unwrap();
    let began = tokio::time::Instant::now();
    assert!(
        store.is_single_server_since(began) && fleet.confirm_primary(id, began).await.unwrap(),
        "nothing was read"
    );
    head(&store).await;
    assert!(!store.is_single_server_since(began));
    assert!(!fleet.confirm_primary(id, began).await.unwrap(), "it was read from the other server");
    store.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_renewal_acknowledges_only_what_the_log_holds_and_counts_once() {
    let database = PostgresDatabase::new();
    let store = open(&database).await;
    commit(&store, "acme").await.unwrap();
    commit(&store, "globex").await.unwrap();
    let [first, second] = store.list_log_after(Revision(0), 2).await.unwrap().try_into().unwrap();
    let fleet = store.replica_registry().unwrap();
    let id = ReplicaId(uuid::Uuid::from_u128(1));
    fleet.register(id, "r").await.unwrap();
    let renew = async |next, at: Option<LogPosition>| {
        let counts = RenewalSequence { confirmed: 0, next };
        let renewal = RenewalRequest {
            attempt: AttemptId(1),
            id,
            sequence: counts,
            applied: at,
            settle_incarnation: None,
        };
        fleet.renew_lease(&renewal).await.unwrap()
    };
    let applied =
        || database.sql("SELECT coalesce(applied::text, '-') || ' ' || renew_seq FROM keyward.replicas");
    assert!(renew(1, None).await.reply.was_renewed);
    assert_eq!(applied(), "- 1");
    let here = LogPosition { revision: first.revision, hash: first.hash };
    let told = renew(2, Some(here)).await;
    assert_eq!(
        (told.reply.was_renewed, told.reply.acknowledged_hash, told.entries),
        (true, Some(here.hash), vec![second.clone()])
    );
    let other = LogPosition { revision: second.revision, hash: first.hash };
    let told = renew(3, Some(other)).await;
    assert_eq!((told.reply.was_renewed, told.reply.acknowledged_hash), (false, Some(second.hash)));
    assert!(!renew(2, Some(here)).await.reply.was_renewed, "it has counted so far already");
    assert_eq!(applied(), "1 2");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_secrets_row_is_written_when_it_changes_and_not_else() {
    let database = PostgresDatabase::new();
    let server = TestHome::with_database_url(database.url()).start();
    server.root_caller().create_account("acme").await;
    let (id, _) = server.root_caller().create_key(plain_key_request()).await.unwrap();
    let (other, _) = server.root_caller().create_key(plain_key_request()).await.unwrap();
    let writes = |id: &str| {
        let sql = "SELECT string_agg(version || ':' || xmin, ' ' ORDER BY version) FROM keyward.secrets WHERE key_id";
        database.sql(&format!("{sql} = '\\x{}'", id.replace('-', "")))
    };
    let made = writes(&id);
    server.root_caller().revoke_key(&id).await.unwrap();
    assert_eq!(writes(&id), made);
    let made = writes(&other);
    server.root_caller().rotate_key(&other).await.unwrap();
    assert!(!writes(&other).starts_with(&made), "the first one's end stands in its row");
    server.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_that_ends_in_the_message_that_commits_leaves_open_what_the_log_then_decides() {
    let database = PostgresDatabase::new();
    let store = open(&database).await;
    trigger(&database, "", "PERFORM pg_sleep(60)");
    let committing = tokio::spawn({
        let store = store.clone();
        async move { commit(&store, "acme").await }
    });
    end_waiting(&database);
    let error = committing.await.unwrap().unwrap_err();
    assert!(matches!(error, CommitError::Unknown(StoreError::Unavailable(_))), "{error:?}");
    store.settle_pending_commits().await.unwrap();
    assert_eq!(head(&store).await, Revision(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_that_waits_too_long_for_its_turn_is_not_recorded() {
    let database = PostgresDatabase::new();
    let store = open(&database).await;
    let held = holding(&database, "SELECT * FROM keyward.meta FOR UPDATE").await;
    let error = commit(&store, "acme").await.unwrap_err();
    drop(held);
    assert!(matches!(error, CommitError::NotRecorded(StoreError::Unavailable(_))), "{error:?}");
    commit(&store, "acme").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_while_others_commit_finds_the_log_whole() {
    let database = PostgresDatabase::new();
    let store = open(&database).await;
    let is_over = Arc::new(AtomicBool::new(false));
    let committing = tokio::spawn({
        let is_over = is_over.clone();
        async move {
            let mut committed = 0;
            while !is_over.load(Ordering::Relaxed) {
                commit(&store, &format!("a{committed}")).await.unwrap();
                committed += 1;
            }
            committed
        }
    });
    for _ in 0..20 {
        open(&database).await.close().await;
    }
    is_over.store(true, Ordering::Relaxed);
    assert!(committing.await.unwrap() > 0, "none was committed meanwhile");
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_that_ended_while_idle_are_not_noticed() {
    let database = PostgresDatabase::new();
    let store = open(&database).await;
    // Several, so that the pool has several idle.
    let reads = (0..6).map(|_| {
        tokio::spawn({
            let store = store.clone();
            async move { store.log_head().await.unwrap() }
        })
    });
    for read in reads.collect::<Vec<_>>() {
        read.await.unwrap();
    }
    let end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity \
               WHERE application_name = 'keyward' AND datname = current_database()";
    for id in ["acme", "globex"] {
        database.sql(end);
        commit(&store, id).await.unwrap();
        database.sql(end);
        assert!(store.get_account(&AccountId::parse(id).unwrap()).await.unwrap().is_some());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_read_that_is_given_up_leaves_no_transaction_behind() {
    let database = PostgresDatabase::new();
    let store = open(&database).await;
    let sessions = |state: &str| {
        database.sql(&format!(
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'keyward' AND {state} \
             AND datname = current_database()"
        ))
    };
    let locked = holding(&database, "LOCK TABLE keyward.accounts").await;
    let reading = tokio::spawn({
        let store = store.clone();
        async move { store.list_accounts(None, 1).await }
    });
    wait_for("a read to wait", || (sessions("wait_event_type = 'Lock'") == "1").then_some(()));
    reading.abort();
    drop(locked);
    let given_up = Instant::now();
    wait_for("no transaction to be open", || (sessions("state <> 'idle'") == "0").then_some(()));
    assert!(given_up.elapsed() < Duration::from_secs(8), "by then the server ends what we forgot");
    commit(&store, "acme").await.unwrap();
    assert_eq!(store.list_accounts(None, 10).await.unwrap().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_not_there_is_named_with_the_cause() {
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let said = refusal(&format!("postgres://u:secret@{nobody}/keys")).await.to_string();
    assert!(said.contains(&format!("postgres://127.0.0.1:{}/keys", nobody.port())), "{said}");
    assert!(said.contains("Connection refused") && !said.contains("secret"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_says_nothing_is_given_up() {
    let deaf = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("postgres://u:secret@{}/keys?sslmode=disable", deaf.local_addr().unwrap());
    let error = tokio::time::timeout(Duration::from_secs(30), refusal(&url)).await.unwrap();
    assert!(
        matches!(error, OpenError::Unreachable { .. }) && !error.to_string().contains("secret"),
        "{error}"
    );
}

// What the server must be. -------------------------------------------------------------------------------------------

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_may_lose_changes_or_lag_is_refused() {
    let mut cluster = PostgresServer::start(&["fsync=off"]);
    let said = refusal(&url(cluster.socket(), 5432, "postgres")).await.to_string();
    assert!(said.contains("its fsync is off") && said.contains("Set fsync = on"), "{said}");
    cluster.restart(|data| std::fs::write(data.join("standby.signal"), "").unwrap());
    let said = refusal(&url(cluster.socket(), 5432, "postgres")).await.to_string();
    assert!(said.contains("a standby") && said.contains("Name the primary"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn commits_wait_for_the_disk_whatever_the_databases_default_is() {
    let database = PostgresDatabase::new();
    database.sql(&format!("ALTER DATABASE {} SET synchronous_commit = off", database.name));
    let store = open(&database).await;
    database.sql("CREATE TABLE public.seen (setting TEXT); GRANT INSERT ON public.seen TO keyward");
    trigger(&database, "", "INSERT INTO public.seen VALUES (current_setting('synchronous_commit'))");
    commit(&store, "acme").await.unwrap();
    assert_eq!(database.sql("SELECT setting FROM public.seen"), "on");
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_listens_hears_where_the_head_is() {
    let database = PostgresDatabase::new();
    let store = open(&database).await;
    let mut listener = sqlx::postgres::PgListener::connect(&database.url()).await.unwrap();
    listener.listen("keyward").await.unwrap();
    commit(&store, "acme").await.unwrap();
    store.commit(&[account("globex"), account("initech")]).await.unwrap();
    assert_eq!(listener.recv().await.unwrap().payload(), "1");
    assert_eq!(listener.recv().await.unwrap().payload(), "3", "one for a batch");
}

// The role, the schema, the tables. ----------------------------------------------------------------------------------

#[tokio::test(flavor = "multi_thread")]
async fn schemas_of_one_database_are_stores_of_their_own() {
    let database = PostgresDatabase::new();
    let first = open(&database).await;
    let second = store::open(&format!("{}&schema=second", database.url())).await.unwrap();
    commit(&first, "acme").await.unwrap();
    commit(&second, "acme").await.unwrap();
    assert_eq!((head(&first).await, head(&second).await), (Revision(1), Revision(1)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_role_that_may_make_no_schema_uses_one_that_was_made_for_it() {
    let database = PostgresDatabase::new();
    database.sql(&format!("ALTER DATABASE {} OWNER TO postgres", database.name));
    let said = refusal(&database.url()).await.to_string();
    assert!(said.contains("permission denied") && said.contains("CREATE SCHEMA"), "{said}");
    database.sql("CREATE SCHEMA keyward AUTHORIZATION keyward");
    commit(&open(&database).await, "acme").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_log_is_not_changed_by_keywards_own_role() {
    let database = PostgresDatabase::new();
    let _store = open(&database).await;
    for (right, has) in
        [("SELECT", "t"), ("INSERT", "t"), ("UPDATE", "f"), ("DELETE", "f"), ("TRUNCATE", "f")]
    {
        let asked = format!("SELECT has_table_privilege('keyward', 'keyward.log', '{right}')");
        assert_eq!(database.sql(&asked), has, "{right}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_schema_that_is_newer_or_other_is_refused() {
    let database = PostgresDatabase::new();
    open(&database).await.close().await;
    database.sql("INSERT INTO keyward.migrations VALUES (9999, 'later', '')");
    let error = refusal(&database.url()).await;
    assert!(matches!(error, OpenError::NewerSchema { found: 9999, .. }), "{error}");
    database.sql("DELETE FROM keyward.migrations WHERE version = 9999");
    database.sql("UPDATE keyward.migrations SET checksum = 'x' WHERE version = 1");
    let error = refusal(&database.url()).await;
    assert!(
        matches!(error, OpenError::Damaged { .. }) && error.to_string().contains("migration 1"),
        "{error}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_was_touched_is_refused_at_the_start() {
    for (touch, said) in [
        (
            "UPDATE keyward.log SET payload = payload || ' ' WHERE revision = 2",
            "hash chain breaks at entry 2",
        ),
        ("DELETE FROM keyward.log WHERE revision = 3", "ends at 2, and should end at 3"),
        ("DELETE FROM keyward.log WHERE revision = 1", "hash chain breaks at entry 1"),
    ] {
        let database = PostgresDatabase::new();
        let store = open(&database).await;
        for id in ["acme", "globex", "initech"] {
            commit(&store, id).await.unwrap();
        }
        store.close().await;
        database.sql(touch);
        let error = refusal(&database.url()).await;
        assert!(matches!(error, OpenError::Damaged { .. }) && error.to_string().contains(said), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_was_touched_is_refused_instead_of_believed() {
    let database = PostgresDatabase::new();
    let store = open(&database).await;
    commit(&store, "acme").await.unwrap();
    database.sql("UPDATE keyward.accounts SET suspended_at = 1");
    let read = store.get_account(&AccountId::parse("acme").unwrap()).await.unwrap_err();
    let load = snapshot_loader::load_snapshot(&store, Timestamp::from_micros(0)).await.unwrap_err();
    assert!(matches!((&read, &load), (StoreError::Damaged(_), StoreError::Damaged(_))), "{read} {load}");
}
