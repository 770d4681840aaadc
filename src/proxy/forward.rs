//! The slow path: whatever HTTP has, hyper on both sides, bodies streaming both ways.
//!
//! HTTP/2 (gRPC with its trailers), HTTP/1.0, upgrades such as WebSocket, this node's own pages. Plain requests go by
//! [`super::relay`], which decides alike and costs less.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONNECTION, CONTENT_TYPE, HOST, HeaderName, TE, UPGRADE, VIA};
use http::uri::Scheme;
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, Uri};
use http_body_util::BodyExt;
use hyper::body::{Frame, Incoming, SizeHint};
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use serde_json::json;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep};
use tokio_util::sync::CancellationToken;

use crate::domain::side::Side;
use crate::domain::time::Mono;
use crate::listener::{Admitted, ConnectionLimiter};
use crate::status;

use super::answer::{Body, BodyError, own, problem};
use super::hop::{self, is_hop_by_hop};
use super::send::{SendFailure, UpstreamBody, UpstreamSender};
use super::table::{NoRoute, RequestPermit, Route, RoutingTable};
use super::upstream::{InFlightGuard, Pool, Server};

/// State of a worker's slow path.
#[derive(Clone)]
pub struct SlowPath {
    router: Arc<RoutingTable>,
    shard: usize,
    sender: Arc<UpstreamSender<Lent>>,
}

impl SlowPath {
    /// Returns the slow path of the worker that counts in this shard.
    pub fn new(router: Arc<RoutingTable>, shard: usize) -> Self {
        let sender = Arc::new(UpstreamSender::new(&router.settings));
        Self { sender, shard, router }
    }

    /// Serves a connection of which this much was read, until it ends; `shutdown` lets its open requests end.
    pub async fn serve<S>(
        &self,
        ahead: Vec<u8>,
        stream: S,
        peer: SocketAddr,
        place: Admitted,
        limiter: &ConnectionLimiter,
        shutdown: &CancellationToken,
    ) where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let service = service_fn(|request| {
            place.asked();
            let general = self.clone();
            async move { Ok::<_, Infallible>(answer(&general, request, peer).await) }
        });
        let stream = TokioIo::new(Rewound { ahead: ahead.into(), stream });
        let mut http = limiter.http();
        // A client that only ends its side is answered.
        http.http1().half_close(true);
        let connection = async {
            let mut connection = pin!(http.serve_connection_with_upgrades(stream, service));
            tokio::select! {
                ended = connection.as_mut() => return ended,
                () = shutdown.cancelled() => connection.as_mut().graceful_shutdown(),
            }
            connection.await
        };
        limiter.watch(connection, &place, peer).await;
    }

    fn count(&self, route: &Route, pick: Side, status: u16, began: Mono, error: bool) {
        self.router.count(self.shard, route, pick, status, began, error);
    }
}

/// A connection of which something was read already.
struct Rewound<S> {
    ahead: Bytes,
    stream: S,
}

impl<S: AsyncRead + Unpin> AsyncRead for Rewound<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.ahead.is_empty() {
            return Pin::new(&mut self.stream).poll_read(cx, into);
        }
        let length = self.ahead.len().min(into.remaining());
        into.put_slice(&self.ahead.split_to(length));
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Rewound<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, parts)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

async fn answer(general: &SlowPath, request: Request<Incoming>, peer: SocketAddr) -> Response<Body> {
    let router = &general.router;
    if let Some(response) = status::answer(&router.node, request.method(), request.uri()).await {
        return response.map(own);
    }
    let grpc = is_grpc(request.headers());
    let Some(place) = router.place() else {
        let mut response = problem(StatusCode::SERVICE_UNAVAILABLE, "too many requests at once", grpc);
        response.headers_mut().insert(http::header::RETRY_AFTER, HeaderValue::from_static("1"));
        return response;
    };
    let table = router.table();
    match table.route_of(&router.settings, request.uri().path(), request.headers()) {
        Ok(route) => forward(general, route, request, peer, place).await,
        Err(NoRoute { status, why }) => problem(StatusCode::from_u16(status).unwrap_or_default(), &why, grpc),
    }
}

fn is_grpc(headers: &HeaderMap) -> bool {
    headers.get(CONTENT_TYPE).is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc"))
}

/// State of a request's body, which [`Lent`] reports to the task that waits for the answer.
struct Upload {
    /// The body, while no attempt has it.
    body: Mutex<Option<Incoming>>,
    /// One of `MOVING`, `AWAITED` and `CUT`.
    state: AtomicU8,
    /// When something last came from the client, in milliseconds since `began`.
    moved_ms: AtomicU64,
    began: Instant,
    /// When everything must be over.
    end: Option<Instant>,
}

