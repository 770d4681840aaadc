//! The protocol core of one node: its state, its door, and what follows from a decided record.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound::{Excluded, Unbounded};
use std::sync::Arc;

use crate::domain::ids::{ClusterId, Incarnation, NodeId, ServiceId};
use crate::domain::routing::{RoutingState, Status};
use crate::domain::text::bounded;
use crate::domain::time::{Mono, Now};

use super::checkpoint::{Checkpoint, Incoming, Part};
use super::coordinator::CoordinatorState;
use super::gate::Gate;
use super::lease::Lease;
use super::ledger::{Ledger, ServiceState};
use super::message::{Decision, Membership, Message};
use super::participant::{LastVote, Prepared};
use super::record::{AcceptorState, Ballot, Chosen, Operation, Record, SavedRun, Slot};
use super::tracker::RunTracker;
use super::{Event, Input, MemberView, Output, ServiceView, Serving, Timings, View};

/// What a node is told about itself.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The node.
    pub node: NodeId,
    /// Its cluster.
    pub cluster: ClusterId,
    /// Durations.
    pub timings: Timings,
    /// Where the node's own draws (suspicion, back-off) begin.
    pub seed: u64,
    /// The incarnation it takes when its register is gone.
    pub fresh_incarnation: Incarnation,
    /// What it keeps of its log.
    pub retention: Retention,
    /// Nodes it talks with beside the cluster's members: those that are to become members.
    pub peers: BTreeSet<NodeId>,
}

/// What a node keeps of its log: disk and start-up stay bounded by it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Retention {
    /// A checkpoint is made every so many slots.
    pub checkpoint_every: u64,
    /// Records that stay readable before a checkpoint: for history, and for peers that lag.
    pub history: u64,
}

impl Default for Retention {
    fn default() -> Self {
        Self { checkpoint_every: 4_096, history: 16_384 }
    }
}

/// What a node knows of another.
#[derive(Debug, Clone, Default)]
pub(super) struct PeerState {
    /// When it last said anything; none since this node started.
    pub heard: Option<Mono>,
    /// True when its process is known to be gone, until it speaks.
    pub unreachable: bool,
    /// Its incarnation, by its own word.
    pub incarnation: Option<Incarnation>,
    /// Its last decided slot.
    pub head: Option<Slot>,
    /// Its role, by its own word.
    pub membership: Option<Membership>,
    /// It accepted a record in its open slot: the ballot, the slot, and since when this node knows.
    pub open: Option<(Ballot, Slot, Mono)>,
    /// The records sent to it last, and when.
    pub sent_log: Option<(Slot, Mono)>,
    /// What was said about it last: alive or not.
    pub announced_alive: bool,
}

/// A small generator for suspicion and back-off: their draws need to differ between nodes, not to be secret.
#[derive(Debug, Clone)]
pub(super) struct Draws(u64);

impl Draws {
    /// Returns a number in `low..high`.
    pub fn between(&mut self, low: u64, high: u64) -> u64 {
        assert!(low < high, "an empty range");
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        low + (mixed ^ (mixed >> 31)) % (high - low)
    }
}

