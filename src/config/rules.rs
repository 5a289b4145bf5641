//! Parses and validates the rules file of the gateway: TOML becomes route rules, or a list of all problems with their lines.
//!
//! `domain::route` matches requests against the rules.

use std::{fmt, path::Path};

use serde::Deserialize;
use toml::Spanned;

use super::{file::read_text_up_to, toml_messages};
use crate::domain::credential_mask::{mask_message, mask_value};
use crate::domain::{
    account::EnvironmentSet,
    name::{AccountId, CustomerId, EnvironmentName, NameError},
    policy_decision::{MAX_REQUEST_COST, MAX_REQUIRED_SCOPES},
    route::{
        EnforcementMode, MAX_ROUTE_RULES, NameSource, RouteRequirement, RouteRule, RouteRules, RouteSpec,
        RuleBook, parse_header_name,
        pattern::{HostPattern, MethodSet, PathPattern},
    },
    scope::Scope,
};

/// The maximum size of a file in bytes.
pub(crate) const MAX_RULES_FILE_BYTES: u64 = 1024 * 1024;

/// A problem of a rules file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RuleProblem {
    /// The line of the problem, counted from 1.
    pub line: usize,
    /// The problem in one line; credentials are masked.
    pub text: String,
}

impl fmt::Display for RuleProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}: {}", self.line, self.text)
    }
}

/// Why a rules file cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RulesFileError {
    /// The file system denies it, or the file is too large.
    #[error("the rules file {} cannot be read: {source}", mask_value(.path))]
    Unreadable {
        /// The path as it was given.
        path: String,
        /// The error of the file system.
        source: std::io::Error,
    },
    /// The file has problems.
    #[error("the rules file {} is wrong:\n  {}", mask_value(.path), .problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n  "))]
    Invalid {
        /// The path as it was given.
        path: String,
        /// All problems, sorted by line.
        problems: Vec<RuleProblem>,
    },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawRules {
    #[serde(default)]
    defaults: RawRoute,
    #[serde(default)]
    rule: Vec<Spanned<RawRoute>>,
}

/// A `[[rule]]` or the `[defaults]`, which have no path and no requirement.
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawRoute {
    path: Option<Spanned<String>>,
    hosts: Option<Spanned<Vec<String>>>,
    methods: Option<Spanned<Vec<String>>>,
    scope: Option<Spanned<String>>,
    scopes: Option<Spanned<Vec<String>>>,
    authenticate_only: Option<Spanned<bool>>,
    public: Option<Spanned<bool>>,
    environment: Option<Spanned<String>>,
    account: Option<Spanned<String>>,
    account_header: Option<Spanned<String>>,
    customer: Option<Spanned<String>>,
    customer_header: Option<Spanned<String>>,
    cost: Option<Spanned<u64>>,
    mode: Option<Spanned<String>>,
}

/// Reads a file and returns its text and its rules.
///
/// # Errors
/// If the file cannot be read, or has problems.
pub(crate) fn load_rules(
    path: &Path,
    environments: &EnvironmentSet,
) -> Result<(String, RuleBook), RulesFileError> {
    let unreadable = |source| RulesFileError::Unreadable { path: path.display().to_string(), source };
    let text = read_rules_text(path).map_err(unreadable)?;
    let book = parse_rules_file(path, &text, environments)?;
    Ok((text, book))
}

/// Parses the text of the file at `path`, which the error names.
///
/// # Errors
/// All problems of the file.
pub(crate) fn parse_rules_file(
    path: &Path,
    text: &str,
    environments: &EnvironmentSet,
) -> Result<RuleBook, RulesFileError> {
    let wrong = |problems| RulesFileError::Invalid { path: path.display().to_string(), problems };
    parse_rules(text, environments).map_err(wrong)
}

/// Reads the text of a file.
///
/// # Errors
/// If the file cannot be read, or is larger than [`MAX_RULES_FILE_BYTES`].
pub(crate) fn read_rules_text(path: &Path) -> std::io::Result<String> {
    read_text_up_to(path, MAX_RULES_FILE_BYTES)
}

