//! A bare Paxos behind the core's seam: it shows that the world itself is sound, and that it finds seeded bugs.

use std::collections::{BTreeMap, BTreeSet};

use aviary_core::domain::ids::NodeId;
use aviary_core::domain::time::{Mono, Now};
use aviary_core::protocol::ledger::Ledger;
use aviary_core::protocol::message::{Answer, Decision, GateVote, Heartbeat, Membership, Message, Prepare, Vote};
use aviary_core::protocol::record::{
    Accepted, AcceptorState, Ballot, Chosen, Initiator, Intent, Members, Operation, Record, Slot,
};
use aviary_core::protocol::{Input, Output};

use crate::subject::{Setup, Subject};

/// A toy without a seeded bug.
pub const SOUND: u8 = 0;
/// Seeded bug: a restart forgets what was promised.
pub const FORGETS_PROMISE: u8 = 1;
/// The vote doesn't tell what was accepted.
pub const HIDES_ACCEPTED: u8 = 2;
/// One accept too few counts as a majority.
pub const SMALL_QUORUM: u8 = 3;
/// The vote leaves before the write.
pub const SENDS_FIRST: u8 = 4;
/// A node without its memory votes.
pub const WIPED_VOTES: u8 = 5;

struct Attempt {
    ballot: Ballot,
    intent: Intent,
    promised: BTreeMap<NodeId, Option<Box<Accepted>>>,
    proposed: Option<Record>,
    accepted: BTreeSet<NodeId>,
    since: Mono,
}

/// One node of a tiny single-slot consensus, to test the simulator itself.
pub struct Toy<const BUG: u8> {
    acceptor: AcceptorState,
    members: Members,
    head_hash: aviary_core::protocol::record::Hash,
    head: Slot,
    attempt: Option<Attempt>,
    out: Vec<Output>,
    beat: Mono,
    round: u64,
    now: Now,
}

impl<const BUG: u8> Toy<BUG> {
    fn persist(&mut self) {
        self.acceptor.head = self.head;
        self.acceptor.head_hash = self.head_hash;
        self.out.push(Output::Persist(Box::new(self.acceptor.clone())));
    }

    fn peers(&self) -> Vec<NodeId> {
        self.members.0.keys().filter(|node| **node != self.acceptor.node).cloned().collect()
    }

    fn send(&mut self, to: NodeId, message: Message) {
        self.out.push(Output::Send { to, message: Box::new(message) });
    }

    fn tell(&mut self, message: &Message) {
        self.peers().into_iter().for_each(|peer| self.send(peer, message.clone()));
    }

    fn counts(&self) -> bool {
        BUG == WIPED_VOTES || self.members.counts(&self.acceptor.node, self.acceptor.incarnation)
    }

    fn vote(&mut self, to: NodeId, ballot: Ballot, slot: Slot, answer: Answer) {
        let head = self.head;
        let at = self.out.len();
        self.send(to, Message::Vote(Vote { ballot, slot, head, writes: 0, answer }));
        if BUG == SENDS_FIRST && at > 0 {
            self.out.swap(at - 1, at);
        }
    }

    fn begin(&mut self, intent: Intent) {
        self.round = self.acceptor.promised.as_ref().map_or(0, |ballot| ballot.round) + 1;
        let (node, incarnation, boot) = (self.acceptor.node.clone(), self.acceptor.incarnation, self.acceptor.boot);
        let ballot = Ballot { round: self.round, node: node.clone(), incarnation, boot };
        self.acceptor.promised = Some(ballot.clone());
        self.persist();
        let prepare = Prepare {
            ballot: ballot.clone(),
            slot: self.head.next(),
            base_hash: self.head_hash,
            intent: intent.clone(),
            recovery: false,
            evidence_age_ms_max: 0,
        };
        self.tell(&Message::Prepare(prepare));
        let own = self.acceptor.accepted.clone().map(Box::new);
        let promised = BTreeMap::from([(node, own)]);
        let since = self.now.mono;
        self.attempt = Some(Attempt { ballot, intent, promised, proposed: None, accepted: BTreeSet::new(), since });
        self.advance();
    }

