//! The tests that need more than one module: the contract over the wire, the seeds, the real binary, the stores,
//! the rules that the source keeps. One binary, one file per subject, each name a promise.

#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    clippy::print_stderr,
    clippy::print_stdout,
    missing_docs,
    reason = "a test stops at what it did not expect, and its name says what it holds"
)]

mod accounts;
mod audit;
mod bad_input;
mod batch;
mod bulk;
mod callers;
mod canary;
mod check;
mod crash;
mod deadline;
mod escalation;
mod grpcurl;
mod idempotency;
mod keys;
mod lease;
mod lifecycle;
mod limits;
mod paging;
mod people;
mod process;
mod rotation;
mod seed_checkly;
mod seed_eazip;
mod seed_environments;
mod seed_izli;
mod seed_tracer;
mod sqlite_file;
mod standard;
mod store;
mod support;
mod tidy;
mod usage;
