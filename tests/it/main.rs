//! The tests that need more than one module: the contract over the wire, the seeds, the real binary, the stores,
//! the rules that the source keeps. One binary, one file per subject, each name a promise.

#![allow(
    clippy::duplicate_mod,
    clippy::unwrap_used,
    clippy::disallowed_methods,
    clippy::print_stderr,
    clippy::print_stdout,
    missing_docs,
    reason = "a test stops at what it did not expect, and its name says what it holds"
)]

mod accounts;
mod attacks;
mod audit_files;
mod authorized_replicas;
mod background_load;
mod bad_input;
mod batch;
mod bench;
mod beyond;
mod bulk;
mod callers;
mod canary;
mod check;
mod checksums;
mod circles;
mod collector;
mod config;
mod crash;
mod deadline;
mod deploy;
mod direct;
mod doctor;
mod doubt;
mod engine_replicas;
mod envoy;
mod envoy_bounds;
mod envoy_http;
mod envoy_tls;
mod escalation;
mod ext_authz;
mod ext_authz_client;
mod ext_authz_headers;
mod ext_authz_proxies;
mod ext_authz_requests;
mod failures;
mod files;
mod forward_auth;
mod grpcurl;
mod gzip;
mod header_folding_service;
mod header_spellings;
mod import;
mod instructions;
mod judge;
mod keys;
mod keys_change;
mod lease;
mod lifecycle;
mod limits;
mod limits_redis;
mod listeners;
mod nginx;
mod postgres;
mod postgres_server;
mod process;
mod proxy;
mod quotas;
mod raw_http;
mod redis_server;
mod replicas;
mod rest;
mod retention;
mod rolling_upgrade;
mod root_key;
mod rotation;
mod snapshot_loader;
mod sqlite_file;
mod sqlite_owner;
mod standard;
mod store;
mod stream;
mod support;
mod telemetry;
mod terminal;
mod test_ca;
mod tidy;
mod tls;
mod unknown;
mod upkeep;
mod upstream;
mod walk;
mod watches;

// The suites that every store is held to over the wire: the seeds, and what leans most on the store. Each says
// `super::Server`, which is a server on the store of the module that it stands in.

#[path = "."]
mod on_sqlite {
    pub(crate) use crate::support::Server;

    mod account_limits;
    mod audit;
    mod audit_verify;
    mod authorized;
    mod idempotency;
    mod names;
    mod paging;
    mod path_spellings;
    mod people;
    mod persons;
    mod seed_checkly;
    mod seed_eazip;
    mod seed_environments;
    mod seed_izli;
    mod seed_tracer;
    mod usage;
}

#[path = "."]
mod on_postgres {
    pub(crate) type Server = crate::support::TestServer<crate::postgres::PostgresDatabase>;

    mod account_limits;
    mod audit;
    mod audit_verify;
    mod authorized;
    mod idempotency;
    mod names;
    mod paging;
    mod path_spellings;
    mod people;
    mod persons;
    mod seed_checkly;
    mod seed_eazip;
    mod seed_environments;
    mod seed_izli;
    mod seed_tracer;
    mod usage;
}
