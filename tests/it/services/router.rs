//! A topic split between two services, on a real broker: each record is processed once, by one of them, in its key's order.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use aviary::router::audit::read_source;
use rand::RngExt as _;
use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer as _};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{Header, Headers as _, Message as _, OwnedHeaders};
use rdkafka::producer::{BaseRecord, Producer as _, ThreadedProducer};
use rdkafka::{Offset, TopicPartitionList};
use serde_json::Value;

use super::{Own, runtime, unique, variable};
use crate::cluster::harness::{Cluster, Process, Upstream, aviary, free_port, http, rollout as cluster_rollout, wait};

const PARTITIONS: usize = 6;

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// A record that a service has processed.
#[derive(Debug, Clone)]
struct Processed {
    id: u64,
    key: Option<Vec<u8>>,
    /// `stable` or `canary`.
    side: String,
    /// Whether it came from the source itself.
    alone: bool,
    /// Where it stood in the topic that the service read, and in the source.
    place: (i32, i64),
    source: (i32, i64),
    at: Instant,
}

type Log = Arc<Mutex<Vec<Processed>>>;

/// A consumer that runs.
struct Running {
    topic: String,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

/// The two services, started and stopped by the router's requests.
struct Services {
    bootstrap: String,
    source: String,
    running: BTreeMap<String, Running>,
    /// The newest call's number, for each service.
    numbers: BTreeMap<String, u64>,
    log: Log,
    /// Microseconds that the canary takes for a record.
    canary_us: Arc<AtomicU64>,
}

impl Services {
    /// Does what a hook is asked, unless it comes after a newer one.
    fn asked(&mut self, number: u64, call: &str, side: &str, topic: &str, group: &str) {
        let newest = self.numbers.entry(side.into()).or_default();
        if number >= *newest {
            *newest = number;
            self.call(call, side, topic, group);
        }
    }

    fn call(&mut self, call: &str, side: &str, topic: &str, group: &str) {
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
                    // A service commits what it did before it does more, however long the broker is away.
                    while let Err(why) = consumer.commit_consumer_state(CommitMode::Sync) {
                        assert_ne!(
                            why.rdkafka_error_code(),
                            Some(RDKafkaErrorCode::UnknownMemberId),
                            "{side} was thrown out"
                        );
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
struct Rollout {
    bootstrap: String,
    dir: tempfile::TempDir,
    services: Arc<Mutex<Services>>,
    log: Log,
    canary_us: Arc<AtomicU64>,
    emitted: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    emitter: Option<JoinHandle<Duration>>,
}

impl Rollout {
    fn start(bootstrap: String, rate: u64, more: &str) -> Self {
        Self::named("r", bootstrap, rate, more)
    }

    fn named(name: &str, bootstrap: String, rate: u64, more: &str) -> Self {
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

    fn file(&self) -> PathBuf {
        self.dir.path().join("router.yaml")
    }

    fn router(&self) -> Process {
        let log =
            std::fs::OpenOptions::new().create(true).append(true).open(self.dir.path().join("router.log")).unwrap();
        let mut command = aviary();
        command.args(["router", "start", "--audit-every", "0s", "-f"]).arg(self.file());
        Process(command.stdout(Stdio::null()).stderr(log).spawn().unwrap())
    }

    fn ask(&self, words: &[&str]) -> Output {
        aviary().arg("router").args(words).arg("-f").arg(self.file()).output().unwrap()
    }

    /// Asks, and has it done.
    fn done(&self, words: &[&str]) {
        let output = self.ask(words);
        assert!(
            output.status.success(),
            "{words:?}: {} {}",
            String::from_utf8_lossy(&output.stderr),
            self.router_log()
        );
    }

    fn router_log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("router.log")).unwrap_or_default()
    }

    fn status(&self) -> Value {
        serde_json::from_slice(&self.ask(&["status", "-o", "json"]).stdout).unwrap_or(Value::Null)
    }

    fn until_phase(&self, phase: &str) {
        let began = Instant::now();
        while self.status()["phase"] != phase {
            assert!(began.elapsed() < Duration::from_secs(120), "{phase}: not within 120 s\n{}", self.router_log());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Waits until this many more records are processed.
    fn processed(&self, more: u64) {
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
    fn checked(mut self, winner: &str) -> Vec<Processed> {
        self.stop.store(true, Ordering::Relaxed);
        let slowest = self.emitter.take().unwrap().join().unwrap();
        let emitted = self.emitted.load(Ordering::Relaxed);
        // What is in the source is what counts: an emitter whose broker is killed may write a record twice.
        let source = self.read_source();
        assert!(source.len() as u64 >= emitted);
        wait("all records", Duration::from_secs(120), || {
            (self.log.lock().unwrap().len() >= source.len()).then_some(())
        });
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
                    std::thread::sleep(Duration::from_millis(1));
                }
                slowest = slowest.max(sent.elapsed());
                emitted.fetch_add(1, Ordering::Relaxed);
            }
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
                let asked: Value = serde_json::from_slice(&body).unwrap();
                let text = |key: &str| asked[key].as_str().unwrap().to_string();
                let (number, mut services) = (asked["number"].as_u64().unwrap(), services.lock().unwrap());
                services.asked(number, &text("call"), &text("side"), &text("topic"), &text("group"));
                drop(services);
                // A router that was killed meanwhile doesn't hear it.
                let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
            });
        }
    });
    port
}

