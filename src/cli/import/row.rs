//! One row of an import: its columns read into the key that the request holds, and what it lacks filled in.
//!
//! No message here repeats a value: a file that holds tokens by mistake must not spread them.

use std::collections::BTreeMap;

use clap::Args;
use serde_json::Value;

use super::{
    cell::{self, Since},
    column::Column,
};
use crate::{
    cli::{
        failure::Failure,
        values::{Expiry, pair, proto_duration, quota, rate_limit},
    },
    domain::time::Timestamp,
    pb,
};

/// Why a row gives no key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum NoKey {
    /// It cannot be read: what is wrong, and where.
    Unreadable(String),
    /// The key has expired.
    Expired,
    /// The key is revoked or disabled.
    Inactive,
}

impl From<String> for NoKey {
    fn from(problem: String) -> NoKey {
        NoKey::Unreadable(problem)
    }
}

const STILL_WORKS: &str = "revoked_at or disabled_at: is in the future, so the key still works; write the instant as \
                           expires_at";

/// A row on its way to become a key.
#[derive(Debug, Default)]
pub(super) struct Draft {
    key: pb::ImportKey,
    /// Whether the row says when the key ends, be it never.
    says_expiry: bool,
    /// Whether the row says that the key does not work.
    is_inactive: bool,
    /// The instant at which the key stops working, which may lie in the future; the latest of several.
    inactive_since: Option<prost_types::Timestamp>,
    /// The lists that the row says are empty.
    empty: Vec<Column>,
}

impl Draft {
    /// Takes a field that is text. Empty means that the row says nothing.
    pub(super) fn text(&mut self, column: Column, text: &str) -> Result<(), String> {
        let text = text.trim();
        // PostgreSQL and MySQL write NULL as \N.
        if text.is_empty() || text == "\\N" {
            return Ok(());
        }
        if column.is_list() {
            return self.list(column, cell::list(text)?);
        }
        let key = &mut self.key;
        match column {
            Column::Account => text.clone_into(&mut key.account),
            Column::User => text.clone_into(&mut key.user),
            Column::Environment => text.clone_into(&mut key.environment),
            Column::Name => key.name = Some(text.to_owned()),
            Column::Hint => text.clone_into(&mut key.hint),
            Column::Sha256 => key.sha256 = cell::digest(text)?,
            Column::Quota => key.quota = Some(quota(text)?),
            Column::Metadata => {
                key.metadata = serde_json::from_str::<BTreeMap<String, String>>(text).map_err(|_| {
                    "write a JSON object of texts, such as {\"team\": \"billing\"}".to_owned()
                })?;
            }
            Column::EntropyBits => {
                let bits =
                    text.parse().map_err(|_| "write the bits as a whole number, such as 128".to_owned());
                key.entropy_bits = Some(bits?);
            }
            Column::ExpiresAt => self.expires(cell::expiry(text)?),
            Column::Active => self.is_inactive |= !cell::truth(text)?,
            Column::Inactive => self.is_inactive |= cell::truth(text)?,
            Column::InactiveSince => match cell::since(text)? {
                Since::Never => {}
                Since::Unknown => self.is_inactive = true,
                Since::At(instant) => {
                    let later =
                        |known: prost_types::Timestamp| known.seconds.max(instant.seconds) == known.seconds;
                    self.inactive_since = self.inactive_since.filter(|known| later(*known)).or(Some(instant));
                }
            },
            Column::Unnamed => return Err("the header gives this column no name".to_owned()),
            _ => {}
        }
        Ok(())
    }

    /// Takes a field that is a list.
    fn list(&mut self, column: Column, values: Vec<String>) -> Result<(), String> {
        if values.is_empty() {
            self.empty.push(column);
        }
        let key = &mut self.key;
        match column {
            Column::Scopes => key.scopes = values,
            Column::Roles => key.roles = values,
            Column::Customers => key.customers = values,
            Column::AllowedCidrs => key.allowed_cidrs = values,
            Column::RateLimits => {
                key.rate_limits = values.iter().map(|value| rate_limit(value)).collect::<Result<_, _>>()?;
            }
            _ => return Err("is no list".to_owned()),
        }
        Ok(())
    }

