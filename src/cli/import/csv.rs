//! Rows of separated values as RFC 4180 describes them, whatever separates the fields. Fields may be in quotes, and then
//! hold separators, line ends and doubled quotes. Lines end in LF, CR LF or CR; rows whose fields are all blank are
//! skipped.
//!
//! A row that breaks the rules ends at the end of its first line, so that a stray quote costs one row and not the rest
//! of the file. That is why this is not the csv crate: it has no rule for a stray quote, reads an open one to the file's
//! end, without a bound, and keeps neither the text of a row, which a rejected one is written with, nor the place where
//! reading could continue behind a broken one.

use std::io::{self, Read, Seek};

use super::text::{Line, Position, Text, trim_line_end};

const STRAY: &str = "a quote is inside a field; put the field in quotes and double the quotes in it";
const OPEN: &str = "a field's quotes are not closed";
const TOO_LONG: &str = "the row is longer than 1 MiB";
const NOT_TEXT: &str = "the row is not text in the file's encoding";

/// A row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Record {
    /// The line on which it begins, from 1.
    pub(super) line: u64,
    /// As it is in the file, without the last line end.
    pub(super) raw: String,
    /// The fields, or why there are none.
    pub(super) fields: Result<Vec<String>, &'static str>,
}

/// Reads the next row that is not blank.
pub(super) fn next<R: Read + Seek>(text: &mut Text<R>, separator: char) -> io::Result<Option<Record>> {
    let is_blank = |fields: &Vec<String>| fields.iter().all(|field| field.trim().is_empty());
    loop {
        match read(text, separator)? {
            Some(record) if record.fields.as_ref().is_ok_and(is_blank) => {}
            record => return Ok(record),
        }
    }
}

fn read<R: Read + Seek>(text: &mut Text<R>, separator: char) -> io::Result<Option<Record>> {
    let line = text.at().lines + 1;
    let (mut raw, mut parser) = (String::new(), Parser::new(separator));
    let mut read = text.line(&mut raw)?;
    let first: (usize, Position) = (raw.len(), text.at());
    let mut parsed = 0;
    let problem = loop {
        match read {
            Line::End if parsed == 0 => return Ok(None),
            Line::End => break OPEN,
            Line::TooLong => break TOO_LONG,
            Line::NotText => break NOT_TEXT,
            Line::Whole => match parser.line(&raw[parsed..]) {
                Ok(true) => {
                    raw.truncate(trim_line_end(&raw).len());
                    return Ok(Some(Record { line, raw, fields: Ok(parser.fields) }));
                }
                Ok(false) => {}
                Err(problem) => break problem,
            },
        }
        parsed = raw.len();
        read = text.line(&mut raw)?;
    };
    text.go_to(first.1)?;
    raw.truncate(first.0);
    raw.truncate(trim_line_end(&raw).len());
    Ok(Some(Record { line, raw, fields: Err(problem) }))
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Before the first character of a field.
    Start,
    Plain,
    Quoted,
    /// After a quote inside quotes: their end, or the first of two.
    Quote,
}

#[derive(Debug)]
struct Parser {
    separator: char,
    state: State,
    field: String,
    fields: Vec<String>,
}

impl Parser {
    fn new(separator: char) -> Parser {
        Parser { separator, state: State::Start, field: String::new(), fields: Vec::new() }
    }

    /// Takes a line; true if the row ends with it.
    fn line(&mut self, line: &str) -> Result<bool, &'static str> {
        let text = trim_line_end(line);
        text.chars().try_for_each(|character| self.character(character))?;
        if self.state == State::Quoted {
            self.field.push_str(&line[text.len()..]);
            return Ok(false);
        }
        self.fields.push(std::mem::take(&mut self.field));
        Ok(true)
    }

    fn character(&mut self, character: char) -> Result<(), &'static str> {
        self.state = match (self.state, character) {
            (State::Start, '"') => State::Quoted,
            (State::Quoted, '"') => State::Quote,
            (State::Start | State::Plain | State::Quote, character) if character == self.separator => {
                self.fields.push(std::mem::take(&mut self.field));
                State::Start
            }
            (State::Plain, '"') => return Err(STRAY),
            (State::Quote, character) if character != '"' => return Err(STRAY),
            (State::Quoted | State::Quote, character) => {
                self.field.push(character);
                State::Quoted
            }
            (State::Start | State::Plain, character) => {
                self.field.push(character);
                State::Plain
            }
        };
        Ok(())
    }
}

