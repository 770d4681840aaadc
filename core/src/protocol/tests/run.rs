//! Analysis runs outlive the restarts of those who conduct them.

use super::*;
use crate::domain::run::SequentialEvidence;
use crate::protocol::Measurement;

/// Compares with stable, in windows of 3 s.
fn compared() -> Arc<Manifest> {
    fixtures::manifest(&[fixtures::manual(2_000), fixtures::held(10_000, 0)], fixtures::errors_vs_stable())
}

/// Returns three nodes 8.6 s after the beginning of a rollout that is compared with stable; there was no traffic in the first 1.6 s.
fn under_way() -> Rig {
    let mut rig = Rig::new();
    rig.asked("a", 1, OperatorRequest::Apply(compared()));
    rig.serve(5_000);
    rig.assert_same_evidence();
    rig
}

impl Rig {
    /// Lets `ms` pass in which every node that runs sees five answers of stable in 100 ms, one failing now and then, and one of the
    /// canary.
    pub(super) fn serve(&mut self, ms: u64) {
        for _ in 0..ms / 100 {
            for (place, name) in ["a", "b", "c"].map(node).into_iter().enumerate() {
                let mut evidence = Evidence::default();
                let tenth = self.now / 100_000 + place as u64;
                (0..5).for_each(|i| {
                    evidence.stable.record(1_000 * (1 + (tenth + i) % 7), (tenth + i).is_multiple_of(41))
                });
                evidence.canary.record(1_000 * (1 + tenth % 7), tenth.is_multiple_of(37));
                self.observe(&name, evidence);
            }
            self.run_for(100);
        }
    }

    /// Hands a node that runs what it saw at the weight that it knows.
    fn observe(&mut self, name: &NodeId, evidence: Evidence) {
        let Some(core) = self.cores.get(name) else { return };
        let routing_version = core.view().services[&service()].service.routing.version;
        self.handle(name, Input::Telemetry(vec![Observation { service: service(), routing_version, evidence }]));
    }

    /// Asserts that all nodes come to the same numbers at the same ticks, for 2 s. What was put into bets tells the tick.
    fn assert_same_evidence(&mut self) {
        let mut told = BTreeMap::<u64, BTreeMap<NodeId, SequentialEvidence>>::new();
        for _ in 0..20 {
            self.serve(100);
            for (name, core) in &self.cores {
                let sequential = core.view().services[&service()].sequential.expect("there is traffic to compare");
                told.entry(sequential.alpha_spent.to_bits()).or_default().insert(name.clone(), sequential);
            }
        }
        let all: Vec<_> = told.values().filter(|nodes| nodes.len() == 3).collect();
        assert!(all.len() >= 4, "{told:?}");
        assert!(
            told.values().all(|nodes| nodes.values().all(|sequential| sequential == nodes.values().next().unwrap())),
            "{told:?}"
        );
    }

    /// Returns the windows that were decided, as node `name` learned of them.
    fn windows(&self, name: &str) -> Vec<(u64, u64, u64)> {
        let decided = self.judged.iter().filter(|(at, sequence, _)| *at == node(name) && sequence.is_some());
        decided
            .map(|(.., window_verdict)| (window_verdict.from_ms, window_verdict.to_ms, window_verdict.stable.count))
            .collect()
    }

    /// Asserts that the windows follow each other, and that all that was served in each was counted: of the first one 210
    /// answers, of the others 450, less what `missing` says of the one that begins there.
    fn assert_windows(&self, name: &str, missing: impl Fn(u64) -> std::ops::RangeInclusive<u64>) {
        let windows = self.windows(name);
        assert!(windows.len() >= 4, "{windows:?}");
        for (place, (from_ms, to_ms, count)) in windows.iter().enumerate() {
            let expected_ms = 3_000 * place as u64;
            assert_eq!((*from_ms, *to_ms), (expected_ms, expected_ms + 3_000), "{windows:?}");
            let served = if place == 0 { 210 } else { 450 };
            assert!(missing(*from_ms).contains(&(served - count)), "{count} from {from_ms} ms on: {windows:?}");
        }
    }
}

