//! The mark "open" in the header of a database file, which distinguishes a file that lacks its WAL from a complete one.
//!
//! The newest changes are only in the WAL. A copy of the database file, or a file whose WAL is lost, is an older state
//! that looks complete. So while a process owns the file, `user_version` in the header is the owner's term; it is 0 in
//! a closed file. Every version of the first page that the owner writes has the mark, so checkpoints do not remove it.
//! `application_id` is the newest term, also in a closed file: a WAL with an older one does not belong to the file.
//!
//! # What a crash leaves, step by step
//! | step | in the file | in the WAL | the next start |
//! |---|---|---|---|
//! | the file is created, its tables are made | closed, or empty | the tables | opens; nothing was acknowledged yet |
//! | the term is committed, with the mark | as before | the term and the mark | opens with the WAL |
//! | the WAL is copied into the file | open, partly copied | everything | opens with the WAL |
//! | the file is synced: the first change may come | open | all frames, copied | opens with the WAL |
//! | changes, checkpoints | open | a header at least, the newest changes | opens with the WAL |
//! | close: all is copied, a commit clears the mark | open | the commit | opens with the WAL |
//! | close: the commit is copied and synced | closed | the same | opens |
//! | close: the WAL is removed | closed | - | opens |
//!
//! A file without its WAL is refused in each row where it is open, and only there: in all others, it contains
//! everything that was acknowledged. A checkpoint never shortens the WAL, and only the close removes it: writing
//! connections do not checkpoint when they are closed (`connection.rs`), and the others cannot write.

use std::{
    fs::File,
    io,
    os::unix::{ffi::OsStrExt as _, fs::FileExt as _},
    path::Path,
};

use rusqlite::{Connection, OpenFlags, config::DbConfig};

use crate::{private_file::append_suffix, store::OpenError};

use super::connection::{SqliteResult, unavailable_failure};

/// The first bytes of an SQLite file.
const SQLITE_MAGIC: &[u8] = b"SQLite format 3\0";
/// The offset of `user_version` in SQLite's header.
const USER_VERSION_OFFSET: usize = 60;
const APPLICATION_ID_OFFSET: usize = 68;
const HEADER_LEN: usize = 100;
/// The size of a WAL's header, which SQLite writes before any frame.
const WAL_HEADER_LEN: u64 = 32;
/// The first bytes of a WAL, except for the lowest bit.
const WAL_MAGIC: u32 = 0x377f_0682;
/// A frame's header and the smallest page.
const MIN_FRAME_LEN: u64 = 24 + 512;

/// The terms in the header of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct OpenMark {
    /// The term of the owner that has the file open; 0 = closed.
    pub(super) open_term: u32,
    /// The newest term of any owner.
    newest_term: u32,
}

impl OpenMark {
    /// The mark of a new file, and of a file that is older than marks.
    const UNMARKED: OpenMark = OpenMark { open_term: 0, newest_term: 0 };

    /// Reads the mark from the file alone, without its WAL. `None` = the file does not begin like a database.
    pub(super) fn read_from_file(file: &File) -> io::Result<Option<OpenMark>> {
        let mut header = [0; HEADER_LEN];
        match file.read_exact_at(&mut header, 0) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            read => read?,
        }
        let number = |at: usize| header[at..].first_chunk().map_or(0, |bytes| u32::from_be_bytes(*bytes));
        let mark =
            OpenMark { open_term: number(USER_VERSION_OFFSET), newest_term: number(APPLICATION_ID_OFFSET) };
        Ok(header.starts_with(SQLITE_MAGIC).then_some(mark))
    }

    /// Reads the mark as the WAL has it.
    fn read_from_connection(connection: &Connection) -> SqliteResult<OpenMark> {
        let number = |name| connection.pragma_query_value(None, name, |row| row.get::<_, i32>(0));
        Ok(OpenMark {
            open_term: number("user_version")?.cast_unsigned(),
            newest_term: number("application_id")?.cast_unsigned(),
        })
    }
}

/// A term as the header stores it, in 31 bits.
pub(super) fn term_number(term: i64) -> u32 {
    u32::try_from(term.rem_euclid(i64::from(i32::MAX))).unwrap_or(0).max(1)
}

/// Whether a database file has the WAL that it needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum WalState {
    /// The file is closed, or its WAL exists.
    Consistent,
    /// The file is open, and its WAL does not exist.
    Missing,
    /// The file is closed, but a WAL exists: it contains nothing acknowledged. A killed start left it, or it belongs to
    /// another file.
    Leftover,
}

