//! What the README claims of the control plane, measured. Ignored: `cargo test --release --test it measure -- --ignored --nocapture`.
#![expect(clippy::disallowed_methods, reason = "these measure real processes, on the real clock")]

use std::fs;
use std::time::{Duration, Instant, SystemTime};

use aviary::schema::v1::{Decision, DecisionKind, TelemetryEvent};
use prost::Message as _;
use rand::RngExt as _;
use rdkafka::message::Message as _;
use rdkafka::producer::{BaseRecord, ThreadedProducer};

use crate::cluster::harness::{Cluster, Upstream, http, rollout, wait};
use crate::services::kafka::Topics;
use crate::services::{Following, Own, apply_when_ready, kinds, redis, streamed, variable};

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

fn event(service: &str, version: &str, status: u32) -> Vec<u8> {
    let event = TelemetryEvent {
        service: service.into(),
        version: version.into(),
        status,
        latency_ms: 20.0,
        event_time: Some(SystemTime::now().into()),
        event_id: String::new(),
    };
    event.encode_to_vec()
}

#[test]
#[ignore = "measures for minutes; needs Kafka"]
fn from_the_event_that_crosses_the_limit_to_the_decision_on_the_topic() {
    let topics = Topics::create(variable("KAFKA_BOOTSTRAP"));
    let (v1, v2) = (Upstream::start("v1"), Upstream::start("v2"));
    let cluster = Cluster::start_with(&topics.lines());
    let yaml = rollout(&v1.url(), &v2.url(), "    - setWeight: 20\n    - pause: {}\n    - setWeight: 100");
    let producer: ThreadedProducer<_> = topics.client().set("linger.ms", "0").create().unwrap();
    let send = |version: &str, status: u32| {
        let payload = event("svc", version, status);
        producer.send(BaseRecord::to(&topics.telemetry).key("svc").payload(&payload)).map_err(|(e, _)| e).unwrap();
    };
    // Longer than the nodes take to join their consumer group: starting isn't what is measured.
    std::thread::sleep(Duration::from_secs(5));
    let reader = topics.reader();
    let until = |kind: DecisionKind| {
        let began = Instant::now();
        loop {
            assert!(began.elapsed() < Duration::from_secs(20), "no {kind:?}");
            let Some(message) = reader.poll(Duration::from_millis(100)) else { continue };
            let decision = Decision::decode(message.unwrap().payload().unwrap()).unwrap();
            if decision.kind() == kind {
                break;
            }
        }
    };
    let mut took: Vec<f64> = Vec::new();
    for round in 0..number("MEASURE_RUNS", 50) {
        // A version of its own for each: what was counted for the last one is not this one's.
        let canary = format!("v2-{round}");
        cluster.apply(0, &yaml.replace("version: v2", &format!("version: {canary}")));
        until(DecisionKind::Start);
        // The nodes' consumers have joined their group by then, too.
        std::thread::sleep(Duration::from_millis(700));
        for _ in 0..200 {
            send(&canary, 200);
        }
        // The good events are counted, and the peers know of them, which takes a third of a second.
        std::thread::sleep(Duration::from_millis(500));
        // 10 of 210 are less than 5 %; the eleventh crosses the limit.
        for _ in 0..10 {
            send(&canary, 500);
        }
        // Time for a rollback that must not come.
        std::thread::sleep(Duration::from_millis(500));
        assert_eq!(cluster.state(0).unwrap()["phase"], "Progressing", "round {round}: not over the limit yet");
        let crossed = Instant::now();
        send(&canary, 500);
        until(DecisionKind::Rollback);
        println!("round {round}: {} ms", crossed.elapsed().as_millis());
        took.push(crossed.elapsed().as_secs_f64() * 1000.0);
    }
    took.sort_by(f64::total_cmp);
    let at = |q: f64| took[((took.len() - 1) as f64 * q).round() as usize];
    println!("event to decision on the topic: p50 {:.0} ms, p99 {:.0} ms, n {}", at(0.5), at(0.99), took.len());
    assert!(at(0.99) < 1_000.0);
}

/// Returns a node's resident memory in bytes, and the processor time that it used.
fn usage(pid: u32) -> (f64, Duration) {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS")).unwrap();
    let kib: f64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
    (kib * 1024.0, Duration::from_millis(ticks * 10))
}

