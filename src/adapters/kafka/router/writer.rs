//! One transaction after the other: copies, as they are but for their headers.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};

use rdkafka::ClientContext;
use rdkafka::config::{ClientConfig, RDKafkaLogLevel};
use rdkafka::error::KafkaError;
use rdkafka::message::{BorrowedMessage, DeliveryResult, Header, Message as _, OwnedHeaders};
use rdkafka::producer::{BaseRecord, Producer as _, ProducerContext, ThreadedProducer};

use super::super::{log, send};
use super::{TopicNames, VERSION_HEADER, WEIGHT_VERSION_HEADER};
use crate::domain::side::Side;
use crate::domain::time::Mono;
use crate::ports::{Assignment, Clock};

/// Results of the open transaction's records, as the broker reports them.
pub struct Deliveries {
    /// The last offset in stable's and canary's topic, for each partition; below 0: none.
    pub last: [Vec<AtomicI64>; 2],
    /// How many records could not be written.
    pub failed: AtomicU64,
}

/// Hears what the broker says.
#[derive(Clone)]
pub struct DeliveryContext(pub Arc<Deliveries>);

impl ClientContext for DeliveryContext {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, text: &str) {
        log(level, facility, text);
    }
}

/// Records of the control topic have this mark, others their side's number.
pub const CONTROL: usize = 2;

impl ProducerContext for DeliveryContext {
    type DeliveryOpaque = usize;

    fn delivery(&self, result: &DeliveryResult<'_>, mark: usize) {
        match result {
            // Where it is isn't told of what the broker had already: what waits for it can't go on.
            Ok(message) if mark < CONTROL && message.offset() >= 0 => {
                self.0.last[mark][message.partition() as usize].fetch_max(message.offset(), Ordering::Relaxed);
            }
            Ok(_) if mark == CONTROL => {}
            _ => {
                self.0.failed.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
}

/// A transactional producer, and what became of its records.
pub struct Writer {
    /// The client of librdkafka that sends the records.
    pub producer: ThreadedProducer<DeliveryContext>,
    /// Delivery results that the broker reported.
    pub deliveries: Arc<Deliveries>,
    /// When the open transaction began.
    pub begun: Option<Mono>,
    clock: Arc<dyn Clock>,
    /// The headers of records given to stable and canary under the weight of this number, but for where they are from.
    stamped: Option<(u64, [OwnedHeaders; 2])>,
}

impl Writer {
    /// Returns a producer that has begun nothing.
    pub fn new(config: &ClientConfig, partitions: usize, clock: Arc<dyn Clock>) -> Result<Self, KafkaError> {
        let lasts = || (0..partitions).map(|_| AtomicI64::new(-1)).collect();
        let deliveries = Arc::new(Deliveries { last: [lasts(), lasts()], failed: AtomicU64::new(0) });
        let producer = config.create_with_context(DeliveryContext(deliveries.clone()))?;
        Ok(Self { producer, deliveries, begun: None, clock, stamped: None })
    }

    /// Begins a transaction, if none has begun.
    pub fn begin(&mut self) -> Result<(), KafkaError> {
        if self.begun.is_none() {
            for last in self.deliveries.last.iter().flatten() {
                last.store(-1, Ordering::Relaxed);
            }
            self.producer.begin_transaction()?;
            self.begun = Some(self.clock.now().mono);
        }
        Ok(())
    }

    /// Returns the headers that say which version a record was given to, and under which weight.
    pub fn stamped(&mut self, names: &TopicNames, stamp: Assignment) -> &OwnedHeaders {
        if self.stamped.as_ref().is_none_or(|(weight_version, _)| *weight_version != stamp.weight_version) {
            let weight_version = stamp.weight_version.to_string();
            let made = names.versions.each_ref().map(|version| {
                OwnedHeaders::new_with_capacity(3)
                    .insert(Header { key: VERSION_HEADER, value: Some(version) })
                    .insert(Header { key: WEIGHT_VERSION_HEADER, value: Some(&weight_version) })
            });
            self.stamped = Some((stamp.weight_version, made));
        }
        &self.stamped.as_ref().expect("made above").1[stamp.side as usize]
    }

    /// Writes a record as it is, but for its headers.
    pub fn copy(
        &mut self,
        names: &TopicNames,
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
        send(&self.producer, record)
    }
}
