//! The first seed, izli: one kind of key per organisation, unique names, and a default scope `agent`. Each test
//! is a sentence of its page; `docs/seeds.md` has the table.

use tonic::Code;

use keyward::{
    domain::{
        account::{Environment, EnvironmentSet},
        name::{EnvironmentName, RoleName, TokenPrefix, TokenTag},
    },
    pb::{self, Reason},
};

use crate::support::{
    Client, CreatedKey, DAY, assert_refused, scope_check_request, service_key_request, to_strings,
};

use super::Server;

/// What the scope `agent` stands for: run journeys, run monitors, view results, upload artifacts.
const AGENT: [&str; 4] = ["journeys:run", "monitors:run", "results:read", "artifacts:write"];

/// izli's deployment: tokens start `izli_agent_`, and keys made without scopes get the role `agent`.
async fn izli() -> Server {
    let untagged = ["production", "staging", "ci"].map(|name| Environment {
        name: EnvironmentName::parse(name).unwrap(),
        tag: TokenTag::parse("").unwrap(),
    });
    let server = Server::start_with(|settings| {
        settings.key_settings.prefix = TokenPrefix::parse("izli_agent").unwrap();
        settings.key_settings.default_role = Some(RoleName::parse("agent").unwrap());
        settings.key_settings.environments = EnvironmentSet::new(untagged.to_vec()).unwrap();
    })
    .await;
    server.root_client().put_role("", "agent", &AGENT).await.unwrap();
    server.create_account("acme").await;
    server.create_account("other").await;
    server
}

/// What izli's settings page sends: a name, and nothing about scopes.
fn only_named(account: &str, name: &str) -> pb::CreateKeyRequest {
    pb::CreateKeyRequest { name: Some(name.to_owned()), ..service_key_request(account, &[]) }
}

/// What the page lists.
async fn shown(server: &Server) -> Vec<pb::Key> {
    let states = vec![pb::KeyState::Active.into(), pb::KeyState::Expired.into()];
    let request = pb::ListKeysRequest { account: "acme".to_owned(), states, ..Default::default() };
    server.root_client().list(request).await.unwrap().keys
}

async fn reason_for(server: &Server, token: &str) -> Reason {
    server.root_client().check(scope_check_request(token, "monitors:run")).await.unwrap().reason()
}

#[tokio::test]
async fn all_api_requests_require_a_key() {
    let server = izli().await;
    assert_eq!(reason_for(&server, "").await, Reason::Malformed, "no credential");
    assert_eq!(reason_for(&server, "something").await, Reason::Unknown, "an invented one");
    let list = pb::ListKeysRequest { account: "acme".to_owned(), ..Default::default() };
    assert_refused(server.client_without_token().list(list).await, Code::Unauthenticated, "UNAUTHENTICATED");
}

#[tokio::test]
async fn a_key_gives_revocable_access_to_its_organizations_resources() {
    let server = izli().await;
    let made = server.create_key(only_named("acme", "ci")).await;
    let inside = |account: &str| pb::CheckRequest {
        account: Some(account.to_owned()),
        ..scope_check_request(&made.token, "monitors:run")
    };
    assert!(server.root_client().check(inside("acme")).await.unwrap().allowed);
    assert_eq!(server.root_client().check(inside("other")).await.unwrap().reason(), Reason::WrongAccount);
    server.root_client().revoke(&made.id).await.unwrap();
    assert_eq!(server.root_client().check(inside("acme")).await.unwrap().reason(), Reason::Revoked);
}

#[tokio::test]
async fn a_name_and_a_click_make_a_key() {
    let server = izli().await;
    let made = server.create_key(only_named("acme", "CI/CD - Production")).await;
    assert_eq!(made.key.name, "CI/CD - Production");
    assert_eq!(reason_for(&server, &made.token).await, Reason::Ok);
}

#[tokio::test]
async fn each_key_name_must_be_unique_within_the_organization() {
    let server = izli().await;
    server.create_key(only_named("acme", "Staging Tests")).await;
    let again = server.root_client().create(only_named("acme", "Staging Tests")).await;
    assert_refused(again, Code::AlreadyExists, "KEY_NAME_TAKEN");
    server.create_key(only_named("other", "Staging Tests")).await;
}

#[tokio::test]
async fn keys_are_shown_only_once_when_created() {
    let server = izli().await;
    let made = server.create_key(only_named("acme", "ci")).await;
    let listed = shown(&server).await;
    let got = server.root_client().get(&made.id).await.unwrap();
    for later in [format!("{listed:?}"), format!("{got:?}")] {
        assert!(later.contains(&made.key.hint));
        assert!(!later.contains(&made.token) && !later.contains(&made.token[made.key.hint.len()..]));
    }
}

