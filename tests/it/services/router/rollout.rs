//! A topic, its emitter, two services that its records go to, and what is checked of them in the end.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Output, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use aviary::router::audit::read_source;
use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer as _};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{Header, Headers as _, Message as _, OwnedHeaders};
use rdkafka::producer::{BaseRecord, Producer as _, ThreadedProducer};
use rdkafka::{Offset, TopicPartitionList};
use serde_json::Value;

use super::super::{runtime, unique};
use crate::cluster::harness::{Process, aviary, wait};

const PARTITIONS: usize = 6;

pub fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// A record that a service has processed.
#[derive(Debug, Clone)]
pub struct Processed {
    pub id: u64,
    pub key: Option<Vec<u8>>,
    /// `stable` or `canary`.
    pub side: String,
    /// Whether it came from the source itself.
    pub alone: bool,
    /// Where it stood in the topic that the service read, and in the source.
    pub place: (i32, i64),
    pub source: (i32, i64),
    pub at: Instant,
}

pub type Log = Arc<Mutex<Vec<Processed>>>;

/// A consumer that runs.
pub struct Running {
    topic: String,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

/// The two services, started and stopped by the router's requests.
pub struct Services {
    pub bootstrap: String,
    pub source: String,
    pub running: BTreeMap<String, Running>,
    /// The newest call's number, for each service.
    pub numbers: BTreeMap<String, u64>,
    pub log: Log,
    /// Microseconds that the canary takes for a record.
    pub canary_us: Arc<AtomicU64>,
    /// Who hears of the router's calls.
    pub witness: Option<Witness>,
}

/// Says that a router is about to be told, or to hear, that a call is done: its last moment.
#[derive(Clone)]
pub struct Witness {
    tell: mpsc::Sender<String>,
    calls: Arc<Mutex<BTreeMap<String, u32>>>,
}

impl Witness {
    /// Returns a witness, and where it is heard.
    pub fn new() -> (Self, mpsc::Receiver<String>) {
        let (tell, told) = mpsc::channel();
        (Self { tell, calls: Arc::default() }, told)
    }

    /// Returns how often this was called before.
    fn count(&self, call: &str) -> u32 {
        let mut calls = self.calls.lock().unwrap();
        let count = calls.entry(call.into()).or_default();
        *count += 1;
        *count - 1
    }

    /// Gives the test the time to kill the router.
    fn say(&self, when: &str, call: &str) {
        let _ = self.tell.send(format!("{when} {call}"));
        // Longer than the test takes to hear of it and to kill.
        std::thread::sleep(Duration::from_millis(500));
    }
}

/// Does what a hook is asked, unless it comes after a newer one. A witness hears of each call's first time before it has an effect, of
/// its second one after.
fn asked(services: &Mutex<Services>, number: u64, [call, side, topic, group]: [&str; 4]) {
    let (witness, source) = {
        let services = services.lock().unwrap();
        (services.witness.clone(), services.source.clone())
    };
    let words = format!("{call} {side} on {}", if topic == source { "the source" } else { "its own topic" });
    let before = witness.as_ref().map(|witness| witness.count(&words));
    if let (Some(witness), Some(0)) = (&witness, before) {
        witness.say("before", &words);
    }
    {
        let mut services = services.lock().unwrap();
        let newest = services.numbers.entry(side.into()).or_default();
        if number >= *newest {
            *newest = number;
            services.call(call, side, topic, group);
        }
    }
    if let (Some(witness), Some(1)) = (&witness, before) {
        witness.say("after", &words);
    }
}

impl Services {
    pub fn call(&mut self, call: &str, side: &str, topic: &str, group: &str) {
        let same = self.running.get(side).is_some_and(|running| running.topic == topic);
        if call == "stop" && same || call == "start" && !same {
            self.stop(side);
        }
        if call == "start" && !same {
            let stop = Arc::new(AtomicBool::new(false));
            let reader = self.reader(side, topic, group, stop.clone());
            let thread = std::thread::spawn(reader);
            self.running.insert(side.into(), Running { topic: topic.into(), stop, thread });
        }
    }

