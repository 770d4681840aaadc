//! What the log holds: chosen records, hash-chained, each with the votes that allowed it; the promises beside it, and
//! the analysis runs
//! that are saved.

use std::collections::BTreeMap;
use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::domain::ids::{ClusterId, Incarnation, NodeId, ServiceId, TxId};
use crate::domain::rollout::{Change, Phase};
use crate::domain::routing::RoutingState;
use crate::domain::run::{AnalysisRun, WindowVerdict};
use crate::domain::time::Wall;
use crate::protocol::feature::Feature;

/// Position in the log; 0 is genesis. Decoding refuses those above [`Slot::MAX`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "u64")]
pub struct Slot(pub u64);

/// A number that no log gets to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("slot is {0}, expected at most {max}", max = Slot::MAX)]
pub struct SlotError(u64);

impl TryFrom<u64> for Slot {
    type Error = SlotError;

    fn try_from(slot: u64) -> Result<Self, SlotError> {
        if slot <= Self::MAX.0 { Ok(Self(slot)) } else { Err(SlotError(slot)) }
    }
}

impl Slot {
    /// The last position that is told: far above what any cluster reaches, and far enough below the largest number that
    /// counting on from it can't overflow.
    pub const MAX: Self = Self(1 << 51);

    /// Returns the position after this one.
    pub const fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl fmt::Display for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Position of one decision among all of them: of a record, which may hold the verdicts of many services, and of its place in
/// that record. Strictly increasing, with gaps: `slot × 4096 + index`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize, JsonSchema)]
pub struct Sequence(pub u64);

impl Sequence {
    const IN_A_SLOT: u64 = 4096;

    /// Returns the position of the decision with this index in a slot; the index is below 4096.
    pub fn of(slot: Slot, index: usize) -> Self {
        let index = index as u64;
        assert!(index < Self::IN_A_SLOT, "a record holds less than 4096 decisions");
        Self(slot.0 * Self::IN_A_SLOT + index)
    }

    /// Returns the last position in a slot: a reader that goes on after it misses nothing and repeats nothing of it.
    pub fn last_of(slot: Slot) -> Self {
        Self::of(slot, Self::IN_A_SLOT as usize - 1)
    }

    /// Returns the slot.
    pub fn slot(self) -> Slot {
        Slot(self.0 / Self::IN_A_SLOT)
    }

    /// Returns the slot in which the decisions after this one begin: the same one, where it may hold more of them.
    pub fn next_slot(self) -> Slot {
        Self(self.0 + 1).slot()
    }
}

impl fmt::Display for Sequence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// BLAKE3 of a record, which contains its predecessor's: equal hashes mean equal histories.
#[derive(Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Hash(pub [u8; 32]);

impl fmt::Display for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0[..8].iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The number of an attempt to decide a slot; never used for two attempts at the same slot. One ballot serves slot after
/// slot until a node promises a higher one: a promise is about every slot that is open then or later.
///
/// `boot` counts the starts of the process and is durable before the first message of a start: that alone makes a
/// ballot unique, so that PREPARE need not wait for its own sender's disk.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Ballot {
    /// StepComparison first; above everything its node had promised.
    pub round: u64,
    /// Node that leads the ballot.
    pub node: NodeId,
    /// Incarnation of that node.
    pub incarnation: Incarnation,
    /// Which start of that node's process.
    pub boot: u64,
}

impl fmt::Display for Ballot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.round, self.node, self.boot)
    }
}

/// A voter of the configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// The only incarnation whose votes count.
    pub incarnation: Incarnation,
    /// True when rollouts go on without this node's Yes; it stays an acceptor, and on stable.
    pub cordoned: bool,
}

/// Who decides: the configuration in force.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Members(pub BTreeMap<NodeId, Member>);

impl Members {
    /// Returns how many voters make a majority.
    pub fn quorum(&self) -> usize {
        self.0.len() / 2 + 1
    }

    /// Returns true when `incarnation` of `node` is the one whose votes count.
    pub fn counts(&self, node: &NodeId, incarnation: Incarnation) -> bool {
        self.0.get(node).is_some_and(|member| member.incarnation == incarnation)
    }

    /// Returns the nodes whose Yes a rise in exposure needs.
    pub fn gate_voters(&self) -> impl Iterator<Item = &NodeId> {
        self.0.iter().filter(|(_, member)| !member.cordoned).map(|(node, _)| node)
    }

    /// Returns true when `node` is out of the gate set.
    pub fn is_cordoned(&self, node: &NodeId) -> bool {
        self.0.get(node).is_some_and(|member| member.cordoned)
    }
}

