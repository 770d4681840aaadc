//! Pauses are measured by those who live through them, never by the time of day.

use super::*;

const HOUR_MS: u64 = 3_600_000;

/// Returns three nodes 5 s after the beginning of a pause of 30 s.
fn in_a_pause() -> Rig {
    let mut rig = Rig::new();
    let stages = [fixtures::held(2_000, 30_000), fixtures::manual(5_000), fixtures::held(10_000, 0)];
    let mut analysis = Analysis { min_samples: 10, ..Analysis::default() };
    analysis.metrics.retain(|metric| metric.name == "latency");
    rig.asked("a", 1, OperatorRequest::Apply(fixtures::manifest(&stages, analysis)));
    rig.serve(3_400);
    assert_eq!(rig.weight_bp(), 2_000);
    rig
}

impl Rig {
    /// Returns the committed weight that the first node which runs knows of.
    fn weight_bp(&self) -> u16 {
        let core = self.cores.values().next().unwrap();
        core.view().services[&service()].service.routing.canary_weight().bp()
    }
}

#[test]
fn a_pause_is_not_shortened_by_a_coordinator_whose_time_of_day_is_ahead() {
    let mut rig = in_a_pause();
    rig.ahead_ms.insert(node("a"), HOUR_MS);
    rig.restart(&node("a"));
    rig.serve(24_000);
    assert_eq!(rig.weight_bp(), 2_000, "29 s of 30 are over");
    // It knows of 24 s only, but b lived through all of them, and asks for the step.
    rig.serve(5_000);
    assert_eq!(rig.weight_bp(), 5_000);
}

#[test]
fn a_failover_to_a_node_that_is_an_hour_ahead_does_not_shorten_a_pause() {
    let mut rig = in_a_pause();
    rig.ahead_ms = ["b", "c"].map(|name| (node(name), HOUR_MS)).into();
    rig.kill("a");
    rig.restart(&node("b"));
    rig.serve(20_000);
    rig.restart(&node("a"));
    rig.serve(4_000);
    assert_eq!(rig.weight_bp(), 2_000, "29 s of 30 are over");
    rig.serve(8_000);
    assert_eq!(rig.weight_bp(), 5_000);
}

#[test]
fn a_pause_that_nobody_lived_through_begins_anew() {
    let mut rig = in_a_pause();
    for name in ["a", "b", "c"].map(node) {
        rig.ahead_ms.insert(name.clone(), HOUR_MS);
        rig.restart(&name);
    }
    rig.serve(29_000);
    assert_eq!(rig.weight_bp(), 2_000);
    rig.serve(2_000);
    assert_eq!(rig.weight_bp(), 5_000);
}
