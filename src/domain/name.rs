//! Names and ids that come from outside: each type is parsed once, and holds only what its rule allows.

use std::{fmt, sync::Arc};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use uuid::Uuid;

use super::time::Timestamp;

/// Why a name was refused: the rule, worded so that it can follow the field's name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct NameError(pub &'static str);

macro_rules! name {
    ($(#[$doc:meta])* $type:ident, $rule:literal, $ok:expr) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize)]
        #[serde(try_from = "String")]
        pub struct $type(Arc<str>);

        impl $type {
            /// Reads a name.
            ///
            /// # Errors
            /// When it breaks the rule; the error says the rule.
            pub fn parse(text: &str) -> Result<Self, NameError> {
                $type::check(text)?;
                Ok($type(text.into()))
            }

            /// Whether a text is such a name, for whoever does not keep it.
            ///
            /// # Errors
            /// When it breaks the rule; the error says the rule.
            pub fn check(text: &str) -> Result<(), NameError> {
                let ok: fn(&str) -> bool = $ok;
                if ok(text) { Ok(()) } else { Err(NameError($rule)) }
            }

            /// The name as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:?}", &*self.0)
            }
        }

        impl Serialize for $type {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(&self.0)
            }
        }

        impl TryFrom<String> for $type {
            type Error = NameError;
            fn try_from(text: String) -> Result<Self, NameError> {
                $type::parse(&text)
            }
        }

        impl From<$type> for String {
            fn from(name: $type) -> String {
                name.as_str().to_owned()
            }
        }

        impl std::borrow::Borrow<str> for $type {
            fn borrow(&self) -> &str {
                &self.0
            }
        }
    };
}

fn visible(text: &str, most: usize) -> bool {
    (1..=most).contains(&text.len()) && text.bytes().all(|b| (0x21..=0x7e).contains(&b))
}

fn slug(text: &str, most: usize) -> bool {
    (1..=most).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_' || b == b'-')
}

name!(
    /// An account's id.
    AccountId, "must be 1-64 characters of [a-z0-9_-]", |t| slug(t, 64)
);
name!(
    /// A user's id in the product that uses Keyward; opaque here.
    UserId, "must be 1-128 visible ASCII characters", |t| visible(t, 128)
);
name!(
    /// A customer's id in the product that uses Keyward; opaque here.
    CustomerId, "must be 1-128 visible ASCII characters", |t| visible(t, 128)
);
name!(
    /// A role's name.
    RoleName, "must be 1-64 characters of [a-z0-9_-]", |t| slug(t, 64)
);
name!(
    /// An environment's name.
    EnvironmentName, "must be 1-32 characters of [a-z0-9_-]", |t| slug(t, 32)
);
name!(
    /// What a person calls a key.
    KeyName, "must be 1-255 characters without control characters",
    |t| (1..=255).contains(&t.chars().count()) && !t.chars().any(char::is_control)
);
name!(
    /// What a person calls an account.
    DisplayName, "must be 1-255 characters without control characters",
    |t| (1..=255).contains(&t.chars().count()) && !t.chars().any(char::is_control)
);
name!(
    /// A caller's name for one request, so that it can be sent again safely.
    IdempotencyKey, "must be 1-128 visible ASCII characters", |t| visible(t, 128)
);
name!(
    /// The start of a token.
    TokenPrefix, "must be 1-16 characters of [a-z0-9_], starting with a letter",
    |t| (1..=16).contains(&t.len())
        && t.as_bytes()[0].is_ascii_lowercase()
        && t.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
);
name!(
    /// An environment's short name inside a token; may be empty.
    TokenTag, "must be 0-16 characters of [a-z0-9]",
    |t| t.len() <= 16 && t.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit())
);

impl AccountId {
    /// The built-in account whose keys act on every account.
    #[must_use]
    pub fn operator() -> Self {
        AccountId("keyward".into())
    }

