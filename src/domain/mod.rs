//! The words and the policy of Keyward, as plain values and pure functions.
//!
//! Here live tokens, scopes, keys, accounts, the decision, the log that every change is written to, and the
//! protocol by which replicas follow it.
//! Not here: I/O, clocks, randomness, async, SQL, protobuf. Time and random bytes come in as arguments, so
//! that every rule can be tested at its exact instant, and the same rules serve gRPC, Envoy and simulations.

pub mod account;
pub mod certificate_identity;
pub mod change_origin;
pub mod connection_url;
pub mod credential_mask;
pub mod header_name;
pub mod key;
pub mod key_attributes;
pub mod key_policy;
pub mod lease;
pub mod limit;
pub mod lineage;
pub mod log;

pub mod log_chain;
pub mod log_export;
pub mod log_format;
pub mod log_payload;
pub mod log_position;
pub mod name;
pub mod policy_decision;
pub mod route;
pub mod scope;
pub mod text;
pub mod time;
pub mod token;
