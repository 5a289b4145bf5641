//! Scopes: the permissions that a key is granted and that a request needs.
//!
//! A scope is one to four segments of `[A-Za-z0-9_./-]` joined by `:`, case-sensitive. The last segment of a grant may
//! be `*`, which matches one or more segments of any kind. `*` alone does not cover the reserved `keyward` scopes; only
//! a grant that starts with `keyward` does. An empty set grants nothing.

use std::{fmt, sync::Arc};

use serde::{Deserialize, Serialize};

use super::name::NameError;

/// The first segment of the scopes that Keyward keeps for itself.
pub const RESERVED_SEGMENT: &str = "keyward";

const MAX_SCOPE_LEN: usize = 128;
const MAX_SEGMENTS: usize = 4;
const GRANT_RULE: &str = "must be one to four segments of [A-Za-z0-9_./-] joined by ':', at most 128 characters; \
                    only the last segment may be '*'";
const REQUIRED_RULE: &str = "must be a concrete scope, such as monitors:read: one to four segments of \
                             [A-Za-z0-9_./-] joined by ':', at most 128 characters, without '*'";

/// One scope. With `*` at its end it is a pattern, and can only be granted.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize)]
#[serde(try_from = "String")]
pub struct Scope(Arc<str>);

impl Serialize for Scope {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

impl Scope {
    /// Reads a grant. The word `all` is read as `*`.
    ///
    /// # Errors
    /// When it breaks the rule in this module's head.
    pub fn parse_grant(text: &str) -> Result<Scope, NameError> {
        let text = if text == "all" { "*" } else { text };
        let mut segments = text.split(':');
        let last = segments.next_back().unwrap_or_default();
        let well_formed = text.len() <= MAX_SCOPE_LEN
            && text.split(':').count() <= MAX_SEGMENTS
            && (last == "*" || is_segment(last))
            && segments.all(is_segment);
        if well_formed { Ok(Scope(text.into())) } else { Err(NameError(GRANT_RULE)) }
    }

    /// Reads a scope that a request needs: always concrete.
    ///
    /// # Errors
    /// When it breaks the rule in this module's head, or is a pattern.
    pub fn parse_required(text: &str) -> Result<Scope, NameError> {
        match Scope::parse_grant(text) {
            Ok(scope) if scope.pattern_prefix().is_none() => Ok(scope),
            _ => Err(NameError(REQUIRED_RULE)),
        }
    }

    /// The scope as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether the scope is one that Keyward keeps for itself.
    #[must_use]
    pub fn is_reserved(&self) -> bool {
        has_reserved_segment(&self.0)
    }

    /// The text before the `*`: empty, or ending in `:`. `None` for a concrete scope.
    fn pattern_prefix(&self) -> Option<&str> {
        self.0.strip_suffix('*')
    }

    /// Whether granting this grants all of `other`, itself a grant or a requirement.
    #[must_use]
    pub fn covers(&self, other: &Scope) -> bool {
        self.covers_text(&other.0)
    }

    fn covers_text(&self, other: &str) -> bool {
        match self.pattern_prefix() {
            None => *self.0 == *other,
            // A longer pattern under the same start is part of this one; `a:*` does not cover `a`.
            Some(start) => {
                other.len() > start.len()
                    && other.starts_with(start)
                    && has_reserved_segment(&self.0) == has_reserved_segment(other)
            }
        }
    }
}

fn has_reserved_segment(text: &str) -> bool {
    text.split(':').next() == Some(RESERVED_SEGMENT)
}

fn is_segment(text: &str) -> bool {
    !text.is_empty()
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'/' | b'-'))
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", &*self.0)
    }
}

impl TryFrom<String> for Scope {
    type Error = NameError;
    fn try_from(text: String) -> Result<Self, NameError> {
        Scope::parse_grant(&text)
    }
}

/// A set of grants, sorted and without repetition.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Deserialize)]
#[serde(from = "Vec<Scope>")]
pub struct ScopeSet(Arc<[Scope]>);

impl Serialize for ScopeSet {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.iter())
    }
}

