//! A request at one server: its bytes on their way there, and the answer's on their way back.

use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;

use crate::proxy::body::{BadMessage, BodyFraming, Keep, put_chunk};
use crate::proxy::client::{Client, poll_read};
use crate::proxy::deadline::Deadline;
use crate::proxy::dispose::Routed;
use crate::proxy::policy;
use crate::proxy::request::Protocol;
use crate::proxy::stay::{CanaryStay, during, may_go};
use crate::proxy::upstream::{InFlightGuard, Pool};
use crate::proxy::wire::{self, Delivery, ResponseFields, Room};
use crate::proxy::worker::Worker;

use super::request::{FastFailure, FastRequest, count};

/// Bytes of further requests that are read while one is under way.
const AHEAD_BYTES_MAX: usize = 16 * 1024;

const CUT: BadMessage = BadMessage { status: 408, why: "the request's body broke off" };
const STOPPED: BadMessage = BadMessage { status: 408, why: "the request's body stopped coming" };

/// How an exchange ended whose answer had begun.
enum ExchangeEnd {
    /// Everything is with the client.
    Complete,
    /// The upstream ended the connection before its answer's end.
    Cut,
    /// The client went away, or never read.
    Gone,
    /// The canary lost its share, and its grace is over.
    Overstayed,
}

/// What becomes of the client's connection after a request.
pub enum AfterAnswer {
    /// It takes the next request.
    Stays,
    /// It ends.
    Ends,
    /// Both sides speak another protocol on it.
    Switched(TcpStream),
}

/// Tries one server: an error when no answer began. A request that is repeated gets a connection that served nothing before.
pub async fn attempt<S>(
    worker: &Rc<Worker>,
    watch: &Deadline,
    client: &mut Client<S>,
    request: &mut FastRequest,
    pool: &Pool,
    in_flight: &InFlightGuard,
    is_repeat: bool,
) -> Result<AfterAnswer, FastFailure>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let server = &in_flight.server;
    let kept = if is_repeat { None } else { worker.kept(server.id) };
    let (upstream, life_ends_ms, reused) = match kept {
        Some((upstream, life_ends_ms)) => (upstream, life_ends_ms, true),
        None => match server.connect(worker.settings().connect_timeout()).await {
            Ok(upstream) => (upstream, worker.life_ends_ms(), false),
            Err(failure) => return Err(FastFailure::NoConnection(failure)),
        },
    };
    // To connect may have taken seconds.
    let Routed { route, to, .. } = &request.routed;
    if !reused && !may_go(&worker.router, route, *to) {
        worker.keep(server.id, upstream, life_ends_ms);
        return Err(FastFailure::Withdrawn);
    }
    let stay = CanaryStay::of(&request.routed);
    let mut exchange = Exchange {
        worker,
        watch,
        client,
        request,
        pool,
        in_flight,
        upstream,
        life_ends_ms,
        reused,
        sent: 0,
        deaf: false,
        head: Vec::new(),
        status: 0,
        counted: false,
        answer: BodyFraming::NONE,
        delivery: Delivery::AsItCame,
        stays_open: false,
        closes: false,
        back: Vec::new(),
        returned: 0,
        body_bytes: 0,
    };
    watch.rest();
    let end = during(worker, stay.as_ref(), pin!(std::future::poll_fn(|cx| exchange.poll(cx)))).await;
    let end = match end.unwrap_or_else(|| exchange.overstayed()) {
        Ok(end) => end,
        Err(failure) => {
            worker.give_back(std::mem::take(&mut exchange.back));
            return Err(failure);
        }
    };
    Ok(exchange.finish(end).await)
}

