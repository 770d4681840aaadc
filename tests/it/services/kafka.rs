//! Telemetry from a topic, decisions to a topic.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use aviary::adapters::clock::BootClock;
use aviary::adapters::kafka::KafkaTelemetry;
use aviary::config::node::Kafka;
use aviary::ports::EventSource as _;
use aviary::schema::v1::{Decision, DecisionKind, TelemetryEvent};
use prost::Message as _;
use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::consumer::{BaseConsumer, Consumer as _};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{Headers as _, Message as _};
use rdkafka::producer::{BaseRecord, Producer as _, ThreadedProducer};

use super::{apply_when_ready, kinds, redis, runtime, streamed, unique, variable};
use crate::cluster::harness::{Cluster, Process, Upstream, aviary, http, rollout, wait};

/// Two topics of this test's own.
pub struct Topics {
    bootstrap: String,
    pub telemetry: String,
    pub decisions: String,
}

impl Topics {
    pub fn create(bootstrap: String) -> Self {
        let topics = Self { bootstrap, telemetry: unique("telemetry"), decisions: unique("decisions") };
        let admin: AdminClient<_> = topics.client().create().unwrap();
        let new = [(&topics.telemetry, 6), (&topics.decisions, 1)]
            .map(|(name, partitions)| NewTopic::new(name, partitions, TopicReplication::Fixed(1)));
        let created = runtime().block_on(admin.create_topics(&new, &AdminOptions::new())).unwrap();
        created.into_iter().for_each(|topic| drop(topic.unwrap()));
        // A broker that has just started answers before it knows what it made.
        for (name, partitions) in [(&topics.telemetry, 6), (&topics.decisions, 1)] {
            wait("the topics", Duration::from_secs(20), || {
                let found = admin.inner().fetch_metadata(Some(name), Duration::from_secs(2)).ok()?;
                let topic = found.topics().first()?;
                let led = topic.partitions().iter().filter(|partition| partition.error().is_none()).count();
                (topic.error().is_none() && led == partitions).then_some(())
            });
        }
        topics
    }

    pub fn client(&self) -> ClientConfig {
        let mut config = ClientConfig::new();
        config.set("bootstrap.servers", &self.bootstrap);
        config
    }

    /// Returns the lines of a node's file.
    pub fn lines(&self) -> String {
        let Self { bootstrap, telemetry, decisions } = self;
        let group = unique("group");
        format!(
            "\n[kafka]\nbootstrap = \"{bootstrap}\"\ntelemetry = \"{telemetry}\"\ndecisions = \"{decisions}\"\n\
             group = \"{group}\"\n"
        )
    }

    /// Returns a reader of the decisions, from the first on.
    pub fn reader(&self) -> BaseConsumer {
        let mut config = self.client();
        config.set("group.id", unique("reader")).set("auto.offset.reset", "earliest");
        config.set("isolation.level", "read_committed").set("enable.auto.commit", "false");
        let consumer: BaseConsumer = config.create().unwrap();
        consumer.subscribe(&[&self.decisions]).unwrap();
        consumer
    }

    /// Returns the decisions on the topic, each as its bytes and headers say, until `enough` of them.
    pub fn read(&self, mut enough: impl FnMut(&[Decision]) -> bool) -> Vec<Decision> {
        let consumer = self.reader();
        let (began, mut found) = (Instant::now(), Vec::new());
        while !enough(&found) {
            assert!(began.elapsed() < Duration::from_secs(60), "not within a minute: {found:#?}");
            let Some(message) = consumer.poll(Duration::from_millis(200)) else { continue };
            let message = message.unwrap();
            let decision = Decision::decode(message.payload().unwrap()).unwrap();
            assert_eq!(message.key(), Some(decision.service.as_bytes()));
            let headers: BTreeMap<_, _> =
                message.headers().unwrap().iter().map(|header| (header.key, header.value.unwrap())).collect();
            assert_eq!(headers["sequence"], decision.sequence.to_string().as_bytes());
            assert!(headers["decision_id"].ends_with(format!(":{}", decision.sequence).as_bytes()));
            found.push(decision);
        }
        found
    }

