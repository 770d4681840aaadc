//! The topics and groups of a record router.
//!
//! Each transaction holds the copies, the router's own places with its notes, the services' places where they are handed over, and
//! the control topic's entry. The transactional id shuts out whoever was the router before.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, ResourceSpecifier, TopicReplication};
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::consumer::{BaseConsumer, Consumer as _, ConsumerGroupMetadata};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{BorrowedMessage, DeliveryResult, Header, Headers as _, Message as _, OwnedHeaders};
use rdkafka::producer::{BaseRecord, Producer as _, ProducerContext, ThreadedProducer};
use rdkafka::types::RDKafkaErrorCode as Code;
use rdkafka::{ClientContext, Offset, TopicPartitionList};
use tracing::info;

use super::{ANSWER_MAX, Quiet, again, client, flush, log};
use crate::config::node::Kafka;
use crate::domain::split::Side;
use crate::ports::{Broker, Clock, Commit, Group, Opened, OutsideError, Place, Reclaimed, Record, Stamp, Topic};

/// Where a copy comes from: `TOPIC/PARTITION/OFFSET`.
pub const SOURCE_HEADER: &str = "x-aviary-source";
/// Which version it was given to.
pub const VERSION_HEADER: &str = "x-aviary-version";
/// Under which weight.
pub const EPOCH_HEADER: &str = "x-aviary-epoch";

/// What a producer hears whose transactions a newer one has taken over.
const FENCED: [RDKafkaErrorCode; 3] =
    [RDKafkaErrorCode::Fenced, RDKafkaErrorCode::ProducerFenced, RDKafkaErrorCode::InvalidProducerEpoch];

/// After how many records the clock is read.
const CLOCK_EVERY: usize = 64;

/// How long a full queue is waited for before it is looked at again.
const FULL: Duration = Duration::from_millis(1);

/// What a router's topics, groups and versions are called.
#[derive(Debug, Clone)]
pub struct Names {
    /// The topic that is split.
    pub source: String,
    /// The versions' own topics, stable's first.
    pub topics: [String; 2],
    /// Their services' groups.
    pub groups: [String; 2],
    /// The versions.
    pub versions: [String; 2],
    /// The control topic.
    pub control: String,
    /// The router's own group and transactional id.
    pub router: String,
}

impl Names {
    fn topic(&self, topic: Topic) -> &str {
        match topic {
            Topic::Source => &self.source,
            Topic::Of(side) => &self.topics[side as usize],
        }
    }
}

/// What the broker said about records of the open transaction.
struct Deliveries {
    /// The last offset in stable's and canary's topic, for each partition; below 0: none.
    last: [Vec<AtomicI64>; 2],
    failed: AtomicU64,
}

#[derive(Clone)]
struct Context(Arc<Deliveries>);

impl ClientContext for Context {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, text: &str) {
        log(level, facility, text);
    }
}

/// Records of the control topic have this mark, others their side's number.
const CONTROL: usize = 2;

impl ProducerContext for Context {
    type DeliveryOpaque = usize;

