//! Acceptor side of a commit: vote, accept, remember what is open.
//!
//! Every promise made in a message is persisted before the message (see the contract in [`crate::protocol`]).

use crate::domain::ids::{Incarnation, NodeId};
use crate::domain::routing::{RoutingState, Status};
use crate::domain::time::Mono;

use super::context::Context;
use super::event::Event;
use super::log::ledger::RecordError;
use super::log::record::{Accepted, Ballot, Intent, Record, Slot};
use super::message::{Answer, GateVote, Membership, Prepare, Refusal};

/// The vote given last, to repeat it.
#[derive(Debug, Clone)]
struct LastVote {
    ballot: Ballot,
    slot: Slot,
    gate: GateVote,
}

/// What was voted on in the open slot, until it is settled.
#[derive(Debug, Clone)]
struct Prepared {
    slot: Slot,
    ballot: Ballot,
    intent: Intent,
    at: Mono,
}

/// What this process knows of the open slot beside its acceptor state, and need not remember.
#[derive(Debug, Clone)]
pub(super) struct Acceptor {
    /// The vote given in the open slot, to repeat it.
    last_vote: Option<LastVote>,
    /// The intent voted on in the open slot.
    prepared: Option<Prepared>,
    /// When the accepted record was accepted.
    accepted_at: Mono,
}

/// What is to follow an acceptance.
#[must_use]
pub(super) enum AfterAccept {
    /// The record was accepted before: there is nothing to do.
    Nothing,
    /// The acceptor state must be durable before the answer leaves.
    Persist,
    /// A decrease is obeyed from here on, or one isn't any more: publish, then make it durable.
    PublishAndPersist,
}

/// How long an open slot of a live coordinator is not touched.
const OPEN_PATIENCE_MS: u64 = 1_500;

impl Acceptor {
    pub fn new(now: Mono) -> Self {
        Self { last_vote: None, prepared: None, accepted_at: now }
    }

    /// Returns why a PREPARE gets no vote; none when it gets one.
    pub fn refuse_prepare(
        &self,
        ctx: &mut Context,
        from: &NodeId,
        incarnation: Incarnation,
        prepare: &Prepare,
    ) -> Option<Refusal> {
        if let Some(refusal) = refuse_sender(ctx, from, incarnation, &prepare.ballot, prepare.slot) {
            return Some(refusal);
        }
        if prepare.base_hash != ctx.ledger.head_hash {
            return Some(ctx.reject(from, format!("slot {} follows another history", prepare.slot)));
        }
        if ctx.ledger.settled.contains_key(&prepare.intent.key()) {
            return Some(Refusal::Decided);
        }
        ctx.promised().filter(|promised| **promised > prepare.ballot).cloned().map(Refusal::Stale)
    }

    /// Returns the vote given to the same ballot in the same slot before: it is the same one, as long as the process lives.
    /// After a restart the gate is asked again: it knows less by then, and never says Yes on old evidence.
    pub fn repeated_vote(&self, ctx: &Context, prepare: &Prepare) -> Option<Answer> {
        let vote = self.last_vote.as_ref().filter(|vote| vote.ballot == prepare.ballot && vote.slot == prepare.slot)?;
        Some(Answer::Gate { accepted: ctx.acceptor.accepted.clone().map(Box::new), gate: vote.gate.clone() })
    }

    /// Promises a peer's ballot and returns the vote.
    pub fn vote(&mut self, ctx: &mut Context, prepare: &Prepare, gate: GateVote) -> Answer {
        let accepted = ctx.acceptor.accepted.clone().map(Box::new);
        promise(ctx, &prepare.ballot);
        self.last_vote = Some(LastVote { ballot: prepare.ballot.clone(), slot: prepare.slot, gate: gate.clone() });
        self.note_prepared(ctx, prepare, &gate);
        Answer::Gate { accepted, gate }
    }

    /// Promises this node's own ballot; returns what it accepted in the open slot before.
    pub fn vote_own(&mut self, ctx: &mut Context, prepare: &Prepare, gate: &GateVote) -> Option<Accepted> {
        promise(ctx, &prepare.ballot);
        self.note_prepared(ctx, prepare, gate);
        ctx.acceptor.accepted.clone()
    }

    /// Remembers, and tells people, what this node voted on.
    fn note_prepared(&mut self, ctx: &mut Context, prepare: &Prepare, gate: &GateVote) {
        if prepare.recovery {
            return;
        }
        let Prepare { slot, ballot, intent, .. } = prepare;
        let at = ctx.now.mono;
        self.prepared = Some(Prepared { slot: *slot, ballot: ballot.clone(), intent: intent.clone(), at });
        ctx.announce(Event::voted(prepare, gate));
        let Ok(record) = ctx.ledger.next_record(intent.clone(), None) else { return };
        let Some(state) = record.state else { return };
        let state = RoutingState { status: Status::Prepared, ..state };
        ctx.announce(Event::Routing {
            slot: *slot,
            kind: intent.operation.kind(),
            refused: None,
            initiator: intent.initiator,
            actor: intent.actor.clone(),
            state,
            phase: record.phase,
            reasons: Vec::new(),
            decided_at: None,
            took_ms: None,
            coordinator: None,
        });
    }

