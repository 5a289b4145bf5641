//! The seeds' calls as curl makes them: JSON over HTTP to the real Envoy with `deploy/envoy/rest.yaml`, which asks
//! the real server. `docs/rest.md` shows the same calls.

use serde_json::{Value, json};

use crate::{
    process::{KeywardProcess, TestHome},
    proxy::{EnvoyProcess, fill_placeholders},
    raw_http::{RawRequest, RawResponse},
};

/// Envoy in front of a server with the accounts `ann` and `bob`. A key that is made with a name alone may do
/// everything in its account.
struct RestSetup {
    envoy: EnvoyProcess,
    server: KeywardProcess,
    root: String,
}

impl RestSetup {
    fn start() -> RestSetup {
        let home = TestHome::new();
        std::fs::write(home.path("keyward.toml"), "default_role = \"everything\"\n").unwrap();
        let mut serve = home.serve_command();
        serve.arg("--config").arg(home.path("keyward.toml"));
        let server = home.start_with(serve).unwrap();
        let descriptors = home.command(["descriptors"]).output().unwrap();
        assert!(descriptors.status.success(), "{descriptors:?}");
        std::fs::write(home.path("keyward.pb"), descriptors.stdout).unwrap();
        let rest =
            RestSetup { envoy: EnvoyProcess::start(&envoy_config(&server)), root: home.root_key(), server };
        let everything = json!({"scopes": ["all", "keyward:keys:*"]});
        rest.call_ok(&rest.root, "PUT", "/v1/roles/everything", &everything);
        for account in ["ann", "bob"] {
            rest.call_ok(&rest.root, "POST", "/v1/accounts", &json!({"id": account}));
        }
        rest
    }

    #[track_caller]
    fn send(&self, request: &RawRequest) -> RawResponse {
        request.send(self.envoy.listener_address("rest"))
    }

    /// A call with a body, unless that is null.
    #[track_caller]
    fn call(&self, token: &str, method: &str, target: &str, body: &Value) -> RawResponse {
        let request = RawRequest::new(method, target).bearer(token);
        self.send(&if body.is_null() { request } else { request.json(body) })
    }

    #[track_caller]
    fn get(&self, token: &str, target: &str) -> RawResponse {
        self.call(token, "GET", target, &Value::Null)
    }

    /// The JSON of a call that is answered with 200, or 201.
    #[track_caller]
    fn call_ok(&self, token: &str, method: &str, target: &str, body: &Value) -> Value {
        let response = self.call(token, method, target, body);
        assert!(matches!(response.status, 200 | 201), "{method} {target}: {}", response.text());
        response.json()
    }

    /// `POST /v1/api-keys`: the key and its token.
    #[track_caller]
    fn create_key(&self, token: &str, body: &Value) -> (Value, String) {
        let made = self.call_ok(token, "POST", "/v1/api-keys", body);
        (made["key"].clone(), text(&made["token"]))
    }

    /// A key of an account that may do everything there.
    #[track_caller]
    fn account_token(&self, account: &str) -> String {
        self.create_key(&self.root, &json!({"account": account, "environment": "production"})).1
    }
}

/// `deploy/envoy/rest.yaml` on ports of the system's choice, in front of this server.
fn envoy_config(server: &KeywardProcess) -> String {
    let descriptors = format!("proto_descriptor: {}", server.home.path("keyward.pb").display());
    fill_placeholders(
        include_str!("../../deploy/envoy/rest.yaml"),
        &[
            ("port_value: 10000", "port_value: 0"),
            ("port_value: 9901", "port_value: 0"),
            ("port_value: 50051", &format!("port_value: {}", server.address.port())),
            ("proto_descriptor: keyward.pb", &descriptors),
        ],
    )
}

#[track_caller]
fn text(value: &Value) -> String {
    value.as_str().unwrap_or_else(|| panic!("{value} is no text")).to_owned()
}

#[track_caller]
fn id(key: &Value) -> String {
    text(&key["id"])
}

