//! Reads the objects of JSON files: one object per line, one array of objects, or a sequence of objects over many lines.

use std::{
    fmt,
    io::{self, Read, Seek},
};

use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, Visitor},
};
use serde_json::Value;

use super::text_reader::{LineOutcome, MAX_ROW_BYTES, TextReader, trim_line_end};

const ERR_OBJECT_TOO_LONG: &str = "the object is longer than 1 MiB";
const ERR_OBJECT_NOT_TEXT: &str = "the object is not text in the file's encoding";
const ERR_NOT_AN_OBJECT: &str = "is not a JSON object";

/// How objects are laid out in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum JsonLayout {
    /// One object per line. A malformed line does not affect others.
    Lines,
    /// One array, whose elements are the objects.
    Array,
    /// Objects one after the other, each over many lines.
    Sequence,
}

#[derive(Clone, Debug, PartialEq)]
pub(super) struct JsonObject {
    /// The number of the object's first line, from 1.
    pub(super) line: u64,
    /// The object's text in the file.
    pub(super) raw: String,
    /// The fields, or why the object is malformed.
    pub(super) fields: Result<JsonFields, &'static str>,
}

/// The fields of an object in their order, including repeated names.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct JsonFields(pub(super) Vec<(String, Value)>);

impl<'de> Deserialize<'de> for JsonFields {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<JsonFields, D::Error> {
        struct JsonFieldsVisitor;
        impl<'de> Visitor<'de> for JsonFieldsVisitor {
            type Value = JsonFields;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<JsonFields, M::Error> {
                let mut fields = Vec::new();
                while let Some(field) = map.next_entry()? {
                    fields.push(field);
                }
                Ok(JsonFields(fields))
            }
        }
        deserializer.deserialize_map(JsonFieldsVisitor)
    }
}

impl JsonLayout {
    /// Detects the layout at the beginning of a file. The opening bracket of an array is consumed.
    pub(super) fn detect<R: Read + Seek>(text: &mut TextReader<R>) -> io::Result<JsonLayout> {
        let start = text.position();
        skip_chars(text, is_blank)?;
        if text.peek_unit()? == Some(u16::from(b'[')) {
            text.consume_unit(&mut Vec::new())?;
            return Ok(JsonLayout::Array);
        }
        let mut first = String::new();
        text.read_line(&mut first)?;
        text.seek_to(start)?;
        // Only an object that continues on the next line ends too early.
        let continues = serde_json::from_str::<JsonFields>(&first).is_err_and(|error| error.is_eof());
        Ok(if continues && first.starts_with('{') { JsonLayout::Sequence } else { JsonLayout::Lines })
    }

    pub(super) fn next_object<R: Read + Seek>(
        self,
        text: &mut TextReader<R>,
    ) -> io::Result<Option<JsonObject>> {
        match self {
            JsonLayout::Lines => next_line(text),
            JsonLayout::Array => next_value(text, true),
            JsonLayout::Sequence => next_value(text, false),
        }
    }
}

fn parse_object(raw: &str) -> Result<JsonFields, &'static str> {
    serde_json::from_str(raw).map_err(|_| ERR_NOT_AN_OBJECT)
}

fn next_line<R: Read + Seek>(text: &mut TextReader<R>) -> io::Result<Option<JsonObject>> {
    loop {
        let (line, mut raw) = (text.position().lines + 1, String::new());
        let fields = match text.read_line(&mut raw)? {
            LineOutcome::End => return Ok(None),
            LineOutcome::TooLong => Err(ERR_OBJECT_TOO_LONG),
            LineOutcome::NotText => Err(ERR_OBJECT_NOT_TEXT),
            LineOutcome::Whole if raw.trim().is_empty() => continue,
            LineOutcome::Whole => parse_object(&raw),
        };
        raw.truncate(trim_line_end(&raw).len());
        return Ok(Some(JsonObject { line, raw, fields }));
    }
}

