//! Coordinator side of a commit: one ballot at a time, from PREPARE to the answer.
//!
//! Any node may run a ballot. The preferred coordinator only keeps them from duelling; a duel costs time, never safety.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use crate::domain::ids::{Incarnation, NodeId, ServiceId, TxId};
use crate::domain::text::bounded;
use crate::domain::time::Mono;

use super::context::Context;
use super::log::codec;
use super::log::record::{
    Accepted, Ballot, Certificate, Chosen, Initiator, Intent, Operation, Record, Slot, TransactionKey,
};
use super::message::{Answer, Decision, GateVote, Membership, Message, Prepare, Refusal, Vote};
use super::proposal::{Obstacle, Proposal};
use super::{Command, OperatorRequest, Outcome, Output, RequestId};

/// A proposal that waits for its slot.
#[derive(Debug, Clone)]
struct Pending {
    /// Who made up its id, and the id.
    key: TransactionKey,
    actor: String,
    digest: u64,
    proposal: Proposal,
    /// Who waits for the answer.
    requests: Vec<RequestId>,
    /// Moment at which the request came.
    since: Mono,
}

/// A ballot of this node's.
#[derive(Debug, Clone)]
struct BallotAttempt {
    pending: Pending,
    ballot: Ballot,
    slot: Slot,
    intent: Intent,
    began: Mono,
    resend: Mono,
    /// A decrease waits behind it: don't wait for the last votes.
    hurry: bool,
    stage: BallotStage,
}

#[derive(Debug, Clone)]
enum BallotStage {
    Preparing { votes: BTreeMap<NodeId, (Option<Accepted>, GateVote)>, refused: BTreeMap<NodeId, String> },
    Proposing { record: Box<Record>, accepts: BTreeSet<NodeId> },
}

/// What this node coordinates: requests that wait, and the attempt at a slot.
#[derive(Debug, Clone, Default)]
pub(super) struct Coordinator {
    queue: VecDeque<Pending>,
    attempt: Option<BallotAttempt>,
    /// The ballot of the last attempt and its slot. It serves for later slots until a higher one is promised.
    standing: Option<(Ballot, Slot)>,
    /// No ballot before this, after a duel.
    not_before: Mono,
    /// Highest round of a ballot seen anywhere; the next ballot is above it.
    round: u64,
    /// Transactions made up by this process.
    made_up: u64,
    /// Answers to clients that no record holds.
    unrecorded: Unrecorded,
}

/// What clients were told without a record: that there was nothing to do, or that it isn't possible. The same key gets the same
/// answer at this node, with the state of then, though it would be possible by now.
#[derive(Debug, Clone, Default)]
struct Unrecorded {
    /// Fingerprint of the request, and its answer.
    of: BTreeMap<TransactionKey, (u64, Outcome)>,
    /// The same transactions, oldest first.
    order: VecDeque<TransactionKey>,
}

/// Answers without a record that are kept.
const UNRECORDED_MAX: usize = 1_024;

impl Unrecorded {
    fn put(&mut self, key: &TransactionKey, digest: u64, outcome: &Outcome) {
        if self.of.insert(key.clone(), (digest, outcome.clone())).is_none() {
            self.order.push_back(key.clone());
        }
        if self.order.len() > UNRECORDED_MAX
            && let Some(oldest) = self.order.pop_front()
        {
            self.of.remove(&oldest);
        }
    }
}

/// What is to follow a step of the coordinator.
#[must_use]
pub(super) enum Next {
    /// This node votes on its own PREPARE.
    Vote(Prepare),
    /// This node accepts its own proposal.
    Accept(Ballot, Box<Record>),
    /// A majority accepted the record: it is chosen.
    Learn(Box<Chosen>),
}

impl Coordinator {
    /// Returns true when nothing is being decided or waiting here.
    pub fn is_free(&self) -> bool {
        self.attempt.is_none() && self.queue.is_empty()
    }

