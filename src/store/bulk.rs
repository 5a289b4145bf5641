//! Reads that go through most of the log and of the keys, such as a verification. They may keep state from page to page,
//! and see what is committed when each page is read, not one revision.

use async_trait::async_trait;

use crate::domain::{key::ApiKey, log::LogEntry, name::KeyId, time::Revision};

use super::error::StoreError;

/// Reads pages of the log, and the keys that it is about. Memory is bounded whatever the size of the tables.
#[async_trait]
pub trait BulkReader: Send {
    /// The log after `revision`, in order, at most `limit` rows: as [`Store::log_after`](super::Store::log_after).
    async fn log_after(&mut self, revision: Revision, limit: u32) -> Result<Vec<LogEntry>, StoreError>;

    /// The keys with these ids, which must be in ascending order, in that order; those that there are.
    ///
    /// A key that was changed after this reader was made may come with the secrets that it had then.
    async fn keys_at(&mut self, ids: &[KeyId]) -> Result<Vec<ApiKey>, StoreError>;

    /// The id of each key after `after` with the revision of its record, in the order of ids, at most `limit`. The records
    /// are not read otherwise, and their checksums not looked at.
    async fn key_revisions(
        &mut self,
        after: Option<KeyId>,
        limit: u32,
    ) -> Result<Vec<(KeyId, Revision)>, StoreError>;
}