/// Returns the longest time that passed between two records from the services' own topics.
fn longest_gap(log: &[Processed], from: Instant, until: Instant) -> Duration {
    let times: Vec<Instant> = log.iter().map(|one| one.at).filter(|at| (from..until).contains(at)).collect();
    times.windows(2).map(|two| two[1] - two[0]).max().unwrap_or_default()
}

#[test]
#[ignore = "needs Kafka: scripts/services.sh up"]
fn router_start_ten_percent_fifty_percent_and_promote() {
    let rollout = Rollout::start(variable("KAFKA_BOOTSTRAP"), number("ROUTER_RATE", 2_000), "  weight: 0\n");
    rollout.processed(2_000);
    let router = rollout.router();
    rollout.until_phase("running");
    rollout.processed(2_000);
    let began = Instant::now();
    for share in ["10", "50"] {
        rollout.done(&["set-weight", share]);
        rollout.processed(number("ROUTER_RECORDS", 6_000) / 2);
    }
    let ended = Instant::now();
    rollout.done(&["promote"]);
    drop(router);
    rollout.processed(2_000);
    let log = rollout.checked("canary");
    println!("longest gap in output over two changes of weight: {} ms", longest_gap(&log, began, ended).as_millis());
}

#[test]
#[ignore = "needs Kafka: scripts/services.sh up"]
fn router_start_ten_percent_and_abort_with_a_backlog() {
    let rollout = Rollout::start(variable("KAFKA_BOOTSTRAP"), number("ROUTER_RATE", 2_000), "  weight: 10\n");
    let router = rollout.router();
    rollout.until_phase("running");
    // The canary can't keep up: when it is stopped it has a backlog.
    rollout.canary_us.store(20_000, Ordering::Relaxed);
    rollout.processed(number("ROUTER_RECORDS", 6_000));
    let lag: u64 =
        rollout.status()["partitions"].as_array().unwrap().iter().map(|one| one["canary_lag"].as_u64().unwrap()).sum();
    rollout.done(&["abort", "--reason", "too slow"]);
    drop(router);
    rollout.processed(2_000);
    assert!(rollout.router_log().contains("backlog was given to stable"), "a lag of {lag}");
    rollout.checked("stable");
}