    /// Returns true when a change of this service of the given kind is under way or waiting here.
    pub fn has(&self, service: &ServiceId, decrease: bool) -> bool {
        let open = self.attempt.as_ref().map(|attempt| &attempt.pending);
        open.into_iter()
            .chain(&self.queue)
            .any(|pending| pending.proposal.concerns(service) && pending.proposal.decreases() == decrease)
    }
}

/// Requests that may wait at once. What decreases exposure is never turned away for load: those who wait for its answer are its
/// bound.
const QUEUE_MAX: usize = 64;

/// Returns true when a proposal decreases exposure, by what it is or by what it comes to as things stand.
fn decreases(ctx: &Context, proposal: &Proposal) -> bool {
    let is_file = matches!(proposal, Proposal::OperatorRequest(OperatorRequest::Apply(_)));
    proposal.decreases() || is_file && proposal.operation(ctx).is_ok_and(|operation| operation.decreases_exposure())
}

impl Coordinator {
    /// Takes in an operator's request; `no_vote` says why this node's vote doesn't count, where it doesn't.
    pub fn on_command(&mut self, ctx: &mut Context, command: Command, no_vote: Option<String>) -> Option<Next> {
        let Command { request, tx, actor, asked } = command;
        let key = (Initiator::Client, tx);
        let digest = xxhash_rust::xxh3::xxh3_64(&codec::encode(&asked));
        let open = self.attempt.as_mut().map(|attempt| &mut attempt.pending);
        if let Some(pending) = open.into_iter().chain(&mut self.queue).find(|pending| pending.key == key) {
            if pending.digest == digest {
                pending.requests.push(request);
                return None;
            }
            let outcome = Outcome::KeyReused { slot: ctx.ledger.head.next() };
            ctx.put(Output::Reply(request, outcome));
            return None;
        }
        let proposal = Proposal::OperatorRequest(asked);
        let outcome = if ctx.ledger.settled.contains_key(&key) {
            settled_outcome(ctx, &key, digest)
        } else if let Some((known, outcome)) = self.unrecorded.of.get(&key) {
            let reused = || Outcome::KeyReused { slot: ctx.ledger.head };
            if *known == digest { outcome.clone() } else { reused() }
        } else if ctx.membership() == Membership::Learner {
            Outcome::Refused(format!("this node has no vote: {}", no_vote.unwrap_or_else(|| "it is no member".into())))
        } else if self.queue.len() >= QUEUE_MAX && !decreases(ctx, &proposal) {
            Outcome::Busy
        } else {
            let requests = vec![request];
            let (actor, since) = (bounded(actor), ctx.now.mono);
            let pending = Pending { key, actor, digest, proposal, requests, since };
            return self.enqueue(ctx, pending);
        };
        ctx.put(Output::Reply(request, outcome));
        None
    }

    /// Queues a proposal of this node's own, with a transaction id that nobody else makes up.
    pub fn submit_own(&mut self, ctx: &mut Context, proposal: Proposal) -> Option<Next> {
        let pending = self.own(ctx, proposal);
        self.enqueue(ctx, pending)
    }

    fn own(&mut self, ctx: &Context, proposal: Proposal) -> Pending {
        self.made_up += 1;
        let (node, boot) = (&ctx.settings.node, ctx.acceptor.boot);
        let incarnation = ctx.acceptor.incarnation.0 & 0xffff;
        let tx = TxId::new(format!("auto-{node}-{incarnation:04x}-{boot}-{}", self.made_up));
        let tx = tx.expect("a made-up id is made of id characters");
        let (key, actor, since) = ((Initiator::Node, tx), node.to_string(), ctx.now.mono);
        Pending { key, actor, digest: 0, proposal, requests: Vec::new(), since }
    }

    /// A decrease goes first, after those that came before it, and hurries what is being decided.
    fn enqueue(&mut self, ctx: &mut Context, pending: Pending) -> Option<Next> {
        if decreases(ctx, &pending.proposal) {
            if let Some(attempt) = &mut self.attempt {
                attempt.hurry = true;
            }
            let place = self.queue.iter().position(|other| !other.proposal.decreases()).unwrap_or(self.queue.len());
            self.queue.insert(place, pending);
            return self.try_propose(ctx);
        }
        self.queue.push_back(pending);
        None
    }