    fn advance(&mut self) {
        let quorum = self.members.quorum() - usize::from(BUG == SMALL_QUORUM);
        let Some(attempt) = &mut self.attempt else { return };
        if attempt.proposed.is_none() && attempt.promised.len() >= self.members.quorum() {
            let highest = attempt.promised.values().flatten().max_by(|x, y| x.ballot.cmp(&y.ballot));
            let fresh = Record {
                slot: self.head.next(),
                prev_hash: self.head_hash,
                intent: attempt.intent.clone(),
                state: None,
                phase: None,
                certificate: None,
            };
            let record = highest.map_or(fresh, |accepted| accepted.record.clone());
            attempt.proposed = Some(record.clone());
            attempt.accepted.insert(self.acceptor.node.clone());
            let ballot = attempt.ballot.clone();
            self.acceptor.accepted = Some(Accepted { ballot: ballot.clone(), record: record.clone() });
            self.persist();
            self.tell(&Message::Decision(Decision::Propose(ballot, Box::new(record))));
        }
        let done = self.attempt.as_ref().is_some_and(|a| a.proposed.is_some() && a.accepted.len() >= quorum);
        if done {
            let attempt = self.attempt.take().expect("just seen");
            let record = attempt.proposed.expect("just seen");
            let chosen = Chosen { ballot: Some(attempt.ballot), decided_at: self.now.wall, record };
            self.learn(chosen.clone());
            self.tell(&Message::Decision(Decision::Chosen(Box::new(chosen))));
        }
    }

    fn learn(&mut self, chosen: Chosen) {
        if chosen.record.slot != self.head.next() {
            return;
        }
        self.head = chosen.record.slot;
        self.head_hash = chosen.record.hash();
        self.acceptor.accepted = None;
        self.attempt = None;
        self.out.push(Output::Append(Box::new(chosen)));
    }

    fn receive(&mut self, from: NodeId, message: Message) {
        match message {
            Message::Prepare(p) if p.slot == self.head.next() && self.counts() => {
                let stale = self.acceptor.promised.as_ref() > Some(&p.ballot);
                if stale && BUG != FORGETS_PROMISE {
                    return;
                }
                self.attempt = None;
                self.acceptor.promised = Some(p.ballot.clone());
                self.persist();
                let told = self.acceptor.accepted.clone().filter(|_| BUG != HIDES_ACCEPTED).map(Box::new);
                let gate = GateVote::Abstain("a toy".into());
                self.vote(from, p.ballot, p.slot, Answer::Gate { accepted: told, gate });
            }
            Message::Decision(Decision::Propose(ballot, record))
                if record.slot == self.head.next() && self.counts() =>
            {
                if self.acceptor.promised.as_ref() > Some(&ballot) {
                    return;
                }
                let slot = record.slot;
                self.attempt = None;
                self.acceptor.promised = Some(ballot.clone());
                self.acceptor.accepted = Some(Accepted { ballot: ballot.clone(), record: *record });
                self.persist();
                self.vote(from, ballot, slot, Answer::Accept);
            }
            Message::Decision(Decision::Chosen(chosen) | Decision::CatchUp(chosen)) => self.learn(*chosen),
            Message::Vote(vote) => {
                let open = self.head.next();
                let Some(attempt) = &mut self.attempt else { return };
                if attempt.ballot != vote.ballot || vote.slot != open {
                    return;
                }
                match vote.answer {
                    Answer::Gate { accepted, .. } => drop(attempt.promised.insert(from, accepted)),
                    Answer::Accept => drop(attempt.accepted.insert(from)),
                    Answer::Refuse(_) => {}
                }
                self.advance();
            }
            Message::Heartbeat(heartbeat) if heartbeat.head < self.head => {
                let (from, through, to) = (heartbeat.head.next(), self.head, from);
                self.out.push(Output::SendLog { to, from, through });
            }
            _ => {}
        }
    }