/// Reads a value up to its closing bracket, or up to the separator before the next value.
fn next_value<R: Read + Seek>(text: &mut TextReader<R>, in_array: bool) -> io::Result<Option<JsonObject>> {
    skip_chars(text, |character| is_blank(character) || in_array && character == ',')?;
    let line = text.position().lines + 1;
    let (mut bytes, mut value, mut whole) = (Vec::new(), JsonNesting::default(), true);
    while let Some(unit) = text.peek_unit()? {
        // Characters outside of ASCII occur only within strings.
        let character = char::from_u32(unit.into()).filter(char::is_ascii).unwrap_or('\u{fffd}');
        if value.is_ended_before(character) {
            break;
        }
        text.consume_unit(&mut bytes)?;
        whole = whole && bytes.len() <= MAX_ROW_BYTES;
        if !whole {
            bytes.clear();
        }
        if value.push_char(character) {
            break;
        }
    }
    if whole && bytes.is_empty() {
        return Ok(None);
    }
    let raw = whole.then(|| text.decode(&bytes).map(|raw| raw.trim().to_owned()));
    take_separators(text, in_array)?;
    let fields = match &raw {
        None => Err(ERR_OBJECT_TOO_LONG),
        Some(None) => Err(ERR_OBJECT_NOT_TEXT),
        Some(Some(raw)) => parse_object(raw),
    };
    Ok(Some(JsonObject { line, raw: raw.flatten().unwrap_or_default(), fields }))
}

/// Skips separators and the end of the array after a value, so that lines without a value are counted.
fn take_separators<R: Read + Seek>(text: &mut TextReader<R>, in_array: bool) -> io::Result<()> {
    let mut is_in_line = true;
    while let Some(unit) = text.peek_unit()? {
        let character = char::from_u32(unit.into()).unwrap_or_default();
        if !(is_blank(character) || in_array && matches!(character, ',' | ']')) {
            return Ok(());
        }
        text.consume_unit(&mut Vec::new())?;
        is_in_line = !matches!(character, '\n' | '\r');
    }
    if is_in_line {
        text.end_last_line();
    }
    Ok(())
}

/// The state of a scan through a JSON value.
#[derive(Debug, Default)]
struct JsonNesting {
    depth: usize,
    in_string: bool,
    escaped: bool,
}

impl JsonNesting {
    /// Whether this character is after the end of the value.
    fn is_ended_before(&self, character: char) -> bool {
        self.depth == 0 && !self.in_string && (matches!(character, ',' | ']') || is_blank(character))
    }

    /// Scans a character; returns whether the value ends with it.
    fn push_char(&mut self, character: char) -> bool {
        if self.in_string {
            let ends = character == '"' && !self.escaped;
            self.escaped = character == '\\' && !self.escaped;
            self.in_string = !ends;
            return ends && self.depth == 0;
        }
        match character {
            '"' => self.in_string = true,
            '{' | '[' => self.depth += 1,
            '}' | ']' => {
                self.depth = self.depth.saturating_sub(1);
                return self.depth == 0;
            }
            _ => {}
        }
        false
    }
}

fn is_blank(character: char) -> bool {
    matches!(character, ' ' | '\t' | '\n' | '\r')
}

