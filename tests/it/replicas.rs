//! Several servers on one PostgreSQL database: what a narrowing change promises, and what operators do. The servers are real
//! processes, and so is the database. What becomes of it under faults is in `failures.rs`.

use std::{
    path::PathBuf,
    process::Command,
    time::{Duration, Instant},
};

use keyward::pb;
use prost::Message as _;
use tonic::{Code, Status};

use crate::{
    postgres::{PostgresServer, url},
    process::{
        KeywardProcess, TestHome, TestProcess, WAIT_TIMEOUT, check_request, plain_key_request, wait_for,
    },
    redis_server::RedisServer,
};

/// A database server of its own, and replicas on it.
pub(crate) struct ReplicaCluster {
    pub(crate) home: TestHome,
    pub(crate) replicas: Vec<KeywardProcess>,
    /// The settings file that each is started with.
    config: Option<PathBuf>,
    pub(crate) cluster: PostgresServer,
}

impl ReplicaCluster {
    /// `count` replicas called r0, r1 ..., and the account `acme`.
    pub(crate) async fn start(count: usize, lease: &str) -> ReplicaCluster {
        ReplicaCluster::start_with(count, lease, None).await
    }

    /// Replicas with the usual lease and this settings file.
    pub(crate) async fn start_with_config(count: usize, file: &str) -> ReplicaCluster {
        ReplicaCluster::start_with(count, "default", Some(file)).await
    }

    async fn start_with(count: usize, lease: &str, file: Option<&str>) -> ReplicaCluster {
        let cluster = PostgresServer::start(&[]);
        cluster.sql("postgres", "CREATE DATABASE keys OWNER keyward TEMPLATE template0");
        let home = TestHome::with_database_url(url(cluster.socket(), 5432, "keys"));
        let config = file.map(|text| {
            std::fs::write(home.path("keyward.toml"), text).unwrap();
            home.path("keyward.toml")
        });
        let mut fleet = ReplicaCluster { home, replicas: Vec::new(), config, cluster };
        for _ in 0..count {
            fleet.add_replica(lease);
        }
        fleet.replicas[0].root_caller().create_account("acme").await;
        fleet
    }

    pub(crate) fn add_replica(&mut self, lease: &str) {
        self.add_replica_at(&self.home.url(), lease);
    }

    /// Adds a replica that reaches the database over this URL.
    pub(crate) fn add_replica_at(&mut self, url: &str, lease: &str) {
        let name = format!("r{}", self.replicas.len());
        let home = self.home.with_url(url);
        let mut serve = home.serve_command();
        serve.args(["--replica-name", &name, "--lease", lease, "--threads", "1"]);
        if let Some(config) = &self.config {
            serve.arg("--config").arg(config);
        }
        let replica = home.start_with(serve).unwrap();
        wait_until_ready(&replica, 200);
        self.replicas.push(replica);
    }

    /// A new key: its id and its token. Every replica knows it.
    pub(crate) async fn create_key(&self) -> (String, String) {
        let made =
            self.replicas[0].root_caller().keys.create(plain_key_request()).await.unwrap().into_inner();
        for replica in &self.replicas {
            let known = async || check_at_revision(replica, &made.token, Some(made.revision)).await;
            let end = Instant::now() + WAIT_TIMEOUT;
            while known().await.ok() != Some(pb::Reason::Ok) {
                assert!(Instant::now() < end, "a replica does not learn of a key");
                tokio::task::yield_now().await;
            }
        }
        (made.key.unwrap().id, made.token)
    }

    pub(crate) fn run_operator_command(&self, arguments: &[&str]) -> String {
        let url = self.home.url();
        let arguments = [&["replicas"], arguments, &["--database", &url]].concat();
        let ended = self.home.run_to_end(self.home.command(arguments));
        assert_eq!(ended.code, Some(0), "{ended:?}");
        ended.out
    }

    pub(crate) fn sql(&self, sql: &str) -> String {
        self.cluster.sql("keys", sql)
    }
}

impl Drop for ReplicaCluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for replica in &self.replicas {
                eprintln!("{}", replica.process.stderr());
            }
        }
    }
}

