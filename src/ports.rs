//! What the shell asks of the world. Adapters answer; tests and simulators answer with a world of their own.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};

use crate::domain::ids::{NodeId, ServiceId};
use crate::domain::router_state::HookCall;
use crate::domain::side::Side;
use crate::domain::text::bounded;
use crate::domain::time::Now;
use crate::protocol::checkpoint::Checkpoint;
use crate::protocol::ledger::Ledger;
use crate::protocol::record::{AcceptorState, Chosen, SavedRun, Slot};
use crate::schema::v1::Decision;

/// A store could not do what it must. The process stops: a promise that may not be on disk can't be made.
#[derive(Debug, thiserror::Error)]
#[error("{path}: {doing}: {cause}")]
pub struct StoreError {
    /// Path of the file or directory.
    pub path: String,
    /// Attempted operation, and the operator's remedy.
    pub doing: String,
    /// Error of the operating system.
    pub cause: io::Error,
}

/// Durable memory of a node: acceptor state, log and checkpoint.
pub trait Store: Send {
    /// Writes the acceptor state; on return it and every record appended before survive power loss.
    fn persist(&mut self, acceptor: &AcceptorState) -> Result<(), StoreError>;

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

/// Where analysis runs outlive a node's process, should all nodes restart at once. Nothing is promised by it: what is
/// lost is judged
/// anew.
pub trait RunStore: Send {
    /// Saves the analysis run of a service in place of the one before, without waiting for it, or none: it is over.
    fn save(&mut self, service: &ServiceId, run: Option<Box<SavedRun>>);
}

/// Reads decided records of the log, from any thread.
pub trait LogReader: Send + Sync {
    /// Returns up to `most` records from slot `from` on, in order; empty when there are none. Where `from` is no longer
    /// kept, they begin with the first that is.
    fn read(&self, from: Slot, most: usize) -> Result<Vec<Chosen>, StoreError>;

    /// Returns the newest checkpoint; none while the log is kept from its beginning.
    fn checkpoint(&self) -> Result<Option<Checkpoint>, StoreError>;
}

/// Content of a store at start.
pub struct Recovered<S> {
    /// The store, ready to be written.
    pub store: S,
    /// The promises; none when no slot of the acceptor state is readable: the node's memory is gone.
    pub acceptor: Option<AcceptorState>,
    /// The sum of the log that the records build on: the checkpoint's, or that of genesis alone.
    pub ledger: Ledger,
    /// The records after it: contiguous, the chain verified.
    pub log: Vec<Chosen>,
    /// Findings that an operator should see, one sentence each, for the log.
    pub notes: Vec<String>,
}

/// Source of time: a monotonic clock and the time of day.
pub trait Clock: Send + Sync {
    /// Returns the monotonic time and the time of day, read together.
    fn now(&self) -> Now;
}

/// A future without a name.
pub type Later<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Byte stream in both directions.
pub trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Duplex for T {}

/// A connection between two nodes.
pub struct Connection {
    /// Byte stream of the connection, after the TLS handshake.
    pub stream: Box<dyn Duplex>,
    /// The peer that the transport itself authenticated (mutual TLS); none on a plaintext transport, where HELLO's
    /// word is all there is.
    pub peer: Option<NodeId>,
    /// Where it comes from or goes to, for logs.
    pub address: String,
}

/// Network between nodes: dials peers and binds the control port.
pub trait Network: Send + Sync {
    /// Connects to a peer's control port.
    fn connect<'a>(&'a self, peer: &'a NodeId, address: &'a str) -> Later<'a, io::Result<Connection>>;

    /// Binds this node's control port.
    fn listen<'a>(&'a self, address: &'a str) -> Later<'a, io::Result<Box<dyn Listener>>>;
}

/// Bound control port that accepts connections of peers.
pub trait Listener: Send {
    /// Returns the next connection before any handshake; completing one must not delay the next.
    fn accept(&mut self) -> Later<'_, io::Result<Later<'static, io::Result<Connection>>>>;

    /// Returns the address that the port is bound to, `host:port`.
    fn address(&self) -> io::Result<String>;
}

/// Something outside the cluster doesn't do what it should right now. It is tried again.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what}: {why}")]
pub struct OutsideError {
    /// The system that failed, such as `kafka topic telemetry.raw`.
    pub what: String,
    /// Its answer, and what an operator can do; cut where it is long.
    pub why: String,
    /// Another process does this work: it isn't tried again.
    pub replaced: bool,
    /// Another try meets the same answer, until somebody changes something.
    pub lasting: bool,
}

impl OutsideError {
    /// Returns the error of the system `what`, with its own reason.
    pub fn new(what: impl Into<String>, why: impl ToString) -> Self {
        Self { what: what.into(), why: bounded(why.to_string()), replaced: false, lasting: false }
    }

    /// Returns that another process has taken over what this one did with `what`.
    pub fn replaced(what: impl Into<String>, why: impl ToString) -> Self {
        Self { replaced: true, ..Self::new(what, why) }
    }