/// A life of a router that is killed at random moments, and now and then its broker.
fn killed(end: &str, kills: u64, broker_kills: u64) {
    let own = (broker_kills > 0).then(|| Own::start("kafka"));
    let bootstrap = own.as_ref().map_or_else(|| variable("KAFKA_BOOTSTRAP"), |own| format!("127.0.0.1:{}", own.port));
    let rollout = Rollout::start(bootstrap, number("ROUTER_RATE", 1_000), "  weight: 10\n  changeMax: 1s\n");
    rollout.processed(500);
    let mut random = rand::rng();
    let mut router = rollout.router();
    for kill in 0..kills {
        // Every step of start and end is hit as well: some lives are very short.
        let life = if random.random_bool(0.5) { random.random_range(50..900) } else { random.random_range(900..4_000) };
        std::thread::sleep(Duration::from_millis(life));
        router.0.kill().unwrap();
        router.0.wait().unwrap();
        if let Some(own) = own.as_ref().filter(|_| kill * broker_kills / kills != (kill + 1) * broker_kills / kills) {
            own.kill();
            std::thread::sleep(Duration::from_millis(random.random_range(100..2_000)));
            own.up();
        }
        router = rollout.router();
        let share = random.random_range(5..60).to_string();
        match kill {
            _ if kill + 4 == kills => wait("somebody who hears", Duration::from_secs(60), || {
                rollout.ask(&[end, "--no-wait"]).status.success().then_some(())
            }),
            _ if kill + 4 < kills && kill % 3 == 0 => drop(rollout.ask(&["set-weight", &share, "--no-wait"])),
            _ => {}
        }
    }
    let done = if end == "promote" { "promoted" } else { "aborted" };
    rollout.until_phase(done);
    wait("the router's end", Duration::from_secs(60), || router.0.try_wait().unwrap());
    rollout.processed(1_000);
    println!("killed the router {kills} times, the broker {broker_kills} times");
    rollout.checked(if end == "promote" { "canary" } else { "stable" });
}

#[test]
#[ignore = "needs Kafka: scripts/services.sh up"]
fn router_killed_again_and_again_and_promoted() {
    killed("promote", number("ROUTER_KILLS", 8), number("ROUTER_BROKER_KILLS", 0));
}

#[test]
#[ignore = "needs Kafka: scripts/services.sh up"]
fn router_killed_again_and_again_and_aborted() {
    killed("abort", number("ROUTER_KILLS", 8), number("ROUTER_BROKER_KILLS", 0));
}

#[test]
#[ignore = "needs Kafka: scripts/services.sh up"]
fn router_started_twice_is_the_newer_one() {
    let rollout = Rollout::start(variable("KAFKA_BOOTSTRAP"), 500, "  weight: 30\n");
    let mut first = rollout.router();
    rollout.until_phase("running");
    rollout.processed(500);
    let second = rollout.router();
    let status = wait("the first one's end", Duration::from_secs(30), || first.0.try_wait().unwrap());
    assert_eq!(status.code(), Some(1), "{}", rollout.router_log());
    rollout.processed(500);
    rollout.done(&["promote"]);
    drop(second);
    rollout.processed(500);
    rollout.checked("canary");
}

#[test]
#[ignore = "needs Kafka: scripts/services.sh up"]
fn router_follows_the_cluster_waits_without_it_and_aborts_with_it() {
    let (v1, v2) = (Upstream::start("v1"), Upstream::start("v2"));
    let mut cluster = Cluster::start();
    let nodes: Vec<_> = cluster.nodes.iter().map(|node| format!("'http://127.0.0.1:{}'", node.api)).collect();
    let follow = format!("  follow: {{ api: [{}] }}\n", nodes.join(", "));
    let rollout = Rollout::named("svc", variable("KAFKA_BOOTSTRAP"), 1_000, &follow);
    cluster
        .apply(0, &cluster_rollout(&v1.url(), &v2.url(), "    - setWeight: 20\n    - pause: {}\n    - setWeight: 100"));
    let router = rollout.router();
    rollout.until_phase("running");
    let shares = |status: &Value| -> Vec<f64> {
        status["partitions"].as_array().unwrap().iter().map(|one| one["weight"].as_f64().unwrap()).collect()
    };
    wait("the cluster's weight", Duration::from_secs(20), || {
        shares(&rollout.status()).iter().all(|w| *w == 0.2).then_some(())
    });
    assert_eq!(rollout.ask(&["promote"]).status.code(), Some(1), "it is the cluster's to say");
    rollout.processed(2_000);
    // A node alone holds no lease: nothing moves.
    cluster.kill(0);
    cluster.kill(1);
    wait("the pause", Duration::from_secs(20), || {
        rollout.router_log().contains("waiting for the cluster").then_some(())
    });
    let next = rollout.status()["partitions"].clone();
    std::thread::sleep(Duration::from_secs(2));
    let still: Vec<_> =
        rollout.status()["partitions"].as_array().unwrap().iter().map(|one| one["next"].clone()).collect();
    assert_eq!(still, next.as_array().unwrap().iter().map(|one| one["next"].clone()).collect::<Vec<_>>());
    for node in [0, 1] {
        cluster.spawn(node, None);
        cluster.wait_ready(node);
    }
    rollout.processed(3_000);
    wait("the rollback", Duration::from_secs(10), || {
        (cluster.post(2, "/v1/rollouts/svc/abort", None, "{}").status == 200).then_some(())
    });
    rollout.until_phase("aborted");
    drop(router);
    rollout.processed(1_000);
    rollout.checked("stable");
    cluster.assert_no_panic();
}

