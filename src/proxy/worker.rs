//! A worker: one thread's connections, buffers, kept upstream connections and deadlines. Nothing here is shared.

use std::cell::{Cell, Ref, RefCell, RefMut};
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Poll, Waker};
use std::time::{Duration, SystemTime};

use serde_json::json;
use slab::Slab;
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;

use super::forward::SlowPath;
use super::settings::ProxySettings;
use super::table::{RoutingTable, Table};

/// Bytes read at a time.
const SCRATCH_BYTES: usize = 64 * 1024;
/// Buffers kept for later, and the largest that is.
const SPARE_MAX: usize = 64;
const SPARE_BYTES_MAX: usize = 64 * 1024;
/// How often deadlines are looked at.
const SWEEP: Duration = Duration::from_millis(50);

/// One thread's share of the data plane.
pub struct Worker {
    /// Routing table and settings that all workers share.
    pub router: Arc<RoutingTable>,
    /// Index of the worker's own shard of the counters.
    pub shard: usize,
    /// What carries the requests that are not plain.
    pub general: SlowPath,
    table: RefCell<(u64, Arc<Table>)>,
    kept: RefCell<Vec<Vec<Kept>>>,
    scratch: RefCell<Box<[u8]>>,
    spare: RefCell<Vec<Vec<u8>>>,
    date: RefCell<(u64, String)>,
    clock: Rc<DeadlineClock>,
    stopping: Cell<bool>,
    pulse: Pulse,
}

/// That something was read, for who polls instead of sleeping.
#[derive(Default)]
struct Pulse {
    reads: Cell<u64>,
    waker: Cell<Option<Waker>>,
}

/// An upstream's connection, and until when it is kept.
struct Kept {
    stream: TcpStream,
    until_ms: u64,
}

/// The deadlines of a worker's connections.
#[derive(Default)]
struct DeadlineClock {
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

impl Worker {
    /// Returns the worker that counts in this shard.
    pub fn new(router: Arc<RoutingTable>, shard: usize) -> Rc<Self> {
        let general = SlowPath::new(router.clone(), shard);
        let table = (router.node.published.number(), router.table());
        Rc::new(Self {
            shard,
            general,
            table: RefCell::new(table),
            kept: RefCell::default(),
            scratch: RefCell::new(vec![0; SCRATCH_BYTES].into()),
            spare: RefCell::default(),
            date: RefCell::default(),
            clock: Rc::default(),
            stopping: Cell::new(false),
            pulse: Pulse::default(),
            router,
        })
    }

    /// Starts the tasks that look at deadlines and poll busily, until they are aborted.
    pub fn tend(self: &Rc<Self>) -> [JoinHandle<()>; 2] {
        self.sweep();
        let sweeping = self.clone();
        let sweeper = tokio::task::spawn_local(async move {
            let mut tick = tokio::time::interval(SWEEP);
            tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
            loop {
                tick.tick().await;
                sweeping.sweep();
            }
        });
        [sweeper, tokio::task::spawn_local(self.clone().poll_busily())]
    }

    /// Lets no connection take another request, and wakes all of them to see that.
    pub fn stop(&self) {
        self.stopping.set(true);
        self.clock.deadlines.borrow().iter().for_each(|(_, deadline)| deadline.waker.wake_by_ref());
    }

    /// Keeps the thread awake for `busy_poll_us` after each read: what comes then needn't wake it.
    async fn poll_busily(self: Rc<Self>) {
        let (clock, budget) = (self.router.node.published.clock(), self.settings().busy_poll_us);
        if budget == 0 {
            return;
        }
        let (mut seen, mut until) = (0, 0);
        loop {
            let (reads, now) = (self.pulse.reads.get(), clock.now().mono.0);
            if reads != seen {
                (seen, until) = (reads, now + budget);
            }
            if now < until {
                // The runtime looks for events, without waiting, before it runs this again.
                tokio::task::yield_now().await;
            } else {
                std::future::poll_fn(|cx| {
                    if self.pulse.reads.get() != seen {
                        return Poll::Ready(());
                    }
                    self.pulse.waker.set(Some(cx.waker().clone()));
                    Poll::Pending
                })
                .await;
            }
        }
    }

