//! Rate limits and quotas as a Check enforces them: what it takes, what it tells, and what never takes anything.
//! The arithmetic itself is tested in `domain::limit`.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use keyward::{
    clock::{Clock as _, ManualClock, SystemEntropy},
    config::server::{DatabaseArgs, ServerSettings},
    domain::time::Timestamp,
    pb::{self, Reason, authz_service_client::AuthzServiceClient, key_service_client::KeyServiceClient},
};
use tonic::{
    Code, Request,
    service::{Interceptor, interceptor::InterceptedService},
    transport::Channel,
};
use tonic_types::StatusExt as _;

use crate::support::{
    Client, CreatedKey, DAY, HOUR, START, Server, assert_invalid, assert_refused, authenticate_request,
    proto_seconds, scope_check_request, service_key_request, to_strings, user_key_request,
};

fn limit(name: &str, limit: u64, window: u64) -> pb::RateLimit {
    pb::RateLimit { name: name.to_owned(), limit, window: Some(proto_seconds(window)) }
}

fn quota(limit: u64, period: pb::QuotaPeriod) -> Option<pb::Quota> {
    Some(pb::Quota { limit, period: period.into() })
}

fn limited(rate_limits: &[pb::RateLimit]) -> pb::CreateKeyRequest {
    pb::CreateKeyRequest {
        rate_limits: rate_limits.to_vec(),
        ..service_key_request("acme", &["monitors:read"])
    }
}

fn with_quota(units: u64, period: pb::QuotaPeriod) -> pb::CreateKeyRequest {
    pb::CreateKeyRequest { quota: quota(units, period), ..limited(&[]) }
}

fn check_with_cost(token: &str, cost: u64) -> pb::CheckRequest {
    pb::CheckRequest { cost: Some(cost), ..authenticate_request(token) }
}

fn dry_run_check(token: &str) -> pb::CheckRequest {
    pb::CheckRequest { dry_run: true, ..authenticate_request(token) }
}

async fn ask(server: &Server, request: pb::CheckRequest) -> pb::CheckResponse {
    server.root_client().check(request).await.unwrap()
}

/// What is left of each limit, taking nothing.
async fn remaining_units(server: &Server, token: &str) -> Vec<(String, u64)> {
    let states = ask(server, dry_run_check(token)).await.rate_limits;
    states.into_iter().map(|state| (state.name, state.remaining)).collect()
}

fn named(list: &[(&str, u64)]) -> Vec<(String, u64)> {
    list.iter().map(|(name, left)| ((*name).to_owned(), *left)).collect()
}

/// How many of `times` Checks are allowed.
async fn allowed(server: &Server, token: &str, times: usize) -> usize {
    let mut allowed = 0;
    for _ in 0..times {
        allowed += usize::from(ask(server, authenticate_request(token)).await.allowed);
    }
    allowed
}

// ---- rate limits ----

#[tokio::test]
async fn a_check_tells_what_remains_and_when_all_is_there_again() {
    let server = Server::with_accounts().await;
    let made = server.create_key(limited(&[limit("requests", 3, 30)])).await;
    for (remaining, reset) in [(2, 10), (1, 20), (0, 30)] {
        let answer = ask(&server, authenticate_request(&made.token)).await;
        let state = &answer.rate_limits[0];
        assert_eq!((answer.allowed, answer.retry_after), (true, None));
        assert_eq!((state.name.as_str(), state.limit), ("requests", 3));
        assert_eq!((state.remaining, state.reset_after), (remaining, Some(proto_seconds(reset))));
    }
    let denied = ask(&server, authenticate_request(&made.token)).await;
    assert_eq!((denied.reason(), denied.retry_after), (Reason::RateLimited, Some(proto_seconds(10))));
    assert_eq!(denied.rate_limits[0].remaining, 0);
}

