//! The record router beside a plain copy with the same client and settings, and beside Kafka Streams' `split` with exactly-once v2, on one
//! broker, in turns: records a second, and the time that each adds to a record's way.
//! `eval "$(scripts/services.sh env)"; cargo bench --bench router [-- RECORDS [ROUNDS]]`. Kafka Streams takes part where Maven is.

use std::collections::BTreeMap;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use aviary::adapters::clock::BootClock;
use aviary::adapters::kafka::{KafkaBroker, TopicNames};
use aviary::config::node::Kafka;
use aviary::domain::assignment::TicketHash;
use aviary::domain::router_state::HookCall;
use aviary::domain::side::Side;
use aviary::domain::time::Mono;
use aviary::domain::weights::Weight;
use aviary::ports::{Clock, Hooks, OutsideError, RouterTopics as _, Topic};
use aviary::router::engine::{Engine, Plan, Steering};
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer as _};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{Header, Message as _, OwnedHeaders};
use rdkafka::producer::{BaseRecord, Producer as _, ThreadedProducer};
use rdkafka::{ClientConfig, Offset, TopicPartitionList};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const PARTITIONS: i32 = 6;
const WEIGHT_BP: u16 = 3000;
const INTERVAL: Duration = Duration::from_millis(100);
const BATCH_MAX: usize = 20_000;
/// What is measured begins once this share of the records is copied: a virtual machine warms up.
const WARM: f64 = 0.3;
const PAYLOAD: [u8; 200] = [7; 200];
/// Each record has one header of its own.
const TRACE: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

