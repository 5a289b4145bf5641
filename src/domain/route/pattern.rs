//! Patterns of hosts, methods and paths, and which pattern covers which.

use std::fmt;

use unicode_normalization::UnicodeNormalization as _;

use super::{
    super::name::NameError,
    Captures,
    path::{self, Path},
};

/// Which hosts: `*`, `api.example.com`, or `*.example.com` (any name below, at any depth).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HostPattern {
    /// Every host.
    Any,
    /// This one.
    Is(Box<str>),
    /// Those that end so; the text begins with a dot.
    Below(Box<str>),
}

impl HostPattern {
    /// Reads a pattern.
    ///
    /// # Errors
    /// When it is none; the error says what would be right.
    pub fn parse(text: &str) -> Result<HostPattern, NameError> {
        const RULE: NameError =
            NameError("must be a host without a port, *.example.com, or * for every host");
        if text == "*" {
            return Ok(HostPattern::Any);
        }
        let (below, name) = match text.strip_prefix("*.") {
            Some(rest) => (true, rest),
            None => (false, text),
        };
        // An IPv6 address has many spellings; any of them is meant.
        let bare = |host: &String| host.eq_ignore_ascii_case(name) || name.ends_with(']');
        let host = path::host(name).filter(bare).ok_or(RULE)?;
        Ok(if below { HostPattern::Below(format!(".{host}").into()) } else { HostPattern::Is(host.into()) })
    }

    /// Whether a host, in the spelling of [`path::host`], is one of them.
    #[must_use]
    pub fn matches(&self, host: &str) -> bool {
        match self {
            HostPattern::Any => true,
            HostPattern::Is(name) => **name == *host,
            HostPattern::Below(end) => host.len() > end.len() && host.ends_with(&**end),
        }
    }

    pub(super) fn covers(&self, other: &HostPattern) -> bool {
        match (self, other) {
            (HostPattern::Any, _) => true,
            (_, HostPattern::Any) | (HostPattern::Is(_), HostPattern::Below(_)) => false,
            (_, HostPattern::Is(name)) => self.matches(name),
            (HostPattern::Below(wide), HostPattern::Below(end)) => end.ends_with(&**wide),
        }
    }
}

/// Which methods.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Methods {
    /// Every method.
    Any,
    /// These, in upper case. `GET` stands for `HEAD` too.
    Are(Vec<Box<str>>),
}

impl Methods {
    /// Reads a list of methods; `*` alone stands for every one.
    ///
    /// # Errors
    /// When it is none; the error says what would be right.
    pub fn parse<'a>(list: impl IntoIterator<Item = &'a str>) -> Result<Methods, NameError> {
        const RULE: NameError = NameError(
            "must be methods in upper case, such as \"GET\" and \"POST\", or \"*\" alone for every one",
        );
        let list: Vec<_> = list.into_iter().collect();
        let good = |method: &str| {
            (1..=32).contains(&method.len()) && method.bytes().all(|b| b.is_ascii_uppercase() || b == b'-')
        };
        match &*list {
            ["*"] => Ok(Methods::Any),
            [] => Err(RULE),
            _ if list.iter().all(|method| good(method)) => {
                Ok(Methods::Are(list.into_iter().map(Box::from).collect()))
            }
            _ => Err(RULE),
        }
    }

    /// Whether a method is one of them. Case does not matter, since to some services it does not.
    #[must_use]
    pub fn has(&self, method: &str) -> bool {
        let is = |name: &str| name.eq_ignore_ascii_case(method);
        match self {
            Methods::Any => true,
            Methods::Are(list) => {
                list.iter().any(|name| is(name))
                    || method.eq_ignore_ascii_case("HEAD") && list.iter().any(|name| **name == *"GET")
            }
        }
    }

    pub(super) fn covers(&self, other: &Methods) -> bool {
        match (self, other) {
            (Methods::Any, _) => true,
            (_, Methods::Any) => false,
            (_, Methods::Are(list)) => list.iter().all(|method| self.has(method)),
        }
    }
}

/// One segment of a path pattern.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Segment {
    /// This text.
    Is(Box<str>),
    /// Any one segment.
    Any,
    /// Any one segment, by this name.
    Named(Box<str>),
}

/// Which paths: `/v1/monitors`, `/v1/accounts/{account}/monitors`, `/v1/*/runs`, `/public/**` (the path before it,
/// and everything below). A last slash in a request does not matter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PathPattern {
    segments: Vec<Segment>,
    /// Whether anything may follow.
    open: bool,
}

