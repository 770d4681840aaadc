//! What a router checks before it stops anything, and the ends that it reaches where something is gone.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rdkafka::admin::AdminOptions;
use rdkafka::consumer::{BaseConsumer, Consumer as _};
use rdkafka::{Offset, TopicPartitionList};

use super::super::{runtime, unique, variable};
use super::case::Case;
use crate::cluster::harness::wait;

const WAIT: Duration = Duration::from_secs(60);

fn case(more: &str) -> Case {
    Case::new(&variable("KAFKA_BOOTSTRAP"), &[], more)
}

#[test]
#[ignore = "needs Kafka: scripts/services.sh up"]
fn router_touches_nothing_when_the_stable_group_never_committed() {
    let case = case("  weight: 0\n");
    case.fill(3);
    let file = std::fs::read_to_string(case.file()).unwrap();
    std::fs::write(case.file(), file.replace(&format!("{}-stable", case.source), "nobody-yet")).unwrap();
    assert_eq!(case.exits(), Some(1), "{}", case.log());
    assert!(case.calls().is_empty(), "{:?}", case.calls());
    assert_eq!(case.bounds(&case.topic("stable")).1, -1, "no topic was made");
    let plan = case.ask(&["plan"]);
    assert!(
        plan.status.code() == Some(1) && String::from_utf8_lossy(&plan.stdout).contains("no place in it"),
        "{plan:?}"
    );
}

#[test]
#[ignore = "needs Kafka: scripts/services.sh up"]
fn router_that_takes_over_is_aborted_and_starts_stable_again() {
    let case = case("  weight: 0\n");
    case.fill(3);
    // Stable's group has a member that no hook stops.
    let mut config = case.config();
    let member: BaseConsumer = config.set("group.id", format!("{}-stable", case.source)).create().unwrap();
    member.subscribe(&[&case.source]).unwrap();
    let poll = || drop(member.poll(Duration::from_millis(100)));
    wait("the member", WAIT, || {
        poll();
        member.assignment().is_ok_and(|list| list.count() > 0).then_some(())
    });
    let mut router = case.router();
    wait("the stop", WAIT, || {
        poll();
        (case.status()["phase"] == "taking over from the stable service").then_some(())
    });
    assert!(case.ask(&["abort", "--no-wait"]).status.success());
    let code = wait("the end", WAIT, || {
        poll();
        router.0.try_wait().unwrap()
    });
    assert_eq!(code.code(), Some(0), "{}", case.log());
    assert_eq!(case.status()["phase"], "aborted");
    assert_eq!(case.calls().last().unwrap(), "start stable", "{:?}", case.calls());
}

#[test]
#[ignore = "needs Kafka: scripts/services.sh up"]
fn router_refuses_the_name_of_another_rollout() {
    let case = case("  weight: 0\n");
    let router = case.router();
    case.until_phase("running");
    case.ends(router, &["promote"], "promoted");
    assert_eq!(case.exits(), Some(0), "the same file has nothing to do: {}", case.log());
    let file = std::fs::read_to_string(case.file()).unwrap();
    let calls = case.calls();
    std::fs::write(case.file(), file.replace("version: v2", "version: v3")).unwrap();
    assert_eq!(case.exits(), Some(1), "{}", case.log());
    assert_eq!(case.calls(), calls, "nothing was called");
    case.said("expected another metadata.name");
}

