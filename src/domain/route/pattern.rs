//! Matches hosts, methods and paths against patterns, and decides which pattern covers which.

use std::fmt;

use unicode_normalization::UnicodeNormalization as _;

use super::{
    super::name::NameError,
    path::{self, CanonicalPath},
};

/// The names and values of the path segments that a pattern captures.
pub type PathCaptures<'a> = Vec<(&'a str, &'a str)>;

/// Which hosts: `*`, `api.example.com`, or `*.example.com` (any name below, at any depth).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HostPattern {
    /// Every host.
    Any,
    /// Exactly this host.
    Exact(Box<str>),
    /// Hosts with this suffix, which begins with a dot.
    Subdomains(Box<str>),
}

impl HostPattern {
    /// Parses a pattern of the configuration.
    ///
    /// # Errors
    /// If the text is invalid; the error states the rule.
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
        let host = path::normalize_host(name).filter(bare).ok_or(RULE)?;
        Ok(if below {
            HostPattern::Subdomains(format!(".{host}").into())
        } else {
            HostPattern::Exact(host.into())
        })
    }

    /// Whether a host, in the spelling of [`path::normalize_host`], is one of them.
    #[must_use]
    pub fn matches(&self, host: &str) -> bool {
        match self {
            HostPattern::Any => true,
            HostPattern::Exact(name) => **name == *host,
            HostPattern::Subdomains(end) => host.len() > end.len() && host.ends_with(&**end),
        }
    }

    pub(super) fn covers(&self, other: &HostPattern) -> bool {
        match (self, other) {
            (HostPattern::Any, _) => true,
            (_, HostPattern::Any) | (HostPattern::Exact(_), HostPattern::Subdomains(_)) => false,
            (_, HostPattern::Exact(name)) => self.matches(name),
            (HostPattern::Subdomains(wide), HostPattern::Subdomains(end)) => end.ends_with(&**wide),
        }
    }
}

/// The methods that a rule matches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MethodSet {
    /// Every method.
    Any,
    /// These methods, in upper case. `GET` includes `HEAD`.
    Only(Vec<Box<str>>),
}

impl MethodSet {
    /// Parses a list of methods; `*` alone matches every method.
    ///
    /// # Errors
    /// If the text is invalid; the error states the rule.
    pub fn parse<'a>(list: impl IntoIterator<Item = &'a str>) -> Result<MethodSet, NameError> {
        const RULE: NameError = NameError(
            "must be methods in upper case, such as \"GET\" and \"POST\", or \"*\" alone for every one",
        );
        let list: Vec<_> = list.into_iter().collect();
        let good = |method: &str| {
            (1..=32).contains(&method.len()) && method.bytes().all(|b| b.is_ascii_uppercase() || b == b'-')
        };
        match &*list {
            ["*"] => Ok(MethodSet::Any),
            [] => Err(RULE),
            _ if list.iter().all(|method| good(method)) => {
                Ok(MethodSet::Only(list.into_iter().map(Box::from).collect()))
            }
            _ => Err(RULE),
        }
    }

    /// Whether a method is one of them. Case does not matter, since to some services it does not.
    #[must_use]
    pub fn contains(&self, method: &str) -> bool {
        let is = |name: &str| name.eq_ignore_ascii_case(method);
        match self {
            MethodSet::Any => true,
            MethodSet::Only(list) => {
                list.iter().any(|name| is(name))
                    || method.eq_ignore_ascii_case("HEAD") && list.iter().any(|name| **name == *"GET")
            }
        }
    }

    pub(super) fn covers(&self, other: &MethodSet) -> bool {
        match (self, other) {
            (MethodSet::Any, _) => true,
            (_, MethodSet::Any) => false,
            (_, MethodSet::Only(list)) => list.iter().all(|method| self.contains(method)),
        }
    }
}

/// One segment of a path pattern.
#[derive(Clone, Debug, PartialEq, Eq)]
enum PatternSegment {
    /// Exactly this text.
    Literal(Box<str>),
    /// Any one segment.
    Wildcard,
    /// Any one segment, by this name.
    Capture(Box<str>),
}

/// Which paths: `/v1/monitors`, `/v1/accounts/{account}/monitors`, `/v1/*/runs`, `/public/**` (the path before it,
/// and everything below). A last slash in a request does not matter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PathPattern {
    segments: Vec<PatternSegment>,
    /// Whether more segments may follow.
    is_open_ended: bool,
}

impl PathPattern {
    /// Parses a pattern of the configuration.
    ///
    /// # Errors
    /// If the text is invalid; the error states the rule.
    pub fn parse(text: &str) -> Result<PathPattern, NameError> {
        const SLASH_RULE: NameError =
            NameError("must begin with / and end in none: it covers the path with and without");
        const SEGMENT_RULE: NameError = NameError(
            "has a segment that is none of: a name as it stands in the decoded path, *, {name} of [a-z0-9_], \
             or ** as the last",
        );
        const UNMATCHABLE_SEGMENT: NameError = NameError(
            "has a segment that no request passes with: it ends in a dot or a blank, continues after a script's name such as \
             .php, or is otherwise ambiguous (see Spelling in docs/gateway.md)",
        );
        const DUPLICATE_NAME: NameError = NameError("names two segments alike");
        let rest = text.strip_prefix('/').ok_or(SLASH_RULE)?;
        let (rest, open) = match rest.strip_suffix("**") {
            Some("") => ("", true),
            Some(before) => (before.strip_suffix('/').ok_or(SEGMENT_RULE)?, true),
            None => (rest, false),
        };
        if rest.is_empty() {
            return Ok(PathPattern { segments: Vec::new(), is_open_ended: open });
        }
        if rest.ends_with('/') {
            return Err(SLASH_RULE);
        }
        let segments: Vec<_> = rest
            .split('/')
            .map(|text| parse_pattern_segment(text).ok_or(SEGMENT_RULE))
            .collect::<Result<_, _>>()?;
        let before_last = segments.split_last().map_or(&[][..], |(_, before)| before);
        if before_last.iter().any(|segment| matches!(segment, PatternSegment::Literal(text) if path::is_script(text)))
            || segments
                .iter()
                .any(|segment| matches!(segment, PatternSegment::Literal(text) if path::check_segment(text).is_err()))
        {
            return Err(UNMATCHABLE_SEGMENT);
        }
        let pattern = PathPattern { segments, is_open_ended: open };
        let names: Vec<_> = pattern.capture_names().collect();
        let twice = names.iter().enumerate().any(|(at, name)| names[..at].contains(name));
        if twice { Err(DUPLICATE_NAME) } else { Ok(pattern) }
    }

