//! Tests how paths and hosts are parsed, against a model of servers that parse them.

use super::*;
use percent_encoding::NON_ALPHANUMERIC;
use proptest::prelude::*;

fn segments(target: &str) -> Vec<String> {
    CanonicalPath::parse(target).unwrap().segments().iter().map(ToString::to_string).collect()
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
        ("/domains/allegro.pl/dns", &["domains", "allegro.pl", "dns"]),
        ("/zones/example.com.py/records", &["zones", "example.com.py", "records"]),
        ("/repos/octokit/octokit.rb/issues", &["repos", "octokit", "octokit.rb", "issues"]),
        ("/admin:i30/x", &["admin:i30", "x"]),
    ] {
        assert_eq!(segments(target), wanted, "{target}");
    }
}

#[test]
fn a_path_that_can_be_read_in_two_ways_is_refused() {
    use PathError::*;
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
        ("/admin%C2%A0", Stripped),
        ("/%E3%80%80admin", Stripped),
        ("/%E2%80%A5/b", Lookalike),
        ("/admin%E2%80%A6", Lookalike),
        ("/%25%EF%BC%92f", Lookalike),
        ("/admin%EF%BC%8Ephp/x", PathInfo),
        ("/admin.%EF%BD%90hp/x", PathInfo),
        ("/admin%EF%BC%9A$DATA", Lookalike),
        ("/admin.php5/x", PathInfo),
        ("/admin.PHP8/x", PathInfo),
        ("/admin:$i30:$INDEX_ALLOCATION/x", Stream),
        ("/admin%EF%BB%BF", Stripped),
        ("/%E2%80%8Badmin/x", Stripped),
        ("/a%C2%A5b", Lookalike),
    ] {
        assert_eq!(CanonicalPath::parse(target), Err(why), "{target}");
    }
}

#[test]
fn text_of_any_script_has_one_reading() {
    for text in [
        "報告書１.pdf",
        "２０２４年度",
        "Ｑ＆Ａ",
        "会社－支店",
        "続く…今日",
        "iPhone™",
        "1ª",
        "nº",
        "5m²",
        "½",
        "№7",
        "①",
        "20℃",
        "ℹ\u{fe0f}",
        "ทำ",
        "\u{645}\u{61b}",
        "Ａ１",
        "ﬁle",
        "K",
    ] {
        let target = format!("/{}/x", percent_encoding::percent_encode(text.as_bytes(), NON_ALPHANUMERIC));
        assert_eq!(segments(&target), [text, "x"], "{target}");
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
        assert_eq!(normalize_host(authority).as_deref(), Some(wanted), "{authority}");
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
        assert_eq!(normalize_host(bad), None, "{bad}");
    }
}

proptest! {
    #[test]
    fn no_string_makes_the_parsers_panic(text in any::<String>(), odd in "[/.%2eEfF5cC;a\\\\]{0,20}") {
        let _ = (CanonicalPath::parse(&text), normalize_host(&text), CanonicalPath::parse(&odd));
    }

    /// A path is accepted if and only if it is well-formed and every server reads it alike.
    #[test]
    fn what_is_accepted_has_one_reading_and_what_is_refused_has_another(
        pieces in proptest::collection::vec(proptest::sample::select(model::PIECES), 0..10)
    ) {
        let target = format!("/{}", pieces.concat());
        let ours = CanonicalPath::parse(&target).ok();
        let ours = ours.as_ref().map(|path| path.segments().iter().map(|segment| segment.to_string()).collect());
        prop_assert_eq!(ours, model::one_reading(&target), "{}", target);
    }

    #[test]
    fn an_ipv6_host_has_one_spelling(address: [u16; 8], port in proptest::option::of(any::<u16>())) {
        let port = port.map(|port| format!(":{port}")).unwrap_or_default();
        let address = address.map(|group| group & if group % 3 == 0 { 0 } else { 0xffff });
        let long = address.map(|group| format!("{group:04X}")).join(":");
        let short = normalize_host(&format!("[{}]", Ipv6Addr::from(address)));
        prop_assert!(short.is_some());
        prop_assert_eq!(normalize_host(&format!("[{long}]{port}")), short);
    }
}

/// How servers read paths, each in the most obvious way.
mod model {
    use crate::domain::route::path::{BEST_FIT_SEPARATORS, SCRIPT_EXTENSIONS};
    use percent_encoding::percent_decode;
    use unicode_normalization::UnicodeNormalization as _;

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
        ".Php7",
        ".asP",
        ":$",
        "x y",
        "v1.2",
        "%EF%BD%81",
        "%EF%BC%88",
        "%EF%BC%8E",
        "%EF%BB%BF",
        "%E2%80%A6",
        "%EF%BC%91",
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
        // The same of the text in NFKC: other letters are the rules' business, and other segments are another path.
        let normal = nfkc(&decoded_strictly(target)?).replace('%', "%25");
        let normal_plain: Vec<String> = plain.iter().map(|segment| nfkc(segment)).collect();
        let reads_alike = |server: &fn(&str) -> String| {
            server(target) == format!("/{}", plain.join("/"))
                && server(&normal) == format!("/{}", normal_plain.join("/"))
        };
        let separates = |segment: &String| segment.contains('/');
        (SERVERS.iter().all(reads_alike) && !normal_plain.iter().any(separates)).then_some(plain)
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

    fn nfkc(text: &str) -> String {
        text.nfkc().collect()
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
                stripped => stripped.split(":$").next().unwrap().to_owned(),
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
        // Strips everything at the ends of a name that looks like nothing.
        |target| {
            let nothing = |letter: char| letter.is_whitespace() || "\u{feff}\u{200b}".contains(letter);
            each(&decoded(target), |name| name.trim_matches(nothing).to_owned())
        },
        |target| {
            let fit = |letter| {
                BEST_FIT_SEPARATORS.iter().find(|(from, _)| *from == letter).map_or(letter, |(_, to)| *to)
            };
            each(&decoded(target).chars().map(fit).collect::<String>(), str::to_owned)
        },
        // Runs a script with what comes after its name.
        |target| {
            let path = each(&decoded(target), str::to_owned);
            let lower = path.to_ascii_lowercase();
            let versions = (0..10).map(|version| format!(".php{version}"));
            let names = SCRIPT_EXTENSIONS.iter().map(|name| (*name).to_owned()).chain(versions);
            let ends = names.filter_map(|name| Some(lower.find(&format!("{name}/"))? + name.len()));
            path[..ends.min().unwrap_or(path.len())].to_owned()
        },
    ];
}
