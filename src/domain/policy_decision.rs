//! Decides whether a token may make a request at an instant. [`decide`] is a pure function.
//!
//! The decision is complete: it lists every failed condition in a fixed order, but of a revoked key only `Revoked`.
//!
//! The callers decide which reasons a client may see. A token with an unknown digest never gets here: the engine
//! answers it with `Malformed` or `Unknown`.

use std::{net::IpAddr, sync::Arc};

use super::{
    account::Role,
    key::KeyOwner,
    key_attributes::KeyAttributes,
    name::{AccountId, CustomerId, EnvironmentName},
    scope::{Scope, ScopeSet},
    time::Timestamp,
};

/// The most scopes that one question may need.
pub const MAX_REQUIRED_SCOPES: usize = 64;
/// The most units that one request may cost.
pub const MAX_REQUEST_COST: u64 = 1_000_000;

/// Why a request was decided as it was. The order is the order of decision; the numbers are the wire's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Reason {
    /// The request is allowed.
    Ok = 1,
    /// The string cannot be a token.
    Malformed = 2,
    /// The token does not exist, or the caller may not know that it does.
    Unknown = 3,
    /// The key is revoked.
    Revoked = 4,
    /// The key is disabled.
    Disabled = 5,
    /// The key is past its expiry.
    Expired = 6,
    /// The token was replaced by a rotation.
    Rotated = 7,
    /// The key belongs to another environment.
    WrongEnvironment = 8,
    /// The key does not work in the requested account.
    WrongAccount = 9,
    /// The account is suspended.
    AccountSuspended = 10,
    /// The key is restricted to other customers.
    WrongCustomer = 11,
    /// The key is restricted to other client addresses.
    AddressNotAllowed = 12,
    /// At least one scope is not granted.
    MissingScope = 13,
    /// A rate limit is used up.
    RateLimited = 14,
    /// The quota is used up.
    QuotaExceeded = 15,
}

impl Reason {
    /// All reasons, in the order of a decision.
    pub const ALL: [Reason; 15] = [
        Reason::Ok,
        Reason::Malformed,
        Reason::Unknown,
        Reason::Revoked,
        Reason::Disabled,
        Reason::Expired,
        Reason::Rotated,
        Reason::WrongEnvironment,
        Reason::WrongAccount,
        Reason::AccountSuspended,
        Reason::WrongCustomer,
        Reason::AddressNotAllowed,
        Reason::MissingScope,
        Reason::RateLimited,
        Reason::QuotaExceeded,
    ];

    /// A stable lower-case name, for metrics and logs.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Reason::Ok => "ok",
            Reason::Malformed => "malformed",
            Reason::Unknown => "unknown",
            Reason::Revoked => "revoked",
            Reason::Disabled => "disabled",
            Reason::Expired => "expired",
            Reason::Rotated => "rotated",
            Reason::WrongEnvironment => "wrong_environment",
            Reason::WrongAccount => "wrong_account",
            Reason::AccountSuspended => "account_suspended",
            Reason::WrongCustomer => "wrong_customer",
            Reason::AddressNotAllowed => "address_not_allowed",
            Reason::MissingScope => "missing_scope",
            Reason::RateLimited => "rate_limited",
            Reason::QuotaExceeded => "quota_exceeded",
        }
    }

    /// A sentence that explains the reason.
    #[must_use]
    pub const fn message(self) -> &'static str {
        match self {
            Reason::Ok => "allowed",
            Reason::Malformed => "the string is not a token: check for typos and truncation",
            Reason::Unknown => "no such token",
            Reason::Revoked => "the key is revoked",
            Reason::Disabled => "the key is disabled",
            Reason::Expired => "the key has expired",
            Reason::Rotated => "the token was replaced by a newer one of the same key",
            Reason::WrongEnvironment => "the key belongs to another environment",
            Reason::WrongAccount => "the key does not work in this account",
            Reason::AccountSuspended => "the account is suspended",
            Reason::WrongCustomer => "the key is restricted to other customers",
            Reason::AddressNotAllowed => "the key is restricted to other client addresses",
            Reason::MissingScope => "the key is not granted every scope that is needed",
            Reason::RateLimited => "a rate limit of the key is used up",
            Reason::QuotaExceeded => "the quota of the key is used up",
        }
    }
}

/// A set of reasons, kept as a bit mask.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReasonSet(u16);

impl ReasonSet {
    /// Adds a reason when `failed`.
    pub fn insert_if(&mut self, reason: Reason, failed: bool) {
        self.0 |= u16::from(failed) << reason as u8;
    }

