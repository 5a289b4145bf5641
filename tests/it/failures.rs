//! The failure table of `docs/reliability.md`: each test is named after its row. The servers are real processes, and so are
//! the database, its standby, and the pooler that stands for the network between them. The rows of the embedded database
//! are in `sqlite_file.rs`.

use std::{
    path::PathBuf,
    process::Command,
    time::{Duration, Instant},
};

use keyward::pb;
use tonic::Code;

use crate::{
    envoy::minimal,
    http::Request,
    postgres::{Bouncer, Cluster, WALL, url},
    process::{PATIENCE, plain_key, question, wait_for},
    proxy::Envoy,
    replicas::{
        Fleet, check, is_unavailable, report, revoke, signal, silent, until_ready, until_unavailable,
    },
    upstream::Upstream,
};

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
    let mistyped = format!("kw_live_{}", "0".repeat(49));
    for unknown in ["nobody", &mistyped] {
        assert!(
            is_unavailable(&check(there, unknown).await, "LEASE_LOST"),
            "it may have been made or imported since"
        );
    }
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

/// Whatever is written to this table finds the disk full.
fn no_room(fleet: &Fleet, table: &str) {
    fleet.sql(&format!(
        "CREATE FUNCTION public.no_room() RETURNS trigger LANGUAGE plpgsql AS \
         $$ BEGIN RAISE EXCEPTION USING ERRCODE = 'disk_full'; END $$; \
         CREATE TRIGGER no_room BEFORE INSERT OR UPDATE ON keyward.{table} \
         FOR EACH ROW EXECUTE FUNCTION public.no_room()"
    ));
}

#[tokio::test(flavor = "multi_thread")]
async fn database_disk_full_is_told_apart_and_records_nothing() {
    let fleet = Fleet::start(1, "default").await;
    let (id, token) = fleet.key().await;
    no_room(&fleet, "log");
    let refused = revoke(&fleet.replicas[0], &id, None).await.unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused:?}");
    assert!(refused.message().contains("not recorded"), "{refused:?}");
    assert_eq!(check(&fleet.replicas[0], &token).await.unwrap(), pb::Reason::Revoked, "denied here");
    assert_eq!(fleet.sql("SELECT count(*) FROM keyward.keys WHERE revoked_at IS NOT NULL"), "0");
}

#[tokio::test(flavor = "multi_thread")]
async fn database_disk_full_for_longer_than_a_lease_is_as_if_it_were_down() {
    let fleet = Fleet::start(1, "1s").await;
    let (_, token) = fleet.key().await;
    no_room(&fleet, "replicas");
    until_unavailable(&fleet.replicas[0], &token).await;
    until_ready(&fleet.replicas[0], 503);
    fleet.sql("DROP TRIGGER no_room ON keyward.replicas");
    until_ready(&fleet.replicas[0], 200);
    assert_eq!(check(&fleet.replicas[0], &token).await.unwrap(), pb::Reason::Ok);
}

/// Ends every session of the replicas that began before this call.
fn cut_sessions(fleet: &Fleet) {
    let now = fleet.sql("SELECT clock_timestamp()");
    let end = format!(
        "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity \
         WHERE usename = 'keyward' AND backend_start < '{now}'"
    );
    wait_for("the sessions to end", || (fleet.sql(&end) == "0").then_some(()));
}

/// An address of the database that leads to the primary, and after a failover to what is left as a standby.
struct Address {
    way: PathBuf,
    standby: Cluster,
}

impl Address {
    /// Adds a replica that reaches the database by this address.
    fn join(fleet: &mut Fleet, lease: &str) -> Address {
        let address = Address { way: fleet.cluster.socket().join("way"), standby: fleet.cluster.standby() };
        address.lead_to(&fleet.cluster);
        fleet.join_over(&url(&address.way, 5432, "keys"), lease);
        address
    }

    /// Sessions that are there stay as they are.
    fn lead_to(&self, cluster: &Cluster) {
        let _ = std::fs::remove_file(&self.way);
        std::os::unix::fs::symlink(cluster.socket(), &self.way).unwrap();
    }

