//! Why the engine cannot answer. Such an error is a failure to decide, never a denial.

use crate::domain::time::Revision;

/// Why a Check could not be answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CheckError {
    /// The first snapshot is not loaded yet.
    #[error("the server is starting and has not loaded its keys yet")]
    Starting,
    /// The lease has expired, and the local state would allow what others may have revoked.
    #[error(
        "this server has not reached its database within its lease, so keys that it would allow may be \
         revoked; keys that it knows to be dead are still denied"
    )]
    LeaseLost,
    /// The applied state is older than requested.
    #[error("this server has applied revision {have}, older than the requested {want}")]
    Stale {
        /// The revision that is applied here.
        have: Revision,
        /// The revision that was requested.
        want: Revision,
    },
    /// Redis, which counts the key's rate limits, did not answer.
    #[error("the key's rate limits cannot be counted: Redis did not answer; retry")]
    LimitsUnavailable,
    /// The requester was revoked or restricted during the call.
    #[error("the calling key was revoked or restricted during the call")]
    RequesterRevoked,
    /// More of the quota was used here than the database has counted yet.
    #[error("the key's quota cannot be counted: the database did not answer; retry")]
    QuotaUnavailable,
}