fn skip_chars<R: Read + Seek>(text: &mut TextReader<R>, skipped: impl Fn(char) -> bool) -> io::Result<()> {
    while let Some(unit) = text.peek_unit()?
        && char::from_u32(unit.into()).is_some_and(&skipped)
    {
        text.consume_unit(&mut Vec::new())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use encoding_rs::{UTF_8, UTF_16BE, UTF_16LE};
    use proptest::prelude::*;
    use serde_json::json;

    use super::{
        super::text_reader::{FilePosition, tests::encoded},
        *,
    };

    fn open(file: &[u8]) -> (TextReader<Cursor<Vec<u8>>>, JsonLayout) {
        let mut text = TextReader::open(Cursor::new(file.to_vec()), None).unwrap();
        let layout = JsonLayout::detect(&mut text).unwrap();
        (text, layout)
    }

    /// All objects from a position on, each with where the next one begins.
    fn objects(file: &[u8], from: Option<FilePosition>) -> Vec<(JsonObject, FilePosition)> {
        let (mut text, layout) = open(file);
        from.into_iter().for_each(|from| text.seek_to(from).unwrap());
        std::iter::from_fn(|| Some((layout.next_object(&mut text).unwrap()?, text.position()))).collect()
    }

    #[test]
    fn the_layout_is_known_by_the_files_beginning() {
        for (file, layout) in [
            ("", JsonLayout::Lines),
            ("{\"a\":1}\n{\"b\":2}\n", JsonLayout::Lines),
            ("no json\n{}", JsonLayout::Lines),
            ("\n[\n{}\n]", JsonLayout::Array),
            ("[{}]", JsonLayout::Array),
            ("{\n  \"a\": 1\n}\n{}", JsonLayout::Sequence),
        ] {
            assert_eq!(open(file.as_bytes()).1, layout, "{file:?}");
        }
    }

    #[test]
    fn a_line_that_is_no_object_costs_no_other() {
        let read = objects(b"{\"a\":1}\n\n[1]\nnonsense\n{\"b\":2}", None);
        let actual: Vec<_> = read.iter().map(|(object, _)| (object.line, object.fields.is_ok())).collect();
        assert_eq!(actual, [(1, true), (3, false), (4, false), (5, true)]);
    }

    #[test]
    fn elements_of_an_array_that_are_no_objects_cost_no_other() {
        let read = objects(b"[1, \"],{\", [2], {\"a\": \"}\\\"]\"} ,null]", None);
        let actual: Vec<_> =
            read.iter().map(|(object, _)| (object.raw.as_str(), object.fields.is_ok())).collect();
        let expected = [
            ("1", false),
            ("\"],{\"", false),
            ("[2]", false),
            ("{\"a\": \"}\\\"]\"}", true),
            ("null", false),
        ];
        assert_eq!(actual, expected);
        let long = format!("[{{\"a\":\"{}\"}},{{}}]", "x".repeat(MAX_ROW_BYTES));
        let read = objects(long.as_bytes(), None);
        assert_eq!((&read[0].0.fields, read[1].0.fields.is_ok()), (&Err(ERR_OBJECT_TOO_LONG), true));
    }

    #[test]
    fn the_lines_of_a_file_are_counted_whether_or_not_a_line_end_follows_the_last_value() {
        for (file, lines) in [
            ("[{},{}]", 1),
            ("[{},{}]\n", 1),
            ("[{}, {}", 1),
            ("[\n{},\n{}\n]", 4),
            ("[\r\n{}\r\n]\r\n\r\n", 4),
            ("{\n}\n{\n}", 4),
            ("{}\n{}", 2),
        ] {
            let read = objects(file.as_bytes(), None);
            assert_eq!(read.last().unwrap().1.lines, lines, "{file:?}");
        }
    }

    #[test]
    fn fields_with_the_same_name_are_all_read() {
        let fields = parse_object("{\"a\":1,\"a\":2}").unwrap();
        assert_eq!(fields.0, [("a".to_owned(), json!(1)), ("a".to_owned(), json!(2))]);
    }

    fn text() -> impl Strategy<Value = String> {
        "[a\"\\\\{}\\[\\],é \n]{0,8}"
    }

    proptest! {
        #[test]
        fn what_is_written_in_any_layout_and_encoding_reads_back_from_every_position(
            rows in proptest::collection::vec(proptest::collection::vec((text(), text()), 1..4), 0..6),
            layout in 0..4,
            encoding in prop_oneof![Just(UTF_8), Just(UTF_16LE), Just(UTF_16BE)],
        ) {
            let values: Vec<Value> = rows
                .iter()
                .map(|row| Value::Object(row.iter().map(|(name, text)| (name.clone(), json!(text))).collect()))
                .collect();
            let each = |write: fn(&Value) -> String, between: &str| {
                values.iter().map(write).collect::<Vec<_>>().join(between)
            };
            let pretty = |value: &Value| serde_json::to_string_pretty(value).unwrap();
            let file = match layout {
                0 => each(Value::to_string, "\n"),
                1 => format!("[{}]", each(Value::to_string, ",")),
                2 => format!("[\r\n{}\r\n]\r\n", each(pretty, ",\r\n")),
                _ => each(pretty, "\n"),
            };
            let file = encoded(&file, encoding);
            let all = objects(&file, None);
            let read: Vec<Value> = all
                .iter()
                .map(|(object, _)| Value::Object(object.fields.clone().unwrap().0.into_iter().collect()))
                .collect();
            prop_assert_eq!(read, values);
            for (place, (_, end)) in all.iter().enumerate() {
                prop_assert_eq!(&objects(&file, Some(*end))[..], &all[place + 1..]);
            }
        }

        #[test]
        fn any_file_is_read_to_its_end(
            file in proptest::collection::vec(prop_oneof![
                Just(b'"'), Just(b'{'), Just(b'}'), Just(b'['), Just(b']'), Just(b','), Just(b'\n'), any::<u8>()
            ], 0..100),
        ) {
            let mut at = FilePosition::default();
            for (_, end) in objects(&file, None) {
                prop_assert!(end.bytes > at.bytes && end.bytes <= file.len() as u64);
                at = end;
            }
        }
    }
}
