//! Defines routes: the requirements that an HTTP request must meet, and the rules that select its route.
//! `config::rules` parses the file of rules, and `gateway` applies the route.
//!
//! **Precedence.** Rules are tried in order, and the first whose host, method and path match decides. Rules that can
//! never match, because an earlier rule covers them, are an error. A request that no rule matches gets the defaults,
//! and is denied without them.

pub mod path;
pub mod pattern;

use std::fmt;

use super::{
    name::{AccountId, CustomerId, EnvironmentName, NameError},
    scope::Scope,
};
use path::CanonicalPath;
pub use pattern::PathCaptures;
use pattern::{HostPattern, MethodSet, PathPattern};

/// Maximum number of rules, since a request may try all of them.
pub const MAX_ROUTE_RULES: usize = 1000;

/// The requirement that a request must meet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RouteRequirement {
    /// Nothing: the route is open to everybody.
    Public,
    /// A valid token, whatever it is granted.
    Authenticated,
    /// A valid token that is granted all of these.
    Scopes(Vec<Scope>),
}

/// The source of an identifier.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NameSource<T> {
    /// The configuration fixes the value.
    Fixed(T),
    /// The request's header of this name (lower-case).
    Header(Box<str>),
    /// The path segment that the pattern captures under this name.
    PathCapture(Box<str>),
}

/// Whether a denial stops the request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EnforcementMode {
    /// A denial stops the request.
    #[default]
    Enforce,
    /// A denial is logged, and the request passes.
    Shadow,
}

impl EnforcementMode {
    /// Parses `enforce` or `shadow`.
    ///
    /// # Errors
    /// If the text is neither.
    pub fn parse(text: &str) -> Result<EnforcementMode, NameError> {
        match text {
            "enforce" => Ok(EnforcementMode::Enforce),
            "shadow" => Ok(EnforcementMode::Shadow),
            _ => Err(NameError("must be enforce or shadow")),
        }
    }
}

/// Parses the name of a header, and returns it in lower case.
///
/// # Errors
/// If the text is no name of a header.
pub fn parse_header_name(text: &str) -> Result<Box<str>, NameError> {
    let good = |byte: u8| byte.is_ascii_alphanumeric() || b"-_".contains(&byte);
    if (1..=64).contains(&text.len()) && text.bytes().all(good) {
        Ok(text.to_ascii_lowercase().into())
    } else {
        Err(NameError("must be the name of a header: 1-64 characters of [A-Za-z0-9_-]"))
    }
}

/// The settings of a route. `None` = not set: a default applies, if there is one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RouteSpec {
    /// The requirement that a request must meet. If nothing sets it, every request is denied.
    pub requirement: Option<RouteRequirement>,
    /// The environment of the call.
    pub environment: Option<EnvironmentName>,
    /// The account of the call. Not set = the service key's own account.
    pub account: Option<NameSource<AccountId>>,
    /// The customer of the call.
    pub customer: Option<NameSource<CustomerId>>,
    /// Units to consume of limits and quota. Not set = 1.
    pub cost: Option<u64>,
    /// Not set = [`EnforcementMode::Enforce`] by default.
    pub mode: Option<EnforcementMode>,
}

impl RouteSpec {
    /// Takes each field that is not set from `other`.
    #[must_use]
    pub fn or_defaults(self, other: &RouteSpec) -> RouteSpec {
        RouteSpec {
            requirement: self.requirement.or_else(|| other.requirement.clone()),
            environment: self.environment.or_else(|| other.environment.clone()),
            account: self.account.or_else(|| other.account.clone()),
            customer: self.customer.or_else(|| other.customer.clone()),
            cost: self.cost.or(other.cost),
            mode: self.mode.or(other.mode),
        }
    }
}

/// Selects requests, and sets their route.
#[derive(Clone, Debug)]
pub struct RouteRule {
    /// The line in the file, from 1.
    pub line: usize,
    /// Matches if one of these hosts matches.
    pub hosts: Vec<HostPattern>,
    /// Matches if the method is in this set.
    pub methods: MethodSet,
    /// Matches if the path matches this pattern.
    pub path: PathPattern,
    /// The settings of the matched requests.
    pub route: RouteSpec,
}

/// Why a rule does not match.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RuleMismatch {
    /// No host pattern matches.
    Host,
    /// The method does not match.
    Method,
    /// The path does not match.
    Path,
}

impl fmt::Display for RuleMismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            RuleMismatch::Host => "another host",
            RuleMismatch::Method => "another method",
            RuleMismatch::Path => "another path",
        })
    }
}