/// One node's part in the protocol. See [`crate::protocol`] for the contract with its caller.
#[derive(Debug, Clone)]
pub struct Core {
    pub(super) settings: Settings,
    pub(super) acceptor: AcceptorState,
    pub(super) ledger: Ledger,
    /// The log lacks slots that the register remembers: no votes until they are back.
    pub(super) rebuilding: bool,
    pub(super) peers: BTreeMap<NodeId, PeerState>,
    pub(super) lease: Lease,
    pub(super) gates: BTreeMap<ServiceId, Gate>,
    pub(super) trackers: BTreeMap<ServiceId, RunTracker>,
    /// Trials that this node saved before it restarted, until their watches begin.
    pub(super) runs: BTreeMap<ServiceId, SavedRun>,
    /// More windows were due than were asked for to be decided: the next ones needn't wait for a tick.
    pub(super) more_windows: bool,
    /// A service whose next change was due while something else was being decided.
    pub(super) waits: Option<ServiceId>,
    /// The service whose trial was saved last.
    pub(super) saved_last: Option<ServiceId>,
    /// The vote given in the open slot, to repeat it.
    pub(super) last_vote: Option<LastVote>,
    /// The intent voted on in the open slot.
    pub(super) prepared: Option<Prepared>,
    /// When the register's accepted record was accepted.
    pub(super) accepted_at: Mono,
    pub(super) coordination: CoordinatorState,
    /// Chosen records that came before their predecessors.
    pub(super) early: BTreeMap<Slot, Chosen>,
    /// A peer's checkpoint, as far as it came.
    pub(super) incoming: Incoming,
    pub(super) draws: Draws,
    pub(super) suspect_ms: u64,
    pub(super) coordinator: NodeId,
    pub(super) now: Now,
    pub(super) out: Vec<Output>,
    /// What of the view isn't as it is any more; it is published at the end of the call.
    pub(super) outdated: Outdated,
    /// What is shown of each service.
    shown: BTreeMap<ServiceId, Arc<ServiceView>>,
    /// The service that had its turn last, and when.
    turned: (Option<ServiceId>, Mono),
    /// Why promotions hold: the store that they depend on is away.
    pub(super) unavailable: Option<String>,
    /// When this process began.
    started: Mono,
    published_at: Mono,
    view: Arc<View>,
}

/// Parts of the published view that must be made anew. A view is of all services: with many, most are as they were.
#[derive(Debug, Clone, Default)]
pub(super) struct Outdated {
    /// Head, members, coordinator.
    pub cluster: bool,
    /// All services.
    pub all: bool,
    /// These.
    pub services: BTreeSet<ServiceId>,
}

/// Returns the services of a map in order, those after `last` first.
pub(super) fn one_round<'m, V>(
    map: &'m BTreeMap<ServiceId, V>,
    last: Option<&ServiceId>,
) -> impl Iterator<Item = &'m ServiceId> {
    let after = last.map_or(Unbounded, Excluded);
    map.range::<ServiceId, _>((after, Unbounded)).chain(map).take(map.len()).map(|(id, _)| id)
}

/// How long it takes until all services had their turn.
const ROUND_MS: u64 = 100;
/// Shortest time between two publications that only refresh evidence.
const REFRESH_MS: u64 = 250;

