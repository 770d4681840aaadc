//! What the rest of the process may know and ask of its node.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use arc_swap::ArcSwap;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{Semaphore, broadcast, mpsc, oneshot};

use super::greeting::Greetings;
use crate::domain::ids::TxId;
use crate::domain::time::Mono;
use crate::ports::{Clock, LogReader};
use crate::protocol::message::Membership;
use crate::protocol::{Announcement, Mode, Observation, OperatorRequest, Outcome, Serving, View};

/// Requests of one kind that may wait for the node's loop: writes, or what is observed.
pub const REQUESTS_MAX: usize = 256;
/// Linearizable reads that may be under way at once: anybody may ask for them, and they keep no write and no evidence waiting.
pub const READS_MAX: usize = 512;
/// Events that a slow reader may lag behind before it must start again from the log.
pub const EVENTS_MAX: usize = 1024;

/// A question to the node's loop.
#[derive(Debug)]
pub enum NodeRequest {
    /// A change that an operator asks for.
    Submit {
        /// Id of the transaction: the idempotency key.
        tx: TxId,
        /// Who asks: the name of the client's token.
        actor: String,
        /// The requested change.
        asked: OperatorRequest,
        /// Where the outcome goes, once it is known.
        reply: oneshot::Sender<Outcome>,
    },
    /// A linearizable read: it is answered once a majority confirmed this node's state.
    Read {
        /// Where the outcome goes, once it is known.
        reply: oneshot::Sender<Outcome>,
    },
    /// Counts of the data plane since the last message, by service.
    Observed(Vec<Observation>),
    /// Value of a metric that Prometheus stores.
    Measured(crate::protocol::Measurement),
    /// Why the store that promotions depend on doesn't do what it should; none when it does.
    Guarded(Option<String>),
    /// The data plane's circuit breaker.
    CircuitBreakerTripped {
        /// The service, by its observation's name.
        service: crate::domain::ids::ServiceId,
        /// Routing version under which it happened.
        routing_version: u64,
        /// Reason, for the log and the vote.
        reason: String,
    },
}

/// The latest published view and lease. Readers take no lock.
#[derive(Clone)]
pub struct Published {
    view: Arc<ArcSwap<View>>,
    /// Number of views published so far; readers compare it with theirs.
    number: Arc<AtomicU64>,
    /// Microseconds of the lease's start on the node's clock; 0: no lease.
    lease_from: Arc<AtomicU64>,
    /// False while the data plane has no server left that takes requests.
    has_servers: Arc<AtomicBool>,
    /// The node is about to stop.
    leaving: Arc<AtomicBool>,
    clock: Arc<dyn Clock>,
}

impl Published {
    /// Returns a publication of `view`, without a lease.
    pub fn new(view: Arc<View>, clock: Arc<dyn Clock>) -> Self {
        let (view, number, lease_from) = (Arc::new(ArcSwap::new(view)), Arc::default(), Arc::default());
        let has_servers = Arc::new(AtomicBool::new(true));
        Self { view, number, lease_from, has_servers, leaving: Arc::default(), clock }
    }

    /// Says that the node is about to stop: from then on it reports that it is not ready.
    pub fn leave(&self) {
        self.leaving.store(true, Ordering::Relaxed);
    }

    /// Returns true once the node is about to stop.
    pub fn is_leaving(&self) -> bool {
        self.leaving.load(Ordering::Relaxed)
    }

    /// Returns the view in force.
    pub fn view(&self) -> Arc<View> {
        self.view.load_full()
    }

    /// Returns how many views were put in force since the first: who remembers it sees by one load that nothing is new.
    pub fn number(&self) -> u64 {
        self.number.load(Ordering::Acquire)
    }

    /// Returns the clock that leases are measured by.
    pub fn clock(&self) -> &Arc<dyn Clock> {
        &self.clock
    }

    /// Puts a view in force.
    pub fn publish(&self, view: Arc<View>) {
        self.view.store(view);
        self.number.fetch_add(1, Ordering::Release);
    }

    /// Sets the moment from which the lease counts; without one there is no lease.
    pub fn set_lease(&self, from: Option<Mono>) {
        self.lease_from.store(from.map_or(0, |t| t.0), Ordering::Release);
    }

    /// Returns the milliseconds left of a lease of `lease_ms`; none when it ended or never began.
    pub fn lease_ms_left(&self, lease_ms: u64) -> Option<u64> {
        self.lease_ms_left_at(lease_ms, self.clock.now().mono)
    }

