//! Whole clusters of real processes: what a user would see.
#![expect(clippy::disallowed_methods, reason = "these tests wait for real processes, on the real clock")]

mod backup;
mod chaos;
mod command_line;
mod disk;
mod drain;
mod failure;
mod flood;
mod grpc;
pub mod harness;
mod identity;
mod input;
mod membership;
mod old_disk;
mod pipeline;
mod rolling;
mod rollout;
mod sequential;
mod telemetry;
mod upgrade;
mod waiting;
