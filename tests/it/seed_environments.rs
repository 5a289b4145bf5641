//! The fourth seed, a licensing platform's API Keys page: environments, permissions, rate limits, Regenerate, and
//! a "Revoke" that can be taken back. Each test is a sentence of its page; `docs/seeds.md` has the table.

use keyward::pb::{self, KeyState, Reason};

use crate::support::{
    CreatedKey, DAY, HOUR, assert_invalid, authenticate_request, proto_seconds, scope_check_request,
    service_key_request, to_strings,
};

use super::Server;

const ENVIRONMENTS: [&str; 3] = ["production", "staging", "development"];
/// "License Management, Customer Read, Telemetry Write".
const PERMISSIONS: [&str; 3] = ["customer:read", "license:manage", "telemetry:write"];

/// What the Create API Key dialog sends.
fn generated(name: &str, environment: &str) -> pb::CreateKeyRequest {
    pb::CreateKeyRequest {
        name: Some(name.to_owned()),
        environment: environment.to_owned(),
        rate_limits: vec![per_minute(60)],
        ..service_key_request("acme", &PERMISSIONS)
    }
}

fn per_minute(limit: u64) -> pb::RateLimit {
    pb::RateLimit { name: "requests".to_owned(), limit, window: Some(proto_seconds(60)) }
}

/// What a call to an environment's endpoint hears.
async fn call(server: &Server, made: &CreatedKey, environment: &str) -> Reason {
    let environment = environment.to_owned();
    let asked = pb::CheckRequest { environment, ..scope_check_request(&made.token, "license:manage") };
    server.root_client().check(asked).await.unwrap().reason()
}

/// The main list.
async fn main_list(server: &Server) -> Vec<pb::Key> {
    let request = pb::ListKeysRequest { account: "acme".to_owned(), ..Default::default() };
    server.root_client().list(request).await.unwrap().keys
}

#[tokio::test]
async fn administrators_generate_manage_and_secure_keys() {
    let server = Server::with_accounts().await;
    let scopes = ["all", "keyward:keys:read", "keyward:keys:write", "keyward:check"];
    let admin = server.client_with_scopes("acme", &scopes).await;
    let made = admin.create_key(generated("Main Website Integration", "production")).await;
    assert_eq!(admin.get(&made.id).await.unwrap(), made.key);
    assert_eq!(admin.disable(&made.id).await.unwrap().state(), KeyState::Disabled);
    assert_eq!(admin.enable(&made.id).await.unwrap().state(), KeyState::Active);
    admin.revoke(&made.id).await.unwrap();
    let integration = server.client_with_scopes("acme", &PERMISSIONS).await;
    assert!(integration.create(generated("mine", "production")).await.is_err(), "no administrator");
}

#[tokio::test]
async fn a_key_authenticates_without_a_username_or_password() {
    let server = Server::with_accounts().await;
    let made = server.create_key(generated("site", "production")).await;
    let answer = server.root_client().check(authenticate_request(&made.token)).await.unwrap();
    assert!(answer.allowed);
    assert_eq!(answer.key_id, made.id, "the token alone says who it is");
}

#[tokio::test]
async fn a_key_is_bound_to_exactly_one_environment() {
    let server = Server::with_accounts().await;
    for environment in ENVIRONMENTS {
        assert_eq!(server.create_key(generated(environment, environment)).await.key.environment, environment);
    }
    for none in ["", "prod", "*", "all", "production,staging"] {
        assert_invalid(server.root_client().create(generated("x", none)).await, &["environment"]);
    }
}

#[tokio::test]
async fn production_staging_and_development_keys_work_in_their_environment() {
    let server = Server::with_accounts().await;
    for environment in ENVIRONMENTS {
        let made = server.create_key(generated(environment, environment)).await;
        assert_eq!(call(&server, &made, environment).await, Reason::Ok);
    }
}

#[tokio::test]
async fn cross_environment_access_is_strictly_forbidden() {
    let server = Server::with_accounts().await;
    for environment in ENVIRONMENTS {
        let made = server.create_key(generated(environment, environment)).await;
        for other in ENVIRONMENTS.into_iter().filter(|other| *other != environment) {
            assert_eq!(
                call(&server, &made, other).await,
                Reason::WrongEnvironment,
                "{environment} in {other}"
            );
        }
        let moved = pb::Key { environment: "production".to_owned(), ..made.key };
        assert_invalid(
            server.root_client().update(&moved, &["environment"]).await,
            &["update_mask.paths[0]"],
        );
    }
}