    fn lease_ms_left_at(&self, lease_ms: u64, now: Mono) -> Option<u64> {
        let from = self.lease_from.load(Ordering::Acquire);
        let end = Mono(from).after_ms(lease_ms);
        (from > 0 && now < end).then(|| end.millis_since(now))
    }

    /// Returns the canary's share that may be served at this moment, in basis points.
    pub fn effective_bp(&self, serving: &Serving) -> u16 {
        self.effective_bp_at(serving, self.clock.now().mono)
    }

    /// Returns the canary's share that may be served at `now`, read from [`Published::clock`], in basis points.
    pub fn effective_bp_at(&self, serving: &Serving, now: Mono) -> u16 {
        let Some((_, bp)) = &serving.canary else { return 0 };
        match serving.lease_ms {
            Some(lease_ms) if self.lease_ms_left_at(lease_ms, now).is_none() => 0,
            _ => *bp,
        }
    }

    /// Says whether any server that this node would send a request to takes requests, as the data plane found.
    pub fn set_has_servers(&self, has_servers: bool) {
        self.has_servers.store(has_servers, Ordering::Relaxed);
    }

    /// Returns why this node can't serve requests; none when it can. A majority isn't needed: without one it serves stable. Who
    /// lacks one may have missed that the rollout was completed, and learns that as its stable servers fail.
    pub fn not_ready(&self) -> Option<&'static str> {
        match self.mode() {
            _ if self.is_leaving() => Some("this node is about to stop"),
            Mode::Learner => Some("this node has no vote and may not know the newest routing"),
            _ if self.has_servers.load(Ordering::Relaxed) => None,
            Mode::Normal => Some("every server that this node would use is ejected"),
            Mode::FailSafe => {
                Some("every stable server is ejected, and without a majority this node may not know the newest routing")
            }
        }
    }

    /// Returns what the node as a whole is able to do.
    pub fn mode(&self) -> Mode {
        match self.view.load().membership {
            Membership::Learner => Mode::Learner,
            Membership::Voter if self.lease_ms_left(LEASE_MS_SHOWN).is_some() => Mode::Normal,
            Membership::Voter => Mode::FailSafe,
        }
    }
}

/// The lease length that a node's own mode is judged by, where no service names one.
pub const LEASE_MS_SHOWN: u64 = 2_000;

/// What promotions depend on beside the nodes' votes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Guard {
    /// The store that gets the decisions.
    Store,
    /// Room on the node's own disk.
    Disk,
}

/// Handle of a running node: its published view, requests to it, its events and its log.
#[derive(Clone)]
pub struct NodeHandle {
    /// Published view of the node, which readers load without a lock.
    pub published: Published,
    /// The log, for `history` and for resuming streams.
    pub log: Arc<dyn LogReader>,
    /// What the peers said about themselves.
    pub greetings: Greetings,
    writes: mpsc::Sender<NodeRequest>,
    reads: mpsc::Sender<NodeRequest>,
    observed: mpsc::Sender<NodeRequest>,
    /// Why what promotions depend on doesn't do what it should.
    guards: Arc<Mutex<BTreeMap<Guard, String>>>,
    reads_under_way: Arc<Semaphore>,
    events: broadcast::Sender<Arc<Announcement>>,
}

/// Longest wait for an answer; the core answers sooner by its own deadlines.
const ANSWER_MAX: Duration = Duration::from_secs(10);

impl NodeHandle {
    /// Returns the handle, and the other side of it for the loop.
    pub fn new(
        published: Published,
        log: Arc<dyn LogReader>,
    ) -> (Self, NodeRequests, broadcast::Sender<Arc<Announcement>>) {
        let (writes, written) = mpsc::channel(REQUESTS_MAX);
        let (reads, read) = mpsc::channel(READS_MAX);
        let (observed, seen) = mpsc::channel(REQUESTS_MAX);
        let requests = NodeRequests { observed: seen, writes: written, reads: read };
        let reads_under_way = Arc::new(Semaphore::new(READS_MAX));
        let (events, _) = broadcast::channel(EVENTS_MAX);
        let greetings = Greetings::default();
        let handle = Self {
            published,
            log,
            greetings,
            writes,
            reads,
            observed,
            reads_under_way,
            guards: Arc::default(),
            events: events.clone(),
        };
        (handle, requests, events)
    }

