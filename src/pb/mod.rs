//! Contains the generated messages and services of `proto/`, and the encoded descriptor set. No logic belongs here.

#![allow(missing_docs, unreachable_pub, clippy::all)]

pub mod envoy_request;

use std::fmt;

/// All generated code, one module per package.
#[allow(rustdoc::all)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/protos.rs"));
}

/// `envoy.*`: the messages of Envoy's ext_authz API.
pub use generated::envoy;
pub use generated::keyward::v1::*;

/// Echo service of the load generator; not part of the API.
pub mod bench {
    include!(concat!(env!("OUT_DIR"), "/keyward.bench.v1.rs"));
}

/// A `google.rpc.Status` with only a code.
#[must_use]
pub(crate) fn google_rpc_status(code: i32) -> generated::google::rpc::Status {
    generated::google::rpc::Status { code, ..Default::default() }
}

/// The encoded `google.protobuf.FileDescriptorSet` of everything in `proto/`.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

/// Messages with a token print only their name.
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
