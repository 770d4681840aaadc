//! Participant side of a commit: vote, accept, learn.
//!
//! Pure: every promise made in a message is persisted before the message (see the contract in [`crate::protocol`]).

use crate::domain::ids::{Incarnation, NodeId};
use crate::domain::time::Mono;

use super::core::Core;
use super::message::{Answer, Decision, GateVote, Membership, Message, Prepare, Refusal, Vote};
use super::record::{Accepted, Ballot, Chosen, Intent, Record, Slot};
use super::{Event, Output};

/// The vote given last, to repeat it.
#[derive(Debug, Clone)]
pub(super) struct LastVote {
    ballot: Ballot,
    slot: Slot,
    gate: GateVote,
}

/// What was voted on in the open slot, until it is settled.
#[derive(Debug, Clone)]
pub(super) struct Prepared {
    pub slot: Slot,
    pub ballot: Ballot,
    pub intent: Intent,
    pub at: Mono,
}

/// Most records sent to a peer that lags, for each sign of life it gives.
const CATCH_UP_RECORDS: u64 = 64;

impl Core {
    pub(super) fn on_prepare(&mut self, from: &NodeId, incarnation: Incarnation, prepare: Prepare) {
        let answer = match self.refuse_prepare(from, incarnation, &prepare) {
            Some(refusal) => Answer::Refuse(refusal),
            None => self.vote(&prepare),
        };
        let vote = Vote { ballot: prepare.ballot, slot: prepare.slot, head: self.ledger.head, answer };
        self.send(from, Message::Vote(vote));
    }

    fn refuse_prepare(&mut self, from: &NodeId, incarnation: Incarnation, prepare: &Prepare) -> Option<Refusal> {
        if let Some(refusal) = self.refuse_sender(from, incarnation, &prepare.ballot, prepare.slot) {
            return Some(refusal);
        }
        if prepare.base_hash != self.ledger.head_hash {
            return Some(self.reject(from, format!("slot {} follows another history", prepare.slot)));
        }
        if self.ledger.settled.contains_key(&prepare.intent.tx) {
            return Some(Refusal::Decided);
        }
        self.promised().filter(|promised| **promised > prepare.ballot).cloned().map(Refusal::Stale)
    }

    /// What PREPARE and a proposal are both refused for.
    fn refuse_sender(
        &mut self,
        from: &NodeId,
        incarnation: Incarnation,
        ballot: &Ballot,
        slot: Slot,
    ) -> Option<Refusal> {
        if ballot.node != *from || ballot.incarnation != incarnation {
            return Some(self.reject(from, format!("ballot {ballot} is not the sender's")));
        }
        if slot <= self.ledger.head {
            self.send_log(from, slot);
            return Some(Refusal::Behind);
        }
        if slot > self.ledger.head.next() {
            return Some(Refusal::Ahead);
        }
        if !self.counts(from, incarnation) || self.membership() != Membership::Voter {
            return Some(Refusal::NotVoter);
        }
        None
    }

    /// Promises the ballot and returns the vote; the same one for the same ballot and slot, as long as the process
    /// lives. After a restart the gate is asked again: it knows less by then, and never says Yes on old evidence.
    fn vote(&mut self, prepare: &Prepare) -> Answer {
        let accepted = self.acceptor.accepted.clone().map(Box::new);
        let last_vote = self
            .last_vote
            .as_ref()
            .filter(|last_vote| last_vote.ballot == prepare.ballot && last_vote.slot == prepare.slot);
        if let Some(last_vote) = last_vote {
            return Answer::Gate { accepted, gate: last_vote.gate.clone() };
        }
        let gate = match prepare.recovery {
            true => GateVote::Abstain("settling an open slot".into()),
            false => self.gate_vote(&prepare.intent.operation, prepare.evidence_age_ms_max),
        };
        self.promise(&prepare.ballot);
        self.last_vote = Some(LastVote { ballot: prepare.ballot.clone(), slot: prepare.slot, gate: gate.clone() });
        self.note_prepared(prepare, &gate);
        Answer::Gate { accepted, gate }
    }

    /// Promises a ballot, durably: no lower one gets a vote in any slot. Writes nothing when that was promised before.
    pub(super) fn promise(&mut self, ballot: &Ballot) {
        assert!(self.promised().is_none_or(|promised| promised <= ballot), "I6: a promise is kept");
        if self.promised() != Some(ballot) {
            self.acceptor.promised = Some(ballot.clone());
            self.persist();
        }
    }

    /// Remembers, and tells people, what this node voted on.
    pub(super) fn note_prepared(&mut self, prepare: &Prepare, gate: &GateVote) {
        if prepare.recovery {
            return;
        }
        let Prepare { slot, ballot, intent, .. } = prepare;
        let at = self.now.mono;
        let prepared = Prepared { slot: *slot, ballot: ballot.clone(), intent: intent.clone(), at };
        self.prepared = Some(prepared);
        let (vote, reason) = match gate {
            GateVote::Yes(why) => ("yes", why),
            GateVote::No(why) => ("no", why),
            GateVote::Abstain(why) => ("abstain", why),
        };
        let (vote, reason) = (vote.to_string(), reason.clone());
        let (ballot, txid) = (ballot.to_string(), intent.tx.clone());
        self.announce(Event::Voted { slot: *slot, ballot, txid, vote, reason });
        self.announce_prepared(*slot, intent);
    }