#[test]
fn a_node_that_restarts_goes_on_with_its_peers_run() {
    let mut rig = under_way();
    rig.kill("c");
    rig.serve(1_000);
    rig.restart(&node("c"));
    rig.serve(3_000);
    rig.assert_same_evidence();
    // c served nothing from 8.6 to 9.6 s, and what it saw in its last tick before that nobody knows.
    rig.assert_windows("b", |from_ms| match from_ms {
        6_000 => 20..=32,
        9_000 => 30..=30,
        _ => 0..=0,
    });
    // What c judged by itself, it judged with the counts of the whole rollout.
    let minds = |name: &str| {
        let by = rig.judged.iter().filter(|(at, sequence, _)| *at == node(name) && sequence.is_none());
        by.map(|(.., window_verdict)| window_verdict.clone()).collect::<Vec<_>>()
    };
    assert_eq!(minds("c"), minds("a")[..minds("c").len()]);
}

#[test]
fn a_coordinator_that_restarts_decides_the_windows_that_closed_without_it() {
    let mut rig = under_way();
    rig.serve(300);
    rig.kill("a");
    rig.serve(300);
    rig.restart(&node("a"));
    rig.serve(4_000);
    rig.assert_same_evidence();
    rig.assert_windows("b", |from_ms| match from_ms {
        6_000 => 5..=17,
        9_000 => 10..=10,
        _ => 0..=0,
    });
}

#[test]
fn two_nodes_that_restart_together_go_on_with_the_third_ones_run() {
    let mut rig = under_way();
    rig.serve(300);
    ["b", "c"].iter().for_each(|name| rig.kill(name));
    rig.serve(300);
    // They hear of each other first, and have a majority.
    rig.loses = |from, _, _| *from == node("a");
    ["b", "c"].iter().for_each(|name| rig.restart(&node(name)));
    rig.serve(600);
    rig.loses = |_, _, _| false;
    rig.serve(4_000);
    rig.assert_same_evidence();
    rig.assert_windows("a", |from_ms| if from_ms < 6_000 { 0..=0 } else { 0..=200 });
}

#[test]
fn a_peer_that_asked_is_asked_once_it_has_the_run() {
    let mut rig = under_way();
    rig.serve(300);
    ["b", "c"].iter().for_each(|name| rig.kill(name));
    // Both know that the other one asks.
    rig.loses = |from, _, _| *from == node("a");
    ["b", "c"].iter().for_each(|name| rig.restart(&node(name)));
    rig.serve(400);
    rig.loses = |from, to, message| (from, to) == (&node("a"), &node("b")) && hands_over(message);
    rig.serve(2_500);
    rig.loses = |_, _, _| false;
    rig.assert_same_evidence();
}

fn hands_over(message: &Message) -> bool {
    matches!(message, Message::HealthSnapshot(snapshot) if snapshot.transfer.is_some())
}

#[test]
fn a_node_asks_the_next_peer_when_the_first_doesnt_answer() {
    let mut rig = under_way();
    rig.serve(300);
    rig.kill("c");
    rig.serve(300);
    rig.loses = |from, _, message| *from == node("a") && hands_over(message);
    rig.restart(&node("c"));
    rig.serve(2_600);
    rig.loses = |_, _, _| false;
    rig.serve(4_000);
    rig.assert_same_evidence();
    rig.assert_windows("b", |from_ms| if from_ms == 6_000 || from_ms == 9_000 { 0..=30 } else { 0..=0 });
}

/// Restarts all nodes `ms` after they were killed; of those that `lost` names nothing is left of an analysis run.
fn all_restart(rig: &mut Rig, ms: u64, lost: &[&str]) {
    ["a", "b", "c"].iter().for_each(|name| rig.kill(name));
    rig.now += 1_000 * ms;
    lost.iter().for_each(|name| drop(rig.runs.remove(&node(name))));
    ["a", "b", "c"].iter().for_each(|name| rig.restart(&node(name)));
}

