//! Records that a broker takes once and refuses as copies.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpListener;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rand::RngExt as _;
use rdkafka::message::{Headers as _, Message as _};

use super::super::{Own, unique, variable, wire};
use super::case::Case;
use crate::cluster::harness::{Process, wait};

const WAIT: Duration = Duration::from_secs(60);

fn noise(bytes: usize) -> Vec<u8> {
    let mut random = rand::rng();
    (0..bytes).map(|_| random.random()).collect()
}

#[test]
#[ignore = "needs Kafka: scripts/services.sh up"]
fn router_copies_headers_whose_names_are_not_text() {
    let case = Case::new(&variable("KAFKA_BOOTSTRAP"), &[], "  weight: 0\n");
    case.write_file("compression.type: none", "  weight: 0\n");
    let name: &[u8] = b"go-\xff\xfe";
    let own = b"x-aviary-source".as_slice();
    wire::produce(
        &case.bootstrap,
        &case.source,
        b"one",
        &[(name, Some(b"\xfd")), (b"null", None), (own, Some(b"former"))],
    );
    let mut router = case.router();
    wait("the copy", WAIT, || {
        assert!(router.0.try_wait().unwrap().is_none(), "{}", case.log());
        (case.status()["stable"] == 1).then_some(())
    });
    let found = wire::fetch(&case.bootstrap, &case.topic("stable"));
    let has = |what: &[u8]| found.windows(what.len()).any(|part| part == what);
    // Lengths are doubled; that of a null value is 1.
    assert!(has(b"\x0ago-\xff\xfe\x02\xfd\x08null\x01"), "{}", found.escape_ascii());
    assert!(!has(b"former") && has(format!("{}/0/0", case.source).as_bytes()), "{}", found.escape_ascii());
    let audit = case.ask(&["audit"]);
    assert!(audit.status.success() && audit.stdout.starts_with(b"0 missing, 0 extra, 0 in both; 1 = "), "{audit:?}");
    case.ends(router, &["abort"], "aborted");
}

#[test]
#[ignore = "needs Kafka: scripts/services.sh up"]
fn router_copies_a_record_that_fits_by_its_compression_only() {
    let case = Case::new(&variable("KAFKA_BOOTSTRAP"), &[], "  weight: 0\n");
    // One block again and again, farther apart than lz4 looks.
    let value = noise(150_000).repeat(20);
    case.produce(&[("compression.type", "zstd")], [("large", value.clone())]);
    let _router = case.router();
    case.until_phase("running");
    case.copied(1, WAIT);
    assert!(case.read(&case.topic("stable"))[0].payload() == Some(&value[..]));
}

#[test]
#[ignore = "needs Kafka: scripts/services.sh up"]
fn router_copies_records_that_are_older_than_the_broker_takes() {
    let own = Own::with("kafka", "log.message.timestamp.before.max.ms=3600000");
    let bootstrap = format!("127.0.0.1:{}", own.port);
    let case = Case::new(&bootstrap, &[("message.timestamp.before.max.ms", "9223372036854775807")], "  weight: 0\n");
    let producer: rdkafka::producer::ThreadedProducer<_> = case.config().create().unwrap();
    let old = rdkafka::producer::BaseRecord::to(&case.source).key("old").payload("1970").timestamp(1_000_000);
    producer.send(old).map_err(|(why, _)| why).unwrap();
    rdkafka::producer::Producer::flush(&producer, WAIT).unwrap();
    let _router = case.router();
    case.until_phase("running");
    case.copied(1, WAIT);
    assert_eq!(case.read(&case.topic("stable"))[0].timestamp().to_millis(), Some(1_000_000));
}

#[test]
#[ignore = "needs Kafka: scripts/services.sh up"]
fn router_goes_on_under_a_quota_and_names_it() {
    let case = Case::new(&variable("KAFKA_BOOTSTRAP"), &[], "  weight: 50\n");
    let client = unique("client");
    case.write_file(&format!("client.id: {client}"), "  weight: 50\n");
    case.produce(&[("compression.type", "none")], (0..480).map(|_| ("key", noise(50_000))));
    wire::quota(&case.bootstrap, &client, 1_000_000.0);
    let _router = case.router();
    case.until_phase("running");
    // 24 MB at 1 MB a second, which the broker counts over its last eleven seconds.
    case.copied(480, Duration::from_secs(100));
    case.said("the broker throttles the router: a quota");
}