    /// Begins the next ballot when none is under way.
    pub fn begin_next(&mut self, ctx: &mut Context) -> Option<Next> {
        while self.attempt.is_none() && ctx.now.mono >= self.not_before && ctx.membership() == Membership::Voter {
            let pending = self.queue.pop_front()?;
            if let Some(prepare) = self.begin(ctx, pending) {
                return Some(Next::Vote(prepare));
            }
        }
        None
    }

    fn begin(&mut self, ctx: &mut Context, pending: Pending) -> Option<Prepare> {
        if ctx.ledger.settled.contains_key(&pending.key) {
            let outcome = settled_outcome(ctx, &pending.key, pending.digest);
            reply(ctx, &pending, &outcome);
            return None;
        }
        if let Some(first) = pending.proposal.needs_first(ctx) {
            return self.begin_with(ctx, first, pending);
        }
        let operation = match pending.proposal.operation(ctx) {
            Ok(operation) => operation,
            Err(obstacle) => {
                let outcome = match (obstacle, pending.proposal.service().and_then(|id| ctx.ledger.services.get(id))) {
                    (Obstacle::Unchanged { reason, rolled_back }, Some(service_state)) => {
                        let state = service_state.service.routing.clone();
                        Outcome::Unchanged { state, reason, rolled_back }
                    }
                    (Obstacle::Unchanged { .. }, None) => Outcome::Refused("nothing to do".into()),
                    (Obstacle::Refused(why), _) => Outcome::Refused(why),
                    (Obstacle::NotReady(feature, waits_for), _) => Outcome::NotReady { feature, waits_for },
                };
                self.reply_unrecorded(ctx, &pending, &outcome);
                return None;
            }
        };
        let intent = match &pending.proposal {
            Proposal::Settle(Some(intent)) if !ctx.ledger.settled.contains_key(&intent.key()) => intent.clone(),
            _ => {
                let (initiator, tx) = pending.key.clone();
                let actor = pending.actor.clone();
                Intent { initiator, tx, actor, digest: pending.digest, at: ctx.now.wall, operation }
            }
        };
        if let Err(error) = ctx.ledger.next_record(intent.clone(), None) {
            self.reply_unrecorded(ctx, &pending, &Outcome::Refused(error.to_string()));
            return None;
        }
        let slot = ctx.ledger.head.next();
        let ballot = self.ballot_for(ctx, slot, matches!(pending.proposal, Proposal::Settle(_)));
        let now = ctx.now.mono;
        let hurry = self.queue.front().is_some_and(|next| next.proposal.decreases());
        let stage = BallotStage::Preparing { votes: BTreeMap::new(), refused: BTreeMap::new() };
        let resend = now.after_ms(ctx.settings.timings.resend_ms);
        let attempt = BallotAttempt { pending, ballot, slot, intent, began: now, resend, hurry, stage };
        let prepare = prepare_of(ctx, &attempt);
        self.attempt = Some(attempt);
        // Its own promise need not be durable before it asks for others': `boot` makes the ballot unique.
        ctx.broadcast(Message::Prepare(prepare.clone()));
        Some(prepare)
    }

    /// Answers that nothing was decided, and remembers that for the client's key.
    fn reply_unrecorded(&mut self, ctx: &mut Context, pending: &Pending, outcome: &Outcome) {
        if pending.key.0 == Initiator::Client {
            self.unrecorded.put(&pending.key, pending.digest, outcome);
        }
        reply(ctx, pending, outcome);
    }

    /// Begins with what has to be decided before a proposal, which waits as the next one.
    fn begin_with(&mut self, ctx: &mut Context, first: Operation, pending: Pending) -> Option<Prepare> {
        if let Some(feature) = first.needs() {
            let waits_for = ctx.lacking(feature);
            if !waits_for.is_empty() {
                reply(ctx, &pending, &Outcome::NotReady { feature, waits_for });
                return None;
            }
        }
        self.queue.push_front(pending);
        let first = self.own(ctx, Proposal::Operation(first));
        self.begin(ctx, first)
    }

