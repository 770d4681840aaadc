//! What each connection of a port is doing, so that those that are needed least can make room.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use hyper::body::{Body, Frame, SizeHint};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{Admitted, PortLimits};

/// Between two looks whether a connection may go.
const LOOK: Duration = Duration::from_millis(100);
/// One in so many connections makes room at once: to look at all of them for each that comes would cost more than they do.
const EVICTED_SHARE: usize = 64;

/// Extension of an answer to a caller whose token was known: its connection is the last to make room.
#[derive(Debug, Clone, Copy)]
pub struct KnownCaller;

/// One connection.
pub struct Tracked {
    /// Requests whose answers aren't sent to the end.
    open: AtomicUsize,
    /// When a request began or ended last, in milliseconds since the port was opened.
    last_ms: AtomicU64,
    /// One of its requests had a known token.
    pub is_known: AtomicBool,
    /// It has asked for something: before that, it is half open, and bounded as such.
    has_asked: AtomicBool,
    end: CancellationToken,
    /// Of the connection's task, where that looks at `is_evicted` instead of waiting for `end`.
    waker: OnceLock<Waker>,
    is_evicted: AtomicBool,
    began: Instant,
}

impl Tracked {
    fn note(&self) {
        self.last_ms.store(self.began.elapsed().as_millis() as u64, Relaxed);
    }

    fn idle(&self) -> Duration {
        self.began.elapsed().saturating_sub(Duration::from_millis(self.last_ms.load(Relaxed)))
    }

    /// Notes that a request begins, at this moment in milliseconds of any clock that all connections of the port go by.
    pub fn begins(&self, now_ms: u64) {
        self.open.fetch_add(1, Relaxed);
        self.has_asked.store(true, Relaxed);
        self.last_ms.store(now_ms, Relaxed);
    }

    /// Notes that a request ended, in milliseconds as [`Tracked::begins`] has them.
    pub fn ends(&self, now_ms: u64) {
        self.open.fetch_sub(1, Relaxed);
        self.last_ms.store(now_ms, Relaxed);
    }

    /// Has this task woken when the connection is to make room.
    pub fn wakes(&self, waker: Waker) {
        let _ = self.waker.set(waker);
    }

    /// Returns true once the connection is to make room.
    pub fn is_evicted(&self) -> bool {
        self.is_evicted.load(Relaxed)
    }

    fn evict(&self) {
        self.is_evicted.store(true, Relaxed);
        self.end.cancel();
        self.waker.get().into_iter().for_each(Waker::wake_by_ref);
    }

    /// Returns how little the connection is needed, least first: idle ones of unknown callers, then those whose requests last longer
    /// than `patience`, then idle ones of known callers. Others stay.
    fn rank(&self, patience: Option<Duration>) -> Option<u8> {
        match (self.is_known.load(Relaxed), self.open.load(Relaxed) > 0) {
            (false, false) if self.has_asked.load(Relaxed) => Some(0),
            (false, _) => patience.is_some_and(|patience| self.idle() >= patience).then_some(1),
            (true, false) => Some(2),
            (true, true) => None,
        }
    }

    /// Returns when the connection is to end: it makes room, or has been idle for as long as `limit`.
    pub async fn is_not_needed(&self, limit: Option<Duration>) {
        let Some(limit) = limit else { return self.end.cancelled().await };
        loop {
            let left = limit.saturating_sub(self.idle()).max(LOOK);
            if self.end.run_until_cancelled(tokio::time::sleep(left)).await.is_none() {
                return;
            }
            if self.open.load(Relaxed) == 0 && self.idle() >= limit {
                return;
            }
        }
    }
}

/// A request until its answer is sent to the end.
pub struct OpenRequest(Arc<Tracked>);

impl OpenRequest {
    /// Notes that a request begins.
    pub fn begins(connection: &Arc<Tracked>) -> Self {
        connection.open.fetch_add(1, Relaxed);
        connection.has_asked.store(true, Relaxed);
        connection.note();
        Self(connection.clone())
    }
}

impl Drop for OpenRequest {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Relaxed);
        self.0.note();
    }
}

/// The body of an answer, whose request is open until it is dropped.
pub struct TrackedBody<B> {
    pub body: B,
    pub _open: OpenRequest,
}

impl<B: Body + Unpin> Body for TrackedBody<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// The connections of a port.
#[derive(Clone)]
pub struct PortConnections {
    limits: PortLimits,
    began: Instant,
    open: Arc<Mutex<BTreeMap<u64, Arc<Tracked>>>>,
}

