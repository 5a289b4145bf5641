//! Parses the values of cells in the notations that databases, spreadsheets and APIs export: lists, instants, booleans
//! and digests.
//!
//! Error messages never repeat a value, because a file may hold tokens by mistake.

use base64::{
    Engine as _, alphabet,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};
use jiff::{Timestamp, civil, tz::TimeZone};

use crate::cli::value_format::{ExpiryArg, timestamp_from_micros};

/// Parses a list: words separated by blanks, commas or semicolons, a JSON array, or a PostgreSQL array.
pub(super) fn parse_list(text: &str) -> Result<Vec<String>, String> {
    match text.as_bytes().first() {
        Some(b'[') => serde_json::from_str(text).map_err(|_| "write a JSON array of texts".to_owned()),
        Some(b'{') => parse_postgres_array(text)
            .ok_or_else(|| "write a PostgreSQL array of texts, such as {a,b}".to_owned()),
        _ => {
            let separates = |c: char| c.is_whitespace() || matches!(c, ',' | ';');
            Ok(text.split(separates).filter(|word| !word.is_empty()).map(str::to_owned).collect())
        }
    }
}

/// Parses `{a,"b c","d\"e"}`. NULL and nested arrays are not accepted.
fn parse_postgres_array(text: &str) -> Option<Vec<String>> {
    let inner = text.strip_prefix('{')?.strip_suffix('}')?;
    if inner.trim().is_empty() {
        return Some(Vec::new());
    }
    let (mut elements, mut rest) = (Vec::new(), inner);
    loop {
        let (element, after) = match rest.trim_start().strip_prefix('"') {
            Some(quoted) => parse_quoted_element(quoted)?,
            None => parse_bare_element(rest)?,
        };
        elements.push(element);
        match after.trim_start() {
            "" => return Some(elements),
            after => rest = after.strip_prefix(',')?,
        }
    }
}

fn parse_bare_element(text: &str) -> Option<(String, &str)> {
    let (element, after) = text.split_at(text.find(',').unwrap_or(text.len()));
    let element = element.trim();
    let is_text = !element.is_empty()
        && !element.eq_ignore_ascii_case("null")
        && !element.contains(['{', '}', '"', '\\']);
    is_text.then(|| (element.to_owned(), after))
}

/// Parses the element up to its closing quote. A backslash escapes the next character.
fn parse_quoted_element(text: &str) -> Option<(String, &str)> {
    let mut element = String::new();
    let mut characters = text.char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            '"' => return Some((element, &text[at + 1..])),
            '\\' => element.push(characters.next()?.1),
            other => element.push(other),
        }
    }
    None
}

/// Parses when a key ends: never, a duration from now, or an instant. A date means its first instant; an instant without
/// a zone is in UTC.
pub(super) fn parse_expiry(text: &str) -> Result<ExpiryArg, String> {
    if ["never", "infinity"].iter().any(|never| text.eq_ignore_ascii_case(never)) {
        return Ok(ExpiryArg::Never);
    }
    if let Some(instant) = parse_unix_time(text).or_else(|| parse_iso8601(text)) {
        return Ok(ExpiryArg::At(timestamp_from_micros(instant.as_microsecond())));
    }
    ExpiryArg::parse(text).map_err(|_| {
        "write never, a duration such as 90d, or an instant such as 2027-01-31T00:00:00Z, 2027-01-31 (UTC) or \
         1801353600 (Unix seconds or milliseconds)"
            .to_owned()
    })
}

/// Since when a key has been revoked or disabled.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum DeactivatedAt {
    NotDeactivated,
    /// The key does not work, since an unknown instant.
    Unknown,
    /// This instant, which may be in the future.
    At(prost_types::Timestamp),
}

/// Parses since when a key has not worked. Zero, NULL and the zero dates of MySQL, .NET and Go mean that it works. Some
/// exports hold a boolean instead of an instant.
pub(super) fn parse_deactivated_at(text: &str) -> Result<DeactivatedAt, String> {
    let digits: String = text.chars().filter(char::is_ascii_digit).collect();
    let is_zero = !digits.is_empty()
        && text.bytes().all(|byte| byte.is_ascii_digit() || b"-:. TZ+".contains(&byte))
        && (digits.bytes().all(|byte| byte == b'0') && !text.starts_with(['-', '+'])
            || text.starts_with("0001-01-01") && digits[8..].bytes().all(|byte| byte == b'0'));
    if is_zero || ["null", "never", "infinity"].iter().any(|none| text.eq_ignore_ascii_case(none)) {
        return Ok(DeactivatedAt::NotDeactivated);
    }
    if let Ok(is_inactive) = parse_bool(text) {
        return Ok(if is_inactive { DeactivatedAt::Unknown } else { DeactivatedAt::NotDeactivated });
    }
    let instant = parse_unix_time(text).or_else(|| parse_iso8601(text)).ok_or_else(|| {
        "write the instant at which the key was deactivated, such as 2027-01-31T00:00:00Z, 2027-01-31 (UTC) or \
         1801353600, or true or false; leave it empty if the key works"
            .to_owned()
    })?;
    // Ambiguous: some exports write 0 for keys that work, others for keys that were revoked at an unknown time.
    if instant.as_microsecond() == 0 {
        return Err("1970-01-01 is ambiguous; write true, or leave it empty if the key works".to_owned());
    }
    Ok(DeactivatedAt::At(timestamp_from_micros(instant.as_microsecond())))
}

