//! Parses rows of separated values (RFC 4180) with any separator.
//!
//! Quoted fields may contain separators, line ends and doubled quotes. Lines end in LF, CR LF or CR. Blank rows are
//! skipped.
//!
//! A malformed row ends at the end of its first line, so that a stray quote costs one row and not the rest of the file.
//! The csv crate cannot do that: it reads an open quote to the end of the file, without a bound. It also keeps neither the
//! raw text of a row, which rejected rows need, nor the position after a malformed row.

use std::io::{self, Read, Seek};

use super::text_reader::{FilePosition, LineOutcome, TextReader, trim_line_end};

const ERR_STRAY_QUOTE: &str = "a field contains a quote; put the field in quotes and double the quotes in it";
const ERR_UNCLOSED_QUOTE: &str = "a field's quotes are not closed";
const ERR_ROW_TOO_LONG: &str = "the row is longer than 1 MiB";
const ERR_ROW_NOT_TEXT: &str = "the row is not text in the file's encoding";

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct CsvRecord {
    /// The number of the row's first line, from 1.
    pub(super) line: u64,
    /// The row's text in the file, without the last line end.
    pub(super) raw: String,
    /// The fields, or why the row is malformed.
    pub(super) fields: Result<Vec<String>, &'static str>,
}

/// Reads the next row that is not blank.
pub(super) fn next_record<R: Read + Seek>(
    text: &mut TextReader<R>,
    separator: char,
) -> io::Result<Option<CsvRecord>> {
    let is_blank = |fields: &Vec<String>| fields.iter().all(|field| field.trim().is_empty());
    loop {
        match read_record(text, separator)? {
            Some(record) if record.fields.as_ref().is_ok_and(is_blank) => {}
            record => return Ok(record),
        }
    }
}

fn read_record<R: Read + Seek>(text: &mut TextReader<R>, separator: char) -> io::Result<Option<CsvRecord>> {
    let line = text.position().lines + 1;
    let (mut raw, mut parser) = (String::new(), CsvParser::new(separator));
    let mut read = text.read_line(&mut raw)?;
    let first: (usize, FilePosition) = (raw.len(), text.position());
    let mut parsed = 0;
    let problem = loop {
        match read {
            LineOutcome::End if parsed == 0 => return Ok(None),
            LineOutcome::End => break ERR_UNCLOSED_QUOTE,
            LineOutcome::TooLong => break ERR_ROW_TOO_LONG,
            LineOutcome::NotText => break ERR_ROW_NOT_TEXT,
            LineOutcome::Whole => match parser.push_line(&raw[parsed..]) {
                Ok(true) => {
                    raw.truncate(trim_line_end(&raw).len());
                    return Ok(Some(CsvRecord { line, raw, fields: Ok(parser.fields) }));
                }
                Ok(false) => {}
                Err(problem) => break problem,
            },
        }
        parsed = raw.len();
        read = text.read_line(&mut raw)?;
    };
    text.seek_to(first.1)?;
    raw.truncate(first.0);
    raw.truncate(trim_line_end(&raw).len());
    Ok(Some(CsvRecord { line, raw, fields: Err(problem) }))
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum CsvState {
    /// Before a field's first character.
    FieldStart,
    Unquoted,
    Quoted,
    /// After a quote in a quoted field: the end of the field, or the first of two quotes.
    QuoteInQuoted,
}

#[derive(Debug)]
struct CsvParser {
    separator: char,
    state: CsvState,
    field: String,
    fields: Vec<String>,
}

impl CsvParser {
    fn new(separator: char) -> CsvParser {
        CsvParser { separator, state: CsvState::FieldStart, field: String::new(), fields: Vec::new() }
    }

    /// Parses a line; returns whether the row ends with it.
    fn push_line(&mut self, line: &str) -> Result<bool, &'static str> {
        let text = trim_line_end(line);
        text.chars().try_for_each(|character| self.push_char(character))?;
        if self.state == CsvState::Quoted {
            self.field.push_str(&line[text.len()..]);
            return Ok(false);
        }
        self.fields.push(std::mem::take(&mut self.field));
        Ok(true)
    }

    fn push_char(&mut self, character: char) -> Result<(), &'static str> {
        self.state = match (self.state, character) {
            (CsvState::FieldStart, '"') => CsvState::Quoted,
            (CsvState::Quoted, '"') => CsvState::QuoteInQuoted,
            (CsvState::FieldStart | CsvState::Unquoted | CsvState::QuoteInQuoted, character)
                if character == self.separator =>
            {
                self.fields.push(std::mem::take(&mut self.field));
                CsvState::FieldStart
            }
            (CsvState::Unquoted, '"') => return Err(ERR_STRAY_QUOTE),
            (CsvState::QuoteInQuoted, character) if character != '"' => return Err(ERR_STRAY_QUOTE),
            (CsvState::Quoted | CsvState::QuoteInQuoted, character) => {
                self.field.push(character);
                CsvState::Quoted
            }
            (CsvState::FieldStart | CsvState::Unquoted, character) => {
                self.field.push(character);
                CsvState::Unquoted
            }
        };
        Ok(())
    }
}

/// Formats a field, in quotes if it needs them.
pub(super) fn quote_field(text: &str, separator: char) -> String {
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
        super::text_reader::{MAX_ROW_BYTES, tests::encoded},
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
    fn rows(file: &[u8], dialect: Dialect, from: Option<FilePosition>) -> Vec<(CsvRecord, FilePosition)> {
        let mut text = TextReader::open(Cursor::new(file.to_vec()), Some(dialect.encoding)).unwrap();
        from.into_iter().for_each(|from| text.seek_to(from).unwrap());
        std::iter::from_fn(|| Some((next_record(&mut text, dialect.separator).unwrap()?, text.position())))
            .collect()
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
        assert_eq!(fields("a,b\"c\nd,e\n"), [Err(ERR_STRAY_QUOTE), row(&["d", "e"])]);
        assert_eq!(fields("\"a\"b\nd,e\n"), [Err(ERR_STRAY_QUOTE), row(&["d", "e"])]);
        assert_eq!(fields("x,\"a\nd,e\nf,g"), [Err(ERR_UNCLOSED_QUOTE), row(&["d", "e"]), row(&["f", "g"])]);
        assert_eq!(fields("x,\"a\rd,e\rf,g"), [Err(ERR_UNCLOSED_QUOTE), row(&["d", "e"]), row(&["f", "g"])]);
        let long = format!("\"{}\nd,e\n", "y\n".repeat(MAX_ROW_BYTES));
        assert_eq!(fields(&long)[0], Err(ERR_ROW_TOO_LONG));
        assert_eq!(fields(&long).last(), Some(&row(&["d", "e"])));
    }

    #[test]
    fn what_is_not_text_in_the_files_encoding_is_refused() {
        let read = |file: &[u8]| rows(file, COMMAS, None).remove(0).0.fields;
        assert_eq!(read(b"a,\xff"), Err(ERR_ROW_NOT_TEXT));
        assert_eq!(read(b"\xc3,\xa9"), Err(ERR_ROW_NOT_TEXT));
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
                row.iter().map(|text| quote_field(text, separator)).collect::<Vec<_>>().join(&separator.to_string())
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
            let mut at = FilePosition::default();
            for (place, (record, end)) in all.iter().enumerate() {
                prop_assert!(end.bytes > at.bytes && record.line > at.lines, "{record:?}");
                prop_assert!(end.bytes <= file.len() as u64);
                prop_assert_eq!(&rows(&file, COMMAS, Some(*end)), &all[place + 1..]);
                at = *end;
            }
        }
    }
}
