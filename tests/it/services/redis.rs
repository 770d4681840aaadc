//! Decisions in Redis, and promotions that wait for it.

use std::collections::BTreeMap;
use std::time::Duration;

use aviary::schema::v1::{Decision, DecisionKind, WindowVerdict};

use super::{Own, apply_when_ready};
use crate::cluster::harness::{Cluster, Traffic, Upstream, http, rollout, wait};

/// Returns the cluster's id, as its keys begin with.
fn prefix(cluster: &Cluster) -> String {
    let answer = http(cluster.nodes[0].api, "GET", "/v1/cluster", &[], "").unwrap().json();
    format!("aviary:{{{}}}", answer["cluster"].as_str().unwrap())
}

fn stored(connection: &mut redis::Connection, prefix: &str) -> BTreeMap<String, String> {
    redis::cmd("HGETALL").arg(format!("{prefix}:rollout:svc")).query(connection).unwrap()
}

fn is_state_of(state: &BTreeMap<String, String>, decision: &Decision) -> bool {
    let expected = [
        ("sequence", decision.sequence.to_string()),
        ("routing_version", decision.routing_version.to_string()),
        ("stable", decision.stable_version.clone()),
        ("canary", decision.canary_version.clone()),
        ("canary_weight_bp", decision.canary_weight_bp.to_string()),
        ("transaction_id", decision.transaction_id.clone()),
    ];
    expected.iter().all(|(key, value)| state.get(*key) == Some(value))
}

/// Checks that Redis has the verdicts of these windows, and no other ones.
fn has_all(cluster: &Cluster, url: &str, windows: &[(&Decision, &WindowVerdict)]) {
    let (prefix, mut connection) = (prefix(cluster), redis::Client::open(url).unwrap().get_connection().unwrap());
    for (decision, window) in windows {
        let key = format!("{prefix}:window:svc:{}:{}", decision.rollout_generation, window.to_ms);
        let verdict: String = redis::cmd("GET").arg(&key).query(&mut connection).unwrap();
        let word = window.verdict().as_str_name().trim_start_matches("VERDICT_").to_string();
        assert_eq!(verdict, format!("{} {word}", decision.sequence), "{key}");
    }
    let keys: Vec<String> = redis::cmd("KEYS").arg(format!("{prefix}:window:*")).query(&mut connection).unwrap();
    assert_eq!(keys.len(), windows.len(), "no verdict but those of the log");
}

/// Checks that Redis has the state after the last of these decisions, and the verdict of every window, and nothing else.
pub fn agrees(cluster: &Cluster, url: &str, all: &[Decision]) {
    let prefix = prefix(cluster);
    let mut connection = redis::Client::open(url).unwrap().get_connection().unwrap();
    let last = all.iter().rfind(|one| one.kind() != DecisionKind::Verdict).unwrap();
    let found = wait("the last decision in Redis", Duration::from_secs(10), || {
        let found = stored(&mut connection, &prefix);
        (found.get("sequence") == Some(&last.sequence.to_string())).then_some(found)
    });
    assert!(is_state_of(&found, last), "{found:?} {last:?}");
    let windows: Vec<_> = all.iter().filter_map(|one| Some((one, one.window.as_ref()?))).collect();
    has_all(cluster, url, &windows);
}

#[test]
#[ignore = "needs redis-server: scripts/services.sh up"]
fn redis_unavailable_holds_promotions_lets_rollbacks_through_and_is_made_up_for() {
    let own = Own::start("redis");
    let url = format!("redis://127.0.0.1:{}", own.port);
    let (v1, v2) = (Upstream::start("v1"), Upstream::start("v2"));
    let cluster = Cluster::start_with(&format!("\n[redis]\nurl = \"{url}\"\n"));
    let yaml = rollout(
        &v1.url(),
        &v2.url(),
        "    - setWeight: 20\n    - pause: { duration: 2s }\n    - setWeight: 50\n    - pause: {}\n    - setWeight: 100",
    );
    apply_when_ready(&cluster, &yaml);
    own.kill();
    let traffic = Traffic::start(&cluster, 150);
    let held = |state: &serde_json::Value| state["waiting_for"].as_str().unwrap_or_default().contains("redis: ");
    cluster.until(0, "a promotion that holds", Duration::from_secs(10), held);
    // As long as the step's pause: it would be over.
    std::thread::sleep(Duration::from_secs(2));
    let state = cluster.state(1).unwrap();
    assert_eq!((&state["weights"]["v2"], &state["phase"]), (&0.2.into(), &"Progressing".into()), "{state}");
    let refused = cluster.promote(0, None);
    assert!(refused.status == 409 && refused.json().to_string().contains("redis: "), "{}", refused.json());
    own.up();
    cluster.until(0, "the promotion", Duration::from_secs(10), |state| state["weights"]["v2"] == 0.5);
    own.kill();
    assert_eq!(cluster.post(1, "/v1/rollouts/svc/abort", None, r#"{"reason":"lunch"}"#).status, 200);
    assert_eq!(cluster.agreed(&[0, 1, 2], Duration::from_secs(1))["weights"], serde_json::json!({"v1": 1.0}));
    own.up();
    let (prefix, client) = (prefix(&cluster), redis::Client::open(url).unwrap());
    wait("the rollback in Redis", Duration::from_secs(15), || {
        let found = stored(&mut client.get_connection().ok()?, &prefix);
        (found.get("kind")? == "ROLLBACK" && found.get("reasons")? == "lunch").then_some(())
    });
    drop(traffic);
    cluster.assert_no_panic();
}

#[test]
#[ignore = "needs redis-server: scripts/services.sh"]
fn redis_that_answers_but_takes_nothing_holds_promotions_too() {
    let own = Own::start("redis");
    let url = format!("redis://127.0.0.1:{}", own.port);
    let mut connection = redis::Client::open(url.as_str()).unwrap().get_connection().unwrap();
    let mut replicas_to_write = |count: u32| {
        redis::cmd("CONFIG").arg("SET").arg("min-replicas-to-write").arg(count).exec(&mut connection).unwrap();
    };
    let (v1, v2) = (Upstream::start("v1"), Upstream::start("v2"));
    let cluster = Cluster::start_with(&format!("\n[redis]\nurl = \"{url}\"\n"));
    let steps = "    - setWeight: 20\n    - pause: { duration: 2s }\n    - setWeight: 50\n    - pause: {}\n    - setWeight: 100";
    apply_when_ready(&cluster, &rollout(&v1.url(), &v2.url(), steps));
    replicas_to_write(1);
    let traffic = Traffic::start(&cluster, 150);
    let held = |state: &serde_json::Value| state["waiting_for"].as_str().unwrap_or_default().contains("NOREPLICAS");
    cluster.until(0, "a promotion that holds", Duration::from_secs(10), held);
    // As long as the step's pause: it would be over.
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(cluster.state(1).unwrap()["weights"]["v2"], 0.2);
    replicas_to_write(0);
    cluster.until(0, "the promotion", Duration::from_secs(10), |state| state["weights"]["v2"] == 0.5);
    let prefix = prefix(&cluster);
    wait("the promotion in Redis", Duration::from_secs(15), || {
        (stored(&mut connection, &prefix).get("canary_weight_bp")? == "5000").then_some(())
    });
    drop(traffic);
    cluster.assert_no_panic();
}
