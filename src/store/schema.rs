//! The database schema: its migration steps, what to do if it is old, and a check that both backends make before step 9.

use super::error::OpenError;

/// What to do where the schema is older than this program.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SchemaPolicy {
    /// Bring it up to date.
    #[default]
    Migrate,
    /// Do not open the store.
    RequireCurrent,
}

/// One step of the schema.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MigrationStep {
    /// Its number.
    pub version: i64,
    /// Its name.
    pub name: String,
}

/// Ids of accounts that differ in case alone, next to each other. Both stores read it before the step that makes an index
/// of them.
pub(super) const CASE_COLLISIONS: &str = "SELECT id FROM accounts WHERE lower(id) IN \
    (SELECT lower(id) FROM accounts GROUP BY lower(id) HAVING count(*) > 1) ORDER BY lower(id), id";

/// The most ids that an error names.
const MAX_NAMED_IDS: usize = 20;

/// Refuses ids of accounts that differ in case alone: `found` is what [`CASE_COLLISIONS`] gives.
///
/// # Errors
/// [`OpenError::Unsuitable`], with the ids and what to do, if there are any.
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
              database by hand, or go on with the version before and move what uses one of them to another account",
    })
}
