//! Why the engine cannot answer: a failure to decide, which is never a denial.

use crate::domain::time::Revision;

/// Why a Check could not be answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CheckError {
    /// The first snapshot is not loaded yet.
    #[error("the server is starting and has not loaded its keys yet")]
    Starting,
    /// The lease has run out: it would be allowed by what is known here, which others may have changed.
    #[error(
        "this server has had no news from its database for longer than its lease, so what it would allow may have \
         been revoked; what it knows to be dead it still denies"
    )]
    LeaseLost,
    /// The state is older than asked for.
    #[error("the state here is revision {have}, older than the {want} asked for")]
    Stale {
        /// The revision here.
        have: Revision,
        /// The revision asked for.
        want: Revision,
    },
    /// The key's rate limits are counted in Redis, which did not answer.
    #[error("the key's rate limits cannot be counted: Redis did not answer; try again")]
    LimitsUnavailable,
    /// Whoever asks may not any more.
    #[error("whoever asks may not call any more")]
    RequesterRevoked,
    /// More was used of the key's quota here than the database has counted yet.
    #[error("the key's quota cannot be counted: the database did not answer; try again")]
    QuotaUnavailable,
}
