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
    envoy::minimal_config,
    postgres::{PgBouncer, PostgresServer, WALL_CLOCK_SQL, url},
    process::{WAIT_TIMEOUT, check_request, plain_key_request, wait_for},
    proxy::EnvoyProcess,
    raw_http::RawRequest,
    replicas::{
        ReplicaCluster, check_token, is_unavailable, propagation_report, revoke_with_deadline, send_signal,
        unconfirmed_replicas, wait_until_ready, wait_until_unavailable,
    },
    upstream::EchoUpstream,
};

#[tokio::test(flavor = "multi_thread")]
async fn replica_kill_9_is_waited_for_until_its_lease_has_run_out() {
    let mut fleet = ReplicaCluster::start(2, "2s").await;
    let (id, _) = fleet.create_key().await;
    fleet.replicas.pop().unwrap().process.kill();
    let begun = Instant::now();
    let said = revoke_with_deadline(&fleet.replicas[0], &id, None).await.unwrap().propagation.unwrap();
    assert!(said.complete);
    assert_eq!((said.confirmed.clone(), unconfirmed_replicas(&said)), (vec!["r0".to_owned()], vec!["r1"]));
    // It could not be sooner: its last renewal is at most that much older than the kill.
    assert!(begun.elapsed() > Duration::from_secs(1));
    wait_for("the dead row to be removed", || {
        (fleet.sql("SELECT count(*) FROM keyward.replicas") == "1").then_some(())
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn replica_kill_9_is_not_waited_for_once_it_is_attested_dead() {
    let mut fleet = ReplicaCluster::start(2, "static").await;
    let (id, _) = fleet.create_key().await;
    fleet.replicas.pop().unwrap().process.kill();
    let waited =
        revoke_with_deadline(&fleet.replicas[0], &id, Some(Duration::from_secs(1))).await.unwrap_err();
    let said = propagation_report(&waited);
    assert_eq!((said.complete, unconfirmed_replicas(&said), said.complete_by), (false, vec!["r1"], None));
    let told = fleet.run_operator_command(&["attest-dead", "r1", "--seen-gone"]);
    assert!(told.starts_with("Changes no longer wait for r1 ("), "{told}");
    assert!(revoke_with_deadline(&fleet.replicas[0], &id, None).await.unwrap().propagation.unwrap().complete);
}

#[tokio::test(flavor = "multi_thread")]
async fn replica_sigstop_longer_than_its_lease_then_cont_allows_nothing_that_was_revoked_meanwhile() {
    let fleet = ReplicaCluster::start(2, "1s").await;
    let mut callers: Vec<_> = (0..8).map(|_| fleet.replicas[1].root_caller()).collect();
    for caller in &mut callers {
        // The connections are there before the process stands still.
        caller.check_token("nobody").await.unwrap();
    }
    let (id, token) = fleet.create_key().await;
    send_signal("-STOP", &fleet.replicas[1].process);
    let said = revoke_with_deadline(&fleet.replicas[0], &id, None).await.unwrap().propagation.unwrap();
    assert!(said.complete && unconfirmed_replicas(&said) == ["r1"], "{said:?}");
    // Asked while it stands still: these are the first that it hears of.
    let asked: Vec<_> = callers
        .into_iter()
        .map(|mut caller| {
            let token = token.clone();
            tokio::spawn(async move { caller.check_token(&token).await })
        })
        .collect();
    send_signal("-CONT", &fleet.replicas[1].process);
    for answer in asked {
        let answer = answer.await.unwrap();
        assert!(
            is_unavailable(&answer, "LEASE_LOST")
                || answer.as_ref().is_ok_and(|reason| *reason == pb::Reason::Revoked),
            "{answer:?}"
        );
    }
    wait_until_ready(&fleet.replicas[1], 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn partition_of_a_replica_from_its_database_ends_with_its_lease() {
    let mut fleet = ReplicaCluster::start(1, "1s").await;
    let bouncer = PgBouncer::start(&fleet.cluster);
    fleet.add_replica_at(&bouncer.url("keys"), "1s");
    let (dead, known) = fleet.create_key().await;
    revoke_with_deadline(&fleet.replicas[0], &dead, None).await.unwrap();
    let (id, token) = fleet.create_key().await;
    bouncer.pause();
    let said = revoke_with_deadline(&fleet.replicas[0], &id, None).await.unwrap().propagation.unwrap();
    assert!(said.complete && unconfirmed_replicas(&said) == ["r1"], "{said:?}");
    let there = &fleet.replicas[1];
    assert!(is_unavailable(&check_token(there, &token).await, "LEASE_LOST"));
    assert_eq!(check_token(there, &known).await.unwrap(), pb::Reason::Revoked, "a denial needs no lease");
    let mistyped = format!("kw_live_{}", "0".repeat(49));
    for unknown in ["nobody", &mistyped] {
        assert!(
            is_unavailable(&check_token(there, unknown).await, "LEASE_LOST"),
            "it may have been made or imported since"
        );
    }
    wait_until_ready(there, 503);
    bouncer.resume();
    wait_until_ready(there, 200);
    assert_eq!(check_token(there, &token).await.unwrap(), pb::Reason::Revoked);
}

#[tokio::test(flavor = "multi_thread")]
async fn partition_of_a_static_replica_is_told_and_followed() {
    let mut fleet = ReplicaCluster::start(1, "static").await;
    let bouncer = PgBouncer::start(&fleet.cluster);
    fleet.add_replica_at(&bouncer.url("keys"), "static");
    let (id, token) = fleet.create_key().await;
    bouncer.pause();
    let waited =
        revoke_with_deadline(&fleet.replicas[0], &id, Some(Duration::from_secs(1))).await.unwrap_err();
    assert_eq!(unconfirmed_replicas(&propagation_report(&waited)), ["r1"]);
    let answer =
        fleet.replicas[1].root_caller().authz.check(check_request(&token)).await.unwrap().into_inner();
    assert!(answer.allowed, "it keeps answering, and says from how old a state");
    assert!(answer.staleness.unwrap() != prost_types::Duration::default());
    let revision = fleet.replicas[0].root_caller().get_key(&id).await.unwrap().revision;
    let follow = pb::WatchPropagationRequest { revision };
    let mut reports =
        fleet.replicas[0].root_caller().keys.watch_propagation(follow).await.unwrap().into_inner();
    let first = reports.message().await.unwrap().unwrap();
    assert_eq!(unconfirmed_replicas(&first.propagation.unwrap()), ["r1"]);
    bouncer.resume();
    let mut last = None;
    while let Some(report) = reports.message().await.unwrap() {
        assert_eq!(report.revision, revision);
        last = report.propagation;
    }
    assert!(last.unwrap().complete);
    assert_eq!(check_token(&fleet.replicas[1], &token).await.unwrap(), pb::Reason::Revoked);
}

#[tokio::test(flavor = "multi_thread")]
async fn database_down_for_less_than_a_lease_is_not_noticed_by_checks() {
    let mut fleet = ReplicaCluster::start(2, "default").await;
    let (id, token) = fleet.create_key().await;
    let (_, other) = fleet.create_key().await;
    let (cluster, replicas) = (&mut fleet.cluster, &fleet.replicas);
    let handle = tokio::runtime::Handle::current();
    tokio::task::block_in_place(|| {
        cluster.crash(|| {
            handle.block_on(async {
                for replica in replicas {
                    assert_eq!(check_token(replica, &other).await.unwrap(), pb::Reason::Ok);
                }
                let refused = revoke_with_deadline(&replicas[0], &id, None).await;
                assert!(is_unavailable(&refused, "NOT_RECORDED"), "{refused:?}");
                assert_eq!(
                    check_token(&replicas[0], &token).await.unwrap(),
                    pb::Reason::Revoked,
                    "denied here"
                );
                assert_eq!(
                    check_token(&replicas[1], &token).await.unwrap(),
                    pb::Reason::Ok,
                    "and nowhere else"
                );
            });
        });
    });
    let end = Instant::now() + WAIT_TIMEOUT;
    while revoke_with_deadline(&fleet.replicas[0], &id, None).await.is_err() {
        assert!(Instant::now() < end, "the database is there again");
    }
    assert_eq!(check_token(&fleet.replicas[1], &token).await.unwrap(), pb::Reason::Revoked);
}

#[tokio::test(flavor = "multi_thread")]
async fn database_down_for_longer_than_a_lease_is_unavailable_everywhere() {
    let mut fleet = ReplicaCluster::start(2, "1s").await;
    let (dead, known) = fleet.create_key().await;
    revoke_with_deadline(&fleet.replicas[0], &dead, None).await.unwrap();
    let (_, token) = fleet.create_key().await;
    let (cluster, replicas) = (&mut fleet.cluster, &fleet.replicas);
    let handle = tokio::runtime::Handle::current();
    tokio::task::block_in_place(|| {
        cluster.restart(|_| {
            handle.block_on(async {
                for replica in replicas {
                    wait_until_unavailable(replica, &token).await;
                    assert_eq!(check_token(replica, &known).await.unwrap(), pb::Reason::Revoked);
                    wait_until_ready(replica, 503);
                    let changed = replica.root_caller().create_key(plain_key_request()).await;
                    assert!(is_unavailable(&changed, "LEASE_LOST"), "its caller may be revoked: {changed:?}");
                }
            });
        });
    });
    for replica in &fleet.replicas {
        wait_until_ready(replica, 200);
        assert_eq!(check_token(replica, &token).await.unwrap(), pb::Reason::Ok);
        let log = replica.process.stderr();
        assert!(log.lines().any(|line| line.contains("ERROR") && line.contains("lease expired")), "{log}");
    }
}

/// Whatever is written to this table finds the disk full.
fn fail_writes_disk_full(fleet: &ReplicaCluster, table: &str) {
    fleet.sql(&format!(
        "CREATE FUNCTION public.no_room() RETURNS trigger LANGUAGE plpgsql AS \
         $$ BEGIN RAISE EXCEPTION USING ERRCODE = 'disk_full'; END $$; \
         CREATE TRIGGER no_room BEFORE INSERT OR UPDATE ON keyward.{table} \
         FOR EACH ROW EXECUTE FUNCTION public.no_room()"
    ));
}

#[tokio::test(flavor = "multi_thread")]
async fn database_disk_full_is_told_apart_and_records_nothing() {
    let fleet = ReplicaCluster::start(1, "default").await;
    let (id, token) = fleet.create_key().await;
    fail_writes_disk_full(&fleet, "log");
    let refused = revoke_with_deadline(&fleet.replicas[0], &id, None).await.unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused:?}");
    assert!(refused.message().contains("not recorded"), "{refused:?}");
    assert_eq!(check_token(&fleet.replicas[0], &token).await.unwrap(), pb::Reason::Revoked, "denied here");
    assert_eq!(fleet.sql("SELECT count(*) FROM keyward.keys WHERE revoked_at IS NOT NULL"), "0");
}

#[tokio::test(flavor = "multi_thread")]
async fn database_disk_full_for_longer_than_a_lease_is_as_if_it_were_down() {
    let fleet = ReplicaCluster::start(1, "1s").await;
    let (_, token) = fleet.create_key().await;
    fail_writes_disk_full(&fleet, "replicas");
    wait_until_unavailable(&fleet.replicas[0], &token).await;
    wait_until_ready(&fleet.replicas[0], 503);
    fleet.sql("DROP TRIGGER no_room ON keyward.replicas");
    wait_until_ready(&fleet.replicas[0], 200);
    assert_eq!(check_token(&fleet.replicas[0], &token).await.unwrap(), pb::Reason::Ok);
}

/// Ends every session of the replicas that began before this call.
fn cut_sessions(fleet: &ReplicaCluster) {
    let now = fleet.sql("SELECT clock_timestamp()");
    let end = format!(
        "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity \
         WHERE usename = 'keyward' AND backend_start < '{now}'"
    );
    wait_for("the sessions to end", || (fleet.sql(&end) == "0").then_some(()));
}

/// An address of the database that leads to the primary, and after a failover to what is left as a standby.
struct SwitchableAddress {
    socket_link: PathBuf,
    standby: PostgresServer,
}

impl SwitchableAddress {
    /// Adds a replica that reaches the database by this address.
    fn join(fleet: &mut ReplicaCluster, lease: &str) -> SwitchableAddress {
        let address = SwitchableAddress {
            socket_link: fleet.cluster.socket().join("way"),
            standby: fleet.cluster.standby(),
        };
        address.lead_to(&fleet.cluster);
        fleet.add_replica_at(&url(&address.socket_link, 5432, "keys"), lease);
        address
    }

    /// Sessions that are there stay as they are.
    fn lead_to(&self, cluster: &PostgresServer) {
        let _ = std::fs::remove_file(&self.socket_link);
        std::os::unix::fs::symlink(cluster.socket(), &self.socket_link).unwrap();
    }

    fn lead_to_standby(&self, fleet: &ReplicaCluster) {
        self.lead_to(&self.standby);
        cut_sessions(fleet);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn database_read_only_for_less_than_a_lease_records_nothing_and_says_so() {
    let mut fleet = ReplicaCluster::start(1, "default").await;
    let address = SwitchableAddress::join(&mut fleet, "default");
    let (id, token) = fleet.create_key().await;
    let (_, other) = fleet.create_key().await;
    address.lead_to_standby(&fleet);
    let [elsewhere, there] = fleet.replicas.as_slice() else { unreachable!() };
    let refused = revoke_with_deadline(there, &id, None).await;
    assert!(is_unavailable(&refused, "NOT_RECORDED"), "{refused:?}");
    let said = refused.unwrap_err().message().to_owned();
    assert!(said.contains("not recorded") && said.contains("on another server"), "{said}");
    let made = there.root_caller().create_key(plain_key_request()).await.unwrap_err();
    assert_eq!(made.code(), Code::Unavailable, "{made:?}");
    assert_eq!(check_token(there, &token).await.unwrap(), pb::Reason::Revoked, "denied here");
    assert_eq!(check_token(elsewhere, &token).await.unwrap(), pb::Reason::Ok, "and nowhere else");
    assert_eq!(check_token(there, &other).await.unwrap(), pb::Reason::Ok, "Checks go on");
    assert_eq!(fleet.sql("SELECT count(*) FROM keyward.keys WHERE revoked_at IS NOT NULL"), "0");
    wait_for("the log to say what is wrong", || {
        let log = there.process.stderr();
        log.lines().any(|line| line.contains("WARN") && line.contains("it is a standby")).then_some(())
    });
    // It finds the primary although nothing ends what leads to the standby.
    address.lead_to(&fleet.cluster);
    revoke_with_deadline(there, &id, None).await.unwrap();
    assert_eq!(check_token(elsewhere, &token).await.unwrap(), pb::Reason::Revoked);
}

#[tokio::test(flavor = "multi_thread")]
async fn database_read_only_for_longer_than_a_lease_is_as_if_it_were_down() {
    let mut fleet = ReplicaCluster::start(1, "1s").await;
    let address = SwitchableAddress::join(&mut fleet, "1s");
    let (dead, known) = fleet.create_key().await;
    revoke_with_deadline(&fleet.replicas[0], &dead, None).await.unwrap();
    let (id, token) = fleet.create_key().await;
    let (second, _) = fleet.create_key().await;
    address.lead_to_standby(&fleet);
    let [elsewhere, there] = fleet.replicas.as_slice() else { unreachable!() };
    wait_until_unavailable(there, &token).await;
    wait_until_ready(there, 503);
    assert_eq!(check_token(there, &known).await.unwrap(), pb::Reason::Revoked, "a denial needs no lease");
    let refused = revoke_with_deadline(there, &id, None).await;
    assert!(is_unavailable(&refused, "LEASE_LOST"), "its caller may be revoked: {refused:?}");
    let said = revoke_with_deadline(elsewhere, &second, None).await.unwrap().propagation.unwrap();
    assert!(said.complete && unconfirmed_replicas(&said) == ["r1"], "{said:?}");
    address.lead_to(&fleet.cluster);
    wait_until_ready(there, 200);
    assert_eq!(check_token(there, &token).await.unwrap(), pb::Reason::Ok);
    revoke_with_deadline(there, &id, None).await.unwrap();
    assert_eq!(check_token(elsewhere, &token).await.unwrap(), pb::Reason::Revoked);
}

#[tokio::test(flavor = "multi_thread")]
async fn sync_standby_frozen_is_as_if_the_database_were_down() {
    let fleet = ReplicaCluster::start(1, "1s").await;
    let (id, token) = fleet.create_key().await;
    let standby = |names: &str| {
        fleet.cluster.sql("postgres", &format!("ALTER SYSTEM SET synchronous_standby_names = '{names}'"));
        fleet.cluster.sql("postgres", "SELECT pg_reload_conf()");
    };
    standby("nobody");
    wait_until_unavailable(&fleet.replicas[0], &token).await;
    wait_until_ready(&fleet.replicas[0], 503);
    standby("");
    wait_until_ready(&fleet.replicas[0], 200);
    revoke_with_deadline(&fleet.replicas[0], &id, None).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn listen_dead_costs_time_and_nothing_else() {
    let mut fleet = ReplicaCluster::start(1, "default").await;
    // A pooler in transaction mode passes no notifications.
    let bouncer = PgBouncer::start(&fleet.cluster);
    fleet.add_replica_at(&bouncer.url("keys"), "default");
    for _ in 0..5 {
        let (id, token) = fleet.create_key().await;
        let said = revoke_with_deadline(&fleet.replicas[0], &id, None).await.unwrap().propagation.unwrap();
        assert_eq!(unconfirmed_replicas(&said), [""; 0], "polling brings it");
        assert_eq!(check_token(&fleet.replicas[1], &token).await.unwrap(), pb::Reason::Revoked);
        let (id, token) = fleet.create_key().await;
        let said = revoke_with_deadline(&fleet.replicas[1], &id, None).await.unwrap().propagation.unwrap();
        assert_eq!(
            unconfirmed_replicas(&said),
            [""; 0],
            "what others acknowledge is not heard here, and looked for"
        );
        assert_eq!(check_token(&fleet.replicas[0], &token).await.unwrap(), pb::Reason::Revoked);
    }
}

/// A machine cannot be made to stand still here. To one that did, the database's clock has run on, and that is all that there is
/// to see: so it does.
#[tokio::test(flavor = "multi_thread")]
async fn machine_frozen_and_thawed_is_noticed_counted_and_told_once() {
    let fleet = ReplicaCluster::start(1, "3s").await;
    let (_, token) = fleet.create_key().await;
    let replica = &fleet.replicas[0];
    fleet.sql(WALL_CLOCK_SQL);
    cut_sessions(&fleet);
    let frozen = |times: u32| {
        replica.fetch_admin_page("/metrics").1.contains(&format!("keyward_clock_frozen_total {times}\n"))
    };
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
    wait_until_ready(replica, 200);
    assert_eq!(check_token(replica, &token).await.unwrap(), pb::Reason::Ok);
    let log = replica.process.stderr();
    let told: Vec<_> = log.lines().filter(|line| line.contains("clock stood still")).collect();
    assert_eq!(told.len(), 2, "{log}");
    assert!(told.iter().all(|line| line.contains("WARN") && line.contains("Do not suspend")), "{told:?}");
    // What was missed is more than the lease, and is taken off it: only the renewal after that allows again.
    assert_eq!(log.matches("lease expired").count(), 2, "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wall_clock_that_differs_from_the_databases_is_measured_and_logged_once() {
    let fleet = ReplicaCluster::start(1, "3s").await;
    let replica = &fleet.replicas[0];
    let offset = || {
        let page = replica.fetch_admin_page("/metrics").1;
        let line = page.lines().find_map(|line| line.strip_prefix("keyward_clock_offset_seconds "));
        line.map(|value| value.parse::<f64>().unwrap())
    };
    wait_for("the first reading", || offset().filter(|offset| offset.abs() < 0.5));
    assert!(!replica.process.stderr().contains("wall clock differs"));
    fleet.sql(WALL_CLOCK_SQL);
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
fn restore_copy(cluster: &mut PostgresServer, copy: &std::path::Path, change: impl FnOnce(&std::path::Path)) {
    cluster.restart(|data| {
        std::fs::remove_dir_all(data).unwrap();
        run_checked(Command::new("cp").arg("-a").arg(copy).arg(data));
        change(data);
    });
}

fn run_checked(command: &mut Command) {
    assert!(command.status().unwrap().success(), "{command:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn backup_restored_is_met_by_replicas_that_deny_and_stop_until_it_is_accepted() {
    let mut fleet = ReplicaCluster::start(2, "1s").await;
    let (id, token) = fleet.create_key().await;
    let copy = fleet.home.path("copy");
    fleet.cluster.restart(|data| run_checked(Command::new("cp").arg("-a").arg(data).arg(&copy)));
    for replica in &fleet.replicas {
        wait_until_ready(replica, 200);
    }
    revoke_with_deadline(&fleet.replicas[0], &id, None).await.unwrap();
    // A replica that lost its lease in the restart was not waited for.
    wait_for("both replicas to know of the revocation", || {
        let behind =
            "SELECT count(*) FROM keyward.replicas WHERE applied < (SELECT max(revision) FROM keyward.keys)";
        (fleet.sql(behind) == "0").then_some(())
    });
    restore_copy(&mut fleet.cluster, &copy, |_| {});
    for replica in &fleet.replicas {
        wait_for("the replica to know", || {
            replica.fetch_admin_page("/metrics").1.contains("keyward_regressed 1").then_some(())
        });
        assert_eq!(
            check_token(replica, &token).await.unwrap(),
            pb::Reason::Revoked,
            "what it knows to be dead is denied"
        );
        wait_until_ready(replica, 503);
    }
    assert_eq!(fleet.sql("SELECT count(*) FROM keyward.keys WHERE revoked_at IS NOT NULL"), "0");
    assert!(fleet.run_operator_command(&["accept-regression", "--yes"]).starts_with("Accepted: epoch "));
    for replica in &fleet.replicas {
        wait_until_ready(replica, 200);
        assert_eq!(check_token(replica, &token).await.unwrap(), pb::Reason::Revoked, "it was revoked again");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn async_failover_that_lost_the_revoke_is_denied_by_who_knew_and_was_warned_of() {
    let mut fleet = ReplicaCluster::start(1, "1s").await;
    let (id, token) = fleet.create_key().await;
    let copy = fleet.home.path("copy");
    fleet.cluster.restart(|data| run_checked(Command::new("cp").arg("-a").arg(data).arg(&copy)));
    wait_until_ready(&fleet.replicas[0], 200);
    let said = revoke_with_deadline(&fleet.replicas[0], &id, None).await.unwrap().propagation.unwrap();
    assert!(!said.sync_replicated, "no standby has it");
    // The copy is a standby that lagged, and is promoted.
    restore_copy(&mut fleet.cluster, &copy, |data| {
        std::fs::copy(data.join("PG_VERSION"), data.join("standby.signal")).unwrap();
        let owner = std::fs::metadata(data).map(|it| std::os::unix::fs::MetadataExt::uid(&it)).unwrap();
        std::os::unix::fs::chown(data.join("standby.signal"), Some(owner), None).unwrap();
    });
    fleet.cluster.sql("postgres", "SELECT pg_promote()");
    let knew = &fleet.replicas[0];
    wait_for("the replica to know", || {
        knew.fetch_admin_page("/metrics").1.contains("keyward_regressed 1").then_some(())
    });
    assert_eq!(check_token(knew, &token).await.unwrap(), pb::Reason::Revoked);
    wait_until_ready(knew, 503);
    // What the guarantee does not cover: who comes new believes the database.
    fleet.add_replica("1s");
    assert_eq!(check_token(&fleet.replicas[1], &token).await.unwrap(), pb::Reason::Ok);
    // Another life of the database: rows may have been lost, so only time helps.
    let said = revoke_with_deadline(&fleet.replicas[1], &id, None).await.unwrap().propagation.unwrap();
    assert!(said.complete);
}

#[tokio::test(flavor = "multi_thread")]
async fn lease_gone_is_503_through_envoy() {
    let mut fleet = ReplicaCluster::start(1, "1s").await;
    let (_, token) = fleet.create_key().await;
    let upstream = EchoUpstream::start();
    let envoy = EnvoyProcess::start(&minimal_config(fleet.replicas[0].address, &upstream));
    let send = || RawRequest::get("/v1/monitors").bearer(&token).send(envoy.listener_address("edge")).status;
    assert_eq!(send(), 200);
    tokio::task::block_in_place(|| {
        fleet.cluster.restart(|_| wait_for("the lease to run out", || (send() == 503).then_some(())));
    });
    wait_for("the lease to be there again", || (send() == 200).then_some(()));
}
