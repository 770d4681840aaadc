//! The five messages between nodes. Fields that carry durations count milliseconds; nobody's clock crosses the wire.

use serde::{Deserialize, Serialize};

use crate::domain::classes::ClassCounts;
use crate::domain::ids::{NodeId, ServiceId};
use crate::domain::sequential::ClassComparison;
use crate::domain::ticks::TickSample;
use crate::domain::window::Evidence;

use super::feature::Feature;
use super::log::checkpoint::Part;
use super::log::record::{Accepted, Ballot, Chosen, Hash, Intent, Record, RunTransfer, SeenDisk, Slot};

/// Everything a node says to another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Message {
    /// Phase 1: promise not to follow lower ballots, and say whether your gate is healthy.
    Prepare(Prepare),
    /// The answer to a PREPARE or to a proposal.
    Vote(Vote),
    /// Phase 2 and after: accept this; this was chosen; this is what you missed.
    Decision(Decision),
    /// I am here, this far; extend my lease, or: I extend yours.
    Heartbeat(Heartbeat),
    /// What this node's traffic looked like.
    HealthSnapshot(HealthSnapshot),
}

impl Message {
    /// Returns what a node must know to read it; none for what every build knows.
    pub fn needs(&self) -> Option<Feature> {
        match self {
            Self::Prepare(prepare) => prepare.intent.operation.needs(),
            Self::Vote(Vote { answer: Answer::Gate { accepted: Some(accepted), .. }, .. }) => {
                accepted.record.intent.operation.needs()
            }
            Self::Decision(Decision::Propose(_, record)) => record.intent.operation.needs(),
            Self::Decision(Decision::Chosen(chosen) | Decision::CatchUp(chosen)) => {
                chosen.record.intent.operation.needs()
            }
            Self::Decision(Decision::Checkpoint(part)) => part.needs(),
            Self::Vote(_) | Self::Heartbeat(_) | Self::HealthSnapshot(_) => None,
        }
    }

    /// Returns the message's name on the wire and in logs.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Prepare(_) => "PREPARE",
            Self::Vote(_) => "VOTE",
            Self::Decision(_) => "DECISION",
            Self::Heartbeat(_) => "HEARTBEAT",
            Self::HealthSnapshot(_) => "HEALTH_SNAPSHOT",
        }
    }
}

/// Phase 1 of a ballot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Prepare {
    /// Ballot in which the coordinator asks.
    pub ballot: Ballot,
    /// The slot it wants to fill.
    pub slot: Slot,
    /// Hash of the slot before.
    pub base_hash: Hash,
    /// Transaction and operation that the coordinator wants to decide.
    pub intent: Intent,
    /// True when the ballot only settles what a lost coordinator left open: nobody's gate is asked.
    pub recovery: bool,
    /// Oldest evidence that a gate may vote on.
    pub evidence_age_ms_max: u64,
}

/// What a node's gate says of a rise in exposure.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum GateVote {
    /// Healthy; with the evidence in words.
    Yes(String),
    /// No: the canary is unhealthy, for the reason in words.
    No(String),
    /// Can't tell: silence is not health.
    Abstain(String),
}

/// Why a node gives no vote.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Refusal {
    /// It promised itself to a higher ballot.
    Stale(Ballot),
    /// The sender lacks decided slots.
    Behind,
    /// The voter lacks decided slots.
    Ahead,
    /// Sender or voter doesn't count in the configuration in force.
    NotVoter,
    /// The transaction is in the log already.
    Decided,
    /// The proposal breaks a rule; with which.
    BadProposal(String),
}

/// Answer of a participant to PREPARE or DECISION.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vote {
    /// Ballot that the answer belongs to.
    pub ballot: Ballot,
    /// Slot that the answer belongs to.
    pub slot: Slot,
    /// The voter's last decided slot.
    pub head: Slot,
    /// Number of the last write of the voter's promises, which the answer may depend on.
    pub writes: u64,
    /// What the participant promised, accepted or refused.
    pub answer: Answer,
}

/// What a participant promises, accepts or refuses.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// Phase 1: the ballot was promised, durably.
    Gate {
        /// What this node accepted for the slot in an earlier ballot.
        accepted: Option<Box<Accepted>>,
        /// Health vote of the node on an increase.
        gate: GateVote,
    },
    /// Phase 2: the record was accepted, durably.
    Accept,
    /// Neither: the ballot or the record is refused.
    Refuse(Refusal),
}

/// DECISION: a record to accept (phase 2), or one that was chosen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Decision {
    /// Accept this record in this ballot.
    Propose(Ballot, Box<Record>),
    /// A majority accepted the record, which is thereby chosen.
    Chosen(Box<Chosen>),
    /// A majority accepted it some time ago, and you missed it.
    CatchUp(Box<Chosen>),
    /// A piece of the sender's checkpoint, for a receiver whose next record is no longer in the sender's log.
    Checkpoint(Part),
}

