//! Coordinator side of a commit: one ballot at a time, from PREPARE to the answer.
//!
//! Any node may run a ballot. The preferred coordinator only keeps them from duelling; a duel costs time, never safety.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use crate::domain::ids::{Incarnation, NodeId, ServiceId, TxId};
use crate::domain::plan::RolloutSpec;
use crate::domain::rollout::{Change, ChangeError, Phase};
use crate::domain::text::bounded;
use crate::domain::time::Mono;

use super::core::Core;
use super::message::{Answer, Decision, GateVote, Membership, Message, Prepare, Refusal, Vote};
use super::record::{Accepted, Ballot, Certificate, Chosen, ConfigChange, Intent, Operation, Record, Slot};
use super::{Command, OperatorRequest, Outcome, Output, RequestId, codec};

/// What is asked for: by an operator, or by the node itself.
#[derive(Debug, Clone)]
pub(super) enum Proposal {
    /// An operator's request.
    OperatorRequest(OperatorRequest),
    /// A change that the autopilot or the brake wants.
    Operation(Operation),
    /// Settle what a lost coordinator left open: propose what was accepted; of what was only voted on, do what lowers exposure, and
    /// abort the rest.
    Settle(Option<Intent>),
}

/// A wish that waits for its slot.
#[derive(Debug, Clone)]
pub(super) struct Pending {
    pub tx: TxId,
    pub digest: u64,
    pub proposal: Proposal,
    /// Who waits for the answer.
    pub requests: Vec<RequestId>,
    /// When it came.
    pub since: Mono,
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
    /// A lowering waits behind it: don't wait for the last votes.
    hurry: bool,
    stage: BallotStage,
}

#[derive(Debug, Clone)]
enum BallotStage {
    Preparing { votes: BTreeMap<NodeId, (Option<Accepted>, GateVote)>, refused: BTreeMap<NodeId, String> },
    Proposing { record: Box<Record>, accepts: BTreeSet<NodeId> },
}

/// What this node coordinates.
#[derive(Debug, Clone, Default)]
pub(super) struct CoordinatorState {
    queue: VecDeque<Pending>,
    attempt: Option<BallotAttempt>,
    /// The ballot of the last attempt and its slot. It serves for later slots until a higher one is promised.
    standing: Option<(Ballot, Slot)>,
    /// No ballot before this, after a duel.
    not_before: Mono,
    /// Highest round seen anywhere.
    round: u64,
    /// Transactions made up by this process.
    made_up: u64,
}

impl CoordinatorState {
    /// Returns how long a decided record took since this node proposed it; none when another node did.
    pub fn took_ms(&self, record: &Record, now: Mono) -> Option<u64> {
        let attempt = self.attempt.as_ref()?;
        (attempt.intent.tx == record.intent.tx).then(|| now.millis_since(attempt.pending.since))
    }

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

impl Proposal {
    fn decreases(&self) -> bool {
        match self {
            Self::OperatorRequest(asked) => matches!(
                asked,
                OperatorRequest::Abort { .. }
                    | OperatorRequest::Undo { .. }
                    | OperatorRequest::Config(ConfigChange::Cordon(_) | ConfigChange::Remove(_))
            ),
            Self::Operation(operation) => operation.decreases_exposure(),
            Self::Settle(_) => false,
        }
    }

