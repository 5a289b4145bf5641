//! The engine: answers Checks from memory. Nothing here asks a database, and nothing awaits but `limiter`: a Check of
//! a key without limits is answered the first time that it is polled.
//!
//! `parse → digest → look up → decide_locally → consume from the limits → note the use → answer`. An unknown token is judged by its
//! checksum after the look-up, since imported tokens have checksums of other systems. The index is fed with log rows
//! in revision order; uses are written behind. Who may ask, and how answers look on the wire, is `grpc`'s business.

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
