//! What every sink of decisions does, whatever it keeps them in: one publisher at a time, each decision once, and a place that says
//! what is missing.

use std::time::{Duration, Instant};

use aviary::adapters::kafka::KafkaDecisions;
use aviary::adapters::redis::{RedisDecisions, client};
use aviary::config::node::Kafka;
use aviary::domain::ids::ClusterId;
use aviary::ports::DecisionSink;
use aviary::protocol::record::{Sequence, Slot};
use aviary::schema::v1::{Decision, DecisionKind, WindowVerdict};
use prost::Message as _;
use rdkafka::consumer::Consumer as _;
use rdkafka::message::Message as _;

use super::kafka::Topics;
use super::{unique, variable};

/// The verdict of a window that ends at this second, decided in the slot of this number.
fn decision(slot: u64) -> Decision {
    Decision {
        sequence: Sequence::of(Slot(slot), 0).0,
        service: "svc".into(),
        kind: DecisionKind::Verdict.into(),
        rollout_generation: 1,
        window: Some(WindowVerdict { to_ms: slot * 1000, verdict: 1, ..WindowVerdict::default() }),
        ..Decision::default()
    }
}

/// `sink` makes publishers of one cluster; `seen` returns the slots that a reader sees, in order.
fn keeps_its_word(sink: &dyn Fn() -> Box<dyn DecisionSink>, seen: &dyn Fn() -> Vec<u64>) {
    let mut first = sink();
    assert!(first.publish(&[decision(1)], Slot(1)).is_err(), "it isn't open");
    assert_eq!(first.open().unwrap(), None, "nothing is published yet");
    first.publish(&[decision(1), decision(2)], Slot(2)).unwrap();
    first.publish(&[decision(5)], Slot(6)).unwrap();
    assert_eq!(seen(), [1, 2, 5]);

    let mut second = sink();
    assert_eq!(second.open().unwrap(), Some(Slot(6)), "what nobody reads has a place too");
    assert!(first.publish(&[decision(7)], Slot(7)).is_err(), "another one publishes by now");
    assert!(first.publish(&[decision(7)], Slot(7)).is_err(), "and still does");
    assert_eq!(seen(), [1, 2, 5], "nothing of it");
    second.publish(&[decision(7)], Slot(7)).unwrap();
    second.publish(&[], Slot(9)).unwrap();

    assert_eq!(first.open().unwrap(), Some(Slot(9)), "it may take over again");
    assert!(second.publish(&[decision(10)], Slot(10)).is_err());
    let many: Vec<_> = (10..1_010).map(decision).collect();
    first.publish(&many, Slot(1_009)).unwrap();
    assert_eq!(sink().open().unwrap(), Some(Slot(1_009)));
    assert_eq!(seen(), [1, 2, 5, 7].into_iter().chain(10..1_010).collect::<Vec<_>>(), "each once");
}

fn cluster() -> ClusterId {
    ClusterId(rand::random())
}

#[test]
#[ignore = "needs Kafka: scripts/services.sh up"]
fn kafka_keeps_a_sinks_word() {
    let bootstrap = variable("KAFKA_BOOTSTRAP");
    let (topics, cluster) = (Topics::create(bootstrap.clone()), cluster());
    let config = Kafka { group: unique("group"), ..Kafka::at(&bootstrap) };
    let sink = || Box::new(KafkaDecisions::new(&config, &topics.decisions, cluster)) as Box<dyn DecisionSink>;
    let seen = || {
        let (reader, mut found, mut heard) = (topics.reader(), Vec::new(), Instant::now());
        // A reader joins its group for some seconds.
        while heard.elapsed() < Duration::from_secs(if found.is_empty() { 20 } else { 2 }) {
            if let Some(message) = reader.poll(Duration::from_millis(100)) {
                let decision = Decision::decode(message.unwrap().payload().unwrap()).unwrap();
                found.push(Sequence(decision.sequence).slot().0);
                heard = Instant::now();
            }
        }
        reader.unsubscribe();
        found
    };
    keeps_its_word(&sink, &seen);
}

/// A step of the rollout, to this weight.
fn step(slot: u64) -> Decision {
    let canary_weight_bp = slot as u32 * 100;
    Decision {
        sequence: Sequence::of(Slot(slot), 0).0,
        service: "svc".into(),
        kind: DecisionKind::Promote.into(),
        canary_weight_bp,
        ..Decision::default()
    }
}

#[test]
#[ignore = "needs Redis: scripts/services.sh up"]
fn redis_never_shows_an_older_state_though_its_place_is_gone() {
    let (url, cluster) = (variable("REDIS_URL"), cluster());
    let mut connection = redis::Client::open(url.as_str()).unwrap().get_connection().unwrap();
    let mut shown = || -> (u64, u32) {
        let key = format!("aviary:{{{cluster}}}:rollout:svc");
        let shown: (u64, u32) =
            redis::cmd("HMGET").arg(key).arg(&["sequence", "canary_weight_bp"]).query(&mut connection).unwrap();
        (Sequence(shown.0).slot().0, shown.1)
    };
    let mut sink = RedisDecisions::new(client(&url).unwrap(), cluster);
    sink.open().unwrap();
    sink.publish(&[step(1), step(2), step(3)], Slot(3)).unwrap();
    assert_eq!(shown(), (3, 300));

    // Somebody deleted it, or Redis did, for want of memory.
    let mut other = redis::Client::open(url.as_str()).unwrap().get_connection().unwrap();
    redis::cmd("DEL").arg(format!("aviary:{{{cluster}}}:published")).query::<u64>(&mut other).unwrap();
    assert!(sink.publish(&[step(4)], Slot(4)).is_err(), "it isn't known as the publisher any more");
    assert_eq!(sink.open().unwrap(), None, "everything is published again");
    for sequence in 1..=3 {
        sink.publish(&[step(sequence)], Slot(sequence)).unwrap();
        assert_eq!(shown(), (3, 300), "at {sequence}");
    }
    sink.publish(&[step(4)], Slot(4)).unwrap();
    assert_eq!(shown(), (4, 400));
}

#[test]
#[ignore = "needs Redis: scripts/services.sh up"]
fn redis_keeps_a_sinks_word() {
    let (url, cluster) = (variable("REDIS_URL"), cluster());
    let sink = || Box::new(RedisDecisions::new(client(&url).unwrap(), cluster)) as Box<dyn DecisionSink>;
    let seen = || {
        let mut connection = redis::Client::open(url.as_str()).unwrap().get_connection().unwrap();
        let pattern = format!("aviary:{{{cluster}}}:window:svc:1:*");
        let keys: Vec<String> = redis::cmd("KEYS").arg(pattern).query(&mut connection).unwrap();
        let verdict = |key: &String| redis::cmd("GET").arg(key).query::<String>(&mut connection).unwrap();
        let verdicts: Vec<String> = keys.iter().map(verdict).collect();
        let mut found: Vec<u64> =
            verdicts.iter().map(|text| Sequence(text.split(' ').next().unwrap().parse().unwrap()).slot().0).collect();
        found.sort_unstable();
        found
    };
    keeps_its_word(&sink, &seen);
}
