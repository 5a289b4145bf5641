//! Verifies the audit log: recomputes the hash chain page by page, and compares the tables with it.
//!
//! The checkpoint of the last archive must be stated in the chain. `table_comparison.rs` compares the tables.

use crate::{
    domain::{
        lease::LogPosition,
        log::{AuditAction, LogEntry},
        log_chain::ChainVerifier,
        log_payload::RedactedPayload,
        time::Revision,
    },
    service_error::{InvalidFields, ServiceError},
    store::{ArchiveCheckpoint, BulkReader, Store, StoreError},
};

pub(crate) use super::table_comparison::RecordMismatch;
use super::table_comparison::TableComparison;

/// Entries in memory at once, about a megabyte. Smaller pages cost more switches between threads; larger ones fall out
/// of the processor's cache before they are compared.
const PAGE: u32 = 1000;

/// What a verification covers.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct VerifyOptions {
    /// First entry; `None` = the oldest.
    pub(crate) from: Option<Revision>,
    /// Last entry; `None` = the newest.
    pub(crate) to: Option<Revision>,
    /// An entry whose hash is known from another source.
    pub(crate) expected_entry: Option<LogPosition>,
    /// Verifies only the chain, not the tables.
    pub(crate) is_chain_only: bool,
}

/// The result for an entry whose hash is known from another source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ExpectedEntryStatus {
    /// The log has the entry with this hash.
    Found,
    /// The log has a different entry at this revision: its history is another one.
    Differs,
    /// The entry was archived; the archive file has it.
    Archived,
    /// The log ends before the entry: entries were lost.
    Lost,
    /// The entry is outside the verified range.
    OutOfRange,
}

/// The result of a verification.
#[derive(Clone, Debug)]
pub(crate) struct VerificationReport {
    /// First entry of the range.
    pub(crate) first: Revision,
    /// Last entry that verified.
    pub(crate) last: LogPosition,
    /// Number of entries that verified.
    pub(crate) entries: u64,
    /// The head of the log when the verification started.
    pub(crate) head: LogPosition,
    /// The end of the archived part.
    pub(crate) checkpoint: Option<ArchiveCheckpoint>,
    /// The first entry that failed, and why.
    pub(crate) first_fault: Option<(Revision, String)>,
    /// Number of table records that were compared with the log.
    pub(crate) compared_records: u64,
    /// Records that differ from the log; only the first ones are listed.
    pub(crate) mismatches: Vec<RecordMismatch>,
    /// The result for [`VerifyOptions::expected_entry`].
    pub(crate) expected_status: Option<ExpectedEntryStatus>,
}

impl VerificationReport {
    /// Whether the chain, the tables and the expected entry all verified.
    #[must_use]
    pub(crate) fn is_valid(&self) -> bool {
        self.first_fault.is_none()
            && self.mismatches.is_empty()
            && !matches!(
                self.expected_status,
                Some(
                    ExpectedEntryStatus::Differs
                        | ExpectedEntryStatus::Lost
                        | ExpectedEntryStatus::OutOfRange
                )
            )
    }
}