/// One change of the membership.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ConfigChange {
    /// Let rollouts go on without this node.
    Cordon(NodeId),
    /// Include the node in promotion votes again.
    Uncordon(NodeId),
    /// Count this incarnation's votes from here on.
    Readmit(NodeId, Incarnation),
    /// Make this node, in this incarnation, a voter.
    Add(NodeId, Incarnation),
    /// Go on without this node for good; it serves stable only.
    Remove(NodeId),
}

impl ConfigChange {
    /// Returns the node that the change is about.
    pub fn node(&self) -> &NodeId {
        let (Self::Cordon(node)
        | Self::Uncordon(node)
        | Self::Readmit(node, _)
        | Self::Add(node, _)
        | Self::Remove(node)) = self;
        node
    }
}

/// What one transaction is about.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Operation {
    /// The first record of every log.
    Genesis {
        /// Cluster that begins here.
        cluster: ClusterId,
        /// Members of the cluster at its beginning, all of them voters.
        members: Members,
    },
    /// A change of one service.
    Change(ServiceId, Change),
    /// The increase at `increased` was decided in doubt: undo it.
    Revert {
        /// Service whose rollout the increase belongs to.
        service: ServiceId,
        /// Slot of the increase that is undone.
        increased: Slot,
        /// Reason for the revert, in words.
        reason: String,
    },
    /// The transaction was refused; nothing changes but that everybody knows.
    Refused {
        /// The service it concerned; none for a change of membership.
        service: Option<ServiceId>,
        /// Name of the change that was refused.
        refused: String,
        /// Reasons of the nodes that refused, each with its node.
        reasons: Vec<String>,
    },
    /// A change of the members, or of who votes on promotions.
    Config(ConfigChange),
    /// What closed windows say, one of each service at most, ordered by service. The windows of a rollout follow each other
    /// without a gap, each decided once.
    Verdicts(Vec<ServiceVerdict>),
    /// Requests that name no service go to this one.
    SetDefault(ServiceId),
}

/// What a closed window of a rollout says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceVerdict {
    /// The routing in force, which the verdict doesn't change.
    pub routing: RoutingState,
    /// The routing version that the rollout began with.
    pub rollout_generation: u64,
    /// The verdict, and what it rests on.
    pub window_verdict: WindowVerdict,
}

/// Most verdicts in one record, and most bytes of them all: what fits into a frame with room to spare.
pub const VERDICTS_MAX: (usize, usize) = (256, 32 * 1024);
const _: () = assert!(VERDICTS_MAX.1 < crate::domain::limits::RECORD_BYTES_MAX);

/// What a record is about, for people.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum RecordKind {
    /// The first record of every log.
    Genesis,
    /// A rollout began.
    Start,
    /// The canary's weight was raised, or the canary became stable.
    Promote,
    /// All traffic went back to stable.
    Rollback,
    /// The weight is held.
    Pause,
    /// A paused rollout goes on.
    Resume,
    /// An increase that was decided in doubt was undone.
    Revert,
    /// A transaction was refused.
    Refused,
    /// A node was cordoned.
    Cordon,
    /// A node's Yes is needed again.
    Uncordon,
    /// A node's vote counts again.
    Readmit,
    /// A node became a voter.
    Add,
    /// A node was removed.
    Remove,
    /// Windows were closed and got their verdicts.
    Verdict,
    /// A service became the one that gets the requests that name none.
    SetDefault,
    /// What serves as stable got other servers.
    SetServers,
}

impl RecordKind {
    /// Returns its name, as logs, events and metrics show it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Genesis => "Genesis",
            Self::Start => "Start",
            Self::Promote => "Promote",
            Self::Rollback => "Rollback",
            Self::Pause => "Pause",
            Self::Resume => "Resume",
            Self::Revert => "Revert",
            Self::Refused => "Refused",
            Self::Cordon => "Cordon",
            Self::Uncordon => "Uncordon",
            Self::Readmit => "Readmit",
            Self::Add => "Add",
            Self::Remove => "Remove",
            Self::Verdict => "Verdict",
            Self::SetDefault => "SetDefault",
            Self::SetServers => "SetServers",
        }
    }
}