#[test]
#[ignore = "measures for minutes; needs Kafka"]
fn a_thousand_services_at_once() {
    let services = number("MEASURE_SERVICES", 1_000);
    let topics = Topics::create(variable("KAFKA_BOOTSTRAP"));
    let (v1, v2) = (Upstream::start("v1"), Upstream::start("v2"));
    let cluster = Cluster::start_with(&topics.lines());
    let pids: Vec<u32> = cluster.nodes.iter().map(|node| node.process.as_ref().unwrap().0.id()).collect();
    let before: Vec<_> = pids.iter().map(|pid| usage(*pid)).collect();
    let window = number("MEASURE_WINDOW_SECONDS", 30);
    let yaml = rollout(&v1.url(), &v2.url(), "    - setWeight: 20\n    - pause: {}\n    - setWeight: 100");
    let yaml = yaml.replace("window: 30s", &format!("window: {window}s"));
    let began = Instant::now();
    for service in 0..services {
        cluster.apply(0, &yaml.replace("name: svc", &format!("name: s{service}")));
    }
    println!("{services} rollouts started in {:.1} s", began.elapsed().as_secs_f64());
    let producer: ThreadedProducer<_> = topics.client().set("linger.ms", "5").create().unwrap();
    let (seconds, rate) = (number("MEASURE_SECONDS", 75), 20_000);
    let (began, mut sent) = (Instant::now(), 0u64);
    let busy: Vec<_> = pids.iter().map(|pid| usage(*pid).1).collect();
    while began.elapsed() < Duration::from_secs(seconds) {
        while sent < (began.elapsed().as_secs_f64() * f64::from(rate)) as u64 {
            let service = format!("s{}", sent % services);
            let version = if (sent / services).is_multiple_of(5) { "v2" } else { "v1" };
            let payload = event(&service, version, 200);
            let _ = producer.send(BaseRecord::to(&topics.telemetry).key(&service).payload(&payload));
            sent += 1;
        }
        // The rate is made of batches of 5 ms.
        std::thread::sleep(Duration::from_millis(5));
    }
    let elapsed = began.elapsed().as_secs_f64();
    for (((node, pid), before), busy) in cluster.nodes.iter().zip(&pids).zip(&before).zip(&busy) {
        let (memory, used) = usage(*pid);
        println!(
            "node {}: {:.1} KiB a service, {:.0} % of a core at {rate} events/s and {services} services",
            node.name,
            (memory - before.0) / services as f64 / 1024.0,
            (used - *busy).as_secs_f64() / elapsed * 100.0
        );
    }
    let head = http(cluster.nodes[0].api, "GET", "/v1/cluster", &[], "").unwrap().json()["head"].as_u64().unwrap();
    let all = streamed(&cluster, 0, head);
    let started = |decision: &Decision| decision.proposed_time.map(|at| at.seconds as f64 + f64::from(at.nanos) / 1e9);
    let mut late: Vec<f64> = Vec::new();
    for decision in all.iter().filter(|one| one.kind() == DecisionKind::Verdict) {
        let window = decision.window.as_ref().unwrap();
        let start = all.iter().find(|one| one.service == decision.service).and_then(started).unwrap();
        late.push(started(decision).unwrap() - start - window.to_ms as f64 / 1000.0);
    }
    late.sort_by(f64::total_cmp);
    let at = |q: f64| late[((late.len() - 1) as f64 * q).round() as usize];
    println!("{} windows decided, after their end: p50 {:.2} s, p99 {:.2} s", late.len(), at(0.5), at(0.99));
    assert!(late.len() as u64 >= services * 2 && at(0.99) < 5.0);
    cluster.assert_no_panic();
}