    fn stop(&mut self, side: &str) {
        let Some(running) = self.running.remove(side) else { return };
        running.stop.store(true, Ordering::Relaxed);
        running.thread.join().unwrap();
    }

    /// Returns what a service does: read, process, and from time to time commit.
    fn reader(&self, side: &str, topic: &str, group: &str, stop: Arc<AtomicBool>) -> impl FnOnce() + Send + 'static {
        let mut config = ClientConfig::new();
        config.set("bootstrap.servers", &self.bootstrap).set("group.id", group).set("enable.auto.commit", "false");
        config.set("isolation.level", "read_committed").set("session.timeout.ms", "45000");
        // Only who begins on its own begins at the beginning: after that the router has set the place.
        let reset = if topic == self.source && side == "stable" { "earliest" } else { "error" };
        config.set("auto.offset.reset", reset).set("reconnect.backoff.max.ms", "500").set("fetch.wait.max.ms", "50");
        let consumer: BaseConsumer = config.create().unwrap();
        consumer.subscribe(&[topic]).unwrap();
        let (log, side, alone) = (self.log.clone(), side.to_string(), topic == self.source);
        let slow = (side == "canary").then(|| self.canary_us.clone());
        move || {
            let (mut committed, mut dirty) = (Instant::now(), false);
            loop {
                let ends = stop.load(Ordering::Relaxed);
                if dirty && (ends || committed.elapsed() > Duration::from_millis(100)) {
                    // A service commits what it did before it does more, however long the broker is unavailable.
                    while let Err(why) = consumer.commit_consumer_state(CommitMode::Sync) {
                        assert_ne!(
                            why.rdkafka_error_code(),
                            Some(RDKafkaErrorCode::UnknownMemberId),
                            "{side} was thrown out"
                        );
                        // Pause between two tries.
                        std::thread::sleep(Duration::from_millis(100));
                    }
                    (committed, dirty) = (Instant::now(), false);
                }
                if ends {
                    return;
                }
                match consumer.poll(Duration::from_millis(50)) {
                    None => {}
                    Some(Err(why)) => assert_ne!(
                        why.rdkafka_error_code(),
                        Some(RDKafkaErrorCode::AutoOffsetReset),
                        "{side} has no place in its topic: {why}"
                    ),
                    Some(Ok(message)) => {
                        let header = |name| {
                            let headers = message.headers().into_iter().flat_map(|headers| headers.iter());
                            let found = headers.filter(|header| header.key == name).last();
                            found.map(|header| String::from_utf8(header.value.unwrap().to_vec()).unwrap())
                        };
                        let id: u64 = header("id").unwrap().parse().unwrap();
                        let payload = message.payload().map(<[u8]>::to_vec);
                        assert_eq!(
                            (payload, message.timestamp().to_millis()),
                            (payload_of(id), Some(1_000_000 + id as i64))
                        );
                        if !alone {
                            assert_eq!(header("x-aviary-version").unwrap(), if side == "stable" { "v1" } else { "v2" });
                        }
                        let key = message.key().map(<[u8]>::to_vec);
                        assert_eq!(key, key_of(id));
                        let place = (message.partition(), message.offset());
                        let source = header("x-aviary-source").map_or(place, |text| {
                            let at = read_source(&text).unwrap();
                            (at.partition as i32, at.offset)
                        });
                        let (side, at) = (side.clone(), Instant::now());
                        log.lock().unwrap().push(Processed { id, key, side, alone, place, source, at });
                        dirty = true;
                        if let Some(slow) = &slow {
                            let us = slow.load(Ordering::Relaxed);
                            if us > 0 {
                                // How long this service takes for a record.
                                std::thread::sleep(Duration::from_micros(us));
                            }
                        }
                    }
                }
            }
        }
    }
}