#[tokio::test]
async fn each_key_has_its_own_set_of_permissions() {
    let server = Server::with_accounts().await;
    for scope in PERMISSIONS {
        let made = server.create_key(service_key_request("acme", &[scope])).await;
        for asked in PERMISSIONS {
            let allowed =
                server.root_client().check(scope_check_request(&made.token, asked)).await.unwrap().allowed;
            assert_eq!(allowed, asked == scope, "{scope} asked for {asked}");
        }
    }
}

#[tokio::test]
async fn the_main_list_shows_permissions_environment_rate_limits_and_status() {
    let server = Server::with_accounts().await;
    server.create_key(generated("site", "staging")).await;
    let row = main_list(&server).await.remove(0);
    assert_eq!((row.name.as_str(), row.environment.as_str()), ("site", "staging"));
    assert_eq!(row.scopes, PERMISSIONS);
    assert_eq!(row.rate_limits, [per_minute(60)]);
    assert_eq!(row.state(), KeyState::Active);
}

#[tokio::test]
async fn least_privilege_grants_only_the_exact_access_needed() {
    let server = Server::with_accounts().await;
    let made = server.create_key(service_key_request("acme", &["customer:read"])).await;
    for beyond in ["customer:write", "customer:read:all", "customer", "license:manage", "Customer:read"] {
        assert!(
            !server.root_client().check(scope_check_request(&made.token, beyond)).await.unwrap().allowed,
            "{beyond}"
        );
    }
}

#[tokio::test]
async fn the_status_is_active_inactive_or_expired() {
    let server = Server::with_accounts().await;
    let ttl = Some(proto_seconds(HOUR));
    server.create_key(generated("active", "production")).await;
    let inactive = server.create_key(generated("inactive", "production")).await;
    server.root_client().disable(&inactive.id).await.unwrap();
    server.create_key(pb::CreateKeyRequest { ttl, ..generated("expired", "production") }).await;
    server.advance(HOUR);
    let status = [KeyState::Active, KeyState::Disabled, KeyState::Expired];
    for (name, state) in ["active", "inactive", "expired"].into_iter().zip(status) {
        let states = vec![state.into()];
        let request = pb::ListKeysRequest { account: "acme".to_owned(), states, ..Default::default() };
        let keys = server.root_client().list(request).await.unwrap().keys;
        let shown: Vec<_> = keys.iter().map(|key| (key.name.as_str(), key.state())).collect();
        assert_eq!(shown, [(name, state)]);
    }
}

#[tokio::test]
async fn last_used_says_exactly_when_and_finds_orphaned_keys() {
    let server = Server::with_accounts().await;
    let [used, _] = [
        server.create_key(generated("used", "production")).await,
        server.create_key(generated("orphan", "production")).await,
    ];
    server.advance(10 * DAY);
    assert_eq!(call(&server, &used, "production").await, Reason::Ok);
    let at = server.timestamp_after(0);
    server.advance(HOUR);
    assert_eq!(call(&server, &used, "staging").await, Reason::WrongEnvironment);
    let rows = main_list(&server).await;
    let last_used = |name| rows.iter().find(|key| key.name == name).unwrap().last_used_at;
    assert_eq!(last_used("used"), Some(at), "a denied call is no use");
    assert_eq!(last_used("orphan"), None);
    let unused_since = Some(server.timestamp_after(-7 * 86_400));
    let orphans = pb::ListKeysRequest { account: "acme".to_owned(), unused_since, ..Default::default() };
    let orphans = server.root_client().list(orphans).await.unwrap().keys;
    assert_eq!(orphans.iter().map(|key| key.name.as_str()).collect::<Vec<_>>(), ["orphan"]);
}

