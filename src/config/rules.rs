//! The rules file: TOML becomes rules that are valid already, or a list of everything that is wrong with it, each
//! with its line. What the rules mean is `domain::route`'s business.

use std::{fmt, path::Path};

use serde::Deserialize;
use toml::Spanned;

use super::wording;
use crate::domain::credential_mask::{mask_message, mask_value};
use crate::domain::{
    account::Environments,
    decision::{MAX_COST, MAX_SCOPES},
    name::{AccountId, CustomerId, EnvironmentName, NameError},
    route::{
        Demand, MAX_RULES, Mode, Named, Route, Rule, RuleBook, Rules, header_name,
        pattern::{HostPattern, Methods, PathPattern},
    },
    scope::Scope,
};

/// The largest file, in bytes.
pub const MAX_BYTES: u64 = 1024 * 1024;

/// Something that is wrong with a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Where, from 1.
    pub line: usize,
    /// What, and what would be right.
    pub text: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}: {}", self.line, self.text)
    }
}

/// Why a rules file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RulesError {
    /// It cannot be read.
    #[error("the rules file {} cannot be read: {source}", mask_value(.path))]
    Unreadable {
        /// The file.
        path: String,
        /// The cause.
        source: std::io::Error,
    },
    /// It is not what it should be: everything that is wrong with it.
    #[error("the rules file {} is wrong:\n  {}", mask_value(.path), .problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n  "))]
    Wrong {
        /// The file.
        path: String,
        /// Each with its line.
        problems: Vec<Problem>,
    },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    defaults: FileRoute,
    #[serde(default)]
    rule: Vec<Spanned<FileRoute>>,
}

/// A rule, and the defaults, which have no path.
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct FileRoute {
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

/// Reads a file: its text, and the rules.
///
/// # Errors
/// When it cannot be read or is wrong; every problem has its line.
pub fn read(path: &Path, environments: &Environments) -> Result<(String, RuleBook), RulesError> {
    let unreadable = |source| RulesError::Unreadable { path: path.display().to_string(), source };
    let text = text(path).map_err(unreadable)?;
    let book = parse_named(path, &text, environments)?;
    Ok((text, book))
}

/// Reads the text of a file that is named when it is wrong.
///
/// # Errors
/// When it is wrong; every problem has its line.
pub fn parse_named(path: &Path, text: &str, environments: &Environments) -> Result<RuleBook, RulesError> {
    let wrong = |problems| RulesError::Wrong { path: path.display().to_string(), problems };
    parse(text, environments).map_err(wrong)
}

/// The text of a file that is not too large.
///
/// # Errors
/// When it cannot be read, or is no rules file by its size.
pub fn text(path: &Path) -> std::io::Result<String> {
    let length = std::fs::metadata(path)?.len();
    if length > MAX_BYTES {
        let problem = format!("it has {length} bytes; at most {MAX_BYTES} are allowed");
        return Err(std::io::Error::other(problem));
    }
    std::fs::read_to_string(path)
}

/// Reads the text of a file.
///
/// # Errors
/// Everything that is wrong with it.
pub fn parse(text: &str, environments: &Environments) -> Result<RuleBook, Vec<Problem>> {
    let file: File = toml::from_str(text).map_err(|error| vec![unreadable(text, &error)])?;
    let mut reader = Reader { text, environments, problems: Vec::new() };
    let File { defaults, rule } = file;
    let rules = reader.rules(&defaults, &rule);
    let defaults = reader.defaults(&defaults);
    let Reader { mut problems, .. } = reader;
    match Rules::new(rules) {
        Ok(rules) if problems.is_empty() => Ok(RuleBook { rules, defaults }),
        Ok(_) => Err(sorted(problems)),
        Err(hidden) => {
            problems.extend(hidden.into_iter().map(|hidden| Problem {
                line: hidden.line,
                text: format!(
                    "this rule never matches: the rule in line {} comes first and covers all of it; put the \
                     narrower rule before the wider one",
                    hidden.by
                ),
            }));
            Err(sorted(problems))
        }
    }
}

fn sorted(mut problems: Vec<Problem>) -> Vec<Problem> {
    problems.sort_by_key(|problem| problem.line);
    problems
}

/// What is no TOML, or has a key that no rule has.
fn unreadable(text: &str, error: &toml::de::Error) -> Problem {
    let at = error.span().map_or(0, |span| span.start);
    Problem { line: line(text, at), text: wording::plain(error.message()) }
}

fn line(text: &str, at: usize) -> usize {
    1 + text.bytes().take(at).filter(|byte| *byte == b'\n').count()
}

struct Reader<'a> {
    text: &'a str,
    environments: &'a Environments,
    problems: Vec<Problem>,
}

