//! One request, carried to an upstream and back, bodies streaming both ways.

use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONNECTION, HOST, HeaderName, VIA};
use http::uri::{Authority, Scheme};
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, Uri};
use http_body_util::BodyExt;
use hyper::body::{Frame, Incoming, SizeHint};
use serde_json::json;
use tokio::time::{Instant, Sleep};

use crate::domain::time::Mono;

use super::outcome::FAILURES_MAX;
use super::table::{Pick, Pool, Route, Router};
use super::{Body, BodyError, problem};

/// Headers that concern one connection only (RFC 9110, 7.6.1).
const HOP_BY_HOP: [&str; 8] = [
    "connection",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "proxy-connection",
    "te",
    "transfer-encoding",
    "upgrade",
];

/// What a request's body is doing, told by [`Lent`] to whoever waits for the answer.
struct Upload {
    /// The body, while no attempt has it.
    body: Mutex<Option<Incoming>>,
    /// One of `MOVING`, `AWAITED` and `CUT`.
    state: AtomicU8,
    /// When something last came from the client, in milliseconds since `began`.
    moved_ms: AtomicU64,
    began: Instant,
}

/// The upstream takes what comes, or everything came.
const MOVING: u8 = 0;
/// The client has more to send, and the upstream waits for it.
const AWAITED: u8 = 1;
/// The client broke off.
const CUT: u8 = 2;

