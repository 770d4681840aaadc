//! The default service, and what a node of an older build may not be told.

use super::*;
use crate::protocol::feature::{Feature, PROTOCOL};
use crate::protocol::log::checkpoint::CheckpointError;

fn id(name: &str) -> ServiceId {
    ServiceId::new(name).unwrap()
}

/// A rollout like the one that other tests begin, of another service.
fn rollout_of(name: &str) -> OperatorRequest {
    let mut value = spec().value();
    value["metadata"]["name"] = name.into();
    let json = value.to_string();
    let digest = *blake3::hash(json.as_bytes()).as_bytes();
    OperatorRequest::Apply(Arc::new(codec::decode(&codec::encode(&(1u16, json, digest))).unwrap()))
}

fn default_of(rig: &Rig, name: &str) -> Option<String> {
    rig.cores[&node(name)].view().default_service.as_ref().map(ToString::to_string)
}

fn kinds(rig: &Rig) -> Vec<&'static str> {
    rig.logs[&node("b")].iter().map(|chosen| chosen.record.intent.operation.name()).collect()
}

#[test]
fn a_service_that_comes_first_by_name_does_not_take_the_requests_that_name_none() {
    let mut rig = Rig::new();
    rig.asked("a", 1, rollout_of("shop"));
    assert_eq!(default_of(&rig, "b").as_deref(), Some("shop"));
    assert!(matches!(rig.asked("a", 2, rollout_of("zoo")), Outcome::Committed { slot: Slot(2), .. }));
    let outcome = rig.asked("b", 3, rollout_of("fraud-model"));
    assert!(matches!(outcome, Outcome::Committed { slot: Slot(4), .. }), "{outcome:?}");
    assert_eq!(kinds(&rig), ["Genesis", "Start", "Start", "SetDefault", "Start"]);
    for name in ["a", "b", "c"] {
        assert_eq!(default_of(&rig, name).as_deref(), Some("shop"), "at {name}");
    }
    // What is set once stays until somebody says otherwise.
    rig.asked("a", 4, rollout_of("alpha"));
    assert_eq!((default_of(&rig, "c").as_deref(), kinds(&rig).len()), (Some("shop"), 6));
    let set = |name: &str| OperatorRequest::SetDefault { service: id(name) };
    assert!(matches!(rig.asked("a", 5, set("fraud-model")), Outcome::Committed { state: None, .. }));
    assert_eq!(default_of(&rig, "c").as_deref(), Some("fraud-model"));
    assert!(matches!(rig.asked("a", 6, set("fraud-model")), Outcome::Unchanged { .. }));
    let unknown = rig.asked("a", 7, set("nobody"));
    assert!(matches!(&unknown, Outcome::Refused(why) if why.contains("nobody")), "{unknown:?}");
    rig.check();
}

#[test]
fn a_record_that_an_older_build_can_not_read_waits_for_its_upgrade() {
    let mut rig = Rig::new();
    rig.asked("a", 1, rollout_of("shop"));
    rig.speaks.insert(node("c"), PROTOCOL - 1);
    rig.restart(&node("c"));
    rig.run_for(600);
    let waits = Outcome::NotReady { feature: Feature::DefaultService, waits_for: vec![node("c")] };
    assert_eq!(rig.asked("a", 2, OperatorRequest::SetDefault { service: id("shop") }), waits);
    // So does a rollout that would need such a record before it; others don't.
    assert_eq!(rig.asked("b", 3, rollout_of("fraud-model")), waits);
    assert!(matches!(rig.asked("a", 4, rollout_of("zoo")), Outcome::Committed { .. }));
    assert_eq!(kinds(&rig), ["Genesis", "Start", "Start"]);
    rig.speaks.clear();
    rig.restart(&node("c"));
    rig.run_for(600);
    assert!(matches!(rig.asked("b", 5, rollout_of("fraud-model")), Outcome::Committed { .. }));
    assert_eq!(rig.cores[&node("c")].view().uses, [Feature::DefaultService]);
}

#[test]
fn a_member_that_said_nothing_yet_is_waited_for() {
    let mut rig = Rig::new();
    rig.asked("a", 1, rollout_of("shop"));
    rig.kill("c");
    ["a", "b"].map(node).iter().for_each(|name| rig.restart(name));
    rig.run_for(2_000);
    let outcome = rig.asked("a", 2, OperatorRequest::SetDefault { service: id("shop") });
    assert_eq!(outcome, Outcome::NotReady { feature: Feature::DefaultService, waits_for: vec![node("c")] });
}

#[test]
fn a_node_that_can_not_read_the_log_does_not_become_a_member() {
    let mut rig = Rig::new();
    rig.asked("a", 1, rollout_of("shop"));
    rig.asked("a", 2, OperatorRequest::SetDefault { service: id("shop") });
    rig.others = BTreeSet::from(["a", "b", "c", "d"].map(node));
    for name in ["a", "b", "c"].map(node) {
        rig.restart(&name);
        rig.run_for(600);
    }
    rig.speaks.insert(node("d"), PROTOCOL - 1);
    rig.found(&node("d"));
    rig.run_for(600);
    let add = |rig: &mut Rig, number| {
        rig.asked("a", number, OperatorRequest::Config(ConfigChange::Add(node("d"), Incarnation(1))))
    };
    let Outcome::Refused(why) = add(&mut rig, 3) else { panic!("a member that can't read the log") };
    assert_eq!(why, "node d speaks protocol 8, expected 9 or newer, which the log needs: upgrade it first");
    assert!(rig.cores[&node("a")].view().outsiders.contains_key(&node("d")));
    rig.speaks.clear();
    rig.restart(&node("d"));
    rig.run_for(600);
    assert!(matches!(add(&mut rig, 4), Outcome::Committed { .. }));
    assert!(rig.cores[&node("a")].view().outsiders.is_empty());
}

#[test]
fn a_checkpoint_has_the_oldest_format_that_can_say_it() {
    let mut rig = Rig::new();
    rig.asked("a", 1, rollout_of("shop"));
    let sum = |rig: &Rig| {
        let mut ledger = Ledger::new(&genesis()).unwrap();
        rig.logs[&node("a")][1..].iter().for_each(|chosen| ledger.apply(chosen).unwrap());
        ledger
    };
    let before = Checkpoint::of(&sum(&rig)).unwrap();
    rig.asked("a", 2, OperatorRequest::SetDefault { service: id("shop") });
    let after = Checkpoint::of(&sum(&rig)).unwrap();
    assert_eq!((before.format, after.format), (3, 4));
    assert!(!before.ledger().unwrap().is_default_set());
    assert_eq!(after.ledger().unwrap(), sum(&rig));
    let cut = Checkpoint { format: 3, ..after.clone() };
    assert!(matches!(cut.ledger(), Err(CheckpointError::Decode(_))), "what is behind a ledger of format 3");
    let later = Checkpoint { format: 5, ..after }.ledger().unwrap_err().to_string();
    assert_eq!(later, "the ledger has format 5, expected 3 or 4");
}
