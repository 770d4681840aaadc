//! What tells an operator whether the nodes may be replaced one by one, and what a node does with a later version's files.

use std::fs;
use std::process::Output;
use std::time::Duration;

use serde_json::Value;

use super::harness::{Cluster, aviary, http, wait};

fn run(cluster: &Cluster, arguments: &[&str]) -> (Option<i32>, String) {
    let api = format!("http://127.0.0.1:{}", cluster.nodes[0].api);
    let Output { status, stdout, .. } = aviary().args(arguments).args(["--api", &api]).output().unwrap();
    (status.code(), String::from_utf8(stdout).unwrap())
}

#[test]
fn the_check_names_the_node_that_is_down_and_the_status_names_all_builds() {
    let mut cluster = Cluster::start();
    let version: Value = serde_json::from_str(&run(&cluster, &["version", "-o", "json"]).1).unwrap();
    let build = format!("{} ({})", version["version"].as_str().unwrap(), version["commit"].as_str().unwrap());
    assert!(version["formats"]["journal"].is_u64() && version["toolchain"].as_str().unwrap().starts_with("rustc "));
    let may_begin = wait("an upgrade may begin", Duration::from_secs(10), || {
        let (code, text) = run(&cluster, &["cluster", "upgrade", "--check"]);
        (code == Some(0)).then_some(text)
    });
    assert!(may_begin.contains("all 3 voters are alive and caught up"), "{may_begin}");
    let state = http(cluster.nodes[0].api, "GET", "/v1/cluster", &[], "").unwrap().json();
    for node in ["a", "b", "c"] {
        let member = &state["members"][node];
        assert_eq!((&member["build"], &member["protocol"]), (&Value::from(build.as_str()), &version["protocol"]));
        assert_eq!(member["formats"]["journal"], version["formats"]["journal"].to_string());
    }
    let status = run(&cluster, &["cluster", "status"]).1;
    assert_eq!(status.matches(&build).count(), 3, "{status}");

    cluster.kill(2);
    let (code, text) = wait("c is missed", Duration::from_secs(10), || {
        Some(run(&cluster, &["cluster", "upgrade", "--check"])).filter(|(code, _)| *code != Some(0))
    });
    assert_eq!(code, Some(1), "{text}");
    assert!(text.contains("node c is not alive\n    start node c, or: aviary cluster remove c"), "{text}");
    // What a node said stays known while it is away.
    assert_eq!(run(&cluster, &["cluster", "status"]).1.matches(&build).count(), 3);
}

#[test]
fn a_node_that_meets_a_later_journal_ends_with_both_versions() {
    let mut cluster = Cluster::start();
    cluster.kill(2);
    let text = "journal 200";
    let marker = format!("{text} {:08x}\n", crc32c::crc32c(text.as_bytes()));
    fs::write(cluster.data_dir(2).join("journal.format"), marker).unwrap();
    let output = aviary().arg("node").arg("--config").arg(cluster.config(2)).output().unwrap();
    let told = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{told}");
    let expected = format!("the log's record has format 200, expected {}", aviary::adapters::disk::format::JOURNAL);
    assert!(told.contains(&expected) && told.contains("start the version of aviary that wrote it"), "{told}");
}
