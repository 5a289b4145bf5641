//! What an import leaves beside its file: how far it came, and the rows that were rejected. Both are written
//! batch by batch, in the order of the file, so that an import that was interrupted goes on where it was.

use std::{
    fs::{self, File},
    io::{self, ErrorKind, Read as _, Seek as _, SeekFrom, Write as _},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use sha2::{Digest as _, Sha256};

use super::{
    csv,
    header::Header,
    send::{Done, Rejected},
    source::Dialect,
    text::Position,
};
use crate::{
    cli::failure::Failure,
    domain::token::Hex,
    private_file::{self, with_suffix},
};

/// So much of a file's beginning tells it from another one.
const FACE: u64 = 64 * 1024;

/// How far an import came.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Progress {
    /// Lines of the file that are done, the header among them.
    pub(super) lines: u64,
    /// The bytes that they have.
    bytes: u64,
    pub(super) imported: u64,
    pub(super) there_already: u64,
    #[serde(default)]
    pub(super) expired: u64,
    #[serde(default)]
    pub(super) inactive: u64,
    pub(super) rejected: u64,
    /// The bytes of the file of rejected rows.
    rejected_bytes: u64,
    /// SHA-256 of the beginning of what is done, up to 64 KiB.
    face: String,
}

/// The two files beside an import's file.
#[derive(Debug)]
pub(super) struct Journal {
    pub(super) progress: Progress,
    /// Whether an earlier run began.
    pub(super) resumed: bool,
    progress_path: PathBuf,
    rejected_path: PathBuf,
    rejected: Option<File>,
    /// The beginning of the import's file.
    face: Vec<u8>,
}