    fn concerns(&self, service: &ServiceId) -> bool {
        match self {
            Self::OperatorRequest(asked) => asked.service() == Some(service),
            Self::Operation(operation) => operation.service() == Some(service),
            Self::Settle(_) => false,
        }
    }
}

impl OperatorRequest {
    /// Returns the service it concerns.
    pub fn service(&self) -> Option<&ServiceId> {
        match self {
            Self::Apply(spec) => Some(&spec.service),
            Self::Promote { service, .. }
            | Self::Pause { service, .. }
            | Self::Resume { service }
            | Self::Abort { service, .. }
            | Self::Retry { service }
            | Self::Undo { service } => Some(service),
            Self::Config(_) => None,
        }
    }
}

/// Requests that may wait at once.
const QUEUE_MAX: usize = 64;

/// What stands in the way of a wish.
enum Obstacle {
    /// The cluster is there already.
    Unchanged,
    /// It can't be done.
    Refused(String),
}

impl From<ChangeError> for Obstacle {
    fn from(error: ChangeError) -> Self {
        Self::Refused(error.to_string())
    }
}

impl Core {
    pub(super) fn on_command(&mut self, command: Command) {
        let Command { request, tx, asked } = command;
        let digest = xxhash_rust::xxh3::xxh3_64(&codec::encode(&asked));
        let coordination = &mut self.coordination;
        let open = coordination.attempt.as_mut().map(|attempt| &mut attempt.pending);
        if let Some(pending) = open.into_iter().chain(&mut coordination.queue).find(|pending| pending.tx == tx) {
            if pending.digest == digest {
                pending.requests.push(request);
                return;
            }
            let outcome = Outcome::KeyReused { slot: self.ledger.head.next() };
            self.out.push(Output::Reply(request, outcome));
            return;
        }
        let outcome = if self.ledger.settled.contains_key(&tx) {
            self.settled_outcome(&tx, digest)
        } else if self.membership() == Membership::Learner {
            let why = self.view().members.get(&self.settings.node).and_then(|member| member.counts_not.clone());
            Outcome::Refused(format!("this node has no vote: {}", why.unwrap_or_else(|| "it is no member".into())))
        } else if self.coordination.queue.len() >= QUEUE_MAX {
            Outcome::Busy
        } else {
            let requests = vec![request];
            self.enqueue(Pending {
                tx,
                digest,
                proposal: Proposal::OperatorRequest(asked),
                requests,
                since: self.now.mono,
            });
            return;
        };
        self.out.push(Output::Reply(request, outcome));
    }

    /// Queues a wish of this node's own, with a transaction id that nobody else makes up.
    pub(super) fn submit_own(&mut self, proposal: Proposal) {
        self.coordination.made_up += 1;
        let (node, boot) = (&self.settings.node, self.acceptor.boot);
        let incarnation = self.acceptor.incarnation.0 & 0xffff;
        let tx = TxId::new(format!("auto-{node}-{incarnation:04x}-{boot}-{}", self.coordination.made_up));
        let tx = tx.expect("a made-up id is made of id characters");
        self.enqueue(Pending { tx, digest: 0, proposal, requests: Vec::new(), since: self.now.mono });
    }

    /// A lowering goes first, and hurries what is being decided.
    fn enqueue(&mut self, pending: Pending) {
        if pending.proposal.decreases() {
            if let Some(attempt) = &mut self.coordination.attempt {
                attempt.hurry = true;
            }
            self.coordination.queue.push_front(pending);
            self.try_propose();
        } else {
            self.coordination.queue.push_back(pending);
        }
    }

    /// Begins the next ballot when the desk is free.
    pub(super) fn pump(&mut self) {
        while self.coordination.attempt.is_none()
            && self.now.mono >= self.coordination.not_before
            && self.membership() == Membership::Voter
        {
            let Some(pending) = self.coordination.queue.pop_front() else { return };
            self.begin(pending);
        }
    }