    fn tick(&mut self) {
        if self.now.mono < self.beat {
            return;
        }
        self.beat = self.now.mono.after_ms(200);
        if self.attempt.as_ref().is_some_and(|attempt| self.now.mono.millis_since(attempt.since) > 1_000) {
            self.attempt = None;
        }
        let heartbeat = Heartbeat {
            nonce: None,
            acknowledges: None,
            head: self.head,
            head_hash: self.head_hash,
            in_doubt: Default::default(),
            open: None,
            membership: Membership::Voter,
            writes: 0,
            seen: None,
            speaks: aviary_core::protocol::feature::PROTOCOL,
        };
        self.tell(&Message::Heartbeat(heartbeat));
    }
}

impl<const BUG: u8> Subject for Toy<BUG> {
    fn start(
        setup: Setup,
        acceptor: Option<AcceptorState>,
        ledger: Ledger,
        log: &[Chosen],
        now: Now,
    ) -> (Self, Vec<Output>) {
        let base = (ledger.head, ledger.head_hash);
        let last = log.last().map_or(base, |last| (last.record.slot, last.record.hash()));
        let mut acceptor = acceptor.unwrap_or(AcceptorState {
            cluster: setup.cluster,
            node: setup.node,
            incarnation: setup.fresh_incarnation,
            boot: 0,
            promised: None,
            accepted: None,
            head: base.0,
            head_hash: base.1,
            writes: 0,
            seen: BTreeMap::new(),
        });
        acceptor.boot += 1;
        acceptor.accepted = acceptor.accepted.filter(|accepted| accepted.record.slot > last.0);
        let round = acceptor.promised.as_ref().map_or(0, |ballot| ballot.round);
        let ((head, head_hash), members) = (last, ledger.members);
        let (attempt, out, beat) = (None, Vec::new(), now.mono);
        let mut toy = Self { acceptor, members, head, head_hash, attempt, out, beat, round, now };
        toy.persist();
        let out = std::mem::take(&mut toy.out);
        (toy, out)
    }

    fn handle(&mut self, now: Now, input: Input) -> Vec<Output> {
        self.now = now;
        match input {
            Input::Tick => self.tick(),
            Input::Received { from, message, .. } => self.receive(from, *message),
            Input::Operator(command) if self.attempt.is_none() && self.counts() => {
                let operation = Operation::Refused { service: None, refused: "everything".into(), reasons: vec![] };
                // Made unique: the toy keeps no outcomes, and so can't tell a repeated transaction.
                let unique = format!("{}.{}.{}", command.tx, self.acceptor.node, command.request.0);
                let tx = aviary_core::domain::ids::TxId::new(unique).expect("short enough");
                self.begin(Intent {
                    initiator: Initiator::Client,
                    tx,
                    actor: "toy".into(),
                    digest: 0,
                    at: now.wall,
                    operation,
                });
            }
            _ => {}
        }
        std::mem::take(&mut self.out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::world::{LATER, Options, World};

    /// Returns the first broken safety invariant of these seeds.
    fn first<const BUG: u8>(seeds: u64) -> Option<(u64, &'static str, String)> {
        (1..=seeds).find_map(|seed| {
            let options = Options { ms: 8_000, without: LATER, ..Options::of(seed) };
            let violation = World::<Toy<BUG>>::new(options).run().err()?;
            (violation.invariant != "liveness" && !violation.what.contains("answered ABORTED at slot")).then_some((
                seed,
                violation.invariant,
                violation.what,
            ))
        })
    }

    #[test]
    fn a_sound_paxos_breaks_nothing() {
        assert_eq!(first::<SOUND>(60), None);
        let options = Options { ms: 8_000, nodes: Some(3), without: LATER, ..Options::of(1) };
        let mut world = World::<Toy<SOUND>>::new(options);
        let _ = world.run();
        assert!(world.slots() > 0, "nothing was decided, so nothing was checked");
    }

    #[test]
    fn seeded_bugs_are_found() {
        assert!(first::<FORGETS_PROMISE>(60).is_some(), "a forgotten promise");
        assert!(first::<HIDES_ACCEPTED>(60).is_some(), "a hidden accept");
        assert!(first::<SMALL_QUORUM>(60).is_some(), "a quorum too small");
        assert!(first::<SENDS_FIRST>(60).is_some(), "a vote before its write");
        assert!(first::<WIPED_VOTES>(200).is_some(), "a wiped voter's vote");
    }
}
