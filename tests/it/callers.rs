//! Who may call what: every RPC of the descriptors by every kind of caller, as one table; and that another
//! account's things look exactly like things that do not exist.

use std::{collections::BTreeSet, fmt::Write as _};

use keyward::pb;
use prost::Message as _;
use tonic::{Code, Status};

use crate::support::{
    Client, HOUR, Server, assert_refused, named_key_request, proto_seconds, service_key_request, to_strings,
    user_key_request,
};

const REVIEWED: &str = include_str!("../snapshots/callers.txt");

/// Every RPC with the fields of its request, in the order of the protos; RevokeSelf last, since it ends its
/// caller.
fn rpcs() -> Vec<(String, Vec<String>)> {
    let set = prost_types::FileDescriptorSet::decode(pb::FILE_DESCRIPTOR_SET).unwrap();
    let ours: Vec<_> = set.file.into_iter().filter(|file| file.package() == "keyward.v1").collect();
    let fields = |message: &str| {
        let message = message.strip_prefix(".keyward.v1.").unwrap();
        let mut messages = ours.iter().flat_map(|file| &file.message_type);
        let found = messages.find(|candidate| candidate.name() == message).unwrap();
        found.field.iter().map(|field| field.name().to_owned()).collect::<Vec<_>>()
    };
    let services = ours.iter().flat_map(|file| &file.service);
    let mut rpcs: Vec<_> = services
        .flat_map(|service| service.method.iter().map(move |method| (service.name(), method)))
        .map(|(service, method)| {
            (format!("keyward.v1.{service}/{}", method.name()), fields(method.input_type()))
        })
        .collect();
    rpcs.sort_by_key(|(method, _)| method.ends_with("/RevokeSelf"));
    rpcs
}

/// One of each kind, with what the table calls it; the one that every other depends on last.
async fn every_kind(server: &Server) -> Vec<(&'static str, Client)> {
    let root = server.root_client();
    let manager = |account: &str| service_key_request(account, &["keyward:*"]);
    let revoked = server.create_key(manager("acme")).await;
    root.revoke(&revoked.id).await.unwrap();
    let disabled = server.create_key(manager("acme")).await;
    root.disable(&disabled.id).await.unwrap();
    let expired =
        server.create_key(pb::CreateKeyRequest { ttl: Some(proto_seconds(1)), ..manager("acme") }).await;
    let rotated = server.create_key(manager("acme")).await;
    root.rotate(&rotated.id, 0).await.unwrap();
    let elsewhere = pb::CreateKeyRequest { allowed_cidrs: to_strings(&["10.0.0.0/8"]), ..manager("acme") };
    let elsewhere = server.create_key(elsewhere).await;
    server.create_account("asleep").await;
    let suspended = server.create_key(manager("asleep")).await;
    root.suspend("asleep").await.unwrap();
    server.advance(1);
    let mut kinds = vec![
        ("anonymous", server.client_without_token()),
        ("garbage", server.client_with_token("kw_live_garbage")),
        ("revoked", server.client_with_token(&revoked.token)),
        ("disabled", server.client_with_token(&disabled.token)),
        ("expired", server.client_with_token(&expired.token)),
        ("rotated", server.client_with_token(&rotated.token)),
        ("suspended", server.client_with_token(&suspended.token)),
        ("elsewhere", server.client_with_token(&elsewhere.token)),
        ("no scope", server.client_with_scopes("acme", &["*"]).await),
        ("checker", server.client_with_scopes("acme", &["keyward:check"]).await),
        ("manager", server.client_with_scopes("acme", &["keyward:*"]).await),
        ("other's", server.client_with_scopes("other", &["keyward:*"]).await),
    ];
    for (name, scope) in [
        ("op check", "keyward:check"),
        ("op keys:r", "keyward:keys:read"),
        ("op keys:w", "keyward:keys:write"),
        ("op acc:r", "keyward:accounts:read"),
        ("op acc:w", "keyward:accounts:write"),
        ("op audit", "keyward:audit:read"),
    ] {
        kinds.push((name, server.client_with_scopes("keyward", &[scope]).await));
    }
    kinds.push(("root", root));
    kinds
}

