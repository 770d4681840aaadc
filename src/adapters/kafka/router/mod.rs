//! The topics and groups of a record router.
//!
//! Each transaction holds the copies, the router's own places with their metadata, the services' places where they are handed over, and
//! the control topic's entry. The transactional id fences the router before.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use rdkafka::consumer::{BaseConsumer, Consumer as _, ConsumerGroupMetadata};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{BorrowedMessage, Message as _};
use rdkafka::producer::{BaseRecord, Producer as _};
use rdkafka::{Offset, TopicPartitionList};
use tracing::info;

use super::native::GroupMembers;
use super::{ANSWER_MAX, MESSAGE_BYTES_MAX, Quiet, again, client, flush, native};
use crate::config::node::Kafka;
use crate::domain::side::Side;
use crate::domain::time::Mono;
use crate::ports::{
    Assignment, Broker, Clock, Commit, OffsetRange, Opened, OutsideError, Place, RebuiltPlace, Reclaimed,
    RouterTopics as _, SourceRecord, Topic,
};

mod pace;
mod topics;
mod world;
mod writer;

use pace::BatchPace;
pub use world::KafkaRouter;
use writer::{CONTROL, Writer};

/// Where a copy comes from: `TOPIC/PARTITION/OFFSET`.
pub const SOURCE_HEADER: &str = "x-aviary-source";
/// Which version it was given to.
pub const VERSION_HEADER: &str = "x-aviary-version";
/// Header of a copy: the number of the weight that assigned the record.
pub const WEIGHT_VERSION_HEADER: &str = "x-aviary-weight-version";

/// The broker ends a transaction by itself that takes longer.
const TRANSACTION_MS_MAX: u64 = 15_000;

/// Error of a producer that a newer one has fenced.
const FENCED: [RDKafkaErrorCode; 3] =
    [RDKafkaErrorCode::Fenced, RDKafkaErrorCode::ProducerFenced, RDKafkaErrorCode::InvalidProducerEpoch];

/// After how many records the clock is read.
const CLOCK_EVERY: usize = 64;

/// Names of a router's topics, groups and versions.
#[derive(Debug, Clone)]
pub struct TopicNames {
    /// The topic that is split.
    pub source: String,
    /// The versions' own topics, stable's first.
    pub topics: [String; 2],
    /// Consumer groups of the two services, stable first.
    pub groups: [String; 2],
    /// Names of the two versions, stable first.
    pub versions: [String; 2],
    /// Name of the control topic.
    pub control: String,
    /// The router's own group and transactional id.
    pub router: String,
}

impl TopicNames {
    fn topic(&self, topic: Topic) -> &str {
        match topic {
            Topic::Source => &self.source,
            Topic::Of(side) => &self.topics[side as usize],
        }
    }
}

/// A broker, as a router sees it.
pub struct KafkaBroker {
    config: Kafka,
    names: TopicNames,
    clock: Arc<dyn Clock>,
    /// One for each service's group, which it asks about and never joins.
    services: [BaseConsumer<Quiet>; 2],
    /// Asks for the ends of topics, open transactions included.
    ends: BaseConsumer<Quiet>,
    /// How much a transaction takes up: what was learned outlives an error.
    pace: BatchPace,
    open: Option<OpenClients>,
}

struct OpenClients {
    writer: Writer,
    /// When the open transaction was told to be written; none before.
    flushed: Option<Mono>,
    /// Reads the source; its group is the router's.
    source: BaseConsumer<Quiet>,
    group: ConsumerGroupMetadata,
    control: BaseConsumer<Quiet>,
    partitions: usize,
    /// Which partitions aren't read at the moment.
    held: Vec<bool>,
}

/// Returns a reader of what is committed that joins no group, and commits nothing.
fn reader(config: &Kafka, group: &str, own: &[(&str, &str)]) -> Result<BaseConsumer<Quiet>, KafkaError> {
    let all = [
        ("group.id", group),
        ("enable.auto.commit", "false"),
        ("isolation.level", "read_committed"),
        // A place that is gone is an error; nothing is ever skipped.
        ("auto.offset.reset", "error"),
        ("fetch.wait.max.ms", "50"),
    ];
    client(config, &[&all, own].concat()).create_with_context(Quiet)
}

