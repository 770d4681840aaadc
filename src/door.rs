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
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use hyper::body::{Body, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::server::graceful::GracefulShutdown;
use metrics::Counter;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

/// Bounds of a port.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// The port's name, in logs and metrics.
    pub name: &'static str,
    /// Connections at once; others wait in the system's queue.
    pub connections_max: usize,
    /// Connections at once that have not asked for anything yet.
    pub half_open_max: usize,
    /// Longest wait for a request's headers.
    pub header_timeout: Duration,
    /// How long open requests may take to end after the shutdown.
    pub grace: Duration,
}

/// Bytes of a connection's headers, at most.
const HEADER_BYTES_MAX: u32 = 64 * 1024;
/// Pause after the system refused to accept: it is short of something, and asking again at once would not help.
const ACCEPT_PAUSE: Duration = Duration::from_millis(20);

/// Connections without a request, oldest first.
#[derive(Clone, Default)]
struct HalfOpen(Arc<Mutex<BTreeMap<u64, CancellationToken>>>);

impl HalfOpen {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, CancellationToken>> {
        self.0.lock().expect("nothing panics while it holds the connections")
    }

    /// Adds a connection; returns its end, and true when an older one had to go.
    fn admit(&self, id: u64, most: usize) -> (CancellationToken, bool) {
        let mut open = self.lock();
        let evicted = open.len() >= most && open.pop_first().map(|(_, oldest)| oldest.cancel()).is_some();
        let end = CancellationToken::new();
        open.insert(id, end.clone());
        (end, evicted)
    }

    fn remove(&self, id: u64) {
        self.lock().remove(&id);
    }
}

/// Where connections come from: the machine's TCP, or a simulated network.
pub trait Accept: Send {
    /// A connection.
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

/// Serves HTTP/1 and HTTP/2 with `answer` until `shutdown`, then lets open requests end.
pub async fn serve<L, A, F, B>(mut listener: L, limits: Limits, shutdown: CancellationToken, answer: A)
where
    L: Accept,
    A: Fn(Request<Incoming>, SocketAddr) -> F + Clone + Send + Sync + 'static,
    F: Future<Output = Response<B>> + Send + 'static,
    B: Body<Data = Bytes, Error: Into<Box<dyn Error + Send + Sync>>> + Send + 'static,
{
    let Limits { name, connections_max, half_open_max, header_timeout, grace } = limits;
    let places = Arc::new(Semaphore::new(connections_max));
    let half_open = HalfOpen::default();
    let refused = |class| metrics::counter!("aviary_connections_refused_total", "port" => name, "class" => class);
    let (evictions, late) = (refused("half_open"), refused("header_deadline"));
    let graceful = GracefulShutdown::new();
    let mut builder = auto::Builder::new(TokioExecutor::new());
    let http1 = &mut builder.http1();
    http1.timer(TokioTimer::new()).header_read_timeout(header_timeout).max_buf_size(HEADER_BYTES_MAX as usize);
    builder.http2().timer(TokioTimer::new()).max_header_list_size(HEADER_BYTES_MAX);
    for id in 0.. {
        let place = tokio::select! {
            () = shutdown.cancelled() => break,
            place = places.clone().acquire_owned() => place.expect("the semaphore is never closed"),
        };
        let (stream, peer) = tokio::select! {
            () = shutdown.cancelled() => break,
            accepted = listener.accept() => match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    // Out of descriptors, mostly: those that are open must end first.
                    warn!(port = name, %error, "a connection can't be accepted");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            },
        };
        let (end, evicted) = half_open.admit(id, half_open_max);
        evictions.increment(u64::from(evicted));
        let asked = Arc::new(AtomicBool::new(false));
        let (first, waiting, answer) = (asked.clone(), half_open.clone(), answer.clone());
        let service = service_fn(move |request| {
            if !first.swap(true, Relaxed) {
                waiting.remove(id);
            }
            let answered = answer(request, peer);
            async move { Ok::<_, Infallible>(answered.await) }
        });
        let connection = builder.serve_connection(TokioIo::new(stream), service).into_owned();
        let connection = graceful.watch(connection);
        let (half_open, late) = (half_open.clone(), late.clone());
        tokio::spawn(async move {
            let served = until_asked(connection, &asked, header_timeout, &late);
            let ended = end.run_until_cancelled(served).await;
            half_open.remove(id);
            if let Some(Err(error)) = ended {
                debug!(port = name, %peer, error, "connection ended");
            }
            drop(place);
        });
    }
    drop(listener);
    let _ = tokio::time::timeout(grace, graceful.shutdown()).await;
}

/// Serves a connection that asks for something in time. hyper's own limit on headers begins once the protocol is known:
/// a client that says nothing, or half of HTTP/2's preface, would keep its place for ever.
async fn until_asked(
    connection: impl Future<Output = Result<(), Box<dyn Error + Send + Sync>>>,
    asked: &AtomicBool,
    limit: Duration,
    late: &Counter,
) -> Result<(), Box<dyn Error + Send + Sync>> {
    let mut connection = pin!(connection);
    match tokio::time::timeout(limit, connection.as_mut()).await {
        Ok(ended) => ended,
        Err(_) if asked.load(Relaxed) => connection.await,
        Err(_) => {
            late.increment(1);
            Err("no request came in time".into())
        }
    }
}
