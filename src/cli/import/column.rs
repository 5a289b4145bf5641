//! The columns of an import: their names in a file, and the flags that map other names to them.

use clap::Args;

use crate::cli::value_format::parse_name_value;

/// A column of a CSV file or a field of a JSON object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ImportColumn {
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
    EntropyBits,
    /// A boolean: whether the key works.
    Active,
    /// A boolean: whether the key is revoked or disabled.
    Inactive,
    /// The instant since which the key has not worked; empty if it works.
    InactiveSince,
    /// A column that is not read. Files of rejected rows have some, so that they can be corrected and imported.
    Ignored,
    /// A column without a name, as spreadsheets add them. It must be empty.
    Unnamed,
}

/// The names that a file may use. `--help` lists all but the ignored ones.
pub(super) const COLUMN_NAMES: [(&str, ImportColumn); 24] = [
    ("account", ImportColumn::Account),
    ("user", ImportColumn::User),
    ("environment", ImportColumn::Environment),
    ("name", ImportColumn::Name),
    ("scopes", ImportColumn::Scopes),
    ("roles", ImportColumn::Roles),
    ("expires_at", ImportColumn::ExpiresAt),
    ("customers", ImportColumn::Customers),
    ("allowed_cidrs", ImportColumn::AllowedCidrs),
    ("rate_limits", ImportColumn::RateLimits),
    ("quota", ImportColumn::Quota),
    ("metadata", ImportColumn::Metadata),
    ("sha256", ImportColumn::Sha256),
    ("hint", ImportColumn::Hint),
    ("entropy_bits", ImportColumn::EntropyBits),
    ("active", ImportColumn::Active),
    ("enabled", ImportColumn::Active),
    ("revoked", ImportColumn::Inactive),
    ("disabled", ImportColumn::Inactive),
    ("revoked_at", ImportColumn::InactiveSince),
    ("disabled_at", ImportColumn::InactiveSince),
    ("line", ImportColumn::Ignored),
    ("error", ImportColumn::Ignored),
    ("message", ImportColumn::Ignored),
];

impl ImportColumn {
    /// Finds the column with this name in any spelling: `expires_at`, `Expires At`, `expiresAt`.
    pub(super) fn parse(name: &str) -> Option<ImportColumn> {
        let name = normalize_name(name);
        COLUMN_NAMES.iter().find(|(column, _)| normalize_name(column) == name).map(|(_, column)| *column)
    }

    /// Joins the names, without the ignored ones, for an error message.
    pub(super) fn list_names() -> String {
        let names =
            COLUMN_NAMES.iter().filter(|(_, column)| *column != ImportColumn::Ignored).map(|(name, _)| *name);
        names.collect::<Vec<_>>().join(", ")
    }

    pub(super) fn first_name(self) -> &'static str {
        COLUMN_NAMES.iter().find(|(_, column)| *column == self).map_or("", |(name, _)| *name)
    }

    /// Whether a file may have several such columns.
    pub(super) fn may_repeat(self) -> bool {
        use ImportColumn::{Active, Ignored, Inactive, InactiveSince, Unnamed};
        matches!(self, Active | Inactive | InactiveSince | Ignored | Unnamed)
    }

    pub(super) fn may_be_number(self) -> bool {
        use ImportColumn::{Active, EntropyBits, ExpiresAt, Inactive, InactiveSince};
        matches!(self, ExpiresAt | EntropyBits | Active | Inactive | InactiveSince)
    }

    pub(super) fn is_list(self) -> bool {
        use ImportColumn::{AllowedCidrs, Customers, RateLimits, Roles, Scopes};
        matches!(self, Scopes | Roles | Customers | AllowedCidrs | RateLimits)
    }
}

/// Removes case, blanks and punctuation from a column's name.
fn normalize_name(name: &str) -> String {
    name.chars().filter(|c| c.is_alphanumeric()).flat_map(char::to_lowercase).collect()
}

/// Flags that map the file's column names to columns.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Columns with other names")]
pub(super) struct ColumnNameArgs {
    /// Use the file's column THEIRS as the column OURS (repeatable)
    #[arg(long = "rename", value_name = "THEIRS=OURS", value_parser = parse_renaming)]
    renamed: Vec<(String, ImportColumn)>,
    /// Ignore the file's column NAME (repeatable)
    #[arg(long = "ignore", value_name = "NAME")]
    ignored: Vec<String>,
}

impl ColumnNameArgs {
    /// Returns the flags as a user writes them, each with the file's column that it names.
    pub(super) fn flags(&self) -> Vec<(String, &str)> {
        let renamed = self.renamed.iter().map(|(theirs, _)| (format!("--rename {theirs}"), theirs.as_str()));
        let ignored = self.ignored.iter().map(|name| (format!("--ignore {name}"), name.as_str()));
        renamed.chain(ignored).collect()
    }

    /// Returns the column that a name in the file means.
    pub(super) fn resolve(&self, name: &str) -> Option<ImportColumn> {
        let is = |other: &str| is_same_name(name, other);
        if name.trim().is_empty() {
            return Some(ImportColumn::Unnamed);
        }
        if self.ignored.iter().any(|ignored| is(ignored)) {
            return Some(ImportColumn::Ignored);
        }
        let renamed = self.renamed.iter().find(|(theirs, _)| is(theirs)).map(|(_, ours)| *ours);
        renamed.or_else(|| ImportColumn::parse(name))
    }
}

/// Whether two column names differ only in spelling.
pub(super) fn is_same_name(one: &str, other: &str) -> bool {
    let spelt = normalize_name(one);
    one.trim() == other.trim() || !spelt.is_empty() && spelt == normalize_name(other)
}

fn parse_renaming(text: &str) -> Result<(String, ImportColumn), String> {
    let (theirs, ours) =
        parse_name_value(text).map_err(|_| "write THEIRS=OURS, such as key_hash=sha256".to_owned())?;
    let column = ImportColumn::parse(&ours)
        .ok_or_else(|| format!("{ours:?} is not a column; the columns are {}", ImportColumn::list_names()))?;
    Ok((theirs, column))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_column_is_known_by_its_name_however_it_is_spelt_and_by_what_the_flags_say() {
        for name in ["expires_at", " Expires At ", "EXPIRES-AT", "expiresAt"] {
            assert_eq!(ImportColumn::parse(name), Some(ImportColumn::ExpiresAt), "{name}");
        }
        let names = ColumnNameArgs {
            renamed: vec![parse_renaming("key_hash=sha256").unwrap()],
            ignored: vec!["Created At".into(), "#".into()],
        };
        for (name, column) in [
            ("Key Hash", Some(ImportColumn::Sha256)),
            ("created_at", Some(ImportColumn::Ignored)),
            ("#", Some(ImportColumn::Ignored)),
            ("", Some(ImportColumn::Unnamed)),
            ("name", Some(ImportColumn::Name)),
            ("?", None),
            ("id", None),
        ] {
            assert_eq!(names.resolve(name), column, "{name:?}");
        }
        assert!(
            parse_renaming("key_hash").is_err()
                && parse_renaming("a=b").unwrap_err().contains("account, user")
        );
    }
}