#[tokio::test]
async fn waiting_for_retry_after_is_enough_and_less_is_not() {
    let server = Server::with_accounts().await;
    let made = server.create_key(limited(&[limit("requests", 3, 30)])).await;
    assert_eq!(allowed(&server, &made.token, 4).await, 3);
    server.advance_by(Duration::from_micros(9_999_999));
    assert_eq!(allowed(&server, &made.token, 1).await, 0);
    server.advance_by(Duration::from_micros(1));
    assert_eq!(allowed(&server, &made.token, 2).await, 1);
    server.advance(30);
    assert_eq!(allowed(&server, &made.token, 4).await, 3, "a full burst again after a window");
}

#[tokio::test]
async fn a_check_takes_its_cost() {
    let server = Server::with_accounts().await;
    let made = server.create_key(limited(&[limit("units", 100, 100)])).await;
    assert_eq!(ask(&server, check_with_cost(&made.token, 70)).await.rate_limits[0].remaining, 30);
    let denied = ask(&server, check_with_cost(&made.token, 40)).await;
    assert_eq!((denied.reason(), denied.retry_after), (Reason::RateLimited, Some(proto_seconds(10))));
    assert_eq!(ask(&server, check_with_cost(&made.token, 30)).await.rate_limits[0].remaining, 0);
}

#[tokio::test]
async fn a_cost_above_the_limit_never_fits_and_no_wait_is_promised() {
    let server = Server::with_accounts().await;
    let made = server.create_key(limited(&[limit("units", 10, 60)])).await;
    let denied = ask(&server, check_with_cost(&made.token, 11)).await;
    assert_eq!((denied.reason(), denied.retry_after), (Reason::RateLimited, None));
    assert_eq!(denied.rate_limits[0].remaining, 10);
}

#[tokio::test]
async fn a_check_takes_from_every_limit_or_from_none() {
    let server = Server::with_accounts().await;
    let request = pb::CreateKeyRequest {
        quota: quota(100, pb::QuotaPeriod::Day),
        ..limited(&[limit("second", 2, 1), limit("minute", 50, 60)])
    };
    let made = server.create_key(request).await;
    assert_eq!(allowed(&server, &made.token, 5).await, 2);
    let expected = named(&[("second", 0), ("minute", 48), ("quota", 98)]);
    assert_eq!(remaining_units(&server, &made.token).await, expected, "the three refused ones took nothing");
}

#[tokio::test]
async fn the_wait_is_the_longest_of_all_limits() {
    let server = Server::with_accounts().await;
    let made = server.create_key(limited(&[limit("minute", 1, 60), limit("hour", 1, HOUR)])).await;
    assert_eq!(allowed(&server, &made.token, 1).await, 1);
    let denied = ask(&server, authenticate_request(&made.token)).await;
    assert_eq!(denied.retry_after, Some(proto_seconds(HOUR)));
}

#[tokio::test]
async fn no_wait_is_promised_where_another_limit_never_lets_the_request_through() {
    let server = Server::with_accounts().await;
    let credits = quota(1, pb::QuotaPeriod::Total);
    let request = pb::CreateKeyRequest { quota: credits, ..limited(&[limit("minute", 1, 60)]) };
    let made = server.create_key(request).await;
    assert_eq!(allowed(&server, &made.token, 1).await, 1);
    let denied = ask(&server, authenticate_request(&made.token)).await;
    assert_eq!(denied.failures, [Reason::RateLimited, Reason::QuotaExceeded].map(i32::from));
    assert_eq!(denied.retry_after, None, "credits do not come back");
}

#[tokio::test]
async fn a_dry_run_decides_and_takes_nothing() {
    let server = Server::with_accounts().await;
    let made = server.create_key(limited(&[limit("requests", 1, 60)])).await;
    for _ in 0..3 {
        let answer = ask(&server, dry_run_check(&made.token)).await;
        assert_eq!((answer.allowed, answer.rate_limits[0].remaining), (true, 1));
    }
    assert_eq!(allowed(&server, &made.token, 1).await, 1);
    assert_eq!(ask(&server, dry_run_check(&made.token)).await.reason(), Reason::RateLimited);
}