impl Reader<'_> {
    fn problem(&mut self, at: usize, text: impl Into<String>) {
        let line = line(self.text, at);
        self.problems.push(Problem { line, text: mask_message(&text.into()).into_owned() });
    }

    fn rules(&mut self, defaults: &FileRoute, rules: &[Spanned<FileRoute>]) -> Vec<Rule> {
        if rules.len() > MAX_RULES {
            let last = &rules[MAX_RULES];
            self.problem(last.span().start, format!("at most {MAX_RULES} rules are allowed"));
            return Vec::new();
        }
        rules.iter().filter_map(|rule| self.rule(defaults, rule.get_ref(), rule.span().start)).collect()
    }

    /// One rule, unless something is wrong with it.
    fn rule(&mut self, defaults: &FileRoute, rule: &FileRoute, at: usize) -> Option<Rule> {
        let before = self.problems.len();
        let path = match &rule.path {
            Some(text) => self.take("path", text, |text| PathPattern::parse(text)),
            None => {
                self.problem(at, "path is required");
                None
            }
        };
        let hosts = match rule.hosts.as_ref().or(defaults.hosts.as_ref()) {
            Some(list) => self.hosts(list),
            None => {
                self.problem(at, "hosts is required, here or under [defaults]; [\"*\"] is every host");
                None
            }
        };
        let methods = match rule.methods.as_ref().or(defaults.methods.as_ref()) {
            Some(list) => self.take("methods", list, |list| Methods::parse(list.iter().map(String::as_str))),
            None => {
                self.problem(at, "methods is required, here or under [defaults]; [\"*\"] is every method");
                None
            }
        };
        let demand = self.demand(rule, at);
        let route = self.route(rule, path.as_ref());
        let route = Route { demand, ..route };
        let (path, hosts, methods) = (path?, hosts?, methods?);
        let line = line(self.text, at);
        (self.problems.len() == before).then_some(Rule { line, hosts, methods, path, route })
    }

    fn defaults(&mut self, defaults: &FileRoute) -> Route {
        let no_default = [
            ("path", defaults.path.as_ref().map(Spanned::span)),
            ("scope", defaults.scope.as_ref().map(Spanned::span)),
            ("scopes", defaults.scopes.as_ref().map(Spanned::span)),
            ("authenticate_only", defaults.authenticate_only.as_ref().map(Spanned::span)),
            ("public", defaults.public.as_ref().map(Spanned::span)),
        ];
        for (field, span) in no_default {
            if let Some(span) = span {
                self.problem(span.start, format!("{field} has no default: each rule says its own"));
            }
        }
        self.route(defaults, None)
    }

    fn hosts(&mut self, list: &Spanned<Vec<String>>) -> Option<Vec<HostPattern>> {
        if list.get_ref().is_empty() {
            self.problem(list.span().start, "hosts is empty; [\"*\"] is every host");
            return None;
        }
        self.take("hosts", list, |list| list.iter().map(|host| HostPattern::parse(host)).collect())
    }

    /// What a rule demands: exactly one of four ways to say it.
    fn demand(&mut self, rule: &FileRoute, at: usize) -> Option<Demand> {
        let said = [
            rule.scope.is_some(),
            rule.scopes.is_some(),
            rule.authenticate_only.is_some(),
            rule.public.is_some(),
        ];
        if said.into_iter().filter(|said| *said).count() != 1 {
            self.problem(
                at,
                "exactly one of scope, scopes, authenticate_only = true and public = true is needed",
            );
            return None;
        }
        for (field, said) in [("authenticate_only", &rule.authenticate_only), ("public", &rule.public)] {
            if let Some(said) = said
                && !*said.get_ref()
            {
                self.problem(said.span().start, format!("{field} = false says nothing: leave it out"));
            }
        }
        if rule.public.is_some() {
            return Some(Demand::Public);
        }
        if rule.authenticate_only.is_some() {
            return Some(Demand::Authenticated);
        }
        let scopes = match (&rule.scope, &rule.scopes) {
            (Some(scope), _) => self.take("scope", scope, |scope| Ok(vec![Scope::parse_required(scope)?])),
            (None, Some(scopes)) if (1..=MAX_SCOPES).contains(&scopes.get_ref().len()) => {
                self.take("scopes", scopes, |list| {
                    list.iter().map(|scope| Scope::parse_required(scope)).collect()
                })
            }
            (None, Some(scopes)) => {
                let problem =
                    format!("scopes must be 1 to {MAX_SCOPES}; for none say authenticate_only = true");
                self.problem(scopes.span().start, problem);
                None
            }
            (None, None) => None,
        };
        scopes.map(Demand::Scopes)
    }

    /// What both rules and defaults may say.
    fn route(&mut self, route: &FileRoute, path: Option<&PathPattern>) -> Route {
        let environment = route.environment.as_ref().and_then(|name| self.environment(name));
        let cost = route.cost.as_ref().and_then(|cost| {
            let good = (1..=MAX_COST).contains(cost.get_ref());
            if !good {
                self.problem(cost.span().start, format!("cost must be 1 to {MAX_COST}"));
            }
            good.then_some(*cost.get_ref())
        });
        let mode = route.mode.as_ref().and_then(|mode| self.take("mode", mode, |mode| Mode::parse(mode)));
        let account = self.named("account", &route.account, &route.account_header, path, AccountId::parse);
        let customer =
            self.named("customer", &route.customer, &route.customer_header, path, CustomerId::parse);
        Route { demand: None, environment, account, customer, cost, mode }
    }

    fn environment(&mut self, name: &Spanned<String>) -> Option<EnvironmentName> {
        let found = self.environments.get(name.get_ref()).map(|environment| environment.name.clone());
        if found.is_none() {
            let problem = format!("environment is none of {}", self.environments.names());
            self.problem(name.span().start, problem);
        }
        found
    }

    /// A name that stands here, in a header, or in the path.
    fn named<T>(
        &mut self,
        field: &str,
        fixed: &Option<Spanned<String>>,
        header: &Option<Spanned<String>>,
        path: Option<&PathPattern>,
        parse: fn(&str) -> Result<T, NameError>,
    ) -> Option<Named<T>> {
        match (fixed, header) {
            (Some(_), Some(header)) => {
                self.problem(header.span().start, format!("{field} and {field}_header cannot both be given"));
                None
            }
            (None, Some(header)) => {
                self.take(&format!("{field}_header"), header, |name| header_name(name)).map(Named::Header)
            }
            (Some(text), None) => {
                match text.get_ref().strip_prefix('{').and_then(|name| name.strip_suffix('}')) {
                    Some(name) if path.is_some_and(|path| path.names().any(|known| known == name)) => {
                        Some(Named::Capture(name.into()))
                    }
                    Some(name) => {
                        let name = mask_value(name);
                        let problem =
                            format!("{field} = \"{{{name}}}\", and the path has no segment {{{name}}}");
                        self.problem(text.span().start, problem);
                        None
                    }
                    None => self.take(field, text, |text| parse(text)).map(Named::Is),
                }
            }
            (None, None) => None,
        }
    }

    /// Reads a value, or notes what is wrong with it.
    fn take<T, U>(
        &mut self,
        field: &str,
        value: &Spanned<T>,
        parse: impl FnOnce(&T) -> Result<U, NameError>,
    ) -> Option<U> {
        match parse(value.get_ref()) {
            Ok(value) => Some(value),
            Err(error) => {
                self.problem(value.span().start, format!("{field} {error}"));
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::route::path;

    fn read(text: &str) -> Result<RuleBook, Vec<Problem>> {
        parse(text, &Environments::default())
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
        let target = path::Path::parse("/accounts/acme/runs").unwrap();
        let (rule, captures) = file.rules.find("x", "POST", &target).unwrap();
        assert_eq!((rule.line, captures), (6, vec![("account", "acme")]));
        assert_eq!(rule.route.account, Some(Named::Capture("account".into())));
        assert_eq!(rule.route.customer, Some(Named::Header("x-customer".into())));
        assert_eq!((rule.route.cost, rule.route.mode), (Some(5), Some(Mode::Shadow)));
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
