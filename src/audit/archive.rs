//! The oldest part of the log leaves for a file. First the file is written, read back and verified; then an entry of the
//! log says what it holds, so that the chain itself vouches for where it now begins; and then the entries go.
//!
//! No replica may miss what it has not acknowledged, and each renews against the newest entry that it has: nothing leaves
//! that is not behind what all of them have acknowledged.

use std::{
    fs::File,
    io::{BufRead as _, BufReader, BufWriter, Write as _},
    path::{Path, PathBuf},
    sync::Arc,
};

use sha2::{Digest as _, Sha256};

use crate::{
    clock::Clock,
    domain::{
        lease::LogPosition,
        log::AuditAction,
        log_chain::ChainVerifier,
        log_export::{self, LogExportVerifier},
        log_payload::{ArchivedRange, ChangeOrigin},
        time::{Revision, Timestamp},
        token::HexBytes,
    },
    private_file,
    store::{ArchiveCheckpoint, CommitError, LogHead, Store, StoreError},
};

use super::maintenance_entry;

const PAGE: u32 = 1000;
const METHOD: &str = "keyward audit archive";

/// Why nothing was archived, or not all that could be. Each says what to do.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ArchiveError {
    /// The file cannot be written or read back.
    #[error("the archive {path} cannot be written: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// The log is not whole.
    #[error("the log is damaged, and nothing was taken out of it: {0}. 'keyward audit verify' says more")]
    Damaged(String),
    /// Replicas are in no state in which entries may go.
    #[error("{0}")]
    Replicas(String),
    /// The database failed before any entry was taken out.
    #[error(
        "the database failed; nothing was taken out of the log, and the file holds nothing that is not there"
    )]
    Store(#[from] StoreError),
    /// The database failed when the archive was noted.
    #[error(
        "the database failed when the archive was noted; keep the file, and see with 'keyward audit list' whether \
         the log has an entry log.archived for it"
    )]
    Commit(#[from] CommitError),
    /// The database failed in between.
    #[error(
        "the archive is noted, and not all of its entries were taken out of the log; keep the file, and run the \
         command again: it goes on there"
    )]
    RemoveEntries(#[source] StoreError),
}

/// What was archived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ArchiveSummary {
    /// The first entry in the file.
    pub(crate) first: Revision,
    /// The last.
    pub(crate) last: Revision,
    /// How many.
    pub(crate) entries: u64,
    /// Some of the entries asked for had to stay: a replica has not acknowledged them.
    pub(crate) is_held_back: bool,
}

/// Archives the entries made before an instant to a new file. None = there are none.
///
/// # Errors
/// When the file cannot be written, the log is not whole, a replica stands in the way, or the database fails.
pub(crate) async fn archive_log(
    store: &dyn Store,
    oldest_acknowledged: Revision,
    before: Timestamp,
    path: &Path,
    clock: &dyn Clock,
) -> Result<Option<ArchiveSummary>, ArchiveError> {
    let checkpoint = store.newest_checkpoint().await?;
    if let Some(noted) = &checkpoint {
        // What a run that was broken off has left.
        store.archive_log(noted).await.map_err(ArchiveError::RemoveEntries)?;
    }
    let after = checkpoint.map_or(LogPosition::START, |made| LogPosition {
        revision: made.head.revision,
        hash: made.head.hash,
    });
    let head = store.log_head().await?.revision;
    // The newest entry stays: the next one leads to its hash. And so does what a replica may renew against.
    let last = Revision(head.0.min(oldest_acknowledged.0).saturating_sub(1));
    let file = |source| ArchiveError::File { path: path.to_owned(), source };
    let mut output = ArchiveWriter::create(path).map_err(file)?;
    let written = output.write_entries(store, after, last, before).await;
    let (chain, held_back) = match written {
        Ok(written) if written.0.entry_count > 0 => written,
        ended => {
            std::fs::remove_file(path).map_err(file)?;
            return ended.map(|_| None);
        }
    };
    let file_sha256 = output.finish(&chain).map_err(file)?;
    verify_archive(path, after, &chain)?;
    let archived = ArchivedRange { end: chain.position.into(), entries: chain.entry_count, file_sha256 };
    let via = ChangeOrigin { archived: Some(archived), ..ChangeOrigin::UNKNOWN };
    // Has the chain say what was archived.
    if !maintenance_entry::append_entry::<ArchiveError>(store, AuditAction::LogArchived, via, METHOD, clock)
        .await?
    {
        return Err(ArchiveError::Damaged("the operator account is missing".to_owned()));
    }
    let at = LogHead { revision: chain.position.revision, hash: chain.position.hash };
    let entries = checkpoint.map_or(0, |made| made.entry_count) + chain.entry_count;
    let checkpoint = ArchiveCheckpoint { head: at, entry_count: entries, made_at: clock.now() };
    store.archive_log(&checkpoint).await.map_err(ArchiveError::RemoveEntries)?;
    let first = after.revision.next();
    Ok(Some(ArchiveSummary {
        first,
        last: chain.position.revision,
        entries: chain.entry_count,
        is_held_back: held_back,
    }))
}

