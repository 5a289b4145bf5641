//! `keyward keys import`: imports keys that another system issued, from a file of any size.
//!
//! 1. The whole file is checked, so that an unreadable one imports nothing.
//! 2. One thread reads the file in batches, and several calls are in flight at once.
//! 3. The results are recorded in the order of the file.
//!
//! So memory holds only a few batches, and an interrupted import continues where it stopped.

mod cell;
mod checkpoint;
mod column;
mod csv_rows;
mod header;
mod json_rows;
mod precheck;
mod row;
mod send;
mod source;
mod summary;
mod text_reader;

use std::{
    fs::File,
    io::{self, Read, Seek},
    path::{Path, PathBuf},
    pin::pin,
};

use clap::Args;
use encoding_rs::Encoding;
use futures_util::{StreamExt as _, stream};
use indicatif::ProgressBar;
use tokio::{
    sync::{mpsc, watch},
    time::Instant,
};

use self::{
    checkpoint::ImportCheckpoint,
    column::ColumnNameArgs,
    precheck::precheck_file,
    row::RowDefaultArgs,
    send::{RetryState, send_batch},
    source::{ImportBatch, ImportFormat, ReadOptions, RowSource, parse_encoding},
    summary::{ImportSummary, RowProblems},
    text_reader::TextReader,
};
use super::{
    api_client::{ApiClient, DefaultTimeout},
    console,
    context::CommandContext,
    error::{CliError, EXIT_REFUSED},
    value_format::{format_row_count, shown_path},
};
use crate::{
    clock::{Clock as _, SystemClock},
    domain::time::Timestamp,
    pb,
};

/// The limit of calls that are in flight at once.
const MAX_CALLS_IN_FLIGHT: usize = 4;

const FORMAT_HELP: &str = "\
CSV starts with a row that names its columns, in any order and spelling (expires_at, Expires At, expiresAt): account, \
user, environment, name, scopes, roles, expires_at, customers, allowed_cidrs, rate_limits, quota, metadata, sha256, \
hint, entropy_bits. Only sha256 is required: the SHA-256 of the whole token, 64 hexadecimal digits or base64. Commas, \
semicolons, tabs or | separate the fields; the separator is detected from the header, or from a line sep=; before it. \
JSON has objects with the same names: one per line, or in an array. \
UTF-8 and UTF-16 are detected, other encodings need --encoding.

