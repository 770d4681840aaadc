//! What anybody may do with a router's topics: make them, look at them, send it commands.

use std::collections::BTreeMap;

use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, ResourceSpecifier, TopicReplication};
use rdkafka::consumer::Consumer as _;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::Message as _;
use rdkafka::producer::BaseRecord;
use rdkafka::{Offset, TopicPartitionList};

use super::super::{ANSWER_MAX, MESSAGE_BYTES_MAX, Quiet, client, flush, native};
use super::writer::{CONTROL, Writer};
use super::{KafkaBroker, SOURCE_HEADER, places, read};
use crate::domain::side::Side;
use crate::ports::{OffsetRange, Opened, OutsideError, RouterTopics, Topic};

impl RouterTopics for KafkaBroker {
    fn partitions(&self, topic: &str) -> Result<Option<usize>, OutsideError> {
        let error = |error: KafkaError| OutsideError::new(format!("kafka topic {topic}"), error);
        let metadata = self.services[0].fetch_metadata(Some(topic), ANSWER_MAX).map_err(error)?;
        let found = metadata.topics().first();
        match found.and_then(|found| found.error()) {
            Some(why) if RDKafkaErrorCode::from(why) == RDKafkaErrorCode::UnknownTopicOrPartition => Ok(None),
            Some(why) => Err(error(KafkaError::MetadataFetch(why.into()))),
            None => Ok(found.map(|found| found.partitions().len())),
        }
    }

    fn prepare(&self) -> Result<Vec<String>, OutsideError> {
        let names = &self.names;
        let begun = self.partitions(&names.control)?.is_some();
        let Some(partitions) = self.partitions(&names.source)? else {
            return Err(OutsideError::new(
                format!("kafka topic {}", names.source),
                "does not exist, expected the topic to split",
            ));
        };
        let mut wanted = Vec::new();
        for (topic, count) in [(&names.control, 1), (&names.topics[0], partitions), (&names.topics[1], partitions)] {
            match self.partitions(topic)? {
                None => wanted.push((topic.clone(), count)),
                Some(found) if found == count => {}
                // The source has got more since.
                Some(found) if begun && found > 0 && found < count => {}
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
        let in_sync = like("min.insync.replicas");
        // What fits the source may fit by its producer's compression only, and a copy has more headers. A record was in time when it
        // came to the source; its copy is older. Brokers before 3.6 don't know the latter limits.
        let times = ["message.timestamp.before.max.ms", "message.timestamp.after.max.ms"].into_iter();
        let times: Vec<_> = times.filter_map(|key| Some((key, like(key)?))).collect();
        let bytes = like("max.message.bytes").and_then(|text| text.parse::<i64>().ok()).unwrap_or(1_048_588) + 4096;
        let free = times.iter().map(|(key, _)| (*key, i64::MAX.to_string()));
        let free: Vec<_> = free.chain([("max.message.bytes", MESSAGE_BYTES_MAX.to_string())]).collect();
        // Where the brokers' owner allows no more, it is the source's own limits.
        let bound: Vec<_> = times.into_iter().chain([("max.message.bytes", bytes.to_string())]).collect();
        for (topic, count) in &wanted {
            let make = |limits: &[(&str, String)]| {
                // As many replicas as the broker gives by default; nothing goes by its age: old records are copied with their own time.
                let mut new = NewTopic::new(topic, *count as i32, TopicReplication::Fixed(-1))
                    .set("retention.ms", "-1")
                    .set("retention.bytes", "-1")
                    .set("cleanup.policy", "delete")
                    .set("message.timestamp.type", "CreateTime");
                for (key, value) in limits.iter().map(|(key, value)| (*key, value.as_str())).chain(in_sync_of(&in_sync))
                {
                    new = new.set(key, value);
                }
                let made = runtime.block_on(admin.create_topics([&new], &options)).map_err(error)?;
                Ok(made.into_iter().find_map(Result::err).map(|(_, why)| why))
            };
            let refused = match make(&free)? {
                Some(RDKafkaErrorCode::PolicyViolation | RDKafkaErrorCode::InvalidConfig) => make(&bound)?,
                refused => refused,
            };
            if let Some(why) = refused.filter(|why| *why != RDKafkaErrorCode::TopicAlreadyExists) {
                return Err(OutsideError::new(format!("kafka topic {topic}"), format!("can't be made: {why}")));
            }
        }
        Ok(wanted.into_iter().map(|(topic, _)| topic).collect())
    }

    fn look(&self) -> Result<Opened, OutsideError> {
        let partitions = self.partitions(&self.names.topics[0])?;
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

    fn topic_bounds(&self, topic: Topic) -> Result<Vec<(i64, i64)>, OutsideError> {
        let name = self.names.topic(topic);
        let partitions = self.partitions(name)?.unwrap_or(0);
        let bounds = (0..partitions).map(|one| self.ends.fetch_watermarks(name, one as i32, ANSWER_MAX));
        bounds.collect::<Result<_, _>>().map_err(|error| self.error(error))
    }

    fn stable_ends(&self, topic: Topic) -> Result<Vec<i64>, OutsideError> {
        let name = self.names.topic(topic);
        let partitions = self.partitions(name)?.unwrap_or(0);
        let ends = (0..partitions).map(|one| self.services[0].fetch_watermarks(name, one as i32, ANSWER_MAX));
        ends.map(|ends| ends.map(|(_, end)| end)).collect::<Result<_, _>>().map_err(|error| self.error(error))
    }

    fn service(&self, side: Side, topic: Topic) -> Result<(usize, Vec<Option<i64>>), OutsideError> {
        let partitions = self.partitions(self.names.topic(topic))?.unwrap_or(0);
        let found = self.try_members(side).and_then(|members| Ok((members, self.try_reads(side, topic, partitions)?)));
        found.map_err(|error| self.error(error))
    }

    fn scan(
        &self,
        topic: Topic,
        ranges: &[OffsetRange],
        take: &mut dyn FnMut(usize, i64, Option<&str>),
    ) -> Result<(), OutsideError> {
        self.try_scan(self.names.topic(topic), ranges, take).map_err(|error| self.error(error))
    }

    fn send(&self, entry: &str) -> Result<(), OutsideError> {
        let error = |error: KafkaError| OutsideError::new(format!("kafka topic {}", self.names.control), error);
        let own = [("enable.idempotence", "true"), ("message.timeout.ms", "10000"), ("acks", "all")];
        let writer = Writer::new(&client(&self.config, &own), 0, self.clock.clone()).map_err(error)?;
        let record = BaseRecord::<(), _, _>::with_opaque_to(&self.names.control, CONTROL).partition(0).payload(entry);
        writer.producer.send(record).map_err(|(why, _)| error(why))?;
        flush(&writer.producer).map_err(error)?;
        match writer.deliveries.reason() {
            None => Ok(()),
            Some((_, why)) => Err(error(why)),
        }
    }
}

fn in_sync_of(value: &Option<String>) -> Option<(&'static str, &str)> {
    value.as_ref().map(|value| ("min.insync.replicas", value.as_str()))
}

/// Returns where a copy's record stood, as its last header of that name says; none if it says nothing that can be read.
fn source_of<'m>(headers: &[native::RawHeader<'m>]) -> Option<&'m str> {
    let (_, source) = headers.iter().rfind(|(name, _)| *name == SOURCE_HEADER.as_bytes())?;
    std::str::from_utf8((*source)?).ok()
}

