//! The slow path: requests of HTTP/2 clients, and those whose server speaks HTTP/2.
//!
//! Heads are canonical as on the fast path, failures mean what `policy` says, bodies stream both ways. `send` has the connections
//! to servers, `upload` the request's body, `bridge` the HTTP/1.x clients; those of HTTP/2 are in `super::http2`.

use std::borrow::Cow;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONTENT_LENGTH, HOST, TE};
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, Uri, response};
use http_body_util::BodyExt;
use hyper::body::{Body, Frame};
use tokio::time::{Instant, timeout_at};

use crate::domain::side::Side;

use super::access::Access;
use super::answer::{OwnAnswer, assignment, full, late_trailers, mark, overloaded, problem};
use super::body::{BadMessage, refuse};
use super::cookie::NewCookie;
use super::dispose::Routed;
use super::failure::WITHDRAWN;
use super::policy::{self, FailureKind, NextTry, TriedRequest};
use super::pool::Hints;
use super::request::{CanonicalRequest, Gateway};
use super::settings::ProxySettings;
use super::stay::{CanaryStay, during, may_go};
use super::table::{ClientAddress, Route, SideChoice};
use super::timeouts::{TimeLimits, is_grpc};
use super::upstream::{Choice, InFlightGuard, Pool, Server};
use super::wire::{Asked, ResponseHead};
use super::worker::Worker;

pub mod bridge;
mod http1;
pub mod send;
pub mod upload;

use send::{SendFailure, UpstreamBody};
use upload::{Upload, UploadState};

/// The head that servers get, made from a canonical request.
#[derive(Clone)]
pub struct Head {
    method: Method,
    path_and_query: PathAndQuery,
    headers: HeaderMap,
    takes_trailers: bool,
    is_idempotent: bool,
    /// How the answer is read.
    pub asked: Asked,
    /// Calls of gRPC say in their trailers whether they failed.
    pub is_grpc: bool,
}

impl Head {
    /// Returns the head that a service's servers get on behalf of the client at `peer`.
    pub fn of(
        asked: &CanonicalRequest,
        route: &Route,
        peer: ClientAddress,
        settings: &ProxySettings,
    ) -> Result<Self, BadMessage> {
        const BAD: BadMessage = BadMessage { status: 400, why: "this is no HTTP request" };
        let (service, configured) = (route.service.as_str(), &*route.reads);
        let gateway = Gateway { peer: peer.text, service, configured, is_trusted: settings.is_trusted(peer.ip) };
        let mut headers = HeaderMap::with_capacity(asked.fields.len() + 8);
        headers.insert(HOST, HeaderValue::from_str(asked.host(&gateway)).map_err(|_| BAD)?);
        let mut is_sound = true;
        asked.fields_for(&gateway, |name, parts| {
            let value = match parts {
                [value] => HeaderValue::from_bytes(value),
                parts => HeaderValue::from_bytes(&parts.concat()),
            };
            match (HeaderName::from_bytes(name.as_bytes()), value) {
                (Ok(name), Ok(value)) => drop(headers.append(name, value)),
                _ => is_sound = false,
            }
        });
        if let Some(length) = asked.length() {
            headers.insert(CONTENT_LENGTH, length.into());
        }
        if !is_sound {
            return refuse(BAD.status, BAD.why);
        }
        let kind = headers.get(http::header::CONTENT_TYPE).map(HeaderValue::as_bytes);
        Ok(Self {
            method: Method::from_bytes(asked.method.as_bytes()).map_err(|_| BAD)?,
            path_and_query: PathAndQuery::try_from(&*asked.path_and_query).map_err(|_| BAD)?,
            takes_trailers: asked.takes_trailers,
            is_idempotent: asked.is_idempotent(),
            asked: Asked { is_head: asked.method == "HEAD", wants_websocket: asked.wants_websocket },
            is_grpc: kind.is_some_and(is_grpc),
            headers,
        })
    }

