//! A worker's connections, from their acceptance to their end: HTTP/1.x at first, HTTP/2 once a client begins with it.

use std::net::SocketAddr;
use std::rc::Rc;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::debug;

use crate::listener::{Accept, Admitted, ConnectionLimiter};

use super::worker::Worker;
use super::{http1, http2};

/// Serves a listener's clients until `shutdown`, then lets open requests end.
pub async fn serve<L: Accept>(
    worker: Rc<Worker>,
    mut listener: L,
    limiter: ConnectionLimiter,
    shutdown: CancellationToken,
) {
    let tending = worker.tend();
    let connections = TaskTracker::new();
    let begin = |(stream, peer, place)| {
        let (worker, limiter, shutdown) = (worker.clone(), limiter.clone(), shutdown.clone());
        connections.spawn_local(async move { connection(&worker, stream, peer, place, &limiter, &shutdown).await });
    };
    while let Some(admitted) = limiter.admit(&mut listener, &shutdown).await {
        begin(admitted);
    }
    limiter.left_over(&mut listener).into_iter().for_each(begin);
    drop(listener);
    worker.stop();
    connections.close();
    let _ = tokio::time::timeout(limiter.limits().grace, connections.wait()).await;
    tending.iter().for_each(JoinHandle::abort);
}

async fn connection<S>(
    worker: &Rc<Worker>,
    mut stream: S,
    peer: SocketAddr,
    place: Admitted,
    limiter: &ConnectionLimiter,
    shutdown: &CancellationToken,
) where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    if let Some(ahead) = http1::serve(worker, &mut stream, peer, &place).await {
        debug!(%peer, "the client speaks HTTP/2");
        http2::serve(worker, ahead, stream, peer, place, limiter, shutdown).await;
    }
}
