//! The checkpoint of an import: a file with its progress and a file with the rejected rows, next to the input.
//!
//! # Invariants
//! - Both files are written batch by batch in the order of the input, so that an interrupted import continues where it
//!   stopped.
//! - Before an import continues, the input and the rejected rows are checked against their digests: edited rows are
//!   neither skipped nor overwritten.

use std::{
    fs::{self, File},
    io::{self, ErrorKind, Read as _, Seek as _, SeekFrom, Write as _},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use sha2::{Digest as _, Sha256};

use super::{
    csv_rows,
    header::CsvHeader,
    send::{BatchResult, RejectedRow},
    source::RowDialect,
    text_reader::FilePosition,
};
use crate::{
    cli::{
        error::CliError,
        value_format::{format_row_count, shown_path},
    },
    domain::token::HexBytes,
    private_file::{self, append_suffix},
};

const READ_CHUNK_BYTES: usize = 64 * 1024;

/// How far an import has come, as the progress file stores it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ImportProgress {
    /// Lines of the input that are done, including the header.
    pub(super) lines: u64,
    /// Bytes of the input that are done.
    bytes: u64,
    pub(super) imported: u64,
    pub(super) there_already: u64,
    #[serde(default)]
    pub(super) expired: u64,
    #[serde(default)]
    pub(super) inactive: u64,
    pub(super) rejected: u64,
    /// The size of the file of rejected rows.
    rejected_bytes: u64,
    /// SHA-256 of the input's bytes that are done.
    sha256: String,
    /// SHA-256 of the file of rejected rows.
    rejected_sha256: String,
}

/// The progress and the files that store it.
#[derive(Debug)]
pub(super) struct ImportCheckpoint {
    pub(super) progress: ImportProgress,
    file_path: PathBuf,
    progress_path: PathBuf,
    rejected_path: PathBuf,
    /// The part of the input that is done.
    hashed_input: HashedPrefix,
    rejected_file: Option<File>,
    rejected_digest: Sha256,
}

/// The first bytes of a file, with their SHA-256.
#[derive(Debug)]
struct HashedPrefix {
    file: File,
    bytes: u64,
    digest: Sha256,
}

impl HashedPrefix {
    fn new(file: File) -> HashedPrefix {
        HashedPrefix { file, bytes: 0, digest: Sha256::new() }
    }

    /// Extends the prefix to this many bytes, or to the end of the file if that comes first.
    fn extend_to(&mut self, bytes: u64) -> io::Result<()> {
        let mut chunk = vec![0; READ_CHUNK_BYTES];
        while self.bytes < bytes {
            let length = usize::try_from(bytes - self.bytes)
                .map_or(READ_CHUNK_BYTES, |length| length.min(READ_CHUNK_BYTES));
            let read = self.file.read(&mut chunk[..length])?;
            if read == 0 {
                break;
            }
            self.digest.update(&chunk[..read]);
            self.bytes += read as u64;
        }
        Ok(())
    }

    /// Whether the file's first `bytes` bytes have this SHA-256.
    fn matches(&mut self, bytes: u64, sha256: &str) -> io::Result<bool> {
        self.extend_to(bytes)?;
        Ok(self.bytes == bytes && hex_digest(&self.digest) == sha256)
    }
}

fn hex_digest(digest: &Sha256) -> String {
    HexBytes(&digest.clone().finalize()).to_string()
}

