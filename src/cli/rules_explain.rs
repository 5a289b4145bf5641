//! Explains which rule of a rules file decides a request, and why, as text and as JSON.
//!
//! It follows `gateway::Gateway::match_request` step by step, as far as that needs neither a server nor a proxy.

mod text;

use std::collections::BTreeMap;

use serde::{Serialize, Serializer};

use super::{json_output::ToJson, table::escape_terminal};
use crate::domain::{
    name::{AccountId, CustomerId, EnvironmentName, NameError},
    route::{
        EnforcementMode, NameSource, PathCaptures, RouteRequirement, RouteRule, RouteSpec, RuleBook,
        path::{self, CanonicalPath, PathError},
    },
    token::redact_tokens,
};

/// The defaults in `[gateway]` of the server's settings.
pub(super) struct GatewayDefaults {
    pub(super) environment: Option<EnvironmentName>,
    pub(super) mode: EnforcementMode,
}

pub(super) struct RulesTestRequest<'a> {
    pub(super) method: &'a str,
    pub(super) path: &'a str,
    pub(super) host: Option<&'a str>,
}

/// The result of `keyward rules check`.
#[derive(Debug, Serialize)]
pub(super) struct RulesCheckReport {
    file: String,
    rules: usize,
    /// Remarks about rules that are valid.
    notes: Vec<RuleNote>,
}

#[derive(Debug, Serialize)]
struct RuleNote {
    line: usize,
    text: &'static str,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum RulesOutcome {
    Decided,
    /// No rule matches the request.
    Denied,
    /// The request's spelling is invalid or ambiguous.
    Refused,
}

/// A value and the name of its source.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct SourcedValue {
    value: Option<String>,
    from: String,
}

/// The result of `keyward rules test`.
#[derive(Debug, Serialize)]
pub(super) struct RulesExplanation {
    outcome: RulesOutcome,
    /// Why the request is refused.
    problem: Option<String>,
    mode: SourcedValue,
    rule: Option<DecidingRule>,
    passed_over: Vec<SkippedRule>,
}

#[derive(Debug, Serialize)]
struct DecidingRule {
    #[serde(flatten)]
    rule: RuleSummary,
    captures: BTreeMap<String, String>,
    public: bool,
    authenticate_only: bool,
    scopes: Vec<String>,
    environment: SourcedValue,
    account: SourcedValue,
    customer: SourcedValue,
    cost: SourcedValue,
}

/// A rule before the deciding one, and why it does not match.
#[derive(Debug, Serialize)]
struct SkippedRule {
    #[serde(flatten)]
    rule: RuleSummary,
    mismatch: String,
}

/// The line of a rule and the requests that it matches.
#[derive(Debug, Serialize)]
struct RuleSummary {
    line: usize,
    hosts: Vec<String>,
    methods: String,
    path: String,
}

impl ToJson for RulesCheckReport {
    fn serialize_json<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.serialize(serializer)
    }
}

impl ToJson for RulesExplanation {
    fn serialize_json<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.serialize(serializer)
    }
}

impl RuleSummary {
    fn from_rule(rule: &RouteRule) -> RuleSummary {
        RuleSummary {
            line: rule.line,
            hosts: rule.hosts.iter().map(ToString::to_string).collect(),
            methods: rule.methods.to_string(),
            path: rule.path.to_string(),
        }
    }
}

const NO_ENVIRONMENT_SOURCE: &str = "nobody: its requests get 503, unless the proxy's own configuration or [gateway] of \
                              the server's settings (--config FILE) sets one";

impl RulesCheckReport {
    /// Collects remarks about the rules of a valid file.
    pub(super) fn new(file: &str, book: &RuleBook, defaults: &GatewayDefaults) -> RulesCheckReport {
        let lacks_environment = |rule: &&RouteRule| {
            rule.route.requirement != Some(RouteRequirement::Public)
                && rule.route.environment.is_none()
                && book.defaults.environment.is_none()
                && defaults.environment.is_none()
        };
        let note = |rule: &RouteRule| RuleNote { line: rule.line, text: "the rule has no environment" };
        RulesCheckReport {
            file: file.to_owned(),
            rules: book.rules.len(),
            notes: book.rules.iter().filter(lacks_environment).map(note).collect(),
        }
    }

