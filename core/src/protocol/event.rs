//! What people may want to know: decisions, and what this node noticed by itself.

use serde::{Deserialize, Serialize};

use crate::domain::ids::{NodeId, ServiceId, TxId};
use crate::domain::routing::{RoutingState, Status};
use crate::domain::run::WindowVerdict;
use crate::domain::time::Wall;
use crate::domain::verdict::Verdict;

use super::log::record::{Chosen, Initiator, Operation, Slot};
use super::message::{GateVote, Prepare};

/// What people may want to know.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// A transaction of one service was prepared, committed or aborted; the state carries which.
    Routing {
        /// Its slot.
        slot: Slot,
        /// The record kind.
        kind: String,
        /// Who made up the transaction's id: a client, or a node by itself.
        initiator: Initiator,
        /// The routing it leads to or leaves in force.
        state: RoutingState,
        /// Where the rollout stands.
        phase: String,
        /// Why, or who refused.
        reasons: Vec<String>,
        /// Milliseconds from proposal to decision, at its coordinator; none elsewhere.
        took_ms: Option<u64>,
    },
    /// The membership changed.
    Membership {
        /// Its slot.
        slot: Slot,
        /// The record kind.
        kind: String,
        /// The node concerned.
        node: NodeId,
        /// The transaction.
        txid: TxId,
    },
    /// This node voted.
    Voted {
        /// The slot voted on.
        slot: Slot,
        /// The ballot.
        ballot: String,
        /// The transaction.
        txid: TxId,
        /// yes, no or abstain.
        vote: String,
        /// Why.
        reason: String,
    },
    /// The analysis changed its mind.
    Verdict {
        /// The service.
        service: ServiceId,
        /// The routing version judged.
        routing_version: u64,
        /// The verdict.
        verdict: Verdict,
        /// Canary answers it rests on.
        samples: u64,
    },
    /// A window was closed and decided, once; or the comparison with stable changed its mind here.
    Analyzed {
        /// Its slot; none for a change of mind, which isn't in the log.
        slot: Option<Slot>,
        /// The service.
        service: ServiceId,
        /// The routing version that its rollout began with.
        rollout_generation: u64,
        /// What was decided, and what that rests on.
        window_verdict: WindowVerdict,
    },
    /// This node stopped its canary traffic by itself.
    LocalHold {
        /// The service.
        service: ServiceId,
        /// Why.
        reason: String,
    },
    /// A decrease is in force everywhere.
    Enforced {
        /// The service.
        service: ServiceId,
        /// Its slot.
        slot: Slot,
        /// Milliseconds since it was chosen.
        took_ms: u64,
    },
    /// This node holds a lease again, or lost it.
    Lease {
        /// Holds one.
        held: bool,
    },
    /// Another node coordinates.
    Coordinator {
        /// Which.
        node: NodeId,
    },
    /// A peer went silent or came back.
    Peer {
        /// Which.
        node: NodeId,
        /// Heard from.
        alive: bool,
    },
    /// A message broke a rule.
    Rejected {
        /// Who sent it.
        node: NodeId,
        /// What and why.
        reason: String,
    },
}

impl Event {
    /// Returns what a decided record tells: the same wherever and whenever it is read, but for `phase`, where the rollout stands
    /// after it (empty where the reader doesn't know), and `took_ms`, which only its coordinator knows. None for what tells
    /// nobody anything.
    pub fn of(chosen: &Chosen, phase: String, took_ms: Option<u64>) -> Option<Self> {
        let record = &chosen.record;
        let (slot, operation) = (record.slot, &record.intent.operation);
        match operation {
            Operation::Genesis { .. } => None,
            Operation::Config(change) => {
                let (kind, node) = (operation.name().into(), change.node().clone());
                Some(Self::Membership { slot, kind, node, txid: record.intent.tx.clone() })
            }
            Operation::Verdict { service, rollout_generation, window_verdict } => {
                let (service, window_verdict) = (service.clone(), (**window_verdict).clone());
                let rollout_generation = *rollout_generation;
                Some(Self::Analyzed { slot: Some(slot), service, rollout_generation, window_verdict })
            }
            Operation::Refused { .. } | Operation::Change(..) | Operation::Revert { .. } => {
                let kind = match operation {
                    Operation::Refused { refused, .. } => format!("Refused({refused})"),
                    _ => operation.name().into(),
                };
                let (state, reasons) = (record.state.clone()?, operation.reasons());
                let initiator = record.intent.initiator;
                Some(Self::Routing { slot, kind, initiator, state, phase, reasons, took_ms })
            }
        }
    }

    /// Returns that this node voted.
    pub(super) fn voted(prepare: &Prepare, gate: &GateVote) -> Self {
        let (vote, reason) = match gate {
            GateVote::Yes(why) => ("yes", why),
            GateVote::No(why) => ("no", why),
            GateVote::Abstain(why) => ("abstain", why),
        };
        Self::Voted {
            slot: prepare.slot,
            ballot: prepare.ballot.to_string(),
            txid: prepare.intent.tx.clone(),
            vote: vote.into(),
            reason: reason.clone(),
        }
    }

    /// Returns the slot that it says was decided; none where it isn't about a decision.
    pub fn decided(&self) -> Option<Slot> {
        match self {
            Self::Routing { slot, state, .. } if state.status != Status::Prepared => Some(*slot),
            Self::Membership { slot, .. } => Some(*slot),
            Self::Analyzed { slot, .. } => *slot,
            _ => None,
        }
    }
}

/// A moment and what happened: the shell adds the time.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Announcement {
    /// When.
    pub at: Wall,
    /// Which node says so.
    #[serde(rename = "reported_by")]
    pub node: NodeId,
    /// What.
    #[serde(flatten)]
    pub event: Event,
}
