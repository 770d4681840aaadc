//! A topic of events, read by all nodes as one group.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rdkafka::consumer::{BaseConsumer, Consumer as _, ConsumerContext, Rebalance};
use rdkafka::error::{KafkaError, KafkaResult, RDKafkaErrorCode};
use rdkafka::message::{BorrowedMessage, Message as _};
use rdkafka::{ClientContext, Offset, TopicPartitionList};
use tracing::info;

use super::{ANSWER_MAX, client, log};
use crate::config::node::Kafka;
use crate::ports::{Clock, EventSource, OutsideError};
use crate::telemetry::event::LATE_MS_MAX;

/// Events that are handed over at a time: so few that their memory is still near when it is freed, and used again.
const BATCH_MAX: usize = 64;
/// Most events that one call returns.
const POLL_MAX: usize = 4_096;

/// Records what becomes of partitions.
#[derive(Default)]
struct RebalanceContext {
    topic: String,
    /// The last event that was handed over since its place was stored, by partition: [`RebalanceContext::store`].
    taken: Mutex<BTreeMap<i32, i64>>,
    moves: Mutex<Moves>,
    /// True when there are any, so that it can be known without the lock, for each record.
    moved: AtomicBool,
}

/// Partitions that came and went, in this order.
#[derive(Default)]
struct Moves {
    lost: Vec<i32>,
    gained: Vec<i32>,
}

impl RebalanceContext {
    fn moves(&self) -> MutexGuard<'_, Moves> {
        self.moves.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn taken(&self) -> MutexGuard<'_, BTreeMap<i32, i64>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has the places committed of what was handed over.
    fn store(&self, consumer: &BaseConsumer<Self>) {
        let taken = std::mem::take(&mut *self.taken());
        for (partition, offset) in taken {
            // A partition that was taken away meanwhile is its new owner's to commit.
            let _ = consumer.store_offset(&self.topic, partition, offset);
        }
    }

    /// Returns what came and went since the last call.
    fn take_moves(&self) -> Option<Moves> {
        self.moved.swap(false, Ordering::AcqRel).then(|| std::mem::take(&mut *self.moves()))
    }
}

/// Returns what is kept of a partition.
fn of(last: &mut Vec<Option<i64>>, partition: i32) -> &mut Option<i64> {
    let place = usize::try_from(partition).expect("partitions are counted from 0");
    if place >= last.len() {
        last.resize(place + 1, None);
    }
    &mut last[place]
}

fn numbers(partitions: &TopicPartitionList) -> impl Iterator<Item = i32> {
    partitions.elements().into_iter().map(|partition| partition.partition())
}

impl ClientContext for RebalanceContext {
    fn log(&self, level: rdkafka::config::RDKafkaLogLevel, facility: &str, text: &str) {
        log(level, facility, text);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        tracing::warn!("kafka: {error}: {reason}");
    }
}

impl ConsumerContext for RebalanceContext {
    fn pre_rebalance(&self, consumer: &BaseConsumer<Self>, rebalance: &Rebalance<'_>) {
        if let Rebalance::Revoke(partitions) = rebalance {
            self.store(consumer);
            let mut moves = self.moves();
            moves.gained.retain(|gained| numbers(partitions).all(|lost| lost != *gained));
            moves.lost.extend(numbers(partitions));
            self.moved.store(true, Ordering::Release);
        }
    }

    fn post_rebalance(&self, _: &BaseConsumer<Self>, rebalance: &Rebalance<'_>) {
        if let Rebalance::Assign(partitions) = rebalance {
            self.moves().gained.extend(numbers(partitions));
            self.moved.store(true, Ordering::Release);
        }
    }
}

/// Reads events. A place in the topic is committed once its events were handed over, each second: after a crash about a second
/// of events is counted twice or, where they carry ids, not at all; the same when a node leaves while the group is just sharing
/// the partitions out anew, for then the broker refuses its last commit. Events too old to count are passed over.
pub struct KafkaTelemetry {
    consumer: BaseConsumer<RebalanceContext>,
    /// The offset of the record that was read last, by partition.
    last: Vec<Option<i64>>,
    /// Partitions that are new here: the client reads them from wherever it likes until they are placed.
    unplaced: BTreeSet<i32>,
    clock: Arc<dyn Clock>,
}

impl KafkaTelemetry {
    /// Returns a reader of the topic; connects by itself, as often as it must.
    pub fn new(config: &Kafka, topic: &str, clock: Arc<dyn Clock>) -> Result<Self, OutsideError> {
        let own = [
            ("group.id", config.group.as_str()),
            ("enable.auto.offset.store", "false"),
            ("auto.commit.interval.ms", "1000"),
            ("auto.offset.reset", "latest"),
            ("session.timeout.ms", "6000"),
            ("heartbeat.interval.ms", "1500"),
            ("partition.assignment.strategy", "cooperative-sticky"),
            ("fetch.wait.max.ms", "100"),
            ("queued.max.messages.kbytes", "16384"),
            // Otherwise a reader that empties a full queue in a tenth of a second waits for the rest of a second.
            ("fetch.queue.backoff.ms", "10"),
            // A partition that is new is found within this.
            ("topic.metadata.refresh.interval.ms", "10000"),
        ];
        let error = |error: KafkaError| OutsideError::new(format!("kafka topic {topic}"), error);
        let consumer: BaseConsumer<_> = client(config, &own)
            .create_with_context(RebalanceContext { topic: topic.into(), ..RebalanceContext::default() })
            .map_err(error)?;
        consumer.subscribe(&[topic]).map_err(error)?;
        Ok(Self { consumer, last: Vec::new(), unplaced: BTreeSet::new(), clock })
    }

