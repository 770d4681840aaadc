//! The omniscient observer: what is really promised, accepted and chosen, whatever any node believes.

use std::collections::{BTreeMap, BTreeSet};

use aviary_core::domain::ids::{Incarnation, NodeId, ServiceId, VersionId};
use aviary_core::domain::plan::{Backend, Manifest, OnPartition};
use aviary_core::domain::rollout::{Change, Target};
use aviary_core::protocol::OperatorRequest;
use aviary_core::protocol::Outcome;
use aviary_core::protocol::RequestId;
use aviary_core::protocol::checkpoint::Checkpoint;
use aviary_core::protocol::message::Message;
use aviary_core::protocol::record::{
    Accepted, AcceptorState, Ballot, Chosen, ConfigChange, Hash, Member, Members, Operation, Record, Slot,
};
use std::sync::Arc;

use crate::broken;
use crate::invariants::{AGREEMENT, Violation};

/// Something that happened in a run, as rules see it.
pub enum Fact<'a> {
    /// A node's acceptor state became durable.
    Persisted(&'a NodeId, &'a AcceptorState),
    /// A node learned a chosen record.
    Appended(&'a NodeId, &'a Chosen),
    /// A process started on this log.
    Started(&'a NodeId, &'a [Chosen]),
    /// A node's process sent a message.
    Sent(&'a NodeId, Incarnation, &'a Message),
    /// A client sent a request, with its transaction id.
    Asked(RequestId, &'a str, &'a OperatorRequest),
    /// A client asked for a linearizable read.
    Reads(RequestId),
    /// A client got the answer to its request.
    Replied(RequestId, &'a Outcome),
    /// A majority accepted a record in a ballot.
    Chosen(&'a Record, &'a Ballot),
    /// A node stopped its canary by itself.
    LocalHold(&'a NodeId, &'a ServiceId),
    /// A node summed its log up, or took a peer's sum over.
    SummedUp(&'a NodeId, &'a Checkpoint),
    /// A node shows a decrease of a service, decided at or before this slot, as enforced everywhere.
    Enforced(&'a NodeId, &'a ServiceId, Slot),
    /// What a node would serve at this moment.
    Served(Served<'a>),
    /// What serves a service's stable from here on, at a node.
    Stable {
        /// Node that serves it so.
        node: &'a NodeId,
        /// Service whose stable it is.
        service: &'a ServiceId,
        /// Routing version that the node routes with.
        routing_version: u64,
        /// Version and servers.
        stable: &'a Backend,
    },
    /// Canary answers of a service at a routing version reached a node's gate: how many, and how many failed.
    Observed(&'a ServiceId, u64, u64, u64),
    /// The run is over: everything has healed, and nothing more happens.
    Over,
}

/// What a node would serve of one service.
pub struct Served<'a> {
    /// Node that serves the traffic.
    pub node: &'a NodeId,
    /// Service to which the traffic belongs.
    pub service: &'a ServiceId,
    /// Version that the node treats as canary.
    pub canary: &'a VersionId,
    /// Last slot that this node knows to concern the service.
    pub slot: Slot,
    /// Effective share of the canary at this node, in basis points.
    pub bp: u16,
    /// True while the node writes its acceptor state, or is about to: what it accepted last isn't durable yet.
    pub is_writing: bool,
    /// True when the share ends with a lease.
    pub leased: bool,
    /// What happens to the service's canary without a lease.
    pub on_partition: OnPartition,
}

/// A slot for which a value was chosen.
#[derive(Clone)]
pub struct Known {
    /// Record that was chosen for the slot.
    pub record: Record,
    /// Hash of that record, as ballots and logs name it.
    pub hash: Hash,
    /// The ballots it was chosen in.
    pub ballots: BTreeSet<Ballot>,
    /// True when one of them is the ballot that voted on it, or nobody needed to.
    pub certain: bool,
}

/// Incarnations that durably accepted a value in one ballot.
#[derive(Debug, Clone)]
pub struct Support {
    /// Hash of the value that was accepted.
    pub hash: Hash,
    /// Each node, with the incarnation it did so in.
    pub by: BTreeSet<(NodeId, Incarnation)>,
}

/// What is true of the whole cluster, whatever single nodes know.
#[derive(Clone)]
pub struct Truth {
    /// Microseconds since the run began.
    pub now: u64,
    /// Every chosen slot; genesis first.
    pub log: Vec<Known>,
    /// The membership after each slot.
    pub memberships: Vec<Members>,
    /// Nodes that durably accepted something, by slot and ballot.
    pub accepts: BTreeMap<(Slot, Ballot), Support>,
    /// Nodes that durably promised each ballot.
    pub promises: BTreeMap<Ballot, BTreeSet<(NodeId, Incarnation)>>,
    /// Each node's last durable acceptor state.
    pub acceptors: BTreeMap<NodeId, AcceptorState>,
}

impl Truth {
    /// Returns the truth at genesis.
    pub fn new(genesis: Record, members: Members) -> Self {
        let hash = genesis.hash();
        let first = Known { record: genesis, hash, ballots: BTreeSet::new(), certain: true };
        Self {
            now: 0,
            log: vec![first],
            memberships: vec![members],
            accepts: BTreeMap::new(),
            promises: BTreeMap::new(),
            acceptors: BTreeMap::new(),
        }
    }

    /// Returns the last chosen slot.
    pub fn head(&self) -> Slot {
        Slot(self.log.len() as u64 - 1)
    }

    /// Returns the membership after the last chosen slot.
    pub fn members(&self) -> &Members {
        self.memberships.last().expect("genesis has one")
    }

    /// Returns the membership that decides `slot`; none while its predecessor isn't chosen.
    pub fn membership_for(&self, slot: Slot) -> Option<&Members> {
        self.memberships.get(slot.0.checked_sub(1)? as usize)
    }

    /// Returns what was chosen for `slot`.
    pub fn chosen(&self, slot: Slot) -> Option<&Known> {
        self.log.get(slot.0 as usize)
    }

    /// Counts a durable acceptor state. Returns what became chosen by it, or how agreement broke.
    pub fn persisted(
        &mut self,
        node: &NodeId,
        acceptor: &AcceptorState,
    ) -> Result<Option<(Record, Ballot)>, Violation> {
        self.acceptors.insert(node.clone(), acceptor.clone());
        if let Some(promised) = &acceptor.promised {
            self.promises.entry(promised.clone()).or_default().insert((node.clone(), acceptor.incarnation));
        }
        let Some(Accepted { ballot, record }) = &acceptor.accepted else { return Ok(None) };
        let key = (record.slot, ballot.clone());
        let hash = record.hash();
        let support = self.accepts.entry(key.clone()).or_insert_with(|| Support { hash, by: BTreeSet::new() });
        if support.hash != hash {
            let (slot, other) = (record.slot, support.hash);
            return Err(broken!(AGREEMENT, "ballot {ballot} slot {slot}: two values accepted, {other} and {hash}"));
        }
        if !support.by.insert((node.clone(), acceptor.incarnation)) {
            return Ok(None);
        }
        let Some(members) = self.memberships.get(record.slot.0 as usize - 1) else {
            let (slot, open) = (record.slot, self.head().next());
            return Err(broken!(AGREEMENT, "{node} accepted slot {slot} though slot {open} is not chosen"));
        };
        let count = support.by.iter().filter(|(node, incarnation)| members.counts(node, *incarnation)).count();
        if count < members.quorum() {
            return Ok(None);
        }
        self.choose(hash, record.clone(), ballot.clone())
    }

    fn choose(&mut self, hash: Hash, record: Record, ballot: Ballot) -> Result<Option<(Record, Ballot)>, Violation> {
        let certain = !Chosen { ballot: Some(ballot.clone()), decided_at: record.intent.at, record: record.clone() }
            .is_in_doubt();
        if let Some(known) = self.log.get_mut(record.slot.0 as usize) {
            if known.hash != hash {
                let named = |record: &Record| format!("{} tx {}", record.intent.operation.name(), record.intent.tx);
                return Err(broken!(
                    AGREEMENT,
                    "slot {} has two chosen values: {} in {:?}, and {} in {ballot}",
                    record.slot,
                    named(&known.record),
                    known.ballots.iter().map(ToString::to_string).collect::<Vec<_>>(),
                    named(&record)
                ));
            }
            let first = known.ballots.insert(ballot.clone());
            known.certain |= certain;
            return Ok(first.then_some((record, ballot)));
        }
        let mut members = self.members().clone();
        if let Operation::Config(change) = &record.intent.operation {
            apply(&mut members, change);
        }
        self.memberships.push(members);
        let known = Known { record: record.clone(), hash, ballots: BTreeSet::from([ballot.clone()]), certain };
        self.log.push(known);
        Ok(Some((record, ballot)))
    }
}

fn apply(members: &mut Members, change: &ConfigChange) {
    if let ConfigChange::Add(node, incarnation) = change {
        members.0.entry(node.clone()).or_insert(Member { incarnation: *incarnation, cordoned: false });
    }
    if let ConfigChange::Remove(node) = change {
        members.0.remove(node);
    }
    let Some(member) = members.0.get_mut(change.node()) else { return };
    match change {
        ConfigChange::Cordon(_) => member.cordoned = true,
        ConfigChange::Uncordon(_) => member.cordoned = false,
        ConfigChange::Readmit(_, incarnation) => member.incarnation = *incarnation,
        ConfigChange::Add(..) | ConfigChange::Remove(_) => {}
    }
}

/// One service's rollout as the rules say it must go: written apart from the domain's own arithmetic.
#[derive(Clone, Default)]
pub struct ExpectedRollout {
    /// The rollout, while there is one.
    pub spec: Option<Arc<Manifest>>,
    /// Number of its stage in the rollout file, from 0.
    pub stage: usize,
    /// True while it is in progress.
    pub active: bool,
    /// What may be served of the canary.
    pub ceiling: u16,
    /// What a node may serve of it that learns later that the rollout's completion was decided in doubt, in basis points:
    /// the same version, as the canary it was.
    pub in_doubt: u16,
}

/// Reason for which no rollout can go the way that a chosen record takes it.
#[derive(Debug, thiserror::Error)]
pub enum UnexpectedChange {
    /// A start while another rollout of the service is in progress.
    #[error("starts a rollout while one is in progress")]
    InProgress,
    /// A change, named here, of a service without a rollout in progress.
    #[error("{0} without a rollout in progress")]
    NoRollout(&'static str),
    /// A promotion past a stage, or back.
    #[error("promotes from stage {from} of {stages} to {to:?}")]
    Jumps {
        /// Index of the stage before.
        from: usize,
        /// Number of stages.
        stages: usize,
        /// Stage that was promoted to.
        to: Target,
    },
    /// A revert of this slot, which holds no increase.
    #[error("reverts slot {0}, which raised nothing")]
    RaisedNothing(Slot),
}

/// What is expected of the rollouts of all services, record by record of a log.
#[derive(Clone, Default)]
pub struct ExpectedRollouts {
    /// What is expected of each service, after the last record.
    pub now: BTreeMap<ServiceId, ExpectedRollout>,
    before: BTreeMap<Slot, ExpectedRollout>,
    /// Nodes that are cordoned after the last record.
    pub cordoned: BTreeSet<NodeId>,
}

impl ExpectedRollouts {
    /// Goes one record on; an error says which rule the record breaks.
    pub fn follow(&mut self, record: &Record, certain: bool) -> Result<(), UnexpectedChange> {
        match &record.intent.operation {
            Operation::Config(ConfigChange::Cordon(node)) => {
                self.cordoned.insert(node.clone());
            }
            Operation::Config(ConfigChange::Uncordon(node) | ConfigChange::Remove(node)) => {
                self.cordoned.remove(node);
            }
            _ => {}
        }
        let Some(service) = record.intent.operation.service() else { return Ok(()) };
        let expected = self.now.get(service).cloned().unwrap_or_default();
        if record.intent.operation.increases_exposure() {
            self.before.insert(record.slot, expected.clone());
        }
        let next = match &record.intent.operation {
            Operation::Change(_, change) => expected.after(change, record.intent.operation.name(), certain)?,
            Operation::Revert { increased, .. } => {
                self.before.get(increased).cloned().ok_or(UnexpectedChange::RaisedNothing(*increased))?
            }
            Operation::Verdicts(_)
            | Operation::Refused { .. }
            | Operation::Config(_)
            | Operation::SetDefault(_)
            | Operation::Genesis { .. } => return Ok(()),
        };
        self.now.insert(service.clone(), next);
        Ok(())
    }
}

impl ExpectedRollout {
    fn after(&self, change: &Change, name: &'static str, certain: bool) -> Result<Self, UnexpectedChange> {
        let mut next = self.clone();
        match change {
            Change::Start(spec) => {
                if self.active {
                    return Err(UnexpectedChange::InProgress);
                }
                next = Self { spec: Some(spec.clone()), stage: 0, active: true, ceiling: 0, in_doubt: 0 };
            }
            Change::SetServers(_) => return Ok(next),
            _ if !self.active => return Err(UnexpectedChange::NoRollout(name)),
            Change::Promote { to, full } => {
                let last = self.spec.as_ref().map_or(0, |spec| spec.stages.len() - 1);
                match to {
                    Target::Stage(to) if *to == self.stage + 1 || (*full && *to == last) => next.stage = *to,
                    Target::Complete if self.stage == last => next.active = false,
                    _ => return Err(UnexpectedChange::Jumps { from: self.stage, stages: last + 1, to: *to }),
                }
            }
            Change::Rollback { .. } => next.active = false,
            Change::Pause { .. } | Change::Resume => return Ok(next),
        }
        let weight = next.spec.as_ref().map_or(0, |spec| spec.stages[next.stage].weight.bp());
        let completed = matches!(change, Change::Promote { to: Target::Complete, .. });
        next.in_doubt = if completed { self.ceiling } else { 0 };
        next.ceiling = match (next.active, certain) {
            (_, false) => self.ceiling,
            (false, true) => 0,
            (true, true) => weight,
        };
        Ok(next)
    }
}