    /// Returns the request for a server of HTTP/2.
    fn request<B>(&self, body: B, hints: Option<&Hints>) -> Result<Request<B>, http::Error> {
        let mut request = Request::new(body);
        *request.uri_mut() = Uri::builder().path_and_query(self.path_and_query.clone()).build()?;
        *request.method_mut() = self.method.clone();
        *request.headers_mut() = self.headers.clone();
        if self.takes_trailers {
            request.headers_mut().insert(TE, HeaderValue::from_static("trailers"));
        }
        if let Some(hints) = hints.cloned() {
            request.extensions_mut().insert(hints);
        }
        Ok(request)
    }
}

/// A request on the slow path.
pub struct SlowRequest {
    /// Head that servers get.
    pub head: Head,
    /// Where it goes.
    pub routed: Routed,
    /// Nobody waits for the answer.
    pub is_copy: bool,
    /// Its line in the access log.
    pub access: Access,
}

/// What a request led to.
pub enum SlowAnswer {
    /// A server's answer, whose body is still to come.
    Upstream(Box<Answered>),
    /// An answer of this node's own.
    Own(Box<OwnAnswer>),
}

/// Why an attempt brought no answer, and what the client is told.
struct SlowFailure {
    kind: FailureKind,
    why: String,
}

/// Carries a request to a server of the side that was chosen.
pub async fn carry(worker: &Rc<Worker>, request: SlowRequest, upload: &Upload, hints: Option<&Hints>) -> SlowAnswer {
    let Routed { route, to, limits, began, .. } = &request.routed;
    let is_mirrored = !request.is_copy && to.side == Side::Stable && worker.router.is_mirrored(route, *began);
    let mirrored = is_mirrored.then(|| (request.head.clone(), route.clone()));
    let (began, limits) = (*began, *limits);
    let answer = tried(worker, request, upload, hints).await;
    if let Some((head, route)) = mirrored
        && let (Some(body), Some(permit)) = (upload.copy(), worker.router.place(&route).ok())
    {
        let to = SideChoice::of_copy();
        mirror(worker, head, Routed { route, to, cookie: None, limits, began, permit }, body);
    }
    answer
}

/// Sends a copy of a request to the canary, whose answer nobody gets.
fn mirror(worker: &Rc<Worker>, mut head: Head, routed: Routed, body: Upload) {
    head.headers.insert("x-aviary-mirrored", HeaderValue::from_static("true"));
    let worker = worker.clone();
    tokio::task::spawn_local(async move {
        let request = SlowRequest { head, routed, is_copy: true, access: None };
        if let SlowAnswer::Upstream(mut answered) = tried(&worker, request, &body, None).await {
            let stay = answered.stay.take();
            let reading = async { while let Some(Ok(_)) = answered.next().await {} };
            during(&worker, stay.as_ref(), pin!(reading)).await;
        }
    });
}

