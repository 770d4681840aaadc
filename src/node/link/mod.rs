//! Connections to the peers: messages in, messages out, and nothing that a peer does can hurt.
//!
//! Each node dials every peer and only sends on that connection; it accepts every peer's connection and only receives on
//! it. So the two directions never wait for each other, and nobody has to agree on which of two connections stays.
//! A connection begins with HELLO from the dialler and HELLO back; see [`super::frame`].
//!
//! Everything is bounded: queues, frames, connections, and the time that each may take. Loss is allowed (the protocol
//! repeats what matters), so a full queue drops instead of waiting. Nothing here knows what a message means.
//!
//! Reading order: `outbox` (what waits to be sent), `dial` (the sending side), `accept` (the receiving side),
//! `wire` (frames off a socket), `rejections` (what was refused, counted).

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use arc_swap::ArcSwap;
use tokio::sync::{Notify, mpsc};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::domain::ids::{Incarnation, NodeId};
use crate::ports::{Connection, Network};
use crate::protocol::Input;
use crate::protocol::message::Message;

pub use super::frame::Identity;
use super::frame::{Envelope, FrameError, Hello, VERSIONS, Versions};
use super::greeting::{Greeting, Greetings};
use outbox::Outbox;
pub use rejections::{Class, Rejections};

mod accept;
mod dial;
mod outbox;
mod rejections;
mod wire;

/// Bounds of the links. The defaults fit heartbeats every 250 ms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinkLimits {
    /// Longest wait for a connection.
    pub connect: Duration,
    /// Longest wait for HELLO, from the connection on.
    pub hello: Duration,
    /// Longest time from a frame's first byte to its last.
    pub body: Duration,
    /// Longest silence on a connection that a peer sends on.
    pub idle: Duration,
    /// Longest time that written bytes may wait for room.
    pub write: Duration,
    /// First wait after a failed connection; it doubles from there.
    pub backoff_min: Duration,
    /// Longest wait between two tries.
    pub backoff_max: Duration,
    /// Messages that may wait for one peer.
    pub queue: usize,
    /// Age at which a waiting message is not worth sending any more: by then the core has said it again.
    pub stale: Duration,
    /// Accepted connections that may be without HELLO at one time; one more, and the oldest of them goes.
    pub half_open: usize,
    /// The protocol versions this node speaks.
    pub versions: Versions,
}

impl Default for LinkLimits {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(1),
            hello: Duration::from_secs(2),
            body: Duration::from_secs(5),
            idle: Duration::from_secs(5),
            write: Duration::from_secs(2),
            backoff_min: Duration::from_millis(20),
            backoff_max: Duration::from_secs(1),
            queue: 256,
            stale: Duration::from_secs(1),
            half_open: 64,
            versions: VERSIONS,
        }
    }
}

/// A configured peer: its queue, and the state of its connection.
struct PeerLink {
    node: NodeId,
    address: String,
    outbox: Outbox,
    /// It reached us, so it can be reached: dial at once.
    called: Notify,
    /// Messages go out to it at this moment.
    connected: AtomicBool,
}

/// Where what peers say goes.
#[derive(Debug, Clone)]
pub struct Inbox {
    /// Takes their messages.
    pub inputs: mpsc::Sender<Input>,
    /// Keeps what they say about themselves; what is there of this node is what it says to them.
    pub greetings: Greetings,
}

/// State that all tasks of the links share.
struct LinkShared {
    network: Arc<dyn Network>,
    /// Who this node is; its incarnation changes when it finds that its disk is an old copy.
    me: ArcSwap<Identity>,
    limits: LinkLimits,
    peers: BTreeMap<NodeId, Arc<PeerLink>>,
    inbox: Inbox,
    /// What this node says about itself.
    facts: BTreeMap<String, String>,
    rejections: Arc<Rejections>,
    shutdown: CancellationToken,
}

/// The connections to all peers. Dropping it closes them.
pub struct Links {
    shared: Arc<LinkShared>,
    address: String,
    _stop: DropGuard,
}

