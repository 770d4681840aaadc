//! What strangers and hurried people send.

use std::fs;
use std::io::Write;
use std::net::TcpStream;
use std::time::Duration;

use super::harness::{Cluster, MANUAL, Upstream, aviary, http, rollout};

#[test]
fn garbage_on_the_control_port_changes_nothing() {
    shrugs_garbage_off(Cluster::start(), &["transport"]);
}

#[test]
fn garbage_on_a_plaintext_control_port_changes_nothing() {
    shrugs_garbage_off(
        Cluster::start_with("\n[control]\nplaintext = true\n"),
        &["magic", "version", "too_long", "checksum"],
    );
}

/// Sends garbage to all control ports; each must count it in the given classes, and commit as before.
fn shrugs_garbage_off(cluster: Cluster, classes: &[&str]) {
    let (v1, v2) = (Upstream::start("v1"), Upstream::start("v2"));
    let mut noise = 1u64;
    let mut kept = Vec::new();
    for round in 0..60 {
        let mut bytes: Vec<u8> = std::iter::repeat_with(|| {
            noise = noise.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (noise >> 33) as u8
        })
        .take(64)
        .collect();
        // What a stranger sends who knows how a frame begins: another version, a length, a body of noise.
        match round / 3 % 5 {
            0 => bytes = vec![0xff; 64],
            1 => bytes.splice(..11, *b"AVRY\xff\xff\x00\x00\x00\x00\x31").for_each(drop),
            2 => bytes.splice(..11, *b"AVRY\x00\x02\x00\xff\xff\xff\xff").for_each(drop),
            3 => bytes.splice(..11, *b"AVRY\x00\x02\x00\x00\x00\x00\x31").for_each(drop),
            _ => {}
        }
        let mut stream = TcpStream::connect(("127.0.0.1", cluster.nodes[round % 3].control)).unwrap();
        let _ = stream.write_all(&bytes);
        kept.push(stream);
    }
    cluster.apply(0, &rollout(&v1.url(), &v2.url(), MANUAL));
    cluster.agreed(&[0, 1, 2], Duration::from_millis(500));
    for node in &cluster.nodes {
        let metrics = http(node.api, "GET", "/metrics", &[], "").unwrap().body;
        let metrics = String::from_utf8(metrics).unwrap();
        for class in classes {
            let series = format!("aviary_connections_refused_total{{port=\"control\",class=\"{class}\"}} ");
            let found = metrics.lines().find_map(|line| line.strip_prefix(&series));
            let count: u64 = found.unwrap_or_else(|| panic!("no {series} in {metrics}")).parse().unwrap();
            assert!(count >= 4, "{class} at node {}: {count}", node.name);
        }
    }
    cluster.assert_no_panic();
}

#[test]
fn a_wrong_rollout_file_is_refused_with_what_was_expected() {
    let cluster = Cluster::start();
    let good = rollout("http://127.0.0.1:1", "http://127.0.0.1:1", MANUAL);
    let cases = [
        (good.replace("setWeight: 20", "setWieght: 20"), "unknown field `setWieght`"),
        (good.replace("- setWeight: 20", "- weights: { v1: 85, v2: 5 }"), "weights sum to 9000 bp, expected 10000 bp"),
        (good.replace("setWeight: 20", "setWeight: 120"), "0 to 100"),
        (good.replace("version: v2", "version: v1"), "another version than stable"),
        ("{".to_string(), ""),
    ];
    for (text, expected) in cases {
        let headers = [("content-type", "application/yaml")];
        let answer = http(cluster.nodes[0].api, "POST", "/v1/rollouts", &headers, &text).unwrap();
        let error = answer.json()["detail"].as_str().unwrap().to_string();
        assert_eq!(answer.status, 400, "{error}");
        assert!(error.contains(expected), "{error:?} holds no {expected:?}");
    }
}

#[test]
fn a_canary_that_cannot_be_reached_costs_users_nothing() {
    let v1 = Upstream::start("v1");
    let cluster = Cluster::start();
    cluster.apply(0, &rollout(&v1.url(), "http://127.0.0.1:1", MANUAL));
    for i in 0..300 {
        let answer = http(cluster.nodes[i % 3].data, "POST", "/predict", &[], "{}").unwrap();
        assert_eq!(answer.status, 200, "{answer:?}");
    }
    cluster.until(1, "the rollback", Duration::from_secs(3), |s| s["phase"] == "RolledBack");
}

#[test]
fn a_taken_port_and_a_missing_genesis_end_the_start_with_a_clear_word() {
    let mut cluster = Cluster::found();
    let holder = std::net::TcpListener::bind(("127.0.0.1", cluster.nodes[0].control)).unwrap();
    let output = aviary().arg("node").arg("--config").arg(cluster.config(0)).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).to_string();
    assert!(!output.status.success() && said.contains(&cluster.nodes[0].control.to_string()), "{said}");
    assert!(said.contains("taken"), "{said}");
    drop(holder);

    fs::remove_dir_all(cluster.data_dir(1)).unwrap();
    let output = aviary().arg("node").arg("--config").arg(cluster.config(1)).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).to_string();
    assert!(!output.status.success() && said.contains("genesis") && said.contains("cluster init"), "{said}");

    // A second init must not overwrite what is there.
    let output = aviary().args(["cluster", "init", "--config"]).arg(cluster.config(0)).output().unwrap();
    assert!(!output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    cluster.spawn(0, None);
}