impl Journal {
    /// Reads how far an earlier run came, if there was one.
    pub(super) fn open(file: &Path, progress_path: Option<PathBuf>) -> Result<Journal, Failure> {
        let progress_path = progress_path.unwrap_or_else(|| with_suffix(file, ".keyward-progress"));
        let rejected_path = with_suffix(file, ".rejected");
        let mut face = Vec::new();
        File::open(file)
            .and_then(|file| file.take(FACE).read_to_end(&mut face))
            .map_err(|error| Failure::usage(format!("cannot read {}: {error}", file.display())))?;
        let (progress, resumed) = match fs::read_to_string(&progress_path) {
            Ok(text) => (understand(&text, &progress_path, &face)?, true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => (Progress::default(), false),
            Err(error) => {
                return Err(Failure::usage(format!("cannot read {}: {error}", progress_path.display())));
            }
        };
        let mut journal = Journal { progress, resumed, progress_path, rejected_path, rejected: None, face };
        if fs::symlink_metadata(&journal.rejected_path).is_ok() {
            // What was written after the last progress is written again.
            journal.open_rejected()?;
        }
        // From now on a run that ends early, however early, is one to go on with.
        journal.save()?;
        Ok(journal)
    }

    /// Where to go on; none at the beginning.
    pub(super) fn from(&self) -> Option<Position> {
        let Progress { lines, bytes, .. } = self.progress;
        (bytes > 0).then_some(Position { bytes, lines })
    }

    /// The rows that are done.
    pub(super) fn rows(&self) -> u64 {
        let Progress { imported, there_already, expired, inactive, rejected, .. } = self.progress;
        imported + there_already + expired + inactive + rejected
    }

    /// Where the rejected rows are.
    pub(super) fn rejected_path(&self) -> &Path {
        &self.rejected_path
    }

    /// Where the progress is.
    pub(super) fn progress_path(&self) -> &Path {
        &self.progress_path
    }

    /// Notes what became of a batch.
    pub(super) fn note(&mut self, done: &Done, dialect: &Dialect) -> Result<(), Failure> {
        if !done.rejected.is_empty() {
            let mut text = String::new();
            if let Dialect::Separated(Header { raw, separator, .. }) = dialect
                && self.progress.rejected_bytes == 0
            {
                text = format!("line{separator}error{separator}message{separator}{raw}\n");
            }
            done.rejected.iter().for_each(|row| text.push_str(&shown(row, dialect)));
            let written = match &mut self.rejected {
                Some(file) => file.write_all(text.as_bytes()),
                None => self.open_rejected()?.write_all(text.as_bytes()),
            };
            written.map_err(|error| unwritable(&self.rejected_path, &error))?;
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

    fn open_rejected(&mut self) -> Result<&mut File, Failure> {
        // The rows may hold tokens: people put them where digests belong.
        let open = || match private_file::open_existing(&self.rejected_path) {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                private_file::create_new(&self.rejected_path)
            }
            Ok(mut file) if self.progress.rejected_bytes > 0 => {
                file.set_len(self.progress.rejected_bytes)?;
                file.seek(SeekFrom::End(0))?;
                Ok(file)
            }
            // It is another import's: nothing of it is kept, neither its mode nor its owner.
            Ok(_) => {
                fs::remove_file(&self.rejected_path)?;
                private_file::create_new(&self.rejected_path)
            }
            failed => failed,
        };
        let file = open().map_err(|error| unwritable(&self.rejected_path, &error))?;
        Ok(self.rejected.insert(file))
    }

    /// Writes the progress whole or not at all.
    fn save(&mut self) -> Result<(), Failure> {
        self.progress.face = face(&self.face, self.progress.bytes);
        let text = toml::to_string(&self.progress).unwrap_or_default();
        let text =
            format!("# How far this import came. Without this file it begins at the beginning.\n{text}");
        private_file::replace(&self.progress_path, text.as_bytes())
            .map_err(|error| unwritable(&self.progress_path, &error))
    }
}

fn understand(text: &str, path: &Path, beginning: &[u8]) -> Result<Progress, Failure> {
    let hint = "remove it to begin at the beginning, or name another one: --progress FILE";
    let progress: Progress = toml::from_str(text)
        .map_err(|_| Failure::usage(format!("{} is no progress of an import", path.display())).hint(hint))?;
    if progress.face != face(beginning, progress.bytes) {
        return Err(Failure::usage(format!("{} belongs to another file", path.display())).hint(hint));
    }
    Ok(progress)
}

/// What tells a file from another, by what of it is done.
fn face(beginning: &[u8], done: u64) -> String {
    let length = usize::try_from(done.min(FACE)).unwrap_or_default().min(beginning.len());
    let missing = done.min(FACE) as usize - length;
    // A file that has become shorter is another one.
    format!("{}{}", Hex(&Sha256::digest(&beginning[..length])), if missing > 0 { " cut" } else { "" })
}

fn unwritable(path: &Path, error: &io::Error) -> Failure {
    Failure::usage(format!("cannot write {}: {error}", path.display()))
}

/// A rejected row with what was wrong with it, as the file is written: put right, it can be imported. Objects are
/// written one a line.
fn shown(row: &Rejected, dialect: &Dialect) -> String {
    let Rejected { line, error, message, raw } = row;
    if let Dialect::Separated(Header { separator, .. }) = dialect {
        let field = |text: &str| csv::field(text, *separator);
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
    use crate::cli::import::json::Layout;

    fn rejected(line: u64, raw: &str) -> Rejected {
        let (error, message) = ("INVALID_REQUEST".to_owned(), "scopes: \"x\", no".to_owned());
        Rejected { line, error, message, raw: raw.into() }
    }

    fn done(lines: u64, bytes: u64, rejected: Vec<Rejected>) -> Done {
        Done { end: Position { bytes, lines }, imported: 1, rejected, ..Done::default() }
    }

    fn separated(separator: char, header: &str) -> Dialect {
        Dialect::Separated(Header { separator, raw: header.to_owned(), columns: Vec::new() })
    }

    fn file(folder: &tempfile::TempDir, text: &str) -> PathBuf {
        let path = folder.path().join("keys.csv");
        fs::write(&path, text).unwrap();
        path
    }

    #[test]
    fn an_import_goes_on_where_it_was_and_rejects_nothing_twice() {
        let folder = tempfile::tempdir().unwrap();
        let path = file(&folder, "sha256\na\nb\nc\n");
        let mut first = Journal::open(&path, None).unwrap();
        assert!(!first.resumed && first.from().is_none());
        let dialect = separated(',', "sha256");
        first.note(&done(2, 9, vec![rejected(2, "a")]), &dialect).unwrap();
        let whole = fs::read_to_string(first.rejected_path()).unwrap();
        // Killed after the rejected rows were written and before the progress was.
        first.rejected.as_mut().unwrap().write_all(b"3,half a ro").unwrap();
        drop(first);

        let mut second = Journal::open(&path, None).unwrap();
        assert!(second.resumed);
        assert_eq!(second.from(), Some(Position { bytes: 9, lines: 2 }));
        second.note(&done(3, 11, vec![rejected(3, "b")]), &dialect).unwrap();
        assert_eq!((second.progress.imported, second.progress.rejected), (2, 2));
        let text = fs::read_to_string(second.rejected_path()).unwrap();
        assert_eq!(text, whole + "3,INVALID_REQUEST,\"scopes: \"\"x\"\", no\",b\n");
        assert!(text.starts_with("line,error,message,sha256\n2,"), "{text}");
    }

    #[test]
    fn a_run_that_was_killed_at_once_is_one_to_go_on_with() {
        let folder = tempfile::tempdir().unwrap();
        let path = file(&folder, "sha256\na\n");
        drop(Journal::open(&path, None).unwrap());
        let second = Journal::open(&path, None).unwrap();
        assert!(second.resumed && second.from().is_none());
    }

    #[test]
    fn the_progress_of_another_file_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = file(&folder, "sha256\na\nb\n");
        let mut journal = Journal::open(&path, None).unwrap();
        journal.note(&done(2, 9, Vec::new()), &separated(',', "sha256")).unwrap();
        for other in ["sha256\nx\nb\n", "sha256\n"] {
            file(&folder, other);
            let error = Journal::open(&path, None).unwrap_err().to_string();
            assert!(error.contains("belongs to another file") && error.contains("--progress"), "{error}");
        }
        file(&folder, "sha256\na\nb\nc\n");
        assert!(Journal::open(&path, None).is_ok(), "a file may grow");
        fs::write(with_suffix(&path, ".keyward-progress"), "nonsense").unwrap();
        assert!(Journal::open(&path, None).unwrap_err().to_string().contains("no progress of an import"));
    }

    #[test]
    fn rejected_rows_are_separated_as_their_file_is() {
        let folder = tempfile::tempdir().unwrap();
        let mut journal = Journal::open(&file(&folder, "sha256;name\na;b\n"), None).unwrap();
        journal.note(&done(2, 16, vec![rejected(2, "a;b")]), &separated(';', "sha256;name")).unwrap();
        let text = fs::read_to_string(journal.rejected_path()).unwrap();
        let row = "2;INVALID_REQUEST;\"scopes: \"\"x\"\", no\";a;b\n";
        assert_eq!(text, format!("line;error;message;sha256;name\n{row}"));
    }

    #[test]
    fn an_import_of_one_line_goes_on_within_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = file(&folder, "[{},{}]");
        let mut journal = Journal::open(&path, None).unwrap();
        journal.note(&done(0, 3, Vec::new()), &Dialect::Json(Layout::Array)).unwrap();
        assert_eq!(Journal::open(&path, None).unwrap().from(), Some(Position { bytes: 3, lines: 0 }));
    }

    #[test]
    fn rejected_objects_keep_their_fields() {
        let json = Dialect::Json(Layout::Lines);
        assert_eq!(
            shown(&rejected(7, "{\"account\": \"acme\"}"), &json),
            "{\"account\":\"acme\",\"error\":\"INVALID_REQUEST\",\"line\":7,\
             \"message\":\"scopes: \\\"x\\\", no\"}\n"
        );
        assert!(shown(&rejected(7, "nonsense"), &json).contains("\"row\":\"nonsense\""));
    }
}
