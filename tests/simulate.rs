//! The simulator of the lease protocol by itself, so that it can be optimised without everything else: `make
//! simulate`. The simulator is in `tests/it/lease`, and its schedules of every day run there.

#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    clippy::print_stdout,
    missing_docs,
    reason = "a test stops at what it did not expect, and its name says what it holds"
)]

#[path = "it/lease/mod.rs"]
mod lease;
