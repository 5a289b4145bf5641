//! Keyward: the API-key authority of a backend. It issues API keys, keeps them through their whole life, and
//! answers whether a token is valid for a scope, an environment and an account.
//!
//! # The map
//! | module | holds |
//! |---|---|
//! | [`domain`] | tokens, scopes, keys, the decision, the log, leases: values and pure functions, no I/O, no clock |
//! | [`store`] | the `Store` contract, the backends, migrations, group commit; SQL stands nowhere else |
//! | [`engine`] | Checks from memory: the index, usage written behind |
//! | [`replication`] | many replicas on one database: who follows, holds a lease, waits for whom |
//! | [`access`], [`refusal`] | who calls and what they may do; why a call is not done |
//! | [`keys`], [`accounts`], [`people`] | the use cases: what one transaction writes |
//! | [`audit`] | the log as evidence: verified, its head told, its oldest part archived |
//! | [`gateway`] | HTTP requests that proxies ask about: routes, credentials, replies |
//! | [`transport`] | listeners: sockets, TLS, limits; bytes and connections, and nothing of what is said over them |
//! | [`grpc`] | the wire: services, the gate, connections; the only place that builds a status |
//! | [`forward`] | the gateway for proxies that ask over HTTP |
//! | [`admin`], [`metrics`], [`http1`] | `/healthz`, `/readyz`, `/metrics`; pages made from memory |
//! | [`instruments`] | counters, histograms and the text that tells of them; what is counted is not known here |
//! | [`server`], [`reload`] | the composition root: ordered start and stop; files that are read again |
//! | [`doctor`] | looks at a running deployment and says what to fix; changes nothing |
//! | [`cli`] | commands; the client side knows the generated client only |
//! | [`clock`], [`config`] | the only readers of clock and randomness, of the environment |
//! | [`trace`], [`decisions`], [`telemetry`] | what a call is called and whether it is recorded; the decision log; where log and spans go |
//! | [`quiet`] | a cap on how often something is said |
//! | [`private_file`] | creates files that only their owner can read, and follows no symbolic link |
//! | [`pb`] | generated from `proto/` |
//!
//! # Who may use whom
//! `cli → server → {grpc, forward} → {transport, gateway, keys, accounts, people, audit} → replication → engine → store → domain`, never back; `tests/it/tidy.rs` holds it.
//!
//! # What always holds
//! - A token is shown once and stored never; nothing prints one.
//! - An acknowledged change is on disk, and every Check that starts afterwards sees it.
//! - A Check waits for nothing: no lock that a writer holds, no database, no other task. Of a key with limits that
//!   several processes share it may wait, for a bounded time, for what counts them.
//! - A fault is never a verdict: what cannot be answered is an error, not a denial.
//! - Zero, empty or missing never means "all".

pub mod access;
pub mod accounts;
pub mod admin;
pub mod audit;
pub mod cli;
pub mod clock;
pub mod config;
pub mod decisions;
pub mod doctor;
pub mod domain;
pub mod engine;
pub mod forward;
pub mod gateway;
pub mod grpc;
pub mod http1;
pub mod instruments;
pub mod keys;
pub mod metrics;
pub mod pb;
pub mod people;
pub mod private_file;
pub mod quiet;
pub mod refusal;
pub mod reload;
pub mod replication;
pub mod server;
pub mod store;
pub mod telemetry;
pub mod trace;
pub mod transport;
