//! The attributes that many keys share. A million keys have a few dozen policies, so the index stores each policy once.

use ipnet::IpNet;

use super::{
    key::{ApiKey, Quota, RateLimit},
    name::{CustomerId, EnvironmentName, RoleName},
    scope::ScopeSet,
};

/// The permissions of a key, without the attributes that are unique to each key.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct KeyPolicy {
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

impl KeyPolicy {
    /// A policy that grants nothing; the index stores it for a revoked key.
    #[must_use]
    pub fn without_grants(environment: EnvironmentName) -> KeyPolicy {
        KeyPolicy {
            environment,
            scopes: ScopeSet::default(),
            roles: Box::default(),
            customers: Box::default(),
            allowed_cidrs: Box::default(),
            rate_limits: Box::default(),
            quota: None,
        }
    }

    /// Extracts the policy from a key's record.
    #[must_use]
    pub fn from_key(key: &ApiKey) -> KeyPolicy {
        KeyPolicy {
            environment: key.environment.clone(),
            scopes: key.spec.scopes.clone(),
            roles: key.spec.roles.clone().into(),
            customers: key.spec.customers.clone().into(),
            allowed_cidrs: key.spec.allowed_cidrs.clone().into(),
            rate_limits: key.spec.rate_limits.clone().into(),
            quota: key.spec.quota.clone(),
        }
    }
}