/// A field as it is written: in quotes where it needs them.
pub(super) fn field(text: &str, separator: char) -> String {
    if text.contains(['"', '\n', '\r', separator]) {
        return format!("\"{}\"", text.replace('"', "\"\""));
    }
    text.to_owned()
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use encoding_rs::{Encoding, UTF_8, UTF_16BE, UTF_16LE, WINDOWS_1252};
    use proptest::prelude::*;

    use super::{
        super::text::{MAX_ROW, tests::encoded},
        *,
    };

    /// How a file is written.
    #[derive(Clone, Copy, Debug)]
    struct Dialect {
        separator: char,
        line_end: &'static str,
        encoding: &'static Encoding,
    }

    const COMMAS: Dialect = Dialect { separator: ',', line_end: "\n", encoding: UTF_8 };

    fn dialects() -> impl Strategy<Value = Dialect> {
        let separators = prop_oneof![Just(','), Just(';'), Just('\t'), Just('|')];
        let line_ends = prop_oneof![Just("\n"), Just("\r\n"), Just("\r")];
        let encodings = prop_oneof![Just(UTF_8), Just(UTF_16LE), Just(UTF_16BE), Just(WINDOWS_1252)];
        (separators, line_ends, encodings).prop_map(|(separator, line_end, encoding)| Dialect {
            separator,
            line_end,
            encoding,
        })
    }

    /// All rows of a file from a position on, each with where the next one begins.
    fn rows(file: &[u8], dialect: Dialect, from: Option<Position>) -> Vec<(Record, Position)> {
        let mut text = Text::open(Cursor::new(file.to_vec()), Some(dialect.encoding)).unwrap();
        from.into_iter().for_each(|from| text.go_to(from).unwrap());
        std::iter::from_fn(|| Some((next(&mut text, dialect.separator).unwrap()?, text.at()))).collect()
    }

    fn fields(file: &str) -> Vec<Result<Vec<String>, &'static str>> {
        rows(file.as_bytes(), COMMAS, None).into_iter().map(|(record, _)| record.fields).collect()
    }

    fn row(fields: &[&str]) -> Result<Vec<String>, &'static str> {
        Ok(fields.iter().map(|field| (*field).to_owned()).collect())
    }

    #[test]
    fn the_examples_of_the_rfc_are_read() {
        assert_eq!(
            fields("aaa,bbb,ccc\r\nzzz,yyy,xxx\r\n"),
            [row(&["aaa", "bbb", "ccc"]), row(&["zzz", "yyy", "xxx"])]
        );
        assert_eq!(fields("aaa,bbb,ccc"), [row(&["aaa", "bbb", "ccc"])]);
        assert_eq!(
            fields("\"aaa\",\"b\r\nbb\",\"ccc\"\r\nzzz"),
            [row(&["aaa", "b\r\nbb", "ccc"]), row(&["zzz"])]
        );
        assert_eq!(fields("\"aaa\",\"b\"\"bb\",\"c,cc\""), [row(&["aaa", "b\"bb", "c,cc"])]);
        assert_eq!(fields("a,,\n\"\",b"), [row(&["a", "", ""]), row(&["", "b"])]);
    }

    #[test]
    fn blank_rows_are_skipped_and_count_as_lines() {
        let rows = rows(b"a\n\n\r\n,,,\n \t\n\"\",\" \"\nb\n", COMMAS, None);
        let lines: Vec<u64> = rows.iter().map(|(record, _)| record.line).collect();
        assert_eq!(lines, [1, 7]);
    }

    #[test]
    fn a_broken_row_costs_one_line() {
        assert_eq!(fields("a,b\"c\nd,e\n"), [Err(STRAY), row(&["d", "e"])]);
        assert_eq!(fields("\"a\"b\nd,e\n"), [Err(STRAY), row(&["d", "e"])]);
        assert_eq!(fields("x,\"a\nd,e\nf,g"), [Err(OPEN), row(&["d", "e"]), row(&["f", "g"])]);
        assert_eq!(fields("x,\"a\rd,e\rf,g"), [Err(OPEN), row(&["d", "e"]), row(&["f", "g"])]);
        let long = format!("\"{}\nd,e\n", "y\n".repeat(MAX_ROW));
        assert_eq!(fields(&long)[0], Err(TOO_LONG));
        assert_eq!(fields(&long).last(), Some(&row(&["d", "e"])));
    }

    #[test]
    fn what_is_not_text_in_the_files_encoding_is_refused() {
        let read = |file: &[u8]| rows(file, COMMAS, None).remove(0).0.fields;
        assert_eq!(read(b"a,\xff"), Err(NOT_TEXT));
        assert_eq!(read(b"\xc3,\xa9"), Err(NOT_TEXT));
    }

    fn tables() -> impl Strategy<Value = Vec<Vec<String>>> {
        proptest::collection::vec(proptest::collection::vec("(?s)[a\"é,\r\n\t;|.]{0,6}", 1..5), 0..8)
    }

    fn is_blank(row: &[String]) -> bool {
        row.iter().all(|field| field.trim().is_empty())
    }

    proptest! {
        #[test]
        fn what_is_written_in_any_dialect_reads_back_from_every_row_on(table in tables(), dialect in dialects()) {
            let Dialect { separator, line_end, encoding } = dialect;
            let write = |row: &Vec<String>| {
                row.iter().map(|text| field(text, separator)).collect::<Vec<_>>().join(&separator.to_string())
                    + line_end
            };
            let file = encoded(&table.iter().map(write).collect::<String>(), encoding);
            let expected: Vec<Vec<String>> = table.into_iter().filter(|row| !is_blank(row)).collect();
            let all = rows(&file, dialect, None);
            let read: Vec<Vec<String>> = all.iter().map(|(record, _)| record.fields.clone().unwrap()).collect();
            prop_assert_eq!(&read, &expected);
            for (place, (_, end)) in all.iter().enumerate() {
                prop_assert_eq!(&rows(&file, dialect, Some(*end))[..], &all[place + 1..]);
            }
        }

        #[test]
        fn a_file_of_the_csv_crate_is_read_as_the_csv_crate_reads_it(table in tables(), dialect in dialects()) {
            let separator = u8::try_from(dialect.separator).unwrap();
            let mut writer = csv::WriterBuilder::new().delimiter(separator).flexible(true).from_writer(Vec::new());
            table.iter().for_each(|row| writer.write_record(row).unwrap());
            let file = writer.into_inner().unwrap();
            let mut reader = csv::ReaderBuilder::new()
                .delimiter(separator)
                .has_headers(false)
                .flexible(true)
                .from_reader(&file[..]);
            let expected: Vec<Vec<String>> = reader
                .records()
                .map(|row| row.unwrap().iter().map(str::to_owned).collect())
                .filter(|row: &Vec<String>| !is_blank(row))
                .collect();
            let ours = Dialect { encoding: UTF_8, ..dialect };
            let read: Vec<Vec<String>> =
                rows(&file, ours, None).into_iter().map(|(record, _)| record.fields.unwrap()).collect();
            prop_assert_eq!(read, expected);
        }

        #[test]
        fn any_file_is_read_to_its_end_and_from_any_row_on_as_before(
            file in proptest::collection::vec(prop_oneof![Just(b'"'), Just(b','), Just(b'\n'), Just(b'\r'), any::<u8>()], 0..200),
        ) {
            let all = rows(&file, COMMAS, None);
            let mut at = Position::default();
            for (place, (record, end)) in all.iter().enumerate() {
                prop_assert!(end.bytes > at.bytes && record.line > at.lines, "{record:?}");
                prop_assert!(end.bytes <= file.len() as u64);
                prop_assert_eq!(&rows(&file, COMMAS, Some(*end)), &all[place + 1..]);
                at = *end;
            }
        }
    }
}