    /// Takes a field of a JSON object.
    pub(super) fn json(&mut self, column: Column, value: Value) -> Result<(), String> {
        let words = |values: Vec<Value>| {
            let words = values.into_iter().map(|value| match value {
                Value::String(word) => Ok(word),
                _ => Err("write an array of texts".to_owned()),
            });
            words.collect::<Result<Vec<String>, String>>()
        };
        match (value, column) {
            (Value::Null, _) | (_, Column::Ignored) => Ok(()),
            (Value::String(text), column) => self.text(column, &text),
            (Value::Number(number), column) if column.may_be_number() => {
                self.text(column, &number.to_string())
            }
            (Value::Bool(value), Column::Active | Column::Inactive | Column::InactiveSince) => {
                self.text(column, &value.to_string())
            }
            (Value::Array(values), column) if column.is_list() => self.list(column, words(values)?),
            (object @ Value::Object(_), Column::Metadata) => self.text(column, &object.to_string()),
            (_, column) if column.is_list() => Err("write an array of texts".to_owned()),
            (_, Column::Metadata) => Err("write an object of texts".to_owned()),
            _ => Err("write a text".to_owned()),
        }
    }

    fn expires(&mut self, expiry: Expiry) {
        self.says_expiry = true;
        (self.key.expires_at, self.key.ttl) = match expiry {
            Expiry::Never => (None, None),
            Expiry::In(life) => (None, Some(proto_duration(life))),
            Expiry::At(instant) => (Some(instant), None),
        };
    }

    /// Refuses a list that the row says is empty and a default would fill: such a row does not say nothing.
    fn check_empty_lists(&self, defaults: &DefaultArgs) -> Result<(), String> {
        let grants_nothing = self.key.scopes.is_empty() && self.key.roles.is_empty();
        let has_grants = !defaults.scopes.is_empty() || !defaults.roles.is_empty();
        let filled = |column: &Column| match column {
            Column::Scopes | Column::Roles => grants_nothing && has_grants,
            Column::Customers => !defaults.customers.is_empty(),
            Column::AllowedCidrs => !defaults.allowed_cidrs.is_empty(),
            Column::RateLimits => !defaults.rate_limits.is_empty(),
            _ => false,
        };
        match self.empty.iter().find(|column| filled(column)) {
            Some(column) => Err(format!(
                "{}: is an empty list, which no default replaces; leave it out or empty to take the default",
                column.name()
            )),
            None => Ok(()),
        }
    }

    /// The key, with the defaults where the row says nothing.
    pub(super) fn finish(mut self, defaults: &DefaultArgs, now: Timestamp) -> Result<pb::ImportKey, NoKey> {
        if self.is_inactive || self.inactive_since.is_some_and(|since| is_past(&since, now)) {
            return Err(NoKey::Inactive);
        }
        if self.inactive_since.is_some() {
            return Err(NoKey::Unreadable(STILL_WORKS.to_owned()));
        }
        if self.key.expires_at.is_some_and(|end| is_past(&end, now)) {
            return Err(NoKey::Expired);
        }
        if self.key.sha256.is_empty() {
            return Err(NoKey::Unreadable("sha256: is missing".to_owned()));
        }
        self.check_empty_lists(defaults)?;
        let expires = defaults.expires.filter(|_| !self.says_expiry);
        expires.into_iter().for_each(|expiry| self.expires(expiry));
        let key = &mut self.key;
        if key.account.is_empty() && key.user.is_empty() {
            key.account = defaults.account.clone().unwrap_or_default();
            key.user = defaults.user.clone().unwrap_or_default();
        }
        // Together, so that a row that grants little is not given more.
        if key.scopes.is_empty() && key.roles.is_empty() {
            key.scopes.clone_from(&defaults.scopes);
            key.roles.clone_from(&defaults.roles);
        }
        if key.environment.is_empty() {
            key.environment = defaults.environment.clone().unwrap_or_default();
        }
        or(&mut key.customers, &defaults.customers);
        or(&mut key.allowed_cidrs, &defaults.allowed_cidrs);
        or(&mut key.rate_limits, &defaults.rate_limits);
        if key.metadata.is_empty() {
            key.metadata = defaults.metadata.iter().cloned().collect();
        }
        key.quota = key.quota.or(defaults.quota);
        key.entropy_bits = key.entropy_bits.or(defaults.entropy_bits);
        Ok(self.key)
    }
}