/// What a node counts as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Membership {
    /// A member whose votes count.
    Voter,
    /// It follows, without a vote: its memory is gone, or it is rebuilding its log.
    Learner,
}

/// The answer to a peer's heartbeat.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Acknowledgement {
    /// Nonce of the heartbeat that is acknowledged.
    pub nonce: u64,
    /// True when the peer's lease may last; false when this node knows of a decrease that the peer doesn't.
    pub granted: bool,
}

/// Sign of life of a node, which asks for an acknowledgement.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Heartbeat {
    /// Answer me with this; none in an answer.
    pub nonce: Option<u64>,
    /// The answer to the receiver's own heartbeat.
    pub acknowledges: Option<Acknowledgement>,
    /// Last slot that the sender has decided.
    pub head: Slot,
    /// Hash of the record at that slot.
    pub head_hash: Hash,
    /// A rise in exposure that the sender knows as decided in doubt and not undone.
    pub in_doubt: Option<Slot>,
    /// The ballot of a record that the sender accepted in the open slot.
    pub open: Option<Ballot>,
    /// What the sender counts as, by its own word.
    pub membership: Membership,
    /// Number of the last write of the sender's promises.
    pub writes: u64,
    /// The newest state of the receiver's disk that the sender knows of; none where it knows of none that counts.
    pub seen: Option<SeenDisk>,
    /// The newest protocol version that the sender speaks. Not in version 8, which is all that its speakers can say.
    pub speaks: u16,
}

/// One service's recent traffic as one node saw it. Each snapshot replaces the one before.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HealthSnapshot {
    /// Service that the snapshot is about.
    pub service: ServiceId,
    /// The routing version under which all of it was observed.
    pub routing_version: u64,
    /// Counts of the sender's sliding window.
    pub evidence: Evidence,
    /// Why the sender stopped its canary traffic by itself; none while it hasn't.
    pub local_hold: Option<String>,
    /// What is left of the sender's lease.
    pub lease_ms_left: u64,
    /// The canary share the sender serves, in basis points.
    pub effective_bp: u16,
    /// The routing version that its rollout began with.
    pub rollout_generation: u64,
    /// What the sender saw lately, by ticks since the rollout began; each is final.
    pub tick_samples: Vec<(u64, TickSample)>,
    /// The sender came late to the rollout, and asks for its analysis run.
    pub asks: Option<RunRequest>,
    /// The sender's analysis run, for a receiver that asked for it.
    pub transfer: Option<Box<RunTransfer>>,
}

/// What a snapshot tells of classes of statuses. It travels behind the snapshot, and only where it says something: protocol version 8
/// has no place for it, so that its speakers compare none.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ClassEvidence {
    /// Answers by class, of stable and of the canary, for each of the snapshot's tick samples.
    pub ticks: Vec<[ClassCounts; 2]>,
    /// The comparison of classes that belongs to the snapshot's analysis run.
    pub compared: Option<ClassComparison>,
}

impl HealthSnapshot {
    /// Returns what it tells of classes; none where it says nothing.
    pub fn classes(&self) -> Option<ClassEvidence> {
        let told = |sample: &TickSample| [sample.evidence.stable.classes, sample.evidence.canary.classes];
        let mut ticks: Vec<_> = self.tick_samples.iter().map(|(_, sample)| told(sample)).collect();
        if ticks.iter().flatten().all(|counts| *counts == ClassCounts::default()) {
            ticks.clear();
        }
        let compared = self.transfer.as_ref().and_then(|transfer| transfer.run.classes());
        let compared = compared.filter(|compared| !compared.is_off()).cloned();
        (!ticks.is_empty() || compared.is_some()).then_some(ClassEvidence { ticks, compared })
    }

    /// Returns it with what it tells of classes; none where that belongs to another snapshot.
    pub fn with_classes(mut self, classes: ClassEvidence) -> Option<Self> {
        let ClassEvidence { ticks, compared } = &classes;
        for ((_, sample), [stable, canary]) in self.tick_samples.iter_mut().zip(ticks) {
            for (stats, counts) in [(&mut sample.evidence.stable, stable), (&mut sample.evidence.canary, canary)] {
                stats.classes = counts.within(stats.count);
            }
        }
        if let (Some(transfer), Some(compared)) = (&mut self.transfer, compared) {
            transfer.run.set_classes(compared.clone());
        }
        (self.classes().as_ref() == Some(&classes)).then_some(self)
    }
}

/// A node that came late to a rollout asks for its analysis run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunRequest {
    /// Who should hand it over; none while it isn't this rollout's turn to be asked for.
    pub whom: Option<NodeId>,
    /// How far the analysis run goes that the sender saved before it restarted, in milliseconds since the rollout
    /// began; 0: it has none.
    pub saved: u64,
}
