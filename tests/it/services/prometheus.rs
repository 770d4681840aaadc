//! Metrics that a Prometheus keeps.

use std::time::Duration;

use super::Own;
use crate::cluster::harness::{Cluster, Traffic, Upstream, rollout};

#[test]
#[ignore = "needs the program prometheus: REQUIRE_SERVICES=1 scripts/services.sh up prometheus"]
fn prometheus_unavailable_holds_the_step_and_what_it_says_rolls_back() {
    let mut own = Own::new("prometheus");
    let (v1, v2) = (Upstream::start("v1"), Upstream::start("v2"));
    let cluster = Cluster::start();
    own.targets = cluster.nodes.iter().map(|node| format!("127.0.0.1:{}", node.api)).collect::<Vec<_>>().join(",");
    let steps = "    - setWeight: 20\n    - pause: { duration: 3s }\n    - setWeight: 50\n    - pause: { duration: 60s }\n    - setWeight: 100";
    let yaml = rollout(&v1.url(), &v2.url(), steps);
    let own_errors = "- { name: errors, strategy: THRESHOLD, thresholdRange: { max: 5 }, onFailure: rollback }";
    assert!(yaml.contains(own_errors));
    let requests = "sum(increase(aviary_requests_total{version='{{version}}'";
    let asked = format!(
        "- name: share-of-errors\n        thresholdRange: {{ max: 2 }}\n        provider:\n          prometheus:\n            \
         address: http://127.0.0.1:{}\n            interval: 1s\n            \
         query: \"100 * ({requests},code_class='5xx'}}[{{{{window}}}}])) or vector(0)) / {requests}}}[{{{{window}}}}]))\"",
        own.port
    );
    let yaml = yaml.replace(own_errors, &asked).replace("window: 30s", "window: 10s");
    // Too few for the data plane's own circuit breaker: five failures in a row, which would be quicker than the query looked at here.
    let faults = r#"{"error_percent":6}"#;
    cluster.apply(0, &yaml);
    let traffic = Traffic::start(&cluster, 150);
    let held = |state: &serde_json::Value| {
        let why = state["waiting_for"].as_str().unwrap_or_default();
        why.contains("share-of-errors: http://") && state["weights"]["v2"] == 0.2
    };
    cluster.until(0, "a step that holds", Duration::from_secs(15), held);
    // As long as a step's pause at most: the next one would have come.
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(cluster.state(1).unwrap()["weights"]["v2"], 0.2, "without an answer nothing goes on");
    own.up();
    cluster.until(0, "the promotion", Duration::from_secs(30), |state| state["weights"]["v2"] == 0.5);
    own.kill();
    // Several intervals of the query without an answer.
    std::thread::sleep(Duration::from_secs(4));
    assert_eq!(cluster.state(2).unwrap()["phase"], "Progressing", "an outage rolls nothing back");
    own.up();
    v2.fault(faults);
    let state = cluster.until(1, "the rollback", Duration::from_secs(40), |state| state["phase"] == "RolledBack");
    let reason = state["reason"].as_str().unwrap();
    assert!(reason.contains("share-of-errors: ") && reason.ends_with("limit 2"), "{state}");
    drop(traffic);
    cluster.assert_no_panic();
}
