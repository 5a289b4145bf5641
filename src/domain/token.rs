//! Defines the token: its format, checksum and digest. No other module knows the format.
//!
//! `{prefix}_{tag}_{43 base62 digits}{6 base62 digits}`, or without the tag where it is empty. The 43 digits are
//! 32 random bytes as one big-endian number, the 6 are the CRC-32 (IEEE) of everything before them; digits are
//! `0-9A-Za-z`, most significant first, zero-padded. The checksum explains why a token is unknown: it was mistyped. It
//! proves nothing, and it is checked after the look-up, because imported tokens may have this format with another
//! checksum.

use std::{borrow::Cow, fmt};

use serde::{Deserialize, Serialize};
use sha2::Digest as _;
use zeroize::Zeroizing;

use super::name::{TokenPrefix, TokenTag};

/// A pattern that every token of Keyward matches, for secret scanners.
pub const TOKEN_PATTERN: &str = "^[a-z][a-z0-9_]{0,32}_[0-9A-Za-z]{49}$";

/// The longest string that is looked up, in bytes.
pub const MAX_TOKEN_LEN: usize = 512;

/// The fewest bits of entropy that the token of an imported digest must have: with fewer, a reader of the database can
/// find the token.
pub const MIN_ENTROPY_BITS: u32 = 112;

/// More bits of entropy than this do not fit into [`MAX_TOKEN_LEN`] visible ASCII characters, of which there are 94.
pub const MAX_ENTROPY_BITS: u32 = 3355;

const BASE62_DIGITS: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
const BODY_DIGITS: usize = 43;
const CHECKSUM_DIGITS: usize = 6;
const HINT_DIGITS: usize = 4;

/// A token in the clear. It cannot be printed; [`Token::reveal`] is the one way out, for the one answer that
/// shows it. Its memory is wiped when it is dropped (copies inside the HTTP stack are not).
pub struct Token(Zeroizing<String>);

impl Token {
    /// Makes a token of 32 random bytes.
    #[must_use]
    pub fn generate(prefix: &TokenPrefix, tag: &TokenTag, random: &[u8; 32]) -> Token {
        let mut text = Zeroizing::new(String::with_capacity(96));
        text.push_str(prefix.as_str());
        text.push('_');
        if !tag.as_str().is_empty() {
            text.push_str(tag.as_str());
            text.push('_');
        }
        push_base62(&mut text, random, BODY_DIGITS);
        let sum = crc32fast::hash(text.as_bytes()).to_be_bytes();
        push_base62(&mut text, &sum, CHECKSUM_DIGITS);
        Token(text)
    }

    /// The token's text, only for the response to the caller that created it.
    #[must_use]
    pub fn reveal(&self) -> &str {
        &self.0
    }

    /// The digest that the store keeps.
    #[must_use]
    pub fn digest(&self) -> TokenDigest {
        TokenDigest::from_token(&self.0)
    }

    /// What lists may show of it: prefix, tag and the first four characters of the random part.
    #[must_use]
    pub fn hint(&self) -> String {
        self.0[..self.0.len() - BODY_DIGITS - CHECKSUM_DIGITS + HINT_DIGITS].to_owned()
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(..)")
    }
}

/// SHA-256 of a whole token: the stored value by which keys are found.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TokenDigest([u8; 32]);

impl TokenDigest {
    /// The digest of a token's text.
    #[must_use]
    pub fn from_token(token: &str) -> TokenDigest {
        TokenDigest(sha2::Sha256::digest(token.as_bytes()).into())
    }

    /// The digest from its 32 bytes.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 32]) -> TokenDigest {
        TokenDigest(bytes)
    }

    /// The digest as raw bytes.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Debug for TokenDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Digest(..)")
    }
}

/// In the log a digest is 64 hexadecimal digits.
impl Serialize for TokenDigest {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&HexBytes(&self.0))
    }
}

impl<'de> Deserialize<'de> for TokenDigest {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = Cow::<str>::deserialize(deserializer)?;
        parse_hex_bytes(&text)
            .map(TokenDigest)
            .ok_or_else(|| serde::de::Error::custom("a digest is 64 hexadecimal digits"))
    }
}

/// Displays bytes as lower-case hexadecimal digits.
pub(crate) struct HexBytes<'a>(pub(crate) &'a [u8]);

