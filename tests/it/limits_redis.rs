//! Rate limits that several servers count together, in a real Redis: how many they allow, that Redis counts as one
//! process does, and what becomes of a Check when Redis does not answer.

use std::{path::Path, sync::Arc, time::Duration};

use keyward::{
    clock::{Clock as _, ManualClock, SystemEntropy},
    config::server::{DatabaseArgs, ServerSettings},
    domain::policy_decision::Reason,
    engine::{
        CheckError,
        limiter::{ClockSource, Consumption, KeyLimitState, LimitSettings, RedisOutcome, RedisSettings},
    },
    pb,
};
use rand::{RngExt as _, SeedableRng as _, rngs::ChaCha8Rng};
use tonic::{Code, transport::Channel};

use crate::{
    engine_replicas::{EngineReplica, LimitedKey, rate_limit, start_clock, with_deny_on_failure},
    process::{AuthorizedClients, TestHome, check_request, plain_key_request, wait_for, wait_for_answer},
    redis_server::RedisServer,
    support::{DAY, assert_refused, proto_seconds},
};

const SECOND: Duration = Duration::from_secs(1);
const A_DAY: Duration = Duration::from_secs(DAY);
/// Shorter than the tests' machine may take for a call: for a Redis that never answers.
const SHORT: Duration = Duration::from_millis(20);

fn redis_limit_settings(redis: RedisSettings) -> LimitSettings {
    LimitSettings { shared: true, redis: Some(redis) }
}

// ---- two servers ----

/// Two servers that know the same keys: each has a copy of the database that they were made in.
struct TwoServers {
    servers: Vec<keyward::server::Server>,
    root: String,
    _folder: tempfile::TempDir,
}

async fn start(database: &Path, limits: LimitSettings, clock: Arc<ManualClock>) -> keyward::server::Server {
    let mut settings = ServerSettings::load_for_database(&DatabaseArgs::default()).unwrap();
    settings.listen = "127.0.0.1:0".to_owned();
    settings.admin_listen = "127.0.0.1:0".to_owned();
    settings.database = format!("sqlite:{}", database.display()).into();
    settings.threads = 2;
    settings.limits = limits;
    keyward::server::Server::start(settings, clock, Arc::new(SystemEntropy)).await.unwrap()
}

fn caller(server: &keyward::server::Server, token: &str) -> AuthorizedClients {
    let channel = Channel::from_shared(format!("http://{}", server.address)).unwrap().connect_lazy();
    AuthorizedClients::with_token(channel, token)
}

impl TwoServers {
    /// The servers, and the tokens of keys made so.
    async fn start(keys: &[pb::CreateKeyRequest], limits: &LimitSettings) -> (TwoServers, Vec<String>) {
        let (folder, clock) = (tempfile::tempdir().unwrap(), start_clock());
        let made_in = folder.path().join("keyward.db");
        let first = start(&made_in, LimitSettings::default(), clock.clone()).await;
        let root = first.root_token.as_ref().unwrap().reveal().to_owned();
        let mut operator = caller(&first, &root);
        operator.create_account("acme").await;
        let mut tokens = Vec::new();
        for key in keys {
            tokens.push(operator.create_key(key.clone()).await.unwrap().1);
        }
        first.stop().await;
        let mut servers = Vec::new();
        for name in ["one.db", "two.db"] {
            let file = folder.path().join(name);
            std::fs::copy(&made_in, &file).unwrap();
            servers.push(start(&file, limits.clone(), clock.clone()).await);
        }
        (TwoServers { servers, root, _folder: folder }, tokens)
    }

    fn caller(&self, at: usize) -> AuthorizedClients {
        caller(&self.servers[at], &self.root)
    }

    async fn ask(&self, at: usize, token: &str) -> pb::CheckResponse {
        self.caller(at).authz.check(check_request(token)).await.unwrap().into_inner()
    }
}

fn limited(limits: &[(&str, u64)]) -> pb::CreateKeyRequest {
    let limit = |(name, limit): &(&str, u64)| pb::RateLimit {
        name: (*name).to_owned(),
        limit: *limit,
        window: Some(proto_seconds(DAY)),
    };
    pb::CreateKeyRequest { rate_limits: limits.iter().map(limit).collect(), ..plain_key_request() }
}

