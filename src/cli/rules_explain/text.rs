//! Renders an explanation as text for people.

use comfy_table::Color;

use super::{DecidingRule, RuleSummary, RulesExplanation, RulesOutcome, SkippedRule, SourcedValue};
use crate::cli::table::{DetailTable, ListTable, plain_cell};

impl RulesExplanation {
    pub(in crate::cli) fn to_text(&self, colors: bool) -> String {
        let line = self.rule.as_ref().map_or(0, |rule| rule.rule.line);
        let (verdict, color) = match self.outcome {
            RulesOutcome::Decided => (format!("the rule in line {line} decides"), Color::Green),
            RulesOutcome::Denied => ("denied with 403: no rule matches the request".to_owned(), Color::Red),
            RulesOutcome::Refused => {
                let problem = self.problem.as_deref().unwrap_or_default();
                (format!("refused with 400: {problem}"), Color::Red)
            }
        };
        let record = DetailTable::new().colored_field("verdict", verdict, Some(color));
        let record = self.rule.iter().fold(record, |record, rule| record.merge(rule.to_table()));
        // An ambiguous request is refused before any rule applies, in every mode.
        let ruled = self.outcome == RulesOutcome::Denied
            || self.outcome == RulesOutcome::Refused && self.rule.is_some();
        let mode = match self.mode.value.as_deref() {
            Some("shadow") if ruled => {
                format!("{}; so it is allowed all the same, and marked", self.mode.to_text())
            }
            _ => self.mode.to_text(),
        };
        let text = record.field("mode", mode).render(colors);
        if self.passed_over.is_empty() { text } else { text + "\n" + &self.render_skipped_rules(colors) }
    }

    fn render_skipped_rules(&self, colors: bool) -> String {
        let mut rows = ListTable::new(&["LINE", "IS FOR", "METHODS", "PATH", "HOSTS"], colors);
        for SkippedRule { rule, mismatch } in &self.passed_over {
            let RuleSummary { line, hosts, methods, path } = rule;
            let cells = [&line.to_string(), mismatch, methods, path, &hosts.join(", ")];
            rows.add_row(cells.map(plain_cell));
        }
        rows.render("")
    }
}

impl DecidingRule {
    fn to_table(&self) -> DetailTable {
        let DecidingRule { rule, captures, scopes, environment, account, customer, cost, .. } = self;
        let captures: Vec<String> = captures.iter().map(|(name, text)| format!("{name} = {text}")).collect();
        let record = DetailTable::new()
            .field("path", &rule.path)
            .field("methods", &rule.methods)
            .list_field("hosts", &rule.hosts)
            .list_field("captures", &captures);
        if self.public {
            return record.field("needs", "nothing: it is public");
        }
        let needs = if self.authenticate_only {
            "a valid token, with any scopes".to_owned()
        } else {
            format!("a valid token with {}", scopes.join(", "))
        };
        record
            .field("needs", needs)
            .field("environment", environment.to_text())
            .field("account", account.to_text())
            .field("customer", customer.to_text())
            .field("cost", cost.to_text())
    }
}

impl SourcedValue {
    fn to_text(&self) -> String {
        match (&self.value, self.from.as_str()) {
            (Some(value), "nobody") => value.clone(),
            (Some(value), from) => format!("{value} (set by {from})"),
            (None, "nobody") => String::new(),
            (None, from) => format!("set by {from}"),
        }
    }
}
