//! What a node reads of telemetry from a real broker, beside what the same client reads and throws away, in turns:
//! `eval "$(scripts/services.sh env)"; cargo bench --bench kafka [-- EVENTS [ROUNDS]]`.

use std::sync::Arc;
use std::time::Duration;

use aviary::adapters::clock::BootClock;
use aviary::adapters::kafka::KafkaTelemetry;
use aviary::config::node::Kafka;
use aviary::ports::{Clock, EventSource};
use aviary::telemetry::event::Event;
use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::consumer::{BaseConsumer, Consumer as _};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::Message as _;
use rdkafka::producer::{BaseRecord, Producer as _, ThreadedProducer};

mod common;

use common::{event, intake};

const PARTITIONS: i32 = 6;

fn main() {
    let numbers: Vec<u64> = std::env::args().filter_map(|word| word.parse().ok()).collect();
    let (events, rounds) = (numbers.first().copied().unwrap_or(2_000_000), numbers.get(1).copied().unwrap_or(3));
    let Ok(bootstrap) = std::env::var("KAFKA_BOOTSTRAP") else {
        println!("KAFKA_BOOTSTRAP is not set: eval \"$(scripts/services.sh env)\"");
        return;
    };
    let mut ratios = Vec::new();
    for round in 0..rounds {
        let topic = format!("bench-{:x}", rand::random::<u64>());
        produce(&bootstrap, &topic, events);
        // Whoever is first finds the broker's pages warm for the second: they take turns.
        let (bare, ours) = match round % 2 == 1 {
            true => (read_bare(&bootstrap, &topic, events), read_ours(&bootstrap, &topic, events)),
            false => {
                let ours = read_ours(&bootstrap, &topic, events);
                (read_bare(&bootstrap, &topic, events), ours)
            }
        };
        println!("bare {:.2} M events/s   aviary {:.2} M events/s   ratio {:.2}", bare / 1e6, ours / 1e6, ours / bare);
        ratios.push(ours / bare);
    }
    ratios.sort_by(f64::total_cmp);
    println!("median ratio {:.2}", ratios[ratios.len() / 2]);
}

fn client(bootstrap: &str) -> ClientConfig {
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", bootstrap);
    config
}

fn produce(bootstrap: &str, topic: &str, events: u64) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let admin: AdminClient<_> = client(bootstrap).create().expect("a client");
    let new = NewTopic::new(topic, PARTITIONS, TopicReplication::Fixed(1));
    runtime.block_on(admin.create_topics([&new], &AdminOptions::new())).expect("a topic");
    let producer: ThreadedProducer<_> =
        client(bootstrap).set("linger.ms", "5").set("compression.type", "lz4").create().expect("a producer");
    let now_ms = BootClock.now().wall.0;
    for number in 0..events {
        let payload = event(number, now_ms, true, 1);
        let mut record =
            BaseRecord::<(), _>::to(topic).partition((number % PARTITIONS as u64) as i32).payload(&payload);
        while let Err((KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull), back)) = producer.send(record) {
            record = back;
            producer.poll(Duration::from_millis(5));
        }
    }
    producer.flush(Duration::from_secs(60)).expect("everything delivered");
}

/// Returns events a second, from the first that came to the last.
fn rate(events: u64, mut read: impl FnMut() -> u64) -> f64 {
    let (mut began, mut first, mut seen) = (BootClock.now().mono, 0, 0);
    while seen < events {
        let more = read();
        if seen == 0 && more > 0 {
            (began, first) = (BootClock.now().mono, more);
        }
        seen += more;
    }
    (events - first) as f64 / (BootClock.now().mono.0 - began.0) as f64 * 1e6
}

fn read_bare(bootstrap: &str, topic: &str, events: u64) -> f64 {
    let mut config = client(bootstrap);
    config.set("group.id", format!("bare-{:x}", rand::random::<u64>())).set("auto.offset.reset", "earliest");
    config.set("fetch.wait.max.ms", "100").set("queued.max.messages.kbytes", "16384");
    let consumer: BaseConsumer = config.create().expect("a consumer");
    consumer.subscribe(&[topic]).expect("a subscription");
    let mut bytes = 0;
    let rate = rate(events, || match consumer.poll(Duration::from_millis(100)) {
        Some(message) => {
            bytes += message.expect("a message").payload().map_or(0, <[u8]>::len);
            1
        }
        None => 0,
    });
    assert!(bytes > 0);
    rate
}

fn read_ours(bootstrap: &str, topic: &str, events: u64) -> f64 {
    let config = Kafka { group: format!("ours-{:x}", rand::random::<u64>()), ..Kafka::at(bootstrap) };
    let mut source = KafkaTelemetry::new(&config, topic, Arc::new(BootClock)).expect("a source");
    let intake = intake(1);
    let mut accepted = 0;
    let rate = rate(events, || {
        let read = source.poll(Duration::from_millis(100), &mut |payloads| {
            accepted += intake.take(payloads.iter().map(|payload| Event::from_protobuf(payload))).accepted;
        });
        read.expect("events") as u64
    });
    assert!(accepted > events * 9 / 10, "{accepted} of {events} counted");
    rate
}