    /// Returns an error that another try meets again, until somebody changes something.
    pub fn lasting(what: impl Into<String>, why: impl ToString) -> Self {
        Self { lasting: true, ..Self::new(what, why) }
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
    /// Becomes the only publisher: the one before can't go on. Returns the place in the log that everything up to is
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

/// A topic that a router works on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Topic {
    /// The source topic, whose records are split.
    Source,
    /// Topic of the copies for one version.
    Of(Side),
}

/// A record of the source, as far as the split depends on it.
#[derive(Debug, Clone, Copy)]
pub struct SourceRecord<'a> {
    /// Its partition, counted from 0.
    pub partition: usize,
    /// Offset of the record in its partition.
    pub offset: i64,
    /// Its key; none where it has none, which an empty one is not.
    pub key: Option<&'a [u8]>,
}

/// Which version gets a record, and under which weight that was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Assignment {
    /// Side that the record is assigned to.
    pub side: Side,
    /// Number of the weight that assigned the record.
    pub weight_version: u64,
}

/// How far a router has read a partition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The next offset that is read.
    pub next: i64,
    /// The state at that place.
    pub metadata: String,
}

/// State of the broker when a router opens it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Opened {
    /// Its own place in each partition of the source; none where there is none yet.
    pub places: Vec<Option<Place>>,
    /// The control topic's entries, from the first on.
    pub entries: Vec<String>,
}

/// Next offsets of some partitions.
pub type NextOffsets = Vec<(usize, i64)>;

/// Changes that are committed atomically with the records written since the last commit.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Commit {
    /// The router's own places, of some partitions.
    pub places: Vec<(usize, Place)>,
    /// Next offsets of the services' groups, of some partitions of a topic.
    pub groups: Vec<(Side, Topic, NextOffsets)>,
    /// An entry of the control topic.
    pub entry: Option<String>,
}

/// Records of one version's topic that were written for the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reclaimed {
    /// Number of records that were reclaimed.
    pub count: u64,
    /// The offset after the last of them.
    pub next: i64,
}

/// What the copies say of a partition whose place is gone.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RebuiltPlace {
    /// How many copies each version's topic has, stable's first.
    pub given: [u64; 2],
    /// The offsets of the last of them.
    pub last: [Option<i64>; 2],
    /// The offset in the source after the last record that was copied.
    pub next: Option<i64>,
}

/// The topics and groups that a router works on. Everything it changes is in transactions, which only the newest router of a
/// rollout can commit. Its calls block.
pub trait Broker: Send {
    /// Becomes the only router of the rollout: what another has not committed is gone, and it can't go on. After an error of
    /// any call, this one comes first.
    fn open(&mut self) -> Result<Opened, OutsideError>;

    /// Tries what a router needs to be allowed, without an effect: to write to its topics, and to move the places of both groups.
    /// Errors also where the versions' topics hold records already.
    fn rehearse(&mut self) -> Result<(), OutsideError>;

    /// Reads from the copies how far the source was read, for each partition.
    fn rebuild(&mut self) -> Result<Vec<RebuiltPlace>, OutsideError>;

    /// Returns entries of the control topic that were not returned yet.
    fn entries(&mut self) -> Result<Vec<String>, OutsideError>;

    /// Goes on reading the source at these offsets.
    fn seek(&mut self, next: &[i64]) -> Result<(), OutsideError>;

    /// Copies records of the source, of partitions that aren't `held`, to the versions that `assign` names, for `wait` or until
    /// there are `most`; returns how many.
    fn copy(
        &mut self,
        wait: Duration,
        most: usize,
        held: &[bool],
        assign: &mut dyn FnMut(SourceRecord<'_>) -> Assignment,
    ) -> Result<usize, OutsideError>;

    /// Copies up to `most` records of the canary's topic, `from` on and before `until`, to stable's.
    fn reclaim(
        &mut self,
        partition: usize,
        from: i64,
        until: i64,
        most: usize,
        weight_version: u64,
    ) -> Result<Reclaimed, OutsideError>;

    /// Waits until what was copied is written; returns the last offsets in stable's and canary's topic, for each partition.
    fn flush(&mut self) -> Result<Vec<[Option<i64>; 2]>, OutsideError>;

    /// Commits the open transaction with all that `commit` names, or nothing of it.
    fn commit(&mut self, commit: &Commit) -> Result<(), OutsideError>;

    /// Returns how many consumers are in a service's group.
    fn members(&mut self, side: Side) -> Result<usize, OutsideError>;

    /// Returns the next offset that a service's group reads of a topic, for each partition; none where it never committed one.
    fn reads(&mut self, side: Side, topic: Topic) -> Result<Vec<Option<i64>>, OutsideError>;

    /// Returns the first offset and that after the last, for each partition; records of open transactions count.
    fn bounds(&mut self, topic: Topic) -> Result<Vec<(i64, i64)>, OutsideError>;
}

/// What is read of a partition.
#[derive(Debug, Clone, Copy)]
pub struct OffsetRange {
    /// First offset of the range.
    pub from: i64,
    /// Offset after the last one of the range.
    pub until: i64,
    /// A record that is known to be there: before it is read the partition isn't at its end.
    pub known: Option<i64>,
}

/// A router's topics and groups, for those who look at them or send it commands. Its calls block.
pub trait RouterTopics: Send {
    /// Returns how many partitions a topic has; none when it isn't there.
    fn partitions(&self, topic: &str) -> Result<Option<usize>, OutsideError>;