pub(crate) fn wait_until_ready(replica: &KeywardProcess, code: u16) {
    wait_for("the replica's readiness", || (replica.fetch_admin_page("/readyz").0 == code).then_some(()));
}

pub(crate) async fn check_token(replica: &KeywardProcess, token: &str) -> Result<pb::Reason, Status> {
    check_at_revision(replica, token, None).await
}

pub(crate) async fn check_at_revision(
    replica: &KeywardProcess,
    token: &str,
    min_revision: Option<u64>,
) -> Result<pb::Reason, Status> {
    let question = pb::CheckRequest { min_revision, ..check_request(token) };
    replica.root_caller().authz.check(question).await.map(|answer| answer.into_inner().reason())
}

pub(crate) fn is_unavailable<T: std::fmt::Debug>(answer: &Result<T, Status>, reason: &str) -> bool {
    use tonic_types::StatusExt as _;
    answer.as_ref().is_err_and(|status| {
        status.code() == Code::Unavailable
            && status.get_details_error_info().is_some_and(|info| info.reason == reason)
    })
}

pub(crate) async fn wait_until_unavailable(replica: &KeywardProcess, token: &str) {
    let end = Instant::now() + WAIT_TIMEOUT;
    while !is_unavailable(&check_token(replica, token).await, "LEASE_LOST") {
        assert!(Instant::now() < end, "the lease does not run out");
        tokio::task::yield_now().await;
    }
}

/// Revokes with a deadline of the caller's, if any.
pub(crate) async fn revoke_with_deadline(
    replica: &KeywardProcess,
    id: &str,
    deadline: Option<Duration>,
) -> Result<pb::RevokeKeyResponse, Status> {
    let message = pb::RevokeKeyRequest { id: id.to_owned(), ..Default::default() };
    let mut request = tonic::Request::new(message);
    if let Some(deadline) = deadline {
        request.set_timeout(deadline);
    }
    replica.root_caller().keys.revoke(request).await.map(tonic::Response::into_inner)
}

/// The report in the details of a call that could not wait long enough.
pub(crate) fn propagation_report(status: &Status) -> pb::Propagation {
    assert_eq!(status.code(), Code::DeadlineExceeded, "{status:?}");
    let details = tonic_types::pb::Status::decode(status.details()).unwrap().details;
    let report = details.iter().find(|any| any.type_url.ends_with("/keyward.v1.Propagation")).unwrap();
    pb::Propagation::decode(report.value.as_slice()).unwrap()
}

pub(crate) fn unconfirmed_replicas(report: &pb::Propagation) -> Vec<&str> {
    report.unconfirmed.iter().map(|silent| silent.replica.as_str()).collect()
}

pub(crate) fn send_signal(name: &str, process: &TestProcess) {
    let status = Command::new("kill").args([name, &process.id().to_string()]).status().unwrap();
    assert!(status.success());
}

// What is promised. --------------------------------------------------------------------------------------------------

