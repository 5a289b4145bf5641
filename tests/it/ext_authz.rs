//! `envoy.service.auth.v3.Authorization` over the wire, asked as Envoy asks: where a route's needs come from, what
//! each finding becomes, what the service behind sees, what odd requests hear.

use std::{collections::BTreeMap, time::Duration};

use keyward::{
    config::server::Settings,
    domain::route::Mode,
    engine::limiter::{OnFailure, Prefix, RedisSettings, RedisUrl, Time},
    pb::{
        self,
        envoy::service::auth::v3::{
            CheckResponse, DeniedHttpResponse, OkHttpResponse, authorization_client::AuthorizationClient,
            check_response::HttpResponse,
        },
        envoy_request::{
            Address, AttributeContext, CheckRequest, HeaderMap, HeaderValue, HttpRequest, Pair, Peer,
            Request, SocketAddress,
        },
    },
};
use prost::Message as _;
use tonic::{Code, Status, transport::Channel};

use crate::support::{Client, Made, Server, fields, reason, refused, seconds, service_key, texts, user_key};

/// A request that Envoy asks about.
#[derive(Clone)]
pub(crate) struct Ask {
    http: HttpRequest,
    extensions: Vec<Pair>,
    peer: &'static str,
}

fn pair(key: &str, value: impl AsRef<[u8]>) -> Pair {
    Pair { key: key.to_owned().into(), value: value.as_ref().to_vec().into() }
}

impl Ask {
    pub(crate) fn get(path: &str) -> Ask {
        let http = HttpRequest {
            id: "1".into(),
            method: "GET".into(),
            path: path.to_owned().into(),
            host: "api.test".into(),
            ..HttpRequest::default()
        };
        Ask { http, extensions: Vec::new(), peer: "192.0.2.1" }
    }

    /// A request to a route whose configuration says this.
    pub(crate) fn route(extensions: &[(&str, &str)]) -> Ask {
        let mut ask = Ask::get("/v1/monitors");
        ask.extensions = extensions.iter().map(|(key, value)| pair(key, value)).collect();
        ask
    }

    /// A request to a route that needs `monitors:read` in production.
    pub(crate) fn monitors() -> Ask {
        Ask::route(&[("scope", "monitors:read"), ("environment", "production")])
    }

    pub(crate) fn saying(mut self, extension: &str, value: &str) -> Ask {
        self.extensions.push(pair(extension, value));
        self
    }

    pub(crate) fn header(mut self, name: &str, value: impl AsRef<[u8]>) -> Ask {
        self.http.headers.push(pair(name, value));
        self
    }

    pub(crate) fn bearer(self, token: &str) -> Ask {
        self.header("authorization", format!("Bearer {token}"))
    }

    pub(crate) fn method(mut self, method: &str) -> Ask {
        self.http.method = method.to_owned().into();
        self
    }

    fn host(mut self, host: &str) -> Ask {
        self.http.host = host.to_owned().into();
        self
    }

    fn path(mut self, path: &str) -> Ask {
        self.http.path = path.to_owned().into();
        self
    }

    fn id(mut self, id: &str) -> Ask {
        self.http.id = id.to_owned().into();
        self
    }

    fn message(self) -> CheckRequest {
        let socket_address = Some(SocketAddress { address: self.peer.into() });
        let source = Some(Peer { address: Some(Address { socket_address }) });
        let request = Some(Request { http: Some(self.http) });
        let attributes = AttributeContext { source, request, context_extensions: self.extensions };
        CheckRequest { attributes: Some(attributes) }
    }

    async fn try_of(self, server: &Server) -> Result<CheckResponse, Status> {
        ask(&server.root(), self.message()).await
    }

    /// What passes, as it passes.
    #[track_caller]
    pub(crate) fn passes(self, server: &Server) -> impl Future<Output = Passed> {
        let root = server.root();
        async move { Passed::from(ask(&root, self.message()).await.unwrap()) }
    }

    /// What is refused, as it is refused.
    pub(crate) fn refused(self, server: &Server) -> impl Future<Output = Refused> {
        let root = server.root();
        async move { Refused::from(ask(&root, self.message()).await.unwrap()) }
    }
}

async fn ask(caller: &Client, message: CheckRequest) -> Result<CheckResponse, Status> {
    caller.ask("envoy.service.auth.v3.Authorization/Check", message).await
}

/// How a request with this token is decided, as the answer's metadata says it.
pub(crate) async fn decision(server: &Server, token: &str) -> String {
    let answer = Ask::monitors().bearer(token).try_of(server).await.unwrap();
    metadata(&answer)["reason"].clone()
}

fn metadata(answer: &CheckResponse) -> BTreeMap<String, String> {
    use prost_types::value::Kind;
    let fields = answer.dynamic_metadata.as_ref().unwrap().fields.iter();
    fields
        .map(|(name, value)| match value.kind.as_ref().unwrap() {
            Kind::StringValue(text) => (name.clone(), text.clone()),
            Kind::NumberValue(number) => (name.clone(), number.to_string()),
            Kind::BoolValue(flag) => (name.clone(), flag.to_string()),
            other => panic!("{name} is no scalar: {other:?}"),
        })
        .collect()
}

pub(crate) type Headers = BTreeMap<String, String>;

fn headers(list: &[pb::envoy::config::core::v3::HeaderValueOption]) -> Headers {
    list.iter()
        .map(|option| {
            // Envoys differ in what they make of anything else.
            assert_eq!(option.append_action, 2, "OVERWRITE_IF_EXISTS_OR_ADD: {option:?}");
            let header = option.header.clone().unwrap();
            (header.key, header.value)
        })
        .collect()
}