impl Core {
    /// Starts a node from what its disk holds. A missing `acceptor` means that its memory is gone: it takes a fresh
    /// incarnation, follows as a learner, and has no vote. The outputs are the start's, to be carried out first.
    ///
    /// `ledger` is the newest checkpoint's, or genesis alone; `log` are the records after it; `runs` are those that it
    /// saved. Panics when the log is no chain; stores verify that when they open.
    pub fn start(
        settings: Settings,
        acceptor: Option<AcceptorState>,
        mut ledger: Ledger,
        log: &[Chosen],
        runs: BTreeMap<ServiceId, SavedRun>,
        now: Now,
    ) -> (Self, Vec<Output>) {
        assert_eq!(ledger.cluster, settings.cluster, "the log is this cluster's");
        let (base, base_hash) = (ledger.head, ledger.head_hash);
        for chosen in log {
            ledger.apply(chosen).expect("a verified log is a chain of possible records");
        }

        let mut acceptor = acceptor.unwrap_or_else(|| AcceptorState {
            cluster: settings.cluster,
            node: settings.node.clone(),
            incarnation: settings.fresh_incarnation,
            boot: 0,
            promised: None,
            accepted: None,
            head: base,
            head_hash: base_hash,
        });
        assert_eq!(
            (&acceptor.node, acceptor.cluster),
            (&settings.node, settings.cluster),
            "the register is this node's"
        );
        acceptor.boot += 1;
        let rebuilding = ledger.head < acceptor.head;
        let remembered = log.iter().find(|chosen| chosen.record.slot == acceptor.head);
        let remembered = remembered.map(|chosen| chosen.record.hash()).or((acceptor.head == base).then_some(base_hash));
        if let (false, Some(hash)) = (rebuilding, remembered) {
            assert_eq!(hash, acceptor.head_hash, "I2: the log holds what the register remembers");
        }
        let mut draws = Draws(settings.seed ^ acceptor.boot.rotate_left(32) ^ acceptor.incarnation.0);
        let suspect_ms = draws.between(settings.timings.suspect_ms, settings.timings.suspect_ms * 3 / 2);
        // No other process of this node used these numbers: a late answer to one of them extends nothing here.
        let first_nonce = draws.between(1, 1 << 60);
        let others = ledger.members.0.keys().chain(&settings.peers).filter(|node| **node != settings.node);
        let peers =
            others.map(|node| (node.clone(), PeerState { announced_alive: true, ..PeerState::default() })).collect();
        let coordinator = settings.node.clone();
        let view = Arc::new(View {
            node: settings.node.clone(),
            cluster: settings.cluster,
            incarnation: acceptor.incarnation,
            membership: Membership::Learner,
            head: ledger.head,
            head_hash: ledger.head_hash,
            coordinator: coordinator.clone(),
            members: BTreeMap::new(),
            services: BTreeMap::new(),
        });
        let mut core = Self {
            settings,
            acceptor,
            ledger,
            rebuilding,
            peers,
            lease: Lease::starting_at(first_nonce),
            gates: BTreeMap::new(),
            trackers: BTreeMap::new(),
            runs,
            more_windows: false,
            waits: None,
            saved_last: None,
            last_vote: None,
            prepared: None,
            accepted_at: now.mono,
            coordination: CoordinatorState::default(),
            early: BTreeMap::new(),
            incoming: Incoming::default(),
            draws,
            suspect_ms,
            coordinator,
            now,
            out: Vec::new(),
            outdated: Outdated { all: true, ..Outdated::default() },
            shown: BTreeMap::new(),
            unavailable: None,
            turned: (None, now.mono),
            started: now.mono,
            published_at: now.mono,
            view,
        };
        core.forget_settled_accept();
        core.persist();
        core.new_gates();
        // A log that isn't whole yet may lack the beginning of their rollouts.
        if !core.rebuilding {
            let left = std::mem::take(&mut core.runs);
            core.out.extend(left.into_keys().map(|id| Output::SaveRun(id, None)));
        }
        core.beat();
        let outputs = core.finish();
        (core, outputs)
    }

    /// Takes one input and returns what is to be done about it, in order.
    pub fn handle(&mut self, now: Now, input: Input) -> Vec<Output> {
        self.now = Now { mono: now.mono.max(self.now.mono), wall: now.wall };
        match input {
            Input::Tick => self.on_tick(),
            Input::Received { from, incarnation, message } => self.on_message(&from, incarnation, *message),
            Input::Unreachable(node) => self.on_unreachable(&node),
            Input::Telemetry(observations) => self.on_telemetry(&observations),
            Input::CircuitBreakerTripped { service, routing_version, reason } => {
                self.on_circuit_breaker(&service, routing_version, reason);
            }
            Input::Measured(measurement) => self.on_measured(measurement),
            Input::Guarded(unavailable) => self.unavailable = unavailable.map(bounded),
            Input::Operator(command) => self.on_command(command),
            Input::Read(request) => self.on_read(request),
        }
        self.pump();
        if self.more_windows && self.is_coordinator() {
            self.use_idle_coordinator();
            self.pump();
        }
        self.finish()
    }

