//! What a node answers to probes that find it in order.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

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
