//! Validated names and ids from outside: each type is parsed once, and holds only values that its rule allows.

use std::{borrow::Cow, fmt, sync::Arc};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use uuid::Uuid;

use super::{
    text::{self, TextError},
    time::Timestamp,
};

/// Why a name was refused: the rule, worded so that it can follow the field's name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct NameError(pub &'static str);

/// Defines a type that wraps text, with its display, comparison and serialization.
macro_rules! text_type {
    ($(#[$doc:meta])* $type:ident) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize)]
        #[serde(try_from = "String")]
        pub struct $type(Arc<str>);

        impl $type {
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

/// Defines a name of ASCII characters with one rule for every source.
macro_rules! ascii_name {
    ($(#[$doc:meta])* $type:ident, $rule:literal, $ok:expr) => {
        text_type! { $(#[$doc])* $type }

        impl $type {
            /// Parses and validates a name.
            ///
            /// # Errors
            /// If the text breaks the rule; the error states the rule.
            pub fn parse(text: &str) -> Result<Self, NameError> {
                $type::check(text)?;
                Ok($type(text.into()))
            }

            /// Whether a text is such a name, without keeping it.
            ///
            /// # Errors
            /// If the text breaks the rule; the error states the rule.
            pub fn check(text: &str) -> Result<(), NameError> {
                let ok: fn(&str) -> bool = $ok;
                if ok(text) { Ok(()) } else { Err(NameError($rule)) }
            }
        }

        impl TryFrom<String> for $type {
            type Error = NameError;
            fn try_from(text: String) -> Result<Self, NameError> {
                $type::parse(&text)
            }
        }
    };
}

/// Defines a name in any language. Requests must follow the rules of [`text::parse_name`]. Names that older releases
/// stored under looser rules stay readable through serde.
macro_rules! display_name {
    ($(#[$doc:meta])* $type:ident) => {
        text_type! { $(#[$doc])* $type }

        impl $type {
            /// Reads a name that a person typed, into Unicode Normalization Form C.
            ///
            /// # Errors
            /// The rule that it breaks, and at which character.
            pub fn parse(text: &str) -> Result<Self, TextError> {
                text::parse_name(text).map(|name| $type((&*name).into()))
            }

            /// Reads a stored name as it is.
            ///
            /// # Errors
            /// When no release could have stored it.
            pub fn from_stored(text: &str) -> Result<Self, NameError> {
                $type::check_stored(text)?;
                Ok($type(text.into()))
            }

            /// Checks what [`Self::from_stored`] would read.
            ///
            /// # Errors
            /// When no release could have stored it.
            pub fn check_stored(text: &str) -> Result<(), NameError> {
                let rule = NameError("must be 1-255 characters without control characters");
                if text::is_stored_name(text) { Ok(()) } else { Err(rule) }
            }

            /// The name in Unicode Normalization Form C, in which names are compared.
            #[must_use]
            pub fn normalized(&self) -> Self {
                match text::normalize_nfc(&self.0) {
                    Cow::Borrowed(_) => self.clone(),
                    Cow::Owned(name) => $type(name.into()),
                }
            }
        }

        impl TryFrom<String> for $type {
            type Error = NameError;
            fn try_from(text: String) -> Result<Self, NameError> {
                $type::from_stored(&text)
            }
        }
    };
}

fn is_visible_ascii(text: &str, max: usize) -> bool {
    (1..=max).contains(&text.len()) && text.bytes().all(|b| (0x21..=0x7e).contains(&b))
}

fn is_slug(text: &str, max: usize) -> bool {
    (1..=max).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_' || b == b'-')
}

ascii_name!(
    /// An account's id. Ids are compared exactly; no two accounts have ids that differ in case alone.
    AccountId, "must be 1-64 characters of [A-Za-z0-9_-]",
    |t| (1..=64).contains(&t.len()) && t.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-')
);
ascii_name!(
    /// A user's id in the product that uses Keyward; opaque here.
    UserId, "must be 1-128 visible ASCII characters", |t| is_visible_ascii(t, 128)
);
ascii_name!(
    /// A customer's id in the product that uses Keyward; opaque here.
    CustomerId, "must be 1-128 visible ASCII characters", |t| is_visible_ascii(t, 128)
);
ascii_name!(
    /// The name of a role.
    RoleName, "must be 1-64 characters of [a-z0-9_-]", |t| is_slug(t, 64)
);
ascii_name!(
    /// The name of an environment.
    EnvironmentName, "must be 1-32 characters of [a-z0-9_-]", |t| is_slug(t, 32)
);
display_name!(
    /// What a person calls a key.
    KeyName
);
display_name!(
    /// What a person calls an account.
    DisplayName
);
ascii_name!(
    /// A caller's name for one request, so that it can be sent again safely.
    IdempotencyKey, "must be 1-128 visible ASCII characters", |t| is_visible_ascii(t, 128)
);
ascii_name!(
    /// The start of a token.
    TokenPrefix, "must be 1-16 characters of [a-z0-9_], starting with a letter",
    |t| (1..=16).contains(&t.len())
        && t.as_bytes()[0].is_ascii_lowercase()
        && t.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
);
ascii_name!(
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

    /// No account: the account of a user key's caller that names none. No account can have this id.
    #[must_use]
    pub fn unspecified() -> Self {
        AccountId("".into())
    }

    /// Whether this is the built-in operator account.
    #[must_use]
    pub fn is_operator(&self) -> bool {
        &*self.0 == "keyward"
    }

    /// The id in lower case, in which no two accounts may be equal.
    #[must_use]
    pub fn to_case_folded(&self) -> String {
        self.0.to_ascii_lowercase()
    }

    /// A generated id: `acc-` and 26 characters that sort by time.
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

    /// An id that no key has (RFC 9562, section 5.8), for a caller without a key.
    #[must_use]
    pub fn from_custom_bytes(bytes: [u8; 16]) -> Self {
        KeyId(uuid::Builder::from_custom_bytes(bytes).into_uuid())
    }

    /// An id that no key has, the same in every process and release for the same purpose and parts. No part may hold a
    /// zero byte.
    #[must_use]
    pub fn from_purpose(purpose: &str, parts: &[&str]) -> Self {
        let mut sha = Sha256::new();
        sha.update(purpose);
        for part in parts {
            sha.update([0]);
            sha.update(part);
        }
        let digest: [u8; 32] = sha.finalize().into();
        let mut bytes = [0; 16];
        bytes.copy_from_slice(&digest[..16]);
        KeyId::from_custom_bytes(bytes)
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
    pub fn encode_hyphenated(self, text: &mut [u8; 36]) -> &str {
        self.0.hyphenated().encode_lower(text)
    }

    /// The id in its binary form.
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
        for good in ["acme-1_x", "org_2abCD", "Acme", "0", &"a".repeat(64)] {
            assert!(AccountId::parse(good).is_ok(), "{good:?}");
        }
        for bad in ["", "a b", "é", "a.b", "a/b", &"a".repeat(65)] {
            assert!(AccountId::parse(bad).is_err(), "{bad:?}");
        }
        for bad in ["", "Agent", "org:admin"] {
            assert!(RoleName::parse(bad).is_err(), "{bad:?}");
        }
        assert!(TokenPrefix::parse("izli_sk").is_ok());
        for bad in ["", "1a", "_a", "a-b", "abcdefghijklmnopq"] {
            assert!(TokenPrefix::parse(bad).is_err(), "{bad:?}");
        }
        assert!(TokenTag::parse("").is_ok());
    }

    #[test]
    fn the_operator_account_has_one_spelling() {
        assert!(AccountId::parse("keyward").unwrap().is_operator());
        for other in ["Keyward", "KEYWARD"] {
            let id = AccountId::parse(other).unwrap();
            assert!(!id.is_operator() && id.to_case_folded() == AccountId::operator().as_str(), "{other}");
        }
    }

    #[test]
    fn a_name_is_normalized_when_it_is_typed_and_kept_as_it_is_when_it_is_stored() {
        let (typed, stored) =
            (KeyName::parse("e\u{301}").unwrap(), KeyName::from_stored("e\u{301}").unwrap());
        assert_eq!((typed.as_str(), stored.as_str()), ("\u{e9}", "e\u{301}"));
        assert_eq!(stored.normalized(), typed);
        assert_eq!(
            serde_json::from_str::<KeyName>("\"e\u{301}\"").unwrap(),
            stored,
            "the log holds it as it was"
        );
        for old in [" blank ", "a\u{202e}b", "a\u{200b}"] {
            assert!(KeyName::parse(old).is_err() && KeyName::from_stored(old).is_ok(), "{old:?}");
        }
        assert!(KeyName::from_stored("a\nb").is_err());
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
