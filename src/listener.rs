//! What both HTTP ports share: accepting connections, bounding them, and letting them end.
//!
//! A connection holds a place. One that has not asked for anything yet is *half open*: those are few, and the oldest
//! goes when another comes, so that a flood of silent or slow clients costs little memory and keeps nobody out who asks
//! at once.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::error::Error;
use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use hyper::body::{Body, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::server::graceful::GracefulShutdown;
use metrics::Counter;
use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

mod frames;
mod tracked;

pub use frames::FrameGuard;
pub use tracked::KnownCaller;
use tracked::{OpenRequest, TrackedBody};
pub use tracked::{PortConnections, Tracked};

/// Limits of a port's connections.
#[derive(Debug, Clone, Copy)]
pub struct PortLimits {
    /// The port's name, in logs and metrics.
    pub name: &'static str,
    /// Connections at once; others wait in the system's queue.
    pub connections_max: usize,
    /// Connections at once that have not asked for anything yet.
    pub half_open_max: usize,
    /// Longest wait for a request's headers.
    pub header_timeout: Duration,
    /// How long a connection without an open request is kept, also one that has asked before; none: as long as the client wants.
    /// It makes room for a new one in any case when all places are taken.
    pub idle_timeout: Option<Duration>,
    /// How long an unknown caller's request may last before its connection makes room, too; none: as long as it takes.
    pub patience: Option<Duration>,
    /// How long open requests may take to end after the shutdown.
    pub grace: Duration,
}

/// Bytes of a connection's headers, at most.
const HEADER_BYTES_MAX: u32 = 64 * 1024;
/// Pause after the system refused to accept: it is short of something, and asking again at once would not help.
const ACCEPT_PAUSE: Duration = Duration::from_millis(20);

/// Shortest time between two log lines about connections that can't be accepted.
const REFUSALS_SAID_EVERY: Duration = Duration::from_secs(1);
/// Connections that a listener's end takes from the system's queue, at most.
const LEFT_OVER_MAX: usize = 1024;
/// Silence after which the system asks a peer whether it is still there, how often it asks, and how many times.
const KEEP_ALIVE: TcpKeepalive =
    TcpKeepalive::new().with_time(Duration::from_secs(60)).with_interval(Duration::from_secs(15)).with_retries(4);

/// Has the system end a socket's connection, or those that it accepts, when the peer vanished: within two minutes.
pub fn keep_alive(socket: &impl AsFd) -> io::Result<()> {
    SockRef::from(socket).set_tcp_keepalive(&KEEP_ALIVE)
}

/// Connections without a request, oldest first.
type HalfOpen = Mutex<BTreeMap<u64, CancellationToken>>;

/// Where connections come from: the machine's TCP, or a simulated network.
pub trait Accept: Send {
    /// Stream of bytes of one connection.
    type Stream: AsyncRead + AsyncWrite + Send + Unpin + 'static;

    /// Returns the next connection, and who made it.
    fn accept(&mut self) -> impl Future<Output = io::Result<(Self::Stream, SocketAddr)>> + Send;
}

impl Accept for TcpListener {
    type Stream = TcpStream;

    async fn accept(&mut self) -> io::Result<(TcpStream, SocketAddr)> {
        let (stream, peer) = TcpListener::accept(self).await?;
        // Without it answers wait for more to send; a connection that refuses it is about to end.
        let _ = stream.set_nodelay(true);
        Ok((stream, peer))
    }
}

/// A port's bounds in force, shared by all who accept on it.
#[derive(Clone)]
pub struct ConnectionLimiter {
    limits: PortLimits,
    places: Arc<Semaphore>,
    half_open: Arc<HalfOpen>,
    next: Arc<AtomicU64>,
    evictions: Counter,
    late: Counter,
    refused: Counter,
    refusals: Arc<Mutex<Refusals>>,
}

/// Connections that the system refused to accept, and when that was last said.
#[derive(Debug, Default)]
struct Refusals {
    unsaid: u64,
    said: Option<Instant>,
}

impl Refusals {
    /// Counts one; returns how many are to be logged now, at most once in [`REFUSALS_SAID_EVERY`].
    fn count(&mut self, now: Instant) -> Option<u64> {
        self.unsaid += 1;
        if self.said.is_some_and(|said| now.duration_since(said) < REFUSALS_SAID_EVERY) {
            return None;
        }
        self.said = Some(now);
        Some(std::mem::take(&mut self.unsaid))
    }
}

/// A connection's place. Dropping it gives the place back.
pub struct Admitted {
    /// Cancelled when the connection must end because it has asked for nothing, and others wait.
    pub end: CancellationToken,
    id: u64,
    asked: AtomicBool,
    half_open: Arc<HalfOpen>,
    _place: OwnedSemaphorePermit,
}

impl Admitted {
    /// Says that the connection has asked for something.
    pub fn asked(&self) {
        if !self.asked.swap(true, Relaxed) {
            lock(&self.half_open).remove(&self.id);
        }
    }
}

impl Drop for Admitted {
    fn drop(&mut self) {
        self.asked();
    }
}

/// A connection's place, and what is known of its use.
#[derive(Clone, Copy)]
pub struct HeldPlace<'p> {
    /// The place, which one without a request gives up first.
    pub place: &'p Admitted,
    /// Whether a request is open.
    pub tracked: &'p Arc<Tracked>,
}