/// A code as the table says it.
fn word(code: Code) -> &'static str {
    match code {
        Code::Ok => "ok",
        Code::InvalidArgument => "invalid",
        Code::NotFound => "not found",
        Code::Unauthenticated => "who?",
        Code::PermissionDenied => "denied",
        Code::Unimplemented => "unimpl",
        Code::FailedPrecondition => "not now",
        Code::Unavailable => "unavail",
        _ => "OTHER",
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_rpc_answers_every_kind_of_caller_as_reviewed() {
    let server = Server::with_accounts().await;
    let kinds = every_kind(&server).await;
    let rpcs = rpcs();
    let mut columns = Vec::new();
    for (_, caller) in &kinds {
        let mut column = Vec::new();
        for (method, _) in &rpcs {
            let code = caller.call_rpc(method, ()).await.err().map_or(Code::Ok, |status| status.code());
            column.push(word(code));
        }
        columns.push(column);
    }
    let mut table =
        "What each RPC answers to an empty message, by kind of caller. 'who?' is UNAUTHENTICATED.\n\n"
            .to_owned();
    let mut line = |first: &str, cells: &mut dyn Iterator<Item = &str>| {
        let cells = cells.fold(format!("{first:<30}"), |mut line, cell| {
            write!(line, "{cell:<10}").unwrap();
            line
        });
        writeln!(table, "{}", cells.trim_end()).unwrap();
    };
    line("", &mut kinds.iter().map(|(name, _)| *name));
    for (row, (method, _)) in rpcs.iter().enumerate() {
        line(method.trim_start_matches("keyward.v1."), &mut columns.iter().map(|column| column[row]));
    }
    assert!(
        table == REVIEWED,
        "review the change, then bring tests/snapshots/callers.txt up to date with:\n{table}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn every_rpc_is_served() {
    let server = Server::start().await;
    let root = server.root_client();
    for (method, _) in rpcs() {
        let answer = root.call_rpc(&method, ()).await;
        assert!(answer.err().is_none_or(|status| status.code() != Code::Unimplemented), "{method}");
    }
}

/// Calls every RPC that takes an id, an account or a token, as if of `account` with this key and role.
async fn probe(caller: &Client, account: &str, key: &str, token: &str, user: &str) -> Vec<(String, Status)> {
    let id = || key.to_owned();
    let account = || account.to_owned();
    let user = || user.to_owned();
    let create = |request: pb::CreateKeyRequest| pb::CreateKeyRequest { name: Some("CI".into()), ..request };
    let update = pb::UpdateKeyRequest {
        key: Some(pb::Key { id: id(), name: "mine".into(), ..pb::Key::default() }),
        update_mask: Some(prost_types::FieldMask { paths: to_strings(&["name"]) }),
    };
    let rotate =
        pb::RotateKeyRequest { id: id(), idempotency_key: Some("once".into()), ..Default::default() };
    let role = || "agent".to_owned();
    let mut answers = Vec::new();
    macro_rules! probe {
        ($($method:literal $message:expr),* $(,)?) => {
            $(
                let method = concat!("keyward.v1.", $method);
                let status = caller.call_rpc(method, $message).await.expect_err(method);
                answers.push((method.to_owned(), status));
            )*
        };
    }
    probe! {
        "KeyService/Create" create(service_key_request(&account(), &["keyward:keys:read"])),
        "KeyService/Create" create(user_key_request(&user(), &["keyward:keys:read"])),
        "KeyService/Get" pb::GetKeyRequest { id: id() },
        "KeyService/List" pb::ListKeysRequest { account: account(), ..Default::default() },
        "KeyService/List" pb::ListKeysRequest { user: user(), ..Default::default() },
        "KeyService/Update" update,
        "KeyService/Disable" pb::DisableKeyRequest { id: id() },
        "KeyService/Enable" pb::EnableKeyRequest { id: id() },
        "KeyService/Revoke" pb::RevokeKeyRequest { id: id(), ..Default::default() },
        "KeyService/BulkRevoke" pb::BulkRevokeKeysRequest { account: account(), ..Default::default() },
        "KeyService/BulkRevoke" pb::BulkRevokeKeysRequest { user: user(), dry_run: true, ..Default::default() },
        "KeyService/Rotate" rotate,
        "KeyService/FinishRotation" pb::FinishRotationRequest { id: id() },
        "KeyService/Lookup" pb::LookupKeyRequest { token: token.to_owned() },
        "KeyService/Usage" pb::KeyUsageRequest { id: id(), ..Default::default() },
        "AccountService/Get" pb::GetAccountRequest { id: account() },
        "AccountService/Create" pb::CreateAccountRequest { id: account(), ..Default::default() },
        "AccountService/Update" pb::UpdateAccountRequest { id: account(), name: Some("x".into()), ..Default::default() },
        "AccountService/Suspend" pb::SuspendAccountRequest { id: account() },
        "AccountService/Resume" pb::ResumeAccountRequest { id: account() },
        "AccountService/PutMember" pb::PutMemberRequest { account: account(), user: user(), role: role() },
        "AccountService/RemoveMember" pb::RemoveMemberRequest { account: account(), user: user() },
        "AccountService/ListMembers" pb::ListMembersRequest { account: account(), ..Default::default() },
        "AccountService/PutRole" pb::PutRoleRequest { account: account(), name: role(), scopes: to_strings(&["keyward:check"]) },
        "AccountService/DeleteRole" pb::DeleteRoleRequest { account: account(), name: role() },
        "AccountService/ListRoles" pb::ListRolesRequest { account: account(), ..Default::default() },
        "AuditService/List" pb::ListAuditEntriesRequest { account: account(), ..Default::default() },
    }
    answers
}

#[tokio::test(flavor = "multi_thread")]
async fn what_belongs_to_another_account_looks_like_what_does_not_exist() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    let theirs = server.create_key(named_key_request("other", "CI")).await;
    root.put_role("other", "agent", &["monitors:read"]).await.unwrap();
    root.put_member("other", "ann", "agent").await.unwrap();
    server.create_key(user_key_request("ann", &["all"])).await;
    let manager = server.client_with_scopes("acme", &["*", "keyward:*"]).await;

    let nobodys = "00000000-0000-7000-8000-000000000000";
    let of_other = probe(&manager, "other", &theirs.id, &theirs.token, "ann").await;
    let of_none = probe(&manager, "nowhere", nobodys, "sk-unknown", "nobody").await;
    for ((method, other), (_, none)) in of_other.iter().zip(&of_none) {
        let bytes = |status: &Status| (status.code(), status.message().to_owned(), status.details().to_vec());
        assert_eq!(bytes(other), bytes(none), "{method}");
        let expected = [Code::NotFound, Code::PermissionDenied];
        assert!(expected.contains(&other.code()), "{method}: {other:?}");
    }
    assert_eq!(root.get(&theirs.id).await.unwrap(), theirs.key, "and nothing happened to it");

    // Answers that are no error: Checks (see check.rs), a filter by key, an import's rows.
    let elsewhere =
        ["AuthzService/Check", "AuthzService/BatchCheck", "AuthzService/StreamCheck", "KeyService/Import"];
    let takes = ["id", "account", "user", "key", "key_id", "token", "checks", "keys"];
    for (method, fields) in rpcs() {
        let named = fields.iter().any(|field| takes.contains(&field.as_str()));
        let covered = of_other.iter().any(|(probed, _)| *probed == method)
            || elsewhere.iter().any(|end| method.ends_with(end));
        assert!(covered || !named, "{method} takes an id and is not probed here");
    }
    let list = |key_id: &str| pb::ListAuditEntriesRequest { key_id: key_id.into(), ..Default::default() };
    assert_eq!(
        manager.list_audit_entries(list(&theirs.id)).await.unwrap(),
        manager.list_audit_entries(list(nobodys)).await.unwrap()
    );
    let row = |account: &str| pb::ImportKey {
        account: account.into(),
        environment: "production".into(),
        scopes: to_strings(&["monitors:read"]),
        sha256: vec![1; 32],
        ..Default::default()
    };
    let results = manager.import(vec![row("other"), row("nowhere")]).await.unwrap();
    assert_eq!(results[0], results[1]);
    assert_eq!(results[0].error, "ACCOUNT_NOT_FOUND");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stranger_hears_the_same_whatever_is_wrong_with_its_credential() {
    let server = Server::with_accounts().await;
    let mut said = BTreeSet::new();
    for (kind, caller) in every_kind(&server).await.into_iter().take(8) {
        let status = assert_refused(caller.get("x").await, Code::Unauthenticated, "UNAUTHENTICATED");
        said.insert((status.message().to_owned(), status.details().to_vec()));
        assert_eq!(said.len(), 1, "{kind}");
    }
    for header in ["", "Bearer", "Bearer ", "Basic dTpw", "bearer\u{a0}x"] {
        let Ok(value) = header.parse::<tonic::metadata::AsciiMetadataValue>() else { continue };
        let caller =
            server.client_without_token().with_header("authorization", value.to_str().unwrap_or_default());
        assert_refused(caller.who_am_i().await, Code::Unauthenticated, "UNAUTHENTICATED");
    }
    let twice = server.root_client().with_header("authorization", &format!("Bearer {}", server.root_token));
    assert_refused(twice.who_am_i().await, Code::Unauthenticated, "UNAUTHENTICATED");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_scheme_of_the_credential_is_read_in_any_case() {
    let server = Server::start().await;
    let lower =
        server.client_without_token().with_header("authorization", &format!("bearer {}", server.root_token));
    lower.who_am_i().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_management_key_is_held_to_its_own_limits() {
    let server = Server::with_accounts().await;
    let limited = pb::CreateKeyRequest {
        rate_limits: vec![pb::RateLimit { name: "calls".into(), limit: 2, window: Some(proto_seconds(60)) }],
        ..service_key_request("acme", &["keyward:keys:read"])
    };
    let caller = server.client_with_token(&server.create_key(limited).await.token);
    for _ in 0..2 {
        caller.who_am_i().await.unwrap();
    }
    assert_refused(caller.who_am_i().await, Code::ResourceExhausted, "CALLER_LIMITED");
    server.advance(30);
    caller.who_am_i().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_callers_rights_end_at_the_call_after_they_are_taken() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    let made = server.create_key(service_key_request("acme", &["keyward:keys:*"])).await;
    let caller = server.client_with_token(&made.token);
    let own = || pb::ListKeysRequest::default();
    caller.list(own()).await.unwrap();
    let narrowed = pb::Key { scopes: to_strings(&["keyward:keys:write"]), ..made.key.clone() };
    root.update(&narrowed, &["scopes"]).await.unwrap();
    assert_refused(caller.list(own()).await, Code::PermissionDenied, "PERMISSION_MISSING");
    let new = root.rotate(&made.id, HOUR).await.unwrap();
    server.client_with_token(&new.token).who_am_i().await.unwrap();
    caller.who_am_i().await.unwrap();
    root.revoke(&made.id).await.unwrap();
    assert_refused(caller.who_am_i().await, Code::Unauthenticated, "UNAUTHENTICATED");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_management_key_works_whatever_its_environment() {
    let server = Server::with_accounts().await;
    let staging = pb::CreateKeyRequest {
        environment: "staging".into(),
        ..service_key_request("acme", &["keyward:keys:read"])
    };
    let caller = server.client_with_token(&server.create_key(staging).await.token);
    caller.list(pb::ListKeysRequest::default()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn to_act_for_a_person_is_for_operators() {
    let server = Server::with_accounts().await;
    let acting =
        server.client_with_scopes("acme", &["keyward:*"]).await.with_header("x-keyward-acting-user", "ann");
    assert_refused(
        acting.list(pb::ListKeysRequest::default()).await,
        Code::PermissionDenied,
        "OPERATOR_ONLY",
    );
}