    /// Makes the control topic and the versions' topics, those that aren't there; returns the names of those it made.
    fn prepare(&self) -> Result<Vec<String>, OutsideError>;

    /// Returns what [`Broker::open`] does, without becoming the router.
    fn look(&self) -> Result<Opened, OutsideError>;

    /// Returns for each partition of a topic where readers of what is committed stop for now: before the first open transaction.
    fn stable_ends(&self, topic: Topic) -> Result<Vec<i64>, OutsideError>;

    /// Returns the first offset and that after the last, for each partition of a topic; records of open transactions count.
    fn topic_bounds(&self, topic: Topic) -> Result<Vec<(i64, i64)>, OutsideError>;

    /// Returns how many consumers are in a service's group, and the next offset that it reads of a topic, for each partition.
    fn service(&self, side: Side, topic: Topic) -> Result<(usize, Vec<Option<i64>>), OutsideError>;

    /// Reads what is committed of a topic: each record's partition, offset, and what it says of where it is from.
    fn scan(
        &self,
        topic: Topic,
        ranges: &[OffsetRange],
        take: &mut dyn FnMut(usize, i64, Option<&str>),
    ) -> Result<(), OutsideError>;

    /// Writes an entry of the control topic, as anybody may.
    fn send(&self, entry: &str) -> Result<(), OutsideError>;
}

/// How services are started and stopped. Its calls block.
pub trait Hooks: Send {
    /// Starts or stops a service, which may be what it is already. Calls are numbered: one that comes after a newer one of the same
    /// version, because the router that made it was held up or died, must do nothing.
    fn call(&mut self, call: HookCall, side: Side, topic: Topic, number: u64) -> Result<(), OutsideError>;
}

/// A record that is posted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Posted {
    /// Partition of the source that holds the record.
    pub partition: usize,
    /// Offset of the record in that partition.
    pub offset: i64,
    /// Key of the record; none if it has none.
    pub key: Option<Vec<u8>>,
    /// Its value; none: a tombstone.
    pub value: Option<Vec<u8>>,
    /// Its headers, in order: the name's bytes, and the value; none: it is null.
    pub headers: Vec<(Vec<u8>, Option<Vec<u8>>)>,
    /// Its time, in milliseconds since 1970; none if it has none.
    pub time_ms: Option<i64>,
}

/// A topic whose records are posted one by one, and a topic for those that nobody takes. Its calls block.
pub trait PostSource: Send {
    /// Returns up to `most` records that come within `wait`, of each partition in order.
    fn read(&mut self, wait: Duration, most: usize) -> Result<Vec<Posted>, OutsideError>;

    /// Writes a record that is given up to the dead-letter topic; on return it is there.
    fn give_up(&mut self, record: &Posted, why: &str) -> Result<(), OutsideError>;

    /// Commits that these records are done: of each partition all that were read, or the first of them.
    fn commit(&mut self, records: &[Posted]) -> Result<(), OutsideError>;
}

/// How a record is posted once. Called by many at a time.
pub trait Post: Send + Sync {
    /// Posts a record to a version; returns who answered, or why it is not done.
    fn post<'a>(&'a self, record: &'a Posted, side: Side) -> Later<'a, Result<String, NotDone>>;
}

/// Why a record that was posted is not done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NotDone {
    /// Reason: the answer, or why there was none.
    pub why: String,
    /// Whether there was an answer, and what it says of another try.
    pub answer: PostAnswer,
}

/// What an answer says of another try.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PostAnswer {
    /// There was none, which says nothing of the record.
    Missing,
    /// The record failed, and may not the next time.
    Failed {
        /// How long to wait before that, if the answer says so.
        retry_after: Option<Duration>,
    },
    /// The answer will not be another one.
    Refused,
}

/// What push mode works on: the topics, and how records are posted.
pub type PushPorts = (Box<dyn PostSource>, Arc<dyn Post>);

/// The world that a record router runs in. Each call opens its part anew.
pub trait RouterWorld: Send + Sync {
    /// Returns the clock that the router's waits use.
    fn clock(&self) -> &dyn Clock;

    /// Returns the topics and groups for the router itself, which has not opened them yet.
    fn broker(&self) -> Result<Box<dyn Broker>, OutsideError>;

    /// Returns the topics and groups for those who look.
    fn topics(&self) -> Result<Box<dyn RouterTopics>, OutsideError>;

    /// Returns how services are started and stopped.
    fn hooks(&self) -> Box<dyn Hooks>;

    /// Returns the records of push mode, with what becomes of those that are given up, and how they are posted.
    fn push(&self) -> Result<PushPorts, OutsideError>;
}
