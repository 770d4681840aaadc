//! Each rollout begins with users of its own, once every member can tell them.

use super::*;
use crate::domain::assignment::{HashFunction, Salt};
use crate::domain::plan::{Backend, HashOn};
use crate::domain::rollout::Change;
use crate::protocol::feature::{Feature, PROTOCOL};

/// Returns a rollout between two versions whose users are told apart by a header.
fn sticky(stable: &str, canary: &str, change: impl FnOnce(&mut RolloutSpec)) -> OperatorRequest {
    let backend = |name: &str| Backend::new(crate::domain::ids::VersionId::new(name).unwrap(), Vec::new());
    let stages = vec![fixtures::manual(500), fixtures::held(10_000, 0)];
    let mut spec = RolloutSpec {
        hash_on: Some(HashOn::Header("x-user".into())),
        bake_ms: 0,
        ..RolloutSpec::new(service(), backend(stable), backend(canary), stages)
    };
    change(&mut spec);
    OperatorRequest::Apply(Arc::new(spec.checked().unwrap()))
}

/// Returns the salt that the last Start recorded, and its slot.
fn last_start(rig: &Rig) -> (Salt, u64) {
    let mut starts = rig.decided.values().filter_map(|record| match &record.intent.operation {
        Operation::Change(_, Change::Start(spec)) => Some((spec.salt, record.slot.0)),
        _ => None,
    });
    starts.next_back().unwrap()
}

fn committed(rig: &mut Rig, number: u64, asked: OperatorRequest) {
    let outcome = rig.asked("b", number, asked);
    assert!(matches!(outcome, Outcome::Committed { .. }), "{number}: {outcome:?}");
}

/// Makes the canary stable.
fn complete(rig: &mut Rig, number: u64) {
    committed(rig, number, OperatorRequest::Promote { service: service(), full: true });
    rig.run_for(2_000);
    let phase = rig.cores[&node("a")].view().services[&service()].service.rollout.phase;
    if phase.is_active() {
        committed(rig, number + 1, OperatorRequest::Promote { service: service(), full: true });
    }
}

fn old(rig: &mut Rig, name: &str) {
    rig.speaks.insert(node(name), PROTOCOL - 1);
    rig.restart(&node(name));
    rig.run_for(600);
}

#[test]
fn each_start_has_its_own_slot_for_a_salt_and_a_repeated_one_keeps_it() {
    let mut rig = Rig::new();
    committed(&mut rig, 1, sticky("v1", "v2", |_| {}));
    assert_eq!(last_start(&rig), (Salt::Rollout(Some(1)), 1));
    // The file says nothing about it: what the cluster chose is the same rollout.
    for (number, salt) in [(2, Salt::Unsaid), (3, Salt::Rollout(None)), (4, Salt::Rollout(Some(99)))] {
        let again = rig.asked("a", number, sticky("v1", "v2", |spec| spec.salt = salt));
        assert!(matches!(again, Outcome::Unchanged { .. }), "{again:?}");
    }
    let other = rig.asked("a", 5, sticky("v1", "v2", |spec| spec.salt = Salt::None));
    assert!(matches!(other, Outcome::Refused(_)), "other users are another rollout: {other:?}");
    let abort = rig.abort();
    committed(&mut rig, 6, abort);
    committed(&mut rig, 7, OperatorRequest::Retry { service: service() });
    assert_eq!(last_start(&rig), (Salt::Rollout(Some(1)), 3));
    complete(&mut rig, 8);
    committed(&mut rig, 20, OperatorRequest::Undo { service: service() });
    let (salt, slot) = last_start(&rig);
    assert!(slot > 3 && salt == Salt::Rollout(Some(slot)), "the way back is a rollout of its own: {salt:?} in {slot}");
    rig.check();
}

#[test]
fn who_asks_for_none_or_for_envoys_rule_gets_no_salt() {
    let plain: [fn(&mut RolloutSpec); 3] =
        [|spec| spec.salt = Salt::None, |spec| spec.hash_function = HashFunction::Xxh64, |spec| spec.hash_on = None];
    for change in plain {
        let mut rig = Rig::new();
        committed(&mut rig, 1, sticky("v1", "v2", change));
        assert_eq!(last_start(&rig), (Salt::Unsaid, 1));
        let again = rig.asked("a", 2, sticky("v1", "v2", change));
        assert!(matches!(again, Outcome::Unchanged { .. }), "{again:?}");
    }
}

#[test]
fn a_member_that_can_not_tell_the_users_keeps_them_as_they_were() {
    let mut rig = Rig::new();
    old(&mut rig, "c");
    let asked = rig.asked("b", 1, sticky("v1", "v2", |spec| spec.salt = Salt::Rollout(None)));
    let waits = Outcome::NotReady { feature: Feature::RolloutSalt, waits_for: vec![node("c")] };
    assert_eq!(asked, waits, "asked for by name");
    committed(&mut rig, 2, sticky("v1", "v2", |_| {}));
    assert_eq!(last_start(&rig).0, Salt::Unsaid);
    // The rollout goes on as it began, also once every member could.
    rig.speaks.clear();
    rig.restart(&node("c"));
    rig.run_for(600);
    let abort = rig.abort();
    committed(&mut rig, 3, abort);
    committed(&mut rig, 4, OperatorRequest::Retry { service: service() });
    assert_eq!(last_start(&rig).0, Salt::Unsaid);
    complete(&mut rig, 5);
    committed(&mut rig, 20, sticky("v2", "v3", |_| {}));
    assert!(matches!(last_start(&rig).0, Salt::Rollout(Some(_))));
    // A node that went back: nothing that it can't follow begins, and the way back does without.
    complete(&mut rig, 21);
    old(&mut rig, "c");
    committed(&mut rig, 30, OperatorRequest::Undo { service: service() });
    assert_eq!(last_start(&rig).0, Salt::Unsaid);
}

#[test]
fn a_salted_rollout_is_not_tried_again_where_a_member_can_not_follow() {
    let mut rig = Rig::new();
    committed(&mut rig, 1, sticky("v1", "v2", |_| {}));
    let abort = rig.abort();
    committed(&mut rig, 2, abort);
    old(&mut rig, "c");
    let waits = Outcome::NotReady { feature: Feature::RolloutSalt, waits_for: vec![node("c")] };
    assert_eq!(rig.asked("b", 3, OperatorRequest::Retry { service: service() }), waits);
}