    pub fn produce(&self, more: &[&str]) -> Process {
        let mut command = aviary();
        command.args(["telemetry", "produce", "--kafka", &self.bootstrap, "--topic", &self.telemetry]);
        command.args(["--service", "svc", "--stable", "v1", "--canary", "v2"]).args(more);
        Process(command.stdout(std::process::Stdio::null()).spawn().unwrap())
    }
}

/// Returns a counter of one kind, summed over the nodes.
fn counted(cluster: &Cluster, line: &str) -> f64 {
    let text = cluster.nodes.iter().map(|node| http(node.api, "GET", "/metrics", &[], "").unwrap().body);
    let values = text.flat_map(|text| {
        let text = String::from_utf8(text).unwrap();
        let found = text.lines().find(|found| found.starts_with(line)).map(str::to_string);
        found.and_then(|found| found.rsplit(' ').next()?.parse::<f64>().ok())
    });
    values.sum()
}

#[test]
#[ignore = "needs Kafka: scripts/services.sh up"]
fn kafka_events_promote_a_canary_and_roll_it_back_and_the_topic_says_what_every_node_says() {
    let (topics, url) = (Topics::create(variable("KAFKA_BOOTSTRAP")), variable("REDIS_URL"));
    let (v1, v2) = (Upstream::start("v1"), Upstream::start("v2"));
    let cluster = Cluster::start_with(&format!("{}\n[redis]\nurl = \"{url}\"\n", topics.lines()));
    let steps = "    - setWeight: 20\n    - pause: { duration: 3s }\n    - setWeight: 50\n    - pause: { duration: 60s }\n    - setWeight: 100";
    apply_when_ready(&cluster, &rollout(&v1.url(), &v2.url(), steps).replace("window: 30s", "window: 2s"));
    let _source = topics.produce(&["--share", "20", "--rate", "500", "--profile", "error-burst", "--after", "8s"]);
    // What others write there too.
    let producer: ThreadedProducer<_> = topics.client().create().unwrap();
    let absurd = |event: &dyn Fn(&mut TelemetryEvent)| {
        let mut made = TelemetryEvent { service: "svc".into(), version: "v2".into(), ..TelemetryEvent::default() };
        (made.status, made.event_time) = (500, Some(std::time::SystemTime::now().into()));
        event(&mut made);
        made.encode_to_vec()
    };
    let far = std::time::SystemTime::now() + Duration::from_secs(3600);
    let payloads = [
        b"no protobuf at all".to_vec(),
        absurd(&|event| event.latency_ms = f64::NAN),
        absurd(&|event| event.latency_ms = -1.0),
        absurd(&|event| event.latency_ms = 1e12),
        absurd(&|event| event.status = 9),
        absurd(&|event| event.version = "v9".into()),
        absurd(&|event| event.event_time = Some(far.into())),
    ];
    // AVIARY_ABSURD=1000000 for a million.
    let absurd = std::env::var("AVIARY_ABSURD").map_or(700, |text| text.parse().unwrap());
    let absurd = absurd / payloads.len() * payloads.len();
    for payload in payloads.iter().cycle().take(absurd) {
        let mut record = BaseRecord::<(), _>::to(&topics.telemetry).payload(payload);
        while let Err((KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull), back)) = producer.send(record) {
            record = back;
            // Pause between two tries: the producer's queue empties.
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    producer.flush(Duration::from_secs(60)).unwrap();
    let state = cluster.until(1, "the rollback", Duration::from_secs(60), |state| state["phase"] == "RolledBack");
    assert!(state["reason"].as_str().unwrap().contains("errors: "), "{state}");
    let read = topics.read(|found| kinds(found).last() == Some(&DecisionKind::Rollback));
    // On a busy machine a promotion may find a node that doesn't answer in time, and is tried again.
    let decided: Vec<_> = kinds(&read).into_iter().filter(|kind| *kind != DecisionKind::Refused).collect();
    assert_eq!(decided, [DecisionKind::Start, DecisionKind::Promote, DecisionKind::Rollback]);
    assert!(read.iter().filter(|one| one.kind() == DecisionKind::Verdict).count() >= 4);
    for node in 0..3 {
        assert_eq!(streamed(&cluster, node, read[read.len() - 1].sequence), read, "node {node}");
    }
    redis::agrees(&cluster, &url, &read);
    for (kind, count) in
        [("malformed", 1), ("bad_latency", 3), ("bad_status", 1), ("unknown_version", 1), ("future", 1)]
    {
        let line = format!("aviary_telemetry_rejected_total{{source=\"kafka\",kind=\"{kind}\"}}");
        let count = (absurd / payloads.len() * count) as f64;
        // Once it is rolled back, the canary is an unknown version.
        let found = counted(&cluster, &line);
        assert!(found == count || (kind == "unknown_version" && found > count), "{kind}: {found}");
    }
    cluster.assert_no_panic();
}

#[test]
#[ignore = "needs Kafka: scripts/services.sh up"]
fn kafka_events_are_taken_once_while_readers_join() {
    let bootstrap = variable("KAFKA_BOOTSTRAP");
    let topics = Topics::create(bootstrap.clone());
    let config = Kafka { group: unique("group"), ..Kafka::at(&bootstrap) };
    let (stop, sent) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let emitter = {
        let (stop, sent, topic) = (stop.clone(), sent.clone(), topics.telemetry.clone());
        let producer: ThreadedProducer<_> = topics.client().set("enable.idempotence", "true").create().unwrap();
        std::thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                for _ in 0..100 {
                    let id = sent.fetch_add(1, Ordering::Relaxed).to_le_bytes();
                    let mut record = BaseRecord::<(), _>::to(&topic).payload(&id);
                    while let Err((why, back)) = producer.send(record) {
                        assert_eq!(why.rdkafka_error_code(), Some(RDKafkaErrorCode::QueueFull));
                        record = back;
                        // Pause between two tries: the producer's queue empties.
                        std::thread::sleep(Duration::from_millis(5));
                    }
                }
                // The rate is made of batches of 1 ms.
                std::thread::sleep(Duration::from_millis(1));
            }
            producer.flush(Duration::from_secs(30)).unwrap();
        })
    };
    // How often each was.
    let taken: Arc<Mutex<Vec<u8>>> = Arc::default();
    let reader = || {
        let (ends, taken) = (Arc::new(AtomicBool::new(false)), taken.clone());
        let (ended, config, topic) = (ends.clone(), config.clone(), topics.telemetry.clone());
        let thread = std::thread::spawn(move || {
            let mut source = KafkaTelemetry::new(&config, &topic, Arc::new(BootClock)).unwrap();
            while !ended.load(Ordering::Relaxed) {
                let mut take = |events: &[&[u8]]| {
                    let mut taken = taken.lock().unwrap();
                    for event in events {
                        let id = u64::from_le_bytes((*event).try_into().unwrap()) as usize;
                        let length = taken.len().max(id + 1);
                        taken.resize(length, 0);
                        taken[id] += 1;
                    }
                };
                source.poll(Duration::from_millis(100), &mut take).unwrap();
            }
        });
        (ends, thread)
    };
    let mut readers = Vec::new();
    for _ in 0..5 {
        readers.push(reader());
        // Long enough for the group to share its partitions anew and to read on, which is when an event could be taken twice.
        std::thread::sleep(Duration::from_millis(2_100));
    }
    stop.store(true, Ordering::Relaxed);
    emitter.join().unwrap();
    let sent = sent.load(Ordering::Relaxed);
    let all = || taken.lock().unwrap().iter().filter(|times| **times > 0).count() as u64;
    wait("every event", Duration::from_secs(60), || (all() == sent).then_some(()));
    let again = taken.lock().unwrap().iter().filter(|times| **times > 1).count();
    assert_eq!(again, 0, "of {sent} were taken more than once");
    for (ends, thread) in readers {
        ends.store(true, Ordering::Relaxed);
        thread.join().unwrap();
    }
}
