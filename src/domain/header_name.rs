//! Compares names of HTTP headers as the most lenient service does: CGI, PHP and WSGI programs receive `X.Keyward_User`
//! and `x-keyward-user` under one name.
//!
//! Two names are *alike* if their letters and digits are equal without case, and every other character counts as the
//! same. `gateway` decides which headers of a request to read or remove.

/// The start of every name that is Keyward's to set.
pub const KEYWARD_PREFIX: &str = "x-keyward-";

/// The headers that identify the caller to a service.
pub const IDENTITY_HEADERS: [&str; 7] = [
    "x-keyward-key-id",
    "x-keyward-account",
    "x-keyward-user",
    "x-keyward-environment",
    "x-keyward-scopes",
    "x-keyward-truncated",
    "x-keyward-shadow",
];

/// Headers by which a client overrides the method of its request.
pub const METHOD_OVERRIDE_HEADERS: [&str; 3] =
    ["x-http-method-override", "x-http-method", "x-method-override"];

/// Headers by which a client overrides the method, path or host of its request.
pub const OVERRIDE_HEADERS: [&str; 9] = [
    METHOD_OVERRIDE_HEADERS[0],
    METHOD_OVERRIDE_HEADERS[1],
    METHOD_OVERRIDE_HEADERS[2],
    "x-original-url",
    "x-rewrite-url",
    "x-override-url",
    "x-original-host",
    "x-forwarded-prefix",
    "x-forwarded-host",
];

/// Each byte as it counts: letters in lower case, digits, and `-` for all others.
const FOLDED_BYTES: [u8; 256] = {
    let mut folded = [b'-'; 256];
    let mut byte = 0;
    while byte < 128_u8 {
        if byte.is_ascii_alphanumeric() {
            folded[byte as usize] = byte.to_ascii_lowercase();
        }
        byte += 1;
    }
    folded
};

/// Whether a lenient service takes one name for the other.
#[must_use]
pub fn is_equivalent(name: &[u8], other: &[u8]) -> bool {
    let fold = |byte: &u8| FOLDED_BYTES[usize::from(*byte)];
    name.len() == other.len() && name.iter().zip(other).all(|(one, other)| fold(one) == fold(other))
}

/// Whether a lenient service takes a name for one that begins with [`KEYWARD_PREFIX`].
#[must_use]
pub fn has_keyward_prefix(name: &[u8]) -> bool {
    name.get(..KEYWARD_PREFIX.len()).is_some_and(|start| is_equivalent(start, KEYWARD_PREFIX.as_bytes()))
}

/// Whether a text is a field name of RFC 9110, so that a proxy can remove it.
#[must_use]
pub fn is_field_name(name: &[u8]) -> bool {
    !name.is_empty()
        && name.iter().all(|byte| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(byte))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What a CGI program makes of a name, with no table and no early end.
    fn as_cgi(name: &[u8]) -> String {
        let one = |byte: &u8| match char::from(*byte) {
            letter if letter.is_ascii_alphanumeric() => letter.to_ascii_uppercase(),
            _ => '_',
        };
        name.iter().map(one).collect()
    }

    /// A name, and a spelling that is alike or nearly so.
    fn spellings() -> impl Strategy<Value = (Vec<u8>, Vec<u8>)> {
        let known = proptest::sample::select(
            [&IDENTITY_HEADERS[..], &OVERRIDE_HEADERS[..], &["x-api-key", "a", ""]].concat(),
        );
        let change = (any::<proptest::sample::Index>(), any::<u8>());
        (known, proptest::collection::vec(change, 0..4), any::<bool>()).prop_map(|(name, changes, upper)| {
            let name = name.as_bytes().to_vec();
            let mut other = if upper { name.to_ascii_uppercase() } else { name.clone() };
            for (at, byte) in changes.into_iter().filter(|_| !name.is_empty()) {
                other[at.index(name.len())] = byte;
            }
            (name, other)
        })
    }

    proptest! {
        #[test]
        fn names_are_alike_if_a_cgi_program_cannot_tell_them_apart((name, other) in spellings()) {
            prop_assert_eq!(is_equivalent(&name, &other), as_cgi(&name) == as_cgi(&other));
            prop_assert_eq!(has_keyward_prefix(&other), as_cgi(&other).starts_with(&as_cgi(KEYWARD_PREFIX.as_bytes())));
        }

        #[test]
        fn any_two_names_are_compared_as_the_model_compares_them(name: Vec<u8>, other: Vec<u8>) {
            prop_assert_eq!(is_equivalent(&name, &other), as_cgi(&name) == as_cgi(&other));
            prop_assert_eq!(has_keyward_prefix(&name), as_cgi(&name).starts_with(&as_cgi(KEYWARD_PREFIX.as_bytes())));
        }
    }

    #[test]
    fn a_separator_counts_and_which_one_does_not() {
        for name in
            ["X-Keyward-User", "x_keyward_user", "X.Keyward.User", "x~keyward|USER", "x-keyward\u{7f}user"]
        {
            assert!(
                is_equivalent(name.as_bytes(), b"x-keyward-user") && has_keyward_prefix(name.as_bytes()),
                "{name}"
            );
        }
        for name in
            ["xkeyward-user", "x--keyward-user", "-x-keyward-user", "x-keyward-user-", "x-keywarduser"]
        {
            assert!(!is_equivalent(name.as_bytes(), b"x-keyward-user"), "{name}");
        }
    }

    #[test]
    fn only_field_names_are_tokens() {
        for name in ["a", "X_Keyward.User", "!#$%&'*+-.^_`|~09azAZ"] {
            assert!(is_field_name(name.as_bytes()), "{name}");
        }
        for name in ["", "a b", "a,b", "a:b", "é", "a\"", "a/b", "a\0"] {
            assert!(!is_field_name(name.as_bytes()), "{name}");
        }
    }
}
