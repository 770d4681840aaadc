//! The state that the cluster agrees on for one service, and that every node routes with.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::ids::{ServiceId, TxId, VersionId};
use super::time::Wall;
use super::weights::{Weight, Weights};

/// Outcome of a transaction, as records and the API state it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "UPPERCASE")]
pub enum Status {
    /// Nodes vote; no outcome is decided yet.
    Prepared,
    /// Decided: the change is in force.
    Committed,
    /// Decided: the weights stay as they were.
    Aborted,
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Prepared => "PREPARED",
            Self::Committed => "COMMITTED",
            Self::Aborted => "ABORTED",
        })
    }
}

/// The committed routing of one service: a ceiling on what the canary gets.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct RoutingState {
    /// Service that the routing belongs to.
    pub service: ServiceId,
    /// Number of committed weight changes; strictly increasing.
    pub version: u64,
    /// The version that serves what the canary doesn't.
    pub stable_model_id: VersionId,
    /// The canary version; none without a rollout.
    pub canary_model_id: Option<VersionId>,
    /// Committed shares of the versions; they sum to 10000 bp.
    pub weights: Weights,
    /// COMMITTED in a service; in a record, the outcome of its transaction.
    pub status: Status,
    /// Id of the transaction that committed this state.
    pub txid: TxId,
    /// When its coordinator proposed it.
    pub timestamp: Wall,
}

impl RoutingState {
    /// Returns the canary's committed share: zero when there is no canary.
    pub fn canary_weight(&self) -> Weight {
        self.canary_model_id.as_ref().map_or(Weight::ZERO, |canary| self.weights.of(canary))
    }
}
