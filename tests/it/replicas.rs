//! Several servers on one PostgreSQL database: what a narrowing change promises, and what becomes of it under every
//! fault that the failure table of `docs/reliability.md` has, each test named after its row. The servers are real
//! processes, and so are the database and the pooler that stands for the network between them.

use std::{
    path::PathBuf,
    process::Command,
    time::{Duration, Instant},
};

use keyward::pb;
use prost::Message as _;
use tonic::{Code, Status};

use crate::{
    envoy::minimal,
    http::Request,
    postgres::{Bouncer, Cluster, url},
    process::{Home, Keyward, PATIENCE, Process, plain_key, question, wait_for},
    proxy::Envoy,
    redis_server::RedisServer,
    upstream::Upstream,
};

/// A database server of its own, and replicas on it.
struct Fleet {
    home: Home,
    replicas: Vec<Keyward>,
    /// The settings file that each is started with.
    config: Option<PathBuf>,
    cluster: Cluster,
}

impl Fleet {
    /// `count` replicas called r0, r1 ..., and the account `acme`.
    async fn start(count: usize, lease: &str) -> Fleet {
        Fleet::with(count, lease, None).await
    }

    /// Replicas with the usual lease and this settings file.
    async fn configured(count: usize, file: &str) -> Fleet {
        Fleet::with(count, "default", Some(file)).await
    }

    async fn with(count: usize, lease: &str, file: Option<&str>) -> Fleet {
        let cluster = Cluster::start(&[]);
        cluster.sql("postgres", "CREATE DATABASE keys OWNER keyward TEMPLATE template0");
        let home = Home::on(url(cluster.socket(), 5432, "keys"));
        let config = file.map(|text| {
            std::fs::write(home.path("keyward.toml"), text).unwrap();
            home.path("keyward.toml")
        });
        let mut fleet = Fleet { home, replicas: Vec::new(), config, cluster };
        for _ in 0..count {
            fleet.join(lease);
        }
        fleet.replicas[0].root().make_account("acme").await;
        fleet
    }

    fn join(&mut self, lease: &str) {
        self.join_over(&self.home.url(), lease);
    }

    /// Adds a replica that reaches the database over this URL.
    fn join_over(&mut self, url: &str, lease: &str) {
        let name = format!("r{}", self.replicas.len());
        let home = self.home.over(url);
        let mut serve = home.serve();
        serve.args(["--replica-name", &name, "--lease", lease, "--threads", "1"]);
        if let Some(config) = &self.config {
            serve.arg("--config").arg(config);
        }
        let replica = home.start_as(serve).unwrap();
        until_ready(&replica, 200);
        self.replicas.push(replica);
    }

    /// A new key: its id and its token. Every replica knows it.
    async fn key(&self) -> (String, String) {
        let made = self.replicas[0].root().keys.create(plain_key()).await.unwrap().into_inner();
        for replica in &self.replicas {
            let known = async || check_at(replica, &made.token, Some(made.revision)).await;
            let end = Instant::now() + PATIENCE;
            while known().await.ok() != Some(pb::Reason::Ok) {
                assert!(Instant::now() < end, "a replica does not learn of a key");
                tokio::task::yield_now().await;
            }
        }
        (made.key.unwrap().id, made.token)
    }

    fn operator(&self, arguments: &[&str]) -> String {
        let url = self.home.url();
        let arguments = [&["replicas"], arguments, &["--database", &url]].concat();
        let ended = self.home.run(self.home.command(arguments));
        assert_eq!(ended.code, Some(0), "{ended:?}");
        ended.out
    }

    fn sql(&self, sql: &str) -> String {
        self.cluster.sql("keys", sql)
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for replica in &self.replicas {
                eprintln!("{}", replica.process.stderr());
            }
        }
    }
}

fn until_ready(replica: &Keyward, code: u16) {
    wait_for("the replica's readiness", || (replica.page("/readyz").0 == code).then_some(()));
}

async fn check(replica: &Keyward, token: &str) -> Result<pb::Reason, Status> {
    check_at(replica, token, None).await
}

async fn check_at(replica: &Keyward, token: &str, min_revision: Option<u64>) -> Result<pb::Reason, Status> {
    let question = pb::CheckRequest { min_revision, ..question(token) };
    replica.root().authz.check(question).await.map(|answer| answer.into_inner().reason())
}

fn is_unavailable<T: std::fmt::Debug>(answer: &Result<T, Status>, reason: &str) -> bool {
    use tonic_types::StatusExt as _;
    answer.as_ref().is_err_and(|status| {
        status.code() == Code::Unavailable
            && status.get_details_error_info().is_some_and(|info| info.reason == reason)
    })
}

