//! The comparison with stable, from requests to the rollback it decides.

use std::fs;
use std::time::Duration;

use serde_json::Value;

use super::harness::{Cluster, Traffic, Upstream};

const ROLLOUT: &str = "    metrics:
      - { name: errors-vs-stable, strategy: SEQUENTIAL, allowedIncrease: 0.02 }
      - { name: latency-vs-stable, strategy: SEQUENTIAL, quantile: 0.5, allowedIncrease: 0.5 }
    minSamples: 20\n";

fn rollout(stable: &str, canary: &str, steps: &str) -> String {
    format!(
        "apiVersion: aviary/v1\nkind: Rollout\nmetadata: {{ name: svc }}\nspec:\n  \
         stable: {{ version: v1, url: \"{stable}\" }}\n  canary: {{ version: v2, url: \"{canary}\" }}\n  \
         steps:\n{steps}\n  bake: {{ duration: 500ms }}\n  analysis:\n{ROLLOUT}"
    )
}

/// Returns what node `i` judged, or was told of a window, by its log.
fn lines(cluster: &Cluster, i: usize) -> Vec<Value> {
    let text = fs::read_to_string(cluster.log(i)).unwrap();
    let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    lines.filter(|line| line["message"] == "analyzed").collect()
}

/// Returns what node `i` judged, with what it rests on.
fn judged(cluster: &Cluster, i: usize) -> Vec<[Value; 7]> {
    let keys = ["to_ms", "verdict", "e_value", "canary", "canary_errors", "stable", "stable_errors"];
    lines(cluster, i).into_iter().map(|line| keys.map(|key| line[key].clone())).collect()
}

