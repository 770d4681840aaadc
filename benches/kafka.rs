//! What a node reads of telemetry from a real broker, beside what the same client reads and throws away, in turns:
//! `eval "$(scripts/services.sh env)"; cargo bench --bench kafka [-- EVENTS [ROUNDS]]`.

use std::sync::Arc;
use std::time::Duration;

use aviary::adapters::clock::BootClock;
use aviary::adapters::kafka::KafkaTelemetry;
use aviary::config::node::Kafka;
use aviary::ports::{Clock, EventSource};
use aviary::telemetry::event::ReportedEvent;
use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::consumer::{BaseConsumer, Consumer as _};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::Message as _;
use rdkafka::producer::{BaseRecord, Producer as _, ThreadedProducer};

mod common;

use common::{event, intake};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

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
        let plain = || read_bare(&bootstrap, &topic, events, &[]);
        // With what ours asks of the client.
        let tuned =
            || read_bare(&bootstrap, &topic, events, &[("fetch.wait.max.ms", "100"), ("fetch.queue.backoff.ms", "10")]);
        let ours = || read_ours(&bootstrap, &topic, events);
        // The first contender finds the broker's pages cold: they take turns.
        let (plain, tuned, ours) = match round % 3 {
            0 => {
                let ours = ours();
                (plain(), tuned(), ours)
            }
            1 => (plain(), tuned(), ours()),
            _ => {
                let tuned = tuned();
                let ours = ours();
                (plain(), tuned, ours)
            }
        };
        let [plain_m, tuned_m, ours_m] = [plain, tuned, ours].map(|rate| rate / 1e6);
        println!("bare {plain_m:.2}   bare with the same settings {tuned_m:.2}   aviary {ours_m:.2} M events/s");
        ratios.push((ours / plain, ours / tuned));
    }
    let median = |of: fn(&(f64, f64)) -> f64| {
        let mut ratios: Vec<_> = ratios.iter().map(of).collect();
        ratios.sort_by(f64::total_cmp);
        ratios[ratios.len() / 2]
    };
    println!("median ratio: to bare {:.2}, to bare with the same settings {:.2}", median(|r| r.0), median(|r| r.1));
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

fn read_bare(bootstrap: &str, topic: &str, events: u64, settings: &[(&str, &str)]) -> f64 {
    let mut config = client(bootstrap);
    config.set("group.id", format!("bare-{:x}", rand::random::<u64>())).set("auto.offset.reset", "earliest");
    settings.iter().for_each(|(key, value)| _ = config.set(*key, *value));
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
            accepted += intake.take(payloads.iter().map(|payload| ReportedEvent::from_protobuf(payload))).accepted;
        });
        read.expect("events") as u64
    });
    assert!(accepted > events * 9 / 10, "{accepted} of {events} counted");
    rate
}