    /// Returns a number that tells apart cores that may answer alike questions of a commit differently: what an
    /// exhaustive search knows its states by. Evidence and leases are left out.
    pub fn fingerprint(&self) -> u64 {
        let known: Vec<_> =
            self.peers.values().map(|p| (p.unreachable, p.incarnation, p.head, p.membership, &p.open)).collect();
        let state = (&self.acceptor, self.ledger.head_hash, self.rebuilding, known, &self.coordinator);
        let open =
            (&self.last_vote, &self.prepared, self.accepted_at, &self.coordination, &self.early, &self.draws, self.now);
        xxhash_rust::xxh3::xxh3_64(format!("{state:?} {open:?}").as_bytes())
    }

    /// Returns the latest published view.
    pub fn view(&self) -> &Arc<View> {
        &self.view
    }

    fn on_tick(&mut self) {
        self.watch_peers();
        self.tick_lease();
        let services = self.next_turn();
        self.tick_trackers(&services);
        self.tick_gates(&services);
        self.tick_attempt();
        self.tick_reads();
        self.tick_autopilot(&services);
    }

    /// Returns the services whose turn it is, so that each has one at least each [`ROUND_MS`]: of many a few at a time, so that
    /// whoever asks for something in between isn't kept waiting.
    fn next_turn(&mut self) -> Vec<ServiceId> {
        let (last, before) = &self.turned;
        let most = self.gates.len() as u64 * self.now.mono.millis_since(*before) / ROUND_MS + 1;
        let turn: Vec<_> = one_round(&self.gates, last.as_ref()).take(most as usize).cloned().collect();
        self.turned = (turn.last().cloned(), self.now.mono);
        turn
    }

    fn on_message(&mut self, from: &NodeId, incarnation: Incarnation, message: Message) {
        let now = self.now.mono;
        let Some(peer) = self.peers.get_mut(from) else { return };
        peer.heard = Some(now);
        peer.unreachable = false;
        peer.incarnation = Some(incarnation);
        if !peer.announced_alive {
            self.watch_peers();
        }
        match message {
            Message::Prepare(prepare) => self.on_prepare(from, incarnation, prepare),
            Message::Vote(vote) => self.on_vote(from, incarnation, vote),
            Message::Decision(Decision::Propose(ballot, record)) => {
                self.on_propose(from, incarnation, ballot, *record);
            }
            Message::Decision(Decision::Chosen(chosen)) => self.on_chosen(from, incarnation, *chosen, false),
            Message::Decision(Decision::CatchUp(chosen)) => self.on_chosen(from, incarnation, *chosen, true),
            Message::Decision(Decision::Checkpoint(part)) => self.on_checkpoint(from, part),
            Message::Heartbeat(heartbeat) => self.on_heartbeat(from, incarnation, heartbeat),
            Message::HealthSnapshot(snapshot) => self.on_snapshot(from, incarnation, snapshot),
        }
    }

    fn on_unreachable(&mut self, node: &NodeId) {
        if let Some(peer) = self.peers.get_mut(node) {
            peer.unreachable = true;
            self.watch_peers();
            self.tick_attempt();
            let services: Vec<_> = self.gates.keys().cloned().collect();
            self.tick_autopilot(&services);
        }
    }

    /// Ends a call: publishes what changed and hands over the outputs.
    fn finish(&mut self) -> Vec<Output> {
        let stale = self.now.mono.millis_since(self.published_at) >= REFRESH_MS;
        let Outdated { cluster, all, services } = &self.outdated;
        if *cluster || *all || !services.is_empty() || stale {
            self.publish();
        }
        std::mem::take(&mut self.out)
    }

    /// Publishes what this node serves by, at this point of its outputs: a brake and an accepted lowering before the
    /// disk answers, a decided record before anybody is told of it, everything else at the end of the call.
    pub(super) fn publish(&mut self) {
        let Outdated { all, services, .. } = std::mem::take(&mut self.outdated);
        if all {
            self.shown.retain(|id, _| self.ledger.services.contains_key(id));
            self.ledger.services.keys().cloned().collect::<Vec<_>>().iter().for_each(|id| self.refresh(id));
        } else {
            services.iter().for_each(|id| self.refresh(id));
        }
        self.published_at = self.now.mono;
        let view = Arc::new(self.build_view());
        if *view != *self.view {
            self.view = view.clone();
            self.out.push(Output::Publish(view));
        }
    }