impl fmt::Display for HexBytes<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        // In pieces: to write each digit by itself takes several times as long.
        for piece in self.0.chunks(16) {
            let mut digits = [0; 32];
            for (pair, byte) in digits.as_chunks_mut::<2>().0.iter_mut().zip(piece) {
                *pair = [DIGITS[usize::from(byte >> 4)], DIGITS[usize::from(byte & 15)]];
            }
            f.write_str(std::str::from_utf8(&digits[..2 * piece.len()]).map_err(|_| fmt::Error)?)?;
        }
        Ok(())
    }
}

/// 32 bytes from 64 hexadecimal digits.
pub(crate) fn parse_hex_bytes(text: &str) -> Option<[u8; 32]> {
    let mut bytes = [0; 32];
    if text.len() != 64 || !text.is_ascii() {
        return None;
    }
    for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
    }
    Some(bytes)
}

/// Whether a presented string can be a token of any system: 1 to [`MAX_TOKEN_LEN`] visible ASCII characters. Everything else
/// is malformed without a look-up.
#[must_use]
pub fn can_be_token(presented: &str) -> bool {
    let bytes = presented.as_bytes();
    (1..=MAX_TOKEN_LEN).contains(&bytes.len()) && all_bytes(bytes, |b| (0x21..=0x7e).contains(&b))
}

/// Whether a string has the format of a token with a wrong checksum. Of an unknown token this means that it was
/// mistyped. A known one was imported: other systems compute other checksums.
#[must_use]
pub fn has_wrong_checksum(presented: &str) -> bool {
    let bytes = presented.as_bytes();
    matches_pattern(bytes) && !has_valid_checksum(bytes)
}

/// [`TOKEN_PATTERN`], by hand: this runs in every Check of an unknown token.
fn matches_pattern(bytes: &[u8]) -> bool {
    let Some(start) = bytes.len().checked_sub(BODY_DIGITS + CHECKSUM_DIGITS + 1) else {
        return false;
    };
    let (head, rest) = bytes.split_at(start);
    (1..=33).contains(&head.len())
        && head[0].is_ascii_lowercase()
        && all_bytes(head, |b| b.is_ascii_lowercase() | b.is_ascii_digit() | (b == b'_'))
        && rest[0] == b'_'
        && all_bytes(&rest[1..], |b| b.is_ascii_digit() | (b | 0x20).is_ascii_lowercase())
}

/// Whether all bytes are as they must be. It does not stop at the first that is not, so that many are looked at at once.
fn all_bytes(bytes: &[u8], is: impl Fn(u8) -> bool) -> bool {
    bytes.iter().fold(true, |all, byte| all & is(*byte))
}

fn has_valid_checksum(bytes: &[u8]) -> bool {
    let (text, given) = bytes.split_at(bytes.len() - CHECKSUM_DIGITS);
    let mut sum = u64::from(crc32fast::hash(text));
    given.iter().rev().all(|digit| {
        let expected = BASE62_DIGITS[(sum % 62) as usize];
        sum /= 62;
        *digit == expected
    })
}

/// Redacts a text for logs: replaces the random part of each likely token with `***`. A likely token has 32 or more
/// base62 digits after a `_`, each plain or percent-encoded; so a token that was cut short is redacted, too.
#[must_use]
pub fn redact_tokens(text: &str) -> Cow<'_, str> {
    const MIN_RUN: usize = 32;
    let bytes = text.as_bytes();
    let (mut out, mut copied) = (String::new(), 0);
    // Where the digits after a `_` begin, and how many there are so far.
    let mut run: Option<(usize, usize)> = None;
    let mut at = 0;
    loop {
        let (letter, next) = decoded_byte_at(bytes, at);
        match (&mut run, letter) {
            (Some((_, digits)), Some(letter)) if letter.is_ascii_alphanumeric() => *digits += 1,
            _ => {
                if let Some((start, _)) = run.filter(|(_, digits)| *digits >= MIN_RUN) {
                    out.push_str(&text[copied..start]);
                    out.push_str("***");
                    copied = at;
                }
                run = (letter == Some(b'_')).then_some((next, 0));
            }
        }
        if letter.is_none() {
            break;
        }
        at = next;
    }
    if copied == 0 {
        return Cow::Borrowed(text);
    }
    out.push_str(&text[copied..]);
    Cow::Owned(out)
}

