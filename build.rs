//! Compiles `proto/` into `OUT_DIR` without protoc, and keeps the descriptor set for reflection and tests.

use std::{env, error::Error, fs, path::PathBuf};

use prost::Message as _;

const PROTOS: [&str; 4] = [
    "keyward/v1/keys.proto",
    "keyward/v1/authz.proto",
    "keyward/v1/accounts.proto",
    "keyward/v1/audit.proto",
];

/// Messages that a token travels in: nothing that is generated may print them. `src/pb.rs` says how they print.
const SECRET: [&str; 5] = [
    "keyward.v1.CheckRequest",
    "keyward.v1.BatchCheckRequest",
    "keyward.v1.LookupKeyRequest",
    "keyward.v1.CreateKeyResponse",
    "keyward.v1.RotateKeyResponse",
];

#[expect(clippy::disallowed_methods, reason = "cargo says where to write in the environment")]
fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=proto");
    println!("cargo::rerun-if-changed=src/store/migrations");

    let descriptors = protox::compile(PROTOS, ["proto"])?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("descriptors.bin"), descriptors.encode_to_vec())?;

    tonic_prost_build::configure()
        // Ordered maps make a message's encoding a function of its content,
        // which the fingerprint of an idempotent request relies on.
        .btree_map(".")
        .skip_debug(SECRET)
        .compile_fds(descriptors)?;
    Ok(())
}