    /// Makes what is shown of a service anew.
    pub(super) fn refresh(&mut self, id: &ServiceId) {
        let view = self.service_view(id, &self.ledger.services[id]);
        match self.shown.get_mut(id) {
            Some(shown) if **shown == view => {}
            Some(shown) => *shown = Arc::new(view),
            None => drop(self.shown.insert(id.clone(), Arc::new(view))),
        }
    }

    // What the parts share.

    /// Returns what this node counts as.
    pub(super) fn membership(&self) -> Membership {
        let counts = self.ledger.members.counts(&self.settings.node, self.acceptor.incarnation);
        if counts && !self.rebuilding { Membership::Voter } else { Membership::Learner }
    }

    /// Returns true when a peer's votes count.
    pub(super) fn counts(&self, node: &NodeId, incarnation: Incarnation) -> bool {
        self.ledger.members.counts(node, incarnation)
    }

    /// Returns true while a peer is heard from.
    pub(super) fn is_alive(&self, node: &NodeId) -> bool {
        if *node == self.settings.node {
            return true;
        }
        let Some(peer) = self.peers.get(node) else { return false };
        // Nobody is lost before this process has had the time to hear from them.
        let heard = peer.heard.unwrap_or(self.started);
        !peer.unreachable && self.now.mono.millis_since(heard) < self.suspect_ms
    }

    /// Returns true while a peer is heard from and its votes count.
    pub(super) fn is_live_voter(&self, node: &NodeId) -> bool {
        if *node == self.settings.node {
            return self.membership() == Membership::Voter;
        }
        let Some(peer) = self.peers.get(node) else { return false };
        let counts = peer.incarnation.is_none_or(|incarnation| self.counts(node, incarnation));
        self.is_alive(node) && counts && peer.membership != Some(Membership::Learner)
    }

    pub(super) fn is_coordinator(&self) -> bool {
        self.coordinator == self.settings.node && self.membership() == Membership::Voter
    }

    pub(super) fn send(&mut self, to: &NodeId, message: Message) {
        self.out.push(Output::Send { to: to.clone(), message: Box::new(message) });
    }

    pub(super) fn broadcast(&mut self, message: &Message) {
        for to in self.peers.keys() {
            self.out.push(Output::Send { to: to.clone(), message: Box::new(message.clone()) });
        }
    }

    pub(super) fn announce(&mut self, event: Event) {
        self.out.push(Output::Announce(event));
    }

    /// Makes the register durable as it stands, together with the log so far.
    pub(super) fn persist(&mut self) {
        if !self.rebuilding {
            self.acceptor.head = self.ledger.head;
            self.acceptor.head_hash = self.ledger.head_hash;
        }
        self.out.push(Output::Persist(Box::new(self.acceptor.clone())));
    }

    /// Returns the highest ballot that this node knows to be promised.
    pub(super) fn promised(&self) -> Option<&Ballot> {
        self.acceptor.promised.as_ref()
    }

    fn forget_settled_accept(&mut self) {
        if self.acceptor.accepted.as_ref().is_some_and(|a| a.record.slot <= self.ledger.head) {
            self.acceptor.accepted = None;
        }
    }

    /// Takes note of members that weren't known before.
    fn meet_members(&mut self) {
        for node in self.ledger.members.0.keys().filter(|node| **node != self.settings.node) {
            self.peers.entry(node.clone()).or_default();
        }
    }

