//! How nodes agree: two-phase commit whose phases are also Paxos's, without IO.
//!
//! [`Core::handle`] takes the time and one [`Input`] and returns [`Output`]s. It never waits, reads a clock or draws a
//! random number, so the node's shell and the simulator call exactly the same code.
//!
//! The shell's duties, in order:
//! 1. Carry out the outputs of one call **in their order**, and all of them before the next call.
//! 2. [`Output::Persist`] is a barrier: when it returns, the register *and everything appended before it* survive
//!    power loss. What follows in the list may depend on it. If it fails, the process stops.
//! 3. [`Output::Append`] is ordered but no barrier: its record may be lost in a crash until a later `Persist`.
//!    A chosen record is already durable in a majority of registers; losing the note that it was chosen is harmless.
//! 4. [`Output::Send`] may be lost, delayed, repeated and reordered. The core never waits for a peer.
//! 5. Call [`Core::handle`] with [`Input::Tick`] at least every 25 ms.
//!
//! Reading order: `record` (what is stored), `message` (what is said), `ledger` (what the log adds up to), then
//! `participant`, `coordinator`, `lease`, `gate`, `autopilot`, and `core`, which puts them together.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::domain::analysis::Verdict;
use crate::domain::ids::{ClusterId, Incarnation, NodeId, ServiceId, TxId};
use crate::domain::plan::{Backend, RolloutSpec};
use crate::domain::rollout::Service;
use crate::domain::routing::RoutingState;
use crate::domain::run::{SequentialEvidence, WindowVerdict};
use crate::domain::time::{Mono, Wall};
use crate::domain::window::Evidence;

mod autopilot;
pub mod checkpoint;
pub mod codec;
mod coordinator;
mod core;
mod gate;
mod lease;
pub mod ledger;
pub mod message;
mod participant;
pub mod record;
#[cfg(test)]
mod tests;
mod tracker;

pub use self::core::{Core, Retention, Settings};

use checkpoint::Checkpoint;
use message::{Membership, Message};
use record::{AcceptorState, Chosen, ConfigChange, Hash, SavedRun, Slot};

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
    /// Between two health snapshots.
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

/// Names one request at this node, from the question to its answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub u64);

/// What an operator asks for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum OperatorRequest {
    /// Begin this rollout.
    Apply(Arc<RolloutSpec>),
    /// Go to the next stage, or (`full`) to 100 %.
    Promote {
        /// The service.
        service: ServiceId,
        /// Skip the stages between and the wait for samples; a failing gate still says No.
        full: bool,
    },
    /// Hold the weight.
    Pause {
        /// The service.
        service: ServiceId,
        /// Why.
        reason: String,
    },
    /// Go on after a pause.
    Resume {
        /// The service.
        service: ServiceId,
    },
    /// Everything back to stable; never waits for a gate.
    Abort {
        /// The service.
        service: ServiceId,
        /// Why.
        reason: String,
    },
    /// Start the rolled-back rollout again.
    Retry {
        /// The service.
        service: ServiceId,
    },
    /// Start the completed rollout the other way round; abort one in progress.
    Undo {
        /// The service.
        service: ServiceId,
    },
    /// Change the membership.
    Config(ConfigChange),
}

/// A request to the core.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Command {
    /// Where the answer goes.
    pub request: RequestId,
    /// The transaction's id: the client's `Idempotency-Key`.
    pub tx: TxId,
    /// What is asked.
    pub asked: OperatorRequest,
}

/// What one version's traffic did since the last report.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Observation {
    /// The service.
    pub service: ServiceId,
    /// The routing version that the requests were routed by.
    pub routing_version: u64,
    /// The counts.
    pub evidence: Evidence,
}

/// What another system answered to a query.
#[derive(Debug, Clone, PartialEq)]
pub struct Measurement {
    /// The service.
    pub service: ServiceId,
    /// The routing version that was in force when it was asked.
    pub routing_version: u64,
    /// The query's name.
    pub name: String,
    /// The value, or why there is none.
    pub value: Result<f64, String>,
}

