//! Parses the path of a request into the canonical segments that rules match.
//!
//! Servers differ in how they read odd spellings (`//`, `/./`, `%2F`, `\`, `..;`, `admin.`, `%3f`), and a rule that reads
//! a path differently from the service behind it can be bypassed. Proxies must normalize paths; whatever spelling is
//! still ambiguous afterwards is refused here, regardless of the rule that it would match. The table under *Spelling* in
//! `docs/gateway.md` lists the spellings; a test runs each row.

use std::{
    borrow::Cow,
    net::{Ipv4Addr, Ipv6Addr},
};

use percent_encoding::percent_decode_str;
use unicode_normalization::{UnicodeNormalization as _, is_nfkc};

/// A path in the one spelling that rules see: its segments, decoded, without the query, and without regard to a
/// last slash.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CanonicalPath<'a>(Vec<Cow<'a, str>>);

/// What makes a path ambiguous.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PathError {
    /// It does not begin with a slash.
    #[error("the path must begin with '/'")]
    NotAbsolute,
    /// It has two slashes in a row.
    #[error("the path has an empty segment ('//')")]
    EmptySegment,
    /// It has a segment that refers to the same or the upper folder.
    #[error("the path has a '.' or '..' segment")]
    DotSegment,
    /// It has a slash or a backslash that is not a separator, or may be one.
    #[error("the path has an encoded slash or a backslash")]
    Slash,
    /// It has parameters, which some servers cut off and others do not: `..;` is `..` to some.
    #[error("the path has a ';'")]
    Parameters,
    /// It has an encoded `?` or `#`: servers that decode the path before they cut off the query read a shorter path.
    #[error("the path has an encoded '?' or '#'")]
    Delimiter,
    /// A segment ends in a dot, or begins or ends in a blank or an invisible character: Windows and many programs strip
    /// those.
    #[error(
        "the path has a segment that ends in '.', or begins or ends in a blank or an invisible character"
    )]
    Stripped,
    /// It has a script's name before the last segment: to PHP, CGI and ASP.NET the rest is the script's argument.
    #[error("the path continues after the name of a script, such as '.php'")]
    PathInfo,
    /// It names an NTFS stream by its type: `file::$DATA` is `file` to Windows, and `folder:$I30:$INDEX_ALLOCATION` is
    /// `folder`.
    #[error("the path has a ':$'")]
    Stream,
    /// It has characters that normalization or a conversion to another character set turns into those of another path.
    #[error(
        "the path has characters that Unicode normalization or Windows turns into another path, such as a full-width '/'"
    )]
    Lookalike,
    /// It has characters that do not belong in a path: control characters, `#`, or other than ASCII.
    #[error("the path has a character that must be percent-encoded, or a control character")]
    Character,
    /// It has a `%` that begins no encoding.
    #[error("the path has a '%' without two hexadecimal digits")]
    Percent,
    /// It decodes to something that is encoded again.
    #[error("the path is percent-encoded twice")]
    EncodedTwice,
    /// It decodes to other than UTF-8.
    #[error("the path decodes to other than UTF-8")]
    NotUtf8,
}

/// Names of programs that web servers run with the rest of the path as an argument (CGI's `PATH_INFO`), in lower case;
/// and `.php` with a digit. Not `.pl`, `.py` and `.rb`: segments that are domains and repositories end so.
const SCRIPT_EXTENSIONS: [&str; 11] =
    [".php", ".phtml", ".phar", ".pht", ".cgi", ".fcgi", ".asp", ".aspx", ".ashx", ".asmx", ".cfm"];

/// Characters without a width that programs strip like blanks, and that are no blanks to Unicode.
const STRIPPED_INVISIBLES: [char; 3] = ['\u{feff}', '\u{200b}', '\u{180e}'];

/// Characters that NFKC leaves alone, and that conversions to an older character set ("best fit" on Windows) turn into a
/// character with a meaning in paths.
const BEST_FIT_SEPARATORS: [(char, char); 10] = [
    ('\u{2044}', '/'),
    ('\u{2215}', '/'),
    ('\u{29f8}', '/'),
    ('\u{2571}', '/'),
    ('\u{2216}', '\\'),
    ('\u{29f5}', '\\'),
    ('\u{29f9}', '\\'),
    ('\u{a5}', '\\'),
    ('\u{20a9}', '\\'),
    ('\u{66a}', '%'),
];

