//! What the shell asks of the world. Adapters answer; tests and simulators answer with a world of their own.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};

use crate::domain::ids::NodeId;
use crate::domain::time::Now;
use crate::protocol::checkpoint::Checkpoint;
use crate::protocol::ledger::Ledger;
use crate::protocol::record::{Chosen, Register, Slot};
use crate::schema::v1::Decision;

/// A store could not do what it must. The process stops: a promise that may not be on disk can't be made.
#[derive(Debug, thiserror::Error)]
#[error("{path}: {doing}: {cause}")]
pub struct StoreError {
    /// The file or directory.
    pub path: String,
    /// What was tried, and what an operator can do.
    pub doing: String,
    /// The system's answer.
    pub cause: io::Error,
}

/// A node's durable memory.
pub trait Store: Send {
    /// Writes the register; on return it and every record appended before survive power loss.
    fn persist(&mut self, register: &Register) -> Result<(), StoreError>;

    /// Appends the record of the next slot; it survives power loss once a later [`Store::persist`] returned.
    fn append(&mut self, chosen: &Chosen) -> Result<(), StoreError>;

    /// Keeps a checkpoint that covers everything appended so far; records before `keep_from` may go. A node that
    /// starts gets the checkpoint and the records after it.
    fn checkpoint(&mut self, checkpoint: &Checkpoint, keep_from: Slot) -> Result<(), StoreError>;

    /// Puts a peer's checkpoint, which goes beyond the log, in the log's place; on return it survives power loss.
    fn install(&mut self, checkpoint: &Checkpoint) -> Result<(), StoreError>;

    /// Returns a reader of the log that other threads may use.
    fn reader(&self) -> Arc<dyn LogReader>;
}

/// Reads the log.
pub trait LogReader: Send + Sync {
    /// Returns up to `most` records from slot `from` on, in order; empty when there are none. Where `from` is no longer
    /// kept, they begin with the first that is.
    fn read(&self, from: Slot, most: usize) -> Result<Vec<Chosen>, StoreError>;

    /// Returns the newest checkpoint; none while the log is kept from its beginning.
    fn checkpoint(&self) -> Result<Option<Checkpoint>, StoreError>;
}

/// What a store found at start.
pub struct Recovered<S> {
    /// The store, ready to be written.
    pub store: S,
    /// The promises; none when no slot of the register is readable: the node's memory is gone.
    pub register: Option<Register>,
    /// The sum of the log that the records build on: the checkpoint's, or that of genesis alone.
    pub ledger: Ledger,
    /// The records after it: contiguous, the chain verified.
    pub log: Vec<Chosen>,
    /// What was unusual, one sentence each, for the log.
    pub notes: Vec<String>,
}

/// Reads both clocks.
pub trait Clock: Send + Sync {
    /// Returns the time.
    fn now(&self) -> Now;
}

/// A future without a name.
pub type Later<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// A connection's two directions.
pub trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Duplex for T {}

/// A connection between two nodes.
pub struct Connection {
    /// The bytes.
    pub stream: Box<dyn Duplex>,
    /// The peer that the transport itself authenticated (mutual TLS); none on a plaintext transport, where HELLO's
    /// word is all there is.
    pub peer: Option<NodeId>,
    /// Where it comes from or goes to, for logs.
    pub address: String,
}

/// The network between nodes.
pub trait Network: Send + Sync {
    /// Connects to a peer's control port.
    fn connect<'a>(&'a self, peer: &'a NodeId, address: &'a str) -> Later<'a, io::Result<Connection>>;

    /// Binds this node's control port.
    fn listen<'a>(&'a self, address: &'a str) -> Later<'a, io::Result<Box<dyn Listener>>>;
}

/// A bound control port.
pub trait Listener: Send {
    /// Returns the next connection before any handshake; completing one must not delay the next.
    fn accept(&mut self) -> Later<'_, io::Result<Later<'static, io::Result<Connection>>>>;

    /// Returns the bound address.
    fn address(&self) -> io::Result<String>;
}

/// Something outside the cluster doesn't do what it should right now. It is tried again.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what}: {why}")]
pub struct OutsideError {
    /// What it is.
    pub what: String,
    /// Its answer, and what an operator can do.
    pub why: String,
}

impl OutsideError {
    /// Returns what `what` answered.
    pub fn new(what: impl Into<String>, why: impl ToString) -> Self {
        Self { what: what.into(), why: why.to_string() }
    }
}

/// Reported events as they come over a wire, each an `aviary.v1.TelemetryEvent`. Its calls block.
pub trait EventSource: Send {
    /// Waits up to `wait` for events, and hands over those that are there; returns how many. They are acknowledged after
    /// `take` returned.
    fn poll(&mut self, wait: Duration, take: &mut dyn FnMut(&[&[u8]])) -> Result<usize, OutsideError>;
}

/// Where decisions are published, in order, each once. Its calls block.
pub trait DecisionSink: Send {
    /// Becomes the only publisher: whoever was before can't go on. Returns the place in the log that everything up to is
    /// published; none when nothing is. After an error of any call, this one comes first.
    fn open(&mut self) -> Result<Option<Slot>, OutsideError>;

    /// Publishes decisions, all or none; from then on everything up to `through` is.
    fn publish(&mut self, decisions: &[Decision], through: Slot) -> Result<(), OutsideError>;
}

/// A store that promotions depend on. Its calls block.
pub trait GuardProbe: Send {
    /// Returns whether it does what it should at this moment.
    fn probe(&mut self) -> Result<(), OutsideError>;
}
