//! A call is authorized when it is committed or answered, and not only when it came: what a caller or its rights have
//! become meanwhile counts, however the calls race and however slowly a request arrives.

use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
};

use bytes::Bytes;
use futures_util::stream;
use keyward::{
    grpc::rpc::{AccessRequirement, ExecutionPlane, RPC_TABLE},
    pb,
};
use tokio::{sync::oneshot, task::JoinHandle};
use tonic::{Code, Status};

use crate::{
    process::{WAIT_TIMEOUT, wait_for},
    support::{
        Client, CreatedKey, HOUR, assert_refused, error_reason, proto_seconds, scope_check_request,
        service_key_request, to_strings, user_key_request,
    },
};

use super::Server;

// ---- races ----

const ROUNDS: u32 = 25;

fn with_role(role: &str) -> pb::CreateKeyRequest {
    pb::CreateKeyRequest { roles: to_strings(&[role]), ..service_key_request("acme", &[]) }
}

async fn delete_role(client: &Client, role: &str) -> Result<(), Status> {
    let request = pb::DeleteRoleRequest { account: "acme".to_owned(), name: role.to_owned() };
    client.accounts().delete_role(request).await.map(drop)
}

/// Whether a token may do what only the global roles of these tests allow, in acme.
async fn is_wide(server: &Server, token: &str) -> bool {
    let question =
        pb::CheckRequest { account: Some("acme".to_owned()), ..scope_check_request(token, "billing:write") };
    server.root_client().check(question).await.unwrap().allowed
}

/// A manager of acme that holds monitors, and a role of acme with its name taken before the global one is made, which
/// is wider.
async fn take_manager_role_name(server: &Server, manager: &Client, round: u32) -> String {
    let role = format!("admin-{round}");
    manager.put_role("acme", &role, &["monitors:read"]).await.unwrap();
    server.root_client().put_role("", &role, &["*", "keyward:*"]).await.unwrap();
    role
}

