//! The fields that few keys have, kept out of the records of a block.

use std::{collections::BTreeMap, sync::Arc};

use crate::domain::{
    key::{ApiKey, KeySecret},
    key_attributes::secret_superseded_at,
    time::Timestamp,
    token::TokenDigest,
};

/// The fields that few keys have. Most keys have none of them, and then no allocation.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct ColdFields {
    /// The newest secret's version if it does not fit a record; otherwise 0.
    pub(super) large_version: u32,
    pub(super) disabled: bool,
    /// When the newest secret is superseded.
    pub(super) newest_superseded_at: Option<Timestamp>,
    pub(super) previous_secrets: Box<[PreviousSecret]>,
    /// Boxed separately: an empty map would cost 24 bytes in every `ColdFields`.
    pub(super) metadata: Option<Arc<BTreeMap<String, String>>>,
}

/// The sources of a key's cold fields.
pub(super) struct ColdFieldsView<'k> {
    /// The secrets in the record, newest first.
    pub(super) secrets: &'k [KeySecret],
    pub(super) updated_at: Timestamp,
    pub(super) disabled_at: Option<Timestamp>,
    pub(super) revoked_at: Option<Timestamp>,
    pub(super) metadata: &'k BTreeMap<String, String>,
}

impl<'k> ColdFieldsView<'k> {
    pub(super) fn from_key(key: &'k ApiKey) -> Self {
        ColdFieldsView {
            secrets: &key.secrets,
            updated_at: key.updated_at,
            disabled_at: key.disabled_at,
            revoked_at: key.revocation.as_ref().map(|revocation| revocation.at),
            metadata: &key.spec.metadata,
        }
    }

    /// Adds the superseded secrets that have left the record. Returns `None` if no cold field is set.
    pub(super) fn with_retired_secrets(&self, retired: &[KeySecret]) -> Option<Arc<ColdFields>> {
        let retired = retired.iter().map(|secret| PreviousSecret {
            version: secret.version,
            digest: secret.digest,
            superseded_at: Some(secret.expires_at.unwrap_or(self.updated_at)),
            is_retired: true,
            is_already_superseded: true,
        });
        self.with_previous_secrets(retired)
    }

    pub(super) fn with_previous_secrets(
        &self,
        retired: impl Iterator<Item = PreviousSecret>,
    ) -> Option<Arc<ColdFields>> {
        let (newest, previous) = self.secrets.split_first()?;
        let previous = previous.iter().map(|secret| PreviousSecret {
            version: secret.version,
            digest: secret.digest,
            superseded_at: secret.expires_at,
            is_retired: false,
            is_already_superseded: secret_superseded_at(secret.expires_at, self.updated_at)
                == Some(Timestamp::MIN),
        });
        let is_alive = self.revoked_at.is_none();
        let metadata = Some(self.metadata).filter(|metadata| is_alive && !metadata.is_empty());
        let cold_fields = ColdFields {
            large_version: if newest.version < LARGE_VERSION.into() { 0 } else { newest.version },
            disabled: is_alive && self.disabled_at.is_some(),
            newest_superseded_at: newest.expires_at.filter(|_| is_alive),
            previous_secrets: previous.chain(retired).collect(),
            metadata: metadata.cloned().map(Arc::new),
        };
        (cold_fields != ColdFields::default()).then(|| Arc::new(cold_fields))
    }
}

/// Any secret except the newest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct PreviousSecret {
    pub(super) version: u32,
    pub(super) digest: TokenDigest,
    /// When the secret is superseded.
    pub(super) superseded_at: Option<Timestamp>,
    /// Whether the secret has left the record; then it counts as superseded regardless of the clock.
    pub(super) is_retired: bool,
    /// Whether it was superseded when the record was written; then it counts as superseded regardless of the clock.
    pub(super) is_already_superseded: bool,
}

/// Marks a version of this value or more; the version itself is in [`ColdFields`].
pub(super) const LARGE_VERSION: u16 = u16::MAX;
