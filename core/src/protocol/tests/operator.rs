//! What operators ask for: one step on, the same again, the file of before.

use super::*;
use crate::domain::plan::Backend;
use crate::domain::rollout::Phase;

/// Returns a rollout in held steps that is inconclusive a second after a step is due.
fn inconclusive() -> Arc<Manifest> {
    let stages = [fixtures::held(500, 0), fixtures::held(2_000, 0), fixtures::held(10_000, 0)];
    let analysis = Analysis { min_samples: 50, inconclusive_after_ms: Some(1_000), ..Analysis::default() };
    fixtures::manifest(&stages, analysis)
}

impl Rig {
    fn phase(&self) -> Phase {
        self.cores[&node("b")].view().services[&service()].service.rollout.phase
    }

    fn fail_canary(&mut self, count: u64) {
        for name in ["a", "b", "c"].map(node) {
            let Some(core) = self.cores.get(&name) else { continue };
            let routing_version = core.view().services[&service()].service.routing.version;
            let mut evidence = Evidence::default();
            (0..count).for_each(|_| evidence.canary.record(1_000, true));
            self.handle(&name, Input::Telemetry(vec![Observation { service: service(), routing_version, evidence }]));
        }
    }

    fn ask_at_once(&mut self, number: u64, asked: OperatorRequest) -> Outcome {
        self.ask("b", number, asked);
        self.settle();
        self.run_for(100);
        self.replies[&number].clone()
    }
}

fn committed(outcome: &Outcome) -> bool {
    matches!(outcome, Outcome::Committed { .. })
}

#[test]
fn a_resumed_step_has_its_time_for_evidence_anew() {
    let mut rig = Rig::new();
    rig.asked("a", 1, OperatorRequest::Apply(inconclusive()));
    rig.run_for(1_000);
    for round in 0..3 {
        assert_eq!(rig.phase(), Phase::Paused, "inconclusive without a sample, round {round}");
        let outcome = rig.ask_at_once(10 + round, OperatorRequest::Resume { service: service() });
        assert!(committed(&outcome), "{outcome:?}");
        rig.run_for(700);
        assert_eq!(rig.phase(), Phase::Progressing, "round {round}");
        // The coordinator of that moment gives it that time.
        if round == 1 {
            rig.kill("a");
            rig.run_for(100);
            assert_eq!(rig.phase(), Phase::Progressing, "a is gone");
            rig.restart(&node("a"));
        }
        rig.run_for(1_500);
    }
    assert_eq!(rig.canary_bp("b"), 500);
}

#[test]
fn a_promotion_that_skips_the_wait_goes_one_step_and_names_its_actor() {
    let mut rig = Rig::new();
    rig.asked("a", 1, OperatorRequest::Apply(inconclusive()));
    rig.run_for(1_000);
    assert_eq!(rig.phase(), Phase::Paused);
    let promote = OperatorRequest::Promote { service: service(), full: false };
    let outcome = rig.ask_at_once(2, promote);
    assert!(matches!(&outcome, Outcome::Aborted { reasons, .. } if reasons[0].contains("0 of 50")), "{outcome:?}");
    let outcome = rig.ask_at_once(3, OperatorRequest::SkipWait { service: service() });
    assert!(committed(&outcome), "{outcome:?}");
    assert_eq!(rig.canary_bp("b"), 2_000, "the next step, and no further");
    let record = rig.decided.values().next_back().unwrap();
    assert_eq!((record.intent.operation.name(), record.intent.actor.as_str()), ("Promote", "alice"));
    let yes = &record.certificate.as_ref().unwrap().yes;
    assert!(
        yes.values().all(|why| why.contains("0 of 50") && why.contains("the operator skipped the wait")),
        "{yes:?}"
    );
}

#[test]
fn a_failing_gate_says_no_to_a_promotion_that_skips_the_wait() {
    let stages = [fixtures::manual(500), fixtures::manual(2_000), fixtures::held(10_000, 0)];
    let mut pause_on_errors = Analysis { min_samples: 50, ..Analysis::default() };
    pause_on_errors.metrics[0].on_failure = crate::domain::verdict::OnFailure::Pause;
    let mut rig = Rig::new();
    rig.asked("a", 1, OperatorRequest::Apply(fixtures::manifest(&stages, pause_on_errors)));
    rig.fail_canary(30);
    rig.run_for(500);
    assert_eq!(rig.phase(), Phase::Paused);
    let outcome = rig.ask_at_once(2, OperatorRequest::SkipWait { service: service() });
    assert!(matches!(&outcome, Outcome::Aborted { reasons, .. } if reasons[0].contains("no: errors")), "{outcome:?}");
    assert_eq!(rig.canary_bp("b"), 500);
}

