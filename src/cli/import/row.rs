//! Converts one row of an import to the key in the request, with defaults for empty columns.
//!
//! Error messages never repeat a value, because a file may hold tokens by mistake.

use std::collections::BTreeMap;

use clap::Args;
use serde_json::Value;

use super::{
    cell::{self, DeactivatedAt},
    column::ImportColumn,
};
use crate::{
    cli::{
        error::CliError,
        value_format::{ExpiryArg, duration_to_proto, parse_name_value, parse_quota, parse_rate_limit},
    },
    domain::time::Timestamp,
    pb,
};

/// Why a row is not sent to the server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum RowSkipReason {
    /// The row is malformed; the text names the column and the problem.
    Unreadable(String),
    /// The row's key has expired.
    Expired,
    /// The row's key is revoked or disabled.
    Inactive,
}

impl From<String> for RowSkipReason {
    fn from(problem: String) -> RowSkipReason {
        RowSkipReason::Unreadable(problem)
    }
}

const ERR_STILL_ACTIVE: &str = "revoked_at or disabled_at: is in the future, so the key still works; use the column \
                           expires_at";

/// A key under construction from the columns of a row.
#[derive(Debug, Default)]
pub(super) struct KeyDraft {
    key: pb::ImportKey,
    /// Whether the row has an expiry, `never` included.
    has_expiry: bool,
    /// Whether the row marks the key as revoked or disabled.
    is_inactive: bool,
    /// The latest instant at which the key stops working; it may be in the future.
    inactive_since: Option<prost_types::Timestamp>,
    /// The lists that are explicitly empty in the row.
    empty_lists: Vec<ImportColumn>,
}

impl KeyDraft {
    /// Sets a column from text. Empty text leaves the column unset.
    pub(super) fn set_text(&mut self, column: ImportColumn, text: &str) -> Result<(), String> {
        let text = text.trim();
        // PostgreSQL and MySQL write NULL as \N.
        if text.is_empty() || text == "\\N" {
            return Ok(());
        }
        if column.is_list() {
            return self.set_list(column, cell::parse_list(text)?);
        }
        let key = &mut self.key;
        match column {
            ImportColumn::Account => text.clone_into(&mut key.account),
            ImportColumn::User => text.clone_into(&mut key.user),
            ImportColumn::Environment => text.clone_into(&mut key.environment),
            ImportColumn::Name => key.name = Some(text.to_owned()),
            ImportColumn::Hint => text.clone_into(&mut key.hint),
            ImportColumn::Sha256 => key.sha256 = cell::parse_sha256(text)?,
            ImportColumn::Quota => key.quota = Some(parse_quota(text)?),
            ImportColumn::Metadata => {
                key.metadata = serde_json::from_str::<BTreeMap<String, String>>(text).map_err(|_| {
                    "write a JSON object of texts, such as {\"team\": \"billing\"}".to_owned()
                })?;
            }
            ImportColumn::EntropyBits => {
                let bits =
                    text.parse().map_err(|_| "write the bits as a whole number, such as 128".to_owned());
                key.entropy_bits = Some(bits?);
            }
            ImportColumn::ExpiresAt => self.set_expiry(cell::parse_expiry(text)?),
            ImportColumn::Active => self.is_inactive |= !cell::parse_bool(text)?,
            ImportColumn::Inactive => self.is_inactive |= cell::parse_bool(text)?,
            ImportColumn::InactiveSince => match cell::parse_deactivated_at(text)? {
                DeactivatedAt::NotDeactivated => {}
                DeactivatedAt::Unknown => self.is_inactive = true,
                DeactivatedAt::At(instant) => {
                    let is_later = |other: &prost_types::Timestamp| other.seconds >= instant.seconds;
                    self.inactive_since = self.inactive_since.filter(is_later).or(Some(instant));
                }
            },
            ImportColumn::Unnamed => return Err("the header gives this column no name".to_owned()),
            _ => {}
        }
        Ok(())
    }

    /// Sets a column that is a list.
    fn set_list(&mut self, column: ImportColumn, values: Vec<String>) -> Result<(), String> {
        if values.is_empty() {
            self.empty_lists.push(column);
        }
        let key = &mut self.key;
        match column {
            ImportColumn::Scopes => key.scopes = values,
            ImportColumn::Roles => key.roles = values,
            ImportColumn::Customers => key.customers = values,
            ImportColumn::AllowedCidrs => key.allowed_cidrs = values,
            ImportColumn::RateLimits => {
                key.rate_limits =
                    values.iter().map(|value| parse_rate_limit(value)).collect::<Result<_, _>>()?;
            }
            _ => return Err("is not a list".to_owned()),
        }
        Ok(())
    }

