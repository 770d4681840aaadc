//! The lease: canary traffic that needs one ends a bounded time after the last contact with a majority.
//!
//! A lease is measured from the *send* of the heartbeat that a majority answered, on this node's own clock, and is
//! refused by a node that knows, or has accepted, a decrease that the asker has not.

use std::collections::{BTreeMap, BTreeSet};

use crate::domain::ids::{Incarnation, NodeId, ServiceId};
use crate::domain::time::Mono;

use super::context::Context;
use super::event::Event;
use super::log::ledger::Ledger;
use super::log::record::Slot;
use super::message::{Acknowledgement, Heartbeat, Membership, Message};
use super::{Outcome, Output, RequestId};

/// A heartbeat that waits for answers.
#[derive(Debug, Clone)]
struct Beat {
    sent: Mono,
    granted: BTreeSet<NodeId>,
    answered: BTreeSet<NodeId>,
}

/// A decrease that some node may not obey yet.
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

    /// Returns true unless a decrease of this service may still be disobeyed somewhere.
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

impl Lease {
    /// Beats when it is time, and tells of a lease that began or ended.
    pub fn tick(&mut self, ctx: &mut Context) {
        if ctx.now.mono >= self.next_beat {
            self.beat(ctx);
        }
        let held = self.ms_left(ctx.now.mono, Self::lease_shown_ms(ctx)) > 0;
        if held != self.held {
            self.held = held;
            ctx.announce(Event::Lease { held });
            ctx.outdated.all = true;
        }
        self.tick_enforcing(ctx);
    }

    /// The shortest lease in use; 2 s where no rollout names one.
    fn lease_shown_ms(ctx: &Context) -> u64 {
        let services = ctx.ledger.services.values().filter(|service_state| service_state.service.needs_lease());
        services.map(|service_state| service_state.service.rollout.spec.lease_ms).min().unwrap_or(2_000)
    }

    /// Sends every peer a heartbeat that asks for an answer.
    pub fn beat(&mut self, ctx: &mut Context) -> u64 {
        self.nonce += 1;
        let nonce = self.nonce;
        let now = ctx.now.mono;
        self.next_beat = now.after_ms(ctx.settings.timings.heartbeat_ms);
        self.beats.retain(|_, beat| now.millis_since(beat.sent) < BEAT_MS);
        self.beats.insert(nonce, Beat { sent: now, granted: BTreeSet::new(), answered: BTreeSet::new() });
        for peer in ctx.peers.keys().cloned().collect::<Vec<_>>() {
            let heartbeat = ctx.heartbeat(&peer, Some(nonce), None);
            ctx.send(&peer, Message::Heartbeat(heartbeat));
        }
        let (own, granted) = (ctx.settings.node.clone(), Self::grants_lease(ctx, ctx.ledger.head));
        if ctx.membership() == Membership::Voter {
            self.on_acknowledged(ctx, &own, Acknowledgement { nonce, granted });
        }
        nonce
    }

    /// Returns true when a node at `head` knows every decrease that this one knows or has accepted.
    fn grants_lease(ctx: &Context, head: Slot) -> bool {
        let accepted = Ledger::decrease_in(ctx.acceptor.accepted.as_ref()).unwrap_or(Slot(0));
        ctx.ledger.last_decrease.max(accepted) <= head
    }

    /// Answers a heartbeat, and takes in what it says of the sender and of this node's own heartbeats.
    pub fn on_heartbeat(&mut self, ctx: &mut Context, from: &NodeId, incarnation: Incarnation, heartbeat: Heartbeat) {
        let counts = ctx.counts(from, incarnation);
        ctx.note_disk(from, incarnation, heartbeat.writes);
        if let Some(nonce) = heartbeat.nonce {
            let granted = counts && ctx.membership() == Membership::Voter && Self::grants_lease(ctx, heartbeat.head);
            let answer = ctx.heartbeat(from, None, Some(Acknowledgement { nonce, granted }));
            ctx.send(from, Message::Heartbeat(answer));
        }
        Self::note_heartbeat(ctx, from, &heartbeat);
        if counts
            && heartbeat.membership == Membership::Voter
            && let Some(acknowledgement) = heartbeat.acknowledges
        {
            self.note_read(ctx, from, &heartbeat, acknowledgement.nonce);
            self.on_acknowledged(ctx, from, acknowledgement);
        }
        if heartbeat.head < ctx.ledger.head {
            ctx.send_log(from, heartbeat.head.next());
        }
    }

