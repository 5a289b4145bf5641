//! Ownership of a database file: one process at a time changes it, and a process that has lost it stops.
//!
//! The owner holds `flock` on the database file itself. So a second server is refused under each name of the file: a
//! symbolic link, a hard link, another mount. A lock on a file beside it keeps out servers of versions that know no other,
//! and is the only one on a network file system, where `flock` and SQLite's own locks exclude each other.
//!
//! Where locks fail, the term decides. Each start counts `meta.term` up and draws `meta.owner`, and the mark in the file's
//! header (`mark.rs`) has the term too. A transaction that finds another term is not committed. A commit after which the
//! file's names or its mark are not the owner's is not acknowledged. [`Owner::check`] looks at all of it between
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
    private_file::{self, with_suffix},
    store::{OpenError, StoreError},
};

use super::{
    connection::{Failure, Result, Writer, blocking, read_only, run, unavailable},
    mark::{self, Mark, WalState},
    opening_error, permissions,
};

/// How often the owner looks whether the file is still its own. It bounds how long it answers when it is not.
const CHECKED: Duration = Duration::from_millis(250);

/// NFS, SMB, CIFS and SMB2: file systems that make `flock` a lock of the kind that SQLite takes.
const NETWORK: [FsWord; 4] = [NFS_SUPER_MAGIC, 0x517b, 0xff53_4d42, 0xfe53_4d42];

/// The owner of a database file.
pub(super) struct Owner {
    /// The file as the settings name it: a symbolic link, perhaps.
    path: PathBuf,
    /// The file's own name, which its WAL is beside.
    real: PathBuf,
    /// What it had of its WAL when it was locked.
    wal: WalState,
    term: OnceLock<Term>,
    /// Reads the term between transactions, for as long as there is one.
    reader: Mutex<Option<Connection>>,
    file: File,
    inode: Inode,
    lock_file: File,
}

/// What the file has of this owner and no other.
struct Term {
    number: i64,
    nonce: Vec<u8>,
    wal: Inode,
}

/// A file, whatever its names are.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Inode(u64, u64);

impl From<Metadata> for Inode {
    fn from(found: Metadata) -> Self {
        Inode(found.dev(), found.ino())
    }
}