/// The upstream takes what comes, or everything came.
const MOVING: u8 = 0;
/// The client has more to send, and the upstream waits for it.
const AWAITED: u8 = 1;
/// The client ended the connection before the answer's end.
const CUT: u8 = 2;

impl Upload {
    /// Returns a request's body that has just begun; request and answer may take `total_ms`, 0 for ever.
    fn new(body: Incoming, total_ms: u64) -> Self {
        let (state, began) = (AtomicU8::new(MOVING), Instant::now());
        let end = (total_ms > 0).then(|| began + Duration::from_millis(total_ms));
        Self { body: Mutex::new(Some(body)), state, moved_ms: AtomicU64::new(0), began, end }
    }

    /// Returns `until`, or the end of everything when that is sooner.
    fn bounded(&self, until: Instant) -> Instant {
        self.end.map_or(until, |end| end.min(until))
    }

    fn body(&self) -> std::sync::MutexGuard<'_, Option<Incoming>> {
        self.body.lock().expect("nobody panics with a body in hand")
    }

    fn is(&self, state: u8) -> bool {
        self.state.load(Relaxed) == state
    }

    fn moved(&self) -> Instant {
        self.began + Duration::from_millis(self.moved_ms.load(Relaxed))
    }
}

/// A request's body, lent to an attempt: it comes back when the attempt ends without having read from it.
pub struct Lent {
    body: Option<Incoming>,
    upload: Arc<Upload>,
    read: bool,
}

impl hyper::body::Body for Lent {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        self.read = true;
        let Some(body) = &mut self.body else { return Poll::Ready(None) };
        let polled = Pin::new(body).poll_frame(cx);
        let state = match &polled {
            Poll::Pending => AWAITED,
            Poll::Ready(Some(Err(_))) => CUT,
            Poll::Ready(_) => {
                self.upload.moved_ms.store(self.upload.began.elapsed().as_millis() as u64, Relaxed);
                MOVING
            }
        };
        self.upload.state.store(state, Relaxed);
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(|body| body.is_end_stream())
    }

    fn size_hint(&self) -> SizeHint {
        self.body.as_ref().map_or_else(|| SizeHint::with_exact(0), |body| body.size_hint())
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        if !self.read {
            let body = self.body.take();
            *self.upload.body() = body;
        }
    }
}

