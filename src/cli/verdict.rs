//! What a rules file says of a request: which rule decides and why, in words and as JSON. It follows
//! `gateway::Gateway::judge` step by step for what can be known without a server and without a proxy.

mod words;

use std::collections::BTreeMap;

use serde::{Serialize, Serializer};

use super::{json::Json, table::clean};
use crate::domain::{
    name::{AccountId, CustomerId, EnvironmentName, NameError},
    route::{
        Captures, Demand, Mode, Named, Route, Rule, RuleBook,
        path::{self, Misspelt, Path},
    },
    token::redacted,
};

/// What `[gateway]` of the server's settings says.
pub(super) struct Around {
    pub(super) environment: Option<EnvironmentName>,
    pub(super) mode: Mode,
}

/// A request.
pub(super) struct Asked<'a> {
    pub(super) method: &'a str,
    pub(super) path: &'a str,
    pub(super) host: Option<&'a str>,
}

/// What `keyward rules check` found.
#[derive(Debug, Serialize)]
pub(super) struct Checked {
    file: String,
    rules: usize,
    /// Nothing wrong, and worth knowing.
    notes: Vec<Note>,
}

#[derive(Debug, Serialize)]
struct Note {
    line: usize,
    text: &'static str,
}

/// Which way a request goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Outcome {
    /// A rule decides.
    Decided,
    /// No rule is for it.
    Denied,
    /// It is refused for how it is spelt.
    Refused,
}

/// A value, and where it comes from.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Setting {
    value: Option<String>,
    from: String,
}

/// A request's verdict.
#[derive(Debug, Serialize)]
pub(super) struct Verdict {
    outcome: Outcome,
    /// Why it is refused.
    problem: Option<String>,
    mode: Setting,
    rule: Option<Deciding>,
    passed_over: Vec<PassedOver>,
}

/// The rule that decides.
#[derive(Debug, Serialize)]
struct Deciding {
    #[serde(flatten)]
    rule: Shown,
    captures: BTreeMap<String, String>,
    public: bool,
    authenticate_only: bool,
    scopes: Vec<String>,
    environment: Setting,
    account: Setting,
    customer: Setting,
    cost: Setting,
}

/// A rule that comes earlier and does not match.
#[derive(Debug, Serialize)]
struct PassedOver {
    #[serde(flatten)]
    rule: Shown,
    mismatch: String,
}

/// What a rule is for.
#[derive(Debug, Serialize)]
struct Shown {
    line: usize,
    hosts: Vec<String>,
    methods: String,
    path: String,
}

impl Json for Checked {
    fn write<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.serialize(serializer)
    }
}

impl Json for Verdict {
    fn write<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.serialize(serializer)
    }
}

impl Shown {
    fn of(rule: &Rule) -> Shown {
        Shown {
            line: rule.line,
            hosts: rule.hosts.iter().map(ToString::to_string).collect(),
            methods: rule.methods.to_string(),
            path: rule.path.to_string(),
        }
    }
}

const NO_ENVIRONMENT: &str = "nobody: its requests hear 503, unless the proxy's own configuration says one, or \
                              [gateway] of the server's settings (--config FILE)";

impl Checked {
    /// What there is to say of rules that are right.
    pub(super) fn of(file: &str, book: &RuleBook, around: &Around) -> Checked {
        let nowhere = |rule: &&Rule| {
            rule.route.demand != Some(Demand::Public)
                && rule.route.environment.is_none()
                && book.defaults.environment.is_none()
                && around.environment.is_none()
        };
        let note = |rule: &Rule| Note { line: rule.line, text: "no environment is said by anyone here" };
        Checked {
            file: file.to_owned(),
            rules: book.rules.len(),
            notes: book.rules.iter().filter(nowhere).map(note).collect(),
        }
    }

    /// For people.
    pub(super) fn words(&self) -> String {
        let rules = if self.rules == 1 { "rule" } else { "rules" };
        let head = format!("{}: {} {rules}, nothing wrong.\n", clean(&self.file), self.rules);
        self.notes.iter().fold(head, |text, note| {
            let Note { line, text: said } = note;
            text + &format!("note: line {line}: {said}; without one, its requests hear 503\n")
        })
    }
}

/// What the rules say of a request.
pub(super) fn of(book: &RuleBook, around: &Around, asked: &Asked<'_>) -> Verdict {
    let mut verdict = Verdict {
        outcome: Outcome::Denied,
        problem: None,
        mode: mode(None, book, around),
        rule: None,
        passed_over: Vec::new(),
    };
    let (target, host) = match spelled(asked) {
        Ok(spelled) => spelled,
        Err(problem) => {
            verdict.refuse(problem);
            return verdict;
        }
    };
    if book.rules.is_ambiguous(&host, asked.method, &target) {
        verdict.refuse(Misspelt::Lookalike.to_string());
        return verdict;
    }
    for rule in book.rules.iter() {
        match rule.judge(&host, asked.method, &target) {
            Ok(captures) => {
                verdict.decide(rule, &captures, book, around);
                break;
            }
            Err(mismatch) => {
                let mismatch = mismatch.to_string();
                verdict.passed_over.push(PassedOver { rule: Shown::of(rule), mismatch });
            }
        }
    }
    verdict
}