/// A refusal by Keyward: the status, and the stable reason in the body.
#[track_caller]
fn assert_refused(response: &RawResponse, status: u16, reason: &str) -> Value {
    assert_eq!(response.status, status, "{}", response.text());
    assert_eq!(response.header("content-type"), Some("application/json"));
    let body = response.json();
    let details = body["details"].as_array().unwrap().iter();
    let info: Vec<_> = details.filter(|detail| text(&detail["@type"]).ends_with("rpc.ErrorInfo")).collect();
    assert_eq!((info.len(), &info[0]["reason"], &info[0]["domain"]), (1, &json!(reason), &json!("keyward")));
    body
}

/// A refusal by Envoy itself.
#[track_caller]
fn assert_refused_by_envoy(response: &RawResponse, status: u16, code: u16, said: &str) {
    assert_eq!(response.status, status, "{}", response.text());
    assert_eq!(response.header("content-type"), Some("application/json"));
    let body = response.json();
    assert_eq!((&body["code"], &body["details"]), (&json!(code), &json!([])), "{body}");
    assert!(text(&body["message"]).contains(said), "{body}");
}

// Eazip: `/api-keys`.

#[test]
fn post_api_keys_with_a_name_and_an_expiry_is_201_and_shows_the_key_once() {
    let rest = RestSetup::start();
    let ann = rest.account_token("ann");
    let body = json!({"name": "CI/CD Pipeline", "expires_at": "2099-12-31T23:59:59Z"});
    let response = rest.call(&ann, "POST", "/v1/api-keys", &body);
    assert_eq!(response.status, 201, "{}", response.text());
    let made = response.json();
    let key = &made["key"];
    assert_eq!((&key["name"], &key["expires_at"]), (&body["name"], &body["expires_at"]));
    assert_eq!(
        (&key["account"], &key["environment"]),
        (&json!("ann"), &json!("production")),
        "the caller's own"
    );
    assert!(text(&key["created_at"]).ends_with('Z') && key.get("last_used_at").is_none(), "{key}");
    let token = text(&made["token"]);
    assert!(token.starts_with("kw_live_"));
    let secret = &token[text(&key["hint"]).len()..];
    assert!(!rest.get(&ann, "/v1/api-keys").text().contains(secret), "shown once");
    assert_eq!(rest.get(&token, "/v1/me").status, 200, "and it works");
}

#[test]
fn post_api_keys_without_anything_makes_a_nameless_key_that_never_expires() {
    let rest = RestSetup::start();
    let ann = rest.account_token("ann");
    for body in [Value::Null, json!({})] {
        let (key, _) = rest.create_key(&ann, &body);
        assert_eq!((&key["name"], key.get("expires_at")), (&json!(""), None));
    }
}

#[test]
fn get_api_keys_lists_ones_own_keys_newest_first() {
    let rest = RestSetup::start();
    let (ann, bob) = (rest.account_token("ann"), rest.account_token("bob"));
    for name in ["first", "second"] {
        rest.create_key(&ann, &json!({"name": name}));
    }
    let names = |token: &str, query: &str| -> Vec<String> {
        let list = rest.call_ok(token, "GET", &format!("/v1/api-keys{query}"), &Value::Null);
        list["keys"].as_array().unwrap().iter().map(|key| text(&key["name"])).collect()
    };
    assert_eq!(names(&ann, ""), ["second", "first", ""]);
    assert_eq!(names(&ann, "?name_prefix=fir&states=KEY_STATE_ACTIVE&states=KEY_STATE_EXPIRED"), ["first"]);
    assert_eq!(names(&ann, "?unused_since=2099-01-01T00:00:00Z&page_size=2"), ["second", "first"]);
    assert_eq!(names(&bob, ""), [""], "and nobody else's");
    let used = &rest.get(&ann, "/v1/api-keys").json()["keys"][2];
    assert!(text(&used["last_used_at"]).ends_with('Z'), "the one that asks: {used}");
}

