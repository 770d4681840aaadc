//! The quick way for plain requests: HTTP/1.1 to HTTP/1.1, bodies streaming both ways, in as few steps as can be.
//!
//! A connection is one task. It reads a head, picks, sends it on and waits, without a lock, a timer of its own, or an
//! allocation that lasts: buffers belong to the worker, deadlines are looked at by the worker every few milliseconds.
//! What is not a plain request is left, with its connection, to [`super::forward`].

use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::TcpStream;

use crate::domain::side::Side;
use crate::domain::time::Mono;
use crate::listener::Admitted;
use crate::status;

use super::table::{RequestPermit, Route};
use super::upstream::{InFlightGuard, Pool};
use super::wire::{self, BadMessage, BodyFraming, HEAD_BYTES_MAX, Opening, ResponseFields, Room};
use super::worker::{Deadline, Worker};

/// Bytes of further requests that are read while one is under way.
const AHEAD_BYTES_MAX: usize = 16 * 1024;
/// How long a client may leave what it is sent unread.
const UNREAD_MS_MAX: u64 = 75_000;
/// How long, and how much, is read from a client that was refused, so that it can read why.
const LINGER: Duration = Duration::from_secs(1);
const LINGER_BYTES_MAX: usize = 1 << 20;

/// Connection of a client, with what was read ahead of the request.
struct Client<S> {
    stream: S,
    /// Bytes that were read and are not used yet.
    ahead: Vec<u8>,
    /// True once the client has ended its side.
    ended: bool,
    address: String,
}

/// A client's request, ready to be forwarded.
struct RelayRequest {
    /// Head and first part of the body, for an upstream.
    out: Vec<u8>,
    /// Part of the body that has not arrived yet.
    body: BodyFraming,
    /// The whole of it is in `out`: it can be sent again.
    whole: bool,
    is_head: bool,
    is_idempotent: bool,
    close: bool,
    route: Arc<Route>,
    pick: Side,
    /// Nobody waits for the answer.
    is_copy: bool,
    began: Mono,
    _place: RequestPermit,
}

impl RelayRequest {
    /// Returns a copy for the canary; none of a request that is not all there.
    fn copy(&self, worker: &Worker) -> Option<Self> {
        let _place = worker.router.place().filter(|_| self.whole)?;
        let mut out = worker.buffer();
        let head = self.out.windows(4).position(|four| four == b"\r\n\r\n")? + 2;
        out.extend_from_slice(&self.out[..head]);
        out.extend_from_slice(b"x-aviary-mirrored: true\r\n");
        out.extend_from_slice(&self.out[head..]);
        let route = self.route.clone();
        Some(Self { out, route, pick: Side::Canary, is_copy: true, close: true, _place, ..*self })
    }
}

/// Next state of a connection.
enum NextMessage {
    Request(Box<RelayRequest>),
    /// Whatever it is, it needs the slow path.
    Other,
    Refuse(BadMessage),
    /// It ended, or waited too long.
    Close,
}