Lists are separated by blanks, commas or ;, or are arrays: [\"a\",\"b\"] or {a,b}. expires_at is an instant \
(2027-01-31T00:00:00Z, 2027-01-31, Unix seconds or milliseconds; UTC unless it has a zone), a duration from now \
(90d) or never. metadata is a JSON object of texts; rate_limits are written calls=100/1m, a quota 1000/month; \
entropy_bits is the strength of the token, if known. The flags fill columns that a row leaves empty.

Rows of expired keys are skipped and counted; so are rows of inactive keys, by the columns active, \
enabled, revoked, disabled, revoked_at and disabled_at. A file with other columns is refused before anything is \
sent; map them with --rename and --ignore.

To continue an interrupted import, repeat the same command: FILE.keyward-progress stores the progress. Rejected rows \
do not stop others; FILE.rejected has them with their line and the reason. Correct \
them there and import that file; or correct FILE, remove FILE.keyward-progress and FILE.rejected, and import FILE \
again: rows that are already imported are counted as such.

Exit codes: 0 every row is imported or skipped; 1 some were rejected; 2 the import did not reach the end of the file.

Example: keyward keys import keys.csv --account acme --environment production --role agent";

#[derive(Debug, Args)]
#[command(after_help = FORMAT_HELP)]
pub(super) struct KeyImportArgs {
    /// The CSV or JSON file with the keys
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// The file's format [default: json if it starts with { or [, or its name ends in .json or .jsonl; else csv]
    #[arg(long, value_enum, value_name = "FORMAT")]
    format: Option<ImportFormat>,
    /// Encoding of a file that is neither UTF-8 nor UTF-16, such as windows-1252
    #[arg(long, value_name = "NAME", value_parser = parse_encoding)]
    encoding: Option<&'static Encoding>,
    /// File that stores the progress [default: FILE.keyward-progress]
    #[arg(long, value_name = "FILE")]
    progress: Option<PathBuf>,
    #[command(flatten)]
    columns: ColumnNameArgs,
    #[command(flatten)]
    defaults: RowDefaultArgs,
}

impl KeyImportArgs {
    pub(super) async fn run(self, cx: &mut CommandContext<'_>) -> Result<u8, CliError> {
        let session = cx.connect()?.without_spinner();
        let unreadable = |error| CliError::new(format!("cannot read {}: {error}", shown_path(&self.file)));
        let file = File::open(&self.file).map_err(unreadable)?;
        let size = file.metadata().map_err(unreadable)?.len();
        let options = self.read_options(&file, SystemClock.now())?;
        options.defaults.check_expiry(options.now)?;
        // Check the whole file first, so that an invalid one imports nothing.
        precheck_file(&file, options.encoding, options.required_syntax(&file)?)?;
        let unused = RowSource::open(&file, options.clone(), None)?.check_columns()?;
        for flag in unused {
            cx.console.eprint(&format!("No object has the field that {flag} names.\n"));
        }
        let mut checkpoint = ImportCheckpoint::open(&self.file, self.progress)?;
        let source = RowSource::open(file, options, checkpoint.resume_position())?;
        if checkpoint.resume_position().is_some_and(|from| from.bytes < size) {
            cx.console.eprint(&format!("Resuming after {}.\n", checkpoint.describe_progress()));
        }
        let bar = console::new_progress_bar(size);
        let (began, before, mut problems) = (Instant::now(), checkpoint.rows_done(), RowProblems::default());
        let end = import_rows(source, &session, &mut checkpoint, &mut problems, &bar).await;
        bar.finish_and_clear();
        let rows_now = checkpoint.rows_done() - before;
        let summary = ImportSummary::new(&checkpoint, &problems, end.is_ok(), rows_now, began.elapsed());
        if summary.complete || checkpoint.rows_done() > 0 {
            cx.print_response(&summary, |colors| summary.to_table(&checkpoint).render(colors))?;
        }
        let progress = checkpoint.progress_path().display();
        end.map_err(|failure| {
            failure.with_context(&format!("stopped after {}", checkpoint.describe_progress()))
        })
        .map_err(|failure| {
            failure.with_hint(format!("repeat the command to continue from there ({progress})"))
        })?;
        Ok(if summary.rejected > 0 { EXIT_REFUSED } else { 0 })
    }

    fn read_options(&self, file: &File, now: Timestamp) -> Result<ReadOptions, CliError> {
        let format = match self.format {
            Some(format) => format,
            None => detect_format(&mut TextReader::open(file, self.encoding)?, &self.file)?,
        };
        let (columns, defaults) = (self.columns.clone(), self.defaults.clone());
        Ok(ReadOptions { format, encoding: self.encoding, columns, defaults, now })
    }
}

/// Detects the format by the file's first character, or else by its name.
fn detect_format(text: &mut TextReader<impl Read + Seek>, path: &Path) -> io::Result<ImportFormat> {
    let blank = |unit: &u16| [b' ', b'\t', b'\r', b'\n'].map(u16::from).contains(unit);
    while text.peek_unit()?.is_some_and(|unit| blank(&unit)) {
        text.consume_unit(&mut Vec::new())?;
    }
    let first = text.peek_unit()?.and_then(|unit| char::from_u32(unit.into()));
    Ok(match first {
        Some('{' | '[') => ImportFormat::Json,
        _ => format_by_name(path),
    })
}

/// Returns the format by a file's name. A file of rejected rows has the format of its origin.
fn format_by_name(path: &Path) -> ImportFormat {
    let name = path.to_string_lossy().to_ascii_lowercase();
    let mut name = name.as_str();
    while let Some(origin) = name.strip_suffix(".rejected") {
        name = origin;
    }
    let json = [".jsonl", ".ndjson", ".json"].iter().any(|ending| name.ends_with(ending));
    if json { ImportFormat::Json } else { ImportFormat::Csv }
}

/// Sends the file's batches and records their results, until the end of the file or Ctrl-C.
async fn import_rows(
    source: RowSource<File>,
    session: &ApiClient,
    checkpoint: &mut ImportCheckpoint,
    problems: &mut RowProblems,
    bar: &ProgressBar,
) -> Result<(), CliError> {
    let dialect = source.dialect().clone();
    let mut stop = watch_ctrl_c();
    let batches = spawn_reader(source, stop.clone());
    let attempts = RetryState::default();
    let import = async |request: pb::ImportKeysRequest| {
        session
            .call_keys(DefaultTimeout::Propagation, request, async |mut client, request| {
                client.import(request).await
            })
            .await
    };
    let sent = stream::unfold(batches, async |mut batches| Some((batches.recv().await?, batches)))
        .map(|batch| {
            let (attempts, import) = (&attempts, &import);
            async move { send_batch(batch?, attempts, import).await }
        })
        .buffered(MAX_CALLS_IN_FLIGHT);
    let mut sent = pin!(sent);
    loop {
        let done = tokio::select! {
            done = sent.next() => done,
            _ = stop.wait_for(|count| *count > 1) => return Err(CliError::new("interrupted")),
        };
        let Some(done) = done else { break };
        let done = done?;
        problems.add_rejected(&done.rejected);
        checkpoint.record_batch(&done, &dialect)?;
        if let Some(from) = checkpoint.resume_position() {
            bar.set_position(from.bytes);
            bar.set_message(format!(
                "{}, {} rejected",
                format_row_count(checkpoint.rows_done()),
                checkpoint.progress.rejected
            ));
        }
    }
    if *stop.borrow() > 0 { Err(CliError::new("interrupted")) } else { Ok(()) }
}

/// Reads batches on a separate thread until the end of the file or Ctrl-C.
fn spawn_reader(
    mut source: RowSource<File>,
    stop: watch::Receiver<u32>,
) -> mpsc::Receiver<Result<ImportBatch, CliError>> {
    let (sender, batches) = mpsc::channel(1);
    tokio::task::spawn_blocking(move || {
        while *stop.borrow() == 0
            && let Some(batch) = source.next_batch().map_err(CliError::from).transpose()
        {
            let last = batch.is_err();
            // The receiver is dropped after a failed call.
            if sender.blocking_send(batch).is_err() || last {
                break;
            }
        }
    });
    batches
}

/// Counts Ctrl-C: the first stops the import after the calls in flight, the second at once.
fn watch_ctrl_c() -> watch::Receiver<u32> {
    let (sender, receiver) = watch::channel(0);
    tokio::spawn(async move {
        while tokio::signal::ctrl_c().await.is_ok() {
            sender.send_modify(|count| *count += 1);
        }
        // If signals fail, keep the sender: dropping it would look like an interruption.
        std::future::pending::<()>().await;
    });
    receiver
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Only {
        #[command(flatten)]
        args: KeyImportArgs,
    }

    #[test]
    fn the_format_is_known_by_the_files_name() {
        for (name, format) in [
            ("keys.csv", ImportFormat::Csv),
            ("keys", ImportFormat::Csv),
            ("keys.JSONL", ImportFormat::Json),
            ("keys.ndjson", ImportFormat::Json),
            ("keys.jsonl.rejected", ImportFormat::Json),
            ("keys.csv.rejected.rejected", ImportFormat::Csv),
        ] {
            assert_eq!(format_by_name(Path::new(name)), format, "{name}");
        }
    }

    #[test]
    fn the_format_is_known_by_the_files_first_character() {
        let format = |text: &[u8], name: &str| {
            let mut text = TextReader::open(Cursor::new(text.to_vec()), None).unwrap();
            detect_format(&mut text, Path::new(name)).unwrap()
        };
        for json in [&b"[]"[..], b"\xef\xbb\xbf\r\n {", b"\xff\xfe[\0"] {
            assert_eq!(format(json, "keys.csv"), ImportFormat::Json, "{json:?}");
        }
        assert_eq!(
            (format(b"sha256", "keys.tsv"), format(b"", "keys.json")),
            (ImportFormat::Csv, ImportFormat::Json)
        );
    }

    #[test]
    fn defaults_have_the_flags_of_create() {
        let line = "import keys.csv --account acme -e production -s a:b,c:d --expires 90d --metadata a=b";
        assert!(Only::try_parse_from(line.split_whitespace()).is_ok());
        for bad in ["import", "import f --account a --user u", "import f --format xml"] {
            assert!(Only::try_parse_from(bad.split_whitespace()).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_help_names_every_column() {
        for name in column::ImportColumn::list_names().split(", ") {
            assert!(FORMAT_HELP.contains(name), "{name}");
        }
    }
}
