//! `keyward keys import`: takes in keys made elsewhere, from a file of any size.
//!
//! The file is looked through first, so that one that cannot be read leaves nothing behind. Then one thread reads it in
//! batches; several calls are under way at once; their results are recorded in the order of the file. So memory holds a
//! few batches, and an import that was interrupted continues where it was.

mod cell;
mod column;
mod csv;
mod header;
mod inspect;
mod journal;
mod json;
mod row;
mod send;
mod source;
mod summary;
mod text;

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
    column::ColumnArgs,
    inspect::inspect,
    journal::Journal,
    row::DefaultArgs,
    send::{Attempts, send},
    source::{Batch, Format, Reading, Source, encoding},
    summary::{Problems, Summary, rows},
    text::Text,
};
use super::{
    client::{Patience, Session},
    console,
    context::Context,
    failure::{Failure, REFUSED},
    values::shown_path,
};
use crate::{
    clock::{Clock as _, SystemClock},
    domain::time::Timestamp,
    pb,
};

/// How many calls are under way at once.
const AT_ONCE: usize = 4;

const FORMAT: &str = "\
CSV begins with a row that names its columns, in any order and spelling (expires_at, Expires At, expiresAt): account, \
user, environment, name, scopes, roles, expires_at, customers, allowed_cidrs, rate_limits, quota, metadata, sha256, \
hint, entropy_bits. Only sha256 is needed: the SHA-256 of the whole token, 64 hexadecimal digits or base64. Commas, \
semicolons, tabs or | separate the fields: the header, or a line sep=; before it, says which. \
JSON has objects with the same names: one on each line, or in an array. \
UTF-8 and UTF-16 are known by themselves, other encodings by --encoding.