/// Serves a connection until it ends, or until it asks for something that isn't plain: then returns what was read.
pub async fn serve<S>(worker: &Rc<Worker>, stream: &mut S, peer: SocketAddr, place: &Admitted) -> Option<Vec<u8>>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let watch = worker.watch().await;
    let mut client = Client { stream, ahead: Vec::new(), ended: false, address: peer.ip().to_string() };
    let mut first = true;
    loop {
        let idle = if first { worker.settings().header_timeout_ms } else { worker.settings().keep_alive_timeout_ms };
        let next = std::future::poll_fn(|cx| client.poll_next(worker, &watch, idle, cx));
        let next = match first {
            true => place.end.run_until_cancelled(next).await.unwrap_or(NextMessage::Close),
            false => next.await,
        };
        if !matches!(next, NextMessage::Close) && std::mem::take(&mut first) {
            place.asked();
        }
        let stays = match next {
            NextMessage::Request(request) => {
                if request.pick == Side::Stable && worker.router.is_mirrored(&request.route, request.began) {
                    mirror(worker, &request);
                }
                let stays = carry(worker, &watch, &mut client, *request).await;
                // What was its time is not the next one's.
                watch.set_end(None);
                watch.rest();
                stays
            }
            NextMessage::Other => return Some(client.ahead),
            NextMessage::Refuse(refusal) => {
                worker.say(&mut client.stream, refusal.status, refusal.why, &[], true).await;
                linger(worker, &watch, &mut client).await;
                false
            }
            NextMessage::Close => false,
        };
        if !stays || worker.is_stopping() {
            let _ = client.stream.shutdown().await;
            return None;
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Client<S> {
    /// Waits for a head; nothing of it is used up unless it is a plain request.
    fn poll_next(
        &mut self,
        worker: &Rc<Worker>,
        watch: &Deadline,
        idle_ms: u64,
        cx: &mut Context<'_>,
    ) -> Poll<NextMessage> {
        let mut tried = 0;
        loop {
            if self.ahead.len() > tried {
                tried = self.ahead.len();
                let ahead = std::mem::take(&mut self.ahead);
                let next = self.begin(worker, &ahead);
                if self.ahead.is_empty() && !matches!(next, Some(NextMessage::Request(_))) {
                    self.ahead = ahead;
                }
                if let Some(next) = next {
                    watch.rest();
                    return Poll::Ready(next);
                }
            }
            if watch.is_over() {
                let refusal = BadMessage { status: 408, why: "the request's head stopped coming" };
                return Poll::Ready(if self.ahead.is_empty() {
                    NextMessage::Close
                } else {
                    NextMessage::Refuse(refusal)
                });
            }
            let mut scratch = worker.scratch();
            match poll_read(&mut self.stream, cx, &mut scratch) {
                Poll::Ready(Ok(0) | Err(_)) => return Poll::Ready(NextMessage::Close),
                Poll::Ready(Ok(length)) if self.ahead.is_empty() => {
                    let next = self.begin(worker, &scratch[..length]);
                    if let Some(next) = next {
                        watch.rest();
                        if !matches!(next, NextMessage::Request(_)) {
                            self.ahead.extend_from_slice(&scratch[..length]);
                        }
                        return Poll::Ready(next);
                    }
                    self.ahead.extend_from_slice(&scratch[..length]);
                    tried = length;
                    // From the first byte on, a head has its own time.
                    watch.set(worker.settings().header_timeout_ms);
                }
                Poll::Ready(Ok(length)) => self.ahead.extend_from_slice(&scratch[..length]),
                Poll::Pending => {
                    let begun = !self.ahead.is_empty();
                    watch.set_if_resting(if begun { worker.settings().header_timeout_ms } else { idle_ms });
                    if worker.is_stopping() && self.ahead.is_empty() {
                        return Poll::Ready(NextMessage::Close);
                    }
                    return Poll::Pending;
                }
            }
        }
    }

    /// Makes a request of what came; none when it is not all there. What lies behind it stays for later.
    fn begin(&mut self, worker: &Rc<Worker>, bytes: &[u8]) -> Option<NextMessage> {
        let mut room = Room::default();
        let asked = match wire::request(bytes, &mut room) {
            Ok(Opening::Plain(asked)) => asked,
            Ok(Opening::Partial) if bytes.len() >= HEAD_BYTES_MAX => {
                return Some(NextMessage::Refuse(BadMessage { status: 431, why: "expected a head of at most 32 KiB" }));
            }
            Ok(Opening::Partial) => return None,
            Ok(Opening::Other) => return Some(NextMessage::Other),
            Err(refusal) => return Some(NextMessage::Refuse(refusal)),
        };
        let path = asked.target.split_once('?').map_or(asked.target, |(path, _)| path);
        let table = worker.table();
        let Ok(route) = table.route_of(worker.settings(), path, &asked.fields) else { return Some(NextMessage::Other) };
        if !route.plain || status::is_here(path) {
            return Some(NextMessage::Other);
        }
        let Some(place) = worker.router.place() else { return Some(NextMessage::Other) };
        let began = worker.router.now();
        let mut body = asked.body;
        let taken = match body.take(&bytes[asked.length..]) {
            Ok(taken) => taken,
            Err(refusal) => return Some(NextMessage::Refuse(refusal)),
        };
        let end = asked.length + taken;
        let mut out = worker.buffer();
        asked.write(&self.address, &route.reads, &mut out);
        out.extend_from_slice(&bytes[asked.length..end]);
        self.ahead.clear();
        self.ahead.extend_from_slice(&bytes[end..]);
        Some(NextMessage::Request(Box::new(RelayRequest {
            out,
            body,
            whole: body.has_ended(),
            is_head: asked.method == "HEAD",
            is_idempotent: asked.is_idempotent(),
            close: asked.close,
            pick: worker.router.pick(route, &asked.fields, &self.address, began),
            is_copy: false,
            route: route.clone(),
            began,
            _place: place,
        })))
    }
}

/// Sends a copy of a request to the canary, beside it.
fn mirror(worker: &Rc<Worker>, request: &RelayRequest) {
    let Some(copy) = request.copy(worker) else { return };
    let worker = worker.clone();
    tokio::task::spawn_local(async move {
        let watch = worker.watch().await;
        let mut nobody = Client { stream: tokio::io::empty(), ahead: Vec::new(), ended: true, address: String::new() };
        carry(&worker, &watch, &mut nobody, copy).await;
    });
}

/// Why an attempt brought no answer.
enum RelayFailure {
    /// No connection: nothing was sent.
    Unreachable(io::Error),
    /// A kept connection had ended before anything came back.
    Stale,
    /// No first byte in time.
    Late,
    /// The upstream broke off, or sent what is no answer.
    Broken(&'static str),
    /// The client broke off, stopped sending, or sent what is no body: nobody's error.
    Client(BadMessage),
}

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
}

/// Carries a request to a server of the side that was picked, and the answer back; returns true when the connection stays open.
async fn carry<S>(worker: &Rc<Worker>, watch: &Deadline, client: &mut Client<S>, mut request: RelayRequest) -> bool
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let route = request.route.clone();
    let total = worker.settings().total_timeout_ms;
    watch.set_end((total > 0).then_some(total));
    let mut tried = Vec::new();
    let mut again = true;
    let failure = loop {
        let pool = route.pool(request.pick);
        let Some(in_flight) = pool.choose(request.began, &tried) else {
            break RelayFailure::Unreachable(io::Error::other("no server is left to try"));
        };
        match attempt(worker, watch, client, &mut request, pool, &in_flight).await {
            Ok(stays) => {
                worker.give_back(request.out);
                return stays;
            }
            Err(failure) => {
                let unreachable = matches!(failure, RelayFailure::Unreachable(_));
                if !matches!(failure, RelayFailure::Client(_)) {
                    in_flight.ended(true, worker.router.now());
                }
                if unreachable && pool.has_choice() && tried.len() + 1 < pool.servers.len() {
                    tried.push(in_flight.server.id);
                    continue;
                }
                if matches!(failure, RelayFailure::Stale) && request.whole && request.is_idempotent && again {
                    again = false;
                    continue;
                }
                if !matches!(failure, RelayFailure::Client(_)) {
                    count(worker, &request, 502, true);
                }
                if request.pick == Side::Canary && unreachable && !request.is_copy {
                    // A canary that isn't there costs users nothing. Never the other way round.
                    (request.pick, tried) = (Side::Stable, Vec::new());
                    continue;
                }
                break failure;
            }
        }
    };
    worker.give_back(request.out);
    let pool = route.pool(request.pick);
    let version = &pool.version;
    let limit = worker.settings().first_byte_timeout_ms;
    let (status, why) = match failure {
        RelayFailure::Unreachable(error) => (502, format!("no server of {version} can be reached: {error}")),
        RelayFailure::Stale => (502, format!("{version} broke off: it closed a connection that was to be used again")),
        RelayFailure::Late => (504, format!("{version} sent no answer within {limit} ms")),
        RelayFailure::Broken(why) => (502, format!("{version} broke off: {why}")),
        RelayFailure::Client(BadMessage { status, why }) => (status, why.to_string()),
    };
    let close = request.close || !request.body.has_ended();
    worker.say(&mut client.stream, status, &why, &pool.mark, close).await;
    if close {
        linger(worker, watch, client).await;
    }
    !close
}

/// Tries one server: an error when no answer began.
async fn attempt<S>(
    worker: &Rc<Worker>,
    watch: &Deadline,
    client: &mut Client<S>,
    request: &mut RelayRequest,
    pool: &Pool,
    in_flight: &InFlightGuard,
) -> Result<bool, RelayFailure>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let server = &in_flight.server;
    let (upstream, reused) = match worker.kept(server.id) {
        Some(upstream) => (upstream, true),
        None => match server.connect(worker.settings().connect_timeout()).await {
            Ok(upstream) => (upstream, false),
            Err(failure) => return Err(RelayFailure::Unreachable(io::Error::other(failure))),
        },
    };
    let mut exchange = Exchange {
        worker,
        watch,
        client,
        request,
        pool,
        in_flight,
        upstream,
        reused,
        sent: 0,
        deaf: false,
        head: Vec::new(),
        status: 0,
        counted: false,
        answer: BodyFraming::NONE,
        stays_open: false,
        closes: false,
        back: Vec::new(),
        returned: 0,
    };
    watch.rest();
    let end = std::future::poll_fn(|cx| exchange.poll(cx)).await;
    let end = match end {
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
    request: &'x mut RelayRequest,
    pool: &'x Pool,
    in_flight: &'x InFlightGuard,
    upstream: TcpStream,
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
    /// The upstream takes another request afterwards.
    stays_open: bool,
    /// The client was told that this was the last answer.
    closes: bool,
    /// Bytes that the client has not accepted yet.
    back: Vec<u8>,
    returned: usize,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Exchange<'_, S> {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<ExchangeEnd, RelayFailure>> {
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
    fn poll_request(&mut self, cx: &mut Context<'_>, moved: &mut bool) -> Option<Result<ExchangeEnd, RelayFailure>> {
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
                    Poll::Ready(Ok(0)) => self.client.ended = true,
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
                let taken = match request.body.take(&scratch[..length]) {
                    Ok(taken) => taken,
                    Err(refusal) => return Some(Err(RelayFailure::Client(refusal))),
                };
                self.client.ahead.extend_from_slice(&scratch[taken..length]);
                request.whole = false;
                request.out.clear();
                self.sent = 0;
                match Pin::new(&mut self.upstream).poll_write(cx, &scratch[..taken]) {
                    Poll::Ready(Ok(length)) => request.out.extend_from_slice(&scratch[length..taken]),
                    Poll::Ready(Err(_)) => self.deaf = true,
                    Poll::Pending => request.out.extend_from_slice(&scratch[..taken]),
                }
                None
            }
            Poll::Pending => None,
        }
    }

    /// Moves what the upstream answers.
    fn poll_answer(&mut self, cx: &mut Context<'_>, moved: &mut bool) -> Option<Result<ExchangeEnd, RelayFailure>> {
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
            Poll::Ready(Ok(length)) => length,
            Poll::Ready(Err(_)) => 0,
            Poll::Pending => return None,
        };
        *moved = true;
        if length == 0 {
            return Some(self.upstream_ended());
        }
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
        match self.answer.take(&scratch[..length]) {
            Ok(taken) => {
                // More than the answer is no beginning of another one.
                self.stays_open &= taken == length;
                match Pin::new(&mut self.client.stream).poll_write(cx, &scratch[..taken]) {
                    Poll::Ready(Ok(length)) => self.back.extend_from_slice(&scratch[length..taken]),
                    Poll::Ready(Err(_)) => return Some(self.client_gone()),
                    Poll::Pending => self.back.extend_from_slice(&scratch[..taken]),
                }
                None
            }
            Err(_) => Some(Ok(ExchangeEnd::Cut)),
        }
    }

    /// Takes heads, interim ones too, and what follows them.
    fn take_head(&mut self, mut bytes: &[u8]) -> Result<(), RelayFailure> {
        if self.back.capacity() == 0 {
            self.back = self.worker.buffer();
        }
        loop {
            let mut room = Room::default();
            let found = wire::answer(bytes, self.request.is_head, &mut room);
            let Some(answered) = found.map_err(|refusal| RelayFailure::Broken(refusal.why))? else {
                if bytes.len() > HEAD_BYTES_MAX {
                    return Err(RelayFailure::Broken("its answer's head is larger than 32 KiB"));
                }
                self.head.extend_from_slice(bytes);
                return Ok(());
            };
            let rest = &bytes[answered.length..];
            let early = !self.request.body.has_ended();
            self.closes =
                self.request.close || early || answered.body == BodyFraming::Open || self.worker.is_stopping();
            let date = self.worker.date();
            answered.write(
                ResponseFields { lines: &self.pool.mark, date: date.as_bytes(), close: self.closes },
                &mut self.back,
            );
            if answered.is_interim() {
                if rest.is_empty() {
                    return Ok(());
                }
                bytes = rest;
                continue;
            }
            (self.status, self.answer) = (answered.status, answered.body);
            let taken =
                self.answer.take(rest).map_err(|_| RelayFailure::Broken("a chunk of its answer is malformed"))?;
            self.stays_open = answered.stays_open && taken == rest.len();
            self.back.extend_from_slice(&rest[..taken]);
            if self.status >= 500 {
                // At once, not at the body's end: the circuit breaker must not wait for it.
                self.count(true);
            }
            return Ok(());
        }
    }

    fn count(&mut self, error: bool) {
        if !std::mem::replace(&mut self.counted, true) {
            count(self.worker, self.request, self.status, error);
            self.in_flight.ended(error, self.request.began);
        }
    }

    fn upstream_ended(&mut self) -> Result<ExchangeEnd, RelayFailure> {
        if self.status != 0 {
            let whole = self.answer == BodyFraming::Open;
            self.answer = BodyFraming::NONE;
            self.stays_open = false;
            // What lies in `back` was written before anything was read.
            return Ok(if whole { ExchangeEnd::Complete } else { ExchangeEnd::Cut });
        }
        Err(match self.reused && self.head.is_empty() {
            true => RelayFailure::Stale,
            false => RelayFailure::Broken("the connection ended before an answer was complete"),
        })
    }

    fn client_gone(&mut self) -> Result<ExchangeEnd, RelayFailure> {
        match self.status {
            0 => Err(RelayFailure::Client(CUT)),
            _ => Ok(ExchangeEnd::Gone),
        }
    }

    /// Returns how long nothing may move, in milliseconds.
    fn patience_ms(&self) -> u64 {
        let settings = self.worker.settings();
        match (self.returned < self.back.len(), self.status) {
            (true, _) => UNREAD_MS_MAX,
            (false, 0) => settings.first_byte_timeout_ms,
            (false, _) => settings.idle_timeout_ms,
        }
    }

    fn too_late(&mut self) -> Result<ExchangeEnd, RelayFailure> {
        let awaited = self.sent == self.request.out.len() && !self.request.body.has_ended() && !self.deaf;
        match (self.returned < self.back.len(), self.status) {
            (true, _) => Ok(ExchangeEnd::Gone),
            (false, 0) if awaited => Err(RelayFailure::Client(STOPPED)),
            (false, 0) => Err(RelayFailure::Late),
            (false, _) => Ok(ExchangeEnd::Cut),
        }
    }

    /// Counts, and keeps what can be used again; returns true when the client's connection stays open.
    async fn finish(mut self, end: ExchangeEnd) -> bool {
        self.count(matches!(end, ExchangeEnd::Cut));
        self.worker.give_back(std::mem::take(&mut self.back));
        let sent = self.request.body.has_ended() && self.sent == self.request.out.len() && !self.deaf;
        if !matches!(end, ExchangeEnd::Complete) {
            return false;
        }
        if sent && self.stays_open {
            self.worker.keep(self.in_flight.server.id, self.upstream);
        }
        if !sent {
            linger(self.worker, self.watch, self.client).await;
        }
        sent && !self.closes && (!self.client.ended || !self.client.ahead.is_empty())
    }
}