    pub(super) fn to_text(&self) -> String {
        let rules = if self.rules == 1 { "rule" } else { "rules" };
        let head = format!("{}: {} {rules}, no problems.\n", escape_terminal(&self.file), self.rules);
        self.notes.iter().fold(head, |text, note| {
            let RuleNote { line, text: remark } = note;
            text + &format!("note: line {line}: {remark}; without one, its requests get 503\n")
        })
    }
}

/// Finds the rule that decides a request.
pub(super) fn explain(
    book: &RuleBook,
    defaults: &GatewayDefaults,
    request: &RulesTestRequest<'_>,
) -> RulesExplanation {
    let mut verdict = RulesExplanation {
        outcome: RulesOutcome::Denied,
        problem: None,
        mode: effective_mode(None, book, defaults),
        rule: None,
        passed_over: Vec::new(),
    };
    let (target, host) = match parse_path_and_host(request) {
        Ok(spelled) => spelled,
        Err(problem) => {
            verdict.set_refused(problem);
            return verdict;
        }
    };
    if book.rules.is_ambiguous(&host, request.method, &target) {
        verdict.set_refused(PathError::Lookalike.to_string());
        return verdict;
    }
    for rule in book.rules.iter() {
        match rule.match_request(&host, request.method, &target) {
            Ok(captures) => {
                verdict.set_deciding_rule(rule, &captures, book, defaults);
                break;
            }
            Err(mismatch) => {
                let mismatch = mismatch.to_string();
                verdict.passed_over.push(SkippedRule { rule: RuleSummary::from_rule(rule), mismatch });
            }
        }
    }
    verdict
}

/// Returns path and host in the canonical spelling that rules match. A missing host is empty, which no rule names.
fn parse_path_and_host<'a>(request: &RulesTestRequest<'a>) -> Result<(CanonicalPath<'a>, String), String> {
    let target = CanonicalPath::parse(request.path).map_err(|error| error.to_string())?;
    let host =
        request.host.map(|host| path::normalize_host(host).ok_or("the host is not valid")).transpose()?;
    if request.method.is_empty() {
        return Err("the method is empty".to_owned());
    }
    Ok((target, host.unwrap_or_default()))
}

fn effective_mode(rule: Option<&RouteSpec>, book: &RuleBook, defaults: &GatewayDefaults) -> SourcedValue {
    let word = |mode: &EnforcementMode| match mode {
        EnforcementMode::Enforce => "enforce".to_owned(),
        EnforcementMode::Shadow => "shadow".to_owned(),
    };
    let mode = rule.and_then(|route| route.mode);
    effective_value(&mode, &book.defaults.mode, word).unwrap_or_else(|| SourcedValue {
        value: Some(word(&defaults.mode)),
        from: "the server's settings".to_owned(),
    })
}

/// Returns the rule's value, or else the one of the file's defaults.
fn effective_value<T>(
    rule: &Option<T>,
    defaults: &Option<T>,
    word: impl Fn(&T) -> String,
) -> Option<SourcedValue> {
    let (value, from) = match (rule, defaults) {
        (Some(value), _) => (value, "the rule"),
        (None, Some(value)) => (value, "[defaults]"),
        (None, None) => return None,
    };
    Some(SourcedValue { value: Some(word(value)), from: from.to_owned() })
}

impl RulesExplanation {
    pub(super) fn is_decided(&self) -> bool {
        self.outcome == RulesOutcome::Decided
    }

    fn set_refused(&mut self, problem: String) {
        self.outcome = RulesOutcome::Refused;
        self.problem = Some(problem);
    }