impl PortConnections {
    /// Returns those of a port that nobody has connected to yet.
    pub fn new(limits: PortLimits) -> Self {
        Self { limits, began: Instant::now(), open: Arc::default() }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Arc<Tracked>>> {
        self.open.lock().expect("nothing panics while it holds the connections")
    }

    /// Adds a connection.
    pub fn track(&self, place: &Admitted) -> Arc<Tracked> {
        let tracked = Arc::new(Tracked {
            open: AtomicUsize::new(0),
            last_ms: AtomicU64::new(0),
            is_known: AtomicBool::new(false),
            has_asked: AtomicBool::new(false),
            end: CancellationToken::new(),
            waker: OnceLock::new(),
            is_evicted: AtomicBool::new(false),
            began: self.began,
        });
        tracked.note();
        self.lock().insert(place.id, tracked.clone());
        tracked
    }

    /// Removes a connection that ended.
    pub fn forget(&self, place: &Admitted) {
        self.lock().remove(&place.id);
    }

    /// Waits for a place, and ends connections that are needed less while there is none.
    pub async fn make_room_for<T>(&self, place: impl Future<Output = T>) -> T {
        let mut place = std::pin::pin!(place);
        loop {
            let taken = std::future::poll_fn(|cx| Poll::Ready(place.as_mut().poll(cx))).await;
            if let Poll::Ready(place) = taken {
                return place;
            }
            self.evict();
            // A place that becomes free wakes this; a request that has lasted too long doesn't.
            match tokio::time::timeout(LOOK, place.as_mut()).await {
                Ok(place) => return place,
                Err(_) => continue,
            }
        }
    }

    fn evict(&self) {
        let open = self.lock();
        // One that ends already frees its place without another.
        if open.values().any(|tracked| tracked.is_evicted()) {
            return;
        }
        let patience = self.limits.patience;
        let ranked = open.values().filter_map(|tracked| {
            let rank = tracked.rank(patience)?;
            Some(((rank, tracked.last_ms.load(Relaxed)), tracked))
        });
        let mut ranked: Vec<_> = ranked.collect();
        let count = (self.limits.connections_max / EVICTED_SHARE).max(1).min(ranked.len());
        if count == 0 {
            return;
        }
        ranked.select_nth_unstable_by_key(count - 1, |(key, _)| *key);
        // A known caller's connection goes only for itself.
        let least = ranked[..count].iter().map(|((rank, _), _)| *rank).min();
        let evicted: Vec<_> = ranked[..count].iter().filter(|((rank, _), _)| Some(*rank) == least).collect();
        evicted.iter().for_each(|(_, tracked)| tracked.evict());
        metrics::counter!("aviary_connections_refused_total", "port" => self.limits.name, "class" => "evicted")
            .increment(evicted.len() as u64);
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use http::Response;
    use http_body_util::{BodyExt as _, Empty, combinators::UnsyncBoxBody};
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::{TcpListener, TcpStream};

    use super::*;
    use crate::listener::serve;

    type Text = UnsyncBoxBody<Bytes, std::convert::Infallible>;

    /// A body that never ends, as of a client that takes nothing.
    struct Endless;

    impl Body for Endless {
        type Data = Bytes;
        type Error = std::convert::Infallible;

        fn poll_frame(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
            Poll::Pending
        }
    }

    /// Opens a port with four places; `/known` is asked by known callers, `/endless` never answered to the end.
    async fn port(header_timeout: Duration, idle_timeout: Duration) -> u16 {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let limits = PortLimits {
            name: "test",
            connections_max: 4,
            half_open_max: 4,
            header_timeout,
            idle_timeout: Some(idle_timeout),
            patience: Some(header_timeout),
            grace: Duration::ZERO,
        };
        let answer = |request: http::Request<hyper::body::Incoming>, _| async move {
            let path = request.uri().path();
            let body: Text = if path == "/endless" { Endless.boxed_unsync() } else { Empty::new().boxed_unsync() };
            let mut response = Response::new(body);
            if path == "/known" {
                response.extensions_mut().insert(KnownCaller);
            }
            response
        };
        tokio::spawn(serve(listener, limits, CancellationToken::new(), answer));
        port
    }

    /// Connects and asks for a path; returns the connection, on which a head of an answer came within a second.
    async fn ask(port: u16, path: &str) -> Option<TcpStream> {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
        again(&mut stream, path).await.then_some(stream)
    }

    async fn again(stream: &mut TcpStream, path: &str) -> bool {
        let head = format!("GET {path} HTTP/1.1\r\nhost: x\r\n\r\n");
        if stream.write_all(head.as_bytes()).await.is_err() {
            return false;
        }
        let mut bytes = [0; 1024];
        let read = tokio::time::timeout(Duration::from_millis(1_500), stream.read(&mut bytes)).await;
        matches!(read, Ok(Ok(n)) if bytes[..n].starts_with(b"HTTP/1.1 200"))
    }

    #[tokio::test]
    async fn an_idle_connection_of_somebody_unknown_makes_room_and_a_known_caller_keeps_its_place() {
        let port = port(Duration::from_secs(10), Duration::from_secs(60)).await;
        let mut known = ask(port, "/known").await.unwrap();
        let mut open = Vec::new();
        for number in 0..12 {
            open.push(ask(port, "/livez").await.unwrap_or_else(|| panic!("connection {number} found no place")));
        }
        assert!(again(&mut known, "/known").await);
        assert!(!again(&mut open[0], "/livez").await, "the idlest one made room");
    }

    #[tokio::test]
    async fn requests_without_an_end_keep_nobody_out() {
        let port = port(Duration::from_millis(500), Duration::from_secs(60)).await;
        let mut open = Vec::new();
        for _ in 0..4 {
            open.push(ask(port, "/endless").await.unwrap());
        }
        assert!(ask(port, "/livez").await.is_some());
    }

    #[tokio::test]
    async fn an_idle_connection_ends_after_its_time_and_an_open_request_does_not() {
        let port = port(Duration::from_secs(10), Duration::from_millis(300)).await;
        let (mut idle, mut open) = (ask(port, "/livez").await.unwrap(), ask(port, "/endless").await.unwrap());
        let mut bytes = [0; 64];
        let ended = tokio::time::timeout(Duration::from_secs(2), idle.read(&mut bytes)).await;
        assert!(matches!(ended, Ok(Ok(0) | Err(_))), "{ended:?}");
        let lasts = tokio::time::timeout(Duration::from_millis(300), open.read(&mut bytes)).await;
        assert!(lasts.is_err(), "{lasts:?}");
    }
}
