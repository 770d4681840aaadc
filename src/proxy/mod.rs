//! The data plane: `/predict` and everything else that clients send, split between stable and canary.
//!
//! The request path takes no lock and never asks the consensus: it reads the published view, picks, forwards, counts.
//! `table` compiles the view, `forward` carries a request, `outcome` counts and trips the breaker.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Request, Response, StatusCode};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use crate::domain::ids::ServiceId;
use crate::door::{self, Accept};
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
/// Connections at once that have not asked for anything yet.
const HALF_OPEN_MAX: usize = 256;
/// How long open requests may take to end after `shutdown`.
const GRACE: Duration = Duration::from_secs(10);

/// Serves clients until `shutdown`, then lets open requests end.
pub async fn serve(listener: impl Accept, node: NodeHandle, settings: ProxySettings, shutdown: CancellationToken) {
    let limits = door::Limits {
        name: "data",
        connections_max: settings.connections_max,
        half_open_max: HALF_OPEN_MAX.min(settings.connections_max),
        header_timeout: Duration::from_millis(settings.header_timeout_ms),
        grace: GRACE,
    };
    let router = Arc::new(Router::new(node, settings));
    let drain = tokio::spawn(drain(router.clone(), shutdown.clone()));
    let answer = move |request, peer| {
        let router = router.clone();
        async move { answer(&router, request, peer).await }
    };
    door::serve(listener, limits, shutdown, answer).await;
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
