//! Ownership of a database file: one process at a time changes it, and a process that has lost it stops.
//!
//! The owner holds `flock` on the database file itself. So a second server is refused under each name of the file: a
//! symbolic link, a hard link, another mount. A lock on a file beside it keeps out servers of versions that know no other,
//! and is the only one on a network file system, where `flock` and SQLite's own locks exclude each other.
//!
//! Where locks fail, the term decides. Each start counts `meta.term` up and draws `meta.owner`, and the mark in the file's
//! header (`read_mark.rs`) has the term too. A transaction that finds another term is not committed. A commit after which the
//! file's names or its mark are not the owner's is not acknowledged. [`FileOwner::check`] looks at all of it between
//! transactions.
//!
//! A process that closes a descriptor of a file loses all its POSIX locks on that file, SQLite's among them. So a server
//! opens the database file here once, before SQLite does, and nowhere else.

use std::{
    fs::{File, Metadata},
    io::{Read as _, Seek as _, Write as _},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, OnceLock, PoisonError, Weak},
    time::Duration,
};

use rusqlite::{Connection, OptionalExtension as _, params};
use rustix::fs::{FsWord, NFS_SUPER_MAGIC, fstatfs};

use tokio::{sync::watch::Sender, time::MissedTickBehavior};

use crate::{
    private_file::{self, append_suffix},
    store::{OpenError, StoreError},
};

use super::{
    connection::{
        SqliteFailure, SqliteResult, SqliteWriter, connect_reader, execute, run_blocking, unavailable_failure,
    },
    errors::store_open_error,
    open_mark::{self, OpenMark, WalState},
    permissions,
};

/// How often the owner looks whether the file is still its own. It bounds how long it answers when it is not.
const CHECK_INTERVAL: Duration = Duration::from_millis(250);

/// NFS, SMB, CIFS and SMB2: file systems that make `flock` a lock of the kind that SQLite takes.
const NETWORK_FILE_SYSTEMS: [FsWord; 4] = [NFS_SUPER_MAGIC, 0x517b, 0xff53_4d42, 0xfe53_4d42];

/// The owner of a database file.
pub(super) struct FileOwner {
    /// The file as the settings name it: a symbolic link, perhaps.
    path: PathBuf,
    /// The file's own name, which its WAL is beside.
    real_path: PathBuf,
    /// What it had of its WAL when it was locked.
    wal_state: WalState,
    term: OnceLock<OwnershipTerm>,
    /// Reads the term between transactions, for as long as there is one.
    term_reader: Mutex<Option<Connection>>,
    file: File,
    identity: FileIdentity,
    lock_file: File,
}

/// What the file has of this owner and no other.
struct OwnershipTerm {
    number: i64,
    nonce: Vec<u8>,
    wal_identity: FileIdentity,
}

/// A file, whatever its names are.
#[derive(Clone, Copy, PartialEq, Eq)]
struct FileIdentity(u64, u64);

impl From<Metadata> for FileIdentity {
    fn from(found: Metadata) -> Self {
        FileIdentity(found.dev(), found.ino())
    }
}

impl FileOwner {
    /// Takes the locks on a file, which is created where it is missing.
    ///
    /// # Errors
    /// When another process has them, or the file cannot be opened.
    pub(super) fn lock(path: &str) -> std::result::Result<FileOwner, OpenError> {
        let other = |error: std::io::Error| OpenError::Other { path: path.to_owned(), source: error.into() };
        let path = PathBuf::from(path);
        // A link to nothing yet leads nowhere. The file holds digests and names: it is for its owner alone.
        private_file::create_missing_target(&path).map_err(other)?;
        let real = path.canonicalize().map_err(other)?;
        permissions::check_permissions(&real)?;
        let lock_file = acquire_lock_file(&path, &real)?;
        // To be written, so that an overlay file system copies it before SQLite does.
        let file = private_file::open_existing(&real).map_err(other)?;
        if is_on_network_file_system(&file) {
            tracing::warn!(
                database = %path.display(),
                "the database is on a network file system, where only the lock file keeps a second server from starting"
            );
        } else {
            match file.try_lock() {
                Ok(()) => {}
                Err(std::fs::TryLockError::WouldBlock) => {
                    let owner = " (under another name of the file)".to_owned();
                    return Err(OpenError::Locked { path: path.display().to_string(), owner });
                }
                Err(std::fs::TryLockError::Error(error)) => return Err(other(error)),
            }
        }
        let inode = file.metadata().map_err(other)?.into();
        let wal = open_mark::check_wal(&path.display().to_string(), &real, &file)?;
        let (term, reader) = (OnceLock::new(), Mutex::new(None));
        Ok(FileOwner {
            path,
            real_path: real,
            wal_state: wal,
            term,
            term_reader: reader,
            file,
            identity: inode,
            lock_file,
        })
    }

