//! The columns of an import: what they are, the names that a file may use for them, and the flags that say more.

use clap::Args;

use crate::cli::values::pair;

/// A column of a CSV file or a field of a JSON object.
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
    EntropyBits,
    /// Whether the key works.
    Active,
    /// Whether the key does not work.
    Inactive,
    /// Since when the key does not work; empty if it does.
    InactiveSince,
    /// Left out. Rejected rows have such columns, so that a file of them can be put right and imported.
    Ignored,
    /// A column without a name, as spreadsheets add them: it must be empty.
    Unnamed,
}

/// The names that a file may use, as `--help` lists them.
pub(super) const COLUMNS: [(&str, Column); 24] = [
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
    ("entropy_bits", Column::EntropyBits),
    ("active", Column::Active),
    ("enabled", Column::Active),
    ("revoked", Column::Inactive),
    ("disabled", Column::Inactive),
    ("revoked_at", Column::InactiveSince),
    ("disabled_at", Column::InactiveSince),
    ("line", Column::Ignored),
    ("error", Column::Ignored),
    ("message", Column::Ignored),
];

impl Column {
    /// The column with this name, however it is spelt: `expires_at`, `Expires At`, `expiresAt`.
    pub(super) fn parse(name: &str) -> Option<Column> {
        let name = normalized(name);
        COLUMNS.iter().find(|(known, _)| normalized(known) == name).map(|(_, column)| *column)
    }

    /// The names for an error message.
    pub(super) fn names() -> String {
        let names = COLUMNS.iter().filter(|(_, column)| *column != Column::Ignored).map(|(name, _)| *name);
        names.collect::<Vec<_>>().join(", ")
    }

    /// Its first name.
    pub(super) fn name(self) -> &'static str {
        COLUMNS.iter().find(|(_, column)| *column == self).map_or("", |(name, _)| *name)
    }

    /// Whether a file may have more than one of it.
    pub(super) fn may_repeat(self) -> bool {
        use Column::{Active, Ignored, Inactive, InactiveSince, Unnamed};
        matches!(self, Active | Inactive | InactiveSince | Ignored | Unnamed)
    }

    pub(super) fn may_be_number(self) -> bool {
        use Column::{Active, EntropyBits, ExpiresAt, Inactive, InactiveSince};
        matches!(self, ExpiresAt | EntropyBits | Active | Inactive | InactiveSince)
    }

    pub(super) fn is_list(self) -> bool {
        use Column::{AllowedCidrs, Customers, RateLimits, Roles, Scopes};
        matches!(self, Scopes | Roles | Customers | AllowedCidrs | RateLimits)
    }
}

/// A column's name without case, blanks and punctuation.
fn normalized(name: &str) -> String {
    name.chars().filter(|c| c.is_alphanumeric()).flat_map(char::to_lowercase).collect()
}

/// Which of the file's columns mean what, beyond what their names say.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Columns with other names")]
pub(super) struct ColumnArgs {
    /// Read the file's column THEIRS as the column OURS (repeatable)
    #[arg(long = "rename", value_name = "THEIRS=OURS", value_parser = renaming)]
    renamed: Vec<(String, Column)>,
    /// Leave out the file's column NAME (repeatable)
    #[arg(long = "ignore", value_name = "NAME")]
    ignored: Vec<String>,
}

impl ColumnArgs {
    /// The flags as they are written, each with the file's column that it names.
    pub(super) fn flags(&self) -> Vec<(String, &str)> {
        let renamed = self.renamed.iter().map(|(theirs, _)| (format!("--rename {theirs}"), theirs.as_str()));
        let ignored = self.ignored.iter().map(|name| (format!("--ignore {name}"), name.as_str()));
        renamed.chain(ignored).collect()
    }

    /// What a column of the file is.
    pub(super) fn resolve(&self, name: &str) -> Option<Column> {
        let is = |other: &str| is_same_name(name, other);
        if name.trim().is_empty() {
            return Some(Column::Unnamed);
        }
        if self.ignored.iter().any(|ignored| is(ignored)) {
            return Some(Column::Ignored);
        }
        let renamed = self.renamed.iter().find(|(theirs, _)| is(theirs)).map(|(_, ours)| *ours);
        renamed.or_else(|| Column::parse(name))
    }
}

/// Whether two names of columns are one, however they are spelt.
pub(super) fn is_same_name(one: &str, other: &str) -> bool {
    let spelt = normalized(one);
    one.trim() == other.trim() || !spelt.is_empty() && spelt == normalized(other)
}

fn renaming(text: &str) -> Result<(String, Column), String> {
    let (theirs, ours) = pair(text).map_err(|_| "write THEIRS=OURS, such as key_hash=sha256".to_owned())?;
    let column = Column::parse(&ours)
        .ok_or_else(|| format!("{ours:?} is no column; the columns are {}", Column::names()))?;
    Ok((theirs, column))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_column_is_known_by_its_name_however_it_is_spelt_and_by_what_the_flags_say() {
        for name in ["expires_at", " Expires At ", "EXPIRES-AT", "expiresAt"] {
            assert_eq!(Column::parse(name), Some(Column::ExpiresAt), "{name}");
        }
        let names = ColumnArgs {
            renamed: vec![renaming("key_hash=sha256").unwrap()],
            ignored: vec!["Created At".into(), "#".into()],
        };
        for (name, column) in [
            ("Key Hash", Some(Column::Sha256)),
            ("created_at", Some(Column::Ignored)),
            ("#", Some(Column::Ignored)),
            ("", Some(Column::Unnamed)),
            ("name", Some(Column::Name)),
            ("?", None),
            ("id", None),
        ] {
            assert_eq!(names.resolve(name), column, "{name:?}");
        }
        assert!(renaming("key_hash").is_err() && renaming("a=b").unwrap_err().contains("account, user"));
    }
}
