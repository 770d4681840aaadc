//! What a cluster begins with that is restored from a backup of another one.

use super::*;
use crate::domain::rollout::Phase;
use crate::protocol::message::Membership;

#[test]
fn a_restored_cluster_has_the_services_on_stable_and_no_outcomes() {
    let mut rig = Rig::new();
    rig.asked("a", 1, OperatorRequest::Apply(spec()));
    let log = &rig.logs[&node("a")];
    let mut ledger = Ledger::new(&log[0]).unwrap();
    log[1..].iter().for_each(|chosen| ledger.apply(chosen).unwrap());
    let before = ledger.services[&service()].service.clone();
    assert!(before.routing.canary_model_id.is_some() && !ledger.settled.is_empty());

    let member = |name| (node(name), Member { incarnation: Incarnation(5), cordoned: false });
    let (cluster, members) = (ClusterId([8; 16]), Members(["a", "b", "c"].map(member).into()));
    let restored = ledger.restored(cluster, members.clone(), Wall(9), "backup of x").unwrap();
    assert_eq!((restored.cluster, &restored.members), (cluster, &members));
    let service = &restored.services[&service()].service;
    assert_eq!((&service.stable, &service.routing.canary_model_id), (&before.stable, &None));
    assert!(service.routing.version > before.routing.version, "versions go on");
    assert_eq!(
        (service.rollout.phase, service.rollout.reason.as_str()),
        (Phase::RolledBack, "restored from backup of x")
    );
    assert!(restored.settled.is_empty(), "a key of the old cluster is a new one");
    assert_eq!(Checkpoint::of(&restored).unwrap().ledger().unwrap(), restored);
}

#[test]
fn a_node_on_an_old_copy_of_its_disk_has_no_vote_until_it_is_readmitted() {
    let mut rig = Rig::new();
    // A copy that is made while the node runs: the start that follows it has a number that no other start had.
    let old = rig.acceptors[&node("c")].clone();
    rig.asked("a", 1, OperatorRequest::Apply(spec()));
    rig.run_for(600);
    assert_ne!(rig.acceptors[&node("c")].promised, old.promised, "the copy lacks a promise");
    // What a and b heard of c's disk is durable with their next write, so that they may restart, too.
    let pause = OperatorRequest::Pause { service: service(), reason: "test".into() };
    assert!(matches!(rig.asked("a", 2, pause), Outcome::Committed { .. }));
    rig.acceptors.insert(node("c"), old);
    rig.restart(&node("a"));
    rig.restart(&node("b"));
    rig.restart(&node("c"));
    rig.settle();
    assert_eq!(rig.cores[&node("c")].view().incarnation, Incarnation(9), "it takes a fresh incarnation");
    rig.incarnations.insert(node("c"), Incarnation(9));
    rig.run_for(600);
    assert_eq!(rig.cores[&node("c")].view().membership, Membership::Learner);
    let acceptor = &rig.acceptors[&node("c")];
    assert_eq!((acceptor.incarnation, &acceptor.promised, &acceptor.accepted), (Incarnation(9), &None, &None));

    rig.kill("b");
    let outcome = rig.asked("a", 3, rig.abort());
    assert!(matches!(outcome, Outcome::NoQuorum { .. }), "{outcome:?}");
    rig.restart(&node("b"));
    rig.run_for(600);
    let readmit = OperatorRequest::Config(ConfigChange::Readmit(node("c"), Incarnation(9)));
    let outcome = rig.asked("a", 4, readmit);
    assert!(matches!(outcome, Outcome::Committed { .. }), "{outcome:?}");
    rig.kill("b");
    let outcome = rig.asked("a", 5, OperatorRequest::Config(ConfigChange::Cordon(node("b"))));
    assert!(matches!(outcome, Outcome::Committed { .. }), "{outcome:?}");
}

#[test]
fn a_copy_that_lacks_nothing_and_a_restart_keep_the_vote() {
    let mut rig = Rig::new();
    rig.asked("a", 1, OperatorRequest::Apply(spec()));
    for name in ["c", "b", "a", "c"].map(node) {
        rig.restart(&name);
        rig.run_for(600);
        assert_eq!(rig.cores[&name].view().membership, Membership::Voter, "{name}");
    }
}
