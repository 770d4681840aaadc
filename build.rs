//! Generates the gRPC code from `proto/`, without protoc.

use std::path::PathBuf;

const FILES: [&str; 3] =
    ["proto/aviary/v1/decision.proto", "proto/aviary/v1/rollout.proto", "proto/aviary/v1/telemetry.proto"];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=proto");
    let descriptors = protox::compile(FILES, ["proto"])?;
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    std::fs::write(out.join("aviary.bin"), prost::Message::encode_to_vec(&descriptors))?;
    tonic_prost_build::configure().build_transport(false).btree_map(".").compile_fds(descriptors)?;
    Ok(())
}
