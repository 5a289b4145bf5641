//! The promises of `authorized.rs` where several servers share one database: a change is authorized by what is
//! committed, and not by what its replica knows; and what a caller began is not answered once it is revoked anywhere.

use bytes::Bytes;
use futures_util::stream;
use keyward::pb;
use prost::Message as _;
use sqlx::Connection as _;
use tokio::sync::oneshot;
use tonic::{Code, Status};

use crate::{
    process::{AuthorizedClients, call_raw, check_request, plain_key_request, wait_for},
    replicas::{ReplicaCluster, revoke_with_deadline},
    support::error_reason,
};

fn texts(list: &[&str]) -> Vec<String> {
    list.iter().map(|&text| text.to_owned()).collect()
}

async fn put_role(caller: &mut AuthorizedClients, account: &str, name: &str, scopes: &[&str]) {
    let (account, name, scopes) = (account.to_owned(), name.to_owned(), texts(scopes));
    caller.accounts.put_role(pb::PutRoleRequest { account, name, scopes }).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_role_deleted_on_one_replica_gives_nothing_beyond_its_maker_on_another() {
    let fleet = ReplicaCluster::start(2, "default").await;
    let mut root = fleet.replicas[0].root_caller();
    let scopes = texts(&["monitors:*", "keyward:keys:*", "keyward:accounts:*"]);
    let (_, token) = root.create_key(pb::CreateKeyRequest { scopes, ..plain_key_request() }).await.unwrap();
    let managers = fleet.replicas.iter().map(|replica| replica.caller(&token));
    let [mut here, mut there] = managers.collect::<Vec<_>>().try_into().ok().unwrap();
    for round in 0..40 {
        let role = format!("admin-{round}");
        put_role(&mut here, "acme", &role, &["monitors:read"]).await;
        put_role(&mut root, "", &role, &["*"]).await;
        let delete = pb::DeleteRoleRequest { account: "acme".to_owned(), name: role.clone() };
        let create = pb::CreateKeyRequest { scopes: vec![], roles: vec![role], ..plain_key_request() };
        let (deleted, made) = tokio::join!(here.accounts.delete_role(delete), there.create_key(create));
        assert!(deleted.is_err() || made.is_err(), "round {round}: the role is gone and given");
        let Ok((_, token)) = made else { continue };
        let wide = pb::CheckRequest { scopes: texts(&["billing:write"]), ..check_request(&token) };
        assert!(!root.authz.check(wide).await.unwrap().into_inner().allowed, "round {round}");
    }
}

/// A caller that may do everything with keys, known to every replica: its id and its token.
async fn operator(fleet: &ReplicaCluster) -> (String, String) {
    let request = pb::CreateKeyRequest {
        account: "keyward".to_owned(),
        scopes: texts(&["keyward:keys:*"]),
        ..plain_key_request()
    };
    let (id, token) = fleet.replicas[0].root_caller().create_key(request).await.unwrap();
    for replica in &fleet.replicas {
        wait_for("a replica to know of the key", || {
            let known = async { replica.caller(&token).keys.who_am_i(pb::WhoAmIRequest {}).await.is_ok() };
            tokio::task::block_in_place(|| tokio::runtime::Handle::current().block_on(known)).then_some(())
        });
    }
    (id, token)
}

fn is_revoked(status: &Status) -> bool {
    status.code() == Code::Unauthenticated && error_reason(status) == "CALLER_REVOKED"
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_revoked_on_one_replica_while_its_request_arrives_at_another_makes_and_reads_nothing() {
    let fleet = ReplicaCluster::start(2, "default").await;
    for (method, message) in [
        ("Create", plain_key_request().encode_to_vec()),
        ("List", pb::ListKeysRequest { account: "acme".to_owned(), ..Default::default() }.encode_to_vec()),
    ] {
        let (id, token) = operator(&fleet).await;
        let (send, message_comes) = oneshot::channel::<Bytes>();
        let body = stream::unfold(Some(message_comes), async |body| Some((body?.await.ok()?, None)));
        let (channel, path) = (fleet.replicas[1].channel(), format!("keyward.v1.KeyService/{method}"));
        let call = tokio::spawn(async move { call_raw(channel, &token, &path, Box::pin(body)).await });
        let started = format!("grpc_method=\"{method}\"");
        wait_for("the call to be begun", || {
            let page = fleet.replicas[1].fetch_admin_page("/metrics").1;
            page.lines()
                .any(|line| line.starts_with("grpc_server_started_total") && line.contains(&started))
                .then_some(())
        });
        revoke_with_deadline(&fleet.replicas[0], &id, None).await.unwrap();
        send.send(message.into()).unwrap();
        let refusal = call.await.unwrap().expect_err(method);
        assert_eq!(refusal.code(), Code::Unauthenticated, "{refusal:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_caller_was_reading_when_it_was_revoked_is_not_answered() {
    let fleet = ReplicaCluster::start(1, "default").await;
    let (key, _) = fleet.create_key().await;
    let (id, token) = operator(&fleet).await;
    let mut lock = sqlx::PgConnection::connect(&fleet.home.url()).await.unwrap();
    let begin = "BEGIN; LOCK TABLE keyward.usage IN ACCESS EXCLUSIVE MODE";
    sqlx::raw_sql(begin).execute(&mut lock).await.unwrap();
    let mut caller = fleet.replicas[0].caller(&token);
    let request = pb::KeyUsageRequest { id: key, ..Default::default() };
    let reading = tokio::spawn(async move { caller.keys.usage(request).await });
    let waits = "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'keyward.usage'::regclass";
    wait_for("the reading to wait", || (fleet.sql(waits) != "0").then_some(()));
    revoke_with_deadline(&fleet.replicas[0], &id, None).await.unwrap();
    sqlx::raw_sql("ROLLBACK").execute(&mut lock).await.unwrap();
    let refusal = reading.await.unwrap().unwrap_err();
    assert!(is_revoked(&refusal), "{refusal:?}");
}
