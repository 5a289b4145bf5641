//! Reads most of the log and of the keys, as a verification does.
//!
//! A reader may keep state between pages. Each page shows what was committed when it was read, not one revision.

use async_trait::async_trait;

use crate::domain::{key::ApiKey, log::LogEntry, name::KeyId, time::Revision};

use super::error::StoreError;

/// Reads pages of the log and the keys that it concerns. Its memory is bounded, however large the tables are.
#[async_trait]
pub trait BulkReader: Send {
    /// The log after `revision`, as [`Store::list_log_after`](super::Store::list_log_after) returns it.
    async fn log_after(&mut self, revision: Revision, limit: u32) -> Result<Vec<LogEntry>, StoreError>;

    /// The keys with these ids, which must be ascending, in that order; missing ones are left out.
    ///
    /// A key that changed after this reader was created may come with the secrets that it had then.
    async fn keys_at(&mut self, ids: &[KeyId]) -> Result<Vec<ApiKey>, StoreError>;

    /// The ids above `after` with the revisions of their records, in ascending order; at most `limit`. Nothing else of
    /// the records is read, and their checksums are not verified.
    async fn key_revisions(
        &mut self,
        after: Option<KeyId>,
        limit: u32,
    ) -> Result<Vec<(KeyId, Revision)>, StoreError>;
}
