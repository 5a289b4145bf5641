//! Management calls of somebody who wants to keep others from theirs.

use keyward::pb;
use prost::Message as _;

use super::*;
use crate::replicas::ReplicaCluster;

/// How many calls of a method were begun.
fn started_calls(keyward: &KeywardProcess, method: &str) -> u64 {
    let page = keyward.fetch_admin_page("/metrics").1;
    let of = format!("grpc_method=\"{method}\"");
    let line = page.lines().find(|line| line.starts_with("grpc_server_started_total{") && line.contains(&of));
    line.map_or(0, |line| line.rsplit(' ').next().unwrap().parse().unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_that_send_nothing_keep_nobody_from_management() {
    let keyward = start_server("").await;
    let mut root = keyward.root_caller();
    let (_, living) = root.create_key(plain_key_request()).await.unwrap();
    let (id, dead) = root.create_key(plain_key_request()).await.unwrap();
    root.revoke_key(&id).await.unwrap();
    let headers = |path: &str, token: &str| {
        [encode_call_headers(path), encode_header("authorization", &format!("Bearer {token}"))].concat()
    };
    let mut crowd = Vec::new();
    for (method, token) in [("WhoAmI", &living), ("RevokeSelf", &dead)] {
        let headers = headers(&format!("/keyward.v1.KeyService/{method}"), token);
        for _ in 0..5 {
            let mut attacker = AttackConnection::connect(keyward.address, &[]);
            for _ in 0..250 {
                let stream = attacker.next_stream_id();
                assert!(attacker.send(&frame(HEADERS, END_HEADERS, stream, &headers)));
            }
            crowd.push(attacker);
        }
        wait_for("the calls to be begun", || (started_calls(&keyward, method) >= 1250).then_some(()));
    }
    let (id, _) = root.create_key(plain_key_request()).await.unwrap();
    root.revoke_key(&id).await.unwrap();
    drop(crowd);
    keyward.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn large_messages_that_are_announced_keep_nobody_from_sending_one() {
    let keyward = start_server("").await;
    let mut root = keyward.root_caller();
    let manager = pb::CreateKeyRequest {
        scopes: vec!["monitors:read".to_owned(), "keyward:keys:write".to_owned()],
        ..plain_key_request()
    };
    let (_, manager) = root.create_key(manager).await.unwrap();
    let bearer = encode_header("authorization", &format!("Bearer {manager}"));
    let headers = [encode_call_headers("/keyward.v1.KeyService/Import"), bearer].concat();
    let mut attacker = AttackConnection::connect(keyward.address, &[]);
    for _ in 0..64 {
        let stream = attacker.next_stream_id();
        let announced = [&[0], &(4_u32 << 20).to_be_bytes()[..]].concat();
        attacker.send(&frame(HEADERS, END_HEADERS, stream, &headers));
        assert!(attacker.send(&frame(DATA, 0, stream, &announced)));
    }
    wait_for("the calls to be begun", || (started_calls(&keyward, "Import") >= 64).then_some(()));
    let key = |at: u32| pb::ImportKey {
        account: "acme".to_owned(),
        environment: "production".to_owned(),
        scopes: vec!["monitors:read".to_owned()],
        metadata: [("padding".to_owned(), "x".repeat(4000))].into(),
        sha256: [&at.to_be_bytes()[..], &[7; 28]].concat(),
        ..Default::default()
    };
    let request = pb::ImportKeysRequest { keys: (0..600).map(key).collect() };
    assert!(request.encoded_len() > 2 << 20);
    let results = root.keys.import(request).await.unwrap().into_inner().results;
    assert_eq!(results.len(), 600);
    drop(attacker);
    keyward.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_that_waits_for_a_replica_keeps_nobody_from_management() {
    let mut fleet = ReplicaCluster::start_with_config(2, "[overload]\nmanagement_calls = 1\n").await;
    let (id, token) = fleet.create_key().await;
    fleet.replicas.pop().unwrap().process.kill();
    let mut root = fleet.replicas[0].root_caller();
    let mut waiting = root.clone();
    let revoked = tokio::spawn(async move {
        let mut request = tonic::Request::new(pb::RevokeKeyRequest { id, ..Default::default() });
        request.set_timeout(Duration::from_secs(10));
        waiting.keys.revoke(request).await
    });
    while root.check_token(&token).await.unwrap() != pb::Reason::Revoked {
        tokio::task::yield_now().await;
    }
    for _ in 0..3 {
        root.create_key(plain_key_request()).await.unwrap();
    }
    assert!(!revoked.is_finished(), "the killed replica has its lease");
    revoked.abort();
}
