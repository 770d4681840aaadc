//! A rollout never moves stable's traffic: what serves stable is what the first rollout named, or what a completed one made of
//! its canary.

use super::*;
use crate::domain::plan::{Backend, HealthCheck};
use crate::domain::rollout::{Change, Phase};
use crate::protocol::feature::Feature;
use crate::protocol::record::Certificate;

fn at(version: &str, urls: &[&str]) -> Backend {
    Backend::new(crate::domain::ids::VersionId::new(version).unwrap(), urls.iter().map(ToString::to_string).collect())
}

const ONE: [&str; 1] = ["http://127.0.0.1:1"];
const TWO: [&str; 2] = ["http://127.0.0.1:2", "http://127.0.0.1:3"];

/// Returns a rollout of service `s` with these versions, in a manual step and a last one.
fn between(stable: Backend, canary: Backend) -> Arc<Manifest> {
    let stages = vec![fixtures::manual(500), fixtures::held(10_000, 0)];
    let spec = RolloutSpec { bake_ms: 3_600_000, ..RolloutSpec::new(service(), stable, canary, stages) };
    Arc::new(spec.checked().unwrap())
}

fn apply(rig: &mut Rig, number: u64, stable: Backend, canary: Backend) -> Outcome {
    rig.asked("b", number, OperatorRequest::Apply(between(stable, canary)))
}

/// Returns what every node serves stable by.
fn serving(rig: &Rig) -> Backend {
    let mut served = rig.cores.values().map(|core| core.view().services[&service()].serving.stable.clone());
    let first = served.next().unwrap();
    assert!(served.all(|other| other == first), "all nodes serve the same stable");
    first
}

/// Every way in which a file's stable can differ from what serves.
fn elsewhere() -> Vec<Backend> {
    let probed = |path: &str| Backend {
        health_check: Some(HealthCheck { path: path.into(), interval_ms: 5_000 }),
        ..at("v1", &TWO)
    };
    vec![
        at("v1", &["http://127.0.0.1:9"]),
        at("v1", &TWO[..1]),
        at("v1", &[TWO[0], TWO[1], "http://127.0.0.1:4"]),
        at("v1", &["h2c://127.0.0.1:2", TWO[1]]),
        at("v1", &[]),
        probed("/ok"),
    ]
}

#[test]
fn a_file_whose_stable_is_elsewhere_is_refused_with_both_addresses_and_nothing_moves() {
    let mut rig = Rig::new();
    assert!(matches!(apply(&mut rig, 1, at("v1", &TWO), at("v2", &ONE)), Outcome::Committed { .. }));
    rig.asked("a", 2, rig.abort());
    for (i, stable) in elsewhere().into_iter().enumerate() {
        let words = stable.servers();
        let outcome = apply(&mut rig, 10 + i as u64, stable, at("v3", &ONE));
        let Outcome::Refused(why) = &outcome else { panic!("{words}: {outcome:?}") };
        assert!(why.contains(&words) && why.contains(&TWO.join(", ")), "{why}");
        assert_eq!(serving(&rig), at("v1", &TWO));
    }
    let outcome = apply(&mut rig, 30, at("v1", &[TWO[1], TWO[0]]), at("v3", &ONE));
    assert!(matches!(outcome, Outcome::Committed { .. }), "the order of servers means nothing: {outcome:?}");
    assert_eq!(serving(&rig), at("v1", &TWO), "and what serves stays as it was, to the letter");
}

