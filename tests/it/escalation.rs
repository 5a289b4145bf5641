//! Nobody grants what they do not hold: in every dimension, and on every way in.

use std::net::IpAddr;

use keyward::pb;
use proptest::{
    prelude::{Just, Strategy, prop},
    prop_oneof,
    sample::subsequence,
    test_runner::{Config, RngAlgorithm, TestCaseError, TestRng, TestRunner},
};
use tonic::{Code, Status};

use crate::support::{
    Client, CreatedKey, HOUR, Server, assert_refused, proto_seconds, scope_check_request,
    service_key_request, to_strings, user_key_request,
};

#[track_caller]
fn assert_beyond_caller<T>(result: Result<T, Status>) {
    assert_refused(result, Code::PermissionDenied, "GRANT_BEYOND_CALLER");
}

/// What a manager bound in every dimension may give at the most.
fn tightest_request(server: &Server) -> pb::CreateKeyRequest {
    pb::CreateKeyRequest {
        expires_at: Some(server.timestamp_after(100)),
        customers: to_strings(&["c1", "c2"]),
        allowed_cidrs: to_strings(&["127.0.0.0/8"]),
        rate_limits: vec![rate(1000, 60)],
        quota: quota(10_000, pb::QuotaPeriod::Day),
        ..service_key_request("acme", &["monitors:*"])
    }
}

fn rate(limit: u64, window: u64) -> pb::RateLimit {
    pb::RateLimit { name: "all".to_owned(), limit, window: Some(proto_seconds(window)) }
}

fn quota(limit: u64, period: pb::QuotaPeriod) -> Option<pb::Quota> {
    Some(pb::Quota { limit, period: period.into() })
}

/// A manager of `acme` that is bound so.
async fn restricted_manager(server: &Server) -> Client {
    let scopes = to_strings(&["monitors:*", "keyward:keys:*", "keyward:accounts:*"]);
    let made = server.create_key(pb::CreateKeyRequest { scopes, ..tightest_request(server) }).await;
    server.client_with_token(&made.token)
}

/// The same request with one dimension too wide, by name.
fn requests_too_wide(server: &Server) -> Vec<(&'static str, pb::CreateKeyRequest)> {
    let tight = tightest_request(server);
    vec![
        ("a wider scope", pb::CreateKeyRequest { scopes: to_strings(&["*"]), ..tight.clone() }),
        ("another scope", pb::CreateKeyRequest { scopes: to_strings(&["alerts:read"]), ..tight.clone() }),
        (
            "one scope too many",
            pb::CreateKeyRequest { scopes: to_strings(&["monitors:read", "a"]), ..tight.clone() },
        ),
        (
            "a scope above the pattern",
            pb::CreateKeyRequest { scopes: to_strings(&["monitors"]), ..tight.clone() },
        ),
        (
            "a reserved scope",
            pb::CreateKeyRequest { scopes: to_strings(&["keyward:check"]), ..tight.clone() },
        ),
        (
            "all that is reserved",
            pb::CreateKeyRequest { scopes: to_strings(&["keyward:*"]), ..tight.clone() },
        ),
        ("another environment", pb::CreateKeyRequest { environment: "staging".into(), ..tight.clone() }),
        (
            "a later expiry",
            pb::CreateKeyRequest { expires_at: Some(server.timestamp_after(101)), ..tight.clone() },
        ),
        ("no expiry", pb::CreateKeyRequest { expires_at: None, ..tight.clone() }),
        ("another customer", pb::CreateKeyRequest { customers: to_strings(&["c1", "c3"]), ..tight.clone() }),
        ("every customer", pb::CreateKeyRequest { customers: vec![], ..tight.clone() }),
        (
            "a wider network",
            pb::CreateKeyRequest { allowed_cidrs: to_strings(&["127.0.0.0/7"]), ..tight.clone() },
        ),
        (
            "another network",
            pb::CreateKeyRequest { allowed_cidrs: to_strings(&["127.0.0.1", "10.0.0.1"]), ..tight.clone() },
        ),
        ("every network", pb::CreateKeyRequest { allowed_cidrs: vec![], ..tight.clone() }),
        ("a larger burst", pb::CreateKeyRequest { rate_limits: vec![rate(1001, 120)], ..tight.clone() }),
        ("a higher rate", pb::CreateKeyRequest { rate_limits: vec![rate(500, 29)], ..tight.clone() }),
        ("no rate limit", pb::CreateKeyRequest { rate_limits: vec![], ..tight.clone() }),
        (
            "more units",
            pb::CreateKeyRequest { quota: quota(10_001, pb::QuotaPeriod::Month), ..tight.clone() },
        ),
        (
            "a shorter period",
            pb::CreateKeyRequest { quota: quota(1, pb::QuotaPeriod::Hour), ..tight.clone() },
        ),
        ("no quota", pb::CreateKeyRequest { quota: None, ..tight }),
    ]
}

