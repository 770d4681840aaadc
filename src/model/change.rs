//! What a node answers to a write that was carried out.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::domain::ids::{NodeId, TxId};
use crate::domain::routing::RoutingState;
use crate::protocol::record::{Sequence, Slot};

/// Whether a write changed anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "UPPERCASE")]
pub enum ChangeStatus {
    /// It was decided, and is in force.
    Committed,
    /// Nothing was done: the cluster is there already, or what was asked for was rolled back before.
    Unchanged,
}

/// Answer to a write that was carried out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Changed {
    /// Whether it changed anything.
    pub status: ChangeStatus,
    /// Slot of the record that decided it; none for what changed nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slot: Option<Slot>,
    /// Position of the decision among all of them, as event streams give it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sequence: Option<Sequence>,
    /// True when an earlier request with this key did it.
    #[serde(default)]
    pub repeated: bool,
    /// Why nothing was done; or why the rollout is paused or was rolled back, where the write led to that.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
    /// True when nothing was done because the rollout was rolled back before: it starts again by `retry`, or by another file.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub rolled_back: bool,
    /// Routing that it led to; none for membership.
    pub state: Option<RoutingState>,
    /// Id of the transaction, which is the write's idempotency key.
    pub txid: TxId,
    /// Which nodes route with it; told where `consistency=everywhere` was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reach: Option<Reach>,
}

/// Which nodes route with a write, by the node that was asked.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Reach {
    /// Nodes that route with it.
    pub served_by: Vec<NodeId>,
    /// Nodes that are not live: they route with it once they are back, and serve stable only from when their lease ends until then.
    pub away: Vec<NodeId>,
    /// Live nodes that were not seen to route with it in time, each with why.
    pub missing: BTreeMap<NodeId, String>,
}

impl Changed {
    /// Returns that a write was decided in `slot`.
    pub fn committed(txid: TxId, slot: Slot, state: Option<RoutingState>, repeated: bool) -> Self {
        let (status, sequence) = (ChangeStatus::Committed, Some(Sequence::of(slot, 0)));
        let (reason, rolled_back) = (String::new(), false);
        Self { status, slot: Some(slot), sequence, repeated, reason, rolled_back, state, txid, reach: None }
    }

    /// Returns that nothing was done, and why.
    pub fn unchanged(txid: TxId, state: RoutingState, reason: String, rolled_back: bool) -> Self {
        let (status, state) = (ChangeStatus::Unchanged, Some(state));
        Self { status, slot: None, sequence: None, repeated: false, reason, rolled_back, state, txid, reach: None }
    }
}