    /// Returns the ballot for an attempt at `slot`. The one before it serves again where it asked nothing in this slot
    /// and this node promised no higher one since: who promised it has promised it for every later slot, and need not
    /// write that again. An open slot is settled with a higher one, which makes what it completes in doubt.
    fn ballot_for(&mut self, ctx: &Context, slot: Slot, settling: bool) -> Ballot {
        let standing = self.standing.take().filter(|(ballot, asked)| {
            !settling && *asked < slot && ctx.promised() == Some(ballot) && ballot.round >= self.round
        });
        let ballot = standing.map(|(ballot, _)| ballot).unwrap_or_else(|| {
            let promised = ctx.promised().map_or(0, |ballot| ballot.round);
            self.round = self.round.max(promised) + 1;
            Ballot {
                round: self.round,
                node: ctx.settings.node.clone(),
                incarnation: ctx.acceptor.incarnation,
                boot: ctx.acceptor.boot,
            }
        });
        self.standing = Some((ballot.clone(), slot));
        ballot
    }

    /// Counts this node's own vote, with what it accepted in the open slot before.
    pub fn on_own_vote(&mut self, ctx: &mut Context, accepted: Option<Accepted>, gate: GateVote) -> Option<Next> {
        if let Some(BallotAttempt { stage: BallotStage::Preparing { votes, .. }, .. }) = &mut self.attempt {
            votes.insert(ctx.settings.node.clone(), (accepted, gate));
        }
        self.try_propose(ctx)
    }

    /// Takes in a peer's answer to a PREPARE or a proposal.
    pub fn on_vote(&mut self, ctx: &mut Context, from: &NodeId, incarnation: Incarnation, vote: Vote) -> Option<Next> {
        if let Answer::Refuse(Refusal::Stale(ballot)) = &vote.answer {
            self.round = self.round.max(ballot.round);
        }
        let counts = ctx.counts(from, incarnation);
        let attempt = self.attempt.as_mut().filter(|a| a.ballot == vote.ballot && a.slot == vote.slot)?;
        match (vote.answer, &mut attempt.stage) {
            (Answer::Gate { accepted, gate }, BallotStage::Preparing { votes, refused }) if counts => {
                refused.remove(from);
                votes.entry(from.clone()).or_insert((accepted.map(|a| *a), gate));
                self.try_propose(ctx)
            }
            (Answer::Accept, BallotStage::Proposing { accepts, .. }) if counts => {
                accepts.insert(from.clone());
                self.try_choose(ctx)
            }
            (Answer::Gate { .. } | Answer::Accept, _) => None,
            (Answer::Refuse(refusal), _) => self.on_refusal(ctx, from, refusal, vote.head),
        }
    }

    fn on_refusal(&mut self, ctx: &mut Context, from: &NodeId, refusal: Refusal, head: Slot) -> Option<Next> {
        match refusal {
            Refusal::Stale(_) => self.step_back(ctx, BACK_OFF_MS),
            // The log, or the record, is on its way.
            Refusal::Behind | Refusal::Decided => self.step_back(ctx, CATCH_UP_MS),
            Refusal::Ahead => ctx.send_log(from, head.next()),
            Refusal::NotVoter => return self.note_refused(ctx, from, "it has no vote".into()),
            Refusal::BadProposal(why) => {
                return self.note_refused(ctx, from, format!("it refused the proposal: {why}"));
            }
        }
        None
    }

    fn note_refused(&mut self, ctx: &mut Context, from: &NodeId, why: String) -> Option<Next> {
        let Some(BallotAttempt { stage: BallotStage::Preparing { refused, .. }, .. }) = &mut self.attempt else {
            return None;
        };
        refused.insert(from.clone(), why);
        self.try_propose(ctx)
    }

    /// Gives up the ballot, to try again with a higher one after a random part of `wait_ms`.
    fn step_back(&mut self, ctx: &mut Context, (least, most): (u64, u64)) {
        let Some(attempt) = self.attempt.take() else { return };
        let wait = ctx.draws.between(least, most);
        self.not_before = ctx.now.mono.after_ms(wait);
        if !matches!(attempt.pending.proposal, Proposal::Settle(_)) {
            self.queue.push_front(attempt.pending);
        }
    }