/// Path and host in the one spelling that rules see. No host is one that no rule names.
fn spelled<'a>(asked: &Asked<'a>) -> Result<(Path<'a>, String), String> {
    let target = Path::parse(asked.path).map_err(|misspelt| misspelt.to_string())?;
    let host = asked.host.map(|host| path::host(host).ok_or("the host is none")).transpose()?;
    if asked.method.is_empty() {
        return Err("the method is none".to_owned());
    }
    Ok((target, host.unwrap_or_default()))
}

fn mode(rule: Option<&Route>, book: &RuleBook, around: &Around) -> Setting {
    let word = |mode: &Mode| match mode {
        Mode::Enforce => "enforce".to_owned(),
        Mode::Shadow => "shadow".to_owned(),
    };
    let said = rule.and_then(|route| route.mode);
    setting(&said, &book.defaults.mode, word).unwrap_or_else(|| Setting {
        value: Some(word(&around.mode)),
        from: "the server's settings".to_owned(),
    })
}

/// What the rule says, or else the file's defaults.
fn setting<T>(rule: &Option<T>, defaults: &Option<T>, word: impl Fn(&T) -> String) -> Option<Setting> {
    let (value, from) = match (rule, defaults) {
        (Some(value), _) => (value, "the rule"),
        (None, Some(value)) => (value, "[defaults]"),
        (None, None) => return None,
    };
    Some(Setting { value: Some(word(value)), from: from.to_owned() })
}

impl Verdict {
    /// Whether a rule decides.
    pub(super) fn decided(&self) -> bool {
        self.outcome == Outcome::Decided
    }

    fn refuse(&mut self, problem: String) {
        self.outcome = Outcome::Refused;
        self.problem = Some(problem);
    }

    fn decide(&mut self, rule: &Rule, captures: &Captures<'_>, book: &RuleBook, around: &Around) {
        self.outcome = Outcome::Decided;
        self.mode = mode(Some(&rule.route), book, around);
        let defaults = &book.defaults;
        let scopes = match &rule.route.demand {
            Some(Demand::Scopes(scopes)) => scopes.iter().map(|scope| scope.as_str().to_owned()).collect(),
            _ => Vec::new(),
        };
        let word = |name: &EnvironmentName| name.to_string();
        let environment = setting(&rule.route.environment, &defaults.environment, word)
            .or_else(|| {
                setting(&None, &around.environment, word)
                    .map(|said| Setting { from: "[gateway]".into(), ..said })
            })
            .unwrap_or_else(|| Setting { value: None, from: NO_ENVIRONMENT.to_owned() });
        let account =
            self.named("account", (&rule.route.account, &defaults.account), captures, AccountId::parse);
        let customer =
            self.named("customer", (&rule.route.customer, &defaults.customer), captures, CustomerId::parse);
        let cost = setting(&rule.route.cost, &defaults.cost, u64::to_string)
            .unwrap_or_else(|| Setting { value: Some("1".to_owned()), from: "nobody".to_owned() });
        self.rule = Some(Deciding {
            rule: Shown::of(rule),
            captures: captures
                .iter()
                .map(|(name, text)| ((*name).to_owned(), redacted(text).into_owned()))
                .collect(),
            public: rule.route.demand == Some(Demand::Public),
            authenticate_only: rule.route.demand == Some(Demand::Authenticated),
            scopes,
            environment,
            account,
            customer,
            cost,
        });
    }