/// Parses the text of a file.
///
/// # Errors
/// All problems, sorted by line.
pub(crate) fn parse_rules(text: &str, environments: &EnvironmentSet) -> Result<RuleBook, Vec<RuleProblem>> {
    let file: RawRules = toml::from_str(text).map_err(|error| vec![toml_problem(text, &error)])?;
    let mut reader = RulesValidator { text, environments, problems: Vec::new() };
    let RawRules { defaults, rule } = file;
    let rules = reader.validate_rules(&defaults, &rule);
    let defaults = reader.validate_defaults(&defaults);
    let RulesValidator { mut problems, .. } = reader;
    match RouteRules::new(rules) {
        Ok(rules) if problems.is_empty() => Ok(RuleBook { rules, defaults }),
        Ok(_) => Err(sort_by_line(problems)),
        Err(hidden) => {
            problems.extend(hidden.into_iter().map(|hidden| RuleProblem {
                line: hidden.line,
                text: format!(
                    "this rule never matches: the rule in line {} comes first and covers all of it; put the \
                     narrower rule before the wider one",
                    hidden.hidden_by
                ),
            }));
            Err(sort_by_line(problems))
        }
    }
}

fn sort_by_line(mut problems: Vec<RuleProblem>) -> Vec<RuleProblem> {
    problems.sort_by_key(|problem| problem.line);
    problems
}

/// The problem of a text that is not TOML, or has an unknown key.
fn toml_problem(text: &str, error: &toml::de::Error) -> RuleProblem {
    let at = error.span().map_or(0, |span| span.start);
    RuleProblem { line: line_number(text, at), text: toml_messages::rephrase_serde_error(error.message()) }
}

fn line_number(text: &str, at: usize) -> usize {
    1 + text.bytes().take(at).filter(|byte| *byte == b'\n').count()
}

struct RulesValidator<'a> {
    text: &'a str,
    environments: &'a EnvironmentSet,
    problems: Vec<RuleProblem>,
}