/// The percent-decoded byte at a position, and the position of the next; `None` at the end.
fn decoded_byte_at(bytes: &[u8], at: usize) -> (Option<u8>, usize) {
    let hex = |at: usize| bytes.get(at).and_then(|digit| char::from(*digit).to_digit(16));
    match (bytes.get(at), hex(at + 1), hex(at + 2)) {
        (Some(b'%'), Some(high), Some(low)) => (u8::try_from(high << 4 | low).ok(), at + 3),
        (letter, ..) => (letter.copied(), at + 1),
    }
}

/// Appends `bytes`, read as one big-endian number, as exactly `digits` base62 digits. The bytes come in fours.
fn push_base62(text: &mut String, bytes: &[u8], digits: usize) {
    /// The digits that one division yields: 62^5 fits into 32 bits.
    const DIGITS_PER_DIVISION: usize = 5;
    const DIVISOR: u64 = 62u64.pow(DIGITS_PER_DIVISION as u32);
    let mut number = Zeroizing::new([0u32; 8]);
    let number = &mut number[..bytes.len() / 4];
    for (limb, [a, b, c, d]) in number.iter_mut().zip(bytes.as_chunks::<4>().0) {
        *limb = u32::from_be_bytes([*a, *b, *c, *d]);
    }
    let mut reversed = Zeroizing::new([0u8; BODY_DIGITS]);
    for part in reversed[..digits].chunks_mut(DIGITS_PER_DIVISION) {
        let mut remainder = 0;
        for limb in number.iter_mut() {
            let value = remainder << 32 | u64::from(*limb);
            *limb = (value / DIVISOR) as u32;
            remainder = value % DIVISOR;
        }
        for digit in part {
            *digit = BASE62_DIGITS[(remainder % 62) as usize];
            remainder /= 62;
        }
    }
    text.extend(reversed[..digits].iter().rev().map(|digit| char::from(*digit)));
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn token(prefix: &str, tag: &str, random: [u8; 32]) -> Token {
        Token::generate(&TokenPrefix::parse(prefix).unwrap(), &TokenTag::parse(tag).unwrap(), &random)
    }

    /// Published vectors: docs/token.md shows the same, and they must never change.
    #[test]
    fn test_vectors() {
        let counting: [u8; 32] = std::array::from_fn(|i| i as u8);
        for (prefix, tag, random, text, digest) in [
            (
                "kw",
                "live",
                [0; 32],
                "kw_live_00000000000000000000000000000000000000000000AwA6B",
                "ac122b588fd89c163a254e9c25d5c233a1761730e0be581bad84f95bdefb0952",
            ),
            (
                "kw",
                "dev",
                [255; 32],
                "kw_dev_yhjskwdA6OZ1AL1YmHWZWm8LLG7HjnuCA2j5rOw8Xp11qWSlv",
                "43cb9f5b9b6647c4ba596ff833f0b2cd11b12c70bb222531b6c8388e680a0957",
            ),
            (
                "izli_agent",
                "",
                counting,
                "izli_agent_003aUlTJC7tjlCTQj2uNU3MFagCXG9LRKRcwGkBIDlf2QdPbg",
                "4f5d5e382a16a5525377d01e890bb41ae6b5d0c3938188375fc12c1acdfd9a02",
            ),
        ] {
            let made = token(prefix, tag, random);
            assert_eq!(made.reveal(), text);
            assert_eq!(HexBytes(made.digest().as_bytes()).to_string(), digest);
        }
    }

    #[test]
    fn a_token_cannot_be_printed() {
        let made = token("kw", "live", [7; 32]);
        assert_eq!(format!("{made:?} {:?}", made.digest()), "Token(..) Digest(..)");
    }

    #[test]
    fn a_token_in_a_text_is_not_logged_however_it_is_written() {
        let made = token("kw", "live", [7; 32]);
        let (text, secret) = (made.reveal(), &made.reveal()["kw_live_".len()..]);
        let encoded: String = text.bytes().map(|byte| format!("%{byte:02X}")).collect();
        let (cut, odd) = (&text[..text.len() - 9], text.replace('_', "%5f"));
        for (text, wanted) in [
            (format!("/runs/{text}/x"), "/runs/kw_live_***/x".to_owned()),
            (format!("{text}{text}"), "kw_live_***_live_***".to_owned()),
            (cut.to_owned(), "kw_live_***".to_owned()),
            (format!("/{odd}\u{e9}"), "/kw%5flive%5f***\u{e9}".to_owned()),
            (format!("/{encoded}."), format!("/{}***.", &encoded[.."kw_live_".len() * 3])),
            ("/v1/monitors_of/7%".to_owned(), "/v1/monitors_of/7%".to_owned()),
            (secret.to_owned(), secret.to_owned()),
        ] {
            assert_eq!(redact_tokens(&text), wanted, "{text}");
        }
    }

    #[test]
    fn the_hint_shows_four_characters_of_the_random_part() {
        let made = token("izli_sk", "live", [7; 32]);
        assert_eq!(made.hint(), made.reveal()[.."izli_sk_live_".len() + 4]);
    }

    #[test]
    fn foreign_tokens_are_looked_up_whatever_they_look_like() {
        for foreign in ["abc", "sk_live_51H", "eyJhbGciOi.J9.x-_", &"x".repeat(512)] {
            assert!(can_be_token(foreign) && !has_wrong_checksum(foreign), "{foreign:?}");
        }
    }

    #[test]
    fn what_cannot_be_a_token_is_malformed() {
        for bad in ["", " ", "a b", "tok\u{e9}n", "a\n", "a\0b"] {
            assert!(!can_be_token(bad), "{bad:?}");
        }
        assert!(!can_be_token(&"x".repeat(513)));
    }

    #[test]
    fn the_most_bits_of_entropy_are_those_of_the_longest_token() {
        assert_eq!((MAX_TOKEN_LEN as f64 * 94_f64.log2()).floor() as u32, MAX_ENTROPY_BITS);
    }

    proptest! {
        #[test]
        fn every_token_matches_the_pattern_and_its_checksum_holds(random: [u8; 32], prefix in "[a-z][a-z0-9_]{0,15}", tag in "[a-z0-9]{0,16}") {
            let made = token(&prefix, &tag, random);
            prop_assert!(matches_pattern(made.reveal().as_bytes()));
            prop_assert!(can_be_token(made.reveal()) && !has_wrong_checksum(made.reveal()));
        }

        #[test]
        fn one_changed_character_is_always_noticed(random: [u8; 32], at in 8usize..57, to in 0usize..62) {
            let mut bytes = token("kw", "live", random).reveal().as_bytes().to_vec();
            prop_assume!(bytes[at] != BASE62_DIGITS[to]);
            bytes[at] = BASE62_DIGITS[to];
            prop_assert!(has_wrong_checksum(std::str::from_utf8(&bytes).unwrap()));
        }

        #[test]
        fn a_truncated_token_is_never_taken_for_a_checksummed_one(random: [u8; 32], keep in 1usize..57) {
            let made = token("kw", "live", random);
            // Shorter than the pattern requires, so it is a foreign text.
            prop_assert!(!has_wrong_checksum(&made.reveal()[..keep]));
        }

        #[test]
        fn no_string_makes_the_parser_panic(text in any::<String>()) {
            let visible = text.bytes().all(|b| (0x21..=0x7e).contains(&b));
            prop_assert_eq!(can_be_token(&text), visible && (1..=MAX_TOKEN_LEN).contains(&text.len()));
            prop_assert!(!has_wrong_checksum(&text) || can_be_token(&text));
        }

        #[test]
        fn no_text_is_logged_with_a_whole_token(
            random: [u8; 32], before in any::<String>(), after in "[^0-9A-Za-z]?.*", encode: u64
        ) {
            let made = token("kw", "live", random);
            let written: String = made.reveal().bytes().enumerate().map(|(at, byte)| {
                if encode >> (at % 64) & 1 == 1 { format!("%{byte:02x}") } else { char::from(byte).to_string() }
            }).collect();
            let logged = redact_tokens(&format!("{before}{written}{after}")).into_owned();
            let decoded = |text: &str| percent_encoding::percent_decode_str(text).decode_utf8_lossy().into_owned();
            prop_assert!(!decoded(&logged).contains(&made.reveal()[8..]), "{}", logged);
            prop_assert!(logged.contains("***"));
        }

        #[test]
        fn a_digest_survives_the_log(bytes: [u8; 32]) {
            let digest = TokenDigest::from_bytes(bytes);
            let text = serde_json::to_string(&digest).unwrap();
            prop_assert_eq!(serde_json::from_str::<TokenDigest>(&text).unwrap(), digest);
        }
    }
}
