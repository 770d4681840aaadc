//! Any process may die at any moment.

use std::time::{Duration, Instant};

use serde_json::Value;

use super::harness::{Cluster, MANUAL, Traffic, Upstream, http, rollout, wait};

fn with_rollout() -> (Upstream, Upstream, Cluster) {
    let (v1, v2) = (Upstream::start("v1"), Upstream::start("v2"));
    let cluster = Cluster::start();
    cluster.apply(0, &rollout(&v1.url(), &v2.url(), MANUAL));
    cluster.agreed(&[0, 1, 2], Duration::from_millis(500));
    (v1, v2, cluster)
}

/// Waits until a promotion would not be held for want of samples.
fn gather_evidence(cluster: &Cluster) {
    for _ in 0..200 {
        for i in 0..3 {
            let _ = http(cluster.nodes[i].data, "POST", "/predict", &[], "{}");
        }
    }
    // Longer than the third of a second in which peers learn of a node's counts.
    std::thread::sleep(Duration::from_millis(600));
}

/// Where a coordinator passes in one commit, in order.
const POINTS: [&str; 7] = [
    "before-prepare",
    "after-prepare",
    "before-propose",
    "after-propose",
    "before-chosen",
    "after-chosen",
    "after-append",
];

/// Restarts the coordinator so that it dies at `point` of its next commit of `kind`, has `prepare` set the stage, asks
/// it for that commit, and checks that one outcome comes of it: on the survivors in time, on all three afterwards, and
/// never another one than a client was told.
fn kill_coordinator(
    cluster: &mut Cluster,
    point: &str,
    kind: &str,
    (path, body): (&str, &str),
    prepare: impl Fn(&Cluster),
) -> Value {
    // What the last round appended is synced by then: a record caught up with again would set off `after-append`.
    std::thread::sleep(Duration::from_millis(200));
    cluster.kill(0);
    cluster.spawn(0, Some(&format!("{point}:{kind}")));
    cluster.wait_ready(0);
    prepare(cluster);
    cluster.agreed(&[0, 1, 2], Duration::from_secs(1));
    let key = format!("{kind}-{point}");
    let headers = [("idempotency-key", key.as_str()), ("content-type", "application/json")];
    let asked = http(cluster.nodes[0].api, "POST", path, &headers, body);
    let died = cluster.nodes[0].process.as_mut().unwrap().ended_within(Duration::from_secs(2));
    assert!(died, "{key}: the failpoint was not reached: {asked:?}");
    let began = Instant::now();
    let told = asked.ok().map(|answer| answer.json()["status"].clone());

    // A repetition on a survivor tells the outcome, and both survivors have it.
    let answer = wait(&format!("{key}: an outcome"), Duration::from_millis(3500), || {
        let answer = cluster.post(1, path, Some(&key), body);
        (answer.status != 503).then(|| answer.json())
    });
    let settled = cluster.agreed(&[1, 2], Duration::from_millis(3500).saturating_sub(began.elapsed()));
    println!("{key}: told {told:?}, settled {} after {:?}", answer["status"], began.elapsed());
    if let Some(told) = told {
        assert_eq!(told, answer["status"], "{key}: what a client was told stays true");
    }

    cluster.nodes[0].process = None;
    let began = Instant::now();
    cluster.spawn(0, None);
    cluster.wait_ready(0);
    let state = cluster.agreed(&[0, 1, 2], Duration::from_secs(3).saturating_sub(began.elapsed()));
    assert!(state["slot"].as_u64() >= settled["slot"].as_u64());
    for i in 0..3 {
        let again = cluster.post(i, path, Some(&key), body).json();
        let found = ["status", "slot", "repeated"].map(|name| &again[name]);
        assert_eq!(found, [&answer["status"], &answer["slot"], &true.into()], "{key} at node {i}");
    }
    answer
}

#[test]
fn a_coordinator_killed_at_any_point_leaves_one_outcome() {
    let (v1, v2, mut cluster) = with_rollout();
    for point in POINTS {
        let promote = ("/v1/rollouts/svc/promote", "{}");
        let answer = kill_coordinator(&mut cluster, point, "Promote", promote, |cluster| {
            // Every round begins with a rollout at its first stage.
            let _ = cluster.post(1, "/v1/rollouts/svc/abort", None, "{}");
            wait("a rollout", Duration::from_secs(10), || {
                (cluster.post(1, "/v1/rollouts/svc/retry", None, "{}").status == 200).then_some(())
            });
            gather_evidence(cluster);
        });
        for i in 0..3 {
            let key = format!("Promote-{point}");
            let records: Vec<_> = cluster.history(i).into_iter().filter(|r| r["txid"] == key.as_str()).collect();
            assert_eq!(records.len(), 1, "{point}: one outcome on node {i}");
            let promoted = records[0]["kind"] == "Promote";
            assert_eq!(promoted, answer["status"] == "COMMITTED", "{point}: {records:?} against {answer}");
        }
    }
    cluster.assert_no_panic();
    drop((v1, v2));
}

