//! The lease: canary traffic that needs one ends a bounded time after the last contact with a majority.
//!
//! A lease is measured from the *send* of the heartbeat that a majority answered, on this node's own clock, and is
//! refused by whoever knows, or has accepted, a lowering that the asker has not.

use std::collections::{BTreeMap, BTreeSet};

use crate::domain::ids::{Incarnation, NodeId, ServiceId};
use crate::domain::time::Mono;

use super::core::Core;
use super::ledger::Ledger;
use super::message::{Acknowledgement, Heartbeat, Membership, Message};
use super::record::Slot;
use super::{Event, Outcome, Output, RequestId};

/// A heartbeat that waits for answers.
#[derive(Debug, Clone)]
struct Beat {
    sent: Mono,
    granted: BTreeSet<NodeId>,
    answered: BTreeSet<NodeId>,
}

/// A lowering that some node may not obey yet.
#[derive(Debug, Clone)]
struct Enforcing {
    slot: Slot,
    chosen: Mono,
    /// Longest lease that a node without it may still hold, in milliseconds.
    lease_ms: u64,
}

/// A read that waits for a majority's word, then for this node to catch up with it.
#[derive(Debug, Clone)]
struct Read {
    nonce: u64,
    deadline: Mono,
    answered: BTreeSet<NodeId>,
    /// Slots that an answered write may be in.
    through: Slot,
}

/// This node's lease, and what it waits for from its peers' heartbeats.
#[derive(Debug, Clone, Default)]
pub(super) struct Lease {
    nonce: u64,
    beats: BTreeMap<u64, Beat>,
    from: Option<Mono>,
    next_beat: Mono,
    held: bool,
    enforcing: BTreeMap<ServiceId, Enforcing>,
    reads: BTreeMap<RequestId, Read>,
}

impl Lease {
    /// Returns no lease, with heartbeats numbered from `nonce`.
    pub fn starting_at(nonce: u64) -> Self {
        Self { nonce, ..Self::default() }
    }

    /// Returns true unless a lowering of this service may still be disobeyed somewhere.
    pub fn is_enforced(&self, service: &ServiceId) -> bool {
        !self.enforcing.contains_key(service)
    }

    /// Returns the milliseconds left of a lease of `lease_ms`.
    pub fn ms_left(&self, now: Mono, lease_ms: u64) -> u64 {
        self.from.map_or(0, |from| from.after_ms(lease_ms).millis_since(now))
    }
}

/// How long an unanswered heartbeat is remembered.
const BEAT_MS: u64 = 5_000;
/// Longest wait of a linearizable read.
const READ_MS: u64 = 1_500;
/// Clock rates differ by at most one part in this many.
const RATE_PARTS: u64 = 100;

impl Core {
    pub(super) fn tick_lease(&mut self) {
        if self.now.mono >= self.lease.next_beat {
            self.beat();
        }
        let held = self.lease.ms_left(self.now.mono, self.lease_shown_ms()) > 0;
        if held != self.lease.held {
            self.lease.held = held;
            self.announce(Event::Lease { held });
            self.outdated.all = true;
        }
        self.tick_enforcing();
    }

    /// The shortest lease in use; 2 s where no rollout names one.
    fn lease_shown_ms(&self) -> u64 {
        let services = self.ledger.services.values().filter(|service_state| service_state.service.needs_lease());
        services.map(|service_state| service_state.service.rollout.spec.lease_ms).min().unwrap_or(2_000)
    }

    /// Sends every peer a heartbeat that asks for an answer.
    pub(super) fn beat(&mut self) -> u64 {
        self.lease.nonce += 1;
        let nonce = self.lease.nonce;
        let now = self.now.mono;
        self.lease.next_beat = now.after_ms(self.settings.timings.heartbeat_ms);
        self.lease.beats.retain(|_, beat| now.millis_since(beat.sent) < BEAT_MS);
        self.lease.beats.insert(nonce, Beat { sent: now, granted: BTreeSet::new(), answered: BTreeSet::new() });
        let heartbeat = self.heartbeat(Some(nonce), None);
        self.broadcast(&Message::Heartbeat(heartbeat));
        let (own, granted) = (self.settings.node.clone(), self.grants_lease(self.ledger.head));
        if self.membership() == Membership::Voter {
            self.on_acknowledged(&own, Acknowledgement { nonce, granted });
        }
        nonce
    }

    pub(super) fn heartbeat(&self, nonce: Option<u64>, acknowledges: Option<Acknowledgement>) -> Heartbeat {
        Heartbeat {
            nonce,
            acknowledges,
            head: self.ledger.head,
            head_hash: self.ledger.head_hash,
            in_doubt: self.ledger.in_doubt().map(|(_, increase)| increase.slot),
            open: self.acceptor.accepted.as_ref().map(|accepted| accepted.ballot.clone()),
            membership: self.membership(),
        }
    }

    /// Returns true when a node at `head` knows every lowering that this one knows or has accepted.
    fn grants_lease(&self, head: Slot) -> bool {
        let accepted = Ledger::decrease_in(self.acceptor.accepted.as_ref()).unwrap_or(Slot(0));
        self.ledger.last_decrease.max(accepted) <= head
    }

