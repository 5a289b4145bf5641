//! The second seed, tracer: keys with chosen permissions and an optional expiry. Each test is a sentence of its
//! page; `docs/seeds.md` has the table.

use tonic::Code;

use keyward::pb::{self, KeyState, Reason};

use crate::support::{
    DAY, assert_refused, authenticate_request, proto_seconds, scope_check_request, service_key_request,
    to_strings,
};

use super::Server;

/// The page's permission scopes, in its order.
const SCOPES: [&str; 11] = [
    "monitors:read",
    "monitors:write",
    "monitors:run",
    "journeys:read",
    "journeys:write",
    "journeys:run",
    "alerts:read",
    "alerts:write",
    "organization:read",
    "organization:write",
    "billing:read",
];

const PIPELINE: [&str; 4] = ["monitors:read", "monitors:run", "journeys:read", "journeys:run"];
const DASHBOARD: [&str; 3] = ["monitors:read", "journeys:read", "alerts:read"];

/// tracer with its customer Acme Inc.
async fn tracer() -> Server {
    let server = Server::start().await;
    let acme = pb::CreateAccountRequest {
        id: "org_abc123".to_owned(),
        name: "Acme Inc".to_owned(),
        ..Default::default()
    };
    server.root_client().accounts().create(acme).await.unwrap();
    server
}

/// What the Create API Key dialog sends.
fn configured(name: &str, permissions: &[&str]) -> pb::CreateKeyRequest {
    pb::CreateKeyRequest {
        name: Some(name.to_owned()),
        prefix: Some("izli_sk".to_owned()),
        ..service_key_request("org_abc123", permissions)
    }
}

/// Which of the page's scopes a key has.
async fn held(server: &Server, token: &str) -> Vec<&'static str> {
    let mut held = Vec::new();
    for scope in SCOPES {
        if server.root_client().check(scope_check_request(token, scope)).await.unwrap().allowed {
            held.push(scope);
        }
    }
    held
}

#[tokio::test]
async fn all_api_requests_require_a_key() {
    let server = tracer().await;
    assert_eq!(server.root_client().check_reason("").await, Reason::Malformed);
    assert_refused(server.client_without_token().who_am_i().await, Code::Unauthenticated, "UNAUTHENTICATED");
}

#[tokio::test]
async fn a_key_gives_revocable_access_to_its_organizations_resources() {
    let server = tracer().await;
    let made = server.create_key(configured("CI/CD Pipeline Key", &PIPELINE)).await;
    let answer = server.root_client().check(authenticate_request(&made.token)).await.unwrap();
    assert_eq!((answer.allowed, answer.account.as_str()), (true, "org_abc123"));
    server.root_client().revoke(&made.id).await.unwrap();
    assert!(!server.root_client().check(authenticate_request(&made.token)).await.unwrap().allowed);
}

#[tokio::test]
async fn a_key_is_configured_with_name_permissions_and_expiration() {
    let server = tracer().await;
    let permissions = ["monitors:read", "monitors:write", "journeys:run"];
    let ttl = Some(proto_seconds(365 * DAY));
    let request = pb::CreateKeyRequest { ttl, ..configured("CI/CD Pipeline Key", &permissions) };
    let made = server.create_key(request).await;
    assert_eq!(made.key.name, "CI/CD Pipeline Key");
    assert_eq!(held(&server, &made.token).await, permissions);
    assert_eq!(made.key.expires_at, Some(server.timestamp_after(365 * 86_400)));
}

#[tokio::test]
async fn an_expiration_is_optional() {
    let server = tracer().await;
    let made = server.create_key(configured("forever", &DASHBOARD)).await;
    assert_eq!(made.key.expires_at, None);
}

