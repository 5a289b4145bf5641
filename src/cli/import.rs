//! `keyward keys import`: takes in keys made elsewhere, from a file of any size.
//!
//! One thread reads the file in batches; several calls are under way at once; what came of them is noted in the
//! order of the file. So memory holds a few batches, and an import that was interrupted goes on where it was.

mod csv;
mod journal;
mod lines;
mod row;
mod send;
mod source;

use std::{
    fs::File,
    io::BufReader,
    path::{Path, PathBuf},
    pin::pin,
    time::Duration,
};

use clap::Args;
use futures_util::{StreamExt as _, stream};
use indicatif::ProgressBar;
use serde::{Serialize, Serializer};
use tokio::{
    sync::{mpsc, watch},
    time::Instant,
};

use self::{
    journal::Journal,
    row::DefaultArgs,
    send::{Attempts, send},
    source::{Batch, Format, MOST, Source},
};
use super::{
    client::{Patience, Session},
    console,
    context::Context,
    failure::{Failure, REFUSED},
    json::Json,
    table::Record,
};
use crate::pb;

/// How many calls are under way at once.
const AT_ONCE: usize = 4;

const FORMAT: &str = "\
CSV (RFC 4180) begins with a line that names its columns, in any order: account, user, environment, name, \
scopes, roles, expires_at, customers, allowed_cidrs, rate_limits, quota, metadata, sha256, hint. Only sha256 is \
needed: the SHA-256 of the whole token, 64 hexadecimal digits or base64. Lists are separated by blanks or ;. \
expires_at is an instant (RFC 3339), a duration from now (90d) or never; metadata is a JSON object of texts; \
rate_limits are written calls=100/1m, a quota 1000/month. A file of JSON lines has an object with the same names \
on each line, with arrays for lists and an object for metadata. What a row leaves empty the flags fill in.

The import goes on where it was when the same command is given again: FILE.keyward-progress holds how far it \
came (remove it to begin at the beginning). Rows that are not imported go to FILE.rejected with their line and \
the reason, and stop no other; put right, that file can be imported itself. Where an interrupted run may have \
sent a row already, DIGEST_TAKEN means that it is there.

Exit codes: 0 every row is there; 1 some were rejected; 2 the import did not come to the file's end.

Example: keyward keys import keys.csv --account acme --environment production --role agent";

/// Flags of `keyward keys import`.
#[derive(Debug, Args)]
#[command(after_help = FORMAT)]
pub(super) struct ImportArgs {
    /// The file of keys
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// What the file holds [default: jsonl for .jsonl, .ndjson and .json, else csv]
    #[arg(long, value_enum, value_name = "FORMAT")]
    format: Option<Format>,
    /// File that keeps how far the import came [default: FILE.keyward-progress]
    #[arg(long, value_name = "FILE")]
    progress: Option<PathBuf>,
    #[command(flatten)]
    defaults: DefaultArgs,
}

/// What an import came to.
#[derive(Debug, Serialize)]
struct Summary {
    /// Whether the file's end was reached.
    complete: bool,
    lines: u64,
    imported: u64,
    there_already: u64,
    rejected: u64,
    rejected_file: Option<String>,
    /// Rows that this run has sent or rejected.
    rows_now: u64,
    seconds: f64,
    rows_per_second: f64,
}

impl Json for Summary {
    fn write<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.serialize(serializer)
    }
}

impl ImportArgs {
    pub(super) async fn run(self, cx: &mut Context<'_>) -> Result<u8, Failure> {
        let session = cx.session()?.quiet();
        let format = self.format.unwrap_or_else(|| guess(&self.file));
        let open = File::open(&self.file)
            .and_then(|file| file.metadata().map(|about| (file, about.len())))
            .map_err(|error| Failure::usage(format!("cannot read {}: {error}", self.file.display())));
        let (file, size) = open?;
        // The header first: a file that is not understood leaves nothing behind.
        Source::open(BufReader::new(file.try_clone()?), format, DefaultArgs::default(), None)?;
        let mut journal = Journal::open(&self.file, self.progress)?;
        let source = Source::open(BufReader::new(file), format, self.defaults, journal.from())?;
        if let Some(from) = journal.from().filter(|from| from.bytes < size) {
            cx.console.note(&format!("Going on after line {}.\n", from.lines));
        }
        let bar = console::progress(size);
        let (began, before) = (Instant::now(), rows(&journal));
        let end = run(source, &session, &mut journal, format, &bar).await;
        bar.finish_and_clear();
        let summary = Summary::of(&journal, end.is_ok(), rows(&journal) - before, began.elapsed());
        if summary.complete || summary.lines > 0 {
            cx.show(&summary, |colours| summary.for_people(&journal).show(colours))?;
        }
        let progress = journal.progress_path().display();
        end.map_err(|failure| failure.of(&format!("stopped after line {}", summary.lines)))
            .map_err(|failure| failure.hint(format!("the same command goes on from there ({progress})")))?;
        Ok(if summary.rejected > 0 { REFUSED } else { 0 })
    }
}