    /// Proposes when the votes allow it: what some vote had accepted; else the intent, or its refusal.
    fn try_propose(&mut self, ctx: &mut Context) -> Option<Next> {
        let quorum = ctx.ledger.members.quorum();
        let attempt = self.attempt.as_ref()?;
        let BallotStage::Preparing { votes, refused } = &attempt.stage else { return None };
        if votes.len() < quorum {
            return None;
        }
        let settling = matches!(attempt.pending.proposal, Proposal::Settle(_));
        let accepted = votes.values().filter_map(|(accepted, _)| accepted.as_ref()).max_by_key(|a| &a.ballot);
        if let Some(accepted) = accepted {
            let record = accepted.record.clone();
            return self.propose(ctx, record);
        }
        let intent = attempt.intent.clone();
        if settling {
            return match &attempt.pending.proposal {
                Proposal::Settle(Some(_)) => match ctx.ledger.next_record(intent.clone(), None) {
                    // A decrease needs nobody's permission, a lost coordinator's neither.
                    Ok(record) if intent.operation.decreases_exposure() => self.propose(ctx, record),
                    _ => self.propose_abort(ctx, intent, vec!["its coordinator was lost".into()]),
                },
                _ => {
                    self.attempt = None;
                    None
                }
            };
        }
        if !intent.operation.increases_exposure() {
            return self.propose_intent(ctx, intent, None);
        }
        let expired = ctx.now.mono.millis_since(attempt.began) >= ctx.settings.timings.vote_ms;
        let mut yes = BTreeMap::new();
        let (mut reasons, mut missing) = (Vec::new(), Vec::new());
        for node in ctx.ledger.members.gate_voters() {
            match (votes.get(node), refused.get(node)) {
                (Some((_, GateVote::Yes(why))), _) => drop(yes.insert(node.clone(), bounded(why.clone()))),
                (Some((_, GateVote::No(why))), _) => reasons.push(format!("{node}: no: {why}")),
                (Some((_, GateVote::Abstain(why))), _) => reasons.push(format!("{node}: abstains: {why}")),
                (None, Some(why)) => reasons.push(format!("{node}: {why}")),
                (None, None) => missing.push(node.clone()),
            }
        }
        if attempt.hurry {
            reasons.push("a rollback goes first".into());
        }
        if expired {
            let ms = ctx.settings.timings.vote_ms;
            reasons.extend(missing.drain(..).map(|node| format!("{node}: no vote within {ms} ms")));
        }
        if !reasons.is_empty() {
            return self.propose_abort(ctx, intent, reasons);
        }
        if !missing.is_empty() {
            return None;
        }
        let ballot = attempt.ballot.clone();
        self.propose_intent(ctx, intent, Some(Certificate { ballot, yes }))
    }

    fn propose_abort(&mut self, ctx: &mut Context, intent: Intent, reasons: Vec<String>) -> Option<Next> {
        let (service, refused) = (intent.operation.service().cloned(), intent.operation.name().into());
        let reasons = reasons.into_iter().map(bounded).collect();
        self.propose_intent(ctx, Intent { operation: Operation::Refused { service, refused, reasons }, ..intent }, None)
    }

    fn propose_intent(&mut self, ctx: &mut Context, intent: Intent, certificate: Option<Certificate>) -> Option<Next> {
        match ctx.ledger.next_record(intent, certificate) {
            Ok(record) => self.propose(ctx, record),
            Err(error) => {
                let attempt = self.attempt.take()?;
                self.reply_unrecorded(ctx, &attempt.pending, &Outcome::Refused(error.to_string()));
                None
            }
        }
    }