impl ScopeSet {
    /// The grants, in sorted order.
    pub fn iter(&self) -> std::slice::Iter<'_, Scope> {
        self.0.iter()
    }

    /// Whether nothing is granted.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether one of the grants covers `scope`.
    #[must_use]
    pub fn covers(&self, scope: &Scope) -> bool {
        self.0.iter().any(|grant| grant.covers(scope))
    }

    /// Whether one of the grants covers a scope that is known to be well-formed.
    pub(crate) fn covers_text(&self, scope: &str) -> bool {
        self.0.iter().any(|grant| grant.covers_text(scope))
    }

    /// Whether everything that `other` grants is granted here too.
    #[must_use]
    pub fn covers_all(&self, other: &ScopeSet) -> bool {
        other.iter().all(|scope| self.covers(scope))
    }

    /// The union of two sets of grants.
    #[must_use]
    pub fn union(&self, other: &ScopeSet) -> ScopeSet {
        self.iter().chain(other.iter()).cloned().collect()
    }
}

impl FromIterator<Scope> for ScopeSet {
    fn from_iter<I: IntoIterator<Item = Scope>>(scopes: I) -> Self {
        let mut scopes: Vec<Scope> = scopes.into_iter().collect();
        scopes.sort();
        scopes.dedup();
        ScopeSet(scopes.into())
    }
}

impl From<Vec<Scope>> for ScopeSet {
    fn from(scopes: Vec<Scope>) -> Self {
        scopes.into_iter().collect()
    }
}

impl<'a> IntoIterator for &'a ScopeSet {
    type Item = &'a Scope;
    type IntoIter = std::slice::Iter<'a, Scope>;
    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn grants(texts: &[&str]) -> ScopeSet {
        texts.iter().map(|text| Scope::parse_grant(text).unwrap()).collect()
    }

    fn allows(granted: &[&str], needed: &str) -> bool {
        grants(granted).covers(&Scope::parse_required(needed).unwrap())
    }

    #[test]
    fn a_grant_covers_itself_and_a_pattern_covers_what_follows() {
        assert!(allows(&["monitors:read"], "monitors:read"));
        assert!(!allows(&["monitors:read"], "monitors:write"));
        assert!(allows(&["monitors:*"], "monitors:read"));
        assert!(allows(&["monitors:*"], "monitors:read:all"));
        assert!(!allows(&["monitors:*"], "monitors"));
        assert!(!allows(&["monitors:*"], "monitorsx:read"));
        assert!(allows(&["*"], "a:b:c:d"));
        assert!(allows(&["all"], "anything"));
        assert!(!allows(&["monitors:read"], "Monitors:read"));
    }

    #[test]
    fn an_empty_set_grants_nothing() {
        assert!(!allows(&[], "a"));
    }

    #[test]
    fn only_a_keyward_grant_reaches_the_reserved_scopes() {
        assert!(!allows(&["*"], "keyward:check"));
        assert!(!allows(&["*"], "keyward"));
        assert!(allows(&["keyward:*"], "keyward:keys:read"));
        assert!(allows(&["keyward:keys:*"], "keyward:keys:read"));
        assert!(!allows(&["keyward:keys:*"], "keyward:check"));
        assert!(!grants(&["*"]).covers_all(&grants(&["keyward:*"])));
        assert!(!grants(&["keyward:*"]).covers_all(&grants(&["*"])));
        assert!(allows(&["*"], "keyward2:x"), "only the whole segment is reserved");
    }

    #[test]
    fn malformed_scopes_are_refused() {
        for bad in
            ["", ":", "a:", ":a", "a::b", "a b", "a:b:c:d:e", "mon*", "*:a", "a:*:b", "é", &"a".repeat(129)]
        {
            assert!(Scope::parse_grant(bad).is_err(), "{bad:?}");
        }
        for pattern in ["*", "all", "a:*"] {
            assert!(Scope::parse_required(pattern).is_err(), "{pattern:?}");
        }
    }