/// Why an attempt brought no answer.
enum ForwardFailure {
    /// Nothing was sent: another server may be tried.
    Unreachable(String),
    /// No first byte in time.
    Late,
    /// The upstream ended the connection before its answer's end; the reason in words.
    Broken(String),
    /// The client broke off, or stopped sending: nobody's error.
    Client(&'static str),
}

/// Carries a request to a server of the side that was picked.
async fn forward(
    general: &SlowPath,
    route: &Arc<Route>,
    mut request: Request<Incoming>,
    peer: SocketAddr,
    place: RequestPermit,
) -> Response<Body> {
    let router = &general.router;
    let began = router.now();
    let mut pick = router.pick(route, request.headers(), &peer.ip().to_string(), began);
    let grpc = is_grpc(request.headers());
    let upgrade = request.headers().contains_key(UPGRADE).then(|| hyper::upgrade::on(&mut request));
    let (mut head, body) = request.into_parts();
    prepare(&mut head.headers, &route.reads, &head.uri, peer);
    let upload = Arc::new(Upload::new(body, router.settings.total_timeout_ms));
    loop {
        let pool = route.pool(pick);
        if pool.servers.is_empty() {
            return answered_here(general, route, pool, pick, began);
        }
        match attempt(general, pool, &head, &upload, began).await {
            Ok((mut answer, in_flight)) if answer.status() == StatusCode::SWITCHING_PROTOCOLS => {
                general.count(route, pick, 101, began, false);
                let Some(client) = upgrade else {
                    return problem(StatusCode::BAD_GATEWAY, "found a switch of protocols that nobody asked for", grpc);
                };
                join(client, hyper::upgrade::on(&mut answer), place, in_flight);
                let (mut head, _) = answer.into_parts();
                mark(&mut head.headers, route, pool);
                head.extensions.clear();
                return Response::from_parts(head, own(Default::default()));
            }
            Ok((answer, in_flight)) => {
                let counted = false;
                let outcome = OutcomeGuard {
                    general: general.clone(),
                    route: route.clone(),
                    pick,
                    status: answer.status().as_u16(),
                    began,
                    counted,
                    upload,
                    in_flight,
                    grpc,
                    _place: place,
                };
                return passed_on(pool, answer, outcome);
            }
            Err(failure) => {
                if !matches!(failure, ForwardFailure::Client(_)) {
                    general.count(route, pick, 502, began, true);
                }
                let untouched = upload.body().is_some();
                if pick == Side::Canary && untouched && matches!(failure, ForwardFailure::Unreachable(_)) {
                    // A canary that isn't there costs users nothing. Never the other way round.
                    pick = Side::Stable;
                    continue;
                }
                let (status, error) = match failure {
                    ForwardFailure::Unreachable(why) => {
                        (StatusCode::BAD_GATEWAY, format!("no server of {} can be reached: {why}", pool.version))
                    }
                    ForwardFailure::Late => (
                        StatusCode::GATEWAY_TIMEOUT,
                        format!("{} sent no answer within {} ms", pool.version, router.settings.first_byte_timeout_ms),
                    ),
                    ForwardFailure::Broken(why) => {
                        (StatusCode::BAD_GATEWAY, format!("{} broke off: {why}", pool.version))
                    }
                    ForwardFailure::Client(why) => (StatusCode::REQUEST_TIMEOUT, why.to_string()),
                };
                let mut response = problem(status, &error, grpc);
                mark(response.headers_mut(), route, pool);
                return response;
            }
        }
    }
}

/// Joins both sides of a connection that is HTTP no more.
fn join(
    client: hyper::upgrade::OnUpgrade,
    upstream: hyper::upgrade::OnUpgrade,
    place: RequestPermit,
    in_flight: InFlightGuard,
) {
    tokio::spawn(async move {
        let _held = (place, in_flight);
        if let (Ok(client), Ok(upstream)) = tokio::join!(client, upstream) {
            let _ = tokio::io::copy_bidirectional(&mut TokioIo::new(client), &mut TokioIo::new(upstream)).await;
        }
    });
}

/// Tries a version's servers until one takes the request.
async fn attempt(
    general: &SlowPath,
    pool: &Pool,
    head: &http::request::Parts,
    upload: &Arc<Upload>,
    began: Mono,
) -> Result<(Response<UpstreamBody>, InFlightGuard), ForwardFailure> {
    let (mut unreachable, mut tried) = (String::new(), Vec::new());
    while let Some(in_flight) = pool.choose(began, &tried) {
        let server = in_flight.server.clone();
        tried.push(server.id);
        let body = upload.body().take();
        let body = Lent { body, upload: upload.clone(), read: false };
        let request = outgoing(head, &server, body);
        let limit = Duration::from_millis(general.router.settings.first_byte_timeout_ms);
        let answered = in_time(limit, upload, general.sender.send(&server, request)).await;
        if !matches!(answered, Some(Ok(_))) && !upload.is(CUT) {
            in_flight.ended(true, general.router.now());
        }
        match answered {
            Some(Ok(answer)) => return Ok((answer, in_flight)),
            Some(Err(SendFailure::Local(why) | SendFailure::Unreachable(why))) => {
                unreachable = format!("{}: {why}", server.authority)
            }
            Some(Err(_)) if upload.is(CUT) => return Err(ForwardFailure::Client("the request's body broke off")),
            Some(Err(SendFailure::NotProcessed(why) | SendFailure::Stale(why) | SendFailure::Broken(why))) => {
                return Err(ForwardFailure::Broken(why));
            }
            None if upload.is(AWAITED) => return Err(ForwardFailure::Client("the request's body stopped coming")),
            None => return Err(ForwardFailure::Late),
        }
    }
    Err(ForwardFailure::Unreachable(unreachable))
}

/// Waits for an answer until `limit` after the later of this call and the last that came from the client; none when
/// that passed.
async fn in_time<T>(limit: Duration, upload: &Upload, answer: impl Future<Output = T>) -> Option<T> {
    let mut answer = pin!(answer);
    let mut until = upload.bounded(Instant::now() + limit);
    loop {
        if let Ok(answer) = tokio::time::timeout_at(until, answer.as_mut()).await {
            return Some(answer);
        }
        let later = upload.bounded(upload.moved() + limit);
        if later <= until {
            return None;
        }
        until = later;
    }
}

fn outgoing(head: &http::request::Parts, server: &Server, body: Lent) -> Request<Lent> {
    let mut request = Request::new(body);
    *request.method_mut() = head.method.clone();
    *request.headers_mut() = head.headers.clone();
    if server.http2 {
        request.headers_mut().remove(CONNECTION);
        request.headers_mut().remove(UPGRADE);
        *request.version_mut() = http::Version::HTTP_2;
    } else {
        request.headers_mut().remove(TE);
    }
    let mut uri = head.uri.clone().into_parts();
    uri.scheme = Some(Scheme::HTTP);
    uri.authority = Some(server.authority.clone());
    uri.path_and_query.get_or_insert_with(|| http::uri::PathAndQuery::from_static("/"));
    *request.uri_mut() = Uri::from_parts(uri).expect("a scheme, an authority and a path make a URI");
    request
}

/// Makes a client's headers an upstream's; `configured` are the fields that the service's rollout reads.
fn prepare(headers: &mut HeaderMap, configured: &[String], uri: &Uri, peer: SocketAddr) {
    let upgrade = headers.get(UPGRADE).cloned();
    let trailers = headers.get(TE).is_some_and(|te| te == "trailers");
    strip(headers, configured);
    if let Some(upgrade) = upgrade {
        headers.insert(UPGRADE, upgrade);
        headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
    }
    if trailers {
        headers.insert(TE, HeaderValue::from_static("trailers"));
    }
    if let Some(authority) = uri.authority().filter(|_| !headers.contains_key(HOST))
        && let Ok(host) = HeaderValue::from_str(authority.as_str())
    {
        headers.insert(HOST, host);
    }
    if let Some(host) = headers.get(HOST).cloned() {
        headers.entry("x-forwarded-host").or_insert(host);
    }
    headers.entry("x-forwarded-proto").or_insert(HeaderValue::from_static("http"));
    let before = headers.get_all("x-forwarded-for").iter().filter_map(|value| value.to_str().ok());
    let through = before.map(str::to_string).chain([peer.ip().to_string()]).collect::<Vec<_>>().join(", ");
    if headers.contains_key("forwarded") {
        let node = if peer.is_ipv6() { format!("\"[{}]\"", peer.ip()) } else { peer.ip().to_string() };
        if let Ok(line) = HeaderValue::from_str(&format!("for={node};proto=http")) {
            headers.append("forwarded", line);
        }
    }
    if let Ok(through) = HeaderValue::from_str(&through) {
        headers.insert("x-forwarded-for", through);
    }
    headers.append(VIA, HeaderValue::from_static("1.1 aviary"));
}

/// Removes the fields that concern one connection only, and those that a Connection option names and may remove.
fn strip(headers: &mut HeaderMap, configured: &[String]) {
    let named: Vec<HeaderName> = (headers.get_all(CONNECTION).iter())
        .flat_map(|value| hop::options(value.as_bytes()))
        .filter_map(|name| HeaderName::from_bytes(name).ok())
        .filter(|name| !hop::is_relied_on(name.as_str(), configured))
        .collect();
    named.into_iter().for_each(|name| drop(headers.remove(name)));
    let hops: Vec<_> = headers.keys().filter(|name| is_hop_by_hop(name.as_str())).cloned().collect();
    hops.into_iter().for_each(|name| drop(headers.remove(name)));
}

/// Adds the headers that say which version served.
fn mark(headers: &mut HeaderMap, route: &Route, pool: &Pool) {
    if let Ok(version) = HeaderValue::from_str(pool.version.as_str()) {
        headers.insert("x-served-by", version);
    }
    headers.insert("x-routing-version", HeaderValue::from(route.serving.routing_version));
}

/// A version without servers: the node says who would have served.
fn answered_here(general: &SlowPath, route: &Route, pool: &Pool, pick: Side, began: Mono) -> Response<Body> {
    let node = general.router.node.published.view().node.clone();
    let body = json!({
        "service": route.service, "served_by": pool.version, "routing_version": route.serving.routing_version, "node": node,
    });
    let mut response = Response::new(own(body.to_string().into()));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    mark(response.headers_mut(), route, pool);
    general.count(route, pick, 200, began, false);
    response
}

/// An upstream's answer, on its way to the client.
fn passed_on(pool: &Pool, answer: Response<UpstreamBody>, mut outcome: OutcomeGuard) -> Response<Body> {
    let (mut head, body) = answer.into_parts();
    strip(&mut head.headers, &[]);
    mark(&mut head.headers, &outcome.route, pool);
    if head.status.is_server_error() || (outcome.grpc && grpc_failed(&head.headers)) {
        // At once, not at the body's end: the circuit breaker must not wait for it.
        outcome.count(true);
    }
    let idle = Duration::from_millis(outcome.general.router.settings.idle_timeout_ms);
    let silence = Box::pin(tokio::time::sleep_until(outcome.upload.bounded(Instant::now() + idle)));
    let passing = Passing { body, idle, silence, outcome };
    head.extensions.clear();
    Response::from_parts(head, passing.boxed_unsync())
}

/// Returns true for a gRPC status that blames the server, as a 5xx does: unknown, deadline exceeded, resource
/// exhausted, internal, unavailable, data loss.
fn grpc_failed(headers: &HeaderMap) -> bool {
    let status = headers.get("grpc-status").map(HeaderValue::as_bytes);
    matches!(status, Some(b"2" | b"4" | b"8" | b"13" | b"14" | b"15"))
}

/// Outcome that is counted when a body ends, fails, or is dropped because its client left.
struct OutcomeGuard {
    general: SlowPath,
    route: Arc<Route>,
    pick: Side,
    status: u16,
    began: Mono,
    counted: bool,
    upload: Arc<Upload>,
    in_flight: InFlightGuard,
    grpc: bool,
    _place: RequestPermit,
}

impl OutcomeGuard {
    fn count(&mut self, error: bool) {
        if !std::mem::replace(&mut self.counted, true) {
            self.general.count(&self.route, self.pick, self.status, self.began, error);
            self.in_flight.ended(error, self.began);
        }
    }
}

impl Drop for OutcomeGuard {
    fn drop(&mut self) {
        self.count(false);
    }
}

/// An answer's body with a limit on its silence.
struct Passing {
    body: UpstreamBody,
    idle: Duration,
    silence: Pin<Box<Sleep>>,
    outcome: OutcomeGuard,
}

impl hyper::body::Body for Passing {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match Pin::new(&mut self.body).poll_frame(cx) {
            Poll::Ready(Some(Ok(frame))) => {
                if self.outcome.grpc && frame.trailers_ref().is_some_and(grpc_failed) {
                    self.outcome.count(true);
                }
                let now = Instant::now();
                if self.outcome.upload.end.is_some_and(|end| end <= now) {
                    self.outcome.count(true);
                    return Poll::Ready(Some(Err("the answer took too long".into())));
                }
                let until = self.outcome.upload.bounded(now + self.idle);
                self.silence.as_mut().reset(until);
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Ready(Some(Err(error))) => {
                // An upload that the client cuts takes the upstream's connection with it.
                let upstreams = !self.outcome.upload.is(CUT);
                self.outcome.count(upstreams);
                Poll::Ready(Some(Err(error)))
            }
            Poll::Ready(None) => {
                self.outcome.count(false);
                Poll::Ready(None)
            }
            Poll::Pending => {
                ready!(self.silence.as_mut().poll(cx));
                self.outcome.count(true);
                let ms = self.idle.as_millis();
                Poll::Ready(Some(Err(format!("the upstream was silent for {ms} ms").into())))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_of_one_connection_stay_there() {
        let mut headers = HeaderMap::new();
        for (name, value) in [("connection", "close, X-Secret"), ("x-secret", "1"), ("te", "gzip"), ("x-kept", "1")] {
            headers.insert(name, HeaderValue::from_static(value));
        }
        let uri = "http://models.example/predict".parse().unwrap();
        prepare(&mut headers, &[], &uri, "127.0.0.9:1".parse().unwrap());
        let names: Vec<_> = headers.keys().map(HeaderName::as_str).collect();
        assert_eq!(names, ["x-kept", "host", "x-forwarded-host", "x-forwarded-proto", "x-forwarded-for", "via"]);
        assert_eq!(headers["x-forwarded-for"], "127.0.0.9");
        assert_eq!(headers["host"], "models.example");
    }
    #[test]
    fn no_connection_option_removes_a_field_that_is_relied_on() {
        let configured = ["x-user".to_string()];
        for name in hop::RELIED_ON.into_iter().chain(["x-user"]).filter(|name| !is_hop_by_hop(name)) {
            let mut headers = HeaderMap::new();
            headers.insert(HeaderName::from_static(name), HeaderValue::from_static("7"));
            headers.insert("x-mine", HeaderValue::from_static("1"));
            let options = format!("X-Mine, {}", name.to_uppercase());
            headers.insert(CONNECTION, HeaderValue::from_str(&options).unwrap());
            strip(&mut headers, &configured);
            assert_eq!(headers.keys().map(HeaderName::as_str).collect::<Vec<_>>(), [name]);
        }
    }
}
