//! The embedded backend: one SQLite file, owned by one process.
//!
//! One connection writes ([`connection`]); a few others read, and each sees whole transactions only. [`store`] puts them
//! together, [`write`] contains what a transaction writes, and `backend.rs` of the parent the reads.
//!
//! Invariants:
//! - WAL with `synchronous=FULL`: a committed change survives a power cut.
//! - A second server refuses to start, and a process that has lost the file stops ([`file_owner`]). Backup tools may read.
//! - A file whose WAL is lost is refused ([`open_mark`]).

mod backup;
mod bulk;
mod checks;
mod connect_options;
mod connection;
mod errors;
mod file_owner;
mod inspect;
mod migrate;
mod open_mark;
mod page_readers;
mod permissions;
mod pre_state;
mod secret_range;
mod snapshot;
mod snapshot_view;
mod store;
mod write;

pub(super) use self::{backup::backup, inspect::inspect, store::SqliteStore};
