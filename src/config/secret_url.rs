//! A URL that may hold a password: its type keeps it out of logs and messages, which show it without the password.

use std::{convert::Infallible, ops::Deref, str::FromStr};

use schemars::JsonSchema;
use serde::Deserialize;

use crate::domain::connection_url;

/// A URL that may hold a password. People see only [`SecretUrl::redacted`].
#[derive(Clone, Deserialize, JsonSchema, PartialEq, Eq)]
#[serde(transparent)]
pub struct SecretUrl(String);

impl SecretUrl {
    /// The URL with any password replaced by `***`.
    #[must_use]
    pub fn redacted(&self) -> String {
        connection_url::mask_url(&self.0)
    }

    /// Whether the URL holds a password, or a part that may belong to one.
    #[must_use]
    pub fn has_password(&self) -> bool {
        connection_url::has_secret(&self.0)
    }

    /// Adds a password to a URL without one.
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

/// For connecting only; do not print the text.
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