#[tokio::test]
async fn a_check_denied_for_another_reason_takes_nothing() {
    let server = Server::with_accounts().await;
    let request = pb::CreateKeyRequest {
        customers: to_strings(&["c1"]),
        quota: quota(5, pb::QuotaPeriod::Day),
        ..limited(&[limit("requests", 5, 60)])
    };
    let made = server.create_key(request).await;
    let customer = Some("c1".to_owned());
    let good = || pb::CheckRequest {
        customer: customer.clone(),
        ..scope_check_request(&made.token, "monitors:read")
    };
    let denied = [
        pb::CheckRequest { environment: "staging".to_owned(), ..good() },
        pb::CheckRequest { account: Some("other".to_owned()), ..good() },
        pb::CheckRequest { customer: None, ..good() },
        pb::CheckRequest { scopes: to_strings(&["monitors:write"]), ..good() },
    ];
    for request in denied {
        let answer = ask(&server, request).await;
        assert!(!answer.allowed && answer.rate_limits.is_empty(), "{answer:?}");
    }
    server.root_client().disable(&made.id).await.unwrap();
    assert_eq!(ask(&server, good()).await.reason(), Reason::Disabled);
    server.root_client().enable(&made.id).await.unwrap();
    let states = ask(&server, good()).await.rate_limits;
    assert_eq!(states.iter().map(|state| state.remaining).collect::<Vec<_>>(), [4, 4]);
}

#[tokio::test]
async fn both_secrets_of_a_rotation_share_one_budget() {
    let server = Server::with_accounts().await;
    let request = pb::CreateKeyRequest {
        quota: quota(9, pb::QuotaPeriod::Day),
        ..limited(&[limit("requests", 4, 60)])
    };
    let made = server.create_key(request).await;
    assert_eq!(allowed(&server, &made.token, 1).await, 1);
    let new = server.root_client().rotate(&made.id, HOUR).await.unwrap().token;
    assert_eq!(remaining_units(&server, &new).await, named(&[("requests", 3), ("quota", 8)]));
    assert_eq!(allowed(&server, &new, 1).await + allowed(&server, &made.token, 1).await, 2);
    assert_eq!(allowed(&server, &new, 5).await, 1);
    assert_eq!(allowed(&server, &made.token, 5).await, 0);
}

#[tokio::test]
async fn a_key_has_up_to_eight_named_limits() {
    let server = Server::with_accounts().await;
    let limits: Vec<_> = (1..=8).map(|n| limit(&format!("limit-{n}"), n * 10, 60)).collect();
    let made = server.create_key(limited(&limits)).await;
    assert_eq!(made.key.rate_limits, limits);
    let answer = ask(&server, authenticate_request(&made.token)).await;
    let told: Vec<_> = answer.rate_limits.iter().map(|state| (state.limit, state.remaining)).collect();
    assert_eq!(told, (1..=8).map(|n| (n * 10, n * 10 - 1)).collect::<Vec<_>>());
    let nine: Vec<_> = (1..=9).map(|n| limit(&format!("limit-{n}"), 1, 60)).collect();
    assert_invalid(server.root_client().create(limited(&nine)).await, &["rate_limits"]);
}

#[tokio::test]
async fn keys_do_not_share_budgets() {
    let server = Server::with_accounts().await;
    let request = || limited(&[limit("requests", 1, 60)]);
    let [first, second] = [server.create_key(request()).await, server.create_key(request()).await];
    assert_eq!(allowed(&server, &first.token, 2).await, 1);
    assert_eq!(allowed(&server, &second.token, 2).await, 1);
}

#[tokio::test]
async fn a_user_key_has_one_budget_in_all_accounts() {
    let server = Server::with_accounts().await;
    server.root_client().put_role("", "reader", &["monitors:read"]).await.unwrap();
    for account in ["acme", "other"] {
        server.root_client().put_member(account, "ann", "reader").await.unwrap();
    }
    let rate_limits = vec![limit("requests", 2, 60)];
    let made =
        server.create_key(pb::CreateKeyRequest { rate_limits, ..user_key_request("ann", &["all"]) }).await;
    for (account, expected) in [("acme", Reason::Ok), ("other", Reason::Ok), ("acme", Reason::RateLimited)] {
        let account = Some(account.to_owned());
        let asked = pb::CheckRequest { account, ..authenticate_request(&made.token) };
        assert_eq!(ask(&server, asked).await.reason(), expected);
    }
}