impl KafkaBroker {
    /// Returns whether anything committed is in a topic.
    pub(super) fn has_records(&self, topic: Topic) -> Result<bool, OutsideError> {
        let bounds = self.topic_bounds(topic)?;
        let ranges = bounds.iter().map(|(low, high)| OffsetRange { from: *low, until: *high, known: None });
        let (ranges, mut found): (Vec<_>, bool) = (ranges.collect(), false);
        self.scan(topic, &ranges, &mut |_, _, _| found = true)?;
        Ok(found)
    }

    fn try_scan(
        &self,
        topic: &str,
        ranges: &[OffsetRange],
        take: &mut dyn FnMut(usize, i64, Option<&str>),
    ) -> Result<(), KafkaError> {
        let reader = self.ends()?;
        let (mut list, mut left) = (TopicPartitionList::new(), BTreeMap::new());
        for (partition, range) in ranges.iter().enumerate().filter(|(_, range)| range.from < range.until) {
            list.add_partition_offset(topic, partition as i32, Offset::Offset(range.from))?;
            left.insert(partition, range);
        }
        reader.assign(&list)?;
        let mut next: Vec<i64> = ranges.iter().map(|range| range.from).collect();
        while !left.is_empty() {
            match reader.poll(ANSWER_MAX) {
                None => return Err(KafkaError::MessageConsumption(RDKafkaErrorCode::OperationTimedOut)),
                Some(Err(KafkaError::PartitionEOF(partition))) => {
                    // Where the broker has not yet marked a transaction as committed, its records are still to come.
                    left.retain(|one, range| {
                        *one != partition as usize || range.known.is_some_and(|known| next[*one] <= known)
                    });
                }
                Some(Err(error)) => return Err(error),
                Some(Ok(message)) => {
                    let (partition, offset) = (message.partition() as usize, message.offset());
                    let Some(range) = left.get(&partition) else { continue };
                    next[partition] = offset + 1;
                    if offset < range.until {
                        take(partition, offset, source_of(&native::headers(&message)));
                    }
                    if offset + 1 >= range.until {
                        left.remove(&partition);
                    }
                }
            }
        }
        Ok(())
    }
}