impl Operation {
    /// Returns what it is about.
    pub fn kind(&self) -> RecordKind {
        match self {
            Self::Genesis { .. } => RecordKind::Genesis,
            Self::Change(_, Change::Start(_)) => RecordKind::Start,
            Self::Change(_, Change::Promote { .. }) => RecordKind::Promote,
            Self::Change(_, Change::Rollback { .. }) => RecordKind::Rollback,
            Self::Change(_, Change::Pause { .. }) => RecordKind::Pause,
            Self::Change(_, Change::Resume) => RecordKind::Resume,
            Self::Change(_, Change::SetServers(_)) => RecordKind::SetServers,
            Self::Revert { .. } => RecordKind::Revert,
            Self::Refused { .. } => RecordKind::Refused,
            Self::Config(ConfigChange::Cordon(_)) => RecordKind::Cordon,
            Self::Config(ConfigChange::Uncordon(_)) => RecordKind::Uncordon,
            Self::Config(ConfigChange::Readmit(..)) => RecordKind::Readmit,
            Self::Config(ConfigChange::Add(..)) => RecordKind::Add,
            Self::Config(ConfigChange::Remove(_)) => RecordKind::Remove,
            Self::Verdicts(_) => RecordKind::Verdict,
            Self::SetDefault(_) => RecordKind::SetDefault,
        }
    }

    /// Returns the record kind's name.
    pub fn name(&self) -> &'static str {
        self.kind().name()
    }

    /// Returns the service that it changes, or was to change.
    pub fn service(&self) -> Option<&ServiceId> {
        match self {
            Self::Change(service, _) | Self::Revert { service, .. } => Some(service),
            Self::Refused { service, .. } => service.as_ref(),
            Self::Genesis { .. } | Self::Config(_) | Self::Verdicts(_) | Self::SetDefault(_) => None,
        }
    }

    /// Returns what a node must know to read it; none for what every build knows.
    pub fn needs(&self) -> Option<Feature> {
        match self {
            Self::SetDefault(_) => Some(Feature::DefaultService),
            Self::Change(_, Change::SetServers(_)) => Some(Feature::StableServers),
            Self::Genesis { .. }
            | Self::Change(..)
            | Self::Revert { .. }
            | Self::Refused { .. }
            | Self::Config(_)
            | Self::Verdicts(_) => None,
        }
    }

    /// Returns true when it changes neither routing nor membership: nothing is served by it.
    pub fn is_verdict(&self) -> bool {
        match self {
            Self::Verdicts(_) => true,
            Self::Genesis { .. }
            | Self::Change(..)
            | Self::Refused { .. }
            | Self::Revert { .. }
            | Self::Config(_)
            | Self::SetDefault(_) => false,
        }
    }

    /// Returns why it is asked for, as far as it says.
    pub fn reasons(&self) -> Vec<String> {
        let reasons = match self {
            Self::Refused { reasons, .. } => reasons.clone(),
            Self::Revert { reason, .. } | Self::Change(_, Change::Rollback { reason } | Change::Pause { reason }) => {
                vec![reason.clone()]
            }
            Self::Change(_, Change::SetServers(urls)) => vec![urls.join(", ")],
            Self::Change(..) | Self::Genesis { .. } | Self::Config(_) | Self::Verdicts(_) | Self::SetDefault(_) => {
                Vec::new()
            }
        };
        reasons.into_iter().filter(|reason| !reason.is_empty()).collect()
    }

    /// Returns true when it needs every gate voter's Yes.
    pub fn increases_exposure(&self) -> bool {
        match self {
            Self::Change(_, change) => change.increases_exposure(),
            Self::Genesis { .. }
            | Self::Refused { .. }
            | Self::Revert { .. }
            | Self::Config(_)
            | Self::Verdicts(_)
            | Self::SetDefault(_) => false,
        }
    }

    /// Returns true when some node must serve less canary by it.
    pub fn decreases_exposure(&self) -> bool {
        match self {
            Self::Change(_, change) => change.decreases_exposure(),
            Self::Revert { .. } | Self::Config(ConfigChange::Cordon(_) | ConfigChange::Remove(_)) => true,
            Self::Config(ConfigChange::Add(..) | ConfigChange::Readmit(..) | ConfigChange::Uncordon(_))
            | Self::Genesis { .. }
            | Self::Refused { .. }
            | Self::Verdicts(_)
            | Self::SetDefault(_) => false,
        }
    }
}

/// Who made up a transaction's id. Ids of clients and of nodes never meet, whatever their text is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Initiator {
    /// A client, or the node that it sent a request without a key to.
    Client,
    /// A node of the cluster, for a change that no operator asked for.
    Node,
}

/// Key that tells transactions apart: who began it, and its id.
pub type TransactionKey = (Initiator, TxId);