fn count(worker: &Worker, request: &RelayRequest, status: u16, error: bool) {
    let RelayRequest { route, pick, is_copy, began, .. } = request;
    match is_copy {
        true => worker.router.count_copy(worker.shard, route, status, *began, error),
        false => worker.router.count(worker.shard, route, *pick, status, *began, error),
    }
}

/// Reads what a refused client still sends, for a moment: it would lose the answer if its connection were closed first.
async fn linger<S: AsyncRead + AsyncWrite + Unpin>(worker: &Rc<Worker>, watch: &Deadline, client: &mut Client<S>) {
    let _ = client.stream.shutdown().await;
    watch.rest();
    let mut left = LINGER_BYTES_MAX;
    let rest = std::future::poll_fn(|cx| {
        loop {
            let mut scratch = worker.scratch();
            match ready!(poll_read(&mut client.stream, cx, &mut scratch)) {
                Ok(length) if length > 0 && length <= left => left -= length,
                _ => return Poll::Ready(()),
            }
        }
    });
    let _ = tokio::time::timeout(LINGER, pin!(rest)).await;
}

fn poll_read<S: AsyncRead + Unpin>(stream: &mut S, cx: &mut Context<'_>, into: &mut [u8]) -> Poll<io::Result<usize>> {
    let mut buffer = ReadBuf::new(into);
    ready!(Pin::new(stream).poll_read(cx, &mut buffer))?;
    Poll::Ready(Ok(buffer.filled().len()))
}