    /// Asks for a change and waits for its outcome.
    pub async fn submit(&self, tx: TxId, actor: String, asked: OperatorRequest) -> Outcome {
        let (reply, answer) = oneshot::channel();
        let decreases = asked.decreases();
        let request = NodeRequest::Submit { tx, actor, asked, reply };
        if !decreases {
            return ask(&self.writes, request, answer).await;
        }
        // What decreases exposure waits for its turn, however many others ask.
        let decided = async {
            match self.writes.send(request).await {
                Ok(()) => answer.await.unwrap_or(Outcome::InDoubt),
                Err(_) => Outcome::InDoubt,
            }
        };
        tokio::time::timeout(ANSWER_MAX, decided).await.unwrap_or(Outcome::InDoubt)
    }

    /// Waits until this node knows every write that was answered before the call.
    pub async fn read(&self) -> Outcome {
        let Ok(_place) = self.reads_under_way.try_acquire() else { return Outcome::Busy };
        let (reply, answer) = oneshot::channel();
        ask(&self.reads, NodeRequest::Read { reply }, answer).await
    }

    /// Waits until this node knows what its majority knows, so that a restart shows nobody an older state; at most
    /// `limit`, after which it routes with what it has, on stable.
    pub async fn caught_up(&self, limit: Duration) {
        let current = || {
            let view = self.published.view();
            let newest = view.members.values().filter_map(|member| member.head).max();
            self.published.mode() == Mode::Normal && newest.is_none_or(|newest| view.head >= newest)
        };
        let wait = async {
            while !current() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let _ = tokio::time::timeout(limit, wait).await;
    }

    /// Hands over counts; they are dropped, and that counted, when the loop is behind, which holds steps and no more.
    pub fn observed(&self, observations: Vec<Observation>) {
        let answers = |one: &Observation| one.evidence.stable.count + one.evidence.canary.count;
        if let Err(TrySendError::Full(NodeRequest::Observed(lost))) =
            self.observed.try_send(NodeRequest::Observed(observations))
        {
            metrics::counter!("aviary_evidence_dropped_total").increment(lost.iter().map(answers).sum());
        }
    }

    /// Tells the loop that the data plane stopped a canary by itself.
    pub async fn circuit_breaker_tripped(
        &self,
        service: crate::domain::ids::ServiceId,
        routing_version: u64,
        reason: String,
    ) {
        let _ = self.observed.send(NodeRequest::CircuitBreakerTripped { service, routing_version, reason }).await;
    }

    /// Hands over another system's metric.
    pub async fn measured(&self, measurement: crate::protocol::Measurement) {
        let _ = self.observed.send(NodeRequest::Measured(measurement)).await;
    }

    /// Tells the loop whether what promotions depend on does what it should; told again soon when the loop is behind.
    pub fn guarded(&self, guard: Guard, unavailable: Option<String>) {
        let mut guards = self.guards.lock().expect("nothing panics while it holds the guards");
        match unavailable {
            Some(why) => drop(guards.insert(guard, why)),
            None => drop(guards.remove(&guard)),
        }
        let all: Vec<_> = guards.values().map(String::as_str).collect();
        let unavailable = (!all.is_empty()).then(|| all.join("; "));
        let _ = self.observed.try_send(NodeRequest::Guarded(unavailable));
    }

    /// Follows events from here on.
    pub fn events(&self) -> broadcast::Receiver<Arc<Announcement>> {
        self.events.subscribe()
    }
}

async fn ask(queue: &mpsc::Sender<NodeRequest>, request: NodeRequest, answer: oneshot::Receiver<Outcome>) -> Outcome {
    if queue.try_send(request).is_err() {
        return Outcome::Busy;
    }
    match tokio::time::timeout(ANSWER_MAX, answer).await {
        Ok(Ok(outcome)) => outcome,
        Ok(Err(_)) | Err(_) => Outcome::InDoubt,
    }
}

/// Requests that wait for the node's loop, in a queue for each kind, so that one kind keeps no other out.
pub struct NodeRequests {
    observed: mpsc::Receiver<NodeRequest>,
    writes: mpsc::Receiver<NodeRequest>,
    reads: mpsc::Receiver<NodeRequest>,
}

impl NodeRequests {
    /// Returns the next request: what was observed first, then writes, then reads; none when nobody can ask any more.
    pub async fn recv(&mut self) -> Option<NodeRequest> {
        tokio::select! {
            biased;
            Some(request) = self.observed.recv() => Some(request),
            Some(request) = self.writes.recv() => Some(request),
            Some(request) = self.reads.recv() => Some(request),
            else => None,
        }
    }
}