/// A request under way at one server, and its answer.
struct Exchange<'x, S> {
    worker: &'x Rc<Worker>,
    watch: &'x Deadline,
    client: &'x mut Client<S>,
    request: &'x mut FastRequest,
    pool: &'x Pool,
    in_flight: &'x InFlightGuard,
    upstream: TcpStream,
    /// When the upstream's connection is too old for another request.
    life_ends_ms: u64,
    /// It served another request before.
    reused: bool,
    /// Bytes of `request.out` that the upstream took.
    sent: usize,
    /// The upstream takes nothing more.
    deaf: bool,
    /// The beginning of an answer's head.
    head: Vec<u8>,
    /// The answer's status, once it began.
    status: u16,
    counted: bool,
    /// Part of the answer that has not arrived yet.
    answer: BodyFraming,
    delivery: Delivery,
    /// The upstream takes another request afterwards.
    stays_open: bool,
    /// The client was told that this was the last answer.
    closes: bool,
    /// Bytes that the client has not accepted yet.
    back: Vec<u8>,
    returned: usize,
    /// Bytes of the answer's body that came.
    body_bytes: u64,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Exchange<'_, S> {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<ExchangeEnd, FastFailure>> {
        let mut moved = false;
        loop {
            let before = moved;
            moved = false;
            if let Some(ended) = self.poll_request(cx, &mut moved) {
                return Poll::Ready(ended);
            }
            if let Some(ended) = self.poll_answer(cx, &mut moved) {
                return Poll::Ready(ended);
            }
            if moved {
                continue;
            }
            if before || self.watch.is_resting() {
                self.watch.set(self.patience_ms());
            }
            if self.watch.is_over() {
                return Poll::Ready(self.too_late());
            }
            return Poll::Pending;
        }
    }

    /// Moves what the client sends.
    fn poll_request(&mut self, cx: &mut Context<'_>, moved: &mut bool) -> Option<Result<ExchangeEnd, FastFailure>> {
        let (request, worker) = (&mut *self.request, self.worker);
        if self.sent < request.out.len() && !self.deaf {
            match Pin::new(&mut self.upstream).poll_write(cx, &request.out[self.sent..]) {
                Poll::Ready(Ok(length)) => {
                    self.sent += length;
                    *moved = true;
                }
                // It may have answered before.
                Poll::Ready(Err(_)) => self.deaf = true,
                Poll::Pending => return None,
            }
            if self.sent < request.out.len() {
                return None;
            }
        }
        if request.body.has_ended() || self.deaf {
            // A client that goes away is noticed; one that only ends its side is answered.
            if !self.client.ended && self.client.ahead.len() < AHEAD_BYTES_MAX && request.body.has_ended() {
                let mut scratch = worker.scratch();
                match poll_read(&mut self.client.stream, cx, &mut scratch[..AHEAD_BYTES_MAX]) {
                    Poll::Ready(Ok(0)) => {
                        self.client.ended = true;
                        if request.routed.route.serving.spec.cancel_on_disconnect {
                            return Some(self.client_gone());
                        }
                    }
                    Poll::Ready(Ok(length)) => self.client.ahead.extend_from_slice(&scratch[..length]),
                    Poll::Ready(Err(_)) => return Some(self.client_gone()),
                    Poll::Pending => {}
                }
            }
            return None;
        }
        let mut scratch = worker.scratch();
        match poll_read(&mut self.client.stream, cx, &mut scratch) {
            Poll::Ready(Ok(0) | Err(_)) => {
                drop(scratch);
                self.client.ended = true;
                Some(self.client_gone())
            }
            Poll::Ready(Ok(length)) => {
                *moved = true;
                let part = match request.body.take(&mut scratch[..length], Keep::Framed) {
                    Ok(part) => part,
                    Err(refusal) => return Some(Err(FastFailure::Client(refusal))),
                };
                self.client.ahead.extend_from_slice(&scratch[part.used..length]);
                request.whole = false;
                request.out.clear();
                self.sent = 0;
                let kept = part.kept;
                match Pin::new(&mut self.upstream).poll_write(cx, &scratch[..kept]) {
                    Poll::Ready(Ok(length)) => request.out.extend_from_slice(&scratch[length..kept]),
                    Poll::Ready(Err(_)) => self.deaf = true,
                    Poll::Pending => request.out.extend_from_slice(&scratch[..kept]),
                }
                None
            }
            Poll::Pending => None,
        }
    }

    /// Moves what the upstream answers.
    fn poll_answer(&mut self, cx: &mut Context<'_>, moved: &mut bool) -> Option<Result<ExchangeEnd, FastFailure>> {
        if self.returned < self.back.len() {
            match Pin::new(&mut self.client.stream).poll_write(cx, &self.back[self.returned..]) {
                Poll::Ready(Ok(length)) => {
                    self.returned += length;
                    *moved = true;
                }
                Poll::Ready(Err(_)) => return Some(self.client_gone()),
                Poll::Pending => return None,
            }
            if self.returned < self.back.len() {
                return None;
            }
            self.back.clear();
            self.returned = 0;
        }
        if self.status != 0 && self.answer.has_ended() {
            return Some(Ok(ExchangeEnd::Complete));
        }
        let worker = self.worker;
        let mut scratch = worker.scratch();
        let length = match poll_read(&mut self.upstream, cx, &mut scratch) {
            Poll::Ready(Ok(0)) => {
                *moved = true;
                return self.upstream_ended(false);
            }
            Poll::Ready(Err(_)) => return self.upstream_ended(true),
            Poll::Ready(Ok(length)) => length,
            Poll::Pending => return None,
        };
        *moved = true;
        if self.status == 0 {
            let failure = if self.head.is_empty() {
                self.take_head(&scratch[..length]).err()
            } else {
                let mut head = std::mem::take(&mut self.head);
                head.extend_from_slice(&scratch[..length]);
                self.take_head(&head).err()
            };
            return failure.map(Err);
        }
        let keep = if self.delivery == Delivery::UntilClose { Keep::Data } else { Keep::Framed };
        let Ok(part) = self.answer.take(&mut scratch[..length], keep) else { return Some(Ok(ExchangeEnd::Cut)) };
        self.body_bytes += part.kept as u64;
        // More than the answer is no beginning of another one.
        self.stays_open &= part.used == length;
        if self.delivery == Delivery::Chunked {
            put_chunk(&scratch[..part.kept], &mut self.back);
            return None;
        }
        let kept = part.kept;
        match Pin::new(&mut self.client.stream).poll_write(cx, &scratch[..kept]) {
            Poll::Ready(Ok(length)) => self.back.extend_from_slice(&scratch[length..kept]),
            Poll::Ready(Err(_)) => return Some(self.client_gone()),
            Poll::Pending => self.back.extend_from_slice(&scratch[..kept]),
        }
        None
    }

    /// Takes heads, interim ones too, and what follows them.
    fn take_head(&mut self, mut bytes: &[u8]) -> Result<(), FastFailure> {
        if self.back.capacity() == 0 {
            self.back = self.worker.buffer();
        }
        loop {
            let mut room = Room::default();
            let found = wire::answer(bytes, self.request.asked, &mut room);
            let Some(answered) = found.map_err(|refusal| FastFailure::Broken(refusal.why))? else {
                self.head.extend_from_slice(bytes);
                return Ok(());
            };
            let rest = &bytes[answered.length..];
            let (protocol, early) = (self.request.protocol, !self.request.body.has_ended());
            let delivery = Delivery::of(answered.body, protocol);
            self.closes =
                self.request.close || early || delivery == Delivery::UntilClose || self.worker.ends_connections();
            let date = self.worker.date();
            let close = self.closes && answered.status != 101;
            let cookie = self.request.routed.cookie.as_deref();
            let given = cookie.map(|cookie| cookie.behind(&self.pool.mark));
            let lines = given.as_deref().unwrap_or(&self.pool.mark);
            let marks = ResponseFields { lines, date: date.as_bytes(), close, protocol };
            if answered.is_interim() {
                let is_wanted = answered.status != 100 || self.request.awaits_continue;
                if protocol != Protocol::Http10 && is_wanted {
                    answered.write(marks, &mut self.back);
                }
                if rest.is_empty() {
                    return Ok(());
                }
                bytes = rest;
                continue;
            }
            answered.write(marks, &mut self.back);
            (self.status, self.answer, self.delivery) = (answered.status, answered.body, delivery);
            self.stays_open = answered.stays_open;
            if policy::is_failure(self.status) {
                // At once, not at the body's end: the circuit breaker must not wait for it.
                self.count(true);
            }
            return self.take_beginning(rest);
        }
    }

    /// Takes what came of a body together with its head.
    fn take_beginning(&mut self, rest: &[u8]) -> Result<(), FastFailure> {
        let from = self.back.len();
        if self.status == 101 {
            self.back.extend_from_slice(rest);
            return Ok(());
        }
        if self.delivery == Delivery::Chunked {
            self.body_bytes += rest.len() as u64;
            put_chunk(rest, &mut self.back);
            return Ok(());
        }
        self.back.extend_from_slice(rest);
        let keep = if self.delivery == Delivery::UntilClose { Keep::Data } else { Keep::Framed };
        let taken = self.answer.take(&mut self.back[from..], keep);
        let part = taken.map_err(|_| FastFailure::Broken("a chunk of its answer is malformed"))?;
        self.body_bytes += part.kept as u64;
        self.stays_open &= part.used == rest.len();
        self.back.truncate(from + part.kept);
        Ok(())
    }

    fn count(&mut self, error: bool) {
        if !std::mem::replace(&mut self.counted, true) {
            count(self.worker, self.request, self.status, error);
            self.in_flight.ended(error, self.request.routed.began);
        }
    }

    /// Takes the end of the upstream's connection. What lies in `back` was written before anything was read.
    fn upstream_ended(&mut self, is_reset: bool) -> Option<Result<ExchangeEnd, FastFailure>> {
        if self.status == 0 {
            return Some(Err(match self.reused && self.head.is_empty() {
                true => FastFailure::Stale,
                false => FastFailure::Broken("the connection ended before an answer was complete"),
            }));
        }
        self.stays_open = false;
        if self.answer != BodyFraming::Open || is_reset {
            return Some(Ok(ExchangeEnd::Cut));
        }
        self.answer = BodyFraming::NONE;
        if self.delivery == Delivery::Chunked {
            self.back.extend_from_slice(b"0\r\n\r\n");
        }
        None
    }

    fn client_gone(&mut self) -> Result<ExchangeEnd, FastFailure> {
        match self.status {
            0 => Err(FastFailure::Client(CUT)),
            _ => Ok(ExchangeEnd::Gone),
        }
    }

    /// Ends what may not stay at the canary.
    fn overstayed(&mut self) -> Result<ExchangeEnd, FastFailure> {
        match self.status {
            0 => Err(FastFailure::Overstayed),
            _ => Ok(ExchangeEnd::Overstayed),
        }
    }

    /// Returns how long nothing may move, in milliseconds.
    fn patience_ms(&self) -> u64 {
        let limits = &self.request.routed.limits;
        match (self.returned < self.back.len(), self.status) {
            (true, _) => self.worker.settings().unread_timeout_ms,
            (false, 0) => limits.first_byte_ms,
            (false, _) => limits.idle_ms,
        }
    }

    fn too_late(&mut self) -> Result<ExchangeEnd, FastFailure> {
        let awaited = self.sent == self.request.out.len() && !self.request.body.has_ended() && !self.deaf;
        match (self.returned < self.back.len(), self.status) {
            (true, _) => Ok(ExchangeEnd::Gone),
            (false, 0) if awaited => Err(FastFailure::Client(STOPPED)),
            (false, 0) => Err(FastFailure::Late),
            (false, _) => Ok(ExchangeEnd::Cut),
        }
    }

    /// Counts, and keeps what can be used again.
    async fn finish(mut self, end: ExchangeEnd) -> AfterAnswer {
        self.count(matches!(end, ExchangeEnd::Cut));
        if let Some(entry) = self.request.access.take() {
            entry.answered(self.status);
            entry.sent(self.body_bytes);
        }
        self.worker.give_back(std::mem::take(&mut self.back));
        let sent = self.request.body.has_ended() && self.sent == self.request.out.len() && !self.deaf;
        if !matches!(end, ExchangeEnd::Complete) {
            return AfterAnswer::Ends;
        }
        if self.status == 101 {
            return AfterAnswer::Switched(self.upstream);
        }
        if sent && self.stays_open {
            self.worker.keep(self.in_flight.server.id, self.upstream, self.life_ends_ms);
        }
        if !sent {
            self.client.linger(self.worker, self.watch).await;
        }
        let stays = sent && !self.closes && (!self.client.ended || !self.client.ahead.is_empty());
        if stays { AfterAnswer::Stays } else { AfterAnswer::Ends }
    }
}