fn main() {
    let numbers: Vec<u64> = std::env::args().filter_map(|word| word.parse().ok()).collect();
    let (records, rounds) = (numbers.first().copied().unwrap_or(1_000_000), numbers.get(1).copied().unwrap_or(3));
    let Ok(bootstrap) = std::env::var("KAFKA_BOOTSTRAP") else {
        println!("KAFKA_BOOTSTRAP is not set: eval \"$(scripts/services.sh env)\"");
        return;
    };
    let mut contenders = vec![Contender::Plain, Contender::Aviary];
    if Command::new("mvn").arg("-v").stdout(Stdio::null()).status().is_ok() {
        contenders.push(Contender::Streams);
    }
    let mut rates: BTreeMap<Contender, Vec<f64>> = BTreeMap::new();
    for round in 0..rounds {
        let topics = Topics::create(&bootstrap);
        topics.fill(records);
        // The first contender finds the broker's pages cold: they take turns.
        contenders.rotate_left(usize::from(round > 0));
        let mut line = String::new();
        for contender in &contenders {
            let watch = topics.watch(&contender.group(&topics));
            let run = contender.start(&topics);
            let rate = topics.rate(&watch, records);
            run.stop();
            line = format!("{line}{contender:?} {:.0} k/s   ", rate / 1e3);
            rates.entry(*contender).or_default().push(rate);
        }
        println!("round {}: {line}", round + 1);
    }
    let median = |contender| {
        let mut found = rates.get(&contender).cloned().unwrap_or_default();
        found.sort_by(f64::total_cmp);
        found.get(found.len() / 2).copied().unwrap_or(f64::NAN)
    };
    let ours = median(Contender::Aviary);
    println!(
        "{records} records of {} bytes, {rounds} rounds, medians: plain {:.0} k/s, aviary {:.0} k/s, streams {:.0} k/s; aviary is {:.2} x plain, {:.2} x streams",
        PAYLOAD.len(),
        median(Contender::Plain) / 1e3,
        ours / 1e3,
        median(Contender::Streams) / 1e3,
        ours / median(Contender::Plain),
        ours / median(Contender::Streams)
    );
    contenders.sort();
    for contender in contenders {
        let topics = Topics::create(&bootstrap);
        let run = contender.start(&topics);
        let (p50, p99) = topics.latency(5_000, Duration::from_secs(15));
        run.stop();
        println!("{contender:?} at 5 k/s adds: p50 {p50:.0} ms, p99 {p99:.0} ms");
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Contender {
    Plain,
    Aviary,
    Streams,
}

/// A contender at work.
struct Run {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    child: Option<Child>,
}

impl Run {
    fn stop(mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().into_iter().for_each(|thread| thread.join().expect("a contender ends"));
        if let Some(mut child) = self.child.take() {
            child.kill().and_then(|()| child.wait()).expect("a process ends");
        }
    }
}

/// Services that there are none of: who reads the outputs is not what is measured.
struct NoServices;

impl Hooks for NoServices {
    fn call(&mut self, _: HookCall, _: Side, _: Topic, _: u64) -> Result<(), OutsideError> {
        Ok(())
    }
}

impl Contender {
    /// Returns the group whose places tell how far it is.
    fn group(self, topics: &Topics) -> String {
        match self {
            Self::Streams => format!("streams-split-{}", topics.source),
            _ => format!("{self:?}-{}", topics.source).to_lowercase(),
        }
    }

    fn start(self, topics: &Topics) -> Run {
        let stop = Arc::new(AtomicBool::new(false));
        let name = format!("{self:?}").to_lowercase();
        let (group, ended, child) = (self.group(topics), stop.clone(), None);
        let outputs = [format!("{}.{name}.stable", topics.source), format!("{}.{name}.canary", topics.source)];
        match self {
            Self::Plain => {
                topics.make(&outputs[..1]);
                let topics = topics.clone();
                let (reads, output) = (group.clone(), outputs[0].clone());
                let thread = std::thread::spawn(move || copy(&topics, &reads, &output, &ended));
                Run { stop, thread: Some(thread), child }
            }
            Self::Aviary => {
                let names = TopicNames {
                    source: topics.source.clone(),
                    topics: outputs,
                    groups: [format!("stable-{}", topics.source), format!("canary-{}", topics.source)],
                    versions: ["v1", "v2"].map(Into::into),
                    control: format!("{}.control", topics.source),
                    router: group.clone(),
                };
                topics.begin(&names.groups[0]);
                let broker =
                    KafkaBroker::new(&Kafka::at(&topics.bootstrap), names, Arc::new(BootClock)).expect("a broker");
                broker.prepare().expect("topics");
                let plan = Plan {
                    hash: TicketHash::Salted(7),
                    keyed: true,
                    weight: Weight::from_bp(WEIGHT_BP).expect("a weight"),
                    lag_max: None,
                    change_ms_max: 5_000,
                    interval: INTERVAL,
                    batch_max: BATCH_MAX,
                };
                let mut engine = Engine::new(Box::new(broker), Box::new(NoServices), plan);
                let thread = std::thread::spawn(move || {
                    while !ended.load(Ordering::Relaxed) {
                        engine.turn(BootClock.now().wall.0, &Steering::Alone).expect("a turn");
                    }
                });
                Run { stop, thread: Some(thread), child }
            }
            Self::Streams => {
                topics.make(&outputs);
                let script = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/streams/run.sh");
                let mut command = Command::new(script);
                command.args([&topics.bootstrap, &topics.source, &outputs[0], &outputs[1]]).arg(WEIGHT_BP.to_string());
                let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("Kafka Streams");
                Run { stop, thread: None, child: Some(child) }
            }
        }
    }
}

/// What the router does, without a split: the same client, the same settings, one output.
fn copy(topics: &Topics, group: &str, output: &str, ended: &AtomicBool) {
    let own = [
        ("group.id", group),
        ("enable.auto.commit", "false"),
        ("isolation.level", "read_committed"),
        ("fetch.wait.max.ms", "50"),
        ("queued.max.messages.kbytes", "32768"),
    ];
    let consumer: BaseConsumer = client(&topics.bootstrap, &own).create().expect("a consumer");
    consumer.assign(&topics.offsets(&topics.source, Offset::Beginning)).expect("partitions");
    let own = [
        ("transactional.id", group),
        ("transaction.timeout.ms", "15000"),
        ("message.timeout.ms", "10000"),
        ("linger.ms", "20"),
        ("compression.type", "lz4"),
        ("queue.buffering.max.messages", "200000"),
    ];
    let producer: ThreadedProducer<_> = client(&topics.bootstrap, &own).create().expect("a producer");
    producer.init_transactions(Duration::from_secs(30)).expect("transactions");
    let metadata = consumer.group_metadata().expect("a group");
    while !ended.load(Ordering::Relaxed) {
        let mut message = consumer.poll(INTERVAL);
        let (until, mut copied, mut next) = (BootClock.now().mono.after_ms(100), 0, BTreeMap::new());
        if message.is_some() {
            producer.begin_transaction().expect("a transaction");
        }
        while let Some(from) = message {
            let from = from.expect("a record");
            let mut record = BaseRecord::<[u8], [u8]>::to(output).partition(from.partition());
            if let Some(time) = from.timestamp().to_millis() {
                record = record.timestamp(time);
            }
            if let Some(headers) = from.headers() {
                record = record.headers(headers.detach());
            }
            if let Some(key) = from.key() {
                record = record.key(key);
            }
            if let Some(payload) = from.payload() {
                record = record.payload(payload);
            }
            while let Err((KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull), back)) = producer.send(record) {
                record = back;
                producer.poll(Duration::from_millis(1));
            }
            next.insert(from.partition(), from.offset() + 1);
            copied += 1;
            let left = until.millis_since(BootClock.now().mono);
            message = if copied == BATCH_MAX || left == 0 { None } else { consumer.poll(Duration::from_millis(left)) };
        }
        if copied > 0 {
            let mut list = TopicPartitionList::new();
            for (partition, next) in next {
                list.add_partition_offset(&topics.source, partition, Offset::Offset(next)).expect("an offset");
            }
            // As the router does: the client's own call looks every 100 ms only.
            while producer.flush(Duration::ZERO).is_err() {
                std::thread::park_timeout(Duration::from_micros(300));
            }
            producer.send_offsets_to_transaction(&list, &metadata, Duration::from_secs(10)).expect("offsets");
            producer.commit_transaction(Duration::from_secs(10)).expect("a commit");
        }
    }
}

/// A source of this round's own.
#[derive(Clone)]
struct Topics {
    bootstrap: String,
    source: String,
}

fn client(bootstrap: &str, own: &[(&str, &str)]) -> ClientConfig {
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", bootstrap);
    for (key, value) in own {
        config.set(*key, *value);
    }
    config
}

impl Topics {
    fn create(bootstrap: &str) -> Self {
        let topics = Self { bootstrap: bootstrap.into(), source: format!("bench-{:x}", rand::random::<u64>()) };
        topics.make(std::slice::from_ref(&topics.source));
        topics
    }

    fn make(&self, names: &[String]) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let admin: AdminClient<_> = client(&self.bootstrap, &[]).create().expect("a client");
        let new: Vec<_> =
            names.iter().map(|name| NewTopic::new(name, PARTITIONS, TopicReplication::Fixed(1))).collect();
        let made = runtime.block_on(admin.create_topics(&new, &AdminOptions::new())).expect("topics");
        made.into_iter().for_each(|topic| drop(topic.expect("a topic")));
    }

    fn offsets(&self, topic: &str, offset: Offset) -> TopicPartitionList {
        let mut list = TopicPartitionList::new();
        for partition in 0..PARTITIONS {
            list.add_partition_offset(topic, partition, offset).expect("an offset");
        }
        list
    }

    /// Gives a group its place at the source's beginning.
    fn begin(&self, group: &str) {
        let consumer: BaseConsumer = client(&self.bootstrap, &[("group.id", group)]).create().expect("a consumer");
        consumer.commit(&self.offsets(&self.source, Offset::Offset(0)), CommitMode::Sync).expect("a place");
    }

    fn producer(&self) -> ThreadedProducer<rdkafka::producer::DefaultProducerContext> {
        client(&self.bootstrap, &[("linger.ms", "2"), ("compression.type", "lz4")]).create().expect("a producer")
    }

    fn send(&self, producer: &ThreadedProducer<rdkafka::producer::DefaultProducerContext>, number: u64) {
        let (key, now_ms) =
            (format!("customer-{}", number.wrapping_mul(2_654_435_761) % 5_000), BootClock.now().wall.0);
        let trace = OwnedHeaders::new().insert(Header { key: "traceparent", value: Some(TRACE) });
        let mut record =
            BaseRecord::to(&self.source).key(&key).payload(&PAYLOAD[..]).timestamp(now_ms as i64).headers(trace);
        while let Err((KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull), back)) = producer.send(record) {
            record = back;
            producer.poll(Duration::from_millis(5));
        }
    }

    fn fill(&self, records: u64) {
        let producer = self.producer();
        (0..records).for_each(|number| self.send(&producer, number));
        producer.flush(Duration::from_secs(120)).expect("everything delivered");
    }

    /// Returns who sees what a group commits; its questions are answered at once from now on.
    fn watch(&self, group: &str) -> BaseConsumer {
        // With `read_committed`, while a transaction is always open, the client would ask without a pause and take a core for it.
        let own = [("group.id", group), ("isolation.level", "read_uncommitted")];
        let consumer: BaseConsumer = client(&self.bootstrap, &own).create().expect("a consumer");
        let _ = consumer.committed_offsets(self.offsets(&self.source, Offset::Invalid), Duration::from_secs(10));
        consumer
    }

    /// Returns records a second by what a contender's group commits, from the warm share to the end.
    fn rate(&self, consumer: &BaseConsumer, records: u64) -> f64 {
        let mut warm: Option<(Mono, u64)> = None;
        loop {
            std::thread::park_timeout(Duration::from_millis(50));
            let Ok(found) =
                consumer.committed_offsets(self.offsets(&self.source, Offset::Invalid), Duration::from_secs(10))
            else {
                continue;
            };
            let next = found.elements().into_iter().map(|one| one.offset().to_raw().unwrap_or(0).max(0) as u64);
            let (done, now) = (next.sum::<u64>(), BootClock.now().mono);
            match warm {
                None if done as f64 >= records as f64 * WARM => warm = Some((now, done)),
                Some((since, from)) if done >= records => {
                    return (records - from) as f64 / (now.0 - since.0) as f64 * 1e6;
                }
                _ => {}
            }
        }
    }

    /// Returns the median and the 99th percentile of the milliseconds from a record's sending to its reading behind a contender.
    fn latency(&self, rate: u64, time: Duration) -> (f64, f64) {
        let stop = Arc::new(AtomicBool::new(false));
        let (ended, topics) = (stop.clone(), self.clone());
        let emitter = std::thread::spawn(move || {
            let (producer, began, mut sent) = (topics.producer(), BootClock.now().mono, 0);
            while !ended.load(Ordering::Relaxed) {
                while sent < BootClock.now().mono.millis_since(began) * rate / 1000 {
                    topics.send(&producer, sent);
                    sent += 1;
                }
                std::thread::park_timeout(Duration::from_millis(2));
            }
        });
        let own = [
            ("group.id", "latency"),
            ("isolation.level", "read_committed"),
            ("fetch.wait.max.ms", "5"),
            ("enable.auto.commit", "false"),
            ("auto.offset.reset", "earliest"),
        ];
        let reader: BaseConsumer = client(&self.bootstrap, &own).create().expect("a consumer");
        let metadata = reader.fetch_metadata(None, Duration::from_secs(10)).expect("metadata");
        let outputs = metadata.topics().iter().map(|topic| topic.name().to_string());
        let outputs: Vec<_> = outputs
            .filter(|name| name.starts_with(&self.source) && (name.ends_with(".stable") || name.ends_with(".canary")))
            .collect();
        let mut list = TopicPartitionList::new();
        for output in &outputs {
            for partition in 0..PARTITIONS {
                list.add_partition_offset(output, partition, Offset::Beginning).expect("an offset");
            }
        }
        reader.assign(&list).expect("partitions");
        let (mut took, mut measured): (Vec<u64>, Option<Mono>) = (Vec::new(), None);
        loop {
            let now = BootClock.now();
            // A contender starts for some seconds; what it found waiting then is not measured.
            if let Some(Ok(message)) = reader.poll(Duration::from_millis(50)) {
                let since = *measured.get_or_insert(now.mono.after_ms(5_000));
                let sent = message.timestamp().to_millis().unwrap_or(0) as u64;
                if now.mono > since {
                    took.push(BootClock.now().wall.0.saturating_sub(sent));
                }
            }
            if measured.is_some_and(|since| now.mono > since.after_ms(time.as_millis() as u64)) {
                break;
            }
        }
        stop.store(true, Ordering::Relaxed);
        emitter.join().expect("an emitter ends");
        took.sort_unstable();
        let at = |q: f64| took[((took.len() - 1) as f64 * q) as usize] as f64;
        (at(0.5), at(0.99))
    }
}