/// The newest change that every replica has acknowledged; the newest that can be, where there are none.
///
/// # Errors
/// When one is just loading, or the database may have lost the rows of some.
pub(crate) async fn min_acknowledged_revision(store: Arc<dyn Store>) -> Result<Revision, ArchiveError> {
    let Some(fleet) = store.replica_registry() else { return Ok(Revision(u64::MAX)) };
    let roster = fleet.list_replicas(&[]).await?;
    if !roster.listing.is_complete() {
        let said = "after a failover of the database somebody may hold a lease that it does not know of: wait for one \
                    lease (keyward replicas list), and try again";
        return Err(ArchiveError::Replicas(said.to_owned()));
    }
    let mut oldest = Revision(u64::MAX);
    for row in &roster.listing.rows {
        let Some(applied) = row.applied else {
            let name = roster.names.get(&row.id).cloned().unwrap_or_default();
            let said = format!(
                "the replica {name} is loading and needs the log as it is: wait until it serves; or, if it is gone, say \
                 so with 'keyward replicas attest-dead {name} --seen-gone'"
            );
            return Err(ArchiveError::Replicas(said));
        };
        oldest = oldest.min(applied);
    }
    Ok(oldest)
}

/// The file in the making.
struct ArchiveWriter {
    path: PathBuf,
    file: BufWriter<File>,
    hasher: Sha256,
}

impl ArchiveWriter {
    fn create(path: &Path) -> std::io::Result<ArchiveWriter> {
        let file = private_file::create_new(path)?;
        Ok(ArchiveWriter { path: path.to_owned(), file: BufWriter::new(file), hasher: Sha256::new() })
    }

    fn write_line(&mut self, line: &str) -> std::io::Result<()> {
        self.hasher.update(line);
        self.file.write_all(line.as_bytes())
    }

    /// Writes the entries after one, up to one, made before an instant. Where that ended, and whether `last` ended it.
    async fn write_entries(
        &mut self,
        store: &dyn Store,
        after: LogPosition,
        last: Revision,
        before: Timestamp,
    ) -> Result<(ChainVerifier, bool), ArchiveError> {
        let failed = |path: &Path, source| ArchiveError::File { path: path.to_owned(), source };
        self.write_line(&log_export::header_line(after)).map_err(|source| failed(&self.path, source))?;
        let mut chain = ChainVerifier::from_position(after);
        loop {
            let rows = store.list_log_after(chain.position.revision, PAGE).await?;
            if rows.is_empty() {
                return Ok((chain, false));
            }
            for row in rows {
                if row.at >= before {
                    return Ok((chain, false));
                }
                if row.revision > last {
                    return Ok((chain, true));
                }
                let revision = chain.position.revision.next();
                chain
                    .verify_next(&row)
                    .map_err(|fault| ArchiveError::Damaged(format!("entry {revision}: {fault}")))?;
                self.write_line(&log_export::entry_line(&row))
                    .map_err(|source| failed(&self.path, source))?;
            }
        }
    }

    /// Ends the file and sees it on disk. Gives its SHA-256 in hex.
    fn finish(mut self, chain: &ChainVerifier) -> std::io::Result<String> {
        self.write_line(&log_export::trailer_line(chain.position, chain.entry_count))?;
        self.file.flush()?;
        private_file::sync_to_disk(self.file.get_ref(), &self.path)?;
        Ok(HexBytes(&self.hasher.finalize()).to_string())
    }
}

/// What is on disk is what was to be written.
fn verify_archive(path: &Path, after: LogPosition, chain: &ChainVerifier) -> Result<(), ArchiveError> {
    let failed = |source: std::io::Error| ArchiveError::File { path: path.to_owned(), source };
    let mut verifier = LogExportVerifier::default();
    let mut verified = || -> std::io::Result<_> {
        for line in BufReader::new(File::open(path)?).lines() {
            verifier.verify_line(&line?).map_err(std::io::Error::other)?;
        }
        std::mem::take(&mut verifier).finish().map_err(std::io::Error::other)
    };
    let whole = verified().map_err(failed)?;
    if (whole.after, whole.end) == (after, chain.position) {
        Ok(())
    } else {
        Err(failed(std::io::Error::other("it does not hold what was written")))
    }
}