    /// An account or customer: what is known of it from here.
    fn named<T: ToString>(
        &mut self,
        what: &str,
        (rule, defaults): (&Option<Named<T>>, &Option<Named<T>>),
        captures: &Captures<'_>,
        parse: fn(&str) -> Result<T, NameError>,
    ) -> Setting {
        let by = if rule.is_some() { "the rule" } else { "[defaults]" };
        match rule.as_ref().or(defaults.as_ref()) {
            None => Setting { value: None, from: "nobody".to_owned() },
            Some(Named::Is(name)) => Setting { value: Some(name.to_string()), from: by.to_owned() },
            Some(Named::Header(name)) => {
                Setting { value: None, from: format!("{by}: the request's header {name}") }
            }
            Some(Named::Capture(name)) => {
                let text = captures.iter().find(|(known, _)| *known == &**name).map_or("", |(_, text)| *text);
                if let Err(error) = parse(text) {
                    self.refuse(format!("the {what} named {error}"));
                }
                Setting {
                    value: Some(redacted(text).into_owned()),
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
    use crate::{config::rules::parse, domain::account::Environments};

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

    fn verdict(rules: &str, mode: Mode, method: &str, path: &str, host: Option<&str>) -> Verdict {
        let book = parse(rules, &Environments::default()).unwrap();
        of(&book, &Around { environment: None, mode }, &Asked { method, path, host })
    }

    fn told(method: &str, path: &str) -> String {
        verdict(RULES, Mode::Enforce, method, path, None).words(false)
    }

    #[test]
    fn everything_that_a_rule_demands_is_told_with_where_it_comes_from() {
        let text = told("POST", "/accounts/acme/runs");
        for line in [
            "verdict      the rule in line 17 decides",
            "path         /accounts/{account}/runs",
            "methods      POST",
            "captures     account = acme",
            "needs        a valid token that is granted runs:write, runs:read",
            "environment  staging (said by [defaults])",
            "account      acme (said by the rule: the path's {account})",
            "customer     said by the rule: the request's header x-customer",
            "cost         5 (said by the rule)",
            "mode         shadow (said by the rule)",
            "6     another host    *        /**      admin.test",
            "12    another method  GET      /status  *",
        ] {
            assert!(text.lines().any(|told| told == line), "{line}\n{text}");
        }
        assert!(told("GET", "/status").contains("nothing: it is open to everybody"));
    }

    #[test]
    fn a_token_in_the_path_is_not_shown() {
        let path = format!("/accounts/kw_live_{}/runs", "0".repeat(49));
        let verdict = verdict(RULES, Mode::Enforce, "POST", &path, None);
        let all = verdict.words(false) + &crate::cli::json::object(&verdict);
        assert!(all.contains("kw_live_***") && !all.contains("kw_live_0"), "{all}");
    }

    #[test]
    fn every_rule_is_passed_over_for_what_does_not_fit_first() {
        let verdict = verdict(RULES, Mode::Enforce, "GET", "/runs", Some("API.test:443"));
        let why: Vec<_> = verdict.passed_over.iter().map(|over| (over.rule.line, &*over.mismatch)).collect();
        assert_eq!(why, [(6, "another host"), (12, "another path"), (17, "another method")]);
        assert!(!verdict.decided());
    }

    #[test]
    fn a_host_is_read_as_the_gateway_reads_it() {
        let line = |host| {
            let verdict = verdict(RULES, Mode::Enforce, "GET", "/status", host);
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
            let text = told("POST", path);
            assert!(text.starts_with("verdict") && text.contains("refused with 400"), "{path}: {text}");
            assert!(text.contains(why), "{path}: {text}");
        }
    }

    #[test]
    fn shadow_mode_says_that_a_denied_request_passes() {
        let shadow = verdict(RULES, Mode::Shadow, "GET", "/", None);
        assert!(!shadow.decided());
        assert!(shadow.words(false).contains("shadow (said by the server's settings); so it passes"));
        assert!(!told("GET", "/").contains("passes"));
    }

    #[test]
    fn a_rule_without_an_environment_is_noted() {
        let nowhere = RULES.replace("environment = \"staging\"", "");
        let text = verdict(&nowhere, Mode::Enforce, "POST", "/accounts/acme/runs", None).words(false);
        assert!(text.contains("hear 503"), "{text}");
        let book = parse(&nowhere, &Environments::default()).unwrap();
        let around = |environment| Around { environment, mode: Mode::Enforce };
        let checked = Checked::of("rules.toml", &book, &around(None));
        assert_eq!(
            checked.notes.iter().map(|note| note.line).collect::<Vec<_>>(),
            [6, 17],
            "not the public one"
        );
        assert!(checked.words().starts_with("rules.toml: 3 rules, nothing wrong.\nnote: line 6: "));
        let production = EnvironmentName::parse("production").unwrap();
        assert!(Checked::of("", &book, &around(Some(production))).notes.is_empty());
    }

    #[test]
    fn programs_read_the_same() {
        let verdict = verdict(RULES, Mode::Enforce, "POST", "/accounts/acme/runs", None);
        let value: Value = serde_json::from_str(&crate::cli::json::object(&verdict)).unwrap();
        assert_eq!((&value["outcome"], &value["problem"]), (&json!("decided"), &Value::Null));
        assert_eq!(value["rule"]["line"], 17);
        assert_eq!(value["rule"]["captures"], json!({ "account": "acme" }));
        assert_eq!(value["rule"]["customer"]["value"], Value::Null);
        assert_eq!(value["passed_over"][1]["mismatch"], "another method");
    }
}