#[tokio::test]
async fn a_key_is_shown_once_and_starts_izli_sk_live() {
    let server = tracer().await;
    let made = server.create_key(configured("ci", &PIPELINE)).await;
    assert!(made.token.starts_with("izli_sk_live_"), "{}", made.token);
    let request = pb::ListKeysRequest { account: "org_abc123".to_owned(), ..Default::default() };
    let later = format!(
        "{:?} {:?}",
        server.root_client().list(request).await,
        server.root_client().get(&made.id).await.unwrap()
    );
    assert!(!later.contains(&made.token) && !later.contains(&made.token[made.key.hint.len()..]));
}

#[tokio::test]
async fn a_lost_key_is_replaced_by_a_new_one() {
    let server = tracer().await;
    let lost = server.create_key(configured("ci", &PIPELINE)).await;
    let new = server.create_key(configured("ci, again", &PIPELINE)).await;
    assert_ne!(lost.token, new.token);
    assert_eq!(server.root_client().check_reason(&new.token).await, Reason::Ok);
}

#[tokio::test]
async fn the_key_goes_in_the_authorization_header() {
    let server = tracer().await;
    let made = server.create_key(configured("ci", &PIPELINE)).await;
    let bearer =
        server.client_without_token().with_header("authorization", &format!("Bearer {}", made.token));
    assert_eq!(bearer.who_am_i().await.unwrap().key.unwrap().id, made.id);
}

#[tokio::test]
async fn each_permission_scope_gives_what_it_says_and_nothing_else() {
    let server = tracer().await;
    for scope in SCOPES {
        let made = server.create_key(configured(scope, &[scope])).await;
        assert_eq!(held(&server, &made.token).await, [scope]);
    }
}

#[tokio::test]
async fn the_ci_pipeline_and_dashboard_examples_have_exactly_their_permissions() {
    let server = tracer().await;
    for (name, permissions) in [("CI/CD Pipeline", &PIPELINE[..]), ("Monitoring Dashboard", &DASHBOARD)] {
        let made = server.create_key(configured(name, permissions)).await;
        assert_eq!(held(&server, &made.token).await, permissions);
    }
}

#[tokio::test]
async fn permissions_all_is_full_access() {
    let server = tracer().await;
    let made = server.create_key(configured("full", &["all"])).await;
    assert_eq!(held(&server, &made.token).await, SCOPES);
    let managing =
        server.root_client().check(scope_check_request(&made.token, "keyward:keys:write")).await.unwrap();
    assert_eq!(managing.reason(), Reason::MissingScope, "to the product, not to Keyward itself");
}

#[tokio::test]
async fn least_privilege_is_only_the_granted_permissions() {
    let server = tracer().await;
    let refused = server.root_client().create(configured("nothing", &[])).await;
    assert_eq!(refused.unwrap_err().code(), Code::InvalidArgument, "no permissions are not all of them");
    let made = server.create_key(configured("reader", &["monitors:read"])).await;
    let both = pb::CheckRequest {
        scopes: to_strings(&["monitors:read", "monitors:write"]),
        ..scope_check_request(&made.token, "monitors:read")
    };
    let answer = server.root_client().check(both).await.unwrap();
    assert_eq!((answer.allowed, answer.missing_scopes), (false, to_strings(&["monitors:write"])));
}

#[tokio::test]
async fn keys_are_rotated_periodically_and_keep_their_configuration() {
    let server = tracer().await;
    let made = server.create_key(configured("ci", &PIPELINE)).await;
    let rotated = server.root_client().rotate(&made.id, 3600).await.unwrap();
    for token in [&made.token, &rotated.token] {
        assert_eq!(held(&server, token).await, PIPELINE, "both, while the rotation overlaps");
    }
    server.advance(3600);
    assert_eq!(server.root_client().check_reason(&made.token).await, Reason::Rotated);
    assert_eq!(held(&server, &rotated.token).await, PIPELINE);
}

#[tokio::test]
async fn separate_keys_have_separate_lives() {
    let server = tracer().await;
    let [ci, dashboard] = [
        server.create_key(configured("ci", &PIPELINE)).await,
        server.create_key(configured("dashboard", &DASHBOARD)).await,
    ];
    server.root_client().revoke(&ci.id).await.unwrap();
    assert_eq!(server.root_client().check_reason(&ci.token).await, Reason::Revoked);
    assert_eq!(held(&server, &dashboard.token).await, DASHBOARD);
}

