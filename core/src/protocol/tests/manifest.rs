//! A rollout with a key that a node's build doesn't know: never half obeyed.

use super::*;
use crate::domain::rollout::Change;
use crate::protocol::view::Hold;

/// A rollout as a later build would write it.
fn of_a_later_build() -> Arc<Manifest> {
    let mut value = spec().value();
    value["spec"]["routing"]["salt"] = "x".into();
    let json = value.to_string();
    let digest = *blake3::hash(json.as_bytes()).as_bytes();
    Arc::new(codec::decode(&codec::encode(&(1u16, json, digest))).unwrap())
}

#[test]
fn a_node_that_does_not_know_a_key_refuses_its_vote_and_names_it() {
    let mut rig = Rig::new();
    let outcome = rig.asked("a", 1, OperatorRequest::Apply(of_a_later_build()));
    let Outcome::Aborted { reasons, .. } = outcome else { panic!("{outcome:?}") };
    let own = format!("build {} doesn't know spec.routing.salt", env!("CARGO_PKG_VERSION"));
    // A majority's No is enough; a later answer isn't waited for.
    let named = |name: &str| reasons.iter().any(|why| why.starts_with(&format!("{name}: no: ")) && why.contains(&own));
    assert!(named("a") && named("b"), "{reasons:?}");
}

#[test]
fn a_node_that_learns_of_an_unknown_key_serves_stable_and_says_why() {
    let mut rig = Rig::new();
    rig.asked("a", 1, OperatorRequest::Apply(spec()));
    assert_eq!(rig.canary_bp("b"), 500);
    // As if the others were of the later build: what they chose is taken in as it is.
    let started = rig.logs[&node("b")].iter().find(|chosen| chosen.record.slot == Slot(1)).unwrap().clone();
    let mut record = started.record.clone();
    record.intent.operation = Operation::Change(service(), Change::Start(of_a_later_build()));
    rig.logs.insert(node("b"), vec![genesis(), Chosen { record, ..started }]);
    let acceptor = rig.acceptors.get_mut(&node("b")).unwrap();
    (acceptor.head, acceptor.head_hash, acceptor.accepted) = (Slot(0), genesis().record.hash(), None);
    rig.kill("b");
    rig.restart(&node("b"));
    let serving = rig.cores[&node("b")].view().services[&service()].serving.clone();
    let Some(Hold::UnknownKey(why)) = serving.held_back else { panic!("{:?}", serving.held_back) };
    assert_eq!((why.0.as_str(), serving.canary.unwrap().1), ("spec.routing.salt", 0));
    let kept = &rig.logs[&node("b")][1];
    assert_eq!(codec::decode::<Chosen>(&codec::encode(kept)).unwrap(), *kept, "handed on as it came");
}
