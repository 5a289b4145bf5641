//! Records that reads return, and the filters of lists.

use crate::domain::{
    key::{ApiKey, ApiKeyState},
    log::ChainHash,
    name::{AccountId, EnvironmentName, KeyId, UserId},
    time::{Revision, Timestamp},
};

/// The end of the log: its newest revision and that entry's hash.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogHead {
    /// The newest revision; 0 for an empty log.
    pub revision: Revision,
    /// The hash of the entry at `revision`; the genesis hash for an empty log.
    pub hash: ChainHash,
}

/// A key with the last use of each of its secrets.
#[derive(Clone, Debug)]
pub struct StoredKey {
    /// The record, with the secrets that belong to it.
    pub key: ApiKey,
    /// Secret versions with the time of their last use; includes secrets that left the record.
    pub last_used: Vec<(u32, Timestamp)>,
}

/// Selects keys by their owner.
#[derive(Clone, Debug)]
pub enum OwnerFilter {
    /// Service keys that this account owns.
    Account(AccountId),
    /// Keys that this user owns.
    User(UserId),
    /// All keys except those of the operator account.
    ExceptOperator,
}

/// Selects keys; a key must match each condition.
#[derive(Clone, Debug)]
pub struct KeyFilter {
    /// The owner, which every list is restricted to.
    pub owner: OwnerFilter,
    /// If set, only keys of this environment.
    pub environment: Option<EnvironmentName>,
    /// Only keys in one of these states at `now`; if empty, keys in any state.
    pub states: Vec<ApiKeyState>,
    /// Only keys whose name starts with this text, in Unicode Normalization Form C.
    pub name_prefix: String,
    /// If set, only keys that were created before this time and not used since.
    pub unused_since: Option<Timestamp>,
    /// If set, only keys that expire before this time.
    pub expires_before: Option<Timestamp>,
    /// If set, only keys that were created before this time.
    pub created_before: Option<Timestamp>,
    /// The time at which states are evaluated.
    pub now: Timestamp,
}

/// Selects entries of the log; an entry must match each condition that is set.
#[derive(Clone, Debug, Default)]
pub struct LogFilter {
    /// Only entries that concern this account.
    pub account: Option<AccountId>,
    /// Only entries that concern this key.
    pub key_id: Option<KeyId>,
    /// Only entries made by this actor, in its text form.
    pub actor: Option<String>,
    /// Only entries at this time or later.
    pub from: Option<Timestamp>,
    /// Only entries before this time.
    pub to: Option<Timestamp>,
    /// Only entries made on behalf of this user.
    pub acting_user: Option<UserId>,
    /// Only entries with this action, by its stable name.
    pub action: Option<String>,
    /// Only entries with a greater revision.
    pub after: Revision,
    /// Sorts by ascending revision; otherwise by descending revision.
    pub oldest_first: bool,
}

/// The point up to which the log was archived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ArchiveCheckpoint {
    /// The last archived entry. The next entry in the log links to its hash.
    pub head: LogHead,
    /// The number of entries in all archives together.
    pub entry_count: u64,
    /// The time at which the checkpoint was recorded.
    pub made_at: Timestamp,
}
