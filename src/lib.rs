//! Aviary: safe weighted rollouts. The map of the house, in reading order.

pub use aviary_core::{domain, protocol};

pub mod adapters;
pub mod api;
pub mod cli;
pub mod config;
pub mod decisions;
pub mod door;
pub mod node;
pub mod ports;
pub mod proxy;
pub mod router;
pub mod schema;
pub mod synthetic;
pub mod telemetry;

/// Takes the place of the C library's allocator, librdkafka's calls included: its records are made on one thread and freed on
/// another. Here rather than in the program, so that tests and benchmarks run what users run.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;