#[tokio::test]
async fn changes_that_leave_a_limit_as_it_is_leave_its_budget_as_it_is() {
    let server = Server::with_accounts().await;
    let request = pb::CreateKeyRequest {
        quota: quota(10, pb::QuotaPeriod::Day),
        ..limited(&[limit("requests", 5, 60)])
    };
    let made = server.create_key(request).await;
    assert_eq!(allowed(&server, &made.token, 2).await, 2);
    let changed = pb::Key {
        name: "renamed".to_owned(),
        scopes: to_strings(&["monitors:*"]),
        rate_limits: vec![limit("extra", 7, 60), limit("requests", 5, 60)],
        ..made.key.clone()
    };
    server.root_client().update(&changed, &["name", "scopes", "rate_limits"]).await.unwrap();
    server.root_client().disable(&made.id).await.unwrap();
    server.root_client().enable(&made.id).await.unwrap();
    let expected = named(&[("extra", 7), ("requests", 3), ("quota", 8)]);
    assert_eq!(remaining_units(&server, &made.token).await, expected);
}

#[tokio::test]
async fn a_changed_rate_limit_starts_full_and_a_changed_quota_keeps_what_was_spent() {
    let server = Server::with_accounts().await;
    let request = pb::CreateKeyRequest {
        quota: quota(10, pb::QuotaPeriod::Day),
        ..limited(&[limit("requests", 5, 60)])
    };
    let made = server.create_key(request).await;
    assert_eq!(allowed(&server, &made.token, 4).await, 4);
    let changed = pb::Key {
        rate_limits: vec![limit("requests", 6, 60)],
        quota: quota(20, pb::QuotaPeriod::Day),
        ..made.key.clone()
    };
    server.root_client().update(&changed, &["rate_limits", "quota"]).await.unwrap();
    assert_eq!(remaining_units(&server, &made.token).await, named(&[("requests", 6), ("quota", 16)]));
    let shrunk = pb::Key { quota: quota(3, pb::QuotaPeriod::Day), ..changed };
    server.root_client().update(&shrunk, &["quota"]).await.unwrap();
    assert_eq!(remaining_units(&server, &made.token).await, named(&[("requests", 6), ("quota", 0)]));
    assert_eq!(ask(&server, authenticate_request(&made.token)).await.reason(), Reason::QuotaExceeded);
}

#[tokio::test]
async fn a_limit_that_is_taken_away_limits_no_more() {
    let server = Server::with_accounts().await;
    let made = server.create_key(limited(&[limit("requests", 1, 60)])).await;
    assert_eq!(allowed(&server, &made.token, 2).await, 1);
    let free = pb::Key { rate_limits: vec![], ..made.key.clone() };
    server.root_client().update(&free, &["rate_limits"]).await.unwrap();
    assert_eq!(allowed(&server, &made.token, 20).await, 20);
    assert_eq!(ask(&server, authenticate_request(&made.token)).await.rate_limits, []);
}

// ---- quotas ----

