//! Masks credentials in text that an error message quotes. An invalid value may be a URL or a secret that was pasted
//! into the wrong place.
//!
//! `connection_url` masks settings that hold a URL more strictly.

use std::borrow::Cow;

use super::{
    connection_url::{self, ConnectionUrl, SECRET_MASK},
    token,
};

/// The fewest letters and digits in a row, with both among them, that count as random.
const MIN_RANDOM_RUN: usize = 20;

/// The fewest characters of base64url in a row, with capital and small letters and digits among them, that count as random.
const MIN_RANDOM_TEXT: usize = 32;

/// The names whose value is a secret, as a part of `name=value` or `name: value`.
const SECRET_NAMES: [&str; 11] = [
    "password",
    "passwd",
    "pwd",
    "passphrase",
    "pass",
    "secret",
    "token",
    "api_key",
    "apikey",
    "private_key",
    "cookie",
];

/// Names that begin a scope, such as `token:read`: a colon alone makes no secret of what follows.
const SCOPE_NAMES: [&str; 4] = ["secret", "token", "api_key", "apikey"];

/// What stands between the name and the value of a secret.
const SECRET_GAPS: [&str; 8] = ["=", ": ", " = ", "\":\"", "\": \"", "':'", "': '", ":"];

/// Masks an invalid value for a message: logins in URLs, tokens, long random strings, and the text after `password=`,
/// `Bearer ` or `Basic `.
#[must_use]
pub fn mask_value(value: &str) -> Cow<'_, str> {
    let login = mask_login(value);
    let masked = token::redact_tokens(login.as_deref().unwrap_or(value));
    match mask_secret(&masked) {
        masked if masked == value => value.into(),
        masked => masked.into_owned().into(),
    }
}

/// Whether [`mask_value`] hides something of it.
#[must_use]
pub fn looks_like_credential(value: &str) -> bool {
    mask_value(value) != value
}

/// Masks logins in URLs, and tokens, in a message that may quote values. Ids and hashes that the message is about stay.
#[must_use]
pub fn mask_message(message: &str) -> Cow<'_, str> {
    let masked = map_words(message, |word| {
        let is_login = word.contains('@') && word.contains(':') && !is_template(word);
        is_login.then(|| mask_login(word)).flatten()
    });
    let Cow::Owned(masked) = masked else { return token::redact_tokens(message) };
    token::redact_tokens(&masked).into_owned().into()
}

/// Masks the parts of a quoted value, or of the directory of a path, that look like a credential.
#[must_use]
pub fn mask_quoted(message: &str, value: &str) -> String {
    if !looks_like_credential(value) {
        return mask_message(message).into_owned();
    }
    // The whole value first, then its folders.
    let ends = value.match_indices('/').map(|(end, _)| end).rev();
    let parts =
        std::iter::once(value.len()).chain(ends).map(|end| &value[..end]).filter(|part| !part.is_empty());
    let masked = parts.fold(message.to_owned(), |message, part| message.replace(part, &mask_value(part)));
    mask_words(&masked).into_owned()
}

/// Masks every word of a message that quotes a value which looks like a credential, or pieces of it.
#[must_use]
pub fn mask_words(message: &str) -> Cow<'_, str> {
    map_words(message, |word| match mask_value(word) {
        Cow::Owned(masked) => Some(masked),
        Cow::Borrowed(_) => None,
    })
}

/// Whether a word is a template of a URL, such as `scheme://user:password@host`.
fn is_template(word: &str) -> bool {
    let plain = word.to_ascii_lowercase().replace(['[', ']'], "");
    plain.contains("user:password@")
}

/// Replaces words; `None` leaves one as it is.
fn map_words(message: &str, replacement: impl Fn(&str) -> Option<String>) -> Cow<'_, str> {
    let is_end = |letter: char| letter.is_whitespace() || "\"'`(),;".contains(letter);
    let mut masked = String::new();
    let mut is_changed = false;
    for piece in message.split_inclusive(is_end) {
        let (word, end) = piece.split_at(piece.trim_end_matches(is_end).len());
        match replacement(word) {
            Some(replaced) => {
                is_changed = true;
                masked += &replaced;
            }
            None => masked += word,
        }
        masked += end;
    }
    if is_changed { masked.into() } else { message.into() }
}

