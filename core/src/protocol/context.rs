//! What all components share: what the node was told, the time, the ledger, its acceptor state, what it knows of its peers, and
//! the outbox. Nothing here decides; a component changes its own state and, through this, what is shared.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound::{Excluded, Unbounded};

use crate::domain::ids::{Incarnation, NodeId, ServiceId};
use crate::domain::time::{Mono, Now};

use super::Output;
use super::event::Event;
use super::feature::Feature;
use super::log::ledger::Ledger;
use super::log::record::{AcceptorState, Ballot, Chosen, Operation, SeenDisk, Slot};
use super::message::{Acknowledgement, Heartbeat, Membership, Message, Refusal};
use super::settings::Settings;

/// What a node knows of another.
#[derive(Debug, Clone, Default)]
pub(super) struct PeerState {
    /// When it last said anything; none since this node started.
    pub heard: Option<Mono>,
    /// True when its process is known to be gone, until it speaks.
    pub unreachable: bool,
    /// Its incarnation, by its own word.
    pub incarnation: Option<Incarnation>,
    /// Last slot that the peer has decided.
    pub head: Option<Slot>,
    /// The newest protocol version that it speaks, by its own word.
    pub speaks: Option<u16>,
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

/// Parts of the published view that must be made anew. A view is of all services: with many, most are as they were.
#[derive(Debug, Clone, Default)]
pub(super) struct Outdated {
    /// Head, members or coordinator changed.
    pub cluster: bool,
    /// The views of all services must be made anew.
    pub all: bool,
    /// Services whose views must be made anew.
    pub services: BTreeSet<ServiceId>,
    /// Services of which only the evidence changed, by which nobody is served: they wait for the next refresh.
    pub evidence: BTreeSet<ServiceId>,
}

/// The shared facts and the outbox.
#[derive(Debug, Clone)]
pub(super) struct Context {
    pub settings: Settings,
    pub now: Now,
    pub ledger: Ledger,
    /// What this node promised and accepted, as it is persisted.
    pub acceptor: AcceptorState,
    /// A slot at or after the last change of the membership that this node knows of.
    pub last_config: Slot,
    /// The log lacks slots that the acceptor state remembers: no votes until they are back.
    pub rebuilding: bool,
    pub peers: BTreeMap<NodeId, PeerState>,
    /// The node that this one takes for the coordinator.
    pub coordinator: NodeId,
    /// Why promotions hold: the store that they depend on doesn't answer. None while it does.
    pub unavailable: Option<String>,
    /// What of the view isn't as it is any more; it is published at the end of the call.
    pub outdated: Outdated,
    pub draws: Draws,
    /// Silence after which a peer counts as lost, in milliseconds; each node draws its own.
    suspect_ms: u64,
    /// Moment at which this process began, on its monotonic clock.
    started: Mono,
    out: Vec<Output>,
}

/// Most records sent to a peer that lags, for each sign of life it gives.
pub(super) const CATCH_UP_RECORDS: u64 = 64;

impl Context {
    pub fn new(settings: Settings, acceptor: AcceptorState, ledger: Ledger, now: Now) -> Self {
        let mut draws = Draws(settings.seed ^ acceptor.boot.rotate_left(32) ^ acceptor.incarnation.0);
        let suspect_ms = draws.between(settings.timings.suspect_ms, settings.timings.suspect_ms * 3 / 2);
        let others = ledger.members.0.keys().chain(&settings.peers).filter(|node| **node != settings.node);
        let fresh = || PeerState { announced_alive: true, ..PeerState::default() };
        let peers = others.map(|node| (node.clone(), fresh())).collect();
        Self {
            rebuilding: ledger.head < acceptor.head,
            coordinator: settings.node.clone(),
            // A checkpoint doesn't say when the membership changed: at the latest at its own slot.
            last_config: ledger.head,
            settings,
            now,
            ledger,
            acceptor,
            peers,
            unavailable: None,
            outdated: Outdated { all: true, ..Outdated::default() },
            draws,
            suspect_ms,
            started: now.mono,
            out: Vec::new(),
        }
    }

    // The outbox.

    pub fn put(&mut self, output: Output) {
        self.out.push(output);
    }

    pub fn take_outputs(&mut self) -> Vec<Output> {
        std::mem::take(&mut self.out)
    }

    pub fn send(&mut self, to: &NodeId, message: Message) {
        self.put(Output::Send { to: to.clone(), message: Box::new(message) });
    }

    pub fn broadcast(&mut self, message: Message) {
        let mut peers = self.peers.keys();
        let Some(last) = peers.next_back() else { return };
        let send = |to: &NodeId, message| Output::Send { to: to.clone(), message: Box::new(message) };
        self.out.extend(peers.map(|to| send(to, message.clone())));
        self.out.push(send(last, message));
    }

