//! One row of an import: its columns read into the key that the request holds, and what it lacks filled in.
//!
//! No message here repeats a value: a file that holds tokens by mistake must not spread them.

use std::collections::BTreeMap;

use base64::{
    Engine as _, alphabet,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};
use clap::Args;
use serde_json::Value;

use crate::{
    cli::values::{Expiry, pair, proto_duration, quota, rate_limit},
    pb,
};

/// A column of a CSV file or a field of a JSON line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Column {
    Account,
    User,
    Environment,
    Name,
    Scopes,
    Roles,
    ExpiresAt,
    Customers,
    AllowedCidrs,
    RateLimits,
    Quota,
    Metadata,
    Sha256,
    Hint,
    /// Written beside a rejected row; so a file of them can be put right and imported.
    Remark,
}

/// All that a file may hold, as `--help` lists it.
const COLUMNS: [(&str, Column); 17] = [
    ("account", Column::Account),
    ("user", Column::User),
    ("environment", Column::Environment),
    ("name", Column::Name),
    ("scopes", Column::Scopes),
    ("roles", Column::Roles),
    ("expires_at", Column::ExpiresAt),
    ("customers", Column::Customers),
    ("allowed_cidrs", Column::AllowedCidrs),
    ("rate_limits", Column::RateLimits),
    ("quota", Column::Quota),
    ("metadata", Column::Metadata),
    ("sha256", Column::Sha256),
    ("hint", Column::Hint),
    ("line", Column::Remark),
    ("error", Column::Remark),
    ("message", Column::Remark),
];

impl Column {
    pub(super) fn parse(name: &str) -> Option<Column> {
        COLUMNS.iter().find(|(known, _)| *known == name).map(|(_, column)| *column)
    }

    /// Its name.
    pub(super) fn name(self) -> &'static str {
        COLUMNS.iter().find(|(_, column)| *column == self).map_or("", |(name, _)| *name)
    }

    /// The names for an error message.
    pub(super) fn names() -> String {
        let names = COLUMNS.iter().filter(|(_, column)| *column != Column::Remark).map(|(name, _)| *name);
        names.collect::<Vec<_>>().join(", ")
    }

    fn is_list(self) -> bool {
        use Column::{AllowedCidrs, Customers, RateLimits, Roles, Scopes};
        matches!(self, Scopes | Roles | Customers | AllowedCidrs | RateLimits)
    }
}

/// A row on its way to become a key.
#[derive(Debug, Default)]
pub(super) struct Draft {
    key: pb::ImportKey,
    /// Whether the row says when the key ends, be it never.
    says_expiry: bool,
}

impl Draft {
    /// Takes a field that is text. Empty means that the row says nothing.
    pub(super) fn text(&mut self, column: Column, text: &str) -> Result<(), String> {
        let text = text.trim();
        if text.is_empty() {
            return Ok(());
        }
        if column.is_list() {
            let words = text.split(|c: char| c.is_whitespace() || c == ';').filter(|word| !word.is_empty());
            return self.list(column, words.map(str::to_owned).collect());
        }
        let key = &mut self.key;
        match column {
            Column::Account => text.clone_into(&mut key.account),
            Column::User => text.clone_into(&mut key.user),
            Column::Environment => text.clone_into(&mut key.environment),
            Column::Name => key.name = Some(text.to_owned()),
            Column::Hint => text.clone_into(&mut key.hint),
            Column::Sha256 => key.sha256 = digest(text)?,
            Column::Quota => key.quota = Some(quota(text)?),
            Column::Metadata => {
                key.metadata = serde_json::from_str::<BTreeMap<String, String>>(text).map_err(|_| {
                    "write a JSON object of texts, such as {\"team\": \"billing\"}".to_owned()
                })?;
            }
            Column::ExpiresAt => self.expires(Expiry::parse(text)?),
            _ => {}
        }
        Ok(())
    }

