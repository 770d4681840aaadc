//! What people may want to know: decisions, and what this node noticed by itself.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::domain::ids::{NodeId, ServiceId, TxId};
use crate::domain::rollout::Phase;
use crate::domain::routing::{RoutingState, Status};
use crate::domain::run::WindowVerdict;
use crate::domain::time::Wall;
use crate::domain::verdict::Verdict;

use super::log::record::{Chosen, Initiator, Intent, Operation, Record, RecordKind, Sequence, ServiceVerdict, Slot};
use super::message::{GateVote, Prepare};

/// What people may want to know.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// A transaction of one service was prepared, committed or aborted; the state carries which.
    Routing {
        /// Its slot.
        slot: Slot,
        /// What the record is about.
        kind: RecordKind,
        /// The kind of what was refused; none where nothing was.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        refused: Option<String>,
        /// Who made up the transaction's id: a client, or a node by itself.
        initiator: Initiator,
        /// Who asked for it: the name of the client's token, or the node.
        actor: String,
        /// The routing it leads to or leaves in force.
        state: RoutingState,
        /// The phase that the rollout is in after it; none where the service isn't known.
        phase: Option<Phase>,
        /// Why, or who refused.
        reasons: Vec<String>,
        /// When it was decided; none while it is prepared. `state.timestamp` is when it was proposed.
        decided_at: Option<Wall>,
        /// Milliseconds from the one to the other.
        took_ms: Option<u64>,
        /// The node that led the ballot it was decided in.
        coordinator: Option<NodeId>,
    },
    /// The membership changed.
    Membership {
        /// Its slot.
        slot: Slot,
        /// What the record is about.
        kind: RecordKind,
        /// The node concerned.
        node: NodeId,
        /// The transaction.
        txid: TxId,
        /// Who asked for it.
        actor: String,
        /// When it was decided.
        decided_at: Wall,
    },
    /// Another service gets the requests that name none.
    DefaultService {
        /// Its slot.
        slot: Slot,
        /// The service.
        service: ServiceId,
        /// The transaction.
        txid: TxId,
        /// Who asked for it: the name of the client's token, or the node.
        actor: String,
        /// When it was decided.
        decided_at: Wall,
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
        /// Its place among all decisions; none for a change of mind, which isn't in the log.
        sequence: Option<Sequence>,
        /// The service.
        service: ServiceId,
        /// The routing version that its rollout began with.
        rollout_generation: u64,
        /// What was decided, and what that rests on.
        window_verdict: WindowVerdict,
        /// What the log says beside; none for a change of mind.
        #[serde(flatten)]
        decided: Option<DecidedVerdict>,
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

/// What the log says of a window's verdict.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct DecidedVerdict {
    /// The transaction that decided it, with others.
    pub txid: TxId,
    /// The routing in force, which it didn't change.
    pub state: RoutingState,
    /// When it was proposed.
    pub proposed_at: Wall,
    /// When it was decided.
    pub decided_at: Wall,
}