    /// Sends to every peer that isn't among `done`.
    pub fn broadcast_but(&mut self, message: &Message, done: &BTreeSet<NodeId>) {
        for to in self.peers.keys().filter(|node| !done.contains(*node)) {
            self.out.push(Output::Send { to: to.clone(), message: Box::new(message.clone()) });
        }
    }

    pub fn announce(&mut self, event: Event) {
        self.put(Output::Announce(event));
    }

    /// Makes the acceptor state durable as it stands, together with the log so far.
    pub fn persist(&mut self) {
        if !self.rebuilding {
            self.acceptor.head = self.ledger.head;
            self.acceptor.head_hash = self.ledger.head_hash;
        }
        self.acceptor.writes += 1;
        self.put(Output::Persist(Box::new(self.acceptor.clone())));
    }

    /// Says that a peer's message broke a rule.
    pub fn reject(&mut self, from: &NodeId, reason: String) -> Refusal {
        self.announce(Event::Rejected { node: from.clone(), reason: reason.clone() });
        Refusal::BadProposal(reason)
    }

    /// Sends a peer what it lacks, in batches; the next one when it says that it has this one.
    pub fn send_log(&mut self, to: &NodeId, from: Slot) {
        let through = Slot((from.0 | (CATCH_UP_RECORDS - 1)).min(self.ledger.head.0));
        let now = self.now.mono;
        let resend_ms = self.settings.timings.resend_ms;
        let Some(peer) = self.peers.get_mut(to) else { return };
        let fresh = |(sent, at): &(Slot, Mono)| *sent >= through && now.millis_since(*at) < resend_ms;
        if from > through || peer.sent_log.as_ref().is_some_and(fresh) {
            return;
        }
        peer.sent_log = Some((through, now));
        self.put(Output::SendLog { to: to.clone(), from, through });
    }

    /// Returns a heartbeat of this node as it stands, for a peer.
    pub fn heartbeat(&self, to: &NodeId, nonce: Option<u64>, acknowledges: Option<Acknowledgement>) -> Heartbeat {
        Heartbeat {
            nonce,
            acknowledges,
            head: self.ledger.head,
            head_hash: self.ledger.head_hash,
            in_doubt: self.ledger.in_doubt().map(|(_, increase)| increase.slot),
            open: self.acceptor.accepted.as_ref().map(|accepted| accepted.ballot.clone()),
            membership: self.membership(),
            writes: self.acceptor.writes,
            seen: self.acceptor.seen.get(to).copied(),
            speaks: self.settings.speaks,
        }
    }

    /// Tells one peer where this node is, without asking for an answer.
    pub fn beat_to(&mut self, to: &NodeId) {
        let heartbeat = self.heartbeat(to, None, None);
        self.send(to, Message::Heartbeat(heartbeat));
    }

    /// Remembers how far a member's disk is. It is durable with this node's next write.
    pub fn note_disk(&mut self, from: &NodeId, incarnation: Incarnation, writes: u64) {
        if !self.counts(from, incarnation) {
            return;
        }
        let heard = SeenDisk { incarnation, writes };
        let seen = self.acceptor.seen.entry(from.clone()).or_insert(heard);
        if seen.incarnation != incarnation || seen.writes < writes {
            *seen = heard;
        }
    }

    /// Returns true when a peer knows of a later state of this node's disk: this one is an old copy of it.
    pub fn is_outdated_disk(&self, seen: Option<SeenDisk>) -> bool {
        let own = &self.acceptor;
        seen.is_some_and(|seen| seen.incarnation == own.incarnation && seen.writes > own.writes)
    }

    // Who counts.

    /// Returns what this node counts as.
    pub fn membership(&self) -> Membership {
        let counts = self.ledger.members.counts(&self.settings.node, self.acceptor.incarnation);
        if counts && !self.rebuilding { Membership::Voter } else { Membership::Learner }
    }

    /// Returns true when a peer's votes count.
    pub fn counts(&self, node: &NodeId, incarnation: Incarnation) -> bool {
        self.ledger.members.counts(node, incarnation)
    }

    /// Returns true while a peer is heard from.
    pub fn is_alive(&self, node: &NodeId) -> bool {
        if *node == self.settings.node {
            return true;
        }
        let Some(peer) = self.peers.get(node) else { return false };
        // Nobody is lost before this process has had the time to hear from them.
        let heard = peer.heard.unwrap_or(self.started);
        !peer.unreachable && self.now.mono.millis_since(heard) < self.suspect_ms
    }

    /// Returns true while a peer is heard from and its votes count.
    pub fn is_live_voter(&self, node: &NodeId) -> bool {
        if *node == self.settings.node {
            return self.membership() == Membership::Voter;
        }
        let Some(peer) = self.peers.get(node) else { return false };
        let counts = peer.incarnation.is_none_or(|incarnation| self.counts(node, incarnation));
        self.is_alive(node) && counts && peer.membership != Some(Membership::Learner)
    }