Lists are separated by blanks, commas or ;, or are arrays: [\"a\",\"b\"] or {a,b}. expires_at is an instant \
(2027-01-31T00:00:00Z, 2027-01-31, Unix seconds or milliseconds; UTC unless it says otherwise), a duration from now \
(90d) or never. metadata is a JSON object of texts; rate_limits are written calls=100/1m, a quota 1000/month; \
entropy_bits says how strong the token is, if that is known. What a row leaves empty the flags fill in.

Rows of keys that have expired are skipped and counted; so are those of keys that do not work, by the columns active, \
enabled, revoked, disabled, revoked_at and disabled_at. A file with other columns is refused before anything is \
sent: --rename and --ignore say what they are.

The import continues where it was when the same command is given again: FILE.keyward-progress holds how far it \
came. Rows that are not imported go to FILE.rejected with their line and the reason, and stop no other. Mend \
them there, and import that file; or mend FILE, remove FILE.keyward-progress and FILE.rejected, and import FILE \
again: rows that are imported are counted as there already.

Exit codes: 0 every row is there or skipped; 1 some were rejected; 2 the import did not come to the file's end.

Example: keyward keys import keys.csv --account acme --environment production --role agent";

/// Flags of `keyward keys import`.
#[derive(Debug, Args)]
#[command(after_help = FORMAT)]
pub(super) struct ImportArgs {
    /// The file of keys
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// What the file holds [default: json if it begins with { or [, or is called .json or .jsonl; else csv]
    #[arg(long, value_enum, value_name = "FORMAT")]
    format: Option<Format>,
    /// Encoding of a file that is neither UTF-8 nor UTF-16, such as windows-1252
    #[arg(long, value_name = "NAME", value_parser = encoding)]
    encoding: Option<&'static Encoding>,
    /// File that keeps how far the import came [default: FILE.keyward-progress]
    #[arg(long, value_name = "FILE")]
    progress: Option<PathBuf>,
    #[command(flatten)]
    columns: ColumnArgs,
    #[command(flatten)]
    defaults: DefaultArgs,
}

impl ImportArgs {
    pub(super) async fn run(self, cx: &mut Context<'_>) -> Result<u8, Failure> {
        let session = cx.session()?.quiet();
        let unreadable = |error| Failure::usage(format!("cannot read {}: {error}", shown_path(&self.file)));
        let file = File::open(&self.file).map_err(unreadable)?;
        let size = file.metadata().map_err(unreadable)?.len();
        let reading = self.reading(&file, SystemClock.now())?;
        reading.defaults.check(reading.now)?;
        // The whole file first: one that is not understood leaves nothing behind.
        inspect(&file, reading.encoding, reading.syntax(&file)?)?;
        let unused = Source::open(&file, reading.clone(), None)?.check_columns()?;
        for flag in unused {
            cx.console.note(&format!("No object has the field of {flag}.\n"));
        }
        let mut journal = Journal::open(&self.file, self.progress)?;
        let source = Source::open(file, reading, journal.from())?;
        if journal.from().is_some_and(|from| from.bytes < size) {
            cx.console.note(&format!("Resuming after {}.\n", journal.place()));
        }
        let bar = console::progress(size);
        let (began, before, mut problems) = (Instant::now(), journal.rows(), Problems::default());
        let end = run(source, &session, &mut journal, &mut problems, &bar).await;
        bar.finish_and_clear();
        let rows_now = journal.rows() - before;
        let summary = Summary::new(&journal, &problems, end.is_ok(), rows_now, began.elapsed());
        if summary.complete || journal.rows() > 0 {
            cx.show(&summary, |colours| summary.for_people(&journal).show(colours))?;
        }
        let progress = journal.progress_path().display();
        end.map_err(|failure| failure.of(&format!("stopped after {}", journal.place())))
            .map_err(|failure| failure.hint(format!("the same command continues from there ({progress})")))?;
        Ok(if summary.rejected > 0 { REFUSED } else { 0 })
    }

    fn reading(&self, file: &File, now: Timestamp) -> Result<Reading, Failure> {
        let format = match self.format {
            Some(format) => format,
            None => format_of(&mut Text::open(file, self.encoding)?, &self.file)?,
        };
        let (columns, defaults) = (self.columns.clone(), self.defaults.clone());
        Ok(Reading { format, encoding: self.encoding, columns, defaults, now })
    }
}

/// What a file holds, by its first character, or by its name if that says nothing.
fn format_of(text: &mut Text<impl Read + Seek>, path: &Path) -> io::Result<Format> {
    let blank = |unit: &u16| [b' ', b'\t', b'\r', b'\n'].map(u16::from).contains(unit);
    while text.unit()?.is_some_and(|unit| blank(&unit)) {
        text.take_unit(&mut Vec::new())?;
    }
    let first = text.unit()?.and_then(|unit| char::from_u32(unit.into()));
    Ok(match first {
        Some('{' | '[') => Format::Json,
        _ => format_by_name(path),
    })
}

/// A file of rejected rows holds what its origin held.
fn format_by_name(path: &Path) -> Format {
    let name = path.to_string_lossy().to_ascii_lowercase();
    let mut name = name.as_str();
    while let Some(origin) = name.strip_suffix(".rejected") {
        name = origin;
    }
    let json = [".jsonl", ".ndjson", ".json"].iter().any(|ending| name.ends_with(ending));
    if json { Format::Json } else { Format::Csv }
}

/// Sends the file's batches and records their results, until the file ends or Ctrl-C stops it.
async fn run(
    source: Source<File>,
    session: &Session,
    journal: &mut Journal,
    problems: &mut Problems,
    bar: &ProgressBar,
) -> Result<(), Failure> {
    let dialect = source.dialect().clone();
    let mut stop = interruptions();
    let batches = read(source, stop.clone());
    let attempts = Attempts::default();
    let import = async |request: pb::ImportKeysRequest| {
        session
            .keys(Patience::Propagation, request, async |mut client, request| client.import(request).await)
            .await
    };
    let sent = stream::unfold(batches, async |mut batches| Some((batches.recv().await?, batches)))
        .map(|batch| {
            let (attempts, import) = (&attempts, &import);
            async move { send(batch?, attempts, import).await }
        })
        .buffered(AT_ONCE);
    let mut sent = pin!(sent);
    loop {
        let done = tokio::select! {
            done = sent.next() => done,
            _ = stop.wait_for(|asked| *asked > 1) => return Err(Failure::usage("interrupted")),
        };
        let Some(done) = done else { break };
        let done = done?;
        problems.add(&done.rejected);
        journal.record(&done, &dialect)?;
        if let Some(from) = journal.from() {
            bar.set_position(from.bytes);
            bar.set_message(format!("{}, {} rejected", rows(journal.rows()), journal.progress.rejected));
        }
    }
    if *stop.borrow() > 0 { Err(Failure::usage("interrupted")) } else { Ok(()) }
}

/// Reads batches on a thread of their own until the file ends or Ctrl-C stops it.
fn read(mut source: Source<File>, stop: watch::Receiver<u32>) -> mpsc::Receiver<Result<Batch, Failure>> {
    let (sender, batches) = mpsc::channel(1);
    tokio::task::spawn_blocking(move || {
        while *stop.borrow() == 0
            && let Some(batch) = source.batch().map_err(Failure::from).transpose()
        {
            let last = batch.is_err();
            // The receiver is dropped once a call has failed.
            if sender.blocking_send(batch).is_err() || last {
                break;
            }
        }
    });
    batches
}

/// Counts how often Ctrl-C was pressed: the first ends the import in order, the second at once.
fn interruptions() -> watch::Receiver<u32> {
    let (sender, receiver) = watch::channel(0);
    tokio::spawn(async move {
        while tokio::signal::ctrl_c().await.is_ok() {
            sender.send_modify(|asked| *asked += 1);
        }
        // Without signals nothing interrupts; dropping the sender would look like an interruption.
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
        args: ImportArgs,
    }

    #[test]
    fn the_format_is_known_by_the_files_name() {
        for (name, format) in [
            ("keys.csv", Format::Csv),
            ("keys", Format::Csv),
            ("keys.JSONL", Format::Json),
            ("keys.ndjson", Format::Json),
            ("keys.jsonl.rejected", Format::Json),
            ("keys.csv.rejected.rejected", Format::Csv),
        ] {
            assert_eq!(format_by_name(Path::new(name)), format, "{name}");
        }
    }

    #[test]
    fn the_format_is_known_by_the_files_first_character() {
        let format = |text: &[u8], name: &str| {
            let mut text = Text::open(Cursor::new(text.to_vec()), None).unwrap();
            format_of(&mut text, Path::new(name)).unwrap()
        };
        for json in [&b"[]"[..], b"\xef\xbb\xbf\r\n {", b"\xff\xfe[\0"] {
            assert_eq!(format(json, "keys.csv"), Format::Json, "{json:?}");
        }
        assert_eq!((format(b"sha256", "keys.tsv"), format(b"", "keys.json")), (Format::Csv, Format::Json));
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
        for name in column::Column::names().split(", ") {
            assert!(FORMAT.contains(name), "{name}");
        }
    }
}
