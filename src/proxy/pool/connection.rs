//! One connection: sends PINGs when it is silent, and ends it when they stay unanswered, when it is idle, or old.

use std::future::poll_fn;
use std::io;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use h2::client::{self, SendRequest};
use h2::{Ping, PingPong};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep_until, timeout_at};

use crate::proxy::failure::ConnectFailure;
use crate::proxy::upstream::Server;

use super::limits::{HEAD_BYTES_READ_MAX, PoolLimits, STREAM_WINDOW_BYTES, STREAMS_MAX};

/// The connection that `h2` runs on a socket.
pub type Driven = client::Connection<Watched, Bytes>;

/// What all who use a connection know of it.
pub struct Link {
    began: Instant,
    /// When something last came, in microseconds since `began`; 0: nothing yet.
    read_us: AtomicU64,
    /// When the last stream ended, in microseconds since `began`.
    idle_us: AtomicU64,
    /// Streams that the server takes at once.
    limit: AtomicUsize,
    /// Streams that are open, or about to be.
    streams: AtomicUsize,
    /// It has answered a request.
    served: AtomicBool,
    /// Why the connection ended, once it has.
    ended: OnceLock<String>,
}

impl Link {
    fn new() -> Self {
        Self {
            began: Instant::now(),
            read_us: AtomicU64::new(0),
            idle_us: AtomicU64::new(0),
            limit: AtomicUsize::new(0),
            streams: AtomicUsize::new(0),
            served: AtomicBool::new(false),
            ended: OnceLock::new(),
        }
    }

    fn now_us(&self) -> u64 {
        self.began.elapsed().as_micros() as u64
    }

    fn at(&self, us: &AtomicU64) -> Instant {
        self.began + Duration::from_micros(us.load(Relaxed))
    }

    /// Returns when something last came from the server; the connection's beginning when nothing did.
    pub fn last_read(&self) -> Instant {
        self.at(&self.read_us)
    }

    /// Returns how many streams the connection takes at once.
    pub fn limit(&self) -> usize {
        self.limit.load(Relaxed).min(STREAMS_MAX)
    }

    /// Returns how many places are taken.
    pub fn streams(&self) -> usize {
        self.streams.load(Relaxed)
    }

    /// Takes a place. Only for the one who holds the lock of all places.
    pub fn take(&self) {
        self.streams.fetch_add(1, Relaxed);
    }

    /// Gives a place back.
    pub fn give_back(&self) {
        self.idle_us.store(self.now_us(), Relaxed);
        self.streams.fetch_sub(1, Relaxed);
    }

    /// Says that the connection has answered a request.
    pub fn served(&self) {
        self.served.store(true, Relaxed);
    }

    /// Returns true if the connection has answered a request.
    pub fn has_served(&self) -> bool {
        self.served.load(Relaxed)
    }

    /// Returns why the connection ended, once it has.
    pub fn ended_why(&self) -> Option<String> {
        self.ended.get().cloned()
    }

    /// Returns when the connection is to be closed because no request came, as of now.
    fn idle_until(&self, idle: Duration) -> Instant {
        let from = if self.streams() > 0 { Instant::now() } else { self.at(&self.idle_us) };
        from + idle
    }
}

/// A socket that notes when something came.
pub struct Watched {
    stream: TcpStream,
    link: Arc<Link>,
}

impl AsyncRead for Watched {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = into.filled().len();
        let polled = Pin::new(&mut self.stream).poll_read(cx, into);
        if into.filled().len() > before {
            self.link.read_us.store(self.link.now_us().max(1), Relaxed);
        }
        polled
    }
}