#[test]
#[ignore = "needs Kafka: scripts/services.sh up"]
fn router_counts_members_of_the_newer_group_protocol() {
    let case = case("  weight: 50\n");
    let router = case.router();
    case.until_phase("running");
    case.fill(30);
    case.copied(30, WAIT);
    let stop = Arc::new(AtomicBool::new(false));
    let mut config = case.config();
    config.set("group.id", format!("{}-canary", case.source)).set("group.protocol", "consumer");
    config.set("enable.auto.commit", "false").set("isolation.level", "read_committed");
    let member: BaseConsumer = config.create().unwrap();
    member.subscribe(&[&case.topic("canary")]).unwrap();
    let stops = stop.clone();
    let thread = std::thread::spawn(move || {
        let mut read = 0;
        while !stops.load(Ordering::Relaxed) {
            if let Some(Ok(message)) = member.poll(Duration::from_millis(50)) {
                read += 1;
                member.commit_message(&message, rdkafka::consumer::CommitMode::Sync).unwrap();
            }
        }
        read
    });
    assert!(case.ask(&["promote", "--no-wait"]).status.success());
    wait("stable's records", WAIT, || {
        case.read_all("stable");
        case.log().contains("the canary service's group has 1 members, expected none").then_some(())
    });
    assert_eq!(case.status()["phase"], "promoting: the canary goes on with the source topic");
    stop.store(true, Ordering::Relaxed);
    assert!(thread.join().unwrap() > 0);
    case.ends(router, &["status"], "promoted");
}

#[test]
#[ignore = "needs Kafka: scripts/services.sh up"]
fn router_passes_over_records_that_are_gone_when_it_is_told_to() {
    let case = case("  weight: 0\n");
    let mut router = case.router();
    case.until_phase("running");
    case.fill(10);
    case.copied(10, WAIT);
    router.0.kill().unwrap();
    router.0.wait().unwrap();
    case.fill(70);
    let mut gone = TopicPartitionList::new();
    gone.add_partition_offset(&case.source, 0, Offset::Offset(80)).unwrap();
    runtime().block_on(case.admin().delete_records(&gone, &AdminOptions::new())).unwrap();
    case.fill(5);
    let router = case.router();
    case.said("records 10 to 79 of partition 0 are gone (retention?); `aviary router resume --skip-lost -f FILE`");
    assert!(case.ask(&["resume", "--skip-lost"]).status.success());
    case.copied(15, WAIT);
    assert_eq!(case.status()["lost"], 70);
    case.ends(router, &["promote"], "promoted");
}

#[test]
#[ignore = "needs Kafka: scripts/services.sh up"]
fn router_hands_back_the_first_record_that_is_left() {
    let case = case("  weight: 0\n");
    let mut router = case.router();
    case.until_phase("running");
    case.fill(10);
    case.copied(10, WAIT);
    router.0.kill().unwrap();
    router.0.wait().unwrap();
    case.fill(70);
    let mut gone = TopicPartitionList::new();
    gone.add_partition_offset(&case.source, 0, Offset::Offset(60)).unwrap();
    runtime().block_on(case.admin().delete_records(&gone, &AdminOptions::new())).unwrap();
    case.ends(case.router(), &["abort"], "aborted");
    assert_eq!(case.place("stable", &case.source), Some(60));
}

#[test]
#[ignore = "needs Kafka: scripts/services.sh up"]
fn router_is_aborted_after_the_source_was_made_anew() {
    let case = case("  weight: 0\n");
    let mut router = case.router();
    case.until_phase("running");
    case.fill(10);
    case.copied(10, WAIT);
    router.0.kill().unwrap();
    router.0.wait().unwrap();
    case.delete(&case.source);
    case.make(&case.source, &[]);
    case.fill(20);
    let router = case.router();
    case.said("it was deleted and made anew");
    case.ends(router, &["abort"], "aborted");
    assert_eq!(case.place("stable", &case.source), Some(0), "all of the new topic is stable's");
}

#[test]
#[ignore = "needs Kafka: scripts/services.sh up"]
fn router_goes_on_by_its_copies_when_its_own_group_was_deleted() {
    let case = case("  weight: 50\n");
    let mut router = case.router();
    case.until_phase("running");
    case.fill(30);
    case.copied(30, WAIT);
    router.0.kill().unwrap();
    router.0.wait().unwrap();
    for side in ["stable", "canary"] {
        case.read_all(side);
    }
    let group = format!("aviary-router-{}.r", case.source);
    wait("the deletion", WAIT, || {
        let gone = runtime().block_on(case.admin().delete_groups(&[&group], &AdminOptions::new())).unwrap();
        gone.into_iter().all(|group| group.is_ok()).then_some(())
    });
    let router = case.router();
    case.fill(30);
    case.copied(60, WAIT);
    case.ends(router, &["promote"], "promoted");
    let audit = case.ask(&["audit"]);
    assert!(audit.status.success() && audit.stdout.starts_with(b"0 missing, 0 extra, 0 in both; 60 = "), "{audit:?}");
}