    fn lead_to_standby(&self, fleet: &Fleet) {
        self.lead_to(&self.standby);
        cut_sessions(fleet);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn database_read_only_for_less_than_a_lease_records_nothing_and_says_so() {
    let mut fleet = Fleet::start(1, "default").await;
    let address = Address::join(&mut fleet, "default");
    let (id, token) = fleet.key().await;
    let (_, other) = fleet.key().await;
    address.lead_to_standby(&fleet);
    let [elsewhere, there] = fleet.replicas.as_slice() else { unreachable!() };
    let refused = revoke(there, &id, None).await;
    assert!(is_unavailable(&refused, "NOT_RECORDED"), "{refused:?}");
    let said = refused.unwrap_err().message().to_owned();
    assert!(said.contains("not recorded") && said.contains("to another server"), "{said}");
    let made = there.root().create(plain_key()).await.unwrap_err();
    assert_eq!(made.code(), Code::Unavailable, "{made:?}");
    assert_eq!(check(there, &token).await.unwrap(), pb::Reason::Revoked, "denied here");
    assert_eq!(check(elsewhere, &token).await.unwrap(), pb::Reason::Ok, "and nowhere else");
    assert_eq!(check(there, &other).await.unwrap(), pb::Reason::Ok, "Checks go on");
    assert_eq!(fleet.sql("SELECT count(*) FROM keyward.keys WHERE revoked_at IS NOT NULL"), "0");
    wait_for("the log to say what is wrong", || {
        let log = there.process.stderr();
        log.lines().any(|line| line.contains("WARN") && line.contains("it is a standby")).then_some(())
    });
    // It finds the primary although nothing ends what leads to the standby.
    address.lead_to(&fleet.cluster);
    revoke(there, &id, None).await.unwrap();
    assert_eq!(check(elsewhere, &token).await.unwrap(), pb::Reason::Revoked);
}

#[tokio::test(flavor = "multi_thread")]
async fn database_read_only_for_longer_than_a_lease_is_as_if_it_were_down() {
    let mut fleet = Fleet::start(1, "1s").await;
    let address = Address::join(&mut fleet, "1s");
    let (dead, known) = fleet.key().await;
    revoke(&fleet.replicas[0], &dead, None).await.unwrap();
    let (id, token) = fleet.key().await;
    let (second, _) = fleet.key().await;
    address.lead_to_standby(&fleet);
    let [elsewhere, there] = fleet.replicas.as_slice() else { unreachable!() };
    until_unavailable(there, &token).await;
    until_ready(there, 503);
    assert_eq!(check(there, &known).await.unwrap(), pb::Reason::Revoked, "a denial needs no lease");
    let refused = revoke(there, &id, None).await;
    assert!(is_unavailable(&refused, "LEASE_LOST"), "its caller may be revoked: {refused:?}");
    let said = revoke(elsewhere, &second, None).await.unwrap().propagation.unwrap();
    assert!(said.complete && silent(&said) == ["r1"], "{said:?}");
    address.lead_to(&fleet.cluster);
    until_ready(there, 200);
    assert_eq!(check(there, &token).await.unwrap(), pb::Reason::Ok);
    revoke(there, &id, None).await.unwrap();
    assert_eq!(check(elsewhere, &token).await.unwrap(), pb::Reason::Revoked);
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

/// A machine cannot be made to stand still here. To one that did, the database's clock has run on, and that is all that there is
/// to see: so it does.
#[tokio::test(flavor = "multi_thread")]
async fn machine_frozen_and_thawed_is_noticed_counted_and_told_once() {
    let fleet = Fleet::start(1, "3s").await;
    let (_, token) = fleet.key().await;
    let replica = &fleet.replicas[0];
    fleet.sql(WALL);
    cut_sessions(&fleet);
    let frozen =
        |times: u32| replica.page("/metrics").1.contains(&format!("keyward_clock_frozen_total {times}\n"));
    let renewals = || fleet.sql("SELECT renew_seq FROM keyward.replicas").parse::<u64>().unwrap();
    let two_renewals = || {
        let begun = renewals();
        wait_for("two renewals", || (renewals() >= begun + 2).then_some(()));
    };
    two_renewals();
    assert!(frozen(0), "nothing has stood still");
    for times in 1..=2 {
        fleet.sql("UPDATE public.wall SET ahead = ahead + interval '1 h'");
        wait_for("the freeze to be counted", || frozen(times).then_some(()));
        two_renewals();
        assert!(frozen(times), "it is counted once");
    }
    until_ready(replica, 200);
    assert_eq!(check(replica, &token).await.unwrap(), pb::Reason::Ok);
    let log = replica.process.stderr();
    let told: Vec<_> = log.lines().filter(|line| line.contains("clock stood still")).collect();
    assert_eq!(told.len(), 2, "{log}");
    assert!(
        told.iter().all(|line| line.contains("WARN") && line.contains("Keep the machine from")),
        "{told:?}"
    );
    // What was missed is more than the lease, and is taken off it: only the renewal after that allows again.
    assert_eq!(log.matches("the lease has run out").count(), 2, "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wall_clock_that_differs_from_the_databases_is_measured_and_logged_once() {
    let fleet = Fleet::start(1, "3s").await;
    let replica = &fleet.replicas[0];
    let offset = || {
        let page = replica.page("/metrics").1;
        let line = page.lines().find_map(|line| line.strip_prefix("keyward_clock_offset_seconds "));
        line.map(|value| value.parse::<f64>().unwrap())
    };
    wait_for("the first reading", || offset().filter(|offset| offset.abs() < 0.5));
    assert!(!replica.process.stderr().contains("wall clock differs"));
    fleet.sql(WALL);
    cut_sessions(&fleet);
    fleet.sql("UPDATE public.wall SET ahead = interval '90 s'");
    wait_for("a reading of the new time", || offset().filter(|offset| (-91.0..=-89.0).contains(offset)));
    let renewals = || fleet.sql("SELECT renew_seq FROM keyward.replicas").parse::<u64>().unwrap();
    let begun = renewals();
    wait_for("more readings", || (renewals() >= begun + 3).then_some(()));
    let log = replica.process.stderr();
    let told: Vec<_> = log.lines().filter(|line| line.contains("wall clock differs")).collect();
    // Once an hour; the hour may end just now.
    assert!((1..=2).contains(&told.len()), "{log}");
    assert!(told[0].contains("WARN") && told[0].contains("offset_seconds=-"), "{told:?}");
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
    // A replica that lost its lease in the restart was not waited for.
    wait_for("both replicas to know of the revocation", || {
        let behind =
            "SELECT count(*) FROM keyward.replicas WHERE applied < (SELECT max(revision) FROM keyward.keys)";
        (fleet.sql(behind) == "0").then_some(())
    });
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
    assert!(fleet.operator(&["accept-regression", "--yes"]).starts_with("Accepted: epoch "));
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
