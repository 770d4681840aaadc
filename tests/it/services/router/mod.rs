//! A topic split between two services, on a real broker: each record is processed once, by one of them, in its key's order.

mod case;
mod refused;
mod rollout;
mod ways_out;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rand::RngExt as _;
use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::consumer::{BaseConsumer, Consumer as _};
use rdkafka::message::{Header, Headers as _, Message as _, OwnedHeaders};
use rdkafka::producer::{BaseRecord, Producer as _, ThreadedProducer};
use rdkafka::{Offset, TopicPartitionList};
use serde_json::Value;

use super::{Own, runtime, unique, variable};
use crate::cluster::harness::{Cluster, Process, Upstream, aviary, free_port, http, rollout as cluster_rollout, wait};
use rollout::{Processed, Rollout, Witness, number};

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
        let life = if random.random_bool(0.5) { random.random_range(50..900) } else { random.random_range(900..4_000) };
        // Every step of start and end is hit as well: some lives are very short.
        std::thread::sleep(Duration::from_millis(life));
        router.0.kill().unwrap();
        router.0.wait().unwrap();
        if let Some(own) = own.as_ref().filter(|_| kill * broker_kills / kills != (kill + 1) * broker_kills / kills) {
            own.kill();
            // How long the broker is down.
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

/// A life of a router that is killed at each step, by name: when it says that it goes on to a phase, and at each call of a service,
/// once before that has an effect and once after.
fn killed_at_each_step(end: &str, steps: &[&str]) {
    let rollout = Rollout::start(variable("KAFKA_BOOTSTRAP"), 1_000, "  weight: 30\n");
    let (witness, told) = Witness::new();
    rollout.services.lock().unwrap().witness = Some(witness);
    if end == "abort" {
        rollout.canary_us.store(10_000, Ordering::Relaxed);
    }
    rollout.processed(500);
    let mut router = rollout.router();
    let (mut died, mut asked, began) = (BTreeSet::new(), false, Instant::now());
    loop {
        assert!(began.elapsed() < Duration::from_secs(180), "{died:?}\n{}", rollout.router_log());
        let entered = || {
            let log = rollout.router_log();
            let mut phases =
                log.lines().filter_map(|line| line.split_once("router goes on phase=")).map(|(_, phase)| phase);
            phases.find(|phase| !died.contains(*phase)).map(str::to_string)
        };
        if let Some(step) = told.recv_timeout(Duration::from_millis(20)).ok().or_else(entered) {
            // Whether it writes the step's entry before it dies is chance.
            std::thread::sleep(Duration::from_millis(rand::rng().random_range(0..30)));
            let _ = router.0.kill();
            router.0.wait().unwrap();
            died.insert(step);
            router = rollout.router();
        } else if !asked && died.contains("\"running\"") && rollout.status()["phase"] == "running" {
            rollout.processed(2_000);
            asked = rollout.ask(&[end, "--no-wait"]).status.success();
        } else if router.0.try_wait().unwrap().is_some() {
            break;
        }
    }
    println!("killed {} times: {}", died.len(), died.iter().cloned().collect::<Vec<_>>().join(", "));
    for step in steps {
        assert!(
            died.iter().any(|one| one.contains(step)),
            "never killed at {step:?}: {died:?}\n{}",
            rollout.router_log()
        );
    }
    rollout.processed(1_000);
    rollout.checked(if end == "promote" { "canary" } else { "stable" });
}

#[test]
#[ignore = "needs Kafka: scripts/services.sh up"]
fn router_killed_at_each_step_and_promoted() {
    killed_at_each_step(
        "promote",
        &[
            "taking over from the stable service",
            "before stop stable on the source",
            "after stop stable on the source",
            "starting both services",
            "before start stable on its own topic",
            "after start stable on its own topic",
            "before start canary on its own topic",
            "after start canary on its own topic",
            "running",
            "promoting: the services read what they were given",
            "promoting: the canary goes on with the source topic",
            "before stop stable on its own topic",
            "after stop stable on its own topic",
            "before stop canary on its own topic",
            "after stop canary on its own topic",
            "promoted",
            "before start canary on the source",
            "after start canary on the source",
        ],
    );
}

#[test]
#[ignore = "needs Kafka: scripts/services.sh up"]
fn router_killed_at_each_step_and_aborted() {
    killed_at_each_step(
        "abort",
        &[
            "running",
            "aborting: the canary's backlog goes to stable",
            "before stop canary on its own topic",
            "after stop canary on its own topic",
            "aborting: the services read what they were given",
            "aborting: stable goes on with the source topic",
            "before stop stable on its own topic",
            "after stop stable on its own topic",
            "aborted",
            "before start stable on the source",
            "after start stable on the source",
        ],
    );
}

#[test]
#[ignore = "needs Kafka: scripts/services.sh up"]
fn router_does_not_increase_the_weight_of_a_canary_that_lags() {
    let rollout = Rollout::start(variable("KAFKA_BOOTSTRAP"), 1_000, "  weight: 10\n  lagMax: 100\n");
    let router = rollout.router();
    rollout.until_phase("running");
    rollout.canary_us.store(30_000, Ordering::Relaxed);
    let one = |key: &str| -> Vec<f64> {
        let status = rollout.status();
        status["partitions"].as_array().unwrap().iter().map(|one| one[key].as_f64().unwrap()).collect()
    };
    wait("a lag", Duration::from_secs(60), || (one("canary_lag").iter().sum::<f64>() > 300.0).then_some(()));
    rollout.done(&["set-weight", "50", "--no-wait"]);
    // Many turns of the router's loop.
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(one("weight"), [0.1; 6], "nothing is raised");
    rollout.done(&["set-weight", "5", "--no-wait"]);
    wait("a lower one", Duration::from_secs(30), || (one("weight") == [0.05; 6]).then_some(()));
    rollout.done(&["set-weight", "50", "--no-wait"]);
    rollout.canary_us.store(0, Ordering::Relaxed);
    wait("the increase", Duration::from_secs(30), || (one("weight") == [0.5; 6]).then_some(()));
    rollout.done(&["promote"]);
    drop(router);
    rollout.processed(500);
    rollout.checked("canary");
}

#[test]
#[ignore = "needs Kafka: scripts/services.sh up"]
fn router_audit_finds_what_is_wrong() {
    let rollout = Rollout::start(variable("KAFKA_BOOTSTRAP"), 1_000, "  weight: 50\n");
    rollout.processed(1_000);
    let mut router = rollout.router();
    rollout.until_phase("running");
    rollout.processed(2_000);
    router.0.kill().unwrap();
    router.0.wait().unwrap();
    let audit = || {
        let output = rollout.ask(&["audit"]);
        (output.status.code(), String::from_utf8(output.stdout).unwrap())
    };
    let (code, said) = audit();
    assert!(code == Some(0) && said.starts_with("0 missing, 0 extra, 0 in both; "), "{said}");
    let source = rollout.services.lock().unwrap().source.clone();
    let log = rollout.log.lock().unwrap().clone();
    let of = |alone: bool| log.iter().filter(move |one| one.side == "stable" && one.alone == alone);
    // They would not know what to do with what comes now.
    for side in ["stable", "canary"] {
        rollout.services.lock().unwrap().call("stop", side, &format!("{source}.r.{side}"), "");
    }
    // A record of stable's is written to the canary's topic too, and one that stable had read before anything was split.
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", &rollout.bootstrap).set("acks", "all");
    let producer: ThreadedProducer<_> = config.create().unwrap();
    let (given, former) = (of(false).next().unwrap(), of(true).next().unwrap());
    for (partition, offset) in [given.source, former.source] {
        let text = format!("{source}/{partition}/{offset}");
        let headers = OwnedHeaders::new().insert(Header { key: "x-aviary-source", value: Some(&text) });
        let topic = format!("{source}.r.canary");
        let record = BaseRecord::<[u8], [u8]>::to(&topic).partition(partition).headers(headers);
        producer.send(record).map_err(|(why, _)| why).unwrap();
    }
    producer.flush(Duration::from_secs(30)).unwrap();
    let (code, said) = audit();
    let places = |kind: &str, (partition, offset): (i32, i64)| format!("\n{kind}: {source}/{partition}/{offset}");
    assert!(code == Some(1) && said.starts_with("0 missing, 1 extra, 1 in both; "), "{code:?} {said}");
    assert!(said.contains(&places("both", given.source)) && said.contains(&places("extra", former.source)), "{said}");
    // And some that it was given go.
    let last = of(false).rfind(|one| one.place.0 == given.place.0).unwrap();
    let mut gone = TopicPartitionList::new();
    gone.add_partition_offset(&format!("{source}.r.stable"), last.place.0, Offset::Offset(last.place.1 + 1)).unwrap();
    let admin: AdminClient<_> = config.create().unwrap();
    runtime().block_on(admin.delete_records(&gone, &AdminOptions::new())).unwrap();
    let expected = of(false).filter(|one| one.place.0 == last.place.0 && one.place.1 <= last.place.1).count();
    let (code, said) = audit();
    // The one that is in the canary's topic as well is there still.
    assert!(code == Some(1) && said.starts_with(&format!("{} missing, 1 extra, 0 in both; ", expected - 1)), "{said}");
    println!("{said}");
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
    // Some 2 000 records come meanwhile, and wait.
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
    // What is posted twice comes late.
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
    let Ok(jars) = std::env::var("AVIARY_KAFKA_JARS") else {
        println!("skipped: no Kafka tools, expected AVIARY_KAFKA_JARS to name their folder");
        return;
    };
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
    let had = read("canary").len();
    wait("records without the router", Duration::from_secs(30), || (read("canary").len() > had + 500).then_some(()));
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
