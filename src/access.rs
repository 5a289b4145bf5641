//! Who calls Keyward, what they may do, and that nobody grants what they do not hold.
//!
//! Callers are keys whose scopes lie under `keyward:`, and client certificates that the configuration grants such. How a caller proves who it is stands in `grpc/gate.rs`;
//! which RPC needs which permission, in `grpc/rpc.rs`.

mod authorization;

use std::{fmt::Display, net::IpAddr, sync::Arc};

pub use authorization::{ATTEMPTS, Authorization};

use crate::{
    domain::{
        entry::Via,
        facts::KeyFacts as _,
        identity::Identity,
        key::{Owner, Terms},
        limit,
        log::{Actor, Who},
        name::{AccountId, EnvironmentName, KeyId, UserId},
        scope::{Scope, ScopeSet},
        time::Timestamp,
        token::Digest,
    },
    engine::HeldKey,
    refusal::{Refusal, Thing},
};

/// A right over Keyward itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Permission {
    /// Ask Checks.
    Check,
    /// Read keys.
    KeysRead,
    /// Create and change keys.
    KeysWrite,
    /// Read accounts.
    AccountsRead,
    /// Create and change accounts.
    AccountsWrite,
    /// Read the audit log.
    AuditRead,
}

impl Permission {
    /// The reserved scope that grants it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Permission::Check => "keyward:check",
            Permission::KeysRead => "keyward:keys:read",
            Permission::KeysWrite => "keyward:keys:write",
            Permission::AccountsRead => "keyward:accounts:read",
            Permission::AccountsWrite => "keyward:accounts:write",
            Permission::AuditRead => "keyward:audit:read",
        }
    }

    /// Whether it is granted.
    #[must_use]
    pub fn is_in(self, grants: &ScopeSet) -> bool {
        grants.covers_text(self.as_str())
    }
}

/// What a caller has proved itself by.
#[derive(Clone, Debug)]
pub enum Proof {
    /// A management key, and the digest of the token by which it is judged again.
    Key(HeldKey, Digest),
    /// Possession of a living token with this digest, in whatever state its key is: enough to revoke that key.
    Possession(HeldKey, Digest),
    /// A client certificate. The configuration binds it to an account and to scopes, and to nothing else: it has no
    /// environment, customers, networks, limits or expiry of its own, and belongs to no user.
    Certificate(Arc<Identity>),
}

/// A caller that has proved who it is.
#[derive(Clone, Debug)]
pub struct Caller {
    /// What it called with.
    pub proof: Proof,
    /// The account it acts in.
    pub account: AccountId,
    /// What it is granted there, roles included.
    pub grants: ScopeSet,
    /// The permission that its call needs.
    pub needs: Option<Permission>,
    /// The person that an operator's caller calls for.
    pub acting_user: Option<UserId>,
    /// The person whom the log names, where the change is made for another reason than acting for one.
    pub named_user: Option<UserId>,
    /// The RPC that it called.
    pub method: &'static str,
    /// Where it called from.
    pub peer: Option<IpAddr>,
    /// The call's id.
    pub request_id: Option<String>,
}

impl Caller {
    /// The management key, of a caller with one.
    #[must_use]
    pub fn key(&self) -> Option<&HeldKey> {
        match &self.proof {
            Proof::Key(key, _) | Proof::Possession(key, _) => Some(key),
            Proof::Certificate(_) => None,
        }
    }

    /// Its key's id, or that of its identity.
    #[must_use]
    pub fn id(&self) -> KeyId {
        match &self.proof {
            Proof::Key(key, _) | Proof::Possession(key, _) => key.id(),
            Proof::Certificate(identity) => identity.id(),
        }
    }

    /// The id under which its idempotency keys are kept. Each person that it acts for has idempotency keys apart from all
    /// others, and so has each account that a user key names: neither learns of requests made for another.
    #[must_use]
    pub fn request_scope(&self) -> KeyId {
        let names_account = self.key().is_some_and(|key| key.owner().user().is_some());
        if self.acting_user.is_none() && !names_account {
            return self.id();
        }
        let person = self.acting_user.as_ref().map_or("", UserId::as_str);
        KeyId::derived("keyward-request-scope-1", &[&self.id().to_string(), self.account.as_str(), person])
    }

    /// The environment that it is bound to.
    #[must_use]
    pub fn environment(&self) -> Option<&EnvironmentName> {
        self.key().map(|key| key.environment())
    }

    /// Whether it acts on every account.
    #[must_use]
    pub fn is_operator(&self) -> bool {
        self.account.is_operator()
    }

    /// Whether it is granted the permission.
    #[must_use]
    pub fn may(&self, permission: Permission) -> bool {
        permission.is_in(&self.grants)
    }