impl ImportCheckpoint {
    /// Loads the progress of an earlier run, if there was one.
    ///
    /// Fails if one of the files has changed since then, or if a file of rejected rows is left from an earlier import.
    pub(super) fn open(file: &Path, progress_path: Option<PathBuf>) -> Result<ImportCheckpoint, CliError> {
        let progress_path = progress_path.unwrap_or_else(|| append_suffix(file, ".keyward-progress"));
        let done = File::open(file).map_err(|error| read_error(file, &error))?;
        let (progress, resumed) = match fs::read_to_string(&progress_path) {
            Ok(text) => (parse_progress(&text, &progress_path)?, true),
            Err(error) if error.kind() == ErrorKind::NotFound => (ImportProgress::default(), false),
            Err(error) => return Err(read_error(&progress_path, &error)),
        };
        let mut checkpoint = ImportCheckpoint {
            progress,
            file_path: file.to_owned(),
            progress_path,
            rejected_path: append_suffix(file, ".rejected"),
            hashed_input: HashedPrefix::new(done),
            rejected_file: None,
            rejected_digest: Sha256::new(),
        };
        if resumed {
            checkpoint.check_unchanged()?;
        }
        checkpoint.reopen_rejected_file(resumed)?;
        // From now on, a run that ends early can be continued.
        checkpoint.save()?;
        Ok(checkpoint)
    }

    fn check_unchanged(&mut self) -> Result<(), CliError> {
        let ImportProgress { bytes, sha256, .. } = &self.progress;
        if self.hashed_input.matches(*bytes, sha256).map_err(|error| read_error(&self.file_path, &error))? {
            return Ok(());
        }
        let (file, progress) = (self.file_path.display(), self.progress_path.display());
        let rejected = match fs::symlink_metadata(&self.rejected_path) {
            Ok(_) => format!(" and {}", self.rejected_path.display()),
            Err(_) => String::new(),
        };
        Err(CliError::new(format!("{file} has changed since {progress} was written")).with_hint(format!(
            "to import the changed file, remove {progress}{rejected}, and repeat the command; rows that are \
             already imported are counted as such"
        )))
    }

    /// Opens the file of rejected rows, if there is one. Rows that were written after the last saved progress are truncated.
    fn reopen_rejected_file(&mut self, resumed: bool) -> Result<(), CliError> {
        let failed = |error: io::Error| write_error(&self.rejected_path, &error);
        let mut file = match private_file::open_existing(&self.rejected_path) {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                // The file was moved away: the next one begins with a header.
                self.progress.rejected_bytes = 0;
                return Ok(());
            }
            opened => opened.map_err(failed)?,
        };
        let ImportProgress { rejected_bytes, rejected_sha256, .. } = &self.progress;
        if *rejected_bytes == 0 {
            if !resumed && file.metadata().map_err(failed)?.len() > 0 {
                return Err(self.kept_rejected_error("exists from an earlier import"));
            }
            // A new file has the mode and owner of a private file; an existing one may not.
            fs::remove_file(&self.rejected_path).map_err(failed)?;
            return self.create_rejected_file().map(drop);
        }
        let mut written = HashedPrefix::new(file.try_clone().map_err(failed)?);
        if !written.matches(*rejected_bytes, rejected_sha256).map_err(failed)? {
            return Err(self.kept_rejected_error("has changed since it was written"));
        }
        file.set_len(*rejected_bytes).and_then(|()| file.seek(SeekFrom::End(0))).map_err(failed)?;
        self.rejected_digest = written.digest;
        self.rejected_file = Some(file);
        Ok(())
    }

    fn kept_rejected_error(&self, why: &str) -> CliError {
        let rejected = self.rejected_path.display();
        CliError::new(format!("{rejected} {why}; it is not overwritten")).with_hint(format!(
            "import its rows (keyward keys import {rejected}); to import {} again, move or remove that file first",
            self.file_path.display()
        ))
    }

    fn create_rejected_file(&mut self) -> Result<&mut File, CliError> {
        // A private file, because rows may hold tokens in place of digests.
        let file = private_file::create_new(&self.rejected_path)
            .map_err(|error| write_error(&self.rejected_path, &error))?;
        self.rejected_digest = Sha256::new();
        Ok(self.rejected_file.insert(file))
    }

    /// Returns where to continue; `None` is the beginning.
    pub(super) fn resume_position(&self) -> Option<FilePosition> {
        let ImportProgress { lines, bytes, .. } = self.progress;
        (bytes > 0).then_some(FilePosition { bytes, lines })
    }

    /// Counts the rows that are done, including skipped and rejected ones.
    pub(super) fn rows_done(&self) -> u64 {
        let ImportProgress { imported, there_already, expired, inactive, rejected, .. } = self.progress;
        imported + there_already + expired + inactive + rejected
    }

    /// Describes the progress for people, without the line as long as the first line is not done.
    pub(super) fn describe_progress(&self) -> String {
        let (rows, lines) = (format_row_count(self.rows_done()), self.progress.lines);
        if lines == 0 { rows } else { format!("{rows} (line {lines})") }
    }

    pub(super) fn rejected_path(&self) -> &Path {
        &self.rejected_path
    }

    pub(super) fn progress_path(&self) -> &Path {
        &self.progress_path
    }

    /// Appends the rejected rows of a batch, then saves the progress.
    pub(super) fn record_batch(&mut self, done: &BatchResult, dialect: &RowDialect) -> Result<(), CliError> {
        if !done.rejected.is_empty() {
            let mut text = String::new();
            if let RowDialect::Separated(CsvHeader { raw, separator, .. }) = dialect
                && self.progress.rejected_bytes == 0
            {
                text = format!("line{separator}error{separator}message{separator}{raw}\n");
            }
            done.rejected.iter().for_each(|row| text.push_str(&format_rejected_row(row, dialect)));
            let written = match &mut self.rejected_file {
                Some(file) => file.write_all(text.as_bytes()),
                None => self.create_rejected_file()?.write_all(text.as_bytes()),
            };
            written.map_err(|error| write_error(&self.rejected_path, &error))?;
            self.rejected_digest.update(&text);
            self.progress.rejected_bytes += text.len() as u64;
        }
        self.progress.imported += done.imported;
        self.progress.there_already += done.there_already;
        self.progress.expired += done.expired;
        self.progress.inactive += done.inactive;
        self.progress.rejected += done.rejected.len() as u64;
        self.progress.lines = done.end.lines;
        self.progress.bytes = done.end.bytes;
        self.save()
    }

    /// Replaces the progress file atomically.
    fn save(&mut self) -> Result<(), CliError> {
        self.hashed_input
            .extend_to(self.progress.bytes)
            .map_err(|error| read_error(&self.file_path, &error))?;
        self.progress.sha256 = hex_digest(&self.hashed_input.digest);
        self.progress.rejected_sha256 = hex_digest(&self.rejected_digest);
        let text = toml::to_string(&self.progress).unwrap_or_default();
        let text = format!(
            "# The progress of an import. Without this file, the import starts from the beginning.\n{text}"
        );
        private_file::replace_content(&self.progress_path, text.as_bytes())
            .map_err(|error| write_error(&self.progress_path, &error))
    }
}