    /// Takes a field that is a list.
    fn list(&mut self, column: Column, values: Vec<String>) -> Result<(), String> {
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

    /// Takes a field of a JSON line.
    pub(super) fn json(&mut self, column: Column, value: Value) -> Result<(), String> {
        let words = |values: Vec<Value>| {
            let words = values.into_iter().map(|value| match value {
                Value::String(word) => Ok(word),
                _ => Err("write an array of texts".to_owned()),
            });
            words.collect::<Result<Vec<String>, String>>()
        };
        match (value, column) {
            (Value::Null, _) | (_, Column::Remark) => Ok(()),
            (Value::String(text), column) => self.text(column, &text),
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

    /// The key, with the defaults where the row says nothing.
    pub(super) fn finish(mut self, defaults: &DefaultArgs) -> Result<pb::ImportKey, String> {
        if self.key.sha256.is_empty() {
            return Err("sha256: is missing".to_owned());
        }
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
        Ok(self.key)
    }
}

fn or<T: Clone>(list: &mut Vec<T>, default: &Vec<T>) {
    if list.is_empty() {
        list.clone_from(default);
    }
}

/// Reads 64 hexadecimal digits, or base64 of either alphabet with or without its padding.
fn digest(text: &str) -> Result<Vec<u8>, String> {
    let wanted = || "write the SHA-256 of the whole token: 64 hexadecimal digits, or base64".to_owned();
    if text.len() == 64 {
        let pair = |pair: &[u8]| u8::from_str_radix(str::from_utf8(pair).ok()?, 16).ok();
        let good = text.bytes().all(|byte| byte.is_ascii_hexdigit());
        let bytes = good.then(|| text.as_bytes().chunks(2).map(pair).collect::<Option<Vec<u8>>>());
        return bytes.flatten().ok_or_else(wanted);
    }
    let any_padding = GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent);
    let text = text.replace('-', "+").replace('_', "/");
    let bytes = GeneralPurpose::new(&alphabet::STANDARD, any_padding).decode(text).map_err(|_| wanted())?;
    if bytes.len() == 32 { Ok(bytes) } else { Err(wanted()) }
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
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

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
        draft.finish(&defaults()).unwrap()
    }

    #[test]
    fn a_digest_is_hexadecimal_or_base64() {
        let bytes = digest(HEX).unwrap();
        let base64 = "n4bQgYhMfWWaL+qgxVrQFaO/TxsrC4Is0V1sFbDwCgg=";
        let url_safe = base64.replace('+', "-").replace('/', "_");
        for text in [&HEX.to_uppercase(), base64, base64.trim_end_matches('='), &url_safe] {
            assert_eq!(digest(text).as_ref(), Ok(&bytes), "{text}");
        }
        for bad in ["", "x", &HEX[1..], &format!("{}é", &HEX[2..]), "kw_live_abc", "AAAA"] {
            let error = digest(bad).unwrap_err();
            assert!(
                error.contains("SHA-256") && (bad.is_empty() || bad == "x" || !error.contains(bad)),
                "{error}"
            );
        }
    }

    #[test]
    fn lists_in_text_are_separated_by_blanks_or_semicolons() {
        let key = drafted(&[(Column::Scopes, " a:b;c:d  e:f; "), (Column::RateLimits, "calls=5/1m")]);
        assert_eq!(key.scopes, ["a:b", "c:d", "e:f"]);
        assert_eq!(key.rate_limits.len(), 1);
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
    fn json_says_the_same_with_arrays_and_objects() {
        let mut draft = Draft::default();
        draft.json(Column::Scopes, json!(["a:b", "c:d"])).unwrap();
        draft.json(Column::Metadata, json!({ "team": "x;y z" })).unwrap();
        draft.json(Column::Name, Value::Null).unwrap();
        draft.json(Column::Sha256, json!(HEX)).unwrap();
        let key = draft.finish(&DefaultArgs::default()).unwrap();
        assert_eq!((key.scopes.len(), key.metadata["team"].as_str(), key.name), (2, "x;y z", None));
        for (column, bad) in [
            (Column::Scopes, json!([1])),
            (Column::Scopes, json!(true)),
            (Column::Name, json!(["a"])),
            (Column::Metadata, json!({ "a": 1 })),
            (Column::Sha256, json!(7)),
        ] {
            assert!(Draft::default().json(column, bad).is_err(), "{column:?}");
        }
    }

    #[test]
    fn a_row_without_a_digest_is_no_key() {
        assert_eq!(Draft::default().finish(&defaults()).unwrap_err(), "sha256: is missing");
    }
}
