//! The queue of records, and the thread that writes them.

use std::fmt;
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::time::Duration;

use metrics::Counter;
use tokio::sync::oneshot;
use tokio::time::Instant;
use tracing::warn;

use crate::domain::weights::Weight;
use crate::entropy;

use super::line::{AccessLogFormat, AccessRecord};

/// Records that may wait to be written.
const QUEUE_MAX: usize = 8192;
/// Bytes of lines that are gathered before they are written.
const GATHERED_BYTES_MAX: usize = 64 * 1024;
/// Shortest time between two warnings.
const SAID_EVERY: Duration = Duration::from_secs(1);
/// Pause between two tries to end the queue.
const TRY_AGAIN: Duration = Duration::from_millis(10);

/// Where requests are logged. Clones share it; the default is no log.
#[derive(Clone, Default)]
pub struct AccessLog(Option<Arc<OpenLog>>);

/// A log that is written.
struct OpenLog {
    queue: SyncSender<QueuedMessage>,
    sample: Weight,
    dropped: Arc<AtomicU64>,
    counter: Counter,
}

/// What the writing thread gets.
enum QueuedMessage {
    Record(Box<AccessRecord>),
    /// Tells once everything before it is written.
    Flush(oneshot::Sender<()>),
}

impl fmt::Debug for AccessLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("AccessLog").field(&self.0.as_ref().map(|open| open.sample)).finish()
    }
}

impl AccessLog {
    /// Starts a log of this share of all requests, whose lines go to `out`.
    ///
    /// # Errors
    /// When the system starts no thread.
    pub fn start(out: impl Write + Send + 'static, format: AccessLogFormat, sample: Weight) -> std::io::Result<Self> {
        let (queue, received) = sync_channel(QUEUE_MAX);
        let dropped = Arc::<AtomicU64>::default();
        let counter = metrics::counter!("aviary_access_log_dropped_total");
        let mut writer = LogWriter { out, format, dropped: dropped.clone(), said: None, told: 0 };
        std::thread::Builder::new().name("access-log".into()).spawn(move || writer.run(&received))?;
        Ok(Self(Some(Arc::new(OpenLog { queue, sample, dropped, counter }))))
    }

    /// Returns true when there is a log.
    pub fn is_on(&self) -> bool {
        self.0.is_some()
    }

    /// Draws whether a request is logged.
    pub fn draws(&self) -> bool {
        let sample = self.0.as_ref().map_or(0, |open| open.sample.bp());
        sample == Weight::WHOLE || sample > 0 && entropy::within(0..Weight::WHOLE) < sample
    }

    /// Puts a record into the queue, unless that is full.
    pub fn put(&self, record: Box<AccessRecord>) {
        let Some(open) = &self.0 else { return };
        if let Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) =
            open.queue.try_send(QueuedMessage::Record(record))
        {
            open.dropped.fetch_add(1, Relaxed);
            open.counter.increment(1);
        }
    }

    /// Waits until what was logged so far is written, `limit` at most.
    pub async fn flush(&self, limit: Duration) {
        let Some(open) = &self.0 else { return };
        let (done, written) = oneshot::channel();
        let mut message = QueuedMessage::Flush(done);
        let flushed = async {
            while let Err(TrySendError::Full(back)) = open.queue.try_send(message) {
                message = back;
                tokio::time::sleep(TRY_AGAIN).await;
            }
            // A writer that has ended writes nothing more.
            let _ = written.await;
        };
        let _ = tokio::time::timeout(limit, flushed).await;
    }
}

/// The thread that writes.
struct LogWriter<W> {
    out: W,
    format: AccessLogFormat,
    dropped: Arc<AtomicU64>,
    /// When the last warning was, and how many dropped records it told.
    said: Option<Instant>,
    told: u64,
}

impl<W: Write> LogWriter<W> {
    /// Writes until no log sends any more.
    fn run(&mut self, queue: &Receiver<QueuedMessage>) {
        let mut lines = Vec::new();
        while let Ok(first) = queue.recv() {
            let (mut next, mut flushed) = (Some(first), Vec::new());
            while let Some(message) = next {
                match message {
                    QueuedMessage::Record(record) => record.put(self.format, &mut lines),
                    QueuedMessage::Flush(done) => flushed.push(done),
                }
                next = if lines.len() < GATHERED_BYTES_MAX { queue.try_recv().ok() } else { None };
            }
            self.write(&mut lines);
            for done in flushed {
                // Who asked may have stopped waiting.
                let _ = done.send(());
            }
        }
    }

    /// Writes whole lines: the file may be another one at the next call.
    fn write(&mut self, lines: &mut Vec<u8>) {
        let written = self.out.write_all(lines).and_then(|()| self.out.flush());
        lines.clear();
        let dropped = self.dropped.load(Relaxed);
        if (written.is_ok() && dropped == self.told) || self.said.is_some_and(|said| said.elapsed() < SAID_EVERY) {
            return;
        }
        self.said = Some(Instant::now());
        if let Err(error) = written {
            warn!(%error, "the access log can't be written: lines are lost");
        }
        if dropped > self.told {
            warn!(
                count = dropped - self.told,
                "requests are not in the access log: it is written more slowly than they come"
            );
            self.told = dropped;
        }
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