#[test]
fn a_coordinator_killed_while_it_starts_or_lowers_or_changes_members_leaves_one_outcome() {
    let (v1, v2, mut cluster) = with_rollout();
    for point in &POINTS[1..5] {
        kill_coordinator(&mut cluster, point, "Start", ("/v1/rollouts/svc/retry", "{}"), |cluster| {
            let _ = cluster.post(1, "/v1/rollouts/svc/abort", None, "{}");
        });
        let rollback = ("/v1/rollouts/svc/abort", r#"{"reason":"a test"}"#);
        let answer = kill_coordinator(&mut cluster, point, "Rollback", rollback, |cluster| {
            // A start needs everybody, and one has just come back.
            wait("a rollout to roll back", Duration::from_secs(10), || {
                let _ = cluster.post(1, "/v1/rollouts/svc/retry", None, "{}");
                (cluster.state(1)?["phase"] == "Progressing").then_some(())
            });
        });
        assert_eq!(answer["status"], "COMMITTED", "{point}: nobody's permission is needed");
        let config = ("/v1/cluster/cordon", r#"{"node":"c"}"#);
        let answer = kill_coordinator(&mut cluster, point, "Cordon", config, |cluster| {
            wait("a node that is not cordoned", Duration::from_secs(10), || {
                let answer = cluster.post(1, "/v1/cluster/uncordon", None, r#"{"node":"c"}"#);
                let is_there = String::from_utf8_lossy(&answer.body).contains("is not cordoned");
                (answer.status == 200 || is_there).then_some(())
            });
        });
        assert_eq!(answer["status"], "COMMITTED", "{point}");
    }
    cluster.assert_no_panic();
    drop((v1, v2));
}

#[test]
fn a_dead_participant_stops_promotions_by_name_and_no_rollback() {
    let (v1, v2, mut cluster) = with_rollout();
    gather_evidence(&cluster);
    cluster.kill(2);
    let began = Instant::now();
    let answer = cluster.promote(0, None);
    let took = began.elapsed();
    let json = answer.json();
    assert_eq!((answer.status, &json["code"]), (409, &"ABORTED".into()), "{json}");
    assert!(json["reasons"].to_string().contains("c:"), "the missing node is named: {json}");
    assert!(took <= Duration::from_secs(2), "{took:?}");

    let began = Instant::now();
    assert_eq!(cluster.post(1, "/v1/rollouts/svc/abort", None, "{}").json()["status"], "COMMITTED");
    assert!(began.elapsed() <= Duration::from_secs(1), "{:?}", began.elapsed());

    // Cordoned, the dead node no longer holds up increases.
    let answer = cluster.post(0, "/v1/cluster/cordon", None, r#"{"node":"c"}"#);
    assert_eq!(answer.status, 200, "{answer:?}");
    assert_eq!(cluster.post(0, "/v1/rollouts/svc/retry", None, "{}").json()["status"], "COMMITTED");
    gather_evidence(&cluster);
    let answer = cluster.promote(0, None).json();
    assert_eq!(answer["status"], "COMMITTED", "{answer}");

    // Back, it follows, and serves stable while it is cordoned.
    cluster.spawn(2, None);
    cluster.wait_ready(2);
    let state = cluster.agreed(&[0, 1, 2], Duration::from_secs(3));
    assert_eq!(state["weights"]["v2"], 0.5);
    for _ in 0..100 {
        let answer = http(cluster.nodes[2].data, "POST", "/predict", &[], "{}").unwrap();
        assert_eq!(answer.header("x-served-by"), Some("v1"));
    }
    drop((v1, v2));
}

#[test]
fn a_lone_survivor_serves_stable_only_and_takes_no_writes() {
    let (v1, v2, mut cluster) = with_rollout();
    cluster.kill(0);
    cluster.kill(2);
    let stable_only = |state: &Value| state["effective_weights"]["v1"] == 1.0;
    cluster.until(1, "the end of its lease", Duration::from_millis(2100), stable_only);
    for _ in 0..200 {
        let answer = http(cluster.nodes[1].data, "POST", "/predict", &[], "{}").unwrap();
        assert_eq!((answer.status, answer.header("x-served-by")), (200, Some("v1")));
    }
    let answer = cluster.post(1, "/v1/rollouts/svc/abort", None, "{}");
    assert_eq!((answer.status, &answer.json()["code"]), (503, &"NO_QUORUM".into()), "{answer:?}");

    cluster.spawn(0, None);
    cluster.spawn(2, None);
    (0..3).for_each(|i| cluster.wait_ready(i));
    assert_eq!(cluster.post(1, "/v1/rollouts/svc/abort", None, "{}").status, 200);
    drop((v1, v2));
}

#[test]
fn no_request_fails_because_a_node_restarts() {
    let (v1, v2, mut cluster) = with_rollout();
    let traffic = Traffic::start(&cluster, 100);
    for i in 0..3 {
        cluster.kill(i);
        // Requests come meanwhile, and find nobody.
        std::thread::sleep(Duration::from_millis(200));
        cluster.spawn(i, None);
        cluster.wait_ready(i);
    }
    let seen = traffic.stop();
    // Connections to the dead node itself break or are refused; whatever is answered is answered well.
    let answered: Vec<_> = seen.iter().filter(|s| s.status != 0).collect();
    let bad: Vec<_> = answered.iter().filter(|s| s.status != 200).collect();
    assert!(bad.is_empty(), "{} of {} answers were bad: {:?}", bad.len(), answered.len(), bad.first());
    drop((v1, v2));
}

#[test]
fn a_node_without_its_acceptor_file_has_no_vote() {
    let (v1, v2, mut cluster) = with_rollout();
    cluster.kill(2);
    std::fs::remove_file(cluster.data_dir(2).join("acceptor")).unwrap();
    cluster.spawn(2, None);
    let port = cluster.nodes[0].api;
    let members = wait("c shows why it doesn't count", Duration::from_secs(5), || {
        let cluster = http(port, "GET", "/v1/cluster", &[], "").ok()?.json().to_string();
        cluster.contains("its memory is gone").then_some(cluster)
    });
    assert!(members.contains("readmit"), "{members}");
    cluster.kill(1);
    let answer = cluster.post(0, "/v1/rollouts/svc/abort", None, "{}");
    assert_eq!(answer.status, 503, "two votes of three are needed, and c's is none: {answer:?}");
    drop((v1, v2));
}
