//! The path of a request as rules see it: split, decoded, and in one spelling.
//!
//! Services differ in how they read odd spellings (`//`, `/./`, `%2F`, `\`, `..;`), and a rule that reads one
//! otherwise than the service behind it can be walked around. A proxy is told to normalise them; what still comes
//! in such a spelling is refused here, whichever rule it would have met.

use std::borrow::Cow;

use percent_encoding::percent_decode_str;

/// A path in the one spelling that rules see: its segments, decoded, without the query, and without regard to a
/// last slash.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Path<'a>(Vec<Cow<'a, str>>);

/// What makes a path ambiguous.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Misspelt {
    /// It does not begin with a slash.
    #[error("the path must begin with '/'")]
    NotAbsolute,
    /// It has two slashes in a row.
    #[error("the path has an empty segment ('//')")]
    EmptySegment,
    /// It has a segment that stands for the same or the upper folder.
    #[error("the path has a '.' or '..' segment")]
    DotSegment,
    /// It has a slash or a backslash that is not a separator, or may be one.
    #[error("the path has an encoded slash or a backslash")]
    Slash,
    /// It has parameters, which some servers cut off and others do not: `..;` is `..` to some.
    #[error("the path has a ';'")]
    Parameters,
    /// It has characters that belong into no path: control characters, `#`, or other than ASCII.
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

impl<'a> Path<'a> {
    /// Reads the path of a request target, with or without its query.
    ///
    /// # Errors
    /// When services could read it otherwise than rules do.
    pub fn parse(target: &'a str) -> Result<Path<'a>, Misspelt> {
        let path = target.split('?').next().unwrap_or_default();
        let path = path.strip_prefix('/').ok_or(Misspelt::NotAbsolute)?;
        // The last slash does not matter.
        let path = path.strip_suffix('/').unwrap_or(path);
        if path.is_empty() {
            // Only "/" and "//" come here.
            return if target.starts_with("//") { Err(Misspelt::EmptySegment) } else { Ok(Path(Vec::new())) };
        }
        path.split('/').map(segment).collect::<Result<_, _>>().map(Path)
    }

    /// The segments.
    #[must_use]
    pub fn segments(&self) -> &[Cow<'a, str>] {
        &self.0
    }
}

fn segment(raw: &str) -> Result<Cow<'_, str>, Misspelt> {
    if raw.contains('\\') {
        return Err(Misspelt::Slash);
    }
    if raw.bytes().any(|byte| !(0x21..=0x7e).contains(&byte) || byte == b'#') {
        return Err(Misspelt::Character);
    }
    let decoded = decode(raw)?;
    if decoded.contains(';') {
        return Err(Misspelt::Parameters);
    }
    match &*decoded {
        "" => Err(Misspelt::EmptySegment),
        "." | ".." => Err(Misspelt::DotSegment),
        _ => Ok(decoded),
    }
}

fn decode(raw: &str) -> Result<Cow<'_, str>, Misspelt> {
    if !raw.contains('%') {
        return Ok(Cow::Borrowed(raw));
    }
    if !encodings(raw).all(|encoded| encoded) {
        return Err(Misspelt::Percent);
    }
    let decoded = percent_decode_str(raw).decode_utf8().map_err(|_| Misspelt::NotUtf8)?;
    if decoded.contains(['/', '\\']) {
        return Err(Misspelt::Slash);
    }
    if decoded.chars().any(char::is_control) {
        return Err(Misspelt::Character);
    }
    if encodings(&decoded).any(|encoded| encoded) {
        return Err(Misspelt::EncodedTwice);
    }
    Ok(decoded)
}

/// For each `%`, whether two hexadecimal digits follow.
fn encodings(text: &str) -> impl Iterator<Item = bool> {
    text.match_indices('%').map(|(at, _)| {
        let digits = text.as_bytes().get(at + 1..at + 3);
        digits.is_some_and(|digits| digits.iter().all(u8::is_ascii_hexdigit))
    })
}

/// The host of a request in the one spelling that rules see: lower-case, without port and last dot. `None` when
/// it is no host.
#[must_use]
pub fn host(authority: &str) -> Option<String> {
    let host = match authority.strip_prefix('[') {
        // An IPv6 address is full of colons.
        Some(rest) => {
            let (address, port) = rest.split_once(']')?;
            let good = address.bytes().all(|byte| byte.is_ascii_hexdigit() || b":.".contains(&byte));
            return (good && is_port(port)).then(|| format!("[{}]", address.to_ascii_lowercase()));
        }
        None => match authority.split_once(':') {
            Some((host, port)) => port.bytes().all(|byte| byte.is_ascii_digit()).then_some(host)?,
            None => authority,
        },
    };
    let host = host.strip_suffix('.').unwrap_or(host);
    let good = |byte: u8| byte.is_ascii_alphanumeric() || b"-_".contains(&byte);
    let labels = host.split('.').all(|label| !label.is_empty() && label.bytes().all(good));
    labels.then(|| host.to_ascii_lowercase())
}

