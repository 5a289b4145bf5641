//! The embedded backend: one SQLite file, owned by one process.
//!
//! One connection writes ([`connection`]). A few others read, and each sees whole transactions only. [`store`] puts
//! them together, and `write` contains what a transaction writes. Reads are in `backend.rs` of the parent folder.
//!
//! Invariants:
//! - WAL with `synchronous=FULL`: a committed change survives a power cut.
//! - A second server refuses to start, and a process that has lost the file stops ([`file_owner`]).
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