impl Rig {
    /// Returns where the windows begin that nobody saw the whole of, and how many answers of stable were counted in them.
    fn unseen(&self, name: &str) -> Vec<(u64, u64)> {
        let decided = self.judged.iter().filter(|(at, sequence, _)| *at == node(name) && sequence.is_some());
        let unseen =
            decided.filter(|(.., window_verdict)| window_verdict.verdict.reason() == "nobody saw the whole of it");
        unseen.map(|(.., window_verdict)| (window_verdict.from_ms, window_verdict.stable.count)).collect()
    }
}

#[test]
fn when_all_restart_they_go_on_with_the_run_that_was_saved_last() {
    let mut rig = under_way();
    rig.serve(300);
    // a has been away for a while: what it saved is older.
    rig.kill("a");
    rig.serve(2_000);
    all_restart(&mut rig, 500, &[]);
    rig.serve(1_500);
    rig.assert_same_evidence();
    rig.serve(4_000);
    // In the window from 9 s on two nodes served until 10.9 s, and all from 11.4 s on: 280 answers, less what b saw since it
    // saved them, which is a second's at most.
    rig.assert_windows("b", |from_ms| match from_ms {
        6_000 => 0..=12,
        9_000 => 170..=270,
        12_000 => 0..=100,
        _ => 0..=0,
    });
    assert_eq!(rig.unseen("b").iter().map(|(from_ms, _)| *from_ms).collect::<Vec<_>>(), [9_000]);
}

#[test]
fn a_run_that_one_node_saved_is_enough_and_an_outage_of_many_windows_ends_it_in_none() {
    let mut rig = under_way();
    all_restart(&mut rig, 600_000, &["a", "b"]);
    rig.serve(1_500);
    rig.serve(6_000);
    rig.assert_same_evidence();
    let (windows, unseen) = (rig.windows("b"), rig.unseen("b"));
    assert!(windows.windows(2).all(|pair| pair[0].1 == pair[1].0), "{windows:?}");
    assert_eq!(unseen[0].0, 6_000);
    assert!((240..=390).contains(&unseen[0].1), "what was served until a second before: {unseen:?}");
    assert!(unseen[1..].iter().map(|(_, count)| count).sum::<u64>() < 450, "{unseen:?}");
    let seen = windows.iter().filter(|window| !unseen.iter().any(|(from_ms, _)| *from_ms == window.0));
    let seen: Vec<_> = seen.map(|(.., count)| *count).collect();
    assert!(seen.len() >= 3, "{windows:?}");
    assert_eq!(seen[2..], vec![450; seen.len() - 2], "{windows:?}");
}

#[test]
fn who_is_up_first_waits_for_those_who_may_know_more() {
    let mut rig = under_way();
    rig.kill("a");
    rig.serve(2_000);
    ["b", "c"].iter().for_each(|name| rig.kill(name));
    rig.restart(&node("a"));
    rig.run_for(6_000);
    ["b", "c"].iter().for_each(|name| rig.restart(&node(name)));
    rig.serve(2_000);
    rig.assert_same_evidence();
    // What b saved was seen until 10 s; of that window a saw nothing.
    let counts: Vec<_> =
        rig.windows("b").into_iter().filter(|window| window.0 == 9_000).map(|(.., count)| count).collect();
    assert!(counts.len() == 1 && counts[0] > 30, "{counts:?}");
}

#[test]
fn a_node_that_restarts_cut_off_takes_the_run_when_it_is_back() {
    let mut rig = under_way();
    rig.kill("c");
    rig.loses = |from, to, _| [from, to].contains(&&node("c"));
    rig.restart(&node("c"));
    rig.serve(8_000);
    rig.loses = |_, _, _| false;
    rig.serve(2_000);
    rig.assert_same_evidence();
}

#[test]
fn a_majority_of_which_some_are_cordoned_is_one() {
    let mut rig = under_way();
    for (number, name) in [(2, "b"), (3, "c")] {
        rig.asked("a", number, OperatorRequest::Config(ConfigChange::Cordon(node(name))));
    }
    ["a", "b"].iter().for_each(|name| rig.kill(name));
    rig.run_for(2_000);
    rig.restart(&node("a"));
    rig.serve(6_000);
    assert!(rig.cores[&node("a")].view().services[&service()].sequential.is_some());
}