    /// The caller as the log names it.
    #[must_use]
    pub fn actor(&self) -> Actor {
        let who = match &self.proof {
            Proof::Key(key, _) | Proof::Possession(key, _) => Who::Key(key.id()),
            Proof::Certificate(identity) => Who::Certificate(identity.name().into()),
        };
        Actor {
            who,
            account: Some(self.account.clone()),
            acting_user: self.acting_user.clone().or_else(|| self.named_user.clone()),
            via: Via {
                request_id: self.request_id.clone(),
                peer: self.peer.map(|peer| peer.to_string()),
                ..Via::NONE
            },
        }
    }

    /// Whether keys of this owner exist for the caller. User keys reach into every account of their user: to
    /// others than operators and the user's own keys they do not exist, and while an operator's caller acts
    /// for a person, to others than that person.
    #[must_use]
    pub fn sees(&self, owner: &Owner) -> bool {
        match (owner, &self.acting_user) {
            (Owner::User(user), Some(acting)) => user == acting,
            (Owner::User(user), None) => {
                self.is_operator() || self.key().is_some_and(|key| key.owner().user() == Some(user))
            }
            (Owner::Account(account), _) => self.is_operator() || *account == self.account,
        }
    }

    /// The account that is meant: the one named, or, for an account's caller, its own.
    ///
    /// # Errors
    /// When an operator names none, or an account's caller another: that one does not exist for it.
    pub fn account_meant(&self, named: Option<AccountId>) -> Result<AccountId, Refusal> {
        match named {
            Some(account) if self.is_operator() || account == self.account => Ok(account),
            Some(_) => Err(Refusal::NotFound(Thing::Account)),
            None if self.is_operator() => {
                Err(Refusal::field("account", "is required from the operator account's callers"))
            }
            None => Ok(self.account.clone()),
        }
    }

    /// Checks that the caller acts for itself, as calls over all accounts require.
    ///
    /// # Errors
    /// If it acts for a person.
    pub fn must_act_for_itself(&self) -> Result<(), Refusal> {
        if self.acting_user.is_none() {
            return Ok(());
        }
        let message =
            "a call with x-keyward-acting-user must name one account; name it, or leave the header out";
        Err(Refusal::Forbidden("ROLE_LACKS_PERMISSION", message.to_owned()))
    }

    /// Accounts are made and changed by operators.
    ///
    /// # Errors
    /// When the caller is none.
    pub fn must_be_operator(&self) -> Result<(), Refusal> {
        if self.is_operator() {
            Ok(())
        } else {
            let message = "only the operator account's callers may do this";
            Err(Refusal::Forbidden("OPERATOR_ONLY", message.to_owned()))
        }
    }

    /// Whether the caller could grant these scopes.
    ///
    /// # Errors
    /// When one goes beyond what it holds; the message names it.
    pub fn may_grant(&self, granted: &ScopeSet) -> Result<(), Refusal> {
        let held = |scope: &Scope| (self.is_operator() && !scope.is_reserved()) || self.grants.covers(scope);
        match granted.iter().find(|scope| !held(scope)) {
            Some(scope) => beyond("a scope goes", scope),
            None => Ok(()),
        }
    }

    /// Checks that the caller may grant rights without restrictions, as roles and memberships are. Its own key must not be
    /// restricted to customers or networks. An account's caller must also have a key of the `first` environment that never
    /// expires and has no limits.
    ///
    /// # Errors
    /// When its rights are bound; the message says by what.
    pub fn must_be_unbound(&self, first: &EnvironmentName) -> Result<(), Refusal> {
        const RIGHT: &str = "a role or membership goes";
        let Some(own) = self.key() else { return Ok(()) };
        if !own.customers().is_empty() {
            beyond(RIGHT, &"it is bound to no customers")
        } else if !own.allowed_cidrs().is_empty() {
            beyond(RIGHT, &"it is bound to no networks")
        } else if self.is_operator() {
            Ok(())
        } else if own.expires_at().is_some() {
            beyond(RIGHT, &"it never expires")
        } else if own.is_limited() {
            beyond(RIGHT, &"it has no rate limits and no quota")
        } else {
            self.reaches_every_environment(first)
        }
    }

    /// Whether the caller may change what holds in every environment, as roles and memberships do: among an account's
    /// callers only keys of the first configured environment may.
    ///
    /// # Errors
    /// When its key is of another environment.
    pub fn reaches_every_environment(&self, first: &EnvironmentName) -> Result<(), Refusal> {
        match self.environment() {
            Some(own) if own != first && !self.is_operator() => {
                let which = format_args!("it holds in every environment; use a key of {:?}", first.as_str());
                beyond("a role or membership goes", &which)
            }
            _ => Ok(()),
        }
    }