impl AsyncWrite for Watched {
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

/// Opens a connection, and waits for the server's SETTINGS, which say how many streams it takes.
pub async fn open(
    server: &Server,
    limits: &PoolLimits,
) -> Result<(SendRequest<Bytes>, Driven, Arc<Link>), ConnectFailure> {
    let until = Instant::now() + limits.connect;
    let stream = server.connect(limits.connect).await?;
    let link = Arc::new(Link::new());
    let late = |_| ConnectFailure::Late(limits.connect.as_millis() as u64);
    let no_http2 = |why: String| ConnectFailure::Refused(format!("no HTTP/2 connection came about: {why}"));
    let shaken = builder().handshake(Watched { stream, link: link.clone() });
    let shaken = timeout_at(until, shaken).await.map_err(late)?;
    let (sender, mut connection) = shaken.map_err(|error| no_http2(error.to_string()))?;
    let settled = poll_fn(|cx| match Pin::new(&mut connection).poll(cx) {
        Poll::Ready(Ok(())) => Poll::Ready(Err(no_http2("the server closed it".into()))),
        Poll::Ready(Err(error)) => Poll::Ready(Err(no_http2(error.to_string()))),
        Poll::Pending if connection.max_concurrent_send_streams() > 0 => Poll::Ready(Ok(())),
        Poll::Pending => Poll::Pending,
    });
    match timeout_at(until, settled).await {
        Ok(settled) => settled?,
        // A server that takes no streams at this moment says so in its SETTINGS; one that says nothing is none.
        Err(_) if link.read_us.load(Relaxed) > 0 => {}
        Err(elapsed) => return Err(late(elapsed)),
    }
    link.limit.store(connection.max_concurrent_send_streams(), Relaxed);
    Ok((sender, connection, link))
}

fn builder() -> client::Builder {
    let mut builder = client::Builder::new();
    builder
        .enable_push(false)
        // None before the server's SETTINGS say how many.
        .initial_max_send_streams(0)
        .initial_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(STREAM_WINDOW_BYTES * STREAMS_MAX as u32)
        .max_header_list_size(HEAD_BYTES_READ_MAX)
        // Malformed answers end their streams, however many they are; and tokens may come one by one.
        .max_local_error_reset_streams(None)
        .data_frame_budget(1 << 30);
    builder
}

/// Lets a connection run to its end. `close` is asked when it is idle or old: it takes the connection out of the pool, if
/// nobody uses it; `changed` is told when the server takes another number of streams.
pub async fn drive(
    mut connection: Driven,
    link: &Link,
    limits: &PoolLimits,
    mut close: impl FnMut(Leave) -> bool,
    mut changed: impl FnMut(),
) {
    let mut pings = connection.ping_pong();
    let mut pinged = None;
    let mut leaving = false;
    let mut alarm = pin!(sleep_until(link.began));
    let ended = poll_fn(|cx| {
        loop {
            if let Poll::Ready(ended) = Pin::new(&mut connection).poll(cx) {
                let ended = ended.err().map(|error| error.to_string());
                return Poll::Ready(format!("the connection ended: {}", ended.as_deref().unwrap_or("its server left")));
            }
            let limit = connection.max_concurrent_send_streams();
            if link.limit.swap(limit, Relaxed) != limit {
                changed();
            }
            if answered(&mut pings, cx) {
                pinged = None;
            }
            if alarm.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
            let now = Instant::now();
            let old = link.began + limits.life;
            if !leaving && now >= old {
                leaving = close(Leave::Old);
            }
            if !leaving && now >= link.idle_until(limits.idle) {
                leaving = close(Leave::Idle);
            }
            let mut next = match leaving {
                true => now + Duration::from_secs(1),
                // While it has streams, this looks at it as often as one that has none might have to leave.
                false => link.idle_until(limits.idle).min(old),
            };
            if let (Some(interval), Some(pings)) = (limits.ping_interval, &mut pings) {
                let heard = link.last_read();
                if pinged.is_some_and(|pinged| heard > pinged) {
                    // Whatever came, the server lives; the answer to the PING may follow.
                    pinged = Some(now);
                }
                if pinged.is_none() && now >= heard + interval && pings.send_ping(Ping::opaque()).is_ok() {
                    pinged = Some(now);
                }
                match pinged.map(|pinged| pinged + limits.ping_timeout) {
                    Some(lost) if now >= lost => {
                        let ms = limits.ping_timeout.as_millis();
                        return Poll::Ready(format!("it did not answer a PING within {ms} ms"));
                    }
                    Some(lost) => next = next.min(lost),
                    None => next = next.min(heard + interval),
                }
            }
            alarm.as_mut().reset(next.max(now + Duration::from_millis(5)));
        }
    })
    .await;
    // First the reason, then the end of the streams, which ask for it.
    let _ = link.ended.set(ended);
    drop(connection);
}

/// Why a connection is to leave its pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Leave {
    /// No request has come for a while.
    Idle,
    /// It has been there long enough.
    Old,
}

fn answered(pings: &mut Option<PingPong>, cx: &mut Context<'_>) -> bool {
    pings.as_mut().is_some_and(|pings| matches!(pings.poll_pong(cx), Poll::Ready(Ok(_))))
}
