//! How a snapshot comes: keys on the threads that read them, in parts that know nothing of each other, and as the
//! rows stand, so that nothing is copied that nobody keeps; all else one by one.

use std::{collections::BTreeMap, sync::Arc};

use crate::domain::{
    account::{Account, AccountMember, Role},
    key::{ApiKey, KeyOwner, KeySecret, KeySpec, Revocation},
    key_policy::KeyPolicy,
    limit::QuotaUsage,
    name::{KeyId, KeyName},
    time::{Revision, Timestamp},
};

/// Takes a snapshot.
pub trait SnapshotLoader: Send + Sync + 'static {
    /// Takes a record that is no key.
    fn add_record(&self, item: SnapshotRecord);

    /// Says that about so many secrets will come.
    fn reserve_secrets(&self, secrets: usize);

    /// Begins a part of the keys.
    fn begin_part(&self) -> Box<dyn SnapshotPart>;
}

/// A record of the snapshot.
#[derive(Debug)]
pub enum SnapshotRecord {
    /// An account.
    Account(Account),
    /// A key, with the superseded secrets that left its record. Hints are left out of either, and of a revoked key all that
    /// it granted: see [`LoadedKey`].
    Key(Arc<ApiKey>, Vec<KeySecret>),
    /// A role.
    Role(Role),
    /// A member.
    Member(AccountMember),
    /// What is spent of the quota of a key that is not revoked; after its key.
    QuotaUsage(KeyId, QuotaUsage),
}

/// Takes some keys of a snapshot. Each comes in one part only, once, and in no order.
pub trait SnapshotPart: Send {
    /// Takes a key.
    fn add_key(&mut self, key: &LoadedKey<'_>);

    /// Says that no more will come. Without it, some of what came is lost.
    fn finish(self: Box<Self>);
}

/// A key of a snapshot, while its row is looked at. A revoked key has no name, expiry, grants, restrictions, limits or
/// metadata: a Check needs none of them.
#[derive(Debug)]
pub struct LoadedKey<'a> {
    /// Its id.
    pub id: KeyId,
    /// Who it belongs to.
    pub owner: &'a Arc<KeyOwner>,
    /// What it has in common with others: often the same as of a key before it.
    pub policy: &'a Arc<KeyPolicy>,
    /// A [`KeyName`].
    pub name: Option<&'a str>,
    /// From this instant it is refused.
    pub expires_at: Option<Timestamp>,
    /// The maker's own notes.
    pub metadata: BTreeMap<String, String>,
    /// When it was created.
    pub created_at: Timestamp,
    /// What created it.
    pub created_by: &'a str,
    /// When it last changed.
    pub updated_at: Timestamp,
    /// Since when it is disabled.
    pub disabled_at: Option<Timestamp>,
    /// Its end.
    pub revocation: Option<Revocation>,
    /// The revision of its last change.
    pub revision: Revision,
    /// The secrets in its record, the newest first, without hints.
    pub secrets: &'a [KeySecret],
    /// Superseded secrets that left its record, the newest first, without hints.
    pub retired_secrets: &'a [KeySecret],
}

impl LoadedKey<'_> {
    /// The record.
    #[must_use]
    pub fn to_key(&self) -> ApiKey {
        let policy = &**self.policy;
        ApiKey {
            id: self.id,
            owner: (**self.owner).clone(),
            environment: policy.environment.clone(),
            spec: KeySpec {
                // Whoever made this has found it right.
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
