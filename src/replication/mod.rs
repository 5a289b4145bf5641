//! Lets many replicas serve one database: the tasks that drive the state machines of `domain::lease`.
//!
//! | file | contents |
//! |---|---|
//! | `log_applier` | applies log entries to the index, in revision order |
//! | `replica_task` | the replica: registers, loads, renews, publishes the lease |
//! | `log_tailer` | applies changes faster than renewals: tails the log after notifications, polls it without |
//! | `ack_tracker` | which replicas seem to have acknowledged which revision, from their notifications |
//! | `propagation` | waits until a restriction is in force on every replica |
//! | `reaper` | removes the rows of dead replicas |
//! | `freshness` | catches up with other processes before a look-up |
//! | `regression` | waits for operators after the database has lost changes |
//! | `clock_offset` | compares the wall clock with the database's |
//! | `replica_dependencies`, `replica_input` | what the replica task is made of, and what it receives |
//! | `replica_status` | what the replica task publishes about itself |
//!
//! The protocol's rules are in `domain::lease`, pure and simulated; SQL is in `store`, statuses are in `grpc`.
//!
//! A process that owns its database alone (SQLite) has a [`log_applier::LogApplier`], and
//! a [`propagation::PropagationWaiter`] that never waits.

mod ack_tracker;
mod clock_offset;
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