    fn watch_peers(&mut self) {
        let changed: Vec<_> = (self.peers.iter())
            .map(|(node, peer)| (node.clone(), peer.announced_alive, self.is_alive(node)))
            .filter(|(_, said, alive)| said != alive)
            .collect();
        for (node, _, alive) in changed {
            self.peers.get_mut(&node).expect("a peer just listed").announced_alive = alive;
            self.announce(Event::Peer { node, alive });
            self.outdated.all = true;
        }
        let members = self.ledger.members.0.keys();
        let lowest = members.filter(|node| self.is_live_voter(node)).min();
        let coordinator = lowest.unwrap_or(&self.settings.node).clone();
        if coordinator != self.coordinator {
            self.coordinator = coordinator.clone();
            self.announce(Event::Coordinator { node: coordinator });
            self.outdated.all = true;
        }
    }

    /// Takes in the record of the next slot, which a majority accepted: adds it to the ledger and the log, serves by
    /// it, answers who waited for it. Panics when it contradicts what this node knows: that is I1 or I2 broken.
    pub(super) fn learn(&mut self, chosen: Chosen) {
        let record = &chosen.record;
        self.ledger.apply(&chosen).unwrap_or_else(|error| panic!("I1: chosen record {}: {error}", record.slot));
        if record.slot == self.acceptor.head && self.rebuilding {
            assert_eq!(self.ledger.head_hash, self.acceptor.head_hash, "I2: the rebuilt log is the one remembered");
            self.rebuilding = false;
        }
        self.forget_settled_accept();
        if self.prepared.as_ref().is_some_and(|prepared| prepared.slot <= record.slot) {
            self.prepared = None;
        }
        self.last_vote = None;
        self.meet_members();
        self.renew_gate(&chosen);
        // A verdict changes nothing that is shown but the head: the next refresh has it.
        let is_shown = !record.intent.operation.is_verdict();
        if is_shown {
            self.outdate(&record.intent.operation);
            self.publish();
        }
        // Whoever hears of it finds it in the log.
        self.out.push(Output::Append(Box::new(chosen.clone())));
        self.announce_record(&chosen);
        self.settle(record);
        if is_shown {
            self.outdate(&record.intent.operation);
        }
        let Retention { checkpoint_every, history } = self.settings.retention;
        if self.ledger.head.0.is_multiple_of(checkpoint_every) && !self.rebuilding {
            let keep_from = Slot(self.ledger.head.0.saturating_sub(history) + 1);
            match Checkpoint::of(&self.ledger) {
                Ok(checkpoint) => self.out.push(Output::Checkpoint { checkpoint, keep_from }),
                // The log stays as long as it is, which is read back with the checkpoint before.
                Err(error) => {
                    let node = self.settings.node.clone();
                    self.announce(Event::Rejected { node, reason: format!("its own checkpoint: {error}") });
                }
            }
        }
    }

    /// Notes that what an act concerns must be shown anew.
    pub(super) fn outdate(&mut self, operation: &Operation) {
        match operation.service() {
            Some(id) if self.ledger.services.contains_key(id) => drop(self.outdated.services.insert(id.clone())),
            _ => self.outdated.all = true,
        }
    }

    /// Takes in a peer's checkpoint in place of the records that nobody has any more.
    fn on_checkpoint(&mut self, from: &NodeId, part: Part) {
        if part.slot <= self.ledger.head {
            return;
        }
        let Some(checkpoint) = self.incoming.take(part) else { return };
        let ledger = match checkpoint.ledger() {
            Ok(ledger) if ledger.cluster == self.settings.cluster => ledger,
            Ok(ledger) => {
                self.reject(from, format!("its checkpoint is of cluster {}", ledger.cluster));
                return;
            }
            Err(error) => {
                self.reject(from, format!("its checkpoint: {error}"));
                return;
            }
        };
        let slot = ledger.head;
        if slot == self.acceptor.head && self.rebuilding {
            assert_eq!(ledger.head_hash, self.acceptor.head_hash, "I2: the checkpoint is of the log remembered");
        }
        self.rebuilding &= slot < self.acceptor.head;
        self.ledger = ledger;
        self.early.retain(|early, _| *early > slot);
        self.forget_settled_accept();
        self.prepared = self.prepared.take().filter(|prepared| prepared.slot > slot);
        self.last_vote = None;
        self.meet_members();
        self.new_gates();
        self.out.push(Output::Install(checkpoint));
        self.outdated.all = true;
        self.publish();
        self.release_desk(slot);
        self.beat_to(from);
    }

