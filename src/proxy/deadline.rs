//! Deadlines that cost nothing to set: a worker looks at all of its own every few milliseconds.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::task::{Poll, Waker};
use std::time::Duration;

use slab::Slab;

/// How often deadlines are looked at.
pub const SWEEP: Duration = Duration::from_millis(50);

/// The deadlines of a worker's connections.
#[derive(Default)]
pub struct DeadlineClock {
    /// Milliseconds, as of the last sweep.
    now_ms: Cell<u64>,
    deadlines: RefCell<Slab<Rc<DeadlineEntry>>>,
}

struct DeadlineEntry {
    at_ms: Cell<u64>,
    waker: Waker,
}

/// A connection's deadline; to set it costs nothing. Dropping it ends it.
pub struct Deadline {
    clock: Rc<DeadlineClock>,
    key: usize,
    deadline: Rc<DeadlineEntry>,
    /// No deadline is later than this.
    end_ms: Cell<u64>,
}

const RESTING: u64 = u64::MAX;

impl DeadlineClock {
    /// Returns the milliseconds as of the last sweep.
    pub fn now_ms(&self) -> u64 {
        self.now_ms.get()
    }

    /// Sets the time, and wakes those whose deadline passed.
    pub fn sweep(&self, now_ms: u64) {
        self.now_ms.set(now_ms);
        for (_, deadline) in self.deadlines.borrow().iter() {
            if deadline.at_ms.get() <= now_ms {
                deadline.waker.wake_by_ref();
            }
        }
    }

    /// Wakes everybody.
    pub fn wake_all(&self) {
        self.deadlines.borrow().iter().for_each(|(_, deadline)| deadline.waker.wake_by_ref());
    }

    /// Returns a deadline for the task that asks.
    pub async fn deadline(self: &Rc<Self>) -> Deadline {
        let waker = std::future::poll_fn(|cx| Poll::Ready(cx.waker().clone())).await;
        let deadline = Rc::new(DeadlineEntry { at_ms: Cell::new(RESTING), waker });
        let key = self.deadlines.borrow_mut().insert(deadline.clone());
        Deadline { clock: self.clone(), key, deadline, end_ms: Cell::new(RESTING) }
    }
}

impl Deadline {
    /// Removes the deadline: the connection may take any time now.
    pub fn rest(&self) {
        self.deadline.at_ms.set(RESTING);
    }

    /// Returns true without a deadline.
    pub fn is_resting(&self) -> bool {
        self.deadline.at_ms.get() == RESTING
    }

    /// Wakes the connection after `ms` milliseconds, and at most [`SWEEP`] later.
    pub fn set(&self, ms: u64) {
        let at = self.clock.now_ms.get().saturating_add(ms);
        self.deadline.at_ms.set(at.min(self.end_ms.get()).min(RESTING - 1));
    }

    /// Does so unless there is a deadline.
    pub fn set_if_resting(&self, ms: u64) {
        if self.is_resting() {
            self.set(ms);
        }
    }

    /// Bounds all deadlines from now on; none: no more.
    pub fn set_end(&self, ms: Option<u64>) {
        self.end_ms.set(ms.map_or(RESTING, |ms| self.clock.now_ms.get().saturating_add(ms)));
    }

    /// Returns true once the deadline passed.
    pub fn is_over(&self) -> bool {
        self.deadline.at_ms.get() <= self.clock.now_ms.get()
    }
}

impl Drop for Deadline {
    fn drop(&mut self) {
        self.clock.deadlines.borrow_mut().remove(self.key);
    }
}
