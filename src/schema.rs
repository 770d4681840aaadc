//! The code generated from `proto/`: what other programs and this one say to each other.

/// Version 1 of the protobuf package `aviary`.
#[allow(missing_docs, clippy::all, reason = "what is generated, and how well, is the generator's")]
pub mod v1 {
    tonic::include_proto!("aviary.v1");
    /// The schema itself, for reflection.
    pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/aviary.bin"));
}
