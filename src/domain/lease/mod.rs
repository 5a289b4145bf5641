//! The lease protocol: how many replicas answer from memory, and a revoked key is refused by all of them.
//!
//! **Once Revoke returns OK, every Check that starts afterwards is refused, on every replica.** Three state
//! machines keep that promise. Each takes an event and the present instant, and gives actions:
//!
//! | machine | runs | does |
//! |---|---|---|
//! | [`Replica`] | once a process | registers, loads, follows, renews its lease, gives it up |
//! | [`PropagationTracker`] | once a narrowing change | waits until no replica can allow what was narrowed |
//! | [`ReplicaCollector`] | once a process | removes the rows of replicas that are dead |
//!
//! Not here: I/O, clocks, async, randomness. So a simulator can drive whole fleets of them through faults that
//! no test of real processes would ever meet (`tests/it/lease`), and the layer that does drive them has
//! little left to get wrong.
//!
//! # Why it holds
//! A replica may allow until a deadline. The deadline counts from before a renewal was sent, and is granted with
//! every change that was committed by then. A revoker commits, and *then* reads the list of replicas. Whoever
//! may still allow the key was granted its lease by what was read before that commit; so it is on the list, where
//! it stood before it was granted any, and the revoker waits: until it has acknowledged the change, or its row was
//! removed, or 1.25 leases have passed, by which time its deadline has, even if the one clock is slow and the
//! other fast. Where the list may have lost rows, only time helps. [`LeaseInvariant`] lists what this rests on.
//!
//! # What whoever drives a machine owes it
//! - The instant of an event is read when the event is at hand, and before its actions are begun.
//! - Actions are done in their order, each before the next. To have sent a request is to have done it; the
//!   answer is a later event. The next event waits for the last action.
//! - Every answer names its [`AttemptId`] and may come late, twice or never; the machines sort that out. What is
//!   certain is that each request is one transaction, and that its answer tells what one snapshot of it saw. A
//!   renewal's snapshot is taken before its own change is seen by others, by as long as its commit takes.
//! - A machine is given a `Tick` at the instant that its `wake_at` says, or later, and asked again after each
//!   event.
//! - A Check reads the deadline, then the clock, then the map; it allows only if `clock < deadline`.
//!
//! # What the database owes
//! - Read committed is enough, where what an answer tells was read by one statement, or in one snapshot.
//! - One row, `meta`, gives revisions; its lock makes commit order, revision order and visibility one order.
//! - A renewal changes the replica's row if and only if the row is there, its count is one that [`RenewalSequence`]
//!   expects, and the log holds the [`LogPosition`] that is acknowledged: a number alone acknowledges nothing. It
//!   is a durable commit like any other ("the log is the lease").
//! - An acknowledged commit is not lost. Where it is lost all the same, or a backup is restored, the
//!   [`Incarnation`] is another one.
//! - The lease grows at once. It shrinks in two steps: `lease` first, and `longest` after the old one's
//!   [`LeaseDuration::outlived_after`]; from infinite, after every row has renewed.

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