/// One in ten has no key, one in a thousand an empty one; others have one of 500.
fn key_of(id: u64) -> Option<Vec<u8>> {
    match id % 10 {
        0 => None,
        _ if id % 1000 == 1 => Some(Vec::new()),
        _ => Some(format!("customer-{}", id.wrapping_mul(2_654_435_761) % 500).into_bytes()),
    }
}

/// One in twenty is a tombstone.
fn payload_of(id: u64) -> Option<Vec<u8>> {
    (id % 20 != 3).then(|| format!("order {id} {}", "x".repeat(100)).into_bytes())
}

/// A topic, its emitter, the services, and the router's file.
pub struct Rollout {
    pub bootstrap: String,
    pub dir: tempfile::TempDir,
    pub services: Arc<Mutex<Services>>,
    pub log: Log,
    pub canary_us: Arc<AtomicU64>,
    pub emitted: Arc<AtomicU64>,
    pub stop: Arc<AtomicBool>,
    pub emitter: Option<JoinHandle<Duration>>,
}

impl Rollout {
    pub fn start(bootstrap: String, rate: u64, more: &str) -> Self {
        Self::named("r", bootstrap, rate, more)
    }

    pub fn named(name: &str, bootstrap: String, rate: u64, more: &str) -> Self {
        let source = unique("orders");
        let mut config = ClientConfig::new();
        config.set("bootstrap.servers", &bootstrap);
        let admin: AdminClient<_> = config.create().unwrap();
        let new = NewTopic::new(&source, PARTITIONS as i32, TopicReplication::Fixed(1))
            .set("message.timestamp.type", "CreateTime");
        let made =
            runtime().block_on(admin.create_topics(&[new.set("retention.ms", "-1")], &AdminOptions::new())).unwrap();
        made.into_iter().for_each(|topic| drop(topic.unwrap()));

        let (log, canary_us) = (Log::default(), Arc::new(AtomicU64::new(0)));
        let services = Arc::new(Mutex::new(Services {
            bootstrap: bootstrap.clone(),
            source: source.clone(),
            running: BTreeMap::new(),
            numbers: BTreeMap::new(),
            log: log.clone(),
            canary_us: canary_us.clone(),
            witness: None,
        }));
        let hooks = serve_hooks(services.clone());
        services.lock().unwrap().call("start", "stable", &source, &format!("{source}-v1"));
        let dir = tempfile::tempdir().unwrap();
        let file = format!(
            "apiVersion: aviary/v1\nkind: Router\nmetadata: {{ name: {name} }}\nspec:\n  kafka: {{ bootstrap: '{bootstrap}' }}\n  \
             source: {source}\n  stable: {{ version: v1, group: {source}-v1 }}\n  canary: {{ version: v2, group: {source}-v2 }}\n  \
             hooks: {{ http: 'http://127.0.0.1:{hooks}/hook', timeout: 60s }}\n{more}"
        );
        std::fs::write(dir.path().join("router.yaml"), file).unwrap();

        let (emitted, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let emitter = emit(config, source, rate, emitted.clone(), stop.clone());
        Self { bootstrap, dir, services, log, canary_us, emitted, stop, emitter: Some(emitter) }
    }

    pub fn file(&self) -> PathBuf {
        self.dir.path().join("router.yaml")
    }

    pub fn router(&self) -> Process {
        let log =
            std::fs::OpenOptions::new().create(true).append(true).open(self.dir.path().join("router.log")).unwrap();
        let mut command = aviary();
        command.args(["router", "start", "--audit-every", "0s", "-f"]).arg(self.file());
        Process(command.stdout(Stdio::null()).stderr(log).spawn().unwrap())
    }

    pub fn ask(&self, words: &[&str]) -> Output {
        aviary().arg("router").args(words).arg("-f").arg(self.file()).output().unwrap()
    }

    /// Asks, and has it done.
    pub fn done(&self, words: &[&str]) {
        let output = self.ask(words);
        assert!(
            output.status.success(),
            "{words:?}: {} {}",
            String::from_utf8_lossy(&output.stderr),
            self.router_log()
        );
    }

    pub fn router_log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("router.log")).unwrap_or_default()
    }

    pub fn status(&self) -> Value {
        serde_json::from_slice(&self.ask(&["status", "-o", "json"]).stdout).unwrap_or(Value::Null)
    }

    pub fn until_phase(&self, phase: &str) {
        let began = Instant::now();
        while self.status()["phase"] != phase {
            assert!(began.elapsed() < Duration::from_secs(120), "{phase}: not within 120 s\n{}", self.router_log());
            // Pause between two looks.
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Waits until this many more records are processed.
    pub fn processed(&self, more: u64) {
        let goal = self.log.lock().unwrap().len() as u64 + more;
        wait("records", Duration::from_secs(120), || (self.log.lock().unwrap().len() as u64 >= goal).then_some(()));
    }

    /// Returns each record of the source with its id.
    fn read_source(&self) -> BTreeMap<(i32, i64), u64> {
        let mut config = ClientConfig::new();
        config.set("bootstrap.servers", &self.bootstrap).set("group.id", "reader");
        let reader: BaseConsumer = config.create().unwrap();
        let mut list = TopicPartitionList::new();
        let source = self.services.lock().unwrap().source.clone();
        let mut left = BTreeMap::new();
        for partition in 0..PARTITIONS as i32 {
            list.add_partition_offset(&source, partition, Offset::Beginning).unwrap();
            left.insert(partition, reader.fetch_watermarks(&source, partition, Duration::from_secs(30)).unwrap().1);
        }
        reader.assign(&list).unwrap();
        let (mut found, mut heard) = (BTreeMap::new(), Instant::now());
        while !left.is_empty() {
            assert!(heard.elapsed() < Duration::from_secs(90), "nothing more is read before {left:?}");
            let Some(Ok(message)) = reader.poll(Duration::from_secs(1)) else { continue };
            let header = message.headers().unwrap().get(0).value.unwrap();
            let id = std::str::from_utf8(header).unwrap().parse().unwrap();
            heard = Instant::now();
            found.insert((message.partition(), message.offset()), id);
            if left.get(&message.partition()).is_some_and(|high| message.offset() + 1 >= *high) {
                left.remove(&message.partition());
            }
        }
        found
    }

    /// Ends the emitter, waits until everything is processed, and checks it all. Returns the log.
    pub fn checked(mut self, winner: &str) -> Vec<Processed> {
        self.stop.store(true, Ordering::Relaxed);
        let slowest = self.emitter.take().unwrap().join().unwrap();
        let emitted = self.emitted.load(Ordering::Relaxed);
        // What is in the source is what counts: an emitter whose broker is killed may write a record twice.
        let source = self.read_source();
        assert!(source.len() as u64 >= emitted);
        wait("all records", Duration::from_secs(120), || {
            (self.log.lock().unwrap().len() >= source.len()).then_some(())
        });
        // What comes twice comes late.
        std::thread::sleep(Duration::from_secs(1));
        let log = self.log.lock().unwrap().clone();
        let (mut read, mut given, mut newest) = (BTreeMap::new(), BTreeSet::new(), BTreeMap::new());
        for one in &log {
            let before = read.insert((&one.side, one.alone, one.place.0), one.place.1);
            assert!(before < Some(one.place.1), "the {} service itself went back: {one:?} after {before:?}", one.side);
            assert_eq!(source.get(&one.source), Some(&one.id), "{one:?}");
            assert!(given.insert(one.source), "processed twice: {one:?}\n{}", self.router_log());
            // Producers spread an empty key over the partitions.
            if let Some(key) = one.key.as_ref().filter(|key| !key.is_empty()) {
                let before = newest.insert(key, one.source.1);
                assert!(before < Some(one.source.1), "{one:?} after {before:?}\n{}", self.router_log());
            }
        }
        let missing: Vec<_> = source.keys().filter(|place| !given.contains(place)).take(10).collect();
        assert!(missing.is_empty(), "never processed: {missing:?}\n{}", self.router_log());
        let last = log.last().unwrap();
        assert_eq!((last.side.as_str(), last.alone), (winner, true), "who goes on alone");
        let audit = self.ask(&["audit"]);
        let said = String::from_utf8_lossy(&audit.stdout).into_owned();
        assert!(audit.status.success() && said.starts_with("0 missing, 0 extra, 0 in both; "), "{said}");
        let of = |side: &str| log.iter().filter(|one| one.side == side && !one.alone).count();
        println!(
            "{} records, each processed once ({} stable, {} canary from their topics), keys in order; audit: {}; \
             slowest send {} ms",
            source.len(),
            of("stable"),
            of("canary"),
            said.trim(),
            slowest.as_millis()
        );
        let names: Vec<String> = self.services.lock().unwrap().running.keys().cloned().collect();
        assert_eq!(names, [winner]);
        log
    }
}

impl Drop for Rollout {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Ok(mut services) = self.services.lock() {
            for (_, running) in std::mem::take(&mut services.running) {
                running.stop.store(true, Ordering::Relaxed);
            }
        }
    }
}

