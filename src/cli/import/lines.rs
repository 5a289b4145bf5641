//! A file read line by line, knowing at each end of a line where it stands: from there reading can go on.

use std::io::{self, BufRead, Read as _, Seek, SeekFrom};

/// No row is longer: a file with an open quote is not read into memory whole.
pub(super) const LONGEST: usize = 1 << 20;

/// A place between two lines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Position {
    pub(super) bytes: u64,
    pub(super) lines: u64,
}

/// What was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Line {
    /// There was none.
    End,
    /// It was added.
    Whole,
    /// It was passed over: with it there would be more than [`LONGEST`].
    TooLong,
}

/// The lines of a file.
#[derive(Debug)]
pub(super) struct Lines<R> {
    input: R,
    at: Position,
}

impl<R: BufRead + Seek> Lines<R> {
    /// Starts at the file's beginning, after a byte order mark.
    pub(super) fn new(mut input: R) -> io::Result<Lines<R>> {
        let mut at = Position::default();
        input.seek(SeekFrom::Start(0))?;
        if input.fill_buf()?.starts_with(b"\xef\xbb\xbf") {
            input.consume(3);
            at.bytes = 3;
        }
        Ok(Lines { input, at })
    }

    /// Where reading stands.
    pub(super) fn at(&self) -> Position {
        self.at
    }

    /// Goes on from there.
    pub(super) fn go_to(&mut self, at: Position) -> io::Result<()> {
        self.input.seek(SeekFrom::Start(at.bytes))?;
        self.at = at;
        Ok(())
    }

    /// Adds the next line with its end to `text`.
    pub(super) fn next(&mut self, text: &mut Vec<u8>) -> io::Result<Line> {
        let room = LONGEST.saturating_sub(text.len()) as u64;
        let before = text.len();
        let read = self.input.by_ref().take(room + 1).read_until(b'\n', text)? as u64;
        if read == 0 {
            return Ok(Line::End);
        }
        self.at.bytes += read;
        self.at.lines += 1;
        if read <= room {
            return Ok(Line::Whole);
        }
        if text.last() != Some(&b'\n') {
            self.pass_over()?;
        }
        text.truncate(before);
        Ok(Line::TooLong)
    }

    /// Reads on to the line's end.
    fn pass_over(&mut self) -> io::Result<()> {
        loop {
            let buffer = self.input.fill_buf()?;
            let end = buffer.iter().position(|byte| *byte == b'\n');
            let length = end.map_or(buffer.len(), |end| end + 1);
            self.input.consume(length);
            self.at.bytes += length as u64;
            if end.is_some() || length == 0 {
                return Ok(());
            }
        }
    }
}

/// A line without its end.
pub(super) fn trimmed(line: &[u8]) -> &[u8] {
    let line = line.strip_suffix(b"\n").unwrap_or(line);
    line.strip_suffix(b"\r").unwrap_or(line)
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::*;

    #[test]
    fn a_line_that_is_too_long_is_passed_over_and_the_next_one_read() {
        let file = [vec![b'x'; 2 * LONGEST], b"\nnext\n".to_vec()].concat();
        let mut lines = Lines::new(Cursor::new(file)).unwrap();
        let mut text = Vec::new();
        assert_eq!(lines.next(&mut text).unwrap(), Line::TooLong);
        assert_eq!((text.as_slice(), lines.at().lines), (&b""[..], 1));
        assert_eq!(lines.next(&mut text).unwrap(), Line::Whole);
        assert_eq!(text, b"next\n");
        assert_eq!(lines.next(&mut text).unwrap(), Line::End);
        assert_eq!(lines.at(), Position { bytes: 2 * LONGEST as u64 + 6, lines: 2 });
    }

    #[test]
    fn a_byte_order_mark_is_no_part_of_the_first_line() {
        let mut lines = Lines::new(Cursor::new(b"\xef\xbb\xbfa\nb".to_vec())).unwrap();
        let mut text = Vec::new();
        lines.next(&mut text).unwrap();
        assert_eq!((text.as_slice(), lines.at().bytes), (&b"a\n"[..], 5));
    }
}