impl Owner {
    /// Takes the locks on a file, which is created where it is missing.
    ///
    /// # Errors
    /// When another process has them, or the file cannot be opened.
    pub(super) fn lock(path: &str) -> std::result::Result<Owner, OpenError> {
        let other = |error: std::io::Error| OpenError::Other { path: path.to_owned(), source: error.into() };
        let path = PathBuf::from(path);
        // A link to nothing yet leads nowhere. The file holds digests and names: it is for its owner alone.
        private_file::create_missing_target(&path).map_err(other)?;
        let real = path.canonicalize().map_err(other)?;
        permissions::check(&real)?;
        let lock_file = lock_beside(&path, &real)?;
        // To be written, so that an overlay file system copies it before SQLite does.
        let file = private_file::open_existing(&real).map_err(other)?;
        if is_on_network(&file) {
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
        let wal = mark::look(&path.display().to_string(), &real, &file)?;
        let (term, reader) = (OnceLock::new(), Mutex::new(None));
        Ok(Owner { path, real, wal, term, reader, file, inode, lock_file })
    }

    /// The name under which SQLite opens the file.
    pub(super) fn real(&self) -> &Path {
        &self.real
    }

    /// Why a file does not open: a WAL that is not its own makes a whole file look damaged.
    pub(super) fn explain(&self, error: OpenError) -> OpenError {
        match (self.wal, error) {
            (WalState::Spare, OpenError::Damaged { path, .. }) => OpenError::ForeignWal { path },
            (_, error) => error,
        }
    }

    /// Begins a term: from here on every change is this owner's, and the file is marked as open.
    pub(super) fn begin_term(&self, connection: &Connection) -> Result<()> {
        run(connection, "BEGIN IMMEDIATE")?;
        let sql = "UPDATE meta SET term = term + 1, owner = randomblob(16) RETURNING term, owner";
        let (number, nonce) = connection.query_row(sql, [], |row| Ok((row.get(0)?, row.get(1)?)))?;
        mark::set(connection, mark::number(number))?;
        run(connection, "COMMIT")?;
        let copied = mark::copy_wal(connection)?;
        let marked = self.mark()?.is_some_and(|mark| mark.open == mark::number(number));
        if !(copied && marked) {
            let problem = "another program is reading the database, so it cannot be marked as open; try again \
                           when that has ended";
            return Err(unavailable(problem));
        }
        let wal = std::fs::metadata(mark::wal_of(&self.real)).map_err(unavailable)?;
        *self.reader.lock().unwrap_or_else(PoisonError::into_inner) = Some(read_only(&self.real)?);
        let _ = self.term.set(Term { number, nonce, wal: wal.into() });
        Ok(())
    }

    /// Does `work` in a transaction of this term. `commits` says whether there is something to commit.
    pub(super) fn transaction<T>(
        &self,
        connection: &Connection,
        work: impl FnOnce(&Connection) -> Result<T>,
        commits: impl FnOnce(&T) -> bool,
    ) -> Result<T> {
        run(connection, "BEGIN IMMEDIATE")?;
        self.check_term(connection)?;
        let done = work(connection)?;
        if commits(&done) {
            run(connection, "COMMIT")?;
            // What a process commits to a file that is no longer its own is lost on the others.
            self.check_file()?;
        } else {
            run(connection, "ROLLBACK")?;
        }
        Ok(done)
    }

    /// Checks that this process still owns the file. A file that cannot be read does not count as lost.
    ///
    /// # Errors
    /// [`StoreError::Lost`] if it does not.
    pub(super) fn check(&self) -> Result<()> {
        // Held until the end: a term does not end meanwhile.
        let reader = self.reader.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(reader) = &*reader else { return Ok(()) };
        self.check_file()?;
        self.check_term(reader)
    }

    /// Ends the term in order, and closes the last connection: the file holds everything afterwards, and is marked as
    /// closed. One that is no longer this owner's, or that others read, is left as it is. Another may lock it then, though
    /// a look at the file still holds this owner.
    pub(super) async fn end(self: Arc<Self>, writer: &Writer) -> std::result::Result<(), StoreError> {
        let owner = self.clone();
        let ended = writer.work(move |connection| owner.end_term(connection)).await;
        writer.close().await?;
        self.unlock();
        ended
    }

    /// Releases the locks. To close the files is not enough: a child process has them too between its fork and its exec.
    fn unlock(&self) {
        // They cannot be unlocked twice, and the end of the process unlocks them.
        let _ = (self.file.unlock(), self.lock_file.unlock());
    }

    fn end_term(&self, connection: &Connection) -> Result<()> {
        *self.reader.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.check_names()?;
        self.check_mark()?;
        self.check_term(connection)?;
        if mark::copy_wal(connection)? {
            mark::clear(connection)?;
        }
        Ok(())
    }

    fn check_term(&self, connection: &Connection) -> Result<()> {
        let Some(Term { number, nonce, .. }) = self.term.get() else { return Ok(()) };
        let sql = "SELECT 1 FROM meta WHERE term = ?1 AND owner = ?2";
        let mut statement = connection.prepare_cached(sql)?;
        let own = statement.query_row(params![number, nonce], |_| Ok(())).optional()?;
        own.ok_or_else(|| lost("another process has taken it over"))
    }

    /// Looks at the file from outside, where SQLite may not see what others do.
    fn check_file(&self) -> Result<()> {
        let Some(term) = self.term.get() else { return Ok(()) };
        self.check_names()?;
        self.check_mark()?;
        if is_other(&mark::wal_of(&self.real), term.wal) {
            return Err(lost("its -wal file was removed, renamed or replaced"));
        }
        Ok(())
    }

    fn check_names(&self) -> Result<()> {
        if is_other(&self.path, self.inode) || is_other(&self.real, self.inode) {
            return Err(lost("the file was removed, renamed or replaced"));
        }
        Ok(())
    }

    fn check_mark(&self) -> Result<()> {
        let Some(term) = self.term.get() else { return Ok(()) };
        match self.mark() {
            Ok(Some(mark)) if mark.open == mark::number(term.number) => Ok(()),
            Ok(_) => Err(lost("another process has marked or overwritten it")),
            Err(_) => Ok(()),
        }
    }

    fn mark(&self) -> Result<Option<Mark>> {
        Mark::in_file(&self.file).map_err(unavailable)
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.unlock();
    }
}

/// Locks a file and opens its writing connection, which keeps other connections from removing the WAL. `lost` accepts
/// that the WAL is missing.
pub(super) async fn hold(path: &str, lost: bool) -> std::result::Result<(Arc<Owner>, Writer), OpenError> {
    let owner = Arc::new(Owner::lock(path)?);
    match (owner.wal == WalState::Lost, lost) {
        (true, false) => return Err(OpenError::WithoutWal { path: path.to_owned() }),
        (false, true) => return Err(OpenError::NothingLost { path: path.to_owned() }),
        _ => {}
    }
    let seen = owner.clone();
    let opened = async {
        let writer = Writer::open(owner.real()).await?;
        let own = writer.work(move |connection| mark::is_own_wal(connection, &seen.real, &seen.file)).await?;
        Ok((writer, own))
    };
    match opened.await {
        Ok((writer, true)) => Ok((owner, writer)),
        Ok((_, false)) => Err(OpenError::ForeignWal { path: path.to_owned() }),
        Err(error) => Err(owner.explain(opening_error(path, error))),
    }
}

/// Looks between transactions whether the file is still its owner's.
pub(super) async fn watch(owner: Weak<Owner>, lost: Sender<bool>) {
    let mut due = tokio::time::interval(CHECKED);
    due.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        due.tick().await;
        let Some(owner) = owner.upgrade() else { return };
        if let Err(error @ StoreError::Lost(_)) = blocking(move || owner.check()).await {
            return give_up(&lost, &error);
        }
    }
}

