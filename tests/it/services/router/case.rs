//! A small rollout by hand: a topic with few records, a router, and services that only commit what a test lets them read.

use std::path::PathBuf;
use std::process::{Output, Stdio};
use std::time::Duration;

use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer as _};
use rdkafka::message::{Message as _, OwnedMessage};
use rdkafka::producer::{BaseRecord, Producer as _, ThreadedProducer};
use rdkafka::{Offset, TopicPartitionList};
use serde_json::Value;

use super::super::{runtime, unique};
use crate::cluster::harness::{Process, aviary, wait};

/// A topic, the router's file, and two groups.
pub struct Case {
    pub bootstrap: String,
    pub source: String,
    pub dir: tempfile::TempDir,
}

impl Case {
    /// Makes a topic of one partition, which stable's group has read up to its end, and a router's file with `more` in its spec.
    pub fn new(bootstrap: &str, settings: &[(&str, &str)], more: &str) -> Self {
        let (bootstrap, source, dir) = (bootstrap.to_string(), unique("case"), tempfile::tempdir().unwrap());
        let case = Self { bootstrap, source, dir };
        case.make(&case.source, settings);
        case.write_file("", more);
        case.commit("stable", &case.source, 0);
        case
    }

    /// Writes the router's file, with more properties of the client.
    pub fn write_file(&self, properties: &str, more: &str) {
        let Self { bootstrap, source, .. } = self;
        let file = format!(
            "apiVersion: aviary/v1\nkind: Router\nmetadata: {{ name: r }}\nspec:\n  kafka: {{ bootstrap: '{bootstrap}', \
             properties: {{ {properties} }} }}\n  source: {source}\n  stable: {{ version: v1, group: {source}-stable }}\n  \
             canary: {{ version: v2, group: {source}-canary }}\n{more}"
        );
        // The hook writes down what it is called for.
        let calls = self.dir.path().join("calls");
        let script = format!("echo \"$0 $1\" >> {}", calls.display());
        let hooks = format!("  hooks: {{ exec: ['sh', '-c', '{script}'] }}\n");
        std::fs::write(self.file(), format!("{file}{hooks}")).unwrap();
    }

    pub fn file(&self) -> PathBuf {
        self.dir.path().join("router.yaml")
    }

    pub fn config(&self) -> ClientConfig {
        let mut config = ClientConfig::new();
        config.set("bootstrap.servers", &self.bootstrap);
        config
    }

    pub fn admin(&self) -> AdminClient<DefaultClientContext> {
        self.config().create().unwrap()
    }

    pub fn make(&self, topic: &str, settings: &[(&str, &str)]) {
        let mut new = NewTopic::new(topic, 1, TopicReplication::Fixed(1));
        for (key, value) in settings {
            new = new.set(key, value);
        }
        let made = runtime().block_on(self.admin().create_topics([&new], &AdminOptions::new())).unwrap();
        made.into_iter().for_each(|topic| drop(topic.unwrap()));
        wait("the topic", Duration::from_secs(10), || (self.bounds(topic).1 >= 0).then_some(()));
    }

    pub fn delete(&self, topic: &str) {
        let gone = runtime().block_on(self.admin().delete_topics(&[topic], &AdminOptions::new())).unwrap();
        gone.into_iter().for_each(|topic| drop(topic.unwrap()));
        // A broker forgets a topic's places, and its name, a moment later.
        std::thread::sleep(Duration::from_secs(1));
    }

    /// Returns the name of a version's own topic.
    pub fn topic(&self, side: &str) -> String {
        format!("{}.r.{side}", self.source)
    }

    fn reader(&self, group: &str) -> BaseConsumer {
        let mut config = self.config();
        config.set("group.id", group).set("enable.auto.commit", "false").set("isolation.level", "read_committed");
        config.set("enable.partition.eof", "true").set("fetch.message.max.bytes", "20000000").create().unwrap()
    }

    pub fn bounds(&self, topic: &str) -> (i64, i64) {
        self.reader("look").fetch_watermarks(topic, 0, Duration::from_secs(10)).unwrap_or((-1, -1))
    }

    /// Lets a service's group have read a topic up to this offset.
    pub fn commit(&self, side: &str, topic: &str, next: i64) {
        let mut list = TopicPartitionList::new();
        list.add_partition_offset(topic, 0, Offset::Offset(next)).unwrap();
        self.reader(&format!("{}-{side}", self.source)).commit(&list, CommitMode::Sync).unwrap();
    }

    /// Returns the next offset that a service's group reads of a topic.
    pub fn place(&self, side: &str, topic: &str) -> Option<i64> {
        let mut list = TopicPartitionList::new();
        list.add_partition(topic, 0);
        let reader = self.reader(&format!("{}-{side}", self.source));
        let found = reader.committed_offsets(list, Duration::from_secs(10)).unwrap();
        match found.elements()[0].offset() {
            Offset::Offset(next) => Some(next),
            _ => None,
        }
    }

