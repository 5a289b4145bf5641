//! `keyward audit export`: the log as a file that anybody can verify. Each entry is verified as it comes.

use std::{
    fs::File,
    io::{BufWriter, Write as _},
    path::PathBuf,
};

use clap::Args;

use crate::{
    cli::{
        client::{Patience, Session},
        context::Context,
        failure::Failure,
        values::shown_path,
    },
    domain::{
        chain::Chain,
        export,
        lease::Position,
        log::{Hash, LogRow},
        name::{AccountId, KeyId, UserId},
        time::{Revision, Timestamp},
    },
    pb, private_file,
};

const PAGE: u32 = 1000;

/// Flags of `keyward audit export`.
#[derive(Debug, Args)]
pub(in crate::cli) struct ExportArgs {
    /// Write to this new file (mode 0600) instead of standard output
    #[arg(long, value_name = "FILE")]
    to: Option<PathBuf>,
    /// Only what comes after this entry, such as the last of an earlier export
    #[arg(long, value_name = "REVISION", default_value_t = 0)]
    after: u64,
}

/// Where the lines go.
enum Sink {
    File(BufWriter<File>, PathBuf),
    Stdout,
}

impl Sink {
    fn open(to: Option<&PathBuf>) -> Result<Sink, Failure> {
        let Some(path) = to else { return Ok(Sink::Stdout) };
        let file = private_file::create_new(path)
            .map_err(|error| Failure::usage(format!("{} cannot be made: {error}", shown_path(path))))?;
        Ok(Sink::File(BufWriter::new(file), path.clone()))
    }

    fn write(&mut self, cx: &mut Context<'_>, text: &str) -> Result<(), Failure> {
        match self {
            Sink::File(file, path) => file
                .write_all(text.as_bytes())
                .map_err(|error| Failure::usage(format!("{} cannot be written: {error}", shown_path(path)))),
            // A copy that ends early is none.
            Sink::Stdout => cx.console.deliver(text),
        }
    }

    fn finish(self) -> Result<(), Failure> {
        let Sink::File(mut file, path) = self else { return Ok(()) };
        file.flush()
            .and_then(|()| private_file::sync(file.get_ref(), &path))
            .map_err(|error| Failure::usage(format!("{} cannot be written: {error}", shown_path(&path))))
    }
}

impl ExportArgs {
    pub(in crate::cli) async fn run(self, cx: &mut Context<'_>) -> Result<u8, Failure> {
        let session = cx.session()?.quiet();
        let mut sink = Sink::open(self.to.as_ref())?;
        let mut chain: Option<Chain> = None;
        let mut page_token = String::new();
        loop {
            let (rows, next) = page(&session, self.after, page_token).await?;
            for row in &rows {
                let begun = chain.is_some();
                let before =
                    Position { revision: Revision(row.revision.0.saturating_sub(1)), hash: row.prev_hash };
                let chain = chain.get_or_insert(Chain::after(before));
                if !begun {
                    sink.write(cx, &export::begin(before))?;
                }
                let revision = chain.at.revision.next();
                chain.take(row).map_err(|fault| Failure::refused(format!("entry {revision}: {fault}")))?;
                sink.write(cx, &export::line(row))?;
            }
            page_token = next;
            if page_token.is_empty() {
                break;
            }
        }
        let Some(chain) = chain else {
            let none = format!("there is no entry after {}: nothing was exported", self.after);
            return Err(Failure::refused(none));
        };
        sink.write(cx, &export::end(chain.at, chain.entries))?;
        sink.finish()?;
        if let Some(path) = &self.to {
            let told =
                format!("{} entries up to {} are in {}.\n", chain.entries, chain.at.revision, path.display());
            cx.console.note(&told);
        }
        Ok(0)
    }
}

async fn page(session: &Session, after: u64, page_token: String) -> Result<(Vec<LogRow>, String), Failure> {
    let question = pb::ListAuditEntriesRequest {
        page_size: Some(PAGE),
        page_token,
        oldest_first: true,
        full: true,
        after_revision: after,
        ..Default::default()
    };
    let answer = session
        .audit(Patience::Short, question, async |mut client, request| client.list(request).await)
        .await?;
    let rows = answer.entries.into_iter().map(|entry| {
        let revision = entry.revision;
        row(entry).ok_or_else(|| Failure::usage(format!("the server's entry {revision} cannot be read")))
    });
    Ok((rows.collect::<Result<_, _>>()?, answer.next_page_token))
}

/// The entry as it was hashed. None = some of it cannot be read.
fn row(entry: pb::AuditEntry) -> Option<LogRow> {
    let account = |text: &str| (!text.is_empty()).then(|| AccountId::parse(text)).transpose().ok();
    let user = |text: &str| (!text.is_empty()).then(|| UserId::parse(text)).transpose().ok();
    let hash = |bytes: Vec<u8>| Hash::try_from(bytes).ok();
    let at = entry.at?;
    Some(LogRow {
        revision: Revision(entry.revision),
        at: Timestamp::from_micros(at.seconds * 1_000_000 + i64::from(at.nanos / 1000)),
        action: entry.action,
        account: account(&entry.account)?,
        key_id: (!entry.key_id.is_empty()).then(|| KeyId::parse(&entry.key_id)).transpose().ok()?,
        user: user(&entry.user)?,
        actor: entry.actor,
        actor_account: account(&entry.actor_account)?,
        acting_user: user(&entry.acting_user)?,
        method: entry.method,
        payload: entry.payload,
        prev_hash: hash(entry.prev_hash)?,
        hash: hash(entry.hash)?,
    })
}
