//! The generated messages and services of `proto/keyward/v1` and of the protocols of others that we speak, and
//! the descriptor set for reflection, tests and gateways. No logic stands here.

#![allow(missing_docs, unreachable_pub, clippy::all)]

pub mod envoy_request;

use std::fmt;

/// Everything that was generated, a module for each package.
#[allow(rustdoc::all)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/protos.rs"));
}

/// `envoy.*`: what Envoy asks and hears.
pub use generated::envoy;
pub use generated::keyward::v1::*;

/// What a load is measured against; no part of the contract.
pub mod bench {
    include!(concat!(env!("OUT_DIR"), "/keyward.bench.v1.rs"));
}

/// A bare `google.rpc.Status`: the code alone.
#[must_use]
pub fn google_rpc_status(code: i32) -> generated::google::rpc::Status {
    generated::google::rpc::Status { code, ..Default::default() }
}

/// The encoded `google.protobuf.FileDescriptorSet` of everything in `proto/`.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

/// Messages with a token in them print their name alone.
macro_rules! impl_redacted_debug {
    ($($message:ident),*) => {
        $(impl fmt::Debug for $message {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.debug_struct(stringify!($message)).finish_non_exhaustive()
            }
        })*
    };
}

impl_redacted_debug!(CheckRequest, BatchCheckRequest, LookupKeyRequest, CreateKeyResponse, RotateKeyResponse);