impl Upload {
    fn new(body: Incoming) -> Self {
        let state = AtomicU8::new(MOVING);
        Self { body: Mutex::new(Some(body)), state, moved_ms: AtomicU64::new(0), began: Instant::now() }
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
enum Failure {
    /// Nothing was sent: another server may be tried.
    Unreachable(String),
    /// No first byte in time.
    Late,
    /// The upstream broke off.
    Broken(String),
    /// The client broke off, or stopped sending: nobody's error.
    Client(&'static str),
}

/// Carries a request to whoever serves it.
pub async fn forward(
    router: &Arc<Router>,
    route: &Arc<Route>,
    request: Request<Incoming>,
    peer: SocketAddr,
) -> Response<Body> {
    let mut pick = router.pick(route, request.headers());
    let (mut head, body) = request.into_parts();
    prepare(&mut head.headers, &head.uri, peer);
    let upload = Arc::new(Upload::new(body));
    let began = now(router);
    loop {
        let pool = match (pick, &route.canary) {
            (Pick::Canary, Some(canary)) => canary,
            _ => &route.stable,
        };
        if pool.servers.is_empty() {
            return answered_here(router, route, pool, pick, began);
        }
        match attempt(router, pool, &head, &upload).await {
            Ok(answer) => return passed_on(router, route, pool, pick, began, answer, upload),
            Err(failure) => {
                if !matches!(failure, Failure::Client(_)) {
                    count(router, route, pick, 502, began, true);
                }
                let untouched = upload.body().is_some();
                if pick == Pick::Canary && untouched && matches!(failure, Failure::Unreachable(_)) {
                    // A canary that isn't there costs users nothing. Never the other way round.
                    pick = Pick::Stable;
                    continue;
                }
                let (status, error) = match failure {
                    Failure::Unreachable(why) => {
                        (StatusCode::BAD_GATEWAY, format!("no server of {} can be reached: {why}", pool.version))
                    }
                    Failure::Late => (
                        StatusCode::GATEWAY_TIMEOUT,
                        format!("{} sent no answer within {} ms", pool.version, router.settings.first_byte_timeout_ms),
                    ),
                    Failure::Broken(why) => (StatusCode::BAD_GATEWAY, format!("{} broke off: {why}", pool.version)),
                    Failure::Client(why) => (StatusCode::REQUEST_TIMEOUT, why.to_string()),
                };
                let mut response = problem(status, json!({"error": error}));
                mark(response.headers_mut(), route, pool);
                return response;
            }
        }
    }
}

/// Tries a version's servers until one takes the request.
async fn attempt(
    router: &Router,
    pool: &Pool,
    head: &http::request::Parts,
    upload: &Arc<Upload>,
) -> Result<Response<Incoming>, Failure> {
    let mut unreachable = String::new();
    for server in pool.in_turn() {
        let body = upload.body().take();
        let body = Lent { body, upload: upload.clone(), read: false };
        let request = outgoing(head, server, body);
        let limit = Duration::from_millis(router.settings.first_byte_timeout_ms);
        match in_time(limit, upload, router.client.request(request)).await {
            Some(Ok(answer)) => return Ok(answer),
            Some(Err(error)) if error.is_connect() => unreachable = format!("{server}: {}", root(&error)),
            Some(Err(_)) if upload.is(CUT) => return Err(Failure::Client("the request's body broke off")),
            Some(Err(error)) => return Err(Failure::Broken(root(&error))),
            None if upload.is(AWAITED) => return Err(Failure::Client("the request's body stopped coming")),
            None => return Err(Failure::Late),
        }
    }
    Err(Failure::Unreachable(unreachable))
}

/// Waits for an answer until `limit` after the later of this call and the last that came from the client; none when
/// that passed.
async fn in_time<T>(limit: Duration, upload: &Upload, answer: impl Future<Output = T>) -> Option<T> {
    let mut answer = pin!(answer);
    let mut until = Instant::now() + limit;
    loop {
        if let Ok(answer) = tokio::time::timeout_at(until, answer.as_mut()).await {
            return Some(answer);
        }
        let later = upload.moved() + limit;
        if later <= until {
            return None;
        }
        until = later;
    }
}

fn root(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(next) = cause.source() {
        cause = next;
    }
    cause.to_string()
}

fn outgoing(head: &http::request::Parts, server: &Authority, body: Lent) -> Request<Lent> {
    let mut request = Request::new(body);
    *request.method_mut() = head.method.clone();
    *request.headers_mut() = head.headers.clone();
    let mut uri = head.uri.clone().into_parts();
    uri.scheme = Some(Scheme::HTTP);
    uri.authority = Some(server.clone());
    uri.path_and_query.get_or_insert_with(|| http::uri::PathAndQuery::from_static("/"));
    *request.uri_mut() = Uri::from_parts(uri).expect("a scheme, an authority and a path make a URI");
    request
}

/// Makes a client's headers an upstream's.
fn prepare(headers: &mut HeaderMap, uri: &Uri, peer: SocketAddr) {
    strip(headers);
    if let Some(authority) = uri.authority().filter(|_| !headers.contains_key(HOST))
        && let Ok(host) = HeaderValue::from_str(authority.as_str())
    {
        headers.insert(HOST, host);
    }
    if let Some(host) = headers.get(HOST).cloned() {
        headers.entry("x-forwarded-host").or_insert(host);
    }
    headers.entry("x-forwarded-proto").or_insert(HeaderValue::from_static("http"));
    let before = headers.get("x-forwarded-for").and_then(|value| value.to_str().ok());
    let through = before.map_or_else(|| peer.ip().to_string(), |before| format!("{before}, {}", peer.ip()));
    if let Ok(through) = HeaderValue::from_str(&through) {
        headers.insert("x-forwarded-for", through);
    }
    headers.append(VIA, HeaderValue::from_static("1.1 aviary"));
}

/// Takes out what concerns one connection only, also what its Connection header names.
fn strip(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = (headers.get_all(CONNECTION).iter())
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    named.into_iter().for_each(|name| drop(headers.remove(name)));
    HOP_BY_HOP.iter().for_each(|name| drop(headers.remove(*name)));
}

/// Says who served.
fn mark(headers: &mut HeaderMap, route: &Route, pool: &Pool) {
    if let Ok(version) = HeaderValue::from_str(pool.version.as_str()) {
        headers.insert("x-served-by", version);
    }
    headers.insert("x-routing-version", HeaderValue::from(route.serving.routing_version));
}

fn now(router: &Router) -> Mono {
    router.node.published.clock().now().mono
}

fn count(router: &Router, route: &Arc<Route>, pick: Pick, status: u16, began: Mono, error: bool) {
    let latency_us = now(router).0.saturating_sub(began.0);
    count_at(router, route, pick, status, latency_us, error);
}

fn count_at(router: &Router, route: &Arc<Route>, pick: Pick, status: u16, latency_us: u64, error: bool) {
    let track = &route.track;
    match (pick, &track.canary) {
        (Pick::Canary, Some(canary)) => {
            canary.add(status, latency_us, error);
            if track.breaker.canary(error) {
                let reason = format!("the last {FAILURES_MAX} canary answers failed while stable's did not");
                let (node, service, version) =
                    (router.node.clone(), route.service.clone(), route.serving.routing_version);
                tokio::spawn(async move { node.breaker_tripped(service, version, reason).await });
            }
        }
        _ => {
            track.stable.add(status, latency_us, error);
            track.breaker.stable(error);
        }
    }
}

/// A version without servers: the node says who would have served.
fn answered_here(router: &Router, route: &Arc<Route>, pool: &Pool, pick: Pick, began: Mono) -> Response<Body> {
    let node = router.node.published.view().node.clone();
    let body = json!({
        "service": route.service, "served_by": pool.version, "routing_version": route.serving.routing_version, "node": node,
    });
    let mut response = problem(StatusCode::OK, body);
    mark(response.headers_mut(), route, pool);
    count(router, route, pick, 200, began, false);
    response
}

/// An upstream's answer, on its way to the client.
fn passed_on(
    router: &Arc<Router>,
    route: &Arc<Route>,
    pool: &Pool,
    pick: Pick,
    began: Mono,
    answer: Response<Incoming>,
    upload: Arc<Upload>,
) -> Response<Body> {
    let (mut head, body) = answer.into_parts();
    strip(&mut head.headers);
    mark(&mut head.headers, route, pool);
    let status = head.status.as_u16();
    let counted = head.status.is_server_error();
    if counted {
        // At once, not at the body's end: the breaker is in a hurry.
        count(router, route, pick, status, began, true);
    }
    let idle = Duration::from_millis(router.settings.idle_timeout_ms);
    let passing = Passing {
        body,
        idle,
        silence: Box::pin(tokio::time::sleep(idle)),
        outcome: Outcome { router: router.clone(), route: route.clone(), pick, status, began, counted, upload },
    };
    head.extensions.clear();
    Response::from_parts(head, passing.boxed_unsync())
}

/// What is to be counted when a body ends, breaks, or is dropped by a client that went away.
struct Outcome {
    router: Arc<Router>,
    route: Arc<Route>,
    pick: Pick,
    status: u16,
    began: Mono,
    counted: bool,
    upload: Arc<Upload>,
}

impl Outcome {
    fn count(&mut self, error: bool) {
        if !std::mem::replace(&mut self.counted, true) {
            count(&self.router, &self.route, self.pick, self.status, self.began, error);
        }
    }
}

impl Drop for Outcome {
    fn drop(&mut self) {
        self.count(false);
    }
}

/// An answer's body with a limit on its silence.
struct Passing {
    body: Incoming,
    idle: Duration,
    silence: Pin<Box<Sleep>>,
    outcome: Outcome,
}

impl hyper::body::Body for Passing {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match Pin::new(&mut self.body).poll_frame(cx) {
            Poll::Ready(Some(Ok(frame))) => {
                let until = Instant::now() + self.idle;
                self.silence.as_mut().reset(until);
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Ready(Some(Err(error))) => {
                // An upload that the client cuts takes the upstream's connection with it.
                let upstreams = !self.outcome.upload.is(CUT);
                self.outcome.count(upstreams);
                Poll::Ready(Some(Err(error.into())))
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
        for (name, value) in [("connection", "close, X-Secret"), ("x-secret", "1"), ("te", "trailers"), ("x-kept", "1")]
        {
            headers.insert(name, HeaderValue::from_static(value));
        }
        let uri = "http://models.example/predict".parse().unwrap();
        prepare(&mut headers, &uri, "127.0.0.9:1".parse().unwrap());
        let names: Vec<_> = headers.keys().map(HeaderName::as_str).collect();
        assert_eq!(names, ["x-kept", "host", "x-forwarded-host", "x-forwarded-proto", "x-forwarded-for", "via"]);
        assert_eq!(headers["x-forwarded-for"], "127.0.0.9");
        assert_eq!(headers["host"], "models.example");
    }
}