#[test]
fn a_peer_that_never_hands_over_is_not_waited_for_for_ever() {
    let mut rig = under_way();
    rig.kill("c");
    rig.loses = |_, _, message| hands_over(message);
    rig.restart(&node("c"));
    let sequential = |rig: &Rig| rig.cores[&node("c")].view().services[&service()].sequential;
    rig.serve(3_000);
    assert_eq!(sequential(&rig), None);
    rig.serve(2_000);
    assert!(sequential(&rig).is_some(), "it goes on with what it saved");
}

#[test]
fn evidence_of_a_step_is_none_for_the_next_one() {
    let mut rig = Rig::new();
    let stages = [(2_000, 1_000), (5_000, 0), (10_000, 0)].map(|(bp, hold_ms)| fixtures::held(bp, hold_ms));
    rig.asked("a", 1, OperatorRequest::Apply(fixtures::manifest(&stages, fixtures::errors_vs_stable())));
    let mut since = None;
    for _ in 0..2_000 {
        for name in ["a", "b", "c"].map(node) {
            let mut evidence = Evidence::default();
            (0..40).for_each(|i| evidence.stable.record(1_000 * i, i == 7));
            (0..40).for_each(|i| evidence.canary.record(1_000 * i, false));
            rig.observe(&name, evidence);
        }
        rig.tick();
        rig.settle();
        match (rig.canary_bp("a"), since) {
            (5_000, None) => since = Some(rig.now),
            (10_000, Some(since)) => {
                // A tick has to end, with what was seen at this step.
                assert!(rig.now - since > 200_000, "after {} us", rig.now - since);
                return;
            }
            _ => {}
        }
    }
    panic!("{} bp in 40 s", rig.canary_bp("a"));
}

#[test]
fn what_was_saved_goes_with_its_rollout() {
    let mut rig = under_way();
    assert_eq!(rig.runs.values().map(BTreeMap::len).collect::<Vec<_>>(), [1, 1, 1]);
    let saved = rig.runs.clone();
    let abort = rig.abort();
    rig.asked("a", 2, abort);
    assert_eq!(rig.runs.values().map(BTreeMap::len).collect::<Vec<_>>(), [0, 0, 0]);
    // A file that is left of it is no analysis run of the next one, and goes.
    rig.asked("a", 3, OperatorRequest::Retry { service: service() });
    rig.serve(300);
    rig.runs = saved.clone();
    all_restart(&mut rig, 500, &[]);
    rig.serve(4_000);
    assert!(rig.windows("b").last().unwrap().0 < 6_000, "{:?}", rig.windows("b"));
    let abort = rig.abort();
    rig.asked("a", 4, abort);
    rig.runs = saved;
    all_restart(&mut rig, 500, &[]);
    assert_eq!(rig.runs.values().map(BTreeMap::len).collect::<Vec<_>>(), [0, 0, 0]);
}

#[test]
fn when_nothing_was_saved_the_run_begins_anew_and_says_so() {
    let mut rig = under_way();
    all_restart(&mut rig, 500, &["a", "b", "c"]);
    rig.serve(1_500);
    let sequential = |rig: &Rig| rig.cores[&node("b")].view().services[&service()].sequential;
    assert!(sequential(&rig).is_some(), "nobody waits for who has nothing");
    rig.serve(7_500);
    let windows = rig.windows("b");
    assert!(windows.len() >= 5, "{windows:?}");
    assert_eq!(rig.unseen("b").iter().map(|(from_ms, _)| *from_ms).collect::<Vec<_>>(), [6_000], "{windows:?}");
}