#[test]
#[ignore = "needs Kafka: scripts/services.sh up"]
fn router_is_aborted_after_the_canary_s_topic_was_deleted() {
    let case = case("  weight: 100\n");
    let mut router = case.router();
    case.until_phase("running");
    case.fill(10);
    case.copied(10, WAIT);
    case.delete(&case.topic("canary"));
    router.0.kill().unwrap();
    router.0.wait().unwrap();
    let mut router = case.router();
    case.fill(1);
    case.said("the topic was deleted and made anew");
    assert!(router.0.try_wait().unwrap().is_none() && !case.log().contains("panicked"), "{}", case.log());
    case.ends(router, &["abort"], "aborted");
    assert_eq!(case.place("stable", &case.source), Some(10), "what was never copied is stable's");
}

#[test]
#[ignore = "needs Kafka: scripts/services.sh up"]
fn router_waits_for_a_service_that_assigns_its_partitions_itself() {
    let case = case("  weight: 0\n");
    case.fill(100);
    let stop = Arc::new(AtomicBool::new(false));
    let (stops, mut config) = (stop.clone(), case.config());
    config.set("group.id", format!("{}-stable", case.source)).set("enable.auto.commit", "false");
    let reader: BaseConsumer = config.create().unwrap();
    let source = case.source.clone();
    let thread = std::thread::spawn(move || {
        let mut next = 0;
        while !stops.load(Ordering::Relaxed) {
            next += 1;
            let mut list = TopicPartitionList::new();
            list.add_partition_offset(&source, 0, Offset::Offset(next)).unwrap();
            reader.commit(&list, rdkafka::consumer::CommitMode::Sync).unwrap();
            // How long it takes for a record.
            std::thread::sleep(Duration::from_millis(300));
        }
        next
    });
    let plan = case.ask(&["plan"]);
    assert!(String::from_utf8_lossy(&plan.stdout).contains("nobody is in stable's group"), "{plan:?}");
    let router = case.router();
    case.said("its group has no members and its places move");
    assert_eq!(case.status()["phase"], "taking over from the stable service");
    stop.store(true, Ordering::Relaxed);
    let next = thread.join().unwrap();
    case.until_phase("running");
    case.copied(100 - next as usize, WAIT);
    case.ends(router, &["abort"], "aborted");
}

#[test]
#[ignore = "needs Kafka: scripts/services.sh up"]
fn router_says_what_a_partition_waits_for_and_what_an_open_transaction_hides() {
    let case = case("  weight: 100\n  changeMax: 500ms\n");
    let router = case.router();
    case.until_phase("running");
    case.fill(10);
    case.copied(10, WAIT);
    assert!(case.ask(&["set-weight", "0", "--no-wait"]).status.success());
    case.said("waiting for the canary service, which has up to");
    case.said("`aviary router abort -f FILE`");
    let mut config = case.config();
    let producer: rdkafka::producer::BaseProducer = config.set("transactional.id", unique("open")).create().unwrap();
    use rdkafka::producer::Producer as _;
    producer.init_transactions(WAIT).unwrap();
    producer.begin_transaction().unwrap();
    producer
        .send(rdkafka::producer::BaseRecord::to(&case.source).key("a").payload("x"))
        .map_err(|(why, _)| why)
        .unwrap();
    producer.flush(WAIT).unwrap();
    assert_eq!(case.status()["partitions"][0]["behind_open_transaction"], 1);
    producer.abort_transaction(WAIT).unwrap();
    case.ends(router, &["abort"], "aborted");
}
