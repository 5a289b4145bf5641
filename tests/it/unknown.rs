//! Calls that make many changes, and hear of some of them nothing: the session of a commit ends before it is answered. The
//! servers are real processes, and so is their database.

use std::time::Duration;

use keyward::pb;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use crate::{
    process::wait_for,
    replicas::{ReplicaCluster, check_token},
    support::error_reason,
};

const KEYS: u16 = 300;

fn row(number: u16) -> pb::ImportKey {
    use sha2::Digest as _;
    pb::ImportKey {
        account: "acme".to_owned(),
        environment: "production".to_owned(),
        name: Some(format!("key {number}")),
        scopes: vec!["monitors:read".to_owned()],
        sha256: sha2::Sha256::digest(token(number)).to_vec(),
        hint: "sk".to_owned(),
        ..Default::default()
    }
}

fn token(number: u16) -> String {
    format!("sk-Legacy.{number:05}+dGhpcyBpcyBhIGxvbmcgc2VjcmV0/~==")
}

async fn import(fleet: &ReplicaCluster, replica: usize) -> Result<Vec<pb::ImportResult>, Status> {
    let keys = (0..KEYS).map(row).collect();
    let request = pb::ImportKeysRequest { keys };
    Ok(fleet.replicas[replica].root_caller().keys.import(request).await?.into_inner().results)
}

async fn bulk_revoke(fleet: &ReplicaCluster) -> Result<pb::BulkRevokeKeysResponse, Status> {
    let request = pb::BulkRevokeKeysRequest { account: "acme".to_owned(), ..Default::default() };
    Ok(fleet.replicas[0].root_caller().keys.bulk_revoke(request).await?.into_inner())
}

/// The first commit that writes a key that `when` holds for ends its own session, and is not recorded.
fn fail_first_commit(fleet: &ReplicaCluster, when: &str) {
    fleet.sql(&format!(
        "CREATE SEQUENCE public.cuts; GRANT USAGE ON SEQUENCE public.cuts TO PUBLIC; \
         CREATE FUNCTION public.cut() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN \
         IF nextval('public.cuts') = 1 THEN PERFORM pg_terminate_backend(pg_backend_pid()); END IF; \
         RETURN NULL; END $$; \
         CREATE CONSTRAINT TRIGGER cut AFTER INSERT OR UPDATE ON keyward.keys DEFERRABLE INITIALLY DEFERRED \
         FOR EACH ROW WHEN ({when}) EXECUTE FUNCTION public.cut()"
    ));
}

