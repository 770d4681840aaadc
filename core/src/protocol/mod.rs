//! How nodes agree: two-phase commit whose phases are also Paxos's, without IO.
//!
//! [`Core::handle`] takes the time and one [`Input`] and returns [`Output`]s. It never waits, reads a clock or draws a
//! random number, so the node's shell and the simulator call exactly the same code.
//!
//! The shell's duties, in order:
//! 1. Carry out the outputs of one call **in their order**, and all of them before the next call.
//! 2. [`Output::Persist`] is a barrier: when it returns, the acceptor state *and everything appended before it* survive
//!    power loss. What follows in the list may depend on it. If it fails, the process stops.
//! 3. [`Output::Append`] is ordered but no barrier: its record may be lost in a crash until a later `Persist`.
//!    A chosen record is already durable in a majority of acceptor states; losing the note that it was chosen is
//!    harmless.
//! 4. [`Output::Send`] may be lost, delayed, repeated and reordered. The core never waits for a peer.
//! 5. Call [`Core::handle`] with [`Input::Tick`] at least every 25 ms.
//!
//! Reading order: `log::record` (what is stored), `message` (what is said), `log::ledger` (what the log adds up to), then
//! `core`, which takes an input and has the components deal with it: `acceptor`, `coordinator`, `catch_up`, `lease`, `gate`,
//! `runs`, `autopilot`. A component owns its state; it gets the `context` that all share and returns what is to follow.
//! It never calls another one: only `core` does.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::domain::ids::{Incarnation, NodeId, ServiceId, TxId};
use crate::domain::plan::Manifest;
use crate::domain::query::NoValue;
use crate::domain::routing::RoutingState;
use crate::domain::time::Mono;
use crate::domain::window::Evidence;

mod acceptor;
mod autopilot;
mod catch_up;
mod ceiling;
mod context;
mod coordinator;
mod core;
mod event;
pub mod feature;
mod gate;
mod lease;
mod log;
pub mod message;
mod proposal;
mod publisher;
mod runs;
mod settings;
#[cfg(test)]
mod tests;
mod view;

pub use self::core::Core;
pub use event::{Announcement, DecidedVerdict, Event};
pub use log::{checkpoint, codec, ledger, record};
pub use settings::{Retention, Settings, Timings};
pub use view::{Hold, MemberView, Mode, OutsiderView, ServiceView, Serving, View};

use self::feature::Feature;
use self::log::checkpoint::Checkpoint;
use self::log::record::{AcceptorState, Chosen, ConfigChange, SavedRun, Slot};
use self::message::Message;

/// Names one request at this node, from the question to its answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub u64);

/// What an operator asks for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum OperatorRequest {
    /// Begin this rollout.
    Apply(Arc<Manifest>),
    /// Go to the next stage, or (`full`) to 100 %.
    Promote {
        /// Service whose canary is promoted.
        service: ServiceId,
        /// Skip the stages between and the wait for samples; a failing gate still says No.
        full: bool,
    },
    /// Hold the weight until a Resume.
    Pause {
        /// Service whose rollout is paused.
        service: ServiceId,
        /// Reason that the operator gave.
        reason: String,
    },
    /// Go on after a pause.
    Resume {
        /// Service whose rollout goes on.
        service: ServiceId,
    },
    /// Everything back to stable; never waits for a gate.
    Abort {
        /// Service whose rollout is ended.
        service: ServiceId,
        /// Reason that the operator gave.
        reason: String,
    },
    /// Start the rolled-back rollout again.
    Retry {
        /// Service that the request is about.
        service: ServiceId,
    },
    /// Start the completed rollout the other way round; abort one in progress.
    Undo {
        /// Service that the request is about.
        service: ServiceId,
    },
    /// Change the members, or who votes on promotions.
    Config(ConfigChange),
    /// Send the requests that name no service to this one.
    SetDefault {
        /// The service, which must be known.
        service: ServiceId,
    },
    /// Go to the next stage without the wait for samples; a failing gate still says No.
    SkipWait {
        /// Service whose canary is promoted.
        service: ServiceId,
    },
    /// Start the completed rollout the other way round, all at once; abort one in progress.
    UndoNow {
        /// Service that the request is about.
        service: ServiceId,
    },
    /// What serves as stable is on these servers from here on.
    SetServers {
        /// Service whose stable version moved.
        service: ServiceId,
        /// Addresses of its servers, such as `http://host:port`.
        urls: Vec<String>,
    },
}

/// A request to the core.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Command {
    /// Request that gets the answer.
    pub request: RequestId,
    /// The transaction's id: the client's `Idempotency-Key`.
    pub tx: TxId,
    /// Who asks: the name of the client's token.
    pub actor: String,
    /// What is asked.
    pub asked: OperatorRequest,
}