#[tokio::test]
async fn an_audit_finds_unused_keys_and_who_made_and_revoked_them() {
    let server = tracer().await;
    let made = server.create_key(configured("forgotten", &DASHBOARD)).await;
    server.advance(90 * DAY);
    let request = pb::ListKeysRequest {
        account: "org_abc123".to_owned(),
        unused_since: Some(server.timestamp_after(-60)),
        ..Default::default()
    };
    let unused = server.root_client().list(request).await.unwrap().keys;
    assert_eq!(unused.iter().map(|key| &key.id).collect::<Vec<_>>(), [&made.id]);
    server.root_client().revoke(&made.id).await.unwrap();
    let about = pb::ListAuditEntriesRequest { key_id: made.id, ..Default::default() };
    let entries = server.root_client().list_audit_entries(about).await.unwrap().entries;
    let actions: Vec<_> = entries.iter().map(|entry| entry.action.as_str()).collect();
    assert_eq!(actions, ["key.revoked", "key.created"]);
}

#[tokio::test]
async fn a_key_is_found_and_revoked() {
    let server = tracer().await;
    let made = server.create_key(configured("ci", &PIPELINE)).await;
    let request = pb::ListKeysRequest {
        account: "org_abc123".to_owned(),
        name_prefix: "ci".to_owned(),
        ..Default::default()
    };
    let found = server.root_client().list(request).await.unwrap().keys.remove(0);
    let revoked = server.root_client().revoke(&found.id).await.unwrap().key.unwrap();
    assert_eq!((revoked.id.as_str(), revoked.state()), (made.id.as_str(), KeyState::Revoked));
}

#[tokio::test]
async fn revoked_keys_are_immediately_invalid() {
    let server = tracer().await;
    let made = server.create_key(configured("ci", &PIPELINE)).await;
    assert_eq!(server.root_client().check_reason(&made.token).await, Reason::Ok);
    server.root_client().revoke(&made.id).await.unwrap();
    assert_eq!(server.root_client().check_reason(&made.token).await, Reason::Revoked);
    assert_refused(
        server.client_with_token(&made.token).who_am_i().await,
        Code::Unauthenticated,
        "UNAUTHENTICATED",
    );
}

#[tokio::test]
async fn keys_live_30_days_90_days_1_year_or_for_ever() {
    let server = tracer().await;
    for (name, days) in [("temporary", 30), ("contractor", 90), ("ci", 365)] {
        let ttl = Some(proto_seconds(days * DAY));
        let made = server.create_key(pb::CreateKeyRequest { ttl, ..configured(name, &DASHBOARD) }).await;
        server.advance(days * DAY - 1);
        assert_eq!(
            server.root_client().check_reason(&made.token).await,
            Reason::Ok,
            "{days} days but a second"
        );
        server.advance(1);
        assert_eq!(server.root_client().check_reason(&made.token).await, Reason::Expired, "{days} days");
    }
    let never = server.create_key(configured("integration", &DASHBOARD)).await;
    server.advance(100 * 365 * DAY);
    assert_eq!(server.root_client().check_reason(&never.token).await, Reason::Ok);
}

#[tokio::test]
async fn expired_keys_automatically_stop_working() {
    let server = tracer().await;
    let ttl = Some(proto_seconds(30 * DAY));
    let made = server.create_key(pb::CreateKeyRequest { ttl, ..configured("ci", &PIPELINE) }).await;
    server.advance(30 * DAY);
    assert_eq!(server.root_client().check_reason(&made.token).await, Reason::Expired);
    assert_eq!(server.root_client().get(&made.id).await.unwrap().state(), KeyState::Expired);
}