impl<'a> CanonicalPath<'a> {
    /// Reads the path of a request target, with or without its query.
    ///
    /// # Errors
    /// When services could read it differently from rules.
    pub fn parse(target: &'a str) -> Result<CanonicalPath<'a>, PathError> {
        let path = target.split('?').next().unwrap_or_default();
        let path = path.strip_prefix('/').ok_or(PathError::NotAbsolute)?;
        // The last slash does not matter.
        let path = path.strip_suffix('/').unwrap_or(path);
        if path.is_empty() {
            // Only "/" and "//" come here.
            return if target.starts_with("//") {
                Err(PathError::EmptySegment)
            } else {
                Ok(CanonicalPath(Vec::new()))
            };
        }
        let segments: Vec<_> = path.split('/').map(parse_segment).collect::<Result<_, _>>()?;
        let before_last = segments.split_last().map_or(&[][..], |(_, before)| before);
        if before_last.iter().any(|segment| is_script(segment)) {
            return Err(PathError::PathInfo);
        }
        Ok(CanonicalPath(segments))
    }

    /// Whether it is in Unicode's form NFKC, in which some servers compare names.
    pub(super) fn is_nfkc_normalized(&self) -> bool {
        self.0.iter().all(|segment| segment.is_ascii() || is_nfkc(segment))
    }

    /// The path in Unicode's form NFKC.
    pub(super) fn to_nfkc(&self) -> CanonicalPath<'static> {
        CanonicalPath(self.0.iter().map(|segment| segment.nfkc().collect::<String>().into()).collect())
    }

    /// The decoded segments, in order.
    #[must_use]
    pub fn segments(&self) -> &[Cow<'a, str>] {
        &self.0
    }
}

fn parse_segment(raw: &str) -> Result<Cow<'_, str>, PathError> {
    if raw.contains('\\') {
        return Err(PathError::Slash);
    }
    if raw.bytes().any(|byte| !(0x21..=0x7e).contains(&byte) || byte == b'#') {
        return Err(PathError::Character);
    }
    let decoded = decode_segment(raw)?;
    check_segment(&decoded).map(|()| decoded)
}

/// Whether a decoded segment has one reading.
///
/// # Errors
/// What gives it another.
pub(super) fn check_segment(decoded: &str) -> Result<(), PathError> {
    check_segment_as_is(decoded)?;
    if !decoded.is_ascii() && is_lookalike(decoded) {
        return Err(PathError::Lookalike);
    }
    Ok(())
}

/// The same, of a server that normalizes and converts nothing.
fn check_segment_as_is(decoded: &str) -> Result<(), PathError> {
    if decoded.contains(';') {
        return Err(PathError::Parameters);
    }
    if decoded.contains(['?', '#']) {
        return Err(PathError::Delimiter);
    }
    let strips = |letter: char| letter.is_whitespace() || STRIPPED_INVISIBLES.contains(&letter);
    match decoded {
        "" => Err(PathError::EmptySegment),
        "." | ".." => Err(PathError::DotSegment),
        _ if decoded.ends_with('.') || decoded.starts_with(strips) || decoded.ends_with(strips) => {
            Err(PathError::Stripped)
        }
        _ if decoded.contains(":$") => Err(PathError::Stream),
        _ => Ok(()),
    }
}

/// Whether a segment gets a separator or another reading when it is normalized (NFKC), or converted to another character
/// set. Other letters that it may get, such as ASCII ones of full-width ones, are the rules' business:
/// [`super::RouteRules::is_ambiguous`].
fn is_lookalike(segment: &str) -> bool {
    let separates = |letter: char| "/\\%;?#".contains(letter);
    let becomes_separator = |letter: char| {
        !letter.is_ascii()
            && (BEST_FIT_SEPARATORS.iter().any(|(from, _)| *from == letter)
                || std::iter::once(letter).nfkc().any(separates))
    };
    let normalized: String = segment.nfkc().collect();
    segment.chars().any(becomes_separator)
        || check_segment_as_is(&normalized).is_err()
        || percent_escapes(&normalized).any(|encoded| encoded)
}