    fn begin(&mut self, pending: Pending) {
        if self.ledger.settled.contains_key(&pending.tx) {
            let outcome = self.settled_outcome(&pending.tx, pending.digest);
            self.reply(&pending, &outcome);
            return;
        }
        let operation = match self.operation_for(&pending.proposal) {
            Ok(operation) => operation,
            Err(obstacle) => {
                let outcome = match (obstacle, pending.proposal.service().and_then(|id| self.ledger.services.get(id))) {
                    (Obstacle::Unchanged, Some(service_state)) => {
                        Outcome::Unchanged(service_state.service.routing.clone())
                    }
                    (Obstacle::Unchanged, None) => Outcome::Refused("nothing to do".into()),
                    (Obstacle::Refused(why), _) => Outcome::Refused(why),
                };
                self.reply(&pending, &outcome);
                return;
            }
        };
        let intent = match &pending.proposal {
            Proposal::Settle(Some(intent)) if !self.ledger.settled.contains_key(&intent.tx) => intent.clone(),
            _ => Intent { tx: pending.tx.clone(), digest: pending.digest, at: self.now.wall, operation },
        };
        if let Err(error) = self.ledger.next_record(intent.clone(), None) {
            self.reply(&pending, &Outcome::Refused(error.to_string()));
            return;
        }
        let slot = self.ledger.head.next();
        let ballot = self.ballot_for(slot, matches!(pending.proposal, Proposal::Settle(_)));
        let now = self.now.mono;
        let hurry = self.coordination.queue.front().is_some_and(|next| next.proposal.decreases());
        let stage = BallotStage::Preparing { votes: BTreeMap::new(), refused: BTreeMap::new() };
        let resend = now.after_ms(self.settings.timings.resend_ms);
        let attempt = BallotAttempt { pending, ballot, slot, intent, began: now, resend, hurry, stage };
        let prepare = self.prepare_of(&attempt);
        self.coordination.attempt = Some(attempt);
        // Its own promise need not be durable before it asks for others': `boot` makes the ballot unique.
        self.broadcast(&Message::Prepare(prepare.clone()));
        self.vote_myself(&prepare);
        self.try_propose();
    }

    /// Returns the ballot for an attempt at `slot`. The one before it serves again where it asked nothing in this slot
    /// and this node promised no higher one since: who promised it has promised it for every later slot, and need not
    /// write that again. An open slot is settled with a higher one, which makes what it completes in doubt.
    fn ballot_for(&mut self, slot: Slot, settling: bool) -> Ballot {
        let standing = self.coordination.standing.take().filter(|(ballot, asked)| {
            !settling && *asked < slot && self.promised() == Some(ballot) && ballot.round >= self.coordination.round
        });
        let ballot = standing.map(|(ballot, _)| ballot).unwrap_or_else(|| {
            let promised = self.promised().map_or(0, |ballot| ballot.round);
            self.coordination.round = self.coordination.round.max(promised) + 1;
            Ballot {
                round: self.coordination.round,
                node: self.settings.node.clone(),
                incarnation: self.acceptor.incarnation,
                boot: self.acceptor.boot,
            }
        });
        self.coordination.standing = Some((ballot.clone(), slot));
        ballot
    }

    fn prepare_of(&self, attempt: &BallotAttempt) -> Prepare {
        Prepare {
            ballot: attempt.ballot.clone(),
            slot: attempt.slot,
            base_hash: self.ledger.head_hash,
            intent: attempt.intent.clone(),
            recovery: matches!(attempt.pending.proposal, Proposal::Settle(_)),
            evidence_age_ms_max: self.settings.timings.evidence_age_ms_max,
        }
    }

    fn vote_myself(&mut self, prepare: &Prepare) {
        let gate = match prepare.recovery {
            true => GateVote::Abstain("settling an open slot".into()),
            false => self.gate_vote(&prepare.intent.operation, prepare.evidence_age_ms_max),
        };
        self.promise(&prepare.ballot);
        self.note_prepared(prepare, &gate);
        let accepted = self.acceptor.accepted.clone();
        let own = self.settings.node.clone();
        if let Some(BallotAttempt { stage: BallotStage::Preparing { votes, .. }, .. }) = &mut self.coordination.attempt
        {
            votes.insert(own, (accepted, gate));
        }
    }

    pub(super) fn on_vote(&mut self, from: &NodeId, incarnation: Incarnation, vote: Vote) {
        if let Answer::Refuse(Refusal::Stale(ballot)) = &vote.answer {
            self.coordination.round = self.coordination.round.max(ballot.round);
        }
        let counts = self.counts(from, incarnation);
        let Some(attempt) =
            self.coordination.attempt.as_mut().filter(|a| a.ballot == vote.ballot && a.slot == vote.slot)
        else {
            return;
        };
        match (vote.answer, &mut attempt.stage) {
            (Answer::Gate { accepted, gate }, BallotStage::Preparing { votes, refused }) if counts => {
                refused.remove(from);
                votes.entry(from.clone()).or_insert((accepted.map(|a| *a), gate));
                self.try_propose();
            }
            (Answer::Accept, BallotStage::Proposing { accepts, .. }) if counts => {
                accepts.insert(from.clone());
                self.try_choose();
            }
            (Answer::Gate { .. } | Answer::Accept, _) => {}
            (Answer::Refuse(refusal), _) => self.on_refusal(from, refusal, vote.head),
        }
    }

