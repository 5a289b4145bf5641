//! The real server, driven by the real grpcurl, as operators do it from a shell: reflection, every first step,
//! every reason for which a Check is refused.

use std::{
    path::PathBuf,
    process::{Command, Output},
};

use serde_json::{Value, json};

use crate::process::{KeywardProcess, TestHome, wait_for};

fn grpcurl() -> PathBuf {
    let path = std::env::var_os("KEYWARD_GRPCURL").map_or_else(|| "grpcurl".into(), PathBuf::from);
    match Command::new(&path).arg("-version").output() {
        Ok(_) => path,
        Err(error) => panic!(
            "{} does not run ({error}): 'make tools' installs grpcurl into .tools/bin, where 'make test' finds it; \
             or name one in KEYWARD_GRPCURL",
            path.display()
        ),
    }
}

/// A shell in front of a server.
struct GrpcurlShell {
    server: KeywardProcess,
    root: String,
}

impl GrpcurlShell {
    /// A server with the account `acme`.
    fn new() -> GrpcurlShell {
        let server = KeywardProcess::start();
        let root = server.home.root_key();
        let shell = GrpcurlShell { server, root };
        shell.call("AccountService/Create", json!({"id": "acme"}));
        shell
    }

    fn run(&self, token: Option<&str>, before: &[&str], after: &[&str]) -> Output {
        let mut command = Command::new(grpcurl());
        command.args(["-plaintext", "-emit-defaults"]);
        if let Some(token) = token {
            command.args(["-H", &format!("authorization: Bearer {token}")]);
        }
        command.args(before).arg(self.server.address.to_string()).args(after);
        command.output().unwrap()
    }

    /// What is printed without a credential.
    #[track_caller]
    fn run_without_token(&self, arguments: &[&str]) -> String {
        printed(&self.run(None, &[], arguments)).unwrap()
    }

    fn try_call(&self, method: &str, request: Value) -> Result<Value, String> {
        let output =
            self.run(Some(&self.root), &["-d", &request.to_string()], &[&format!("keyward.v1.{method}")]);
        printed(&output).map(|text| serde_json::from_str(&text).unwrap())
    }

    #[track_caller]
    fn call(&self, method: &str, request: Value) -> Value {
        self.try_call(method, request).unwrap()
    }

    /// A key of `acme` that may `monitors:read` in production, but for what `with` says: its id and its token.
    #[track_caller]
    fn create(&self, with: Value) -> (String, String) {
        let mut request =
            json!({"account": "acme", "environment": "production", "scopes": ["monitors:read"]});
        merge(&mut request, with);
        let made = self.call("KeyService/Create", request);
        (text(&made["key"]["id"]), text(&made["token"]))
    }

    /// Checks a token for `monitors:read` in production, but for what `with` says.
    #[track_caller]
    fn check(&self, token: &str, with: Value) -> Value {
        let mut request = json!({"token": token, "environment": "production", "scopes": ["monitors:read"]});
        merge(&mut request, with);
        self.call("AuthzService/Check", request)
    }

    #[track_caller]
    fn reason(&self, token: &str) -> String {
        text(&self.check(token, json!({}))["reason"])
    }
}

fn merge(into: &mut Value, with: Value) {
    into.as_object_mut().unwrap().extend(with.as_object().unwrap().clone());
}

#[track_caller]
fn text(value: &Value) -> String {
    value.as_str().unwrap().to_owned()
}

fn printed(output: &Output) -> Result<String, String> {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
}

#[test]
fn reflection_tells_strangers_the_services_and_their_comments() {
    let shell = GrpcurlShell::new();
    let services = shell.run_without_token(&["list"]);
    for service in [
        "grpc.health.v1.Health",
        "keyward.v1.AccountService",
        "keyward.v1.AuditService",
        "keyward.v1.AuthzService",
        "keyward.v1.KeyService",
    ] {
        assert!(services.lines().any(|line| line == service), "{services}");
    }
    assert!(
        shell.run_without_token(&["list", "keyward.v1.KeyService"]).contains("keyward.v1.KeyService.Rotate")
    );
    let described = shell.run_without_token(&["describe", "keyward.v1.CheckRequest"]);
    assert!(described.contains("The presented token, of at most 512 bytes."), "{described}");
}

#[test]
fn a_token_is_made_and_checked() {
    let shell = GrpcurlShell::new();
    let (id, token) = shell.create(json!({"name": "first"}));
    let answer = shell.check(&token, json!({"account": "acme"}));
    assert_eq!(answer["allowed"], true);
    assert_eq!(answer["reason"], "REASON_OK");
    assert_eq!((text(&answer["keyId"]), text(&answer["keyName"])), (id, "first".to_owned()));
}