/// Whether SQLite would read anything from a WAL: a header with a correct checksum, and space for a frame. SQLite
/// treats a WAL with another header as empty. Format: <https://www.sqlite.org/fileformat2.html#walformat>.
fn is_wal_readable(wal: &File) -> io::Result<bool> {
    if wal.metadata()?.len() < WAL_HEADER_LEN + MIN_FRAME_LEN {
        return Ok(false);
    }
    let mut header = [0; 32];
    wal.read_exact_at(&mut header, 0)?;
    let bytes = |at: usize| header[at..].first_chunk().copied().unwrap_or_default();
    let magic = u32::from_be_bytes(bytes(0));
    if magic & !1 != WAL_MAGIC {
        return Ok(false);
    }
    // The lowest bit is the byte order of the checksum.
    let word =
        |at| if magic & 1 == 1 { u32::from_be_bytes(bytes(at)) } else { u32::from_le_bytes(bytes(at)) };
    let (mut one, mut two) = (0_u32, 0_u32);
    for at in (0..24).step_by(8) {
        one = one.wrapping_add(word(at)).wrapping_add(two);
        two = two.wrapping_add(word(at + 4)).wrapping_add(one);
    }
    Ok((one, two) == (u32::from_be_bytes(bytes(24)), u32::from_be_bytes(bytes(28))))
}

/// Checks for the WAL that a file needs, before SQLite opens the file. `shown` names the file in errors.
pub(super) fn check_wal(shown: &str, real: &Path, file: &File) -> Result<WalState, OpenError> {
    let other = |error: io::Error| OpenError::Other { path: shown.to_owned(), source: error.into() };
    // The WAL first: an owner that closes the file clears the mark before it removes the WAL.
    let found = match File::open(wal_path(real)) {
        Ok(found) => Some(found),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(other(error)),
    };
    let readable = found.as_ref().map_or(Ok(false), is_wal_readable).map_err(other)?;
    let wal = match found {
        Some(found) => found.metadata().map_err(other)?.len() >= WAL_HEADER_LEN,
        None => false,
    };
    let mark = OpenMark::read_from_file(file).map_err(other)?;
    if wal && file.metadata().map_err(other)?.len() == 0 {
        // SQLite treats an empty file as a new database, and removes the WAL.
        return Err(OpenError::DatabaseFileMissing { path: shown.to_owned() });
    }
    Ok(match (mark.unwrap_or(OpenMark::UNMARKED), wal) {
        (OpenMark { open_term: 1.., .. }, _) if !readable => WalState::Missing,
        // A file that is older than marks may need its WAL.
        (OpenMark { open_term: 0, newest_term: 1.. }, true) => WalState::Leftover,
        _ => WalState::Consistent,
    })
}

/// The path of a file's WAL.
pub(super) fn wal_path(real: &Path) -> std::path::PathBuf {
    append_suffix(real, "-wal")
}

/// Whether the WAL that SQLite has found belongs to the file, as far as the marks show.
pub(super) fn is_own_wal(connection: &Connection, real: &Path, file: &File) -> SqliteResult<bool> {
    let in_file = OpenMark::read_from_file(file).map_err(unavailable_failure)?;
    let in_file = in_file.unwrap_or(OpenMark::UNMARKED);
    let in_wal = OpenMark::read_from_connection(connection)?;
    if in_file.open_term != 0 {
        return Ok(in_wal.newest_term >= in_file.newest_term);
    }
    // A start that was killed before its term was in the file has changed nothing else. A file that is older than
    // marks may need its WAL.
    Ok(in_file.newest_term == 0 || read_log_head(connection)? == read_log_head(&connect_without_wal(real)?)?)
}

/// The end of the log, as this connection reads it.
fn read_log_head(connection: &Connection) -> SqliteResult<(i64, Vec<u8>)> {
    Ok(connection.query_row("SELECT head, head_hash FROM meta", [], |row| Ok((row.get(0)?, row.get(1)?)))?)
}

/// Opens a file without its WAL, read-only.
fn connect_without_wal(real: &Path) -> SqliteResult<Connection> {
    let encoded =
        percent_encoding::percent_encode(real.as_os_str().as_bytes(), percent_encoding::NON_ALPHANUMERIC);
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_URI;
    Ok(Connection::open_with_flags(format!("file:{encoded}?immutable=1"), flags)?)
}

/// Sets the mark in the transaction that begins the term.
pub(super) fn set_mark(connection: &Connection, mark: u32) -> SqliteResult<()> {
    connection.pragma_update(None, "user_version", mark)?;
    connection.pragma_update(None, "application_id", mark)?;
    Ok(())
}

/// Copies the whole WAL into the file and syncs it. Returns false if a reader of an older state prevents it.
pub(super) fn checkpoint_wal(connection: &Connection) -> SqliteResult<bool> {
    let busy = connection.query_row("PRAGMA wal_checkpoint(FULL)", [], |row| row.get::<_, i64>(0))?;
    Ok(busy == 0)
}

/// Clears the mark. When this connection, the last one, is closed, SQLite then copies and removes the WAL.
pub(super) fn clear_mark(connection: &Connection) -> SqliteResult<()> {
    connection.pragma_update(None, "user_version", 0)?;
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, false)?;
    Ok(())
}
