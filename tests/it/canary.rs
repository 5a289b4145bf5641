//! No token is anywhere but in the one answer that shows it: not in a log at its most talkative, not in a file
//! of the database, not in an error. Tokens go in on every way there is, and every byte that came out is read.

use std::collections::{HashMap, HashSet};

use bytes::Bytes;
use keyward::pb;
use prost::Message as _;
use tonic::Status;

use crate::process::{KeywardProcess, TestHome, call_raw, check_request, plain_key_request, read_text};

/// What of a token's random part is looked for: any run of so many characters. Hints show four.
const RUN_LENGTH: usize = 8;
/// The random part and the checksum.
const BODY: usize = 49;

/// Tokens that were used, by all their runs.
#[derive(Default)]
struct TokenCanaries(HashMap<[u8; RUN_LENGTH], &'static str>);

impl TokenCanaries {
    fn add(&mut self, what: &'static str, token: &str) {
        let body = &token.as_bytes()[token.len() - BODY..];
        self.0.extend(body.windows(RUN_LENGTH).map(|run| (run.try_into().unwrap(), what)));
    }

    /// The names of the tokens that show in `bytes`.
    fn found(&self, bytes: &[u8]) -> HashSet<&'static str> {
        let runs = bytes.windows(RUN_LENGTH).map(|run| <[u8; RUN_LENGTH]>::try_from(run).unwrap());
        runs.filter_map(|run| self.0.get(&run).copied()).collect()
    }
}

/// The key's new token, of our shape, as a typo leaves it.
fn typo(token: &str) -> String {
    let last = if token.ends_with('x') { "y" } else { "x" };
    format!("{}{last}", &token[..token.len() - 1])
}

/// Calls with tokens in every place where one may go, by right or by mistake. Returns every error.
async fn use_tokens(server: &KeywardProcess, root: &str, canaries: &mut TokenCanaries) -> Vec<Status> {
    let mut errors = Vec::new();
    let mut caller = server.caller(root);
    caller.create_account("acme").await;
    canaries.add("root", root);

    // By right: made, rotated twice, checked, looked up, as credential, given up.
    let named = pb::CreateKeyRequest {
        name: Some("first".to_owned()),
        idempotency_key: Some("once".to_owned()),
        ..plain_key_request()
    };
    let (id, created) = caller.create_key(named.clone()).await.unwrap();
    caller.keys.create(named.clone()).await.unwrap();
    let rotated = caller.rotate_key(&id).await.unwrap();
    let kept = caller.rotate_key(&id).await.unwrap();
    let (manager_id, manager) = caller
        .create_key(pb::CreateKeyRequest { scopes: vec!["keyward:*".to_owned()], ..plain_key_request() })
        .await
        .unwrap();
    let all = [("created", &created), ("rotated", &rotated), ("kept", &kept), ("manager", &manager)];
    for (what, token) in all {
        canaries.add(what, token);
    }
    let bad = typo(&kept);
    for token in [&created, &rotated, &kept, &manager, &bad] {
        caller.check_token(token).await.unwrap();
        let lookup = pb::LookupKeyRequest { token: token.clone() };
        errors.extend(caller.keys.lookup(lookup).await.err());
        let mut holder = server.caller(token);
        errors.extend(holder.check_token(&created).await.err());
        errors.extend(holder.keys.who_am_i(pb::WhoAmIRequest {}).await.err());
        errors.extend(holder.keys.list(pb::ListKeysRequest::default()).await.err());
    }
    let mut manager_caller = server.caller(&manager);
    manager_caller.get_key(&id).await.unwrap();
    caller.revoke_key(&id).await.unwrap();
    manager_caller.keys.revoke_self(pb::RevokeSelfRequest {}).await.unwrap();
    errors.extend(manager_caller.keys.revoke_self(pb::RevokeSelfRequest {}).await.err());
    errors.extend(manager_caller.get_key(&manager_id).await.err());
    errors.extend(caller.keys.create(pb::CreateKeyRequest { name: None, ..named }).await.err());

    // By mistake: in fields that hold something else.
    for token in [&kept, &bad] {
        let text = || token.clone();
        errors.extend(caller.get_key(token).await.err());
        errors.extend(caller.revoke_key(token).await.err());
        errors.extend(caller.rotate_key(token).await.err());
        let check = pb::CheckRequest {
            environment: text(),
            account: Some(text()),
            client_ip: Some(text()),
            ..check_request(token)
        };
        errors.extend(caller.authz.check(check).await.err());
        let create = pb::CreateKeyRequest {
            account: text(),
            environment: text(),
            scopes: vec![format!("{token} ")],
            roles: vec![text()],
            prefix: Some(text()),
            customers: vec![format!("{token} ")],
            allowed_cidrs: vec![text()],
            idempotency_key: Some(format!("{token} ")),
            ..Default::default()
        };
        errors.extend(caller.keys.create(create).await.err());
        let list = pb::ListKeysRequest { account: text(), page_token: text(), ..Default::default() };
        errors.extend(caller.keys.list(list).await.err());
        let update = pb::UpdateKeyRequest {
            key: Some(pb::Key { id: text(), ..Default::default() }),
            update_mask: Some(prost_types::FieldMask { paths: vec![text()] }),
        };
        errors.extend(caller.keys.update(update).await.err());
        errors.extend(caller.accounts.get(pb::GetAccountRequest { id: text() }).await.err());
        let account =
            pb::CreateAccountRequest { id: text(), name: format!("{token}\n"), ..Default::default() };
        errors.extend(caller.accounts.create(account).await.err());
        let audit = pb::ListAuditEntriesRequest { account: text(), key_id: text(), ..Default::default() };
        errors.extend(caller.audit.list(audit).await.err());
    }

    // In headers that hold something else.
    for name in ["x-request-id", "traceparent", "x-keyward-account"] {
        let mut request = tonic::Request::new(check_request(&bad));
        request.metadata_mut().insert(name, kept.parse().unwrap());
        errors.extend(caller.authz.check(request).await.err());
        let create = pb::CreateKeyRequest { name: Some(format!("by-{name}")), ..plain_key_request() };
        let mut request = tonic::Request::new(create);
        request.metadata_mut().insert(name, kept.parse().unwrap());
        errors.extend(caller.keys.create(request).await.err());
    }

    // In what is no message at all: cut off, and not UTF-8.
    let mut message = check_request(&kept).encode_to_vec();
    message.push(0xff);
    let cut = message[..message.len() / 2].to_vec();
    let mut garbled = message.clone();
    *garbled.iter_mut().find(|byte| **byte == b'_').unwrap() = 0xff;
    for bytes in [message, cut, garbled] {
        for method in
            ["keyward.v1.AuthzService/Check", "keyward.v1.KeyService/Lookup", "keyward.v1.None/Such"]
        {
            let once = futures_util::stream::iter([Bytes::from(bytes.clone())]);
            let answer = call_raw(server.channel(), root, method, once).await;
            errors.push(answer.expect_err("no such message is understood"));
        }
    }
    errors
}

