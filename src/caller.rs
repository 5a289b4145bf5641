//! Callers of the management RPCs: their identity, permissions and authorization.
//!
//! `identity` has a caller and what it may grant; `authorization` authorizes a change. How a caller proves its identity
//! is in `grpc/auth.rs`; which RPC needs which permission is in `grpc/rpc.rs`.

mod authorization;
mod identity;

pub(crate) use authorization::{Authorization, MAX_AUTHORIZATION_ATTEMPTS};
pub(crate) use identity::Permission;
pub(crate) use identity::{Caller, CallerIdentity};
