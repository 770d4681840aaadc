//! The connections to one server: each request takes a place on one of them, and waits while there is none.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Waker};

use bytes::Bytes;
use h2::SendStream;
use h2::client::{ResponseFuture, SendRequest};
use http::Request;
use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::proxy::failure::{ConnectFailure, StreamFailure};
use crate::proxy::upstream::Server;

use super::connection::{Leave, Link, drive, open};
use super::limits::{PoolLimits, STREAMS_MAX};

type Waiter = oneshot::Sender<Result<StreamPlace, ConnectFailure>>;

/// The connections to one server.
pub struct Connections {
    server: Arc<Server>,
    limits: PoolLimits,
    state: Mutex<PoolState>,
}

struct PoolState {
    /// Connections that take requests, oldest first.
    open: Vec<Entry>,
    /// Connections that are being made.
    dialing: usize,
    /// Streams that the server takes on a connection, as far as is known.
    expected: usize,
    /// Requests without a place, in the order in which they came.
    waiting: VecDeque<Waiter>,
}

struct Entry {
    sender: SendRequest<Bytes>,
    link: Arc<Link>,
    /// How often the server had left an address when this connection was made.
    moves: u32,
}

impl Entry {
    fn has_room(&self) -> bool {
        self.link.streams() < self.link.limit()
    }

    /// Returns false once the server said that it takes no more requests, or the connection ended.
    fn is_open(&mut self) -> bool {
        !matches!(self.sender.poll_ready(&mut Context::from_waker(Waker::noop())), std::task::Poll::Ready(Err(_)))
    }
}

/// A request's place on a connection. Dropping it gives the place back.
pub struct StreamPlace {
    sender: SendRequest<Bytes>,
    link: Arc<Link>,
    home: Arc<Connections>,
    reused: bool,
}

/// A request that waits for its answer. To drop it meanwhile says that it was given up.
pub struct AnswerWait<'p> {
    place: &'p StreamPlace,
    since: Instant,
    ended: bool,
}

impl Connections {
    /// Returns what connects to a server when it is asked to.
    pub fn new(server: Arc<Server>, limits: PoolLimits) -> Self {
        let state = PoolState { open: Vec::new(), dialing: 0, expected: STREAMS_MAX, waiting: VecDeque::new() };
        Self { server, limits, state: Mutex::new(state) }
    }