    /// Gives each service that has no gate for its routing version one that knows nothing yet.
    fn new_gates(&mut self) {
        let now = self.now;
        let mut before = std::mem::take(&mut self.gates);
        let gates = self.ledger.services.iter().map(|(id, service_state)| {
            // A brake, and the evidence behind it, outlives a checkpoint that changes nothing about them.
            let same = |gate: &Gate| gate.routing_version == service_state.service.routing.version;
            if let Some(gate) = before.remove(id).filter(same) {
                return (id.clone(), gate);
            }
            let since = now.mono.before_ms(now.wall.0.saturating_sub(service_state.service.routing.timestamp.0));
            (id.clone(), Gate::new(service_state, since))
        });
        self.gates = gates.collect();
        self.trackers.retain(|id, _| self.gates.contains_key(id));
        for id in self.gates.keys().cloned().collect::<Vec<_>>() {
            self.renew_watch(&id, true);
        }
    }

    fn announce_record(&mut self, chosen: &Chosen) {
        let Record { slot, intent, .. } = &chosen.record;
        let kind = intent.operation.name().to_string();
        let took_ms = self.coordination.took_ms(&chosen.record, self.now.mono);
        let event = match &intent.operation {
            Operation::Config(change) => {
                let node = change.node().clone();
                Event::Membership { slot: *slot, kind, node, txid: intent.tx.clone() }
            }
            Operation::Abort { service: None, .. } | Operation::Genesis { .. } => return,
            Operation::Judge { service, rollout_generation, window_verdict } => {
                let (service, window_verdict) = (service.clone(), (**window_verdict).clone());
                Event::Judged { slot: Some(*slot), service, rollout_generation: *rollout_generation, window_verdict }
            }
            Operation::Abort { service: Some(id), refused, reasons } => {
                let Some(service_state) = self.ledger.services.get(id) else { return };
                let phase = service_state.service.rollout.phase.to_string();
                let (state, kind) = (service_state.service.routing.clone(), format!("Abort({refused})"));
                Event::Routing { slot: *slot, kind, state, phase, reasons: reasons.clone(), took_ms }
            }
            Operation::Change(id, _) | Operation::Revert { service: id, .. } => {
                let service_state = &self.ledger.services[id];
                let rollout = &service_state.service.rollout;
                let reasons = Some(rollout.reason.clone()).filter(|r| !r.is_empty()).into_iter().collect();
                let (state, phase) = (service_state.service.routing.clone(), rollout.phase.to_string());
                Event::Routing { slot: *slot, kind, state, phase, reasons, took_ms }
            }
        };
        self.announce(event);
    }

    /// Tells people that a transaction was prepared here.
    pub(super) fn announce_prepared(&mut self, slot: Slot, record_intent: &super::record::Intent) {
        let Some(id) = record_intent.operation.service().filter(|_| !record_intent.operation.is_verdict()) else {
            return;
        };
        let Ok(record) = self.ledger.next_record(record_intent.clone(), None) else { return };
        let Some(state) = record.state else { return };
        let phase = self.ledger.services.get(id).map_or(String::new(), |a| a.service.rollout.phase.to_string());
        let state = RoutingState { status: Status::Prepared, ..state };
        let kind = record_intent.operation.name().into();
        self.announce(Event::Routing { slot, kind, state, phase, reasons: Vec::new(), took_ms: None });
    }

