//! Aviary: safe weighted rollouts. The map of its rooms, in reading order; `ARCHITECTURE.md` gives the reasons.
//!
//! The core is a crate of its own, `aviary-core`, without IO, clock or runtime:
//!
//! 1. [`domain`]: what a rollout is. Start at [`domain::rollout::Service::after`], which says what each change does.
//! 2. [`protocol`]: how nodes agree. Start at [`protocol::Core::handle`], one input in, effects out.
//!
//! The shell around it is this crate:
//!
//! 3. [`ports`]: the traits through which the shell reaches disks, networks, clocks, event sources and sinks.
//!    [`entropy`] is where it draws random numbers from.
//! 4. [`node`]: the loop that feeds the core one input at a time, persists, then sends; links and frames between nodes.
//! 5. [`adapters`]: what implements the ports: disk, TLS, Kafka, Redis, Prometheus, memory.
//! 6. [`listener`]: accepts, limits and closes the connections of both HTTP ports.
//! 7. [`status`]: the status answers of both HTTP ports: routing, health, readiness.
//! 8. [`proxy`]: the data plane, which forwards clients' requests by the published weights and counts their outcomes.
//! 9. [`telemetry`]: events that other programs report, read, checked, deduplicated and counted.
//! 10. [`decisions`]: what the cluster decided, read from the log and published to streams, Kafka and Redis.
//! 11. [`router`]: splits a Kafka topic's records between the stable and the canary service.
//! 12. [`schema`]: the code that is generated from `proto/`.
//! 13. [`model`], [`api`]: the shapes of the API's JSON; the operators' HTTP and gRPC API.
//! 14. [`code`], [`client`]: the names of the API's errors, and a client of the API that goes by them. [`http_client`] sends its requests,
//!     and all others that are not relayed traffic.
//! 15. [`config`]: the files that people write, checked once, at the edge.
//!     [`backup`]: the format of a cluster's backup.
//! 16. [`synthetic`]: made-up traffic from a seed, for `aviary plan` and the benchmarks.
//! 17. [`backoff`]: waits between tries.
//! 18. [`about`]: what this program is: version, commit, compiler and formats.
//! 19. [`cli`]: the command line, a file for each verb or small group of verbs.

pub use aviary_core::{domain, protocol};

pub mod about;
pub mod adapters;
pub mod api;
pub mod backoff;
pub mod backup;
pub mod cli;
pub mod client;
pub mod code;
pub mod config;
pub mod decisions;
pub mod entropy;
pub mod http_client;
pub mod listener;
pub mod model;
pub mod node;
pub mod ports;
pub mod proxy;
pub mod router;
pub mod schema;
pub mod status;
pub mod synthetic;
pub mod telemetry;
