//! Reads tokens from files and stdin, writes them to new files, and detects them among arguments.
//!
//! # Invariants
//! - A token never comes from an argument or an environment variable, because other processes can read both.
//! - A token that was read is wiped after use, and its `Debug` output does not contain it.

use std::{
    ffi::OsString,
    fmt, fs,
    io::{self, Read, Write as _},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use encoding_rs::{Encoding, UTF_8};
use zeroize::Zeroizing;

use super::{error::CliError, table::escape_terminal, value_format::shown_path};
use crate::private_file;

/// Far above the longest token; longer input is not a token.
const MAX_TOKEN_BYTES: usize = 4096;

/// A token in plaintext, whose `Debug` output does not contain it.
pub(super) struct PlainToken(Zeroizing<String>);

impl PlainToken {
    /// Returns the token itself, for the request that needs it.
    pub(super) fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for PlainToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// Whether the path is `-`, which means stdin.
pub(super) fn is_stdin(path: &Path) -> bool {
    path.as_os_str() == "-"
}

/// Reads the caller's own token, which must be visible ASCII.
pub(super) fn read_caller_token(path: &Path) -> Result<PlainToken, CliError> {
    let secret = read_token(path)?;
    if secret.0.bytes().all(|byte| byte.is_ascii_graphic()) && !secret.0.is_empty() {
        return Ok(secret);
    }
    Err(CliError::new(format!("{} holds no token", describe_path(path))).with_hint(
        "the file must hold the token alone, as `keyward keys create --write-token FILE` writes it",
    ))
}

/// Reads a token to check, of any shape: whether it is valid is the server's decision.
pub(super) fn read_token(path: &Path) -> Result<PlainToken, CliError> {
    let text = if is_stdin(path) {
        read_limited(io::stdin().lock())
    } else {
        fs::File::open(path).and_then(read_limited)
    };
    text.map(PlainToken)
        .map_err(|error| CliError::new(format!("cannot read a token from {}: {error}", describe_path(path))))
}

fn read_limited(from: impl Read) -> io::Result<Zeroizing<String>> {
    // Allocated at full size, because growing would leave copies in memory.
    let mut bytes = Zeroizing::new(Vec::with_capacity(MAX_TOKEN_BYTES + 1));
    from.take(MAX_TOKEN_BYTES as u64 + 1).read_to_end(&mut bytes)?;
    if bytes.len() > MAX_TOKEN_BYTES {
        return Err(io::Error::other("too much for a token"));
    }
    let text = decode_text(&bytes).ok_or_else(|| io::Error::other("not text"))?;
    Ok(Zeroizing::new(text.trim_ascii().to_owned()))
}

/// Decodes UTF-8, or UTF-16 with a byte order mark, which editors and shells on Windows write.
fn decode_text(bytes: &[u8]) -> Option<Zeroizing<String>> {
    let (encoding, mark) = Encoding::for_bom(bytes).unwrap_or((UTF_8, 0));
    let text = encoding.decode_without_bom_handling_and_without_replacement(&bytes[mark..])?;
    Some(Zeroizing::new(text.into_owned()))
}

/// Returns a warning if users other than the owner can read a token's file.
pub(super) fn permission_warning(path: &Path) -> Option<String> {
    let found = fs::metadata(path).ok().filter(|found| !is_stdin(path) && found.is_file())?;
    let mode = found.permissions().mode() & 0o777;
    let readers = match (mode & 0o044, mode & 0o004) {
        (0, _) => return None,
        (_, 0) => "its group",
        _ => "everybody",
    };
    let path = escape_terminal(&path.display().to_string());
    Some(format!("warning: {readers} can read the token in {path} (mode {mode:04o}): chmod 600 {path}\n"))
}

fn describe_path(path: &Path) -> String {
    let shown = path.display().to_string();
    // The name may be a token given by mistake: file names are shorter, or have a folder.
    let may_be_token =
        shown.len() >= 24 && !shown.contains('/') && shown.contains(|c: char| c.is_ascii_digit());
    match (is_stdin(path), may_be_token) {
        (true, _) => "stdin".to_owned(),
        (_, true) => "the file (its name may be a token, and is not repeated)".to_owned(),
        _ => shown,
    }
}

/// A new file for a token that only its owner can read.
///
/// It is created before the call that issues the token, so that an unwritable path wastes no key. Without a token it is
/// removed on drop.
#[derive(Debug)]
pub(super) struct TokenFile {
    file: fs::File,
    path: PathBuf,
    is_written: bool,
}

impl TokenFile {
    /// Creates the file. An existing one is refused, because it may hold a token that is in use.
    pub(super) fn create(path: &Path) -> Result<TokenFile, CliError> {
        match private_file::create_new(path) {
            Ok(file) => Ok(TokenFile { file, path: path.to_owned(), is_written: false }),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                Err(CliError::new(format!("{} exists already", shown_path(path)))
                    .with_hint("name a new file: nothing is overwritten"))
            }
            Err(error) => Err(CliError::new(format!("cannot create {}: {error}", shown_path(path)))),
        }
    }

    /// Writes the token as one line and syncs it to disk.
    pub(super) fn write(mut self, token: &str) -> io::Result<()> {
        self.file.write_all(token.as_bytes())?;
        self.file.write_all(b"\n")?;
        private_file::sync_to_disk(&self.file, &self.path)?;
        self.is_written = true;
        Ok(())
    }
}

impl Drop for TokenFile {
    fn drop(&mut self) {
        if !self.is_written {
            // A failure loses nothing: the file is empty or incomplete.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Whether an argument is a token, or holds one as `--flag=TOKEN` or in a list. The checksum is not verified, because a
/// mistyped token is a secret too.
pub(super) fn contains_token(arguments: &[OsString]) -> bool {
    arguments
        .iter()
        .filter_map(|argument| argument.to_str())
        .any(|argument| argument.split(['=', ',']).any(looks_like_token))
}

/// Implements `domain::token::TOKEN_PATTERN`; a test checks that both agree.
fn looks_like_token(text: &str) -> bool {
    let Some((head, body)) = text.rsplit_once('_') else {
        return false;
    };
    body.len() == 49
        && body.bytes().all(|byte| byte.is_ascii_alphanumeric())
        && (1..=33).contains(&head.len())
        && head.starts_with(|first: char| first.is_ascii_lowercase())
        && head.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_')
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;
    use crate::domain::{
        name::{TokenPrefix, TokenTag},
        token::{TOKEN_PATTERN, Token},
    };

    fn token(prefix: &str, tag: &str) -> Token {
        Token::generate(&TokenPrefix::parse(prefix).unwrap(), &TokenTag::parse(tag).unwrap(), &[7; 32])
    }

    #[test]
    fn a_secret_cannot_be_printed() {
        assert_eq!(format!("{:?}", PlainToken(Zeroizing::new("kw_x".to_owned()))), "Secret(..)");
    }

    #[test]
    fn a_token_among_the_arguments_is_noticed_wherever_it_stands() {
        assert_eq!(TOKEN_PATTERN, "^[a-z][a-z0-9_]{0,32}_[0-9A-Za-z]{49}$", "the pattern here must follow");
        for (prefix, tag) in [("kw", "live"), ("izli_agent", ""), ("a", "")] {
            let token = token(prefix, tag);
            let token = token.reveal();
            for argument in [token.to_owned(), format!("--token={token}"), format!("x,{token}")] {
                assert!(contains_token(&["keys".into(), argument.into()]));
            }
            assert!(!contains_token(&[token[1..].to_uppercase().into(), token[..30].into()]));
        }
        for harmless in
            ["--name", "kw_live_0000", "0197c0de-0000-7000-8000-000000000000", "/run/kw_live_token", ""]
        {
            assert!(!contains_token(&[harmless.into()]), "{harmless:?}");
        }
    }

    #[test]
    fn a_byte_order_mark_blanks_and_line_ends_are_not_part_of_the_token() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        let wide = |bytes: fn(u16) -> [u8; 2]| "\u{feff}kw_x\r\n".encode_utf16().flat_map(bytes).collect();
        for content in [
            b"kw_x".to_vec(),
            b"kw_x\r\n".to_vec(),
            b"\xef\xbb\xbfkw_x\r\n".to_vec(),
            b"\xef\xbb\xbf kw_x \n\n".to_vec(),
            wide(u16::to_le_bytes),
            wide(u16::to_be_bytes),
        ] {
            fs::write(&path, &content).unwrap();
            assert_eq!(read_caller_token(&path).unwrap().reveal(), "kw_x", "{content:?}");
        }
    }

    #[test]
    fn a_file_that_holds_no_token_is_refused_without_its_content() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        for content in ["", "\n", "kw_one\nkw_two", "Bearer kw_x", "k\u{e9}y"] {
            fs::write(&path, content).unwrap();
            let error = read_caller_token(&path).unwrap_err().to_string();
            assert!(error.contains("holds no token") && !error.contains("kw_"), "{error}");
        }
        fs::write(&path, [b'k', 0xff]).unwrap();
        assert!(read_caller_token(&path).unwrap_err().to_string().contains("not text"));
        fs::write(&path, vec![b'k'; MAX_TOKEN_BYTES + 1]).unwrap();
        assert!(read_caller_token(&path).unwrap_err().to_string().contains("too much"));
        assert!(
            read_caller_token(&folder.path().join("none")).unwrap_err().to_string().contains("cannot read")
        );
    }

    #[test]
    fn a_token_file_is_the_owners_alone_and_never_overwritten() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        TokenFile::create(&path).unwrap().write("kw_x").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "kw_x\n");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(TokenFile::create(&path).unwrap_err().to_string().contains("exists already"));
        assert_eq!(fs::read_to_string(&path).unwrap(), "kw_x\n");
    }

    #[test]
    fn a_token_file_that_others_can_read_is_warned_of() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        fs::write(&path, "kw_x").unwrap();
        for (mode, who) in
            [(0o600, None), (0o400, None), (0o640, Some("its group")), (0o644, Some("everybody"))]
        {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            let warning = permission_warning(&path);
            assert_eq!(warning.is_some(), who.is_some(), "{mode:o}");
            assert!(
                warning.is_none_or(|warning| warning.contains(who.unwrap()) && !warning.contains("kw_x"))
            );
        }
        assert_eq!(permission_warning(Path::new("-")), None);
        assert_eq!(permission_warning(folder.path()), None);
    }

    #[test]
    fn a_token_file_without_a_token_goes_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        drop(TokenFile::create(&path).unwrap());
        assert!(!path.exists());
    }
}