#[test]
fn delete_api_keys_id_revokes_for_ever() {
    let rest = RestSetup::start();
    let ann = rest.account_token("ann");
    let (key, token) = rest.create_key(&ann, &json!({"name": "CI"}));
    let target = format!("/v1/api-keys/{}", id(&key));
    let revoked = rest.call_ok(
        &ann,
        "DELETE",
        &format!("{target}?reason=REVOKE_REASON_COMPROMISED&comment=on%20a%20wall"),
        &Value::Null,
    );
    assert_eq!(revoked["key"]["state"], "KEY_STATE_REVOKED");
    assert_eq!(revoked["key"]["revoke_comment"], "on a wall");
    assert_eq!(revoked["propagation"]["complete"], true);
    assert_refused(&rest.get(&token, "/v1/me"), 401, "UNAUTHENTICATED");
    assert_eq!(
        rest.call_ok(&ann, "GET", &target, &Value::Null)["key"]["state"],
        "KEY_STATE_REVOKED",
        "soft-delete"
    );
    let enable = rest.call(&ann, "POST", &format!("{target}:enable"), &Value::Null);
    assert_eq!(assert_refused(&enable, 400, "KEY_REVOKED")["code"], 9);
}

#[test]
fn a_key_that_is_not_there_or_another_accounts_is_404_alike() {
    let rest = RestSetup::start();
    let (ann, bob) = (rest.account_token("ann"), rest.account_token("bob"));
    let (of_bob, _) = rest.create_key(&bob, &json!({}));
    let body = |id: &str| {
        let response = rest.call(&ann, "DELETE", &format!("/v1/api-keys/{id}"), &Value::Null);
        assert_refused(&response, 404, "KEY_NOT_FOUND")
    };
    assert_eq!(body(&id(&of_bob)), body("01890000-0000-7000-8000-000000000000"));
}

// tracer and izli: who am I, 401, 403, and the name that is taken.

#[test]
fn get_me_says_the_organization_and_the_keys_name_permissions_and_expiration() {
    let rest = RestSetup::start();
    let body = json!({
        "account": "ann", "environment": "production", "name": "CI/CD Key",
        "scopes": ["monitors:read", "monitors:run"], "expires_at": "2099-01-15T00:00:00Z"
    });
    let (_, token) = rest.create_key(&rest.root, &body);
    let me = rest.call_ok(&token, "GET", "/v1/me", &Value::Null);
    assert_eq!(me["account"], json!({"id": "ann", "name": "ann"}));
    for field in ["name", "scopes", "expires_at"] {
        assert_eq!(me["key"][field], body[field]);
    }
}

#[test]
fn a_missing_malformed_or_dead_key_is_401_with_one_and_the_same_body() {
    let rest = RestSetup::start();
    let ann = rest.account_token("ann");
    let (_, dead) = rest.create_key(&ann, &json!({}));
    rest.call_ok(&dead, "DELETE", "/v1/me", &Value::Null);
    let ask = || RawRequest::get("/v1/api-keys");
    let twice = ask().bearer(&ann).bearer("another");
    let basic = ask().header("authorization", format!("Basic {ann}"));
    let bodies =
        [ask(), ask().bearer("kw_live_nonsense"), ask().bearer(&dead), twice, basic].map(|request| {
            let response = rest.send(&request);
            assert_eq!(response.header("www-authenticate"), Some("Bearer"));
            assert_refused(&response, 401, "UNAUTHENTICATED")
        });
    assert!(bodies.iter().all(|body| body == &bodies[0]));
}

#[test]
fn a_key_without_the_permission_is_403_and_told_which() {
    let rest = RestSetup::start();
    let plain = json!({"account": "ann", "environment": "production", "scopes": ["monitors:read"]});
    let (_, token) = rest.create_key(&rest.root, &plain);
    let body =
        assert_refused(&rest.call(&token, "POST", "/v1/api-keys", &json!({})), 403, "PERMISSION_MISSING");
    assert_eq!(body["details"][0]["metadata"]["scope"], "keyward:keys:write");
}

#[test]
fn a_name_that_is_taken_is_409_in_the_words_of_the_page() {
    let rest = RestSetup::start();
    let ann = rest.account_token("ann");
    rest.create_key(&ann, &json!({"name": "CI"}));
    let again = rest.call(&ann, "POST", "/v1/api-keys", &json!({"name": "CI"}));
    let body = assert_refused(&again, 409, "KEY_NAME_TAKEN");
    assert_eq!(body["message"], "An API key with this name already exists");
}