/// How many of the call's changes are unknown, as its refusal says it.
#[track_caller]
fn unknown<T: std::fmt::Debug>(answer: Result<T, Status>) -> u64 {
    let status = answer.unwrap_err();
    assert_eq!(
        (status.code(), &*error_reason(&status)),
        (Code::Unavailable, "OUTCOME_UNKNOWN"),
        "{status:?}"
    );
    let metadata = status.get_details_error_info().unwrap().metadata;
    assert_eq!(metadata["changes"], KEYS.to_string());
    metadata["unknown"].parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bulk_revoke_with_unknown_outcomes_says_how_many_and_the_same_call_again_finishes_it() {
    let fleet = ReplicaCluster::start(2, "2s").await;
    assert!(import(&fleet, 0).await.unwrap().iter().all(|result| result.error.is_empty()));
    fail_first_commit(&fleet, "new.name = 'key 7' AND new.revoked_at IS NOT NULL");
    let first = bulk_revoke(&fleet).await;
    assert!((1..=u64::from(KEYS)).contains(&unknown(first)));
    let again = bulk_revoke(&fleet).await.unwrap();
    assert!(again.keys.iter().all(|key| key.revoked) && !again.keys.is_empty(), "{again:?}");
    assert!(again.propagation.unwrap().complete);
    for replica in &fleet.replicas {
        for number in [0, 7, 150, KEYS - 1] {
            assert_eq!(check_token(replica, &token(number)).await.unwrap(), pb::Reason::Revoked, "{number}");
        }
    }
    assert_eq!(fleet.sql("SELECT count(*) FROM keyward.keys WHERE revoked_at IS NOT NULL"), "300");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_import_with_unknown_outcomes_says_how_many_and_the_same_call_again_finishes_it() {
    let fleet = ReplicaCluster::start(1, "default").await;
    fail_first_commit(&fleet, "new.name = 'key 7'");
    assert!((1..=u64::from(KEYS)).contains(&unknown(import(&fleet, 0).await)));
    let again = import(&fleet, 0).await.unwrap();
    assert!(again.iter().all(|result| result.error.is_empty() && result.key.is_some()), "{again:?}");
    assert!(again.iter().any(|result| !result.replayed), "what was not recorded is made now");
    assert_eq!(fleet.sql("SELECT count(*) FROM keyward.keys WHERE name LIKE 'key %'"), "300");
}

/// A commit is recorded and waits for a standby that there is not, and its session ends meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn an_import_that_was_recorded_and_not_answered_is_known_as_done_by_another_replica() {
    let fleet = ReplicaCluster::start(2, "default").await;
    let standby = |names: &str| {
        fleet.cluster.sql("postgres", &format!("ALTER SYSTEM SET synchronous_standby_names = '{names}'"));
        fleet.cluster.sql("postgres", "SELECT pg_reload_conf()");
    };
    standby("nobody");
    let root = fleet.replicas[0].root_caller();
    let importing = tokio::spawn(async move {
        let request = pb::ImportKeysRequest { keys: (0..KEYS).map(row).collect() };
        let mut root = root;
        root.keys.import(request).await.map(|answer| answer.into_inner().results)
    });
    tokio::task::block_in_place(|| {
        wait_for("an import to wait for a standby", || {
            let ended = fleet.sql(
                "SELECT bool_or(pg_terminate_backend(pid)) FROM pg_stat_activity \
                 WHERE wait_event = 'SyncRep' AND query LIKE 'INSERT INTO keys%'",
            );
            (ended == "t").then_some(())
        });
    });
    standby("");
    let first = tokio::time::timeout(Duration::from_secs(60), importing).await.unwrap().unwrap();
    assert!((1..=u64::from(KEYS)).contains(&unknown(first)));
    let again = import(&fleet, 1).await.unwrap();
    assert!(again.iter().all(|result| result.error.is_empty() && result.key.is_some()), "{again:?}");
    assert!(again.iter().any(|result| result.replayed), "it was recorded");
    assert_eq!(fleet.sql("SELECT count(*) FROM keyward.keys WHERE name LIKE 'key %'"), "300");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_whose_keys_were_revoked_with_unknown_outcome_is_removed_by_the_same_call_again() {
    let fleet = ReplicaCluster::start(2, "2s").await;
    let mut root = fleet.replicas[0].root_caller();
    let (role, account, user) = ("agent".to_owned(), "acme".to_owned(), "ann".to_owned());
    let scopes = vec!["monitors:read".to_owned()];
    let put = pb::PutRoleRequest { account: account.clone(), name: role.clone(), scopes: scopes.clone() };
    root.accounts.put_role(put).await.unwrap();
    let member = pb::PutMemberRequest { account: account.clone(), user: user.clone(), role };
    root.accounts.put_member(member).await.unwrap();
    let key = pb::CreateKeyRequest {
        user: user.clone(),
        environment: "production".to_owned(),
        scopes,
        ..Default::default()
    };
    root.keys.create(key).await.unwrap();
    fail_first_commit(&fleet, "new.revoked_at IS NOT NULL");
    let remove = || pb::RemoveMemberRequest { account: account.clone(), user: user.clone() };
    let status = root.accounts.remove_member(remove()).await.unwrap_err();
    assert_eq!(error_reason(&status), "OUTCOME_UNKNOWN", "{status:?}");
    let done = root.accounts.remove_member(remove()).await.unwrap().into_inner();
    assert!(done.propagation.unwrap().complete);
    assert_eq!(
        fleet.sql("SELECT count(*) FROM keyward.keys WHERE revoked_at IS NULL AND user_id = 'ann'"),
        "0"
    );
    let status = root.accounts.remove_member(remove()).await.unwrap_err();
    assert_eq!(error_reason(&status), "MEMBER_NOT_FOUND");
}
