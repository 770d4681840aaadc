//! What waits to be sent to one peer.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use crate::protocol::message::Message;

/// A bounded queue that forgets what grew stale and, when it is still full, drops the newest: what is sent is then a
/// beginning without gaps, which is what a peer that catches up can use.
pub(super) struct Outbox {
    queue: Mutex<VecDeque<(Instant, Message)>>,
    filled: Notify,
    dropped: AtomicU64,
    most: usize,
    stale: Duration,
}

impl Outbox {
    pub(super) fn new(most: usize, stale: Duration) -> Self {
        Self { queue: Mutex::default(), filled: Notify::new(), dropped: AtomicU64::new(0), most, stale }
    }

    /// Adds a message, or drops and counts it.
    pub(super) fn push(&self, message: Message) {
        let now = Instant::now();
        let mut queue = self.lock();
        self.forget_stale(&mut queue, now);
        if queue.len() >= self.most {
            self.dropped.fetch_add(1, Ordering::Relaxed);
            return;
        }
        queue.push_back((now, message));
        drop(queue);
        self.filled.notify_one();
    }

    /// Takes everything that is still worth sending.
    pub(super) fn take(&self) -> VecDeque<(Instant, Message)> {
        let mut queue = self.lock();
        self.forget_stale(&mut queue, Instant::now());
        std::mem::take(&mut *queue)
    }

    /// Waits until something was added since the last wait ended.
    pub(super) async fn filled(&self) {
        self.filled.notified().await;
    }

    pub(super) fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    fn forget_stale(&self, queue: &mut VecDeque<(Instant, Message)>, now: Instant) {
        while queue.front().is_some_and(|(since, _)| now.duration_since(*since) >= self.stale) {
            queue.pop_front();
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, VecDeque<(Instant, Message)>> {
        self.queue.lock().expect("nothing panics while it holds the queue")
    }
}
