//! Comma-separated values as RFC 4180 has them: fields may stand in quotes, and then hold commas, line ends and
//! doubled quotes. Lines end in LF or CRLF; empty ones are passed over.
//!
//! A row that breaks the rules ends at the end of its first line, so that one stray quote costs one row and not
//! the rest of the file.

use std::io::{self, BufRead, Seek};

use super::lines::{Line, Lines, trimmed};

const STRAY: &str = "a quote stands inside a field; put the field in quotes and double the ones in it";
const OPEN: &str = "a field's quotes never end";
const TOO_LONG: &str = "the row is longer than 1 MiB";
const NOT_UTF8: &str = "the row is not UTF-8";

/// A row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Record {
    /// The line on which it begins, from 1.
    pub(super) line: u64,
    /// As it stands in the file, without the last line end.
    pub(super) raw: Vec<u8>,
    /// The fields, or why there are none.
    pub(super) fields: Result<Vec<String>, &'static str>,
}

/// Reads the next row.
pub(super) fn next<R: BufRead + Seek>(lines: &mut Lines<R>) -> io::Result<Option<Record>> {
    loop {
        match read(lines)? {
            Some(record) if record.raw.is_empty() && record.fields.is_ok() => {}
            record => return Ok(record),
        }
    }
}

fn read<R: BufRead + Seek>(lines: &mut Lines<R>) -> io::Result<Option<Record>> {
    let line = lines.at().lines + 1;
    let (mut raw, mut parser) = (Vec::new(), Parser::default());
    let first = lines.next(&mut raw)?;
    let (length, after_first) = (raw.len(), lines.at());
    let mut read = first;
    let mut fed = 0;
    let problem = loop {
        match read {
            Line::End if fed == 0 => return Ok(None),
            Line::End => break OPEN,
            Line::TooLong => break TOO_LONG,
            Line::Whole => match parser.line(&raw[fed..]) {
                Ok(true) => {
                    raw.truncate(trimmed(&raw).len());
                    return Ok(Some(Record { line, raw, fields: parser.fields() }));
                }
                Ok(false) => {}
                Err(problem) => break problem,
            },
        }
        fed = raw.len();
        read = lines.next(&mut raw)?;
    };
    lines.go_to(after_first)?;
    raw.truncate(length);
    raw.truncate(trimmed(&raw).len());
    Ok(Some(Record { line, raw, fields: Err(problem) }))
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    /// Before the first character of a field.
    #[default]
    Start,
    Plain,
    Quoted,
    /// After a quote inside quotes: their end, or the first of two.
    Quote,
}

#[derive(Debug, Default)]
struct Parser {
    state: State,
    /// The fields' bytes one after the other, and where each ends.
    bytes: Vec<u8>,
    ends: Vec<usize>,
}

impl Parser {
    /// Takes a line; true when the row ends with it.
    fn line(&mut self, line: &[u8]) -> Result<bool, &'static str> {
        let text = trimmed(line);
        for byte in text {
            self.byte(*byte)?;
        }
        if self.state == State::Quoted {
            self.bytes.extend_from_slice(&line[text.len()..]);
            return Ok(false);
        }
        self.ends.push(self.bytes.len());
        Ok(true)
    }

    fn byte(&mut self, byte: u8) -> Result<(), &'static str> {
        self.state = match (self.state, byte) {
            (State::Start, b'"') => State::Quoted,
            (State::Quoted, b'"') => State::Quote,
            (State::Start | State::Plain | State::Quote, b',') => {
                self.ends.push(self.bytes.len());
                State::Start
            }
            (State::Plain, b'"') => return Err(STRAY),
            (State::Quote, byte) if byte != b'"' => return Err(STRAY),
            (State::Quoted | State::Quote, byte) => {
                self.bytes.push(byte);
                State::Quoted
            }
            (State::Start | State::Plain, byte) => {
                self.bytes.push(byte);
                State::Plain
            }
        };
        Ok(())
    }

    fn fields(self) -> Result<Vec<String>, &'static str> {
        let text = String::from_utf8(self.bytes).map_err(|_| NOT_UTF8)?;
        let starts = std::iter::once(0).chain(self.ends.iter().copied());
        // A field's end is where a comma or a quote stood: always between two characters, where the whole is
        // UTF-8. `get` is there because two broken halves may make a whole.
        let fields = starts.zip(self.ends.iter().copied()).map(|(start, end)| text.get(start..end));
        fields.map(|field| field.map(str::to_owned).ok_or(NOT_UTF8)).collect()
    }
}

