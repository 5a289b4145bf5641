//! A verdict in words, for people.

use comfy_table::Color;

use super::{Deciding, Outcome, PassedOver, Setting, Shown, Verdict};
use crate::cli::table::{Record, Rows, text};

impl Verdict {
    /// For people.
    pub(in crate::cli) fn words(&self, colours: bool) -> String {
        let line = self.rule.as_ref().map_or(0, |rule| rule.rule.line);
        let (verdict, colour) = match self.outcome {
            Outcome::Decided => (format!("the rule in line {line} decides"), Color::Green),
            Outcome::Denied => ("denied with 403: no rule is for such a request".to_owned(), Color::Red),
            Outcome::Refused => {
                let problem = self.problem.as_deref().unwrap_or_default();
                (format!("refused with 400: {problem}"), Color::Red)
            }
        };
        let record = Record::new().coloured("verdict", verdict, Some(colour));
        let record = self.rule.iter().fold(record, |record, rule| record.and(rule.record()));
        // What can be read in two ways is refused before any rule is looked at, in every mode.
        let ruled =
            self.outcome == Outcome::Denied || self.outcome == Outcome::Refused && self.rule.is_some();
        let mode = match self.mode.value.as_deref() {
            Some("shadow") if ruled => {
                format!("{}; so it passes all the same, and is marked", self.mode.words())
            }
            _ => self.mode.words(),
        };
        let text = record.field("mode", mode).show(colours);
        if self.passed_over.is_empty() { text } else { text + "\n" + &self.passed_over(colours) }
    }

    fn passed_over(&self, colours: bool) -> String {
        let mut rows = Rows::new(&["LINE", "IS FOR", "METHODS", "PATH", "HOSTS"], colours);
        for PassedOver { rule, mismatch } in &self.passed_over {
            let Shown { line, hosts, methods, path } = rule;
            let cells = [&line.to_string(), mismatch, methods, path, &hosts.join(", ")];
            rows.row(cells.map(text));
        }
        rows.show("")
    }
}

impl Deciding {
    fn record(&self) -> Record {
        let Deciding { rule, captures, scopes, environment, account, customer, cost, .. } = self;
        let captures: Vec<String> = captures.iter().map(|(name, text)| format!("{name} = {text}")).collect();
        let record = Record::new()
            .field("path", &rule.path)
            .field("methods", &rule.methods)
            .list("hosts", &rule.hosts)
            .list("captures", &captures);
        if self.public {
            return record.field("needs", "nothing: it is open to everybody");
        }
        let needs = if self.authenticate_only {
            "a valid token, whatever it is granted".to_owned()
        } else {
            format!("a valid token that is granted {}", scopes.join(", "))
        };
        record
            .field("needs", needs)
            .field("environment", environment.words())
            .field("account", account.words())
            .field("customer", customer.words())
            .field("cost", cost.words())
    }
}

impl Setting {
    fn words(&self) -> String {
        match (&self.value, self.from.as_str()) {
            (Some(value), "nobody") => value.clone(),
            (Some(value), from) => format!("{value} (said by {from})"),
            (None, "nobody") => String::new(),
            (None, from) => format!("said by {from}"),
        }
    }
}