/// Tries servers until one answers, or until nothing is left to try.
async fn tried(worker: &Rc<Worker>, request: SlowRequest, upload: &Upload, hints: Option<&Hints>) -> SlowAnswer {
    let SlowRequest { head, routed: Routed { route, mut to, cookie, limits, began, permit }, is_copy, access } =
        request;
    let tries = |to: SideChoice, server: Option<&str>| {
        if let Some(entry) = &access {
            entry.tried(&route.service, &route.pool(to.side).version, server);
        }
    };
    let end = limits.total_ms.map(|total_ms| Instant::now() + Duration::from_millis(total_ms));
    let (mut servers, mut is_repeat) = (Vec::new(), false);
    let counts = |to: SideChoice, status, error| match is_copy {
        true => worker.router.count_copy(worker.shard, &route, status, began, error),
        false => worker.router.count(worker.shard, &route, to, status, began, error),
    };
    let (failure, status) = loop {
        if !may_go(&worker.router, &route, to) {
            if is_copy {
                break (SlowFailure { kind: FailureKind::Withdrawn, why: WITHDRAWN.into() }, 503);
            }
            to.side = Side::Stable;
            servers.clear();
        }
        let pool = route.pool(to.side);
        if pool.servers.is_empty() {
            counts(to, 200, false);
            tries(to, None);
            return SlowAnswer::Own(Box::new(assignment(&worker.router, &route, to.side, cookie.as_deref())));
        }
        let chosen = match pool.choose(began, &servers) {
            Choice::Full => pool.queue(|| worker.router.now(), &servers).await,
            chosen => chosen,
        };
        let in_flight = match chosen {
            Choice::Server(in_flight) => Some(in_flight),
            Choice::Full => None,
            Choice::NoneLeft => {
                break (SlowFailure { kind: FailureKind::Unreachable, why: "no server is left to try".into() }, 502);
            }
        };
        let (failure, in_flight) = match in_flight {
            None => {
                worker.router.overflows(&route, "servers");
                (SlowFailure { kind: FailureKind::Full, why: String::new() }, None)
            }
            Some(in_flight) => {
                tries(to, Some(in_flight.server.authority.as_str()));
                let stay = CanaryStay::at(&route, to);
                let sent = {
                    let may_go = || may_go(&worker.router, &route, to);
                    let terms = Terms { limits, end, is_repeat, hints };
                    let sending = pin!(attempt(worker, &head, &in_flight.server, upload, terms, may_go));
                    during(worker, stay.as_ref(), sending).await
                };
                let overstayed = || Err(SlowFailure { kind: FailureKind::Overstayed, why: WITHDRAWN.into() });
                match sent.unwrap_or_else(overstayed) {
                    Ok(answer) => {
                        let outcome = OutcomeGuard {
                            worker: worker.clone(),
                            route: route.clone(),
                            to,
                            cookie,
                            idle: Duration::from_millis(limits.idle_ms),
                            status: answer.status().as_u16(),
                            began,
                            is_counted: false,
                            is_copy,
                            in_flight,
                            access,
                            _permit: permit,
                        };
                        if let Some(entry) = &outcome.access {
                            entry.answered(outcome.status);
                        }
                        let answered = Answered::new(answer, outcome, &head, upload, end, stay);
                        return SlowAnswer::Upstream(Box::new(answered));
                    }
                    Err(failure) => (failure, Some(in_flight)),
                }
            }
        };
        let facts = TriedRequest {
            side: to.side,
            is_idempotent: head.is_idempotent,
            is_whole: upload.is_repeatable(),
            is_repeat,
            has_other: pool.has_choice() && servers.len() + 1 < pool.servers.len(),
            is_copy,
        };
        let consequence = policy::after(failure.kind, &facts);
        if let Some(in_flight) = in_flight.as_ref().filter(|_| consequence.blames_server) {
            in_flight.ended(true, worker.router.now());
        }
        if consequence.blames_version {
            counts(to, 502, true);
        }
        match consequence.next {
            NextTry::OtherServer => servers.extend(in_flight.map(|in_flight| in_flight.server.id)),
            NextTry::NewConnection => is_repeat = true,
            NextTry::Stable => {
                to.side = Side::Stable;
                servers.clear();
            }
            NextTry::Answer(status) => break (failure, status),
        }
    };
    let pool = route.pool(to.side);
    let why = told(&failure, pool, limits.until_first_byte_ms());
    let mut answer = if failure.kind == FailureKind::Full { overloaded(&why) } else { problem(status, &why) };
    if !matches!(failure.kind, FailureKind::Local | FailureKind::Full) {
        mark(answer.headers_mut(), &route, pool);
    }
    SlowAnswer::Own(Box::new(answer))
}

/// Returns what the client is told of a failure.
fn told(failure: &SlowFailure, pool: &Pool, limit_ms: u64) -> String {
    let (version, why) = (&pool.version, &failure.why);
    match failure.kind {
        FailureKind::Local => format!("this proxy can open no connection: {why}"),
        FailureKind::Unreachable => format!("no server of {version} can be reached: {why}"),
        FailureKind::Late => format!("{version} sent no answer within {limit_ms} ms"),
        FailureKind::Stale | FailureKind::Unprocessed | FailureKind::Broken => format!("{version} broke off: {why}"),
        FailureKind::Full => full(version),
        FailureKind::Client | FailureKind::Unsupported | FailureKind::Withdrawn | FailureKind::Overstayed => {
            why.clone()
        }
    }
}