/// Removes the login from a value; `None` = the value has no login.
fn mask_login(value: &str) -> Option<String> {
    if value.contains("://") {
        let masked = connection_url::mask_url(value);
        if masked == value {
            return None;
        }
        // An unknown scheme may be a part of a password only if a login fits before the host.
        let is_plain = ConnectionUrl::parse(value)
            .is_ok_and(|url| url.user.is_none() && url.query.is_none() && url.fragment.is_none());
        return (!is_plain).then_some(masked);
    }
    let (login, _) = value.rsplit_once('@')?;
    login.contains(':').then(|| connection_url::mask_url(value))
}

/// Removes the text after the name of a secret, and random strings.
fn mask_secret(value: &str) -> Cow<'_, str> {
    if let Some(start) = secret_start(value) {
        return format!("{}{SECRET_MASK}", &value[..start]).into();
    }
    let mut masked = String::new();
    let mut copied = 0;
    for (start, run) in runs(value) {
        if is_random(run) {
            masked += &value[copied..start];
            masked += SECRET_MASK;
            copied = start + run.len();
        }
    }
    if copied == 0 {
        return value.into();
    }
    masked += &value[copied..];
    masked.into()
}

/// Where the value of a named secret begins.
fn secret_start(value: &str) -> Option<usize> {
    let small = value.to_ascii_lowercase();
    let named = SECRET_NAMES.iter().flat_map(|name| small.match_indices(name)).filter_map(|(at, name)| {
        let end = at + name.len();
        let rest = &small[end..];
        let gap = SECRET_GAPS.into_iter().find(|gap| rest.starts_with(gap))?;
        let is_scope = gap == ":" && SCOPE_NAMES.contains(&name);
        (!is_scope).then_some(end + gap.len())
    });
    let schemes = ["bearer ", "basic "].into_iter();
    let schemes = schemes.filter_map(|scheme| small.find(scheme).map(|at| at + scheme.len()));
    named.chain(schemes).filter(|start| *start < value.len()).min()
}

/// The runs of characters of base64 without `/`, which is the mark of a path, each with its place.
fn runs(value: &str) -> impl Iterator<Item = (usize, &str)> {
    let is_part = |letter: char| letter.is_ascii_alphanumeric() || "+=_-".contains(letter);
    let mut rest = 0;
    std::iter::from_fn(move || {
        let start = rest + value[rest..].find(is_part)?;
        let run = &value[start..];
        let run = &run[..run.find(|letter| !is_part(letter)).unwrap_or(run.len())];
        rest = start + run.len();
        Some((start, run))
    })
}

