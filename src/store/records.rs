//! Records that reads return, and the filters of lists.

use crate::domain::{
    key::{ApiKey, ApiKeyState},
    log::ChainHash,
    name::{AccountId, EnvironmentName, KeyId, UserId},
    time::{Revision, Timestamp},
};

/// Where the log ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogHead {
    /// The newest revision.
    pub revision: Revision,
    /// Its hash.
    pub hash: ChainHash,
}

/// A key with what is known of its use.
#[derive(Clone, Debug)]
pub struct StoredKey {
    /// The record.
    pub key: ApiKey,
    /// When each secret version was last used, those that left the record included.
    pub last_used: Vec<(u32, Timestamp)>,
}

/// Whose keys.
#[derive(Clone, Debug)]
pub enum OwnerFilter {
    /// Service keys of this account.
    Account(AccountId),
    /// User keys of this user.
    User(UserId),
    /// Every key but those of the operator account.
    ExceptOperator,
}

/// Which keys of an owner.
#[derive(Clone, Debug)]
pub struct KeyFilter {
    /// Whose.
    pub owner: OwnerFilter,
    /// Only of this environment.
    pub environment: Option<EnvironmentName>,
    /// Only in one of these states at `now`. Empty = in any.
    pub states: Vec<ApiKeyState>,
    /// Only with a name that starts so: in Unicode Normalization Form C.
    pub name_prefix: String,
    /// Only created before then, and not used since.
    pub unused_since: Option<Timestamp>,
    /// Only expiring before then.
    pub expires_before: Option<Timestamp>,
    /// Only created before then.
    pub created_before: Option<Timestamp>,
    /// The instant at which states are told.
    pub now: Timestamp,
}

/// Which log entries.
#[derive(Clone, Debug, Default)]
pub struct LogFilter {
    /// Only about this account.
    pub account: Option<AccountId>,
    /// Only about this key.
    pub key_id: Option<KeyId>,
    /// Only by this actor.
    pub actor: Option<String>,
    /// Only from this instant on.
    pub from: Option<Timestamp>,
    /// Only before this instant.
    pub to: Option<Timestamp>,
    /// Only made for this person.
    pub acting_user: Option<UserId>,
    /// Only of this action.
    pub action: Option<String>,
    /// Only after this revision.
    pub after: Revision,
    /// The oldest first; else the newest.
    pub oldest_first: bool,
}

/// Up to where the log was archived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ArchiveCheckpoint {
    /// The last entry that is not in the log any more; the next one leads to its hash.
    pub head: LogHead,
    /// How many entries are in files, all archives together.
    pub entry_count: u64,
    /// When it was made.
    pub made_at: Timestamp,
}