    /// Whether the caller could give a key these terms, which with its roles grant `granted`: nobody grants
    /// what they do not hold, in any dimension. Operators may grant every scope outside `keyward:`, in every environment,
    /// whatever limits their own key has.
    ///
    /// # Errors
    /// When the terms go beyond the caller; the message says in what.
    pub fn may_give(
        &self,
        environment: &EnvironmentName,
        terms: &Terms,
        granted: &ScopeSet,
    ) -> Result<(), Refusal> {
        self.may_grant(granted)?;
        if !self.is_operator() && self.environment().is_some_and(|own| environment != own) {
            return beyond("the environment goes", environment);
        }
        let Some(own) = self.key() else { return Ok(()) };
        if later(terms.expires_at, own.expires_at()) {
            return beyond("the expiry goes", &"it must end no later");
        }
        let customers = &terms.customers;
        if !own.customers().is_empty()
            && (customers.is_empty() || !customers.iter().all(|customer| own.customers().contains(customer)))
        {
            return beyond("the customers go", &"they must be among them");
        }
        let nets = &terms.allowed_cidrs;
        let within = |net: &ipnet::IpNet| own.allowed_cidrs().iter().any(|wide| wide.contains(net));
        if !own.allowed_cidrs().is_empty() && (nets.is_empty() || !nets.iter().all(within)) {
            return beyond("the allowed networks go", &"they must lie within them");
        }
        if self.is_operator() { Ok(()) } else { keeps_limits(own, terms) }
    }
}

/// Whether terms have limits at least as tight as each that the caller's own key has.
fn keeps_limits(own: &HeldKey, terms: &Terms) -> Result<(), Refusal> {
    let kept = |bound| terms.rate_limits.iter().any(|limit| limit::is_rate_within(limit, bound));
    if let Some(bound) = own.rate_limits().iter().find(|bound| !kept(bound)) {
        let seconds = bound.window.as_secs_f64();
        let needed = format!("one must allow at most {} units at once and in {seconds} s", bound.limit);
        return beyond("the rate limits go", &needed);
    }
    match own.quota() {
        Some(bound) if !terms.quota.as_ref().is_some_and(|quota| limit::is_quota_within(quota, bound)) => {
            let needed = format!("it must be at most {} units, in no shorter a period", bound.limit);
            beyond("the quota goes", &needed)
        }
        _ => Ok(()),
    }
}

fn beyond(what: &str, which: &dyn Display) -> Result<(), Refusal> {
    let message = format!("{what} beyond the caller's own: {which}");
    Err(Refusal::Forbidden("GRANT_BEYOND_CALLER", message))
}