#[tokio::test]
async fn a_quota_is_full_again_with_the_next_calendar_period() {
    let server = Server::with_accounts().await;
    server.advance(15 * 60);
    // 2026-01-01T00:15:00Z: how long until the next hour, day and month.
    let periods = [
        (pb::QuotaPeriod::Hour, 45 * 60),
        (pb::QuotaPeriod::Day, DAY - 15 * 60),
        (pb::QuotaPeriod::Month, 31 * DAY - 15 * 60),
    ];
    let mut keys = Vec::new();
    for (period, wait) in periods {
        let made = server.create_key(with_quota(2, period)).await;
        assert_eq!(allowed(&server, &made.token, 3).await, 2);
        let denied = ask(&server, authenticate_request(&made.token)).await;
        assert_eq!((denied.reason(), denied.retry_after), (Reason::QuotaExceeded, Some(proto_seconds(wait))));
        let state = &denied.rate_limits[0];
        let told = (state.name.as_str(), state.limit, state.remaining, state.reset_after);
        assert_eq!(told, ("quota", 2, 0, Some(proto_seconds(wait))));
        keys.push((made, wait));
    }
    let mut waited = 0;
    for (made, wait) in keys {
        server.advance(wait - waited - 1);
        assert_eq!(allowed(&server, &made.token, 1).await, 0, "a second before");
        server.advance(1);
        assert_eq!(allowed(&server, &made.token, 3).await, 2);
        waited = wait;
    }
}

#[tokio::test]
async fn a_total_quota_is_credits_that_never_come_back() {
    let server = Server::with_accounts().await;
    let made = server.create_key(with_quota(5, pb::QuotaPeriod::Total)).await;
    assert!(ask(&server, check_with_cost(&made.token, 4)).await.allowed);
    server.advance(400 * DAY);
    let denied = ask(&server, check_with_cost(&made.token, 2)).await;
    assert_eq!((denied.reason(), denied.retry_after), (Reason::QuotaExceeded, None));
    assert_eq!((denied.rate_limits[0].remaining, denied.rate_limits[0].reset_after), (1, None));
    assert!(ask(&server, check_with_cost(&made.token, 1)).await.allowed);
}

#[tokio::test]
async fn credits_are_bought_by_raising_the_quota() {
    let server = Server::with_accounts().await;
    let made = server.create_key(with_quota(2, pb::QuotaPeriod::Total)).await;
    assert_eq!(allowed(&server, &made.token, 3).await, 2);
    let more = pb::Key { quota: quota(12, pb::QuotaPeriod::Total), ..made.key.clone() };
    server.root_client().update(&more, &["quota"]).await.unwrap();
    assert_eq!(allowed(&server, &made.token, 20).await, 10);
}

#[tokio::test]
async fn a_batch_takes_check_by_check() {
    let server = Server::with_accounts().await;
    let made = server.create_key(limited(&[limit("requests", 3, 60)])).await;
    let checks = vec![authenticate_request(&made.token); 5];
    let batch = pb::BatchCheckRequest { checks };
    let results = server.root_client().authz().batch_check(batch).await.unwrap().into_inner().results;
    let verdicts: Vec<_> = results.iter().map(|answer| answer.allowed).collect();
    assert_eq!(verdicts, [true, true, true, false, false]);
}

// ---- a server that shares its keys with others ----

#[tokio::test]
async fn limits_that_each_replica_counts_by_itself_are_said_to_be_inexact() {
    let server = Server::start_with(|settings| settings.limits.shared = true).await;
    server.create_account("acme").await;
    let made = server.create_key(limited(&[limit("requests", 1, 60)])).await;
    for expected in [true, false] {
        let answer = ask(&server, authenticate_request(&made.token)).await;
        assert_eq!((answer.allowed, answer.limits_inexact), (expected, true));
    }
    for terms in [limited(&[]), with_quota(5, pb::QuotaPeriod::Day)] {
        let made = server.create_key(terms).await;
        assert!(!ask(&server, authenticate_request(&made.token)).await.limits_inexact);
    }
}

#[tokio::test]
async fn limits_of_one_process_are_exact() {
    let server = Server::with_accounts().await;
    let made = server.create_key(limited(&[limit("requests", 1, 60)])).await;
    assert!(!ask(&server, authenticate_request(&made.token)).await.limits_inexact);
}

// ---- a server that is stopped and started again, and many callers at once ----

/// A database, and a clock that goes on while no server runs.
struct PersistentSetup {
    folder: tempfile::TempDir,
    clock: Arc<ManualClock>,
    root: String,
}

/// A server of the rig.
struct RunningServer {
    server: keyward::server::Server,
    address: SocketAddr,
    root: String,
}