    /// The name under which SQLite opens the file.
    pub(super) fn real_path(&self) -> &Path {
        &self.real_path
    }

    /// Why a file does not open: a WAL that is not its own makes a whole file look damaged.
    pub(super) fn explain_open_error(&self, error: OpenError) -> OpenError {
        match (self.wal_state, error) {
            (WalState::Leftover, OpenError::Damaged { path, .. }) => OpenError::ForeignWal { path },
            (_, error) => error,
        }
    }

    /// Begins a term: from here on every change is this owner's, and the file is marked as open.
    pub(super) fn begin_term(&self, connection: &Connection) -> SqliteResult<()> {
        execute(connection, "BEGIN IMMEDIATE")?;
        let sql = "UPDATE meta SET term = term + 1, owner = randomblob(16) RETURNING term, owner";
        let (number, nonce) = connection.query_row(sql, [], |row| Ok((row.get(0)?, row.get(1)?)))?;
        open_mark::set_mark(connection, open_mark::term_number(number))?;
        execute(connection, "COMMIT")?;
        let copied = open_mark::checkpoint_wal(connection)?;
        let marked = self.read_mark()?.is_some_and(|mark| mark.open_term == open_mark::term_number(number));
        if !(copied && marked) {
            let problem = "another program is reading the database, so it cannot be marked as open; try again \
                           when that has ended";
            return Err(unavailable_failure(problem));
        }
        let wal = std::fs::metadata(open_mark::wal_path(&self.real_path)).map_err(unavailable_failure)?;
        *self.term_reader.lock().unwrap_or_else(PoisonError::into_inner) =
            Some(connect_reader(&self.real_path)?);
        let _ = self.term.set(OwnershipTerm { number, nonce, wal_identity: wal.into() });
        Ok(())
    }

    /// Does `run` in a transaction of this term. `commits` says whether there is something to commit.
    pub(super) fn transaction<T>(
        &self,
        connection: &Connection,
        work: impl FnOnce(&Connection) -> SqliteResult<T>,
        commits: impl FnOnce(&T) -> bool,
    ) -> SqliteResult<T> {
        execute(connection, "BEGIN IMMEDIATE")?;
        self.check_term(connection)?;
        let done = work(connection)?;
        if commits(&done) {
            execute(connection, "COMMIT")?;
            // What a process commits to a file that is no longer its own is lost on the others.
            self.check_from_outside()?;
        } else {
            execute(connection, "ROLLBACK")?;
        }
        Ok(done)
    }

    /// Checks that this process still owns the file. A file that cannot be read does not count as lost.
    ///
    /// # Errors
    /// [`StoreError::Lost`] if it does not.
    pub(super) fn check_ownership(&self) -> SqliteResult<()> {
        // Held until the end: a term does not end meanwhile.
        let reader = self.term_reader.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(reader) = &*reader else { return Ok(()) };
        self.check_from_outside()?;
        self.check_term(reader)
    }

    /// Ends the term in order, and closes the last connection: the file holds everything afterwards, and is marked as
    /// closed. One that is no longer this owner's, or that others read, is left as it is. Another may lock it then, though
    /// a look at the file still holds this owner.
    pub(super) async fn release(
        self: Arc<Self>,
        writer: &SqliteWriter,
    ) -> std::result::Result<(), StoreError> {
        let owner = self.clone();
        let ended = writer.run(move |connection| owner.end_term(connection)).await;
        writer.close().await?;
        self.unlock();
        ended
    }