/// Whether `end` is later than `limit`; none is later than any.
fn later(end: Option<Timestamp>, limit: Option<Timestamp>) -> bool {
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
        identity::San,
        key::tests::{at, sample},
        name::CustomerId,
        scope::ScopeSet,
    };

    fn scopes(texts: &[&str]) -> ScopeSet {
        texts.iter().map(|text| Scope::parse_grant(text).unwrap()).collect()
    }

    fn caller(account: &str, granted: &[&str], bind: fn(&mut Terms)) -> Caller {
        let mut key = sample();
        key.terms.scopes = scopes(granted);
        bind(&mut key.terms);
        Caller {
            grants: key.terms.scopes.clone(),
            proof: Proof::Key(HeldKey::from(&key), key.secrets[0].digest),
            account: AccountId::parse(account).unwrap(),
            needs: None,
            acting_user: None,
            named_user: None,
            method: "test",
            peer: None,
            request_id: None,
        }
    }

    fn gives(caller: &Caller, environment: &str, shape: fn(&mut Terms)) -> bool {
        let mut terms = sample().terms;
        terms.scopes = scopes(&["monitors:read"]);
        shape(&mut terms);
        caller.may_give(&EnvironmentName::parse(environment).unwrap(), &terms, &terms.scopes).is_ok()
    }

    #[test]
    fn an_account_caller_gives_only_scopes_that_it_holds() {
        let acme = caller("acme", &["keyward:keys:write", "monitors:*"], |_| {});
        assert!(gives(&acme, "production", |_| {}));
        assert!(gives(&acme, "production", |t| t.scopes = scopes(&["keyward:keys:write"])));
        for beyond in ["*", "alerts:read", "keyward:*", "keyward:keys:read"] {
            let mut terms = sample().terms;
            terms.scopes = scopes(&[beyond]);
            assert!(acme.may_give(&sample().environment, &terms, &terms.scopes).is_err(), "{beyond}");
        }
    }

    #[test]
    fn an_operator_gives_every_scope_but_reserved_ones_it_lacks() {
        let operator = caller("keyward", &["keyward:keys:write"], |_| {});
        assert!(gives(&operator, "staging", |t| t.scopes = scopes(&["*"])));
        assert!(!gives(&operator, "staging", |t| t.scopes = scopes(&["keyward:check"])));
        assert!(!gives(&operator, "staging", |t| t.scopes = scopes(&["keyward:*"])));
    }

    #[test]
    fn an_all_scope_never_includes_the_reserved_ones() {
        let acme = caller("acme", &["*"], |_| {});
        assert!(gives(&acme, "production", |t| t.scopes = scopes(&["*"])));
        assert!(!gives(&acme, "production", |t| t.scopes = scopes(&["keyward:check"])));
    }

    #[test]
    fn a_bound_caller_makes_only_keys_bound_at_least_as_tightly() {
        let bound = caller("acme", &["*"], |t| {
            t.expires_at = Some(at(100));
            t.customers = vec![CustomerId::parse("c1").unwrap(), CustomerId::parse("c2").unwrap()];
            t.allowed_cidrs = vec!["10.0.0.0/8".parse().unwrap()];
        });
        let tight: fn(&mut Terms) = |t| {
            t.expires_at = Some(at(100));
            t.customers = vec![CustomerId::parse("c2").unwrap()];
            t.allowed_cidrs = vec!["10.1.0.0/16".parse().unwrap()];
        };
        assert!(gives(&bound, "production", tight));
        let looser: [fn(&mut Terms); 6] = [
            |t| t.expires_at = None,
            |t| t.expires_at = Some(at(101)),
            |t| t.customers.clear(),
            |t| t.customers.push(CustomerId::parse("c3").unwrap()),
            |t| t.allowed_cidrs.clear(),
            |t| t.allowed_cidrs = vec!["0.0.0.0/0".parse().unwrap()],
        ];
        for loosen in looser {
            let mut terms = sample().terms;
            terms.scopes = scopes(&["monitors:read"]);
            tight(&mut terms);
            loosen(&mut terms);
            assert!(bound.may_give(&sample().environment, &terms, &terms.scopes).is_err(), "{terms:?}");
        }
        assert!(!gives(&bound, "staging", tight), "another environment");
    }

    #[test]
    fn a_certificate_gives_what_its_scopes_hold_and_sees_its_account_alone() {
        let by_certificate = |account: &str, granted: &[&str]| {
            let id = AccountId::parse(account).unwrap();
            let identity = Identity::new(San::dns("ci.internal").unwrap(), id, scopes(granted));
            let caller = caller(account, granted, |_| {});
            Caller { proof: Proof::Certificate(Arc::new(identity)), ..caller }
        };
        let acme = by_certificate("acme", &["keyward:keys:write", "monitors:*"]);
        assert!(acme.may(Permission::KeysWrite) && !acme.may(Permission::KeysRead));
        assert!(gives(&acme, "production", |_| {}) && gives(&acme, "staging", |_| {}));
        assert!(gives(&acme, "production", |t| t.scopes = scopes(&["keyward:keys:write"])));
        for beyond in ["*", "alerts:read", "keyward:*", "keyward:keys:read"] {
            let mut terms = sample().terms;
            terms.scopes = scopes(&[beyond]);
            assert!(acme.may_give(&sample().environment, &terms, &terms.scopes).is_err(), "{beyond}");
        }
        assert!(!acme.sees(&Owner::Account(AccountId::parse("other").unwrap())));
        assert!(!acme.sees(&Owner::User(UserId::parse("ann").unwrap())));
        assert_eq!(acme.actor().to_string(), "cert:ci.internal");
        let operator = by_certificate("keyward", &["keyward:keys:write"]);
        assert!(gives(&operator, "production", |t| t.scopes = scopes(&["*"])));
        assert!(!gives(&operator, "production", |t| t.scopes = scopes(&["keyward:check"])));
    }

    #[test]
    fn another_account_does_not_exist_for_an_account_caller() {
        let acme = caller("acme", &["*"], |_| {});
        let other = AccountId::parse("other").unwrap();
        assert!(!acme.sees(&Owner::Account(other.clone())));
        assert!(matches!(acme.account_meant(Some(other)), Err(Refusal::NotFound(Thing::Account))));
        assert_eq!(acme.account_meant(None).unwrap().as_str(), "acme");
        assert!(caller("keyward", &["*"], |_| {}).account_meant(None).is_err(), "an operator must say which");
    }

    #[test]
    fn a_user_key_exists_for_operators_and_its_own_user_alone() {
        let ann = Owner::User(UserId::parse("ann").unwrap());
        let acting = |account, user: &str| Caller {
            acting_user: Some(UserId::parse(user).unwrap()),
            ..caller(account, &["*"], |_| {})
        };
        assert!(caller("keyward", &["*"], |_| {}).sees(&ann));
        assert!(!caller("acme", &["*"], |_| {}).sees(&ann));
        assert!(acting("keyward", "ann").sees(&ann));
        assert!(!acting("keyward", "bob").sees(&ann));
    }
}
