//! What a Check asks, and for whom: the input of [`Engine::check`](super::Engine::check), independent of the wire format.

use std::net::IpAddr;

use crate::domain::{
    name::{AccountId, CustomerId, EnvironmentName},
    scope::Scope,
    time::Revision,
};

use super::{error::CheckError, key_limits::RequestDedupId};

/// What a Check asks, once it has been read from the wire.
#[derive(Clone, Debug)]
pub struct CheckInput<'a> {
    /// The presented string.
    pub token: &'a str,
    /// Where the call is made.
    pub environment: &'a EnvironmentName,
    /// The scopes that are all needed. Empty = only whether the token is valid here.
    pub scopes: &'a [Scope],
    /// The account that is acted on.
    pub account: Option<&'a AccountId>,
    /// Whom the call is about.
    pub customer: Option<&'a CustomerId>,
    /// The end client's address.
    pub client_ip: Option<IpAddr>,
    /// Units to take of limits and quota.
    pub cost: u64,
    /// Decide, and leave no trace.
    pub dry_run: bool,
    /// Answer only from a state at least as new.
    pub min_revision: Option<Revision>,
    /// What the asker calls this request: asked again under the same number, it takes of the limits once.
    pub dedup_id: Option<RequestDedupId>,
    /// Whether a key that may call Keyward itself is refused here. Such keys are for managing.
    pub refuse_management_keys: bool,
}

/// Who asks a question.
#[derive(Clone, Copy)]
pub struct Requester<'a> {
    /// In which account: the operator account, or another.
    pub account: &'a AccountId,
    /// Whether it may ask still. It is asked once the deadline has been read.
    pub is_still_authorized: &'a (dyn Fn() -> Result<bool, CheckError> + Sync),
}

impl<'a> Requester<'a> {
    /// One that nobody can take anything from: the process itself, for a proxy that shows no key.
    #[must_use]
    pub fn always_authorized(account: &'a AccountId) -> Requester<'a> {
        Requester { account, is_still_authorized: &|| Ok(true) }
    }
}