/// The same key, made elsewhere.
pub(crate) fn as_import(request: &pb::CreateKeyRequest, digest: u8) -> pb::ImportKey {
    let request = request.clone();
    pb::ImportKey {
        account: request.account,
        environment: request.environment,
        scopes: request.scopes,
        roles: request.roles,
        expires_at: request.expires_at,
        customers: request.customers,
        allowed_cidrs: request.allowed_cidrs,
        rate_limits: request.rate_limits,
        quota: request.quota,
        sha256: vec![digest; 32],
        ..Default::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_manager_gives_what_it_holds_and_less() {
    let server = Server::with_accounts().await;
    let manager = restricted_manager(&server).await;
    let as_wide = manager.create_key(tightest_request(&server)).await;
    let narrower = pb::CreateKeyRequest {
        scopes: to_strings(&["monitors:read", "keyward:keys:read"]),
        expires_at: Some(server.timestamp_after(50)),
        customers: to_strings(&["c2"]),
        allowed_cidrs: to_strings(&["127.0.0.1"]),
        rate_limits: vec![rate(500, 30), pb::RateLimit { name: "loose".to_owned(), ..rate(2000, 60) }],
        quota: quota(10_000, pb::QuotaPeriod::Total),
        ..tightest_request(&server)
    };
    manager.create_key(narrower).await;
    manager.update(&as_wide.key, &["name"]).await.unwrap();
    manager.disable(&as_wide.id).await.unwrap();
    manager.enable(&as_wide.id).await.unwrap();
    manager.rotate(&as_wide.id, 0).await.unwrap();
    let imported = manager.import(vec![as_import(&tightest_request(&server), 1)]).await.unwrap();
    assert_eq!(imported[0].error, "", "{}", imported[0].message);
}

#[tokio::test(flavor = "multi_thread")]
async fn create_gives_nothing_beyond_its_caller() {
    let server = Server::with_accounts().await;
    let manager = restricted_manager(&server).await;
    for (dimension, request) in requests_too_wide(&server) {
        println!("{dimension}");
        assert_beyond_caller(manager.create(request).await);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn import_gives_nothing_beyond_its_caller() {
    let server = Server::with_accounts().await;
    let manager = restricted_manager(&server).await;
    let rows = requests_too_wide(&server);
    let keys = rows.iter().zip(1..).map(|((_, request), digest)| as_import(request, digest));
    let results = manager.import(keys.collect()).await.unwrap();
    assert_eq!(results.len(), rows.len());
    for ((dimension, _), result) in rows.iter().zip(results) {
        assert_eq!((result.error.as_str(), &result.key), ("GRANT_BEYOND_CALLER", &None), "{dimension}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn update_widens_nothing_beyond_its_caller() {
    let server = Server::with_accounts().await;
    let manager = restricted_manager(&server).await;
    let made = manager.create_key(tightest_request(&server)).await;
    for (dimension, wide) in requests_too_wide(&server) {
        if wide.environment != "production" {
            continue;
        }
        println!("{dimension}");
        let key = pb::Key {
            scopes: wide.scopes,
            expires_at: wide.expires_at,
            customers: wide.customers,
            allowed_cidrs: wide.allowed_cidrs,
            rate_limits: wide.rate_limits,
            quota: wide.quota,
            ..made.key.clone()
        };
        let fields = ["scopes", "expires_at", "customers", "allowed_cidrs", "rate_limits", "quota"];
        assert_beyond_caller(manager.update(&key, &fields).await);
    }
    assert_eq!(manager.get(&made.id).await.unwrap(), made.key);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_beyond_the_caller_is_not_updated_enabled_or_rotated_by_it() {
    let server = Server::with_accounts().await;
    let manager = restricted_manager(&server).await;
    for (dimension, request) in requests_too_wide(&server) {
        println!("{dimension}");
        let made = server.create_key(request).await;
        assert_beyond_caller(manager.update(&made.key, &["metadata"]).await);
        let tightened = pb::Key { scopes: to_strings(&["monitors:read"]), ..made.key.clone() };
        if dimension.contains("scope") {
            assert_beyond_caller(manager.update(&tightened, &["scopes"]).await);
        }
        assert_beyond_caller(manager.rotate(&made.id, 0).await);
        assert_beyond_caller(manager.rotate(&made.id, HOUR).await);
        server.root_client().disable(&made.id).await.unwrap();
        assert_beyond_caller(manager.enable(&made.id).await);
        manager.revoke(&made.id).await.expect("stopping a key takes no grant");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_star_never_gives_a_reserved_scope() {
    let server = Server::with_accounts().await;
    let all = server.client_with_scopes("acme", &["*", "keyward:keys:write"]).await;
    all.create_key(service_key_request("acme", &["*", "a:b:*", "keyward:keys:write"])).await;
    for reserved in ["keyward:check", "keyward:*", "keyward", "keyward:keys:*", "keyward:keys:read"] {
        assert_beyond_caller(all.create(service_key_request("acme", &[reserved])).await);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_gives_every_scope_but_reserved_ones_it_lacks() {
    let server = Server::with_accounts().await;
    let operator = server.client_with_scopes("keyward", &["keyward:keys:*"]).await;
    for environment in ["production", "staging"] {
        let request = service_key_request("acme", &["*", "billing:write", "keyward:keys:read"]);
        operator.create_key(pb::CreateKeyRequest { environment: environment.into(), ..request }).await;
    }
    for reserved in ["keyward:check", "keyward:*", "keyward:accounts:write"] {
        assert_beyond_caller(operator.create(service_key_request("acme", &[reserved])).await);
        assert_beyond_caller(operator.create(service_key_request("keyward", &[reserved])).await);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_bound_to_an_expiry_or_addresses_gives_no_unbound_key_and_its_limits_bind_none() {
    let server = Server::with_accounts().await;
    let bound = pb::CreateKeyRequest {
        expires_at: Some(server.timestamp_after(100)),
        allowed_cidrs: to_strings(&["127.0.0.1"]),
        rate_limits: vec![rate(1000, 60)],
        quota: quota(10_000, pb::QuotaPeriod::Day),
        ..service_key_request("keyward", &["keyward:keys:write"])
    };
    let made = server.create_key(bound.clone()).await;
    let operator = server.client_with_token(&made.token);
    assert_beyond_caller(operator.create(service_key_request("acme", &["a"])).await);
    let (rate_limits, quota) = (vec![], None);
    let unlimited = pb::CreateKeyRequest {
        account: "acme".into(),
        scopes: to_strings(&["a"]),
        rate_limits,
        quota,
        ..bound
    };
    let unlimited = operator.create_key(unlimited).await;
    operator.rotate(&unlimited.id, 0).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_role_gives_a_key_nothing_beyond_the_caller() {
    let server = Server::with_accounts().await;
    server.root_client().put_role("acme", "admin", &["*"]).await.unwrap();
    server.root_client().put_role("acme", "reader", &["monitors:read"]).await.unwrap();
    let manager = server.client_with_scopes("acme", &["monitors:*", "keyward:keys:write"]).await;
    let with_role =
        |role: &str| pb::CreateKeyRequest { roles: to_strings(&[role]), ..service_key_request("acme", &[]) };
    let made = manager.create_key(with_role("reader")).await;
    assert_beyond_caller(manager.create(with_role("admin")).await);
    let wider = pb::Key { roles: to_strings(&["admin"]), ..made.key.clone() };
    assert_beyond_caller(manager.update(&wider, &["roles"]).await);
    let results = manager.import(vec![as_import(&with_role("admin"), 1)]).await.unwrap();
    assert_eq!(results[0].error, "GRANT_BEYOND_CALLER");
    let admin = server.create_key(with_role("admin")).await;
    assert_beyond_caller(manager.rotate(&admin.id, 0).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn put_role_gives_nothing_beyond_its_caller() {
    let server = Server::with_accounts().await;
    let manager = server.client_with_scopes("acme", &["monitors:*", "keyward:accounts:write"]).await;
    manager.put_role("acme", "reader", &["monitors:read"]).await.unwrap();
    for wide in ["*", "alerts:read", "keyward:keys:write", "keyward:*", "monitors"] {
        assert_beyond_caller(manager.put_role("acme", "wide", &[wide]).await);
        assert_beyond_caller(manager.put_role("acme", "reader", &["monitors:read", wide]).await);
    }
    assert_refused(
        manager.put_role("", "reader", &["monitors:read"]).await,
        Code::PermissionDenied,
        "OPERATOR_ONLY",
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_role_beyond_the_caller_is_neither_changed_nor_deleted_nor_given_by_it() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    root.put_role("acme", "admin", &["*"]).await.unwrap();
    root.put_role("acme", "reader", &["monitors:read"]).await.unwrap();
    root.put_member("acme", "ann", "admin").await.unwrap();
    let manager = server.client_with_scopes("acme", &["monitors:*", "keyward:accounts:write"]).await;
    assert_beyond_caller(manager.put_role("acme", "admin", &["monitors:read"]).await);
    let delete = pb::DeleteRoleRequest { account: "acme".into(), name: "admin".into() };
    assert_beyond_caller(manager.accounts().delete_role(delete).await);
    assert_beyond_caller(manager.put_member("acme", "bob", "admin").await);
    assert_beyond_caller(manager.put_member("acme", "ann", "reader").await);
    manager.put_member("acme", "bob", "reader").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_keys_own_roles_are_the_global_ones_wherever_it_works() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    root.put_role("", "agent", &["*"]).await.unwrap();
    root.put_role("acme", "agent", &["monitors:read"]).await.unwrap();
    root.put_role("acme", "wide", &["*"]).await.unwrap();
    root.put_member("acme", "ann", "wide").await.unwrap();
    let anns = server
        .create_key(pb::CreateKeyRequest { roles: to_strings(&["agent"]), ..user_key_request("ann", &[]) })
        .await;
    let ask = || pb::CheckRequest {
        account: Some("acme".into()),
        ..scope_check_request(&anns.token, "billing:write")
    };
    assert!(root.check(ask()).await.unwrap().allowed);
}

/// A role or a membership is bound to no customer, address, expiry or limit, and holds in every environment: a bound
/// manager would give rights that none of its keys could have.
#[tokio::test(flavor = "multi_thread")]
async fn a_bound_manager_gives_no_rights_away_through_roles_and_members() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    root.put_role("acme", "reader", &["monitors:read"]).await.unwrap();
    let scopes = || to_strings(&["monitors:*", "keyward:accounts:write"]);
    let unbound = service_key_request("acme", &[]);
    for bound in [
        pb::CreateKeyRequest { customers: to_strings(&["c1"]), ..unbound.clone() },
        pb::CreateKeyRequest { allowed_cidrs: to_strings(&["127.0.0.1"]), ..unbound.clone() },
        pb::CreateKeyRequest { expires_at: Some(server.timestamp_after(100)), ..unbound.clone() },
        pb::CreateKeyRequest { rate_limits: vec![rate(1000, 60)], ..unbound.clone() },
        pb::CreateKeyRequest { quota: quota(10_000, pb::QuotaPeriod::Total), ..unbound.clone() },
        pb::CreateKeyRequest { environment: "staging".into(), ..unbound.clone() },
        pb::CreateKeyRequest { environment: "development".into(), ..unbound.clone() },
    ] {
        let made = server.create_key(pb::CreateKeyRequest { scopes: scopes(), ..bound }).await;
        let manager = server.client_with_token(&made.token);
        assert_beyond_caller(manager.put_role("acme", "reader", &["monitors:read", "monitors:write"]).await);
        assert_beyond_caller(manager.put_role("acme", "new", &["monitors:read"]).await);
        assert_beyond_caller(manager.put_member("acme", "ann", "reader").await);
        let delete = pb::DeleteRoleRequest { account: "acme".into(), name: "reader".into() };
        assert_beyond_caller(manager.accounts().delete_role(delete).await);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_manager_of_another_environment_ends_no_membership_and_an_operator_of_any_gives_them() {
    let server = Server::with_accounts().await;
    let staging = |account| pb::CreateKeyRequest {
        environment: "staging".into(),
        ..service_key_request(account, &["monitors:*", "keyward:accounts:write"])
    };
    let (operator, manager) =
        (server.create_key(staging("keyward")).await, server.create_key(staging("acme")).await);
    server.client_with_token(&operator.token).put_role("acme", "reader", &["monitors:read"]).await.unwrap();
    server.client_with_token(&operator.token).put_member("acme", "ann", "reader").await.unwrap();
    let remove = pb::RemoveMemberRequest { account: "acme".into(), user: "ann".into() };
    assert_beyond_caller(
        server.client_with_token(&manager.token).accounts().remove_member(remove.clone()).await,
    );
    server.client_with_token(&operator.token).accounts().remove_member(remove).await.unwrap();
}

/// A user key holds in each account what its roles mean there, and a new key of the user works in all of them.
#[tokio::test(flavor = "multi_thread")]
async fn a_user_key_gives_no_key_that_can_more_than_itself_in_another_account() {
    let server = Server::with_accounts().await;
    let root = server.root_client();
    root.put_role("", "agent", &["monitors:read"]).await.unwrap();
    root.put_role("acme", "agent", &["*", "keyward:keys:write"]).await.unwrap();
    for account in ["acme", "other"] {
        root.put_role(account, "owner", &["*", "keyward:keys:write"]).await.unwrap();
        root.put_member(account, "ann", "owner").await.unwrap();
    }
    let limited = server
        .create_key(pb::CreateKeyRequest { roles: to_strings(&["agent"]), ..user_key_request("ann", &[]) })
        .await;
    let in_other = |token: &str| pb::CheckRequest {
        account: Some("other".into()),
        ..scope_check_request(token, "billing:write")
    };
    assert!(!root.check(in_other(&limited.token)).await.unwrap().allowed);
    let ann = server.client_with_token(&limited.token).with_header("x-keyward-account", "acme");
    if let Ok(new) = ann.create(user_key_request("ann", &["*"])).await {
        let gained = root.check(in_other(&new.token)).await.unwrap();
        assert!(!gained.allowed, "ann's limited key made one that can billing:write in other");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_account_caller_reaches_no_user_key() {
    let server = Server::with_accounts().await;
    server.root_client().put_role("acme", "agent", &["monitors:read"]).await.unwrap();
    server.root_client().put_member("acme", "ann", "agent").await.unwrap();
    let anns = server.create_key(user_key_request("ann", &["all"])).await;
    let manager = server.client_with_scopes("acme", &["*", "keyward:*"]).await;
    let not_found = |result: Result<(), Status>| assert_refused(result, Code::NotFound, "KEY_NOT_FOUND");
    not_found(manager.create(user_key_request("ann", &["monitors:read"])).await.map(drop));
    not_found(manager.get(&anns.id).await.map(drop));
    not_found(manager.lookup(&anns.token).await.map(drop));
    not_found(manager.update(&anns.key, &["name"]).await.map(drop));
    not_found(manager.rotate(&anns.id, 0).await.map(drop));
    not_found(manager.disable(&anns.id).await.map(drop));
    not_found(manager.enable(&anns.id).await.map(drop));
    not_found(manager.revoke(&anns.id).await.map(drop));
    let of_ann = pb::ListKeysRequest { user: "ann".into(), ..Default::default() };
    not_found(manager.list(of_ann).await.map(drop));
}

// The property: what the server does is what a model says that knows nothing of patterns and prefixes. It lists
// every concrete scope of a small world, every address of a small world, and asks whether any is gained.

#[derive(Clone, Debug)]
struct RandomGrant {
    scopes: Vec<&'static str>,
    environment: &'static str,
    expires_in: Option<i64>,
    customers: Vec<&'static str>,
    cidrs: Vec<&'static str>,
    /// Units and seconds.
    rate: Option<(u64, u64)>,
    /// Units in a period.
    quota: Option<(u64, pb::QuotaPeriod)>,
}

impl RandomGrant {
    fn request(&self, server: &Server, account: &str, extra: &[&str]) -> pb::CreateKeyRequest {
        let scopes: Vec<_> = self.scopes.iter().chain(extra).copied().collect();
        pb::CreateKeyRequest {
            environment: self.environment.into(),
            expires_at: self.expires_in.map(|seconds| server.timestamp_after(seconds)),
            customers: to_strings(&self.customers),
            allowed_cidrs: to_strings(&self.cidrs),
            rate_limits: self.rate.iter().map(|(limit, window)| rate(*limit, *window)).collect(),
            quota: self.quota.and_then(|(limit, period)| quota(limit, period)),
            ..service_key_request(account, &scopes)
        }
    }

    /// The concrete scopes that are granted, among all of one to four of these segments.
    fn concrete(&self, extra: &[&str]) -> Vec<String> {
        const SEGMENTS: [&str; 5] = ["a", "b", "z", "keyward", "check"];
        let mut world = to_strings(&SEGMENTS);
        for start in 0..3 {
            let longer = world.iter().filter(|scope| scope.matches(':').count() == start);
            let longer: Vec<_> =
                longer.flat_map(|scope| SEGMENTS.map(|segment| format!("{scope}:{segment}"))).collect();
            world.extend(longer);
        }
        world.extend(to_strings(&["keyward:keys:write"]));
        let granted = |scope: &String| {
            self.scopes.iter().chain(extra).any(|grant| match *grant {
                "*" => !scope.starts_with("keyward"),
                grant => match grant.strip_suffix(":*") {
                    Some(start) => scope.strip_prefix(start).is_some_and(|rest| rest.starts_with(':')),
                    None => scope == grant,
                },
            })
        };
        world.into_iter().filter(granted).collect()
    }

    /// The addresses that may be used from, an unknown one included.
    fn addresses(&self) -> Vec<Option<IpAddr>> {
        let world = ["127.0.0.1", "127.0.0.2", "127.9.0.1", "10.0.0.1", "8.8.8.8", "2001:db8::1"];
        let world = world.map(|ip| Some(ip.parse::<IpAddr>().unwrap())).into_iter().chain([None]);
        let nets: Vec<ipnet::IpNet> = self.cidrs.iter().map(|net| net.parse().unwrap()).collect();
        let inside = |ip: &Option<IpAddr>| {
            nets.is_empty() || ip.is_some_and(|ip| nets.iter().any(|net| net.contains(&ip)))
        };
        world.filter(inside).collect()
    }

    /// How many units at the most in a span of so many seconds: what the rate limit allows, and what the quota does in
    /// whole periods.
    fn most(&self, span: u64) -> (u64, u64) {
        let by_rate = self.rate.map_or(u64::MAX, |(limit, window)| limit + limit * span / window);
        let by_quota = self.quota.map_or(u64::MAX, |(limit, period)| match period {
            pb::QuotaPeriod::Hour => limit * span.div_ceil(HOUR).max(1),
            pb::QuotaPeriod::Day => limit * span.div_ceil(24 * HOUR).max(1),
            _ => limit,
        });
        (by_rate, by_quota)
    }

    /// The customers that may be served, one that nobody names and none included.
    fn served(&self) -> Vec<Option<&str>> {
        let world = [Some("c1"), Some("c2"), Some("c3"), Some("z"), None];
        let may = |customer: &Option<&str>| {
            self.customers.is_empty() || customer.is_some_and(|customer| self.customers.contains(&customer))
        };
        world.into_iter().filter(may).collect()
    }
}

/// Whether a caller with `own` gains nothing by a key with `given`.
fn gains_nothing(own: &RandomGrant, operator: bool, given: &RandomGrant) -> bool {
    let held = own.concrete(&["keyward:keys:write"]);
    let scopes = given.concrete(&[]);
    let free = |scope: &String| operator && scope.split(':').next() != Some("keyward");
    let life = |expires_in: Option<i64>| expires_in.unwrap_or(i64::MAX);
    scopes.iter().all(|scope| held.contains(scope) || free(scope))
        && (operator || own.environment == given.environment)
        && life(given.expires_in) <= life(own.expires_in)
        && given.served().iter().all(|customer| own.served().contains(customer))
        && given.addresses().iter().all(|address| own.addresses().contains(address))
        && (operator
            || [0, 1, 60, 61, HOUR, 24 * HOUR, 240 * HOUR].into_iter().all(|span| {
                let (own, given) = (own.most(span), given.most(span));
                given.0 <= own.0 && given.1 <= own.1
            }))
}

fn random_grants(reachable: bool) -> impl Strategy<Value = RandomGrant> {
    let scopes = vec!["a", "a:b", "a:b:z:z", "a:*", "a:b:*", "b:*", "*", "keyward:check", "keyward:*"];
    // The caller calls from 127.0.0.1.
    let nets: &[Vec<&'static str>] =
        &[vec![], vec!["127.0.0.0/8"], vec!["127.0.0.1/32", "10.0.0.0/8"], vec!["0.0.0.0/0"]];
    let mut nets = nets.to_vec();
    if !reachable {
        nets.extend([
            vec!["10.0.0.0/8"],
            vec!["127.0.0.0/30"],
            vec!["2001:db8::/32"],
            vec!["::/0", "0.0.0.0/0"],
        ]);
    }
    (
        subsequence(scopes, 1..=3),
        prop_oneof![4 => Just("production"), 1 => Just("staging")],
        prop_oneof![Just(None), Just(Some(3600)), Just(Some(3601)), Just(Some(7200))],
        subsequence(vec!["c1", "c2", "c3"], 0..=3),
        prop::sample::select(nets),
        prop_oneof![3 => Just(None), 2 => rates().prop_map(Some)],
        prop_oneof![3 => Just(None), 2 => quotas().prop_map(Some)],
    )
        .prop_map(|(scopes, environment, expires_in, customers, cidrs, rate, quota)| RandomGrant {
            scopes,
            environment,
            expires_in,
            customers,
            cidrs,
            rate,
            quota,
        })
}

fn rates() -> impl Strategy<Value = (u64, u64)> {
    prop::sample::select(vec![
        (1000, 60),
        (1000, 61),
        (1000, 3600),
        (500, 30),
        (500, 29),
        (2000, 120),
        (2000, 60),
    ])
}

fn quotas() -> impl Strategy<Value = (u64, pb::QuotaPeriod)> {
    use pb::QuotaPeriod::{Day, Hour, Total};
    prop::sample::select(vec![(500, Hour), (600, Hour), (500, Day), (600, Day), (600, Total), (700, Total)])
}

async fn check_grant(
    server: &Server,
    own: &RandomGrant,
    operator: bool,
    given: &RandomGrant,
    digest: u64,
) -> Result<(), String> {
    let account = if operator { "keyward" } else { "acme" };
    let made = server.create_key(own.request(server, account, &["keyward:keys:write"])).await;
    let caller = server.client_with_token(&made.token);
    let expected = if gains_nothing(own, operator, given) { Code::Ok } else { Code::PermissionDenied };
    let code = |result: Result<(), Status>| result.err().map_or(Code::Ok, |status| status.code());
    let request = given.request(server, "acme", &[]);
    let there: CreatedKey = server.create_key(request.clone()).await;
    let unlike = pb::Key { metadata: [("a".to_owned(), "b".to_owned())].into(), ..there.key.clone() };
    let mut sha256 = vec![0; 24];
    sha256.extend(digest.to_be_bytes());
    let import = pb::ImportKey { sha256, ..as_import(&request, 0) };
    let imported = caller.import(vec![import]).await.unwrap().remove(0);
    let imported = if imported.error.is_empty() { Code::Ok } else { Code::PermissionDenied };
    let ways = [
        ("Create", code(caller.create(request).await.map(drop))),
        ("Update", code(caller.update(&unlike, &["metadata"]).await.map(drop))),
        ("Enable", code(caller.enable(&there.id).await.map(drop))),
        ("Rotate", code(caller.rotate(&there.id, 0).await.map(drop))),
        ("Import", imported),
    ];
    match ways.iter().find(|(_, answered)| *answered != expected) {
        None => Ok(()),
        Some((way, answered)) => Err(format!("{way} answered {answered:?}; the model says {expected:?}")),
    }
}

#[test]
fn whatever_the_caller_and_the_key_no_way_in_gives_more_than_the_caller_holds() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let server = runtime.block_on(Server::with_accounts());
    let config = Config { cases: 300, failure_persistence: None, ..Config::default() };
    let mut runner = TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &[7; 32]));
    let digests = std::cell::Cell::new(1);
    let allowed = std::cell::Cell::new(0);
    let cases =
        (random_grants(true), prop::bool::weighted(0.25), random_grants(false), prop::bool::weighted(0.4));
    let run = runner.run(&cases, |(own, operator, mut given, alike)| {
        if alike {
            // Left to chance, hardly any would be allowed.
            given = RandomGrant { scopes: given.scopes, ..own.clone() };
            given.scopes.retain(|scope| own.scopes.contains(scope));
            if given.scopes.is_empty() {
                given.scopes = vec!["keyward:keys:write"];
            }
        }
        allowed.set(allowed.get() + u32::from(gains_nothing(&own, operator, &given)));
        digests.set(digests.get() + 1);
        let judged = runtime.block_on(check_grant(&server, &own, operator, &given, digests.get()));
        judged.map_err(TestCaseError::fail)
    });
    run.unwrap();
    assert!(
        (30..270).contains(&allowed.get()),
        "{} of 300 were allowed: the cases say little",
        allowed.get()
    );
}
