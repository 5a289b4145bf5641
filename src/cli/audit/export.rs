//! `keyward audit export`: writes the audit log as a file that anybody can verify, and verifies each entry before it is
//! written.

use std::{
    fs::File,
    io::{BufWriter, Write as _},
    path::PathBuf,
};

use clap::Args;

use crate::{
    cli::{
        api_client::{ApiClient, DefaultTimeout},
        context::CommandContext,
        error::CliError,
        value_format::shown_path,
    },
    domain::{
        lease::LogPosition,
        log::{ChainHash, LogEntry},
        log_chain::ChainVerifier,
        log_export,
        name::{AccountId, KeyId, UserId},
        time::{Revision, Timestamp},
    },
    pb, private_file,
};

const EXPORT_PAGE_SIZE: u32 = 1000;

#[derive(Debug, Args)]
pub(in crate::cli) struct AuditExportArgs {
    /// Write to this new file (mode 0600) instead of standard output
    #[arg(long, value_name = "FILE")]
    to: Option<PathBuf>,
    /// Only entries after this one, such as the last entry of an earlier export
    #[arg(long, value_name = "REVISION", default_value_t = 0)]
    after: u64,
}

enum ExportTarget {
    File(BufWriter<File>, PathBuf),
    Stdout,
}

impl ExportTarget {
    fn open(to: Option<&PathBuf>) -> Result<ExportTarget, CliError> {
        let Some(path) = to else { return Ok(ExportTarget::Stdout) };
        let file = private_file::create_new(path)
            .map_err(|error| CliError::new(format!("cannot create {}: {error}", shown_path(path))))?;
        Ok(ExportTarget::File(BufWriter::new(file), path.clone()))
    }

    fn write(&mut self, cx: &mut CommandContext<'_>, text: &str) -> Result<(), CliError> {
        match self {
            ExportTarget::File(file, path) => file
                .write_all(text.as_bytes())
                .map_err(|error| CliError::new(format!("cannot write {}: {error}", shown_path(path)))),
            // An incomplete export is worthless, so a closed pipe is an error.
            ExportTarget::Stdout => cx.console.print_required(text),
        }
    }

    fn finish(self) -> Result<(), CliError> {
        let ExportTarget::File(mut file, path) = self else { return Ok(()) };
        file.flush()
            .and_then(|()| private_file::sync_to_disk(file.get_ref(), &path))
            .map_err(|error| CliError::new(format!("cannot write {}: {error}", shown_path(&path))))
    }
}

impl AuditExportArgs {
    pub(in crate::cli) async fn run(self, cx: &mut CommandContext<'_>) -> Result<u8, CliError> {
        let session = cx.connect()?.without_spinner();
        let mut sink = ExportTarget::open(self.to.as_ref())?;
        let mut chain: Option<ChainVerifier> = None;
        let mut page_token = String::new();
        loop {
            let (rows, next) = fetch_page(&session, self.after, page_token).await?;
            for row in &rows {
                let has_header = chain.is_some();
                let before =
                    LogPosition { revision: Revision(row.revision.0.saturating_sub(1)), hash: row.prev_hash };
                let chain = chain.get_or_insert(ChainVerifier::from_position(before));
                if !has_header {
                    sink.write(cx, &log_export::header_line(before))?;
                }
                let revision = chain.position.revision.next();
                chain
                    .verify_next(row)
                    .map_err(|fault| CliError::refused(format!("entry {revision}: {fault}")))?;
                sink.write(cx, &log_export::entry_line(row))?;
            }
            page_token = next;
            if page_token.is_empty() {
                break;
            }
        }
        let Some(chain) = chain else {
            let none = format!("no entry after {}: nothing was exported", self.after);
            return Err(CliError::refused(none));
        };
        sink.write(cx, &log_export::trailer_line(chain.position, chain.entry_count))?;
        sink.finish()?;
        if let Some(path) = &self.to {
            let summary = format!(
                "Exported {} entries up to {} to {}.\n",
                chain.entry_count,
                chain.position.revision,
                path.display()
            );
            cx.console.eprint(&summary);
        }
        Ok(0)
    }
}

async fn fetch_page(
    session: &ApiClient,
    after: u64,
    page_token: String,
) -> Result<(Vec<LogEntry>, String), CliError> {
    let request = pb::ListAuditEntriesRequest {
        page_size: Some(EXPORT_PAGE_SIZE),
        page_token,
        oldest_first: true,
        full: true,
        after_revision: after,
        ..Default::default()
    };
    let response = session
        .call_audit(DefaultTimeout::Quick, request, async |mut client, request| client.list(request).await)
        .await?;
    let rows = response.entries.into_iter().map(|entry| {
        let revision = entry.revision;
        to_log_row(entry).ok_or_else(|| CliError::new(format!("cannot read the server's entry {revision}")))
    });
    Ok((rows.collect::<Result<_, _>>()?, response.next_page_token))
}

/// Converts an entry to the form that was hashed; `None` if a field is malformed.
fn to_log_row(entry: pb::AuditEntry) -> Option<LogEntry> {
    let account = |text: &str| (!text.is_empty()).then(|| AccountId::parse(text)).transpose().ok();
    let user = |text: &str| (!text.is_empty()).then(|| UserId::parse(text)).transpose().ok();
    let hash = |bytes: Vec<u8>| ChainHash::try_from(bytes).ok();
    let at = entry.at?;
    Some(LogEntry {
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
