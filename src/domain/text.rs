//! Decides which characters text from people may hold, brings names to one form, and escapes text that is printed.
//!
//! Names are kept in Unicode Normalization Form C (UAX #15), so that one spelling is one name. Not here: ids and slugs,
//! which are ASCII (see `name`).

use std::{borrow::Cow, fmt};

use unicode_normalization::{UnicodeNormalization as _, is_nfc};
use unicode_properties::{GeneralCategory, UnicodeGeneralCategory as _};

/// The most characters of a name.
const MAX_NAME_CHARS: usize = 255;

/// Why text was refused, worded so that it can follow the field's name. Places are counted in characters, from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TextError {
    /// The name is empty or too long; its length in characters.
    InvalidLength(usize),
    /// The name begins or ends with a blank.
    SurroundingBlank {
        /// The blank that was found.
        character: char,
        /// Its position in the text, from 1.
        position: usize,
    },
    /// The text has a character that people cannot see or type.
    Unprintable {
        /// The character that was found.
        character: char,
        /// Its position in the text, from 1.
        position: usize,
        /// What kind of character it is.
        kind: &'static str,
    },
}

impl std::error::Error for TextError {}

impl fmt::Display for TextError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            TextError::InvalidLength(length) => {
                write!(f, "has {length} characters; 1 to {MAX_NAME_CHARS} are allowed")
            }
            TextError::SurroundingBlank { character, position: at } => {
                let code = u32::from(character);
                write!(f, "must not begin or end with a blank (U+{code:04X} at character {at}); remove it")
            }
            TextError::Unprintable { character, position: at, kind } => {
                let code = u32::from(character);
                write!(f, "has U+{code:04X} at character {at}: {kind} is not allowed; remove it")
            }
        }
    }
}

/// What kind of character a printable text does not hold; `None` for a printable character.
fn unprintable_kind(character: char) -> Option<&'static str> {
    if matches!(character, ' '..='~') {
        return None;
    }
    match character.general_category() {
        GeneralCategory::Control => Some("a control character"),
        GeneralCategory::Format => Some("an invisible format character"),
        GeneralCategory::Surrogate => Some("a surrogate"),
        GeneralCategory::PrivateUse => Some("a private-use character"),
        GeneralCategory::Unassigned => Some("an unassigned character"),
        GeneralCategory::LineSeparator | GeneralCategory::ParagraphSeparator => Some("a line separator"),
        _ => None,
    }
}

fn check_characters(text: &str, is_allowed: impl Fn(char) -> bool) -> Result<(), TextError> {
    let mut characters = (1..).zip(text.chars()).filter(|(_, character)| !is_allowed(*character));
    let found = characters.find_map(|(at, character)| Some((at, character, unprintable_kind(character)?)));
    match found {
        Some((at, character, kind)) => Err(TextError::Unprintable { character, position: at, kind }),
        None => Ok(()),
    }
}

/// Checks text of several lines: printable characters, tabs and line ends.
///
/// # Errors
/// The first character that is not allowed, and its position.
pub fn check_multiline(text: &str) -> Result<(), TextError> {
    check_characters(text, |character| matches!(character, '\t' | '\n' | '\r'))
}

/// Checks a line of text without regard to its length.
///
/// # Errors
/// The first character that is not printable, and its place.
fn check_single_line(text: &str) -> Result<(), TextError> {
    check_characters(text, |_| false)
}

/// The text in Unicode Normalization Form C.
#[must_use]
pub fn normalize_nfc(text: &str) -> Cow<'_, str> {
    if text.is_ascii() || is_nfc(text) { Cow::Borrowed(text) } else { Cow::Owned(text.nfc().collect()) }
}

/// Reads a name that a person typed: 1 to 255 printable characters, without blanks around them. Gives it in Unicode
/// Normalization Form C.
///
/// # Errors
/// The first rule that the text breaks, and where.
pub fn parse_name(text: &str) -> Result<Cow<'_, str>, TextError> {
    check_single_line(text)?;
    let blank = |character: &char| character.is_whitespace();
    if let Some(character) = text.chars().next().filter(blank) {
        return Err(TextError::SurroundingBlank { character, position: 1 });
    }
    if let Some(character) = text.chars().next_back().filter(blank) {
        return Err(TextError::SurroundingBlank { character, position: text.chars().count() });
    }
    let name = normalize_nfc(text);
    match name.chars().count() {
        1..=MAX_NAME_CHARS => Ok(name),
        length => Err(TextError::InvalidLength(length)),
    }
}