/// A transaction as its client asked for it, before anybody voted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Intent {
    /// Who made up its id.
    pub initiator: Initiator,
    /// Id of the transaction, by which clients repeat it.
    pub tx: TxId,
    /// Who asked for it: the name of a client's token, or the node that wants it by itself. At most 500 characters.
    pub actor: String,
    /// Fingerprint of the request: one id may not stand for two requests.
    pub digest: u64,
    /// When its coordinator proposed it.
    pub at: Wall,
    /// Operation that the transaction carries out.
    pub operation: Operation,
}

impl Intent {
    /// Returns what tells this transaction apart from others.
    pub fn key(&self) -> TransactionKey {
        (self.initiator, self.tx.clone())
    }
}

/// The health votes of one ballot: what allows a rise in exposure.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Certificate {
    /// The ballot they were given in.
    pub ballot: Ballot,
    /// Who said Yes, and on what evidence.
    pub yes: BTreeMap<NodeId, String>,
}

/// One entry of the log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Position of the record in the log.
    pub slot: Slot,
    /// Hash of the record at the slot before.
    pub prev_hash: Hash,
    /// Transaction, operation and proposer that the record states.
    pub intent: Intent,
    /// The routing it leads to or leaves in force; none for membership and verdicts.
    pub state: Option<RoutingState>,
    /// The phase that the rollout is in after it; none where `state` is none.
    pub phase: Option<Phase>,
    /// The votes behind a rise in exposure; none for what needs no votes.
    pub certificate: Option<Certificate>,
}

impl Record {
    /// Returns the record's hash, which covers its whole history.
    pub fn hash(&self) -> Hash {
        let bytes = super::codec::encode(self);
        Hash(*blake3::hash(&bytes).as_bytes())
    }
}

/// A record and the ballot it was chosen in, as the log stores it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chosen {
    /// The ballot; none for genesis, which nobody voted on.
    pub ballot: Option<Ballot>,
    /// When its coordinator saw that a majority had accepted it, on that node's clock. Not part of the record's hash: of two
    /// coordinators that complete one slot, each has its own time.
    pub decided_at: Wall,
    /// The record.
    pub record: Record,
}

impl Chosen {
    /// Returns true when a rise in exposure was completed by a later ballot than the one that voted on it: its
    /// evidence may be stale, so no node routes with it.
    pub fn is_in_doubt(&self) -> bool {
        let Some(certificate) = &self.record.certificate else { return false };
        self.record.intent.operation.increases_exposure() && self.ballot.as_ref() != Some(&certificate.ballot)
    }
}

/// A record that this node accepted and doesn't know to be chosen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Accepted {
    /// The ballot it was accepted in.
    pub ballot: Ballot,
    /// The record; its slot is the open one.
    pub record: Record,
}

/// A node's promises: what it must not forget, whatever happens to its log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AcceptorState {
    /// Cluster that the disk belongs to.
    pub cluster: ClusterId,
    /// Node that the disk belongs to.
    pub node: NodeId,
    /// This run of its disk.
    pub incarnation: Incarnation,
    /// Number of times that a process started on this disk.
    pub boot: u64,
    /// No ballot below this one gets a vote.
    pub promised: Option<Ballot>,
    /// The open slot's accepted record.
    pub accepted: Option<Accepted>,
    /// Last slot known to be chosen when this was written. A log that ends before it lost something.
    pub head: Slot,
    /// Hash of the record at that slot.
    pub head_hash: Hash,
    /// Number of this write. Peers remember the highest that they heard of: who starts from an older one forgot promises.
    pub writes: u64,
    /// What this node heard of the writes of the members' disks.
    pub seen: BTreeMap<NodeId, SeenDisk>,
}

/// The newest state of another node's disk that is known of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeenDisk {
    /// Incarnation of the disk.
    pub incarnation: Incarnation,
    /// The highest number of a write, by that node's own word.
    pub writes: u64,
}

/// An analysis run on a node's disk, should all nodes restart at once.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedRun {
    /// The routing version that its rollout began with.
    pub rollout_generation: u64,
    /// Time of day at which it was saved.
    pub at: Wall,
    /// The analysis run at that time.
    pub run: RunTransfer,
}

/// An analysis run as far as one node knows it, for another that came late.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunTransfer {
    /// Milliseconds since the rollout began, on the sender's clock.
    pub at_ms: u64,
    /// The run as it was at that time.
    pub run: AnalysisRun<NodeId>,
    /// Windows that are closed and, as far as the sender knows, not decided yet.
    pub closed: Vec<WindowVerdict>,
}

impl RunTransfer {
    /// Returns true when its parts agree, as they do in every one of ours; bytes from outside may not.
    pub fn is_sound(&self) -> bool {
        self.at_ms < 1 << 53 && self.run.is_sound() && self.closed.iter().all(WindowVerdict::is_finite)
    }
}