// The licensing platform: environments, rate limits, Regenerate, and a Revoke that can be taken back.

#[test]
fn a_key_is_generated_and_changed_with_environment_permissions_and_rate_limits() {
    let rest = RestSetup::start();
    let body = json!({
        "account": "ann", "environment": "staging", "name": "Main Website Integration",
        "scopes": ["license:manage"], "rate_limits": [{"name": "minute", "limit": 100, "window": "60s"}]
    });
    let (key, token) = rest.create_key(&rest.root, &body);
    assert!(token.starts_with("kw_staging_"));
    assert_eq!(key["rate_limits"], json!([{"name": "minute", "limit": "100", "window": "60s"}]));
    let change = json!({"scopes": ["license:read"], "name": "Website"});
    let target = format!("/v1/api-keys/{}", id(&key));
    let changed =
        rest.call_ok(&rest.root, "PATCH", &format!("{target}?update_mask=scopes,rate_limits"), &change);
    let changed = &changed["key"];
    assert_eq!((&changed["scopes"], &changed["rate_limits"]), (&change["scopes"], &json!([])));
    assert_eq!(changed["name"], body["name"], "not in the mask");
    let unmasked = rest.call(&rest.root, "PATCH", &target, &change);
    assert_refused(&unmasked, 400, "INVALID_REQUEST");
}

#[test]
fn regenerate_gives_a_new_token_at_once_or_with_an_overlap() {
    let rest = RestSetup::start();
    let (key, first) = rest.create_key(&rest.account_token("ann"), &json!({"name": "CI"}));
    let target = format!("/v1/api-keys/{}", id(&key));
    let works = |token: &str| rest.get(token, "/v1/me").status == 200;
    let second = text(&rest.call_ok(&rest.root, "POST", &format!("{target}:rotate"), &Value::Null)["token"]);
    assert_eq!((works(&first), works(&second)), (false, true));
    let overlap = json!({"overlap": "3600s"});
    let rotated = rest.call_ok(&rest.root, "POST", &format!("{target}:rotate"), &overlap);
    assert!(works(&second) && works(&text(&rotated["token"])));
    rest.call_ok(&rest.root, "POST", &format!("{target}:finish-rotation"), &Value::Null);
    assert!(!works(&second));
}

#[test]
fn disable_can_be_taken_back() {
    let rest = RestSetup::start();
    let (key, token) = rest.create_key(&rest.account_token("ann"), &json!({}));
    for (verb, status) in [("disable", 401), ("enable", 200)] {
        let target = format!("/v1/api-keys/{}:{verb}", id(&key));
        rest.call_ok(&rest.root, "POST", &target, &Value::Null);
        assert_eq!(rest.get(&token, "/v1/me").status, status, "after {verb}");
    }
}

#[test]
fn past_the_callers_rate_limit_is_429_with_retry_after() {
    let rest = RestSetup::start();
    let limited = json!({
        "account": "ann", "environment": "production", "scopes": ["keyward:keys:read"],
        "rate_limits": [{"name": "day", "limit": 1, "window": "86400s"}]
    });
    let (_, token) = rest.create_key(&rest.root, &limited);
    assert_eq!(rest.get(&token, "/v1/api-keys").status, 200);
    let response = rest.get(&token, "/v1/api-keys");
    assert_refused(&response, 429, "CALLER_LIMITED");
    let wait: u64 = response.header("retry-after").unwrap().parse().unwrap();
    assert!((86_300..=86_400).contains(&wait), "{wait}");
}

// Checkly: user keys, and the person behind a dashboard.

