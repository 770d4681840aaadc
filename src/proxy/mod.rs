//! The data plane: `/predict` and everything else that clients send, split between stable and canary.
//!
//! The request path takes no lock and never asks the consensus: it reads the published view, picks, forwards, counts.
//! `table` compiles the view, `forward` carries a request, `outcome` counts and trips the breaker.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Request, Response, StatusCode};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::server::graceful::GracefulShutdown;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::domain::ids::ServiceId;
use crate::node::handle::NodeHandle;

mod forward;
mod outcome;
mod table;

use table::Router;

/// Limits of the data plane.
#[derive(Debug, Clone)]
pub struct ProxySettings {
    /// The service that paths without a model name mean; none: the first by name.
    pub default_service: Option<ServiceId>,
    /// Longest wait for a connection to an upstream, in milliseconds.
    pub connect_timeout_ms: u64,
    /// Longest wait for the first byte of an answer, in milliseconds.
    pub first_byte_timeout_ms: u64,
    /// Longest silence within an answer's body, in milliseconds.
    pub idle_timeout_ms: u64,
    /// Longest wait for a request's headers, in milliseconds.
    pub header_timeout_ms: u64,
    /// Connections at once.
    pub connections_max: usize,
    /// Requests at once.
    pub requests_max: usize,
}

/// A failure of a body that passes through.
type BodyError = Box<dyn std::error::Error + Send + Sync>;
/// An answer's body: an upstream's, as it comes, or this node's own.
type Body = UnsyncBoxBody<Bytes, BodyError>;

/// How often the counters go to the node.
const DRAIN: Duration = Duration::from_millis(100);
/// How long open requests may take to end after `shutdown`.
const GRACE: Duration = Duration::from_secs(10);

/// Serves clients until `shutdown`, then lets open requests end.
pub async fn serve(listener: TcpListener, node: NodeHandle, settings: ProxySettings, shutdown: CancellationToken) {
    let router = Arc::new(Router::new(node, settings));
    let drain = tokio::spawn(drain(router.clone(), shutdown.clone()));
    let connections = Arc::new(Semaphore::new(router.settings.connections_max));
    let graceful = GracefulShutdown::new();
    let mut builder = auto::Builder::new(TokioExecutor::new());
    let header_timeout = Duration::from_millis(router.settings.header_timeout_ms);
    builder.http1().timer(TokioTimer::new()).header_read_timeout(header_timeout).max_buf_size(64 * 1024);
    builder.http2().timer(TokioTimer::new()).max_header_list_size(64 * 1024);
    loop {
        let place = tokio::select! {
            () = shutdown.cancelled() => break,
            place = connections.clone().acquire_owned() => place.expect("the semaphore is never closed"),
        };
        let (stream, peer) = tokio::select! {
            () = shutdown.cancelled() => break,
            accepted = listener.accept() => match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    // Out of descriptors, mostly: those that are open must end first.
                    warn!(%error, "a connection can't be accepted");
                    tokio::time::sleep(Duration::from_millis(20)).await;
                    continue;
                }
            },
        };
        let _ = stream.set_nodelay(true);
        let router = router.clone();
        let asked = Arc::new(AtomicBool::new(false));
        let first = asked.clone();
        let service = service_fn(move |request| {
            first.store(true, Relaxed);
            let router = router.clone();
            async move { Ok::<_, Infallible>(answer(&router, request, peer).await) }
        });
        let connection = builder.serve_connection(TokioIo::new(stream), service).into_owned();
        let connection = graceful.watch(connection);
        tokio::spawn(async move {
            let mut connection = pin!(connection);
            // hyper's own limit on headers begins once the protocol is known: a client that says nothing, or half of
            // HTTP/2's preface, would keep its place for ever.
            let ended = match tokio::time::timeout(header_timeout, connection.as_mut()).await {
                Ok(ended) => ended,
                Err(_) if asked.load(Relaxed) => connection.await,
                Err(_) => Err("no request came in time".into()),
            };
            if let Err(error) = ended {
                debug!(%peer, error, "connection ended");
            }
            drop(place);
        });
    }
    drop(listener);
    let _ = tokio::time::timeout(GRACE, graceful.shutdown()).await;
    let _ = drain.await;
}

async fn drain(router: Arc<Router>, shutdown: CancellationToken) {
    let mut tick = tokio::time::interval(DRAIN);
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            _ = tick.tick() => {}
        }
        let observations = router.drain();
        if !observations.is_empty() {
            router.node.observed(observations);
        }
    }
}

async fn answer(router: &Arc<Router>, request: Request<Incoming>, peer: SocketAddr) -> Response<Body> {
    if let Some(response) = crate::api::read::answer(&router.node, request.method(), request.uri()).await {
        return response.map(own);
    }
    let Ok(_place) = router.places.try_acquire() else {
        let mut response = problem(StatusCode::SERVICE_UNAVAILABLE, json!({"error": "too many requests at once"}));
        response.headers_mut().insert(http::header::RETRY_AFTER, HeaderValue::from_static("1"));
        return response;
    };
    match router.route_of(&request) {
        Ok(route) => forward::forward(router, &route, request, peer).await,
        Err(response) => *response,
    }
}

/// Returns a body of this node's own.
fn own(body: Full<Bytes>) -> Body {
    body.map_err(|never| match never {}).boxed_unsync()
}

/// Returns an answer of this node's own.
fn problem(status: StatusCode, body: Value) -> Response<Body> {
    let mut response = Response::new(own(Full::from(body.to_string())));
    *response.status_mut() = status;
    response.headers_mut().insert(http::header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}