    fn state(&self) -> MutexGuard<'_, PoolState> {
        self.state.lock().expect("nothing panics while it holds the connections")
    }

    /// Returns a place for a request, on a connection that has one or on another.
    pub async fn place(self: &Arc<Self>) -> Result<StreamPlace, ConnectFailure> {
        let told = {
            let mut state = self.state();
            if let Some(place) = self.take(&mut state) {
                return Ok(place);
            }
            let (waiter, told) = oneshot::channel();
            state.waiting.push_back(waiter);
            self.dial_for_waiting(&mut state);
            told
        };
        told.await.unwrap_or_else(|_| Err(ConnectFailure::Refused("the proxy is stopping".into())))
    }

    fn take(self: &Arc<Self>, state: &mut PoolState) -> Option<StreamPlace> {
        // One that ended is noticed here first: an error of its own would follow. One that was made before the server moved may
        // lead to where it was.
        let moves = self.server.addresses.moves();
        state.open.retain_mut(|entry| entry.moves == moves && entry.is_open());
        let entry = state.open.iter().find(|entry| entry.has_room())?;
        entry.link.take();
        let (sender, link) = (entry.sender.clone(), entry.link.clone());
        let reused = link.has_served();
        Some(StreamPlace { sender, link, home: self.clone(), reused })
    }

    /// Makes as many connections as those that wait need, given what the server took so far.
    fn dial_for_waiting(self: &Arc<Self>, state: &mut PoolState) {
        state.waiting.retain(|waiter| !waiter.is_closed());
        // A server that takes no streams now would take none on another connection either.
        if state.open.iter().any(|entry| entry.link.limit() == 0) {
            return;
        }
        while state.dialing * state.expected < state.waiting.len() {
            state.dialing += 1;
            let home = self.clone();
            tokio::spawn(async move { home.dial().await });
        }
    }

    /// Makes a connection, and lets it run to its end.
    async fn dial(self: Arc<Self>) {
        let moves = self.server.addresses.moves();
        let (sender, connection, link) = match open(&self.server, &self.limits).await {
            Ok(made) => made,
            Err(failure) => {
                self.state().dialing -= 1;
                return self.refuse_waiting(&failure);
            }
        };
        {
            let mut state = self.state();
            state.dialing -= 1;
            if link.limit() > 0 {
                state.expected = link.limit();
            }
            state.open.push(Entry { sender, link: link.clone(), moves });
        }
        self.serve_waiting();
        let close = |why| self.close(&link, why);
        drive(connection, &link, &self.limits, close, || self.serve_waiting()).await;
        self.ended(&link);
    }

    /// Tells those that wait that there is no connection, unless there are others.
    fn refuse_waiting(&self, failure: &ConnectFailure) {
        let waiting = {
            let mut state = self.state();
            if state.dialing > 0 || !state.open.is_empty() {
                return;
            }
            std::mem::take(&mut state.waiting)
        };
        for waiter in waiting {
            let _ = waiter.send(Err(failure.clone()));
        }
    }

    /// Gives places to those that wait, and connects anew for the rest.
    fn serve_waiting(self: &Arc<Self>) {
        loop {
            let (waiter, place) = {
                let mut state = self.state();
                state.waiting.retain(|waiter| !waiter.is_closed());
                if state.waiting.is_empty() {
                    return;
                }
                let Some(place) = self.take(&mut state) else { return self.dial_for_waiting(&mut state) };
                (state.waiting.pop_front(), place)
            };
            // Outside of the lock: a place that nobody takes any more is given back.
            if let Some(waiter) = waiter {
                drop(waiter.send(Ok(place)));
            }
        }
    }

    /// Takes a connection out of the pool; returns false if it is not idle any more.
    fn close(&self, link: &Arc<Link>, why: Leave) -> bool {
        let mut state = self.state();
        if why == Leave::Idle && link.streams() > 0 {
            return false;
        }
        state.open.retain(|entry| !Arc::ptr_eq(&entry.link, link));
        true
    }

    fn ended(self: &Arc<Self>, link: &Arc<Link>) {
        self.close(link, Leave::Old);
        if link.has_served() {
            return self.serve_waiting();
        }
        // Another one would most likely end as soon: those that wait are told.
        self.refuse_waiting(&ConnectFailure::Refused(link.ended_why().unwrap_or_default()));
    }
}

impl StreamPlace {
    /// Begins the request's stream.
    pub fn open(
        &mut self,
        head: Request<()>,
        complete: bool,
    ) -> Result<(ResponseFuture, SendStream<Bytes>), StreamFailure> {
        self.sender.send_request(head, complete).map_err(|error| match error.reason().is_some() || error.is_io() {
            true => StreamFailure::NotProcessed(format!("the connection had ended: {error}")),
            false => StreamFailure::Broken(format!("the request can't be sent by HTTP/2: {error}")),
        })
    }

    /// Begins to wait for the answer.
    pub fn wait(&self) -> AnswerWait<'_> {
        AnswerWait { place: self, since: Instant::now(), ended: false }
    }

    /// Says that the server answered.
    pub fn served(&self) {
        self.link.served();
    }

    /// Says that the request was given up that was under way since then. A connection on which nothing came for as long as
    /// the answer to a PING may take is trusted with no more.
    pub fn given_up(&self, since: Instant) {
        if self.link.last_read().max(since).elapsed() >= self.home.limits.ping_timeout {
            self.retire();
        }
    }

    /// Returns true if the connection had answered another request before.
    pub fn is_reused(&self) -> bool {
        self.reused
    }

    /// Returns why the connection ended, once it has.
    pub fn ended_why(&self) -> Option<String> {
        self.link.ended_why()
    }

    /// Lets the connection take no more requests.
    fn retire(&self) {
        self.home.close(&self.link, Leave::Old);
    }
}

impl Drop for StreamPlace {
    fn drop(&mut self) {
        self.link.give_back();
        self.home.serve_waiting();
    }
}

impl<'p> AnswerWait<'p> {
    /// Returns the place of the request.
    pub fn place(&self) -> &'p StreamPlace {
        self.place
    }

    /// Says that the answer, or a failure, came.
    pub fn ended(&mut self) {
        self.ended = true;
    }
}

impl Drop for AnswerWait<'_> {
    fn drop(&mut self) {
        if self.ended {
            return;
        }
        if self.since.elapsed() >= self.place.home.limits.first_byte {
            return self.place.retire();
        }
        self.place.given_up(self.since);
    }
}