/// Checks a name as it is stored: releases before names were normalized allowed everything but control characters.
pub(super) fn is_stored_name(text: &str) -> bool {
    (1..=MAX_NAME_CHARS).contains(&text.chars().count()) && !text.chars().any(char::is_control)
}

/// Shows text as one line that cannot steer a terminal: each character that is not printable is written as an escape
/// such as `\n` or `\u{202e}`.
#[derive(Clone, Copy, Debug)]
pub struct EscapedText<'a>(pub &'a str);

impl fmt::Display for EscapedText<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Write::write_str(&mut EscapingWriter(f), self.0)
    }
}

/// Passes text on as [`EscapedText`] shows it.
pub struct EscapingWriter<W>(pub W);

impl<W: fmt::Write> fmt::Write for EscapingWriter<W> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let mut rest = text;
        while let Some((start, character)) =
            rest.char_indices().find(|(_, character)| unprintable_kind(*character).is_some())
        {
            self.0.write_str(&rest[..start])?;
            match character {
                '\n' => self.0.write_str("\\n")?,
                '\r' => self.0.write_str("\\r")?,
                '\t' => self.0.write_str("\\t")?,
                _ => write!(self.0, "{}", character.escape_unicode())?,
            }
            rest = &rest[start + character.len_utf8()..];
        }
        self.0.write_str(rest)
    }
}

/// Replaces each unprintable character in the strings of JSON text with its `\u` escape, so that the value stays the
/// same. Line ends between values stay. The text must come from a JSON writer, which leaves none in a string.
#[must_use]
pub fn escape_json(json: String) -> String {
    let needs_escape = |character: char| character != '\n' && unprintable_kind(character).is_some();
    if !json.contains(needs_escape) {
        return json;
    }
    let mut escaped = String::with_capacity(json.len() + 16);
    for character in json.chars() {
        if needs_escape(character) {
            for unit in character.encode_utf16(&mut [0; 2]) {
                escaped.push_str(&format!("\\u{unit:04x}"));
            }
        } else {
            escaped.push(character);
        }
    }
    escaped
}

