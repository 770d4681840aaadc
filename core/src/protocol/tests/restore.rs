//! What a cluster begins with that is restored from a backup of another one.

use super::*;
use crate::domain::rollout::Phase;

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