// Two measurements that are no number are the same for whoever compares inputs.
impl Eq for Measurement {}

/// What reaches the core.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Input {
    /// Time passed.
    Tick,
    /// A peer said something.
    Received {
        /// The authenticated peer.
        from: NodeId,
        /// Its incarnation, by its own word.
        incarnation: Incarnation,
        /// What it said.
        message: Box<Message>,
    },
    /// The connection to a peer broke, and a new one was refused: a hint that its process is gone.
    Unreachable(NodeId),
    /// The data plane's counts.
    Telemetry(Vec<Observation>),
    /// Another system's metric.
    Measured(Measurement),
    /// The data plane's circuit breaker stopped a canary by itself.
    CircuitBreakerTripped {
        /// The service.
        service: ServiceId,
        /// The routing version it was routed by.
        routing_version: u64,
        /// What happened, in words.
        reason: String,
    },
    /// Whether the store that promotions depend on does what it should: why not, or none.
    Guarded(Option<String>),
    /// An operator asks for a change.
    Operator(Command),
    /// A client asks for a read that counts every answered write.
    Read(RequestId),
}

/// What the shell is to do.
#[derive(Debug, Clone, PartialEq)]
pub enum Output {
    /// Write the register durably, and with it everything appended before.
    Persist(Box<AcceptorState>),
    /// Append a chosen record to the log.
    Append(Box<Chosen>),
    /// Tell a peer.
    Send {
        /// The peer.
        to: NodeId,
        /// What.
        message: Box<Message>,
    },
    /// Keep this checkpoint, which covers the log so far, and let records before `keep_from` go.
    Checkpoint {
        /// The sum of the log.
        checkpoint: Checkpoint,
        /// The first record that must stay readable.
        keep_from: Slot,
    },
    /// Put a peer's checkpoint in place of the log. A barrier like [`Output::Persist`].
    Install(Checkpoint),
    /// Send a peer the log's records from `from`, each as [`message::Decision::CatchUp`], as many as fit in a second.
    SendLog {
        /// The peer.
        to: NodeId,
        /// The first record it lacks.
        from: Slot,
        /// The last record to send.
        through: Slot,
    },
    /// Save the trial of a service in place of the one before, or none: it is over. No barrier, and no promise.
    SaveRun(ServiceId, Option<Box<SavedRun>>),
    /// Serve by this.
    Publish(Arc<View>),
    /// Canary traffic that needs a lease may go on until its lease length after this; none: stop it.
    Lease(Option<Mono>),
    /// Answer a request.
    Reply(RequestId, Outcome),
    /// Tell people.
    Announce(Event),
}

/// How a request ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// Decided and in force.
    Committed {
        /// Its slot.
        slot: Slot,
        /// The routing it led to; none for membership.
        state: Option<RoutingState>,
        /// True when an earlier request with this id did it.
        repeated: bool,
    },
    /// Decided against.
    Aborted {
        /// Its slot.
        slot: Slot,
        /// Who refused, and why.
        reasons: Vec<String>,
        /// True when an earlier request with this id was answered so.
        repeated: bool,
    },
    /// Nothing to do: the cluster is there already.
    Unchanged(RoutingState),
    /// Not possible as things stand; nothing was decided.
    Refused(String),
    /// The id stands for another request.
    KeyReused {
        /// The slot of that request.
        slot: Slot,
    },
    /// No majority answered; nothing was proposed. May be tried again.
    NoQuorum {
        /// Nodes that answered, this one included.
        reached: Vec<NodeId>,
        /// How many are needed.
        needed: usize,
    },
    /// Proposed, and no majority confirmed it in time. The same id will tell later.
    InDoubt,
    /// Too many requests are waiting.
    Busy,
    /// A read: every write answered before it was asked is in slots up to here, and this node has them.
    Current(Slot),
}

/// What a node as a whole is able to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// A voter in touch with a majority.
    Normal,
    /// No lease: canary traffic that needs one is off.
    FailSafe,
    /// Without a vote.
    Learner,
}