async fn until_unavailable(replica: &Keyward, token: &str) {
    let end = Instant::now() + PATIENCE;
    while !is_unavailable(&check(replica, token).await, "LEASE_LOST") {
        assert!(Instant::now() < end, "the lease does not run out");
        tokio::task::yield_now().await;
    }
}

/// Revokes with a deadline of the caller's, if any.
async fn revoke(
    replica: &Keyward,
    id: &str,
    deadline: Option<Duration>,
) -> Result<pb::RevokeKeyResponse, Status> {
    let message = pb::RevokeKeyRequest { id: id.to_owned(), ..Default::default() };
    let mut request = tonic::Request::new(message);
    if let Some(deadline) = deadline {
        request.set_timeout(deadline);
    }
    replica.root().keys.revoke(request).await.map(tonic::Response::into_inner)
}

/// The report in the details of a call that could not wait long enough.
fn report(status: &Status) -> pb::Propagation {
    assert_eq!(status.code(), Code::DeadlineExceeded, "{status:?}");
    let details = tonic_types::pb::Status::decode(status.details()).unwrap().details;
    let report = details.iter().find(|any| any.type_url.ends_with("/keyward.v1.Propagation")).unwrap();
    pb::Propagation::decode(report.value.as_slice()).unwrap()
}

fn silent(report: &pb::Propagation) -> Vec<&str> {
    report.unconfirmed.iter().map(|silent| silent.replica.as_str()).collect()
}

fn signal(name: &str, process: &Process) {
    let status = Command::new("kill").args([name, &process.id().to_string()]).status().unwrap();
    assert!(status.success());
}

// What is promised. --------------------------------------------------------------------------------------------------

