//! Ownership of a database file: only one process changes it, and a process that has lost it stops.
//!
//! The owner holds `flock` on the database file itself. So a second server is refused under each name of the file: a
//! symbolic link, a hard link, another mount. A lock on a separate `-lock` file keeps out older versions, which know no
//! other lock. It is the only lock on a network file system, where `flock` conflicts with SQLite's own locks.
//!
//! If locks fail, the term decides. Each start increments `meta.term`, sets a random `meta.owner`, and writes the term
//! to the mark in the file's header (`open_mark.rs`). A transaction that finds another term is not committed. A commit
//! is not acknowledged if the file's names or its mark are no longer the owner's. [`FileOwner::check_ownership`] checks
//! all of this between transactions.
//!
//! A process that closes a descriptor of a file loses all its POSIX locks on that file, including SQLite's. So a server
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

/// How often the owner checks that it still owns the file. This bounds how long it answers after it has lost the file.
const CHECK_INTERVAL: Duration = Duration::from_millis(250);

/// NFS, SMB, CIFS and SMB2: on these file systems, `flock` conflicts with SQLite's locks.
const NETWORK_FILE_SYSTEMS: [FsWord; 4] = [NFS_SUPER_MAGIC, 0x517b, 0xff53_4d42, 0xfe53_4d42];

/// The ownership of a database file, until it is dropped.
pub(super) struct FileOwner {
    /// The path in the settings, which may be a symbolic link.
    path: PathBuf,
    /// The path with links resolved; the WAL is next to it.
    real_path: PathBuf,
    /// The state of the WAL when the file was locked.
    wal_state: WalState,
    term: OnceLock<OwnershipTerm>,
    /// Reads the term between transactions, while there is one.
    term_reader: Mutex<Option<Connection>>,
    file: File,
    identity: FileIdentity,
    lock_file: File,
}

/// What distinguishes this owner from all others.
struct OwnershipTerm {
    number: i64,
    nonce: Vec<u8>,
    wal_identity: FileIdentity,
}

/// The device and the inode of a file, independent of its names.
#[derive(Clone, Copy, PartialEq, Eq)]
struct FileIdentity(u64, u64);

impl From<Metadata> for FileIdentity {
    fn from(found: Metadata) -> Self {
        FileIdentity(found.dev(), found.ino())
    }
}

impl FileOwner {
    /// Locks a file, and creates it if it is missing.
    ///
    /// # Errors
    /// If another process has locked the file, or it cannot be opened.
    pub(super) fn lock(path: &str) -> Result<FileOwner, OpenError> {
        let other = |error: std::io::Error| OpenError::Other { path: path.to_owned(), source: error.into() };
        let path = PathBuf::from(path);
        // A dangling link gets its target. Only the owner may read the file: it contains digests and names.
        private_file::create_missing_target(&path).map_err(other)?;
        let real = path.canonicalize().map_err(other)?;
        permissions::check_permissions(&real)?;
        let lock_file = acquire_lock_file(&path, &real)?;
        // Opened for writing, so that an overlay file system copies it before SQLite opens it.
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
        Ok(FileOwner {
            path,
            real_path: real,
            wal_state: wal,
            term: OnceLock::new(),
            term_reader: Mutex::new(None),
            file,
            identity: inode,
            lock_file,
        })
    }

    /// The path that SQLite opens.
    pub(super) fn real_path(&self) -> &Path {
        &self.real_path
    }

    /// Explains why a file does not open: a foreign WAL makes an intact file look damaged.
    pub(super) fn explain_open_error(&self, error: OpenError) -> OpenError {
        match (self.wal_state, error) {
            (WalState::Leftover, OpenError::Damaged { path, .. }) => OpenError::ForeignWal { path },
            (_, error) => error,
        }
    }

    /// Begins a term: every later change is this owner's, and the file is marked as open.
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
                           when it has finished";
            return Err(unavailable_failure(problem));
        }
        let wal = std::fs::metadata(open_mark::wal_path(&self.real_path)).map_err(unavailable_failure)?;
        *self.term_reader.lock().unwrap_or_else(PoisonError::into_inner) =
            Some(connect_reader(&self.real_path)?);
        let _ = self.term.set(OwnershipTerm { number, nonce, wal_identity: wal.into() });
        Ok(())
    }

    /// Runs `work` in a transaction of this term. `commits` decides whether there is something to commit.
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
            // A commit to a file that this process no longer owns does not exist for the other processes.
            self.check_from_outside()?;
        } else {
            execute(connection, "ROLLBACK")?;
        }
        Ok(done)
    }

    /// Checks that this process still owns the file. A file that cannot be read does not count as lost.
    ///
    /// # Errors
    /// [`StoreError::OwnershipLost`] if the file is lost.
    pub(super) fn check_ownership(&self) -> SqliteResult<()> {
        // Locked until the end, so the term cannot end meanwhile.
        let reader = self.term_reader.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(reader) = &*reader else { return Ok(()) };
        self.check_from_outside()?;
        self.check_term(reader)
    }

    /// Ends the term in order and closes the last connection: afterwards the file contains everything and is marked as
    /// closed. A lost file, or one that others are reading, is left as it is. Another process may lock the file then,
    /// even if `self` is still referenced.
    pub(super) async fn release(self: Arc<Self>, writer: &SqliteWriter) -> Result<(), StoreError> {
        let owner = self.clone();
        let ended = writer.run(move |connection| owner.end_term(connection)).await;
        writer.close().await?;
        self.unlock();
        ended
    }

    /// Releases the locks. Closing the files is not enough: a child process shares them between its fork and its exec.
    fn unlock(&self) {
        // Errors do not matter: the end of the process releases the locks, too.
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

    /// Checks the file itself, since SQLite may not see what others do to it.
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

/// Locks a file and opens its writing connection, which keeps other connections from removing the WAL.
/// `accept_lost_wal` expects that the WAL is missing.
pub(super) async fn acquire(
    path: &str,
    accept_lost_wal: bool,
) -> Result<(Arc<FileOwner>, SqliteWriter), OpenError> {
    let owner = Arc::new(FileOwner::lock(path)?);
    match (owner.wal_state == WalState::Missing, accept_lost_wal) {
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

/// Checks periodically that the process still owns the file.
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

/// Reports that the server must stop: it no longer decides which changes are committed.
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

/// Whether a path certainly leads to another file, or to none.
fn is_different_file(name: &Path, known: FileIdentity) -> bool {
    match std::fs::metadata(name) {
        Ok(found) => FileIdentity::from(found) != known,
        Err(error) => error.kind() == std::io::ErrorKind::NotFound,
    }
}

fn is_on_network_file_system(file: &File) -> bool {
    fstatfs(file).is_ok_and(|found| NETWORK_FILE_SYSTEMS.contains(&found.f_type))
}

/// The path of the lock file of a database file.
fn lock_file_path(real: &Path) -> PathBuf {
    append_suffix(real, "-lock")
}

/// Locks the lock file, which contains the process id of the owner.
fn acquire_lock_file(path: &Path, real: &Path) -> Result<File, OpenError> {
    let shown = path.display().to_string();
    let other = |error: std::io::Error| OpenError::Other { path: shown.clone(), source: error.into() };
    let lock = lock_file_path(real);
    let mut file = private_file::open_or_create(&lock)
        .map_err(|error| OpenError::Other { path: lock.display().to_string(), source: error.into() })?;
    // The file is overwritten below.
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

/// Whether any process owns the file. SQLite must not have opened it in this process yet.
pub(super) fn is_owned(real: &Path) -> bool {
    // A shared lock, released at once: it can hardly disturb a server that is starting.
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