fn lock(half_open: &HalfOpen) -> MutexGuard<'_, BTreeMap<u64, CancellationToken>> {
    half_open.lock().expect("nothing panics while it holds the connections")
}

impl ConnectionLimiter {
    /// Returns a limiter with these limits.
    pub fn new(limits: PortLimits) -> Self {
        let refused =
            |class| metrics::counter!("aviary_connections_refused_total", "port" => limits.name, "class" => class);
        Self {
            limits,
            places: Arc::new(Semaphore::new(limits.connections_max)),
            half_open: Arc::default(),
            next: Arc::default(),
            evictions: refused("half_open"),
            late: refused("header_deadline"),
            refused: refused("not_accepted"),
            refusals: Arc::default(),
        }
    }

    /// Returns the limits of this port.
    pub fn limits(&self) -> &PortLimits {
        &self.limits
    }

    /// Returns the next connection, once there is a place for it, which others make; none at the shutdown.
    pub async fn admit<L: Accept>(
        &self,
        listener: &mut L,
        connections: &PortConnections,
        shutdown: &CancellationToken,
    ) -> Option<(L::Stream, SocketAddr, Admitted)> {
        loop {
            let place = connections.make_room_for(self.places.clone().acquire_owned());
            let place = tokio::select! {
                () = shutdown.cancelled() => return None,
                place = place => place.expect("the semaphore is never closed"),
            };
            let accepted = tokio::select! {
                () = shutdown.cancelled() => return None,
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok((stream, peer)) => return Some((stream, peer, self.admitted(place))),
                Err(error) => {
                    // Out of descriptors, mostly: those that are open must end first.
                    self.refused.increment(1);
                    let said = self.refusals.lock().expect("counting doesn't panic").count(Instant::now());
                    if let Some(count) = said {
                        warn!(port = self.limits.name, count, %error, "connections can't be accepted");
                    }
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    /// Returns the connections that wait in the system's queue at the end of a listener, as far as there are places: the
    /// system would reset them with it.
    pub fn left_over<L: Accept>(&self, listener: &mut L) -> Vec<(L::Stream, SocketAddr, Admitted)> {
        let mut cx = Context::from_waker(Waker::noop());
        let next = || {
            let place = self.places.clone().try_acquire_owned().ok()?;
            match pin!(listener.accept()).poll(&mut cx) {
                Poll::Ready(Ok((stream, peer))) => Some((stream, peer, self.admitted(place))),
                Poll::Ready(Err(_)) | Poll::Pending => None,
            }
        };
        std::iter::from_fn(next).take(LEFT_OVER_MAX).collect()
    }

    fn admitted(&self, place: OwnedSemaphorePermit) -> Admitted {
        let (id, end) = (self.next.fetch_add(1, Relaxed), CancellationToken::new());
        let mut open = lock(&self.half_open);
        if open.len() >= self.limits.half_open_max
            && let Some((_, oldest)) = open.pop_first()
        {
            oldest.cancel();
            self.evictions.increment(1);
        }
        open.insert(id, end.clone());
        drop(open);
        let half_open = self.half_open.clone();
        Admitted { end, id, asked: AtomicBool::new(false), half_open, _place: place }
    }

    /// Returns what serves HTTP/1 and HTTP/2 within these limits.
    pub fn http(&self) -> auto::Builder<TokioExecutor> {
        let mut builder = auto::Builder::new(TokioExecutor::new());
        let http1 = &mut builder.http1();
        http1.timer(TokioTimer::new()).header_read_timeout(self.limits.header_timeout);
        http1.max_buf_size(HEADER_BYTES_MAX as usize);
        builder.http2().timer(TokioTimer::new()).max_header_list_size(HEADER_BYTES_MAX);
        builder
    }

    /// Lets a connection run that asks for something in time. hyper's own limit on headers begins once the protocol is
    /// known: a client that says nothing, or half of HTTP/2's preface, would keep its place for ever.
    pub async fn watch(
        &self,
        connection: impl Future<Output = Result<(), Box<dyn Error + Send + Sync>>>,
        place: &Admitted,
        peer: SocketAddr,
    ) {
        let mut connection = pin!(connection);
        let served = async {
            match tokio::time::timeout(self.limits.header_timeout, connection.as_mut()).await {
                Ok(ended) => ended,
                Err(_) if place.asked.load(Relaxed) => connection.await,
                Err(_) => {
                    self.late.increment(1);
                    Err("no request came in time".into())
                }
            }
        };
        if let Some(Err(error)) = place.end.run_until_cancelled(served).await {
            debug!(port = self.limits.name, %peer, error, "connection ended");
        }
    }
}

/// Serves HTTP/1 and HTTP/2 with `answer` until `shutdown`, then lets open requests end.
pub async fn serve<L, A, F, B>(mut listener: L, limits: PortLimits, shutdown: CancellationToken, answer: A)
where
    L: Accept,
    A: Fn(Request<Incoming>, SocketAddr) -> F + Clone + Send + Sync + 'static,
    F: Future<Output = Response<B>> + Send + 'static,
    B: Body<Data = Bytes, Error: Into<Box<dyn Error + Send + Sync>>> + Send + Unpin + 'static,
{
    let limiter = ConnectionLimiter::new(limits);
    let graceful = GracefulShutdown::new();
    let http = limiter.http();
    let connections = PortConnections::new(limits);
    while let Some((stream, peer, place)) = limiter.admit(&mut listener, &connections, &shutdown).await {
        let (place, answer, limiter) = (Arc::new(place), answer.clone(), limiter.clone());
        let (asking, tracked) = (place.clone(), connections.track(&place));
        let asked = tracked.clone();
        let service = service_fn(move |request| {
            asking.asked();
            let (open, tracked) = (OpenRequest::begins(&asked), asked.clone());
            let answered = answer(request, peer);
            async move {
                let response = answered.await;
                if response.extensions().get::<KnownCaller>().is_some() {
                    tracked.is_known.store(true, Relaxed);
                }
                Ok::<_, Infallible>(response.map(|body| TrackedBody { body, _open: open }))
            }
        });
        let connection = http.serve_connection(TokioIo::new(FrameGuard::new(stream)), service).into_owned();
        let connection = graceful.watch(connection);
        let connections = connections.clone();
        tokio::spawn(async move {
            tokio::select! {
                () = limiter.watch(connection, &place, peer) => {}
                () = tracked.is_not_needed(limits.idle_timeout) => debug!(port = limits.name, %peer, "idle connection ended"),
            }
            connections.forget(&place);
        });
    }
    drop(listener);
    let _ = tokio::time::timeout(limits.grace, graceful.shutdown()).await;
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncReadExt;

    #[test]
    fn refusals_are_said_once_a_second_with_their_number() {
        let (mut refusals, began) = (Refusals::default(), Instant::now());
        // Fifty in a second, as a process without descriptors has them, for three seconds.
        let said: Vec<_> = (0..150).filter_map(|i| refusals.count(began + i * Duration::from_millis(20))).collect();
        assert_eq!(said, [1, 50, 50]);
        assert_eq!(refusals.count(began + Duration::from_secs(60)), Some(50));
    }

    #[tokio::test]
    async fn accepted_connections_are_asked_whether_they_live() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        keep_alive(&listener).unwrap();
        let _client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (accepted, _) = listener.accept().await.unwrap();
        let socket = SockRef::from(&accepted);
        assert!(socket.keepalive().unwrap());
        assert_eq!(socket.tcp_keepalive_time().unwrap(), Duration::from_secs(60));
        assert_eq!(socket.tcp_keepalive_interval().unwrap(), Duration::from_secs(15));
        assert_eq!(socket.tcp_keepalive_retries().unwrap(), 4);
    }

    #[tokio::test]
    async fn connections_in_the_queue_are_taken_at_the_end() {
        let mut listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let limits = PortLimits {
            name: "test",
            connections_max: 3,
            half_open_max: 3,
            header_timeout: Duration::from_secs(1),
            idle_timeout: None,
            patience: None,
            grace: Duration::from_secs(1),
        };
        let limiter = ConnectionLimiter::new(limits);
        let mut clients = Vec::new();
        for _ in 0..5 {
            clients.push(TcpStream::connect(listener.local_addr().unwrap()).await.unwrap());
        }
        // The runtime learns of them at its next look.
        tokio::task::yield_now().await;
        let taken = limiter.left_over(&mut listener);
        assert_eq!(taken.len(), 3, "as many as there are places");
        drop(listener);
        let mut cut = 0;
        for client in &mut clients {
            let read = tokio::time::timeout(Duration::from_millis(50), client.read(&mut [0; 1])).await;
            cut += usize::from(read.is_ok());
        }
        assert_eq!(cut, 2);
    }
}