#[tokio::test(flavor = "multi_thread")]
async fn what_is_revoked_on_one_replica_is_refused_by_the_others_three_hundred_times_of_three_hundred() {
    let fleet = Fleet::start(3, "default").await;
    let mut callers: Vec<_> = fleet.replicas.iter().map(Keyward::root).collect();
    for turn in 0..300 {
        let (id, token) = callers[turn % 3].create(plain_key()).await.unwrap();
        callers[(turn + 1) % 3].revoke(&id).await.unwrap();
        for caller in &mut callers {
            let answer = caller.check(&token).await.unwrap();
            assert_eq!(answer, pb::Reason::Revoked, "key {turn}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_narrowing_change_is_in_force_everywhere_when_it_returns() {
    let fleet = Fleet::start(2, "default").await;
    let (mut here, there) = (fleet.replicas[0].root(), &fleet.replicas[1]);
    let (id, token) = fleet.key().await;
    here.keys.disable(pb::DisableKeyRequest { id: id.clone() }).await.unwrap();
    assert_eq!(check(there, &token).await.unwrap(), pb::Reason::Disabled);
    let enabled = here.keys.enable(pb::EnableKeyRequest { id: id.clone() }).await.unwrap().into_inner();
    assert_eq!(
        check_at(there, &token, Some(enabled.revision)).await.ok().unwrap_or(pb::Reason::Ok),
        pb::Reason::Ok
    );
    let narrowed = pb::Key { id: id.clone(), scopes: vec!["other:read".to_owned()], ..Default::default() };
    let update_mask = Some(prost_types::FieldMask { paths: vec!["scopes".to_owned()] });
    here.keys.update(pb::UpdateKeyRequest { key: Some(narrowed), update_mask }).await.unwrap();
    assert_eq!(check(there, &token).await.unwrap(), pb::Reason::MissingScope);
    here.rotate(&id).await.unwrap();
    assert_eq!(check(there, &token).await.unwrap(), pb::Reason::Rotated);
    let (_, other) = fleet.key().await;
    here.accounts.suspend(pb::SuspendAccountRequest { id: "acme".to_owned() }).await.unwrap();
    assert_eq!(check(there, &other).await.unwrap(), pb::Reason::AccountSuspended);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_role_that_loses_a_scope_and_a_member_who_goes_are_so_everywhere_when_it_returns() {
    let fleet = Fleet::start(2, "default").await;
    let (mut here, there) = (fleet.replicas[0].root(), &fleet.replicas[1]);
    let role = |scopes: &[&str]| pb::PutRoleRequest {
        account: "acme".to_owned(),
        name: "reader".to_owned(),
        scopes: scopes.iter().map(|&scope| scope.to_owned()).collect(),
    };
    here.accounts.put_role(role(&["monitors:read", "x:y"])).await.unwrap();
    let key = pb::CreateKeyRequest { scopes: vec![], roles: vec!["reader".to_owned()], ..plain_key() };
    let (_, token) = here.create(key).await.unwrap();
    here.accounts.put_role(role(&["x:y"])).await.unwrap();
    assert_eq!(check(there, &token).await.unwrap(), pb::Reason::MissingScope);

    let (account, user) = ("acme".to_owned(), "anna".to_owned());
    here.accounts.put_role(role(&["monitors:read"])).await.unwrap();
    let member =
        pb::PutMemberRequest { account: account.clone(), user: user.clone(), role: "reader".to_owned() };
    here.accounts.put_member(member).await.unwrap();
    let scopes = vec!["all".to_owned()];
    let key = pb::CreateKeyRequest { account: String::new(), user: user.clone(), scopes, ..plain_key() };
    let (_, token) = here.create(key).await.unwrap();
    here.accounts.remove_member(pb::RemoveMemberRequest { account: account.clone(), user }).await.unwrap();
    let question = pb::CheckRequest { account: Some(account), ..question(&token) };
    let answer = there.root().authz.check(question).await.unwrap().into_inner();
    assert!(!answer.allowed, "{answer:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_report_names_who_has_confirmed_and_a_check_says_how_old_its_state_can_be() {
    let fleet = Fleet::start(2, "default").await;
    let (id, token) = fleet.key().await;
    let revoked = revoke(&fleet.replicas[0], &id, None).await.unwrap();
    let mut said = revoked.propagation.unwrap();
    said.confirmed.sort();
    assert!(said.complete && !said.sync_replicated, "{said:?}");
    assert_eq!((said.confirmed, said.unconfirmed), (vec!["r0".to_owned(), "r1".to_owned()], vec![]));
    let answer = fleet.replicas[1].root().authz.check(question(&token)).await.unwrap().into_inner();
    assert!(answer.revision >= revoked.revision);
    assert!(answer.staleness.unwrap().seconds < 60, "within the lease");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_made_on_one_replica_is_found_by_a_change_on_another() {
    let fleet = Fleet::start(2, "default").await;
    for turn in 0..20 {
        let account = format!("a{turn}");
        fleet.replicas[turn % 2].root().make_account(&account).await;
        let key = pb::CreateKeyRequest { account, ..plain_key() };
        fleet.replicas[(turn + 1) % 2].root().create(key).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_stops_leaves_and_nobody_waits_for_it() {
    let mut fleet = Fleet::start(2, "default").await;
    let (id, _) = fleet.key().await;
    fleet.replicas.pop().unwrap().stop();
    assert_eq!(fleet.sql("SELECT count(*) FROM keyward.replicas"), "1");
    let said =
        revoke(&fleet.replicas[0], &id, Some(Duration::from_secs(20))).await.unwrap().propagation.unwrap();
    assert_eq!((said.confirmed, said.unconfirmed), (vec!["r0".to_owned()], vec![]));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_orderly_stop_gives_up_the_lease_and_raises_no_alarm() {
    let mut fleet = Fleet::start(1, "default").await;
    let Keyward { process, .. } = fleet.replicas.pop().unwrap();
    process.terminate();
    let ended = process.ended();
    assert_eq!(ended.code, Some(0), "{ended:?}");
    let (_, said) = ended.err.split_once("stopping\n").unwrap();
    assert!(said.contains("the lease is given up"), "{said}");
    assert!(!said.contains("ERROR") && !said.contains("WARN"), "{said}");
}

// The failure table. -------------------------------------------------------------------------------------------------

#[tokio::test(flavor = "multi_thread")]
async fn replica_kill_9_is_waited_for_until_its_lease_has_run_out() {
    let mut fleet = Fleet::start(2, "2s").await;
    let (id, _) = fleet.key().await;
    fleet.replicas.pop().unwrap().process.kill();
    let begun = Instant::now();
    let said = revoke(&fleet.replicas[0], &id, None).await.unwrap().propagation.unwrap();
    assert!(said.complete);
    assert_eq!((said.confirmed.clone(), silent(&said)), (vec!["r0".to_owned()], vec!["r1"]));
    // It could not be sooner: its last renewal is at most that much older than the kill.
    assert!(begun.elapsed() > Duration::from_secs(1));
    wait_for("the dead row to be removed", || {
        (fleet.sql("SELECT count(*) FROM keyward.replicas") == "1").then_some(())
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn replica_kill_9_is_not_waited_for_once_it_is_attested_dead() {
    let mut fleet = Fleet::start(2, "static").await;
    let (id, _) = fleet.key().await;
    fleet.replicas.pop().unwrap().process.kill();
    let waited = revoke(&fleet.replicas[0], &id, Some(Duration::from_secs(1))).await.unwrap_err();
    let said = report(&waited);
    assert_eq!((said.complete, silent(&said), said.complete_by), (false, vec!["r1"], None));
    let told = fleet.operator(&["attest-dead", "r1", "--seen-gone"]);
    assert!(told.starts_with("r1 ("), "{told}");
    assert!(revoke(&fleet.replicas[0], &id, None).await.unwrap().propagation.unwrap().complete);
}

#[tokio::test(flavor = "multi_thread")]
async fn replica_sigstop_longer_than_its_lease_then_cont_allows_nothing_that_was_revoked_meanwhile() {
    let fleet = Fleet::start(2, "1s").await;
    let mut callers: Vec<_> = (0..8).map(|_| fleet.replicas[1].root()).collect();
    for caller in &mut callers {
        // The connections are there before the process stands still.
        caller.check("nobody").await.unwrap();
    }
    let (id, token) = fleet.key().await;
    signal("-STOP", &fleet.replicas[1].process);
    let said = revoke(&fleet.replicas[0], &id, None).await.unwrap().propagation.unwrap();
    assert!(said.complete && silent(&said) == ["r1"], "{said:?}");
    // Asked while it stands still: these are the first that it hears of.
    let asked: Vec<_> = callers
        .into_iter()
        .map(|mut caller| {
            let token = token.clone();
            tokio::spawn(async move { caller.check(&token).await })
        })
        .collect();
    signal("-CONT", &fleet.replicas[1].process);
    for answer in asked {
        let answer = answer.await.unwrap();
        assert!(
            is_unavailable(&answer, "LEASE_LOST")
                || answer.as_ref().is_ok_and(|reason| *reason == pb::Reason::Revoked),
            "{answer:?}"
        );
    }
    until_ready(&fleet.replicas[1], 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn partition_of_a_replica_from_its_database_ends_with_its_lease() {
    let mut fleet = Fleet::start(1, "1s").await;
    let bouncer = Bouncer::start(&fleet.cluster);
    fleet.join_over(&bouncer.url("keys"), "1s");
    let (dead, known) = fleet.key().await;
    revoke(&fleet.replicas[0], &dead, None).await.unwrap();
    let (id, token) = fleet.key().await;
    bouncer.pause();
    let said = revoke(&fleet.replicas[0], &id, None).await.unwrap().propagation.unwrap();
    assert!(said.complete && silent(&said) == ["r1"], "{said:?}");
    let there = &fleet.replicas[1];
    assert!(is_unavailable(&check(there, &token).await, "LEASE_LOST"));
    assert_eq!(check(there, &known).await.unwrap(), pb::Reason::Revoked, "a denial needs no lease");
    assert!(is_unavailable(&check(there, "nobody").await, "LEASE_LOST"), "it may have been made since");
    until_ready(there, 503);
    bouncer.resume();
    until_ready(there, 200);
    assert_eq!(check(there, &token).await.unwrap(), pb::Reason::Revoked);
}

#[tokio::test(flavor = "multi_thread")]
async fn partition_of_a_static_replica_is_told_and_followed() {
    let mut fleet = Fleet::start(1, "static").await;
    let bouncer = Bouncer::start(&fleet.cluster);
    fleet.join_over(&bouncer.url("keys"), "static");
    let (id, token) = fleet.key().await;
    bouncer.pause();
    let waited = revoke(&fleet.replicas[0], &id, Some(Duration::from_secs(1))).await.unwrap_err();
    assert_eq!(silent(&report(&waited)), ["r1"]);
    let answer = fleet.replicas[1].root().authz.check(question(&token)).await.unwrap().into_inner();
    assert!(answer.allowed, "it keeps answering, and says from how old a state");
    assert!(answer.staleness.unwrap() != prost_types::Duration::default());
    let revision = fleet.replicas[0].root().get(&id).await.unwrap().revision;
    let follow = pb::WatchPropagationRequest { revision };
    let mut reports = fleet.replicas[0].root().keys.watch_propagation(follow).await.unwrap().into_inner();
    let first = reports.message().await.unwrap().unwrap();
    assert_eq!(silent(&first.propagation.unwrap()), ["r1"]);
    bouncer.resume();
    let mut last = None;
    while let Some(report) = reports.message().await.unwrap() {
        assert_eq!(report.revision, revision);
        last = report.propagation;
    }
    assert!(last.unwrap().complete);
    assert_eq!(check(&fleet.replicas[1], &token).await.unwrap(), pb::Reason::Revoked);
}

#[tokio::test(flavor = "multi_thread")]
async fn database_down_for_less_than_a_lease_is_not_noticed_by_checks() {
    let mut fleet = Fleet::start(2, "default").await;
    let (id, token) = fleet.key().await;
    let (_, other) = fleet.key().await;
    let (cluster, replicas) = (&mut fleet.cluster, &fleet.replicas);
    let handle = tokio::runtime::Handle::current();
    tokio::task::block_in_place(|| {
        cluster.crash(|| {
            handle.block_on(async {
                for replica in replicas {
                    assert_eq!(check(replica, &other).await.unwrap(), pb::Reason::Ok);
                }
                let refused = revoke(&replicas[0], &id, None).await;
                assert!(is_unavailable(&refused, "NOT_RECORDED"), "{refused:?}");
                assert_eq!(check(&replicas[0], &token).await.unwrap(), pb::Reason::Revoked, "denied here");
                assert_eq!(check(&replicas[1], &token).await.unwrap(), pb::Reason::Ok, "and nowhere else");
            });
        });
    });
    let end = Instant::now() + PATIENCE;
    while revoke(&fleet.replicas[0], &id, None).await.is_err() {
        assert!(Instant::now() < end, "the database is there again");
    }
    assert_eq!(check(&fleet.replicas[1], &token).await.unwrap(), pb::Reason::Revoked);
}

#[tokio::test(flavor = "multi_thread")]
async fn database_down_for_longer_than_a_lease_is_unavailable_everywhere() {
    let mut fleet = Fleet::start(2, "1s").await;
    let (dead, known) = fleet.key().await;
    revoke(&fleet.replicas[0], &dead, None).await.unwrap();
    let (_, token) = fleet.key().await;
    let (cluster, replicas) = (&mut fleet.cluster, &fleet.replicas);
    let handle = tokio::runtime::Handle::current();
    tokio::task::block_in_place(|| {
        cluster.restart(|_| {
            handle.block_on(async {
                for replica in replicas {
                    until_unavailable(replica, &token).await;
                    assert_eq!(check(replica, &known).await.unwrap(), pb::Reason::Revoked);
                    until_ready(replica, 503);
                    let changed = replica.root().create(plain_key()).await;
                    assert!(is_unavailable(&changed, "LEASE_LOST"), "its caller may be revoked: {changed:?}");
                }
            });
        });
    });
    for replica in &fleet.replicas {
        until_ready(replica, 200);
        assert_eq!(check(replica, &token).await.unwrap(), pb::Reason::Ok);
        let log = replica.process.stderr();
        assert!(log.lines().any(|line| line.contains("ERROR") && line.contains("has run out")), "{log}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn database_with_a_full_disk_is_told_apart_and_records_nothing() {
    let fleet = Fleet::start(1, "default").await;
    let (id, token) = fleet.key().await;
    fleet.sql(
        "CREATE FUNCTION public.no_room() RETURNS trigger LANGUAGE plpgsql AS \
         $$ BEGIN RAISE EXCEPTION USING ERRCODE = 'disk_full'; END $$; \
         CREATE TRIGGER no_room BEFORE INSERT ON keyward.log FOR EACH ROW EXECUTE FUNCTION public.no_room()",
    );
    let refused = revoke(&fleet.replicas[0], &id, None).await.unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused:?}");
    assert!(refused.message().contains("not recorded"), "{refused:?}");
    assert_eq!(check(&fleet.replicas[0], &token).await.unwrap(), pb::Reason::Revoked, "denied here");
    assert_eq!(fleet.sql("SELECT count(*) FROM keyward.keys WHERE revoked_at IS NOT NULL"), "0");
}

#[tokio::test(flavor = "multi_thread")]
async fn sync_standby_frozen_is_as_if_the_database_were_down() {
    let fleet = Fleet::start(1, "1s").await;
    let (id, token) = fleet.key().await;
    let standby = |names: &str| {
        fleet.cluster.sql("postgres", &format!("ALTER SYSTEM SET synchronous_standby_names = '{names}'"));
        fleet.cluster.sql("postgres", "SELECT pg_reload_conf()");
    };
    standby("nobody");
    until_unavailable(&fleet.replicas[0], &token).await;
    until_ready(&fleet.replicas[0], 503);
    standby("");
    until_ready(&fleet.replicas[0], 200);
    revoke(&fleet.replicas[0], &id, None).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn listen_dead_costs_time_and_nothing_else() {
    let mut fleet = Fleet::start(1, "default").await;
    // A pooler in transaction mode passes no notifications.
    let bouncer = Bouncer::start(&fleet.cluster);
    fleet.join_over(&bouncer.url("keys"), "default");
    for _ in 0..5 {
        let (id, token) = fleet.key().await;
        let said = revoke(&fleet.replicas[0], &id, None).await.unwrap().propagation.unwrap();
        assert_eq!(silent(&said), [""; 0], "polling brings it");
        assert_eq!(check(&fleet.replicas[1], &token).await.unwrap(), pb::Reason::Revoked);
        let (id, token) = fleet.key().await;
        let said = revoke(&fleet.replicas[1], &id, None).await.unwrap().propagation.unwrap();
        assert_eq!(silent(&said), [""; 0], "what others acknowledge is not heard here, and looked for");
        assert_eq!(check(&fleet.replicas[0], &token).await.unwrap(), pb::Reason::Revoked);
    }
}

// Acknowledgments that are told. -------------------------------------------------------------------------------------

const TOLD: &str = "keyward_acks";

#[tokio::test(flavor = "multi_thread")]
async fn acknowledgments_are_told_of_what_takes_something_away_and_of_nothing_else() {
    let fleet = Fleet::start(3, "default").await;
    let mut listener = sqlx::postgres::PgListener::connect(&fleet.home.url()).await.unwrap();
    listener.listen(TOLD).await.unwrap();
    let (id, _) = fleet.key().await;
    // Each has renewed twice since, and acknowledged the key that way.
    let renewals = || fleet.sql("SELECT min(renew_seq) FROM keyward.replicas").parse::<u64>().unwrap();
    let begun = renewals();
    wait_for("two renewals", || (renewals() >= begun + 2).then_some(()));
    let revision = revoke(&fleet.replicas[0], &id, None).await.unwrap().revision;
    let own = fleet.sql("SELECT encode(id, 'hex') FROM keyward.replicas WHERE name = 'r0'");
    for _ in 0..2 {
        let told = tokio::time::timeout(PATIENCE, listener.recv()).await.unwrap().unwrap();
        let (who, upto) = told.payload().split_once(' ').unwrap();
        assert!(upto == revision.to_string() && who != own, "{}", told.payload());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_acknowledgment_that_is_not_told_is_found() {
    let fleet = Fleet::start(1, "default").await;
    let (id, _) = fleet.key().await;
    // A replica that acknowledges as those of the version before do.
    fleet.sql("INSERT INTO keyward.replicas SELECT decode(repeat('01', 16), 'hex'), 'old', head, 1, 0 FROM keyward.meta");
    let acknowledge = "UPDATE keyward.replicas SET applied = head FROM keyward.meta WHERE name = 'old'";
    let head = || fleet.sql("SELECT head FROM keyward.meta");
    let before = head();
    let (said, ()) = tokio::join!(revoke(&fleet.replicas[0], &id, None), async {
        tokio::task::block_in_place(|| {
            wait_for("the commit", || (head() != before).then_some(()));
            fleet.sql(acknowledge);
        });
    });
    let said = said.unwrap().propagation.unwrap();
    assert_eq!((said.confirmed.len(), silent(&said)), (2, vec![]));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_acknowledgment_that_anybody_told_confirms_nothing() {
    let fleet = Fleet::start(2, "default").await;
    let (id, token) = fleet.key().await;
    let other = fleet.sql("SELECT encode(id, 'hex') FROM keyward.replicas WHERE name = 'r1'");
    signal("-STOP", &fleet.replicas[1].process);
    let deadline = Duration::from_secs(2);
    let revoking = revoke(&fleet.replicas[0], &id, Some(deadline));
    let (said, ()) = tokio::join!(revoking, async {
        // Before it is committed, and after.
        let end = Instant::now() + deadline / 2;
        while Instant::now() < end {
            tokio::task::block_in_place(|| fleet.sql(&format!("NOTIFY {TOLD}, '{other} 1000000'")));
        }
    });
    assert_eq!(silent(&report(&said.unwrap_err())), ["r1"]);
    signal("-CONT", &fleet.replicas[1].process);
    let said = revoke(&fleet.replicas[0], &id, None).await.unwrap().propagation.unwrap();
    assert_eq!(silent(&said), [""; 0]);
    assert_eq!(check(&fleet.replicas[1], &token).await.unwrap(), pb::Reason::Revoked);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_hears_nothing_for_a_while_revokes_all_the_same() {
    let fleet = Fleet::start(2, "default").await;
    for _ in 0..5 {
        let (id, token) = fleet.key().await;
        fleet.sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE 'LISTEN%'");
        let said = revoke(&fleet.replicas[0], &id, None).await.unwrap().propagation.unwrap();
        assert_eq!(silent(&said), [""; 0]);
        assert_eq!(check(&fleet.replicas[1], &token).await.unwrap(), pb::Reason::Revoked);
    }
}

/// The database goes back to what it was when `copy` was made, with the help of `change`.
fn go_back(cluster: &mut Cluster, copy: &std::path::Path, change: impl FnOnce(&std::path::Path)) {
    cluster.restart(|data| {
        std::fs::remove_dir_all(data).unwrap();
        run(Command::new("cp").arg("-a").arg(copy).arg(data));
        change(data);
    });
}

fn run(command: &mut Command) {
    assert!(command.status().unwrap().success(), "{command:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn backup_restored_is_met_by_replicas_that_deny_and_stop_until_it_is_accepted() {
    let mut fleet = Fleet::start(2, "1s").await;
    let (id, token) = fleet.key().await;
    let copy = fleet.home.path("copy");
    fleet.cluster.restart(|data| run(Command::new("cp").arg("-a").arg(data).arg(&copy)));
    for replica in &fleet.replicas {
        until_ready(replica, 200);
    }
    revoke(&fleet.replicas[0], &id, None).await.unwrap();
    go_back(&mut fleet.cluster, &copy, |_| {});
    for replica in &fleet.replicas {
        wait_for("the replica to know", || {
            replica.page("/metrics").1.contains("keyward_regressed 1").then_some(())
        });
        assert_eq!(
            check(replica, &token).await.unwrap(),
            pb::Reason::Revoked,
            "what it knows to be dead is denied"
        );
        until_ready(replica, 503);
    }
    assert_eq!(fleet.sql("SELECT count(*) FROM keyward.keys WHERE revoked_at IS NOT NULL"), "0");
    assert!(fleet.operator(&["accept-regression"]).starts_with("Accepted: epoch "));
    for replica in &fleet.replicas {
        until_ready(replica, 200);
        assert_eq!(check(replica, &token).await.unwrap(), pb::Reason::Revoked, "it was revoked again");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn async_failover_that_lost_the_revoke_is_denied_by_who_knew_and_was_warned_of() {
    let mut fleet = Fleet::start(1, "1s").await;
    let (id, token) = fleet.key().await;
    let copy = fleet.home.path("copy");
    fleet.cluster.restart(|data| run(Command::new("cp").arg("-a").arg(data).arg(&copy)));
    until_ready(&fleet.replicas[0], 200);
    let said = revoke(&fleet.replicas[0], &id, None).await.unwrap().propagation.unwrap();
    assert!(!said.sync_replicated, "no standby has it");
    // The copy is a standby that lagged, and is promoted.
    go_back(&mut fleet.cluster, &copy, |data| {
        std::fs::copy(data.join("PG_VERSION"), data.join("standby.signal")).unwrap();
        let owner = std::fs::metadata(data).map(|it| std::os::unix::fs::MetadataExt::uid(&it)).unwrap();
        std::os::unix::fs::chown(data.join("standby.signal"), Some(owner), None).unwrap();
    });
    fleet.cluster.sql("postgres", "SELECT pg_promote()");
    let knew = &fleet.replicas[0];
    wait_for("the replica to know", || knew.page("/metrics").1.contains("keyward_regressed 1").then_some(()));
    assert_eq!(check(knew, &token).await.unwrap(), pb::Reason::Revoked);
    until_ready(knew, 503);
    // What the guarantee does not cover: who comes new believes the database.
    fleet.join("1s");
    assert_eq!(check(&fleet.replicas[1], &token).await.unwrap(), pb::Reason::Ok);
    // Another life of the database: rows may have been lost, so only time helps.
    let said = revoke(&fleet.replicas[1], &id, None).await.unwrap().propagation.unwrap();
    assert!(said.complete);
}

#[tokio::test(flavor = "multi_thread")]
async fn lease_gone_is_503_through_envoy() {
    let mut fleet = Fleet::start(1, "1s").await;
    let (_, token) = fleet.key().await;
    let upstream = Upstream::start();
    let envoy = Envoy::start(&minimal(fleet.replicas[0].address, &upstream));
    let send = || Request::get("/v1/monitors").bearer(&token).send(envoy.listener("edge")).status;
    assert_eq!(send(), 200);
    tokio::task::block_in_place(|| {
        fleet.cluster.restart(|_| wait_for("the lease to run out", || (send() == 503).then_some(())));
    });
    wait_for("the lease to be there again", || (send() == 200).then_some(()));
}

// Limits and quotas. -------------------------------------------------------------------------------------------------

/// Asks with 64 callers, spread over the replicas, `each` times: how many Checks were allowed, and how many said that a
/// limit was not exact. A Check that could not be answered is asked again.
async fn ask_with_64(fleet: &Fleet, token: &str, each: u64) -> (u64, u64) {
    let callers = (0..64).map(|at| {
        let (mut caller, token) = (fleet.replicas[at % fleet.replicas.len()].root(), token.to_owned());
        tokio::spawn(async move {
            let (mut allowed, mut inexact) = (0, 0);
            for _ in 0..each {
                let answer = loop {
                    match caller.authz.check(question(&token)).await {
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

async fn known_everywhere(fleet: &Fleet, made: pb::CreateKeyRequest) -> String {
    for replica in &fleet.replicas {
        // Each hears of the others with its next renewal.
        let all = format!("keyward_replicas {}\n", fleet.replicas.len());
        wait_for("a replica to know of the others", || {
            replica.page("/metrics").1.contains(&all).then_some(())
        });
    }
    let made = fleet.replicas[0].root().keys.create(made).await.unwrap().into_inner();
    for replica in &fleet.replicas {
        let dry =
            pb::CheckRequest { min_revision: Some(made.revision), dry_run: true, ..question(&made.token) };
        let end = Instant::now() + PATIENCE;
        while replica.root().authz.check(dry.clone()).await.is_err() {
            assert!(Instant::now() < end, "a replica does not learn of a key");
        }
    }
    made.token
}

fn a_hundred_a_day() -> pb::CreateKeyRequest {
    let window = Some(prost_types::Duration { seconds: 24 * 60 * 60, nanos: 0 });
    let limit = pb::RateLimit { name: "daily".to_owned(), limit: 100, window };
    pb::CreateKeyRequest { rate_limits: vec![limit], ..plain_key() }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_limit_in_redis_allows_exactly_its_units_to_64_callers_of_two_servers() {
    let redis = RedisServer::start();
    let fleet =
        Fleet::configured(2, &format!("[limits]\nbackend = 'redis'\nurl = '{}'\n", redis.url())).await;
    let token = known_everywhere(&fleet, a_hundred_a_day()).await;
    assert_eq!(ask_with_64(&fleet, &token, 4).await, (100, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_limit_without_redis_is_each_servers_own_and_says_so() {
    let fleet = Fleet::start(2, "default").await;
    let token = known_everywhere(&fleet, a_hundred_a_day()).await;
    assert_eq!(ask_with_64(&fleet, &token, 4).await, (200, 256));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_quota_over_two_servers_is_overspent_by_a_block_each_at_the_most() {
    let fleet = Fleet::start(2, "default").await;
    let quota = Some(pb::Quota { limit: 1000, period: pb::QuotaPeriod::Total.into() });
    let token = known_everywhere(&fleet, pb::CreateKeyRequest { quota, ..plain_key() }).await;
    let (allowed, _) = ask_with_64(&fleet, &token, 20).await;
    assert!((1000..=1100).contains(&allowed), "{allowed}");
}

// Operators. ---------------------------------------------------------------------------------------------------------

#[tokio::test(flavor = "multi_thread")]
async fn operators_see_who_serves_and_change_the_lease() {
    let fleet = Fleet::start(2, "1s").await;
    let listed = fleet.operator(&["list"]);
    assert!(listed.contains("r0  ") && listed.contains("r1  ") && listed.contains("lease 1s"), "{listed}");
    assert_eq!(fleet.operator(&["lease", "static"]), "The lease is static (never runs out).\n");
    assert_eq!(fleet.operator(&["lease", "2s"]), "The lease is 2s.\n");
    assert_eq!(fleet.operator(&["lease"]), "2s; nobody holds one longer than 2s.\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn operators_hear_what_is_wrong() {
    let fleet = Fleet::start(1, "1s").await;
    let refused = |arguments: &[&str]| {
        let ended = fleet.home.run(fleet.home.command(["replicas"].iter().chain(arguments)));
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
    let fleet = Fleet::start(1, "1s").await;
    let mut old = fleet.replicas[0].root();
    let url = fleet.home.url();
    let ended = fleet.home.run(fleet.home.command(["root-key", "reset", "--database", &url]));
    assert_eq!(ended.code, Some(0), "{ended:?}");
    let refused = old.check("anything").await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated);
}