impl RouteRule {
    /// Matches a request. Returns the named segments of the path.
    ///
    /// # Errors
    /// If the rule does not match; the first mismatch.
    pub fn match_request<'a>(
        &'a self,
        host: &str,
        method: &str,
        path: &'a CanonicalPath<'_>,
    ) -> Result<PathCaptures<'a>, RuleMismatch> {
        if !self.hosts.iter().any(|pattern| pattern.matches(host)) {
            return Err(RuleMismatch::Host);
        }
        if !self.methods.contains(method) {
            return Err(RuleMismatch::Method);
        }
        self.path.match_path(path).ok_or(RuleMismatch::Path)
    }

    /// Whether this rule matches every request that `other` matches.
    fn covers(&self, other: &RouteRule) -> bool {
        let host = |theirs: &HostPattern| self.hosts.iter().any(|ours| ours.covers(theirs));
        other.hosts.iter().all(host) && self.methods.covers(&other.methods) && self.path.covers(&other.path)
    }
}

/// A rule that can never match.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnreachableRule {
    /// The line of the rule.
    pub line: usize,
    /// The line of the earlier rule that takes all its requests.
    pub hidden_by: usize,
}

/// The rules, in order of precedence.
#[derive(Clone, Debug, Default)]
pub struct RouteRules {
    rules: Vec<RouteRule>,
    /// The same with paths in Unicode's form NFKC; `None` if they are in this form.
    normalized: Option<Vec<RouteRule>>,
}

impl RouteRules {
    /// Creates rules that are tried in this order.
    ///
    /// # Errors
    /// Every rule that could never match.
    pub fn new(rules: Vec<RouteRule>) -> Result<RouteRules, Vec<UnreachableRule>> {
        let mut hidden = Vec::new();
        for (at, rule) in rules.iter().enumerate() {
            if let Some(earlier) = rules[..at].iter().find(|earlier| earlier.covers(rule)) {
                hidden.push(UnreachableRule { line: rule.line, hidden_by: earlier.line });
            }
        }
        if !hidden.is_empty() {
            return Err(hidden);
        }
        let normalized = |rule: &RouteRule| RouteRule { path: rule.path.to_nfkc(), ..rule.clone() };
        let normalized: Vec<RouteRule> = rules.iter().map(normalized).collect();
        let differ = rules.iter().zip(&normalized).any(|(rule, normalized)| rule.path != normalized.path);
        Ok(RouteRules { normalized: differ.then_some(normalized), rules })
    }

    /// The rules, in order of precedence.
    pub fn iter(&self) -> std::slice::Iter<'_, RouteRule> {
        self.rules.iter()
    }

    /// The number of rules.
    #[must_use]
    pub fn len(&self) -> usize {
        self.rules.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.rules.is_empty()
    }

    /// The rule that decides a request, and the named segments of the path.
    #[must_use]
    pub fn find_match<'a>(
        &'a self,
        host: &str,
        method: &str,
        path: &'a CanonicalPath<'_>,
    ) -> Option<(&'a RouteRule, PathCaptures<'a>)> {
        self.rules
            .iter()
            .find_map(|rule| rule.match_request(host, method, path).ok().map(|captures| (rule, captures)))
    }

    /// Whether another rule decides the path's NFKC form. A server that normalizes names would then serve what the
    /// other rule protects.
    #[must_use]
    pub fn is_ambiguous(&self, host: &str, method: &str, path: &CanonicalPath<'_>) -> bool {
        if self.normalized.is_none() && path.is_nfkc_normalized() {
            return false;
        }
        let deciding = |rules: &[RouteRule], path: &CanonicalPath<'_>| {
            rules.iter().position(|rule| rule.match_request(host, method, path).is_ok())
        };
        let normalized = self.normalized.as_deref().unwrap_or(&self.rules);
        deciding(&self.rules, path) != deciding(normalized, &path.to_nfkc())
    }
}

/// The rules, and the defaults of their routes.
#[derive(Clone, Debug, Default)]
pub struct RuleBook {
    /// The rules.
    pub rules: RouteRules,
    /// The settings that neither a rule nor the proxy sets, also for requests that no rule matches.
    pub defaults: RouteSpec,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(line: usize, hosts: &[&str], methods: &[&str], path: &str) -> RouteRule {
        RouteRule {
            line,
            hosts: hosts.iter().map(|host| HostPattern::parse(host).unwrap()).collect(),
            methods: MethodSet::parse(methods.iter().copied()).unwrap(),
            path: PathPattern::parse(path).unwrap(),
            route: RouteSpec::default(),
        }
    }