    /// The same without one reason.
    #[must_use]
    pub fn without(self, reason: Reason) -> ReasonSet {
        ReasonSet(self.0 & !(1 << reason as u8))
    }

    /// The reasons, in the order of [`Reason::ALL`].
    pub fn iter(self) -> impl Iterator<Item = Reason> {
        Reason::ALL.into_iter().filter(move |reason| self.0 & (1 << *reason as u8) != 0)
    }

    /// The first reason, or `Ok` where nothing failed.
    #[must_use]
    pub fn primary_reason(self) -> Reason {
        // A reason's bit is its number, and they are numbered from 1.
        let number = self.0.trailing_zeros() as usize;
        number.checked_sub(1).and_then(|at| Reason::ALL.get(at)).copied().unwrap_or(Reason::Ok)
    }
}

/// What the presented token is.
#[derive(Debug)]
pub struct CheckSubject<'a, K> {
    /// The key that the token belongs to.
    pub key: &'a K,
    /// Which version of the key's secret it is.
    pub secret_version: u32,
    /// Whether the account that is decided in is suspended.
    pub account_suspended: bool,
    /// The key's own roles, as they are now. One that no longer exists grants nothing.
    pub roles: &'a [Arc<Role>],
    /// Of a user key: the role that the user has in the account that is decided in, as it is now.
    pub membership: MembershipStatus<'a>,
}

/// What a user is in the account that is decided in.
#[derive(Clone, Copy, Debug)]
pub enum MembershipStatus<'a> {
    /// Not applicable: the key belongs to an account.
    NotApplicable,
    /// No member: the key does not work here.
    NotMember,
    /// A member, with the scopes of the member's role. A role that no longer exists grants nothing.
    MemberRole(Option<&'a Role>),
}

impl<K: KeyAttributes> CheckSubject<'_, K> {
    /// Whether the key is granted `scope` in its account: by its own grants and, for a user key, also by the member's
    /// role.
    #[must_use]
    pub fn is_granted(&self, scope: &Scope) -> bool {
        let own = self.key.scopes().covers(scope) || self.roles.iter().any(|role| role.scopes.covers(scope));
        own && match self.membership {
            MembershipStatus::NotApplicable => true,
            MembershipStatus::NotMember | MembershipStatus::MemberRole(None) => false,
            MembershipStatus::MemberRole(Some(role)) => role.scopes.covers(scope),
        }
    }

    /// Whether the key has its own scopes only, without roles or a membership.
    #[must_use]
    pub fn has_only_direct_grants(&self) -> bool {
        self.roles.is_empty() && matches!(self.membership, MembershipStatus::NotApplicable)
    }

    /// All scopes that the key is granted in its account.
    #[must_use]
    pub fn effective_scopes(&self) -> ScopeSet {
        if self.has_only_direct_grants() {
            return self.key.scopes().clone();
        }
        let roles = self.roles.iter().flat_map(|role| role.scopes.iter());
        let own: ScopeSet = self.key.scopes().iter().chain(roles).cloned().collect();
        match self.membership {
            MembershipStatus::NotApplicable => own,
            MembershipStatus::NotMember | MembershipStatus::MemberRole(None) => ScopeSet::default(),
            // Two grants are disjoint, or one covers the other. The intersection is the narrower of each pair.
            MembershipStatus::MemberRole(Some(role)) => {
                let narrowed = own.iter().filter(|scope| role.scopes.covers(scope));
                narrowed.chain(role.scopes.iter().filter(|scope| own.covers(scope))).cloned().collect()
            }
        }
    }
}

/// What the token is presented for.
#[derive(Clone, Copy, Debug)]
pub enum TokenPurpose<'a> {
    /// A call to a service that asks Keyward.
    Service {
        /// Where the call is made.
        environment: &'a EnvironmentName,
        /// The customer of the request.
        customer: Option<&'a CustomerId>,
    },
    /// A call to Keyward itself: management is neither of an environment nor about a customer.
    Management,
}

/// The request to decide.
#[derive(Clone, Copy, Debug)]
pub struct PolicyRequest<'a> {
    /// What the token is presented for.
    pub purpose: TokenPurpose<'a>,
    /// The account that is acted on. `NotMember` = the key's own.
    pub account: Option<&'a AccountId>,
    /// The address of the end client, if known.
    pub client_ip: Option<IpAddr>,
    /// The scopes that are all needed.
    pub scopes: &'a [Scope],
}

/// The result of [`decide`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PolicyDecision {
    /// Everything that fails. Empty = allowed.
    pub failed_reasons: ReasonSet,
    /// The needed scopes that are not granted.
    pub missing_scopes: Vec<Scope>,
}