impl PersistentSetup {
    async fn new() -> (PersistentSetup, RunningServer) {
        let clock = Arc::new(ManualClock::new(Timestamp::from_micros(START * 1_000_000)));
        let mut rig = PersistentSetup { folder: tempfile::tempdir().unwrap(), clock, root: String::new() };
        let mut up = rig.start().await;
        rig.root = up.server.root_token.as_ref().unwrap().reveal().to_owned();
        up.root.clone_from(&rig.root);
        (rig, up)
    }

    async fn start(&self) -> RunningServer {
        let mut settings = ServerSettings::load_for_database(&DatabaseArgs::default()).unwrap();
        settings.listen = "127.0.0.1:0".to_owned();
        settings.admin_listen = "127.0.0.1:0".to_owned();
        settings.database = format!("sqlite:{}", self.folder.path().join("keyward.db").display()).into();
        settings.threads = 2;
        let (clock, entropy) = (self.clock.clone(), Arc::new(SystemEntropy));
        let server = keyward::server::Server::start(settings, clock, entropy).await.unwrap();
        RunningServer { address: server.address.as_tcp().unwrap(), server, root: self.root.clone() }
    }
}

type BearerChannel = InterceptedService<Channel, BearerInterceptor>;

#[derive(Clone)]
struct BearerInterceptor(String);

impl Interceptor for BearerInterceptor {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, tonic::Status> {
        request.metadata_mut().insert("authorization", format!("Bearer {}", self.0).parse().unwrap());
        Ok(request)
    }
}

impl RunningServer {
    /// A connection of its own.
    fn wire(&self) -> BearerChannel {
        let channel = Channel::from_shared(format!("http://{}", self.address)).unwrap().connect_lazy();
        InterceptedService::new(channel, BearerInterceptor(self.root.clone()))
    }

    fn authz(&self) -> AuthzServiceClient<BearerChannel> {
        AuthzServiceClient::new(self.wire())
    }

    async fn make(&self, terms: pb::CreateKeyRequest) -> pb::CreateKeyResponse {
        let request = pb::CreateKeyRequest { account: "keyward".to_owned(), ..terms };
        KeyServiceClient::new(self.wire()).create(request).await.unwrap().into_inner()
    }

    async fn ask(&self, request: pb::CheckRequest) -> pb::CheckResponse {
        self.authz().check(request).await.unwrap().into_inner()
    }