/// A field as it is written: in quotes where it needs them.
pub(super) fn field(text: &str) -> String {
    if text.contains(['"', ',', '\n', '\r']) {
        return format!("\"{}\"", text.replace('"', "\"\""));
    }
    text.to_owned()
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use proptest::prelude::*;

    use super::{
        super::lines::{LONGEST, Position},
        *,
    };

    /// All rows of a file from a position on, each with where the next one begins.
    fn rows(file: &[u8], from: Position) -> Vec<(Record, Position)> {
        let mut lines = Lines::new(Cursor::new(file.to_vec())).unwrap();
        if from != Position::default() {
            lines.go_to(from).unwrap();
        }
        std::iter::from_fn(|| Some((next(&mut lines).unwrap()?, lines.at()))).collect()
    }

    fn fields(file: &str) -> Vec<Result<Vec<String>, &'static str>> {
        rows(file.as_bytes(), Position::default()).into_iter().map(|(record, _)| record.fields).collect()
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
        assert_eq!(fields("a,,\n,\n\"\",b"), [row(&["a", "", ""]), row(&["", ""]), row(&["", "b"])]);
    }

    #[test]
    fn empty_lines_are_no_rows_and_count_as_lines() {
        let rows = rows(b"a\n\n\r\nb\n", Position::default());
        let lines: Vec<u64> = rows.iter().map(|(record, _)| record.line).collect();
        assert_eq!(lines, [1, 4]);
    }

    #[test]
    fn a_broken_row_costs_one_line() {
        assert_eq!(fields("a,b\"c\nd,e\n"), [Err(STRAY), row(&["d", "e"])]);
        assert_eq!(fields("\"a\"b\nd,e\n"), [Err(STRAY), row(&["d", "e"])]);
        assert_eq!(fields("x,\"a\nd,e\nf,g"), [Err(OPEN), row(&["d", "e"]), row(&["f", "g"])]);
        let long = format!("\"{}\nd,e\n", "y\n".repeat(LONGEST));
        assert_eq!(fields(&long)[0], Err(TOO_LONG));
        assert_eq!(fields(&long).last(), Some(&row(&["d", "e"])));
    }

    #[test]
    fn what_is_not_utf_8_is_refused_even_where_two_halves_make_a_whole() {
        let read = |file: &[u8]| rows(file, Position::default()).remove(0).0.fields;
        assert_eq!(read(b"a,\xff"), Err(NOT_UTF8));
        assert_eq!(read(b"\xc3,\xa9"), Err(NOT_UTF8));
    }

    proptest! {
        #[test]
        fn what_is_written_reads_back(
            table in proptest::collection::vec(proptest::collection::vec("(?s)[a\"é,\r\n ;.]{0,6}", 1..5), 0..8),
            crlf: bool,
        ) {
            // A row of one empty field cannot be told from an empty line, in any file.
            let table: Vec<Vec<String>> = table.into_iter().filter(|row| row.as_slice() != [""]).collect();
            let end = if crlf { "\r\n" } else { "\n" };
            let file: String = table
                .iter()
                .map(|row| row.iter().map(|text| field(text)).collect::<Vec<_>>().join(",") + end)
                .collect();
            let read: Vec<Vec<String>> = fields(&file).into_iter().map(Result::unwrap).collect();
            prop_assert_eq!(read, table);
        }

        #[test]
        fn any_file_is_read_to_its_end_and_from_any_row_on_as_before(
            file in proptest::collection::vec(prop_oneof![Just(b'"'), Just(b','), Just(b'\n'), Just(b'\r'), any::<u8>()], 0..200),
        ) {
            let all = rows(&file, Position::default());
            let mut at = Position::default();
            for (place, (record, end)) in all.iter().enumerate() {
                prop_assert!(end.bytes > at.bytes && record.line > at.lines, "{record:?}");
                prop_assert!(end.bytes <= file.len() as u64);
                prop_assert_eq!(&rows(&file, *end), &all[place + 1..]);
                at = *end;
            }
        }
    }
}
