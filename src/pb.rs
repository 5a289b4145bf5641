//! The generated messages and services of `proto/keyward/v1`, and the descriptor set for reflection and tests.

#![allow(missing_docs, unreachable_pub, clippy::all)]

use std::fmt;

tonic::include_proto!("keyward.v1");

/// The encoded `google.protobuf.FileDescriptorSet` of everything in `proto/`.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

/// Messages with a token in them print their name alone.
macro_rules! redacted {
    ($($message:ident),*) => {
        $(impl fmt::Debug for $message {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.debug_struct(stringify!($message)).finish_non_exhaustive()
            }
        })*
    };
}

redacted!(CheckRequest, BatchCheckRequest, LookupKeyRequest, CreateKeyResponse, RotateKeyResponse);
