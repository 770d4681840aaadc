//! A rollout without progress: rolled back where the canary had its chance, paused where something else is missing.

use super::*;
use crate::domain::analysis::NoData;
use crate::domain::query::NoValue;
use crate::domain::rollout::Phase;
use crate::protocol::Measurement;

/// Returns a rollout by `analysis` that has 4 s for each step.
fn hurried(analysis: Analysis) -> Arc<Manifest> {
    let stages = vec![fixtures::held(2_000, 0), fixtures::held(10_000, 60_000)];
    let spec = RolloutSpec { stages, progress_deadline_ms: 4_000, ..fixtures::rollout(&[], analysis) };
    Arc::new(spec.checked().unwrap())
}

fn limits(no_data: NoData) -> Analysis {
    Analysis { window_ms: 3_000, min_samples: 50, no_data, ..Analysis::default() }
}

fn by_query(no_data: NoData) -> Analysis {
    Analysis { no_data, ..fixtures::by_query() }
}

type Answer = Result<f64, NoValue>;

/// Tells every node, once a second for as long as the rollout is at its first step, what `answer` says of it.
fn let_pass(rig: &mut Rig, seconds: u64, answer: impl Fn(&str) -> Option<Answer>, canary_answers: u64) {
    for _ in 0..seconds {
        for name in ["a", "b", "c"] {
            let Some(core) = rig.cores.get(&node(name)) else { continue };
            let routing_version = core.view().services[&service()].service.routing.version;
            if let Some(value) = answer(name) {
                let measured = Measurement { service: service(), routing_version, name: "failing".into(), value };
                rig.handle(&node(name), Input::Measured(measured));
            }
            let mut evidence = Evidence::default();
            (0..canary_answers).for_each(|_| evidence.canary.record(1_000, false));
            (0..canary_answers * 4).for_each(|_| evidence.stable.record(1_000, false));
            rig.handle(
                &node(name),
                Input::Telemetry(vec![Observation { service: service(), routing_version, evidence }]),
            );
        }
        rig.run_for(1_000);
    }
}

fn ended(rig: &Rig) -> (Phase, String) {
    let rollout = &rig.cores[&node("b")].view().services[&service()].service.rollout;
    (rollout.phase, rollout.reason.clone())
}

/// Applies, lets `seconds` pass, and returns how the rollout ended.
fn after(
    analysis: Analysis,
    seconds: u64,
    answer: impl Fn(&str) -> Option<Answer>,
    canary_answers: u64,
) -> (Phase, String) {
    let mut rig = Rig::new();
    rig.ask("a", 1, OperatorRequest::Apply(hurried(analysis)));
    rig.settle();
    let_pass(&mut rig, seconds, answer, canary_answers);
    ended(&rig)
}

fn no_route() -> Option<Answer> {
    Some(Err(NoValue::new("http://x:1: no route")))
}

#[test]
fn what_is_missing_outside_the_canary_ends_in_a_pause_that_names_it() {
    let paused = |(phase, reason): (Phase, String), why: &str| {
        assert_eq!((phase, reason), (Phase::Paused, format!("no progress at 20% within 4 s: {why}")));
    };
    for no_data in [NoData::Hold, NoData::Fail] {
        paused(after(by_query(no_data), 6, |_| no_route(), 0), "failing: http://x:1: no route");
        paused(after(by_query(no_data), 6, |_| None, 0), "failing: no answer yet");
        // The coordinator's own provider answers, and another node's doesn't.
        let one_out = |name: &str| if name == "c" { no_route() } else { Some(Ok(0.01)) };
        paused(after(by_query(no_data), 6, one_out, 0), "the nodes' votes");
    }
    let both = Analysis { queries: fixtures::by_query().queries, ..limits(NoData::Hold) };
    paused(after(both, 6, |_| no_route(), 40), "failing: http://x:1: no route");

    let mut rig = Rig::new();
    rig.ask("a", 1, OperatorRequest::Apply(hurried(limits(NoData::Fail))));
    rig.settle();
    rig.kill("c");
    let_pass(&mut rig, 7, |_| None, 40);
    paused(ended(&rig), "node c is silent");

    let mut rig = Rig::new();
    rig.ask("a", 1, OperatorRequest::Apply(hurried(limits(NoData::Fail))));
    rig.settle();
    ["a", "b", "c"].map(node).iter().for_each(|name| rig.handle(name, Input::Guarded(Some("redis is away".into()))));
    let_pass(&mut rig, 6, |_| None, 40);
    paused(ended(&rig), "redis is away");
}

