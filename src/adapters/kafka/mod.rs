//! Kafka, by librdkafka: telemetry in, decisions out. Its calls block, so that each client has a thread of its own.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rdkafka::ClientConfig;
use rdkafka::ClientContext;
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::ToBytes;
use rdkafka::producer::{BaseRecord, Producer as _, ProducerContext, ThreadedProducer};
use tracing::{debug, warn};

use crate::config::node::Kafka;

mod decisions;
mod events;
mod native;
mod push;
mod router;
mod telemetry;

pub use decisions::KafkaDecisions;
pub use events::KafkaEvents;
pub use push::KafkaPush;
pub use router::{KafkaBroker, KafkaRouter, SOURCE_HEADER, TopicNames, VERSION_HEADER};
pub use telemetry::KafkaTelemetry;

/// How often a step of a transaction that may be tried again is.
const TRIES: usize = 5;

/// Calls again what may be tried again.
#[expect(clippy::disallowed_methods, reason = "the caller has a thread of its own")]
fn again(mut step: impl FnMut() -> Result<(), KafkaError>) -> Result<(), KafkaError> {
    for _ in 1..TRIES {
        match step() {
            Err(KafkaError::Transaction(error)) if error.is_retriable() => {
                std::thread::sleep(Duration::from_millis(50))
            }
            result => return result,
        }
    }
    step()
}

/// Waits until everything that was sent is delivered or given up. The client's own call looks every 100 ms only.
#[expect(clippy::disallowed_methods, reason = "the caller has a thread of its own")]
fn flush<C: ProducerContext + 'static>(producer: &ThreadedProducer<C>) -> Result<(), KafkaError> {
    let mut left = ANSWER_MAX;
    loop {
        match producer.flush(Duration::ZERO) {
            Err(KafkaError::Flush(RDKafkaErrorCode::OperationTimedOut)) if !left.is_zero() => {
                std::thread::sleep(FLUSH_LOOK);
                left = left.saturating_sub(FLUSH_LOOK);
            }
            result => return result,
        }
    }
}

/// Sends a record; waits while the client's queue is full.
#[expect(clippy::disallowed_methods, reason = "the caller has a thread of its own")]
fn send<C, K, P>(
    producer: &ThreadedProducer<C>,
    mut record: BaseRecord<'_, K, P, C::DeliveryOpaque>,
) -> Result<(), KafkaError>
where
    C: ProducerContext + 'static,
    K: ToBytes + ?Sized,
    P: ToBytes + ?Sized,
{
    loop {
        match producer.send(record) {
            Ok(()) => return Ok(()),
            Err((KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull), back)) => {
                record = back;
                std::thread::sleep(FULL);
            }
            Err((error, _)) => return Err(error),
        }
    }
}

/// How long a full queue is waited for before it is looked at again.
const FULL: Duration = Duration::from_millis(1);

/// Between two looks at what is not delivered yet.
const FLUSH_LOOK: Duration = Duration::from_micros(300);

/// Above any broker's own limit.
const MESSAGE_BYTES_MAX: &str = "100000000";

/// Longest wait for one answer of the broker.
const ANSWER_MAX: Duration = Duration::from_secs(10);

/// Returns what every client needs; the file's own `properties` come last, so that they prevail.
fn client(config: &Kafka, own: &[(&str, &str)]) -> ClientConfig {
    let mut client = ClientConfig::new();
    client.set("bootstrap.servers", &config.bootstrap).set("client.id", "aviary");
    // A broker that comes back is found within a second.
    client.set("reconnect.backoff.max.ms", "1000");
    let properties = config.properties.iter().map(|(key, value)| (key.as_str(), value.as_str()));
    for (key, value) in own.iter().copied().chain(properties) {
        client.set(key, value);
    }
    client.set_log_level(RDKafkaLogLevel::Warning);
    client
}

fn log(level: RDKafkaLogLevel, facility: &str, text: &str) {
    match level {
        RDKafkaLogLevel::Debug | RDKafkaLogLevel::Info | RDKafkaLogLevel::Notice => debug!(facility, "kafka: {text}"),
        _ => warn!(facility, "kafka: {text}"),
    }
}

/// Forwards the client's log lines to this program's log.
struct Quiet;

impl ClientContext for Quiet {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, text: &str) {
        log(level, facility, text);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        // A reader that asks for ends sees them where it reads.
        if error.rdkafka_error_code() != Some(RDKafkaErrorCode::PartitionEOF) {
            warn!("kafka: {error}: {reason}");
        }
    }
}

impl rdkafka::consumer::ConsumerContext for Quiet {}
impl ProducerContext for Quiet {
    type DeliveryOpaque = ();

    fn delivery(&self, _: &rdkafka::message::DeliveryResult<'_>, (): ()) {}
}

#[derive(Default)]
struct DeliveryCounts {
    delivered: AtomicU64,
    failed: AtomicU64,
}

/// Counts what a producer delivered, and what it could not.
#[derive(Clone, Default)]
struct CountingContext(Arc<DeliveryCounts>);

impl CountingContext {
    fn counts(&self) -> (u64, u64) {
        (self.0.delivered.load(Ordering::Relaxed), self.0.failed.load(Ordering::Relaxed))
    }
}

impl ClientContext for CountingContext {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, text: &str) {
        log(level, facility, text);
    }
}

impl ProducerContext for CountingContext {
    type DeliveryOpaque = ();

    fn delivery(&self, result: &rdkafka::message::DeliveryResult<'_>, (): ()) {
        let count = if result.is_ok() { &self.0.delivered } else { &self.0.failed };
        count.fetch_add(1, Ordering::Relaxed);
    }
}

/// Keeps why a producer's record could not be written.
#[derive(Clone, Default)]
struct FailureContext(Arc<Mutex<Option<KafkaError>>>);

impl FailureContext {
    fn failure(&self) -> MutexGuard<'_, Option<KafkaError>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets what failed before.
    fn clear(&self) {
        *self.failure() = None;
    }

    /// Returns the first failure since.
    fn first(&self) -> Option<KafkaError> {
        self.failure().clone()
    }
}

impl ClientContext for FailureContext {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, text: &str) {
        log(level, facility, text);
    }
}

impl ProducerContext for FailureContext {
    type DeliveryOpaque = ();

    fn delivery(&self, result: &rdkafka::message::DeliveryResult<'_>, (): ()) {
        if let Err((error, _)) = result {
            self.failure().get_or_insert_with(|| error.clone());
        }
    }
}