    fn propose(&mut self, ctx: &mut Context, record: Record) -> Option<Next> {
        let attempt = self.attempt.as_mut()?;
        assert_eq!(record.slot, attempt.slot, "a ballot is about one slot");
        let ballot = attempt.ballot.clone();
        if ctx.promised() != Some(&ballot) {
            self.step_back(ctx, BACK_OFF_MS);
            return None;
        }
        attempt.began = ctx.now.mono;
        attempt.resend = ctx.now.mono.after_ms(ctx.settings.timings.resend_ms);
        let accepts = BTreeSet::from([ctx.settings.node.clone()]);
        attempt.stage = BallotStage::Proposing { record: Box::new(record.clone()), accepts };
        ctx.broadcast(Message::Decision(Decision::Propose(ballot.clone(), Box::new(record.clone()))));
        Some(Next::Accept(ballot, Box::new(record)))
    }

    /// Returns the proposed record once a majority accepted it, and tells the others.
    pub fn try_choose(&mut self, ctx: &mut Context) -> Option<Next> {
        let attempt = self.attempt.as_ref()?;
        let BallotStage::Proposing { record, accepts } = &attempt.stage else { return None };
        if accepts.len() < ctx.ledger.members.quorum() {
            return None;
        }
        let chosen = Box::new(Chosen {
            ballot: Some(attempt.ballot.clone()),
            decided_at: ctx.now.wall,
            record: (**record).clone(),
        });
        ctx.broadcast(Message::Decision(Decision::Chosen(chosen.clone())));
        Some(Next::Learn(chosen))
    }

    /// Follows up a record that was just added to the ledger: gives up the attempt at its slot, answers who waited for it.
    pub fn settle(&mut self, ctx: &mut Context, record: &Record) {
        self.release(record.slot);
        let Some(at) = self.queue.iter().position(|pending| pending.key == record.intent.key()) else { return };
        let pending = self.queue.remove(at).expect("a position just found");
        // Nobody asked for a verdict, and its outcome is not kept.
        if !pending.requests.is_empty() {
            let outcome = settled_outcome(ctx, &pending.key, pending.digest).first_time();
            reply(ctx, &pending, &outcome);
        }
    }

    /// Gives up the attempt at a slot that is decided; its proposal waits for the next one.
    pub fn release(&mut self, decided: Slot) {
        if self.attempt.as_ref().is_some_and(|attempt| attempt.slot <= decided) {
            let attempt = self.attempt.take().expect("an attempt just seen");
            if !matches!(attempt.pending.proposal, Proposal::Settle(_)) {
                self.queue.push_front(attempt.pending);
            }
        }
    }

    /// Decides without the votes that didn't come in time.
    pub fn close_votes(&mut self, ctx: &mut Context) -> Option<Next> {
        let attempt = self.attempt.as_ref()?;
        let is_late = ctx.now.mono.millis_since(attempt.began) >= ctx.settings.timings.vote_ms;
        if !is_late || !matches!(attempt.stage, BallotStage::Preparing { .. }) {
            return None;
        }
        self.try_propose(ctx)
    }

    /// Tells clients what didn't happen in time, and asks again where no answer came. Votes are closed before.
    pub fn tick(&mut self, ctx: &mut Context) {
        let vote_ms = ctx.settings.timings.vote_ms;
        if let Some(attempt) = &self.attempt {
            if ctx.now.mono.millis_since(attempt.began) >= vote_ms {
                match attempt.stage {
                    BallotStage::Preparing { .. } => self.give_up_preparing(ctx),
                    BallotStage::Proposing { .. } => self.doubt(ctx),
                }
            }
            self.resend(ctx);
        }
        self.expire_queue(ctx);
    }

    fn resend(&mut self, ctx: &mut Context) {
        let now = ctx.now.mono;
        let Some(attempt) = self.attempt.as_ref().filter(|attempt| now >= attempt.resend) else { return };
        let (message, done): (_, BTreeSet<_>) = match &attempt.stage {
            BallotStage::Preparing { votes, .. } => {
                (Message::Prepare(prepare_of(ctx, attempt)), votes.keys().cloned().collect())
            }
            BallotStage::Proposing { record, accepts } => {
                let decision = Decision::Propose(attempt.ballot.clone(), record.clone());
                (Message::Decision(decision), accepts.clone())
            }
        };
        ctx.broadcast_but(&message, &done);
        let resend = now.after_ms(ctx.settings.timings.resend_ms);
        if let Some(attempt) = &mut self.attempt {
            attempt.resend = resend;
        }
    }

