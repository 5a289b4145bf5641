//! The path of a request as rules see it: split, decoded, and in one spelling.
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
    /// A segment ends in a dot, or begins or ends in a blank: Windows and many programs strip those.
    #[error("the path has a segment that ends in '.', or begins or ends in a blank")]
    Stripped,
    /// It has a script's name before the last segment: to PHP, CGI and ASP.NET the rest is the script's argument.
    #[error("the path goes on after the name of a script, such as '.php'")]
    PathInfo,
    /// It names an NTFS stream: `file::$DATA` is `file` to Windows.
    #[error("the path has a '::$'")]
    Stream,
    /// It has characters that normalization or a conversion to another character set turns into those of another path.
    #[error(
        "the path has characters that Unicode normalization or Windows turns into ASCII, such as a full-width '/'"
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

/// Names of programs that web servers run with the rest of the path as an argument (CGI's `PATH_INFO`), in lower case.
const SCRIPTS: [&str; 13] = [
    ".php", ".phtml", ".phar", ".cgi", ".fcgi", ".pl", ".py", ".rb", ".asp", ".aspx", ".ashx", ".asmx",
    ".cfm",
];

/// Characters that NFKC leaves alone, and that conversions to an older character set ("best fit" on Windows) turn into a
/// character with a meaning in paths.
const BEST_FIT: [(char, char); 11] = [
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
    ('\u{61b}', ';'),
];