    #[test]
    fn a_slash_belongs_to_a_segment_and_separates_none() {
        for scope in
            ["repo/write", "read/orders:all", "/v1/users:read", "https://api.example.com/auth/mail.read"]
        {
            assert_eq!(Scope::parse_required(scope).unwrap().as_str(), scope);
            assert!(allows(&[scope], scope) && allows(&["*"], scope));
        }
        assert!(allows(&["repo/a:*"], "repo/a:read"));
        assert!(!allows(&["repo:*"], "repo/a:read"), "repo/a is another segment than repo");
        assert!(!allows(&["repo"], "repo/a"));
        assert!(Scope::parse_grant("repo/*").is_err(), "only a whole segment is a pattern");
        assert!(!Scope::parse_grant("keyward/check").unwrap().is_reserved());
    }

    fn segment() -> impl Strategy<Value = String> {
        prop::sample::select(vec!["a", "b", "a/b", "/", "keyward", "keyward/a"]).prop_map(str::to_owned)
    }

    fn concrete() -> impl Strategy<Value = String> {
        proptest::collection::vec(segment(), 1..=4).prop_map(|s| s.join(":"))
    }

    fn grant() -> impl Strategy<Value = String> {
        (proptest::collection::vec(segment(), 0..=3), any::<bool>()).prop_map(|(mut segments, star)| {
            if star || segments.is_empty() {
                segments.push("*".to_owned());
            }
            segments.join(":")
        })
    }

    /// Text of the characters that matter to the parser.
    fn near_scope() -> impl Strategy<Value = String> {
        let piece = prop_oneof![
            8 => prop::sample::select(vec!["a", "Z", "0", "_", ".", "/", "-", ":", ":", "*", "all"]),
            1 => prop::sample::select(vec![" ", ",", "\\", "%2F", "é", "\0", "～"]),
        ];
        let max = prop_oneof![9 => Just(9usize), 1 => Just(160)];
        max.prop_flat_map(move |max| {
            proptest::collection::vec(piece.clone(), 0..max).prop_map(|pieces| pieces.concat())
        })
    }

    /// Whether a text is a grant, character by character.
    fn naive_is_grant(text: &str) -> bool {
        const ALLOWED: &str = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_./-";
        let (mut segments, mut segment) = (Vec::new(), String::new());
        for character in text.chars() {
            if character == ':' {
                segments.push(std::mem::take(&mut segment));
            } else {
                segment.push(character);
            }
        }
        let is_plain = |segment: &String| !segment.is_empty() && segment.chars().all(|c| ALLOWED.contains(c));
        text.len() <= 128
            && segments.len() <= 3
            && segments.iter().all(is_plain)
            && (segment == "*" || is_plain(&segment))
    }

    /// The rule of the module's head once more, segment by segment.
    fn naive(grant: &str, needed: &str) -> bool {
        let (grant, needed): (Vec<_>, Vec<_>) = (grant.split(':').collect(), needed.split(':').collect());
        if needed[0] == "keyward" && grant[0] != "keyward" {
            return false;
        }
        match grant.split_last() {
            Some((&"*", start)) => needed.len() > start.len() && needed.starts_with(start),
            _ => grant == needed,
        }
    }

    proptest! {
        #[test]
        fn matching_agrees_with_the_naive_model(granted in grant(), needed in concrete()) {
            prop_assert_eq!(allows(&[&granted], &needed), naive(&granted, &needed));
        }

        #[test]
        fn parsing_agrees_with_the_naive_model(text in near_scope()) {
            prop_assert_eq!(Scope::parse_grant(&text).is_ok(), naive_is_grant(&text));
            let concrete = naive_is_grant(&text) && !text.ends_with('*') && text != "all";
            prop_assert_eq!(Scope::parse_required(&text).is_ok(), concrete);
        }

        #[test]
        fn covering_a_grant_means_covering_all_it_covers(wide in grant(), narrow in grant(), needed in concrete()) {
            let (wide_set, narrow_set) = (grants(&[&wide]), grants(&[&narrow]));
            let covers = wide_set.covers_all(&narrow_set);
            if covers {
                prop_assert!(!naive(&narrow, &needed) || naive(&wide, &needed));
            }
        }

        #[test]
        fn no_string_makes_the_parser_panic(text in any::<String>()) {
            if let Ok(scope) = Scope::parse_grant(&text) {
                prop_assert_eq!(Scope::parse_grant(scope.as_str()).unwrap(), scope);
            }
        }
    }
}
