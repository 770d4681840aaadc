//! What a client calls its transactions is nothing to the cluster's own.

use super::*;
use crate::domain::rollout::Phase;
use crate::protocol::record::Initiator;

#[test]
fn a_clients_id_that_looks_like_a_nodes_own_does_not_delay_an_automatic_rollback() {
    let mut rig = Rig::new();
    rig.asked("a", 1, OperatorRequest::Apply(spec()));
    let incarnation = rig.cores[&node("a")].view().incarnation.0 & 0xffff;
    for number in 1..=200 {
        let asked = match number % 2 {
            1 => OperatorRequest::Pause { service: service(), reason: "squatted".into() },
            _ => OperatorRequest::Resume { service: service() },
        };
        let tx = TxId::new(format!("auto-a-{incarnation:04x}-1-{number}")).unwrap();
        rig.handle(
            &node("a"),
            Input::Operator(Command { request: RequestId(number + 100), tx, actor: "alice".into(), asked }),
        );
        rig.settle();
    }
    let committed = |outcome: &&Outcome| matches!(outcome, Outcome::Committed { .. });
    assert_eq!(rig.replies.values().filter(committed).count(), 201);

    let routing_version = rig.cores[&node("a")].view().services[&service()].service.routing.version;
    let reason = "five failures in a row".to_string();
    rig.handle(&node("a"), Input::CircuitBreakerTripped { service: service(), routing_version, reason });
    rig.run_for(1_000);

    let phase = rig.cores[&node("b")].view().services[&service()].service.rollout.phase;
    assert_eq!(phase, Phase::RolledBack);
    let last = rig.decided.values().rev().find(|record| record.intent.operation.name() == "Rollback").unwrap();
    assert_eq!(last.intent.initiator, Initiator::Node, "counted as a verdict");
    let squatted = rig.decided.values().filter(|record| record.intent.tx.as_str().starts_with("auto-"));
    assert_eq!(squatted.filter(|record| record.intent.initiator == Initiator::Client).count(), 200);
}

#[test]
fn a_refused_promotion_leaves_the_rollouts_own_status_as_it_was() {
    let mut rig = Rig::new();
    rig.asked("a", 1, OperatorRequest::Apply(spec()));
    rig.kill("c");
    let outcome = rig.asked("a", 2, OperatorRequest::Promote { service: service(), full: true });
    assert!(matches!(outcome, Outcome::Aborted { .. }), "{outcome:?}");
    let routing = rig.cores[&node("a")].view().services[&service()].service.routing.clone();
    assert_eq!((routing.status.to_string().as_str(), routing.txid.as_str()), ("COMMITTED", "t1"));
    let refused = rig.decided.values().last().unwrap();
    let told = refused.state.as_ref().unwrap();
    assert_eq!(refused.intent.operation.name(), "Refused");
    assert_eq!((told.status.to_string().as_str(), told.txid.as_str()), ("ABORTED", "t2"));
}
