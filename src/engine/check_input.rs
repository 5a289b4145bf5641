//! The input of a Check, independent of the wire format, and the caller on whose behalf it is made.

use std::net::IpAddr;

use crate::domain::{
    name::{AccountId, CustomerId, EnvironmentName},
    scope::Scope,
    time::Revision,
};

use super::{error::CheckError, key_limits::RequestDedupId};

/// What a Check asks, after it was parsed from the wire.
#[derive(Clone, Debug)]
pub struct CheckInput<'a> {
    /// The token as the client presented it.
    pub token: &'a str,
    /// The environment that the call is made in.
    pub environment: &'a EnvironmentName,
    /// The required scopes. Empty: only the token's validity in this environment is asked.
    pub scopes: &'a [Scope],
    /// The account that the call acts on.
    pub account: Option<&'a AccountId>,
    /// The customer that the call concerns.
    pub customer: Option<&'a CustomerId>,
    /// The address of the end client, for keys with allowed networks.
    pub client_ip: Option<IpAddr>,
    /// How many units to consume from limits and quota.
    pub cost: u64,
    /// Decide only: consume and record nothing.
    pub dry_run: bool,
    /// The answer must be from this revision or a newer one.
    pub min_revision: Option<Revision>,
    /// The requester's ID of this request: a repetition with the same ID consumes from the limits only once.
    pub dedup_id: Option<RequestDedupId>,
    /// Whether to refuse keys that may call Keyward itself; these are for management.
    pub refuse_management_keys: bool,
}

/// The caller on whose behalf a Check is made.
#[derive(Clone, Copy)]
pub struct Requester<'a> {
    /// The requester's account; the operator account sees all keys.
    pub account: &'a AccountId,
    /// Returns whether the requester may still call. The engine calls it after it has read the lease's deadline.
    pub is_still_authorized: &'a (dyn Fn() -> Result<bool, CheckError> + Sync),
}

impl<'a> Requester<'a> {
    /// A requester that cannot be revoked: the process itself, for a proxy without a key.
    #[must_use]
    pub fn always_authorized(account: &'a AccountId) -> Requester<'a> {
        Requester { account, is_still_authorized: &|| Ok(true) }
    }
}