    /// Looks at the time: wakes who waited too long, forgets old connections.
    fn sweep(&self) {
        let now = self.router.node.published.clock().now();
        let now_ms = now.mono.0 / 1000;
        self.clock.now_ms.set(now_ms);
        for (_, deadline) in self.clock.deadlines.borrow().iter() {
            if deadline.at_ms.get() <= now_ms {
                deadline.waker.wake_by_ref();
            }
        }
        for kept in self.kept.borrow_mut().iter_mut() {
            kept.retain(|kept| kept.until_ms > now_ms);
        }
        let second = now.wall.0 / 1000;
        if self.date.borrow().0 != second {
            let time = SystemTime::UNIX_EPOCH + Duration::from_secs(second);
            *self.date.borrow_mut() = (second, httpdate::fmt_http_date(time));
        }
    }

    /// Returns a deadline for the task that asks.
    pub async fn watch(&self) -> Deadline {
        let waker = std::future::poll_fn(|cx| Poll::Ready(cx.waker().clone())).await;
        let deadline = Rc::new(DeadlineEntry { at_ms: Cell::new(RESTING), waker });
        let key = self.clock.deadlines.borrow_mut().insert(deadline.clone());
        Deadline { clock: self.clock.clone(), key, deadline, end_ms: Cell::new(RESTING) }
    }

    /// Returns the limits in force.
    pub fn settings(&self) -> &ProxySettings {
        &self.router.settings
    }

    /// Returns true once no connection should take another request.
    pub fn is_stopping(&self) -> bool {
        self.stopping.get()
    }

    /// Returns the table of the view in force: one atomic load while that stays the same.
    pub fn table(&self) -> Ref<'_, Table> {
        let number = self.router.node.published.number();
        if self.table.borrow().0 != number {
            *self.table.borrow_mut() = (number, self.router.table());
        }
        Ref::map(self.table.borrow(), |(_, table)| &**table)
    }

    /// Returns room to read into, for as long as nothing is waited for.
    pub fn scratch(&self) -> RefMut<'_, [u8]> {
        self.pulse.reads.set(self.pulse.reads.get().wrapping_add(1));
        if let Some(waker) = self.pulse.waker.take() {
            waker.wake();
        }
        RefMut::map(self.scratch.borrow_mut(), |scratch| &mut scratch[..])
    }

    /// Returns an empty buffer, a used one if there is any.
    pub fn buffer(&self) -> Vec<u8> {
        self.spare.borrow_mut().pop().unwrap_or_default()
    }

    /// Keeps a buffer for the next call of `buffer`.
    pub fn give_back(&self, mut buffer: Vec<u8>) {
        let mut spare = self.spare.borrow_mut();
        if spare.len() < SPARE_MAX && (1..=SPARE_BYTES_MAX).contains(&buffer.capacity()) {
            buffer.clear();
            spare.push(buffer);
        }
    }

    /// Returns a server's connection that served before, and that the server has not closed.
    pub fn kept(&self, server: usize) -> Option<TcpStream> {
        let mut all = self.kept.borrow_mut();
        let kept = all.get_mut(server)?;
        while let Some(Kept { stream, .. }) = kept.pop() {
            // Costs no system call unless something came, and nothing should have.
            match stream.try_read(&mut [0; 1]) {
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return Some(stream),
                _ => {}
            }
        }
        None
    }

    /// Keeps a connection for the next request.
    pub fn keep(&self, server: usize, stream: TcpStream) {
        let mut all = self.kept.borrow_mut();
        if all.len() <= server {
            all.resize_with(server + 1, Vec::new);
        }
        let until_ms = self.clock.now_ms.get() + self.settings().upstream_keep_alive_ms;
        all[server].push(Kept { stream, until_ms });
    }

    /// Returns the time of day, as a Date field has it.
    pub fn date(&self) -> Ref<'_, str> {
        Ref::map(self.date.borrow(), |(_, date)| date.as_str())
    }

    /// Sends an answer of this node's own; `mark` says who should have served.
    pub async fn say<S: AsyncWrite + Unpin>(&self, stream: &mut S, status: u16, why: &str, mark: &[u8], close: bool) {
        let reason = http::StatusCode::from_u16(status).ok().and_then(|status| status.canonical_reason());
        let body = json!({"error": why}).to_string();
        let mut out = self.buffer();
        let head = format!("HTTP/1.1 {status} {}\r\ncontent-type: application/json\r\n", reason.unwrap_or(""));
        out.extend_from_slice(head.as_bytes());
        out.extend_from_slice(mark);
        let close = if close { "connection: close\r\n" } else { "" };
        let rest = format!("date: {}\r\n{close}content-length: {}\r\n\r\n{body}", self.date(), body.len());
        out.extend_from_slice(rest.as_bytes());
        // A client that doesn't take it in time doesn't want it.
        let _ = tokio::time::timeout(Duration::from_secs(5), stream.write_all(&out)).await;
        self.give_back(out);
    }
}
