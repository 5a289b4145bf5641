//! Reads a file as lines of text in its encoding, and keeps the position, so that an import can continue from there.
//!
//! Not here: rows and fields (`csv_rows`, `json_rows`). Positions are bytes of the file in every encoding.

use std::{
    borrow::Cow,
    io::{self, ErrorKind, Read, Seek, SeekFrom},
};

use encoding_rs::{Encoding, UTF_8, UTF_16BE, UTF_16LE};

/// The longest row. It bounds the memory for a file with an unclosed quote.
pub(super) const MAX_ROW_BYTES: usize = 1 << 20;
const READ_CHUNK_BYTES: usize = 64 * 1024;
/// Represents half a unit at the end of a UTF-16 file; no valid text has this unit.
const BROKEN_UNIT: u16 = 0xffff;

/// A position between two rows of a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct FilePosition {
    pub(super) bytes: u64,
    /// The number of lines that end before this position.
    pub(super) lines: u64,
}

/// The result of reading a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LineOutcome {
    /// No line is left in the file.
    End,
    Whole,
    /// The line was skipped, because it would make the row longer than [`MAX_ROW_BYTES`].
    TooLong,
    /// The line was skipped, because it is not text in the file's encoding.
    NotText,
}

#[derive(Debug)]
pub(super) struct TextReader<R> {
    input: R,
    encoding: &'static Encoding,
    /// Bytes that were read; those from `start` on are not consumed yet.
    buffer: Vec<u8>,
    start: usize,
    position: FilePosition,
}

/// Detects the encoding by a file's beginning; returns it with the length of the byte order mark.
///
/// The mark takes precedence over the user's encoding. Without either, a zero byte in the first two means UTF-16.
fn detect_encoding(beginning: &[u8], named: Option<&'static Encoding>) -> (&'static Encoding, usize) {
    if let Some(marked) = Encoding::for_bom(beginning) {
        return marked;
    }
    let encoding = named.unwrap_or(match beginning {
        [1..=0x7f, 0, ..] => UTF_16LE,
        [0, 1..=0x7f, ..] => UTF_16BE,
        _ => UTF_8,
    });
    (encoding, 0)
}

impl<R: Read + Seek> TextReader<R> {
    /// Opens a file and skips its byte order mark.
    pub(super) fn open(mut input: R, named: Option<&'static Encoding>) -> io::Result<TextReader<R>> {
        input.seek(SeekFrom::Start(0))?;
        let mut text = TextReader {
            input,
            encoding: UTF_8,
            buffer: Vec::new(),
            start: 0,
            position: FilePosition::default(),
        };
        let (encoding, mark) = detect_encoding(text.fill_and_peek(3)?, named);
        text.encoding = encoding;
        text.consume(mark);
        Ok(text)
    }