    /// How many of 64 callers, on 8 connections and of `times` Checks each, are allowed.
    async fn count_allowed_concurrently(&self, token: &str, times: usize) -> usize {
        let connections: Vec<_> = (0..8).map(|_| self.authz()).collect();
        let callers = (0..64).map(|at| {
            let (mut authz, request) = (connections[at % 8].clone(), authenticate_request(token));
            tokio::spawn(async move {
                let mut allowed = 0;
                for _ in 0..times {
                    let answer = authz.check(request.clone()).await.unwrap().into_inner();
                    allowed += usize::from(answer.allowed);
                }
                allowed
            })
        });
        let mut allowed = 0;
        for caller in callers.collect::<Vec<_>>() {
            allowed += caller.await.unwrap();
        }
        allowed
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sixty_four_callers_at_once_get_exactly_the_limit() {
    let (_rig, up) = PersistentSetup::new().await;
    let rate = up.make(limited(&[limit("requests", 100, 60)])).await;
    assert_eq!(up.count_allowed_concurrently(&rate.token, 4).await, 100);
    let budget = up.make(with_quota(70, pb::QuotaPeriod::Day)).await;
    assert_eq!(up.count_allowed_concurrently(&budget.token, 4).await, 70);
}

#[tokio::test]
async fn a_quota_goes_on_where_it_was_after_a_restart() {
    let (rig, up) = PersistentSetup::new().await;
    let day = up.make(with_quota(10, pb::QuotaPeriod::Day)).await;
    let credits = up.make(with_quota(10, pb::QuotaPeriod::Total)).await;
    for made in [&day, &credits] {
        assert!(up.ask(check_with_cost(&made.token, 7)).await.allowed);
    }
    up.server.stop().await;
    let up = rig.start().await;
    for made in [&day, &credits] {
        assert_eq!(up.ask(check_with_cost(&made.token, 4)).await.reason(), Reason::QuotaExceeded);
        assert_eq!(up.ask(check_with_cost(&made.token, 3)).await.rate_limits[0].remaining, 0);
    }
    up.server.stop().await;
    rig.clock.advance(Duration::from_secs(DAY));
    let up = rig.start().await;
    assert!(up.ask(check_with_cost(&day.token, 10)).await.allowed, "another day");
    assert_eq!(up.ask(check_with_cost(&credits.token, 1)).await.reason(), Reason::QuotaExceeded);
    up.server.stop().await;
    assert!(rig.clock.now() > Timestamp::from_micros(START * 1_000_000));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_many_callers_spent_at_once_is_remembered_to_the_unit() {
    let (rig, mut up) = PersistentSetup::new().await;
    let made = up.make(with_quota(100_000, pb::QuotaPeriod::Total)).await;
    for round in 1..=3 {
        assert_eq!(up.count_allowed_concurrently(&made.token, 20).await, 64 * 20);
        up.server.stop().await;
        up = rig.start().await;
        let answer = up.ask(dry_run_check(&made.token)).await;
        assert_eq!(answer.rate_limits[0].remaining, 100_000 - round * 64 * 20);
    }
    up.server.stop().await;
}

#[tokio::test]
async fn rate_limits_start_full_after_a_restart() {
    let (rig, up) = PersistentSetup::new().await;
    let made = up.make(limited(&[limit("requests", 1, DAY)])).await;
    assert!(up.ask(authenticate_request(&made.token)).await.allowed);
    assert!(!up.ask(authenticate_request(&made.token)).await.allowed);
    up.server.stop().await;
    let up = rig.start().await;
    assert!(up.ask(authenticate_request(&made.token)).await.allowed);
    up.server.stop().await;
}

// ---- callers of Keyward itself ----

/// The holder of a management key with two calls a minute.
async fn limited_caller(server: &Server) -> (CreatedKey, Client) {
    let rate_limits = vec![limit("calls", 2, 60)];
    let scopes = ["keyward:keys:read", "keyward:check"];
    let made =
        server.create_key(pb::CreateKeyRequest { rate_limits, ..service_key_request("acme", &scopes) }).await;
    let client = server.client_with_token(&made.token);
    (made, client)
}

#[tokio::test]
async fn a_management_key_past_its_limit_is_resource_exhausted_and_hears_when_to_retry() {
    let server = Server::with_accounts().await;
    let (made, caller) = limited_caller(&server).await;
    for _ in 0..2 {
        caller.get(&made.id).await.unwrap();
    }
    let status = assert_refused(caller.get(&made.id).await, Code::ResourceExhausted, "CALLER_LIMITED");
    let retry = status.get_details_retry_info().unwrap().retry_delay;
    assert_eq!(retry, Some(Duration::from_secs(30)));
    let check = caller.check(authenticate_request(&made.token)).await;
    assert_refused(check, Code::ResourceExhausted, "CALLER_LIMITED");
    assert_refused(caller.who_am_i().await, Code::ResourceExhausted, "CALLER_LIMITED");
    server.advance(30);
    caller.get(&made.id).await.unwrap();
}

#[tokio::test]
async fn a_management_key_past_its_quota_is_resource_exhausted() {
    let server = Server::with_accounts().await;
    let request = pb::CreateKeyRequest {
        quota: quota(1, pb::QuotaPeriod::Hour),
        ..service_key_request("acme", &["keyward:keys:read"])
    };
    let made = server.create_key(request).await;
    let caller = server.client_with_token(&made.token);
    caller.get(&made.id).await.unwrap();
    let status = assert_refused(caller.get(&made.id).await, Code::ResourceExhausted, "CALLER_LIMITED");
    let retry = status.get_details_retry_info().unwrap().retry_delay;
    assert_eq!(retry, Some(Duration::from_secs(HOUR)));
}

#[tokio::test]
async fn a_caller_past_its_limit_still_revokes_itself() {
    let server = Server::with_accounts().await;
    let (made, caller) = limited_caller(&server).await;
    for _ in 0..3 {
        let _ = caller.get(&made.id).await;
    }
    caller.revoke_self().await.unwrap();
    assert_eq!(server.root_client().check_reason(&made.token).await, Reason::Revoked);
}

// ---- bad input ----

#[tokio::test]
async fn every_wrong_limit_names_its_field() {
    let server = Server::with_accounts().await;
    let half = Some(prost_types::Duration { seconds: 0, nanos: 500_000_000 });
    let backwards = Some(prost_types::Duration { seconds: -1, nanos: 0 });
    let cases: [(&[pb::RateLimit], &[&str]); 9] = [
        (&[limit("", 1, 60)], &["rate_limits[0].name"]),
        (&[limit("Per Minute", 1, 60)], &["rate_limits[0].name"]),
        (&[limit("quota", 1, 60)], &["rate_limits[0].name"]),
        (&[limit("a", 1, 60), limit("b", 1, 60), limit("a", 2, 60)], &["rate_limits[2].name"]),
        (
            &[limit("a", 0, 60), limit("b", 1_000_000_001, 60)],
            &["rate_limits[0].limit", "rate_limits[1].limit"],
        ),
        (&[pb::RateLimit { window: None, ..limit("a", 1, 60) }], &["rate_limits[0].window"]),
        (&[pb::RateLimit { window: half, ..limit("a", 1, 60) }], &["rate_limits[0].window"]),
        (&[pb::RateLimit { window: backwards, ..limit("a", 1, 60) }], &["rate_limits[0].window"]),
        (&[limit("a", 1, DAY + 1)], &["rate_limits[0].window"]),
    ];
    for (limits, wrong) in cases {
        assert_invalid(server.root_client().create(limited(limits)).await, wrong);
    }
    server.create_key(limited(&[limit("a", 1_000_000_000, 1), limit("b", 1, DAY)])).await;
}

#[tokio::test]
async fn every_wrong_quota_names_its_field() {
    let server = Server::with_accounts().await;
    let create = |quota| pb::CreateKeyRequest { quota, ..limited(&[]) };
    for units in [0, 1_000_000_000_001, u64::MAX] {
        assert_invalid(
            server.root_client().create(create(quota(units, pb::QuotaPeriod::Day))).await,
            &["quota.limit"],
        );
    }
    for period in [0, 5, -1] {
        let quota = Some(pb::Quota { limit: 1, period });
        assert_invalid(server.root_client().create(create(quota)).await, &["quota.period"]);
    }
    assert_invalid(
        server.root_client().create(create(Some(pb::Quota::default()))).await,
        &["quota.limit", "quota.period"],
    );
    server.create_key(create(quota(1_000_000_000_000, pb::QuotaPeriod::Total))).await;
}

#[tokio::test]
async fn every_wrong_limit_of_an_update_names_its_field() {
    let server = Server::with_accounts().await;
    let made = server.create_key(limited(&[])).await;
    let wrong =
        pb::Key { rate_limits: vec![limit("a", 0, 60)], quota: quota(0, pb::QuotaPeriod::Day), ..made.key };
    let refusal = server.root_client().update(&wrong, &["rate_limits", "quota"]).await;
    assert_invalid(refusal, &["key.rate_limits[0].limit", "key.quota.limit"]);
}

#[tokio::test]
async fn a_wrong_cost_names_its_field() {
    let server = Server::with_accounts().await;
    let made = server.create_key(limited(&[])).await;
    for cost in [0, 1_000_001, u64::MAX] {
        assert_invalid(server.root_client().check(check_with_cost(&made.token, cost)).await, &["cost"]);
    }
    assert!(
        ask(&server, check_with_cost(&made.token, 1_000_000)).await.allowed,
        "an unlimited key pays nothing"
    );
}
