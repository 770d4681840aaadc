//! The operator's door: rollouts, the cluster, events and metrics over HTTP.

pub mod read;