#[test]
#[ignore = "needs Kafka: scripts/services.sh up"]
fn router_says_why_a_record_is_refused_and_abort_is_a_way_out() {
    let case = Case::new(&variable("KAFKA_BOOTSTRAP"), &[], "  weight: 0\n");
    case.make(&case.topic("stable"), &[("max.message.bytes", "1000")]);
    let router = case.router();
    case.until_phase("running");
    case.produce(&[], [("large", noise(100_000))]);
    case.said(&format!("the first to {}", case.topic("stable")));
    assert!(case.log().contains("Message size too large"), "{}", case.log());
    assert!(case.log().contains("aviary router abort -f FILE"), "{}", case.log());
    case.ends(router, &["abort"], "aborted");
    assert_eq!(case.place("stable", &case.source), Some(0), "the record is stable's");
}

/// Answers each post: 400 to large bodies, 200 to others; returns the address, and the paths' bodies' lengths.
fn endpoint() -> (u16, Arc<Mutex<Vec<usize>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (port, posts) = (listener.local_addr().unwrap().port(), Arc::new(Mutex::new(Vec::new())));
    let seen = posts.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let (mut stream, seen) = (stream.unwrap(), seen.clone());
            std::thread::spawn(move || {
                let mut reader = BufReader::new(stream.try_clone().unwrap());
                loop {
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
                    if length == 0 || reader.read_exact(&mut body).is_err() {
                        return;
                    }
                    seen.lock().unwrap().push(length);
                    let status = if length > 1000 { "400 Bad Request" } else { "200 OK" };
                    let _ = write!(stream, "HTTP/1.1 {status}\r\ncontent-length: 0\r\n\r\n");
                }
            });
        }
    });
    (port, posts)
}

#[test]
#[ignore = "needs Kafka: scripts/services.sh up"]
fn router_writes_a_dead_letter_by_its_place_where_its_topic_does_not_take_it() {
    let (port, posts) = endpoint();
    let bootstrap = variable("KAFKA_BOOTSTRAP");
    let dead = unique("dead");
    let more = format!("  weight: 0\n  push: {{ url: 'http://127.0.0.1:{port}/', deadLetter: {dead} }}\n");
    let case = Case::new(&bootstrap, &[], &more);
    case.make(&dead, &[("max.message.bytes", "20000")]);
    let small = |one: usize| ("small", vec![b'x'; 10 + one]);
    case.produce(&[], (0..5).map(small));
    wire::produce(&bootstrap, &case.source, &noise(100_000), &[(b"\xff", Some(b"1")), (b"null", None)]);
    case.produce(&[], (5..10).map(small));
    let _router: Process = case.router();
    wait("the place", WAIT, || (case.place("stable", &case.source) == Some(11)).then_some(()));
    let mut seen = posts.lock().unwrap().clone();
    seen.sort_unstable();
    assert_eq!(seen, [10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 100_000], "each once: {}", case.log());
    let found = wire::fetch(&bootstrap, &dead);
    let has = |what: &[u8]| found.windows(what.len()).any(|part| part == what);
    assert!(has(b"\x02\xff\x021\x08null\x01"), "{}", found.escape_ascii());
    assert!(has(format!("{}/0/5", case.source).as_bytes()) && has(b"its value of 100000 bytes is left out"));
    assert!(found.len() < 2_000);
}

#[test]
#[ignore = "needs Kafka: scripts/services.sh up"]
fn router_keeps_a_record_s_time_and_headers_in_its_copy() {
    let case = Case::new(&variable("KAFKA_BOOTSTRAP"), &[], "  weight: 100\n");
    wire::produce(&case.bootstrap, &case.source, b"one", &[(b"traceparent", Some(b"00-1-2-01"))]);
    let _router = case.router();
    case.until_phase("running");
    case.copied(1, WAIT);
    let copy = case.read(&case.topic("canary")).remove(0);
    let names: Vec<String> = copy.headers().unwrap().iter().map(|header| header.key.to_string()).collect();
    assert_eq!(names, ["traceparent", "x-aviary-version", "x-aviary-weight-version", "x-aviary-source"]);
    assert_eq!(copy.timestamp(), case.read(&case.source)[0].timestamp());
}