    fn note_heartbeat(ctx: &mut Context, from: &NodeId, heartbeat: &Heartbeat) {
        let (now, head) = (ctx.now.mono, ctx.ledger.head);
        let Some(peer) = ctx.peers.get_mut(from) else { return };
        let news = peer.membership != Some(heartbeat.membership) || peer.head != Some(heartbeat.head);
        peer.speaks = Some(heartbeat.speaks);
        peer.membership = Some(heartbeat.membership);
        peer.head = Some(heartbeat.head);
        peer.open = match (&heartbeat.open, peer.open.take()) {
            (Some(ballot), Some((known, slot, since))) if *ballot == known && heartbeat.head.next() == slot => {
                Some((known, slot, since))
            }
            (Some(ballot), _) if heartbeat.head == head => Some((ballot.clone(), head.next(), now)),
            _ => None,
        };
        ctx.outdated.cluster |= news;
        if let Some(slot) = heartbeat.in_doubt.filter(|slot| *slot <= head) {
            ctx.outdated.all |= ctx.ledger.mark_in_doubt(slot);
        }
    }

    fn on_acknowledged(&mut self, ctx: &mut Context, from: &NodeId, acknowledgement: Acknowledgement) {
        let quorum = ctx.ledger.members.quorum();
        let Some(beat) = self.beats.get_mut(&acknowledgement.nonce) else { return };
        beat.answered.insert(from.clone());
        if acknowledgement.granted {
            beat.granted.insert(from.clone());
        }
        let sent = beat.sent;
        if beat.granted.len() >= quorum && self.from < Some(sent) && ctx.membership() == Membership::Voter {
            self.from = Some(sent);
            ctx.put(Output::Lease(Some(sent)));
        }
    }

    // Enforcement of decreases.

    /// Begins to watch until a decrease is in force everywhere.
    pub fn enforce(&mut self, ctx: &Context, service: ServiceId, slot: Slot, lease_ms: u64) {
        let chosen = ctx.now.mono;
        self.enforcing.insert(service, Enforcing { slot, chosen, lease_ms });
    }

    fn tick_enforcing(&mut self, ctx: &mut Context) {
        if self.enforcing.is_empty() {
            return;
        }
        let now = ctx.now.mono;
        let lowest = ctx.ledger.members.0.keys().map(|node| match *node == ctx.settings.node {
            true => Some(ctx.ledger.head),
            false => ctx.peers.get(node).and_then(|peer| peer.head),
        });
        let everybody = lowest.min().flatten();
        let done: Vec<_> = (self.enforcing.iter())
            .filter(|(_, e)| {
                let ended = e.lease_ms + e.lease_ms / RATE_PARTS + 1;
                everybody >= Some(e.slot) || now.millis_since(e.chosen) >= ended
            })
            .map(|(service, e)| (service.clone(), e.slot, now.millis_since(e.chosen)))
            .collect();
        for (service, slot, took_ms) in done {
            self.enforcing.remove(&service);
            ctx.outdated.services.insert(service.clone());
            if ctx.is_coordinator() {
                ctx.announce(Event::Enforced { service, slot, took_ms });
            }
        }
    }

    // Linearizable reads.

    /// Begins a linearizable read: it is answered once a majority confirms the coordinator's head.
    pub fn on_read(&mut self, ctx: &mut Context, request: RequestId) {
        if ctx.membership() == Membership::Learner {
            ctx.put(Output::Reply(request, Outcome::Refused("this node has no vote".into())));
            return;
        }
        let own_open = ctx.acceptor.accepted.is_some();
        let through = if own_open { ctx.ledger.head.next() } else { ctx.ledger.head };
        let nonce = self.beat(ctx);
        let answered = BTreeSet::from([ctx.settings.node.clone()]);
        let deadline = ctx.now.mono.after_ms(READ_MS);
        self.reads.insert(request, Read { nonce, deadline, answered, through });
        self.tick_reads(ctx);
    }

    fn note_read(&mut self, ctx: &mut Context, from: &NodeId, heartbeat: &Heartbeat, nonce: u64) {
        let through = if heartbeat.open.is_some() { heartbeat.head.next() } else { heartbeat.head };
        for read in self.reads.values_mut().filter(|read| read.nonce == nonce) {
            read.answered.insert(from.clone());
            read.through = read.through.max(through);
        }
        self.tick_reads(ctx);
    }

    /// Answers the reads that a majority confirmed, and those that took too long.
    pub fn tick_reads(&mut self, ctx: &mut Context) {
        let (now, head, needed) = (ctx.now.mono, ctx.ledger.head, ctx.ledger.members.quorum());
        let mut answers = Vec::new();
        self.reads.retain(|request, read| {
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
        answers.into_iter().for_each(|answer| ctx.put(answer));
    }
}
