//! The topic of push mode, read as a group, and its dead letters.

use std::collections::BTreeMap;
use std::time::Duration;

use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer as _};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{Header, Headers as _, Message as _, OwnedHeaders};
use rdkafka::producer::{BaseRecord, Producer as _, ThreadedProducer};
use rdkafka::{Offset, TopicPartitionList};

use super::{ANSWER_MAX, CountingContext, MESSAGE_BYTES_MAX, Quiet, SOURCE_HEADER, client};
use crate::config::node::Kafka;
use crate::ports::{OutsideError, PostSource, Posted};

/// Why a record was given up.
const ERROR_HEADER: &str = "x-aviary-error";

/// Reads the records that push mode posts, and writes dead letters.
pub struct KafkaPush {
    consumer: BaseConsumer<Quiet>,
    producer: ThreadedProducer<CountingContext>,
    counts: CountingContext,
    topic: String,
    dead_letter: String,
}

impl KafkaPush {
    /// Returns a reader of `topic` in the place of `group`, and a writer to `dead_letter`.
    pub fn new(config: &Kafka, topic: &str, group: &str, dead_letter: &str) -> Result<Self, OutsideError> {
        let error = |error: KafkaError| OutsideError::new("kafka", error);
        let own = [
            ("group.id", group),
            ("enable.auto.commit", "false"),
            ("isolation.level", "read_committed"),
            ("auto.offset.reset", "error"),
            ("fetch.wait.max.ms", "50"),
            // A batch may take as long as its slowest record's retries.
            ("max.poll.interval.ms", "86400000"),
        ];
        let consumer: BaseConsumer<_> = client(config, &own).create_with_context(Quiet).map_err(error)?;
        consumer.subscribe(&[topic]).map_err(error)?;
        let own = [
            ("enable.idempotence", "true"),
            ("message.timeout.ms", "10000"),
            ("acks", "all"),
            ("message.max.bytes", MESSAGE_BYTES_MAX),
        ];
        let counts = CountingContext::default();
        let producer: ThreadedProducer<_> = client(config, &own).create_with_context(counts.clone()).map_err(error)?;
        let found = producer.client().fetch_metadata(Some(dead_letter), ANSWER_MAX).map_err(error)?;
        if let Some(why) = found.topics().first().and_then(|topic| topic.error()) {
            let why =
                format!("{}; create it: records that nobody takes go there", KafkaError::MetadataFetch(why.into()));
            return Err(OutsideError::new(format!("kafka topic {dead_letter}"), why));
        }
        Ok(Self { consumer, producer, counts, topic: topic.into(), dead_letter: dead_letter.into() })
    }

    fn error(&self, error: KafkaError) -> OutsideError {
        let hint = match error.rdkafka_error_code() {
            Some(RDKafkaErrorCode::AutoOffsetReset) => {
                "; the group has no place in this topic: set it (kafka-consumer-groups --reset-offsets)"
            }
            _ => "",
        };
        OutsideError::new(format!("kafka topic {}", self.topic), format!("{error}{hint}"))
    }
}

impl PostSource for KafkaPush {
    fn read(&mut self, wait: Duration, most: usize) -> Result<Vec<Posted>, OutsideError> {
        let (mut records, mut wait) = (Vec::new(), wait);
        while records.len() < most
            && let Some(message) = self.consumer.poll(wait)
        {
            let message = match message {
                Ok(message) => message,
                Err(why) if records.is_empty() => return Err(self.error(why)),
                // What was read before it is posted; it comes again if it lasts.
                Err(_) => break,
            };
            let headers = message.headers().into_iter().flat_map(|headers| headers.iter());
            let headers = headers.filter_map(|header| Some((header.key.to_string(), header.value?.to_vec())));
            records.push(Posted {
                partition: message.partition() as usize,
                offset: message.offset(),
                key: message.key().map(<[u8]>::to_vec),
                value: message.payload().map(<[u8]>::to_vec),
                headers: headers.collect(),
            });
            // What is there already comes along.
            wait = Duration::from_millis(2);
        }
        Ok(records)
    }

    fn give_up(&mut self, record: &Posted, why: &str) -> Result<(), OutsideError> {
        let error = |why: String| OutsideError::new(format!("kafka topic {}", self.dead_letter), why);
        let source = format!("{}/{}/{}", self.topic, record.partition, record.offset);
        let mut headers = OwnedHeaders::new();
        for (key, value) in &record.headers {
            headers = headers.insert(Header { key, value: Some(value) });
        }
        headers = headers.insert(Header { key: SOURCE_HEADER, value: Some(&source) });
        headers = headers.insert(Header { key: ERROR_HEADER, value: Some(why) });
        let mut letter = BaseRecord::<[u8], [u8]>::to(&self.dead_letter).headers(headers);
        if let Some(key) = &record.key {
            letter = letter.key(key);
        }
        if let Some(value) = &record.value {
            letter = letter.payload(value);
        }
        let failed = self.counts.counts().1;
        self.producer.send(letter).map_err(|(why, _)| error(why.to_string()))?;
        self.producer.flush(ANSWER_MAX).map_err(|why| error(why.to_string()))?;
        match self.counts.counts().1 == failed {
            true => Ok(()),
            false => Err(error("the dead letter was not written".into())),
        }
    }

    fn commit(&mut self, records: &[Posted]) -> Result<(), OutsideError> {
        let mut next = BTreeMap::new();
        for record in records {
            next.insert(record.partition, record.offset + 1);
        }
        let mut list = TopicPartitionList::new();
        for (partition, next) in next {
            let added = list.add_partition_offset(&self.topic, partition as i32, Offset::Offset(next));
            added.map_err(|why| self.error(why))?;
        }
        self.consumer.commit(&list, CommitMode::Sync).map_err(|why| self.error(why))
    }
}
