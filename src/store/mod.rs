//! Stores accounts, keys, roles, members, usage and the log in SQLite or PostgreSQL.
//!
//! The trait [`Store`] is the contract. Nothing outside this folder names a backend or contains SQL.
//!
//! Each change is one [`WriteRequest`]: the whole record, the revision that the caller read, what was read to authorize
//! the change, and the fields of its log entry.
//!
//! Invariants:
//! - Writes are committed in batches. Each write of a batch is accepted or rejected by itself.
//! - Revisions count in commit order, without gaps. A reader that has applied revision `n` has seen each change up to `n`.
//! - A released migration never changes, not even its comments: its checksum is stored in each database.

mod backend;
mod bulk;
mod contract;
mod error;
pub mod group_commit;
pub mod inspect;
mod inspection;
mod log_fence;
mod open;
mod owner_tally;
pub mod page_budget;
mod parse_cache;
mod postgres;
mod pre_state;
mod queries;
mod read_set;
mod records;
pub mod replica_registry;
mod row_decoding;
mod row_format;
mod schema;
mod secret_join;
mod snapshot_loader;
mod sqlite;
mod usage_records;
mod write_plan;
mod write_request;

pub use bulk::{BulkReader, RowFault};
pub use contract::Store;
pub use error::{CommitError, OpenError, StoreError};
pub use open::{
    backup, check_reachable, check_url, migrate, open, open_existing, open_with_schema, open_without_wal,
    sqlite_file,
};
pub use read_set::{ReadSet, ReadState, RecordId};
pub use records::{ArchiveCheckpoint, KeyFilter, LogFilter, LogHead, OwnerFilter, StoredKey};
pub use schema::{MigrationStep, SchemaPolicy};
pub use snapshot_loader::{LoadedKey, SnapshotLoader, SnapshotPart, SnapshotRecord};
pub use usage_records::{SecretUse, UsageBatch, UsageCount, UsageHour};
pub use write_request::{
    CommittedBatch, IDEMPOTENCY_WINDOW, IdempotentRequest, WriteOutcome, WriteRejection, WriteRequest,
};
