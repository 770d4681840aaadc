//! A healthy rollout goes on without words of trouble, and what stands in its way is named.

use super::*;
use crate::domain::analysis::{Limit, Metric};
use crate::domain::query::NoValue;
use crate::domain::rollout::Phase;
use crate::domain::verdict::OnFailure;
use crate::protocol::Measurement;

impl Rig {
    /// Lets `ms` pass in which node `seen_by` counts ten answers of each version in 20 ms, of which one in fifty fails.
    fn serve_at(&mut self, seen_by: &str, ms: u64) {
        for _ in 0..ms / 20 {
            let routing_version = self.cores[&node(seen_by)].view().services[&service()].service.routing.version;
            let mut evidence = Evidence::default();
            for place in 0..10 {
                let fails = place == 0 && (self.now / 20_000).is_multiple_of(5);
                evidence.stable.record(1_000, fails);
                evidence.canary.record(1_000, fails);
            }
            let observation = Observation { service: service(), routing_version, evidence };
            self.handle(&node(seen_by), Input::Telemetry(vec![observation]));
            self.run_for(20);
        }
    }

    /// Returns the refused transactions of the log.
    fn refused(&self) -> Vec<String> {
        let refused = |record: &Record| match &record.intent.operation {
            Operation::Refused { reasons, .. } => Some(reasons.join("; ")),
            _ => None,
        };
        self.decided.values().filter_map(refused).collect()
    }

    fn promotions(&self) -> usize {
        self.decided.values().filter(|record| record.intent.operation.name() == "Promote").count()
    }
}

#[test]
fn a_promotion_decided_by_evidence_is_never_refused_first() {
    let stages = [fixtures::held(2_000, 0), fixtures::held(5_000, 0), fixtures::held(10_000, 0)];
    // More or less than a window's worth of it decides.
    for min_samples in [60, 400, 1_500] {
        let analysis = Analysis { min_samples, ..Analysis::default() };
        // The node that sees the traffic is the coordinator, or a peer of it; the evidence comes at any moment of a tick.
        for (seen_by, offset_ms) in [("a", 0), ("a", 100), ("a", 180), ("b", 60), ("c", 140), ("c", 240)] {
            let mut rig = Rig::new();
            rig.asked("a", 1, OperatorRequest::Apply(fixtures::manifest(&stages, analysis.clone())));
            rig.run_for(offset_ms);
            rig.serve_at(seen_by, 20_000);
            assert_eq!(rig.refused(), Vec::<String>::new(), "seen by {seen_by}, {offset_ms} ms later");
            let view = &rig.cores[&node("a")].view().services[&service()];
            let (waiting_for, verdict) = (&view.waiting_for, &view.verdict);
            assert!(rig.promotions() >= 2, "seen by {seen_by}, {offset_ms} ms later: {waiting_for}, {verdict:?}");
            rig.check();
        }
    }
}

/// What one node counts is compared by all: the classes of statuses travel with its ticks.
#[test]
fn a_canary_that_answers_only_404_is_rolled_back_by_what_any_node_saw() {
    let limit = Limit::ErrorsVsStable { increase_ppm: 5_000 };
    let metrics = vec![Metric { name: "errors-vs-stable".into(), limit, on_failure: OnFailure::Rollback }];
    let analysis = Analysis { metrics, min_samples: 10, ..Analysis::default() };
    for seen_by in ["a", "b", "c"] {
        let mut rig = Rig::new();
        let stages = [fixtures::held(2_000, 60_000), fixtures::held(10_000, 0)];
        rig.asked("a", 1, OperatorRequest::Apply(fixtures::manifest(&stages, analysis.clone())));
        for _ in 0..500 {
            let routing_version = rig.cores[&node(seen_by)].view().services[&service()].service.routing.version;
            let mut evidence = Evidence::default();
            (0..8).for_each(|_| evidence.stable.record(1_000, false));
            (0..2).for_each(|_| evidence.canary.record(1_000, false));
            (0..2).for_each(|_| evidence.canary.classes.add(404));
            let observation = Observation { service: service(), routing_version, evidence };
            rig.handle(&node(seen_by), Input::Telemetry(vec![observation]));
            rig.run_for(20);
        }
        let rollout = &rig.cores[&node("b")].view().services[&service()].service.rollout;
        assert_eq!(rollout.phase, Phase::RolledBack, "seen by {seen_by}");
        assert!(rollout.reason.contains("4xx answers: "), "{}", rollout.reason);
        rig.check();
    }
}

#[test]
fn a_node_that_cannot_tell_is_named_and_asked_seldom() {
    let mut rig = Rig::new();
    let stages = [fixtures::held(2_000, 0), fixtures::held(10_000, 0)];
    rig.asked("a", 1, OperatorRequest::Apply(fixtures::manifest(&stages, fixtures::by_query())));
    let measure = |rig: &mut Rig, seconds: u64, is_reached_by_c: bool| {
        for _ in 0..seconds {
            for name in ["a", "b", "c"].map(node) {
                let value = match name == node("c") && !is_reached_by_c {
                    true => Err(NoValue::new("http://x:1: connection refused")),
                    false => Ok(0.01),
                };
                let measurement = Measurement { service: service(), routing_version: 1, name: "failing".into(), value };
                rig.handle(&name, Input::Measured(measurement));
            }
            rig.run_for(1_000);
        }
    };
    measure(&mut rig, 60, false);
    let refused = rig.refused();
    assert!((1..=4).contains(&refused.len()), "{refused:?}");
    for name in ["a", "b"] {
        let waiting_for = rig.cores[&node(name)].view().services[&service()].waiting_for.clone();
        assert!(waiting_for.contains("c: abstains: failing: http://x:1: connection refused"), "{name}: {waiting_for}");
    }
    // Once it can tell, the rollout goes on within the longest wait.
    measure(&mut rig, 62, true);
    assert_eq!(rig.promotions(), 1);
}
