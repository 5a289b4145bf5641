//! The parameters of Update: which fields to change, and their new values.

use crate::domain::key::KeySpec;

/// A field that Update can change, named as in an update mask.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum KeyField {
    Name,
    Scopes,
    Roles,
    ExpiresAt,
    Customers,
    AllowedCidrs,
    RateLimits,
    Quota,
    Metadata,
}

impl KeyField {
    /// Parses a path of an update mask.
    #[must_use]
    pub(crate) fn from_path(path: &str) -> Option<KeyField> {
        Some(match path {
            "name" => KeyField::Name,
            "scopes" => KeyField::Scopes,
            "roles" => KeyField::Roles,
            "expires_at" => KeyField::ExpiresAt,
            "customers" => KeyField::Customers,
            "allowed_cidrs" => KeyField::AllowedCidrs,
            "rate_limits" => KeyField::RateLimits,
            "quota" => KeyField::Quota,
            "metadata" => KeyField::Metadata,
            _ => return None,
        })
    }
}

/// New values for some fields of a key's specification.
#[derive(Clone, Debug)]
pub(crate) struct KeyPatch {
    pub(crate) fields: Vec<KeyField>,
    /// The new values; values of other fields are ignored.
    pub(crate) new_spec: KeySpec,
}

impl KeyPatch {
    /// Whether a new value equals the current one.
    pub(super) fn has_unchanged_value(&self, spec: &KeySpec) -> bool {
        self.fields.iter().any(|field| {
            let mut after = spec.clone();
            KeyPatch { fields: vec![*field], new_spec: self.new_spec.clone() }.apply(&mut after);
            after == *spec
        })
    }

    pub(super) fn apply(&self, spec: &mut KeySpec) {
        let new = self.new_spec.clone();
        for field in &self.fields {
            match field {
                KeyField::Name => spec.name.clone_from(&new.name),
                KeyField::Scopes => spec.scopes = new.scopes.clone(),
                KeyField::Roles => spec.roles.clone_from(&new.roles),
                KeyField::ExpiresAt => spec.expires_at = new.expires_at,
                KeyField::Customers => spec.customers.clone_from(&new.customers),
                KeyField::AllowedCidrs => spec.allowed_cidrs.clone_from(&new.allowed_cidrs),
                KeyField::RateLimits => spec.rate_limits.clone_from(&new.rate_limits),
                KeyField::Quota => spec.quota.clone_from(&new.quota),
                KeyField::Metadata => spec.metadata.clone_from(&new.metadata),
            }
        }
    }
}