    fn set_deciding_rule(
        &mut self,
        rule: &RouteRule,
        captures: &PathCaptures<'_>,
        book: &RuleBook,
        defaults: &GatewayDefaults,
    ) {
        self.outcome = RulesOutcome::Decided;
        self.mode = effective_mode(Some(&rule.route), book, defaults);
        let defaults = &book.defaults;
        let scopes = match &rule.route.requirement {
            Some(RouteRequirement::Scopes(scopes)) => {
                scopes.iter().map(|scope| scope.as_str().to_owned()).collect()
            }
            _ => Vec::new(),
        };
        let word = |name: &EnvironmentName| name.to_string();
        let environment = effective_value(&rule.route.environment, &defaults.environment, word)
            .or_else(|| {
                effective_value(&None, &defaults.environment, word)
                    .map(|value| SourcedValue { from: "[gateway]".into(), ..value })
            })
            .unwrap_or_else(|| SourcedValue { value: None, from: NO_ENVIRONMENT_SOURCE.to_owned() });
        let account = self.resolve_name(
            "account",
            (&rule.route.account, &defaults.account),
            captures,
            AccountId::parse,
        );
        let customer = self.resolve_name(
            "customer",
            (&rule.route.customer, &defaults.customer),
            captures,
            CustomerId::parse,
        );
        let cost = effective_value(&rule.route.cost, &defaults.cost, u64::to_string)
            .unwrap_or_else(|| SourcedValue { value: Some("1".to_owned()), from: "nobody".to_owned() });
        self.rule = Some(DecidingRule {
            rule: RuleSummary::from_rule(rule),
            captures: captures
                .iter()
                .map(|(name, text)| ((*name).to_owned(), redact_tokens(text).into_owned()))
                .collect(),
            public: rule.route.requirement == Some(RouteRequirement::Public),
            authenticate_only: rule.route.requirement == Some(RouteRequirement::Authenticated),
            scopes,
            environment,
            account,
            customer,
            cost,
        });
    }

