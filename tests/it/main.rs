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
mod envoy;
mod envoy_http;
mod escalation;
mod ext_authz;
mod forward_auth;
mod grpcurl;
mod http;
mod idempotency;
mod keys;
mod lifecycle;
mod limits;
mod load;
mod nginx;
mod paging;
mod people;
mod process;
mod proxy;
mod rest;
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
mod upstream;
mod usage;