#[test]
fn a_user_key_names_its_account_and_a_dashboard_names_the_person() {
    let rest = RestSetup::start();
    let member = json!({"role": "everything"});
    // An id with a slash, as identity providers give them.
    rest.call_ok(&rest.root, "PUT", "/v1/accounts/ann/members/oidc%7Cx%2Fjo", &member);
    let members = rest.call_ok(&rest.root, "GET", "/v1/accounts/ann/members", &Value::Null);
    assert_eq!(members["members"][0]["user"], "oidc|x/jo");
    let body = json!({"user": "oidc|x/jo", "environment": "production", "scopes": ["all", "keyward:keys:*"]});
    let create = |acting: &str| {
        let request = RawRequest::new("POST", "/v1/api-keys").bearer(&rest.root).json(&body);
        rest.send(&request.header("x-keyward-acting-user", acting))
    };
    assert_refused(&create("somebody-else"), 404, "KEY_NOT_FOUND");
    let token = text(&create("oidc|x/jo").json()["token"]);
    let list = |account: &str| {
        let request = RawRequest::get("/v1/api-keys").bearer(&token);
        rest.send(&request.header("x-keyward-account", account)).status
    };
    assert_eq!((list("ann"), list("bob")), (200, 401));
    rest.call_ok(&rest.root, "DELETE", "/v1/accounts/ann/members/oidc%7Cx%2Fjo", &Value::Null);
    assert_eq!(list("ann"), 401);
}

// What holds for all.

#[test]
fn what_is_wrong_with_a_request_is_400_with_every_field() {
    let rest = RestSetup::start();
    let wrong = json!({"name": "a".repeat(256), "expires_at": "2020-01-01T00:00:00Z", "environment": "moon"});
    let body = assert_refused(
        &rest.call(&rest.account_token("ann"), "POST", "/v1/api-keys", &wrong),
        400,
        "INVALID_REQUEST",
    );
    let fields = body["details"][1]["field_violations"].as_array().unwrap().iter();
    let mut fields: Vec<_> = fields.map(|violation| text(&violation["field"])).collect();
    fields.sort();
    assert_eq!(fields, ["environment", "expires_at", "name"]);
}

#[test]
fn what_envoy_refuses_itself_has_the_same_form() {
    let rest = RestSetup::start();
    let root = || rest.root.as_str();
    let post = |body: &str| {
        rest.send(&RawRequest::new("POST", "/v1/api-keys").bearer(root()).body("application/json", body))
    };
    assert_refused_by_envoy(&rest.get(root(), "/v1/nothing"), 404, 5, "Could not resolve");
    assert_refused_by_envoy(
        &rest.call(root(), "PUT", "/v1/api-keys", &json!({})),
        404,
        5,
        "Could not resolve",
    );
    assert_refused_by_envoy(&rest.get(root(), "/v1/api-keys?bogus=1"), 400, 3, "bogus");
    assert_refused_by_envoy(&rest.get(root(), "/v1/api-keys?page_size=x"), 400, 3, "page_size");
    assert_refused_by_envoy(&post("{\"name\":"), 400, 3, "Unexpected end");
    assert_refused_by_envoy(&post("[]"), 400, 3, "must be a message");
    assert_refused_by_envoy(&post("{\"ttl\": \"1 year\"}"), 400, 3, "duration");
    let long = json!({"name": "x".repeat(9 << 20)}).to_string();
    assert_refused_by_envoy(&post(&long), 413, 3, "Too Large");
}

#[test]
fn without_keyward_it_is_503() {
    let RestSetup { envoy, server, root } = RestSetup::start();
    let _home = server.stop();
    let response = RawRequest::get("/v1/me").bearer(&root).send(envoy.listener_address("rest"));
    assert_refused_by_envoy(&response, 503, 14, "upstream");
}

/// As `docs/rest.md` warns: Envoy has no switch against it.
#[test]
fn a_misspelt_field_is_not_noticed() {
    let rest = RestSetup::start();
    let (key, _) = rest.create_key(&rest.account_token("ann"), &json!({"nam": "CI"}));
    assert_eq!(key["name"], "");
}