/// Stops the server: it can no longer tell which changes are committed.
pub(super) fn give_up(lost: &Sender<bool>, error: &StoreError) {
    if !lost.send_replace(true) {
        tracing::error!(
            error = error as &dyn std::error::Error,
            "database file lost: this process no longer owns it"
        );
    }
}

fn lost(how: &'static str) -> Failure {
    StoreError::Lost(how).into()
}

/// Whether a name certainly leads to another file, or to none.
fn is_other(name: &Path, known: Inode) -> bool {
    match std::fs::metadata(name) {
        Ok(found) => Inode::from(found) != known,
        Err(error) => error.kind() == std::io::ErrorKind::NotFound,
    }
}

fn is_on_network(file: &File) -> bool {
    fstatfs(file).is_ok_and(|found| NETWORK.contains(&found.f_type))
}

/// The name of the lock file beside a database file.
fn lock_file_of(real: &Path) -> PathBuf {
    with_suffix(real, "-lock")
}

/// Locks the file beside the database file, which has the owner's process id.
fn lock_beside(path: &Path, real: &Path) -> std::result::Result<File, OpenError> {
    let shown = path.display().to_string();
    let other = |error: std::io::Error| OpenError::Other { path: shown.clone(), source: error.into() };
    let lock = lock_file_of(real);
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
    is_locked(File::open(lock_file_of(real)))
        || is_locked(File::open(real).and_then(|file| match is_on_network(&file) {
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
        let owner = Owner::lock(&path).unwrap();
        // As a fork copies them: of the same open files.
        let copies = (owner.file.try_clone().unwrap(), owner.lock_file.try_clone().unwrap());
        assert!(matches!(Owner::lock(&path), Err(OpenError::Locked { .. })));
        drop(owner);
        assert!(Owner::lock(&path).is_ok());
        drop(copies);
    }

    #[tokio::test]
    async fn a_file_is_free_after_the_end_though_a_look_at_it_still_holds_the_owner() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("keyward.db").display().to_string();
        let (owner, writer) = hold(&path, false).await.unwrap();
        let looking = owner.clone();
        owner.end(&writer).await.unwrap();
        assert!(Owner::lock(&path).is_ok());
        assert!(looking.check().is_ok());
    }
}
