//! Moves the oldest part of the audit log to an archive file.
//!
//! Three steps: write the file, read it back and verify it; append an entry that states its contents; remove the
//! archived entries from the database. The appended entry makes the chain itself prove where it now begins.
//!
//! Only entries that every replica has acknowledged are removed: a replica reads the entries that it has not applied,
//! and renews its lease against the newest one that it has.

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

/// Why an archive failed or is incomplete. Each message names the next step.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ArchiveError {
    /// The archive file cannot be written or read back.
    #[error("the archive {path} cannot be written: {source}")]
    File { path: PathBuf, source: std::io::Error },
    /// The hash chain is broken.
    #[error("the log is damaged, and nothing was removed from it: {0}. 'keyward audit verify' shows details")]
    Damaged(String),
    /// The state of the replicas does not allow entries to be removed.
    #[error("{0}")]
    Replicas(String),
    /// The database failed before any entry was removed.
    #[error(
        "the database failed; nothing was removed from the log, and the file holds nothing that the log does not"
    )]
    Store(#[from] StoreError),
    /// The database failed while the `log.archived` entry was appended.
    #[error(
        "the database failed while the archive was recorded; keep the file, and check with 'keyward audit list' whether \
         the log has an entry log.archived for it"
    )]
    Commit(#[from] CommitError),
    /// The database failed after the `log.archived` entry was appended.
    #[error(
        "the archive is recorded, but not all of its entries were removed from the log; keep the file, and run the \
         command again to finish"
    )]
    RemoveEntries(#[source] StoreError),
}

/// The entries that one run archived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ArchiveSummary {
    /// First entry in the file.
    pub(crate) first: Revision,
    pub(crate) last: Revision,
    pub(crate) entries: u64,
    /// A replica has not acknowledged some of the requested entries, so they stay in the log.
    pub(crate) is_held_back: bool,
}

/// Archives the entries made before an instant to a new file. Returns `None` if there are none.
///
/// Fails if the file cannot be written, the chain is broken, or the database fails.
pub(crate) async fn archive_log(
    store: &dyn Store,
    oldest_acknowledged: Revision,
    before: Timestamp,
    path: &Path,
    clock: &dyn Clock,
) -> Result<Option<ArchiveSummary>, ArchiveError> {
    let checkpoint = store.newest_checkpoint().await?;
    if let Some(noted) = &checkpoint {
        // Finish what an interrupted run left.
        store.archive_log(noted).await.map_err(ArchiveError::RemoveEntries)?;
    }
    let after = checkpoint.map_or(LogPosition::START, |made| LogPosition {
        revision: made.head.revision,
        hash: made.head.hash,
    });
    let head = store.log_head().await?.revision;
    // The newest entry stays, because the next entry links to its hash. So does the entry that a replica may renew
    // against.
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
    // The chain must state what was archived before the entries go.
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

/// The newest change that every replica has acknowledged; the highest revision possible if there are no replicas.
///
/// Fails if a replica is still loading, or the database may have lost the rows of some replicas.
pub(crate) async fn min_acknowledged_revision(store: Arc<dyn Store>) -> Result<Revision, ArchiveError> {
    let Some(registry) = store.replica_registry() else { return Ok(Revision(u64::MAX)) };
    let snapshot = registry.list_replicas(&[]).await?;
    if !snapshot.listing.is_complete() {
        let problem = "after a database failover, a replica may hold a lease that the database has lost: wait for one lease \
                       period (keyward replicas list), then retry";
        return Err(ArchiveError::Replicas(problem.to_owned()));
    }
    let mut oldest = Revision(u64::MAX);
    for row in &snapshot.listing.rows {
        let Some(applied) = row.applied else {
            let name = snapshot.names.get(&row.id).cloned().unwrap_or_default();
            let problem = format!(
                "the replica {name} is loading and needs the log unchanged: wait until it serves; or, if it is gone, \
                 confirm that with 'keyward replicas attest-dead {name} --seen-gone'"
            );
            return Err(ArchiveError::Replicas(problem));
        };
        oldest = oldest.min(applied);
    }
    Ok(oldest)
}

/// An archive file while it is written, with its running SHA-256.
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

    /// Writes the entries after `after`, up to `last`, that were made before an instant. Returns the chain at the end,
    /// and whether `last` ended it.
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

    /// Writes the trailer and syncs the file to disk. Returns its SHA-256 in hex.
    fn finish(mut self, chain: &ChainVerifier) -> std::io::Result<String> {
        self.write_line(&log_export::trailer_line(chain.position, chain.entry_count))?;
        self.file.flush()?;
        private_file::sync_to_disk(self.file.get_ref(), &self.path)?;
        Ok(HexBytes(&self.hasher.finalize()).to_string())
    }
}

/// Reads the file back and checks that it holds the expected part of the chain.
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
        Err(failed(std::io::Error::other("the file does not hold what was written")))
    }
}