    /// Sets a column from a field of a JSON object.
    pub(super) fn set_json(&mut self, column: ImportColumn, value: Value) -> Result<(), String> {
        let words = |values: Vec<Value>| {
            let words = values.into_iter().map(|value| match value {
                Value::String(word) => Ok(word),
                _ => Err("write an array of texts".to_owned()),
            });
            words.collect::<Result<Vec<String>, String>>()
        };
        match (value, column) {
            (Value::Null, _) | (_, ImportColumn::Ignored) => Ok(()),
            (Value::String(text), column) => self.set_text(column, &text),
            (Value::Number(number), column) if column.may_be_number() => {
                self.set_text(column, &number.to_string())
            }
            (
                Value::Bool(value),
                ImportColumn::Active | ImportColumn::Inactive | ImportColumn::InactiveSince,
            ) => self.set_text(column, &value.to_string()),
            (Value::Array(values), column) if column.is_list() => self.set_list(column, words(values)?),
            (object @ Value::Object(_), ImportColumn::Metadata) => self.set_text(column, &object.to_string()),
            (_, column) if column.is_list() => Err("write an array of texts".to_owned()),
            (_, ImportColumn::Metadata) => Err("write an object of texts".to_owned()),
            _ => Err("write a text".to_owned()),
        }
    }

    fn set_expiry(&mut self, expiry: ExpiryArg) {
        self.has_expiry = true;
        (self.key.expires_at, self.key.ttl) = match expiry {
            ExpiryArg::Never => (None, None),
            ExpiryArg::In(life) => (None, Some(duration_to_proto(life))),
            ExpiryArg::At(instant) => (Some(instant), None),
        };
    }

    /// Refuses an explicitly empty list that a default would fill, because an empty list differs from an unset column.
    fn check_empty_lists(&self, defaults: &RowDefaultArgs) -> Result<(), String> {
        let grants_nothing = self.key.scopes.is_empty() && self.key.roles.is_empty();
        let has_grants = !defaults.scopes.is_empty() || !defaults.roles.is_empty();
        let filled = |column: &ImportColumn| match column {
            ImportColumn::Scopes | ImportColumn::Roles => grants_nothing && has_grants,
            ImportColumn::Customers => !defaults.customers.is_empty(),
            ImportColumn::AllowedCidrs => !defaults.allowed_cidrs.is_empty(),
            ImportColumn::RateLimits => !defaults.rate_limits.is_empty(),
            _ => false,
        };
        match self.empty_lists.iter().find(|column| filled(column)) {
            Some(column) => Err(format!(
                "{}: is an empty list, which no default replaces; leave it out or empty to take the default",
                column.first_name()
            )),
            None => Ok(()),
        }
    }

    /// Completes the key with the defaults for unset columns.
    pub(super) fn into_key(
        mut self,
        defaults: &RowDefaultArgs,
        now: Timestamp,
    ) -> Result<pb::ImportKey, RowSkipReason> {
        if self.is_inactive || self.inactive_since.is_some_and(|since| is_past(&since, now)) {
            return Err(RowSkipReason::Inactive);
        }
        if self.inactive_since.is_some() {
            return Err(RowSkipReason::Unreadable(ERR_STILL_ACTIVE.to_owned()));
        }
        if self.key.expires_at.is_some_and(|end| is_past(&end, now)) {
            return Err(RowSkipReason::Expired);
        }
        if self.key.sha256.is_empty() {
            return Err(RowSkipReason::Unreadable("sha256: is missing".to_owned()));
        }
        self.check_empty_lists(defaults)?;
        let expires = defaults.expires.filter(|_| !self.has_expiry);
        expires.into_iter().for_each(|expiry| self.set_expiry(expiry));
        let key = &mut self.key;
        if key.account.is_empty() && key.user.is_empty() {
            key.account = defaults.account.clone().unwrap_or_default();
            key.user = defaults.user.clone().unwrap_or_default();
        }
        // Scopes and roles together, so that defaults never add to a row's own grants.
        if key.scopes.is_empty() && key.roles.is_empty() {
            key.scopes.clone_from(&defaults.scopes);
            key.roles.clone_from(&defaults.roles);
        }
        if key.environment.is_empty() {
            key.environment = defaults.environment.clone().unwrap_or_default();
        }
        fill_if_empty(&mut key.customers, &defaults.customers);
        fill_if_empty(&mut key.allowed_cidrs, &defaults.allowed_cidrs);
        fill_if_empty(&mut key.rate_limits, &defaults.rate_limits);
        if key.metadata.is_empty() {
            key.metadata = defaults.metadata.iter().cloned().collect();
        }
        key.quota = key.quota.or(defaults.quota);
        key.entropy_bits = key.entropy_bits.or(defaults.entropy_bits);
        Ok(self.key)
    }
}

