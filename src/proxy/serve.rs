//! A worker's connections, from their acceptance to their end: HTTP/1.x at first, HTTP/2 once a client begins with it.

use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::debug;

use crate::listener::{Accept, ConnectionLimiter, HeldPlace, PortConnections};

use super::source::header::{self, ProxyHeader};
use super::worker::Worker;
use super::{http1, http2};

/// Serves a listener's clients until `shutdown`, then lets open requests end.
pub async fn serve<L: Accept>(
    worker: Rc<Worker>,
    mut listener: L,
    limiter: ConnectionLimiter,
    open: PortConnections,
    shutdown: CancellationToken,
) {
    let tending = worker.tend();
    let connections = TaskTracker::new();
    let begin = |(stream, peer, place)| {
        let (worker, limiter, open, shutdown) = (worker.clone(), limiter.clone(), open.clone(), shutdown.clone());
        connections.spawn_local(async move {
            let tracked = open.track(&place);
            let held = HeldPlace { place: &place, tracked: &tracked };
            connection(&worker, stream, peer, held, &limiter, &shutdown).await;
            open.forget(&place);
        });
    };
    while let Some(admitted) = limiter.admit(&mut listener, &open, &shutdown).await {
        begin(admitted);
    }
    limiter.left_over(&mut listener).into_iter().for_each(begin);
    drop(listener);
    worker.stop();
    connections.close();
    let _ = timeout(limiter.limits().grace, connections.wait()).await;
    tending.iter().for_each(JoinHandle::abort);
}

async fn connection<S>(
    worker: &Rc<Worker>,
    mut stream: S,
    peer: SocketAddr,
    held: HeldPlace<'_>,
    limiter: &ConnectionLimiter,
    shutdown: &CancellationToken,
) where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let settings = worker.settings();
    let from_proxy = settings.trusted.is_empty() || settings.trusted.iter().any(|network| network.contains(peer.ip()));
    let mut client = peer;
    if settings.proxy_protocol && from_proxy {
        let limit = Duration::from_millis(settings.header_timeout_ms);
        match timeout(limit, header::read(&mut stream)).await {
            Ok(Ok(ProxyHeader::For(address))) => client = address,
            Ok(Ok(ProxyHeader::Own)) => {}
            Ok(Err(problem)) => return debug!(%peer, %problem, "no PROXY header: the connection ends"),
            Err(_) => return debug!(%peer, "no PROXY header in time: the connection ends"),
        }
    }
    let peer = client;
    if let Some(ahead) = http1::serve(worker, &mut stream, peer, held).await {
        debug!(%peer, "the client speaks HTTP/2");
        http2::serve(worker, ahead, stream, peer, held, limiter, shutdown).await;
    }
}