/// What an attempt is bound by.
struct Terms<'t> {
    /// How long the request may take.
    limits: TimeLimits,
    /// When everything must be over, if there is a limit.
    end: Option<Instant>,
    /// Only a connection that served nothing before will do.
    is_repeat: bool,
    /// What tells the client what comes before its answer.
    hints: Option<&'t Hints>,
}

/// Tries one server: an error when no answer began. `may_go` is asked once there is a connection.
async fn attempt(
    worker: &Rc<Worker>,
    head: &Head,
    server: &Arc<Server>,
    upload: &Upload,
    terms: Terms<'_>,
    may_go: impl Fn() -> bool,
) -> Result<Response<UpstreamBody>, SlowFailure> {
    let Terms { limits, end, is_repeat, hints } = terms;
    let failure = |kind, why: &str| SlowFailure { kind, why: why.to_string() };
    if head.asked.wants_websocket {
        return Err(failure(FailureKind::Unsupported, "servers of HTTP/2 take no WebSocket from this proxy"));
    }
    let limit = Duration::from_millis(limits.first_byte_ms);
    let sending = pin!(send::send(worker, server, head, upload.lend(), is_repeat, hints, may_go));
    let answered = in_time(limit, upload, end, sending).await;
    let state = upload.state().0;
    match answered {
        Some(Ok(answer)) => {
            let fields = fields_of(answer.headers());
            match ResponseHead::of(answer.status().as_u16(), &fields, head.asked) {
                Ok(_) => Ok(answer),
                Err(bad) => Err(failure(FailureKind::Broken, bad.why)),
            }
        }
        Some(Err(_)) if state == UploadState::Cut => Err(failure(FailureKind::Client, "the request's body broke off")),
        Some(Err(SendFailure { kind, why })) => Err(SlowFailure { kind, why }),
        None if state == UploadState::Awaited => Err(failure(FailureKind::Client, "the request's body stopped coming")),
        None => Err(failure(FailureKind::Late, "")),
    }
}

/// Returns a map's fields as heads are read.
pub fn fields_of(headers: &HeaderMap) -> Vec<httparse::Header<'_>> {
    headers.iter().map(|(name, value)| httparse::Header { name: name.as_str(), value: value.as_bytes() }).collect()
}

/// Waits for an answer until `limit` after the later of this call and the last that came from the client, and no longer than
/// `end`; none when that passed.
async fn in_time<T>(
    limit: Duration,
    upload: &Upload,
    end: Option<Instant>,
    mut answer: Pin<&mut impl Future<Output = T>>,
) -> Option<T> {
    let bounded = |until: Instant| end.map_or(until, |end| end.min(until));
    let mut until = bounded(Instant::now() + limit);
    loop {
        if let Ok(answer) = timeout_at(until, answer.as_mut()).await {
            return Some(answer);
        }
        let later = bounded(upload.state().1 + limit);
        if later <= until {
            return None;
        }
        until = later;
    }
}

/// A server's answer: its head, and the body as it comes.
pub struct Answered {
    /// Head of the answer, as the server sent it.
    pub head: response::Parts,
    body: UpstreamBody,
    outcome: OutcomeGuard,
    is_grpc: bool,
    upload: Upload,
    end: Option<Instant>,
    /// The answer's stay at the canary, for its receiver to end; none at stable.
    pub stay: Option<CanaryStay>,
}

/// Why an answer ended before its end.
#[derive(Debug, thiserror::Error)]
pub enum CutShort {
    /// The request's time was over.
    #[error("the answer took too long")]
    TooLong,
    /// Nothing came for this many milliseconds.
    #[error("the upstream was silent for {0} ms")]
    Silent(u128),
    /// The server broke it off.
    #[error("{0}")]
    Broken(String),
}

impl Answered {
    fn new(
        answer: Response<UpstreamBody>,
        mut outcome: OutcomeGuard,
        asked: &Head,
        upload: &Upload,
        end: Option<Instant>,
        stay: Option<CanaryStay>,
    ) -> Self {
        let (head, body) = answer.into_parts();
        if policy::is_failure(outcome.status) || (asked.is_grpc && grpc_failed(&head.headers)) {
            // At once, not at the body's end: the circuit breaker must not wait for it.
            outcome.count(true);
        }
        Self { head, body, outcome, is_grpc: asked.is_grpc, upload: upload.clone(), end, stay }
    }