/// Decides one request. Every condition is evaluated, even if others fail.
///
/// A revoked key fails with `Revoked` alone, because nothing can lift that and the index drops the rest of its record.
#[must_use]
pub fn decide<K: KeyAttributes>(
    subject: CheckSubject<'_, K>,
    request: PolicyRequest<'_>,
    now: Timestamp,
) -> PolicyDecision {
    let CheckSubject { key, secret_version: version, account_suspended: suspended, .. } = subject;
    let mut failures = ReasonSet::default();
    if key.is_revoked() {
        failures.insert_if(Reason::Revoked, true);
        return PolicyDecision { failed_reasons: failures, missing_scopes: Vec::new() };
    }
    failures.insert_if(Reason::Disabled, key.is_disabled());
    failures.insert_if(Reason::Expired, key.is_expired(now));
    failures.insert_if(Reason::Rotated, key.is_secret_superseded(version, now));
    if let TokenPurpose::Service { environment, customer } = request.purpose {
        failures.insert_if(Reason::WrongEnvironment, *key.environment() != *environment);
        let listed = |customer| key.customers().contains(customer);
        failures
            .insert_if(Reason::WrongCustomer, !key.customers().is_empty() && !customer.is_some_and(listed));
    }
    let wrong_account = match (key.owner(), request.account) {
        (KeyOwner::Account(own), requested) => requested.is_some_and(|requested| requested != own),
        // A user key needs an explicit account of which the user is a member.
        (KeyOwner::User(_), requested) => {
            requested.is_none() || matches!(subject.membership, MembershipStatus::NotMember)
        }
    };
    failures.insert_if(Reason::WrongAccount, wrong_account);
    failures.insert_if(Reason::AccountSuspended, suspended);
    failures.insert_if(Reason::AddressNotAllowed, !is_address_allowed(key, request.client_ip));

    let missing: Vec<Scope> =
        request.scopes.iter().filter(|scope| !subject.is_granted(scope)).cloned().collect();
    failures.insert_if(Reason::MissingScope, !missing.is_empty());
    PolicyDecision { failed_reasons: failures, missing_scopes: missing }
}