impl Event {
    /// Returns what a decided record tells: the same wherever and whenever it is read, each with its place among all decisions.
    pub fn of(chosen: &Chosen) -> Vec<(Sequence, Self)> {
        let Chosen { ballot, decided_at, record } = chosen;
        let Record { slot, intent: Intent { initiator, tx, actor, at, operation, .. }, .. } = record;
        let alone = |event| vec![(Sequence::of(*slot, 0), event)];
        match operation {
            Operation::Genesis { .. } => Vec::new(),
            Operation::Config(change) => alone(Self::Membership {
                slot: *slot,
                kind: operation.kind(),
                node: change.node().clone(),
                txid: tx.clone(),
                actor: actor.clone(),
                decided_at: *decided_at,
            }),
            Operation::SetDefault(service) => alone(Self::DefaultService {
                slot: *slot,
                service: service.clone(),
                txid: tx.clone(),
                actor: actor.clone(),
                decided_at: *decided_at,
            }),
            Operation::Verdicts(verdicts) => {
                let analyzed = |(index, verdict): (usize, &ServiceVerdict)| {
                    let sequence = Sequence::of(*slot, index);
                    let ServiceVerdict { routing, rollout_generation, window_verdict } = verdict.clone();
                    let (txid, proposed_at, decided_at) = (tx.clone(), *at, *decided_at);
                    let service = routing.service.clone();
                    let decided = Some(DecidedVerdict { txid, state: routing, proposed_at, decided_at });
                    let told = Some(sequence);
                    (sequence, Self::Analyzed { sequence: told, service, rollout_generation, window_verdict, decided })
                };
                verdicts.iter().enumerate().map(analyzed).collect()
            }
            Operation::Refused { .. } | Operation::Change(..) | Operation::Revert { .. } => {
                let refused = match operation {
                    Operation::Refused { refused, .. } => Some(refused.clone()),
                    _ => None,
                };
                let Some(state) = record.state.clone() else { return Vec::new() };
                alone(Self::Routing {
                    slot: *slot,
                    kind: operation.kind(),
                    refused,
                    initiator: *initiator,
                    actor: actor.clone(),
                    took_ms: Some(decided_at.0.saturating_sub(state.timestamp.0)),
                    coordinator: ballot.as_ref().map(|ballot| ballot.node.clone()),
                    state,
                    phase: record.phase,
                    reasons: operation.reasons(),
                    decided_at: Some(*decided_at),
                })
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

    /// Returns the service that it is about; none where it is about nodes.
    pub fn service(&self) -> Option<&ServiceId> {
        match self {
            Self::Routing { state, .. } => Some(&state.service),
            Self::Verdict { service, .. }
            | Self::Analyzed { service, .. }
            | Self::LocalHold { service, .. }
            | Self::DefaultService { service, .. }
            | Self::Enforced { service, .. } => Some(service),
            Self::Membership { .. }
            | Self::Voted { .. }
            | Self::Lease { .. }
            | Self::Coordinator { .. }
            | Self::Peer { .. }
            | Self::Rejected { .. } => None,
        }
    }

    /// Returns the place among all decisions of the one that it tells of; none where it isn't about a decision.
    pub fn sequence(&self) -> Option<Sequence> {
        match self {
            Self::Routing { slot, state, .. } => (state.status != Status::Prepared).then(|| Sequence::of(*slot, 0)),
            Self::Membership { slot, .. } | Self::DefaultService { slot, .. } => Some(Sequence::of(*slot, 0)),
            Self::Analyzed { sequence, .. } => *sequence,
            Self::Verdict { .. }
            | Self::Voted { .. }
            | Self::LocalHold { .. }
            | Self::Enforced { .. }
            | Self::Lease { .. }
            | Self::Coordinator { .. }
            | Self::Peer { .. }
            | Self::Rejected { .. } => None,
        }
    }

    /// Returns when what it tells of was decided; none where it isn't about a decision.
    pub fn decided_at(&self) -> Option<Wall> {
        match self {
            Self::Routing { decided_at, .. } => *decided_at,
            Self::Analyzed { decided, .. } => decided.as_ref().map(|decided| decided.decided_at),
            Self::Membership { decided_at, .. } | Self::DefaultService { decided_at, .. } => Some(*decided_at),
            Self::Verdict { .. }
            | Self::Voted { .. }
            | Self::LocalHold { .. }
            | Self::Enforced { .. }
            | Self::Lease { .. }
            | Self::Coordinator { .. }
            | Self::Peer { .. }
            | Self::Rejected { .. } => None,
        }
    }
}

/// A moment and what happened: the shell adds the time.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
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

impl Announcement {
    /// Returns what a node says of an event that it notices `now`. A decision's time is when it was decided, so that it is told the
    /// same when it is read from the log later.
    pub fn new(event: Event, now: Wall, node: &NodeId) -> Self {
        Self { at: event.decided_at().unwrap_or(now), node: node.clone(), event }
    }
}