    fn on_refusal(&mut self, from: &NodeId, refusal: Refusal, head: Slot) {
        match refusal {
            Refusal::Stale(_) => self.step_back(BACK_OFF_MS),
            // The log, or the record, is on its way.
            Refusal::Behind | Refusal::Decided => self.step_back(CATCH_UP_MS),
            Refusal::Ahead => self.send_log(from, head.next()),
            Refusal::NotVoter => self.note_refused(from, "it has no vote".into()),
            Refusal::BadProposal(why) => self.note_refused(from, format!("it refused the proposal: {why}")),
        }
    }

    fn note_refused(&mut self, from: &NodeId, why: String) {
        if let Some(BallotAttempt { stage: BallotStage::Preparing { refused, .. }, .. }) =
            &mut self.coordination.attempt
        {
            refused.insert(from.clone(), why);
            self.try_propose();
        }
    }

    /// Gives up the ballot, to try again with a higher one after a random part of `wait_ms`.
    fn step_back(&mut self, (least, most): (u64, u64)) {
        let Some(attempt) = self.coordination.attempt.take() else { return };
        let wait = self.draws.between(least, most);
        self.coordination.not_before = self.now.mono.after_ms(wait);
        if !matches!(attempt.pending.proposal, Proposal::Settle(_)) {
            self.coordination.queue.push_front(attempt.pending);
        }
    }

    /// Proposes when the votes allow it: what some vote had accepted; else the intent, or its refusal.
    pub(super) fn try_propose(&mut self) {
        let quorum = self.ledger.members.quorum();
        let Some(attempt) = &self.coordination.attempt else { return };
        let BallotStage::Preparing { votes, refused } = &attempt.stage else { return };
        if votes.len() < quorum {
            return;
        }
        let settling = matches!(attempt.pending.proposal, Proposal::Settle(_));
        let accepted = votes.values().filter_map(|(accepted, _)| accepted.as_ref()).max_by_key(|a| &a.ballot);
        if let Some(accepted) = accepted {
            let record = accepted.record.clone();
            self.propose(record);
            return;
        }
        let intent = attempt.intent.clone();
        if settling {
            match &attempt.pending.proposal {
                Proposal::Settle(Some(_)) => match self.ledger.next_record(intent.clone(), None) {
                    // Lowering needs nobody's permission, a lost coordinator's neither.
                    Ok(record) if intent.operation.decreases_exposure() => self.propose(record),
                    _ => self.propose_abort(intent, vec!["its coordinator was lost".into()]),
                },
                _ => self.coordination.attempt = None,
            }
            return;
        }
        if !intent.operation.increases_exposure() {
            self.propose_intent(intent, None);
            return;
        }
        let expired = self.now.mono.millis_since(attempt.began) >= self.settings.timings.vote_ms;
        let mut yes = BTreeMap::new();
        let (mut reasons, mut missing) = (Vec::new(), Vec::new());
        for node in self.ledger.members.gate_voters() {
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
            let ms = self.settings.timings.vote_ms;
            reasons.extend(missing.drain(..).map(|node| format!("{node}: no vote within {ms} ms")));
        }
        if !reasons.is_empty() {
            self.propose_abort(intent, reasons);
        } else if missing.is_empty() {
            let ballot = attempt.ballot.clone();
            self.propose_intent(intent, Some(Certificate { ballot, yes }));
        }
    }

    fn propose_abort(&mut self, intent: Intent, reasons: Vec<String>) {
        let (service, refused) = (intent.operation.service().cloned(), intent.operation.name().into());
        let reasons = reasons.into_iter().map(bounded).collect();
        self.propose_intent(Intent { operation: Operation::Abort { service, refused, reasons }, ..intent }, None);
    }