fn is_random(run: &str) -> bool {
    let has = |text: &str, is: fn(&u8) -> bool| text.as_bytes().iter().any(is);
    let has_digit = |text: &str| has(text, u8::is_ascii_digit);
    let is_random_piece = |piece: &str| {
        piece.len() >= MIN_RANDOM_RUN && has_digit(piece) && has(piece, u8::is_ascii_alphabetic)
    };
    run.split(|letter: char| !letter.is_ascii_alphanumeric()).any(is_random_piece)
        || run.len() >= MIN_RANDOM_TEXT
            && has_digit(run)
            && has(run, u8::is_ascii_uppercase)
            && has(run, u8::is_ascii_lowercase)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_value_that_looks_like_a_credential_is_masked() {
        let random = "q7RkZ2mVb9XcT4nWs8Lp";
        for (value, shown) in [
            ("postgres://u:sesame@h:5432/k", "postgres://u:***@h:5432/k"),
            ("postgres://u:ses#ame@h/k", "postgres:***"),
            ("https://u:sesame@h", "https://u:***@h"),
            ("other://u:sesame@h", "***"),
            ("other://h?key=sesame", "***"),
            ("u:sesame@h:80", "***"),
            ("redis:u:sesame@h", "redis:***"),
            ("host=h user=u password=sesame dbname=k", "host=h user=u password=***"),
            ("Authorization: Bearer sesame", "Authorization: Bearer ***"),
            ("passphrase=x", "passphrase=***"),
            ("password:x", "password:***"),
            (r#"{"password":"x"}"#, r#"{"password":"***"#),
            ("PGPASSWORD:x", "PGPASSWORD:***"),
            ("Authorization: Basic dTpwYXNz", "Authorization: Basic ***"),
            ("Cookie: a=b", "Cookie: ***"),
            ("private_key=x", "private_key=***"),
            (random, "***"),
            (&format!("{random}-x_y=="), "***"),
            (&format!("/etc/{random}.pem"), "/etc/***.pem"),
            ("da39a3ee5e6b4b0d3255bfef95601890afd80709", "***"),
            ("AbC-1-AbC-2-AbC-3-AbC-4-AbC-5-AbC-6", "***"),
            (&format!("kw_live_{}", "a".repeat(49)), "kw_live_***"),
        ] {
            assert_eq!(mask_value(value), shown, "{value}");
            assert!(looks_like_credential(value), "{value}");
        }
    }

    #[test]
    fn a_value_that_is_no_credential_is_repeated_whole() {
        for value in [
            "",
            "127.0.0.1:50051",
            "[::1]:50051",
            "http://127.0.0.1:50053/auth",
            "unix:/run/keyward.sock",
            "spiffe://example.org/envoy",
            "/var/lib/keyward/production.2026-12-01/keyward.db",
            "ops@example.org",
            "token:read",
            "secret/manage:read",
            "0190a1b2-c3d4-7e5f-8a9b-0c1d2e3f4a5b",
            "x-http-method-override",
            "keyward-7f9c8d6b54-x2x9z",
            "strict",
            "é\u{202e}",
        ] {
            assert_eq!(mask_value(value), value);
            assert_eq!(mask_message(value), value);
        }
    }

    #[test]
    fn a_message_is_masked_where_it_quotes_a_login_or_a_token() {
        let token = format!("kw_live_{}", "a".repeat(49));
        let hash = "da39a3ee5e6b4b0d3255bfef95601890afd80709";
        for (message, shown) in [
            ("no file \"postgres://u:sesame@h/k\", try again", "no file \"postgres://u:***@h/k\", try again"),
            ("invalid value 'u:sesame@h' for '--x'", "invalid value '***' for '--x'"),
            (&format!("{token}: unknown"), "kw_live_***: unknown"),
            (&format!("hash {hash}: use http://HOST:PORT, or a@b"), ""),
            ("write postgres://USER@HOST:5432/DATABASE", ""),
            ("must be redis://[[USER]:PASSWORD@]HOST[:PORT][/DB], rediss://", ""),
        ] {
            assert_eq!(mask_message(message), if shown.is_empty() { message } else { shown });
        }
        let value = "postgres://u:a ses#ame@h/k";
        let quoted = mask_quoted("the folder postgres://u:a ses#ame@h is missing", value);
        assert_eq!(quoted, "the folder postgres:*** is missing");
        assert_eq!(mask_quoted("the folder a/b is missing", "a/b/c"), "the folder a/b is missing");
        assert_eq!(mask_words(&format!("the folder {hash} is missing")), "the folder *** is missing");
    }

    const SECRET: &str = "[A-Z]{3}[0-9][A-Za-z0-9]{16,40}";

    proptest! {
        #[test]
        fn nothing_of_a_random_string_is_left_wherever_it_is_pasted(
            secret in SECRET, before in "[ -~é]{0,8}[ /:.,\"]", after in "[ /:.,\"][ -~é]{0,8}", at in 0_usize..5
        ) {
            let value = [
                secret.clone(),
                format!("{before}{secret}{after}"),
                format!("postgres://u:{secret}@h/k"),
                format!("postgres://u:{secret}@h:5432/{secret}"),
                format!("password={secret}"),
            ][at].clone();
            let masked = mask_value(&value);
            prop_assert!(!masked.contains(&secret[..8]) || before.contains(&secret[..8]), "{}", masked);
        }

        #[test]
        fn masked_text_is_masked_once_and_no_text_makes_it_panic(text in any::<String>()) {
            let masked = mask_value(&text).into_owned();
            let _ = (mask_message(&text).len(), mask_words(&text).len(), mask_value(&masked).len());
        }

        /// Short words, as names and numbers are, are never taken for a credential.
        #[test]
        fn short_words_are_repeated(words in prop::collection::vec("[a-z]{1,12}|[0-9]{1,9}", 1..6), joint in "[ /.,]") {
            let text = words.join(&joint);
            prop_assume!(!text.contains("bearer") && !text.contains("basic"));
            prop_assert_eq!(mask_value(&text), &*text);
        }
    }
}