#[test]
#[ignore = "needs Kafka: scripts/services.sh up"]
fn router_posts_records_to_the_data_plane_and_the_rest_to_the_dead_letters() {
    let (v1, v2) = (Upstream::start("v1"), Upstream::start("v2"));
    let cluster = Cluster::start();
    cluster
        .apply(0, &cluster_rollout(&v1.url(), &v2.url(), "    - setWeight: 50\n    - pause: {}\n    - setWeight: 100"));
    let bootstrap = variable("KAFKA_BOOTSTRAP");
    let dead = unique("dead");
    let port = free_port();
    let more = format!(
        "  weight: 50\n  push: {{ url: 'http://127.0.0.1:{}/predict', deadLetter: {dead}, attempts: 3 }}\n",
        cluster.nodes[0].data
    );
    let mut rollout = Rollout::named("svc", bootstrap.clone(), 500, &more);
    let mut config = ClientConfig::new();
    let admin: AdminClient<_> = config.set("bootstrap.servers", &bootstrap).create().unwrap();
    let new = NewTopic::new(&dead, 1, TopicReplication::Fixed(1));
    runtime().block_on(admin.create_topics(&[new], &AdminOptions::new())).unwrap();
    // The stable service's place is the router's.
    rollout.processed(200);
    let source = rollout.services.lock().unwrap().source.clone();
    rollout.services.lock().unwrap().call("stop", "stable", &source, &format!("{source}-v1"));
    let before = rollout.log.lock().unwrap().len() as u64;
    let start = |rollout: &Rollout| {
        let mut command = aviary();
        command.args(["router", "start", "--listen", &format!("127.0.0.1:{port}"), "-f"]).arg(rollout.file());
        let log =
            std::fs::OpenOptions::new().create(true).append(true).open(rollout.dir.path().join("router.log")).unwrap();
        Process(command.stderr(log).spawn().unwrap())
    };
    let done = |version: &str| {
        let text = http(port, "GET", "/metrics", &[], "")
            .map(|answer| String::from_utf8(answer.body).unwrap())
            .unwrap_or_default();
        let line = format!("aviary_router_records_total{{version=\"{version}\"}} ");
        text.lines().find_map(|found| found.strip_prefix(&line)?.parse::<u64>().ok()).unwrap_or(0)
    };
    let router = start(&rollout);
    wait("records done", Duration::from_secs(30), || (done("v1") > 300 && done("v2") > 300).then_some(()));
    rollout.stop.store(true, Ordering::Relaxed);
    rollout.emitter.take().unwrap().join().unwrap();
    let emitted = rollout.emitted.load(Ordering::Relaxed);
    wait("all records", Duration::from_secs(30), || (done("v1") + done("v2") >= emitted - before).then_some(()));
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(done("v1") + done("v2"), emitted - before, "each once: {}", rollout.router_log());
    let share = done("v2") as f64 / (emitted - before) as f64;
    assert!((0.4..0.6).contains(&share), "{share}");
    drop(router);
    // Nobody is there to take records: they are posted again, and then kept for people.
    drop((v1, v2));
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", &bootstrap).set("group.id", unique("reader")).set("auto.offset.reset", "earliest");
    let producer: ThreadedProducer<_> = config.create().unwrap();
    producer.send(BaseRecord::to(&source).key("lost").payload("nobody's")).map_err(|(why, _)| why).unwrap();
    producer.flush(Duration::from_secs(10)).unwrap();
    let _router = start(&rollout);
    let reader: BaseConsumer = config.create().unwrap();
    reader.subscribe(&[&dead]).unwrap();
    let letter = wait("the dead letter", Duration::from_secs(60), || {
        reader.poll(Duration::from_millis(100)).map(Result::unwrap)
    });
    let headers: BTreeMap<_, _> =
        letter.headers().unwrap().iter().map(|one| (one.key, String::from_utf8_lossy(one.value.unwrap()))).collect();
    assert_eq!(letter.payload(), Some(&b"nobody's"[..]));
    assert!(
        headers["x-aviary-source"].starts_with(&source) && headers["x-aviary-error"].contains("(3 times)"),
        "{headers:?}"
    );
    cluster.assert_no_panic();
}

