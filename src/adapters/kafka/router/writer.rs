//! One transaction after the other: copies, as they are but for their headers.

use std::ffi::CStr;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rdkafka::config::{ClientConfig, RDKafkaLogLevel};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{BorrowedHeaders, BorrowedMessage, DeliveryResult, Header, Message as _, OwnedHeaders};
use rdkafka::producer::{BaseRecord, Producer as _, ProducerContext, ThreadedProducer};
use rdkafka::{ClientContext, Statistics};
use tracing::warn;

use super::super::{log, native, send};
use super::{SOURCE_HEADER, TopicNames, VERSION_HEADER, WEIGHT_VERSION_HEADER};
use crate::domain::side::Side;
use crate::domain::time::Mono;
use crate::ports::{Assignment, Clock};

/// Results of the open transaction's records, as the broker reports them.
pub struct Deliveries {
    /// The last offset in stable's and canary's topic, for each partition; below 0: none.
    pub last: [Vec<AtomicI64>; 2],
    /// How many records could not be written.
    pub failed: AtomicU64,
    /// Where the first of those was to go, and the broker's reason.
    first: Mutex<Option<(String, KafkaError)>>,
    /// How long the broker made this producer wait of late, in milliseconds: a quota.
    throttled_ms: AtomicU64,
    /// Statistics since that was said.
    unsaid: AtomicU64,
}

/// Statistics, one a second, between two lines that say that the broker throttles.
const SAY_AGAIN: u64 = 60;

impl Deliveries {
    fn new(partitions: usize) -> Self {
        let lasts = || (0..partitions).map(|_| AtomicI64::new(-1)).collect();
        Self {
            last: [lasts(), lasts()],
            failed: AtomicU64::new(0),
            first: Mutex::default(),
            throttled_ms: AtomicU64::new(0),
            unsaid: AtomicU64::new(SAY_AGAIN),
        }
    }

    /// Returns the reason of the first record that could not be written: its topic, and what the broker said.
    pub fn reason(&self) -> Option<(String, KafkaError)> {
        self.first.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Returns the words for an error that a throttled producer meets; empty if the broker doesn't throttle it.
    pub fn throttling(&self) -> String {
        match self.throttled_ms.load(Ordering::Relaxed) {
            0 => String::new(),
            ms => format!(
                "; the broker throttles this client by up to {ms} ms an answer: a quota of its user or client.id"
            ),
        }
    }

    fn fail(&self, topic: &str, error: &KafkaError) {
        self.failed.fetch_add(1, Ordering::Relaxed);
        let mut first = self.first.lock().unwrap_or_else(PoisonError::into_inner);
        first.get_or_insert_with(|| (topic.into(), error.clone()));
    }
}

/// Hears what the broker says.
#[derive(Clone)]
pub struct DeliveryContext(pub Arc<Deliveries>);

impl ClientContext for DeliveryContext {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, text: &str) {
        log(level, facility, text);
    }

    fn stats(&self, statistics: Statistics) {
        let waits = statistics.brokers.values().filter_map(|broker| Some(broker.throttle.as_ref()?.max));
        let ms = u64::try_from(waits.max().unwrap_or(0)).unwrap_or(0);
        self.0.throttled_ms.store(ms, Ordering::Relaxed);
        let unsaid = self.0.unsaid.fetch_add(1, Ordering::Relaxed);
        if ms > 0 && unsaid >= SAY_AGAIN {
            self.0.unsaid.store(0, Ordering::Relaxed);
            warn!(throttled_ms = ms, "the broker throttles the router: a quota of its user or client.id");
        }
    }
}

/// The headers that a router writes; the last is where the record stood in the source.
const STAMPS: [&CStr; 3] = [c"x-aviary-version", c"x-aviary-weight-version", c"x-aviary-source"];

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
            Ok(message) => self.0.fail(message.topic(), &KafkaError::MessageProduction(RDKafkaErrorCode::NoOffset)),
            Err((error, message)) => self.0.fail(message.topic(), error),
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
    /// Keys and values of the open transaction, in bytes.
    pub bytes: usize,
    /// The number of a weight, and its text.
    weight_version: (u64, String),
}

impl Writer {
    /// Returns a producer that has begun nothing.
    pub fn new(config: &ClientConfig, partitions: usize, clock: Arc<dyn Clock>) -> Result<Self, KafkaError> {
        let deliveries = Arc::new(Deliveries::new(partitions));
        let producer = config.create_with_context(DeliveryContext(deliveries.clone()))?;
        Ok(Self { producer, deliveries, begun: None, clock, bytes: 0, weight_version: (0, "0".into()) })
    }

    /// Begins a transaction, if none has begun.
    pub fn begin(&mut self) -> Result<(), KafkaError> {
        if self.begun.is_none() {
            for last in self.deliveries.last.iter().flatten() {
                last.store(-1, Ordering::Relaxed);
            }
            self.producer.begin_transaction()?;
            self.begun = Some(self.clock.now().mono);
            self.bytes = 0;
        }
        Ok(())
    }

    /// Returns the headers of a record's copy: its own, as they are, then which version it was given to, and under which weight.
    /// `source` says where the record stood, which one that was copied before says by itself.
    pub fn stamped(
        &mut self,
        names: &TopicNames,
        from: &mut BorrowedMessage<'_>,
        stamp: Assignment,
        source: Option<&str>,
    ) -> OwnedHeaders {
        // A record that a router has copied before says so of that one.
        let former: &[&CStr] = if source.is_some() { &STAMPS } else { &STAMPS[..2] };
        former.iter().for_each(|name| native::remove_header(from, name));
        if self.weight_version.0 != stamp.weight_version {
            self.weight_version = (stamp.weight_version, stamp.weight_version.to_string());
        }
        let version = Header { key: VERSION_HEADER, value: Some(&names.versions[stamp.side as usize]) };
        let weight_version = Header { key: WEIGHT_VERSION_HEADER, value: Some(&self.weight_version.1) };
        let own = from.headers().map_or_else(|| OwnedHeaders::new_with_capacity(3), BorrowedHeaders::detach);
        let stamped = own.insert(version).insert(weight_version);
        match source {
            Some(source) => stamped.insert(Header { key: SOURCE_HEADER, value: Some(source) }),
            None => stamped,
        }
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
        self.bytes += from.key_len() + from.payload_len();
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