impl PathPattern {
    /// Reads a pattern.
    ///
    /// # Errors
    /// When it is none; the error says what would be right.
    pub fn parse(text: &str) -> Result<PathPattern, NameError> {
        const SLASH: NameError =
            NameError("must begin with / and end in none: it covers the path with and without");
        const SEGMENT: NameError = NameError(
            "has a segment that is none of: a name as it stands in the decoded path, *, {name} of [a-z0-9_], \
             or ** as the last",
        );
        const NEVER: NameError = NameError(
            "has a segment that no request passes with: it ends in a dot or a blank, continues after a script's name such as \
             .php, or is otherwise ambiguous (see Spelling in docs/gateway.md)",
        );
        const TWICE: NameError = NameError("names two segments alike");
        let rest = text.strip_prefix('/').ok_or(SLASH)?;
        let (rest, open) = match rest.strip_suffix("**") {
            Some("") => ("", true),
            Some(before) => (before.strip_suffix('/').ok_or(SEGMENT)?, true),
            None => (rest, false),
        };
        if rest.is_empty() {
            return Ok(PathPattern { segments: Vec::new(), open });
        }
        if rest.ends_with('/') {
            return Err(SLASH);
        }
        let segments: Vec<_> =
            rest.split('/').map(|text| segment(text).ok_or(SEGMENT)).collect::<Result<_, _>>()?;
        let before_last = segments.split_last().map_or(&[][..], |(_, before)| before);
        if before_last.iter().any(|segment| matches!(segment, Segment::Is(text) if path::is_script(text)))
            || segments
                .iter()
                .any(|segment| matches!(segment, Segment::Is(text) if path::check(text).is_err()))
        {
            return Err(NEVER);
        }
        let pattern = PathPattern { segments, open };
        let names: Vec<_> = pattern.names().collect();
        let twice = names.iter().enumerate().any(|(at, name)| names[..at].contains(name));
        if twice { Err(TWICE) } else { Ok(pattern) }
    }

    /// The names that it gives to segments.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.segments.iter().filter_map(|segment| match segment {
            Segment::Named(name) => Some(&**name),
            _ => None,
        })
    }

    /// The pattern with its names in Unicode's form NFKC.
    pub(super) fn normalized(&self) -> PathPattern {
        let normalized = |segment: &Segment| match segment {
            Segment::Is(text) => Segment::Is(text.nfkc().collect::<String>().into()),
            Segment::Any | Segment::Named(_) => segment.clone(),
        };
        PathPattern { segments: self.segments.iter().map(normalized).collect(), open: self.open }
    }

    /// The named segments of a path that it matches.
    pub(super) fn captures<'a>(&'a self, path: &'a Path<'_>) -> Option<Captures<'a>> {
        let given = path.segments();
        if given.len() < self.segments.len() || given.len() > self.segments.len() && !self.open {
            return None;
        }
        let mut captures = Vec::new();
        for (wanted, given) in self.segments.iter().zip(given) {
            match wanted {
                Segment::Is(text) if **text != **given => return None,
                Segment::Named(name) => captures.push((&**name, &**given)),
                Segment::Is(_) | Segment::Any => {}
            }
        }
        Some(captures)
    }

    pub(super) fn covers(&self, other: &PathPattern) -> bool {
        let fits = match (self.open, other.open) {
            (true, _) => other.segments.len() >= self.segments.len(),
            (false, open) => !open && other.segments.len() == self.segments.len(),
        };
        fits && self.segments.iter().zip(&other.segments).all(|pair| match pair {
            (Segment::Is(ours), Segment::Is(theirs)) => ours == theirs,
            (Segment::Is(_), _) => false,
            _ => true,
        })
    }
}

fn segment(text: &str) -> Option<Segment> {
    if text == "*" {
        return Some(Segment::Any);
    }
    if let Some(name) = text.strip_prefix('{') {
        let name = name.strip_suffix('}')?;
        let good = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_';
        return (!name.is_empty() && name.bytes().all(good)).then(|| Segment::Named(name.into()));
    }
    // What no decoded segment can be would never match.
    let never = text.is_empty()
        || matches!(text, "." | "..")
        || text.contains(['*', '{', '}', '\\', ';', '%', '?', '#']);
    (!never && !text.chars().any(char::is_control)).then(|| Segment::Is(text.into()))
}

impl fmt::Display for PathPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for segment in &self.segments {
            match segment {
                Segment::Is(text) => write!(f, "/{text}")?,
                Segment::Any => f.write_str("/*")?,
                Segment::Named(name) => write!(f, "/{{{name}}}")?,
            }
        }
        match (self.open, self.segments.is_empty()) {
            (true, _) => f.write_str("/**"),
            (false, true) => f.write_str("/"),
            (false, false) => Ok(()),
        }
    }
}

impl fmt::Display for HostPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            HostPattern::Any => f.write_str("*"),
            HostPattern::Is(name) => f.write_str(name),
            HostPattern::Below(end) => write!(f, "*{end}"),
        }
    }
}

