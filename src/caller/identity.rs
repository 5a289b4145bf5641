//! The caller of an RPC: its identity, what it may see, and what it may grant.
//!
//! A caller is a key with scopes under `keyward:`, or a client certificate to which the configuration grants such
//! scopes. Invariant: no caller grants what it does not hold.

use std::{fmt::Display, net::IpAddr, sync::Arc};

use crate::{
    domain::{
        certificate_identity::CertificateIdentity,
        key::{KeyOwner, KeySpec},
        key_attributes::KeyAttributes as _,
        limit,
        log::{Actor, ActorId},
        log_payload::ChangeOrigin,
        name::{AccountId, EnvironmentName, KeyId, UserId},
        scope::{Scope, ScopeSet},
        time::Timestamp,
        token::TokenDigest,
    },
    engine::KeyRef,
    service_error::{ResourceKind, ServiceError},
};

/// A permission to use Keyward itself, granted by a reserved scope.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Permission {
    Check,
    KeysRead,
    KeysWrite,
    AccountsRead,
    AccountsWrite,
    AuditRead,
}

impl Permission {
    /// The reserved scope that grants the permission.
    #[must_use]
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Permission::Check => "keyward:check",
            Permission::KeysRead => "keyward:keys:read",
            Permission::KeysWrite => "keyward:keys:write",
            Permission::AccountsRead => "keyward:accounts:read",
            Permission::AccountsWrite => "keyward:accounts:write",
            Permission::AuditRead => "keyward:audit:read",
        }
    }

    /// Whether these scopes grant the permission.
    #[must_use]
    pub(crate) fn is_granted_by(self, grants: &ScopeSet) -> bool {
        grants.covers_text(self.as_str())
    }
}

/// The credential that a caller has proved.
#[derive(Clone, Debug)]
pub(crate) enum CallerIdentity {
    /// A management key, and the digest of the token by which it is authenticated again.
    Key(KeyRef, TokenDigest),
    /// Possession of an unexpired token with this digest, whatever the state of its key. It suffices to revoke that
    /// key.
    Possession(KeyRef, TokenDigest),
    /// A client certificate. The configuration binds it to an account and to scopes. It has no environment, customers,
    /// networks, limits or expiry, and belongs to no user.
    Certificate(Arc<CertificateIdentity>),
}

/// An authenticated caller of one RPC.
#[derive(Clone, Debug)]
pub(crate) struct Caller {
    pub(crate) identity: CallerIdentity,
    /// The account that the caller acts in.
    pub(crate) account: AccountId,
    /// The scopes that the caller has in the account, roles included.
    pub(crate) granted_scopes: ScopeSet,
    /// The permission that the RPC requires.
    pub(crate) required_permission: Option<Permission>,
    /// The person that an operator's caller acts for (`x-keyward-acting-user`).
    pub(crate) acting_user: Option<UserId>,
    /// The person that the log names, if the change is not made on that person's behalf.
    pub(crate) logged_user: Option<UserId>,
    /// The RPC, such as `keyward.v1.KeyService/Revoke`.
    pub(crate) method: &'static str,
    pub(crate) peer: Option<IpAddr>,
    pub(crate) request_id: Option<String>,
}

impl Caller {
    /// The management key; `None` for a certificate.
    #[must_use]
    pub(crate) fn key(&self) -> Option<&KeyRef> {
        match &self.identity {
            CallerIdentity::Key(key, _) | CallerIdentity::Possession(key, _) => Some(key),
            CallerIdentity::Certificate(_) => None,
        }
    }

    /// The id of the key, or of the certificate's identity.
    #[must_use]
    pub(crate) fn id(&self) -> KeyId {
        match &self.identity {
            CallerIdentity::Key(key, _) | CallerIdentity::Possession(key, _) => key.id(),
            CallerIdentity::Certificate(identity) => identity.idempotency_caller_id(),
        }
    }