async fn manager_of(server: &Server) -> Client {
    server.client_with_scopes("acme", &["monitors:*", "keyward:keys:*", "keyward:accounts:*"]).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_role_that_a_deletion_reveals_gives_a_new_key_nothing_beyond_its_maker() {
    let server = Server::with_accounts().await;
    let manager = manager_of(&server).await;
    for round in 0..ROUNDS {
        let role = take_manager_role_name(&server, &manager, round).await;
        let (deleted, made) = tokio::join!(delete_role(&manager, &role), manager.create(with_role(&role)));
        match (deleted, made) {
            (Ok(()), Err(status)) => {
                drop(assert_refused(Err::<(), _>(status), Code::PermissionDenied, "GRANT_BEYOND_CALLER"))
            }
            (Err(status), Ok(made)) => {
                assert_refused(Err::<(), _>(status), Code::FailedPrecondition, "ROLE_IN_USE");
                assert!(!is_wide(&server, &made.token).await, "round {round}");
            }
            (deleted, made) => panic!("round {round}: {deleted:?} {:?}", made.map(|made| made.key)),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_role_that_a_deletion_reveals_gives_a_member_nothing_beyond_the_manager() {
    let server = Server::with_accounts().await;
    let manager = manager_of(&server).await;
    let anns = server.create_key(user_key_request("ann", &["all"])).await;
    server.root_client().put_role("acme", "reader", &["monitors:read"]).await.unwrap();
    for round in 0..ROUNDS {
        let role = take_manager_role_name(&server, &manager, round).await;
        let (deleted, put) =
            tokio::join!(delete_role(&manager, &role), manager.put_member("acme", "ann", &role));
        assert!(deleted.is_err() || put.is_err(), "round {round}: the role is gone and given");
        assert!(!is_wide(&server, &anns.token).await, "round {round}");
        manager.put_member("acme", "ann", "reader").await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_role_that_a_deletion_reveals_gives_a_changed_key_nothing_beyond_its_manager() {
    let server = Server::with_accounts().await;
    let manager = manager_of(&server).await;
    let made = manager.create_key(service_key_request("acme", &["monitors:read"])).await;
    for round in 0..ROUNDS {
        let role = take_manager_role_name(&server, &manager, round).await;
        let wanted = pb::Key { roles: to_strings(&[&role]), ..made.key.clone() };
        let (deleted, changed) =
            tokio::join!(delete_role(&manager, &role), manager.update(&wanted, &["roles"]));
        assert!(deleted.is_err() || changed.is_err(), "round {round}: the role is gone and given");
        assert!(!is_wide(&server, &made.token).await, "round {round}");
        manager.update(&made.key, &["roles"]).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_whose_authorization_moved_and_still_holds_is_made() {
    let server = Server::with_accounts().await;
    let (root, manager) = (server.root_client(), manager_of(&server).await);
    for round in 0..ROUNDS {
        let rename = pb::UpdateAccountRequest {
            id: "acme".to_owned(),
            name: Some(format!("Acme {round}")),
            ..Default::default()
        };
        let (mut accounts, role) = (root.accounts(), format!("reader-{round}"));
        let (renamed, put, made) = tokio::join!(
            accounts.update(rename),
            manager.put_role("acme", &role, &["monitors:read"]),
            manager.create(service_key_request("acme", &["monitors:read"])),
        );
        renamed.unwrap();
        put.unwrap();
        made.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_is_revoked_makes_nothing_after_that_has_returned() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    for round in 0..ROUNDS {
        let made = server.create_key(service_key_request("acme", &["monitors:*", "keyward:keys:*"])).await;
        let (thief, racing) = (server.client_with_token(&made.token), server.client_with_token(&made.token));
        let making = tokio::spawn(async move {
            let mut newest = 0;
            while let Ok(made) = thief.create(service_key_request("acme", &["monitors:read"])).await {
                newest = newest.max(made.revision);
            }
            newest
        });
        racing.create_key(service_key_request("acme", &["monitors:read"])).await;
        let revoked = root.revoke(&made.id).await.unwrap().revision;
        assert!(making.await.unwrap() < revoked, "round {round}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bulk_revocation_ends_the_callers_own_key_after_all_others() {
    let server = Server::with_accounts().await;
    let before = server.create_key(service_key_request("acme", &["a"])).await;
    server.advance(1);
    let made = server.create_key(service_key_request("acme", &["keyward:keys:*"])).await;
    server.advance(1);
    let after = server.create_key(service_key_request("acme", &["a"])).await;
    let all = pb::BulkRevokeKeysRequest { account: "acme".to_owned(), ..Default::default() };
    let answer = server.client_with_token(&made.token).keys().bulk_revoke(all).await.unwrap().into_inner();
    let ids: Vec<_> =
        answer.keys.iter().map(|key| (key.key.as_ref().unwrap().id.as_str(), key.revoked)).collect();
    assert_eq!(ids, [(&*after.id, true), (&*made.id, true), (&*before.id, true)]);
    let last = answer.keys.iter().map(|key| key.key.as_ref().unwrap().revision).max().unwrap();
    assert_eq!(answer.keys[1].key.as_ref().unwrap().revision, last);
}

// ---- requests that arrive slowly ----

/// A call whose headers have come, and its body not.
struct BegunCall {
    body: oneshot::Sender<Bytes>,
    answer: JoinHandle<Result<Bytes, Status>>,
}

impl BegunCall {
    async fn finish(self, message: impl prost::Message) -> Result<Bytes, Status> {
        self.body.send(message.encode_to_vec().into()).unwrap();
        tokio::time::timeout(WAIT_TIMEOUT, self.answer).await.unwrap().unwrap()
    }
}

/// How many calls of management the server has begun.
fn count_begun_calls(server: &Server) -> u64 {
    let mut stream = TcpStream::connect(server.inner().admin_address).unwrap();
    stream.set_read_timeout(Some(WAIT_TIMEOUT)).unwrap();
    write!(stream, "GET /metrics HTTP/1.1\r\nhost: keyward\r\nconnection: close\r\n\r\n").unwrap();
    let mut page = String::new();
    stream.read_to_string(&mut page).unwrap();
    let lines = page
        .lines()
        .filter(|line| line.starts_with("grpc_server_started_total{") && !line.contains("AuthzService"));
    lines.map(|line| line.rsplit(' ').next().unwrap().parse::<u64>().unwrap()).sum()
}

/// Begins calls by these methods, and returns when the server has let all of them in.
async fn begin(server: &Server, caller: &Client, methods: &[&str]) -> Vec<BegunCall> {
    let before = count_begun_calls(server);
    let calls: Vec<_> = methods
        .iter()
        .map(|method| {
            let (body, message) = oneshot::channel::<Bytes>();
            let message = stream::unfold(Some(message), async |message| Some((message?.await.ok()?, None)));
            let (caller, method) = (caller.clone(), (*method).to_owned());
            let answer = tokio::spawn(async move { caller.call_slowly(&method, Box::pin(message)).await });
            BegunCall { body, answer }
        })
        .collect();
    let wanted = before + methods.len() as u64;
    tokio::task::block_in_place(|| {
        wait_for("the calls to be begun", || (count_begun_calls(server) >= wanted).then_some(()));
    });
    // Calls of one connection are let in on one thread, in the order in which they come.
    server.root_client().who_am_i().await.unwrap();
    calls
}

/// What may happen to a caller while its request arrives.
type CallerEnd = (&'static str, Code);

const ENDS: [CallerEnd; 7] = [
    ("revoked", Code::Unauthenticated),
    ("disabled", Code::Unauthenticated),
    ("expired", Code::Unauthenticated),
    ("suspended", Code::Unauthenticated),
    ("removed", Code::Unauthenticated),
    ("rotated", Code::Unauthenticated),
    ("narrowed", Code::PermissionDenied),
];

/// A caller that can make and list keys in acme: a service key, or, where its membership is to end, a user's.
async fn caller_to_end(server: &Server, end: &str) -> (CreatedKey, Client) {
    let scopes = ["monitors:*", "keyward:keys:*"];
    if end == "removed" {
        server.root_client().put_member("acme", "ann", "owner").await.unwrap();
        let made = server.create_key(user_key_request("ann", &scopes)).await;
        let caller = server.client_with_token(&made.token).with_header("x-keyward-account", "acme");
        return (made, caller);
    }
    let ttl = (end == "expired").then(|| proto_seconds(HOUR));
    let made = server.create_key(pb::CreateKeyRequest { ttl, ..service_key_request("acme", &scopes) }).await;
    let caller = server.client_with_token(&made.token);
    (made, caller)
}

async fn end_rights(server: &Server, end: &str, made: &CreatedKey) {
    let root = server.root_client();
    match end {
        "revoked" => drop(root.revoke(&made.id).await.unwrap()),
        "disabled" => drop(root.disable(&made.id).await.unwrap()),
        "expired" => server.advance(HOUR),
        "suspended" => drop(root.suspend("acme").await.unwrap()),
        "rotated" => drop(root.rotate(&made.id, 0).await.unwrap()),
        "removed" => {
            let request = pb::RemoveMemberRequest { account: "acme".to_owned(), user: "ann".to_owned() };
            root.accounts().remove_member(request).await.unwrap();
        }
        _ => {
            let narrowed = pb::Key { scopes: to_strings(&["monitors:read"]), ..made.key.clone() };
            root.update(&narrowed, &["scopes"]).await.unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_whose_rights_end_while_its_request_arrives_changes_and_reads_nothing() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    root.put_role("acme", "owner", &["all", "keyward:keys:*"]).await.unwrap();
    for (end, code) in ENDS {
        let (made, caller) = caller_to_end(&server, end).await;
        let methods = ["keyward.v1.KeyService/Create", "keyward.v1.KeyService/List"];
        let [create, list] = begin(&server, &caller, &methods).await.try_into().ok().unwrap();
        end_rights(&server, end, &made).await;
        let head = root.verify_audit_log().await.head;
        let request = service_key_request("acme", &["monitors:read"]);
        for refusal in [create.finish(request).await, list.finish(pb::ListKeysRequest::default()).await] {
            let status = refusal.expect_err(end);
            let expected =
                if code == Code::PermissionDenied { "PERMISSION_MISSING" } else { "CALLER_REVOKED" };
            assert_eq!((status.code(), error_reason(&status).as_str()), (code, expected), "{end}");
        }
        assert_eq!(root.verify_audit_log().await.head, head, "{end}: nothing is recorded");
        root.resume("acme").await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_management_call_is_refused_whose_caller_is_revoked_while_its_request_arrives() {
    let server = Server::with_accounts().await;
    let methods: Vec<_> = RPC_TABLE
        .iter()
        .filter(|rpc| {
            rpc.plane == ExecutionPlane::Management && rpc.access != AccessRequirement::TokenPossession
        })
        .map(|rpc| rpc.method)
        .collect();
    let made = server.create_key(service_key_request("keyward", &["keyward:*"])).await;
    let calls = begin(&server, &server.client_with_token(&made.token), &methods).await;
    server.root_client().revoke(&made.id).await.unwrap();
    for (method, call) in methods.iter().zip(calls) {
        let status = call.finish(()).await.expect_err(method);
        assert_eq!(
            (status.code(), error_reason(&status).as_str()),
            (Code::Unauthenticated, "CALLER_REVOKED"),
            "{method}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revocation_is_not_kept_out_by_changes_of_the_same_key() {
    let server = Server::with_accounts().await;
    let made = server.create_key(service_key_request("acme", &["monitors:read"])).await;
    let changes = (0..200).map(|number| {
        let (client, key) = (server.root_client(), made.key.clone());
        tokio::spawn(async move {
            for count in 0.. {
                let key = pb::Key { name: format!("{number} {count}"), ..key.clone() };
                if client
                    .update(&key, &["name"])
                    .await
                    .is_err_and(|error| error_reason(&error) == "KEY_REVOKED")
                {
                    return;
                }
            }
        })
    });
    let changes: Vec<_> = changes.collect();
    let root = server.root_client();
    while root.get(&made.id).await.unwrap().revision < made.revision + 20 {}
    root.revoke(&made.id).await.unwrap();
    for change in changes {
        change.await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_is_replaced_while_its_request_arrives_revokes_nothing() {
    let server = Server::with_accounts().await;
    let made = server.create_key(service_key_request("acme", &["monitors:read"])).await;
    let [call] =
        begin(&server, &server.client_with_token(&made.token), &["keyward.v1.KeyService/RevokeSelf"])
            .await
            .try_into()
            .ok()
            .unwrap();
    let new = server.root_client().rotate(&made.id, 0).await.unwrap().token;
    assert_refused(call.finish(()).await, Code::Unauthenticated, "CALLER_REVOKED");
    assert_eq!(server.root_client().check_reason(&new).await, pb::Reason::Ok);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_that_is_judged_again_is_charged_once() {
    let server = Server::with_accounts().await;
    let limited = pb::CreateKeyRequest {
        rate_limits: vec![pb::RateLimit { name: "calls".into(), limit: 3, window: Some(proto_seconds(60)) }],
        ..service_key_request("acme", &["keyward:keys:read"])
    };
    let caller = server.client_with_token(&server.create_key(limited).await.token);
    for _ in 0..3 {
        caller.list(pb::ListKeysRequest::default()).await.unwrap();
    }
    assert_refused(caller.who_am_i().await, Code::ResourceExhausted, "CALLER_LIMITED");
}