#[test]
fn five_percent_more_errors_in_the_middle_of_a_step_are_found_by_all_nodes_and_rolled_back_with_the_evidence() {
    let (v1, v2) = (Upstream::start("v1"), Upstream::start("v2"));
    let cluster = Cluster::start();
    // Stable isn't perfect: a threshold of its own would have to guess how imperfect.
    v1.fault(r#"{"error_percent":1}"#);
    v2.fault(r#"{"error_percent":1}"#);
    cluster.apply(0, &rollout(&v1.url(), &v2.url(), "    - setWeight: 20\n    - pause: {}\n    - setWeight: 100"));
    cluster.agreed(&[0, 1, 2], Duration::from_millis(500));
    let traffic = Traffic::start(&cluster, 150);
    // Some 2 000 requests without a difference.
    std::thread::sleep(Duration::from_secs(5));
    assert_eq!(cluster.state(0).unwrap()["phase"], "Progressing");
    v2.fault(r#"{"error_percent":6}"#);
    let state = cluster.until(1, "the rollback", Duration::from_secs(60), |s| s["phase"] == "RolledBack");
    let reason = state["reason"].as_str().unwrap();
    println!("{reason}");
    assert!(
        reason.contains("errors-vs-stable: evidence ") && reason.contains(" of 100 that the canary is worse"),
        "{state}"
    );
    assert!(reason.contains(" failed, stable's "), "{state}");
    assert_eq!(cluster.agreed(&[0, 1, 2], Duration::from_secs(1))["weights"], serde_json::json!({"v1": 1.0}));
    let record = cluster.history(2).into_iter().find(|record| record["kind"] == "Rollback");
    assert!(record.unwrap().to_string().contains("errors-vs-stable"), "the log keeps the evidence");
    let judged: Vec<_> = (0..3).flat_map(|i| judged(&cluster, i)).filter(|line| line[1] == "ROLLBACK").collect();
    assert!(!judged.is_empty(), "somebody judged");
    assert!(judged.iter().all(|one| *one == judged[0]), "{judged:?}");
    drop(traffic);
    cluster.assert_no_panic();
}

#[test]
fn a_canary_as_good_as_stable_is_promoted_by_evidence_and_silence_is_none() {
    let (v1, v2) = (Upstream::start("v1"), Upstream::start("v2"));
    let cluster = Cluster::start();
    cluster.apply(
        0,
        &rollout(&v1.url(), &v2.url(), "    - setWeight: 50\n    - pause: { duration: 200ms }\n    - setWeight: 100"),
    );
    // Fifteen times the step's pause.
    std::thread::sleep(Duration::from_secs(3));
    let state = cluster.state(0).unwrap();
    assert_eq!(
        (&state["phase"], &state["weights"]["v2"]),
        (&"Progressing".into(), &0.5.into()),
        "no traffic, no verdict"
    );
    let traffic = Traffic::start(&cluster, 150);
    cluster.until(2, "completion", Duration::from_secs(90), |s| s["phase"] == "Completed");
    // Each node judged for itself, on the same tick samples: the same numbers at the same tick.
    let all = [0, 1, 2].map(|i| judged(&cluster, i));
    println!("{:?}", all[0]);
    assert!(all[0].iter().any(|line| line[1] == "PROMOTE"), "{all:?}");
    let promoted = |lines: &[[Value; 7]]| lines.iter().find(|line| line[1] == "PROMOTE").cloned();
    assert!(all.iter().all(|lines| promoted(lines) == promoted(&all[0])), "{all:#?}");
    drop(traffic);
    cluster.assert_no_panic();
}

#[test]
fn a_node_killed_in_the_middle_of_a_rollout_goes_on_with_its_peers_run() {
    let (v1, v2) = (Upstream::start("v1"), Upstream::start("v2"));
    let mut cluster = Cluster::start();
    let steps = "    - setWeight: 50\n    - pause: { duration: 12s }\n    - setWeight: 100";
    let text = rollout(&v1.url(), &v2.url(), steps).replace("  analysis:\n", "  analysis:\n    window: 3s\n");
    cluster.apply(0, &text);
    let traffic = Traffic::start(&cluster, 150);
    // It dies in the middle of the second of its windows, and misses a part of that one.
    std::thread::sleep(Duration::from_secs(5));
    cluster.kill(2);
    // What it misses: a third of a window.
    std::thread::sleep(Duration::from_secs(1));
    cluster.spawn(2, None);
    cluster.wait_ready(2);
    cluster.until(2, "completion", Duration::from_secs(90), |s| s["phase"] == "Completed");
    // It promoted by the same numbers, of which it saw only the second half itself.
    let promoted = [0, 1, 2].map(|i| judged(&cluster, i).into_iter().find(|line| line[1] == "PROMOTE"));
    assert!(promoted[0].is_some() && promoted.iter().all(|one| *one == promoted[0]), "{promoted:#?}");
    let windows: Vec<_> = lines(&cluster, 1).into_iter().filter(|line| line["from_ms"] != 0).collect();
    assert!(windows.len() >= 9, "{windows:#?}");
    assert!(windows.iter().all(|window| window["reason"] != "nobody saw the whole of it"), "{windows:#?}");
    drop(traffic);
    cluster.assert_no_panic();
}

#[test]
fn when_all_nodes_are_killed_together_they_go_on_with_the_run_that_they_saved() {
    let (v1, v2) = (Upstream::start("v1"), Upstream::start("v2"));
    let mut cluster = Cluster::start();
    let steps = "    - setWeight: 50\n    - pause: { duration: 12s }\n    - setWeight: 100";
    let text = rollout(&v1.url(), &v2.url(), steps).replace("  analysis:\n", "  analysis:\n    window: 4s\n");
    cluster.apply(0, &text);
    let traffic = Traffic::start(&cluster, 150);
    // They die in the middle of the second window; the first one is decided and saved.
    std::thread::sleep(Duration::from_secs(7));
    (0..3).for_each(|i| cluster.kill(i));
    (0..3).for_each(|i| cluster.spawn(i, None));
    (0..3).for_each(|i| cluster.wait_ready(i));
    cluster.until(2, "completion", Duration::from_secs(90), |s| s["phase"] == "Completed");
    // All count from the beginning on, and come to the same numbers.
    let last = [0, 1, 2].map(|i| lines(&cluster, i).into_iter().rfind(|line| line["sequence"].is_null()));
    let same = ["from_ms", "to_ms", "verdict", "e_value", "canary", "stable"];
    let last = last.map(|line| same.map(|key| line.as_ref().map(|line| line[key].clone())));
    assert!(last.iter().all(|one| *one == last[0]), "{last:#?}");
    assert_eq!(last[0][0], Some(0.into()), "{last:#?}");
    let decided: Vec<_> = lines(&cluster, 1).into_iter().filter(|line| line["sequence"].is_u64()).collect();
    let unseen = decided.iter().filter(|window| window["reason"] == "nobody saw the whole of it").count();
    assert!(decided.len() >= 4 && (1..=3).contains(&unseen), "{decided:#?}");
    drop(traffic);
    cluster.assert_no_panic();
}
