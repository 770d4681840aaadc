//! What a node is told about itself.

use std::collections::BTreeSet;

use crate::domain::ids::{ClusterId, Incarnation, NodeId};

/// What a node is told about itself.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Name of this node.
    pub node: NodeId,
    /// Cluster that this node belongs to.
    pub cluster: ClusterId,
    /// Durations by which the protocol waits and gives up.
    pub timings: Timings,
    /// Where the node's own draws (suspicion, back-off) begin.
    pub seed: u64,
    /// The incarnation it takes when its acceptor state is gone.
    pub fresh_incarnation: Incarnation,
    /// What it keeps of its log.
    pub retention: Retention,
    /// Nodes it talks with beside the cluster's members: those that are to become members.
    pub peers: BTreeSet<NodeId>,
    /// The newest protocol version that it speaks, which it tells its peers.
    pub speaks: u16,
}

/// What a node keeps of its log: disk and start-up stay bounded by it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Retention {
    /// A checkpoint is made every so many slots.
    pub checkpoint_every: u64,
    /// Records that stay readable before a checkpoint: for history, and for peers that lag.
    pub history: u64,
}

impl Default for Retention {
    fn default() -> Self {
        Self { checkpoint_every: 4_096, history: 16_384 }
    }
}

/// Durations of the protocol, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timings {
    /// Between two heartbeats; below a quarter of the shortest lease.
    pub heartbeat_ms: u64,
    /// Shortest silence after which a peer counts as lost; each node draws its own between this and 1.5 times it.
    pub suspect_ms: u64,
    /// Longest wait for a vote.
    pub vote_ms: u64,
    /// Between two tries of an unanswered PREPARE or proposal.
    pub resend_ms: u64,
    /// Time from one health snapshot to the next, in milliseconds.
    pub snapshot_ms: u64,
    /// Oldest evidence that a gate votes on.
    pub evidence_age_ms_max: u64,
}

impl Default for Timings {
    fn default() -> Self {
        Self {
            heartbeat_ms: 250,
            suspect_ms: 1_000,
            vote_ms: 1_000,
            resend_ms: 200,
            snapshot_ms: 250,
            evidence_age_ms_max: 2_000,
        }
    }
}