#[derive(Debug)]
pub(crate) struct Passed {
    pub(crate) upstream: Headers,
    pub(crate) removed: Vec<String>,
    removed_queries: Vec<String>,
    response: Headers,
    metadata: BTreeMap<String, String>,
}

impl From<CheckResponse> for Passed {
    #[track_caller]
    fn from(answer: CheckResponse) -> Passed {
        let metadata = metadata(&answer);
        assert_eq!(answer.status.unwrap().code, 0, "{metadata:?}");
        let Some(HttpResponse::OkResponse(ok)) = answer.http_response else { panic!("{metadata:?}") };
        let OkHttpResponse {
            headers: upstream,
            headers_to_remove: removed,
            response_headers_to_add,
            query_parameters_to_remove: removed_queries,
            ..
        } = ok;
        let (upstream, response) = (headers(&upstream), headers(&response_headers_to_add));
        Passed { upstream, removed, removed_queries, response, metadata }
    }
}

#[derive(Debug)]
pub(crate) struct Refused {
    pub(crate) status: i32,
    /// Whether Envoy counts it as an error, not as a denial.
    fault: bool,
    code: i32,
    headers: Headers,
    pub(crate) body: String,
    metadata: BTreeMap<String, String>,
}

impl From<CheckResponse> for Refused {
    #[track_caller]
    fn from(answer: CheckResponse) -> Refused {
        let metadata = metadata(&answer);
        let code = answer.status.unwrap().code;
        assert_ne!(code, 0, "{metadata:?}");
        let (fault, denied) = match answer.http_response {
            Some(HttpResponse::DeniedResponse(denied)) => (false, denied),
            Some(HttpResponse::ErrorResponse(denied)) => (true, denied),
            other => panic!("{other:?}"),
        };
        let DeniedHttpResponse { status, headers: sent, body } = denied;
        Refused { status: status.unwrap().code, fault, code, headers: headers(&sent), body, metadata }
    }
}

impl Refused {
    pub(crate) fn reason(&self) -> &str {
        &self.metadata["reason"]
    }
}

const UNAUTHORIZED: &str =
    r#"{"success":false,"error":{"code":"UNAUTHORIZED","message":"Invalid or missing API key"}}"#;
const FORBIDDEN: &str =
    r#"{"success":false,"error":{"code":"FORBIDDEN","message":"Insufficient permissions for this action"}}"#;

/// A server with `acme`, and a key of it that may `monitors:read`.
pub(crate) async fn with_key() -> (Server, Made) {
    let server = Server::with_accounts().await;
    let made = server.make(service_key("acme", &["monitors:read"])).await;
    (server, made)
}

/// A server with these rules.
pub(crate) async fn with_rules(rules: &str) -> (Server, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rules.toml");
    std::fs::write(&path, rules).unwrap();
    let server = Server::start_with(|settings| settings.rules = Some(path)).await;
    server.account("acme").await;
    (server, folder)
}