impl<'a> Path<'a> {
    /// Reads the path of a request target, with or without its query.
    ///
    /// # Errors
    /// When services could read it differently from rules.
    pub fn parse(target: &'a str) -> Result<Path<'a>, Misspelt> {
        let path = target.split('?').next().unwrap_or_default();
        let path = path.strip_prefix('/').ok_or(Misspelt::NotAbsolute)?;
        // The last slash does not matter.
        let path = path.strip_suffix('/').unwrap_or(path);
        if path.is_empty() {
            // Only "/" and "//" come here.
            return if target.starts_with("//") { Err(Misspelt::EmptySegment) } else { Ok(Path(Vec::new())) };
        }
        let segments: Vec<_> = path.split('/').map(segment).collect::<Result<_, _>>()?;
        let before_last = segments.split_last().map_or(&[][..], |(_, before)| before);
        if before_last.iter().any(|segment| is_script(segment)) {
            return Err(Misspelt::PathInfo);
        }
        Ok(Path(segments))
    }

    /// The path in Unicode's form NFKC, in which some servers compare names; `None` if it is in this form.
    #[must_use]
    pub(super) fn normalized(&self) -> Option<Path<'static>> {
        if self.0.iter().all(|segment| segment.is_ascii() || is_nfkc(segment)) {
            return None;
        }
        Some(Path(self.0.iter().map(|segment| segment.nfkc().collect::<String>().into()).collect()))
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
    check(&decoded).map(|()| decoded)
}

/// Whether a decoded segment has one reading.
///
/// # Errors
/// What gives it another.
pub(super) fn check(decoded: &str) -> Result<(), Misspelt> {
    if decoded.contains(';') {
        return Err(Misspelt::Parameters);
    }
    if decoded.contains(['?', '#']) {
        return Err(Misspelt::Delimiter);
    }
    if !decoded.is_ascii() && has_lookalikes(decoded) {
        return Err(Misspelt::Lookalike);
    }
    match decoded {
        "" => Err(Misspelt::EmptySegment),
        "." | ".." => Err(Misspelt::DotSegment),
        _ if decoded.ends_with('.') || decoded.trim() != decoded => Err(Misspelt::Stripped),
        _ if decoded.contains("::$") => Err(Misspelt::Stream),
        _ => Ok(()),
    }
}

/// Whether a text has characters that become ASCII with a meaning in paths when they are normalized (NFKC) or converted.
/// Others may change too, such as full-width brackets and letters with separate accents: [`super::Rules::is_ambiguous`].
fn has_lookalikes(text: &str) -> bool {
    let matters = |letter: char| letter.is_ascii_alphanumeric() || "/\\.%;?#-_$".contains(letter);
    let becomes_ascii = |letter: char| {
        !letter.is_ascii()
            && (BEST_FIT.iter().any(|(from, _)| *from == letter)
                || std::iter::once(letter).nfkc().any(matters))
    };
    text.chars().any(becomes_ascii)
}

pub(super) fn is_script(segment: &str) -> bool {
    let Some(dot) = segment.rfind('.') else { return false };
    SCRIPTS.iter().any(|name| segment[dot..].eq_ignore_ascii_case(name))
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

/// The host of a request in the one spelling that rules see: lower-case, without port and last dot, an IPv6 address in
/// the form of RFC 5952. `None` when it is no host, which an address in another form than four decimal numbers is.
#[must_use]
pub fn host(authority: &str) -> Option<String> {
    let host = match authority.strip_prefix('[') {
        // An IPv6 address is full of colons.
        Some(rest) => {
            let (address, port) = rest.split_once(']')?;
            let address: Ipv6Addr = address.parse().ok()?;
            return is_port(port).then(|| format!("[{address}]"));
        }
        None => match authority.find(':') {
            Some(colon) => is_port(&authority[colon..]).then(|| &authority[..colon])?,
            None => authority,
        },
    };
    let host = host.strip_suffix('.').unwrap_or(host);
    let good = |byte: u8| byte.is_ascii_alphanumeric() || b"-_".contains(&byte);
    let labels = host.split('.').all(|label| !label.is_empty() && label.bytes().all(good));
    (labels && !is_odd_address(host)).then(|| host.to_ascii_lowercase())
}

/// Whether a host is an IPv4 address in another form than four decimal numbers (`127.1`, `0x7f.0.0.1`, `2130706433`):
/// resolvers read it as an address, and rules would not know it.
fn is_odd_address(host: &str) -> bool {
    let last = host.rsplit('.').next().unwrap_or_default();
    let hexadecimal = last.strip_prefix("0x").or_else(|| last.strip_prefix("0X"));
    let number = match hexadecimal {
        Some(digits) => digits.bytes().all(|byte| byte.is_ascii_hexdigit()),
        None => last.bytes().all(|byte| byte.is_ascii_digit()),
    };
    number && host.parse::<Ipv4Addr>().is_err()
}

/// Nothing, or a colon and a port, which may be empty.
fn is_port(text: &str) -> bool {
    match text.strip_prefix(':') {
        Some(port) => {
            port.bytes().all(|byte| byte.is_ascii_digit()) && (port.is_empty() || port.parse::<u16>().is_ok())
        }
        None => text.is_empty(),
    }
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
            ("/files/report.pdf", &["files", "report.pdf"]),
            ("/v1.2/..a/.well-known", &["v1.2", "..a", ".well-known"]),
            ("/index.php", &["index.php"]),
            ("/admin.php/", &["admin.php"]),
            ("/keys:revoke", &["keys:revoke"]),
            ("/%E6%9C%80%E7%B5%82%EF%BC%88%E6%A1%88%EF%BC%89%E3%80%82", &["最終（案）。"]),
            ("/cafe%CC%81", &["cafe\u{301}"]),
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
            ("/a%c0%af", NotUtf8),
            ("/admin%3f", Delimiter),
            ("/admin%3Fx=1/y", Delimiter),
            ("/admin%23", Delimiter),
            ("/...", Stripped),
            ("/admin.", Stripped),
            ("/a./b", Stripped),
            ("/admin%20", Stripped),
            ("/admin%2e", Stripped),
            ("/%20admin", Stripped),
            ("/admin.php/x", PathInfo),
            ("/Admin.PHP/public/y", PathInfo),
            ("/admin::$DATA", Stream),
            ("/a%EF%BC%8Fb", Lookalike),
            ("/a%E2%88%95b", Lookalike),
            ("/%EF%BD%81dmin", Lookalike),
            ("/admin%C2%A0", Stripped),
            ("/%E3%80%80admin", Stripped),
            ("/%E2%84%AAeys", Lookalike),
            ("/%E2%80%A5/b", Lookalike),
            ("/a%C2%A5b", Lookalike),
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
            ("api.test:", "api.test"),
            ("[2001:DB8::1]:80", "[2001:db8::1]"),
            ("[::1]", "[::1]"),
            ("[0:0:0:0:0:0:0:1]", "[::1]"),
            ("[2001:0db8:0:0::1]:443", "[2001:db8::1]"),
            ("[::ffff:7f00:1]", "[::ffff:127.0.0.1]"),
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
            "[1]",
            "[fe80::1%25eth0]",
            "[::1]:65536",
            "[::1].",
            "api.test:65536",
            "api.test..",
            "127.1",
            "0x7f.0.0.1",
            "0177.0.0.1",
            "2130706433",
            "256.0.0.1",
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

        /// A path is accepted if and only if it is well-formed and every server reads it alike.
        #[test]
        fn what_is_accepted_has_one_reading_and_what_is_refused_has_another(
            pieces in proptest::collection::vec(proptest::sample::select(model::PIECES), 0..10)
        ) {
            let target = format!("/{}", pieces.concat());
            let ours = Path::parse(&target).ok();
            let ours = ours.as_ref().map(|path| path.segments().iter().map(|segment| segment.to_string()).collect());
            prop_assert_eq!(ours, model::one_reading(&target), "{}", target);
        }

        #[test]
        fn an_ipv6_host_has_one_spelling(address: [u16; 8], port in proptest::option::of(any::<u16>())) {
            let port = port.map(|port| format!(":{port}")).unwrap_or_default();
            let address = address.map(|group| group & if group % 3 == 0 { 0 } else { 0xffff });
            let long = address.map(|group| format!("{group:04X}")).join(":");
            let short = host(&format!("[{}]", Ipv6Addr::from(address)));
            prop_assert!(short.is_some());
            prop_assert_eq!(host(&format!("[{long}]{port}")), short);
        }
    }

    /// How servers read paths, each in the most obvious way.
    mod model {
        use super::super::{BEST_FIT, SCRIPTS};
        use percent_encoding::percent_decode;

        pub(super) const PIECES: &[&str] = &[
            "/",
            "/",
            "a",
            "b",
            ".",
            ".",
            ";",
            "%2e",
            "%2f",
            "%25",
            "%61",
            "%",
            "2f",
            "%20",
            "%3f",
            "%23",
            "%3B",
            "%00",
            "%5C",
            "\\",
            " ",
            "#",
            "\u{e9}",
            "%C3%A9",
            "e%CC%81",
            "%EF%BC%8F",
            "%E2%88%95",
            "%C2%A0",
            "%ff",
            ".php",
            ".PY",
            "::$",
            "x y",
            "v1.2",
            "%EF%BD%81",
            "%EF%BC%88",
        ];

        /// The segments, if the path is well-formed and every server reads the same ones.
        pub(super) fn one_reading(target: &str) -> Option<Vec<String>> {
            let path = target.strip_prefix('/').unwrap();
            if path == "/" {
                return None;
            }
            let path = path.strip_suffix('/').unwrap_or(path);
            let raw: Vec<&str> = if target == "/" { Vec::new() } else { path.split('/').collect() };
            let plain: Vec<String> = raw.iter().map(|segment| well_formed(segment)).collect::<Option<_>>()?;
            let reads_alike = |server: &fn(&str) -> String| server(target) == format!("/{}", plain.join("/"));
            SERVERS.iter().all(reads_alike).then_some(plain)
        }

        /// A segment, decoded: visible ASCII, each `%` with two digits, UTF-8 without control characters behind it.
        fn well_formed(raw: &str) -> Option<String> {
            let visible = raw.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'#');
            let encodings = raw.split('%').skip(1).all(|rest| {
                rest.len() >= 2 && rest.is_char_boundary(2) && u8::from_str_radix(&rest[..2], 16).is_ok()
            });
            let decoded = decoded_strictly(raw)?;
            (visible && encodings && !decoded.chars().any(char::is_control)).then_some(decoded)
        }

        fn decoded_strictly(text: &str) -> Option<String> {
            Some(percent_decode(text.as_bytes()).decode_utf8().ok()?.into_owned())
        }

        fn decoded(text: &str) -> String {
            percent_decode(text.as_bytes()).decode_utf8_lossy().into_owned()
        }

        /// A path with each segment changed, and without the last slash.
        fn each(path: &str, change: impl Fn(&str) -> String) -> String {
            let segments: Vec<_> = path.split('/').map(change).collect();
            let path = segments.join("/");
            if path.len() > 1 { path.strip_suffix('/').unwrap_or(&path).to_owned() } else { path }
        }

        const SERVERS: [fn(&str) -> String; 8] = [
            // Cuts the query off after decoding, as Python's WSGI servers may.
            |target| each(decoded(target).split(['?', '#']).next().unwrap(), str::to_owned),
            // Windows: a backslash separates, dots and blanks at the end of a name are nothing, streams are of a file.
            |target| {
                let name = |name: &str| match name.trim_end_matches(['.', ' ']).trim_start_matches(' ') {
                    "" => "\u{0}".to_owned(),
                    stripped => stripped.split("::$").next().unwrap().to_owned(),
                };
                let path = decoded(target).replace('\\', "/");
                let path = each(&path, str::to_owned);
                if path == "/" { path } else { format!("/{}", each(path.strip_prefix('/').unwrap(), name)) }
            },
            // Tomcat: parameters are no part of a segment.
            |target| each(&decoded(target), |segment| segment.split(';').next().unwrap().to_owned()),
            // Merges slashes, and walks up and down.
            |target| {
                let mut walked = Vec::new();
                for segment in decoded(target).split('/') {
                    match segment {
                        "" | "." => {}
                        ".." => drop(walked.pop()),
                        segment => walked.push(segment.to_owned()),
                    }
                }
                format!("/{}", walked.join("/"))
            },
            |target| each(&decoded(&decoded(target)), str::to_owned),
            // Normalizes what looks like ASCII, and strips every blank at the ends of a name.
            |target| {
                let path = decoded(target).replace('\u{ff0f}', "/").replace('\u{ff41}', "a");
                each(&path, |name| name.trim().to_owned())
            },
            |target| {
                let fit =
                    |letter| BEST_FIT.iter().find(|(from, _)| *from == letter).map_or(letter, |(_, to)| *to);
                each(&decoded(target).chars().map(fit).collect::<String>(), str::to_owned)
            },
            // Runs a script with what comes after its name.
            |target| {
                let path = each(&decoded(target), str::to_owned);
                let lower = path.to_ascii_lowercase();
                let ends =
                    SCRIPTS.iter().filter_map(|name| Some(lower.find(&format!("{name}/"))? + name.len()));
                path[..ends.min().unwrap_or(path.len())].to_owned()
            },
        ];
    }
}
