//! What anybody may do with a router's topics: make them, look at them, send it commands.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;

use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, ResourceSpecifier, TopicReplication};
use rdkafka::consumer::Consumer as _;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{Headers as _, Message as _};
use rdkafka::producer::BaseRecord;
use rdkafka::{Offset, TopicPartitionList};

use super::super::{ANSWER_MAX, Quiet, client, flush};
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
        // A copy is larger than its record by its headers.
        let bytes = like("max.message.bytes").and_then(|text| text.parse::<i64>().ok()).unwrap_or(1_048_588) + 4096;
        let (bytes, in_sync) = (bytes.to_string(), like("min.insync.replicas"));
        let ahead = like("message.timestamp.after.max.ms");
        for (topic, count) in &wanted {
            // As many replicas as the broker gives by default; nothing goes by its age: old records are copied with their own time.
            let mut new = NewTopic::new(topic, *count as i32, TopicReplication::Fixed(-1))
                .set("retention.ms", "-1")
                .set("retention.bytes", "-1")
                .set("cleanup.policy", "delete")
                .set("message.timestamp.type", "CreateTime")
                .set("max.message.bytes", &bytes);
            if let Some(in_sync) = &in_sync {
                new = new.set("min.insync.replicas", in_sync);
            }
            if let Some(ahead) = &ahead {
                new = new.set("message.timestamp.after.max.ms", ahead);
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
        let bounds = (0..partitions).map(|one| self.services[0].fetch_watermarks(name, one as i32, ANSWER_MAX));
        bounds.collect::<Result<_, _>>().map_err(|error| self.error(error))
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
        match writer.deliveries.failed.load(Ordering::Relaxed) {
            0 => Ok(()),
            _ => Err(OutsideError::new(format!("kafka topic {}", self.names.control), "the entry was not written")),
        }
    }
}

impl KafkaBroker {
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
                        let all: Vec<_> = message.headers().into_iter().flat_map(|headers| headers.iter()).collect();
                        let mut headers = all.iter();
                        let source =
                            headers.rfind(|header| header.key == SOURCE_HEADER).and_then(|header| header.value);
                        take(partition, offset, source.and_then(|text| std::str::from_utf8(text).ok()));
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