/// Parses seconds or milliseconds since 1970. Their number of digits distinguishes them, for instants from 2001 to 5138.
fn parse_unix_time(text: &str) -> Option<Timestamp> {
    let (whole, fraction) = text.split_once('.').unwrap_or((text, "0"));
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    if !digits(whole) || !digits(fraction) {
        return None;
    }
    let number: i64 = whole.parse().ok()?;
    match number {
        1_000_000_000..100_000_000_000 => Timestamp::from_second(number).ok(),
        1_000_000_000_000..100_000_000_000_000 => Timestamp::from_millisecond(number).ok(),
        _ => None,
    }
}

/// Parses an instant in ISO 8601, with or without time and zone.
fn parse_iso8601(text: &str) -> Option<Timestamp> {
    let text =
        text.strip_suffix("UTC").or_else(|| text.strip_suffix("GMT")).map(str::trim_end).unwrap_or(text);
    // Ruby writes a space before the offset.
    let joined = text.rsplit_once(' ').filter(|(_, offset)| offset.starts_with(['+', '-']));
    let joined = joined.map_or_else(|| text.to_owned(), |(time, offset)| format!("{time}{offset}"));
    if let Ok(instant) = joined.parse::<Timestamp>() {
        return Some(instant);
    }
    let has_offset = joined.get(10..).is_some_and(|time| time.contains(['+', '-', 'Z', 'z', '[']));
    let local = joined.parse::<civil::DateTime>().ok().filter(|_| !has_offset)?;
    local.to_zoned(TimeZone::UTC).ok().map(|zoned| zoned.timestamp())
}

/// Parses a boolean as databases, spreadsheets and people write it.
pub(super) fn parse_bool(text: &str) -> Result<bool, String> {
    match text.to_ascii_lowercase().as_str() {
        "true" | "t" | "yes" | "y" | "1" | "on" => Ok(true),
        "false" | "f" | "no" | "n" | "0" | "off" => Ok(false),
        _ => Err("write true or false".to_owned()),
    }
}

