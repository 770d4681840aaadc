//! Events to a topic: for trying out, and for measuring.

use std::time::Duration;

use rdkafka::error::KafkaError;
use rdkafka::producer::{BaseRecord, Producer as _, ThreadedProducer};

use super::{ANSWER_MAX, CountingContext, client, send};
use crate::config::node::Kafka;
use crate::ports::OutsideError;

/// Writes telemetry events to a topic; for `aviary telemetry produce`.
pub struct KafkaEvents {
    producer: ThreadedProducer<CountingContext>,
    counts: CountingContext,
    topic: String,
}

impl KafkaEvents {
    /// Returns a writer to `[kafka] telemetry`, once the broker says that the topic is there.
    pub fn new(config: &Kafka) -> Result<Self, OutsideError> {
        let error = |error: KafkaError| OutsideError::new(format!("kafka topic {}", config.telemetry), error);
        let own = [("linger.ms", "5"), ("compression.type", "lz4"), ("message.timeout.ms", "30000"), ("acks", "all")];
        let counts = CountingContext::default();
        let producer: ThreadedProducer<_> = client(config, &own).create_with_context(counts.clone()).map_err(error)?;
        let found = producer.client().fetch_metadata(Some(&config.telemetry), ANSWER_MAX).map_err(error)?;
        match found.topics().first().and_then(|topic| topic.error()) {
            Some(why) => Err(error(KafkaError::MetadataFetch(why.into()))),
            None => Ok(Self { producer, counts, topic: config.telemetry.clone() }),
        }
    }

    /// Sends an event; waits while the queue is full.
    pub fn send(&self, service: &str, event: &[u8]) -> Result<(), OutsideError> {
        let record = BaseRecord::to(&self.topic).key(service).payload(event);
        send(&self.producer, record).map_err(|why| OutsideError::new(format!("kafka topic {}", self.topic), why))
    }

    /// Returns how many events the broker has, and how many it could not be given.
    pub fn counts(&self) -> (u64, u64) {
        self.counts.counts()
    }

    /// Waits until every event is delivered or given up.
    pub fn flush(&self) {
        // Whatever is left is told by the counts.
        let _ = self.producer.flush(Duration::from_secs(30));
    }
}