#[test]
fn what_is_so_already_is_unchanged() {
    let mut rig = Rig::new();
    rig.asked("a", 1, OperatorRequest::Apply(spec()));
    let pause = || OperatorRequest::Pause { service: service(), reason: "lunch".into() };
    let resume = || OperatorRequest::Resume { service: service() };
    let mut number = 10;
    let mut ask = |rig: &mut Rig, asked| {
        number += 1;
        let outcome = rig.ask_at_once(number, asked);
        match outcome {
            Outcome::Committed { .. } => "COMMITTED",
            Outcome::Unchanged { rolled_back: false, .. } => "UNCHANGED 0",
            Outcome::Unchanged { rolled_back: true, .. } => "UNCHANGED 1",
            _ => "other",
        }
    };
    for (asked, expected) in [
        (OperatorRequest::Apply(spec()), "UNCHANGED 0"),
        (resume(), "UNCHANGED 0"),
        (pause(), "COMMITTED"),
        (pause(), "UNCHANGED 0"),
        (OperatorRequest::Apply(spec()), "UNCHANGED 0"),
        (resume(), "COMMITTED"),
        (resume(), "UNCHANGED 0"),
        (rig.abort(), "COMMITTED"),
        (rig.abort(), "UNCHANGED 0"),
        (pause(), "other"),
        (resume(), "other"),
        (OperatorRequest::Apply(spec()), "UNCHANGED 1"),
        (OperatorRequest::Apply(spec()), "UNCHANGED 1"),
        (OperatorRequest::Retry { service: service() }, "COMMITTED"),
    ] {
        let words = format!("{asked:?}");
        assert_eq!(ask(&mut rig, asked), expected, "{words}");
    }
}

#[test]
fn the_file_of_before_aborts_the_rollout_under_way_and_says_so() {
    let backend = |name: &str| Backend::new(crate::domain::ids::VersionId::new(name).unwrap(), Vec::new());
    let stages = vec![fixtures::manual(5_000), fixtures::held(10_000, 0)];
    let between = |stable: &str, canary: &str| {
        let spec = RolloutSpec::new(service(), backend(stable), backend(canary), stages.clone());
        OperatorRequest::Apply(Arc::new(spec.checked().unwrap()))
    };
    let mut rig = Rig::new();
    rig.asked("a", 1, between("v1", "v2"));
    assert_eq!(rig.canary_bp("b"), 5_000);
    let outcome = rig.ask_at_once(2, between("v0", "v1"));
    let Outcome::Committed { reason, .. } = &outcome else { panic!("{outcome:?}") };
    assert_eq!(reason, "the file's canary v1 serves as stable: the rollout to v2 ends");
    assert_eq!((rig.canary_bp("b"), rig.phase()), (0, Phase::RolledBack));
    let outcome = rig.ask_at_once(3, between("v0", "v1"));
    assert!(matches!(&outcome, Outcome::Unchanged { rolled_back: false, .. }), "a loop goes on: {outcome:?}");
}

#[test]
fn what_decreases_exposure_is_let_in_however_many_wait() {
    let backend = |name: &str| Backend::new(crate::domain::ids::VersionId::new(name).unwrap(), Vec::new());
    let stages = vec![fixtures::manual(5_000), fixtures::held(10_000, 0)];
    let between = |stable: &str, canary: &str| {
        let spec = RolloutSpec::new(service(), backend(stable), backend(canary), stages.clone());
        OperatorRequest::Apply(Arc::new(spec.checked().unwrap()))
    };
    let waits = |number: u64| match number % 2 {
        0 => OperatorRequest::Pause { service: service(), reason: "flood".into() },
        _ => OperatorRequest::Resume { service: service() },
    };
    for (name, asked) in [
        ("abort", OperatorRequest::Abort { service: service(), reason: "test".into() }),
        ("undo", OperatorRequest::Undo { service: service() }),
        ("the file of before", between("v0", "v1")),
        ("cordon", OperatorRequest::Config(ConfigChange::Cordon(node("c")))),
    ] {
        let mut rig = Rig::new();
        rig.asked("a", 1, between("v1", "v2"));
        // Nobody answers: what is asked for waits.
        for number in 100..300 {
            rig.ask("a", number, waits(number));
        }
        let busy = |rig: &Rig| rig.replies.values().filter(|outcome| **outcome == Outcome::Busy).count();
        assert!(busy(&rig) > 100, "{name}: {} turned away", busy(&rig));
        rig.ask("a", 2, asked);
        assert_eq!(rig.replies.get(&2), None, "{name} waits");
        rig.settle();
        rig.run_for(200);
        assert!(committed(&rig.replies[&2]), "{name}: {:?}", rig.replies[&2]);
        assert!(rig.canary_bp("c") == 0, "{name}");
    }
}
