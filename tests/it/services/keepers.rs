//! Where decisions are kept: the log that every node has, a topic, Redis. One contract for all of them.

use std::time::Duration;

use aviary::schema::v1::{Decision, DecisionKind};

use super::kafka::Topics;
use super::{Following, apply_when_ready, kinds, redis, streamed, variable};
use crate::cluster::harness::{Cluster, Traffic, Upstream, rollout, wait};

/// Kills coordinators, again and again, and ends the rollout; returns the slot of its end.
fn kill_and_roll_back(cluster: &mut Cluster) -> u64 {
    for node in [0, 1, 0, 0] {
        // Windows are a second long: with these odd times, deaths and returns fall into all parts of them.
        std::thread::sleep(Duration::from_millis(2_300));
        cluster.kill(node);
        // Longer than the others take to find another coordinator.
        std::thread::sleep(Duration::from_millis(1_700));
        cluster.spawn(node, None);
        cluster.wait_ready(node);
    }
    wait("the rollback", Duration::from_secs(10), || {
        let answer = cluster.post(2, "/v1/rollouts/svc/abort", None, "{}");
        (answer.status == 200).then(|| answer.json()["sequence"].as_u64().unwrap())
    })
}

/// Each window is decided once, without a gap, whichever node dies; every node says the same, a client that resumes hears the same, and so
/// does a client of the keeper: `agrees` checks that.
fn keeps_every_decision(config: &str, agrees: &dyn Fn(&mut Cluster, &[Decision])) {
    let (v1, v2) = (Upstream::start("v1"), Upstream::start("v2"));
    let mut cluster = Cluster::start_with(config);
    let yaml = rollout(&v1.url(), &v2.url(), "    - setWeight: 50\n    - pause: {}\n    - setWeight: 100");
    apply_when_ready(&cluster, &yaml.replace("window: 30s", "window: 1s"));
    let traffic = Traffic::start(&cluster, 100);
    let following = Following::start(&cluster);
    let last = kill_and_roll_back(&mut cluster);
    drop(traffic);
    let all = streamed(&cluster, 2, last);
    assert_eq!(kinds(&all).last(), Some(&DecisionKind::Rollback));

    let (mut next, mut seen) = (0, 0);
    for decision in all.iter().filter(|one| one.kind() == DecisionKind::Verdict) {
        let window = decision.window.as_ref().unwrap();
        assert!(window.from_ms == next && window.to_ms > next, "{window:?} follows {next}");
        assert_eq!(decision.canary_weight_bp, 5_000);
        seen += u64::from(window.canary.as_ref().unwrap().count > 20);
        next = window.to_ms;
    }
    assert!(seen >= 8, "most windows were seen: {all:#?}");
    for node in [0, 1] {
        assert_eq!(streamed(&cluster, node, last), all, "node {node} tells the same");
    }
    let followed = following.up_to(last);
    assert!(followed.resumed > 0 && followed.decisions == all, "{} times, {:?}", followed.resumed, followed.decisions);
    agrees(&mut cluster, &all);
    cluster.assert_no_panic();
}

#[test]
fn the_log_keeps_every_decision_whichever_node_is_killed() {
    keeps_every_decision("", &|cluster, all| {
        (0..3).for_each(|node| cluster.kill(node));
        (0..3).for_each(|node| cluster.spawn(node, None));
        for node in 0..3 {
            cluster.wait_ready(node);
            assert_eq!(streamed(cluster, node, all[all.len() - 1].sequence), all, "node {node}, from its disk");
        }
    });
}

#[test]
#[ignore = "needs Kafka: scripts/services.sh up"]
fn kafka_keeps_every_decision_whichever_node_is_killed() {
    let topics = Topics::create(variable("KAFKA_BOOTSTRAP"));
    keeps_every_decision(&topics.lines(), &|_, all| {
        assert_eq!(topics.read(|found| kinds(found).last() == Some(&DecisionKind::Rollback)), all);
    });
}

#[test]
#[ignore = "needs Redis: scripts/services.sh up"]
fn redis_keeps_every_decision_whichever_node_is_killed() {
    let url = variable("REDIS_URL");
    keeps_every_decision(&format!("\n[redis]\nurl = \"{url}\"\n"), &|cluster, all| redis::agrees(cluster, &url, all));
}
