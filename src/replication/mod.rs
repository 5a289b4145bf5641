//! Many replicas on one database: the tasks that drive the machines of `domain::lease`.
//!
//! | file | drives |
//! |---|---|
//! | `follow` | the one way into the index: changes in revision order, each linked to the one before |
//! | `feed` | the replica: registers, loads, renews, publishes the lease |
//! | `changes` | what is quicker than renewals: reads the log at a hint, and polls where hints do not come |
//! | `acks` | nothing: what replicas tell of their acknowledgments, so that their rows are read in time |
//! | `propagation` | the revoker, for each narrowing change that waits |
//! | `collect` | the collector |
//! | `news` | nothing: reads what others have committed before a change is judged |
//! | `regression` | what people accept after the database has lost changes |
//!
//! Not here: the rules (they are pure, in the domain, and simulated), SQL, and statuses. A process that owns its
//! database alone (SQLite) has a [`follow::Follow`] and a [`propagation::Propagation`] that waits for nobody.

mod ack_tracker;
pub mod clock_offset;
pub mod freshness;
pub mod log_applier;
mod log_tailer;
pub mod propagation;
mod reaper;
mod regression;
mod replica_dependencies;
mod replica_input;
mod replica_status;
pub mod replica_task;