///
/// Fails if the range does not fit the log, or the store fails.
pub(crate) async fn verify_log(
    store: &dyn Store,
    options: VerifyOptions,
) -> Result<VerificationReport, ServiceError> {
    // Read the checkpoint first. If it moves meanwhile, entries are missing, and the caller repeats the call.
    let checkpoint = store.newest_checkpoint().await?;
    let head = store.log_head().await?;
    let head = LogPosition { revision: head.revision, hash: head.hash };
    let oldest = checkpoint.map_or(LogPosition::START, |made| checkpoint_position(&made));
    let (from, to) = resolve_range(options, oldest.revision, head.revision)?;
    let mut walk = LogVerifier {
        reader: store.bulk_reader(to.next().0.saturating_sub(from.0)),
        chain: ChainVerifier::from_position(oldest),
        to,
        expected_entry: options.expected_entry,
        expected_status: options
            .expected_entry
            .map(|expect| status_outside_walk(expect, oldest, from, to, head.revision)),
        checkpoint,
        is_checkpoint_stated: false,
        first_fault: None,
        table_comparison: (!options.is_chain_only).then(|| TableComparison::starting_at(from)),
    };
    if from > oldest.revision.next() {
        walk.start_after(store, Revision(from.0 - 1)).await?;
    }
    walk.run(store).await?;
    walk.check_head(head);
    walk.check_checkpoint_stated(from == oldest.revision.next() && to == head.revision);
    let whole = walk.first_fault.is_none();
    let (records, mismatches) = match walk.table_comparison {
        Some(mut records) => {
            // A broken chain proves nothing about the tables.
            if whole {
                records.find_planted(store, &mut *walk.reader, oldest.revision).await?;
            }
            records.finish()
        }
        None => (0, Vec::new()),
    };
    let (last, entries) = (walk.chain.position, walk.chain.entry_count);
    let (broken, expected) = (walk.first_fault, walk.expected_status);
    Ok(VerificationReport {
        first: from,
        last,
        entries,
        head,
        checkpoint,
        first_fault: broken,
        compared_records: records,
        mismatches,
        expected_status: expected,
    })
}

fn checkpoint_position(checkpoint: &ArchiveCheckpoint) -> LogPosition {
    LogPosition { revision: checkpoint.head.revision, hash: checkpoint.head.hash }
}

fn resolve_range(
    options: VerifyOptions,
    archived: Revision,
    head: Revision,
) -> Result<(Revision, Revision), ServiceError> {
    let (from, to) = (options.from.unwrap_or(archived.next()), options.to.unwrap_or(head));
    let mut violations = InvalidFields::default();
    violations.add_if(
        from <= archived,
        "from_revision",
        format!("is archived, like all entries up to {archived}: 'keyward audit verify --file' verifies an archive"),
    );
    violations.add_if(from > head.next(), "from_revision", format!("the log ends at {head}"));
    violations.add_if(to > head, "to_revision", format!("the log ends at {head}"));
    violations.add_if(to.next() < from, "to_revision", "must not be before from_revision");
    violations.into_result()?;
    Ok((from, to))
}

/// The status of an expected entry that the verification does not reach.
fn status_outside_walk(
    expect: LogPosition,
    oldest: LogPosition,
    from: Revision,
    to: Revision,
    head: Revision,
) -> ExpectedEntryStatus {
    match expect.revision {
        revision if revision > head => ExpectedEntryStatus::Lost,
        revision if revision < oldest.revision => ExpectedEntryStatus::Archived,
        revision if revision == oldest.revision && expect.hash == oldest.hash => ExpectedEntryStatus::Found,
        revision if revision == oldest.revision => ExpectedEntryStatus::Differs,
        revision if revision < from || revision > to => ExpectedEntryStatus::OutOfRange,
        // Replaced when the entry is reached; it is not if the chain breaks first.
        _ => ExpectedEntryStatus::OutOfRange,
    }
}

struct LogVerifier<'s> {
    reader: Box<dyn BulkReader + 's>,
    chain: ChainVerifier,
    to: Revision,
    expected_entry: Option<LogPosition>,
    expected_status: Option<ExpectedEntryStatus>,
    checkpoint: Option<ArchiveCheckpoint>,
    /// An entry of the chain states the checkpoint.
    is_checkpoint_stated: bool,
    first_fault: Option<(Revision, String)>,
    table_comparison: Option<TableComparison>,
}

