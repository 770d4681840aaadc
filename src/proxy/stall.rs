//! Requests that wait for their own clients: they make room when there is no place for another request.
//!
//! A client that takes nothing, or doesn't send what it announced, holds a request's place until a deadline that slow networks need.
//! While places are plenty that harms nobody, and is not looked at.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use tokio::time::Instant;

/// How long a client may always be waited for.
const PATIENCE: Duration = Duration::from_millis(50);

/// Says whether a request waits for its client, and since when.
type WaitingSince = Box<dyn Fn() -> Option<Instant> + Send + Sync>;

/// The requests that may be waiting for their clients, in the order in which they began to.
#[derive(Clone, Default)]
pub struct StalledRequests {
    next: Arc<AtomicU64>,
    all: Arc<Mutex<BTreeMap<u64, Arc<StallEntry>>>>,
}

struct StallEntry {
    since: WaitingSince,
    is_evicted: AtomicBool,
    waker: Mutex<Waker>,
}

impl StalledRequests {
    fn all(&self) -> MutexGuard<'_, BTreeMap<u64, Arc<StallEntry>>> {
        self.all.lock().expect("nothing panics while it holds the requests")
    }

    /// Adds a request that waits for its client from now on.
    pub fn waits(&self) -> StalledRequest {
        let now = Instant::now();
        self.may_wait(Box::new(move || Some(now)))
    }

    /// Adds a request that waits for its client whenever `since` says so.
    pub fn may_wait(&self, since: WaitingSince) -> StalledRequest {
        let waker = Mutex::new(Waker::noop().clone());
        let entry = Arc::new(StallEntry { since, is_evicted: AtomicBool::new(false), waker });
        let id = self.next.fetch_add(1, Relaxed);
        self.all().insert(id, entry.clone());
        StalledRequest { requests: self.clone(), id, entry }
    }

    /// Ends the request that began first of those that wait for their clients; returns false when there is none.
    pub fn evict(&self) -> bool {
        let mut all = self.all();
        let waits = |entry: &StallEntry| (entry.since)().is_some_and(|since| since.elapsed() >= PATIENCE);
        let Some(id) = all.iter().find(|(_, entry)| waits(entry)).map(|(id, _)| *id) else { return false };
        let entry = all.remove(&id).expect("it was found");
        drop(all);
        entry.is_evicted.store(true, Relaxed);
        entry.waker.lock().expect("waking doesn't panic").wake_by_ref();
        true
    }
}

/// A request among those that may be waiting for their clients, until it is dropped.
pub struct StalledRequest {
    requests: StalledRequests,
    id: u64,
    entry: Arc<StallEntry>,
}

impl StalledRequest {
    /// Returns once the request is to make room.
    pub fn poll_evicted(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut waker = self.entry.waker.lock().expect("waking doesn't panic");
        if !waker.will_wake(cx.waker()) {
            waker.clone_from(cx.waker());
        }
        // Under the lock, so that no eviction falls between.
        if self.entry.is_evicted.load(Relaxed) { Poll::Ready(()) } else { Poll::Pending }
    }
}

impl Drop for StalledRequest {
    fn drop(&mut self) {
        self.requests.all().remove(&self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_longest_waiting_request_makes_room() {
        let requests = StalledRequests::default();
        let moving = requests.may_wait(Box::new(|| None));
        let first = requests.waits();
        let second = requests.waits();
        let is_evicted = |one: &StalledRequest| one.poll_evicted(&mut Context::from_waker(Waker::noop())).is_ready();
        assert!(!requests.evict(), "a client is waited for that long in any case");
        tokio::time::sleep(PATIENCE).await;
        assert!(requests.evict());
        assert_eq!([&moving, &first, &second].map(is_evicted), [false, true, false]);
        drop(second);
        assert!(!requests.evict());
    }
}
