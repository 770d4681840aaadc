//! Checks behind others: each holds by itself, also when its callers don't look first.

use super::limits::{add, start};
use super::*;
use crate::protocol::ledger::RecordError;
use crate::protocol::record::Hash;

/// Returns a ledger whose last record is a start, and the start that may follow it, of another service.
fn ledger_and_next() -> (Ledger, Record) {
    let mut ledger = Ledger::new(&genesis()).unwrap();
    let first = start(&ledger, 0, 1).1.unwrap();
    add(&mut ledger, first);
    let mut again = ledger.clone();
    let mut next = start(&ledger, 1, 1).1.unwrap();
    let ballot = Ballot { round: 1, node: node("a"), incarnation: Incarnation(1), boot: 1 };
    let yes = ["a", "b", "c"].map(|name| (node(name), "healthy".to_string())).into();
    next.certificate = Some(crate::protocol::record::Certificate { ballot, yes });
    again.apply(&chosen(&next)).unwrap();
    (ledger, next)
}

fn chosen(record: &Record) -> Chosen {
    let ballot = record.certificate.as_ref().map(|certificate| certificate.ballot.clone());
    Chosen { ballot, decided_at: Wall(0), record: record.clone() }
}

#[test]
fn a_ledger_takes_neither_a_gap_nor_another_history_nor_a_settled_transaction() {
    let (ledger, next) = ledger_and_next();
    let refused = |record: &Record| {
        let mut ledger = ledger.clone();
        let found = ledger.apply(&chosen(record)).unwrap_err();
        assert_eq!(ledger.check(record), Err(found.clone()));
        assert_eq!(ledger.check_proposal(record), Err(found.clone()));
        assert_eq!(ledger.head, Slot(1), "nothing was taken in");
        found
    };
    for slot in [0, 1, 3, 4].map(Slot) {
        let record = Record { slot, ..next.clone() };
        assert_eq!(refused(&record), RecordError::Slot { expected: Slot(2), found: slot });
    }
    let record = Record { prev_hash: Hash([9; 32]), ..next.clone() };
    assert_eq!(refused(&record), RecordError::History { expected: ledger.head_hash, found: Hash([9; 32]) });
    let settled = ledger.settled.keys().next().unwrap().clone();
    let mut record = next.clone();
    record.intent.tx = settled.1.clone();
    assert_eq!(refused(&record), RecordError::Settled { tx: settled.1, slot: Slot(1) });
}

#[test]
fn an_increase_needs_the_yes_of_every_gate_voter() {
    let (ledger, next) = ledger_and_next();
    for voter in ["a", "b", "c"] {
        let mut record = next.clone();
        record.certificate.as_mut().unwrap().yes.remove(&node(voter));
        assert_eq!(ledger.check_proposal(&record), Err(RecordError::Certificate(voter.into())));
    }
    let record = Record { certificate: None, ..next };
    assert_eq!(ledger.check_proposal(&record), Err(RecordError::Certificate("a, b, c".into())));
}

#[test]
fn an_acceptor_refuses_an_increase_without_every_yes() {
    let mut rig = Rig::new();
    rig.asked("a", 1, OperatorRequest::Apply(spec()));
    rig.ask("a", 2, OperatorRequest::Promote { service: service(), full: true });
    // Up to the proposal to b, of which a Yes is taken away.
    let at = loop {
        let proposal = rig.wire.iter().position(|(_, to, message)| {
            *to == node("b") && matches!(message, Message::Decision(Decision::Propose(..)))
        });
        match proposal {
            Some(at) => break at,
            None => rig.deliver(0),
        }
    };
    let Message::Decision(Decision::Propose(_, record)) = &mut rig.wire[at].2 else { unreachable!() };
    record.certificate.as_mut().expect("an increase").yes.remove(&node("c"));
    let promised = rig.acceptors[&node("b")].clone();
    rig.take_story();
    rig.deliver(at);
    let story = rig.take_story();
    assert_eq!(rig.acceptors[&node("b")], promised, "nothing was accepted: {story:?}");
    assert!(story[0].starts_with("b to a: VOTE refuse: BadProposal(\"no Yes of c in the certificate"), "{story:?}");
}

#[test]
fn evidence_of_another_routing_version_counts_for_nothing() {
    let mut rig = Rig::new();
    rig.asked("a", 1, OperatorRequest::Apply(spec()));
    let shown = |rig: &Rig| rig.cores[&node("b")].view().services[&service()].clone();
    let version = shown(&rig).service.routing.version;
    let tell = |rig: &mut Rig, routing_version| {
        let core = &rig.cores[&node("c")];
        let mut snapshot = core.snapshot(&service());
        snapshot.routing_version = routing_version;
        (0..300).for_each(|_| snapshot.evidence.canary.record(1_000, false));
        let message = Box::new(Message::HealthSnapshot(snapshot));
        rig.handle(&node("b"), Input::Received { from: node("c"), incarnation: Incarnation(1), message });
        // Until it is shown, but not until c speaks itself.
        rig.now += 260_000;
        rig.handle(&node("b"), Input::Tick);
        rig.wire.clear();
        shown(rig).cluster.canary.count
    };
    assert_eq!(tell(&mut rig, version - 1), 0, "of the step before");
    assert_eq!(tell(&mut rig, version + 1), 0, "of a step that b doesn't know yet");
    assert_eq!(tell(&mut rig, version), 300);
}