async fn no_token_leaves(format: &str) {
    let home = TestHome::new();
    let mut command = home.serve_command_without_root_key_file();
    // Everything that is decided is written down.
    std::fs::write(home.path("keyward.toml"), "[decision_log]\nallowed = 1.0\nfile = 'decisions'").unwrap();
    command.args(["--log", "trace", "--log-format", format, "--config", "keyward.toml"]);
    let server = home.start_with(command).unwrap();
    let root_file = home.path("keyward-root.key");
    let root = &read_text(&root_file);

    let mut canaries = TokenCanaries::default();
    let errors = use_tokens(&server, root, &mut canaries).await;
    assert!(errors.len() > 30, "too little went wrong: {}", errors.len());
    // While it runs the -wal and -shm files are there, too.
    let mut files = home.files();
    let home = server.stop();
    files.extend(home.files());

    let logged: usize = files.iter().map(|(_, bytes)| bytes.len()).sum();
    assert!(logged > 100_000, "the log was to be talkative: {logged} bytes");
    let names: Vec<_> = files.iter().map(|(path, _)| path.to_string_lossy()).collect();
    for end in [".db", "-wal", "-shm", "-lock", "stdout.0", "stderr.0", "decisions"] {
        assert!(names.iter().any(|name| name.ends_with(end)), "{end}: {names:?}");
    }
    for (path, bytes) in files.iter().filter(|(path, _)| *path != root_file) {
        if let Some(line) = bytes.split(|byte| *byte == b'\n').find(|line| !canaries.found(line).is_empty()) {
            let line = String::from_utf8_lossy(line);
            panic!("{}: {:?} in {line:.2000}", path.display(), canaries.found(line.as_bytes()));
        }
    }
    for status in &errors {
        let all = format!("{status:?} {} {:?}", status.message(), String::from_utf8_lossy(status.details()));
        assert!(canaries.found(all.as_bytes()).is_empty(), "{all}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_token_leaves_with_the_log_for_people_a_file_or_an_error() {
    no_token_leaves("text").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_token_leaves_with_the_log_for_machines_a_file_or_an_error() {
    no_token_leaves("json").await;
}

#[test]
fn a_token_that_shows_is_found() {
    let token = "kw_live_00000000000000000000000000000000000000000000AwA6B";
    let mut canaries = TokenCanaries::default();
    canaries.add("planted", token);
    for shown in [token, &token[20..40], "x AwA6Bkw 00000000"] {
        assert_eq!(canaries.found(shown.as_bytes()).len(), 1, "{shown}");
    }
    assert!(canaries.found(b"hint kw_live_0000").is_empty());
}