fn fill_if_empty<T: Clone>(list: &mut Vec<T>, default: &Vec<T>) {
    if list.is_empty() {
        list.clone_from(default);
    }
}

fn is_past(instant: &prost_types::Timestamp, now: Timestamp) -> bool {
    let micros = i128::from(instant.seconds) * 1_000_000 + i128::from(instant.nanos) / 1_000;
    micros <= i128::from(now.as_micros())
}

/// Flags with the values for columns that a row leaves empty.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Defaults for empty columns")]
pub(super) struct RowDefaultArgs {
    /// The account that owns the key, unless the row names an account or a user
    #[arg(long, value_name = "ID", conflicts_with = "user")]
    account: Option<String>,
    /// The user that owns the key, unless the row names an account or a user
    #[arg(long, value_name = "ID")]
    user: Option<String>,
    /// The one environment in which the key works
    #[arg(long, short, value_name = "NAME")]
    environment: Option<String>,
    /// Scope to grant if the row has neither scopes nor roles (repeat, or separate by commas)
    #[arg(long = "scope", short, value_name = "SCOPE", value_delimiter = ',')]
    scopes: Vec<String>,
    /// Role to grant if the row has neither scopes nor roles (repeat, or separate by commas)
    #[arg(long = "role", value_name = "ROLE", value_delimiter = ',')]
    roles: Vec<String>,
    /// When the key ends: a duration from now (90d, 1y), an instant (RFC 3339), or never
    #[arg(long, value_name = "WHEN", value_parser = ExpiryArg::parse)]
    expires: Option<ExpiryArg>,
    /// Restrict the key to this customer (repeat, or separate by commas)
    #[arg(long = "customer", value_name = "ID", value_delimiter = ',')]
    customers: Vec<String>,
    /// Restrict the key to client addresses of this network (repeat, or separate by commas)
    #[arg(long = "allow-cidr", value_name = "CIDR", value_delimiter = ',')]
    allowed_cidrs: Vec<String>,
    /// Rate limit, such as calls=100/1m (repeatable)
    #[arg(long = "rate-limit", value_name = "NAME=LIMIT/WINDOW", value_parser = parse_rate_limit)]
    rate_limits: Vec<pb::RateLimit>,
    /// Quota per hour, day, month (UTC) or total, such as 1000/month
    #[arg(long, value_name = "LIMIT/PERIOD", value_parser = parse_quota)]
    quota: Option<pb::Quota>,
    /// Metadata of the key, such as source=legacy (repeatable)
    #[arg(long, value_name = "NAME=VALUE", value_parser = parse_name_value)]
    metadata: Vec<(String, String)>,
    /// The least entropy of a token in bits, if known; must be 112 or more
    #[arg(long, value_name = "BITS")]
    entropy_bits: Option<u32>,
}

