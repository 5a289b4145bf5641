//! Compiles `proto/` and the protocols of others in `third_party/` into `OUT_DIR` without protoc, and keeps the
//! descriptor set for reflection, tests and gateways.

use std::{env, error::Error, fs, path::PathBuf};

use prost::Message;
use prost_types::FileDescriptorProto;

const PROTOS: [&str; 6] = [
    "keyward/v1/keys.proto",
    "keyward/v1/authz.proto",
    "keyward/v1/accounts.proto",
    "keyward/v1/audit.proto",
    "envoy/service/auth/v3/external_auth.proto",
    ERROR_DETAILS,
];

/// What our errors carry. Gateways that show them as JSON read it in the descriptor set; we have tonic's own.
const ERROR_DETAILS: &str = "google/rpc/error_details.proto";

/// Messages that a token travels in: nothing that is generated may print them. `src/pb/mod.rs` says how they print.
const SECRET: [&str; 5] = [
    "keyward.v1.CheckRequest",
    "keyward.v1.BatchCheckRequest",
    "keyward.v1.LookupKeyRequest",
    "keyward.v1.CreateKeyResponse",
    "keyward.v1.RotateKeyResponse",
];

/// What Envoy asks is read by messages of our own, which leave most of it where it lies.
const READ_BY_HAND: (&str, &str) =
    (".envoy.service.auth.v3.CheckRequest", "crate::pb::envoy_request::EnvoyCheckRequest");

/// Packages that hold options alone: notes on other protos, which no code reads.
const NOTES: [&str; 5] =
    ["udpa.annotations", "xds.annotations.v3", "envoy.annotations", "validate", "google.api"];

#[expect(clippy::disallowed_methods, reason = "cargo says where to write in the environment")]
fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=proto");
    println!("cargo::rerun-if-changed=third_party");
    println!("cargo::rerun-if-changed=src/store/migrations");

    let mut compiler = protox::Compiler::new(["proto", "third_party"])?;
    compiler.include_imports(true).include_source_info(true).open_files(PROTOS)?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("descriptors.bin"), published(&compiler.encode_file_descriptor_set())?)?;

    let mut descriptors = compiler.file_descriptor_set();
    descriptors.file.retain(|file| !NOTES.contains(&file.package()) && file.name() != ERROR_DETAILS);
    tonic_prost_build::configure()
        // Ordered maps make a message's encoding a function of its content,
        // which the fingerprint of an idempotent request relies on.
        .btree_map(".")
        .skip_debug(SECRET)
        .extern_path(READ_BY_HAND.0, READ_BY_HAND.1)
        .include_file("protos.rs")
        .compile_fds(descriptors)?;
    // Not a part of what is published.
    let mut compiler = protox::Compiler::new(["proto"])?;
    compiler.open_file("keyward/bench/v1/baseline.proto")?;
    Ok(tonic_prost_build::configure().compile_fds(compiler.file_descriptor_set())?)
}

/// A descriptor set whose files are left as bytes: a file that is read loses the options that extensions add, as
/// `google.api.http` is one.
#[derive(Message)]
struct Files {
    #[prost(bytes = "vec", repeated, tag = "1")]
    file: Vec<Vec<u8>>,
}

/// The descriptor set as others see it. Comments are for `grpcurl describe`, of what is ours.
fn published(set: &[u8]) -> Result<Vec<u8>, Box<dyn Error>> {
    let mut files = Files::decode(set)?;
    for bytes in &mut files.file {
        let mut file = FileDescriptorProto::decode(bytes.as_slice())?;
        if !file.package().starts_with("keyward.") {
            file.source_code_info = None;
            *bytes = file.encode_to_vec();
        }
    }
    Ok(files.encode_to_vec())
}