    /// Returns true when nothing more comes.
    pub fn has_ended(&self) -> bool {
        self.body.is_end_stream()
    }

    /// Returns when everything must be over, if there is a limit.
    pub fn end(&self) -> Option<Instant> {
        self.end
    }

    /// Adds the headers that say which version served.
    pub fn mark(&self, headers: &mut HeaderMap) {
        mark(headers, &self.outcome.route, self.outcome.route.pool(self.outcome.to.side));
        self.outcome.cookie.iter().for_each(|cookie| cookie.put(headers));
    }

    /// Returns whole header lines that say which version served, and give the client its cookie.
    pub fn lines(&self) -> Cow<'_, [u8]> {
        let mark = &*self.outcome.route.pool(self.outcome.to.side).mark;
        self.outcome.cookie.as_ref().map_or(Cow::Borrowed(mark), |cookie| Cow::Owned(cookie.behind(mark)))
    }

    /// Returns the trailers by which a gRPC client is told that its answer came too late; none for other reasons, clients and answers.
    pub fn late_trailers(&self, cut: &CutShort) -> Option<HeaderMap> {
        let is_late = matches!(cut, CutShort::TooLong | CutShort::Silent(_));
        let can_end = !self.head.headers.contains_key(CONTENT_LENGTH);
        (self.is_grpc && is_late && can_end).then(|| late_trailers(&cut.to_string()))
    }

    /// Returns the next piece of the body, or the trailers; none at its end, which is counted.
    pub async fn next(&mut self) -> Option<Result<Frame<Bytes>, CutShort>> {
        let idle = self.outcome.idle;
        let until = Instant::now() + idle;
        let until = self.end.map_or(until, |end| end.min(until));
        let is_over = self.end.is_some_and(|end| end <= Instant::now());
        let cut = match timeout_at(until, self.body.frame()).await {
            Ok(Some(Ok(_))) if is_over => CutShort::TooLong,
            Ok(Some(Ok(frame))) => {
                if self.is_grpc && frame.trailers_ref().is_some_and(grpc_failed) {
                    self.outcome.count(true);
                }
                if let (Some(entry), Some(data)) = (&self.outcome.access, frame.data_ref()) {
                    entry.sent(data.len() as u64);
                }
                return Some(Ok(frame));
            }
            Ok(None) => {
                self.outcome.count(false);
                return None;
            }
            Ok(Some(Err(error))) => CutShort::Broken(error.to_string()),
            Err(_) if self.end.is_some_and(|end| end <= Instant::now()) => CutShort::TooLong,
            Err(_) => CutShort::Silent(idle.as_millis()),
        };
        // An upload that the client cuts takes the upstream's stream with it.
        self.outcome.count(self.upload.state().0 != UploadState::Cut);
        Some(Err(cut))
    }
}

fn grpc_failed(headers: &HeaderMap) -> bool {
    headers.get("grpc-status").is_some_and(|status| policy::is_grpc_failure(status.as_bytes()))
}

/// Outcome that is counted when a body ends, fails, or is dropped because its client left.
struct OutcomeGuard {
    worker: Rc<Worker>,
    route: Arc<Route>,
    to: SideChoice,
    cookie: Option<Box<NewCookie>>,
    /// Longest silence within the answer.
    idle: Duration,
    status: u16,
    began: crate::domain::time::Mono,
    is_counted: bool,
    is_copy: bool,
    in_flight: InFlightGuard,
    access: Access,
    _permit: super::table::RequestPermit,
}

impl OutcomeGuard {
    fn count(&mut self, error: bool) {
        if std::mem::replace(&mut self.is_counted, true) {
            return;
        }
        let (router, shard) = (&self.worker.router, self.worker.shard);
        match self.is_copy {
            true => router.count_copy(shard, &self.route, self.status, self.began, error),
            false => router.count(shard, &self.route, self.to, self.status, self.began, error),
        }
        self.in_flight.ended(error, self.began);
    }
}

impl Drop for OutcomeGuard {
    fn drop(&mut self) {
        self.count(false);
    }
}