impl Summary {
    fn of(journal: &Journal, complete: bool, rows_now: u64, took: Duration) -> Summary {
        let progress = &journal.progress;
        let path = journal.rejected_path().display().to_string();
        Summary {
            complete,
            lines: progress.lines,
            imported: progress.imported,
            there_already: progress.there_already,
            rejected: progress.rejected,
            rejected_file: (progress.rejected > 0).then_some(path),
            rows_now,
            seconds: took.as_secs_f64(),
            rows_per_second: (rows_now as f64 / took.as_secs_f64().max(0.001)).round(),
        }
    }

    fn for_people(&self, journal: &Journal) -> Record {
        let file = self.rejected_file.as_ref();
        let rejected = file.map_or_else(|| "0".to_owned(), |file| format!("{}, see {file}", self.rejected));
        let already = match self.there_already {
            0 => String::new(),
            count => format!("{count}, imported by an earlier attempt"),
        };
        let record = Record::new()
            .field("imported", self.imported.to_string())
            .field("there already", already)
            .field("rejected", rejected)
            .field("lines done", self.lines.to_string());
        if self.rows_now == 0 && self.complete {
            let hint = format!("nothing; {} says that all is done", journal.progress_path().display());
            return record.field("this time", hint);
        }
        let Summary { rows_now, seconds, rows_per_second, .. } = self;
        record.field("this time", format!("{rows_now} rows in {seconds:.1}s, {rows_per_second:.0} rows/s"))
    }
}

/// The rows that are done.
fn rows(journal: &Journal) -> u64 {
    journal.progress.imported + journal.progress.there_already + journal.progress.rejected
}

/// What a file holds, by its name; a file of rejected rows holds what its origin held.
fn guess(path: &Path) -> Format {
    let name = path.to_string_lossy().to_ascii_lowercase();
    let mut name = name.as_str();
    while let Some(origin) = name.strip_suffix(".rejected") {
        name = origin;
    }
    let json = [".jsonl", ".ndjson", ".json"].iter().any(|ending| name.ends_with(ending));
    if json { Format::Jsonl } else { Format::Csv }
}

/// Sends the file's batches and notes what became of them, until the file or the person at the terminal ends it.
async fn run(
    source: Source<BufReader<File>>,
    session: &Session,
    journal: &mut Journal,
    format: Format,
    bar: &ProgressBar,
) -> Result<(), Failure> {
    let header = source.header().to_owned();
    let mut stop = interruptions();
    let batches = read(source, stop.clone());
    // Calls of an earlier run may have been under way behind what it noted, and no more than these rows.
    let mut unsure = if journal.resumed { AT_ONCE * MOST } else { 0 };
    let attempts = Attempts::default();
    let import = async |request: pb::ImportKeysRequest| {
        session
            .keys(Patience::Propagation, request, async |mut client, request| client.import(request).await)
            .await
    };
    let sent = stream::unfold(batches, async |mut batches| Some((batches.recv().await?, batches)))
        .map(|batch| {
            let repeated = unsure > 0;
            unsure = unsure.saturating_sub(batch.as_ref().map_or(0, |batch| batch.rows.len()));
            let (attempts, import) = (&attempts, &import);
            async move { send(batch?, repeated, attempts, import).await }
        })
        .buffered(AT_ONCE);
    let mut sent = pin!(sent);
    loop {
        let done = tokio::select! {
            done = sent.next() => done,
            _ = stop.wait_for(|asked| *asked > 1) => return Err(Failure::usage("interrupted")),
        };
        let Some(done) = done else { break };
        journal.note(&done?, format, &header)?;
        if let Some(from) = journal.from() {
            bar.set_position(from.bytes);
            bar.set_message(format!("{} rows, {} rejected", rows(journal), journal.progress.rejected));
        }
    }
    if *stop.borrow() > 0 { Err(Failure::usage("interrupted")) } else { Ok(()) }
}

/// Reads batches on a thread of their own until the file ends or somebody interrupts.
fn read(
    mut source: Source<BufReader<File>>,
    stop: watch::Receiver<u32>,
) -> mpsc::Receiver<Result<Batch, Failure>> {
    let (sender, batches) = mpsc::channel(1);
    tokio::task::spawn_blocking(move || {
        while *stop.borrow() == 0
            && let Some(batch) = source.batch().map_err(Failure::from).transpose()
        {
            let last = batch.is_err();
            // Nobody listens any more once a call has failed.
            if sender.blocking_send(batch).is_err() || last {
                break;
            }
        }
    });
    batches
}

/// Counts how often somebody pressed Ctrl-C: once ends the import in order, twice at once.
fn interruptions() -> watch::Receiver<u32> {
    let (sender, receiver) = watch::channel(0);
    tokio::spawn(async move {
        while tokio::signal::ctrl_c().await.is_ok() {
            sender.send_modify(|asked| *asked += 1);
        }
        // Where signals cannot be had, nobody interrupts; dropping the sender would look like it.
        std::future::pending::<()>().await;
    });
    receiver
}

#[cfg(test)]
mod tests {
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
            ("keys.JSONL", Format::Jsonl),
            ("keys.ndjson", Format::Jsonl),
            ("keys.jsonl.rejected", Format::Jsonl),
            ("keys.csv.rejected.rejected", Format::Csv),
        ] {
            assert_eq!(guess(Path::new(name)), format, "{name}");
        }
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
        for name in row::Column::names().split(", ") {
            assert!(FORMAT.contains(name), "{name}");
        }
    }
}
