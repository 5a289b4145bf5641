//! Keyward: the API-key authority of a backend. It issues API keys, manages them for their whole life, and decides
//! whether a token is valid for a scope, an environment and an account.
//!
//! # Modules
//! | module | contents |
//! |---|---|
//! | `domain` | tokens, scopes, keys, the decision, the log, leases: values and pure functions without I/O or a clock |
//! | `store` | the `Store` contract, the backends, migrations, group commit; all SQL |
//! | `engine` | Checks from memory: the index, limits, usage that is written later |
//! | `replication` | replicas on one database: they apply the log, hold a lease, wait for each other |
//! | `caller`, `service_error` | the caller of an RPC and its rights; the errors of the use cases |
//! | `keys`, `accounts`, `membership` | the use cases: what one transaction writes |
//! | `audit` | the log as evidence: verification, the published head, archives |
//! | `gateway` | the HTTP requests that proxies ask about: routes, credentials, responses |
//! | `transport` | listeners: sockets, TLS, limits on connections and bytes; no protocol above them |
//! | `grpc` | the gRPC services, their router and connections; the only module that builds a status |
//! | `forward_auth` | the gateway for proxies that ask over HTTP |
//! | `admin`, `metrics`, `http1` | `/healthz`, `/readyz`, `/metrics`; HTTP/1.1 for pages made from memory |
//! | `metrics_core` | counters, histograms and the Prometheus text format; no metric is defined here |
//! | `server`, `file_watcher` | the composition root: ordered start and stop; files that are read again |
//! | `doctor` | inspects a running deployment and its files, and reports what to fix; changes nothing |
//! | `cli` | commands; its client side uses the generated client only |
//! | `clock`, `config` | the only readers of the clock, of randomness and of the environment |
//! | `trace`, `decision_log`, `telemetry` | trace context and sampling; the decision log; outputs for logs and spans |
//! | `log_throttle` | limits how often a line is logged |
//! | `private_file` | creates files that only their owner can read, and follows no symbolic link |
//! | `pb` | generated from `proto/` |
//!
//! # Imports
//! `cli → server → {grpc, forward_auth} → {transport, gateway, keys, accounts, membership, audit} → replication → engine →
//! store → domain`, never the other way, and never in a circle between files: `tests/it/tidy.rs` and `circles.rs` check it.
//!
//! # Invariants
//! - A token is shown once and never stored; nothing prints one.
//! - An acknowledged change is on disk, and every Check that starts afterwards sees it.
//! - A Check waits for nothing: no lock that a writer holds, no database, no other task. The exception is a key with
//!   limits that several processes share: its Check may wait, for a bounded time, for the shared counter.
//! - A fault is never a verdict: if Keyward cannot decide, it returns an error, not a denial.
//! - Zero, empty or missing never means "all".

pub(crate) mod accounts;
pub(crate) mod admin;
pub(crate) mod audit;
pub(crate) mod caller;
pub mod cli;
pub mod clock;
pub mod config;
pub mod decision_log;
pub mod doctor;
pub mod domain;
pub mod engine;
pub(crate) mod file_watcher;
pub(crate) mod forward_auth;
pub mod gateway;
pub mod grpc;
pub mod http1;
pub(crate) mod keys;
pub(crate) mod log_throttle;
pub(crate) mod membership;
pub(crate) mod metrics;
pub(crate) mod metrics_core;
pub mod pb;
pub(crate) mod private_file;
pub mod replication;
pub mod server;
pub(crate) mod service_error;
pub mod store;
pub mod telemetry;
pub mod trace;
pub mod transport;