    pub(super) fn on_propose(&mut self, from: &NodeId, incarnation: Incarnation, ballot: Ballot, record: Record) {
        let slot = record.slot;
        let answer = match self.refuse_proposal(from, incarnation, &ballot, &record) {
            Some(refusal) => Answer::Refuse(refusal),
            None => {
                self.accept(ballot.clone(), record);
                Answer::Accept
            }
        };
        let head = self.ledger.head;
        self.send(from, Message::Vote(Vote { ballot, slot, head, answer }));
    }

    fn refuse_proposal(
        &mut self,
        from: &NodeId,
        incarnation: Incarnation,
        ballot: &Ballot,
        record: &Record,
    ) -> Option<Refusal> {
        if let Some(refusal) = self.refuse_sender(from, incarnation, ballot, record.slot) {
            return Some(refusal);
        }
        if let Some(promised) = self.promised().filter(|promised| *promised > ballot) {
            return Some(Refusal::Stale(promised.clone()));
        }
        if record.certificate.as_ref().is_some_and(|certificate| certificate.ballot > *ballot) {
            return Some(self.reject(from, format!("ballot {ballot} carries a later certificate")));
        }
        match self.ledger.check_proposal(record) {
            Ok(()) => None,
            Err(super::ledger::RecordError::Settled { .. }) => Some(Refusal::Decided),
            Err(error) => Some(self.reject(from, error.to_string())),
        }
    }

    /// Accepts a record, durably. What lowers exposure is obeyed from here on.
    pub(super) fn accept(&mut self, ballot: Ballot, record: Record) {
        assert!(self.promised().is_none_or(|promised| *promised <= ballot), "I6: a promise is kept");
        let accepted = self.acceptor.accepted.as_ref();
        let same = accepted.is_some_and(|a| a.ballot == ballot && a.record.slot == record.slot);
        if same {
            return;
        }
        let is_verdict = record.intent.operation.is_verdict();
        if !is_verdict {
            self.outdate(&record.intent.operation);
        }
        self.acceptor.promised = Some(ballot.clone());
        self.acceptor.accepted = Some(Accepted { ballot, record });
        self.accepted_at = self.now.mono;
        if !is_verdict {
            self.publish();
        }
        self.persist();
    }

    pub(super) fn on_chosen(&mut self, from: &NodeId, incarnation: Incarnation, chosen: Chosen, catch_up: bool) {
        let slot = chosen.record.slot;
        if let Some(peer) = self.peers.get_mut(from) {
            peer.head = peer.head.max(Some(slot));
        }
        if slot == self.ledger.head {
            assert_eq!(chosen.record.hash(), self.ledger.head_hash, "I1: one record in slot {slot}");
            if chosen.is_in_doubt() && self.ledger.mark_in_doubt(slot) {
                self.outdated.all = true;
            }
            return;
        }
        if slot < self.ledger.head {
            return;
        }
        if !self.counts(from, incarnation) && !catch_up {
            return;
        }
        if slot > self.ledger.head.next() {
            self.beat_to(from);
            if slot.0 - self.ledger.head.0 <= 2 * CATCH_UP_RECORDS {
                self.early.insert(slot, chosen);
            }
            return;
        }
        let mut next = Some(chosen);
        while let Some(chosen) = next {
            if let Err(error) = self.ledger.check(&chosen.record) {
                self.reject(from, format!("record {}: {error}", chosen.record.slot));
                return;
            }
            self.learn(chosen);
            let head = self.ledger.head;
            self.early.retain(|early, _| *early > head);
            next = self.early.remove(&head.next());
        }
        let slot = self.ledger.head;
        let behind = self.peers.get(from).is_some_and(|peer| peer.head > Some(slot));
        if catch_up && behind && (slot.0 + 1).is_multiple_of(CATCH_UP_RECORDS) {
            self.beat_to(from);
        }
    }

    /// Sends a peer what it lacks, in batches; the next one when it says that it has this one.
    pub(super) fn send_log(&mut self, to: &NodeId, from: Slot) {
        let through = Slot((from.0 | (CATCH_UP_RECORDS - 1)).min(self.ledger.head.0));
        let now = self.now.mono;
        let resend_ms = self.settings.timings.resend_ms;
        let Some(peer) = self.peers.get_mut(to) else { return };
        let fresh = |(sent, at): &(Slot, Mono)| *sent >= through && now.millis_since(*at) < resend_ms;
        if from > through || peer.sent_log.as_ref().is_some_and(fresh) {
            return;
        }
        peer.sent_log = Some((through, now));
        self.out.push(Output::SendLog { to: to.clone(), from, through });
    }

    /// Says that a peer's message broke a rule.
    pub(super) fn reject(&mut self, from: &NodeId, reason: String) -> Refusal {
        self.announce(Event::Rejected { node: from.clone(), reason: reason.clone() });
        Refusal::BadProposal(reason)
    }

    /// Tells one peer where this node is, without asking for an answer.
    pub(super) fn beat_to(&mut self, to: &NodeId) {
        let heartbeat = self.heartbeat(None, None);
        self.send(to, Message::Heartbeat(heartbeat));
    }

    /// Tells the others that a record was chosen.
    pub(super) fn tell_chosen(&mut self, chosen: &Chosen) {
        self.broadcast(&Message::Decision(Decision::Chosen(Box::new(chosen.clone()))));
    }
}