    /// The names that it gives to segments.
    pub fn capture_names(&self) -> impl Iterator<Item = &str> {
        self.segments.iter().filter_map(|segment| match segment {
            PatternSegment::Capture(name) => Some(&**name),
            _ => None,
        })
    }

    /// The pattern with its names in Unicode's form NFKC.
    pub(super) fn to_nfkc(&self) -> PathPattern {
        let normalized = |segment: &PatternSegment| match segment {
            PatternSegment::Literal(text) => PatternSegment::Literal(text.nfkc().collect::<String>().into()),
            PatternSegment::Wildcard | PatternSegment::Capture(_) => segment.clone(),
        };
        PathPattern {
            segments: self.segments.iter().map(normalized).collect(),
            is_open_ended: self.is_open_ended,
        }
    }

    /// The named segments of a path that it matches.
    pub(super) fn match_path<'a>(&'a self, path: &'a CanonicalPath<'_>) -> Option<PathCaptures<'a>> {
        let given = path.segments();
        if given.len() < self.segments.len() || given.len() > self.segments.len() && !self.is_open_ended {
            return None;
        }
        let mut captures = Vec::new();
        for (wanted, given) in self.segments.iter().zip(given) {
            match wanted {
                PatternSegment::Literal(text) if **text != **given => return None,
                PatternSegment::Capture(name) => captures.push((&**name, &**given)),
                PatternSegment::Literal(_) | PatternSegment::Wildcard => {}
            }
        }
        Some(captures)
    }

    pub(super) fn covers(&self, other: &PathPattern) -> bool {
        let fits = match (self.is_open_ended, other.is_open_ended) {
            (true, _) => other.segments.len() >= self.segments.len(),
            (false, open) => !open && other.segments.len() == self.segments.len(),
        };
        fits && self.segments.iter().zip(&other.segments).all(|pair| match pair {
            (PatternSegment::Literal(ours), PatternSegment::Literal(theirs)) => ours == theirs,
            (PatternSegment::Literal(_), _) => false,
            _ => true,
        })
    }
}

fn parse_pattern_segment(text: &str) -> Option<PatternSegment> {
    if text == "*" {
        return Some(PatternSegment::Wildcard);
    }
    if let Some(name) = text.strip_prefix('{') {
        let name = name.strip_suffix('}')?;
        let good = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_';
        return (!name.is_empty() && name.bytes().all(good)).then(|| PatternSegment::Capture(name.into()));
    }
    // What no decoded segment can be would never match.
    let never = text.is_empty()
        || matches!(text, "." | "..")
        || text.contains(['*', '{', '}', '\\', ';', '%', '?', '#']);
    (!never && !text.chars().any(char::is_control)).then(|| PatternSegment::Literal(text.into()))
}

impl fmt::Display for PathPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for segment in &self.segments {
            match segment {
                PatternSegment::Literal(text) => write!(f, "/{text}")?,
                PatternSegment::Wildcard => f.write_str("/*")?,
                PatternSegment::Capture(name) => write!(f, "/{{{name}}}")?,
            }
        }
        match (self.is_open_ended, self.segments.is_empty()) {
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
            HostPattern::Exact(name) => f.write_str(name),
            HostPattern::Subdomains(end) => write!(f, "*{end}"),
        }
    }
}

impl fmt::Display for MethodSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            MethodSet::Any => f.write_str("*"),
            MethodSet::Only(list) => f.write_str(&list.join(",")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn captured(pattern: &str, path: &str) -> Option<Vec<(String, String)>> {
        let (pattern, path) = (PathPattern::parse(pattern).unwrap(), CanonicalPath::parse(path).unwrap());
        let captures = pattern.match_path(&path)?;
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
            assert!(MethodSet::parse(bad.iter().copied()).is_err(), "{bad:?}");
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
        let methods = MethodSet::parse(["GET", "DELETE"]).unwrap();
        assert!(["GET", "HEAD", "head", "delete"].into_iter().all(|method| methods.contains(method)));
        assert!(!methods.contains("POST"));
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
                let path = CanonicalPath::parse(path).unwrap();
                if one.covers(&other) && other.match_path(&path).is_some() {
                    prop_assert!(one.match_path(&path).is_some(), "{one} {other} {path:?}");
                }
                prop_assert_eq!(PathPattern::parse(&one.to_string()), Ok(one));
            }
        }

        #[test]
        fn no_string_makes_a_pattern_panic(text in any::<String>()) {
            let _ = (PathPattern::parse(&text), HostPattern::parse(&text), MethodSet::parse([&*text]));
        }
    }
}