#[tokio::test(flavor = "multi_thread")]
async fn what_is_revoked_on_one_replica_is_refused_by_the_others_three_hundred_times_of_three_hundred() {
    let fleet = ReplicaCluster::start(3, "default").await;
    let mut callers: Vec<_> = fleet.replicas.iter().map(KeywardProcess::root_caller).collect();
    for turn in 0..300 {
        let (id, token) = callers[turn % 3].create_key(plain_key_request()).await.unwrap();
        callers[(turn + 1) % 3].revoke_key(&id).await.unwrap();
        for caller in &mut callers {
            let answer = caller.check_token(&token).await.unwrap();
            assert_eq!(answer, pb::Reason::Revoked, "key {turn}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_narrowing_change_is_in_force_everywhere_when_it_returns() {
    let fleet = ReplicaCluster::start(2, "default").await;
    let (mut here, there) = (fleet.replicas[0].root_caller(), &fleet.replicas[1]);
    let (id, token) = fleet.create_key().await;
    here.keys.disable(pb::DisableKeyRequest { id: id.clone() }).await.unwrap();
    assert_eq!(check_token(there, &token).await.unwrap(), pb::Reason::Disabled);
    let enabled = here.keys.enable(pb::EnableKeyRequest { id: id.clone() }).await.unwrap().into_inner();
    assert_eq!(
        check_at_revision(there, &token, Some(enabled.revision)).await.ok().unwrap_or(pb::Reason::Ok),
        pb::Reason::Ok
    );
    let narrowed = pb::Key { id: id.clone(), scopes: vec!["other:read".to_owned()], ..Default::default() };
    let update_mask = Some(prost_types::FieldMask { paths: vec!["scopes".to_owned()] });
    here.keys.update(pb::UpdateKeyRequest { key: Some(narrowed), update_mask }).await.unwrap();
    assert_eq!(check_token(there, &token).await.unwrap(), pb::Reason::MissingScope);
    here.rotate_key(&id).await.unwrap();
    assert_eq!(check_token(there, &token).await.unwrap(), pb::Reason::Rotated);
    let (_, other) = fleet.create_key().await;
    here.accounts.suspend(pb::SuspendAccountRequest { id: "acme".to_owned() }).await.unwrap();
    assert_eq!(check_token(there, &other).await.unwrap(), pb::Reason::AccountSuspended);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_role_that_loses_a_scope_and_a_member_who_goes_are_so_everywhere_when_it_returns() {
    let fleet = ReplicaCluster::start(2, "default").await;
    let (mut here, there) = (fleet.replicas[0].root_caller(), &fleet.replicas[1]);
    let role = |scopes: &[&str]| pb::PutRoleRequest {
        account: "acme".to_owned(),
        name: "reader".to_owned(),
        scopes: scopes.iter().map(|&scope| scope.to_owned()).collect(),
    };
    here.accounts.put_role(role(&["monitors:read", "x:y"])).await.unwrap();
    let key =
        pb::CreateKeyRequest { scopes: vec![], roles: vec!["reader".to_owned()], ..plain_key_request() };
    let (_, token) = here.create_key(key).await.unwrap();
    here.accounts.put_role(role(&["x:y"])).await.unwrap();
    assert_eq!(check_token(there, &token).await.unwrap(), pb::Reason::MissingScope);

    let (account, user) = ("acme".to_owned(), "anna".to_owned());
    here.accounts.put_role(role(&["monitors:read"])).await.unwrap();
    let member =
        pb::PutMemberRequest { account: account.clone(), user: user.clone(), role: "reader".to_owned() };
    here.accounts.put_member(member).await.unwrap();
    let scopes = vec!["all".to_owned()];
    let key =
        pb::CreateKeyRequest { account: String::new(), user: user.clone(), scopes, ..plain_key_request() };
    let (_, token) = here.create_key(key).await.unwrap();
    here.accounts.remove_member(pb::RemoveMemberRequest { account: account.clone(), user }).await.unwrap();
    let question = pb::CheckRequest { account: Some(account), ..check_request(&token) };
    let answer = there.root_caller().authz.check(question).await.unwrap().into_inner();
    assert!(!answer.allowed, "{answer:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_report_names_who_has_confirmed_and_a_check_says_how_old_its_state_can_be() {
    let fleet = ReplicaCluster::start(2, "default").await;
    let (id, token) = fleet.create_key().await;
    let revoked = revoke_with_deadline(&fleet.replicas[0], &id, None).await.unwrap();
    let mut said = revoked.propagation.unwrap();
    said.confirmed.sort();
    assert!(said.complete && !said.sync_replicated, "{said:?}");
    assert_eq!((said.confirmed, said.unconfirmed), (vec!["r0".to_owned(), "r1".to_owned()], vec![]));
    let answer =
        fleet.replicas[1].root_caller().authz.check(check_request(&token)).await.unwrap().into_inner();
    assert!(answer.revision >= revoked.revision);
    assert!(answer.staleness.unwrap().seconds < 60, "within the lease");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_made_on_one_replica_is_found_by_a_change_on_another() {
    let fleet = ReplicaCluster::start(2, "default").await;
    for turn in 0..20 {
        let account = format!("a{turn}");
        fleet.replicas[turn % 2].root_caller().create_account(&account).await;
        let key = pb::CreateKeyRequest { account, ..plain_key_request() };
        fleet.replicas[(turn + 1) % 2].root_caller().create_key(key).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_made_a_member_on_one_replica_finds_the_account_on_another() {
    let fleet = ReplicaCluster::start(2, "default").await;
    let mut root = fleet.replicas[0].root_caller();
    let (account, name, scopes) = ("acme".to_owned(), "reader".to_owned(), vec!["monitors:read".to_owned()]);
    root.accounts.put_role(pb::PutRoleRequest { account, name, scopes }).await.unwrap();
    for turn in 0..20 {
        let (account, user, role) = ("acme".to_owned(), format!("user-{turn}"), "reader".to_owned());
        let member = pb::PutMemberRequest { account, user: user.clone(), role };
        root.accounts.put_member(member).await.unwrap();
        let mut request = tonic::Request::new(pb::GetAccountRequest { id: "acme".to_owned() });
        request.metadata_mut().insert("x-keyward-acting-user", user.parse().unwrap());
        fleet.replicas[1].root_caller().accounts.get(request).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_stops_leaves_and_nobody_waits_for_it() {
    let mut fleet = ReplicaCluster::start(2, "default").await;
    let (id, _) = fleet.create_key().await;
    fleet.replicas.pop().unwrap().stop();
    assert_eq!(fleet.sql("SELECT count(*) FROM keyward.replicas"), "1");
    let said = revoke_with_deadline(&fleet.replicas[0], &id, Some(Duration::from_secs(20)))
        .await
        .unwrap()
        .propagation
        .unwrap();
    assert_eq!((said.confirmed, said.unconfirmed), (vec!["r0".to_owned()], vec![]));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_orderly_stop_gives_up_the_lease_and_raises_no_alarm() {
    let mut fleet = ReplicaCluster::start(1, "default").await;
    let KeywardProcess { process, .. } = fleet.replicas.pop().unwrap();
    process.terminate();
    let ended = process.wait_until_ended();
    assert_eq!(ended.code, Some(0), "{ended:?}");
    let (_, said) = ended.err.split_once("stopping\n").unwrap();
    assert!(said.contains("lease released"), "{said}");
    assert!(!said.contains("ERROR") && !said.contains("WARN"), "{said}");
}

// Acknowledgments that are told. -------------------------------------------------------------------------------------

const ACK_CHANNEL: &str = "keyward_acks";

#[tokio::test(flavor = "multi_thread")]
async fn acknowledgments_are_told_of_what_takes_something_away_and_of_nothing_else() {
    let fleet = ReplicaCluster::start(3, "default").await;
    let mut listener = sqlx::postgres::PgListener::connect(&fleet.home.url()).await.unwrap();
    listener.listen(ACK_CHANNEL).await.unwrap();
    let (id, _) = fleet.create_key().await;
    // Each has renewed twice since, and acknowledged the key that way.
    let renewals = || fleet.sql("SELECT min(renew_seq) FROM keyward.replicas").parse::<u64>().unwrap();
    let begun = renewals();
    wait_for("two renewals", || (renewals() >= begun + 2).then_some(()));
    let revision = revoke_with_deadline(&fleet.replicas[0], &id, None).await.unwrap().revision;
    let own = fleet.sql("SELECT encode(id, 'hex') FROM keyward.replicas WHERE name = 'r0'");
    for _ in 0..2 {
        let told = tokio::time::timeout(WAIT_TIMEOUT, listener.recv()).await.unwrap().unwrap();
        let (who, upto) = told.payload().split_once(' ').unwrap();
        assert!(upto == revision.to_string() && who != own, "{}", told.payload());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_acknowledgment_that_is_not_told_is_found() {
    let fleet = ReplicaCluster::start(1, "default").await;
    let (id, _) = fleet.create_key().await;
    // A replica that acknowledges as those of the version before do.
    fleet.sql("INSERT INTO keyward.replicas SELECT decode(repeat('01', 16), 'hex'), 'old', head, 1, 0 FROM keyward.meta");
    let acknowledge = "UPDATE keyward.replicas SET applied = head FROM keyward.meta WHERE name = 'old'";
    let head = || fleet.sql("SELECT head FROM keyward.meta");
    let before = head();
    let (said, ()) = tokio::join!(revoke_with_deadline(&fleet.replicas[0], &id, None), async {
        tokio::task::block_in_place(|| {
            wait_for("the commit", || (head() != before).then_some(()));
            fleet.sql(acknowledge);
        });
    });
    let said = said.unwrap().propagation.unwrap();
    assert_eq!((said.confirmed.len(), unconfirmed_replicas(&said)), (2, vec![]));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_acknowledgment_that_anybody_told_confirms_nothing() {
    let fleet = ReplicaCluster::start(2, "default").await;
    let (id, token) = fleet.create_key().await;
    let other = fleet.sql("SELECT encode(id, 'hex') FROM keyward.replicas WHERE name = 'r1'");
    send_signal("-STOP", &fleet.replicas[1].process);
    let deadline = Duration::from_secs(2);
    let revoking = revoke_with_deadline(&fleet.replicas[0], &id, Some(deadline));
    let (said, ()) = tokio::join!(revoking, async {
        // Before it is committed, and after.
        let end = Instant::now() + deadline / 2;
        while Instant::now() < end {
            tokio::task::block_in_place(|| fleet.sql(&format!("NOTIFY {ACK_CHANNEL}, '{other} 1000000'")));
        }
    });
    assert_eq!(unconfirmed_replicas(&propagation_report(&said.unwrap_err())), ["r1"]);
    send_signal("-CONT", &fleet.replicas[1].process);
    let said = revoke_with_deadline(&fleet.replicas[0], &id, None).await.unwrap().propagation.unwrap();
    assert_eq!(unconfirmed_replicas(&said), [""; 0]);
    assert_eq!(check_token(&fleet.replicas[1], &token).await.unwrap(), pb::Reason::Revoked);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_hears_nothing_for_a_while_revokes_all_the_same() {
    let fleet = ReplicaCluster::start(2, "default").await;
    for _ in 0..5 {
        let (id, token) = fleet.create_key().await;
        fleet.sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE 'LISTEN%'");
        let said = revoke_with_deadline(&fleet.replicas[0], &id, None).await.unwrap().propagation.unwrap();
        assert_eq!(unconfirmed_replicas(&said), [""; 0]);
        assert_eq!(check_token(&fleet.replicas[1], &token).await.unwrap(), pb::Reason::Revoked);
    }
}

// Limits and quotas. -------------------------------------------------------------------------------------------------

/// Asks with 64 callers, spread over the replicas, `each` times: how many Checks were allowed, and how many said that a
/// limit was not exact. A Check that could not be answered is asked again.
async fn check_concurrently(fleet: &ReplicaCluster, token: &str, each: u64) -> (u64, u64) {
    let callers = (0..64).map(|at| {
        let (mut caller, token) = (fleet.replicas[at % fleet.replicas.len()].root_caller(), token.to_owned());
        tokio::spawn(async move {
            let (mut allowed, mut inexact) = (0, 0);
            for _ in 0..each {
                let answer = loop {
                    match caller.authz.check(check_request(&token)).await {
                        Ok(answer) => break answer.into_inner(),
                        Err(status) => assert_eq!(status.code(), Code::Unavailable, "{status:?}"),
                    }
                };
                allowed += u64::from(answer.allowed);
                inexact += u64::from(answer.limits_inexact);
            }
            (allowed, inexact)
        })
    });
    let mut sum = (0, 0);
    for caller in callers.collect::<Vec<_>>() {
        let (allowed, inexact) = caller.await.unwrap();
        sum = (sum.0 + allowed, sum.1 + inexact);
    }
    sum
}

async fn create_key_everywhere(fleet: &ReplicaCluster, made: pb::CreateKeyRequest) -> String {
    for replica in &fleet.replicas {
        // Each hears of the others with its next renewal.
        let all = format!("keyward_replicas {}\n", fleet.replicas.len());
        wait_for("a replica to know of the others", || {
            replica.fetch_admin_page("/metrics").1.contains(&all).then_some(())
        });
    }
    let made = fleet.replicas[0].root_caller().keys.create(made).await.unwrap().into_inner();
    for replica in &fleet.replicas {
        let dry = pb::CheckRequest {
            min_revision: Some(made.revision),
            dry_run: true,
            ..check_request(&made.token)
        };
        let end = Instant::now() + WAIT_TIMEOUT;
        while replica.root_caller().authz.check(dry.clone()).await.is_err() {
            assert!(Instant::now() < end, "a replica does not learn of a key");
        }
    }
    made.token
}

fn daily_limited_key_request() -> pb::CreateKeyRequest {
    let window = Some(prost_types::Duration { seconds: 24 * 60 * 60, nanos: 0 });
    let limit = pb::RateLimit { name: "daily".to_owned(), limit: 100, window };
    pb::CreateKeyRequest { rate_limits: vec![limit], ..plain_key_request() }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_limit_in_redis_allows_exactly_its_units_to_64_callers_of_two_servers() {
    let redis = RedisServer::start();
    let fleet = ReplicaCluster::start_with_config(
        2,
        &format!("[limits]\nbackend = 'redis'\nurl = '{}'\n", redis.url()),
    )
    .await;
    let token = create_key_everywhere(&fleet, daily_limited_key_request()).await;
    assert_eq!(check_concurrently(&fleet, &token, 4).await, (100, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_limit_without_redis_is_each_servers_own_and_says_so() {
    let fleet = ReplicaCluster::start(2, "default").await;
    let token = create_key_everywhere(&fleet, daily_limited_key_request()).await;
    assert_eq!(check_concurrently(&fleet, &token, 4).await, (200, 256));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_quota_over_two_servers_is_overspent_by_a_block_each_at_the_most() {
    let fleet = ReplicaCluster::start(2, "default").await;
    let quota = Some(pb::Quota { limit: 1000, period: pb::QuotaPeriod::Total.into() });
    let token = create_key_everywhere(&fleet, pb::CreateKeyRequest { quota, ..plain_key_request() }).await;
    let (allowed, _) = check_concurrently(&fleet, &token, 20).await;
    assert!((1000..=1100).contains(&allowed), "{allowed}");
}

// Operators. ---------------------------------------------------------------------------------------------------------

#[tokio::test(flavor = "multi_thread")]
async fn operators_see_who_serves_and_change_the_lease() {
    let fleet = ReplicaCluster::start(2, "1s").await;
    let listed = fleet.run_operator_command(&["list"]);
    assert!(listed.contains("r0  ") && listed.contains("r1  ") && listed.contains("lease 1s"), "{listed}");
    assert_eq!(fleet.run_operator_command(&["lease", "static"]), "The lease is static (never runs out).\n");
    assert_eq!(fleet.run_operator_command(&["lease", "2s"]), "The lease is 2s.\n");
    assert_eq!(fleet.run_operator_command(&["lease"]), "2s; no replica holds one longer than 2s.\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn operators_hear_what_is_wrong() {
    let fleet = ReplicaCluster::start(1, "1s").await;
    let refused = |arguments: &[&str]| {
        let ended = fleet.home.run_to_end(fleet.home.command(["replicas"].iter().chain(arguments)));
        assert_ne!(ended.code, Some(0));
        ended.err
    };
    let url = fleet.home.url();
    assert!(
        refused(&["attest-dead", "r9", "--seen-gone", "--database", &url]).contains("there is no replica")
    );
    assert!(refused(&["attest-dead", "r0", "--database", &url]).contains("--seen-gone"));
    assert!(refused(&["lease", "0s", "--database", &url]).contains("1s to 1d"));
    assert!(refused(&["list", "--database", "sqlite:x.db"]).contains("no replicas"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_root_key_is_the_only_one_everywhere() {
    let fleet = ReplicaCluster::start(1, "1s").await;
    let mut old = fleet.replicas[0].root_caller();
    let ended = fleet.home.run_to_end(fleet.home.root_key_reset_command("-"));
    assert_eq!(ended.code, Some(0), "{ended:?}");
    let refused = old.check_token("anything").await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated);
}
