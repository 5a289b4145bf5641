//! Reads most of the log and of the keys, as a verification does.
//!
//! A reader may keep state between pages. Each page shows what was committed when it was read, not one revision.

use async_trait::async_trait;

use crate::domain::{key::ApiKey, log::LogEntry, name::KeyId, time::Revision, token::HexBytes};

use super::error::StoreError;

/// A row of the tables that is wrong beside its checksum.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RowFault {
    /// Which row, such as `key 0198…`.
    pub record: String,
    /// What is wrong with it.
    pub problem: &'static str,
}

impl RowFault {
    pub(super) fn secret_without_key(key_id: &[u8]) -> RowFault {
        let record = format!("secret of key {}", describe_key_id(key_id));
        RowFault { record, problem: "there is no key with this id" }
    }

    pub(super) fn wrong_normalized_name(key_id: &[u8]) -> RowFault {
        let record = format!("key {}", describe_key_id(key_id));
        RowFault { record, problem: "its normalized name is not the normalized form of its name" }
    }
}

/// How many bytes of an id of a wrong length are shown.
const MAX_SHOWN_ID_BYTES: usize = 32;

/// The id as the log has it, or in hex if it is none.
fn describe_key_id(bytes: &[u8]) -> String {
    match <[u8; 16]>::try_from(bytes) {
        Ok(id) => KeyId::from_bytes(id).to_string(),
        Err(_) => {
            let shown = HexBytes(&bytes[..bytes.len().min(MAX_SHOWN_ID_BYTES)]);
            format!("{shown} ({} bytes instead of 16)", bytes.len())
        }
    }
}

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

    /// Finds rows that no look at a key would find wrong: secrets without a key, and normalized names that are not those
    /// of their keys. At most `limit` of each kind.
    async fn find_row_faults(&mut self, limit: u32) -> Result<Vec<RowFault>, StoreError>;
}