    /// Returns why a proposal isn't accepted; none when it may be.
    pub fn refuse_proposal(
        &self,
        ctx: &mut Context,
        from: &NodeId,
        incarnation: Incarnation,
        ballot: &Ballot,
        record: &Record,
    ) -> Option<Refusal> {
        if let Some(refusal) = refuse_sender(ctx, from, incarnation, ballot, record.slot) {
            return Some(refusal);
        }
        if let Some(promised) = ctx.promised().filter(|promised| *promised > ballot) {
            return Some(Refusal::Stale(promised.clone()));
        }
        if record.certificate.as_ref().is_some_and(|certificate| certificate.ballot > *ballot) {
            return Some(ctx.reject(from, format!("ballot {ballot} carries a later certificate")));
        }
        match ctx.ledger.check_proposal(record) {
            Ok(()) => None,
            Err(RecordError::Settled { .. }) => Some(Refusal::Decided),
            Err(error) => Some(ctx.reject(from, error.to_string())),
        }
    }

    /// Accepts a record; it is durable once what follows is done. What lowers exposure is obeyed from here on.
    pub fn accept(&mut self, ctx: &mut Context, ballot: Ballot, record: Record) -> AfterAccept {
        assert!(ctx.promised().is_none_or(|promised| *promised <= ballot), "I6: a promise is kept");
        let accepted = ctx.acceptor.accepted.as_ref();
        if accepted.is_some_and(|a| a.ballot == ballot && a.record.slot == record.slot) {
            return AfterAccept::Nothing;
        }
        // What is served changes with a decrease alone: with this one, or with one that this record takes the place of.
        let replaced = ctx.acceptor.accepted.take().map(|accepted| accepted.record.intent.operation);
        let operations = replaced.iter().chain([&record.intent.operation]);
        let decreases: Vec<_> = operations.filter(|operation| operation.decreases_exposure()).collect();
        let after = if decreases.is_empty() { AfterAccept::Persist } else { AfterAccept::PublishAndPersist };
        decreases.into_iter().for_each(|operation| ctx.outdate(operation));
        ctx.acceptor.promised = Some(ballot.clone());
        ctx.acceptor.accepted = Some(Accepted { ballot, record });
        self.accepted_at = ctx.now.mono;
        after
    }

    /// Forgets what was voted on in slots that are decided.
    pub fn settle(&mut self, decided: Slot) {
        self.prepared = self.prepared.take().filter(|prepared| prepared.slot > decided);
        self.last_vote = None;
    }

    /// Returns true while something is voted on or accepted, and not known to be decided.
    pub fn is_open(&self, ctx: &Context) -> bool {
        ctx.acceptor.accepted.is_some() || self.prepared.is_some()
    }

    /// Returns the open slot's intent, as far as this node knows it, when it is time to settle it: its coordinator is lost,
    /// or took too long. This node coordinates nothing itself when it asks.
    pub fn overdue(&self, ctx: &Context) -> Option<Option<Intent>> {
        let overdue = |ballot: &Ballot, since: Mono| {
            let own = ballot.node == ctx.settings.node;
            let lost = own || !ctx.is_alive(&ballot.node);
            lost || ctx.now.mono.millis_since(since) >= OPEN_PATIENCE_MS
        };
        if let Some(accepted) = &ctx.acceptor.accepted {
            return overdue(&accepted.ballot, self.accepted_at).then(|| Some(accepted.record.intent.clone()));
        }
        if let Some(prepared) = &self.prepared
            && overdue(&prepared.ballot, prepared.at)
        {
            return Some(Some(prepared.intent.clone()));
        }
        let mut open = ctx.peers.values().filter_map(|peer| peer.open.as_ref());
        open.any(|(ballot, _, since)| overdue(ballot, *since)).then_some(None)
    }
}

/// What PREPARE and a proposal are both refused for.
fn refuse_sender(
    ctx: &mut Context,
    from: &NodeId,
    incarnation: Incarnation,
    ballot: &Ballot,
    slot: Slot,
) -> Option<Refusal> {
    if ballot.node != *from || ballot.incarnation != incarnation {
        return Some(ctx.reject(from, format!("ballot {ballot} is not the sender's")));
    }
    if slot <= ctx.ledger.head {
        ctx.send_log(from, slot);
        return Some(Refusal::Behind);
    }
    if slot > ctx.ledger.head.next() {
        return Some(Refusal::Ahead);
    }
    if !ctx.counts(from, incarnation) || ctx.membership() != Membership::Voter {
        return Some(Refusal::NotVoter);
    }
    None
}

/// Promises a ballot, durably: no lower one gets a vote in any slot. Writes nothing when that was promised before.
fn promise(ctx: &mut Context, ballot: &Ballot) {
    assert!(ctx.promised().is_none_or(|promised| promised <= ballot), "I6: a promise is kept");
    if ctx.promised() != Some(ballot) {
        ctx.acceptor.promised = Some(ballot.clone());
        ctx.persist();
    }
}
