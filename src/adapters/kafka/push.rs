//! The topic of push mode, read as a group, and its dead letters.

use std::collections::BTreeMap;
use std::time::Duration;

use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer as _};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{BorrowedHeaders, Header, Message as _, OwnedHeaders};
use rdkafka::producer::{BaseRecord, Producer as _, ThreadedProducer};
use rdkafka::{Offset, TopicPartitionList};

use super::{ANSWER_MAX, FailureContext, MESSAGE_BYTES_MAX, Quiet, SOURCE_HEADER, client, native};
use crate::config::node::Kafka;
use crate::ports::{OutsideError, PostSource, Posted};

/// Why a record was given up.
const ERROR_HEADER: &str = "x-aviary-error";

/// Reads the records that push mode posts, and writes dead letters.
pub struct KafkaPush {
    consumer: BaseConsumer<Quiet>,
    producer: ThreadedProducer<FailureContext>,
    failures: FailureContext,
    /// Headers of the records that were read last, as they are; by place.
    headers: BTreeMap<(usize, i64), OwnedHeaders>,
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
        let failures = FailureContext::default();
        let producer: ThreadedProducer<_> =
            client(config, &own).create_with_context(failures.clone()).map_err(error)?;
        let found = producer.client().fetch_metadata(Some(dead_letter), ANSWER_MAX).map_err(error)?;
        if let Some(why) = found.topics().first().and_then(|topic| topic.error()) {
            let why =
                format!("{}; create it: records that nobody takes go there", KafkaError::MetadataFetch(why.into()));
            return Err(OutsideError::new(format!("kafka topic {dead_letter}"), why));
        }
        let (topic, dead_letter) = (topic.into(), dead_letter.into());
        Ok(Self { consumer, producer, failures, headers: BTreeMap::new(), topic, dead_letter })
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

impl KafkaPush {
    /// Writes a dead letter with this value; on return it is there.
    fn letter(&self, record: &Posted, why: &str, value: Option<&[u8]>) -> Result<(), KafkaError> {
        let source = format!("{}/{}/{}", self.topic, record.partition, record.offset);
        let own = self.headers.get(&(record.partition, record.offset));
        let headers = own.map_or_else(OwnedHeaders::new, |own| BorrowedHeaders::detach(own.as_borrowed()));
        let headers = headers
            .insert(Header { key: SOURCE_HEADER, value: Some(&source) })
            .insert(Header { key: ERROR_HEADER, value: Some(why) });
        let mut letter = BaseRecord::<[u8], [u8]>::to(&self.dead_letter).headers(headers);
        letter.key = record.key.as_deref();
        letter.payload = value;
        letter.timestamp = record.time_ms;
        self.failures.clear();
        self.producer.send(letter).map_err(|(why, _)| why)?;
        self.producer.flush(ANSWER_MAX)?;
        self.failures.first().map_or(Ok(()), Err)
    }
}

impl PostSource for KafkaPush {
    fn read(&mut self, wait: Duration, most: usize) -> Result<Vec<Posted>, OutsideError> {
        let (mut records, mut wait) = (Vec::new(), wait);
        self.headers.clear();
        while records.len() < most
            && let Some(message) = self.consumer.poll(wait)
        {
            let message = match message {
                Ok(message) => message,
                Err(why) if records.is_empty() => return Err(self.error(why)),
                // What was read before it is posted; it comes again if it lasts.
                Err(_) => break,
            };
            let headers = native::headers(&message);
            let headers = headers.iter().map(|(name, value)| (name.to_vec(), value.map(<[u8]>::to_vec)));
            let (partition, offset) = (message.partition() as usize, message.offset());
            if let Some(own) = message.headers() {
                self.headers.insert((partition, offset), own.detach());
            }
            records.push(Posted {
                partition,
                offset,
                key: message.key().map(<[u8]>::to_vec),
                value: message.payload().map(<[u8]>::to_vec),
                headers: headers.collect(),
                time_ms: message.timestamp().to_millis(),
            });
            // What is there already comes along.
            wait = Duration::from_millis(2);
        }
        Ok(records)
    }

    fn give_up(&mut self, record: &Posted, why: &str) -> Result<(), OutsideError> {
        match self.letter(record, why, record.value.as_deref()) {
            Err(error) if error.rdkafka_error_code() == Some(RDKafkaErrorCode::MessageSizeTooLarge) => {
                // The dead-letter topic takes less than the source: the record's place says where its value is.
                let bytes = record.value.as_ref().map_or(0, Vec::len);
                let why = format!("{why}; its value of {bytes} bytes is left out, the topic doesn't take it");
                self.letter(record, &why, None)
            }
            written => written,
        }
        .map_err(|why| {
            let why = format!("the dead letter of {}/{} was not written: {why}", record.partition, record.offset);
            OutsideError::new(format!("kafka topic {}", self.dead_letter), why)
        })
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