#[test]
fn what_is_not_allowed_says_why() {
    let shell = GrpcurlShell::new();
    let denied = |token: &str, with: Value, reason: &str| {
        let answer = shell.check(token, with);
        assert_eq!(answer["reason"], reason, "{answer}");
        assert_eq!(answer["allowed"], false, "{answer}");
        answer
    };
    let (id, token) = shell.create(json!({}));

    let typo = format!("{}{}", &token[..token.len() - 1], if token.ends_with('x') { 'y' } else { 'x' });
    denied(&typo, json!({}), "REASON_MALFORMED");
    denied("sk_live_of_another_system", json!({}), "REASON_UNKNOWN");
    denied(&token, json!({"environment": "staging"}), "REASON_WRONG_ENVIRONMENT");
    denied(&token, json!({"account": "globex"}), "REASON_WRONG_ACCOUNT");
    let answer = denied(&token, json!({"scopes": ["monitors:write"]}), "REASON_MISSING_SCOPE");
    assert_eq!(answer["missingScopes"], json!(["monitors:write"]));

    let (_, bound) = shell.create(json!({"customers": ["c1"], "allowedCidrs": ["10.0.0.0/8"]}));
    let at_home = json!({"customer": "c1", "clientIp": "10.1.2.3"});
    assert_eq!(shell.check(&bound, at_home)["allowed"], true);
    denied(&bound, json!({"customer": "c2", "clientIp": "10.1.2.3"}), "REASON_WRONG_CUSTOMER");
    denied(&bound, json!({"customer": "c1", "clientIp": "192.0.2.1"}), "REASON_ADDRESS_NOT_ALLOWED");

    shell.call("KeyService/Disable", json!({"id": id}));
    denied(&token, json!({}), "REASON_DISABLED");
    shell.call("KeyService/Enable", json!({"id": id}));
    shell.call("AccountService/Suspend", json!({"id": "acme"}));
    denied(&token, json!({}), "REASON_ACCOUNT_SUSPENDED");
    shell.call("AccountService/Resume", json!({"id": "acme"}));
    assert_eq!(shell.reason(&token), "REASON_OK");

    shell.call("KeyService/Rotate", json!({"id": id}));
    denied(&token, json!({}), "REASON_ROTATED");
    shell.call("KeyService/Revoke", json!({"id": id, "reason": "REVOKE_REASON_COMPROMISED"}));
    denied(&token, json!({}), "REASON_REVOKED");
    let (_, brief) = shell.create(json!({"ttl": "1s"}));
    wait_for("a key to expire", || (shell.reason(&brief) != "REASON_OK").then_some(()));
    denied(&brief, json!({}), "REASON_EXPIRED");
}

#[test]
fn both_tokens_live_until_the_rotation_is_finished() {
    let shell = GrpcurlShell::new();
    let (id, old) = shell.create(json!({}));
    let rotated = shell.call("KeyService/Rotate", json!({"id": id, "overlap": "10s"}));
    let new = text(&rotated["token"]);
    assert_eq!((shell.reason(&old), shell.reason(&new)), ("REASON_OK".into(), "REASON_OK".into()));
    shell.call("KeyService/FinishRotation", json!({"id": id}));
    assert_eq!((shell.reason(&old), shell.reason(&new)), ("REASON_ROTATED".into(), "REASON_OK".into()));
}

#[test]
fn an_overlap_ends_by_itself() {
    let shell = GrpcurlShell::new();
    let (id, old) = shell.create(json!({}));
    shell.call("KeyService/Rotate", json!({"id": id, "overlap": "1s"}));
    let ended =
        wait_for("the overlap to end", || Some(shell.reason(&old)).filter(|reason| reason != "REASON_OK"));
    assert_eq!(ended, "REASON_ROTATED");
}

#[test]
fn a_list_comes_in_pages() {
    let shell = GrpcurlShell::new();
    let made: Vec<String> = (0..3).map(|_| shell.create(json!({})).0).collect();
    let ids = |page: &Value| -> Vec<String> {
        page["keys"].as_array().unwrap().iter().map(|key| text(&key["id"])).collect()
    };
    let first = shell.call("KeyService/List", json!({"account": "acme", "pageSize": 2}));
    let next = &first["nextPageToken"];
    let second = shell.call("KeyService/List", json!({"account": "acme", "pageSize": 2, "pageToken": next}));
    assert_eq!(second["nextPageToken"], "");
    let mut listed = [ids(&first), ids(&second)].concat();
    listed.reverse();
    assert_eq!(listed, made, "newest first");
}

#[test]
fn an_error_shows_its_details() {
    let shell = GrpcurlShell::new();
    let error = shell.try_call("KeyService/Create", json!({"account": "acme"})).unwrap_err();
    for said in ["Code: InvalidArgument", "environment: must be one of", "INVALID_REQUEST", "fieldViolations"]
    {
        assert!(error.contains(said), "{said}: {error}");
    }
}

/// The lines that a first start prints are pasted into a shell as they stand.
#[test]
fn the_first_steps_that_are_printed_work_when_pasted() {
    let home = TestHome::new();
    let server = home.start_with(home.with_terminal(&home.serve_command_without_root_key_file())).unwrap();
    let printed_lines = server.process.stdout();
    let pasted = printed_lines.lines().filter(|line| line.starts_with("  ")).collect::<Vec<_>>().join("\n");
    let script = format!("set -euo pipefail\ngrpcurl() {{ command \"$GRPCURL\" \"$@\"; }}\n{pasted}\n");
    let output = Command::new("bash").args(["-c", &script]).env("GRPCURL", grpcurl()).output().unwrap();
    let shown = printed(&output).unwrap_or_else(|error| panic!("{error}\n{script}"));
    assert!(shown.contains("\"id\": \"acme\""), "{shown}");
    assert!(shown.contains("\"allowed\": true"), "{shown}");
    assert!(shown.contains("service KeyService"), "{shown}");
}
