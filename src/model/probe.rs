//! What a node answers to probes that find it in order.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::domain::ids::{ServiceId, VersionId};
use crate::protocol::Mode;

/// A node's word on itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ProbeStatus {
    /// The process answers.
    Alive,
    /// The node is in touch with a majority.
    Ready,
}

/// Answer of `GET /livez`, and of `GET /readyz` when the node is ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ProbeView {
    /// What was asked for, and is so.
    pub status: ProbeStatus,
    /// What the node is able to do at the moment; `/readyz` tells it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<Mode>,
}

/// Answer of `GET /lease/SERVICE` while the node may send canary traffic.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct LeaseView {
    /// Service that was asked for.
    pub service: ServiceId,
    /// Version that is the canary.
    pub version: VersionId,
    /// The canary's share at this node, between 0 and 1.
    pub weight: f64,
    /// Milliseconds that are left of the lease; none where the canary's share outlives it (`onPartition: hold`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease_ms_left: Option<u64>,
}
