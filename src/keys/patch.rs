//! What Update changes: which fields, and to which values.

use crate::domain::key::KeySpec;

/// The fields that Update changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum KeyField {
    /// `name`
    Name,
    /// `scopes`
    Scopes,
    /// `roles`
    Roles,
    /// `expires_at`
    ExpiresAt,
    /// `customers`
    Customers,
    /// `allowed_cidrs`
    AllowedCidrs,
    /// `rate_limits`
    RateLimits,
    /// `quota`
    Quota,
    /// `metadata`
    Metadata,
}

impl KeyField {
    /// The field that an update mask's path names.
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

/// New values for some of a key's terms.
#[derive(Clone, Debug)]
pub(crate) struct KeyPatch {
    /// Which.
    pub(crate) fields: Vec<KeyField>,
    /// The values; those of other fields are not looked at.
    pub(crate) new_spec: KeySpec,
}

impl KeyPatch {
    /// Whether any of the new values is the old one.
    pub(super) fn has_unchanged_value(&self, terms: &KeySpec) -> bool {
        self.fields.iter().any(|field| {
            let mut after = terms.clone();
            KeyPatch { fields: vec![*field], new_spec: self.new_spec.clone() }.apply(&mut after);
            after == *terms
        })
    }

    pub(super) fn apply(&self, terms: &mut KeySpec) {
        let new = self.new_spec.clone();
        for field in &self.fields {
            match field {
                KeyField::Name => terms.name.clone_from(&new.name),
                KeyField::Scopes => terms.scopes = new.scopes.clone(),
                KeyField::Roles => terms.roles.clone_from(&new.roles),
                KeyField::ExpiresAt => terms.expires_at = new.expires_at,
                KeyField::Customers => terms.customers.clone_from(&new.customers),
                KeyField::AllowedCidrs => terms.allowed_cidrs.clone_from(&new.allowed_cidrs),
                KeyField::RateLimits => terms.rate_limits.clone_from(&new.rate_limits),
                KeyField::Quota => terms.quota.clone_from(&new.quota),
                KeyField::Metadata => terms.metadata.clone_from(&new.metadata),
            }
        }
    }
}