/// Whether a segment names a script, as it is or normalized.
pub(super) fn is_script(segment: &str) -> bool {
    let ends_so = |segment: &str| {
        let Some(dot) = segment.rfind('.') else { return false };
        let name = &segment[dot..];
        let version = name.strip_suffix(|last: char| last.is_ascii_digit());
        SCRIPT_EXTENSIONS.iter().any(|script| name.eq_ignore_ascii_case(script))
            || version.is_some_and(|name| name.eq_ignore_ascii_case(".php"))
    };
    ends_so(segment) || !segment.is_ascii() && ends_so(&segment.nfkc().collect::<String>())
}

fn decode_segment(raw: &str) -> Result<Cow<'_, str>, PathError> {
    if !raw.contains('%') {
        return Ok(Cow::Borrowed(raw));
    }
    if !percent_escapes(raw).all(|encoded| encoded) {
        return Err(PathError::Percent);
    }
    let decoded = percent_decode_str(raw).decode_utf8().map_err(|_| PathError::NotUtf8)?;
    if decoded.contains(['/', '\\']) {
        return Err(PathError::Slash);
    }
    if decoded.chars().any(char::is_control) {
        return Err(PathError::Character);
    }
    if percent_escapes(&decoded).any(|encoded| encoded) {
        return Err(PathError::EncodedTwice);
    }
    Ok(decoded)
}

/// For each `%`, whether two hexadecimal digits follow.
fn percent_escapes(text: &str) -> impl Iterator<Item = bool> {
    text.match_indices('%').map(|(at, _)| {
        let digits = text.as_bytes().get(at + 1..at + 3);
        digits.is_some_and(|digits| digits.iter().all(u8::is_ascii_hexdigit))
    })
}

/// The host of a request in the one spelling that rules see: lower-case, without port and last dot, an IPv6 address in
/// the form of RFC 5952. `None` when it is no host, which an address in another form than four decimal numbers is.
#[must_use]
pub fn normalize_host(authority: &str) -> Option<String> {
    let host = match authority.strip_prefix('[') {
        // An IPv6 address is full of colons.
        Some(rest) => {
            let (address, port) = rest.split_once(']')?;
            let address: Ipv6Addr = address.parse().ok()?;
            return is_port_suffix(port).then(|| format!("[{address}]"));
        }
        None => match authority.find(':') {
            Some(colon) => is_port_suffix(&authority[colon..]).then(|| &authority[..colon])?,
            None => authority,
        },
    };
    let host = host.strip_suffix('.').unwrap_or(host);
    let good = |byte: u8| byte.is_ascii_alphanumeric() || b"-_".contains(&byte);
    let labels = host.split('.').all(|label| !label.is_empty() && label.bytes().all(good));
    (labels && !is_nonstandard_ipv4(host)).then(|| host.to_ascii_lowercase())
}

/// Whether a host is an IPv4 address in another form than four decimal numbers (`127.1`, `0x7f.0.0.1`, `2130706433`):
/// resolvers read it as an address, and rules would not know it.
fn is_nonstandard_ipv4(host: &str) -> bool {
    let last = host.rsplit('.').next().unwrap_or_default();
    let hexadecimal = last.strip_prefix("0x").or_else(|| last.strip_prefix("0X"));
    let number = match hexadecimal {
        Some(digits) => digits.bytes().all(|byte| byte.is_ascii_hexdigit()),
        None => last.bytes().all(|byte| byte.is_ascii_digit()),
    };
    number && host.parse::<Ipv4Addr>().is_err()
}

/// Nothing, or a colon and a port, which may be empty.
fn is_port_suffix(text: &str) -> bool {
    match text.strip_prefix(':') {
        Some(port) => {
            port.bytes().all(|byte| byte.is_ascii_digit()) && (port.is_empty() || port.parse::<u16>().is_ok())
        }
        None => text.is_empty(),
    }
}

#[cfg(test)]
mod tests;