    fn propose_intent(&mut self, intent: Intent, certificate: Option<Certificate>) {
        match self.ledger.next_record(intent, certificate) {
            Ok(record) => self.propose(record),
            Err(error) => {
                let Some(attempt) = self.coordination.attempt.take() else { return };
                self.reply(&attempt.pending, &Outcome::Refused(error.to_string()));
            }
        }
    }

    fn propose(&mut self, record: Record) {
        let own = self.settings.node.clone();
        let resend = self.now.mono.after_ms(self.settings.timings.resend_ms);
        let Some(attempt) = &mut self.coordination.attempt else { return };
        assert_eq!(record.slot, attempt.slot, "a ballot is about one slot");
        let ballot = attempt.ballot.clone();
        if self.acceptor.promised.as_ref() != Some(&ballot) {
            self.step_back(BACK_OFF_MS);
            return;
        }
        attempt.began = self.now.mono;
        attempt.resend = resend;
        attempt.stage = BallotStage::Proposing { record: Box::new(record.clone()), accepts: BTreeSet::from([own]) };
        self.broadcast(&Message::Decision(Decision::Propose(ballot.clone(), Box::new(record.clone()))));
        self.accept(ballot, record);
        self.try_choose();
    }

    fn try_choose(&mut self) {
        let quorum = self.ledger.members.quorum();
        let Some(attempt) = &self.coordination.attempt else { return };
        let BallotStage::Proposing { record, accepts } = &attempt.stage else { return };
        if accepts.len() < quorum {
            return;
        }
        let chosen = Chosen { ballot: Some(attempt.ballot.clone()), record: (**record).clone() };
        self.tell_chosen(&chosen);
        self.learn(chosen);
    }

    /// Follows up a record that was just added to the ledger: answers who waited for it, frees the desk.
    pub(super) fn settle(&mut self, record: &Record) {
        self.release_desk(record.slot);
        if let Some(at) = self.coordination.queue.iter().position(|pending| pending.tx == record.intent.tx) {
            let pending = self.coordination.queue.remove(at).expect("a position just found");
            // Nobody asked for a verdict, and its outcome is not kept.
            if !pending.requests.is_empty() {
                let outcome = self.settled_outcome(&pending.tx, pending.digest).first_time();
                self.reply(&pending, &outcome);
            }
        }
        if record.intent.operation.decreases_exposure()
            && let Some(id) = record.intent.operation.service().cloned()
        {
            let lease_ms = self.ledger.services[&id].service.rollout.spec.lease_ms;
            self.enforce(id, record.slot, lease_ms);
        }
    }

    /// Gives up the attempt at a slot that is decided; its wish waits for the next one.
    pub(super) fn release_desk(&mut self, decided: Slot) {
        if self.coordination.attempt.as_ref().is_some_and(|attempt| attempt.slot <= decided) {
            let attempt = self.coordination.attempt.take().expect("an attempt just seen");
            if !matches!(attempt.pending.proposal, Proposal::Settle(_)) {
                self.coordination.queue.push_front(attempt.pending);
            }
        }
    }

    pub(super) fn tick_attempt(&mut self) {
        let now = self.now.mono;
        let timings = self.settings.timings;
        let Some(attempt) = &self.coordination.attempt else {
            self.expire_queue();
            return;
        };
        let age = now.millis_since(attempt.began);
        if matches!(attempt.stage, BallotStage::Preparing { .. }) && age >= timings.vote_ms {
            self.try_propose();
            self.give_up_preparing();
        } else if matches!(attempt.stage, BallotStage::Proposing { .. }) && age >= timings.vote_ms {
            self.doubt();
        }
        self.resend();
        self.expire_queue();
    }