#[test]
fn a_window_is_no_promotion_while_another_system_that_counts_says_nothing_or_no() {
    let mut rig = Rig::new();
    let stages = [fixtures::manual(2_000), fixtures::held(10_000, 0)];
    rig.asked("a", 1, OperatorRequest::Apply(fixtures::manifest(&stages, fixtures::by_query())));
    rig.serve(3_000);
    for _ in 0..80 {
        for name in ["a", "b", "c"].map(node) {
            let (name_of, value) = ("failing".to_string(), Ok(0.01));
            let measurement = Measurement { service: service(), routing_version: 1, name: name_of, value };
            rig.handle(&name, Input::Measured(measurement));
        }
        rig.serve(100);
    }
    let decided = rig.judged.iter().filter(|(at, sequence, _)| *at == node("b") && sequence.is_some());
    let words: Vec<_> = decided.map(|(.., window_verdict)| window_verdict.verdict.word()).collect();
    assert_eq!(words, ["HOLD", "PROMOTE", "PROMOTE", "PROMOTE"]);
}

#[test]
fn verdicts_of_many_rollouts_share_a_slot_and_each_has_its_place() {
    const SERVICES: u64 = 40;
    let mut rig = Rig::new();
    let stages = [fixtures::manual(2_000), fixtures::held(10_000, 0)];
    for number in 0..SERVICES {
        let mut spec = fixtures::rollout(&stages, fixtures::errors_vs_stable());
        spec.service = ServiceId::new(format!("s{number:02}")).unwrap();
        rig.asked("a", number, OperatorRequest::Apply(Arc::new(spec.checked().unwrap())));
    }
    let head = |rig: &Rig| rig.decided.keys().next_back().unwrap().0;
    let (before, began) = (head(&rig), rig.now);
    rig.run_for(9_100);
    let seconds = (rig.now - began) / 1_000_000;
    let slots = head(&rig) - before;
    assert!(slots <= 4 * seconds + 1, "{slots} slots in {seconds} s for {SERVICES} windows each 3 s");
    let told: Vec<_> =
        rig.judged.iter().filter_map(|(at, sequence, _)| sequence.filter(|_| *at == node("b"))).collect();
    assert!(told.len() as u64 >= 3 * SERVICES, "{} verdicts", told.len());
    assert!(told.windows(2).all(|pair| pair[0] < pair[1]), "strictly increasing: {told:?}");
}

#[test]
fn the_samples_of_a_comparison_are_counted_over_the_step_and_not_over_the_window() {
    // In a window there are 90 canary answers at most.
    let analysis = Analysis { min_samples: 200, ..fixtures::errors_vs_stable() };
    let stages = [fixtures::manual(2_000), fixtures::manual(3_000), fixtures::held(10_000, 0)];
    let mut rig = Rig::new();
    rig.asked("a", 1, OperatorRequest::Apply(fixtures::manifest(&stages, analysis)));
    let samples = |rig: &Rig, name: &str| {
        let verdict = rig.cores[&node(name)].view().services[&service()].verdict.clone();
        let reason = verdict.map(|verdict| verdict.reason().to_string()).unwrap_or_default();
        reason.strip_suffix(" of 200 canary samples in this step").map(|count| count.parse::<u64>().unwrap())
    };
    rig.serve(4_000);
    for name in ["a", "b", "c"] {
        assert!(samples(&rig, name).is_some_and(|count| (91..=120).contains(&count)), "{:?}", samples(&rig, name));
    }
    rig.serve(4_000);
    assert_eq!(["a", "b", "c"].map(|name| samples(&rig, name)), [None; 3], "enough, though no window holds as many");
    let outcome = rig.asked("b", 2, OperatorRequest::SkipWait { service: service() });
    assert!(matches!(outcome, Outcome::Committed { .. }), "{outcome:?}");
    rig.serve(2_000);
    assert!(samples(&rig, "a").is_some_and(|count| (5..=60).contains(&count)), "{:?}", samples(&rig, "a"));
    // A node that takes the run over counts from there on: too few is safe.
    rig.serve(8_000);
    rig.kill("b");
    rig.serve(500);
    rig.restart(&node("b"));
    rig.serve(2_000);
    assert!(samples(&rig, "b").is_some_and(|count| count < 100), "{:?}", samples(&rig, "b"));
    assert_eq!(samples(&rig, "a"), None);
}