#[tokio::test]
async fn revocation_cuts_off_all_access_and_deletes_no_history() {
    let server = Server::with_accounts().await;
    let made = server.create_key(generated("site", "production")).await;
    assert_eq!(call(&server, &made, "production").await, Reason::Ok);
    let used = server.root_client().get(&made.id).await.unwrap().last_used_at;
    server.root_client().revoke(&made.id).await.unwrap();
    assert_eq!(call(&server, &made, "production").await, Reason::Revoked);
    let kept = server.root_client().get(&made.id).await.unwrap();
    assert_eq!((kept.name.as_str(), kept.state(), kept.last_used_at), ("site", KeyState::Revoked, used));
    let usage = pb::KeyUsageRequest { id: made.id.clone(), ..Default::default() };
    assert_eq!(server.root_client().keys().usage(usage).await.unwrap().into_inner().allowed, 1);
    let about = pb::ListAuditEntriesRequest { key_id: made.id, ..Default::default() };
    assert_eq!(server.root_client().list_audit_entries(about).await.unwrap().entries.len(), 2);
}

#[tokio::test]
async fn a_key_is_generated_with_name_environment_permissions_and_rate_limits() {
    let server = Server::with_accounts().await;
    let made = server.create_key(generated("Main Website Integration", "staging")).await;
    let answer = server
        .root_client()
        .check(pb::CheckRequest {
            environment: "staging".to_owned(),
            ..scope_check_request(&made.token, "customer:read")
        })
        .await
        .unwrap();
    assert_eq!((answer.allowed, answer.key_name.as_str()), (true, "Main Website Integration"));
    assert_eq!((answer.rate_limits[0].limit, answer.rate_limits[0].remaining), (60, 59));
}

#[tokio::test]
async fn the_full_key_is_displayed_only_once() {
    let server = Server::with_accounts().await;
    let made = server.create_key(generated("site", "production")).await;
    assert!(!made.token.is_empty());
    let later = format!("{:?} {:?}", main_list(&server).await, server.root_client().get(&made.id).await);
    assert!(!later.contains(&made.token[made.key.hint.len()..]));
}

#[tokio::test]
async fn regenerate_keeps_name_permissions_and_configuration_under_a_new_string() {
    let server = Server::with_accounts().await;
    let made = server.create_key(generated("site", "staging")).await;
    let regenerated = server.root_client().rotate(&made.id, 0).await.unwrap();
    let key = regenerated.key.unwrap();
    assert_ne!(regenerated.token, made.token);
    let expected = pb::Key {
        hint: key.hint.clone(),
        secrets: key.secrets.clone(),
        revision: key.revision,
        updated_at: key.updated_at,
        ..made.key
    };
    assert_eq!(key, expected);
    assert_eq!(
        call(&server, &CreatedKey { token: regenerated.token, ..made_of(key) }, "staging").await,
        Reason::Ok
    );
}

fn made_of(key: pb::Key) -> CreatedKey {
    CreatedKey { id: key.id.clone(), token: String::new(), revision: key.revision, key }
}

#[tokio::test]
async fn the_old_key_stops_working_immediately_after_regenerate() {
    let server = Server::with_accounts().await;
    let made = server.create_key(generated("site", "production")).await;
    assert_eq!(call(&server, &made, "production").await, Reason::Ok);
    server.root_client().rotate(&made.id, 0).await.unwrap();
    assert_eq!(call(&server, &made, "production").await, Reason::Rotated);
}

#[tokio::test]
async fn revoke_temporarily_disables_a_key_without_deleting_it() {
    let server = Server::with_accounts().await;
    let made = server.create_key(generated("site", "production")).await;
    for _ in 0..2 {
        server.root_client().disable(&made.id).await.unwrap();
        assert_eq!(call(&server, &made, "production").await, Reason::Disabled);
        server.root_client().enable(&made.id).await.unwrap();
        assert_eq!(call(&server, &made, "production").await, Reason::Ok, "the same token");
    }
}

#[tokio::test]
async fn an_inactive_or_expired_key_is_unauthorized() {
    let server = Server::with_accounts().await;
    let inactive = server.create_key(generated("inactive", "production")).await;
    server.root_client().disable(&inactive.id).await.unwrap();
    let ttl = Some(proto_seconds(HOUR));
    let expired = server.create_key(pb::CreateKeyRequest { ttl, ..generated("expired", "production") }).await;
    server.advance(HOUR);
    assert_eq!(call(&server, &inactive, "production").await, Reason::Disabled);
    assert_eq!(call(&server, &expired, "production").await, Reason::Expired);
}

