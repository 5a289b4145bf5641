//! Creates files that only their owner can read and write, and never writes through a symbolic link.
//!
//! Every file that the program creates comes from here. There are two exceptions: sockets (`transport/socket.rs`), and
//! the files that SQLite puts next to a database, which get the database's mode.
//!
//! - A new file has mode 0600, whatever the umask.
//! - An existing file keeps its mode: an operator may have opened it for a log shipper.
//! - Only the last component of a path is checked. Write access to a parent folder allows the folder to be replaced.

use std::{
    ffi::OsString,
    fs::{self, DirBuilder, File, OpenOptions, Permissions},
    io::{self, ErrorKind, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use rustix::{fs::OFlags, io::Errno};

/// Read and write for the owner only.
const FILE_MODE: u32 = 0o600;

/// Creates a new file to write to.
///
/// Fails if a file or symbolic link exists, or the system refuses.
pub(crate) fn create_new(path: &Path) -> io::Result<File> {
    create_with(path, OpenOptions::new().write(true))
}

/// Opens a file for reading and writing, and creates it if it is missing.
///
/// Fails if it is a symbolic link, or the system refuses.
pub(crate) fn open_or_create(path: &Path) -> io::Result<File> {
    open_or_create_with(path, OpenOptions::new().read(true).write(true))
}

/// Opens a file for appending, and creates it if it is missing.
///
/// Fails if it is a symbolic link, or the system refuses.
pub(crate) fn append_or_create(path: &Path) -> io::Result<File> {
    open_or_create_with(path, OpenOptions::new().append(true))
}

/// Opens an existing file for reading and writing.
///
/// Fails if it is missing or a symbolic link, or the system refuses.
pub(crate) fn open_existing(path: &Path) -> io::Result<File> {
    open_no_follow(path, OpenOptions::new().read(true).write(true))
}

/// Creates an empty file if it is missing. It follows a symbolic link, because a link may name a database, even before
/// it exists.
pub(crate) fn create_missing_target(path: &Path) -> io::Result<()> {
    match create_new(path) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {
            OpenOptions::new().append(true).create(true).mode(FILE_MODE).open(path).map(drop)
        }
        created => created.map(drop),
    }
}

/// Replaces the content of a file atomically. A symbolic link is replaced, not followed.
///
/// Fails if the system refuses; the file then keeps its old content.
pub(crate) fn replace_content(path: &Path, content: &[u8]) -> io::Result<()> {
    let new = append_suffix(path, ".new");
    // A killed process may have left one.
    match fs::remove_file(&new) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
        _ => create_new(&new)?.write_all(content)?,
    }
    fs::rename(&new, path)
}

/// Creates a folder that only its owner can use.
///
/// Fails if the folder exists, or the system refuses.
pub(crate) fn create_private_dir(path: &Path) -> io::Result<()> {
    DirBuilder::new().mode(0o700).create(path)
}

/// Waits until the content and the name of a file are on disk.
///
/// Fails if the system reports a fault; the content may not be on disk then.
pub(crate) fn sync_to_disk(file: &File, path: &Path) -> io::Result<()> {
    file.sync_all()?;
    match File::open(parent_dir(path)) {
        // A folder that is writable but not readable cannot be synced.
        Err(error) if error.kind() == ErrorKind::PermissionDenied => Ok(()),
        folder => folder?.sync_all(),
    }
}

/// Returns the folder of a file.
#[must_use]
pub(crate) fn parent_dir(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Appends a suffix to the last component of a path.
#[must_use]
pub(crate) fn append_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(suffix);
    PathBuf::from(name)
}

fn create_with(path: &Path, options: &OpenOptions) -> io::Result<File> {
    // `O_EXCL` follows no link.
    let file = options.clone().create_new(true).mode(FILE_MODE).open(path)?;
    // A umask may have removed rights of the owner too.
    file.set_permissions(Permissions::from_mode(FILE_MODE))?;
    Ok(file)
}

fn open_or_create_with(path: &Path, options: &OpenOptions) -> io::Result<File> {
    match create_with(path, options) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {
            // Log rotation may move it away meanwhile.
            open_no_follow(path, options.clone().create(true).mode(FILE_MODE))
        }
        created => created,
    }
}

fn open_no_follow(path: &Path, options: &OpenOptions) -> io::Result<File> {
    let flags = i32::try_from(OFlags::NOFOLLOW.bits()).unwrap_or_default();
    options.clone().custom_flags(flags).open(path).map_err(|error| {
        let is_link = error.raw_os_error() == Some(Errno::LOOP.raw_os_error());
        if is_link {
            io::Error::other("it is a symbolic link; name the file that it leads to")
        } else {
            error
        }
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// A folder with a file of another user, and a link to it.
    fn linked() -> (tempfile::TempDir, PathBuf, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let (target, link) = (folder.path().join("target"), folder.path().join("link"));
        fs::write(&target, "precious").unwrap();
        symlink(&target, &link).unwrap();
        (folder, target, link)
    }

    #[test]
    fn nothing_is_written_through_a_symbolic_link() {
        let (_folder, target, link) = linked();
        let opened =
            [create_new(&link), open_or_create(&link), append_or_create(&link), open_existing(&link)];
        for error in opened.into_iter().skip(1) {
            assert!(error.unwrap_err().to_string().contains("symbolic link"));
        }
        replace_content(&link, b"new").unwrap();
        assert_eq!(fs::read_to_string(&target).unwrap(), "precious");
        assert!(!link.is_symlink(), "the link itself was replaced");
    }

    #[test]
    fn a_link_to_nothing_is_not_filled() {
        let folder = tempfile::tempdir().unwrap();
        let (nothing, link) = (folder.path().join("nothing"), folder.path().join("link"));
        symlink(&nothing, &link).unwrap();
        for opened in [create_new(&link), open_or_create(&link), append_or_create(&link)] {
            opened.unwrap_err();
        }
        assert!(!nothing.exists());
    }

    #[test]
    fn a_file_that_exists_keeps_its_mode_and_its_content() {
        let (_folder, target, _) = linked();
        fs::set_permissions(&target, Permissions::from_mode(0o640)).unwrap();
        append_or_create(&target).unwrap().write_all(b" and more").unwrap();
        assert_eq!(fs::read_to_string(&target).unwrap(), "precious and more");
        assert_eq!(fs::metadata(&target).unwrap().permissions().mode() & 0o777, 0o640);
    }

    #[test]
    fn what_a_killed_process_left_does_not_keep_a_file_from_being_replaced() {
        let (_folder, target, link) = linked();
        symlink(&link, append_suffix(&target, ".new")).unwrap();
        replace_content(&target, b"new").unwrap();
        assert_eq!(fs::read_to_string(&target).unwrap(), "new");
    }
}