impl Links {
    /// Binds `listen`, starts dialling `peers` (this node's own entry is ignored), and from then on hands what arrives
    /// to `inbox`: [`Input::Received`], and [`Input::Unreachable`] once per outage when a peer's port refuses.
    ///
    /// Fails only when the port can't be bound. Runs until `shutdown`.
    pub async fn start(
        limits: LinkLimits,
        network: Arc<dyn Network>,
        identity: Identity,
        listen: &str,
        peers: BTreeMap<NodeId, String>,
        inbox: Inbox,
        shutdown: CancellationToken,
    ) -> io::Result<Self> {
        let listener = network.listen(listen).await?;
        let address = listener.address()?;
        let others = peers.into_iter().filter(|(node, _)| *node != identity.node);
        let peers =
            others.map(|(node, address)| (node.clone(), Arc::new(PeerLink::new(node, address, &limits)))).collect();
        let shutdown = shutdown.child_token();
        let rejections = Arc::new(Rejections::default());
        let facts = inbox.greetings.of(&identity.node).map(|greeting| greeting.facts).unwrap_or_default();
        let stop = shutdown.clone().drop_guard();
        let shared = Arc::new(LinkShared {
            network,
            me: ArcSwap::from_pointee(identity),
            limits,
            peers,
            inbox,
            facts,
            rejections,
            shutdown,
        });
        shared.spawn(accept::run(shared.clone(), listener));
        for peer in shared.peers.values() {
            shared.spawn(dial::run(shared.clone(), peer.clone()));
        }
        Ok(Self { shared, address, _stop: stop })
    }

    /// Speaks for this incarnation from here on; connections that began with another one are dialled again.
    pub fn set_incarnation(&self, incarnation: Incarnation) {
        let me = self.shared.me.load();
        if me.incarnation != incarnation {
            self.shared.me.store(Arc::new(Identity { incarnation, ..(**me).clone() }));
        }
    }

    /// Queues a message for a peer; never waits. It is dropped when the peer is unknown or its queue is full, and when
    /// it grew stale before there was a connection.
    pub fn send(&self, to: &NodeId, message: Message) {
        match self.shared.peers.get(to) {
            Some(peer) => peer.outbox.push(message),
            None => tracing::warn!(to = %to, message = message.name(), "message for a node that is no peer dropped"),
        }
    }

    /// Returns the bound address of the control port.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Returns the counts of what was refused.
    pub fn rejections(&self) -> &Arc<Rejections> {
        &self.shared.rejections
    }

    /// Returns true while messages to `peer` have a connection to go out on.
    pub fn is_connected(&self, peer: &NodeId) -> bool {
        self.shared.peers.get(peer).is_some_and(|peer| peer.connected.load(Ordering::Relaxed))
    }

    /// Returns how many messages to each peer were dropped: its queue was full, or they grew stale in it.
    pub fn dropped(&self) -> BTreeMap<NodeId, u64> {
        self.shared.peers.iter().map(|(node, peer)| (node.clone(), peer.outbox.dropped())).collect()
    }
}

impl PeerLink {
    fn new(node: NodeId, address: String, limits: &LinkLimits) -> Self {
        let outbox = Outbox::new(limits.queue, limits.stale);
        Self { node, address, outbox, called: Notify::new(), connected: AtomicBool::new(false) }
    }
}

impl LinkShared {
    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let shutdown = self.shutdown.clone();
        tokio::spawn(async move { shutdown.run_until_cancelled_owned(task).await });
    }

    fn hello_to(&self, to: &NodeId) -> Hello {
        Hello { versions: self.limits.versions, to: to.clone(), facts: self.facts.clone() }
    }

    /// Checks the parts of a HELLO that both sides check in the same way, and returns the version to go on with.
    fn check_hello(&self, connection: &Connection, hello: &Envelope<Hello>) -> Result<u16, FrameError> {
        self.check_cluster(hello)?;
        if let Some(peer) = &connection.peer {
            expect("sender", peer, &hello.from)?;
        }
        expect("hello to", &self.me.load().node, &hello.payload.to)?;
        let Hello { versions, facts, .. } = &hello.payload;
        if self.peers.contains_key(&hello.from) {
            // Also where no version is common: operators see why.
            self.inbox.greetings.put(hello.from.clone(), Greeting { versions: *versions, facts: facts.clone() });
        }
        self.limits.versions.common(*versions)
    }

    fn check_cluster<T>(&self, envelope: &Envelope<T>) -> Result<(), FrameError> {
        let (expected, found) = (self.me.load().cluster, envelope.cluster);
        if found == expected { Ok(()) } else { Err(FrameError::Cluster { expected, found }) }
    }
}

fn expect<T: PartialEq + ToString>(what: &'static str, expected: &T, found: &T) -> Result<(), FrameError> {
    match found == expected {
        true => Ok(()),
        false => Err(FrameError::Sender { what, expected: expected.to_string(), found: found.to_string() }),
    }
}

#[cfg(test)]
mod tests;
