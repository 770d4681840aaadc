//! Verdicts from reported events, without a request through the data plane.

use std::process::{Child, Stdio};
use std::time::{Duration, UNIX_EPOCH};

use serde_json::{Value, json};

use super::harness::{Answer, Cluster, Process, aviary, http};

const ROLLOUT: &str = "apiVersion: aviary/v1\nkind: Rollout\nmetadata: { name: svc }\nspec:
  stable: { version: v1, url: \"http://127.0.0.1:1\" }
  canary: { version: v2, url: \"http://127.0.0.1:2\" }
  steps: [ { setWeight: 20 }, { pause: {} }, { setWeight: 100 } ]
  analysis:
    minSamples: 20
    metrics: [ { name: errors-vs-stable, strategy: SEQUENTIAL, allowedIncrease: 0.02 } ]\n";

fn now_ms() -> u64 {
    UNIX_EPOCH.elapsed().unwrap().as_millis() as u64
}

fn event(id: &str, version: &str, status: u64, latency_ms: f64, at_ms: u64) -> Value {
    json!({"service": "svc", "version": version, "status": status, "latency_ms": latency_ms, "event_time": at_ms, "event_id": id})
}

fn report(cluster: &Cluster, node: usize, kind: &str, body: &str) -> Answer {
    http(cluster.nodes[node].api, "POST", "/v1/telemetry", &[("content-type", kind)], body).unwrap()
}

fn produce(cluster: &Cluster, more: &[&str]) -> Child {
    let api: Vec<_> = cluster.nodes.iter().map(|node| format!("http://127.0.0.1:{}", node.api)).collect();
    let mut command = aviary();
    command.args(["--api", &api.join(","), "telemetry", "produce", "--service", "svc", "--stable", "v1"]);
    command.args(["--canary", "v2", "--share", "20", "--rate", "300"]).args(more);
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

#[test]
fn reported_events_are_counted_once_and_rejected_by_kind() {
    let cluster = Cluster::start();
    cluster.apply(0, ROLLOUT);
    cluster.agreed(&[0, 1, 2], Duration::from_millis(500));
    let now = now_ms();
    let events = [
        event("a", "v1", 200, 12.0, now + 1),
        event("b", "v2", 500, 12.0, now),
        event("b", "v2", 500, 12.0, now),
        event("c", "v9", 200, 12.0, now),
        event("d", "v2", 200, -1.0, now),
        event("e", "v2", 99, 1.0, now),
        event("f", "v2", 200, 1.0, now + 3_600_000),
        event("g", "v2", 200, 1.0, now - 3_600_000),
        json!({"service": "svc"}),
        json!({"service": "other", "version": "v1", "status": 200, "latency_ms": 1, "event_time": now}),
    ];
    let answer = report(&cluster, 1, "application/json", &json!({"events": events}).to_string());
    assert_eq!(answer.status, 200, "{answer:?}");
    let found = answer.json();
    assert_eq!(found["accepted"], 2, "{found}");
    let kinds = json!({"bad_latency": 1, "bad_status": 1, "duplicate": 1, "future": 1, "late": 1, "malformed": 1,
        "unknown_service": 1, "unknown_version": 1});
    assert_eq!(found["rejected"], kinds, "{found}");
    assert_eq!(found["first_rejected"][1]["error"], "version is \"v9\", expected v1 or v2");
    // The evidence of one node is the cluster's.
    let seen = || {
        let answer = http(cluster.nodes[2].data, "GET", "/health/snapshot", &[], "").ok()?.json();
        let health = if answer["cluster"].is_object() { answer } else { answer["svc"].clone() };
        (health["cluster"]["v2"]["errors"] == 1 && health["cluster"]["v1"]["count"] == 1).then_some(())
    };
    super::harness::wait("the evidence", Duration::from_secs(3), seen);
    // Lines, and a batch of which nothing counts.
    let answer = report(&cluster, 0, "application/x-ndjson", "nonsense\n\n");
    assert_eq!((answer.status, &answer.json()["rejected"]["malformed"]), (422, &json!(1)));
    assert_eq!(report(&cluster, 0, "application/json", "nonsense").status, 400);
    let metrics = http(cluster.nodes[1].api, "GET", "/metrics", &[], "").unwrap();
    let text = String::from_utf8(metrics.body).unwrap();
    assert!(text.contains("aviary_telemetry_rejected_total{source=\"http\",kind=\"duplicate\"} 1"), "{text}");
    assert!(text.contains("aviary_telemetry_out_of_order_total{source=\"http\"} 1"), "{text}");
    cluster.assert_no_panic();
}

#[test]
fn a_canary_that_fails_in_reported_events_is_rolled_back_and_an_incident_that_both_share_is_not() {
    let cluster = Cluster::start();
    cluster.apply(0, ROLLOUT);
    cluster.agreed(&[0, 1, 2], Duration::from_millis(500));
    let mut incident =
        Process(produce(&cluster, &["--profile", "shared-incident", "--after", "2s", "--duration", "8s"]));
    assert!(incident.ended_within(Duration::from_secs(12)));
    let state = cluster.state(1).unwrap();
    assert_eq!(state["phase"], "Progressing", "{state}");
    let mut burst = Process(produce(&cluster, &["--profile", "error-burst", "--seed", "2", "--duration", "60s"]));
    let state = cluster.until(1, "the rollback", Duration::from_secs(40), |s| s["phase"] == "RolledBack");
    assert!(state["reason"].as_str().unwrap().contains("errors-vs-stable"), "{state}");
    burst.kill();
    // Malformed, absurd and unknown events by the thousand change nothing and end nothing.
    let lines: String =
        (0..20_000).map(|i| format!("{{\"service\":\"svc\",\"latency_ms\":{i}e300,\"x\":[[[\n")).collect();
    let answer = report(&cluster, 2, "application/x-ndjson", &lines);
    assert_eq!((answer.status, &answer.json()["rejected"]["malformed"]), (422, &json!(20_000)));
    cluster.assert_no_panic();
}

#[test]
fn a_batch_of_four_million_lines_that_are_no_events_takes_no_memory_to_speak_of() {
    let cluster = Cluster::start();
    let pid = cluster.nodes[1].process.as_ref().unwrap().0.id();
    let peak_kib = || -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    };
    let before = peak_kib();
    let answer = report(&cluster, 1, "application/x-ndjson", &"1\n".repeat(4_000_000));
    assert_eq!((answer.status, &answer.json()["rejected"]), (422, &json!({"malformed": 4_000_000})));
    // The body itself, twice: as it comes in pieces, and whole.
    assert!(peak_kib() - before < 64 * 1024, "{} KiB, {before} KiB before", peak_kib());
}