    /// Releases the locks. To close the files is not enough: a child process has them too between its fork and its exec.
    fn unlock(&self) {
        // They cannot be unlocked twice, and the end of the process unlocks them.
        let _ = (self.file.unlock(), self.lock_file.unlock());
    }

    fn end_term(&self, connection: &Connection) -> SqliteResult<()> {
        *self.term_reader.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.check_names()?;
        self.check_mark()?;
        self.check_term(connection)?;
        if open_mark::checkpoint_wal(connection)? {
            open_mark::clear_mark(connection)?;
        }
        Ok(())
    }

    fn check_term(&self, connection: &Connection) -> SqliteResult<()> {
        let Some(OwnershipTerm { number, nonce, .. }) = self.term.get() else { return Ok(()) };
        let sql = "SELECT 1 FROM meta WHERE term = ?1 AND owner = ?2";
        let mut statement = connection.prepare_cached(sql)?;
        let own = statement.query_row(params![number, nonce], |_| Ok(())).optional()?;
        own.ok_or_else(|| lost_failure("another process has taken it over"))
    }

    /// Looks at the file from outside, where SQLite may not see what others do.
    fn check_from_outside(&self) -> SqliteResult<()> {
        let Some(term) = self.term.get() else { return Ok(()) };
        self.check_names()?;
        self.check_mark()?;
        if is_different_file(&open_mark::wal_path(&self.real_path), term.wal_identity) {
            return Err(lost_failure("its -wal file was removed, renamed or replaced"));
        }
        Ok(())
    }

    fn check_names(&self) -> SqliteResult<()> {
        if is_different_file(&self.path, self.identity) || is_different_file(&self.real_path, self.identity) {
            return Err(lost_failure("the file was removed, renamed or replaced"));
        }
        Ok(())
    }

    fn check_mark(&self) -> SqliteResult<()> {
        let Some(term) = self.term.get() else { return Ok(()) };
        match self.read_mark() {
            Ok(Some(mark)) if mark.open_term == open_mark::term_number(term.number) => Ok(()),
            Ok(_) => Err(lost_failure("another process has marked or overwritten it")),
            Err(_) => Ok(()),
        }
    }

    fn read_mark(&self) -> SqliteResult<Option<OpenMark>> {
        OpenMark::read_from_file(&self.file).map_err(unavailable_failure)
    }
}

impl Drop for FileOwner {
    fn drop(&mut self) {
        self.unlock();
    }
}

/// Locks a file and opens its writing connection, which keeps other connections from removing the WAL. `lost_failure` accepts
/// that the WAL is missing.
pub(super) async fn acquire(
    path: &str,
    lost: bool,
) -> std::result::Result<(Arc<FileOwner>, SqliteWriter), OpenError> {
    let owner = Arc::new(FileOwner::lock(path)?);
    match (owner.wal_state == WalState::Missing, lost) {
        (true, false) => return Err(OpenError::WalMissing { path: path.to_owned() }),
        (false, true) => return Err(OpenError::WalNotLost { path: path.to_owned() }),
        _ => {}
    }
    let seen = owner.clone();
    let opened = async {
        let writer = SqliteWriter::open(owner.real_path()).await?;
        let own = writer
            .run(move |connection| open_mark::is_own_wal(connection, &seen.real_path, &seen.file))
            .await?;
        Ok((writer, own))
    };
    match opened.await {
        Ok((writer, true)) => Ok((owner, writer)),
        Ok((_, false)) => Err(OpenError::ForeignWal { path: path.to_owned() }),
        Err(error) => Err(owner.explain_open_error(store_open_error(path, error))),
    }
}

/// Looks between transactions whether the file is still its owner's.
pub(super) async fn watch_ownership(owner: Weak<FileOwner>, lost: Sender<bool>) {
    let mut due = tokio::time::interval(CHECK_INTERVAL);
    due.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        due.tick().await;
        let Some(owner) = owner.upgrade() else { return };
        if let Err(error @ StoreError::OwnershipLost(_)) = run_blocking(move || owner.check_ownership()).await
        {
            return report_lost(&lost, &error);
        }
    }
}