#[tokio::test]
async fn a_staging_key_on_the_production_api_is_unauthorized() {
    let server = Server::with_accounts().await;
    let made = server.create_key(generated("staging", "staging")).await;
    let answer =
        server.root_client().check(scope_check_request(&made.token, "license:manage")).await.unwrap();
    assert_eq!(answer.reason(), Reason::WrongEnvironment);
    assert_eq!(answer.failures, [i32::from(Reason::WrongEnvironment)], "and nothing else is wrong");
}

#[tokio::test]
async fn past_the_rate_limit_are_too_many_requests() {
    let server = Server::with_accounts().await;
    let rate_limits = vec![per_minute(2)];
    let made =
        server.create_key(pb::CreateKeyRequest { rate_limits, ..generated("site", "production") }).await;
    for _ in 0..2 {
        assert_eq!(call(&server, &made, "production").await, Reason::Ok);
    }
    let answer =
        server.root_client().check(scope_check_request(&made.token, "license:manage")).await.unwrap();
    assert_eq!((answer.allowed, answer.reason()), (false, Reason::RateLimited));
    assert_eq!(answer.retry_after, Some(proto_seconds(30)), "for Retry-After");
    server.advance(30);
    assert_eq!(call(&server, &made, "production").await, Reason::Ok);
}

#[tokio::test]
async fn the_threshold_is_increased_in_the_keys_settings() {
    let server = Server::with_accounts().await;
    let rate_limits = vec![per_minute(1)];
    let made =
        server.create_key(pb::CreateKeyRequest { rate_limits, ..generated("site", "production") }).await;
    assert_eq!(call(&server, &made, "production").await, Reason::Ok);
    assert_eq!(call(&server, &made, "production").await, Reason::RateLimited);
    let wider = pb::Key { rate_limits: vec![per_minute(100)], ..made.key.clone() };
    server.root_client().update(&wider, &["rate_limits"]).await.unwrap();
    assert_eq!(call(&server, &made, "production").await, Reason::Ok);
    assert_eq!(main_list(&server).await[0].rate_limits, [per_minute(100)]);
}

#[tokio::test]
async fn without_the_endpoints_permission_it_is_permission_denied() {
    let server = Server::with_accounts().await;
    let made = server.create_key(generated("site", "production")).await;
    let answer =
        server.root_client().check(scope_check_request(&made.token, "customer:write")).await.unwrap();
    assert_eq!((answer.allowed, answer.reason()), (false, Reason::MissingScope));
    assert_eq!(answer.missing_scopes, ["customer:write"]);
    assert_eq!(answer.scopes, PERMISSIONS, "the active permissions, to compare");
}

#[tokio::test]
async fn a_key_scoped_to_customers_is_restricted_to_them() {
    let server = Server::with_accounts().await;
    let customers = to_strings(&["cust_1", "cust_2"]);
    let made = server.create_key(pb::CreateKeyRequest { customers, ..generated("site", "production") }).await;
    let about = |customer: Option<&str>| pb::CheckRequest {
        customer: customer.map(str::to_owned),
        ..scope_check_request(&made.token, "license:manage")
    };
    for customer in ["cust_1", "cust_2"] {
        assert!(server.root_client().check(about(Some(customer))).await.unwrap().allowed);
    }
    for customer in [Some("cust_3"), Some("cust_11"), None] {
        let reason = server.root_client().check(about(customer)).await.unwrap().reason();
        assert_eq!(reason, Reason::WrongCustomer, "{customer:?}");
    }
}

#[tokio::test]
async fn the_answer_names_the_key_for_the_request_log() {
    let server = Server::with_accounts().await;
    let made = server.create_key(generated("site", "production")).await;
    let [allowed, denied] =
        ["license:manage", "billing:read"].map(|scope| scope_check_request(&made.token, scope));
    for asked in [allowed, denied] {
        let answer = server.root_client().check(asked).await.unwrap();
        let named = (answer.key_id, answer.key_name, answer.account, answer.environment);
        assert_eq!(named, (made.id.clone(), "site".to_owned(), "acme".to_owned(), "production".to_owned()));
    }
}