#[test]
fn a_full_page_passes_though_it_is_larger_than_envoys_buffers() {
    let rest = RestSetup::start();
    let key = |at: u32| {
        let notes = "x".repeat(4000);
        let digest = base64(&[at.to_be_bytes(), [7; 4]].concat().repeat(4));
        json!({
            "account": "ann", "environment": "production", "scopes": ["a:b"], "sha256": digest, "hint": "x",
            "metadata": {"notes": notes}
        })
    };
    let keys: Vec<_> = (0..600).map(key).collect();
    let imported = rest.call_ok(&rest.root, "POST", "/v1/api-keys:import", &json!({"keys": keys}));
    assert!(imported["results"].as_array().unwrap().iter().all(|result| result["error"] == ""), "{imported}");
    let page = rest.call_ok(&rest.root, "GET", "/v1/api-keys?account=ann&page_size=1000", &Value::Null);
    assert_eq!(page["keys"].as_array().unwrap().len(), 600);
    assert!(page.to_string().len() > 2 << 20);
}

fn base64(bytes: &[u8]) -> String {
    use base64::Engine as _;
    base64::engine::general_purpose::STANDARD.encode(bytes)
}

/// Method and path of every `google.api.http` option.
fn paths() -> Vec<(String, &'static str)> {
    const PROTOS: &str = concat!(
        include_str!("../../proto/keyward/v1/keys.proto"),
        include_str!("../../proto/keyward/v1/accounts.proto"),
        include_str!("../../proto/keyward/v1/audit.proto"),
    );
    let path_at = |at: usize| PROTOS[at..].split('"').nth(1).unwrap();
    let of = |method: &'static str| {
        let places = PROTOS.match_indices(method).map(|(at, _)| at);
        let name = method.trim_end_matches(": \"/").to_uppercase();
        places.map(move |at| (name.clone(), path_at(at)))
    };
    ["get: \"/", "post: \"/", "put: \"/", "patch: \"/", "delete: \"/"].into_iter().flat_map(of).collect()
}

#[test]
fn every_path_leads_to_a_call_that_asks_for_a_key_and_is_documented() {
    let rest = RestSetup::start();
    let paths = paths();
    assert!(paths.len() > 30, "{paths:?}");
    for (method, path) in paths {
        let response = rest.send(&RawRequest::new(&method, &path.replace(['{', '}'], "")));
        assert_eq!(response.status, 401, "{method} {path}: {}", response.text());
        let row = format!("| `{method}` | `{path}` |");
        assert!(include_str!("../../docs/rest.md").contains(&row), "docs/rest.md lacks {row}");
    }
}

#[test]
fn accounts_and_their_log_are_there_too() {
    let rest = RestSetup::start();
    let root = rest.root.as_str();
    let taken = rest.call(root, "POST", "/v1/accounts", &json!({"id": "ann"}));
    assert_refused(&taken, 409, "ACCOUNT_EXISTS");
    let renamed = rest.call_ok(root, "PATCH", "/v1/accounts/ann", &json!({"name": "Ann & Sons"}));
    assert_eq!(renamed["account"]["name"], "Ann & Sons");
    rest.call_ok(root, "PUT", "/v1/accounts/ann/roles/reader", &json!({"scopes": ["a:read"]}));
    let roles = rest.call_ok(root, "GET", "/v1/accounts/ann/roles", &Value::Null);
    assert_eq!(roles["roles"][1]["name"], "reader");
    rest.call_ok(root, "POST", "/v1/accounts/ann:suspend", &Value::Null);
    let newest = rest.call_ok(root, "GET", "/v1/audit-entries?account=ann&page_size=1", &Value::Null);
    assert_eq!(newest["entries"][0]["action"], "account.suspended");
    assert_eq!(newest["entries"][0]["method"], "keyward.v1.AccountService/Suspend");
}

#[tokio::test]
async fn grpc_from_outside_reaches_nothing_through_the_rest_listener() {
    let rest = RestSetup::start();
    for method in [
        "envoy.service.auth.v3.Authorization/Check",
        "keyward.v1.AuthzService/Check",
        "keyward.v1.KeyService/List",
    ] {
        let channel = tonic::transport::Endpoint::from_shared(format!(
            "http://{}",
            rest.envoy.listener_address("rest")
        ))
        .unwrap();
        let message = futures_util::stream::iter([bytes::Bytes::new()]);
        let refused =
            crate::process::call_raw(channel.connect_lazy(), "x", method, message).await.unwrap_err();
        assert_eq!(refused.code(), tonic::Code::Unimplemented, "{method}: {refused:?}");
    }
}