#[tokio::test]
async fn a_lost_key_is_revoked_and_a_new_one_created() {
    let server = izli().await;
    let lost = server.create_key(only_named("acme", "ci")).await;
    server.root_client().revoke(&lost.id).await.unwrap();
    let new = server.create_key(only_named("acme", "ci")).await;
    assert_eq!(reason_for(&server, &lost.token).await, Reason::Revoked);
    assert_eq!(reason_for(&server, &new.token).await, Reason::Ok);
}

#[tokio::test]
async fn a_key_is_a_bearer_token_that_starts_izli_agent() {
    let server = izli().await;
    let made = server.create_key(only_named("acme", "ci")).await;
    let secret = made.token.strip_prefix("izli_agent_").unwrap();
    assert!(secret.bytes().all(|byte| byte.is_ascii_alphanumeric()), "nothing to escape in a header");
    assert_eq!(server.client_with_token(&made.token).who_am_i().await.unwrap().key.unwrap().id, made.id);
}

#[tokio::test]
async fn keys_are_created_with_the_agent_scope_by_default() {
    let server = izli().await;
    let made = server.create_key(only_named("acme", "ci")).await;
    assert_eq!(made.key.roles, ["agent"]);
    assert_eq!(made.key.scopes, [""; 0]);
    let explicit = server.create_key(service_key_request("acme", &["results:read"])).await;
    assert_eq!(explicit.key.roles, [""; 0], "the default is for keys that name nothing");
}

#[tokio::test]
async fn the_agent_scope_runs_journeys_and_monitors_views_results_and_uploads_artifacts() {
    let server = izli().await;
    let made = server.create_key(only_named("acme", "ci")).await;
    for scope in AGENT {
        assert!(
            server.root_client().check(scope_check_request(&made.token, scope)).await.unwrap().allowed,
            "{scope}"
        );
    }
    for scope in ["monitors:write", "journeys:write", "results:write", "artifacts:read", "billing:read"] {
        let answer = server.root_client().check(scope_check_request(&made.token, scope)).await.unwrap();
        assert_eq!((answer.reason(), answer.missing_scopes), (Reason::MissingScope, to_strings(&[scope])));
    }
}

#[tokio::test]
async fn different_keys_for_staging_production_and_ci_are_apart() {
    let server = izli().await;
    for environment in ["production", "staging", "ci"] {
        let request = pb::CreateKeyRequest {
            environment: environment.to_owned(),
            ..only_named("acme", &format!("{environment} tests"))
        };
        let made = server.create_key(request).await;
        for place in ["production", "staging", "ci"] {
            let asked = pb::CheckRequest {
                environment: place.to_owned(),
                ..scope_check_request(&made.token, "monitors:run")
            };
            let allowed = server.root_client().check(asked).await.unwrap().allowed;
            assert_eq!(allowed, place == environment, "a {environment} key in {place}");
        }
    }
}

#[tokio::test]
async fn unused_keys_are_found_for_the_periodic_clean_up() {
    let server = izli().await;
    let [used, unused] = [server.create_key(only_named("acme", "used")).await, {
        server.create_key(only_named("acme", "unused")).await
    }];
    server.advance(30 * DAY);
    assert_eq!(reason_for(&server, &used.token).await, Reason::Ok);
    let unused_since = Some(server.timestamp_after(-60));
    let request = pb::ListKeysRequest { account: "acme".to_owned(), unused_since, ..Default::default() };
    let found = server.root_client().list(request).await.unwrap().keys;
    assert_eq!(ids(&found), [unused.id]);
}

#[tokio::test]
async fn rotating_creates_a_new_key_before_the_old_one_is_revoked() {
    let server = izli().await;
    let old = server.create_key(only_named("acme", "ci 2026-01")).await;
    let new = server.create_key(only_named("acme", "ci 2026-02")).await;
    for key in [&old, &new] {
        assert_eq!(reason_for(&server, &key.token).await, Reason::Ok);
    }
    server.root_client().revoke(&old.id).await.unwrap();
    assert_eq!(reason_for(&server, &old.token).await, Reason::Revoked);
    assert_eq!(reason_for(&server, &new.token).await, Reason::Ok);
}

#[tokio::test]
async fn the_trash_icon_revokes_the_key_next_to_it() {
    let server = izli().await;
    let [first, second] = [
        server.create_key(only_named("acme", "one")).await,
        server.create_key(only_named("acme", "two")).await,
    ];
    let row = shown(&server).await.into_iter().find(|key| key.name == "one").unwrap();
    server.root_client().revoke(&row.id).await.unwrap();
    assert_eq!(ids(&shown(&server).await), [second.id]);
    assert_eq!(reason_for(&server, &first.token).await, Reason::Revoked);
    assert_eq!(reason_for(&server, &second.token).await, Reason::Ok);
}

#[tokio::test]
async fn revoked_keys_are_immediately_invalid() {
    let server = izli().await;
    for _ in 0..20 {
        let made = server.create_key(service_key_request("acme", &[])).await;
        assert_eq!(reason_for(&server, &made.token).await, Reason::Ok);
        let revoked = server.root_client().revoke(&made.id).await.unwrap();
        assert!(revoked.propagation.unwrap().complete);
        assert_eq!(reason_for(&server, &made.token).await, Reason::Revoked);
    }
}

