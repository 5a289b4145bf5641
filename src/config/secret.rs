//! URLs that may hold a password: kept from logs and messages by their type, and shown without it. Where a secret may
//! come from is said here too; reading a file that holds one is `server.rs`'s.

use std::{convert::Infallible, ops::Deref, str::FromStr};

use schemars::JsonSchema;
use serde::Deserialize;

/// What stands for a password that is there.
const MASK: &str = "***";

/// A URL that may hold a password: [`SecretUrl::shown`] is what people see of it.
#[derive(Clone, Deserialize, JsonSchema, PartialEq, Eq)]
#[serde(transparent)]
pub struct SecretUrl(String);

impl SecretUrl {
    /// The URL with any password replaced by `***`.
    #[must_use]
    pub fn shown(&self) -> String {
        masked(&self.0)
    }

    /// Whether it holds a password.
    #[must_use]
    pub fn has_password(&self) -> bool {
        self.shown() != self.0
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

/// A URL without its passwords: the one of its user, and each in a parameter. A password may hold any character as it
/// stands, so what is hidden ends at the last `@`, which is too much rather than too little.
fn masked(url: &str) -> String {
    let Some((scheme, rest)) = url.split_once("://") else { return url.to_owned() };
    let rest = match rest.rsplit_once('@') {
        Some((user, place)) => match user.split_once(':') {
            Some((user, _)) => format!("{user}:{MASK}@{place}"),
            None => rest.to_owned(),
        },
        None => rest.to_owned(),
    };
    let Some((place, parameters)) = rest.split_once('?') else { return format!("{scheme}://{rest}") };
    let parameters = parameters.split('&').map(|parameter| match parameter.split_once('=') {
        Some((name, _)) if name.contains("pass") => format!("{name}={MASK}"),
        _ => parameter.to_owned(),
    });
    format!("{scheme}://{place}?{}", parameters.collect::<Vec<_>>().join("&"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_is_masked_wherever_it_stands() {
        for (url, shown) in [
            ("postgres://u:sesame@h:5432/keys", "postgres://u:***@h:5432/keys"),
            ("postgres://u:se@sa:me@h/keys", "postgres://u:***@h/keys"),
            ("postgres://u:ses/am?e@h/keys", "postgres://u:***@h/keys"),
            ("redis://:sesame@h:6379/1", "redis://:***@h:6379/1"),
            ("postgres://u@h/keys?schema=a&password=sesame", "postgres://u@h/keys?schema=a&password=***"),
            (
                "postgres://h/keys?sslpassword=sesame&sslmode=require",
                "postgres://h/keys?sslpassword=***&sslmode=require",
            ),
        ] {
            assert_eq!(SecretUrl::from(url).shown(), shown);
            assert!(
                SecretUrl::from(url).has_password()
                    && !format!("{:?}", SecretUrl::from(url)).contains("sesame")
            );
        }
        for url in ["postgres://u@h:5432/keys?schema=a", "sqlite:keyward.db", "postgres://h:5432/keys", ""] {
            assert_eq!(SecretUrl::from(url).shown(), url);
            assert!(!SecretUrl::from(url).has_password());
        }
    }

    #[test]
    fn a_password_is_added_as_a_parameter_whatever_it_holds() {
        let added = SecretUrl::from("postgres://u@h/keys").with_password("a&b =@");
        assert_eq!(&*added, "postgres://u@h/keys?password=a%26b%20%3D%40");
        let added = SecretUrl::from("postgres://u@h/keys?schema=a").with_password("b");
        assert_eq!(&*added, "postgres://u@h/keys?schema=a&password=b");
    }
}