    fn resend(&mut self) {
        let now = self.now.mono;
        let Some(attempt) = self.coordination.attempt.as_ref().filter(|attempt| now >= attempt.resend) else { return };
        let (message, done): (_, BTreeSet<_>) = match &attempt.stage {
            BallotStage::Preparing { votes, .. } => {
                (Message::Prepare(self.prepare_of(attempt)), votes.keys().cloned().collect())
            }
            BallotStage::Proposing { record, accepts } => {
                let decision = Decision::Propose(attempt.ballot.clone(), record.clone());
                (Message::Decision(decision), accepts.clone())
            }
        };
        for node in self.peers.keys().filter(|node| !done.contains(*node)) {
            self.out.push(Output::Send { to: node.clone(), message: Box::new(message.clone()) });
        }
        let resend = now.after_ms(self.settings.timings.resend_ms);
        if let Some(attempt) = &mut self.coordination.attempt {
            attempt.resend = resend;
        }
    }

    /// No majority of votes in time: nothing was proposed, and the client may try again.
    fn give_up_preparing(&mut self) {
        let Some(BallotAttempt { stage: BallotStage::Preparing { votes, .. }, .. }) = &self.coordination.attempt else {
            return;
        };
        let outcome =
            Outcome::NoQuorum { reached: votes.keys().cloned().collect(), needed: self.ledger.members.quorum() };
        let attempt = self.coordination.attempt.take().expect("an attempt just seen");
        self.reply(&attempt.pending, &outcome);
    }

    /// No majority confirmed in time: clients hear so, and the ballot goes on.
    fn doubt(&mut self) {
        let Some(attempt) = &mut self.coordination.attempt else { return };
        let pending = Pending { requests: std::mem::take(&mut attempt.pending.requests), ..attempt.pending.clone() };
        self.reply(&pending, &Outcome::InDoubt);
    }

    fn expire_queue(&mut self) {
        let (now, limit) = (self.now.mono, self.settings.timings.vote_ms * 3 / 2);
        let blocked = self.coordination.attempt.is_some() || self.membership() == Membership::Learner;
        if !blocked {
            return;
        }
        let (late, waiting) = std::mem::take(&mut self.coordination.queue)
            .into_iter()
            .partition::<VecDeque<_>, _>(|pending| now.millis_since(pending.since) >= limit);
        self.coordination.queue = waiting;
        let reached = self.ledger.members.0.keys().filter(|node| self.is_live_voter(node)).cloned().collect::<Vec<_>>();
        let needed = self.ledger.members.quorum();
        let outcome = if reached.len() < needed { Outcome::NoQuorum { reached, needed } } else { Outcome::Busy };
        late.iter().for_each(|pending| self.reply(pending, &outcome));
    }

    fn reply(&mut self, pending: &Pending, outcome: &Outcome) {
        self.out.extend(pending.requests.iter().map(|request| Output::Reply(*request, outcome.clone())));
    }

    fn settled_outcome(&self, tx: &TxId, digest: u64) -> Outcome {
        let settled = &self.ledger.settled[tx];
        let slot = settled.slot;
        if settled.digest != digest {
            return Outcome::KeyReused { slot };
        }
        match &settled.refused {
            Some(reasons) => Outcome::Aborted { slot, reasons: reasons.clone(), repeated: true },
            None => {
                let services = self.ledger.services.values();
                let state = services
                    .map(|service_state| &service_state.service.routing)
                    .find(|routing| routing.txid == *tx)
                    .cloned();
                Outcome::Committed { slot, state, repeated: true }
            }
        }
    }

    /// Returns what a wish comes to as things stand.
    fn operation_for(&self, proposal: &Proposal) -> Result<Operation, Obstacle> {
        match proposal {
            Proposal::Operation(operation) => Ok(operation.clone()),
            Proposal::Settle(_) => {
                Ok(Operation::Abort { service: None, refused: "Settle".into(), reasons: vec!["an open slot".into()] })
            }
            Proposal::OperatorRequest(OperatorRequest::Config(change)) => {
                if let ConfigChange::Readmit(node, incarnation) | ConfigChange::Add(node, incarnation) = change {
                    self.check_readmission(node, *incarnation).map_err(Obstacle::Refused)?;
                }
                Ok(Operation::Config(change.clone()))
            }
            Proposal::OperatorRequest(asked) => {
                self.change_for(asked).map(|(id, change)| Operation::Change(id, change))
            }
        }
    }