    fn delivery(&self, result: &DeliveryResult<'_>, mark: usize) {
        match result {
            Ok(message) if mark < CONTROL => {
                self.0.last[mark][message.partition() as usize].fetch_max(message.offset(), Ordering::Relaxed);
            }
            Ok(_) => {}
            Err(_) => {
                self.0.failed.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
}

/// A broker, as a router sees it.
pub struct KafkaBroker {
    config: Kafka,
    names: Names,
    clock: Arc<dyn Clock>,
    /// One for each service's group, which it asks about and never joins.
    services: [BaseConsumer<Quiet>; 2],
    open: Option<Open>,
}

struct Open {
    writer: Writer,
    /// Reads the source; its group is the router's.
    source: BaseConsumer<Quiet>,
    group: ConsumerGroupMetadata,
    control: BaseConsumer<Quiet>,
    partitions: usize,
    /// Which partitions aren't read at the moment.
    held: Vec<bool>,
}

struct Writer {
    producer: ThreadedProducer<Context>,
    deliveries: Arc<Deliveries>,
    /// A transaction has begun.
    begun: bool,
    /// The headers of records given to stable and canary under the weight of this number, but for where they are from.
    stamped: Option<(u64, [OwnedHeaders; 2])>,
}

fn whole(topic: &str, partitions: usize) -> TopicPartitionList {
    let mut list = TopicPartitionList::new();
    list.add_partition_range(topic, 0, partitions as i32 - 1);
    list
}

impl KafkaBroker {
    /// Returns a broker that is not open yet.
    pub fn new(config: &Kafka, names: Names, clock: Arc<dyn Clock>) -> Result<Self, OutsideError> {
        let consumer = |group: &String| {
            let own =
                [("group.id", group.as_str()), ("enable.auto.commit", "false"), ("isolation.level", "read_committed")];
            let made = client(config, &own).create_with_context(Quiet);
            made.map_err(|error: KafkaError| OutsideError::new("kafka", error))
        };
        let services = [consumer(&names.groups[0])?, consumer(&names.groups[1])?];
        Ok(Self { config: config.clone(), names, clock, services, open: None })
    }

    /// Returns how many partitions a topic has; none when it isn't there.
    pub fn partitions(&self, topic: &str) -> Result<Option<usize>, OutsideError> {
        let error = |error: KafkaError| OutsideError::new(format!("kafka topic {topic}"), error);
        let metadata = self.services[0].fetch_metadata(Some(topic), ANSWER_MAX).map_err(error)?;
        let found = metadata.topics().first();
        match found.and_then(|found| found.error()) {
            Some(why) if Code::from(why) == Code::UnknownTopicOrPartition => Ok(None),
            Some(why) => Err(error(KafkaError::MetadataFetch(why.into()))),
            None => Ok(found.map(|found| found.partitions().len())),
        }
    }

    /// Makes the control topic and the versions' topics, those that aren't there; returns the names of those it made.
    pub fn prepare(&self) -> Result<Vec<String>, OutsideError> {
        let names = &self.names;
        let Some(partitions) = self.partitions(&names.source)? else {
            return Err(OutsideError::new(
                format!("kafka topic {}", names.source),
                "isn't there, expected the topic to split",
            ));
        };
        let mut wanted = Vec::new();
        for (topic, count) in [(&names.control, 1), (&names.topics[0], partitions), (&names.topics[1], partitions)] {
            match self.partitions(topic)? {
                None => wanted.push((topic.clone(), count)),
                Some(found) if found == count => {}
                Some(found) => {
                    let why = format!("has {found} partitions, expected {count}, as many as {}", names.source);
                    return Err(OutsideError::new(format!("kafka topic {topic}"), why));
                }
            }
        }
        let error = |error: KafkaError| OutsideError::new("kafka", error);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|error| OutsideError::new("kafka", error))?;
        let admin: AdminClient<Quiet> = client(&self.config, &[]).create_with_context(Quiet).map_err(error)?;
        let options = AdminOptions::new().operation_timeout(Some(ANSWER_MAX)).request_timeout(Some(ANSWER_MAX));
        let like = runtime.block_on(admin.describe_configs([&ResourceSpecifier::Topic(&names.source)], &options));
        let like = like.map_err(error)?.into_iter().next().and_then(Result::ok);
        let like = |key: &str| like.as_ref().and_then(|config| config.get(key)).and_then(|entry| entry.value.clone());
        // A copy is larger than its record by its headers.
        let bytes = like("max.message.bytes").and_then(|text| text.parse::<i64>().ok()).unwrap_or(1_048_588) + 4096;
        let (bytes, in_sync) = (bytes.to_string(), like("min.insync.replicas"));
        for (topic, count) in &wanted {
            // As many replicas as the broker gives by default; nothing goes by its age: old records are copied with their own time.
            let mut new = NewTopic::new(topic, *count as i32, TopicReplication::Fixed(-1))
                .set("retention.ms", "-1")
                .set("cleanup.policy", "delete")
                .set("message.timestamp.type", "CreateTime")
                .set("max.message.bytes", &bytes);
            if let Some(in_sync) = &in_sync {
                new = new.set("min.insync.replicas", in_sync);
            }
            let made = runtime.block_on(admin.create_topics([&new], &options)).map_err(error)?;
            match made.into_iter().next() {
                Some(Err((_, why))) if why != RDKafkaErrorCode::TopicAlreadyExists => {
                    return Err(OutsideError::new(format!("kafka topic {topic}"), format!("can't be made: {why}")));
                }
                _ => {}
            }
        }
        Ok(wanted.into_iter().map(|(topic, _)| topic).collect())
    }

    /// Returns what [`Broker::open`] does, without becoming the router: for those who only look.
    pub fn look(&self) -> Result<Opened, OutsideError> {
        let partitions = self.partitions(&self.names.source)?;
        let (Some(partitions), Some(_)) = (partitions, self.partitions(&self.names.control)?) else {
            return Ok(Opened::default());
        };
        let error = |error| self.error(error);
        let (source, control) = (self.source().map_err(error)?, self.control().map_err(error)?);
        Ok(Opened {
            places: places(&source, &self.names.source, partitions).map_err(error)?,
            entries: read(&control).map_err(error)?,
        })
    }

    /// Returns the first offset and that after the last, for each partition of a topic.
    pub fn topic_bounds(&self, topic: Topic) -> Result<Vec<(i64, i64)>, OutsideError> {
        let name = self.names.topic(topic);
        let partitions = self.partitions(name)?.unwrap_or(0);
        let bounds = (0..partitions).map(|one| self.services[0].fetch_watermarks(name, one as i32, ANSWER_MAX));
        bounds.collect::<Result<_, _>>().map_err(|error| self.error(error))
    }

    /// Returns a service's group, as it reads a topic.
    pub fn service_group(&self, side: Side, topic: Topic) -> Result<Group, OutsideError> {
        let partitions = self.partitions(&self.names.source)?.unwrap_or(0);
        self.try_group(side, topic, partitions).map_err(|error| self.error(error))
    }

    /// Reads what is committed of a topic, from these offsets on and before `until`: each record's partition, offset, and what
    /// it says of where it is from.
    pub fn scan(
        &self,
        topic: Topic,
        from: &[i64],
        until: &[i64],
        take: &mut dyn FnMut(usize, i64, Option<&str>),
    ) -> Result<(), OutsideError> {
        self.try_scan(self.names.topic(topic), from, until, take).map_err(|error| self.error(error))
    }

    fn try_scan(
        &self,
        topic: &str,
        from: &[i64],
        until: &[i64],
        take: &mut dyn FnMut(usize, i64, Option<&str>),
    ) -> Result<(), KafkaError> {
        let own = [
            ("group.id", self.names.router.as_str()),
            ("enable.auto.commit", "false"),
            ("isolation.level", "read_committed"),
            ("auto.offset.reset", "earliest"),
            ("enable.partition.eof", "true"),
            ("queued.max.messages.kbytes", "16384"),
        ];
        let reader: BaseConsumer<_> = client(&self.config, &own).create_with_context(Quiet)?;
        let (mut list, mut left) = (TopicPartitionList::new(), BTreeSet::new());
        for (partition, (from, _)) in from.iter().zip(until).enumerate().filter(|(_, (from, until))| from < until) {
            list.add_partition_offset(topic, partition as i32, Offset::Offset(*from))?;
            left.insert(partition);
        }
        reader.assign(&list)?;
        while !left.is_empty() {
            match reader.poll(ANSWER_MAX) {
                None => return Err(KafkaError::MessageConsumption(RDKafkaErrorCode::OperationTimedOut)),
                Some(Err(KafkaError::PartitionEOF(partition))) => {
                    left.remove(&(partition as usize));
                }
                Some(Err(error)) => return Err(error),
                Some(Ok(message)) => {
                    let (partition, offset) = (message.partition() as usize, message.offset());
                    if offset < until[partition] {
                        let mut headers = message.headers().into_iter().flat_map(|headers| headers.iter());
                        let source = headers.find(|header| header.key == SOURCE_HEADER).and_then(|header| header.value);
                        take(partition, offset, source.and_then(|text| std::str::from_utf8(text).ok()));
                    }
                    if offset + 1 >= until[partition] {
                        left.remove(&partition);
                    }
                }
            }
        }
        Ok(())
    }

    /// Writes an entry of the control topic, as anybody may.
    pub fn ask(&self, entry: &str) -> Result<(), OutsideError> {
        let error = |error: KafkaError| OutsideError::new(format!("kafka topic {}", self.names.control), error);
        let own = [("enable.idempotence", "true"), ("message.timeout.ms", "10000"), ("acks", "all")];
        let deliveries = Arc::new(Deliveries { last: [Vec::new(), Vec::new()], failed: AtomicU64::new(0) });
        let producer: ThreadedProducer<_> =
            client(&self.config, &own).create_with_context(Context(deliveries.clone())).map_err(error)?;
        let record = BaseRecord::<(), _, _>::with_opaque_to(&self.names.control, CONTROL).partition(0).payload(entry);
        producer.send(record).map_err(|(why, _)| error(why))?;
        producer.flush(ANSWER_MAX).map_err(error)?;
        match deliveries.failed.load(Ordering::Relaxed) {
            0 => Ok(()),
            _ => Err(OutsideError::new(format!("kafka topic {}", self.names.control), "the entry was not written")),
        }
    }

    fn source(&self) -> Result<BaseConsumer<Quiet>, KafkaError> {
        let own = [
            ("group.id", self.names.router.as_str()),
            ("enable.auto.commit", "false"),
            ("isolation.level", "read_committed"),
            // A place that is gone is an error; nothing is ever skipped.
            ("auto.offset.reset", "error"),
            ("fetch.wait.max.ms", "50"),
            ("queued.max.messages.kbytes", "32768"),
        ];
        client(&self.config, &own).create_with_context(Quiet)
    }

    fn control(&self) -> Result<BaseConsumer<Quiet>, KafkaError> {
        let own = [
            ("group.id", self.names.router.as_str()),
            ("enable.auto.commit", "false"),
            ("isolation.level", "read_committed"),
            ("enable.partition.eof", "true"),
            ("fetch.wait.max.ms", "50"),
        ];
        let control: BaseConsumer<_> = client(&self.config, &own).create_with_context(Quiet)?;
        let mut list = TopicPartitionList::new();
        list.add_partition_offset(&self.names.control, 0, Offset::Beginning)?;
        control.assign(&list)?;
        Ok(control)
    }

    fn begin(&mut self) -> Result<Opened, KafkaError> {
        let metadata = self.services[0].fetch_metadata(Some(&self.names.source), ANSWER_MAX)?;
        let partitions = metadata.topics().first().map_or(0, |topic| topic.partitions().len());
        let lasts = || (0..partitions).map(|_| AtomicI64::new(-1)).collect();
        let deliveries = Arc::new(Deliveries { last: [lasts(), lasts()], failed: AtomicU64::new(0) });
        let own = [
            ("transactional.id", self.names.router.as_str()),
            ("transaction.timeout.ms", "15000"),
            ("message.timeout.ms", "10000"),
            // Nobody sees records before their transaction is over, and its end waits for none: batches may as well be large.
            ("linger.ms", "20"),
            ("compression.type", "lz4"),
            ("queue.buffering.max.messages", "200000"),
            // What was written to a topic that just was made is not lost while its leader is found.
            ("retry.backoff.ms", "50"),
        ];
        let producer: ThreadedProducer<_> =
            client(&self.config, &own).create_with_context(Context(deliveries.clone()))?;
        again(|| producer.init_transactions(ANSWER_MAX))?;
        let (source, control) = (self.source()?, self.control()?);
        let group = source.group_metadata().ok_or(KafkaError::MetadataFetch(RDKafkaErrorCode::UnknownGroup))?;
        let opened = Opened { places: places(&source, &self.names.source, partitions)?, entries: read(&control)? };
        let held = vec![false; partitions];
        let writer = Writer { producer, deliveries, begun: false, stamped: None };
        self.open = Some(Open { writer, source, group, control, partitions, held });
        Ok(opened)
    }

    fn error(&self, error: KafkaError) -> OutsideError {
        // Whichever call met it first: the producer knows why it can't go on.
        let fatal = self.open.as_ref().and_then(|open| open.writer.producer.client().fatal_error());
        let what = format!("kafka, router of {}", self.names.source);
        match (fatal, error.rdkafka_error_code()) {
            (Some((code, why)), _) if FENCED.contains(&code) => OutsideError::replaced(what, why),
            (_, Some(RDKafkaErrorCode::AutoOffsetReset | RDKafkaErrorCode::OffsetOutOfRange)) => OutsideError::new(
                what,
                format!("{error}: records that were not read yet are gone (retention?), or the topic was made anew"),
            ),
            _ => OutsideError::new(what, error),
        }
    }

    fn opened(&mut self) -> Result<&mut Open, OutsideError> {
        self.open.as_mut().ok_or_else(|| OutsideError::new("kafka", "not open"))
    }

    fn try_copy(
        &mut self,
        wait: Duration,
        most: usize,
        held: &[bool],
        assign: &mut dyn FnMut(Record<'_>) -> Stamp,
    ) -> Result<usize, KafkaError> {
        let open = self.open.as_mut().ok_or(KafkaError::Canceled)?;
        open.hold(&self.names.source, held)?;
        let (mut copied, mut source) = (0, self.names.source.clone());
        let mut message = open.source.poll(wait);
        let until = self.clock.now().mono.after_ms(wait.as_millis() as u64);
        while let Some(next) = message {
            let next = next?;
            let (partition, offset) = (next.partition() as usize, next.offset());
            let stamp = assign(Record { partition, offset, key: next.key() });
            source.truncate(self.names.source.len());
            write!(source, "/{partition}/{offset}").expect("a text grows");
            let stamped = open.writer.stamped(&self.names, stamp);
            let own = next.headers().into_iter().flat_map(|headers| headers.iter());
            let headers = own
                .fold(stamped.clone(), OwnedHeaders::insert)
                .insert(Header { key: SOURCE_HEADER, value: Some(&source) });
            open.writer.copy(&self.names, &next, headers, stamp.side)?;
            copied += 1;
            // Reading a clock costs as much as reading a record: it isn't done for each.
            let late = || until <= self.clock.now().mono;
            if copied == most || copied.is_multiple_of(CLOCK_EVERY) && late() {
                break;
            }
            message = open.source.poll(Duration::ZERO);
            if message.is_none() {
                let left = until.millis_since(self.clock.now().mono);
                message = open.source.poll(Duration::from_millis(left));
            }
        }
        Ok(copied)
    }

    fn try_reclaim(&mut self, at: (usize, i64, i64), most: usize, epoch: u64) -> Result<Reclaimed, KafkaError> {
        let (partition, from, until) = at;
        let open = self.open.as_mut().ok_or(KafkaError::Canceled)?;
        let own = [
            ("group.id", self.names.router.as_str()),
            ("enable.auto.commit", "false"),
            ("isolation.level", "read_committed"),
            ("auto.offset.reset", "error"),
            ("enable.partition.eof", "true"),
        ];
        let reader: BaseConsumer<_> = client(&self.config, &own).create_with_context(Quiet)?;
        let mut list = TopicPartitionList::new();
        list.add_partition_offset(&self.names.topics[Side::Canary as usize], partition as i32, Offset::Offset(from))?;
        reader.assign(&list)?;
        let mut reclaimed = Reclaimed { count: 0, next: from };
        while reclaimed.next < until && (reclaimed.count as usize) < most {
            match reader.poll(ANSWER_MAX) {
                None => return Err(KafkaError::MessageConsumption(RDKafkaErrorCode::OperationTimedOut)),
                // Only the ends of transactions are left.
                Some(Err(KafkaError::PartitionEOF(_))) => reclaimed.next = until,
                Some(Err(error)) => return Err(error),
                Some(Ok(message)) if message.offset() >= until => reclaimed.next = until,
                Some(Ok(message)) => {
                    let mut headers = open.writer.stamped(&self.names, Stamp { side: Side::Stable, epoch }).clone();
                    let stamps = [VERSION_HEADER, EPOCH_HEADER];
                    for header in message.headers().into_iter().flat_map(|headers| headers.iter()) {
                        if !stamps.contains(&header.key) {
                            headers = headers.insert(header);
                        }
                    }
                    open.writer.copy(&self.names, &message, headers, Side::Stable)?;
                    reclaimed = Reclaimed { count: reclaimed.count + 1, next: message.offset() + 1 };
                }
            }
        }
        Ok(reclaimed)
    }

    fn try_commit(&mut self, commit: &Commit) -> Result<(), KafkaError> {
        let names = &self.names;
        let open = self.open.as_mut().ok_or(KafkaError::Canceled)?;
        open.writer.begin()?;
        if let Some(entry) = &commit.entry {
            let record =
                BaseRecord::<(), _, _>::with_opaque_to(&names.control, CONTROL).partition(0).payload(entry.as_str());
            open.writer.producer.send(record).map_err(|(error, _)| error)?;
        }
        if !commit.places.is_empty() {
            let mut list = TopicPartitionList::new();
            for (partition, place) in &commit.places {
                let mut element = list.add_partition(&names.source, *partition as i32);
                element.set_offset(Offset::Offset(place.next))?;
                element.set_metadata(&place.note);
            }
            again(|| open.writer.producer.send_offsets_to_transaction(&list, &open.group, ANSWER_MAX))?;
        }
        for (side, topic, next) in &commit.groups {
            let mut list = TopicPartitionList::new();
            for (partition, next) in next {
                list.add_partition_offset(names.topic(*topic), *partition as i32, Offset::Offset(*next))?;
            }
            let group = self.services[*side as usize].group_metadata();
            let group = group.ok_or(KafkaError::MetadataFetch(RDKafkaErrorCode::UnknownGroup))?;
            again(|| open.writer.producer.send_offsets_to_transaction(&list, &group, ANSWER_MAX))?;
        }
        flush(&open.writer.producer)?;
        // A commit that was not answered may have happened: the same call again tells.
        again(|| open.writer.producer.commit_transaction(ANSWER_MAX))?;
        open.writer.begun = false;
        Ok(())
    }

    fn try_group(&self, side: Side, topic: Topic, partitions: usize) -> Result<Group, KafkaError> {
        let (name, reader) = (&self.names.groups[side as usize], &self.services[side as usize]);
        let found = reader.fetch_group_list(Some(name), ANSWER_MAX)?;
        let members =
            found.groups().iter().filter(|group| group.name() == name).map(|group| group.members().len()).sum();
        let committed = reader.committed_offsets(whole(self.names.topic(topic), partitions), ANSWER_MAX)?;
        let next = offsets(&committed, partitions)?;
        Ok(Group { members, next: next.into_iter().map(|found| found.map(|(next, _)| next)).collect() })
    }
}

/// Returns a group's committed offsets with what stands beside them, for each partition.
fn offsets(list: &TopicPartitionList, partitions: usize) -> Result<Vec<Option<(i64, String)>>, KafkaError> {
    let mut found = BTreeMap::new();
    for element in list.elements() {
        element.error()?;
        if let Offset::Offset(next) = element.offset() {
            found.insert(element.partition() as usize, (next, element.metadata().to_string()));
        }
    }
    Ok((0..partitions).map(|partition| found.remove(&partition)).collect())
}

fn places(source: &BaseConsumer<Quiet>, topic: &str, partitions: usize) -> Result<Vec<Option<Place>>, KafkaError> {
    let committed = source.committed_offsets(whole(topic, partitions), ANSWER_MAX)?;
    let found = offsets(&committed, partitions)?;
    Ok(found.into_iter().map(|found| found.map(|(next, note)| Place { next, note })).collect())
}

/// Reads the control topic up to its end.
fn read(control: &BaseConsumer<Quiet>) -> Result<Vec<String>, KafkaError> {
    let mut entries = Vec::new();
    loop {
        match control.poll(ANSWER_MAX) {
            None => return Err(KafkaError::MessageConsumption(RDKafkaErrorCode::OperationTimedOut)),
            Some(Err(KafkaError::PartitionEOF(_))) => return Ok(entries),
            Some(Err(error)) => return Err(error),
            Some(Ok(message)) => entries.push(text(&message)),
        }
    }
}

fn text(message: &BorrowedMessage<'_>) -> String {
    String::from_utf8_lossy(message.payload().unwrap_or_default()).into_owned()
}

impl Open {
    /// Reads from some partitions only.
    fn hold(&mut self, topic: &str, held: &[bool]) -> Result<(), KafkaError> {
        for (partition, (before, after)) in self.held.iter_mut().zip(held).enumerate() {
            let mut one = TopicPartitionList::new();
            one.add_partition(topic, partition as i32);
            match (*before, *after) {
                (false, true) => self.source.pause(&one)?,
                (true, false) => self.source.resume(&one)?,
                _ => {}
            }
            *before = *after;
        }
        Ok(())
    }
}

impl Writer {
    fn begin(&mut self) -> Result<(), KafkaError> {
        if !self.begun {
            for last in self.deliveries.last.iter().flatten() {
                last.store(-1, Ordering::Relaxed);
            }
            self.producer.begin_transaction()?;
            self.begun = true;
        }
        Ok(())
    }

    /// Returns the headers that say which version a record was given to, and under which weight.
    fn stamped(&mut self, names: &Names, stamp: Stamp) -> &OwnedHeaders {
        if self.stamped.as_ref().is_none_or(|(epoch, _)| *epoch != stamp.epoch) {
            let epoch = stamp.epoch.to_string();
            let made = names.versions.each_ref().map(|version| {
                OwnedHeaders::new_with_capacity(3)
                    .insert(Header { key: VERSION_HEADER, value: Some(version) })
                    .insert(Header { key: EPOCH_HEADER, value: Some(&epoch) })
            });
            self.stamped = Some((stamp.epoch, made));
        }
        &self.stamped.as_ref().expect("made above").1[stamp.side as usize]
    }

    /// Writes a record as it is, but for its headers.
    #[expect(clippy::disallowed_methods, reason = "a router has a thread of its own")]
    fn copy(
        &mut self,
        names: &Names,
        from: &BorrowedMessage<'_>,
        headers: OwnedHeaders,
        side: Side,
    ) -> Result<(), KafkaError> {
        self.begin()?;
        let side = side as usize;
        let mut record = BaseRecord::<[u8], [u8], _>::with_opaque_to(&names.topics[side], side)
            .partition(from.partition())
            .headers(headers);
        if let Some(time) = from.timestamp().to_millis() {
            record = record.timestamp(time);
        }
        if let Some(key) = from.key() {
            record = record.key(key);
        }
        if let Some(payload) = from.payload() {
            record = record.payload(payload);
        }
        loop {
            match self.producer.send(record) {
                Ok(()) => return Ok(()),
                Err((KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull), back)) => {
                    record = back;
                    std::thread::sleep(FULL);
                }
                Err((error, _)) => return Err(error),
            }
        }
    }
}

impl Broker for KafkaBroker {
    fn open(&mut self) -> Result<Opened, OutsideError> {
        // A transaction of the former producer is ended by the new one's first call.
        self.open = None;
        let opened = self.begin().map_err(|error| self.error(error))?;
        info!(
            partitions = opened.places.len(),
            entries = opened.entries.len(),
            "kafka: router's transactions are open"
        );
        Ok(opened)
    }

    fn entries(&mut self) -> Result<Vec<String>, OutsideError> {
        let control = &self.opened()?.control;
        let mut entries = Vec::new();
        loop {
            match control.poll(Duration::ZERO) {
                None => return Ok(entries),
                Some(Err(KafkaError::PartitionEOF(_))) => {}
                Some(Err(error)) => return Err(self.error(error)),
                Some(Ok(message)) => entries.push(text(&message)),
            }
        }
    }

    fn seek(&mut self, next: &[i64]) -> Result<(), OutsideError> {
        let topic = self.names.source.clone();
        let open = self.opened()?;
        let mut list = TopicPartitionList::new();
        let added = next.iter().enumerate().try_for_each(|(partition, next)| {
            list.add_partition_offset(&topic, partition as i32, Offset::Offset(*next))
        });
        let assigned = added.and_then(|()| open.source.assign(&list));
        open.held = vec![false; next.len()];
        assigned.map_err(|error| self.error(error))
    }

    fn copy(
        &mut self,
        wait: Duration,
        most: usize,
        held: &[bool],
        assign: &mut dyn FnMut(Record<'_>) -> Stamp,
    ) -> Result<usize, OutsideError> {
        self.try_copy(wait, most, held, assign).map_err(|error| self.error(error))
    }

    fn reclaim(
        &mut self,
        partition: usize,
        from: i64,
        until: i64,
        most: usize,
        epoch: u64,
    ) -> Result<Reclaimed, OutsideError> {
        self.try_reclaim((partition, from, until), most, epoch).map_err(|error| self.error(error))
    }

    fn flush(&mut self) -> Result<Vec<[Option<i64>; 2]>, OutsideError> {
        let open = self.opened()?;
        let flushed = flush(&open.writer.producer);
        let failed = open.writer.deliveries.failed.load(Ordering::Relaxed);
        let known = |last: &AtomicI64| Some(last.load(Ordering::Relaxed)).filter(|last| *last >= 0);
        let [stable, canary] = &open.writer.deliveries.last;
        let last = stable.iter().zip(canary).map(|(stable, canary)| [known(stable), known(canary)]).collect();
        flushed.map_err(|error| self.error(error))?;
        match failed {
            0 => Ok(last),
            failed => Err(OutsideError::new("kafka", format!("{failed} records could not be written"))),
        }
    }

    fn commit(&mut self, commit: &Commit) -> Result<(), OutsideError> {
        self.try_commit(commit).map_err(|error| self.error(error))
    }

    fn group(&mut self, side: Side, topic: Topic) -> Result<Group, OutsideError> {
        let partitions = self.opened()?.partitions;
        self.try_group(side, topic, partitions).map_err(|error| self.error(error))
    }

    fn bounds(&mut self, topic: Topic) -> Result<Vec<(i64, i64)>, OutsideError> {
        self.topic_bounds(topic)
    }
}
