//! URLs that may hold a password: kept from logs and messages by their type, and shown without it. Where a secret may
//! come from is said here too; reading a file that holds one is `server.rs`'s.

use std::{convert::Infallible, ops::Deref, str::FromStr};

use schemars::JsonSchema;
use serde::Deserialize;

use crate::domain::connection_url;

/// A URL that may hold a password: [`SecretUrl::redacted`] is what people see of it.
#[derive(Clone, Deserialize, JsonSchema, PartialEq, Eq)]
#[serde(transparent)]
pub struct SecretUrl(String);

impl SecretUrl {
    /// The URL with any password replaced by `***`.
    #[must_use]
    pub fn redacted(&self) -> String {
        connection_url::mask_url(&self.0)
    }

    /// Whether it holds a password, or what may be a piece of one.
    #[must_use]
    pub fn has_password(&self) -> bool {
        connection_url::has_secret(&self.0)
    }

    /// The same URL with this password, which it must not have yet.
    pub(super) fn with_password(&self, password: &str) -> SecretUrl {
        let password = percent_encoding::utf8_percent_encode(password, percent_encoding::NON_ALPHANUMERIC);
        let joint = if self.0.contains('?') { '&' } else { '?' };
        SecretUrl(format!("{}{joint}password={password}", self.0))
    }
}

impl std::fmt::Debug for SecretUrl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SecretUrl")
    }
}

/// For what connects; nothing that prints takes a `&str` from here.
impl Deref for SecretUrl {
    type Target = str;

    fn deref(&self) -> &str {
        &self.0
    }
}

impl From<&str> for SecretUrl {
    fn from(text: &str) -> Self {
        SecretUrl(text.to_owned())
    }
}

impl From<String> for SecretUrl {
    fn from(text: String) -> Self {
        SecretUrl(text)
    }
}

impl FromStr for SecretUrl {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(SecretUrl(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_is_neither_shown_nor_printed_by_debug() {
        let url = SecretUrl::from("postgres://u:sesame@h/keys");
        assert_eq!(url.redacted(), "postgres://u:***@h/keys");
        assert!(url.has_password() && !format!("{url:?}").contains("sesame"));
    }

    #[test]
    fn a_password_is_added_as_a_parameter_whatever_it_holds() {
        let added = SecretUrl::from("postgres://u@h/keys").with_password("a&b =@");
        assert_eq!(&*added, "postgres://u@h/keys?password=a%26b%20%3D%40");
        let added = SecretUrl::from("postgres://u@h/keys?schema=a").with_password("b");
        assert_eq!(&*added, "postgres://u@h/keys?schema=a&password=b");
    }
}