    /// The id that scopes the caller's idempotency keys. Each acting user has a separate scope, and so has each account
    /// that a user key names: neither learns of requests made for another.
    #[must_use]
    pub(crate) fn idempotency_scope(&self) -> KeyId {
        let names_account = self.key().is_some_and(|key| key.owner().user().is_some());
        if self.acting_user.is_none() && !names_account {
            return self.id();
        }
        let user = self.acting_user.as_ref().map_or("", UserId::as_str);
        KeyId::from_purpose("keyward-request-scope-1", &[&self.id().to_string(), self.account.as_str(), user])
    }

    /// The environment that the caller's key is bound to.
    #[must_use]
    pub(crate) fn environment(&self) -> Option<&EnvironmentName> {
        self.key().map(|key| key.environment())
    }

    /// Whether the caller belongs to the operator account, and so acts on every account.
    #[must_use]
    pub(crate) fn is_operator(&self) -> bool {
        self.account.is_operator()
    }

    /// Whether the caller holds the permission.
    #[must_use]
    pub(crate) fn has_permission(&self, permission: Permission) -> bool {
        permission.is_granted_by(&self.granted_scopes)
    }

    /// The caller as an actor of the audit log.
    #[must_use]
    pub(crate) fn actor(&self) -> Actor {
        let id = match &self.identity {
            CallerIdentity::Key(key, _) | CallerIdentity::Possession(key, _) => ActorId::Key(key.id()),
            CallerIdentity::Certificate(identity) => ActorId::Certificate(identity.actor_name().into()),
        };
        Actor {
            id,
            account: Some(self.account.clone()),
            acting_user: self.acting_user.clone().or_else(|| self.logged_user.clone()),
            origin: ChangeOrigin {
                request_id: self.request_id.clone(),
                peer: self.peer.map(|peer| peer.to_string()),
                ..ChangeOrigin::UNKNOWN
            },
        }
    }

    /// Whether keys of this owner are visible to the caller. User keys work in every account of their user, so only
    /// operators and the user's own keys see them. While an operator's caller acts for a person, it sees that person's
    /// user keys only.
    #[must_use]
    pub(crate) fn can_see_owner(&self, owner: &KeyOwner) -> bool {
        match (owner, &self.acting_user) {
            (KeyOwner::User(user), Some(acting)) => user == acting,
            (KeyOwner::User(user), None) => {
                self.is_operator() || self.key().is_some_and(|key| key.owner().user() == Some(user))
            }
            (KeyOwner::Account(account), _) => self.is_operator() || *account == self.account,
        }
    }

    /// Resolves the account of a request: the named one or, for an account's caller, its own.
    ///
    /// Fails if an operator names no account, or an account's caller names another one, which does not exist for it.
    pub(crate) fn resolve_account(&self, named: Option<AccountId>) -> Result<AccountId, ServiceError> {
        match named {
            Some(account) if self.is_operator() || account == self.account => Ok(account),
            Some(_) => Err(ServiceError::NotFound(ResourceKind::Account)),
            None if self.is_operator() => {
                Err(ServiceError::invalid_field("account", "is required from the operator account's callers"))
            }
            None => Ok(self.account.clone()),
        }
    }

    /// Checks that the caller acts for no person, as calls over all accounts require.
    pub(crate) fn require_no_acting_user(&self) -> Result<(), ServiceError> {
        if self.acting_user.is_none() {
            return Ok(());
        }
        let message =
            "a call with x-keyward-acting-user must name one account; name it, or leave the header out";
        Err(ServiceError::Forbidden("ROLE_LACKS_PERMISSION", message.to_owned()))
    }

    /// Checks that the caller belongs to the operator account.
    pub(crate) fn require_operator(&self) -> Result<(), ServiceError> {
        if self.is_operator() {
            Ok(())
        } else {
            let message = "only the operator account's callers may do this";
            Err(ServiceError::Forbidden("OPERATOR_ONLY", message.to_owned()))
        }
    }

    /// Checks that the caller could grant these scopes.
    ///
    /// Fails if a scope exceeds what the caller holds; the message names it.
    pub(crate) fn check_grant(&self, granted: &ScopeSet) -> Result<(), ServiceError> {
        let held =
            |scope: &Scope| (self.is_operator() && !scope.is_reserved()) || self.granted_scopes.covers(scope);
        match granted.iter().find(|scope| !held(scope)) {
            Some(scope) => beyond_caller_error("a scope goes", scope),
            None => Ok(()),
        }
    }

