//! Text from outside is short by the time it is voted on, sent and recorded, also where nobody cut it before.

use super::*;
use crate::domain::query::NoValue;
use crate::domain::text::{CHARACTERS_MAX, CUT};
use crate::protocol::Measurement;

/// Longer than any frame or acceptor state.
fn essay() -> String {
    "é".repeat(60_000)
}

/// Most characters of a reason: what was cut, and its mark.
fn longest() -> usize {
    CHARACTERS_MAX + CUT.chars().count()
}

/// Returns three nodes whose rollout asks another system, and waits for an operator.
fn asking() -> Rig {
    let mut rig = Rig::new();
    let stages = [fixtures::manual(500), fixtures::held(10_000, 0)];
    rig.asked("a", 1, OperatorRequest::Apply(fixtures::manifest(&stages, fixtures::by_query())));
    rig
}

impl Rig {
    /// Asks for a promotion, which is refused for reasons that are cut, and that every acceptor state can hold.
    fn assert_refused_in_short(&mut self) {
        let Outcome::Aborted { reasons, .. } =
            self.asked("a", 2, OperatorRequest::Promote { service: service(), full: false })
        else {
            panic!("{:?}", self.replies[&2]);
        };
        assert!(!reasons.is_empty() && reasons.iter().any(|why| why.contains("ééé")), "{reasons:?}");
        for why in reasons {
            assert!(why.chars().count() <= longest(), "{why}");
        }
        for acceptor in self.acceptors.values() {
            assert!(codec::encode(acceptor).len() < 32 * 1024);
        }
    }
}

#[test]
fn a_query_that_is_answered_with_an_essay_refuses_a_promotion_in_short() {
    let mut rig = asking();
    for name in ["a", "b", "c"].map(node) {
        let value = Err(NoValue::new(essay()));
        let measurement = Measurement { service: service(), routing_version: 1, name: "failing".into(), value };
        rig.handle(&name, Input::Measured(measurement));
    }
    rig.assert_refused_in_short();
}

#[test]
fn a_store_that_is_unavailable_for_an_essay_refuses_a_promotion_in_short() {
    let mut rig = asking();
    for name in ["a", "b", "c"].map(node) {
        rig.handle(&name, Input::Guarded(Some(essay())));
    }
    rig.assert_refused_in_short();
}

#[test]
fn a_peer_that_refuses_with_an_essay_is_recorded_in_short() {
    let mut rig = asking();
    rig.ask("a", 2, OperatorRequest::Promote { service: service(), full: false });
    let (from, _, prepare) =
        rig.wire.iter().find(|(.., message)| matches!(message, Message::Prepare(_))).cloned().unwrap();
    let Message::Prepare(prepare) = prepare else { unreachable!() };
    let refusals =
        [Answer::Gate { accepted: None, gate: GateVote::No(essay()) }, Answer::Refuse(Refusal::BadProposal(essay()))];
    for (peer, answer) in [node("b"), node("c")].into_iter().zip(refusals) {
        let vote = Vote { ballot: prepare.ballot.clone(), slot: prepare.slot, head: Slot(1), writes: 1, answer };
        let message = Box::new(Message::Vote(vote));
        rig.handle(&from, Input::Received { from: peer, incarnation: Incarnation(1), message });
    }
    rig.settle();
    rig.run_for(1_600);
    rig.assert_refused_in_short();
}

#[test]
fn a_circuit_breaker_or_a_peer_that_stops_a_canary_for_an_essay_rolls_back_in_short() {
    let holds = |rig: &mut Rig, by_peer: bool| match by_peer {
        false => {
            let tripped = Input::CircuitBreakerTripped { service: service(), routing_version: 1, reason: essay() };
            rig.handle(&node("a"), tripped);
        }
        true => {
            let snapshot = HealthSnapshot { local_hold: Some(essay()), ..rig.cores[&node("b")].snapshot(&service()) };
            let message = Box::new(Message::HealthSnapshot(snapshot));
            rig.handle(&node("a"), Input::Received { from: node("b"), incarnation: Incarnation(1), message });
        }
    };
    for by_peer in [false, true] {
        let mut rig = asking();
        holds(&mut rig, by_peer);
        rig.settle();
        rig.run_for(1_000);
        let last = rig.decided.values().last().unwrap();
        let why = last.intent.operation.reasons().join("");
        assert!(why.contains("ééé") && why.chars().count() <= longest() + 30, "{why}");
    }
}
