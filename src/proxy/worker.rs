//! A worker: one thread's connections, buffers, kept upstream connections and deadlines. Nothing here is shared.

use std::cell::{Cell, Ref, RefCell, RefMut};
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Poll, Waker};
use std::time::{Duration, SystemTime};

use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;

use super::answer::{self, OwnAnswer};
use super::deadline::{Deadline, DeadlineClock, SWEEP};
use super::pool::{Http2Pool, PoolLimits};
use super::request::Protocol;
use super::settings::ProxySettings;
use super::table::{RoutingTable, Table};
use super::wire::ResponseFields;

/// Bytes read at a time.
const SCRATCH_BYTES: usize = 64 * 1024;
/// Buffers kept for later, and the largest that is.
const SPARE_MAX: usize = 64;
const SPARE_BYTES_MAX: usize = 64 * 1024;

/// How far the proxy's stop has come, in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum StopStage {
    /// It serves.
    Serving,
    /// It says that it is not ready, and still serves what comes (`drain_ms`). Each connection's next answer is its last, so that
    /// clients are elsewhere when the port closes.
    Draining,
    /// The port is closed, and no connection takes another request, except the first of one that just connected.
    Stopping,
}

/// One thread's share of the data plane.
pub struct Worker {
    /// Routing table and settings that all workers share.
    pub router: Arc<RoutingTable>,
    /// Index of the worker's own shard of the counters.
    pub shard: usize,
    /// Connections to `h2c://` servers.
    pub http2: Http2Pool,
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

/// An upstream's connection, until when it is kept, and when it is too old for another request.
struct Kept {
    stream: TcpStream,
    until_ms: u64,
    life_ends_ms: u64,
}

impl Worker {
    /// Returns the worker that counts in this shard.
    pub fn new(router: Arc<RoutingTable>, shard: usize) -> Rc<Self> {
        let http2 = Http2Pool::new(PoolLimits::of(&router.settings));
        let table = (router.node.published.number(), router.table());
        Rc::new(Self {
            shard,
            http2,
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
        self.clock.wake_all();
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
        self.clock.sweep(now_ms);
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
        self.clock.deadline().await
    }

    /// Returns the time in milliseconds, as of the last sweep.
    pub fn now_ms(&self) -> u64 {
        self.clock.now_ms()
    }

    /// Returns the limits in force.
    pub fn settings(&self) -> &ProxySettings {
        &self.router.settings
    }

    /// Returns how far the stop has come.
    pub fn stop_stage(&self) -> StopStage {
        match self.stopping.get() {
            true => StopStage::Stopping,
            false if self.router.node.published.is_leaving() => StopStage::Draining,
            false => StopStage::Serving,
        }
    }

    /// Returns true once no connection should take another request.
    pub fn is_stopping(&self) -> bool {
        self.stop_stage() == StopStage::Stopping
    }

    /// Returns true once an answer says that it is the last of its connection.
    pub fn ends_connections(&self) -> bool {
        self.stop_stage() >= StopStage::Draining
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

    /// Returns a server's connection that served before, and that the server has not closed, with the time at which it is too
    /// old for another request.
    pub fn kept(&self, server: usize) -> Option<(TcpStream, u64)> {
        let mut all = self.kept.borrow_mut();
        let kept = all.get_mut(server)?;
        let now_ms = self.clock.now_ms();
        while let Some(Kept { stream, life_ends_ms, .. }) = kept.pop() {
            if now_ms >= life_ends_ms {
                continue;
            }
            // Costs no system call unless something came, and nothing should have.
            match stream.try_read(&mut [0; 1]) {
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return Some((stream, life_ends_ms)),
                _ => {}
            }
        }
        None
    }

    /// Returns when a connection that is made now is too old for another request: its server's name may mean another address
    /// by then.
    pub fn life_ends_ms(&self) -> u64 {
        self.clock.now_ms().saturating_add(self.settings().upstream_life_ms)
    }

    /// Keeps a connection for the next request, until `life_ends_ms` at the latest.
    pub fn keep(&self, server: usize, stream: TcpStream, life_ends_ms: u64) {
        let mut all = self.kept.borrow_mut();
        if all.len() <= server {
            all.resize_with(server + 1, Vec::new);
        }
        let until_ms = self.clock.now_ms() + self.settings().upstream_keep_alive_ms;
        all[server].push(Kept { stream, until_ms, life_ends_ms });
    }

    /// Returns the time of day, as a Date field has it.
    pub fn date(&self) -> Ref<'_, str> {
        Ref::map(self.date.borrow(), |(_, date)| date.as_str())
    }

    /// Sends an answer of this node's own to an HTTP/1.x client; `lines` say who should have served.
    pub async fn say<S: AsyncWrite + Unpin>(&self, stream: &mut S, answer: &OwnAnswer, how: Saying<'_>) {
        let mut out = self.buffer();
        let date = self.date().to_string();
        let Saying { lines, is_head, close, protocol } = how;
        answer::write(answer, is_head, ResponseFields { lines, date: date.as_bytes(), close, protocol }, &mut out);
        // A client that doesn't take it in time doesn't want it.
        let _ = tokio::time::timeout(Duration::from_secs(5), stream.write_all(&out)).await;
        self.give_back(out);
    }
}

/// How an answer of this node's own is sent.
#[derive(Debug, Clone, Copy)]
pub struct Saying<'m> {
    /// Whole header lines that say who should have served.
    pub lines: &'m [u8],
    /// The request was HEAD: no body follows.
    pub is_head: bool,
    /// Nothing more is taken from this client.
    pub close: bool,
    /// Protocol of the client.
    pub protocol: Protocol,
}
