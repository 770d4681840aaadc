//! Who extends whose lease, and when a decrease is told as enforced.

use super::*;

fn to(name: &str, to: &NodeId, message: &Message) -> bool {
    to.as_str() == name && matches!(message, Message::Decision(_))
}

#[test]
fn a_lease_is_granted_only_by_nodes_that_know_the_same_members() {
    let mut rig = Rig::new();
    rig.asked("a", 1, OperatorRequest::Apply(spec()));
    rig.others = BTreeSet::from(["a", "b", "c", "d", "e"].map(node));
    for name in ["a", "b", "c"].map(node) {
        rig.restart(&name);
        rig.run_for(600);
    }
    ["d", "e"].map(node).iter().for_each(|name| rig.found(name));
    rig.run_for(600);
    assert!(rig.canary_bp("a") > 0 && rig.is_leased("a"));
    // No decision reaches a any more, but heartbeats do.
    rig.loses = |_, receiver, message| to("a", receiver, message);
    for (number, name) in [(2, "d"), (3, "e")] {
        let add = OperatorRequest::Config(ConfigChange::Add(node(name), Incarnation(1)));
        let outcome = rig.asked("b", number, add);
        assert!(matches!(outcome, Outcome::Committed { .. }), "{outcome:?}");
    }
    // c, d and e decide the rollback; b knows the members, but neither votes nor hears of it.
    rig.loses = |_, receiver, message| to("a", receiver, message) || to("b", receiver, message);
    let abort = rig.abort();
    let outcome = rig.asked("c", 4, abort);
    assert!(matches!(outcome, Outcome::Committed { .. }), "{outcome:?}");
    rig.run_for(2_100);
    assert_eq!(rig.cores[&node("a")].view().head, Slot(1), "a knows of three members only");
    assert!(!rig.is_leased("a"), "a majority of three members need not meet the one of five that decided");
}

#[test]
fn a_restart_does_not_make_a_decrease_enforced() {
    let mut rig = Rig::new();
    rig.asked("a", 1, OperatorRequest::Apply(spec()));
    rig.run_for(2_000);
    rig.loses = |_, receiver, _| receiver.as_str() == "c";
    let abort = rig.abort();
    rig.ask("a", 2, abort);
    rig.settle();
    rig.run_for(100);
    let enforced = |rig: &Rig, name: &str| rig.cores[&node(name)].view().services[&service()].enforced;
    assert!(matches!(rig.replies[&2], Outcome::Committed { .. }) && !enforced(&rig, "a") && rig.is_leased("c"));
    rig.restart(&node("a"));
    rig.run_for(100);
    assert!(!enforced(&rig, "a"), "c may still serve the canary");
    rig.run_for(2_000);
    assert!(enforced(&rig, "a") && !rig.is_leased("c"));
}

#[test]
fn where_no_lease_ends_the_canary_only_nodes_that_know_of_a_decrease_obey_it() {
    let mut rig = Rig::new();
    let mut spec = (**spec()).clone();
    spec.on_partition = crate::domain::plan::OnPartition::Hold;
    rig.asked("a", 1, OperatorRequest::Apply(Arc::new(spec.checked().unwrap())));
    rig.loses = |_, receiver, _| receiver.as_str() == "c";
    let abort = rig.abort();
    rig.asked("a", 2, abort);
    rig.run_for(5_000);
    let enforced = |rig: &Rig| rig.cores[&node("a")].view().services[&service()].enforced;
    assert!(rig.canary_bp("c") > 0 && !enforced(&rig), "c holds the weight that it knows");
    rig.loses = |_, _, _| false;
    rig.run_for(1_000);
    assert!(rig.canary_bp("c") == 0 && enforced(&rig));
}