fn whole(topic: &str, partitions: usize) -> TopicPartitionList {
    let mut list = TopicPartitionList::new();
    list.add_partition_range(topic, 0, partitions as i32 - 1);
    list
}

impl KafkaBroker {
    /// Returns a broker that is not open yet.
    pub fn new(config: &Kafka, names: TopicNames, clock: Arc<dyn Clock>) -> Result<Self, OutsideError> {
        let service = |group: &str| {
            let made = reader(config, group, &[]);
            made.map_err(|error: KafkaError| OutsideError::new("kafka", error))
        };
        let services = [service(&names.groups[0])?, service(&names.groups[1])?];
        let ends = reader(config, &names.router, &[("isolation.level", "read_uncommitted")]);
        let ends = ends.map_err(|error| OutsideError::new("kafka", error))?;
        Ok(Self { config: config.clone(), names, clock, services, ends, pace: BatchPace::default(), open: None })
    }

    fn source(&self) -> Result<BaseConsumer<Quiet>, KafkaError> {
        reader(&self.config, &self.names.router, &[("queued.max.messages.kbytes", "32768")])
    }

    fn control(&self) -> Result<BaseConsumer<Quiet>, KafkaError> {
        let control = self.ends()?;
        let mut list = TopicPartitionList::new();
        list.add_partition_offset(&self.names.control, 0, Offset::Beginning)?;
        control.assign(&list)?;
        Ok(control)
    }

    /// Returns a reader that hears where partitions end.
    fn ends(&self) -> Result<BaseConsumer<Quiet>, KafkaError> {
        reader(
            &self.config,
            &self.names.router,
            &[("enable.partition.eof", "true"), ("queued.max.messages.kbytes", "16384")],
        )
    }

    fn begin(&mut self) -> Result<Opened, KafkaError> {
        // As many as there are places to copy to: a source that has got more since is read as it was.
        let metadata = self.services[0].fetch_metadata(Some(&self.names.topics[0]), ANSWER_MAX)?;
        let partitions = match metadata.topics().first() {
            Some(topic) if topic.error().is_none() && !topic.partitions().is_empty() => topic.partitions().len(),
            _ => return Err(KafkaError::MetadataFetch(RDKafkaErrorCode::UnknownTopicOrPartition)),
        };
        let timeout = TRANSACTION_MS_MAX.to_string();
        let own = [
            ("transactional.id", self.names.router.as_str()),
            ("transaction.timeout.ms", timeout.as_str()),
            ("message.timeout.ms", "10000"),
            // Nobody sees records before their transaction is over, and its end waits for none: batches may as well be large.
            ("linger.ms", "20"),
            ("compression.type", "lz4"),
            ("queue.buffering.max.messages", "200000"),
            // The broker's limit is the one that counts; this one is of records before they are compressed.
            ("message.max.bytes", MESSAGE_BYTES_MAX),
            // What was written to a topic that just was made is not lost while its leader is found.
            ("retry.backoff.ms", "50"),
            // Says how long the broker makes this client wait.
            ("statistics.interval.ms", "1000"),
        ];
        let writer = Writer::new(&client(&self.config, &own), partitions, self.clock.clone())?;
        again(|| writer.producer.init_transactions(ANSWER_MAX))?;
        let (source, control) = (self.source()?, self.control()?);
        let group = source.group_metadata().ok_or(KafkaError::MetadataFetch(RDKafkaErrorCode::UnknownGroup))?;
        let opened = Opened { places: places(&source, &self.names.source, partitions)?, entries: read(&control)? };
        let held = vec![false; partitions];
        self.open = Some(OpenClients { writer, flushed: None, source, group, control, partitions, held });
        Ok(opened)
    }

    fn error(&self, error: KafkaError) -> OutsideError {
        // Whichever call met it first: the producer knows why it can't go on.
        let fatal = self.open.as_ref().and_then(|open| open.writer.producer.client().fatal_error());
        let what = format!("kafka, router of {}", self.names.source);
        match (fatal, error.rdkafka_error_code()) {
            // Who took too long hears the same.
            (Some((code, why)), _) if FENCED.contains(&code) && !self.is_timed_out() => {
                OutsideError::replaced(what, why)
            }
            (_, Some(RDKafkaErrorCode::InconsistentGroupProtocol)) => OutsideError::lasting(
                what,
                "a service's group has members that can't be counted, expected a consumer group (group.protocol=classic or consumer)",
            ),
            (_, Some(RDKafkaErrorCode::AutoOffsetReset | RDKafkaErrorCode::OffsetOutOfRange)) => OutsideError::new(
                what,
                format!("{error}: records that were not read yet are gone (retention?), or the topic was made anew"),
            ),
            (_, code) => OutsideError {
                lasting: code.is_some_and(is_forbidden),
                ..OutsideError::new(what, format!("{error}{}", code.map_or("", way_out)))
            },
        }
    }

