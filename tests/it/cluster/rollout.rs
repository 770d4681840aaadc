//! Rollouts that go well, and canaries that don't.

use std::time::Duration;

use super::harness::{Cluster, Http, MANUAL, Traffic, Upstream, rollout, wait};

const SHORT: &str = "    - setWeight: 5\n    - pause: { duration: 700ms }\n    - setWeight: 20\n    - pause: { duration: 700ms }\n    - setWeight: 50\n    - pause: { duration: 700ms }\n    - setWeight: 100";

#[test]
fn a_rollout_goes_through_its_steps_by_itself_and_all_nodes_agree() {
    let (v1, v2) = (Upstream::start("v1"), Upstream::start("v2"));
    let cluster = Cluster::start();
    cluster.apply(0, &rollout(&v1.url(), &v2.url(), SHORT));
    // A service is new to a node until it learns of its first rollout.
    cluster.agreed(&[0, 1, 2], Duration::from_millis(500));
    let traffic = Traffic::start(&cluster, 200);
    for weight in [0.2, 0.5, 1.0] {
        cluster.until(0, &format!("weight {weight}"), Duration::from_secs(15), |s| s["weights"]["v2"] == weight);
        let state = cluster.agreed(&[0, 1, 2], Duration::from_millis(500));
        assert_eq!(state["status"], "COMMITTED");
    }
    cluster.until(0, "completion", Duration::from_secs(15), |s| s["phase"] == "Completed");
    let state = cluster.agreed(&[0, 1, 2], Duration::from_millis(500));
    assert_eq!((&state["stable_model_id"], &state["weights"]), (&"v2".into(), &serde_json::json!({"v2": 1.0})));
    let seen = traffic.stop();
    let failed: Vec<_> = seen.iter().filter(|s| s.status != 200).collect();
    assert!(failed.is_empty(), "{} of {} requests failed: {:?}", failed.len(), seen.len(), failed.first());
    cluster.assert_no_panic();
}

#[test]
fn ten_thousand_requests_land_within_one_point_of_the_weight() {
    let (v1, v2) = (Upstream::start("v1"), Upstream::start("v2"));
    let cluster = Cluster::start();
    cluster.apply(1, &rollout(&v1.url(), &v2.url(), MANUAL));
    cluster.agreed(&[0, 1, 2], Duration::from_millis(500));
    let ports: Vec<_> = cluster.nodes.iter().map(|node| node.data).collect();
    let threads: Vec<_> = (0..4)
        .map(|i| {
            let port = ports[i % 3];
            std::thread::spawn(move || {
                let mut http = Http::connect(port).unwrap();
                let served = (0..2500).map(|_| http.send("POST", "/predict", &[], "{}").unwrap());
                served.filter(|answer| answer.header("x-served-by") == Some("v2")).count()
            })
        })
        .collect();
    let canary: usize = threads.into_iter().map(|thread| thread.join().unwrap()).sum();
    println!("{canary} of 10000 went to the canary");
    assert!((1900..=2100).contains(&canary), "{canary} of 10000 went to the canary, expected 2000 ± 100");
}

