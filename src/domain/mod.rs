//! Keyward's data types and authorization policy, as plain values and pure functions.
//!
//! Contains tokens, scopes, keys, accounts, the policy decision, the change log, and the lease protocol by which
//! replicas follow the log.
//!
//! I/O, clocks, randomness, async, SQL and protobuf do not belong here. Time and random bytes are arguments, so that
//! tests control every instant, and the same rules serve gRPC, Envoy and the simulator.

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