fn or<T: Clone>(list: &mut Vec<T>, default: &Vec<T>) {
    if list.is_empty() {
        list.clone_from(default);
    }
}

fn is_past(instant: &prost_types::Timestamp, now: Timestamp) -> bool {
    let micros = i128::from(instant.seconds) * 1_000_000 + i128::from(instant.nanos) / 1_000;
    micros <= i128::from(now.as_micros())
}

/// What a key gets where its row says nothing.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Where a row says nothing")]
pub(super) struct DefaultArgs {
    /// The account that owns the key, unless the row names an account or a user
    #[arg(long, value_name = "ID", conflicts_with = "user")]
    account: Option<String>,
    /// The user who owns the key, unless the row names an account or a user
    #[arg(long, value_name = "ID")]
    user: Option<String>,
    /// The one environment in which the key works
    #[arg(long, short, value_name = "NAME")]
    environment: Option<String>,
    /// Scope to grant where the row has neither scopes nor roles (repeat, or separate by commas)
    #[arg(long = "scope", short, value_name = "SCOPE", value_delimiter = ',')]
    scopes: Vec<String>,
    /// Role to grant where the row has neither scopes nor roles (repeat, or separate by commas)
    #[arg(long = "role", value_name = "ROLE", value_delimiter = ',')]
    roles: Vec<String>,
    /// When the key ends: a duration from now (90d, 1y), an instant (RFC 3339), or never
    #[arg(long, value_name = "WHEN", value_parser = Expiry::parse)]
    expires: Option<Expiry>,
    /// Restrict the key to this customer (repeat, or separate by commas)
    #[arg(long = "customer", value_name = "ID", value_delimiter = ',')]
    customers: Vec<String>,
    /// Restrict the key to client addresses of this network (repeat, or separate by commas)
    #[arg(long = "allow-cidr", value_name = "CIDR", value_delimiter = ',')]
    allowed_cidrs: Vec<String>,
    /// Rate limit, such as calls=100/1m (repeatable)
    #[arg(long = "rate-limit", value_name = "NAME=LIMIT/WINDOW", value_parser = rate_limit)]
    rate_limits: Vec<pb::RateLimit>,
    /// Quota per hour, day, month (UTC) or total, such as 1000/month
    #[arg(long, value_name = "LIMIT/PERIOD", value_parser = quota)]
    quota: Option<pb::Quota>,
    /// Note to keep with the key, such as source=legacy (repeatable)
    #[arg(long, value_name = "NAME=VALUE", value_parser = pair)]
    metadata: Vec<(String, String)>,
    /// How many bits of entropy a token has at least, if that is known: at least 112
    #[arg(long, value_name = "BITS")]
    entropy_bits: Option<u32>,
}