#[test]
#[ignore = "measures for minutes; needs Kafka"]
fn memory_is_flat_while_telemetry_comes() {
    let topics = Topics::create(variable("KAFKA_BOOTSTRAP"));
    let (v1, v2) = (Upstream::start("v1"), Upstream::start("v2"));
    let cluster = Cluster::start_with(&topics.lines());
    let pids: Vec<u32> = cluster.nodes.iter().map(|node| node.process.as_ref().unwrap().0.id()).collect();
    let yaml = rollout(&v1.url(), &v2.url(), "    - setWeight: 20\n    - pause: {}\n    - setWeight: 100");
    cluster.apply(0, &yaml.replace("window: 30s", "window: 2s"));
    let (seconds, rate) = (number("MEASURE_SECONDS", 600), number("MEASURE_RATE", 20_000).to_string());
    let _source = topics.produce(&["--share", "20", "--rate", &rate]);
    let memory = || -> Vec<f64> { pids.iter().map(|pid| usage(*pid).0 / 1_048_576.0).collect() };
    // What is kept for a fixed number of events or seconds fills up first.
    let (began, mut early) = (Instant::now(), Vec::new());
    while began.elapsed() < Duration::from_secs(seconds) {
        // Time between two measurements.
        std::thread::sleep(Duration::from_secs(seconds / 10));
        let now = memory();
        println!("{:.0} s: {now:.1?} MiB", began.elapsed().as_secs_f64());
        if early.is_empty() && began.elapsed() >= Duration::from_secs(seconds / 5) {
            early = now;
        }
    }
    for (early, late) in early.iter().zip(memory()) {
        assert!(late < early * 1.1 + 4.0, "{early:.1} MiB, then {late:.1}");
    }
    cluster.assert_no_panic();
}

#[test]
#[ignore = "measures for minutes; needs Kafka and Redis programs"]
fn a_node_the_broker_or_redis_is_killed_again_and_again_and_no_window_is_lost() {
    let (kafka, store) = (Own::start("kafka"), Own::start("redis"));
    let topics = Topics::create(format!("127.0.0.1:{}", kafka.port));
    let url = format!("redis://127.0.0.1:{}", store.port);
    let (v1, v2) = (Upstream::start("v1"), Upstream::start("v2"));
    let mut cluster = Cluster::start_with(&format!("{}\n[redis]\nurl = \"{url}\"\n", topics.lines()));
    let yaml = rollout(&v1.url(), &v2.url(), "    - setWeight: 20\n    - pause: {}\n    - setWeight: 100");
    let yaml = yaml.replace("window: 30s", "window: 2s");
    apply_when_ready(&cluster, &yaml);
    let source = topics.produce(&["--share", "20", "--rate", "1000"]);
    let following = Following::start(&cluster);
    let (began, mut random) = (Instant::now(), rand::rng());
    let mut kills = [0; 3];
    while began.elapsed() < Duration::from_secs(number("MEASURE_SECONDS", 60)) {
        // All are up for some windows of a second between two failures.
        std::thread::sleep(Duration::from_millis(random.random_range(1_000..4_000)));
        let victim = random.random_range(0..3);
        kills[victim] += 1;
        let unavailable = Duration::from_millis(random.random_range(200..3_000));
        match victim {
            0 => {
                let node = random.random_range(0..3);
                cluster.kill(node);
                // How long the node is down.
                std::thread::sleep(unavailable);
                cluster.spawn(node, None);
                cluster.wait_ready(node);
            }
            other => {
                let own = if other == 1 { &kafka } else { &store };
                own.kill();
                // How long the service is down.
                std::thread::sleep(unavailable);
                own.up();
            }
        }
    }
    let seconds = began.elapsed().as_secs();
    wait("the rollback", Duration::from_secs(20), || {
        (cluster.post(2, "/v1/rollouts/svc/abort", None, "{}").status == 200).then_some(())
    });
    let read = topics.read(|found| kinds(found).last() == Some(&DecisionKind::Rollback));
    drop(source);
    for node in 0..3 {
        assert_eq!(streamed(&cluster, node, read[read.len() - 1].sequence), read, "node {node}");
    }
    let followed = following.up_to(read[read.len() - 1].sequence);
    assert_eq!(followed.decisions, read, "a client that resumed {} times", followed.resumed);
    let mut next = 0;
    let windows: Vec<_> = read.iter().filter_map(|one| Some((one, one.window.as_ref()?))).collect();
    for (_, window) in &windows {
        assert_eq!(window.from_ms, next, "no window is missing");
        next = window.to_ms;
    }
    redis::agrees(&cluster, &url, &read);
    let seen = windows.iter().filter(|(_, window)| window.canary.as_ref().unwrap().count > 0).count();
    println!(
        "{seconds} s, killed {} nodes, {} brokers, {} Redis: {} windows decided once each, {seen} with evidence; topic, streams, Redis and a client that resumed {} times agree",
        kills[0],
        kills[1],
        kills[2],
        windows.len(),
        followed.resumed
    );
    assert!(seen * 10 > windows.len(), "telemetry came between the kills");
    assert!(next >= (seconds - 20) * 1_000);
    cluster.assert_no_panic();
}
