//! Checks a whole file before anything is imported, so that binary files and broken JSON are refused at once.
//!
//! Not here: errors of single rows, which do not stop an import.

use std::io::{self, BufReader, ErrorKind, Read, Seek, SeekFrom};

use encoding_rs::{Decoder, DecoderResult, Encoding, UTF_8};
use serde::de::IgnoredAny;

use super::text_reader::TextReader;
use crate::cli::error::CliError;

/// The size of the buffer for decoded text. A decoder needs at least a few bytes.
const DECODE_BUFFER_BYTES: usize = 16 * 1024;

/// The JSON syntax that a whole file must have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum WholeFileSyntax {
    /// None, because each row is checked separately.
    Rows,
    JsonValue,
    /// A sequence of JSON values without separators.
    JsonValues,
}

/// Reads a whole file and refuses it if it has bytes that are not text, zero bytes or broken JSON.
pub(super) fn precheck_file(
    mut input: impl Read + Seek,
    named: Option<&'static Encoding>,
    syntax: WholeFileSyntax,
) -> Result<(), CliError> {
    refuse_binary_formats(&mut input)?;
    let mut text = BufReader::with_capacity(DECODE_BUFFER_BYTES, Utf8Reader::open(input, named)?);
    let read = match syntax {
        WholeFileSyntax::Rows => io::copy(&mut text, &mut io::sink()).map(drop),
        WholeFileSyntax::JsonValue => {
            serde_json::from_reader::<_, IgnoredAny>(&mut text).map(drop).map_err(io::Error::from)
        }
        WholeFileSyntax::JsonValues => serde_json::Deserializer::from_reader(&mut text)
            .into_iter::<IgnoredAny>()
            .try_for_each(|value| value.map(drop))
            .map_err(io::Error::from),
    };
    read.map_err(|error| match error.downcast::<TextDecodeError>() {
        Ok(problem) => problem.into(),
        // An error of serde_json, which names line and column and repeats no text.
        Err(error) if syntax != WholeFileSyntax::Rows => {
            CliError::new(format!("the file is not valid JSON: {error}"))
                .with_hint("nothing was imported; correct the file and repeat the command")
        }
        Err(error) => CliError::from(error),
    })
}

/// Refuses workbooks and compressed files, which people often mistake for text.
fn refuse_binary_formats(mut input: impl Read + Seek) -> Result<(), CliError> {
    let mut beginning = [0; 4];
    input.seek(SeekFrom::Start(0))?;
    let read = input.by_ref().take(4).read(&mut beginning)?;
    input.seek(SeekFrom::Start(0))?;
    let (what, fix) = match &beginning[..read] {
        [b'P', b'K', 3, 4] => ("an Excel workbook or another zip archive", "save the sheet as \"CSV UTF-8\""),
        [0xd0, 0xcf, 0x11, 0xe0] => ("an old Excel workbook", "save the sheet as \"CSV UTF-8\""),
        [0x1f, 0x8b, ..] => ("compressed with gzip", "decompress it first, with gunzip"),
        [0x28, 0xb5, 0x2f, 0xfd] => ("compressed with zstd", "decompress it first, with unzstd"),
        _ => return Ok(()),
    };
    Err(CliError::new(format!("the file is {what}, not CSV or JSON")).with_hint(fix))
}

/// Why a file is not text.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
enum TextDecodeError {
    #[error("line {line} is not {encoding}")]
    Undecodable { line: u64, encoding: &'static str },
    #[error("line {line} has a zero byte: the file is damaged, or not text")]
    ZeroByte { line: u64 },
}

impl From<TextDecodeError> for CliError {
    fn from(problem: TextDecodeError) -> CliError {
        let hint = match &problem {
            TextDecodeError::Undecodable { encoding, .. } if *encoding == UTF_8.name() => {
                "nothing was imported; name the file's encoding, such as --encoding windows-1252 for a file that Excel \
                 saved as \"CSV (comma delimited)\", or save it as \"CSV UTF-8\""
            }
            TextDecodeError::Undecodable { .. } => {
                "nothing was imported; name the file's encoding with --encoding"
            }
            TextDecodeError::ZeroByte { .. } => "nothing was imported; export the file again",
        };
        CliError::new(problem.to_string()).with_hint(hint)
    }
}

/// Reads a file in any encoding as UTF-8.
struct Utf8Reader<R> {
    text: TextReader<R>,
    decoder: Decoder,
    /// A decoder must not be called again after it has finished.
    decoder_finished: bool,
    /// The number of the current line, from 1.
    line: u64,
    after_carriage_return: bool,
}

impl<R: Read + Seek> Utf8Reader<R> {
    fn open(input: R, named: Option<&'static Encoding>) -> io::Result<Utf8Reader<R>> {
        let text = TextReader::open(input, named)?;
        let decoder = text.encoding().new_decoder_without_bom_handling();
        Ok(Utf8Reader { text, decoder, decoder_finished: false, line: 1, after_carriage_return: false })
    }