    pub(super) fn encoding(&self) -> &'static Encoding {
        self.encoding
    }

    pub(super) fn position(&self) -> FilePosition {
        self.position
    }

    pub(super) fn seek_to(&mut self, at: FilePosition) -> io::Result<()> {
        self.input.seek(SeekFrom::Start(at.bytes))?;
        self.buffer.clear();
        self.start = 0;
        self.position = at;
        Ok(())
    }

    /// Appends the next line with its line end (LF, CR LF or CR) to `row`.
    pub(super) fn read_line(&mut self, row: &mut String) -> io::Result<LineOutcome> {
        let limit = MAX_ROW_BYTES.saturating_sub(row.len());
        let (mut bytes, mut whole) = (Vec::new(), true);
        let before = self.position.bytes;
        loop {
            let window = self.fill_and_peek(self.unit_width())?;
            if window.is_empty() {
                break;
            }
            let end = self.find_line_end();
            let length = end.unwrap_or_else(|| self.complete_unit_bytes());
            whole = whole && bytes.len() + length <= limit;
            if whole {
                bytes.extend_from_slice(&self.buffer[self.start..][..length]);
            }
            self.consume(length);
            if end.is_some() {
                self.consume_line_end(&mut bytes)?;
                break;
            }
        }
        if self.position.bytes == before {
            return Ok(LineOutcome::End);
        }
        self.position.lines += 1;
        let decoded = whole.then(|| self.decode(&bytes));
        Ok(match decoded {
            None => LineOutcome::TooLong,
            Some(None) => LineOutcome::NotText,
            Some(Some(text)) if row.len() + text.len() > MAX_ROW_BYTES + 2 => LineOutcome::TooLong,
            Some(Some(text)) => {
                row.push_str(&text);
                LineOutcome::Whole
            }
        })
    }

    /// Decodes bytes in the file's encoding; `None` if they are not text.
    pub(super) fn decode<'b>(&self, bytes: &'b [u8]) -> Option<Cow<'b, str>> {
        self.encoding.decode_without_bom_handling_and_without_replacement(bytes)
    }

    /// Returns the next unit of the encoding without consuming it: a byte, or two bytes in UTF-16.
    pub(super) fn peek_unit(&mut self) -> io::Result<Option<u16>> {
        let (width, encoding) = (self.unit_width(), self.encoding);
        Ok(match *self.fill_and_peek(width)? {
            [] => None,
            [byte, ..] if width == 1 => Some(byte.into()),
            [_] => Some(BROKEN_UNIT),
            [one, two, ..] if encoding == UTF_16LE => Some(u16::from_le_bytes([one, two])),
            [one, two, ..] => Some(u16::from_be_bytes([one, two])),
        })
    }

    /// Consumes the next unit and appends it to `bytes`.
    pub(super) fn consume_unit(&mut self, bytes: &mut Vec<u8>) -> io::Result<()> {
        let Some(unit) = self.peek_unit()? else { return Ok(()) };
        let length = self.unit_width().min(self.buffer.len() - self.start);
        bytes.extend_from_slice(&self.buffer[self.start..][..length]);
        self.consume(length);
        let ends_line = unit == u16::from(b'\n')
            || unit == u16::from(b'\r') && self.peek_unit()? != Some(u16::from(b'\n'));
        self.position.lines += u64::from(ends_line);
        Ok(())
    }

    /// Counts a last line that has no line end.
    pub(super) fn end_last_line(&mut self) {
        self.position.lines += 1;
    }

    fn consume_line_end(&mut self, bytes: &mut Vec<u8>) -> io::Result<()> {
        let lines = self.position.lines;
        let carriage_return = self.peek_unit()? == Some(u16::from(b'\r'));
        self.consume_unit(bytes)?;
        if carriage_return && self.peek_unit()? == Some(u16::from(b'\n')) {
            self.consume_unit(bytes)?;
        }
        // `read_line` counts the line.
        self.position.lines = lines;
        Ok(())
    }

    fn unit_width(&self) -> usize {
        if self.encoding == UTF_16LE || self.encoding == UTF_16BE { 2 } else { 1 }
    }

    /// Returns at least `count` of the next bytes without consuming them; fewer only at the end of the file.
    pub(super) fn fill_and_peek(&mut self, count: usize) -> io::Result<&[u8]> {
        while self.buffer.len() - self.start < count {
            self.buffer.drain(..self.start);
            self.start = 0;
            let held = self.buffer.len();
            self.buffer.resize(held + READ_CHUNK_BYTES, 0);
            let read = self.input.read(&mut self.buffer[held..]);
            self.buffer.truncate(held + *read.as_ref().unwrap_or(&0));
            match read {
                Ok(0) => break,
                Err(error) if error.kind() != ErrorKind::Interrupted => return Err(error),
                _ => {}
            }
        }
        Ok(&self.buffer[self.start..])
    }

    pub(super) fn consume(&mut self, bytes: usize) {
        self.start += bytes;
        self.position.bytes += bytes as u64;
    }

    /// Returns the offset of the next line end in the unconsumed bytes.
    fn find_line_end(&self) -> Option<usize> {
        let window = &self.buffer[self.start..];
        let wide = |unit: fn([u8; 2]) -> u16| {
            let ends = |pair: &[u8; 2]| matches!(unit(*pair), 0x0a | 0x0d);
            window.as_chunks::<2>().0.iter().position(ends).map(|units| units * 2)
        };
        match self.encoding {
            encoding if encoding == UTF_16LE => wide(u16::from_le_bytes),
            encoding if encoding == UTF_16BE => wide(u16::from_be_bytes),
            _ => window.iter().position(|byte| matches!(byte, b'\n' | b'\r')),
        }
    }

    /// Counts the unconsumed bytes without half a unit at the end. At the end of the file, only the half may be left.
    fn complete_unit_bytes(&self) -> usize {
        let bytes = self.buffer.len() - self.start;
        let whole = bytes / self.unit_width() * self.unit_width();
        if whole == 0 { bytes } else { whole }
    }
}

/// Removes the line end from a line.
pub(super) fn trim_line_end(line: &str) -> &str {
    let line = line.strip_suffix('\n').unwrap_or(line);
    line.strip_suffix('\r').unwrap_or(line)
}

#[cfg(test)]
pub(super) mod tests {
    use std::io::Cursor;

    use proptest::prelude::*;

    use super::*;