    fn build_view(&self) -> View {
        let members = self.ledger.members.0.iter().map(|(node, member)| {
            let view = MemberView {
                incarnation: member.incarnation,
                cordoned: member.cordoned,
                alive: self.is_alive(node),
                head: if *node == self.settings.node {
                    Some(self.ledger.head)
                } else {
                    self.peers.get(node).and_then(|peer| peer.head)
                },
                counts_not: self.counts_not(node, member.incarnation),
            };
            (node.clone(), view)
        });
        View {
            node: self.settings.node.clone(),
            cluster: self.settings.cluster,
            incarnation: self.acceptor.incarnation,
            membership: self.membership(),
            head: self.ledger.head,
            head_hash: self.ledger.head_hash,
            coordinator: self.coordinator.clone(),
            members: members.collect(),
            services: self.shown.clone(),
        }
    }

    fn counts_not(&self, node: &NodeId, bound: Incarnation) -> Option<String> {
        let own = *node == self.settings.node;
        let found = if own { Some(self.acceptor.incarnation) } else { self.peers.get(node)?.incarnation };
        let membership = if own { Some(self.membership()) } else { self.peers.get(node)?.membership };
        match found {
            Some(found) if found != bound => {
                Some(format!("its memory is gone: incarnation is {found}, expected {bound}; readmit it"))
            }
            Some(_) if membership == Some(Membership::Learner) => {
                Some("it is rebuilding its log from its peers".into())
            }
            _ => None,
        }
    }

    fn service_view(&self, id: &ServiceId, service_state: &ServiceState) -> ServiceView {
        let gate = &self.gates[id];
        let serving = self.serving(service_state, gate);
        let active = service_state.service.rollout.phase.is_active();
        ServiceView {
            service: service_state.service.clone(),
            slot: service_state.slot,
            hash: service_state.hash,
            serving,
            local: gate.local().clone(),
            cluster: self.cluster_evidence(gate),
            verdict: active.then(|| gate.verdict.clone()).flatten(),
            sequential: self.trackers.get(id).and_then(RunTracker::sequential),
            waiting_for: self.waiting_for(id, service_state, gate),
            enforced: self.lease.is_enforced(id),
        }
    }

    /// Returns what a service is served by: never more than agreed, less where something holds it back.
    pub(super) fn serving(&self, service_state: &ServiceState, gate: &Gate) -> Serving {
        let in_doubt = service_state.increase.as_ref().filter(|increase| increase.in_doubt);
        let service = in_doubt.map_or(&service_state.service, |increase| &increase.before);
        let spec = &service.rollout.spec;
        let decrease = Ledger::decrease_in(self.acceptor.accepted.as_ref()).is_some_and(|slot| {
            let accepted = &self.acceptor.accepted.as_ref().expect("a lowering was accepted").record;
            slot > self.ledger.head && accepted.intent.operation.service() == Some(&service.routing.service)
        });
        let held_back = if self.membership() == Membership::Learner {
            Some("this node has no vote".to_string())
        } else if self.ledger.members.is_cordoned(&self.settings.node) {
            Some("this node is benched".into())
        } else if decrease {
            Some("a rollback is being decided".into())
        } else if let Some(why) = &gate.local_hold {
            Some(format!("brake: {why}"))
        } else {
            in_doubt.map(|increase| format!("slot {} was decided in doubt and is being reverted", increase.slot))
        };
        let canary = service.routing.canary_model_id.as_ref().map(|_| {
            let stopped = held_back.is_some() && in_doubt.is_none() || gate.local_hold.is_some() || decrease;
            let stopped = stopped
                || self.membership() == Membership::Learner
                || self.ledger.members.is_cordoned(&self.settings.node);
            let weight = if stopped { 0 } else { service.routing.canary_weight().bp() };
            (spec.canary.clone(), weight)
        });
        let leased = service.needs_lease() && spec.on_partition == crate::domain::plan::OnPartition::Stable;
        Serving {
            routing_version: service_state.service.routing.version,
            stable: service.stable.clone(),
            canary,
            lease_ms: leased.then_some(spec.lease_ms),
            spec: spec.clone(),
            held_back,
        }
    }
}