/// What the data plane serves one service by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Serving {
    /// The committed routing version.
    pub routing_version: u64,
    /// What serves everything else.
    pub stable: Backend,
    /// What is on trial, and its share at most, in basis points; the share is 0 when something holds it back.
    pub canary: Option<(Backend, u16)>,
    /// Milliseconds that canary traffic outlives the lease's start; none: no lease is needed.
    pub lease_ms: Option<u64>,
    /// Stickiness and matches are the rollout's.
    pub spec: Arc<RolloutSpec>,
    /// Why less than the committed share is served; none when nothing holds it back.
    pub held_back: Option<String>,
}

/// One service as this node sees it.
#[derive(Debug, Clone, PartialEq)]
pub struct ServiceView {
    /// What is agreed.
    pub service: Service,
    /// The last record that concerned it.
    pub slot: Slot,
    /// That record's hash.
    pub hash: Hash,
    /// What is served.
    pub serving: Serving,
    /// This node's window.
    pub local: Evidence,
    /// All nodes' windows.
    pub cluster: Evidence,
    /// What the analysis says, when the canary has traffic.
    pub verdict: Option<Verdict>,
    /// The comparison's reckoning; none without one.
    pub sequential: Option<SequentialEvidence>,
    /// What the rollout waits for, in words; empty when it waits for nothing.
    pub waiting_for: String,
    /// The last lowering: true once every voter obeys it or every lease it could outlive has ended.
    pub enforced: bool,
}

// No figure in it is ever NaN. What is the same is then known without looking into it.
impl Eq for ServiceView {}

/// One member as this node sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemberView {
    /// Whose votes count.
    pub incarnation: Incarnation,
    /// Out of the gate set.
    pub cordoned: bool,
    /// Heard from lately.
    pub alive: bool,
    /// Its last decided slot, by its last word.
    pub head: Option<Slot>,
    /// Why its votes don't count; none when they do.
    pub counts_not: Option<String>,
}

/// Everything this node serves by and shows.
#[derive(Debug, Clone, PartialEq)]
pub struct View {
    /// The node.
    pub node: NodeId,
    /// Its cluster.
    pub cluster: ClusterId,
    /// This run of its disk.
    pub incarnation: Incarnation,
    /// Voter or learner; whether it holds a lease is the reader's to compare with the clock.
    pub membership: Membership,
    /// Last decided slot.
    pub head: Slot,
    /// Its hash.
    pub head_hash: Hash,
    /// Whom this node takes for the coordinator.
    pub coordinator: NodeId,
    /// The voters.
    pub members: BTreeMap<NodeId, MemberView>,
    /// The services.
    pub services: BTreeMap<ServiceId, Arc<ServiceView>>,
}

impl View {
    /// Returns the view of a node by itself, of one service whose weights nobody changes any more, and no lease ends.
    pub fn fixed(node: NodeId, service: Service) -> Self {
        let (spec, routing) = (service.rollout.spec.clone(), &service.routing);
        let canary = routing.canary_model_id.as_ref().map(|_| (spec.canary.clone(), routing.canary_weight().bp()));
        let serving = Serving {
            routing_version: routing.version,
            stable: service.stable.clone(),
            canary,
            lease_ms: None,
            spec,
            held_back: None,
        };
        let id = routing.service.clone();
        let shown = ServiceView {
            service,
            slot: Slot(0),
            hash: Hash::default(),
            serving,
            local: Evidence::default(),
            cluster: Evidence::default(),
            verdict: None,
            sequential: None,
            waiting_for: String::new(),
            enforced: true,
        };
        Self {
            node: node.clone(),
            cluster: ClusterId([0; 16]),
            incarnation: Incarnation(0),
            membership: Membership::Voter,
            head: Slot(0),
            head_hash: Hash::default(),
            coordinator: node,
            members: BTreeMap::new(),
            services: BTreeMap::from([(id, Arc::new(shown))]),
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
        kind: String,
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
    Judged {
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
    /// A lowering is in force everywhere.
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