/// A key for each cause of a 401 on the page, as the bearer would present it.
async fn causes(server: &Server) -> Vec<(&'static str, Client)> {
    let revoked = server.create_key(only_named("acme", "revoked")).await;
    server.root_client().revoke(&revoked.id).await.unwrap();
    let ttl = Some(prost_types::Duration { seconds: 60, nanos: 0 });
    let expired = server.create_key(pb::CreateKeyRequest { ttl, ..only_named("acme", "expired") }).await;
    server.advance(60);
    let CreatedKey { token: good, .. } = server.create_key(only_named("acme", "good")).await;
    assert!(server.client_with_token(&good).who_am_i().await.is_ok());
    let plain = server.client_without_token().with_header("authorization", &good);
    let basic = server.client_without_token().with_header("authorization", &format!("Basic {good}"));
    let [none, short] = [server.client_without_token(), server.client_with_token(&good[..20])];
    let [revoked, expired] = [revoked, expired].map(|made| server.client_with_token(&made.token));
    vec![
        ("missing header", none),
        ("not 'Bearer <KEY>'", plain),
        ("another scheme", basic),
        ("truncated", short),
        ("revoked", revoked),
        ("expired", expired),
    ]
}

#[tokio::test]
async fn missing_malformed_revoked_and_expired_are_unauthorized_alike() {
    let server = izli().await;
    let mut heard = Vec::new();
    for (cause, bearer) in causes(&server).await {
        let status = assert_refused(bearer.who_am_i().await, Code::Unauthenticated, "UNAUTHENTICATED");
        heard.push((status.message().to_owned(), status.details().to_vec(), cause));
    }
    assert!(heard.iter().all(|(message, details, _)| (message, details) == (&heard[0].0, &heard[0].1)));
}

#[tokio::test]
async fn an_operator_can_still_tell_the_causes_apart() {
    let server = izli().await;
    let [revoked, expired] = [
        server.create_key(only_named("acme", "one")).await,
        server.create_key(only_named("acme", "two")).await,
    ];
    server.root_client().revoke(&revoked.id).await.unwrap();
    let key = pb::Key { expires_at: Some(server.timestamp_after(60)), ..expired.key };
    server.root_client().update(&key, &["expires_at"]).await.unwrap();
    server.advance(60);
    assert_eq!(reason_for(&server, &revoked.token).await, Reason::Revoked);
    assert_eq!(reason_for(&server, &expired.token).await, Reason::Expired);
}

#[tokio::test]
async fn a_duplicate_name_is_an_error_in_izlis_own_words() {
    let server = izli().await;
    server.create_key(only_named("acme", "ci")).await;
    let status = server.root_client().create(only_named("acme", "ci")).await.unwrap_err();
    assert_eq!(status.message(), "An API key with this name already exists");
}

#[tokio::test]
async fn a_duplicate_name_is_solved_by_a_unique_one_or_by_revoking_the_other_first() {
    let server = izli().await;
    let first = server.create_key(only_named("acme", "ci")).await;
    server.create_key(only_named("acme", "ci 2")).await;
    server.root_client().revoke(&first.id).await.unwrap();
    server.create_key(only_named("acme", "ci")).await;
}

#[tokio::test]
async fn the_test_request_verifies_that_a_key_works() {
    let server = izli().await;
    let made = server.create_key(only_named("acme", "ci")).await;
    let answer = server.root_client().check(scope_check_request(&made.token, "results:read")).await.unwrap();
    assert_eq!((answer.allowed, answer.key_name.as_str(), answer.account.as_str()), (true, "ci", "acme"));
}

/// The table is complete for all five seeds, and names no test that is not there.
#[test]
fn the_table_in_docs_names_every_seed_test_and_no_other() {
    let sources = [
        include_str!("seed_izli.rs"),
        include_str!("seed_tracer.rs"),
        include_str!("seed_checkly.rs"),
        include_str!("seed_environments.rs"),
        include_str!("seed_eazip.rs"),
    ];
    let head = "#[tokio::test]\nasync fn ";
    let mut tests: Vec<_> = sources
        .iter()
        .flat_map(|source| source.split(head).skip(1))
        .filter_map(|test| test.split('(').next())
        .collect();
    let rows = include_str!("../../docs/seeds.md").lines().filter_map(|line| line.split(" | `").nth(1));
    let mut named: Vec<_> = rows.filter_map(|row| row.split_once("` | ")).map(|(name, _)| name).collect();
    tests.sort_unstable();
    named.sort_unstable();
    assert_eq!(tests, named);
}

fn ids(keys: &[pb::Key]) -> Vec<String> {
    keys.iter().map(|key| key.id.clone()).collect()
}
