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
        chain::Chain,
        entry::{Archived, Via},
        export::{self, Verifier},
        lease::Position,
        log::Action,
        time::{Revision, Timestamp},
        token::Hex,
    },
    private_file,
    store::{Checkpoint, CommitError, Head, Store, StoreError},
};

use super::note;

const PAGE: u32 = 1000;
const METHOD: &str = "keyward audit archive";

/// Why nothing was archived, or not all that could be. Each says what to do.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
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
    TakingOut(#[source] StoreError),
}

/// What was archived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Archive {
    /// The first entry in the file.
    pub first: Revision,
    /// The last.
    pub last: Revision,
    /// How many.
    pub entries: u64,
    /// Some of the entries asked for had to stay: a replica has not acknowledged them.
    pub held_back: bool,
}

/// Archives the entries made before an instant to a new file. None = there are none.
///
/// # Errors
/// When the file cannot be written, the log is not whole, a replica stands in the way, or the database fails.
pub async fn archive(
    store: &dyn Store,
    oldest_acknowledged: Revision,
    before: Timestamp,
    path: &Path,
    clock: &dyn Clock,
) -> Result<Option<Archive>, ArchiveError> {
    let checkpoint = store.checkpoint().await?;
    if let Some(noted) = &checkpoint {
        // What a run that was broken off has left.
        store.archive(noted).await.map_err(ArchiveError::TakingOut)?;
    }
    let after = checkpoint
        .map_or(Position::START, |made| Position { revision: made.at.revision, hash: made.at.hash });
    let head = store.head().await?.revision;
    // The newest entry stays: the next one leads to its hash. And so does what a replica may renew against.
    let last = Revision(head.0.min(oldest_acknowledged.0).saturating_sub(1));
    let file = |source| ArchiveError::File { path: path.to_owned(), source };
    let mut output = Output::create(path).map_err(file)?;
    let written = output.write(store, after, last, before).await;
    let (chain, held_back) = match written {
        Ok(written) if written.0.entries > 0 => written,
        ended => {
            std::fs::remove_file(path).map_err(file)?;
            return ended.map(|_| None);
        }
    };
    let file_sha256 = output.finish(&chain).map_err(file)?;
    read_back(path, after, &chain)?;
    let archived = Archived { upto: chain.at.into(), entries: chain.entries, file_sha256 };
    let via = Via { archived: Some(archived), ..Via::NONE };
    // Has the chain say what was archived.
    if !note::append_entry::<ArchiveError>(store, Action::LogArchived, via, METHOD, clock).await? {
        return Err(ArchiveError::Damaged("the operator account is missing".to_owned()));
    }
    let at = Head { revision: chain.at.revision, hash: chain.at.hash };
    let entries = checkpoint.map_or(0, |made| made.entries) + chain.entries;
    let checkpoint = Checkpoint { at, entries, made_at: clock.now() };
    store.archive(&checkpoint).await.map_err(ArchiveError::TakingOut)?;
    let first = after.revision.next();
    Ok(Some(Archive { first, last: chain.at.revision, entries: chain.entries, held_back }))
}

/// The newest change that every replica has acknowledged; the newest that can be, where there are none.
///
/// # Errors
/// When one is just loading, or the database may have lost the rows of some.
pub async fn acknowledged_by_all(store: Arc<dyn Store>) -> Result<Revision, ArchiveError> {
    let Some(fleet) = store.fleet() else { return Ok(Revision(u64::MAX)) };
    let roster = fleet.roster(&[]).await?;
    if !roster.listing.is_whole() {
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
struct Output {
    path: PathBuf,
    file: BufWriter<File>,
    sum: Sha256,
}

impl Output {
    fn create(path: &Path) -> std::io::Result<Output> {
        let file = private_file::create_new(path)?;
        Ok(Output { path: path.to_owned(), file: BufWriter::new(file), sum: Sha256::new() })
    }

    fn line(&mut self, line: &str) -> std::io::Result<()> {
        self.sum.update(line);
        self.file.write_all(line.as_bytes())
    }

    /// Writes the entries after one, up to one, made before an instant. Where that ended, and whether `last` ended it.
    async fn write(
        &mut self,
        store: &dyn Store,
        after: Position,
        last: Revision,
        before: Timestamp,
    ) -> Result<(Chain, bool), ArchiveError> {
        let failed = |path: &Path, source| ArchiveError::File { path: path.to_owned(), source };
        self.line(&export::begin(after)).map_err(|source| failed(&self.path, source))?;
        let mut chain = Chain::after(after);
        loop {
            let rows = store.log_after(chain.at.revision, PAGE).await?;
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
                let revision = chain.at.revision.next();
                chain
                    .take(&row)
                    .map_err(|fault| ArchiveError::Damaged(format!("entry {revision}: {fault}")))?;
                self.line(&export::line(&row)).map_err(|source| failed(&self.path, source))?;
            }
        }
    }

    /// Ends the file and sees it on disk. Gives its SHA-256 in hex.
    fn finish(mut self, chain: &Chain) -> std::io::Result<String> {
        self.line(&export::end(chain.at, chain.entries))?;
        self.file.flush()?;
        private_file::sync(self.file.get_ref(), &self.path)?;
        Ok(Hex(&self.sum.finalize()).to_string())
    }
}

/// What is on disk is what was to be written.
fn read_back(path: &Path, after: Position, chain: &Chain) -> Result<(), ArchiveError> {
    let failed = |source: std::io::Error| ArchiveError::File { path: path.to_owned(), source };
    let mut verifier = Verifier::default();
    let mut verified = || -> std::io::Result<_> {
        for line in BufReader::new(File::open(path)?).lines() {
            verifier.take(&line?).map_err(std::io::Error::other)?;
        }
        std::mem::take(&mut verifier).finish().map_err(std::io::Error::other)
    };
    let whole = verified().map_err(failed)?;
    if (whole.after, whole.end) == (after, chain.at) {
        Ok(())
    } else {
        Err(failed(std::io::Error::other("it does not hold what was written")))
    }
}
