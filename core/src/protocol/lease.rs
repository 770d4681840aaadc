//! The lease: canary traffic that needs one ends a bounded time after the last contact with a majority.
//!
//! A lease is measured from the *send* of the heartbeat that a majority answered, on this node's own clock, and is
//! refused by a node that knows, or has accepted, a decrease that the asker has not. Both must know the same last change of
//! the membership: majorities of two memberships need not meet.

use std::collections::{BTreeMap, BTreeSet};

use crate::domain::ids::{Incarnation, NodeId, ServiceId};
use crate::domain::plan::OnPartition;
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
    granted: BTreeSet<(NodeId, Incarnation)>,
}

/// A decrease that some node may not obey yet.
#[derive(Debug, Clone)]
struct Enforcing {
    slot: Slot,
    chosen: Mono,
    /// Longest lease that a node without it may still hold, in milliseconds; none where canary traffic needs no lease.
    lease_ms: Option<u64>,
    /// True when people are told once it is enforced: this node saw it being decided.
    is_news: bool,
}

/// A read that waits for a majority's word, then for this node to catch up with it.
#[derive(Debug, Clone)]
struct Read {
    /// The heartbeat that asks for it, sent after it came; none while it waits for the round before to end.
    nonce: Option<u64>,
    deadline: Mono,
    answered: BTreeSet<(NodeId, Incarnation)>,
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
    /// The shortest lease in use, in milliseconds, as of this last decided slot.
    shown_ms: Option<(Slot, u64)>,
    enforcing: BTreeMap<ServiceId, Enforcing>,
    /// When a member was removed last, or this node may have missed that. It may still hold a lease, and nobody hears of it.
    removed: Mono,
    reads: BTreeMap<RequestId, Read>,
    /// The heartbeat that was sent for reads last, and when.
    round: Option<(u64, Mono)>,
}