/// What one version's traffic did since the last report.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Observation {
    /// Service that the counts are of.
    pub service: ServiceId,
    /// The routing version that the requests were routed by.
    pub routing_version: u64,
    /// Answers of both versions, as the data plane counted them.
    pub evidence: Evidence,
}

/// What another system answered to a query.
#[derive(Debug, Clone, PartialEq)]
pub struct Measurement {
    /// Service that the metric belongs to.
    pub service: ServiceId,
    /// The routing version that was in force when it was asked.
    pub routing_version: u64,
    /// Name of the query, as the rollout file has it.
    pub name: String,
    /// The value, or why there is none.
    pub value: Result<f64, NoValue>,
}

// Two measurements that are no number are the same when inputs are compared.
impl Eq for Measurement {}

/// Everything that reaches the core: time, messages, counts and requests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Input {
    /// Time has passed; deadlines are looked at.
    Tick,
    /// A message of a peer arrived.
    Received {
        /// Peer that sent it, as the connection authenticated it.
        from: NodeId,
        /// Its incarnation, by its own word.
        incarnation: Incarnation,
        /// The message, decoded and checked.
        message: Box<Message>,
    },
    /// The connection to a peer broke, and a new one was refused: a hint that its process is gone.
    Unreachable(NodeId),
    /// Counts of the data plane, for each service and routing version.
    Telemetry(Vec<Observation>),
    /// A metric that another system measured.
    Measured(Measurement),
    /// The data plane's circuit breaker stopped a canary by itself.
    CircuitBreakerTripped {
        /// Service whose canary failed.
        service: ServiceId,
        /// The routing version it was routed by.
        routing_version: u64,
        /// Reason in words, for logs and clients.
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
#[expect(clippy::large_enum_variant, reason = "outputs are few at a time, and taken apart at once")]
#[derive(Debug, Clone, PartialEq)]
pub enum Output {
    /// Write the acceptor state durably, and with it everything appended before.
    Persist(Box<AcceptorState>),
    /// Append a chosen record to the log.
    Append(Box<Chosen>),
    /// Send a message to a peer.
    Send {
        /// Peer that gets the message.
        to: NodeId,
        /// Message that is sent.
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
        /// Peer that gets the records or the checkpoint.
        to: NodeId,
        /// The first record it lacks.
        from: Slot,
        /// The last record to send.
        through: Slot,
    },
    /// Save the analysis run of a service in place of the one before, or none: it is over. No barrier, and no promise.
    SaveRun(ServiceId, Option<Box<SavedRun>>),
    /// Publish the view that this node routes with.
    Publish(Arc<View>),
    /// Canary traffic that needs a lease may go on until its lease length after this; none: stop it.
    Lease(Option<Mono>),
    /// Answer a request of a client.
    Reply(RequestId, Outcome),
    /// Tell logs and streams of an event.
    Announce(Event),
}

/// How a request of a client ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// The change was decided, and is in force.
    Committed {
        /// Slot of the transaction's record.
        slot: Slot,
        /// The routing it led to; none for membership.
        state: Option<RoutingState>,
        /// Why the rollout is paused or was rolled back, where it is so after the change; empty otherwise.
        reason: String,
        /// True when an earlier request with this id did it.
        repeated: bool,
    },
    /// The change was decided against: nothing changed.
    Aborted {
        /// Slot of the transaction's record.
        slot: Slot,
        /// Reasons of the nodes that refused, each with its node.
        reasons: Vec<String>,
        /// True when an earlier request with this id was answered so.
        repeated: bool,
    },
    /// Nothing was done, and nothing was decided: the cluster is there already, or on its way; or what was asked for was rolled
    /// back before.
    Unchanged {
        /// The routing in force.
        state: RoutingState,
        /// Why there was nothing to do, in words; may be empty.
        reason: String,
        /// True when the rollout that was asked for was rolled back before, and isn't started again by this.
        rolled_back: bool,
    },
    /// Not possible as things stand; nothing was decided.
    Refused(String),
    /// Not possible before every member knows the feature; nothing was decided.
    NotReady {
        /// What the request needs.
        feature: Feature,
        /// The members that don't know it, or didn't say so yet.
        waits_for: Vec<NodeId>,
    },
    /// The id stands for another request.
    KeyReused {
        /// The slot of that request.
        slot: Slot,
    },
    /// No majority answered; nothing was proposed. May be tried again.
    NoQuorum {
        /// Nodes that answered, this one included.
        reached: Vec<NodeId>,
        /// Number of voters that a majority needs.
        needed: usize,
    },
    /// Proposed, and no majority confirmed it in time. The same id will tell later.
    InDoubt,
    /// Too many requests are waiting.
    Busy,
    /// A read: every write answered before it was asked is in slots up to here, and this node has them.
    Current(Slot),
}