    /// Returns the slot that a record was accepted for, here or by a peer's word, without being known to be decided.
    pub fn open_slot(&self) -> Option<Slot> {
        let own = self.acceptor.accepted.as_ref().map(|accepted| accepted.record.slot);
        let told = self.peers.values().filter_map(|peer| peer.open.as_ref()).map(|(_, slot, _)| *slot);
        told.chain(own).filter(|slot| *slot > self.ledger.head).max()
    }

    pub fn is_coordinator(&self) -> bool {
        self.coordinator == self.settings.node && self.membership() == Membership::Voter
    }

    /// Returns the highest ballot that this node knows to be promised.
    pub fn promised(&self) -> Option<&Ballot> {
        self.acceptor.promised.as_ref()
    }

    pub fn watch_peers(&mut self) {
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

    /// Notes that a peer spoke. Returns false for a node that isn't known.
    pub fn hear(&mut self, from: &NodeId, incarnation: Incarnation) -> bool {
        let now = self.now.mono;
        let Some(peer) = self.peers.get_mut(from) else { return false };
        peer.heard = Some(now);
        peer.unreachable = false;
        peer.incarnation = Some(incarnation);
        if !peer.announced_alive {
            self.watch_peers();
        }
        true
    }

    /// Notes that a peer's process is gone. Returns false for a node that isn't known.
    pub fn lose(&mut self, node: &NodeId) -> bool {
        let Some(peer) = self.peers.get_mut(node) else { return false };
        peer.unreachable = true;
        self.watch_peers();
        true
    }

    /// Returns the members that don't know a feature, or didn't say yet what they speak.
    pub fn lacking(&self, feature: Feature) -> Vec<NodeId> {
        let lacks = |node: &&NodeId| self.speaks(node).is_none_or(|version| version < feature.protocol());
        self.ledger.members.0.keys().filter(lacks).cloned().collect()
    }

    /// Returns the newest protocol version that a node speaks; none before it said so to this process.
    pub fn speaks(&self, node: &NodeId) -> Option<u16> {
        match *node == self.settings.node {
            true => Some(self.settings.speaks),
            false => self.peers.get(node)?.speaks,
        }
    }

    // What is known to be decided.

    /// Adds a chosen record to the ledger. Panics when it contradicts what this node knows: that is I1 or I2 broken.
    pub fn apply(&mut self, chosen: &Chosen) {
        let slot = chosen.record.slot;
        self.ledger.apply(chosen).unwrap_or_else(|error| panic!("I1: chosen record {slot}: {error}"));
        if matches!(chosen.record.intent.operation, Operation::Config(_)) {
            self.last_config = slot;
        }
        if slot == self.acceptor.head && self.rebuilding {
            assert_eq!(self.ledger.head_hash, self.acceptor.head_hash, "I2: the rebuilt log is the one remembered");
            self.rebuilding = false;
        }
        self.follow_ledger();
    }

    /// Goes on from a peer's checkpoint.
    pub fn replace_ledger(&mut self, ledger: Ledger) {
        if ledger.head == self.acceptor.head && self.rebuilding {
            assert_eq!(ledger.head_hash, self.acceptor.head_hash, "I2: the checkpoint is of the log remembered");
        }
        self.rebuilding &= ledger.head < self.acceptor.head;
        self.last_config = ledger.head;
        self.ledger = ledger;
        self.follow_ledger();
    }

    /// Forgets an accepted record whose slot is decided, and takes note of members that weren't known before.
    fn follow_ledger(&mut self) {
        self.forget_settled_accept();
        for node in self.ledger.members.0.keys().filter(|node| **node != self.settings.node) {
            self.peers.entry(node.clone()).or_default();
        }
        let members = &self.ledger.members;
        self.acceptor.seen.retain(|node, seen| members.counts(node, seen.incarnation));
    }

    pub fn forget_settled_accept(&mut self) {
        if self.acceptor.accepted.as_ref().is_some_and(|a| a.record.slot <= self.ledger.head) {
            self.acceptor.accepted = None;
        }
    }

    /// Notes that what an operation concerns must be shown anew. A service that isn't in the ledger isn't shown.
    pub fn outdate(&mut self, operation: &Operation) {
        match operation.service() {
            Some(id) if self.ledger.services.contains_key(id) => drop(self.outdated.services.insert(id.clone())),
            Some(_) => self.outdated.cluster = true,
            None => self.outdated.all = true,
        }
    }
}

/// Returns the services of a map in order, those after `last` first.
pub(super) fn one_round<'m, V>(
    map: &'m BTreeMap<ServiceId, V>,
    last: Option<&ServiceId>,
) -> impl Iterator<Item = &'m ServiceId> {
    let after = last.map_or(Unbounded, Excluded);
    map.range::<ServiceId, _>((after, Unbounded)).chain(map).take(map.len()).map(|(id, _)| id)
}