impl Lease {
    /// Returns no lease, with heartbeats numbered from `nonce`.
    pub fn starting_at(nonce: u64, now: Mono) -> Self {
        Self { nonce, removed: now, ..Self::default() }
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

/// Returns true when these are a majority of the members, in the incarnations that count.
fn is_quorum(ctx: &Context, nodes: &BTreeSet<(NodeId, Incarnation)>) -> bool {
    let counting = nodes.iter().filter(|(node, incarnation)| ctx.counts(node, *incarnation));
    counting.count() >= ctx.ledger.members.quorum()
}

/// How long an unanswered heartbeat is remembered.
const BEAT_MS: u64 = 5_000;
/// How long reads wait for a round that is under way, in milliseconds, before a round of their own begins.
const ROUND_MS: u64 = 100;
/// Longest wait of a linearizable read.
const READ_MS: u64 = 1_500;
/// A clock shows between 99 and 101 seconds in 100.
const RATES: (u64, u64) = (99, 101);

/// Returns how long this node waits, by the fastest clock, until a lease of `lease_ms` has ended by the slowest one.
fn longest_ms(lease_ms: u64) -> u64 {
    lease_ms.saturating_mul(RATES.1) / RATES.0 + 1
}

impl Lease {
    /// Beats when it is time, and tells of a lease that began or ended.
    pub fn tick(&mut self, ctx: &mut Context) {
        if ctx.now.mono >= self.next_beat {
            self.beat(ctx);
        }
        let shown_ms = self.lease_shown_ms(ctx);
        let held = self.ms_left(ctx.now.mono, shown_ms) > 0;
        if held != self.held {
            self.held = held;
            ctx.announce(Event::Lease { held });
            ctx.outdated.all = true;
        }
        self.tick_enforcing(ctx);
    }

    /// The shortest lease in use; 2 s where no rollout names one.
    fn lease_shown_ms(&mut self, ctx: &Context) -> u64 {
        match self.shown_ms {
            Some((head, ms)) if head == ctx.ledger.head => ms,
            _ => {
                let services = ctx.ledger.services.values().filter(|service_state| service_state.service.needs_lease());
                let shortest = services.map(|service_state| service_state.service.rollout.spec.lease_ms).min();
                self.shown_ms.insert((ctx.ledger.head, shortest.unwrap_or(2_000))).1
            }
        }
    }

    /// Sends every peer a heartbeat that asks for an answer.
    pub fn beat(&mut self, ctx: &mut Context) -> u64 {
        self.nonce += 1;
        let nonce = self.nonce;
        let now = ctx.now.mono;
        self.next_beat = now.after_ms(ctx.settings.timings.heartbeat_ms);
        self.beats.retain(|_, beat| now.millis_since(beat.sent) < BEAT_MS);
        self.beats.insert(nonce, Beat { sent: now, granted: BTreeSet::new() });
        for peer in ctx.peers.keys().cloned().collect::<Vec<_>>() {
            let heartbeat = ctx.heartbeat(&peer, Some(nonce), None);
            ctx.send(&peer, Message::Heartbeat(heartbeat));
        }
        let own = (ctx.settings.node.clone(), ctx.acceptor.incarnation);
        if ctx.membership() == Membership::Voter && Self::grants_lease(ctx, ctx.ledger.head) {
            self.on_granted(ctx, own, nonce);
        }
        nonce
    }

    /// Returns true when a node at `head` knows every decrease that this one knows or has accepted, and every change of the
    /// membership that this one knows.
    fn grants_lease(ctx: &Context, head: Slot) -> bool {
        let accepted = Ledger::decrease_in(ctx.acceptor.accepted.as_ref()).unwrap_or(Slot(0));
        ctx.ledger.last_decrease.max(accepted).max(ctx.last_config) <= head
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
            self.note_read(ctx, from, incarnation, &heartbeat, acknowledgement.nonce);
            if acknowledgement.granted && heartbeat.head >= ctx.last_config {
                self.on_granted(ctx, (from.clone(), incarnation), acknowledgement.nonce);
            }
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

    fn on_granted(&mut self, ctx: &mut Context, from: (NodeId, Incarnation), nonce: u64) {
        let Some(beat) = self.beats.get_mut(&nonce) else { return };
        beat.granted.insert(from);
        let sent = beat.sent;
        if is_quorum(ctx, &beat.granted) && self.from < Some(sent) && ctx.membership() == Membership::Voter {
            self.from = Some(sent);
            ctx.put(Output::Lease(Some(sent)));
        }
    }

    // Enforcement of decreases.

    /// Begins to watch until the last decrease of a service is in force everywhere.
    pub fn enforce(&mut self, ctx: &Context, id: &ServiceId, is_news: bool) {
        let service_state = &ctx.ledger.services[id];
        let spec = &service_state.service.rollout.spec;
        let lease_ms = (spec.on_partition == OnPartition::Stable).then_some(spec.lease_ms);
        let (slot, chosen) = (service_state.slot, ctx.now.mono);
        self.enforcing.insert(id.clone(), Enforcing { slot, chosen, lease_ms, is_news });
    }

    /// Watches the last decrease of each service again: what this node knew of their enforcement is gone, or it wasn't there.
    pub fn enforce_again(&mut self, ctx: &Context) {
        self.removed = ctx.now.mono;
        for (id, service_state) in &ctx.ledger.services {
            let known = self.enforcing.get(id).is_some_and(|known| known.slot == service_state.slot);
            if service_state.increase.is_none() && !known {
                self.enforce(ctx, id, false);
            }
        }
    }

    /// Notes that a member was removed.
    pub fn note_removed(&mut self, now: Mono) {
        self.removed = now;
    }

    fn tick_enforcing(&mut self, ctx: &mut Context) {
        if self.enforcing.is_empty() {
            return;
        }
        let (now, removed) = (ctx.now.mono, self.removed);
        let lowest = ctx.ledger.members.0.keys().map(|node| match *node == ctx.settings.node {
            true => Some(ctx.ledger.head),
            false => ctx.peers.get(node).and_then(|peer| peer.head),
        });
        let everybody = lowest.min().flatten();
        let done: Vec<_> = (self.enforcing.iter())
            .filter(|(_, e)| {
                let is_over = |since: Mono| e.lease_ms.is_some_and(|ms| now.millis_since(since) >= longest_ms(ms));
                let obeyed = everybody >= Some(e.slot) && (is_over(removed) || e.lease_ms.is_none());
                obeyed || is_over(e.chosen)
            })
            .map(|(service, e)| (service.clone(), e.slot, now.millis_since(e.chosen), e.is_news))
            .collect();
        for (service, slot, took_ms, is_news) in done {
            self.enforcing.remove(&service);
            ctx.outdated.services.insert(service.clone());
            if is_news && ctx.is_coordinator() {
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
        let (deadline, through) = (ctx.now.mono.after_ms(READ_MS), ctx.ledger.head);
        self.reads.insert(request, Read { nonce: None, deadline, answered: BTreeSet::new(), through });
        self.begin_round(ctx);
        self.answer_reads(ctx);
    }

    /// Asks for all reads that wait with one heartbeat, unless the one before may still be answered: so that many reads cost as
    /// little as one.
    fn begin_round(&mut self, ctx: &mut Context) {
        let now = ctx.now.mono;
        let is_open = |nonce| self.reads.values().any(|read| read.nonce == Some(nonce));
        if self.round.is_some_and(|(nonce, sent)| now.millis_since(sent) < ROUND_MS && is_open(nonce))
            || self.reads.values().all(|read| read.nonce.is_some())
        {
            return;
        }
        let nonce = self.beat(ctx);
        self.round = Some((nonce, now));
        let own_open = ctx.acceptor.accepted.is_some();
        let through = if own_open { ctx.ledger.head.next() } else { ctx.ledger.head };
        let own = (ctx.settings.node.clone(), ctx.acceptor.incarnation);
        for read in self.reads.values_mut().filter(|read| read.nonce.is_none()) {
            (read.nonce, read.through) = (Some(nonce), through);
            read.answered.insert(own.clone());
        }
    }

    fn note_read(
        &mut self,
        ctx: &mut Context,
        from: &NodeId,
        incarnation: Incarnation,
        heartbeat: &Heartbeat,
        nonce: u64,
    ) {
        let through = if heartbeat.open.is_some() { heartbeat.head.next() } else { heartbeat.head };
        for read in self.reads.values_mut().filter(|read| read.nonce == Some(nonce)) {
            read.answered.insert((from.clone(), incarnation));
            read.through = read.through.max(through);
        }
        self.tick_reads(ctx);
    }

    /// Answers the reads that a majority confirmed, and those that took too long; then asks for those that came meanwhile.
    pub fn tick_reads(&mut self, ctx: &mut Context) {
        self.answer_reads(ctx);
        self.begin_round(ctx);
    }

    fn answer_reads(&mut self, ctx: &mut Context) {
        let (now, head, needed) = (ctx.now.mono, ctx.ledger.head, ctx.ledger.members.quorum());
        let mut answers = Vec::new();
        self.reads.retain(|request, read| {
            let outcome = if is_quorum(ctx, &read.answered) && head >= read.through {
                Outcome::Current(head)
            } else if now >= read.deadline {
                Outcome::NoQuorum { reached: read.answered.iter().map(|(node, _)| node.clone()).collect(), needed }
            } else {
                return true;
            };
            answers.push(Output::Reply(*request, outcome));
            false
        });
        answers.into_iter().for_each(|answer| ctx.put(answer));
    }
}