impl RulesValidator<'_> {
    fn add_problem(&mut self, at: usize, text: impl Into<String>) {
        let line = line_number(self.text, at);
        self.problems.push(RuleProblem { line, text: mask_message(&text.into()).into_owned() });
    }

    fn validate_rules(&mut self, defaults: &RawRoute, rules: &[Spanned<RawRoute>]) -> Vec<RouteRule> {
        if rules.len() > MAX_ROUTE_RULES {
            let last = &rules[MAX_ROUTE_RULES];
            self.add_problem(last.span().start, format!("at most {MAX_ROUTE_RULES} rules are allowed"));
            return Vec::new();
        }
        rules
            .iter()
            .filter_map(|rule| self.validate_rule(defaults, rule.get_ref(), rule.span().start))
            .collect()
    }

    /// Validates a rule. None = it has problems.
    fn validate_rule(&mut self, defaults: &RawRoute, rule: &RawRoute, at: usize) -> Option<RouteRule> {
        let before = self.problems.len();
        let path = match &rule.path {
            Some(text) => self.parse_or_add("path", text, |text| PathPattern::parse(text)),
            None => {
                self.add_problem(at, "path is required");
                None
            }
        };
        let hosts = match rule.hosts.as_ref().or(defaults.hosts.as_ref()) {
            Some(list) => self.parse_hosts(list),
            None => {
                self.add_problem(at, "hosts is required, here or under [defaults]; [\"*\"] is every host");
                None
            }
        };
        let methods = match rule.methods.as_ref().or(defaults.methods.as_ref()) {
            Some(list) => {
                self.parse_or_add("methods", list, |list| MethodSet::parse(list.iter().map(String::as_str)))
            }
            None => {
                self.add_problem(
                    at,
                    "methods is required, here or under [defaults]; [\"*\"] is every method",
                );
                None
            }
        };
        let requirement = self.parse_requirement(rule, at);
        let route = self.parse_route(rule, path.as_ref());
        let route = RouteSpec { requirement, ..route };
        let (path, hosts, methods) = (path?, hosts?, methods?);
        let line = line_number(self.text, at);
        (self.problems.len() == before).then_some(RouteRule { line, hosts, methods, path, route })
    }

    fn validate_defaults(&mut self, defaults: &RawRoute) -> RouteSpec {
        let no_default = [
            ("path", defaults.path.as_ref().map(Spanned::span)),
            ("scope", defaults.scope.as_ref().map(Spanned::span)),
            ("scopes", defaults.scopes.as_ref().map(Spanned::span)),
            ("authenticate_only", defaults.authenticate_only.as_ref().map(Spanned::span)),
            ("public", defaults.public.as_ref().map(Spanned::span)),
        ];
        for (field, span) in no_default {
            if let Some(span) = span {
                self.add_problem(span.start, format!("{field} has no default: set it in each rule"));
            }
        }
        self.parse_route(defaults, None)
    }

    fn parse_hosts(&mut self, list: &Spanned<Vec<String>>) -> Option<Vec<HostPattern>> {
        if list.get_ref().is_empty() {
            self.add_problem(list.span().start, "hosts is empty; [\"*\"] is every host");
            return None;
        }
        self.parse_or_add("hosts", list, |list| list.iter().map(|host| HostPattern::parse(host)).collect())
    }

    /// Parses the requirement of a rule, which exactly one of four keys states.
    fn parse_requirement(&mut self, rule: &RawRoute, at: usize) -> Option<RouteRequirement> {
        let given = [
            rule.scope.is_some(),
            rule.scopes.is_some(),
            rule.authenticate_only.is_some(),
            rule.public.is_some(),
        ];
        if given.into_iter().filter(|given| *given).count() != 1 {
            self.add_problem(
                at,
                "exactly one of scope, scopes, authenticate_only = true and public = true is needed",
            );
            return None;
        }
        for (field, value) in [("authenticate_only", &rule.authenticate_only), ("public", &rule.public)] {
            if let Some(value) = value
                && !*value.get_ref()
            {
                self.add_problem(value.span().start, format!("{field} = false has no effect: leave it out"));
            }
        }
        if rule.public.is_some() {
            return Some(RouteRequirement::Public);
        }
        if rule.authenticate_only.is_some() {
            return Some(RouteRequirement::Authenticated);
        }
        let scopes = match (&rule.scope, &rule.scopes) {
            (Some(scope), _) => {
                self.parse_or_add("scope", scope, |scope| Ok(vec![Scope::parse_required(scope)?]))
            }
            (None, Some(scopes)) if (1..=MAX_REQUIRED_SCOPES).contains(&scopes.get_ref().len()) => self
                .parse_or_add("scopes", scopes, |list| {
                    list.iter().map(|scope| Scope::parse_required(scope)).collect()
                }),
            (None, Some(scopes)) => {
                let problem = format!(
                    "scopes must be 1 to {MAX_REQUIRED_SCOPES}; for none use authenticate_only = true"
                );
                self.add_problem(scopes.span().start, problem);
                None
            }
            (None, None) => None,
        };
        scopes.map(RouteRequirement::Scopes)
    }

    /// Parses the keys that rules and defaults have in common.
    fn parse_route(&mut self, route: &RawRoute, path: Option<&PathPattern>) -> RouteSpec {
        let environment = route.environment.as_ref().and_then(|name| self.resolve_environment(name));
        let cost = route.cost.as_ref().and_then(|cost| {
            let good = (1..=MAX_REQUEST_COST).contains(cost.get_ref());
            if !good {
                self.add_problem(cost.span().start, format!("cost must be 1 to {MAX_REQUEST_COST}"));
            }
            good.then_some(*cost.get_ref())
        });
        let mode = route
            .mode
            .as_ref()
            .and_then(|mode| self.parse_or_add("mode", mode, |mode| EnforcementMode::parse(mode)));
        let account =
            self.parse_name_source("account", &route.account, &route.account_header, path, AccountId::parse);
        let customer = self.parse_name_source(
            "customer",
            &route.customer,
            &route.customer_header,
            path,
            CustomerId::parse,
        );
        RouteSpec { requirement: None, environment, account, customer, cost, mode }
    }

    fn resolve_environment(&mut self, name: &Spanned<String>) -> Option<EnvironmentName> {
        let found = self.environments.get(name.get_ref()).map(|environment| environment.name.clone());
        if found.is_none() {
            let problem = format!("environment must be one of {}", self.environments.names());
            self.add_problem(name.span().start, problem);
        }
        found
    }

    /// Parses the source of a name: a fixed name, a header, or a segment of the path.
    fn parse_name_source<T>(
        &mut self,
        field: &str,
        fixed: &Option<Spanned<String>>,
        header: &Option<Spanned<String>>,
        path: Option<&PathPattern>,
        parse: fn(&str) -> Result<T, NameError>,
    ) -> Option<NameSource<T>> {
        match (fixed, header) {
            (Some(_), Some(header)) => {
                self.add_problem(
                    header.span().start,
                    format!("{field} and {field}_header cannot both be given"),
                );
                None
            }
            (None, Some(header)) => self
                .parse_or_add(&format!("{field}_header"), header, |name| parse_header_name(name))
                .map(NameSource::Header),
            (Some(text), None) => {
                match text.get_ref().strip_prefix('{').and_then(|name| name.strip_suffix('}')) {
                    Some(name)
                        if path.is_some_and(|path| path.capture_names().any(|known| known == name)) =>
                    {
                        Some(NameSource::PathCapture(name.into()))
                    }
                    Some(name) => {
                        let name = mask_value(name);
                        let problem =
                            format!("{field} = \"{{{name}}}\", and the path has no segment {{{name}}}");
                        self.add_problem(text.span().start, problem);
                        None
                    }
                    None => self.parse_or_add(field, text, |text| parse(text)).map(NameSource::Fixed),
                }
            }
            (None, None) => None,
        }
    }

    /// The parsed value, or None after the problem was added.
    fn parse_or_add<T, U>(
        &mut self,
        field: &str,
        value: &Spanned<T>,
        parse: impl FnOnce(&T) -> Result<U, NameError>,
    ) -> Option<U> {
        match parse(value.get_ref()) {
            Ok(value) => Some(value),
            Err(error) => {
                self.add_problem(value.span().start, format!("{field} {error}"));
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::route::path;

    fn read(text: &str) -> Result<RuleBook, Vec<RuleProblem>> {
        parse_rules(text, &EnvironmentSet::default())
    }

    #[test]
    fn rules_and_their_defaults_are_read() {
        let file = read(
            r#"
            [defaults]
            hosts = ["*"]
            environment = "production"

            [[rule]]
            methods = ["POST"]
            path = "/accounts/{account}/runs"
            scopes = ["runs:write", "runs:read"]
            account = "{account}"
            customer_header = "X-Customer"
            cost = 5
            mode = "shadow"

            [[rule]]
            methods = ["GET"]
            path = "/status"
            public = true
            "#,
        )
        .unwrap();
        assert_eq!(file.rules.len(), 2);
        assert_eq!(file.defaults.environment.as_ref().unwrap().as_str(), "production");
        let target = path::CanonicalPath::parse("/accounts/acme/runs").unwrap();
        let (rule, captures) = file.rules.find_match("x", "POST", &target).unwrap();
        assert_eq!((rule.line, captures), (6, vec![("account", "acme")]));
        assert_eq!(rule.route.account, Some(NameSource::PathCapture("account".into())));
        assert_eq!(rule.route.customer, Some(NameSource::Header("x-customer".into())));
        assert_eq!((rule.route.cost, rule.route.mode), (Some(5), Some(EnforcementMode::Shadow)));
    }

    #[test]
    fn everything_that_is_wrong_is_told_with_its_line() {
        let problems = read(
            r#"[defaults]
environment = "moon"
public = true
[[rule]]
path = "/a/"
methods = ["get"]
scope = "a:*"
[[rule]]
hosts = ["*"]
methods = ["*"]
path = "/b"
scopes = []
account = "{b}"
cost = 0
mode = "off"
[[rule]]
hosts = ["*"]
methods = ["*"]
"#,
        )
        .unwrap_err();
        let told: Vec<_> = problems.iter().map(|p| (p.line, p.text.split(' ').next().unwrap())).collect();
        let wanted = [
            (2, "environment"),
            (3, "public"),
            (4, "hosts"),
            (5, "path"),
            (6, "methods"),
            (7, "scope"),
            (12, "scopes"),
            (13, "account"),
            (14, "cost"),
            (15, "mode"),
            (16, "path"),
            (16, "exactly"),
        ];
        assert_eq!(told, wanted, "{problems:#?}");
    }

    #[test]
    fn a_key_that_no_rule_has_is_told_with_its_line() {
        for (text, line, said) in [
            ("[[rule]]\npath = '/'\nscop = 'a'", 3, "scop"),
            ("rules = []", 1, "rules"),
            ("[[rule]]\npath = 1", 2, "text is needed"),
            ("[[rule]", 1, ""),
        ] {
            let problems = read(text).unwrap_err();
            assert_eq!(problems.len(), 1);
            assert!(problems[0].line == line && problems[0].text.contains(said), "{problems:?}");
        }
    }

    #[test]
    fn a_rule_behind_a_wider_one_is_told_with_both_lines() {
        let rule = |path: &str| format!("[[rule]]\nhosts=['*']\nmethods=['*']\npath='{path}'\npublic=true\n");
        let problems = read(&(rule("/**") + &rule("/admin"))).unwrap_err();
        assert_eq!(problems[0].line, 6);
        assert!(problems[0].text.contains("line 1"), "{problems:?}");
    }
}
