//! The database schema: its migration steps, the policy for an old schema, and the check before step 9.

use super::error::OpenError;

/// What to do if the schema is older than this program.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SchemaPolicy {
    /// Runs the missing migration steps.
    #[default]
    Migrate,
    /// Refuses to open the store.
    RequireCurrent,
}

/// One step of the schema, the same in both databases.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MigrationStep {
    /// The number of the step, counted from 1.
    pub version: i64,
    /// The name in the file of the step: `start` of `0001_start.sql`.
    pub name: String,
}

/// Selects ids of accounts that differ only in case, next to each other. Both backends run it before the step that adds
/// a unique index on folded ids.
pub(super) const CASE_COLLISIONS: &str = "SELECT id FROM accounts WHERE lower(id) IN \
    (SELECT lower(id) FROM accounts GROUP BY lower(id) HAVING count(*) > 1) ORDER BY lower(id), id";

/// How many ids the error names at most.
const MAX_NAMED_IDS: usize = 20;

/// Rejects ids of accounts that differ only in case; `found` is the result of [`CASE_COLLISIONS`].
///
/// # Errors
/// [`OpenError::Unsuitable`] with the ids and what to do, if there are any.
pub(super) fn check_account_ids(database: &str, found: &[String]) -> Result<(), OpenError> {
    if found.is_empty() {
        return Ok(());
    }
    let ids: Vec<_> = found.iter().take(MAX_NAMED_IDS).map(|id| format!("{id:?}")).collect();
    let more = found.len().saturating_sub(MAX_NAMED_IDS);
    let more = if more == 0 { String::new() } else { format!(" and {more} more") };
    Err(OpenError::Unsuitable {
        database: database.to_owned(),
        what: format!(
            "it has accounts whose ids differ in case alone, which migration 9 no longer allows: {}{more}",
            ids.join(", ")
        ),
        fix: "Nothing was migrated. No release makes such ids: restore a backup from before they were written into the \
              database by hand, or use the previous version and move what uses one of them to another account",
    })
}