    /// Produces records with these keys and values to the source.
    pub fn produce<'a>(&self, settings: &[(&str, &str)], records: impl IntoIterator<Item = (&'a str, Vec<u8>)>) {
        let mut config = self.config();
        config.set("acks", "all").set("message.max.bytes", "100000000");
        for (key, value) in settings {
            config.set(*key, *value);
        }
        let producer: ThreadedProducer<_> = config.create().unwrap();
        for (key, value) in records {
            let record = BaseRecord::to(&self.source).key(key).payload(&value);
            producer.send(record).map_err(|(why, _)| why).unwrap();
        }
        producer.flush(Duration::from_secs(60)).unwrap();
    }

    /// Produces `count` records of three keys.
    pub fn fill(&self, count: usize) {
        self.produce(&[], (0..count).map(|one| (["a", "b", "c"][one % 3], format!("record {one}").into_bytes())));
    }

    /// Returns all committed records of a topic.
    pub fn read(&self, topic: &str) -> Vec<OwnedMessage> {
        let reader = self.reader("look");
        let mut list = TopicPartitionList::new();
        list.add_partition_offset(topic, 0, Offset::Beginning).unwrap();
        reader.assign(&list).unwrap();
        let mut found = Vec::new();
        while let Some(Ok(message)) = reader.poll(Duration::from_secs(10)) {
            found.push(message.detach());
        }
        found
    }

    /// Lets a service have read all of its own topic; returns how many records there are.
    pub fn read_all(&self, side: &str) -> usize {
        let topic = self.topic(side);
        let records = self.read(&topic);
        if let Some(last) = records.last() {
            self.commit(side, &topic, last.offset() + 1);
        }
        records.len()
    }

    /// Waits until the two versions have this many records together.
    pub fn copied(&self, count: usize, within: Duration) {
        wait("copies", within, || {
            let copies = ["stable", "canary"].iter().map(|side| self.read(&self.topic(side)).len()).sum::<usize>();
            assert!(copies <= count, "{copies} copies of {count} records");
            (copies == count).then_some(())
        });
    }

    pub fn router(&self) -> Process {
        let log =
            std::fs::OpenOptions::new().create(true).append(true).open(self.dir.path().join("router.log")).unwrap();
        let mut command = aviary();
        command.args(["router", "start", "--audit-every", "0s", "-f"]).arg(self.file());
        Process(command.stdout(Stdio::null()).stderr(log).spawn().unwrap())
    }

    /// Returns which services were started and stopped, such as `stop stable`.
    pub fn calls(&self) -> Vec<String> {
        let text = std::fs::read_to_string(self.dir.path().join("calls")).unwrap_or_default();
        text.lines().map(str::to_string).collect()
    }

    /// Starts a router that ends by itself, and returns its exit code.
    pub fn exits(&self) -> Option<i32> {
        let mut router = self.router();
        wait("the router's end", Duration::from_secs(60), || router.0.try_wait().unwrap()).code()
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("router.log")).unwrap_or_default()
    }

    /// Waits until the router's log has this.
    pub fn said(&self, what: &str) {
        let began = std::time::Instant::now();
        while !self.log().contains(what) {
            assert!(began.elapsed() < Duration::from_secs(60), "never said {what:?}:\n{}", self.log());
            // Pause between two looks.
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    pub fn ask(&self, words: &[&str]) -> Output {
        aviary().arg("router").args(words).arg("-f").arg(self.file()).output().unwrap()
    }

    pub fn status(&self) -> Value {
        serde_json::from_slice(&self.ask(&["status", "-o", "json"]).stdout).unwrap_or(Value::Null)
    }

    pub fn until_phase(&self, phase: &str) {
        let began = std::time::Instant::now();
        while self.status()["phase"] != phase {
            assert!(began.elapsed() < Duration::from_secs(60), "{phase}: not within 60 s\n{}", self.log());
            // Pause between two looks.
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Asks for an end, lets both services read what they are given, and waits for the router's.
    pub fn ends(&self, mut router: Process, words: &[&str], phase: &str) {
        let no_wait: &[&str] = if words == ["status"] { &[] } else { &["--no-wait"] };
        let asked = self.ask(&[words, no_wait].concat());
        assert!(asked.status.success(), "{}", String::from_utf8_lossy(&asked.stderr));
        let began = std::time::Instant::now();
        while router.0.try_wait().unwrap().is_none() {
            assert!(began.elapsed() < Duration::from_secs(60), "no end within 60 s\n{}", self.log());
            for side in ["stable", "canary"].iter().filter(|side| self.bounds(&self.topic(side)).1 > 0) {
                self.read_all(side);
            }
        }
        assert_eq!(self.status()["phase"], phase, "{}", self.log());
    }
}