    /// Begins each partition that is new here where the group stopped, but not before events that still count.
    fn place(&mut self) -> KafkaResult<()> {
        let topic = &self.consumer.context().topic;
        let (mut times, mut new) = (TopicPartitionList::new(), TopicPartitionList::new());
        let since_ms = self.clock.now().wall.0.saturating_sub(LATE_MS_MAX);
        // Asked before the times: whatever comes between the two questions is read. The word "end" would be taken at its time.
        let mut ends = BTreeMap::new();
        for partition in &self.unplaced {
            times.add_partition_offset(topic, *partition, Offset::Offset(since_ms as i64))?;
            new.add_partition(topic, *partition);
            ends.insert(*partition, self.consumer.fetch_watermarks(topic, *partition, ANSWER_MAX)?.1);
        }
        let by_time = self.consumer.offsets_for_times(times, ANSWER_MAX)?;
        let committed = self.consumer.committed_offsets(new, ANSWER_MAX)?;
        for place in by_time.elements() {
            let (topic, partition) = (place.topic(), place.partition());
            let known = committed.find_partition(topic, partition).map(|known| known.offset());
            let counts = match place.offset() {
                Offset::Offset(counts) => counts,
                _ => ends[&partition],
            };
            let start = Offset::Offset(match known {
                Some(Offset::Offset(committed)) => committed.max(counts),
                _ => counts,
            });
            self.consumer.seek(topic, partition, start, ANSWER_MAX)?;
            info!(topic, partition, offset = ?start, "telemetry partition taken");
        }
        self.unplaced.clear();
        Ok(())
    }
}

impl EventSource for KafkaTelemetry {
    fn poll(&mut self, wait: Duration, take: &mut dyn FnMut(&[&[u8]])) -> Result<usize, OutsideError> {
        let topic = self.consumer.context().topic.clone();
        let error = |error: KafkaError| {
            let hint = match error.rdkafka_error_code() {
                Some(RDKafkaErrorCode::UnknownTopicOrPartition) => "; create it, or name another in [kafka] telemetry",
                _ => "",
            };
            OutsideError::new(format!("kafka topic {topic}"), format!("{error}{hint}"))
        };
        let (mut count, mut messages) = (0, Vec::<BorrowedMessage<'_>>::with_capacity(BATCH_MAX));
        let mut next = self.consumer.poll(wait);
        loop {
            let context = self.consumer.context();
            if let Some(Moves { lost, gained }) = context.take_moves() {
                // What is in hand of a partition that went is its new owner's, who begins where this node has committed.
                messages.retain(|message| !lost.contains(&message.partition()));
                lost.iter().chain(&gained).for_each(|partition| *of(&mut self.last, *partition) = None);
                self.unplaced.retain(|partition| !lost.contains(partition));
                self.unplaced.extend(gained);
            }
            let mut ended = !self.unplaced.is_empty();
            match next {
                None => ended = true,
                Some(Err(why)) if count + messages.len() == 0 => return Err(error(why)),
                // What was read before it counts; it comes again if it lasts.
                Some(Err(_)) => ended = true,
                Some(Ok(message)) if self.unplaced.contains(&message.partition()) => {}
                // Where the client pauses a partition for its rebalancing, it goes on with the record that it was handing over.
                Some(Ok(message)) => {
                    if of(&mut self.last, message.partition()).replace(message.offset()) != Some(message.offset()) {
                        messages.push(message);
                    }
                }
            }
            ended |= count + messages.len() == POLL_MAX;
            if !messages.is_empty() && (ended || messages.len() == BATCH_MAX) {
                let payloads: Vec<&[u8]> =
                    messages.iter().map(|message| message.payload().unwrap_or_default()).collect();
                take(&payloads);
                let mut taken = context.taken();
                // Records of a partition come in runs: what counts is the last of each.
                let mut places = messages.iter().map(|message| (message.partition(), message.offset())).peekable();
                while let Some((partition, offset)) = places.next() {
                    if places.peek().is_none_or(|(next, _)| *next != partition) {
                        taken.insert(partition, offset);
                    }
                }
                count += messages.len();
                messages.clear();
            }
            if ended {
                break;
            }
            next = self.consumer.poll(Duration::ZERO);
        }
        self.consumer.context().store(&self.consumer);
        if !self.unplaced.is_empty()
            && let Err(why) = self.place()
            && count == 0
        {
            return Err(error(why));
        }
        Ok(count)
    }
}