#[test]
fn no_data_alone_decides_about_the_canarys_own_silence() {
    let silent = || Some(Err(NoValue::silence("no series")));
    let nothing = |_: &str| None;
    let (phase, reason) = after(limits(NoData::Hold), 6, nothing, 0);
    assert_eq!((phase, reason.as_str()), (Phase::Paused, "no progress at 20% within 4 s: 0 of 50 canary samples"));
    let (phase, reason) = after(limits(NoData::Hold), 6, nothing, 2);
    assert!(phase == Phase::Paused && reason.contains("of 50 canary samples"), "{phase}: {reason}");
    assert_eq!(after(limits(NoData::Fail), 2, nothing, 0).0, Phase::RolledBack, "as soon as the step is due");
    let (phase, reason) = after(limits(NoData::Fail), 6, nothing, 2);
    assert!(phase == Phase::RolledBack && reason.contains("of 50 canary samples"), "{phase}: {reason}");
    assert_eq!(after(by_query(NoData::Hold), 6, |_| silent(), 0).0, Phase::Paused);
}

#[test]
fn where_prometheus_alone_measures_its_silence_counts_and_not_the_data_planes() {
    let silent = || Some(Err(NoValue::silence("no series")));
    let (phase, _) = after(by_query(NoData::Fail), 3, |_| Some(Ok(0.01)), 0);
    assert_eq!(phase, Phase::Baking, "its metrics alone are enough to promote");
    for answer in [silent(), Some(Ok(f64::NAN))] {
        let (phase, reason) = after(by_query(NoData::Fail), 2, |_| answer.clone(), 40);
        assert_eq!((phase, reason.as_str()), (Phase::RolledBack, "no canary data in the whole step"));
    }
}

#[test]
fn a_canary_that_had_its_chance_is_rolled_back() {
    // There is evidence, and it doesn't suffice for a promotion within 4 s.
    let (phase, reason) = after(fixtures::errors_vs_stable(), 6, |_| None, 40);
    assert!(
        phase == Phase::RolledBack && reason.contains("no progress at 20% within 4 s: errors"),
        "{phase}: {reason}"
    );
}

#[test]
fn the_deadline_that_runs_is_told_with_the_time_that_is_left() {
    let told = |analysis: Analysis, seconds| {
        let mut rig = Rig::new();
        rig.ask("a", 1, OperatorRequest::Apply(hurried(analysis)));
        rig.settle();
        let_pass(&mut rig, seconds, |_| None, 0);
        rig.cores[&node("a")].view().services[&service()].waiting_for.clone()
    };
    // What is shown is up to a quarter of a second old.
    let is_left = |told: String, what: &str, seconds: u64| {
        let left = told.strip_prefix(what).and_then(|rest| rest.strip_suffix(" s")).map(|left| left.parse::<u64>());
        assert!(matches!(left, Some(Ok(left)) if left == seconds || left == seconds + 1), "{told}");
    };
    let samples = "evidence: 0 of 50 canary samples";
    is_left(told(limits(NoData::Hold), 1), &format!("{samples}; progressDeadline pauses it in "), 3);
    let soon = Analysis { inconclusive_after_ms: Some(2_000), ..limits(NoData::Hold) };
    is_left(told(soon, 1), &format!("{samples}; onInconclusive pauses it in "), 1);
    let short = Analysis { window_ms: 2_000, ..limits(NoData::Hold) };
    let never = "needs 25.0 canary requests/s, sees 0.0: never at this rate";
    is_left(told(short, 3), &format!("{samples}; {never}; progressDeadline pauses it in "), 1);
    is_left(
        told(fixtures::errors_vs_stable(), 1).replace("10 canary samples in this step", "50 canary samples"),
        &format!("{samples}; progressDeadline pauses it in "),
        3,
    );
    assert_eq!(told(limits(NoData::Hold), 6), "an operator: resume, promote or abort");
}