    /// A node is added or readmitted as what it is now: a request that was overtaken by another wipe must not bind an
    /// incarnation that is gone, nor take the vote from a node that has it.
    fn check_readmission(&self, node: &NodeId, incarnation: Incarnation) -> Result<(), String> {
        let own = *node == self.settings.node;
        let heard = self.peers.get(node).filter(|_| self.is_alive(node)).and_then(|peer| peer.incarnation);
        match if own { Some(self.acceptor.incarnation) } else { heard } {
            Some(found) if found == incarnation => Ok(()),
            Some(found) => Err(format!("node {node} has incarnation {found}, expected {incarnation}, as asked")),
            None => Err(format!("node {node} is not heard from: start it, then ask again")),
        }
    }

    fn change_for(&self, asked: &OperatorRequest) -> Result<(ServiceId, Change), Obstacle> {
        let id = asked.service().expect("an operation that is no Config concerns a service").clone();
        let known = self.ledger.services.get(&id).map(|service_state| &service_state.service);
        let known_or = || known.ok_or_else(|| ChangeError::UnknownService(id.clone()));
        let change = match asked {
            OperatorRequest::Apply(spec) => self.apply(known, spec)?,
            OperatorRequest::Promote { full, .. } => Change::Promote { to: known_or()?.next(*full), full: *full },
            OperatorRequest::Pause { reason, .. } => Change::Pause { reason: reason.clone() },
            OperatorRequest::Resume { .. } => Change::Resume,
            OperatorRequest::Abort { reason, .. } => match known_or()?.rollout.phase {
                Phase::RolledBack => return Err(Obstacle::Unchanged),
                _ => Change::Rollback { reason: reason.clone() },
            },
            OperatorRequest::Retry { .. } => {
                let rollout = &known_or()?.rollout;
                if rollout.phase != Phase::RolledBack {
                    let version = rollout.spec.canary.version.clone();
                    return Err(ChangeError::Phase { version, phase: rollout.phase, expected: "RolledBack" }.into());
                }
                Change::Start(rollout.spec.clone())
            }
            OperatorRequest::Undo { .. } => match &known_or()?.rollout {
                rollout if rollout.phase == Phase::Completed => Change::Start(rollout.spec.reversed().into()),
                rollout if rollout.phase.is_active() => Change::Rollback { reason: "undo".into() },
                rollout => {
                    let version = rollout.spec.canary.version.clone();
                    return Err(ChangeError::NotInProgress { version, phase: rollout.phase }.into());
                }
            },
            OperatorRequest::Config(_) => unreachable!("no service, so not here"),
        };
        Ok((id, change))
    }

    fn apply(
        &self,
        known: Option<&crate::domain::rollout::Service>,
        spec: &std::sync::Arc<RolloutSpec>,
    ) -> Result<Change, Obstacle> {
        match known.map(|service| &service.rollout) {
            Some(rollout) if rollout.spec == *spec && rollout.phase != Phase::RolledBack => Err(Obstacle::Unchanged),
            _ => Ok(Change::Start(spec.clone())),
        }
    }
}

impl Proposal {
    fn service(&self) -> Option<&ServiceId> {
        match self {
            Self::OperatorRequest(asked) => asked.service(),
            Self::Operation(operation) => operation.service(),
            Self::Settle(_) => None,
        }
    }
}

impl Outcome {
    /// Returns the outcome as the request that caused it hears it.
    fn first_time(self) -> Self {
        match self {
            Self::Committed { slot, state, .. } => Self::Committed { slot, state, repeated: false },
            Self::Aborted { slot, reasons, .. } => Self::Aborted { slot, reasons, repeated: false },
            other => other,
        }
    }
}

/// Range of the random wait after a duel.
const BACK_OFF_MS: (u64, u64) = (10, 80);
/// Range of the wait for records that are on their way.
const CATCH_UP_MS: (u64, u64) = (5, 15);