/// Stops the server: it can no longer tell which changes are committed.
pub(super) fn report_lost(lost: &Sender<bool>, error: &StoreError) {
    if !lost.send_replace(true) {
        tracing::error!(
            error = error as &dyn std::error::Error,
            "database file lost: this process no longer owns it"
        );
    }
}

fn lost_failure(how: &'static str) -> SqliteFailure {
    StoreError::OwnershipLost(how).into()
}

/// Whether a name certainly leads to another file, or to none.
fn is_different_file(name: &Path, known: FileIdentity) -> bool {
    match std::fs::metadata(name) {
        Ok(found) => FileIdentity::from(found) != known,
        Err(error) => error.kind() == std::io::ErrorKind::NotFound,
    }
}

fn is_on_network_file_system(file: &File) -> bool {
    fstatfs(file).is_ok_and(|found| NETWORK_FILE_SYSTEMS.contains(&found.f_type))
}

/// The name of the lock file beside a database file.
fn lock_file_path(real: &Path) -> PathBuf {
    append_suffix(real, "-lock")
}

/// Locks the file beside the database file, which has the owner's process id.
fn acquire_lock_file(path: &Path, real: &Path) -> std::result::Result<File, OpenError> {
    let shown = path.display().to_string();
    let other = |error: std::io::Error| OpenError::Other { path: shown.clone(), source: error.into() };
    let lock = lock_file_path(real);
    let mut file = private_file::open_or_create(&lock)
        .map_err(|error| OpenError::Other { path: lock.display().to_string(), source: error.into() })?;
    // It is overwritten below.
    if file.metadata().map_err(other)?.nlink() > 1 {
        let what = format!("{} is a hard link to another file", lock.display());
        return Err(OpenError::Unsuitable { database: shown, what, fix: "Remove the link" });
    }
    match file.try_lock() {
        Ok(()) => {
            let note = format!("{}\n", std::process::id());
            file.set_len(0).and_then(|()| file.write_all(note.as_bytes())).map_err(other)?;
            Ok(file)
        }
        Err(std::fs::TryLockError::WouldBlock) => {
            let mut note = String::new();
            let _ = file.rewind().and_then(|()| file.read_to_string(&mut note));
            let owner = note.trim().parse::<u32>().map(|id| format!(" (process {id})")).unwrap_or_default();
            Err(OpenError::Locked { path: shown, owner })
        }
        Err(std::fs::TryLockError::Error(error)) => Err(other(error)),
    }
}

/// Whether some process owns the file. SQLite must not have it open in this process yet.
pub(super) fn is_owned(real: &Path) -> bool {
    // Shared, and let go of at once: a server that starts meanwhile would have to be very unlucky.
    let is_locked = |file: std::io::Result<File>| {
        file.is_ok_and(|file| matches!(file.try_lock_shared(), Err(std::fs::TryLockError::WouldBlock)))
    };
    is_locked(File::open(lock_file_path(real)))
        || is_locked(File::open(real).and_then(|file| match is_on_network_file_system(&file) {
            true => Err(std::io::ErrorKind::Unsupported.into()),
            false => Ok(file),
        }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_free_as_soon_as_its_owner_is_gone_though_a_child_process_still_has_the_descriptors() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("keyward.db").display().to_string();
        let owner = FileOwner::lock(&path).unwrap();
        // As a fork copies them: of the same open files.
        let copies = (owner.file.try_clone().unwrap(), owner.lock_file.try_clone().unwrap());
        assert!(matches!(FileOwner::lock(&path), Err(OpenError::Locked { .. })));
        drop(owner);
        assert!(FileOwner::lock(&path).is_ok());
        drop(copies);
    }

    #[tokio::test]
    async fn a_file_is_free_after_the_end_though_a_look_at_it_still_holds_the_owner() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("keyward.db").display().to_string();
        let (owner, writer) = acquire(&path, false).await.unwrap();
        let looking = owner.clone();
        owner.release(&writer).await.unwrap();
        assert!(FileOwner::lock(&path).is_ok());
        assert!(looking.check_ownership().is_ok());
    }
}
