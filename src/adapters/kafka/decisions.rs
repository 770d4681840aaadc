//! A topic of decisions, each on it once.
//!
//! Decisions and the publisher's place in the log go out in one transaction: after a crash the place says what is missing. A
//! node that begins to publish fences the node that did before, by the transactional id.

use prost::Message as _;
use rdkafka::consumer::{BaseConsumer, Consumer as _, ConsumerGroupMetadata};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::{BaseRecord, Producer as _, ThreadedProducer};
use rdkafka::{Offset, TopicPartitionList};

use super::{ANSWER_MAX, Quiet, again, client, flush};
use crate::config::node::Kafka;
use crate::domain::ids::ClusterId;
use crate::ports::{DecisionSink, OutsideError};
use crate::protocol::record::Slot;
use crate::schema::v1::Decision;

/// Publishes decisions to a topic, with the publisher's position, in transactions.
pub struct KafkaDecisions {
    config: Kafka,
    topic: String,
    /// Names the transactions and the place: there is one publisher in a cluster.
    name: String,
    open: Option<OpenProducer>,
}

struct OpenProducer {
    producer: ThreadedProducer<Quiet>,
    group: ConsumerGroupMetadata,
}

impl KafkaDecisions {
    /// Returns a publisher of a cluster's decisions to a topic.
    pub fn new(config: &Kafka, topic: &str, cluster: ClusterId) -> Self {
        let name = format!("{}-decisions-{cluster}", config.group);
        Self { config: config.clone(), topic: topic.into(), name, open: None }
    }

    fn error(&self, error: KafkaError) -> OutsideError {
        let hint = match error.rdkafka_error_code() {
            Some(RDKafkaErrorCode::UnknownTopicOrPartition) => "; create it, or name another in [kafka] decisions",
            _ => "",
        };
        OutsideError::new(format!("kafka topic {}", self.topic), format!("{error}{hint}"))
    }

    fn begin(&self) -> Result<(OpenProducer, Option<Slot>), KafkaError> {
        let own =
            [("group.id", self.name.as_str()), ("enable.auto.commit", "false"), ("isolation.level", "read_committed")];
        let reader: BaseConsumer<_> = client(&self.config, &own).create_with_context(Quiet)?;
        // Before anything is shut out: a topic that isn't there is no reason to.
        let metadata = reader.fetch_metadata(Some(&self.topic), ANSWER_MAX)?;
        if let Some(error) = metadata.topics().first().and_then(|topic| topic.error()) {
            return Err(KafkaError::MetadataFetch(error.into()));
        }
        let own = [
            ("transactional.id", self.name.as_str()),
            ("transaction.timeout.ms", "15000"),
            ("message.timeout.ms", "10000"),
            ("linger.ms", "0"),
            ("compression.type", "lz4"),
        ];
        let producer: ThreadedProducer<_> = client(&self.config, &own).create_with_context(Quiet)?;
        producer.init_transactions(ANSWER_MAX)?;
        let mut place = TopicPartitionList::new();
        place.add_partition(&self.topic, 0);
        let place = reader.committed_offsets(place, ANSWER_MAX)?;
        let told = match place.elements().first().map(|place| place.offset()) {
            Some(Offset::Offset(next)) => Some(Slot((next as u64).saturating_sub(1))),
            _ => None,
        };
        let group = reader.group_metadata().ok_or(KafkaError::MetadataFetch(RDKafkaErrorCode::UnknownGroup))?;
        Ok((OpenProducer { producer, group }, told))
    }

    fn send(&self, open: &OpenProducer, decisions: &[Decision], through: Slot) -> Result<(), KafkaError> {
        open.producer.begin_transaction()?;
        for decision in decisions {
            let payload = decision.encode_to_vec();
            let id = format!("{}:{}", self.name, decision.sequence);
            let (sequence, kind) = (decision.sequence.to_string(), decision.kind().as_str_name());
            let header = |key, value| Header { key, value: Some(value) };
            let headers = OwnedHeaders::new()
                .insert(header("decision_id", id.as_str()))
                .insert(header("sequence", sequence.as_str()))
                .insert(header("kind", kind))
                .insert(header("content-type", "application/x-protobuf; messageType=\"aviary.v1.Decision\""));
            let record = BaseRecord::to(&self.topic).key(&decision.service).payload(&payload).headers(headers);
            open.producer.send(record).map_err(|(error, _)| error)?;
        }
        flush(&open.producer)?;
        let mut place = TopicPartitionList::new();
        place.add_partition_offset(&self.topic, 0, Offset::Offset(through.next().0 as i64))?;
        again(|| open.producer.send_offsets_to_transaction(&place, &open.group, ANSWER_MAX))?;
        // A commit that was not answered may have happened: the same call again tells.
        again(|| open.producer.commit_transaction(ANSWER_MAX))
    }
}

impl DecisionSink for KafkaDecisions {
    fn open(&mut self) -> Result<Option<Slot>, OutsideError> {
        self.open = None;
        let (open, told) = self.begin().map_err(|error| self.error(error))?;
        self.open = Some(open);
        Ok(told)
    }

    fn publish(&mut self, decisions: &[Decision], through: Slot) -> Result<(), OutsideError> {
        let Some(open) = self.open.take() else {
            return Err(OutsideError::new(format!("kafka topic {}", self.topic), "not open"));
        };
        // Whatever went wrong, opening it anew tells what is missing, and ends a transaction that was left open.
        self.send(&open, decisions, through).map_err(|error| self.error(error))?;
        self.open = Some(open);
        Ok(())
    }
}
