//! The receiver of a snapshot.
//!
//! Keys arrive on the threads that read them, in independent parts, and borrow from their rows: only what the receiver
//! keeps is copied. All other records arrive one by one.

use std::{collections::BTreeMap, sync::Arc};

use crate::domain::{
    account::{Account, AccountMember, Role},
    key::{ApiKey, KeyOwner, KeySecret, KeySpec, Revocation},
    key_policy::KeyPolicy,
    limit::QuotaUsage,
    name::{KeyId, KeyName},
    time::{Revision, Timestamp},
};

/// Receives a snapshot.
pub trait SnapshotLoader: Send + Sync + 'static {
    /// Receives a record that is not a key.
    fn add_record(&self, item: SnapshotRecord);

    /// Announces that about this many secrets will follow.
    fn reserve_secrets(&self, secrets: usize);

    /// Begins a part of the keys, for one thread.
    fn begin_part(&self) -> Box<dyn SnapshotPart>;
}

/// A record of a snapshot.
#[derive(Debug)]
pub enum SnapshotRecord {
    /// An account, suspended or not.
    Account(Account),
    /// A key, and the superseded secrets that left its record. Both lack hints, and a revoked key lacks its grants: see
    /// [`LoadedKey`].
    Key(Arc<ApiKey>, Vec<KeySecret>),
    /// A role of an account, or a global one.
    Role(Role),
    /// A membership of a user in an account.
    Member(AccountMember),
    /// The usage of the quota of an unrevoked key; arrives after its key.
    QuotaUsage(KeyId, QuotaUsage),
}

/// Receives some keys of a snapshot. Each key arrives once, in one part only, in any order.
pub trait SnapshotPart: Send {
    /// Receives a key, which is only valid during the call.
    fn add_key(&mut self, key: &LoadedKey<'_>);

    /// Ends the part. Without this call, some of its keys are lost.
    fn finish(self: Box<Self>);
}

/// A key of a snapshot, borrowed from its row. A revoked key has no name, expiry, grants, restrictions, limits or
/// metadata, since a Check needs none of them.
#[derive(Debug)]
pub struct LoadedKey<'a> {
    /// The id of the key.
    pub id: KeyId,
    /// The owner, shared with other keys that have the same.
    pub owner: &'a Arc<KeyOwner>,
    /// The policy, shared with other keys that have the same.
    pub policy: &'a Arc<KeyPolicy>,
    /// The name, which is a valid [`KeyName`].
    pub name: Option<&'a str>,
    /// The time from which the key is denied.
    pub expires_at: Option<Timestamp>,
    /// The metadata that the creator attached.
    pub metadata: BTreeMap<String, String>,
    /// The time of its creation.
    pub created_at: Timestamp,
    /// The actor that created the key, in its text form.
    pub created_by: &'a str,
    /// The time of its last change.
    pub updated_at: Timestamp,
    /// The time since which the key is disabled.
    pub disabled_at: Option<Timestamp>,
    /// The revocation, which is final.
    pub revocation: Option<Revocation>,
    /// The revision of its last change.
    pub revision: Revision,
    /// The secrets in its record, the newest first, without hints.
    pub secrets: &'a [KeySecret],
    /// The superseded secrets that left its record, the newest first, without hints.
    pub retired_secrets: &'a [KeySecret],
}

impl LoadedKey<'_> {
    /// Copies the key into an owned record.
    #[must_use]
    pub fn to_key(&self) -> ApiKey {
        let policy = &**self.policy;
        ApiKey {
            id: self.id,
            owner: (**self.owner).clone(),
            environment: policy.environment.clone(),
            spec: KeySpec {
                // The name was checked when the row was parsed.
                name: self.name.and_then(|name| KeyName::from_stored(name).ok()),
                scopes: policy.scopes.clone(),
                roles: policy.roles.to_vec(),
                expires_at: self.expires_at,
                customers: policy.customers.to_vec(),
                allowed_cidrs: policy.allowed_cidrs.to_vec(),
                rate_limits: policy.rate_limits.to_vec(),
                quota: policy.quota.clone(),
                metadata: self.metadata.clone(),
            },
            created_at: self.created_at,
            created_by: self.created_by.to_owned(),
            updated_at: self.updated_at,
            disabled_at: self.disabled_at,
            revocation: self.revocation.clone(),
            secrets: self.secrets.to_vec(),
            revision: self.revision,
        }
    }
}