impl LogVerifier<'_> {
    fn record_fault(&mut self, problem: impl ToString) {
        let at = self.chain.position.revision.next();
        self.first_fault.get_or_insert((at, problem.to_string()));
    }

    /// Starts after an entry in the middle of the log, whose hash is trusted.
    async fn start_after(&mut self, store: &dyn Store, revision: Revision) -> Result<(), StoreError> {
        match store.get_log_entries(&[revision]).await?.pop() {
            Some(row) => self.chain = ChainVerifier::from_position(LogPosition { revision, hash: row.hash }),
            None => self.first_fault = Some((revision, "the entry is missing".to_owned())),
        }
        Ok(())
    }

    async fn run(&mut self, store: &dyn Store) -> Result<(), StoreError> {
        while self.first_fault.is_none() && self.chain.position.revision < self.to {
            let left = self.to.0 - self.chain.position.revision.0;
            let page = u32::try_from(left).unwrap_or(PAGE).min(PAGE);
            let rows = match self.reader.log_after(self.chain.position.revision, page).await {
                Ok(rows) => rows,
                Err(StoreError::Damaged(_)) => self.read_until_damage(store, page).await?,
                Err(error) => return Err(error),
            };
            if rows.is_empty() {
                self.record_fault(format!("the entry is missing; the log should continue to {}", self.to));
            }
            self.verify_page(store, &rows).await?;
        }
        Ok(())
    }

    /// Reads the entries of a page up to the first unreadable one.
    async fn read_until_damage(&mut self, store: &dyn Store, page: u32) -> Result<Vec<LogEntry>, StoreError> {
        let (mut rows, mut after) = (Vec::new(), self.chain.position.revision);
        while rows.len() < page as usize {
            match store.list_log_after(after, 1).await {
                Ok(next) => match next.into_iter().next() {
                    Some(row) => {
                        after = row.revision;
                        rows.push(row);
                    }
                    None => break,
                },
                Err(StoreError::Damaged(what)) if rows.is_empty() => {
                    self.record_fault(format!("the entry cannot be read: {what}"));
                    break;
                }
                Err(StoreError::Damaged(_)) => break,
                Err(error) => return Err(error),
            }
        }
        Ok(rows)
    }

    async fn verify_page(&mut self, store: &dyn Store, rows: &[LogEntry]) -> Result<(), StoreError> {
        let mut fitting = 0;
        for row in rows {
            if self.first_fault.is_some() {
                break;
            }
            match self.chain.verify_next(row) {
                Ok(()) => fitting += 1,
                Err(fault) => self.record_fault(fault),
            }
            self.inspect_entry(row);
        }
        match &mut self.table_comparison {
            Some(records) => records.compare_entries(store, &mut *self.reader, &rows[..fitting]).await,
            None => Ok(()),
        }
    }

    fn inspect_entry(&mut self, row: &LogEntry) {
        if let Some(expect) = self.expected_entry.filter(|expect| expect.revision == row.revision) {
            self.expected_status = Some(if row.hash == expect.hash {
                ExpectedEntryStatus::Found
            } else {
                ExpectedEntryStatus::Differs
            });
        }
        if row.action == AuditAction::LogArchived.as_str()
            && let Some(archived) =
                RedactedPayload::parse(&row.payload).and_then(|payload| payload.origin.archived)
            && archived.end.to_position() == self.checkpoint.map(|made| checkpoint_position(&made))
        {
            self.is_checkpoint_stated = true;
        }
    }

    /// Checks that the newest entry is the head that the tables state.
    fn check_head(&mut self, head: LogPosition) {
        if self.first_fault.is_none() && self.to == head.revision && self.chain.position != head {
            let problem = "the newest entry is not the head that the database states";
            self.first_fault = Some((head.revision, problem.to_owned()));
        }
    }

    /// A checkpoint that the chain does not state hides removed entries.
    fn check_checkpoint_stated(&mut self, has_walked_all: bool) {
        if let Some(made) = self.checkpoint
            && self.first_fault.is_none()
            && has_walked_all
            && !self.is_checkpoint_stated
        {
            let problem = "the entries up to here are missing, and no entry states that they were archived";
            self.first_fault = Some((made.head.revision, problem.to_owned()));
        }
    }
}
