//! What Update changes: which fields, and to which values.

use crate::domain::key::Terms;

/// The fields that Update changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Field {
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

impl Field {
    /// The field that an update mask's path names.
    #[must_use]
    pub fn parse(path: &str) -> Option<Field> {
        Some(match path {
            "name" => Field::Name,
            "scopes" => Field::Scopes,
            "roles" => Field::Roles,
            "expires_at" => Field::ExpiresAt,
            "customers" => Field::Customers,
            "allowed_cidrs" => Field::AllowedCidrs,
            "rate_limits" => Field::RateLimits,
            "quota" => Field::Quota,
            "metadata" => Field::Metadata,
            _ => return None,
        })
    }
}

/// New values for some of a key's terms.
#[derive(Clone, Debug)]
pub struct Patch {
    /// Which.
    pub fields: Vec<Field>,
    /// The values; those of other fields are not looked at.
    pub terms: Terms,
}

impl Patch {
    /// Whether any of the new values is the old one.
    pub(super) fn repeats(&self, terms: &Terms) -> bool {
        self.fields.iter().any(|field| {
            let mut after = terms.clone();
            Patch { fields: vec![*field], terms: self.terms.clone() }.apply(&mut after);
            after == *terms
        })
    }

    pub(super) fn apply(&self, terms: &mut Terms) {
        let new = self.terms.clone();
        for field in &self.fields {
            match field {
                Field::Name => terms.name.clone_from(&new.name),
                Field::Scopes => terms.scopes = new.scopes.clone(),
                Field::Roles => terms.roles.clone_from(&new.roles),
                Field::ExpiresAt => terms.expires_at = new.expires_at,
                Field::Customers => terms.customers.clone_from(&new.customers),
                Field::AllowedCidrs => terms.allowed_cidrs.clone_from(&new.allowed_cidrs),
                Field::RateLimits => terms.rate_limits.clone_from(&new.rate_limits),
                Field::Quota => terms.quota.clone_from(&new.quota),
                Field::Metadata => terms.metadata.clone_from(&new.metadata),
            }
        }
    }
}