/// Parses 64 hexadecimal digits, with PostgreSQL's `bytea` prefix or without, or base64 of either alphabet, padded or not.
pub(super) fn parse_sha256(text: &str) -> Result<Vec<u8>, String> {
    let usage = || "write the SHA-256 of the whole token: 64 hexadecimal digits, or base64".to_owned();
    let text = text.strip_prefix("\\x").unwrap_or(text);
    if text.len() == 64 {
        let pair = |pair: &[u8]| u8::from_str_radix(str::from_utf8(pair).ok()?, 16).ok();
        let good = text.bytes().all(|byte| byte.is_ascii_hexdigit());
        let bytes = good.then(|| text.as_bytes().chunks(2).map(pair).collect::<Option<Vec<u8>>>());
        return bytes.flatten().ok_or_else(usage);
    }
    let any_padding = GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent);
    let text = text.replace('-', "+").replace('_', "/");
    let bytes = GeneralPurpose::new(&alphabet::STANDARD, any_padding).decode(text).map_err(|_| usage())?;
    if bytes.len() == 32 { Ok(bytes) } else { Err(usage()) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    pub(super) const HEX: &str = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08";

    #[test]
    fn a_digest_is_hexadecimal_or_base64() {
        let bytes = parse_sha256(HEX).unwrap();
        let base64 = "n4bQgYhMfWWaL+qgxVrQFaO/TxsrC4Is0V1sFbDwCgg=";
        let url_safe = base64.replace('+', "-").replace('/', "_");
        let bytea = format!("\\x{HEX}");
        for text in [&HEX.to_uppercase(), base64, base64.trim_end_matches('='), &url_safe, &bytea] {
            assert_eq!(parse_sha256(text).as_ref(), Ok(&bytes), "{text}");
        }
        for bad in ["", "x", &HEX[1..], &format!("{}é", &HEX[2..]), "kw_live_abc", "AAAA"] {
            let error = parse_sha256(bad).unwrap_err();
            assert!(
                error.contains("SHA-256") && (bad.is_empty() || bad == "x" || !error.contains(bad)),
                "{error}"
            );
        }
    }

    #[test]
    fn a_list_is_separated_by_blanks_commas_or_semicolons_or_is_an_array() {
        for text in ["a:b c:d", "a:b,c:d", " a:b; c:d ;", "a:b,\n c:d", "[\"a:b\",\"c:d\"]", "{a:b,c:d}"] {
            assert_eq!(parse_list(text.trim()).unwrap(), ["a:b", "c:d"], "{text:?}");
        }
        assert_eq!(parse_list("{ \"a b\" , \"c\\\"d\" }").unwrap(), ["a b", "c\"d"]);
        assert_eq!((parse_list("{}").unwrap(), parse_list("[]").unwrap()), (vec![], vec![]));
        for bad in
            ["{a", "{a}b", "{NULL}", "{{a},{b}}", "{\"a}", "{a,}", "{a\"b}", "[1]", "[\"a\"", "{\"a\" b}"]
        {
            assert!(parse_list(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn an_instant_is_read_in_every_notation_that_names_one() {
        let seconds = |text: &str| match parse_expiry(text) {
            Ok(ExpiryArg::At(instant)) => Some(instant.seconds),
            _ => None,
        };
        let (day, time) = (1_801_353_600, 1_801_353_600 + 13 * 3600 + 5 * 60);
        for (text, expected) in [
            ("2027-01-31", day),
            ("2027-01-31T00:00:00Z", day),
            ("1801353600", day),
            ("1801353600.0", day),
            ("1801353600000", day),
            ("2027-01-31 13:05:00", time),
            ("2027-01-31T13:05", time),
            ("2027-01-31 13:05:00+00", time),
            ("2027-01-31 14:05:00.000+01", time),
            ("2027-01-31 13:05:00 UTC", time),
            ("2027-01-31 14:05:00 +0100", time),
            ("2027-01-31 09:05:00-04:00", time),
        ] {
            assert_eq!(seconds(text), Some(expected), "{text}");
        }
        assert!(
            matches!(parse_expiry("infinity"), Ok(ExpiryArg::Never))
                && matches!(parse_expiry("Never"), Ok(ExpiryArg::Never))
        );
        assert!(matches!(parse_expiry("90d"), Ok(ExpiryArg::In(_))));
        for unclear in
            ["01/31/2027", "31.01.2027", "46053", "2027-13-01", "1.80135E+12", "tomorrow", "2027", "-5"]
        {
            assert!(parse_expiry(unclear).is_err_and(|error| error.contains("2027-01-31")), "{unclear}");
        }
    }

    #[test]
    fn a_truth_value_is_read_as_databases_spreadsheets_and_people_write_it() {
        for (text, value) in
            [("TRUE", true), ("t", true), ("1", true), ("Yes", true), ("f", false), ("0", false)]
        {
            assert_eq!(parse_bool(text), Ok(value), "{text}");
        }
        assert!(parse_bool("maybe").is_err() && parse_bool("2").is_err());
    }

    #[test]
    fn a_zero_date_means_that_the_key_works_and_what_is_no_instant_is_refused() {
        for none in [
            "0",
            "0.0",
            "NULL",
            "null",
            "never",
            "infinity",
            "false",
            "0000-00-00",
            "0000-00-00 00:00:00",
            "0000-00-00 00:00:00.000000",
            "0001-01-01T00:00:00Z",
            "0001-01-01 00:00:00+00",
            "0001-01-01",
        ] {
            assert_eq!(parse_deactivated_at(none), Ok(DeactivatedAt::NotDeactivated), "{none}");
        }
        for (text, seconds) in [
            ("2027-01-31", 1_801_353_600),
            ("1801353600000", 1_801_353_600),
            ("0001-01-01 00:00:01", -62_135_596_799),
        ] {
            let at = DeactivatedAt::At(prost_types::Timestamp { seconds, nanos: 0 });
            assert_eq!(parse_deactivated_at(text), Ok(at), "{text}");
        }
        assert_eq!(parse_deactivated_at("t"), Ok(DeactivatedAt::Unknown));
        for unclear in
            ["gone", "-", "-0", "none", "90d", "46053", "31.01.2027", "1970-01-01T00:00:00Z", "-infinity"]
        {
            assert!(parse_deactivated_at(unclear).unwrap_err().contains("if the key works"), "{unclear}");
        }
    }

    proptest! {
        #[test]
        fn an_array_of_postgresql_reads_back(words in proptest::collection::vec("[a:\"\\\\{}, nul]{0,6}", 0..5)) {
            // As `array_out` writes it: what could be misread is quoted.
            let written = words.iter().map(|word| {
                let bare = !word.is_empty()
                    && !word.eq_ignore_ascii_case("null")
                    && !word.contains(['"', '\\', '{', '}', ',', ' ']);
                if bare { word.clone() } else { format!("\"{}\"", word.replace('\\', "\\\\").replace('"', "\\\"")) }
            });
            let written = format!("{{{}}}", written.collect::<Vec<_>>().join(","));
            prop_assert_eq!(parse_list(&written).unwrap(), words);
        }

        #[test]
        fn no_cell_makes_a_reader_panic(text in any::<String>()) {
            let _ = (parse_list(&text), parse_expiry(&text), parse_deactivated_at(&text), parse_bool(&text), parse_sha256(&text));
        }
    }
}