impl DefaultArgs {
    /// Refuses an expiry that would skip every row.
    pub(super) fn check(&self, now: Timestamp) -> Result<(), Failure> {
        match self.expires {
            Some(Expiry::At(end)) if is_past(&end, now) => {
                Err(Failure::usage("--expires is in the past; name an instant that is yet to come, or never"))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{super::column::COLUMNS, *};

    const NOW: Timestamp = Timestamp::from_micros(10_000_000);
    const HEX: &str = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08";

    fn defaults() -> DefaultArgs {
        DefaultArgs {
            account: Some("acme".into()),
            environment: Some("production".into()),
            scopes: vec!["all".into()],
            expires: Some(Expiry::In(std::time::Duration::from_secs(60))),
            customers: vec!["c1".into()],
            ..DefaultArgs::default()
        }
    }

    fn drafted(cells: &[(Column, &str)]) -> pb::ImportKey {
        let mut draft = Draft::default();
        for (column, text) in cells {
            draft.text(*column, text).unwrap();
        }
        draft.text(Column::Sha256, HEX).unwrap();
        draft.finish(&defaults(), NOW).unwrap()
    }

    #[test]
    fn a_list_is_read_in_every_notation_in_every_column_that_holds_one() {
        let key =
            drafted(&[(Column::Scopes, " a:b;c:d , e:f; "), (Column::RateLimits, "{calls=5/1m,burst=9/1s}")]);
        assert_eq!(key.scopes, ["a:b", "c:d", "e:f"]);
        assert_eq!(key.rate_limits.len(), 2);
    }

    #[test]
    fn a_key_that_has_expired_or_does_not_work_is_skipped_and_no_error() {
        let outcome = |column, text: &str| {
            let mut draft = Draft::default();
            draft.text(Column::Sha256, HEX).unwrap();
            draft.text(column, text).unwrap();
            draft.finish(&defaults(), NOW).err()
        };
        for (column, text, expected) in [
            (Column::ExpiresAt, "1970-01-01T00:00:10Z", Some(NoKey::Expired)),
            (Column::ExpiresAt, "1970-01-01T00:00:11Z", None),
            (Column::Active, "f", Some(NoKey::Inactive)),
            (Column::Active, "TRUE", None),
            (Column::Inactive, "1", Some(NoKey::Inactive)),
            (Column::Inactive, "no", None),
            (Column::InactiveSince, "1970-01-01T00:00:05Z", Some(NoKey::Inactive)),
            (Column::InactiveSince, "\\N", None),
            (Column::InactiveSince, "true", Some(NoKey::Inactive)),
            (Column::InactiveSince, "1801353600", Some(NoKey::Unreadable(STILL_WORKS.to_owned()))),
        ] {
            assert_eq!(outcome(column, text), expected, "{column:?} {text}");
        }
        let past = DefaultArgs { expires: Some(cell::expiry("1970-01-01").unwrap()), ..defaults() };
        assert!(past.check(NOW).is_err() && defaults().check(NOW).is_ok());
    }

    #[test]
    fn a_tokens_strength_is_the_rows_or_the_flags() {
        let strong = DefaultArgs { entropy_bits: Some(256), ..defaults() };
        let bits = |cells: &[(Column, &str)]| {
            let mut draft = Draft::default();
            cells.iter().for_each(|(column, text)| draft.text(*column, text).unwrap());
            draft.text(Column::Sha256, HEX).unwrap();
            draft.finish(&strong, NOW).unwrap().entropy_bits
        };
        assert_eq!((bits(&[]), bits(&[(Column::EntropyBits, "128")])), (Some(256), Some(128)));
        for bad in ["-1", "12.5", "many", "4294967296"] {
            assert!(
                Draft::default().text(Column::EntropyBits, bad).unwrap_err().contains("whole number"),
                "{bad}"
            );
        }
    }

    #[test]
    fn a_default_fills_only_what_the_row_leaves_open() {
        let key = drafted(&[]);
        assert_eq!((key.account.as_str(), key.environment.as_str()), ("acme", "production"));
        assert_eq!((key.scopes, key.ttl.map(|ttl| ttl.seconds)), (vec!["all".to_owned()], Some(60)));
        let key = drafted(&[(Column::User, "ada"), (Column::Roles, "agent"), (Column::Customers, "c2")]);
        assert_eq!((key.account.as_str(), key.user.as_str()), ("", "ada"), "one owner, and the row's");
        assert!(key.scopes.is_empty(), "a row that grants something is not given more");
        assert_eq!(key.customers, ["c2"]);
    }

    #[test]
    fn a_row_that_says_never_never_ends_whatever_the_default() {
        let key = drafted(&[(Column::ExpiresAt, "never")]);
        assert_eq!((key.expires_at, key.ttl), (None, None));
        let key = drafted(&[(Column::ExpiresAt, "1970-01-01T00:01:00Z")]);
        assert_eq!((key.expires_at.map(|at| at.seconds), key.ttl), (Some(60), None));
    }

    #[test]
    fn a_list_that_a_row_says_is_empty_is_not_filled_by_a_default() {
        let outcome = |column: Column, value: Value, defaults: &DefaultArgs| {
            let mut draft = Draft::default();
            draft.text(Column::Sha256, HEX).unwrap();
            draft.json(column, value).unwrap();
            draft.finish(defaults, NOW)
        };
        let all = DefaultArgs {
            roles: vec!["admin".into()],
            allowed_cidrs: vec!["10.0.0.0/8".into()],
            rate_limits: vec![rate_limit("calls=5/1m").unwrap()],
            ..defaults()
        };
        for (name, column) in COLUMNS.iter().filter(|(_, column)| column.is_list()) {
            for empty in [json!("{}"), json!("[]"), json!(" , "), json!([])] {
                match outcome(*column, empty.clone(), &all) {
                    Err(NoKey::Unreadable(problem)) => {
                        assert!(problem.starts_with(&format!("{name}: is an empty list")), "{problem}");
                    }
                    other => panic!("{name} {empty}: {other:?}"),
                }
                let key = outcome(*column, empty, &DefaultArgs::default()).unwrap();
                assert!(key.scopes.is_empty() && key.roles.is_empty(), "{name}");
            }
            for absent in [json!(""), json!(null), json!("\\N")] {
                let key = outcome(*column, absent, &all).unwrap();
                assert_eq!((key.scopes.len(), key.roles.len(), key.customers.len()), (1, 1, 1), "{name}");
            }
        }
        let mut draft = Draft::default();
        draft.json(Column::Scopes, json!([])).unwrap();
        draft.json(Column::Roles, json!(["agent"])).unwrap();
        draft.text(Column::Sha256, HEX).unwrap();
        assert_eq!(draft.finish(&all, NOW).unwrap().roles, ["agent"], "it grants something");
    }

    #[test]
    fn only_an_instant_or_a_truth_value_takes_a_key_out_of_service() {
        let outcome = |value: Value| {
            let mut draft = Draft::default();
            draft.text(Column::Sha256, HEX).unwrap();
            draft.json(Column::InactiveSince, value)?;
            draft
                .finish(&defaults(), Timestamp::from_micros(1_801_353_600_000_000))
                .map_err(|no| format!("{no:?}"))
        };
        for live in
            [json!(0), json!("0"), json!("NULL"), json!(null), json!(false), json!("0000-00-00 00:00:00")]
        {
            assert!(outcome(live.clone()).is_ok(), "{live}");
        }
        for dead in [json!(1), json!(true), json!(1_701_353_600), json!("2020-01-01 10:00:00")] {
            assert_eq!(outcome(dead.clone()).unwrap_err(), "Inactive", "{dead}");
        }
        for unclear in [json!("gone"), json!("none"), json!("90d"), json!(7), json!("-infinity")] {
            assert!(outcome(unclear.clone()).unwrap_err().contains("true or false"), "{unclear}");
        }
    }

    #[test]
    fn json_says_the_same_with_arrays_and_objects() {
        let mut draft = Draft::default();
        draft.json(Column::Scopes, json!(["a:b", "c:d"])).unwrap();
        draft.json(Column::Metadata, json!({ "team": "x;y z" })).unwrap();
        draft.json(Column::Name, Value::Null).unwrap();
        draft.json(Column::ExpiresAt, json!(1_801_353_600)).unwrap();
        draft.json(Column::EntropyBits, json!(128)).unwrap();
        draft.json(Column::Active, json!(true)).unwrap();
        draft.json(Column::Sha256, json!(HEX)).unwrap();
        let key = draft.finish(&DefaultArgs::default(), NOW).unwrap();
        assert_eq!((key.scopes.len(), key.metadata["team"].as_str(), key.name), (2, "x;y z", None));
        assert_eq!(
            (key.expires_at.map(|end| end.seconds), key.entropy_bits),
            (Some(1_801_353_600), Some(128))
        );
        for (column, bad) in [
            (Column::Scopes, json!([1])),
            (Column::Scopes, json!(true)),
            (Column::Name, json!(["a"])),
            (Column::Metadata, json!({ "a": 1 })),
            (Column::Name, json!(7)),
            (Column::ExpiresAt, json!(true)),
            (Column::Sha256, json!(7)),
        ] {
            assert!(Draft::default().json(column, bad).is_err(), "{column:?}");
        }
    }

    #[test]
    fn a_row_without_a_digest_is_no_key() {
        let missing = NoKey::Unreadable("sha256: is missing".to_owned());
        assert_eq!(Draft::default().finish(&defaults(), NOW).unwrap_err(), missing);
    }
}