async fn configured(configure: impl FnOnce(&mut Settings)) -> (Server, Made) {
    let server = Server::start_with(configure).await;
    server.account("acme").await;
    let made = server.make(service_key("acme", &["monitors:read"])).await;
    (server, made)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_cannot_tell_the_short_way_from_the_long_one() {
    let server = Server::with_accounts().await;
    let made = server.make(service_key("acme", &["monitors:read"])).await;
    let revoked = server.make(service_key("acme", &["monitors:read"])).await;
    server.root().revoke(&revoked.id).await.unwrap();
    let short = server.anonymous();
    // Of those who show no key nobody reads it; and so their calls go the long way.
    let long = short.with_header("x-keyward-account", "acme");
    let asks = [
        Ask::monitors().bearer(&made.token),
        Ask::monitors().bearer(&made.token).header("x-request-id", "seven").path("/v1/monitors?api_key=1"),
        Ask::monitors().bearer(&revoked.token),
        Ask::monitors().bearer("nobody's"),
        Ask::monitors(),
        Ask::route(&[("scope", "monitors:write"), ("environment", "production")]).bearer(&made.token),
        Ask::route(&[("environment", "nowhere")]).bearer(&made.token),
        Ask::route(&[("public", "true")]),
        Ask::get("/v1//monitors").bearer(&made.token),
        Ask::get("/none").bearer(&made.token),
    ];
    let told = |answer: Result<CheckResponse, Status>| {
        answer.map_err(|status| (status.code(), status.message().to_owned(), status.details().to_vec()))
    };
    let (mut passed, mut refused) = (0, 0);
    for message in asks.map(Ask::message).into_iter().chain([CheckRequest::default()]) {
        let answer = told(ask(&short, message.clone()).await);
        assert_eq!(answer, told(ask(&long, message).await));
        match answer.is_ok_and(|answer| answer.status.is_some_and(|status| status.code == 0)) {
            true => passed += 1,
            false => refused += 1,
        }
    }
    assert!(passed >= 3 && refused >= 5, "{passed} {refused}");
}

#[tokio::test]
async fn a_key_passes_and_the_service_learns_whose_it_is() {
    let (server, made) = with_key().await;
    let passed = Ask::monitors().bearer(&made.token).passes(&server).await;
    let wanted = [
        ("x-keyward-account", "acme"),
        ("x-keyward-environment", "production"),
        ("x-keyward-key-id", &made.id),
        ("x-keyward-scopes", "monitors:read"),
    ];
    let wanted: Headers = wanted.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
    assert_eq!(passed.upstream, wanted);
    assert!(passed.removed.contains(&"authorization".to_owned()), "the credential is hidden");
    assert_eq!((&*passed.metadata["key_id"], &*passed.metadata["reason"]), (&*made.id, "ok"));
    assert_eq!((&*passed.metadata["allowed"], &*passed.metadata["account"]), ("true", "acme"));
    let used = server.root().check(crate::support::check(&made.token, "monitors:read")).await.unwrap();
    assert!(used.allowed, "one decision for both services");
}

#[tokio::test]
async fn an_unusable_key_hears_one_word_and_401() {
    let (server, made) = with_key().await;
    let disabled = server.make(service_key("acme", &["monitors:read"])).await;
    server.root().disable(&disabled.id).await.unwrap();
    let staging = server
        .make(pb::CreateKeyRequest { environment: "staging".into(), ..service_key("acme", &["*"]) })
        .await;
    let revoked = server.make(service_key("acme", &["monitors:read"])).await;
    server.root().revoke(&revoked.id).await.unwrap();
    let rotated = server.make(service_key("acme", &["monitors:read"])).await;
    server.root().rotate(&rotated.id, 0).await.unwrap();
    let short = pb::CreateKeyRequest { ttl: Some(seconds(1)), ..service_key("acme", &["monitors:read"]) };
    let expired = server.make(short).await;
    server.advance(2);
    let typo = format!("{}x", &made.token[..made.token.len() - 1]);
    for (token, reason) in [
        (&*typo, "malformed"),
        ("imported-elsewhere", "unknown"),
        (&*revoked.token, "revoked"),
        (&*disabled.token, "disabled"),
        (&*expired.token, "expired"),
        (&*rotated.token, "rotated"),
        (&*staging.token, "wrong_environment"),
    ] {
        let refused = Ask::monitors().bearer(token).refused(&server).await;
        assert_eq!(
            (refused.status, refused.code, refused.body.as_str()),
            (401, 16, UNAUTHORIZED),
            "{reason}"
        );
        assert_eq!(refused.reason(), reason);
        assert_eq!(refused.headers["www-authenticate"], r#"Bearer realm="keyward", error="invalid_token""#);
        assert_eq!(refused.headers["content-type"], "application/json");
        assert!(!refused.fault && !refused.headers.contains_key("x-keyward-reason"));
    }
    let other = Ask::monitors().saying("account", "other").bearer(&made.token).refused(&server).await;
    assert_eq!((other.status, other.reason()), (401, "wrong_account"));
}

#[tokio::test]
async fn a_request_without_a_credential_is_told_to_bring_one() {
    let (server, made) = with_key().await;
    let none = Ask::monitors().refused(&server).await;
    assert_eq!((none.status, none.reason(), none.body.as_str()), (401, "no_credential", UNAUTHORIZED));
    assert_eq!(none.headers["www-authenticate"], r#"Bearer realm="keyward""#);
    let many = Ask::monitors().bearer(&made.token).header("x-api-key", "another").refused(&server).await;
    assert_eq!((many.status, many.reason()), (401, "many_credentials"));
    let joined = format!("Bearer {0},Bearer {0}", made.token);
    let joined = Ask::monitors().header("authorization", joined).refused(&server).await;
    assert_eq!(joined.reason(), "many_credentials");
    let passed = Ask::monitors().header("x-api-key", &made.token).passes(&server).await;
    assert!(
        passed.removed.contains(&"x-api-key".to_owned()) && !passed.removed.contains(&"authorization".into())
    );
}

#[tokio::test]
async fn a_usable_key_without_the_right_hears_403() {
    let (server, made) = with_key().await;
    let bound = pb::CreateKeyRequest {
        customers: texts(&["c1"]),
        allowed_cidrs: texts(&["10.0.0.0/8"]),
        ..service_key("acme", &["monitors:read"])
    };
    let bound = server.make(bound).await;
    let ask = Ask::monitors().saying("customer_header", "X-Customer").bearer(&bound.token);
    let mut inside = ask.clone().header("x-customer", "c1");
    inside.peer = "10.1.2.3";
    inside.clone().passes(&server).await;
    let mut elsewhere = inside.clone();
    elsewhere.peer = "192.0.2.1";
    for (ask, reason) in [
        (
            Ask::route(&[("scope", "alerts:read"), ("environment", "production")]).bearer(&made.token),
            "missing_scope",
        ),
        (Ask { peer: "10.1.2.3", ..ask }, "wrong_customer"),
        (elsewhere, "address_not_allowed"),
    ] {
        let refused = ask.refused(&server).await;
        assert_eq!((refused.status, refused.code, refused.body.as_str()), (403, 7, FORBIDDEN), "{reason}");
        assert_eq!(refused.reason(), reason);
        let challenge = refused.headers.get("www-authenticate").map(String::as_str);
        let wanted = r#"Bearer realm="keyward", error="insufficient_scope", scope="alerts:read""#;
        assert_eq!(challenge, (reason == "missing_scope").then_some(wanted));
    }
    server.root().suspend("acme").await.unwrap();
    let suspended = Ask::monitors().bearer(&made.token).refused(&server).await;
    assert_eq!((suspended.status, suspended.reason()), (403, "account_suspended"));
}

fn limited(limit: u64) -> pb::CreateKeyRequest {
    let limit = pb::RateLimit { name: "burst".to_owned(), limit, window: Some(seconds(60)) };
    let quota = pb::Quota { limit: 5, period: pb::QuotaPeriod::Day.into() };
    pb::CreateKeyRequest {
        rate_limits: vec![limit],
        quota: Some(quota),
        ..service_key("acme", &["monitors:read"])
    }
}

#[tokio::test]
async fn a_limited_key_is_told_how_it_stands_and_hears_429() {
    let (server, _) = with_key().await;
    let made = server.make(limited(3)).await;
    let ask = |id: &str| Ask::monitors().saying("cost", "2").bearer(&made.token).id(id);
    let passed = ask("1").passes(&server).await;
    assert_eq!(passed.response["ratelimit-policy"], r#""burst";q=3;w=60, "quota";q=5;w=86400"#);
    assert_eq!(passed.response["ratelimit"], r#""burst";r=1;t=40, "quota";r=3;t=86400"#);
    assert_eq!(passed.metadata["cost"], "2");
    let refused = ask("2").refused(&server).await;
    assert_eq!((refused.status, refused.code, refused.reason()), (429, 8, "rate_limited"));
    assert_eq!(refused.headers["retry-after"], "20");
    assert_eq!(refused.headers["ratelimit"], r#""burst";r=1;t=40, "quota";r=3;t=86400"#);
    assert!(refused.body.contains(r#""code":"RATE_LIMITED""#), "{}", refused.body);
    server.advance(60);
    ask("3").passes(&server).await;
    server.advance(60);
    let refused = ask("4").refused(&server).await;
    assert_eq!((refused.status, refused.reason()), (429, "quota_exceeded"));
}

#[tokio::test]
async fn what_envoy_asks_again_is_charged_once() {
    let (server, _) = with_key().await;
    let made = server.make(limited(3)).await;
    for _ in 0..5 {
        let passed = Ask::monitors().bearer(&made.token).id("17290").passes(&server).await;
        assert_eq!(passed.response["ratelimit"], r#""burst";r=2;t=20, "quota";r=4;t=86400"#);
    }
    let other = Ask::monitors().bearer(&made.token).id("17291").passes(&server).await;
    assert_eq!(other.response["ratelimit"], r#""burst";r=1;t=40, "quota";r=3;t=86400"#);
}

#[tokio::test]
async fn grpc_calls_get_the_code_that_their_clients_understand() {
    let (server, _) = with_key().await;
    let made = server.make(limited(1)).await;
    let ask = |id: &str| Ask::monitors().header("content-type", "application/grpc+proto").id(id);
    ask("1").bearer(&made.token).passes(&server).await;
    let limited = ask("2").bearer(&made.token).refused(&server).await;
    assert_eq!((limited.headers["grpc-status"].as_str(), limited.body.as_str()), ("8", "Too many requests"));
    let odd = ask("3").path("/a//b").bearer(&made.token).refused(&server).await;
    assert_eq!(odd.headers["grpc-status"], "3");
    let none = ask("4").refused(&server).await;
    assert_eq!(none.body, "Invalid or missing API key");
    assert!(!none.headers.contains_key("grpc-status"), "Envoy knows the code for 401");
}

#[tokio::test]
async fn what_the_route_says_comes_before_the_rules() {
    let rules = r#"
        [defaults]
        hosts = ["*"]
        methods = ["*"]
        environment = "production"
        [[rule]]
        path = "/v1/accounts/{account}/monitors"
        scope = "monitors:read"
        account = "{account}"
        [[rule]]
        path = "/v1/monitors"
        scope = "rules:read"
        [[rule]]
        path = "/open/**"
        public = true
    "#;
    let (server, _folder) = with_rules(rules).await;
    let acme = server.make(service_key("acme", &["monitors:read"])).await;
    let ruled = server.make(service_key("acme", &["rules:read"])).await;

    Ask::get("/v1/monitors").bearer(&ruled.token).passes(&server).await;
    Ask::get("/v1/monitors").host("API.test:443").bearer(&ruled.token).passes(&server).await;
    let refused = Ask::get("/v1/monitors").bearer(&acme.token).refused(&server).await;
    assert_eq!(refused.reason(), "missing_scope", "the rule decides");
    Ask::route(&[("scope", "monitors:read")]).bearer(&acme.token).passes(&server).await;
    let refused = Ask::route(&[("environment", "staging")]).bearer(&ruled.token).refused(&server).await;
    assert_eq!(
        refused.reason(),
        "wrong_environment",
        "what a rule leaves unsaid the route says, before the default"
    );

    Ask::get("/v1/accounts/acme/monitors").bearer(&acme.token).passes(&server).await;
    let other = Ask::get("/v1/accounts/other/monitors").bearer(&acme.token).refused(&server).await;
    assert_eq!((other.status, other.reason()), (401, "wrong_account"));
    let odd = Ask::get("/v1/accounts/n.o/monitors").bearer(&acme.token).refused(&server).await;
    assert_eq!((odd.status, odd.reason()), (400, "bad_request"));

    Ask::get("/open/a/b").passes(&server).await;
    for ask in
        [Ask::get("/v2").bearer(&acme.token), Ask::get("/v2"), Ask::route(&[("scop", "a:read")]).path("/v2")]
    {
        let refused = ask.refused(&server).await;
        assert_eq!((refused.status, refused.reason(), refused.body.as_str()), (403, "no_rule", FORBIDDEN));
    }
}

#[tokio::test]
async fn a_user_key_works_in_the_account_that_a_header_names() {
    let (server, _) = with_key().await;
    server.root().put_role("acme", "reader", &["monitors:read"]).await.unwrap();
    server.root().put_member("acme", "ann", "reader").await.unwrap();
    let ann = server.make(user_key("ann", &["all"])).await;
    let ask = || Ask::monitors().saying("account_header", "X-Checkly-Account").bearer(&ann.token);
    let passed = ask().header("x-checkly-account", "acme").passes(&server).await;
    assert_eq!(
        (&*passed.upstream["x-keyward-user"], &*passed.upstream["x-keyward-account"]),
        ("ann", "acme")
    );
    assert_eq!(ask().refused(&server).await.reason(), "wrong_account");
    assert_eq!(ask().header("x-checkly-account", "other").refused(&server).await.reason(), "wrong_account");
    for odd in [ask().header("x-checkly-account", "acme,other"), ask().header("x-checkly-account", "é")] {
        assert_eq!(odd.refused(&server).await.reason(), "bad_request");
    }
}

#[tokio::test]
async fn nobody_passes_for_somebody_by_a_header() {
    let (server, made) = with_key().await;
    let ask = |ask: Ask| {
        ask.header("x-keyward-user", "root")
            .header("x-keyward-account", "other")
            .header("x_keyward_account", "other")
            .header("X-Keyward_Scopes", "*")
            .header("x-keyward-whatever", "1")
    };
    let passed = ask(Ask::monitors()).bearer(&made.token).passes(&server).await;
    assert_eq!(passed.upstream["x-keyward-account"], "acme");
    for name in
        ["x-keyward-user", "x_keyward_account", "x-keyward_scopes", "x-keyward-whatever", "x-keyward-shadow"]
    {
        assert!(passed.removed.contains(&name.to_owned()), "{name}: {:?}", passed.removed);
    }
    assert!(!passed.removed.contains(&"x-keyward-account".to_owned()), "what is set is not removed");
    let public = ask(Ask::route(&[("public", "true")])).bearer("anything").passes(&server).await;
    assert!(public.upstream.is_empty() && public.removed.contains(&"x-keyward-account".to_owned()));
    assert!(
        !public.removed.contains(&"authorization".to_owned()),
        "who guards the route otherwise may need it"
    );
}

#[tokio::test]
async fn the_credential_stays_where_the_settings_say_so() {
    let (server, made) = configured(|settings| {
        settings.gateway.forward_credential = true;
        settings.gateway.credential_query = Some("api_key".into());
    })
    .await;
    let passed = Ask::monitors().bearer(&made.token).passes(&server).await;
    assert!(!passed.removed.contains(&"authorization".to_owned()));
    let (server, made) =
        configured(|settings| settings.gateway.credential_query = Some("api_key".into())).await;
    let path = format!("/v1/monitors?z=1&api_key={}", made.token);
    let passed = Ask::monitors().path(&path).passes(&server).await;
    assert_eq!(passed.removed_queries, ["api_key"]);
    let passed = Ask::monitors().path("/v1/monitors?z=1").bearer(&made.token).passes(&server).await;
    assert!(passed.removed_queries.is_empty(), "Envoy would sort the rest of the query");
    let (server, made) = with_key().await;
    let path = format!("/v1/monitors?api_key={}", made.token);
    assert_eq!(Ask::monitors().path(&path).refused(&server).await.reason(), "no_credential");
}

#[tokio::test]
async fn keys_for_managing_are_refused_unless_the_settings_say_otherwise() {
    let (server, _) = with_key().await;
    let mixed = server.make(service_key("acme", &["monitors:read", "keyward:keys:read"])).await;
    for token in [&server.root_token, &mixed.token] {
        let refused = Ask::route(&[("authenticate_only", "true"), ("environment", "production")])
            .bearer(token)
            .refused(&server)
            .await;
        assert_eq!((refused.status, refused.reason()), (403, "management_key"));
    }
    let (server, _) = configured(|settings| settings.gateway.management_keys = true).await;
    let mixed = server.make(service_key("acme", &["monitors:read", "keyward:keys:read"])).await;
    Ask::monitors().bearer(&mixed.token).passes(&server).await;
}

#[tokio::test]
async fn in_shadow_mode_all_pass_and_denials_are_marked() {
    let (server, made) = with_key().await;
    let shadow = || Ask::monitors().saying("mode", "shadow");
    let good = shadow().bearer(&made.token).passes(&server).await;
    assert_eq!(good.upstream["x-keyward-account"], "acme");
    assert!(!good.upstream.contains_key("x-keyward-shadow"));
    assert!(!good.removed.contains(&"authorization".to_owned()), "the service may still judge it itself");
    for (ask, reason) in [
        (shadow(), "no_credential"),
        (shadow().bearer("nonsense"), "unknown"),
        (shadow().saying("cost", "none"), "misconfigured"),
        (Ask::route(&[("mode", "shadow")]), "no_rule"),
    ] {
        let passed = ask.header("x-keyward-account", "other").passes(&server).await;
        assert_eq!(
            passed.upstream.into_iter().collect::<Vec<_>>(),
            [("x-keyward-shadow".into(), reason.into())]
        );
        assert!(passed.removed.contains(&"x-keyward-account".to_owned()));
        let said = ["allowed", "mode", "reason"].map(|name| passed.metadata[name].as_str());
        assert_eq!(said, ["false", "shadow", reason]);
    }
    let (server, _) = configured(|settings| settings.gateway.mode = Mode::Shadow).await;
    Ask::monitors().passes(&server).await;
    for mode in ["enforce", "enforec"] {
        Ask::monitors().saying("mode", mode).refused(&server).await;
    }
}

#[tokio::test]
async fn no_shadow_falls_on_a_request_whose_route_cannot_be_known() {
    let rules = r#"
        [defaults]
        hosts = ["*"]
        methods = ["*"]
        environment = "production"
        mode = "shadow"
        [[rule]]
        path = "/admin/**"
        scope = "admin:all"
        mode = "enforce"
        [[rule]]
        path = "/**"
        authenticate_only = true
    "#;
    let (server, _folder) = with_rules(rules).await;
    Ask::get("/x").passes(&server).await;
    assert_eq!(Ask::get("/admin/users").refused(&server).await.status, 401);
    for odd in [
        Ask::get("/admin/users").host("user@x"),
        Ask::get("/admin/%2575sers"),
        Ask::get("//admin/users"),
        Ask::get("/x/../admin/users").saying("mode", "shadow"),
    ] {
        assert_eq!(odd.refused(&server).await.status, 400);
    }
}

#[tokio::test]
async fn a_name_that_was_not_seen_does_not_reach_the_service() {
    let (server, made) = with_key().await;
    let ask = || Ask::monitors().saying("account_header", "X-Acct").bearer(&made.token);
    let passed = ask().passes(&server).await;
    assert!(passed.removed.contains(&"x-acct".to_owned()), "a proxy may have kept it from us");
    let passed = ask().header("x-acct", "acme").passes(&server).await;
    assert!(!passed.removed.contains(&"x-acct".to_owned()));
    assert!(passed.removed.contains(&"x-original-url".to_owned()), "nor does another path");
}

#[tokio::test]
async fn the_client_is_so_many_hops_away_as_the_settings_say() {
    let bound = pb::CreateKeyRequest {
        allowed_cidrs: texts(&["10.0.0.0/8"]),
        ..service_key("acme", &["monitors:read"])
    };
    let (server, _) = configured(|settings| settings.gateway.trusted_hops = 1).await;
    let made = server.make(bound.clone()).await;
    let ask = |forwarded: &str| Ask::monitors().bearer(&made.token).header("x-forwarded-for", forwarded);
    ask("6.6.6.6, 10.0.0.1").passes(&server).await;
    ask("6.6.6.6,10.0.0.1,192.0.2.1").passes(&server).await;
    assert_eq!(ask("10.0.0.1, 6.6.6.6").refused(&server).await.reason(), "address_not_allowed");
    assert_eq!(ask("").refused(&server).await.reason(), "address_not_allowed");
    let (server, _) = configured(|_| {}).await;
    let made = server.make(bound).await;
    let spoofed = Ask::monitors().bearer(&made.token).header("x-forwarded-for", "10.0.0.1");
    assert_eq!(spoofed.refused(&server).await.reason(), "address_not_allowed", "nobody in front is believed");
}

#[tokio::test]
async fn a_route_that_cannot_be_understood_answers_503_not_a_verdict() {
    let (server, made) = with_key().await;
    for extensions in [
        &[("scope", "monitors:read"), ("environment", "moon")][..],
        &[("scope", "monitors:read")],
        &[("scope", "monitors:*"), ("environment", "production")],
        &[("scope", "monitors:read"), ("public", "true")],
        &[("scope", "monitors:read"), ("environment", "production"), ("mode", "of")],
    ] {
        let refused = Ask::route(extensions).bearer(&made.token).refused(&server).await;
        assert_eq!((refused.status, refused.code, refused.fault), (503, 14, true), "{extensions:?}");
        assert_eq!((refused.reason(), refused.headers["retry-after"].as_str()), ("misconfigured", "1"));
        assert!(refused.body.contains("UNAVAILABLE"), "{}", refused.body);
    }
}

#[tokio::test]
async fn a_path_that_can_be_read_in_two_ways_is_refused_whatever_the_route() {
    let (server, made) = with_key().await;
    for path in [
        "/a//b",
        "/public/../admin",
        "/a/%2e%2E/b",
        "/a%2Fb",
        "/a\\b",
        "/a/..;/b",
        "/a;b",
        "/%252e/",
        "a",
        "/a%00",
    ] {
        for ask in [Ask::monitors(), Ask::route(&[("public", "true")])] {
            let refused = ask.path(path).bearer(&made.token).refused(&server).await;
            assert_eq!((refused.status, refused.code, refused.reason()), (400, 3, "bad_request"), "{path}");
            assert!(refused.body.contains(r#""code":"BAD_REQUEST""#), "{}", refused.body);
        }
    }
    for host in ["", "a b", "user@host", "api.test:x"] {
        assert_eq!(Ask::monitors().host(host).refused(&server).await.status, 400, "{host}");
    }
    let mut raw = Ask::monitors();
    raw.http.path = b"/caf\xe9".as_slice().into();
    assert_eq!(raw.refused(&server).await.status, 400);
}

#[tokio::test]
async fn rules_by_method_are_not_evaded_by_a_header_or_by_case() {
    let rules = r#"
        [defaults]
        hosts = ["*"]
        environment = "production"
        [[rule]]
        methods = ["DELETE"]
        path = "/v1/**"
        scope = "monitors:write"
        [[rule]]
        methods = ["GET", "POST"]
        path = "/v1/**"
        scope = "monitors:read"
    "#;
    let (server, _folder) = with_rules(rules).await;
    let made = server.make(service_key("acme", &["monitors:read"])).await;
    let ask = |method: &str| Ask::get("/v1/monitors").method(method).bearer(&made.token);
    ask("GET").passes(&server).await;
    ask("HEAD").passes(&server).await;
    for method in ["DELETE", "delete"] {
        assert_eq!(ask(method).refused(&server).await.reason(), "missing_scope", "{method}");
    }
    assert_eq!(ask("PATCH").refused(&server).await.reason(), "no_rule");
    for name in ["x-http-method-override", "x_http_method_override", "x.method-override"] {
        let tunnelled = ask("POST").header(name, "DELETE").refused(&server).await;
        assert_eq!(tunnelled.reason(), "bad_request", "{name}");
    }
}

#[tokio::test]
async fn raw_headers_are_read_like_joined_ones() {
    let (server, made) = with_key().await;
    let raw = |values: &[(&str, &[u8])]| {
        let mut ask = Ask::monitors();
        let headers = values.iter().map(|(name, value)| HeaderValue {
            key: (*name).to_owned().into(),
            raw_value: value.to_vec().into(),
            ..HeaderValue::default()
        });
        ask.http.header_map = Some(HeaderMap { headers: headers.collect() });
        ask
    };
    let bearer = format!("Bearer {}", made.token);
    raw(&[("authorization", bearer.as_bytes())]).passes(&server).await;
    let twice = raw(&[("authorization", bearer.as_bytes()), ("authorization", b"Bearer x")]);
    assert_eq!(twice.refused(&server).await.reason(), "many_credentials");
    let odd = raw(&[("authorization", b"Bearer caf\xe9")]).refused(&server).await;
    assert_eq!((odd.status, odd.reason()), (401, "malformed"));
}

#[tokio::test]
async fn heaps_of_headers_are_read_and_too_much_is_refused_before_it_is_read() {
    let (server, made) = with_key().await;
    let mut heap = Ask::monitors().bearer(&made.token);
    for number in 0..100 {
        heap = heap.header(&format!("x-{number}"), vec![b'a'; 600]);
    }
    heap.clone().passes(&server).await;
    let bomb = heap.clone().header("authorization", vec![b'a'; 60 * 1024]).header("x", vec![b'a'; 10 * 1024]);
    refused(bomb.try_of(&server).await, Code::InvalidArgument, "INVALID_REQUEST");
    let long = Ask::monitors().bearer(&"a".repeat(10_000)).refused(&server).await;
    assert_eq!((long.status, long.reason()), (401, "malformed"));
}

#[tokio::test]
async fn a_question_about_nothing_is_no_denial() {
    let (server, _) = with_key().await;
    let without_http =
        AttributeContext { request: Some(Request { http: None }), ..AttributeContext::default() };
    for attributes in [None, Some(AttributeContext::default()), Some(without_http)] {
        let status = refused(
            ask(&server.root(), CheckRequest { attributes }).await,
            Code::InvalidArgument,
            "INVALID_REQUEST",
        );
        assert_eq!(fields(&status), ["attributes.request.http"]);
    }
    let empty = AttributeContext {
        request: Some(Request { http: Some(HttpRequest::default()) }),
        ..AttributeContext::default()
    };
    let answer = ask(&server.root(), CheckRequest { attributes: Some(empty) }).await.unwrap();
    assert_eq!(Refused::from(answer).status, 400);
}

#[tokio::test]
async fn proxies_show_a_key_where_the_settings_ask_for_one() {
    let (server, made) = configured(|settings| settings.gateway.require_caller = true).await;
    server.account("other").await;
    let foreign = server.make(service_key("other", &["monitors:read"])).await;
    let stranger = ask(&server.anonymous(), Ask::monitors().bearer(&made.token).message()).await;
    refused(stranger, Code::Unauthenticated, "UNAUTHENTICATED");
    let proxy = server.caller("acme", &["keyward:check"]).await;
    let reader = server.caller("acme", &["keyward:keys:read"]).await;
    let asked = |token: &str| Ask::monitors().bearer(token).message();
    let answer = ask(&proxy, asked(&made.token)).await.unwrap();
    assert_eq!(Passed::from(answer).upstream["x-keyward-account"], "acme");
    let answer = ask(&proxy, asked(&foreign.token)).await.unwrap();
    assert_eq!(Refused::from(answer).reason(), "unknown", "another account's token");
    refused(ask(&reader, asked(&made.token)).await, Code::PermissionDenied, "PERMISSION_MISSING");
}

#[tokio::test]
async fn a_stranger_at_the_main_listener_hears_no_more_than_a_client() {
    let (server, made) = with_key().await;
    server.root().revoke(&made.id).await.unwrap();
    let asked = || Ask::monitors().bearer(&made.token).message();
    let stranger = Refused::from(ask(&server.anonymous(), asked()).await.unwrap());
    assert_eq!((stranger.status, stranger.body.as_str()), (401, UNAUTHORIZED));
    assert_eq!(stranger.metadata.into_iter().collect::<Vec<_>>(), [("allowed".into(), "false".into())]);
    let proxy = server.caller("acme", &["keyward:check"]).await;
    assert_eq!(Refused::from(ask(&proxy, asked()).await.unwrap()).reason(), "revoked");
    let liar = server.holder("nonsense");
    refused(ask(&liar, asked()).await, Code::Unauthenticated, "UNAUTHENTICATED");
}

#[tokio::test]
async fn the_listener_for_envoy_serves_nothing_else() {
    let (server, made) = configured(|settings| settings.envoy_listen = Some("127.0.0.1:0".into())).await;
    let address = server.running().envoy_address.unwrap();
    let channel = Channel::from_shared(format!("http://{address}")).unwrap().connect_lazy();
    let mut client = AuthorizationClient::new(channel.clone());
    let refused = client.check(Ask::monitors().bearer("nonsense").message()).await.unwrap().into_inner();
    assert_eq!(Refused::from(refused).reason(), "unknown");
    let answer = client.check(Ask::monitors().bearer(&made.token).message()).await.unwrap().into_inner();
    assert_eq!(Passed::from(answer).upstream["x-keyward-key-id"], made.id);

    let mut health = tonic_health::pb::health_client::HealthClient::new(channel.clone());
    let service = "envoy.service.auth.v3.Authorization".to_owned();
    let serving = health.check(tonic_health::pb::HealthCheckRequest { service }).await.unwrap().into_inner();
    assert_eq!(serving.status(), tonic_health::pb::health_check_response::ServingStatus::Serving);

    for method in [
        "keyward.v1.AuthzService/Check",
        "keyward.v1.KeyService/List",
        "grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    ] {
        let mut grpc = tonic::client::Grpc::new(channel.clone());
        grpc.ready().await.unwrap();
        let path = format!("/{method}").parse().unwrap();
        let codec = tonic_prost::ProstCodec::<(), ()>::default();
        let status = grpc.unary(tonic::Request::new(()), path, codec).await.unwrap_err();
        assert_eq!(
            (status.code(), reason(&status)),
            (Code::Unimplemented, "NO_SUCH_RPC".to_owned()),
            "{method}"
        );
    }
}

#[tokio::test]
async fn what_the_proxy_may_limit_by_is_published() {
    let (server, _) =
        configured(|settings| settings.gateway.publish_metadata = texts(&["plan", "absent"])).await;
    let metadata =
        [("plan", "gold"), ("note", "private")].map(|(name, value)| (name.into(), value.into())).into();
    let made =
        server.make(pb::CreateKeyRequest { metadata, ..service_key("acme", &["monitors:read"]) }).await;
    let passed = Ask::monitors().bearer(&made.token).passes(&server).await;
    let names: Vec<_> = passed.metadata.keys().map(String::as_str).collect();
    assert_eq!(
        names,
        [
            "account",
            "allowed",
            "cost",
            "environment",
            "key_id",
            "metadata_plan",
            "mode",
            "reason",
            "secret_version"
        ]
    );
    assert_eq!(passed.metadata["metadata_plan"], "gold");
}

#[tokio::test]
async fn a_denied_client_hears_the_reason_where_the_settings_say_so() {
    let (server, _) = configured(|settings| settings.gateway.reason_header = true).await;
    let refused = Ask::monitors().bearer("nonsense").refused(&server).await;
    assert_eq!(refused.headers["x-keyward-reason"], "unknown");
}

/// The messages that we read by hand are the proto's.
#[test]
fn what_is_read_by_hand_has_the_numbers_and_types_of_the_proto() {
    let set = prost_types::FileDescriptorSet::decode(pb::DESCRIPTORS).unwrap();
    let mut numbers = BTreeMap::new();
    for file in &set.file {
        let mut waiting: Vec<_> =
            file.message_type.iter().map(|message| (file.package().to_owned(), message)).collect();
        while let Some((outer, message)) = waiting.pop() {
            let name = format!("{outer}.{}", message.name());
            waiting.extend(message.nested_type.iter().map(|nested| (name.clone(), nested)));
            for field in &message.field {
                let kind = field.type_name().rsplit('.').next().unwrap().to_owned();
                numbers.insert(format!("{name}.{}", field.name()), (field.number(), kind));
            }
        }
    }
    const AUTH: &str = "envoy.service.auth.v3";
    const CORE: &str = "envoy.config.core.v3";
    for (field, number, kind) in [
        (format!("{AUTH}.CheckRequest.attributes"), 1, "AttributeContext"),
        (format!("{AUTH}.AttributeContext.source"), 1, "Peer"),
        (format!("{AUTH}.AttributeContext.request"), 4, "Request"),
        (format!("{AUTH}.AttributeContext.context_extensions"), 10, "ContextExtensionsEntry"),
        (format!("{AUTH}.AttributeContext.Peer.address"), 1, "Address"),
        (format!("{AUTH}.AttributeContext.Request.http"), 2, "HttpRequest"),
        (format!("{AUTH}.AttributeContext.HttpRequest.id"), 1, ""),
        (format!("{AUTH}.AttributeContext.HttpRequest.method"), 2, ""),
        (format!("{AUTH}.AttributeContext.HttpRequest.headers"), 3, "HeadersEntry"),
        (format!("{AUTH}.AttributeContext.HttpRequest.path"), 4, ""),
        (format!("{AUTH}.AttributeContext.HttpRequest.host"), 5, ""),
        (format!("{AUTH}.AttributeContext.HttpRequest.header_map"), 13, "HeaderMap"),
        (format!("{CORE}.Address.socket_address"), 1, "SocketAddress"),
        (format!("{CORE}.SocketAddress.address"), 2, ""),
        (format!("{CORE}.HeaderMap.headers"), 1, "HeaderValue"),
        (format!("{CORE}.HeaderValue.key"), 1, ""),
        (format!("{CORE}.HeaderValue.value"), 2, ""),
        (format!("{CORE}.HeaderValue.raw_value"), 3, ""),
    ] {
        assert_eq!(numbers[&field], (number, kind.to_owned()), "{field}");
    }
}

// ---- limits that several replicas share ----

async fn limited_key(configure: impl FnOnce(&mut Settings)) -> (Server, Made) {
    let (server, _) = configured(configure).await;
    let rate_limits = vec![pb::RateLimit { name: "requests".into(), limit: 5, window: Some(seconds(60)) }];
    let request = pb::CreateKeyRequest { rate_limits, ..service_key("acme", &["monitors:read"]) };
    let made = server.make(request).await;
    (server, made)
}

#[tokio::test]
async fn limits_that_one_replica_counted_alone_are_told_apart_in_the_metadata() {
    let (server, limited) = limited_key(|settings| settings.limits.shared = true).await;
    let passed = Ask::monitors().bearer(&limited.token).passes(&server).await;
    assert_eq!(passed.metadata["limits_inexact"], "true");
    let free = server.make(service_key("acme", &["monitors:read"])).await;
    let passed = Ask::monitors().bearer(&free.token).passes(&server).await;
    assert_eq!(passed.metadata.get("limits_inexact"), None);
}

#[tokio::test]
async fn limits_that_cannot_be_counted_are_a_fault_and_no_denial() {
    let nowhere = RedisSettings {
        url: RedisUrl::parse("unix:///nowhere/redis").unwrap(),
        prefix: Prefix::parse("test:").unwrap(),
        timeout: Duration::from_secs(1),
        on_failure: OnFailure::Deny,
        time: Time::OfRedis,
    };
    let (server, limited) = limited_key(|settings| settings.limits.redis = Some(nowhere)).await;
    let refused = Ask::monitors().bearer(&limited.token).refused(&server).await;
    assert_eq!((refused.status, refused.fault, refused.reason()), (503, true, "limits_unavailable"));
    let free = server.make(service_key("acme", &["monitors:read"])).await;
    Ask::monitors().bearer(&free.token).passes(&server).await;
}