    /// Returns whether the broker may have ended the open transaction by itself.
    fn is_timed_out(&self) -> bool {
        let since = self.open.as_ref().and_then(|open| open.writer.begun);
        since.is_some_and(|since| self.clock.now().mono.millis_since(since) >= TRANSACTION_MS_MAX)
    }

    fn opened(&mut self) -> Result<&mut OpenClients, OutsideError> {
        self.open.as_mut().ok_or_else(|| OutsideError::new("kafka", "not open"))
    }

    fn try_copy(
        &mut self,
        wait: Duration,
        most: usize,
        held: &[bool],
        assign: &mut dyn FnMut(SourceRecord<'_>) -> Assignment,
    ) -> Result<usize, KafkaError> {
        let open = self.open.as_mut().ok_or(KafkaError::Canceled)?;
        open.hold(&self.names.source, held)?;
        let (mut copied, mut source) = (0, self.names.source.clone());
        let mut message = open.source.poll(wait);
        let until = self.clock.now().mono.after_ms(wait.as_millis() as u64);
        while let Some(next) = message {
            let mut next = next?;
            let (partition, offset) = (next.partition() as usize, next.offset());
            let stamp = assign(SourceRecord { partition, offset, key: next.key() });
            source.truncate(self.names.source.len());
            write!(source, "/{partition}/{offset}").expect("a text grows");
            let headers = open.writer.stamped(&self.names, &mut next, stamp, Some(&source));
            open.writer.copy(&self.names, &next, headers, stamp.side)?;
            copied += 1;
            // Reading a clock costs as much as reading a record: it isn't done for each.
            let late = || until <= self.clock.now().mono;
            if copied == most || open.writer.bytes >= self.pace.bytes() || copied.is_multiple_of(CLOCK_EVERY) && late()
            {
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

    fn try_reclaim(
        &mut self,
        at: (usize, i64, i64),
        most: usize,
        weight_version: u64,
    ) -> Result<Reclaimed, KafkaError> {
        let (partition, from, until) = at;
        let reader = self.ends()?;
        let open = self.open.as_mut().ok_or(KafkaError::Canceled)?;
        let mut list = TopicPartitionList::new();
        list.add_partition_offset(&self.names.topics[Side::Canary as usize], partition as i32, Offset::Offset(from))?;
        reader.assign(&list)?;
        let mut reclaimed = Reclaimed { count: 0, next: from };
        while reclaimed.next < until
            && (reclaimed.count as usize) < most
            && (reclaimed.count == 0 || open.writer.bytes < self.pace.bytes())
        {
            match reader.poll(ANSWER_MAX) {
                None => return Err(KafkaError::MessageConsumption(RDKafkaErrorCode::OperationTimedOut)),
                // The last one before `until` is a record: it comes.
                Some(Err(KafkaError::PartitionEOF(_))) => {}
                Some(Err(error)) => return Err(error),
                Some(Ok(message)) if message.offset() >= until => {
                    return Err(KafkaError::MessageConsumption(RDKafkaErrorCode::OffsetOutOfRange));
                }
                Some(Ok(mut message)) => {
                    let stamp = Assignment { side: Side::Stable, weight_version };
                    let headers = open.writer.stamped(&self.names, &mut message, stamp, None);
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
                element.set_metadata(&place.metadata);
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
        open.writer.begun = None;
        if let Some(flushed) = open.flushed.take() {
            let took = self.clock.now().mono.millis_since(flushed);
            self.pace.done(open.writer.bytes, Duration::from_millis(took));
        }
        Ok(())
    }

    /// Does all that a router does to its topics and groups, in a transaction that is aborted.
    fn try_rehearse(&mut self) -> Result<(), KafkaError> {
        let names = &self.names;
        let open = self.open.as_mut().ok_or(KafkaError::Canceled)?;
        open.writer.begin()?;
        for topic in [&names.control, &names.topics[0], &names.topics[1]] {
            let record = BaseRecord::<(), _, _>::with_opaque_to(topic, CONTROL).partition(0).payload("rehearsal");
            open.writer.producer.send(record).map_err(|(error, _)| error)?;
        }
        let place = |topic: &str| {
            let mut list = TopicPartitionList::new();
            list.add_partition_offset(topic, 0, Offset::Offset(0)).map(|()| list)
        };
        let source = place(&names.source)?;
        again(|| open.writer.producer.send_offsets_to_transaction(&source, &open.group, ANSWER_MAX))?;
        for (reader, topic) in self.services.iter().zip(&names.topics) {
            let group = reader.group_metadata().ok_or(KafkaError::MetadataFetch(RDKafkaErrorCode::UnknownGroup))?;
            let own = place(topic)?;
            again(|| open.writer.producer.send_offsets_to_transaction(&own, &group, ANSWER_MAX))?;
        }
        flush(&open.writer.producer)?;
        if let Some((_, error)) = open.writer.deliveries.reason() {
            return Err(error);
        }
        again(|| open.writer.producer.abort_transaction(ANSWER_MAX))?;
        open.writer.begun = None;
        Ok(())
    }

    fn try_members(&self, side: Side) -> Result<usize, KafkaError> {
        let (name, reader) = (&self.names.groups[side as usize], &self.services[side as usize]);
        match native::members(reader.client(), name, ANSWER_MAX)? {
            GroupMembers::Count(members) => Ok(members),
            // A group that is listed and not described has members of another kind: a share or a streams group.
            GroupMembers::Dead => {
                let listed = reader.fetch_group_list(Some(name), ANSWER_MAX)?;
                match listed.groups().iter().any(|group| group.name() == name) {
                    true => Err(KafkaError::GroupListFetch(RDKafkaErrorCode::InconsistentGroupProtocol)),
                    false => Ok(0),
                }
            }
        }
    }

    fn try_reads(&self, side: Side, topic: Topic, partitions: usize) -> Result<Vec<Option<i64>>, KafkaError> {
        let reader = &self.services[side as usize];
        let committed = reader.committed_offsets(whole(self.names.topic(topic), partitions), ANSWER_MAX)?;
        Ok(offsets(&committed, partitions)?.into_iter().map(|found| found.map(|(next, _)| next)).collect())
    }
}

/// Returns whether the broker took too long, which less work at a time may mend.
fn is_late(error: &KafkaError) -> bool {
    let late = [
        RDKafkaErrorCode::MessageTimedOut,
        RDKafkaErrorCode::OperationTimedOut,
        RDKafkaErrorCode::RequestTimedOut,
        RDKafkaErrorCode::TimedOutQueue,
    ];
    error.rdkafka_error_code().is_some_and(|code| late.contains(&code))
}

/// Returns whether the broker doesn't allow something to this client.
fn is_forbidden(code: RDKafkaErrorCode) -> bool {
    matches!(
        code,
        RDKafkaErrorCode::TopicAuthorizationFailed
            | RDKafkaErrorCode::GroupAuthorizationFailed
            | RDKafkaErrorCode::TransactionalIdAuthorizationFailed
            | RDKafkaErrorCode::ClusterAuthorizationFailed
    )
}

/// Returns what an operator can do where another try meets the same answer; nothing where it may meet another.
fn way_out(code: RDKafkaErrorCode) -> &'static str {
    match code {
        RDKafkaErrorCode::MessageSizeTooLarge
        | RDKafkaErrorCode::InvalidTimestamp
        | RDKafkaErrorCode::InvalidRecord
        | RDKafkaErrorCode::PolicyViolation
        | RDKafkaErrorCode::TopicAuthorizationFailed
        | RDKafkaErrorCode::GroupAuthorizationFailed
        | RDKafkaErrorCode::TransactionalIdAuthorizationFailed
        | RDKafkaErrorCode::UnknownTopicOrPartition
        | RDKafkaErrorCode::UnknownTopic => {
            "; change what the broker refuses, or give all to stable without loss: `aviary router abort -f FILE`"
        }
        _ => "",
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
    Ok(found.into_iter().map(|found| found.map(|(next, metadata)| Place { next, metadata })).collect())
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

impl OpenClients {
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

    fn rehearse(&mut self) -> Result<(), OutsideError> {
        self.try_rehearse().map_err(|error| self.error(error))?;
        for side in Side::BOTH {
            if self.has_records(Topic::Of(side))? {
                let what = format!("kafka topic {}", self.names.topic(Topic::Of(side)));
                let why = "has records, expected none: of an earlier rollout of this name?";
                return Err(OutsideError::lasting(what, why));
            }
        }
        Ok(())
    }

    fn rebuild(&mut self) -> Result<Vec<RebuiltPlace>, OutsideError> {
        let mut found = vec![RebuiltPlace::default(); self.opened()?.partitions];
        for side in Side::BOTH {
            let bounds = self.topic_bounds(Topic::Of(side))?;
            let ranges = bounds.iter().map(|(low, high)| OffsetRange { from: *low, until: *high, known: None });
            let ranges: Vec<_> = ranges.collect();
            self.scan(Topic::Of(side), &ranges, &mut |partition, offset, source| {
                let Some(place) = found.get_mut(partition) else { return };
                place.given[side as usize] += 1;
                place.last[side as usize] = Some(offset);
                // The header is `TOPIC/PARTITION/OFFSET`.
                let at = source.and_then(|source| source.rsplit('/').next()?.parse::<i64>().ok());
                place.next = place.next.max(at.map(|at| at + 1));
            })?;
        }
        Ok(found)
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
        assign: &mut dyn FnMut(SourceRecord<'_>) -> Assignment,
    ) -> Result<usize, OutsideError> {
        self.try_copy(wait, most, held, assign).map_err(|error| self.error(error))
    }

    fn reclaim(
        &mut self,
        partition: usize,
        from: i64,
        until: i64,
        most: usize,
        weight_version: u64,
    ) -> Result<Reclaimed, OutsideError> {
        self.try_reclaim((partition, from, until), most, weight_version).map_err(|error| self.error(error))
    }

    fn flush(&mut self) -> Result<Vec<[Option<i64>; 2]>, OutsideError> {
        let now = self.clock.now().mono;
        let open = self.opened()?;
        open.flushed.get_or_insert(now);
        let flushed = flush(&open.writer.producer);
        let (deliveries, bytes) = (open.writer.deliveries.clone(), open.writer.bytes);
        let known = |last: &AtomicI64| Some(last.load(Ordering::Relaxed)).filter(|last| *last >= 0);
        let [stable, canary] = &deliveries.last;
        let last = stable.iter().zip(canary).map(|(stable, canary)| [known(stable), known(canary)]).collect();
        let failed = deliveries.failed.load(Ordering::Relaxed);
        let reason = deliveries.reason();
        let late = reason.as_ref().map(|(_, error)| error).or(flushed.as_ref().err()).is_some_and(is_late);
        if late {
            self.pace.late(bytes);
        }
        let throttling = if late { deliveries.throttling() } else { String::new() };
        match (reason, flushed) {
            (Some((topic, error)), _) => {
                let hint = error.rdkafka_error_code().map_or("", way_out);
                let why =
                    format!("{failed} records could not be written, the first to {topic}: {error}{throttling}{hint}");
                Err(OutsideError::new("kafka", why))
            }
            (None, Err(error)) => {
                let OutsideError { what, why, .. } = self.error(error);
                Err(OutsideError::new(what, format!("{why}{throttling}")))
            }
            (None, Ok(())) => Ok(last),
        }
    }

    fn commit(&mut self, commit: &Commit) -> Result<(), OutsideError> {
        self.try_commit(commit).map_err(|error| {
            if is_late(&error)
                && let Some(open) = &self.open
            {
                self.pace.late(open.writer.bytes);
            }
            self.error(error)
        })
    }

    fn members(&mut self, side: Side) -> Result<usize, OutsideError> {
        self.try_members(side).map_err(|error| self.error(error))
    }

    fn reads(&mut self, side: Side, topic: Topic) -> Result<Vec<Option<i64>>, OutsideError> {
        let partitions = self.opened()?.partitions;
        self.try_reads(side, topic, partitions).map_err(|error| self.error(error))
    }

    fn bounds(&mut self, topic: Topic) -> Result<Vec<(i64, i64)>, OutsideError> {
        self.topic_bounds(topic)
    }
}