#[tokio::test]
async fn a_new_key_before_expiration_avoids_disruption() {
    let server = tracer().await;
    let ttl = Some(proto_seconds(30 * DAY));
    let old = server.create_key(pb::CreateKeyRequest { ttl, ..configured("january", &PIPELINE) }).await;
    server.advance(29 * DAY);
    let expiring = pb::ListKeysRequest {
        account: "org_abc123".to_owned(),
        expires_before: Some(server.timestamp_after(7 * 86_400)),
        ..Default::default()
    };
    assert_eq!(server.root_client().list(expiring).await.unwrap().keys[0].id, old.id, "it can be foreseen");
    let new = server.create_key(pb::CreateKeyRequest { ttl, ..configured("february", &PIPELINE) }).await;
    for token in [&old.token, &new.token] {
        assert_eq!(held(&server, token).await, PIPELINE);
    }
    server.advance(DAY);
    assert_eq!(server.root_client().check_reason(&old.token).await, Reason::Expired);
    assert_eq!(held(&server, &new.token).await, PIPELINE);
}

#[tokio::test]
async fn a_missing_header_a_wrong_format_a_dead_key_and_a_typo_are_unauthorized_alike() {
    let server = tracer().await;
    let good = server.create_key(configured("good", &PIPELINE)).await.token;
    let dead = server.create_key(configured("dead", &PIPELINE)).await;
    server.root_client().revoke(&dead.id).await.unwrap();
    let typo = format!("{}{}{}", &good[..20], if &good[20..21] == "x" { "y" } else { "x" }, &good[21..]);
    let bearers = [
        server.client_without_token(),
        server.client_without_token().with_header("authorization", &good),
        server.client_with_token(&dead.token),
        server.client_with_token(&typo),
    ];
    let mut heard = Vec::new();
    for bearer in bearers {
        let status = assert_refused(bearer.who_am_i().await, Code::Unauthenticated, "UNAUTHENTICATED");
        heard.push((status.message().to_owned(), status.details().to_vec()));
    }
    assert!(heard.iter().all(|each| *each == heard[0]), "{heard:?}");
    assert_eq!(
        server.root_client().check_reason(&typo).await,
        Reason::Malformed,
        "an operator learns that it is a typo"
    );
}

#[tokio::test]
async fn a_key_without_the_required_scope_is_forbidden() {
    let server = tracer().await;
    let made = server.create_key(configured("dashboard", &DASHBOARD)).await;
    let answer =
        server.root_client().check(scope_check_request(&made.token, "monitors:write")).await.unwrap();
    assert_eq!((answer.allowed, answer.reason()), (false, Reason::MissingScope));
    assert_eq!(answer.missing_scopes, ["monitors:write"]);
    assert_eq!(answer.failures, [i32::from(Reason::MissingScope)], "the key is known: this is no 401");
}

#[tokio::test]
async fn a_new_key_with_the_needed_permissions_is_not_forbidden() {
    let server = tracer().await;
    let made = server.create_key(configured("dashboard, writing", &["monitors:write"])).await;
    assert!(
        server.root_client().check(scope_check_request(&made.token, "monitors:write")).await.unwrap().allowed
    );
}

#[tokio::test]
async fn me_says_the_organization_and_the_keys_name_permissions_and_expiration() {
    let server = tracer().await;
    // 2026-01-15T00:00:00Z, two weeks from the tests' start.
    let expires_at = Some(server.timestamp_after(14 * 86_400));
    let permissions = ["monitors:read", "monitors:run"];
    let request = pb::CreateKeyRequest { expires_at, ..configured("CI/CD Key", &permissions) };
    let made = server.create_key(request).await;
    let me = server.client_with_token(&made.token).who_am_i().await.unwrap();
    let (organization, key) = (me.account.unwrap(), me.key.unwrap());
    assert_eq!((organization.id.as_str(), organization.name.as_str()), ("org_abc123", "Acme Inc"));
    assert_eq!((key.name.as_str(), key.expires_at), ("CI/CD Key", expires_at));
    assert_eq!(key.scopes, permissions);
}