    /// The bytes of a text in an encoding, with a byte order mark where there is one.
    pub(in super::super) fn encoded(text: &str, encoding: &'static Encoding) -> Vec<u8> {
        let wide = |bytes: fn(u16) -> [u8; 2]| {
            "\u{feff}".encode_utf16().chain(text.encode_utf16()).flat_map(bytes).collect()
        };
        match encoding {
            encoding if encoding == UTF_16LE => wide(u16::to_le_bytes),
            encoding if encoding == UTF_16BE => wide(u16::to_be_bytes),
            encoding => encoding.encode(text).0.into_owned(),
        }
    }

    fn lines(file: &[u8], named: Option<&'static Encoding>) -> Vec<(LineOutcome, String, FilePosition)> {
        let mut text = TextReader::open(Cursor::new(file.to_vec()), named).unwrap();
        std::iter::from_fn(|| {
            let mut line = String::new();
            let read = text.read_line(&mut line).unwrap();
            (read != LineOutcome::End).then(|| (read, line, text.position()))
        })
        .collect()
    }

    #[test]
    fn a_line_that_is_too_long_is_skipped_and_the_next_one_read() {
        let file = [vec![b'x'; 2 * MAX_ROW_BYTES], b"\nnext\n".to_vec()].concat();
        let read = lines(&file, None);
        assert_eq!((read[0].0, read[0].1.as_str(), read[0].2.lines), (LineOutcome::TooLong, "", 1));
        assert_eq!(read[1].1, "next\n");
        assert_eq!(read[1].2, FilePosition { bytes: 2 * MAX_ROW_BYTES as u64 + 6, lines: 2 });
    }

    #[test]
    fn the_encoding_is_known_by_its_mark_or_by_the_zeros_of_utf_16() {
        for (file, bytes, encoding) in [
            (&b"\xef\xbb\xbfa"[..], 3, UTF_8),
            (b"\xff\xfea\0", 2, UTF_16LE),
            (b"\xfe\xff\0a", 2, UTF_16BE),
            (b"a\0b\0", 0, UTF_16LE),
            (b"\0a\0b", 0, UTF_16BE),
            (b"ab", 0, UTF_8),
            (b"", 0, UTF_8),
        ] {
            assert_eq!(detect_encoding(file, None), (encoding, bytes), "{file:?}");
        }
        assert_eq!(detect_encoding(b"caf\xe9", Some(encoding_rs::WINDOWS_1252)).0, encoding_rs::WINDOWS_1252);
        assert_eq!(
            detect_encoding(b"\xef\xbb\xbfa", Some(encoding_rs::WINDOWS_1252)).0,
            UTF_8,
            "a mark is certain"
        );
    }

    #[test]
    fn bytes_that_are_no_text_cost_their_line() {
        let read = lines(b"a\xff\nb\n", None);
        assert_eq!((read[0].0, read[1].0), (LineOutcome::NotText, LineOutcome::Whole));
        let half = [encoded("a\n", UTF_16LE), vec![0x62]].concat();
        let read = lines(&half, None);
        assert_eq!((read[0].1.as_str(), read[1].0), ("a\n", LineOutcome::NotText));
        assert_eq!(
            lines(&[&encoded("", UTF_16LE)[..], b"\x00\xd8\n\0"].concat(), None)[0].0,
            LineOutcome::NotText
        );
    }

    proptest! {
        #[test]
        fn lines_are_those_of_a_naive_split_in_every_encoding_and_continue_from_every_position(
            text in "[aé,\r\n]{0,40}",
            encoding in prop_oneof![
                Just(UTF_8), Just(UTF_16LE), Just(UTF_16BE), Just(encoding_rs::WINDOWS_1252)
            ],
        ) {
            let marked = text.replace("\r\n", "\u{1}").replace('\r', "\u{2}").replace('\n', "\u{3}");
            let whole = |line: &str| {
                line.replace('\u{1}', "\r\n").replace('\u{2}', "\r").replace('\u{3}', "\n")
            };
            let expected: Vec<String> =
                marked.split_inclusive(['\u{1}', '\u{2}', '\u{3}']).map(whole).collect();
            let file = encoded(&text, encoding);
            let read = lines(&file, Some(encoding));
            let texts: Vec<String> = read.iter().map(|(_, line, _)| line.clone()).collect();
            prop_assert_eq!(&texts, &expected);
            for (place, (_, _, end)) in read.iter().enumerate() {
                let mut rest = TextReader::open(Cursor::new(file.clone()), Some(encoding)).unwrap();
                rest.seek_to(*end).unwrap();
                let mut next = String::new();
                rest.read_line(&mut next).unwrap();
                prop_assert_eq!(Some(&next).filter(|next| !next.is_empty()), expected.get(place + 1));
                prop_assert_eq!(end.lines as usize, place + 1);
            }
        }
    }
}