#[test]
fn a_failing_canary_is_off_every_node_within_a_second() {
    let (v1, v2) = (Upstream::start("v1"), Upstream::start("v2"));
    let cluster = Cluster::start();
    cluster.apply(0, &rollout(&v1.url(), &v2.url(), MANUAL));
    cluster.agreed(&[0, 1, 2], Duration::from_millis(500));
    let traffic = Traffic::start(&cluster, 200);
    // Some 100 good answers first.
    std::thread::sleep(Duration::from_millis(500));
    v2.fault(r#"{"error_percent":100}"#);
    cluster.until(1, "the rollback", Duration::from_secs(3), |s| s["phase"] == "RolledBack");
    let state = cluster.agreed(&[0, 1, 2], Duration::from_millis(500));
    assert_eq!(state["weights"], serde_json::json!({"v1": 1.0}));
    // Some 100 requests more, none of which may reach the canary.
    std::thread::sleep(Duration::from_millis(500));
    let seen = traffic.stop();
    let first = seen.iter().filter(|s| s.status >= 500).map(|s| s.at).min().expect("a failed answer");
    let last = seen.iter().filter(|s| s.version == "v2").map(|s| s.at).max().expect("a canary answer");
    let exposed = last.saturating_duration_since(first);
    println!("from the first failed answer to the last canary answer: {exposed:?}");
    assert!(exposed < Duration::from_secs(1), "the canary answered for {exposed:?} after its first failure");
    assert!(seen.iter().all(|s| s.status == 200 || s.version == "v2"), "stable never fails");
}

#[test]
fn a_slow_canary_is_paused_and_an_operator_decides() {
    let (v1, v2) = (Upstream::start("v1"), Upstream::start("v2"));
    let cluster = Cluster::start();
    cluster.apply(
        0,
        &rollout(&v1.url(), &v2.url(), "    - setWeight: 50\n    - pause: { duration: 3s }\n    - setWeight: 100"),
    );
    v2.fault(r#"{"latency_ms":600}"#);
    cluster.agreed(&[0, 1, 2], Duration::from_millis(500));
    let traffic = Traffic::start(&cluster, 200);
    let state = cluster.until(2, "a pause", Duration::from_secs(20), |s| s["phase"] == "Paused");
    assert!(state["reason"].as_str().unwrap().contains("limit 500 ms"), "{state}");
    let answer = cluster.post(2, "/v1/rollouts/svc/abort", None, r#"{"reason":"too slow"}"#);
    assert_eq!(answer.status, 200, "{answer:?}");
    assert_eq!(cluster.agreed(&[0, 1, 2], Duration::from_millis(500))["phase"], "RolledBack");
    drop(traffic);
}

#[test]
fn the_same_key_gives_the_same_answer_on_every_node_and_after_restarts() {
    let (v1, v2) = (Upstream::start("v1"), Upstream::start("v2"));
    let mut cluster = Cluster::start();
    cluster.apply(0, &rollout(&v1.url(), &v2.url(), MANUAL));
    let first = cluster.post(2, "/v1/rollouts/svc/abort", Some("abort-1"), r#"{"reason":"x"}"#).json();
    assert_eq!((&first["status"], &first["repeated"]), (&"COMMITTED".into(), &false.into()), "{first}");
    for round in 0..2 {
        for i in 0..3 {
            let again = cluster.post(i, "/v1/rollouts/svc/abort", Some("abort-1"), r#"{"reason":"x"}"#).json();
            assert_eq!(
                (&again["status"], &again["slot"], &again["repeated"]),
                (&"COMMITTED".into(), &first["slot"], &true.into())
            );
        }
        let other = cluster.post(1, "/v1/rollouts/svc/retry", Some("abort-1"), "{}");
        assert_eq!(other.status, 422, "{other:?}");
        if round == 0 {
            (0..3).for_each(|i| cluster.kill(i));
            (0..3).for_each(|i| cluster.spawn(i, None));
            (0..3).for_each(|i| cluster.wait_ready(i));
        }
    }
    let records = cluster.history(1).into_iter().filter(|record| record["txid"] == "abort-1").count();
    assert_eq!(records, 1);
}

#[test]
fn completed_rollouts_can_be_undone_and_rolled_back_ones_retried() {
    let (v1, v2) = (Upstream::start("v1"), Upstream::start("v2"));
    let cluster = Cluster::start();
    cluster.apply(0, &rollout(&v1.url(), &v2.url(), MANUAL));
    assert_eq!(cluster.post(0, "/v1/rollouts/svc/abort", None, "{}").status, 200);
    assert_eq!(cluster.post(1, "/v1/rollouts/svc/retry", None, "{}").status, 200);
    let traffic = Traffic::start(&cluster, 200);
    let full = || cluster.post(2, "/v1/rollouts/svc/promote", None, r#"{"full":true}"#);
    assert_eq!(full().json()["status"], "COMMITTED");
    wait("completion", Duration::from_secs(20), || {
        full();
        cluster.state(0).filter(|state| state["phase"] == "Completed")
    });
    assert_eq!(cluster.post(0, "/v1/rollouts/svc/undo", None, "{}").status, 200);
    let state = cluster.agreed(&[0, 1, 2], Duration::from_millis(500));
    assert_eq!((&state["stable_model_id"], &state["canary_model_id"]), (&"v2".into(), &"v1".into()));
    drop(traffic);
}

#[test]
fn a_write_that_a_node_answered_is_served_by_that_node() {
    let (v1, v2) = (Upstream::start("v1"), Upstream::start("v2"));
    let cluster = Cluster::start();
    for round in 0..40 {
        let i = 1 + round % 2;
        let name = format!("svc{round}");
        let yaml = rollout(&v1.url(), &v2.url(), MANUAL).replace("name: svc }", &format!("name: {name} }}"));
        let mut data = Http::connect(cluster.nodes[i].data).unwrap();
        let answer = cluster.post(i, "/v1/rollouts", None, &yaml);
        assert_eq!(answer.status, 200, "{answer:?}");
        let served = data.send("POST", &format!("/v1/models/{name}:predict"), &[], "{}").unwrap();
        assert_eq!(
            (served.status, served.header("x-routing-version")),
            (200, Some("1")),
            "node {i}, {round}: {served:?}"
        );
    }
    cluster.assert_no_panic();
}
