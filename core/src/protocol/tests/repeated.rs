//! The same key gets the same answer; and many reads cost as little as one.

use super::*;

#[test]
fn a_late_duplicate_of_an_abort_that_changed_nothing_does_not_roll_back_a_later_rollout() {
    let mut rig = Rig::new();
    rig.asked("a", 1, OperatorRequest::Apply(spec()));
    let abort = rig.abort();
    rig.asked("a", 2, abort.clone());
    let first = rig.asked("a", 3, abort.clone());
    assert!(matches!(first, Outcome::Unchanged { .. }), "{first:?}");
    let retried = rig.asked("a", 4, OperatorRequest::Retry { service: service() });
    assert!(matches!(retried, Outcome::Committed { .. }), "{retried:?}");
    assert_eq!(rig.asked("a", 3, abort), first, "with the state of then");
    assert!(rig.canary_bp("a") > 0, "the rollout goes on");
    let other = rig.asked("a", 3, OperatorRequest::Resume { service: service() });
    assert!(matches!(other, Outcome::KeyReused { .. }), "{other:?}");
}

#[test]
fn a_refusal_stays_one_when_it_would_be_possible_by_now() {
    let mut rig = Rig::new();
    let promote = || OperatorRequest::Promote { service: service(), full: true };
    let first = rig.asked("a", 1, promote());
    assert!(matches!(first, Outcome::Refused(_)), "{first:?}");
    rig.asked("a", 2, OperatorRequest::Apply(spec()));
    assert_eq!(rig.asked("a", 1, promote()), first);
}

#[test]
fn answers_without_a_record_are_bounded() {
    let mut rig = Rig::new();
    let promote = || OperatorRequest::Promote { service: service(), full: true };
    rig.ask("a", 1, promote());
    (2..1_100).for_each(|number| rig.ask("a", number, promote()));
    rig.asked("a", 2_000, OperatorRequest::Apply(spec()));
    let forgotten = rig.asked("a", 1, promote());
    assert!(matches!(forgotten, Outcome::Committed { .. }), "it is a request like any other: {forgotten:?}");
    assert!(matches!(rig.asked("a", 1_099, promote()), Outcome::Refused(_)));
}

#[test]
fn one_heartbeat_asks_for_all_reads_that_wait() {
    let mut rig = Rig::new();
    rig.asked("a", 1, OperatorRequest::Apply(spec()));
    rig.wire.clear();
    for number in 1_000..1_500 {
        rig.handle(&node("a"), Input::Read(RequestId(number)));
    }
    let questions = |rig: &Rig| {
        let asks = |message: &Message| matches!(message, Message::Heartbeat(heartbeat) if heartbeat.nonce.is_some());
        rig.wire.iter().filter(|(from, _, message)| *from == node("a") && asks(message)).count()
    };
    assert_eq!(questions(&rig), 2, "one to each peer");
    // The answers to the first one's heartbeat were asked before the others came: they need one of their own.
    let mut most = 0;
    while !rig.wire.is_empty() {
        most = most.max(questions(&rig));
        rig.deliver(0);
    }
    assert!(most <= 2, "{most} questions at once");
    let current = |number: &u64| rig.replies.get(number) == Some(&Outcome::Current(Slot(1)));
    assert_eq!((1_000..1_500).filter(current).count(), 500);
}