#[test]
#[ignore = "needs Kafka: scripts/services.sh up"]
fn router_with_console_consumers_as_services() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let rollout = Rollout::start(variable("KAFKA_BOOTSTRAP"), 300, "  weight: 20\n");
    let path = rollout.file();
    let file = std::fs::read_to_string(&path).unwrap();
    let hook = root.join("config/router/console.sh");
    let from = file.find("  hooks:").unwrap();
    let line = file[from..].lines().next().unwrap();
    std::fs::write(&path, file.replace(line, &format!("  hooks: {{ exec: ['{}'], timeout: 60s }}", hook.display())))
        .unwrap();
    // The service that runs on the source is one of those, from the first record on.
    let source = rollout.services.lock().unwrap().source.clone();
    let group = format!("{source}-v1");
    rollout.services.lock().unwrap().call("stop", "stable", &source, &group);
    let dir = rollout.dir.path().join("services");
    let jars =
        std::env::var("AVIARY_KAFKA_JARS").unwrap_or_else(|_| root.join("target/services/jars").display().to_string());
    if !Path::new(&jars).is_dir() {
        println!("skipped: no Kafka tools at {jars}");
        return;
    }
    let hook = |words: [&str; 4], reset: &str| {
        let mut command = std::process::Command::new(&hook);
        command.args(words).env("SERVICES_DIR", &dir).env("KAFKA_JARS", &jars).env("OFFSET_RESET", reset);
        assert!(command.env("KAFKA_BOOTSTRAP", &rollout.bootstrap).status().unwrap().success());
    };
    hook(["start", "stable", &source, &group], "earliest");
    let read = |side: &str| -> Vec<u64> {
        let text = std::fs::read_to_string(dir.join(format!("{side}.log"))).unwrap_or_default();
        let id = |line: &str| line.split("id:").nth(1)?.split([',', '\t']).next()?.parse().ok();
        text.lines().filter_map(id).collect()
    };
    let before = rollout.log.lock().unwrap().len() as u64;
    wait("the console consumer", Duration::from_secs(30), || (!read("stable").is_empty()).then_some(()));
    let mut command = aviary();
    command
        .args(["router", "start", "--audit-every", "2s", "-f"])
        .arg(&path)
        .env("SERVICES_DIR", &dir)
        .env("KAFKA_JARS", &jars);
    let log = std::fs::File::create(rollout.dir.path().join("router.log")).unwrap();
    let router = Process(command.stderr(log).spawn().unwrap());
    rollout.until_phase("running");
    wait("the canary's first records", Duration::from_secs(30), || (read("canary").len() > 100).then_some(()));
    rollout.done(&["promote"]);
    drop(router);
    std::thread::sleep(Duration::from_secs(4));
    rollout.stop.store(true, Ordering::Relaxed);
    let emitted = wait("the emitter's end", Duration::from_secs(10), || {
        rollout.emitter.as_ref().unwrap().is_finished().then(|| rollout.emitted.load(Ordering::Relaxed))
    });
    let all = || {
        let mut all = [read("stable"), read("canary")].concat();
        all.sort_unstable();
        all
    };
    wait("all records", Duration::from_secs(30), || (all().len() as u64 >= emitted - before).then_some(()));
    hook(["stop", "canary", &source, &format!("{source}-v2")], "none");
    hook(["stop", "stable", &source, &group], "none");
    assert_eq!(all(), (before..emitted).collect::<Vec<_>>(), "{}", rollout.router_log());
    assert!(rollout.router_log().contains("audit: 0 missing, 0 extra, 0 in both"), "{}", rollout.router_log());
}
