//! Tokens that look like Keyward's and have another system's checksum: imported, they get the verdict of their key on
//! every way on which a token is judged; unknown, they are mistyped.

use futures_util::{StreamExt as _, stream};
use keyward::{
    domain::token::has_wrong_checksum,
    pb::{self, Reason},
};
use sha2::{Digest as _, Sha256};
use tonic::Code;

use crate::{
    ext_authz_client,
    forward_auth::{ForwardAuthServer, nginx_auth_request},
    support::{
        Client, Server, assert_refused, authenticate_request, named_key_request, scope_check_request,
        to_strings,
    },
};

const DIGITS: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";

/// A token whose CRC-32 covers the random part alone, as several systems make them.
fn foreign(number: u32) -> String {
    let random: String = Sha256::digest(number.to_be_bytes())
        .iter()
        .cycle()
        .take(43)
        .map(|byte| char::from(DIGITS[usize::from(*byte) % 62]))
        .collect();
    let mut sum = crc32fast::hash(random.as_bytes());
    let mut checksum = [b'0'; 6];
    for digit in checksum.iter_mut().rev() {
        *digit = DIGITS[(sum % 62) as usize];
        sum /= 62;
    }
    let token = format!("sk_live_{random}{}", std::str::from_utf8(&checksum).unwrap());
    assert!(has_wrong_checksum(&token));
    token
}

fn row(account: &str, scopes: &[&str], token: &str) -> pb::ImportKey {
    pb::ImportKey {
        account: account.to_owned(),
        environment: "production".to_owned(),
        scopes: to_strings(scopes),
        sha256: Sha256::digest(token).to_vec(),
        ..Default::default()
    }
}

async fn import(server: &Server, row: pb::ImportKey) -> String {
    let result = server.root_client().import(vec![row]).await.unwrap().remove(0);
    assert_eq!(result.error, "", "{}", result.message);
    result.key.unwrap().id
}

/// What each way says of a token, to this caller.
async fn verdicts(caller: &Client, token: &str) -> Vec<(&'static str, Reason)> {
    let question = scope_check_request(token, "monitors:read");
    let short = caller.check(question.clone()).await.unwrap();
    // A header that no service key needs: such calls take the long way.
    let long = caller.with_header("x-keyward-account", "keyward").check(question.clone()).await.unwrap();
    let batch = pb::BatchCheckRequest { checks: vec![question.clone(); 2] };
    let batch = caller.authz().batch_check(batch).await.unwrap().into_inner().results.remove(1);
    let mut streamed = caller.authz().stream_check(stream::iter([question])).await.unwrap().into_inner();
    let streamed = streamed.next().await.unwrap().unwrap();
    let authenticated = caller.check(authenticate_request(token)).await.unwrap();
    [
        ("short", short),
        ("long", long),
        ("batch", batch),
        ("stream", streamed),
        ("authenticate", authenticated),
    ]
    .map(|(way, answer)| (way, answer.reason()))
    .to_vec()
}

#[track_caller]
fn assert_all(verdicts: &[(&str, Reason)], expected: Reason) {
    assert!(verdicts.iter().all(|(_, reason)| *reason == expected), "not {expected:?}: {verdicts:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_imported_token_with_another_checksum_gets_its_keys_verdict_on_every_way() {
    let server = Server::with_accounts().await;
    let (root, token) = (server.root_client(), foreign(1));
    let id = import(&server, row("acme", &["monitors:read"], &token)).await;
    assert_all(&verdicts(&root, &token).await, Reason::Ok);
    assert_eq!(ext_authz_client::decision_reason(&server, &token).await, "ok");
    assert_eq!(root.lookup(&token).await.unwrap().key.unwrap().id, id);
    root.disable(&id).await.unwrap();
    assert_all(&verdicts(&root, &token).await, Reason::Disabled);
    assert_eq!(ext_authz_client::decision_reason(&server, &token).await, "disabled");
    root.revoke(&id).await.unwrap();
    assert_all(&verdicts(&root, &token).await, Reason::Revoked);
    assert_eq!(ext_authz_client::decision_reason(&server, &token).await, "revoked");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_token_of_our_format_with_a_wrong_checksum_is_malformed_on_every_way() {
    let server = Server::with_accounts().await;
    assert_all(&verdicts(&server.root_client(), &foreign(1)).await, Reason::Malformed);
    assert_eq!(ext_authz_client::decision_reason(&server, &foreign(1)).await, "malformed");
    assert_refused(server.root_client().lookup(&foreign(1)).await, Code::NotFound, "KEY_NOT_FOUND");
    assert_refused(
        server.client_with_token(&foreign(1)).who_am_i().await,
        Code::Unauthenticated,
        "UNAUTHENTICATED",
    );
    // One whose checksum holds is a token that nobody has.
    let right = "kw_live_00000000000000000000000000000000000000000000AwA6B";
    assert_all(&verdicts(&server.root_client(), right).await, Reason::Unknown);
}

#[tokio::test(flavor = "multi_thread")]
async fn another_accounts_token_is_told_apart_from_no_unknown_one_by_its_checksum() {
    let server = Server::with_accounts().await;
    import(&server, row("other", &["monitors:read"], &foreign(1))).await;
    let caller = server.client_with_scopes("acme", &["keyward:check", "keyward:keys:read"]).await;
    for token in [foreign(1), foreign(2)] {
        let answer = caller.check(scope_check_request(&token, "monitors:read")).await.unwrap();
        assert_eq!((answer.reason(), answer.key_id.as_str()), (Reason::Malformed, ""));
        assert_refused(caller.lookup(&token).await, Code::NotFound, "KEY_NOT_FOUND");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_proves_itself_by_an_imported_token_with_another_checksum() {
    let server = Server::with_accounts().await;
    let subject = server.create_key(named_key_request("acme", "subject")).await;
    let id = import(&server, row("acme", &["keyward:check", "keyward:keys:read"], &foreign(1))).await;
    let caller = server.client_with_token(&foreign(1));
    for _ in 0..2 {
        let answer = caller.check(scope_check_request(&subject.token, "monitors:read")).await.unwrap();
        assert_eq!(answer.reason(), Reason::Ok);
    }
    assert_eq!(caller.who_am_i().await.unwrap().key.unwrap().id, id);
    caller.revoke_self().await.unwrap();
    assert_refused(caller.who_am_i().await, Code::Unauthenticated, "UNAUTHENTICATED");
    let question = scope_check_request(&subject.token, "monitors:read");
    assert_refused(caller.check(question).await, Code::Unauthenticated, "UNAUTHENTICATED");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_over_http_lets_an_imported_token_with_another_checksum_pass() {
    let front = ForwardAuthServer::start().await;
    let keys = vec![row("acme", &["monitors:read"], &foreign(1))];
    let mut root = front.keyward.root_caller();
    let results = root.keys.import(pb::ImportKeysRequest { keys }).await.unwrap().into_inner().results;
    assert_eq!(results[0].error, "", "{}", results[0].message);
    let status = |token: &str| nginx_auth_request("", "/monitors").bearer(token).send(front.address).status;
    assert_eq!((status(&foreign(1)), status(&foreign(2))), (200, 401));
    root.revoke_key(&results[0].key.as_ref().unwrap().id).await.unwrap();
    assert_eq!(status(&foreign(1)), 401);
}
