//! What many keys say alike: there are a few dozen policies where there are a million keys, so each may stand once.

use ipnet::IpNet;

use super::{
    key::{Key, Quota, RateLimit},
    name::{CustomerId, EnvironmentName, RoleName},
    scope::ScopeSet,
};

/// What a key may do and where, but for what each has of its own.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Policy {
    /// The one environment in which it works.
    pub environment: EnvironmentName,
    /// Granted scopes.
    pub scopes: ScopeSet,
    /// Granted roles.
    pub roles: Box<[RoleName]>,
    /// The only customers it serves. None = every customer.
    pub customers: Box<[CustomerId]>,
    /// The only client networks it serves. None = every address.
    pub allowed_cidrs: Box<[IpNet]>,
    /// Rate limits. None = unlimited.
    pub rate_limits: Box<[RateLimit]>,
    /// Quota. None = unlimited.
    pub quota: Option<Quota>,
}

impl Policy {
    /// A policy that grants nothing: what the index keeps of a revoked key's.
    #[must_use]
    pub fn without_grants(environment: EnvironmentName) -> Policy {
        Policy {
            environment,
            scopes: ScopeSet::default(),
            roles: Box::default(),
            customers: Box::default(),
            allowed_cidrs: Box::default(),
            rate_limits: Box::default(),
            quota: None,
        }
    }

    /// A key's policy.
    #[must_use]
    pub fn of(key: &Key) -> Policy {
        Policy {
            environment: key.environment.clone(),
            scopes: key.terms.scopes.clone(),
            roles: key.terms.roles.clone().into(),
            customers: key.terms.customers.clone().into(),
            allowed_cidrs: key.terms.allowed_cidrs.clone().into(),
            rate_limits: key.terms.rate_limits.clone().into(),
            quota: key.terms.quota.clone(),
        }
    }
}