/// A restricted key with no known address is refused. An IPv4-mapped IPv6 address counts as IPv4.
fn is_address_allowed(key: &impl KeyAttributes, client_ip: Option<IpAddr>) -> bool {
    let nets = key.allowed_cidrs();
    nets.is_empty()
        || client_ip.map(|ip| ip.to_canonical()).is_some_and(|ip| nets.iter().any(|net| net.contains(&ip)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::{
        key::{
            ApiKey, Revocation, RevokeReason,
            tests::{at_seconds, sample_key},
        },
        name::{RoleName, UserId},
        time::Revision,
        token::TokenDigest,
    };
    use std::time::Duration;

    /// What a row of the table may turn.
    struct Case {
        key: ApiKey,
        version: u32,
        suspended: bool,
        environment: &'static str,
        account: Option<&'static str>,
        customer: Option<&'static str>,
        client_ip: Option<&'static str>,
        scopes: Vec<&'static str>,
        now: Timestamp,
        roles: Vec<Arc<Role>>,
        /// The cases of a user key: no member, or a member whose role exists or not.
        membership: Option<Option<Option<Role>>>,
    }

    fn allowed() -> Case {
        Case {
            key: sample_key(),
            version: 1,
            suspended: false,
            environment: "production",
            account: Some("acme"),
            customer: None,
            client_ip: None,
            scopes: vec!["monitors:read"],
            now: at_seconds(10),
            roles: vec![],
            membership: None,
        }
    }

    fn run(case: &Case) -> PolicyDecision {
        let environment = EnvironmentName::parse(case.environment).unwrap();
        let customer = case.customer.map(|c| CustomerId::parse(c).unwrap());
        let requested = case.account.map(|a| AccountId::parse(a).unwrap());
        let scopes: Vec<_> = case.scopes.iter().map(|s| Scope::parse_required(s).unwrap()).collect();
        decide(
            CheckSubject {
                key: &case.key,
                secret_version: case.version,
                account_suspended: case.suspended,
                roles: &case.roles,
                membership: case.membership.as_ref().map_or(
                    MembershipStatus::NotApplicable,
                    |role| match role {
                        None => MembershipStatus::NotMember,
                        Some(role) => MembershipStatus::MemberRole(role.as_ref()),
                    },
                ),
            },
            PolicyRequest {
                purpose: TokenPurpose::Service { environment: &environment, customer: customer.as_ref() },
                account: requested.as_ref(),
                client_ip: case.client_ip.map(|ip| ip.parse().unwrap()),
                scopes: &scopes,
            },
            case.now,
        )
    }

    fn revoke(key: &mut ApiKey) {
        key.revocation =
            Some(Revocation { at: at_seconds(1), reason: RevokeReason::Unspecified, comment: String::new() });
    }

    /// One row per reason; `Malformed` and `Unknown` are the engine's, the limits are the limiter's.
    #[test]
    fn each_reason_has_its_row() {
        type Turn = fn(&mut Case);
        let table: [(Reason, Turn); 11] = [
            (Reason::Ok, |_| {}),
            (Reason::Revoked, |c| revoke(&mut c.key)),
            (Reason::Disabled, |c| c.key.disabled_at = Some(at_seconds(1))),
            (Reason::Expired, |c| c.key.spec.expires_at = Some(c.now)),
            (Reason::Rotated, |c| {
                c.key.rotate(TokenDigest::from_token("two"), String::new(), Duration::ZERO, c.now);
            }),
            (Reason::WrongEnvironment, |c| c.environment = "staging"),
            (Reason::WrongAccount, |c| c.account = Some("other")),
            (Reason::AccountSuspended, |c| c.suspended = true),
            (Reason::WrongCustomer, |c| c.key.spec.customers = vec![CustomerId::parse("c1").unwrap()]),
            (Reason::AddressNotAllowed, |c| c.key.spec.allowed_cidrs = vec!["10.0.0.0/8".parse().unwrap()]),
            (Reason::MissingScope, |c| c.scopes = vec!["monitors:read", "monitors:write"]),
        ];
        for (reason, turn) in table {
            let mut case = allowed();
            turn(&mut case);
            let verdict = run(&case);
            assert_eq!(verdict.failed_reasons.primary_reason(), reason);
            assert_eq!(
                verdict.failed_reasons.iter().count(),
                usize::from(reason != Reason::Ok),
                "{reason:?} alone"
            );
        }
    }

    #[test]
    fn a_key_expires_at_its_very_instant() {
        let mut case = allowed();
        case.key.spec.expires_at = Some(at_seconds(10));
        case.now = Timestamp::from_micros(10_000_000 - 1);
        assert_eq!(run(&case).failed_reasons.primary_reason(), Reason::Ok);
        case.now = at_seconds(10);
        assert_eq!(run(&case).failed_reasons.primary_reason(), Reason::Expired);
    }

    #[test]
    fn an_overlap_ends_at_its_very_instant() {
        let mut case = allowed();
        case.key.rotate(TokenDigest::from_token("two"), String::new(), Duration::from_secs(5), at_seconds(5));
        case.now = Timestamp::from_micros(10_000_000 - 1);
        assert_eq!(run(&case).failed_reasons.primary_reason(), Reason::Ok);
        case.now = at_seconds(10);
        assert_eq!(run(&case).failed_reasons.primary_reason(), Reason::Rotated);
        case.version = 2;
        assert_eq!(run(&case).failed_reasons.primary_reason(), Reason::Ok);
    }

    #[test]
    fn every_failure_is_said_in_order() {
        let mut case = allowed();
        case.key.disabled_at = Some(at_seconds(1));
        case.suspended = true;
        case.environment = "staging";
        case.scopes = vec!["a", "monitors:read", "b"];
        let verdict = run(&case);
        assert_eq!(
            verdict.failed_reasons.iter().collect::<Vec<_>>(),
            [Reason::Disabled, Reason::WrongEnvironment, Reason::AccountSuspended, Reason::MissingScope]
        );
        assert_eq!(verdict.missing_scopes.iter().map(Scope::as_str).collect::<Vec<_>>(), ["a", "b"]);
    }

    #[test]
    fn a_revoked_key_fails_with_that_reason_alone() {
        let mut case = allowed();
        revoke(&mut case.key);
        case.key.disabled_at = Some(at_seconds(1));
        case.suspended = true;
        case.environment = "staging";
        case.scopes = vec!["a"];
        let verdict = run(&case);
        assert_eq!(verdict.failed_reasons.iter().collect::<Vec<_>>(), [Reason::Revoked]);
        assert_eq!(verdict.missing_scopes, []);
    }

    #[test]
    fn a_restricted_key_needs_to_be_told_customer_and_address() {
        let mut case = allowed();
        case.key.spec.customers = vec![CustomerId::parse("c1").unwrap()];
        case.key.spec.allowed_cidrs = vec!["10.0.0.0/8".parse().unwrap(), "2001:db8::/32".parse().unwrap()];
        (case.customer, case.client_ip) = (Some("c1"), Some("10.1.2.3"));
        assert_eq!(run(&case).failed_reasons.primary_reason(), Reason::Ok);
        for (ip, reason) in [
            (Some("::ffff:10.1.2.3"), Reason::Ok),
            (Some("2001:db8::1"), Reason::Ok),
            (Some("11.0.0.1"), Reason::AddressNotAllowed),
            (None, Reason::AddressNotAllowed),
        ] {
            case.client_ip = ip;
            assert_eq!(run(&case).failed_reasons.primary_reason(), reason, "{ip:?}");
        }
        (case.customer, case.client_ip) = (Some("c2"), Some("10.1.2.3"));
        assert_eq!(run(&case).failed_reasons.primary_reason(), Reason::WrongCustomer);
    }

    #[test]
    fn a_service_key_with_no_account_asked_is_decided_in_its_own() {
        let mut case = allowed();
        case.account = None;
        assert_eq!(run(&case).failed_reasons.primary_reason(), Reason::Ok);
        case.suspended = true;
        assert_eq!(run(&case).failed_reasons.primary_reason(), Reason::AccountSuspended);
    }

    #[test]
    fn management_is_asked_for_neither_environment_nor_customer() {
        let mut key = sample_key();
        key.spec.customers = vec![CustomerId::parse("c1").unwrap()];
        let request =
            PolicyRequest { purpose: TokenPurpose::Management, account: None, client_ip: None, scopes: &[] };
        let membership = MembershipStatus::NotApplicable;
        let subject =
            CheckSubject { key: &key, secret_version: 1, account_suspended: false, roles: &[], membership };
        assert_eq!(decide(subject, request, at_seconds(1)).failed_reasons.primary_reason(), Reason::Ok);
    }

    fn role(name: &str, scopes: &[&str]) -> Role {
        Role {
            account: None,
            name: RoleName::parse(name).unwrap(),
            scopes: scopes.iter().map(|scope| Scope::parse_grant(scope).unwrap()).collect(),
            revision: Revision(1),
        }
    }

    #[test]
    fn a_role_on_a_service_key_grants_what_it_holds_now() {
        let mut case = allowed();
        case.scopes = vec!["alerts:read"];
        assert_eq!(run(&case).failed_reasons.primary_reason(), Reason::MissingScope);
        case.roles = vec![Arc::new(role("read-only", &["alerts:read"]))];
        assert_eq!(run(&case).failed_reasons.primary_reason(), Reason::Ok);
    }

    #[test]
    fn a_user_key_may_what_both_its_grants_and_the_members_role_allow() {
        let mut case = allowed();
        case.key.owner = KeyOwner::User(UserId::parse("ann").unwrap());
        case.key.spec.scopes = [Scope::parse_grant("monitors:*").unwrap()].into_iter().collect();
        for (held, needed, reason) in [
            (&["*"][..], "monitors:read", Reason::Ok),
            (&["*"], "alerts:read", Reason::MissingScope),
            (&["monitors:read"], "monitors:read", Reason::Ok),
            (&["monitors:read"], "monitors:write", Reason::MissingScope),
            (&[], "monitors:read", Reason::MissingScope),
        ] {
            case.membership = Some(Some(Some(role("r", held))));
            case.scopes = vec![needed];
            assert_eq!(run(&case).failed_reasons.primary_reason(), reason, "{held:?} {needed}");
        }
        case.membership = Some(Some(None));
        assert_eq!(
            run(&case).failed_reasons.primary_reason(),
            Reason::MissingScope,
            "a role that is gone grants nothing"
        );
        case.membership = Some(None);
        assert_eq!(run(&case).failed_reasons.primary_reason(), Reason::WrongAccount, "no member");
        case.membership = Some(Some(Some(role("r", &["*"]))));
        case.account = None;
        assert_eq!(
            run(&case).failed_reasons.primary_reason(),
            Reason::WrongAccount,
            "the account must be given"
        );
    }

    #[test]
    fn the_grants_of_a_user_key_are_the_narrower_of_each_pair() {
        let mut key = sample_key();
        key.spec.scopes =
            ["monitors:*", "alerts:read"].map(|s| Scope::parse_grant(s).unwrap()).into_iter().collect();
        let held = role("r", &["monitors:read", "alerts:*", "billing:read"]);
        let membership = MembershipStatus::MemberRole(Some(&held));
        let subject =
            CheckSubject { key: &key, secret_version: 1, account_suspended: false, roles: &[], membership };
        let grants = subject.effective_scopes();
        assert_eq!(grants.iter().map(Scope::as_str).collect::<Vec<_>>(), ["alerts:read", "monitors:read"]);
    }
}
