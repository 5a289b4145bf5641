//! Quotas that several replicas draw from one database: by how much they may be overspent, and what becomes of a Check
//! when the database does not count.

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use keyward::{
    domain::{
        account::Account,
        limit::QuotaUsage,
        log::{Actor, AuditAction, RecordChange},
        name::DisplayName,
        policy_decision::Reason,
        time::{Revision, Timestamp},
    },
    engine::{CheckError, CheckOutcome, limiter::LimitSettings, usage::FlushMode},
    store::{self, ReadSet, SnapshotRecord, Store, WriteRequest},
};

use crate::{
    engine_replicas::{EngineReplica, LimitedKey, rate_limit, start_clock},
    redis_server::RedisServer,
    snapshot_loader,
    support::{DAY, START},
};

fn shared() -> LimitSettings {
    LimitSettings { shared: true, redis: None }
}

/// A store that has the key.
async fn open_store(folder: &Path, limited: &LimitedKey) -> Arc<dyn Store> {
    let store = store::open(&format!("sqlite:{}", folder.join("keyward.db").display())).await.unwrap();
    let at = Timestamp::from_micros(0);
    let account = Account {
        id: limited.key.owner.account().unwrap().clone(),
        name: DisplayName::parse("Acme").unwrap(),
        suspended_at: None,
        longest_life: None,
        created_at: at,
        updated_at: at,
        revision: Revision::default(),
    };
    let write = |change, action| WriteRequest {
        change,
        expected_revision: None,
        action,
        actor: Actor::SYSTEM,
        method: "test",
        at,
        idempotency: None,
        read_set: ReadSet::default(),
        limits: None,
    };
    let account = write(RecordChange::Account(Arc::new(account)), AuditAction::AccountCreated);
    let key = write(RecordChange::Key(limited.key.clone()), AuditAction::KeyCreated);
    let committed = store.commit(&[account, key]).await.unwrap();
    assert!(committed.outcomes.iter().all(Result::is_ok), "{:?}", committed.outcomes);
    store
}

/// The database of a store that was closed, there again. It is a copy: another test may be starting a process, which
/// holds the lock on the file for an instant.
async fn reopen_copy(folder: &Path) -> Arc<dyn Store> {
    std::fs::copy(folder.join("keyward.db"), folder.join("again.db")).unwrap();
    store::open(&format!("sqlite:{}", folder.join("again.db").display())).await.unwrap()
}

/// Has a replica's quotas counted in this store when they cannot wait.
fn flush_quotas(replica: &EngineReplica, store: &Arc<dyn Store>) -> tokio::task::JoinHandle<()> {
    let (usage, store) = (replica.engine.usage.clone(), store.clone());
    tokio::spawn(async move { usage.run_quota_flusher(&*store).await })
}

/// What the store says that was spent.
async fn spent_units(store: &Arc<dyn Store>) -> u64 {
    let (_, items) = snapshot_loader::load_snapshot(store, Timestamp::from_micros(0)).await.unwrap();
    let spent = items.iter().find_map(|item| match item {
        SnapshotRecord::QuotaUsage(_, spent) => Some(spent.used_units),
        _ => None,
    });
    spent.unwrap_or_default()
}

async fn flush(replica: &EngineReplica, store: &Arc<dyn Store>) {
    replica.engine.usage.flush(&**store, FlushMode::Immediate).await.unwrap();
}