fn is_port(text: &str) -> bool {
    text.is_empty()
        || text.strip_prefix(':').is_some_and(|port| port.bytes().all(|byte| byte.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn segments(target: &str) -> Vec<String> {
        Path::parse(target).unwrap().segments().iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_path_is_its_decoded_segments() {
        for (target, wanted) in [
            ("/", &[][..]),
            ("/?a=/b", &[]),
            ("/v1/monitors", &["v1", "monitors"]),
            ("/v1/monitors/", &["v1", "monitors"]),
            ("/v1/monitors?limit=1//2", &["v1", "monitors"]),
            ("/%61dmin", &["admin"]),
            ("/a%20b/caf%C3%A9", &["a b", "café"]),
            ("/100%25", &["100%"]),
            ("/a:b@c,d+e=f~g!h$i&j'k(l)*", &["a:b@c,d+e=f~g!h$i&j'k(l)*"]),
            ("/...", &["..."]),
        ] {
            assert_eq!(segments(target), wanted, "{target}");
        }
    }

    #[test]
    fn a_path_that_can_be_read_in_two_ways_is_refused() {
        use Misspelt::*;
        for (target, why) in [
            ("", NotAbsolute),
            ("*", NotAbsolute),
            ("http://x/a", NotAbsolute),
            ("//", EmptySegment),
            ("//a", EmptySegment),
            ("/a//b", EmptySegment),
            ("/a//", EmptySegment),
            ("/;x/a", Parameters),
            ("/admin;v=1", Parameters),
            ("/a%3Bb", Parameters),
            ("/./a", DotSegment),
            ("/a/..", DotSegment),
            ("/a/../b", DotSegment),
            ("/a/%2e%2E/b", DotSegment),
            ("/a/.%2e", DotSegment),
            ("/a/..;/b", Parameters),
            ("/a/%2e%2e;x=1/b", Parameters),
            ("/a%2Fb", Slash),
            ("/a%2fb", Slash),
            ("/a%5cb", Slash),
            ("/a\\b", Slash),
            ("/a%00", Character),
            ("/a%0d%0ab", Character),
            ("/a b", Character),
            ("/a#b", Character),
            ("/café", Character),
            ("/a%", Percent),
            ("/a%2", Percent),
            ("/a%zz", Percent),
            ("/a%252e%252e/b", EncodedTwice),
            ("/a%252Fb", EncodedTwice),
            ("/a%ff", NotUtf8),
        ] {
            assert_eq!(Path::parse(target), Err(why), "{target}");
        }
    }

    #[test]
    fn a_host_is_lower_case_without_port_and_last_dot() {
        for (authority, wanted) in [
            ("api.test", "api.test"),
            ("API.Test:8443", "api.test"),
            ("api.test.", "api.test"),
            ("127.0.0.1:80", "127.0.0.1"),
            ("[2001:DB8::1]:80", "[2001:db8::1]"),
            ("[::1]", "[::1]"),
        ] {
            assert_eq!(host(authority).as_deref(), Some(wanted), "{authority}");
        }
        for bad in [
            "",
            ":80",
            "a b",
            "user@host",
            "a:b",
            "a:1:2",
            "[::1",
            "[::1]x",
            "[x]",
            "café",
            "a/b",
            ".",
            "a..",
            ".a",
            "a..b",
        ] {
            assert_eq!(host(bad), None, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn no_string_makes_the_parsers_panic(text in any::<String>(), odd in "[/.%2eEfF5cC;a\\\\]{0,20}") {
            let _ = (Path::parse(&text), host(&text), Path::parse(&odd));
        }

        /// Whatever is accepted holds no second reading: decoded again it is the same path.
        #[test]
        fn what_is_accepted_has_one_reading(target in "/([a%./;]|%2e|%61|%25|%2f){0,12}") {
            if let Ok(path) = Path::parse(&target) {
                for segment in path.segments() {
                    prop_assert!(!segment.contains('/') && !["", ".", ".."].contains(&&**segment));
                    let again = percent_decode_str(segment).decode_utf8().unwrap();
                    prop_assert_eq!(&*again, &**segment);
                }
            }
        }
    }
}