    /// Resolves an account or customer as far as the request's path allows. An invalid name refuses the request.
    fn resolve_name<T: ToString>(
        &mut self,
        what: &str,
        (rule, defaults): (&Option<NameSource<T>>, &Option<NameSource<T>>),
        captures: &PathCaptures<'_>,
        parse: fn(&str) -> Result<T, NameError>,
    ) -> SourcedValue {
        let by = if rule.is_some() { "the rule" } else { "[defaults]" };
        match rule.as_ref().or(defaults.as_ref()) {
            None => SourcedValue { value: None, from: "nobody".to_owned() },
            Some(NameSource::Fixed(name)) => {
                SourcedValue { value: Some(name.to_string()), from: by.to_owned() }
            }
            Some(NameSource::Header(name)) => {
                SourcedValue { value: None, from: format!("{by}: the request's header {name}") }
            }
            Some(NameSource::PathCapture(name)) => {
                let text =
                    captures.iter().find(|(capture, _)| *capture == &**name).map_or("", |(_, text)| *text);
                if let Err(error) = parse(text) {
                    self.set_refused(format!("the {what} named {error}"));
                }
                SourcedValue {
                    value: Some(redact_tokens(text).into_owned()),
                    from: format!("{by}: the path's {{{name}}}"),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::{config::rules::parse_rules, domain::account::EnvironmentSet};

    const RULES: &str = r#"
[defaults]
hosts = ["*"]
environment = "staging"

[[rule]]
hosts = ["admin.test"]
methods = ["*"]
path = "/**"
scope = "admin:use"

[[rule]]
methods = ["GET"]
path = "/status"
public = true

[[rule]]
methods = ["POST"]
path = "/accounts/{account}/runs"
scopes = ["runs:write", "runs:read"]
account = "{account}"
customer_header = "X-Customer"
cost = 5
mode = "shadow"
"#;

    fn verdict(
        rules: &str,
        mode: EnforcementMode,
        method: &str,
        path: &str,
        host: Option<&str>,
    ) -> RulesExplanation {
        let book = parse_rules(rules, &EnvironmentSet::default()).unwrap();
        explain(&book, &GatewayDefaults { environment: None, mode }, &RulesTestRequest { method, path, host })
    }

    fn rendered(method: &str, path: &str) -> String {
        verdict(RULES, EnforcementMode::Enforce, method, path, None).to_text(false)
    }

    #[test]
    fn everything_that_a_rule_demands_is_told_with_where_it_comes_from() {
        let text = rendered("POST", "/accounts/acme/runs");
        for line in [
            "verdict      the rule in line 17 decides",
            "path         /accounts/{account}/runs",
            "methods      POST",
            "captures     account = acme",
            "needs        a valid token with runs:write, runs:read",
            "environment  staging (set by [defaults])",
            "account      acme (set by the rule: the path's {account})",
            "customer     set by the rule: the request's header x-customer",
            "cost         5 (set by the rule)",
            "mode         shadow (set by the rule)",
            "6     another host    *        /**      admin.test",
            "12    another method  GET      /status  *",
        ] {
            assert!(text.lines().any(|rendered| rendered == line), "{line}\n{text}");
        }
        assert!(rendered("GET", "/status").contains("nothing: it is public"));
    }

    #[test]
    fn a_token_in_the_path_is_not_shown() {
        let path = format!("/accounts/kw_live_{}/runs", "0".repeat(49));
        let verdict = verdict(RULES, EnforcementMode::Enforce, "POST", &path, None);
        let all = verdict.to_text(false) + &crate::cli::json_output::to_json_object(&verdict);
        assert!(all.contains("kw_live_***") && !all.contains("kw_live_0"), "{all}");
    }

    #[test]
    fn every_rule_is_passed_over_for_what_does_not_fit_first() {
        let verdict = verdict(RULES, EnforcementMode::Enforce, "GET", "/runs", Some("API.test:443"));
        let why: Vec<_> = verdict.passed_over.iter().map(|over| (over.rule.line, &*over.mismatch)).collect();
        assert_eq!(why, [(6, "another host"), (12, "another path"), (17, "another method")]);
        assert!(!verdict.is_decided());
    }

    #[test]
    fn a_host_is_read_as_the_gateway_reads_it() {
        let line = |host| {
            let verdict = verdict(RULES, EnforcementMode::Enforce, "GET", "/status", host);
            verdict.rule.map(|rule| rule.rule.line)
        };
        assert_eq!(line(Some("ADMIN.test.:8443")), Some(6));
        assert_eq!(line(Some("other.test")), Some(12));
        assert_eq!(line(None), Some(12));
        assert_eq!(line(Some("a b")), None);
    }

    #[test]
    fn what_the_gateway_answers_with_400_is_refused_and_why() {
        for (path, why) in [
            ("/a//b", "empty segment"),
            ("/a/%2e%2E/b", "'..'"),
            ("/a%2Fb", "encoded slash"),
            ("a", "begin with '/'"),
            ("/accounts/A%20B/runs", "the account named"),
        ] {
            let text = rendered("POST", path);
            assert!(text.starts_with("verdict") && text.contains("refused with 400"), "{path}: {text}");
            assert!(text.contains(why), "{path}: {text}");
        }
    }

    #[test]
    fn shadow_mode_says_that_a_denied_request_passes() {
        let shadow = verdict(RULES, EnforcementMode::Shadow, "GET", "/", None);
        assert!(!shadow.is_decided());
        assert!(shadow.to_text(false).contains("shadow (set by the server's settings); so it is allowed"));
        assert!(!rendered("GET", "/").contains("is allowed"));
    }

    #[test]
    fn a_rule_without_an_environment_is_noted() {
        let nowhere = RULES.replace("environment = \"staging\"", "");
        let text =
            verdict(&nowhere, EnforcementMode::Enforce, "POST", "/accounts/acme/runs", None).to_text(false);
        assert!(text.contains("get 503"), "{text}");
        let book = parse_rules(&nowhere, &EnvironmentSet::default()).unwrap();
        let defaults = |environment| GatewayDefaults { environment, mode: EnforcementMode::Enforce };
        let checked = RulesCheckReport::new("rules.toml", &book, &defaults(None));
        assert_eq!(
            checked.notes.iter().map(|note| note.line).collect::<Vec<_>>(),
            [6, 17],
            "not the public one"
        );
        assert!(checked.to_text().starts_with("rules.toml: 3 rules, no problems.\nnote: line 6: "));
        let production = EnvironmentName::parse("production").unwrap();
        assert!(RulesCheckReport::new("", &book, &defaults(Some(production))).notes.is_empty());
    }

    #[test]
    fn programs_read_the_same() {
        let verdict = verdict(RULES, EnforcementMode::Enforce, "POST", "/accounts/acme/runs", None);
        let value: Value = serde_json::from_str(&crate::cli::json_output::to_json_object(&verdict)).unwrap();
        assert_eq!((&value["outcome"], &value["problem"]), (&json!("decided"), &Value::Null));
        assert_eq!(value["rule"]["line"], 17);
        assert_eq!(value["rule"]["captures"], json!({ "account": "acme" }));
        assert_eq!(value["rule"]["customer"]["value"], Value::Null);
        assert_eq!(value["passed_over"][1]["mismatch"], "another method");
    }
}