/// A way back, and its name.
type Way = (&'static str, fn(&mut Rig));

#[test]
fn every_way_back_leads_to_what_served_before() {
    let ways: [Way; 4] = [
        ("abort", |rig| drop(rig.asked("b", 3, rig.abort()))),
        ("undo", |rig| drop(rig.asked("b", 3, OperatorRequest::Undo { service: service() }))),
        ("a tripped circuit breaker", |rig| {
            let routing_version = rig.cores[&node("b")].view().services[&service()].serving.routing_version;
            let reason = "failed".into();
            rig.handle(&node("b"), Input::CircuitBreakerTripped { service: service(), routing_version, reason });
            rig.run_for(1_000);
        }),
        ("an abort after a failover", |rig| {
            rig.kill("a");
            rig.run_for(3_000);
            let outcome = rig.asked("b", 3, rig.abort());
            assert!(matches!(outcome, Outcome::Committed { .. }), "{outcome:?}");
        }),
    ];
    for (name, way) in ways {
        let mut rig = Rig::new();
        apply(&mut rig, 1, at("v1", &TWO), at("v2", &ONE));
        rig.asked("a", 2, rig.abort());
        apply(&mut rig, 4, at("v1", &[TWO[1], TWO[0]]), at("v3", &ONE));
        assert_eq!(rig.canary_bp("b"), 500, "{name}");
        way(&mut rig);
        assert_eq!((rig.canary_bp("b"), serving(&rig)), (0, at("v1", &TWO)), "{name}");
    }
}

/// Returns what a request for other servers of stable comes to.
fn move_to(rig: &mut Rig, tx: u64, urls: &[&str]) -> Outcome {
    let urls = urls.iter().map(ToString::to_string).collect();
    rig.asked("b", tx, OperatorRequest::SetServers { service: service(), urls })
}

#[test]
fn stable_moves_without_a_canary_and_back() {
    let mut rig = Rig::new();
    let spec = || OperatorRequest::Apply(between(at("v1", &TWO), at("v2", &ONE)));
    rig.asked("a", 1, spec());
    let Outcome::Refused(why) = move_to(&mut rig, 2, &ONE) else { panic!("a rollout is under way") };
    assert!(why.contains("expected none in progress: abort it first"), "{why}");
    rig.asked("a", 3, rig.abort());
    for (tx, wrong) in [(20, &[][..]), (21, &["http://x"]), (22, &["http://x:1/path"])] {
        let outcome = move_to(&mut rig, tx, wrong);
        assert!(matches!(outcome, Outcome::Refused(_)), "{wrong:?}: {outcome:?}");
    }
    assert_eq!(serving(&rig), at("v1", &TWO));
    let version = rig.cores[&node("c")].view().services[&service()].service.routing.version;
    assert!(matches!(move_to(&mut rig, 5, &ONE), Outcome::Committed { .. }));
    assert!(matches!(move_to(&mut rig, 6, &ONE), Outcome::Unchanged { rolled_back: false, .. }));
    let uses = rig.cores[&node("c")].view().uses.clone();
    assert_eq!(uses, [Feature::DefaultService, Feature::StableServers], "no way back to a build that can't read it");
    let service = rig.cores[&node("c")].view().services[&service()].service.clone();
    assert_eq!((service.stable, service.routing.version), (at("v1", &ONE), version + 1));
    // What a loop gets that applies the same file again and again: what it got before.
    let outcome = rig.asked("a", 7, spec());
    assert!(matches!(outcome, Outcome::Unchanged { rolled_back: true, .. }), "{outcome:?}");
    // A rollout of another file needs the new address, and falls back to it.
    assert!(matches!(apply(&mut rig, 8, at("v1", &TWO), at("v3", &ONE)), Outcome::Refused(_)));
    assert!(matches!(apply(&mut rig, 9, at("v1", &ONE), at("v3", &TWO)), Outcome::Committed { .. }));
    rig.asked("a", 10, rig.abort());
    assert_eq!(serving(&rig), at("v1", &ONE));
    assert!(matches!(move_to(&mut rig, 11, &TWO), Outcome::Committed { .. }), "and back");
    assert_eq!(serving(&rig), at("v1", &TWO));
}

#[test]
fn undo_now_goes_back_after_completion_in_one_transaction() {
    let mut rig = Rig::new();
    apply(&mut rig, 1, at("v1", &TWO), at("v2", &ONE));
    rig.asked("a", 2, OperatorRequest::Promote { service: service(), full: true });
    rig.asked("a", 3, OperatorRequest::Promote { service: service(), full: true });
    assert_eq!((rig.canary_bp("b"), serving(&rig)), (0, at("v2", &ONE)), "completed");
    let outcome = rig.asked("b", 4, OperatorRequest::UndoNow { service: service() });
    assert!(matches!(outcome, Outcome::Committed { .. }), "{outcome:?}");
    let view = &rig.cores[&node("b")].view().services[&service()].service;
    assert_eq!((view.rollout.phase, rig.canary_bp("b")), (Phase::Baking, 10_000));
    assert_eq!(view.rollout.spec.canary, at("v1", &TWO), "on the servers that it had");
    // Once more, while it bakes: an abort, as undo is.
    rig.asked("b", 5, OperatorRequest::UndoNow { service: service() });
    assert_eq!((rig.canary_bp("b"), serving(&rig)), (0, at("v2", &ONE)));
}

#[test]
fn undo_now_needs_every_nodes_yes() {
    let mut rig = Rig::new();
    apply(&mut rig, 1, at("v1", &TWO), at("v2", &ONE));
    rig.asked("a", 2, OperatorRequest::Promote { service: service(), full: true });
    rig.asked("a", 3, OperatorRequest::Promote { service: service(), full: true });
    rig.kill("c");
    rig.run_for(3_000);
    let outcome = rig.asked("a", 4, OperatorRequest::UndoNow { service: service() });
    assert!(matches!(outcome, Outcome::Aborted { .. }), "{outcome:?}");
    assert_eq!((rig.canary_bp("a"), serving(&rig)), (0, at("v2", &ONE)));
}

#[test]
fn a_reverted_start_leaves_what_served_before() {
    let mut rig = Rig::new();
    apply(&mut rig, 1, at("v1", &TWO), at("v2", &ONE));
    rig.asked("a", 2, rig.abort());
    rig.ask("a", 3, OperatorRequest::Apply(between(at("v1", &[TWO[1], TWO[0]]), at("v3", &ONE))));
    (0..4).for_each(|_| rig.deliver(0));
    // The proposal reaches b alone; then a is gone: the start is completed in doubt, and reverted.
    rig.wire.retain(|(_, to, _)| *to == node("b"));
    rig.deliver(0);
    rig.kill("a");
    rig.wire.clear();
    rig.run_for(6_000);
    let reverted = rig.decided.values().any(|record| record.intent.operation.name() == "Revert");
    assert!(reverted, "{:?}", rig.decided.values().map(|record| record.intent.operation.name()).collect::<Vec<_>>());
    assert_eq!((rig.canary_bp("b"), serving(&rig)), (0, at("v1", &TWO)));
}

/// A build that doesn't know the rule coordinates: its proposal gets no Yes and no acceptance here, but what such builds
/// decided before is taken in as they decided it.
#[test]
fn a_proposal_that_moves_stable_is_refused_by_voters_and_taken_in_once_it_is_chosen() {
    let mut rig = Rig::new();
    apply(&mut rig, 1, at("v1", &TWO), at("v2", &ONE));
    rig.asked("a", 2, rig.abort());
    let mut ledger = Ledger::new(&rig.logs[&node("a")][0]).unwrap();
    rig.logs[&node("a")][1..].iter().for_each(|chosen| ledger.apply(chosen).unwrap());
    let moved = between(at("v1", &ONE), at("v3", &ONE));
    let start = |spec: &Arc<Manifest>| Intent {
        initiator: Initiator::Client,
        tx: TxId::new("moved").unwrap(),
        actor: "alice".into(),
        digest: 0,
        at: Wall(0),
        operation: Operation::Change(service(), Change::Start(spec.clone())),
    };
    let complaint = ledger.next_record(start(&moved), None).unwrap_err();
    let ballot = Ballot { round: 1, node: node("a"), incarnation: Incarnation(1), boot: 1 };
    let yes = ["a", "b", "c"].map(|name| (node(name), "healthy".to_string())).into();
    let same = between(at("v1", &TWO), at("v3", &ONE));
    let mut record = ledger.next_record(start(&same), None).unwrap();
    record.certificate = Some(Certificate { ballot: ballot.clone(), yes });
    record.intent = start(&moved);
    assert_eq!(ledger.check_proposal(&record), Err(complaint));
    ledger.apply(&Chosen { ballot: Some(ballot), decided_at: Wall(0), record }).unwrap();
    assert_eq!(ledger.services[&service()].service.stable, at("v1", &ONE));
}