    /// No majority of votes in time: nothing was proposed, and the client may try again.
    fn give_up_preparing(&mut self, ctx: &mut Context) {
        let Some(BallotAttempt { stage: BallotStage::Preparing { votes, .. }, .. }) = &self.attempt else { return };
        let outcome =
            Outcome::NoQuorum { reached: votes.keys().cloned().collect(), needed: ctx.ledger.members.quorum() };
        let attempt = self.attempt.take().expect("an attempt just seen");
        reply(ctx, &attempt.pending, &outcome);
    }

    /// No majority confirmed in time: clients hear so, and the ballot goes on.
    fn doubt(&mut self, ctx: &mut Context) {
        let Some(attempt) = &mut self.attempt else { return };
        let pending = Pending { requests: std::mem::take(&mut attempt.pending.requests), ..attempt.pending.clone() };
        reply(ctx, &pending, &Outcome::InDoubt);
    }

    fn expire_queue(&mut self, ctx: &mut Context) {
        let (now, limit) = (ctx.now.mono, ctx.settings.timings.vote_ms * 3 / 2);
        let blocked = self.attempt.is_some() || ctx.membership() == Membership::Learner;
        if !blocked {
            return;
        }
        let (late, waiting) = std::mem::take(&mut self.queue)
            .into_iter()
            .partition::<VecDeque<_>, _>(|pending| now.millis_since(pending.since) >= limit);
        self.queue = waiting;
        let reached = ctx.ledger.members.0.keys().filter(|node| ctx.is_live_voter(node)).cloned().collect::<Vec<_>>();
        let needed = ctx.ledger.members.quorum();
        let outcome = if reached.len() < needed { Outcome::NoQuorum { reached, needed } } else { Outcome::Busy };
        late.iter().for_each(|pending| reply(ctx, pending, &outcome));
    }
}

fn prepare_of(ctx: &Context, attempt: &BallotAttempt) -> Prepare {
    Prepare {
        ballot: attempt.ballot.clone(),
        slot: attempt.slot,
        base_hash: ctx.ledger.head_hash,
        intent: attempt.intent.clone(),
        recovery: matches!(attempt.pending.proposal, Proposal::Settle(_)),
        evidence_age_ms_max: ctx.settings.timings.evidence_age_ms_max,
    }
}

fn reply(ctx: &mut Context, pending: &Pending, outcome: &Outcome) {
    pending.requests.iter().for_each(|request| ctx.put(Output::Reply(*request, outcome.clone())));
}

fn settled_outcome(ctx: &Context, key: &TransactionKey, digest: u64) -> Outcome {
    let settled = &ctx.ledger.settled[key];
    let slot = settled.slot;
    if settled.digest != digest {
        return Outcome::KeyReused { slot };
    }
    match &settled.refused {
        Some(reasons) => Outcome::Aborted { slot, reasons: reasons.clone(), repeated: true },
        None => {
            let found = ctx.ledger.services.values().find(|service_state| service_state.slot == slot);
            let state = found.map(|service_state| service_state.service.routing.clone());
            let reason = found.map(|service_state| service_state.service.rollout.reason.clone()).unwrap_or_default();
            Outcome::Committed { slot, state, reason, repeated: true }
        }
    }
}

impl Outcome {
    /// Returns the outcome as the request that caused it hears it.
    fn first_time(self) -> Self {
        match self {
            Self::Committed { slot, state, reason, .. } => Self::Committed { slot, state, reason, repeated: false },
            Self::Aborted { slot, reasons, .. } => Self::Aborted { slot, reasons, repeated: false },
            other => other,
        }
    }
}

/// Range of the random wait after a duel.
const BACK_OFF_MS: (u64, u64) = (10, 80);
/// Range of the wait for records that are on their way.
const CATCH_UP_MS: (u64, u64) = (5, 15);