fn parse_progress(text: &str, path: &Path) -> Result<ImportProgress, CliError> {
    toml::from_str(text).map_err(|_| {
        CliError::new(format!("{} is not the progress file of an import", shown_path(path)))
            .with_hint("remove it to start from the beginning, or name another file: --progress FILE")
    })
}

fn read_error(path: &Path, error: &io::Error) -> CliError {
    CliError::new(format!("cannot read {}: {error}", shown_path(path)))
}

fn write_error(path: &Path, error: &io::Error) -> CliError {
    CliError::new(format!("cannot write {}: {error}", shown_path(path)))
}

/// Formats a rejected row and its error in the input's dialect (JSON: one line), so that it can be corrected and
/// imported.
fn format_rejected_row(row: &RejectedRow, dialect: &RowDialect) -> String {
    let RejectedRow { line, error, message, raw } = row;
    if let RowDialect::Separated(CsvHeader { separator, .. }) = dialect {
        let field = |text: &str| csv_rows::quote_field(text, *separator);
        return format!("{line}{separator}{}{separator}{}{separator}{raw}\n", field(error), field(message));
    }
    let mut fields: Map<String, Value> = serde_json::from_str(raw)
        .unwrap_or_else(|_| Map::from_iter([("row".to_owned(), raw.as_str().into())]));
    fields.insert("line".to_owned(), (*line).into());
    fields.insert("error".to_owned(), error.as_str().into());
    fields.insert("message".to_owned(), message.as_str().into());
    format!("{}\n", Value::Object(fields))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::import::json_rows::JsonLayout;

    fn rejected(line: u64, raw: &str) -> RejectedRow {
        let (error, message) = ("INVALID_REQUEST".to_owned(), "scopes: \"x\", no".to_owned());
        RejectedRow { line, error, message, raw: raw.into() }
    }

    fn done(lines: u64, bytes: u64, rejected: Vec<RejectedRow>) -> BatchResult {
        BatchResult { end: FilePosition { bytes, lines }, imported: 1, rejected, ..BatchResult::default() }
    }

    fn separated(separator: char, header: &str) -> RowDialect {
        RowDialect::Separated(CsvHeader { separator, raw: header.to_owned(), columns: Vec::new() })
    }

    fn file(folder: &tempfile::TempDir, text: &str) -> PathBuf {
        let path = folder.path().join("keys.csv");
        fs::write(&path, text).unwrap();
        path
    }

    #[test]
    fn an_import_continues_where_it_was_and_rejects_nothing_twice() {
        let folder = tempfile::tempdir().unwrap();
        let path = file(&folder, "sha256\na\nb\nc\n");
        let mut first = ImportCheckpoint::open(&path, None).unwrap();
        assert!(first.resume_position().is_none());
        let dialect = separated(',', "sha256");
        first.record_batch(&done(2, 9, vec![rejected(2, "a")]), &dialect).unwrap();
        let whole = fs::read_to_string(first.rejected_path()).unwrap();
        // Killed after the rejected rows were written and before the progress was.
        first.rejected_file.as_mut().unwrap().write_all(b"3,half a ro").unwrap();
        drop(first);

        let mut second = ImportCheckpoint::open(&path, None).unwrap();
        assert_eq!(second.resume_position(), Some(FilePosition { bytes: 9, lines: 2 }));
        second.record_batch(&done(3, 11, vec![rejected(3, "b")]), &dialect).unwrap();
        assert_eq!((second.progress.imported, second.progress.rejected), (2, 2));
        let text = fs::read_to_string(second.rejected_path()).unwrap();
        assert_eq!(text, whole + "3,INVALID_REQUEST,\"scopes: \"\"x\"\", no\",b\n");
        assert!(text.starts_with("line,error,message,sha256\n2,"), "{text}");
    }

    #[test]
    fn a_run_that_was_killed_before_its_first_progress_begins_anew() {
        let folder = tempfile::tempdir().unwrap();
        let path = file(&folder, "sha256\na\n");
        let mut first = ImportCheckpoint::open(&path, None).unwrap();
        first.create_rejected_file().unwrap().write_all(b"line,error,half a ro").unwrap();
        let second = ImportCheckpoint::open(&path, None).unwrap();
        assert!(second.resume_position().is_none());
        assert_eq!(fs::read_to_string(second.rejected_path()).unwrap(), "");
    }

    #[test]
    fn mended_rejected_rows_are_never_overwritten() {
        let folder = tempfile::tempdir().unwrap();
        let path = file(&folder, "sha256\na\nb\n");
        let mut checkpoint = ImportCheckpoint::open(&path, None).unwrap();
        checkpoint.record_batch(&done(2, 9, vec![rejected(2, "a")]), &separated(',', "sha256")).unwrap();
        let (progress, kept) = (checkpoint.progress_path().to_owned(), checkpoint.rejected_path().to_owned());
        for mended in ["sha256\nmended\n".to_owned(), "sha256\nmended\n".repeat(20)] {
            fs::write(&kept, &mended).unwrap();
            for why in ["has changed since it was written", "exists from an earlier import"] {
                let error = ImportCheckpoint::open(&path, None).unwrap_err().to_string();
                assert!(error.contains(why) && error.contains("keys import"), "{error}");
                assert_eq!(fs::read_to_string(&kept).unwrap(), mended);
                fs::rename(&progress, folder.path().join("away")).ok();
            }
            fs::rename(folder.path().join("away"), &progress).unwrap();
        }
        // After the file is moved away, the next one gets a header.
        fs::remove_file(&kept).unwrap();
        let mut second = ImportCheckpoint::open(&path, None).unwrap();
        second.record_batch(&done(3, 11, vec![rejected(3, "b")]), &separated(',', "sha256")).unwrap();
        let text = fs::read_to_string(&kept).unwrap();
        assert!(text.starts_with("line,error,message,sha256\n3,") && text.lines().count() == 2, "{text}");
        assert_eq!(
            ImportCheckpoint::open(&path, None).unwrap().resume_position(),
            Some(FilePosition { bytes: 11, lines: 3 })
        );
    }

    #[test]
    fn a_file_that_has_changed_is_not_continued() {
        let folder = tempfile::tempdir().unwrap();
        let long = format!("sha256\n{}", "a\n".repeat(READ_CHUNK_BYTES));
        let path = file(&folder, &long);
        let mut checkpoint = ImportCheckpoint::open(&path, None).unwrap();
        let end = long.len() as u64;
        checkpoint.record_batch(&done(9, end, Vec::new()), &separated(',', "sha256")).unwrap();
        file(&folder, &(long[..long.len() - 2].to_owned() + "b\n"));
        let error = ImportCheckpoint::open(&path, None).unwrap_err().to_string();
        assert!(error.contains("has changed since"), "the last row too: {error}");
        fs::remove_file(checkpoint.progress_path()).unwrap();

        file(&folder, "sha256\na\nb\n");
        let mut checkpoint = ImportCheckpoint::open(&path, None).unwrap();
        checkpoint.record_batch(&done(2, 9, Vec::new()), &separated(',', "sha256")).unwrap();
        for other in ["sha256\nx\nb\n", "sha256\n"] {
            file(&folder, other);
            let error = ImportCheckpoint::open(&path, None).unwrap_err().to_string();
            assert!(error.contains("keys.csv has changed since") && error.contains("remove"), "{error}");
        }
        file(&folder, "sha256\na\nb\nc\n");
        assert!(ImportCheckpoint::open(&path, None).is_ok(), "a file may grow");
        fs::write(append_suffix(&path, ".keyward-progress"), "nonsense").unwrap();
        assert!(
            ImportCheckpoint::open(&path, None)
                .unwrap_err()
                .to_string()
                .contains("is not the progress file of an import")
        );
    }

    #[test]
    fn rejected_rows_are_separated_as_their_file_is() {
        let folder = tempfile::tempdir().unwrap();
        let mut checkpoint = ImportCheckpoint::open(&file(&folder, "sha256;name\na;b\n"), None).unwrap();
        checkpoint
            .record_batch(&done(2, 16, vec![rejected(2, "a;b")]), &separated(';', "sha256;name"))
            .unwrap();
        let text = fs::read_to_string(checkpoint.rejected_path()).unwrap();
        let row = "2;INVALID_REQUEST;\"scopes: \"\"x\"\", no\";a;b\n";
        assert_eq!(text, format!("line;error;message;sha256;name\n{row}"));
    }

    #[test]
    fn an_import_of_one_line_goes_on_within_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = file(&folder, "[{},{}]");
        let mut checkpoint = ImportCheckpoint::open(&path, None).unwrap();
        checkpoint.record_batch(&done(0, 3, Vec::new()), &RowDialect::Json(JsonLayout::Array)).unwrap();
        assert_eq!(
            ImportCheckpoint::open(&path, None).unwrap().resume_position(),
            Some(FilePosition { bytes: 3, lines: 0 })
        );
    }

    #[test]
    fn rejected_objects_keep_their_fields() {
        let json = RowDialect::Json(JsonLayout::Lines);
        assert_eq!(
            format_rejected_row(&rejected(7, "{\"account\": \"acme\"}"), &json),
            "{\"account\":\"acme\",\"error\":\"INVALID_REQUEST\",\"line\":7,\
             \"message\":\"scopes: \\\"x\\\", no\"}\n"
        );
        assert!(format_rejected_row(&rejected(7, "nonsense"), &json).contains("\"row\":\"nonsense\""));
    }
}
