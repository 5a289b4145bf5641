//! Answers Checks from memory.
//!
//! Nothing here queries a database, and only `limiter` waits: a Check of a key without limits completes at its first
//! poll. Authentication of the RPC and the wire format are in `grpc`.
//!
//! A Check runs `parse → digest → look up → decide → consume from the limits → record the use → answer`. The
//! checksum of an unknown token is verified after the look-up, since imported tokens have checksums of other systems.
//! The index applies log entries in revision order; uses are written behind.

pub mod authenticate;
pub mod caller_cache;
mod check;
mod check_input;
pub(crate) mod check_outcome;
mod error;
mod evaluate;
pub mod index;
mod key_limits;
mod limit_outcome;
pub mod limiter;
pub mod serving_lease;
mod tracked_reads;
pub mod usage;

pub use authenticate::{AccountStatus, AuthenticatedKey, AuthenticationFailure};
pub use check::{AwaitingLimits, Engine, LocalDecision};
pub use check_input::{CheckInput, Requester};
pub use check_outcome::{CheckOutcome, KeyMatch};
pub use error::CheckError;
pub use index::KeyRef;