    /// Checks that the caller may grant rights that have no restrictions, as roles and memberships have none. Its key
    /// must not be restricted to customers or networks. An account's caller also needs a key of the `first` environment
    /// without expiry and limits.
    ///
    /// Fails if the key is restricted; the message names the restriction.
    pub(crate) fn require_unrestricted_key(&self, first: &EnvironmentName) -> Result<(), ServiceError> {
        const RIGHT: &str = "a role or membership goes";
        let Some(own) = self.key() else { return Ok(()) };
        if !own.customers().is_empty() {
            beyond_caller_error(RIGHT, &"it is bound to no customers")
        } else if !own.allowed_cidrs().is_empty() {
            beyond_caller_error(RIGHT, &"it is bound to no networks")
        } else if self.is_operator() {
            Ok(())
        } else if own.expires_at().is_some() {
            beyond_caller_error(RIGHT, &"it never expires")
        } else if own.is_limited() {
            beyond_caller_error(RIGHT, &"it has no rate limits and no quota")
        } else {
            self.require_first_environment(first)
        }
    }

    /// Checks that the caller may change roles and memberships, which hold in every environment. An account's caller
    /// needs a key of the first configured environment.
    pub(crate) fn require_first_environment(&self, first: &EnvironmentName) -> Result<(), ServiceError> {
        match self.environment() {
            Some(own) if own != first && !self.is_operator() => {
                let which = format_args!("it holds in every environment; use a key of {:?}", first.as_str());
                beyond_caller_error("a role or membership goes", &which)
            }
            _ => Ok(()),
        }
    }

    /// Checks that the caller could grant a key this specification, whose scopes and roles together grant `granted`. A
    /// caller grants nothing that exceeds its own key in any dimension. Operators may grant every scope outside
    /// `keyward:`, in every environment, whatever limits their own key has.
    ///
    /// Fails if the specification exceeds the caller; the message names the field.
    pub(crate) fn check_key_grant(
        &self,
        environment: &EnvironmentName,
        spec: &KeySpec,
        granted: &ScopeSet,
    ) -> Result<(), ServiceError> {
        self.check_grant(granted)?;
        if !self.is_operator() && self.environment().is_some_and(|own| environment != own) {
            return beyond_caller_error("the environment goes", environment);
        }
        let Some(own) = self.key() else { return Ok(()) };
        if is_later(spec.expires_at, own.expires_at()) {
            return beyond_caller_error("the expiry goes", &"it must end no later");
        }
        let customers = &spec.customers;
        if !own.customers().is_empty()
            && (customers.is_empty() || !customers.iter().all(|customer| own.customers().contains(customer)))
        {
            return beyond_caller_error("the customers go", &"they must be among them");
        }
        let nets = &spec.allowed_cidrs;
        let within = |net: &ipnet::IpNet| own.allowed_cidrs().iter().any(|wide| wide.contains(net));
        if !own.allowed_cidrs().is_empty() && (nets.is_empty() || !nets.iter().all(within)) {
            return beyond_caller_error("the allowed networks go", &"they must lie within them");
        }
        if self.is_operator() { Ok(()) } else { check_limits_within(own, spec) }
    }
}

/// Checks that the specification limits at least as tightly as the caller's own key.
fn check_limits_within(own: &KeyRef, spec: &KeySpec) -> Result<(), ServiceError> {
    let is_within = |bound| spec.rate_limits.iter().any(|limit| limit::is_rate_within(limit, bound));
    if let Some(bound) = own.rate_limits().iter().find(|bound| !is_within(bound)) {
        let seconds = bound.window.as_secs_f64();
        let needed = format!("one must allow at most {} units at once and in {seconds} s", bound.limit);
        return beyond_caller_error("the rate limits go", &needed);
    }
    match own.quota() {
        Some(bound) if !spec.quota.as_ref().is_some_and(|quota| limit::is_quota_within(quota, bound)) => {
            let needed = format!("it must be at most {} units, in no shorter a period", bound.limit);
            beyond_caller_error("the quota goes", &needed)
        }
        _ => Ok(()),
    }
}

