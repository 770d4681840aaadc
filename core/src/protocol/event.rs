//! What people may want to know: decisions, and what this node noticed by itself.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::domain::ids::{NodeId, ServiceId, TxId};
use crate::domain::rollout::Change;
use crate::domain::routing::{RoutingState, Status};
use crate::domain::run::WindowVerdict;
use crate::domain::time::Wall;
use crate::domain::verdict::Verdict;

use super::log::record::{Chosen, Initiator, Intent, Operation, Slot};
use super::message::{GateVote, Prepare};

/// Kind of a record about a service's routing. Events and logs show it by its name, and a refused change as `Refused(NAME)`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum RoutingKind {
    /// A rollout was started.
    Start,
    /// The canary's weight was increased, or the rollout completed.
    Promote,
    /// The rollout was paused.
    Pause,
    /// A paused rollout was continued.
    Resume,
    /// All traffic was sent back to stable.
    Rollback,
    /// An increase that was decided in doubt was undone.
    Revert,
    /// A change was refused.
    Refused {
        /// Name of the refused change.
        refused: String,
    },
}

/// A text is no kind of a routing record: a newer node may know more kinds.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("found {found:?}, expected a kind of routing record")]
pub struct RoutingKindError {
    /// The text.
    pub found: String,
}

impl RoutingKind {
    const PLAIN: [Self; 6] = [Self::Start, Self::Promote, Self::Pause, Self::Resume, Self::Rollback, Self::Revert];

    /// Returns the kind of an operation; none where it changes no routing and doesn't refuse to.
    fn of(operation: &Operation) -> Option<Self> {
        match operation {
            Operation::Change(_, Change::Start(_)) => Some(Self::Start),
            Operation::Change(_, Change::Promote { .. }) => Some(Self::Promote),
            Operation::Change(_, Change::Pause { .. }) => Some(Self::Pause),
            Operation::Change(_, Change::Resume) => Some(Self::Resume),
            Operation::Change(_, Change::Rollback { .. }) => Some(Self::Rollback),
            Operation::Revert { .. } => Some(Self::Revert),
            Operation::Refused { refused, .. } => Some(Self::Refused { refused: refused.clone() }),
            Operation::Genesis { .. } | Operation::Config(_) | Operation::Verdict { .. } => None,
        }
    }
}

impl fmt::Display for RoutingKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Start => f.write_str("Start"),
            Self::Promote => f.write_str("Promote"),
            Self::Pause => f.write_str("Pause"),
            Self::Resume => f.write_str("Resume"),
            Self::Rollback => f.write_str("Rollback"),
            Self::Revert => f.write_str("Revert"),
            Self::Refused { refused } => write!(f, "Refused({refused})"),
        }
    }
}

impl From<RoutingKind> for String {
    fn from(kind: RoutingKind) -> Self {
        kind.to_string()
    }
}

impl TryFrom<String> for RoutingKind {
    type Error = RoutingKindError;

    fn try_from(found: String) -> Result<Self, RoutingKindError> {
        let refused = found.strip_prefix("Refused(").and_then(|rest| rest.strip_suffix(')'));
        match (refused, Self::PLAIN.into_iter().find(|kind| kind.to_string() == found)) {
            (Some(refused), _) => Ok(Self::Refused { refused: refused.into() }),
            (None, Some(kind)) => Ok(kind),
            (None, None) => Err(RoutingKindError { found }),
        }
    }
}

/// What people may want to know.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// A transaction of one service was prepared, committed or aborted; the state carries which.
    Routing {
        /// Its slot.
        slot: Slot,
        /// The record kind.
        kind: RoutingKind,
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
                let kind = RoutingKind::of(operation)?;
                let (state, reasons) = (record.state.clone()?, operation.reasons());
                let initiator = record.intent.initiator;
                Some(Self::Routing { slot, kind, initiator, state, phase, reasons, took_ms })
            }
        }
    }

    /// Returns that a change of a service's routing to `state` was prepared, in this slot; none where `intent` is no such change.
    pub(super) fn prepared(slot: Slot, intent: &Intent, state: RoutingState, phase: String) -> Option<Self> {
        let kind = RoutingKind::of(&intent.operation)?;
        let state = RoutingState { status: Status::Prepared, ..state };
        let initiator = intent.initiator;
        Some(Self::Routing { slot, kind, initiator, state, phase, reasons: Vec::new(), took_ms: None })
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

    /// Returns the service that it is about; none where it is about nodes.
    pub fn service(&self) -> Option<&ServiceId> {
        match self {
            Self::Routing { state, .. } => Some(&state.service),
            Self::Verdict { service, .. }
            | Self::Analyzed { service, .. }
            | Self::LocalHold { service, .. }
            | Self::Enforced { service, .. } => Some(service),
            Self::Membership { .. }
            | Self::Voted { .. }
            | Self::Lease { .. }
            | Self::Coordinator { .. }
            | Self::Peer { .. }
            | Self::Rejected { .. } => None,
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
    /// When it happened, by this node's clock; for a record that is read from the log, when it was proposed.
    pub at: Wall,
    /// Which node says so.
    #[serde(rename = "reported_by")]
    pub node: NodeId,
    /// What.
    #[serde(flatten)]
    pub event: Event,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kind_is_read_back_from_its_text_and_no_other_text_is_one() {
        let refused = RoutingKind::Refused { refused: "Start".into() };
        assert_eq!(refused.to_string(), "Refused(Start)");
        for kind in RoutingKind::PLAIN.into_iter().chain([refused]) {
            let text = serde_json::to_string(&kind).unwrap();
            assert_eq!(text, format!("\"{kind}\""));
            assert_eq!(serde_json::from_str::<RoutingKind>(&text).unwrap(), kind);
        }
        let unknown = RoutingKind::try_from("Freeze".to_string()).unwrap_err();
        assert_eq!(unknown.to_string(), "found \"Freeze\", expected a kind of routing record");
    }
}