impl RowDefaultArgs {
    /// Refuses an expiry that would skip every row.
    pub(super) fn check_expiry(&self, now: Timestamp) -> Result<(), CliError> {
        match self.expires {
            Some(ExpiryArg::At(end)) if is_past(&end, now) => {
                Err(CliError::new("--expires is in the past; name an instant in the future, or never"))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{super::column::COLUMN_NAMES, *};

    const NOW: Timestamp = Timestamp::from_micros(10_000_000);
    const HEX: &str = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08";

    fn defaults() -> RowDefaultArgs {
        RowDefaultArgs {
            account: Some("acme".into()),
            environment: Some("production".into()),
            scopes: vec!["all".into()],
            expires: Some(ExpiryArg::In(std::time::Duration::from_secs(60))),
            customers: vec!["c1".into()],
            ..RowDefaultArgs::default()
        }
    }

    fn drafted(cells: &[(ImportColumn, &str)]) -> pb::ImportKey {
        let mut draft = KeyDraft::default();
        for (column, text) in cells {
            draft.set_text(*column, text).unwrap();
        }
        draft.set_text(ImportColumn::Sha256, HEX).unwrap();
        draft.into_key(&defaults(), NOW).unwrap()
    }

    #[test]
    fn a_list_is_read_in_every_notation_in_every_column_that_holds_one() {
        let key = drafted(&[
            (ImportColumn::Scopes, " a:b;c:d , e:f; "),
            (ImportColumn::RateLimits, "{calls=5/1m,burst=9/1s}"),
        ]);
        assert_eq!(key.scopes, ["a:b", "c:d", "e:f"]);
        assert_eq!(key.rate_limits.len(), 2);
    }

    #[test]
    fn a_key_that_has_expired_or_does_not_work_is_skipped_and_no_error() {
        let outcome = |column, text: &str| {
            let mut draft = KeyDraft::default();
            draft.set_text(ImportColumn::Sha256, HEX).unwrap();
            draft.set_text(column, text).unwrap();
            draft.into_key(&defaults(), NOW).err()
        };
        for (column, text, expected) in [
            (ImportColumn::ExpiresAt, "1970-01-01T00:00:10Z", Some(RowSkipReason::Expired)),
            (ImportColumn::ExpiresAt, "1970-01-01T00:00:11Z", None),
            (ImportColumn::Active, "f", Some(RowSkipReason::Inactive)),
            (ImportColumn::Active, "TRUE", None),
            (ImportColumn::Inactive, "1", Some(RowSkipReason::Inactive)),
            (ImportColumn::Inactive, "no", None),
            (ImportColumn::InactiveSince, "1970-01-01T00:00:05Z", Some(RowSkipReason::Inactive)),
            (ImportColumn::InactiveSince, "\\N", None),
            (ImportColumn::InactiveSince, "true", Some(RowSkipReason::Inactive)),
            (
                ImportColumn::InactiveSince,
                "1801353600",
                Some(RowSkipReason::Unreadable(ERR_STILL_ACTIVE.to_owned())),
            ),
        ] {
            assert_eq!(outcome(column, text), expected, "{column:?} {text}");
        }
        let past = RowDefaultArgs { expires: Some(cell::parse_expiry("1970-01-01").unwrap()), ..defaults() };
        assert!(past.check_expiry(NOW).is_err() && defaults().check_expiry(NOW).is_ok());
    }

    #[test]
    fn a_tokens_strength_is_the_rows_or_the_flags() {
        let strong = RowDefaultArgs { entropy_bits: Some(256), ..defaults() };
        let bits = |cells: &[(ImportColumn, &str)]| {
            let mut draft = KeyDraft::default();
            cells.iter().for_each(|(column, text)| draft.set_text(*column, text).unwrap());
            draft.set_text(ImportColumn::Sha256, HEX).unwrap();
            draft.into_key(&strong, NOW).unwrap().entropy_bits
        };
        assert_eq!((bits(&[]), bits(&[(ImportColumn::EntropyBits, "128")])), (Some(256), Some(128)));
        for bad in ["-1", "12.5", "many", "4294967296"] {
            assert!(
                KeyDraft::default()
                    .set_text(ImportColumn::EntropyBits, bad)
                    .unwrap_err()
                    .contains("whole number"),
                "{bad}"
            );
        }
    }

    #[test]
    fn a_default_fills_only_what_the_row_leaves_open() {
        let key = drafted(&[]);
        assert_eq!((key.account.as_str(), key.environment.as_str()), ("acme", "production"));
        assert_eq!((key.scopes, key.ttl.map(|ttl| ttl.seconds)), (vec!["all".to_owned()], Some(60)));
        let key = drafted(&[
            (ImportColumn::User, "ada"),
            (ImportColumn::Roles, "agent"),
            (ImportColumn::Customers, "c2"),
        ]);
        assert_eq!((key.account.as_str(), key.user.as_str()), ("", "ada"), "one owner, and the row's");
        assert!(key.scopes.is_empty(), "a row that grants something is not given more");
        assert_eq!(key.customers, ["c2"]);
    }

    #[test]
    fn a_row_that_says_never_never_ends_whatever_the_default() {
        let key = drafted(&[(ImportColumn::ExpiresAt, "never")]);
        assert_eq!((key.expires_at, key.ttl), (None, None));
        let key = drafted(&[(ImportColumn::ExpiresAt, "1970-01-01T00:01:00Z")]);
        assert_eq!((key.expires_at.map(|at| at.seconds), key.ttl), (Some(60), None));
    }

    #[test]
    fn a_list_that_a_row_says_is_empty_is_not_filled_by_a_default() {
        let outcome = |column: ImportColumn, value: Value, defaults: &RowDefaultArgs| {
            let mut draft = KeyDraft::default();
            draft.set_text(ImportColumn::Sha256, HEX).unwrap();
            draft.set_json(column, value).unwrap();
            draft.into_key(defaults, NOW)
        };
        let all = RowDefaultArgs {
            roles: vec!["admin".into()],
            allowed_cidrs: vec!["10.0.0.0/8".into()],
            rate_limits: vec![parse_rate_limit("calls=5/1m").unwrap()],
            ..defaults()
        };
        for (name, column) in COLUMN_NAMES.iter().filter(|(_, column)| column.is_list()) {
            for empty in [json!("{}"), json!("[]"), json!(" , "), json!([])] {
                match outcome(*column, empty.clone(), &all) {
                    Err(RowSkipReason::Unreadable(problem)) => {
                        assert!(problem.starts_with(&format!("{name}: is an empty list")), "{problem}");
                    }
                    other => panic!("{name} {empty}: {other:?}"),
                }
                let key = outcome(*column, empty, &RowDefaultArgs::default()).unwrap();
                assert!(key.scopes.is_empty() && key.roles.is_empty(), "{name}");
            }
            for absent in [json!(""), json!(null), json!("\\N")] {
                let key = outcome(*column, absent, &all).unwrap();
                assert_eq!((key.scopes.len(), key.roles.len(), key.customers.len()), (1, 1, 1), "{name}");
            }
        }
        let mut draft = KeyDraft::default();
        draft.set_json(ImportColumn::Scopes, json!([])).unwrap();
        draft.set_json(ImportColumn::Roles, json!(["agent"])).unwrap();
        draft.set_text(ImportColumn::Sha256, HEX).unwrap();
        assert_eq!(draft.into_key(&all, NOW).unwrap().roles, ["agent"], "it grants something");
    }

    #[test]
    fn only_an_instant_or_a_truth_value_takes_a_key_out_of_service() {
        let outcome = |value: Value| {
            let mut draft = KeyDraft::default();
            draft.set_text(ImportColumn::Sha256, HEX).unwrap();
            draft.set_json(ImportColumn::InactiveSince, value)?;
            draft
                .into_key(&defaults(), Timestamp::from_micros(1_801_353_600_000_000))
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
        let mut draft = KeyDraft::default();
        draft.set_json(ImportColumn::Scopes, json!(["a:b", "c:d"])).unwrap();
        draft.set_json(ImportColumn::Metadata, json!({ "team": "x;y z" })).unwrap();
        draft.set_json(ImportColumn::Name, Value::Null).unwrap();
        draft.set_json(ImportColumn::ExpiresAt, json!(1_801_353_600)).unwrap();
        draft.set_json(ImportColumn::EntropyBits, json!(128)).unwrap();
        draft.set_json(ImportColumn::Active, json!(true)).unwrap();
        draft.set_json(ImportColumn::Sha256, json!(HEX)).unwrap();
        let key = draft.into_key(&RowDefaultArgs::default(), NOW).unwrap();
        assert_eq!((key.scopes.len(), key.metadata["team"].as_str(), key.name), (2, "x;y z", None));
        assert_eq!(
            (key.expires_at.map(|end| end.seconds), key.entropy_bits),
            (Some(1_801_353_600), Some(128))
        );
        for (column, bad) in [
            (ImportColumn::Scopes, json!([1])),
            (ImportColumn::Scopes, json!(true)),
            (ImportColumn::Name, json!(["a"])),
            (ImportColumn::Metadata, json!({ "a": 1 })),
            (ImportColumn::Name, json!(7)),
            (ImportColumn::ExpiresAt, json!(true)),
            (ImportColumn::Sha256, json!(7)),
        ] {
            assert!(KeyDraft::default().set_json(column, bad).is_err(), "{column:?}");
        }
    }

    #[test]
    fn a_row_without_a_digest_is_no_key() {
        let missing = RowSkipReason::Unreadable("sha256: is missing".to_owned());
        assert_eq!(KeyDraft::default().into_key(&defaults(), NOW).unwrap_err(), missing);
    }
}