    fn line(rules: &RouteRules, host: &str, method: &str, path: &str) -> Option<usize> {
        rules.find_match(host, method, &CanonicalPath::parse(path).unwrap()).map(|(rule, _)| rule.line)
    }

    #[test]
    fn the_first_rule_that_matches_decides() {
        let rules = RouteRules::new(vec![
            rule(1, &["*"], &["GET"], "/v1/monitors/{id}"),
            rule(2, &["api.test"], &["*"], "/v1/**"),
            rule(3, &["*"], &["*"], "/v1/monitors"),
        ])
        .unwrap();
        assert_eq!(line(&rules, "api.test", "GET", "/v1/monitors/7"), Some(1));
        assert_eq!(line(&rules, "api.test", "POST", "/v1/monitors/7"), Some(2));
        assert_eq!(line(&rules, "api.test", "GET", "/v1/monitors"), Some(2));
        assert_eq!(line(&rules, "other.test", "GET", "/v1/monitors"), Some(3));
        assert_eq!(line(&rules, "other.test", "GET", "/v2"), None);
    }

    #[test]
    fn a_path_is_ambiguous_if_another_rule_decides_its_normalized_form() {
        let rules =
            RouteRules::new(vec![rule(1, &["*"], &["*"], "/café/**"), rule(2, &["*"], &["*"], "/files/**")])
                .unwrap();
        let is_ambiguous =
            |path: &str| rules.is_ambiguous("api.test", "GET", &CanonicalPath::parse(path).unwrap());
        assert!(is_ambiguous("/cafe%CC%81/menu"), "a server that normalizes serves /café");
        assert!(!is_ambiguous("/caf%C3%A9/menu") && !is_ambiguous("/files/menu"));
        assert!(!is_ambiguous("/files/cafe%CC%81"), "the same rule decides both");
    }

    #[test]
    fn a_rule_is_found_by_its_name_in_any_script() {
        let rules = RouteRules::new(vec![
            rule(1, &["*"], &["*"], "/wiki/ทำ/**"),
            rule(2, &["*"], &["*"], "/ｗｉｋｉ/**"),
            rule(3, &["*"], &["*"], "/cafe\u{301}/**"),
            rule(4, &["*"], &["*"], "/**"),
        ])
        .unwrap();
        let encoded =
            |path: &str| percent_encoding::utf8_percent_encode(path, percent_encoding::CONTROLS).to_string();
        let decided = |path: &str| {
            let path = encoded(path);
            let path = CanonicalPath::parse(&path).unwrap();
            let line = rules.find_match("api.test", "GET", &path).map(|(rule, _)| rule.line);
            line.filter(|_| !rules.is_ambiguous("api.test", "GET", &path))
        };
        assert_eq!(decided("/wiki/ทำ/a"), Some(1), "its form NFKC has other characters");
        assert_eq!(decided("/報告書１.pdf"), Some(4), "the same rule decides both");
        assert_eq!(decided("/ｗｉｋｉ/報告"), Some(2));
        assert_eq!(decided("/cafe\u{301}/menu"), Some(3));
        for protected in ["/wiki/報告", "/caf\u{e9}/menu", "/ｗiki/ทำ"] {
            assert_eq!(
                decided(protected),
                None,
                "{protected}: a server that normalizes serves what another rule protects"
            );
        }
    }

    #[test]
    fn a_rule_that_can_never_match_is_refused() {
        let hidden = RouteRules::new(vec![
            rule(3, &["*"], &["*"], "/public/**"),
            rule(9, &["api.test"], &["GET"], "/public/{name}"),
            rule(12, &["*"], &["*"], "/publications/{id}"),
        ]);
        assert_eq!(hidden.unwrap_err(), [UnreachableRule { line: 9, hidden_by: 3 }]);
    }

    #[test]
    fn what_a_route_leaves_unsaid_a_default_says() {
        let route = RouteSpec { cost: Some(2), ..RouteSpec::default() };
        let default =
            RouteSpec { cost: Some(3), mode: Some(EnforcementMode::Shadow), ..RouteSpec::default() };
        assert_eq!(
            route.or_defaults(&default),
            RouteSpec { cost: Some(2), mode: Some(EnforcementMode::Shadow), ..RouteSpec::default() }
        );
    }
}