    /// Counts the lines of decoded text; fails at a zero byte.
    fn scan_text(&mut self, text: &[u8]) -> Result<(), TextDecodeError> {
        for byte in text {
            match byte {
                0 => return Err(TextDecodeError::ZeroByte { line: self.line }),
                b'\n' if self.after_carriage_return => {}
                b'\n' | b'\r' => self.line += 1,
                _ => {}
            }
            self.after_carriage_return = *byte == b'\r';
        }
        Ok(())
    }
}

impl<R: Read + Seek> Read for Utf8Reader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while !self.decoder_finished {
            let source = self.text.fill_and_peek(1)?;
            let is_end = source.is_empty();
            let (result, read, written) =
                self.decoder.decode_to_utf8_without_replacement(source, buffer, is_end);
            self.text.consume(read);
            self.scan_text(&buffer[..written])
                .map_err(|problem| io::Error::new(ErrorKind::InvalidData, problem))?;
            match result {
                DecoderResult::Malformed(..) => {
                    let encoding = self.text.encoding().name();
                    let problem = TextDecodeError::Undecodable { line: self.line, encoding };
                    return Err(io::Error::new(ErrorKind::InvalidData, problem));
                }
                // A character may continue in bytes that are not read yet.
                DecoderResult::InputEmpty if written == 0 && !is_end => {}
                DecoderResult::InputEmpty => {
                    self.decoder_finished = is_end;
                    return Ok(written);
                }
                DecoderResult::OutputFull => return Ok(written),
            }
        }
        Ok(0)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use encoding_rs::{UTF_16LE, WINDOWS_1252};

    use super::{super::text_reader::tests::encoded, *};

    fn problem(file: &[u8], named: Option<&'static Encoding>, syntax: WholeFileSyntax) -> Option<String> {
        precheck_file(Cursor::new(file.to_vec()), named, syntax).err().map(|failure| failure.to_string())
    }

    #[test]
    fn a_file_in_an_old_encoding_is_refused_once_with_its_line_and_the_flag_that_reads_it() {
        let file = [b"sha256,name\r\nab,caf\xe9\r\n".to_vec(), b"ab,caf\xe9\r\n".repeat(100_000)].concat();
        let message = problem(&file, None, WholeFileSyntax::Rows).unwrap();
        assert!(
            message.contains("line 2 is not UTF-8") && message.contains("--encoding windows-1252"),
            "{message}"
        );
        assert_eq!(problem(&file, Some(WINDOWS_1252), WholeFileSyntax::Rows), None);
    }

    #[test]
    fn zeros_workbooks_and_archives_are_refused_by_what_they_are() {
        for (file, expected) in [
            (&b"sha256\nab\n\0\0\0\0"[..], "line 3 has a zero byte"),
            (b"PK\x03\x04rest", "Excel workbook"),
            (b"\xd0\xcf\x11\xe0rest", "old Excel workbook"),
            (b"\x1f\x8b\x08rest", "gunzip"),
        ] {
            let message = problem(file, None, WholeFileSyntax::Rows).unwrap();
            assert!(message.contains(expected), "{message}");
        }
        for good in [&b""[..], b"a", b"PK", &encoded("a,\u{e9}\n", UTF_16LE)] {
            assert_eq!(problem(good, None, WholeFileSyntax::Rows), None, "{good:?}");
        }
    }

    #[test]
    fn broken_json_is_refused_once_with_its_place_and_without_its_text() {
        let message =
            problem(b"[\n{\"a\": 1},\n{\"kw_secret\"}\n]", None, WholeFileSyntax::JsonValue).unwrap();
        assert!(message.contains("line 3 column") && !message.contains("kw_secret"), "{message}");
        assert!(
            problem(b"[{}] x", None, WholeFileSyntax::JsonValue).unwrap().contains("trailing characters")
        );
        assert_eq!(problem(b"[{}]\n", None, WholeFileSyntax::JsonValue), None);
        assert_eq!(problem(b"{\n}\n{}", None, WholeFileSyntax::JsonValues), None);
        assert!(problem(b"{\n}\n{", None, WholeFileSyntax::JsonValues).is_some());
        let wide = encoded(&format!("[{}\"\u{20ac}\"]", "\"\u{e9}\",".repeat(100_000)), UTF_16LE);
        assert_eq!(problem(&wide, None, WholeFileSyntax::JsonValue), None);
    }
}