/// Emits records at a rate; returns the longest time that the topic took one in.
fn emit(
    mut config: ClientConfig,
    source: String,
    rate: u64,
    emitted: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
) -> JoinHandle<Duration> {
    config.set("enable.idempotence", "true").set("linger.ms", "2").set("message.timeout.ms", "120000");
    config.set("queue.buffering.max.messages", "1000000").set("reconnect.backoff.max.ms", "500");
    let producer: ThreadedProducer<_> = config.create().unwrap();
    std::thread::spawn(move || {
        let (began, mut slowest) = (Instant::now(), Duration::ZERO);
        while !stop.load(Ordering::Relaxed) {
            let due = (began.elapsed().as_secs_f64() * rate as f64) as u64;
            while emitted.load(Ordering::Relaxed) < due {
                let id = emitted.load(Ordering::Relaxed);
                let (key, payload, text) = (key_of(id), payload_of(id), id.to_string());
                let headers = OwnedHeaders::new().insert(Header { key: "id", value: Some(&text) });
                let mut record =
                    BaseRecord::<[u8], [u8]>::to(&source).timestamp(1_000_000 + id as i64).headers(headers);
                if let Some(key) = &key {
                    record = record.key(key);
                }
                if let Some(payload) = &payload {
                    record = record.payload(payload);
                }
                let sent = Instant::now();
                while let Err((KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull), back)) =
                    producer.send(record)
                {
                    record = back;
                    // Pause between two tries: the producer's queue empties.
                    std::thread::sleep(Duration::from_millis(1));
                }
                slowest = slowest.max(sent.elapsed());
                emitted.fetch_add(1, Ordering::Relaxed);
            }
            // The rate is made of batches of two milliseconds.
            std::thread::sleep(Duration::from_millis(2));
        }
        producer.flush(Duration::from_secs(120)).unwrap();
        slowest
    })
}

/// Answers the router's hooks; returns the port.
fn serve_hooks(services: Arc<Mutex<Services>>) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let (Ok(mut stream), services) = (stream, services.clone()) else { continue };
            std::thread::spawn(move || {
                let mut reader = BufReader::new(stream.try_clone().unwrap());
                let (mut length, mut line) = (0, String::new());
                while reader.read_line(&mut line).is_ok_and(|read| read > 2) {
                    if let Some((name, value)) = line.split_once(':')
                        && name.eq_ignore_ascii_case("content-length")
                    {
                        length = value.trim().parse().unwrap();
                    }
                    line.clear();
                }
                let mut body = vec![0; length];
                if reader.read_exact(&mut body).is_err() {
                    return;
                }
                let body: Value = serde_json::from_slice(&body).unwrap();
                let text = |key: &str| body[key].as_str().unwrap().to_string();
                let number = body["number"].as_u64().unwrap();
                asked(&services, number, [&text("call"), &text("side"), &text("topic"), &text("group")]);
                // A router that was killed meanwhile doesn't hear it.
                let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
            });
        }
    });
    port
}
