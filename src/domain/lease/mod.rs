//! The lease protocol: many replicas answer Checks from memory, and all of them deny a revoked key.
//!
//! **Once Revoke returns OK, every Check that starts afterwards is denied, on every replica.** Three state machines
//! keep that promise. Each takes an event and the current instant, and returns actions:
//!
//! | machine | runs | does |
//! |---|---|---|
//! | [`Replica`] | once per process | registers, loads, applies changes, renews its lease, gives it up |
//! | [`PropagationTracker`] | once per restricting change | waits until no replica can allow what was restricted |
//! | [`ReplicaCollector`] | once per process | removes the rows of dead replicas |
//!
//! I/O, clocks, async and randomness do not belong here. A simulator (`tests/it/lease`) can therefore drive whole
//! clusters through faults that tests of real processes would never meet.
//!
//! # Why it holds
//! A replica may allow Checks until a deadline. The deadline counts from before a renewal was sent. The renewal also
//! delivers every change that was committed by then.
//!
//! A revoker commits, and *then* lists the replicas. A replica that may still allow the key got its lease from a read
//! before that commit, so its row is on the list. The revoker waits until the replica acknowledges the change, or its
//! row is removed, or 1.25 leases have passed. By then the replica's deadline has passed, even if one clock is slow and
//! the other fast. If the list may have lost rows, only time helps. [`LeaseInvariant`] lists the assumptions.
//!
//! # Obligations of the driver
//! - Read the instant of an event when the event has arrived, and before its actions start.
//! - Do the actions in order, each before the next. Sending a request completes its action; the response is a later
//!   event. The next event waits for the last action.
//! - Every response carries its [`AttemptId`] and may be late, repeated or lost; the machines handle that. Each request
//!   must be one transaction, and its response must describe one snapshot of it. A renewal's snapshot is older than the
//!   commit that makes the renewal visible to others.
//! - Deliver a `Tick` at the instant of `wake_at` or later, and read `wake_at` again after each event.
//! - A Check reads the deadline, then the clock, then the map. It allows only if `clock < deadline`.
//!
//! # Obligations of the database
//! - Isolation level read committed is enough, if one statement or one snapshot reads all that a response contains.
//! - One row, `meta`, assigns revisions. Its lock makes commit order, revision order and visibility one order.
//! - A renewal updates the replica's row if and only if the row exists, [`RenewalSequence`] accepts its count, and the
//!   log contains the acknowledged [`LogPosition`]: a revision alone acknowledges nothing. A renewal is a durable
//!   commit like any other ("the log is the lease").
//! - An acknowledged commit is not lost. If one is lost, or a backup is restored, the [`Incarnation`] changes.
//! - The lease grows at once. It shrinks in two steps: first `lease`, and then `longest` after the old lease's
//!   [`LeaseDuration::expiry_wait`]. From an infinite lease, the second step waits until every row has renewed.

mod boot_instant;
mod clock_stall;
pub mod collector;
mod invariants;
mod lease_duration;
pub mod propagation_tracker;
mod protocol;
pub mod replica;

pub use boot_instant::BootInstant;
pub use collector::ReplicaCollector;
#[cfg(keyward_breakable)]
pub use invariants::disable_invariant;
pub use invariants::{AllInvariants, InvariantSet, LeaseInvariant};
pub use lease_duration::LeaseDuration;
pub use propagation_tracker::PropagationTracker;
pub use protocol::{AttemptId, Incarnation, RenewalSequence, ReplicaId, ReplicaListing, ReplicaRow};
pub use replica::{RenewalReply, RenewalRequest, Replica};

pub use crate::domain::log_position::LogPosition;