fn beyond_caller_error(what: &str, which: &dyn Display) -> Result<(), ServiceError> {
    let message = format!("{what} beyond the caller's own: {which}");
    Err(ServiceError::Forbidden("GRANT_BEYOND_CALLER", message))
}

/// Whether `end` is later than `limit`. No end is later than any limit.
fn is_later(end: Option<Timestamp>, limit: Option<Timestamp>) -> bool {
    match (end, limit) {
        (_, None) => false,
        (None, Some(_)) => true,
        (Some(end), Some(limit)) => end > limit,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::{
        certificate_identity::CertificateName,
        key::tests::{at_seconds, sample_key},
        name::CustomerId,
        scope::ScopeSet,
    };

    fn scopes(texts: &[&str]) -> ScopeSet {
        texts.iter().map(|text| Scope::parse_grant(text).unwrap()).collect()
    }

    fn caller(account: &str, granted: &[&str], bind: fn(&mut KeySpec)) -> Caller {
        let mut key = sample_key();
        key.spec.scopes = scopes(granted);
        bind(&mut key.spec);
        Caller {
            granted_scopes: key.spec.scopes.clone(),
            identity: CallerIdentity::Key(KeyRef::from(&key), key.secrets[0].digest),
            account: AccountId::parse(account).unwrap(),
            required_permission: None,
            acting_user: None,
            logged_user: None,
            method: "test",
            peer: None,
            request_id: None,
        }
    }

    fn can_grant(caller: &Caller, environment: &str, shape: fn(&mut KeySpec)) -> bool {
        let mut spec = sample_key().spec;
        spec.scopes = scopes(&["monitors:read"]);
        shape(&mut spec);
        caller.check_key_grant(&EnvironmentName::parse(environment).unwrap(), &spec, &spec.scopes).is_ok()
    }

    #[test]
    fn an_account_caller_gives_only_scopes_that_it_holds() {
        let acme = caller("acme", &["keyward:keys:write", "monitors:*"], |_| {});
        assert!(can_grant(&acme, "production", |_| {}));
        assert!(can_grant(&acme, "production", |t| t.scopes = scopes(&["keyward:keys:write"])));
        for beyond in ["*", "alerts:read", "keyward:*", "keyward:keys:read"] {
            let mut spec = sample_key().spec;
            spec.scopes = scopes(&[beyond]);
            assert!(
                acme.check_key_grant(&sample_key().environment, &spec, &spec.scopes).is_err(),
                "{beyond}"
            );
        }
    }

    #[test]
    fn an_operator_gives_every_scope_but_reserved_ones_it_lacks() {
        let operator = caller("keyward", &["keyward:keys:write"], |_| {});
        assert!(can_grant(&operator, "staging", |t| t.scopes = scopes(&["*"])));
        assert!(!can_grant(&operator, "staging", |t| t.scopes = scopes(&["keyward:check"])));
        assert!(!can_grant(&operator, "staging", |t| t.scopes = scopes(&["keyward:*"])));
    }

    #[test]
    fn an_all_scope_never_includes_the_reserved_ones() {
        let acme = caller("acme", &["*"], |_| {});
        assert!(can_grant(&acme, "production", |t| t.scopes = scopes(&["*"])));
        assert!(!can_grant(&acme, "production", |t| t.scopes = scopes(&["keyward:check"])));
    }

    #[test]
    fn a_bound_caller_makes_only_keys_bound_at_least_as_tightly() {
        let bound = caller("acme", &["*"], |t| {
            t.expires_at = Some(at_seconds(100));
            t.customers = vec![CustomerId::parse("c1").unwrap(), CustomerId::parse("c2").unwrap()];
            t.allowed_cidrs = vec!["10.0.0.0/8".parse().unwrap()];
        });
        let tight: fn(&mut KeySpec) = |t| {
            t.expires_at = Some(at_seconds(100));
            t.customers = vec![CustomerId::parse("c2").unwrap()];
            t.allowed_cidrs = vec!["10.1.0.0/16".parse().unwrap()];
        };
        assert!(can_grant(&bound, "production", tight));
        let looser: [fn(&mut KeySpec); 6] = [
            |t| t.expires_at = None,
            |t| t.expires_at = Some(at_seconds(101)),
            |t| t.customers.clear(),
            |t| t.customers.push(CustomerId::parse("c3").unwrap()),
            |t| t.allowed_cidrs.clear(),
            |t| t.allowed_cidrs = vec!["0.0.0.0/0".parse().unwrap()],
        ];
        for loosen in looser {
            let mut spec = sample_key().spec;
            spec.scopes = scopes(&["monitors:read"]);
            tight(&mut spec);
            loosen(&mut spec);
            assert!(
                bound.check_key_grant(&sample_key().environment, &spec, &spec.scopes).is_err(),
                "{spec:?}"
            );
        }
        assert!(!can_grant(&bound, "staging", tight), "another environment");
    }

    #[test]
    fn a_certificate_gives_what_its_scopes_hold_and_sees_its_account_alone() {
        let by_certificate = |account: &str, granted: &[&str]| {
            let id = AccountId::parse(account).unwrap();
            let identity = CertificateIdentity::new(
                CertificateName::parse_dns("ci.internal").unwrap(),
                id,
                scopes(granted),
            );
            let caller = caller(account, granted, |_| {});
            Caller { identity: CallerIdentity::Certificate(Arc::new(identity)), ..caller }
        };
        let acme = by_certificate("acme", &["keyward:keys:write", "monitors:*"]);
        assert!(acme.has_permission(Permission::KeysWrite) && !acme.has_permission(Permission::KeysRead));
        assert!(can_grant(&acme, "production", |_| {}) && can_grant(&acme, "staging", |_| {}));
        assert!(can_grant(&acme, "production", |t| t.scopes = scopes(&["keyward:keys:write"])));
        for beyond in ["*", "alerts:read", "keyward:*", "keyward:keys:read"] {
            let mut spec = sample_key().spec;
            spec.scopes = scopes(&[beyond]);
            assert!(
                acme.check_key_grant(&sample_key().environment, &spec, &spec.scopes).is_err(),
                "{beyond}"
            );
        }
        assert!(!acme.can_see_owner(&KeyOwner::Account(AccountId::parse("other").unwrap())));
        assert!(!acme.can_see_owner(&KeyOwner::User(UserId::parse("ann").unwrap())));
        assert_eq!(acme.actor().to_string(), "cert:ci.internal");
        let operator = by_certificate("keyward", &["keyward:keys:write"]);
        assert!(can_grant(&operator, "production", |t| t.scopes = scopes(&["*"])));
        assert!(!can_grant(&operator, "production", |t| t.scopes = scopes(&["keyward:check"])));
    }

    #[test]
    fn another_account_does_not_exist_for_an_account_caller() {
        let acme = caller("acme", &["*"], |_| {});
        let other = AccountId::parse("other").unwrap();
        assert!(!acme.can_see_owner(&KeyOwner::Account(other.clone())));
        assert!(matches!(
            acme.resolve_account(Some(other)),
            Err(ServiceError::NotFound(ResourceKind::Account))
        ));
        assert_eq!(acme.resolve_account(None).unwrap().as_str(), "acme");
        assert!(
            caller("keyward", &["*"], |_| {}).resolve_account(None).is_err(),
            "an operator must name the account"
        );
    }

    #[test]
    fn a_user_key_exists_for_operators_and_its_own_user_alone() {
        let ann = KeyOwner::User(UserId::parse("ann").unwrap());
        let acting = |account, user: &str| Caller {
            acting_user: Some(UserId::parse(user).unwrap()),
            ..caller(account, &["*"], |_| {})
        };
        assert!(caller("keyward", &["*"], |_| {}).can_see_owner(&ann));
        assert!(!caller("acme", &["*"], |_| {}).can_see_owner(&ann));
        assert!(acting("keyward", "ann").can_see_owner(&ann));
        assert!(!acting("keyward", "bob").can_see_owner(&ann));
    }
}