/// Asks until there is an answer: a database that is slow is no verdict.
async fn check_until_answered(replica: &EngineReplica) -> CheckOutcome {
    loop {
        match replica.check(1).await {
            Ok(answer) => return answer,
            Err(error) => assert_eq!(error, CheckError::QuotaUnavailable),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn two_replicas_overspend_a_quota_by_a_block_each_at_the_most() {
    const QUOTA: u64 = 1_000;
    const BLOCK: u64 = 50;
    let folder = tempfile::tempdir().unwrap();
    let limited = LimitedKey::new(1, vec![], Some(QUOTA));
    let store = open_store(folder.path(), &limited).await;
    let mut both = Vec::new();
    for _ in 0..2 {
        let replica = EngineReplica::start(&limited, &shared(), start_clock()).await;
        flush_quotas(&replica, &store);
        both.push(replica);
    }
    let allowed = Arc::new(AtomicU64::new(0));
    let callers = (0..64).map(|at| {
        let (replica, allowed) = (both[at % 2].clone(), allowed.clone());
        tokio::spawn(async move {
            for _ in 0..25 {
                let answer = check_until_answered(&replica).await;
                allowed.fetch_add(u64::from(answer.reason() == Reason::Ok), Ordering::Relaxed);
            }
        })
    });
    for caller in callers.collect::<Vec<_>>() {
        caller.await.unwrap();
    }
    let allowed = allowed.load(Ordering::Relaxed);
    assert!((QUOTA..=QUOTA + 2 * BLOCK).contains(&allowed), "{allowed}");
    for replica in &both {
        flush(replica, &store).await;
    }
    assert_eq!(spent_units(&store).await, allowed, "every unit was counted once");
    for replica in &both {
        assert_eq!(check_until_answered(replica).await.reason(), Reason::QuotaExceeded);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_after_the_other_two_replicas_hardly_overspend_a_small_quota() {
    let folder = tempfile::tempdir().unwrap();
    let limited = LimitedKey::new(1, vec![], Some(10));
    let store = open_store(folder.path(), &limited).await;
    let one = EngineReplica::start(&limited, &shared(), start_clock()).await;
    let other = EngineReplica::start(&limited, &shared(), start_clock()).await;
    let mut allowed = 0;
    for _ in 0..20 {
        for replica in [&one, &other] {
            allowed += usize::from(check_until_answered(replica).await.reason() == Reason::Ok);
            flush(replica, &store).await;
        }
    }
    // Of the last unit the other one hears with its own next one.
    assert!((10..=11).contains(&allowed), "{allowed}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_is_away_is_no_verdict_on_a_shared_quota() {
    let folder = tempfile::tempdir().unwrap();
    let limited = LimitedKey::new(1, vec![], Some(60));
    let away = open_store(folder.path(), &limited).await;
    let replica = EngineReplica::start(&limited, &shared(), start_clock()).await;
    let drawing = flush_quotas(&replica, &away);
    away.close().await;
    for _ in 0..50 {
        assert_eq!(replica.check(1).await.unwrap().reason(), Reason::Ok, "a block may wait");
    }
    for _ in 0..3 {
        assert_eq!(replica.check(1).await.unwrap_err(), CheckError::QuotaUnavailable);
    }
    assert_eq!(replica.check_as(1, None, true).await.unwrap().reason(), Reason::Ok, "nothing is taken");
    let certain = replica.check(11).await.unwrap();
    assert_eq!(certain.reason(), Reason::QuotaExceeded, "whatever others have used");
    drawing.abort();
    let store = reopen_copy(folder.path()).await;
    flush_quotas(&replica, &store);
    flush(&replica, &store).await;
    for _ in 0..10 {
        assert_eq!(check_until_answered(&replica).await.reason(), Reason::Ok);
    }
    assert_eq!(check_until_answered(&replica).await.reason(), Reason::QuotaExceeded);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_is_alone_waits_for_no_database() {
    let limited = LimitedKey::new(1, vec![], Some(100));
    let replica = EngineReplica::start(&limited, &LimitSettings::default(), start_clock()).await;
    for _ in 0..100 {
        assert_eq!(replica.check(1).await.unwrap().reason(), Reason::Ok);
    }
    assert_eq!(replica.check(1).await.unwrap().reason(), Reason::QuotaExceeded);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_used_while_a_write_failed_is_counted_once_when_it_succeeds() {
    let folder = tempfile::tempdir().unwrap();
    let limited = LimitedKey::new(1, vec![], Some(1_000));
    let away = open_store(folder.path(), &limited).await;
    let replica = EngineReplica::start(&limited, &LimitSettings::default(), start_clock()).await;
    away.close().await;
    replica.check(5).await.unwrap();
    assert!(replica.engine.usage.flush(&*away, FlushMode::Immediate).await.is_err());
    replica.check(6).await.unwrap();
    let store = reopen_copy(folder.path()).await;
    flush(&replica, &store).await;
    assert_eq!(spent_units(&store).await, 11);
    replica.check(7).await.unwrap();
    flush(&replica, &store).await;
    assert_eq!(spent_units(&store).await, 18);
    flush(&replica, &store).await;
    assert_eq!(spent_units(&store).await, 18, "nothing is written twice");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_hears_what_others_used_when_it_writes() {
    let folder = tempfile::tempdir().unwrap();
    let limited = LimitedKey::new(1, vec![], Some(10_000));
    let store = open_store(folder.path(), &limited).await;
    let one = EngineReplica::start(&limited, &shared(), start_clock()).await;
    let other = EngineReplica::start(&limited, &shared(), start_clock()).await;
    one.check(40).await.unwrap();
    flush(&one, &store).await;
    assert_eq!(other.check(1).await.unwrap().limits().statuses[0].2.remaining, 9_999);
    flush(&other, &store).await;
    assert_eq!(other.check(1).await.unwrap().limits().statuses[0].2.remaining, 9_958);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_quota_starts_afresh_with_its_period_in_the_database_too() {
    let folder = tempfile::tempdir().unwrap();
    let (limited, now) = (LimitedKey::new(1, vec![], Some(10)), start_clock());
    let store = open_store(folder.path(), &limited).await;
    let replica = EngineReplica::start(&limited, &shared(), now.clone()).await;
    replica.check(7).await.unwrap();
    flush(&replica, &store).await;
    replica.check(1).await.unwrap();
    now.advance(Duration::from_secs(DAY));
    assert_eq!(replica.check(10).await.unwrap().reason(), Reason::Ok);
    assert_eq!(replica.check(1).await.unwrap().reason(), Reason::QuotaExceeded);
    flush(&replica, &store).await;
    assert_eq!(spent_units(&store).await, 10);
    let budget = replica.engine.index.find_by_digest(&limited.token.digest()).unwrap().limit_state.unwrap();
    let total =
        QuotaUsage { period_start: Timestamp::from_micros((START + DAY as i64) * 1_000_000), used_units: 3 };
    budget.restore_usage(total);
    assert_eq!(replica.check(7).await.unwrap().reason(), Reason::Ok, "as after a start");
}

#[tokio::test(flavor = "multi_thread")]
async fn with_rate_limits_in_redis_a_quota_stays_in_the_database() {
    let (redis, folder) = (RedisServer::start(), tempfile::tempdir().unwrap());
    let limits = vec![rate_limit("requests", 1_000, Duration::from_secs(DAY))];
    let limited = LimitedKey::new(1, limits, Some(100));
    let store = open_store(folder.path(), &limited).await;
    let settings = LimitSettings { redis: Some(redis.settings()), ..shared() };
    let one = EngineReplica::start(&limited, &settings, start_clock()).await;
    let other = EngineReplica::start(&limited, &settings, start_clock()).await;
    for replica in [&one, &other] {
        assert_eq!(replica.check(30).await.unwrap().reason(), Reason::Ok);
        flush(replica, &store).await;
    }
    assert_eq!(spent_units(&store).await, 60);
    let told = other.check(1).await.unwrap().limits().statuses.clone();
    assert_eq!((told[0].2.remaining, told[1].2.remaining), (939, 39));
}