/// Writes text as a basic string of TOML in one line, quotes included: each unprintable character is an escape, so that
/// the value stays the same.
#[must_use]
pub fn escape_toml(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len() + 2);
    escaped.push('"');
    for character in text.chars() {
        match character {
            '"' | '\\' => escaped.extend(['\\', character]),
            '\n' => escaped.push_str("\\n"),
            '\r' => escaped.push_str("\\r"),
            '\t' => escaped.push_str("\\t"),
            _ if unprintable_kind(character).is_none() => escaped.push(character),
            '\0'..='\u{ffff}' => escaped.push_str(&format!("\\u{:04x}", u32::from(character))),
            _ => escaped.push_str(&format!("\\U{:08x}", u32::from(character))),
        }
    }
    escaped.push('"');
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_refused_name_says_which_character_at_which_place() {
        for (text, expected) in [
            ("", "has 0 characters; 1 to 255 are allowed"),
            (&*"é".repeat(256), "has 256 characters; 1 to 255 are allowed"),
            (
                "a\u{202e}b",
                "has U+202E at character 2: an invisible format character is not allowed; remove it",
            ),
            ("é\u{200b}", "has U+200B at character 2: an invisible format character"),
            ("\u{feff}a", "has U+FEFF at character 1: an invisible format character"),
            ("a\tb", "has U+0009 at character 2: a control character"),
            ("a\u{9b}31m", "has U+009B at character 2: a control character"),
            ("a\u{7f}", "has U+007F at character 2: a control character"),
            ("a\u{2028}b", "has U+2028 at character 2: a line separator"),
            ("\u{e000}", "has U+E000 at character 1: a private-use character"),
            ("\u{10ffff}", "has U+10FFFF at character 1: an unassigned character"),
            ("a\u{378}", "has U+0378 at character 2: an unassigned character"),
            (" a", "must not begin or end with a blank (U+0020 at character 1); remove it"),
            ("a\u{3000}", "must not begin or end with a blank (U+3000 at character 2); remove it"),
            ("\u{a0}", "must not begin or end with a blank (U+00A0 at character 1)"),
        ] {
            let error = parse_name(text).unwrap_err().to_string();
            assert!(error.starts_with(expected), "{text:?}: {error}");
        }
    }

    #[test]
    fn a_name_is_what_people_of_any_language_type() {
        for name in ["deploy", "a b", "déploiement", "本番", "مفتاح", "ключ", "🔑 prod", "a\u{a0}b", "Ⅷ"]
        {
            assert_eq!(parse_name(name).as_deref(), Ok(name));
        }
        assert_eq!(
            parse_name(&"e\u{301}".repeat(255)).as_deref(),
            Ok(&*"é".repeat(255)),
            "counted as it is kept"
        );
        assert_eq!(parse_name("\u{1100}\u{1161}\u{11a8}").as_deref(), Ok("각"));
        assert_eq!(parse_name("\u{212b}").as_deref(), Ok("Å"));
    }

    #[test]
    fn lines_hold_tabs_and_line_ends_and_no_other_control() {
        assert_eq!(check_multiline("{\r\n\t\"a\": 1\n}"), Ok(()));
        for bad in ["\u{1b}[2J", "a\u{85}b", "\u{2066}a", "\0"] {
            assert!(check_multiline(bad).is_err(), "{bad:?}");
        }
        assert!(check_single_line("a\nb").is_err());
    }

    /// The standard library's own tables decide the same, but for characters that one of both does not know yet.
    #[test]
    fn what_is_printable_agrees_with_the_standard_library() {
        let mut newer = 0;
        for character in '\0'..=char::MAX {
            let std_escapes = character.escape_debug().to_string().starts_with("\\u{");
            let is_mark =
                character.general_category_group() == unicode_properties::GeneralCategoryGroup::Mark;
            match unprintable_kind(character) {
                Some("an unassigned character") => {}
                Some(kind) => {
                    let escaped = std_escapes || matches!(character, '\0' | '\t' | '\n' | '\r');
                    assert!(escaped, "{character:?} is {kind}");
                }
                None if std_escapes && !character.is_whitespace() && !is_mark => newer += 1,
                None => {}
            }
        }
        // Unicode 18 has 13,000 characters more than Unicode 17.
        assert!(newer < 20_000, "{newer} characters are printable here alone");
    }

    /// Decomposes the few letters that the property tests are made of, by a table written by hand, and puts marks in
    /// their canonical order: below (202, 220) before above (230).
    fn canonical(text: &str) -> Vec<char> {
        let class = |mark: char| match mark {
            '\u{327}' => 202,
            '\u{323}' => 220,
            '\u{301}' | '\u{30a}' | '\u{302}' => 230,
            _ => 0,
        };
        let mut characters: Vec<char> = Vec::new();
        for character in text.chars() {
            match character {
                'é' => characters.extend(['e', '\u{301}']),
                'Å' | '\u{212b}' => characters.extend(['A', '\u{30a}']),
                'ẹ' => characters.extend(['e', '\u{323}']),
                'ệ' => characters.extend(['e', '\u{323}', '\u{302}']),
                'ê' => characters.extend(['e', '\u{302}']),
                'ȩ' => characters.extend(['e', '\u{327}']),
                'ế' => characters.extend(['e', '\u{302}', '\u{301}']),
                'Á' => characters.extend(['A', '\u{301}']),
                'Â' => characters.extend(['A', '\u{302}']),
                'Ạ' => characters.extend(['A', '\u{323}']),
                'Ậ' => characters.extend(['A', '\u{323}', '\u{302}']),
                'Ấ' => characters.extend(['A', '\u{302}', '\u{301}']),
                'Ǻ' => characters.extend(['A', '\u{30a}', '\u{301}']),
                other => characters.push(other),
            }
        }
        // A bubble sort that moves no mark past a letter or a mark of its class.
        for _ in 0..characters.len() {
            for at in 1..characters.len() {
                let (left, right) = (class(characters[at - 1]), class(characters[at]));
                if right != 0 && left > right {
                    characters.swap(at - 1, at);
                }
            }
        }
        characters
    }

    fn spelling() -> impl Strategy<Value = String> {
        let letters = "eéêẹệȩAÅ\u{212b}x\u{301}\u{302}\u{30a}\u{323}\u{327}".chars().collect::<Vec<_>>();
        prop::collection::vec(prop::sample::select(letters), 1..6)
            .prop_map(|letters| letters.into_iter().collect())
    }

    fn nasty() -> impl Strategy<Value = String> {
        let character = prop_oneof![
            any::<char>(),
            prop::sample::select(
                "\u{1b}\u{9b}\u{7f}\0\t\n\r \u{a0}\u{202e}\u{2066}\u{200d}\u{feff}\u{2028}\u{e000}\"\\aé"
                    .chars()
                    .collect::<Vec<_>>()
            ),
        ];
        prop::collection::vec(character, 0..12).prop_map(|characters| characters.into_iter().collect())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn two_spellings_are_one_name_exactly_when_they_decompose_alike(one in spelling(), other in spelling()) {
            prop_assert_eq!(normalize_nfc(&one) == normalize_nfc(&other), canonical(&one) == canonical(&other));
            prop_assert_eq!(canonical(&normalize_nfc(&one)), canonical(&one));
        }

        #[test]
        fn a_name_that_was_read_is_printable_trimmed_and_reads_as_itself(text in nasty()) {
            match parse_name(&text) {
                Ok(name) => {
                    prop_assert!(!name.chars().any(|character| unprintable_kind(character).is_some()));
                    prop_assert_eq!(name.trim(), &*name);
                    prop_assert_eq!(parse_name(&name), Ok(Cow::Borrowed(&*name)));
                    prop_assert!(is_stored_name(&name));
                    prop_assert_eq!(EscapedText(&name).to_string(), name);
                }
                Err(TextError::Unprintable { character, position: at, .. }) => {
                    prop_assert_eq!(text.chars().nth(at - 1), Some(character));
                    let before = text.chars().take(at - 1);
                    prop_assert!(before.into_iter().all(|character| unprintable_kind(character).is_none()));
                }
                Err(TextError::SurroundingBlank { character, position: at }) => {
                    prop_assert!(character.is_whitespace() && (at == 1 || at == text.chars().count()));
                }
                Err(TextError::InvalidLength(length)) => prop_assert_eq!(length, 0),
            }
        }

        #[test]
        fn nothing_unprintable_is_left_by_an_escape(text in nasty()) {
            let shown = EscapedText(&text).to_string();
            prop_assert!(!shown.chars().any(|character| unprintable_kind(character).is_some()), "{shown:?}");
            let naive: String = text
                .chars()
                .map(|character| match character {
                    '\n' => "\\n".to_owned(),
                    '\r' => "\\r".to_owned(),
                    '\t' => "\\t".to_owned(),
                    other if unprintable_kind(other).is_some() => format!("\\u{{{:x}}}", u32::from(other)),
                    other => other.to_string(),
                })
                .collect();
            prop_assert_eq!(shown, naive);
        }

        #[test]
        fn escaped_toml_is_the_same_value_in_printable_characters(text in nasty()) {
            let line = format!("key = {}", escape_toml(&text));
            prop_assert!(!line.chars().any(|character| unprintable_kind(character).is_some()), "{line:?}");
            let table: toml::Table = toml::from_str(&line).unwrap();
            prop_assert_eq!(table["key"].as_str(), Some(&*text));
        }

        #[test]
        fn escaped_json_is_the_same_value_in_printable_characters(text in nasty(), key in nasty()) {
            let value = serde_json::json!({ key: [text] });
            for json in [serde_json::to_string(&value).unwrap(), serde_json::to_string_pretty(&value).unwrap()] {
                let escaped = escape_json(json);
                let printable = |character: char| character == '\n' || unprintable_kind(character).is_none();
                prop_assert!(escaped.chars().all(printable), "{escaped:?}");
                prop_assert_eq!(&serde_json::from_str::<serde_json::Value>(&escaped).unwrap(), &value);
            }
        }
    }
}
