//! A node whose disk was put back to an earlier state: it forgot promises, so it has no vote.

use std::fs;
use std::time::Duration;

use serde_json::Value;

use super::harness::{Cluster, MANUAL, aviary, copy, http, rollout, wait};

fn change(cluster: &Cluster, verb: &str) {
    wait(verb, Duration::from_secs(5), || {
        Some(cluster.post(0, &format!("/v1/rollouts/svc/{verb}"), None, "{}")).filter(|answer| answer.status == 200)
    });
}

/// Returns why node c's vote doesn't count, as node a tells it; none while it counts.
fn counts_not(cluster: &Cluster) -> Option<String> {
    let answer = http(cluster.nodes[0].api, "GET", "/v1/cluster", &[], "").unwrap().json();
    Value::as_str(&answer["members"]["c"]["counts_not"]).map(ToString::to_string)
}

#[test]
fn a_node_on_an_old_copy_of_its_disk_says_what_to_do_and_votes_once_it_is_readmitted() {
    let mut cluster = Cluster::start();
    cluster.apply(0, &rollout("http://127.0.0.1:1", "http://127.0.0.1:2", MANUAL));
    cluster.agreed(&[0, 1, 2], Duration::from_secs(2));
    cluster.kill(2);
    let old = cluster.dir.path().join("old");
    copy(&cluster.data_dir(2), &old);
    cluster.spawn(2, None);
    cluster.wait_ready(2);
    // An ordinary restart keeps the vote.
    ["pause", "resume", "pause"].iter().for_each(|verb| change(&cluster, verb));
    cluster.agreed(&[0, 1, 2], Duration::from_secs(2));
    assert_eq!(counts_not(&cluster), None);

    cluster.kill(2);
    fs::remove_dir_all(cluster.data_dir(2)).unwrap();
    copy(&old, &cluster.data_dir(2));
    cluster.spawn(2, None);
    let why = wait("the old copy is noticed", Duration::from_secs(5), || {
        counts_not(&cluster).filter(|why| why.starts_with("its memory is gone: incarnation is "))
    });
    cluster.until(2, "c follows without a vote", Duration::from_secs(5), |state| state["mode"] == "learner");
    let incarnation = why.split([' ', ',']).nth(6).unwrap();
    let log = fs::read_to_string(cluster.log(2)).unwrap();
    let command = format!("aviary cluster readmit c --incarnation {incarnation}");
    assert!(log.contains("is an old copy") && log.contains(&command), "expected {command:?} in {log}");

    cluster.kill(1);
    let answer = cluster.post(0, "/v1/rollouts/svc/abort", None, "{}");
    assert_eq!(answer.status, 503, "a and the old copy of c are no majority: {answer:?}");
    cluster.spawn(1, None);
    cluster.wait_ready(1);
    let api = format!("http://127.0.0.1:{}", cluster.nodes[0].api);
    let words: Vec<_> = command.split(' ').skip(1).collect();
    let output = aviary().args(words).args(["--api", &api]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    cluster.until(2, "c votes", Duration::from_secs(5), |state| state["mode"] == "normal");
    cluster.kill(1);
    change(&cluster, "abort");
    cluster.assert_no_panic();
}