fn remaining_units(answer: &pb::CheckResponse) -> Vec<u64> {
    answer.rate_limits.iter().map(|state| state.remaining).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_is_charged_to_its_caller_on_every_server_and_one_that_does_not_fit_on_none() {
    let redis = RedisServer::start();
    let scopes = vec!["keyward:check".to_owned()];
    let keys = [pb::CreateKeyRequest { scopes, ..limited(&[("calls", 5)]) }];
    let (two, tokens) = TwoServers::start(&keys, &redis_limit_settings(redis.settings())).await;
    let batch = async |at: usize, checks| {
        let request = pb::BatchCheckRequest { checks: vec![check_request("x"); checks] };
        caller(&two.servers[at], &tokens[0]).authz.batch_check(request).await
    };
    batch(0, 3).await.unwrap();
    assert_refused(batch(1, 3).await, Code::ResourceExhausted, "CALLER_LIMITED");
    batch(1, 2).await.unwrap();
    assert_refused(batch(0, 1).await, Code::ResourceExhausted, "CALLER_LIMITED");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sixty_four_callers_of_two_servers_get_exactly_the_limit() {
    let redis = RedisServer::start();
    let keys = [limited(&[("wide", 1000), ("requests", 100)])];
    let (two, tokens) = TwoServers::start(&keys, &redis_limit_settings(redis.settings())).await;
    let connections: Vec<_> = (0..8).map(|at| two.caller(at % 2)).collect();
    let callers = (0..64).map(|at| {
        let (mut authz, request) = (connections[at % 8].authz.clone(), check_request(&tokens[0]));
        tokio::spawn(async move {
            let mut allowed = 0;
            for _ in 0..4 {
                let answer = authz.check(request.clone()).await.unwrap().into_inner();
                assert!(!answer.limits_inexact);
                allowed += usize::from(answer.allowed);
            }
            allowed
        })
    });
    let mut allowed = 0;
    for caller in callers.collect::<Vec<_>>() {
        allowed += caller.await.unwrap();
    }
    assert_eq!(allowed, 100);
    for at in 0..2 {
        let denied = two.ask(at, &tokens[0]).await;
        assert_eq!(denied.reason(), pb::Reason::RateLimited);
        assert_eq!(remaining_units(&denied), [900, 0], "the refused ones took nothing from the other limit");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_takes_check_by_check_from_all_servers_limits() {
    let redis = RedisServer::start();
    let (two, tokens) =
        TwoServers::start(&[limited(&[("requests", 3)])], &redis_limit_settings(redis.settings())).await;
    assert!(two.ask(0, &tokens[0]).await.allowed);
    let batch = pb::BatchCheckRequest { checks: vec![check_request(&tokens[0]); 4] };
    let results = two.caller(1).authz.batch_check(batch).await.unwrap().into_inner().results;
    let verdicts: Vec<_> = results.iter().map(|answer| answer.allowed).collect();
    assert_eq!(verdicts, [true, true, false, false]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_redis_leaves_each_server_to_count_by_itself_until_it_is_back() {
    let mut redis = RedisServer::start();
    let keys = [limited(&[("requests", 3)]), plain_key_request()];
    let (two, tokens) = TwoServers::start(&keys, &redis_limit_settings(redis.settings())).await;
    assert!(!two.ask(0, &tokens[0]).await.limits_inexact);
    redis.kill();
    for at in 0..2 {
        for expected in [true, true, true, false] {
            let answer = two.ask(at, &tokens[0]).await;
            assert_eq!((answer.allowed, answer.limits_inexact), (expected, true));
        }
        let free = two.ask(at, &tokens[1]).await;
        assert!(free.allowed && !free.limits_inexact, "a key without limits needs no Redis");
    }
    redis.restart();
    for at in 0..2 {
        wait_until_exact(&two, at, &tokens[0]).await;
    }
}

/// Waits until limits are counted in Redis again.
async fn wait_until_exact(two: &TwoServers, at: usize, token: &str) {
    let mut caller = two.caller(at);
    let dry = pb::CheckRequest { dry_run: true, ..check_request(token) };
    wait_for_answer("Redis to count again", async || {
        let answer = caller.authz.check(dry.clone()).await;
        answer.is_ok_and(|answer| !answer.into_inner().limits_inexact).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_redis_is_no_verdict_where_that_is_asked_for() {
    let mut redis = RedisServer::start();
    let management = pb::CreateKeyRequest {
        account: "keyward".to_owned(),
        scopes: vec!["keyward:check".to_owned()],
        ..limited(&[("calls", 100)])
    };
    let keys = [limited(&[("requests", 3)]), plain_key_request(), management];
    let (two, tokens) =
        TwoServers::start(&keys, &with_deny_on_failure(redis_limit_settings(redis.settings()))).await;
    assert!(two.ask(0, &tokens[0]).await.allowed);
    redis.kill();
    for at in 0..2 {
        let mut root = two.caller(at);
        assert_refused(
            root.authz.check(check_request(&tokens[0])).await,
            Code::Unavailable,
            "LIMITS_UNAVAILABLE",
        );
        let batch =
            pb::BatchCheckRequest { checks: vec![check_request(&tokens[1]), check_request(&tokens[0])] };
        assert_refused(root.authz.batch_check(batch).await, Code::Unavailable, "LIMITS_UNAVAILABLE");
        assert!(two.ask(at, &tokens[1]).await.allowed, "a key without limits needs no Redis");
        let mut limited = caller(&two.servers[at], &tokens[2]);
        assert_refused(
            limited.authz.check(check_request(&tokens[1])).await,
            Code::Unavailable,
            "LIMITS_UNAVAILABLE",
        );
        let mut denied = check_request(&tokens[0]);
        denied.environment = "staging".to_owned();
        let denied = root.authz.check(denied).await.unwrap().into_inner();
        assert_eq!(denied.reason(), pb::Reason::WrongEnvironment, "what is denied anyhow needs no Redis");
    }
    redis.restart();
    wait_until_exact(&two, 0, &tokens[0]).await;
    assert!(two.ask(0, &tokens[0]).await.allowed);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_starts_without_redis_and_finds_it_later() {
    let mut redis = RedisServer::start();
    redis.kill();
    let (two, tokens) =
        TwoServers::start(&[limited(&[("requests", 3)])], &redis_limit_settings(redis.settings())).await;
    assert!(two.ask(0, &tokens[0]).await.limits_inexact);
    redis.restart();
    wait_until_exact(&two, 0, &tokens[0]).await;
}

// ---- one replica, or two, without the wire ----

fn count(replica: &EngineReplica, call: RedisOutcome) -> u64 {
    replica.engine.limiter.redis_outcome_counts().find(|(known, _)| *known == call).unwrap().1
}

/// Waits until limits are counted in Redis again.
async fn exact_once_more(replica: &EngineReplica) {
    wait_for_answer("Redis to count again", async || {
        (!replica.check(1).await.unwrap().limits().is_inexact).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_redis_costs_a_few_checks_their_patience_and_then_none() {
    let redis = RedisServer::start();
    let settings = redis_limit_settings(RedisSettings { timeout: SHORT, ..redis.settings() });
    let limited = LimitedKey::new(1, vec![rate_limit("requests", 1_000_000, A_DAY)], None);
    let replica = EngineReplica::start(&limited, &settings, start_clock()).await;
    redis.pause();
    let mut asked = 0;
    wait_for_answer("the connection to be given up", async || {
        let answer = replica.check(1).await.unwrap();
        assert!(answer.limits().refusal_reasons.is_empty());
        asked += 1;
        (count(&replica, RedisOutcome::NotConnected) >= 100).then_some(())
    })
    .await;
    // Those in flight, and those that found the connection before it was taken away.
    assert!(count(&replica, RedisOutcome::TimedOut) < 20, "{asked} were asked");
    assert!(replica.check(1).await.unwrap().limits().is_inexact);
    redis.resume();
    exact_once_more(&replica).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_dies_while_nobody_asks_is_replaced() {
    let redis = RedisServer::start();
    let limited = LimitedKey::new(1, vec![rate_limit("requests", 10, A_DAY)], None);
    let replica =
        EngineReplica::start(&limited, &redis_limit_settings(redis.settings()), start_clock()).await;
    let before: String = redis.run_command(&["CLIENT", "LIST"]);
    let ours =
        before.lines().next().unwrap().split(' ').next().unwrap().strip_prefix("id=").unwrap().to_owned();
    let _: u64 = redis.run_command(&["CLIENT", "KILL", "ID", &ours]);
    wait_for("another connection", || {
        let now: String = redis.run_command(&["CLIENT", "LIST"]);
        (now.lines().count() == 2 && !now.contains(&format!("id={ours} "))).then_some(())
    });
    // Its first call may come before the replica knows of it.
    exact_once_more(&replica).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redis_that_has_forgotten_the_script_is_told_again() {
    let redis = RedisServer::start();
    let limited = LimitedKey::new(1, vec![rate_limit("requests", 10, A_DAY)], None);
    let replica =
        EngineReplica::start(&limited, &redis_limit_settings(redis.settings()), start_clock()).await;
    assert_eq!(replica.check(1).await.unwrap().limits().statuses[0].2.remaining, 9);
    let _: String = redis.run_command(&["SCRIPT", "FLUSH"]);
    let answer = replica.check(1).await.unwrap();
    assert_eq!((answer.limits().statuses[0].2.remaining, answer.limits().is_inexact), (8, false));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redis_that_refuses_to_count_is_no_verdict() {
    let redis = RedisServer::start();
    let limited = LimitedKey::new(1, vec![rate_limit("requests", 10, A_DAY)], None);
    let replica = EngineReplica::start(
        &limited,
        &with_deny_on_failure(redis_limit_settings(redis.settings())),
        start_clock(),
    )
    .await;
    let _: String = redis.run_command(&["CONFIG", "SET", "maxmemory", "1"]);
    for _ in 0..5 {
        assert_eq!(replica.check(1).await.unwrap_err(), CheckError::LimitsUnavailable);
    }
    let _: String = redis.run_command(&["CONFIG", "SET", "maxmemory", "0"]);
    wait_for_answer("Redis to count again", async || replica.check(1).await.ok().map(drop)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn names_in_redis_are_of_keys_and_limits_and_expire() {
    let redis = RedisServer::start();
    let limited = LimitedKey::new(1, vec![rate_limit("requests", 10, Duration::from_secs(60))], None);
    let replica =
        EngineReplica::start(&limited, &redis_limit_settings(redis.settings()), start_clock()).await;
    replica.check_as(1, Some("secret"), false).await.unwrap();
    let mut names: Vec<String> = redis.run_command(&["KEYS", "*"]);
    names.sort();
    let id = limited.key.id;
    assert_eq!(names[1], format!("test:{{{id}}}/requests/10/60000000"));
    assert!(names[0].starts_with(&format!("test:{{{id}}}#")) && names.len() == 2, "{names:?}");
    for name in &names {
        let lives: i64 = redis.run_command(&["PTTL", name]);
        assert!((0..=121_000).contains(&lives), "{name}: {lives}");
        assert!(!name.contains("secret") && !name.contains(limited.token.reveal()));
    }
    replica.check_as(1, None, true).await.unwrap();
    let more: Vec<String> = redis.run_command(&["KEYS", "*"]);
    assert_eq!(more.len(), 2, "a dry run leaves nothing");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_asked_again_of_another_replica_is_taken_once() {
    let redis = RedisServer::start();
    let limited = LimitedKey::new(1, vec![rate_limit("requests", 10, A_DAY)], Some(5));
    let settings = redis_limit_settings(redis.settings());
    let one = EngineReplica::start(&limited, &settings, start_clock()).await;
    let other = EngineReplica::start(&limited, &settings, start_clock()).await;
    let remaining = |answer: &keyward::engine::CheckOutcome| {
        answer.limits().statuses.iter().map(|(_, _, standing)| standing.remaining).collect::<Vec<_>>()
    };
    assert_eq!(remaining(&one.check_as(5, Some("7"), false).await.unwrap()), [5, 0]);
    let again = one.check_as(5, Some("7"), false).await.unwrap();
    assert_eq!(
        (again.reason(), remaining(&again)),
        (Reason::Ok, vec![5, 0]),
        "its quota is used up by itself"
    );
    let again = other.check_as(5, Some("7"), false).await.unwrap();
    assert_eq!((again.reason(), remaining(&again)), (Reason::Ok, vec![5, 5]));
    assert_eq!(one.check_as(1, Some("8"), false).await.unwrap().reason(), Reason::QuotaExceeded);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_check_takes_from_redis_and_the_quota_or_from_neither() {
    let redis = RedisServer::start();
    let limited = LimitedKey::new(1, vec![rate_limit("requests", 10, A_DAY)], Some(12));
    let replica =
        EngineReplica::start(&limited, &redis_limit_settings(redis.settings()), start_clock()).await;
    for (cost, reason, left) in [
        (8, Reason::Ok, [2, 4]),
        (3, Reason::RateLimited, [2, 4]),
        (5, Reason::RateLimited, [2, 4]),
        (2, Reason::Ok, [0, 2]),
    ] {
        let answer = replica.check(cost).await.unwrap();
        let told: Vec<_> = answer.limits().statuses.iter().map(|(_, _, limit)| limit.remaining).collect();
        assert_eq!((answer.reason(), &*told), (reason, &left[..]), "{cost}");
    }
    let both = replica.check(3).await.unwrap();
    assert_eq!(both.limits().refusal_reasons, [Reason::RateLimited, Reason::QuotaExceeded]);
    let limited = LimitedKey::new(2, vec![rate_limit("requests", 10, A_DAY)], Some(2));
    let replica =
        EngineReplica::start(&limited, &redis_limit_settings(redis.settings()), start_clock()).await;
    for (cost, reason) in [(2, Reason::Ok), (1, Reason::QuotaExceeded), (9, Reason::RateLimited)] {
        let answer = replica.check(cost).await.unwrap();
        assert_eq!((answer.reason(), answer.limits().statuses[0].2.remaining), (reason, 8), "{cost}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn more_checks_at_once_than_a_block_has_units_are_refused_by_their_rate_limit_and_no_fault() {
    let redis = RedisServer::start();
    let limited = LimitedKey::new(1, vec![rate_limit("requests", 1, A_DAY)], Some(100));
    let replica =
        EngineReplica::start(&limited, &redis_limit_settings(redis.settings()), start_clock()).await;
    assert_eq!(replica.check(1).await.unwrap().reason(), Reason::Ok);
    let flood = (0..100).map(|_| replica.check(1));
    for answer in futures_util::future::join_all(flood).await {
        assert_eq!(answer.unwrap().reason(), Reason::RateLimited);
    }
}

/// Checks at odd times and costs, by the clock of the process: Redis and the process say the same of each, to the
/// microsecond.
#[tokio::test(flavor = "multi_thread")]
async fn redis_counts_as_one_process_does() {
    let redis = RedisServer::start();
    let settings =
        redis_limit_settings(RedisSettings { clock_source: ClockSource::Local, ..redis.settings() });
    let mut dice = ChaCha8Rng::seed_from_u64(5);
    for number in 0..40 {
        let limits: Vec<_> = (0..=number % 3)
            .map(|at| {
                let window =
                    Duration::from_secs(dice.random_range(1..=DAY) >> dice.random_range(0..16)).max(SECOND);
                rate_limit(
                    &format!("l{at}"),
                    1 + (dice.random_range(0..1_000_000_000) >> dice.random_range(0..30)),
                    window,
                )
            })
            .collect();
        let limited = LimitedKey::new(number, limits.clone(), None);
        let clock = start_clock();
        let there = EngineReplica::start(&limited, &settings, clock.clone()).await;
        let here = EngineReplica::start(&limited, &LimitSettings::default(), clock.clone()).await;
        for step in 0..40 {
            let smallest = limits.iter().map(|limit| limit.limit).min().unwrap();
            let window = limits[0].window.as_micros() as u64;
            clock.advance(Duration::from_micros(dice.random_range(0..=window) >> dice.random_range(0..40)));
            let cost = 1 + (dice.random_range(0..smallest + smallest / 4 + 1) >> dice.random_range(0..6));
            let dry_run = dice.random_range(0..8) == 0;
            let [there, here] = [&there, &here].map(|replica| replica.check_as(cost, None, dry_run));
            let (there, here) = (there.await.unwrap(), here.await.unwrap());
            assert!(!there.limits().is_inexact);
            assert_eq!(there.limits().statuses, here.limits().statuses, "{limits:?} step {step} cost {cost}");
            assert_eq!(there.limits().refusal_reasons, here.limits().refusal_reasons);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clock_that_was_set_back_counts_in_redis_as_in_one_process() {
    let redis = RedisServer::start();
    let settings =
        redis_limit_settings(RedisSettings { clock_source: ClockSource::Local, ..redis.settings() });
    let limited = LimitedKey::new(1, vec![rate_limit("requests", 7, Duration::from_secs(60))], None);
    for back in [0, 1, 30, 59, 60, 61, 100_000] {
        let _: String = redis.run_command(&["FLUSHALL"]);
        let (earlier, later) = (start_clock(), start_clock());
        later.advance(Duration::from_secs(back));
        let budget = KeyLimitState::default();
        let mut expected = Vec::new();
        let mut told = Vec::new();
        for (now, cost) in [(later, 3), (earlier, 2)] {
            let take = Consumption { cost, dedup_id: None, dry_run: false };
            expected.push(budget.consume(&*limited.key, take, false, now.now()).unwrap().statuses);
            let replica = EngineReplica::start(&limited, &settings, now).await;
            told.push(replica.check(cost).await.unwrap().limits().statuses.clone());
        }
        assert_eq!(told, expected, "{back} s");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_quota_refuses_is_refused_without_redis_too() {
    let mut redis = RedisServer::start();
    let limited = LimitedKey::new(1, vec![rate_limit("requests", 10, A_DAY)], Some(2));
    let replica = EngineReplica::start(
        &limited,
        &with_deny_on_failure(redis_limit_settings(redis.settings())),
        start_clock(),
    )
    .await;
    redis.kill();
    assert_eq!(replica.check(2).await.unwrap_err(), CheckError::LimitsUnavailable);
    let refused = replica.check(3).await.unwrap();
    assert_eq!((refused.reason(), refused.limits().is_inexact), (Reason::QuotaExceeded, true));
    assert_eq!(refused.limits().statuses[1].2.remaining, 2, "what was not answered has taken nothing");
}

// ---- the real binary ----

#[tokio::test(flavor = "multi_thread")]
async fn a_password_of_redis_is_used_and_never_printed() {
    let redis = RedisServer::start();
    let _: String = redis.run_command(&["CONFIG", "SET", "requirepass", "sesame"]);
    let home = TestHome::new();
    std::fs::write(home.path("keyward.toml"), "[limits]\nbackend = 'redis'\ntimeout = '1s'\n").unwrap();
    let socket = redis.url();
    for (password, inexact) in [("sesame", false), ("open-sesame", true)] {
        let mut command = home.serve_command();
        command.args(["--config", "keyward.toml", "--log", "trace"]);
        command.env("KEYWARD_LIMITS_URL", format!("{socket}?pass={password}"));
        let server = home.start_with(command).unwrap();
        let mut root = server.root_caller();
        if !inexact {
            root.create_account("acme").await;
        }
        let (_, token) = root.create_key(limited(&[("requests", 5)])).await.unwrap();
        let answer = root.authz.check(check_request(&token)).await.unwrap().into_inner();
        assert_eq!((answer.allowed, answer.limits_inexact), (true, inexact), "{}", server.process.stderr());
        let metrics = server.fetch_admin_page("/metrics").1;
        let [answered, unconnected, alone] = if inexact { [0, 1, 1] } else { [1, 0, 0] };
        for line in [
            format!("keyward_limits_redis_calls_total{{result=\"answered\"}} {answered}\n"),
            format!("keyward_limits_redis_calls_total{{result=\"unconnected\"}} {unconnected}\n"),
            format!("keyward_limits_fallbacks_total {alone}\n"),
        ] {
            assert!(metrics.contains(&line), "{line}{metrics}");
        }
        assert_eq!(
            server.process.stderr().contains("AuthenticationFailed"),
            inexact,
            "{}",
            server.process.stderr()
        );
        assert!(!server.process.stderr().contains("sesame"));
        assert!(!server.process.stdout().contains("sesame"));
        server.stop();
    }
}

#[test]
fn a_wrong_url_of_redis_stops_the_start_without_being_repeated() {
    let home = TestHome::new();
    std::fs::write(home.path("keyward.toml"), "[limits]\nbackend = 'redis'\n").unwrap();
    for (url, said) in [(None, "KEYWARD_LIMITS_URL"), (Some("http://:sesame@h"), "redis://")] {
        let mut command = home.serve_command();
        command.args(["--config", "keyward.toml"]);
        command.envs(url.map(|url| ("KEYWARD_LIMITS_URL", url)));
        let refusal = home.run_expecting_failure(command);
        assert!(refusal.contains(said) && !refusal.contains("sesame"), "{refusal}");
    }
}