impl fmt::Display for Methods {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Methods::Any => f.write_str("*"),
            Methods::Are(list) => f.write_str(&list.join(",")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn captured(pattern: &str, path: &str) -> Option<Vec<(String, String)>> {
        let (pattern, path) = (PathPattern::parse(pattern).unwrap(), Path::parse(path).unwrap());
        let captures = pattern.captures(&path)?;
        Some(captures.into_iter().map(|(name, text)| (name.to_owned(), text.to_owned())).collect())
    }

    #[test]
    fn a_path_pattern_matches_segment_by_segment() {
        for (pattern, yes, no) in [
            ("/", &["/", "/?a"][..], &["/a"][..]),
            ("/**", &["/", "/a", "/a/b/"], &[]),
            (
                "/v1/monitors",
                &["/v1/monitors", "/v1/monitors/", "/v1/%6donitors"],
                &["/v1", "/v1/monitors/1", "/v1/Monitors"],
            ),
            ("/v1/*/runs", &["/v1/a/runs"], &["/v1/runs", "/v1/a/b/runs"]),
            ("/全角１/**", &["/%E5%85%A8%E8%A7%92%EF%BC%91/a"], &["/%E5%85%A8%E8%A7%921/a"]),
            ("/public/**", &["/public", "/public/", "/public/a/b"], &["/publications", "/"]),
        ] {
            for path in yes {
                assert!(captured(pattern, path).is_some(), "{pattern} {path}");
            }
            for path in no {
                assert!(captured(pattern, path).is_none(), "{pattern} {path}");
            }
        }
    }

    #[test]
    fn a_path_pattern_names_segments() {
        let captures =
            captured("/accounts/{account}/monitors/{id}", "/accounts/acme/monitors/a%20b").unwrap();
        assert_eq!(captures, [("account".into(), "acme".into()), ("id".into(), "a b".into())]);
    }

    #[test]
    fn a_pattern_that_could_never_match_as_written_is_refused() {
        for bad in [
            "",
            "v1",
            "/v1/",
            "//",
            "/a//b",
            "/a/**/b",
            "/a**",
            "/{",
            "/{}",
            "/{A}",
            "/a{b}",
            "/{a}/{a}",
            "/./a",
            "/a%20b",
            "/a;b",
            "/a?b",
            "/a*",
            "/a#",
            "/a.",
            "/a /b",
            "/a.php/b",
            "/a\u{ff0f}b",
            "/a\u{2026}",
            "/a:$b",
            "/a\u{ff0e}php/b",
        ] {
            assert!(PathPattern::parse(bad).is_err(), "{bad}");
        }
        for bad in ["", "a:80", "*a.test", "*.", "a..*", "*.*.test", "a.test.", "[::1]:80", "127.1"] {
            assert!(HostPattern::parse(bad).is_err(), "{bad}");
        }
        for bad in [&[][..], &["get"], &["*", "GET"], &[""], &["GET POST"]] {
            assert!(Methods::parse(bad.iter().copied()).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn hosts_are_exact_or_below_a_name() {
        let host = |pattern, host| HostPattern::parse(pattern).unwrap().matches(host);
        assert!(host("API.test", "api.test") && host("*", "x") && host("*.test", "a.b.test"));
        assert!(host("[0:0:0:0:0:0:0:1]", "[::1]"), "an IPv6 address in any spelling");
        assert!(!host("api.test", "xapi.test") && !host("*.test", "test") && !host("*.test", "atest"));
    }

    #[test]
    fn get_stands_for_head_and_case_evades_nothing() {
        let methods = Methods::parse(["GET", "DELETE"]).unwrap();
        assert!(["GET", "HEAD", "head", "delete"].into_iter().all(|method| methods.has(method)));
        assert!(!methods.has("POST"));
    }

    fn pattern() -> impl Strategy<Value = String> {
        let segment = prop_oneof!["[ab]", Just("*".to_owned()), Just("{x}".to_owned())];
        (proptest::collection::vec(segment, 0..4), any::<bool>()).prop_map(|(mut segments, open)| {
            segments.dedup_by(|a, b| a == "{x}" && b == "{x}");
            if open {
                segments.push("**".to_owned());
            }
            format!("/{}", segments.join("/"))
        })
    }

    proptest! {
        #[test]
        fn a_pattern_covers_what_it_matches_everything_of(
            one in pattern(), other in pattern(), path in "(/[abc]){0,5}"
        ) {
            let parsed = (PathPattern::parse(&one), PathPattern::parse(&other));
            if let (Ok(one), Ok(other)) = parsed {
                let path = if path.is_empty() { "/" } else { &path };
                let path = Path::parse(path).unwrap();
                if one.covers(&other) && other.captures(&path).is_some() {
                    prop_assert!(one.captures(&path).is_some(), "{one} {other} {path:?}");
                }
                prop_assert_eq!(PathPattern::parse(&one.to_string()), Ok(one));
            }
        }

        #[test]
        fn no_string_makes_a_pattern_panic(text in any::<String>()) {
            let _ = (PathPattern::parse(&text), HostPattern::parse(&text), Methods::parse([&*text]));
        }
    }
}