    pub(super) fn on_heartbeat(&mut self, from: &NodeId, incarnation: Incarnation, heartbeat: Heartbeat) {
        let counts = self.counts(from, incarnation);
        if let Some(nonce) = heartbeat.nonce {
            let granted = counts && self.membership() == Membership::Voter && self.grants_lease(heartbeat.head);
            let answer = self.heartbeat(None, Some(Acknowledgement { nonce, granted }));
            self.send(from, Message::Heartbeat(answer));
        }
        self.note_heartbeat(from, &heartbeat);
        if counts
            && heartbeat.membership == Membership::Voter
            && let Some(acknowledgement) = heartbeat.acknowledges
        {
            self.note_read(from, &heartbeat, acknowledgement.nonce);
            self.on_acknowledged(from, acknowledgement);
        }
        if heartbeat.head < self.ledger.head {
            self.send_log(from, heartbeat.head.next());
        }
    }

    fn note_heartbeat(&mut self, from: &NodeId, heartbeat: &Heartbeat) {
        let (now, head) = (self.now.mono, self.ledger.head);
        let Some(peer) = self.peers.get_mut(from) else { return };
        let news = peer.membership != Some(heartbeat.membership) || peer.head != Some(heartbeat.head);
        peer.membership = Some(heartbeat.membership);
        peer.head = Some(heartbeat.head);
        peer.open = match (&heartbeat.open, peer.open.take()) {
            (Some(ballot), Some((known, slot, since))) if *ballot == known && heartbeat.head.next() == slot => {
                Some((known, slot, since))
            }
            (Some(ballot), _) if heartbeat.head == head => Some((ballot.clone(), head.next(), now)),
            _ => None,
        };
        self.outdated.cluster |= news;
        if let Some(slot) = heartbeat.in_doubt.filter(|slot| *slot <= head) {
            self.outdated.all |= self.ledger.mark_in_doubt(slot);
        }
    }

    fn on_acknowledged(&mut self, from: &NodeId, acknowledgement: Acknowledgement) {
        let quorum = self.ledger.members.quorum();
        let Some(beat) = self.lease.beats.get_mut(&acknowledgement.nonce) else { return };
        beat.answered.insert(from.clone());
        if acknowledgement.granted {
            beat.granted.insert(from.clone());
        }
        let sent = beat.sent;
        if beat.granted.len() >= quorum && self.lease.from < Some(sent) && self.membership() == Membership::Voter {
            self.lease.from = Some(sent);
            self.out.push(Output::Lease(Some(sent)));
        }
    }

    // Enforcement of lowerings.

    /// Begins to watch until a lowering is in force everywhere.
    pub(super) fn enforce(&mut self, service: ServiceId, slot: Slot, lease_ms: u64) {
        let chosen = self.now.mono;
        self.lease.enforcing.insert(service, Enforcing { slot, chosen, lease_ms });
    }

    fn tick_enforcing(&mut self) {
        if self.lease.enforcing.is_empty() {
            return;
        }
        let now = self.now.mono;
        let lowest = self.ledger.members.0.keys().map(|node| match *node == self.settings.node {
            true => Some(self.ledger.head),
            false => self.peers.get(node).and_then(|peer| peer.head),
        });
        let everybody = lowest.min().flatten();
        let done: Vec<_> = (self.lease.enforcing.iter())
            .filter(|(_, e)| {
                let ended = e.lease_ms + e.lease_ms / RATE_PARTS + 1;
                everybody >= Some(e.slot) || now.millis_since(e.chosen) >= ended
            })
            .map(|(service, e)| (service.clone(), e.slot, now.millis_since(e.chosen)))
            .collect();
        for (service, slot, took_ms) in done {
            self.lease.enforcing.remove(&service);
            self.outdated.services.insert(service.clone());
            if self.is_coordinator() {
                self.announce(Event::Enforced { service, slot, took_ms });
            }
        }
    }

    // Linearizable reads.

    pub(super) fn on_read(&mut self, request: RequestId) {
        if self.membership() == Membership::Learner {
            self.out.push(Output::Reply(request, Outcome::Refused("this node has no vote".into())));
            return;
        }
        let own_open = self.acceptor.accepted.is_some();
        let through = if own_open { self.ledger.head.next() } else { self.ledger.head };
        let nonce = self.beat();
        let answered = BTreeSet::from([self.settings.node.clone()]);
        let deadline = self.now.mono.after_ms(READ_MS);
        self.lease.reads.insert(request, Read { nonce, deadline, answered, through });
        self.tick_reads();
    }

    fn note_read(&mut self, from: &NodeId, heartbeat: &Heartbeat, nonce: u64) {
        let through = if heartbeat.open.is_some() { heartbeat.head.next() } else { heartbeat.head };
        for read in self.lease.reads.values_mut().filter(|read| read.nonce == nonce) {
            read.answered.insert(from.clone());
            read.through = read.through.max(through);
        }
        self.tick_reads();
    }

    pub(super) fn tick_reads(&mut self) {
        let (now, head, needed) = (self.now.mono, self.ledger.head, self.ledger.members.quorum());
        let mut answers = Vec::new();
        self.lease.reads.retain(|request, read| {
            let outcome = if read.answered.len() >= needed && head >= read.through {
                Outcome::Current(head)
            } else if now >= read.deadline {
                Outcome::NoQuorum { reached: read.answered.iter().cloned().collect(), needed }
            } else {
                return true;
            };
            answers.push(Output::Reply(*request, outcome));
            false
        });
        self.out.extend(answers);
    }
}