    /// No account: what the holder of a user key acts in when it names none. No account can have this id.
    #[must_use]
    pub fn nowhere() -> Self {
        AccountId("".into())
    }

    /// Whether this is the built-in operator account.
    #[must_use]
    pub fn is_operator(&self) -> bool {
        &*self.0 == "keyward"
    }

    /// An id that nobody chose: `acc-` and 26 characters that sort by time.
    #[must_use]
    pub fn generate(now: Timestamp, random: [u8; 10]) -> Self {
        let id = uuid::Builder::from_unix_timestamp_millis(now.as_millis(), &random).into_uuid();
        AccountId(format!("acc-{}", id.simple()).into())
    }
}

/// A key's id: a UUIDv7, so that ids sort by the time of creation.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct KeyId(Uuid);

impl KeyId {
    /// Makes an id from an instant and ten random bytes (RFC 9562, section 5.7).
    #[must_use]
    pub fn generate(now: Timestamp, random: [u8; 10]) -> Self {
        KeyId(uuid::Builder::from_unix_timestamp_millis(now.as_millis(), &random).into_uuid())
    }

    /// An id that no key has (RFC 9562, section 5.8), for a caller that is none.
    #[must_use]
    pub fn custom(bytes: [u8; 16]) -> Self {
        KeyId(uuid::Builder::from_custom_bytes(bytes).into_uuid())
    }

    /// An id that no key has, the same in every process and release for the same purpose and parts. No part may hold a
    /// zero byte.
    #[must_use]
    pub fn derived(purpose: &str, parts: &[&str]) -> Self {
        let mut sha = Sha256::new();
        sha.update(purpose);
        for part in parts {
            sha.update([0]);
            sha.update(part);
        }
        let digest: [u8; 32] = sha.finalize().into();
        let mut bytes = [0; 16];
        bytes.copy_from_slice(&digest[..16]);
        KeyId::custom(bytes)
    }

    /// Reads an id in the hyphenated form.
    ///
    /// # Errors
    /// When the text is no UUID.
    pub fn parse(text: &str) -> Result<Self, NameError> {
        Uuid::try_parse(text).map(KeyId).map_err(|_| NameError("must be a UUID"))
    }

    /// Writes the id in the hyphenated form.
    #[must_use]
    pub fn write(self, text: &mut [u8; 36]) -> &str {
        self.0.hyphenated().encode_lower(text)
    }

    /// The id's 16 bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; 16] {
        self.0.as_bytes()
    }

    /// The id from its 16 bytes.
    #[must_use]
    pub fn from_bytes(bytes: [u8; 16]) -> Self {
        KeyId(Uuid::from_bytes(bytes))
    }
}

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.hyphenated().fmt(f)
    }
}

impl fmt::Debug for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.hyphenated().fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_hold_only_what_their_rule_allows() {
        assert!(AccountId::parse("acme-1_x").is_ok());
        for bad in ["", "Acme", "a b", "é", &"a".repeat(65)] {
            assert!(AccountId::parse(bad).is_err(), "{bad:?}");
        }
        assert!(KeyName::parse(&"é".repeat(255)).is_ok(), "characters count, not bytes");
        assert!(KeyName::parse(&"é".repeat(256)).is_err());
        assert!(KeyName::parse("a\nb").is_err());
        assert!(TokenPrefix::parse("izli_sk").is_ok());
        for bad in ["", "1a", "_a", "a-b", "abcdefghijklmnopq"] {
            assert!(TokenPrefix::parse(bad).is_err(), "{bad:?}");
        }
        assert!(TokenTag::parse("").is_ok());
    }

    #[test]
    fn a_key_id_sorts_by_time_and_reads_back() {
        let early = KeyId::generate(Timestamp::from_micros(1_000_000), [255; 10]);
        let late = KeyId::generate(Timestamp::from_micros(2_000_000), [0; 10]);
        assert!(early < late);
        assert_eq!(KeyId::parse(&early.to_string()), Ok(early));
        assert!(KeyId::parse("nope").is_err());
    }
}
