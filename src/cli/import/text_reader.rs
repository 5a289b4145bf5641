//! An import's file as text: its encoding, its line ends, and where in the file reading is, so that it can continue from
//! there. Rows are `csv`'s and `json`'s subject.
//!
//! Positions are bytes of the file, whatever its encoding.

use std::{
    borrow::Cow,
    io::{self, ErrorKind, Read, Seek, SeekFrom},
};

use encoding_rs::{Encoding, UTF_8, UTF_16BE, UTF_16LE};

/// The longest row, in bytes: a file with an open quote must not be read into memory whole.
pub(super) const MAX_ROW_BYTES: usize = 1 << 20;
/// How much of a file is read at once.
const READ_CHUNK_BYTES: usize = 64 * 1024;
/// What a lone last byte of a UTF-16 file is read as; no text has this unit.
const BROKEN_UNIT: u16 = 0xffff;

/// A place between two rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct FilePosition {
    pub(super) bytes: u64,
    /// The lines that end before it.
    pub(super) lines: u64,
}

/// What reading a row or a line gave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LineOutcome {
    /// The file has ended.
    End,
    /// A line was added.
    Whole,
    /// It was skipped, because it would make the row longer than [`MAX_ROW_BYTES`].
    TooLong,
    /// It was skipped, because it is not text in the file's encoding.
    NotText,
}

/// The text of a file.
#[derive(Debug)]
pub(super) struct TextReader<R> {
    input: R,
    encoding: &'static Encoding,
    /// Bytes that are read; those from `start` on are not consumed.
    buffer: Vec<u8>,
    start: usize,
    position: FilePosition,
}

/// The encoding of a file that begins like this, and the length of its byte order mark. The mark wins over what the
/// user named; without either, a first character of two bytes, one of them zero, is UTF-16.
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
    /// Starts at the file's beginning, after a byte order mark.
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

    /// Adds the next line with its end to `row`. LF, CR LF and a lone CR end lines.
    pub(super) fn read_line(&mut self, row: &mut String) -> io::Result<LineOutcome> {
        let most = MAX_ROW_BYTES.saturating_sub(row.len());
        let (mut bytes, mut whole) = (Vec::new(), true);
        let before = self.position.bytes;
        loop {
            let window = self.fill_and_peek(self.unit_width())?;
            if window.is_empty() {
                break;
            }
            let end = self.find_line_end();
            let length = end.unwrap_or_else(|| self.complete_unit_bytes());
            whole = whole && bytes.len() + length <= most;
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

    /// The text of these bytes, if they are any in the file's encoding.
    pub(super) fn decode<'b>(&self, bytes: &'b [u8]) -> Option<Cow<'b, str>> {
        self.encoding.decode_without_bom_handling_and_without_replacement(bytes)
    }

    /// The next unit of the encoding: a byte, or two in UTF-16.
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

    /// Moves past the next unit, and adds its bytes to `bytes`.
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

    /// Counts the line that the file ends in, though no line end follows.
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
        // The line is counted once, by its reader.
        self.position.lines = lines;
        Ok(())
    }

    /// The bytes of a unit.
    fn unit_width(&self) -> usize {
        if self.encoding == UTF_16LE || self.encoding == UTF_16BE { 2 } else { 1 }
    }

    /// At least so many bytes that come next, fewer only at the file's end.
    pub(super) fn fill_and_peek(&mut self, wanted: usize) -> io::Result<&[u8]> {
        while self.buffer.len() - self.start < wanted {
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

    /// Moves past bytes that were read.
    pub(super) fn consume(&mut self, bytes: usize) {
        self.start += bytes;
        self.position.bytes += bytes as u64;
    }

    /// Where in what is read the next line ends.
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

    /// The bytes that are read, without half a unit at their end; a half is all that is left at the file's end.
    fn complete_unit_bytes(&self) -> usize {
        let bytes = self.buffer.len() - self.start;
        let whole = bytes / self.unit_width() * self.unit_width();
        if whole == 0 { bytes } else { whole }
    }
}

/// A line without its end.
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
