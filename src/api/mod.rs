//! The operators' API: rollouts, the cluster, events and metrics over HTTP.
//!
//! `service` carries out changes (forwarding them to the coordinator), `write` takes them over HTTP, `show` tells what is, `events`
//! streams what happens, `backup` streams a backup, `auth` knows tokens and roles, `token_file` reads them, `admission` lets requests
//! through by them, `browser` keeps web pages out; `state` is what all of them share. `openapi` lists the operations, for the router
//! and for the document that describes them.

use std::time::Duration;

use axum::extract::DefaultBodyLimit;
use axum::response::Response;
use axum::{Router, middleware};
use http::{Method, StatusCode, Uri};

use crate::listener::{self, Accept};

mod admission;
pub mod auth;
mod backup;
mod browser;
mod events;
pub mod grpc;
pub mod metrics;
pub mod openapi;
mod reach;
mod service;
mod show;
mod state;
mod telemetry;
pub mod token_file;
mod write;

pub use state::{ApiState, BackupSource};
use state::{BODY_BYTES_MAX, error};

/// Bounds of the API's port: people and scripts, not traffic.
const LIMITS: listener::PortLimits = listener::PortLimits {
    name: "api",
    connections_max: 1024,
    half_open_max: 128,
    header_timeout: Duration::from_secs(5),
    idle_timeout: Some(Duration::from_secs(75)),
    patience: Some(Duration::from_secs(5)),
    grace: Duration::from_secs(5),
};

/// Serves operators until the state's shutdown, then lets open requests end.
pub async fn serve(listener: impl Accept, state: ApiState) {
    let shutdown = state.shutdown.clone();
    tokio::spawn(state.intake.clone().run(shutdown.clone()));
    let router = router(state);
    let answer = move |request: http::Request<hyper::body::Incoming>, _| {
        let answered = tower::ServiceExt::oneshot(router.clone(), request.map(axum::body::Body::new));
        async { answered.await.unwrap_or_else(|never| match never {}) }
    };
    listener::serve(listener, LIMITS, shutdown, answer).await;
}

/// Where a client that asked for something else finds what there is.
const HELP: &str = "GET /v1/openapi.json describes the API";

fn router(state: ApiState) -> Router {
    let operations = openapi::operations().into_iter();
    let router = operations.fold(Router::new(), |router, operation| router.route(operation.path, operation.handler));
    let router = router
        .fallback(async |uri: Uri| error(StatusCode::NOT_FOUND, format!("{} is unknown, {HELP}", uri.path())))
        .method_not_allowed_fallback(not_allowed)
        .with_state(state.clone());
    grpc::routes(router, &state)
        .layer(middleware::from_fn_with_state(state.clone(), admission::check))
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .layer(middleware::map_response(as_problem))
}

/// The router adds which methods are allowed.
async fn not_allowed(method: Method, uri: Uri) -> Response {
    error(StatusCode::METHOD_NOT_ALLOWED, format!("{} takes no {method}, {HELP}", uri.path()))
}

/// Returns the answer, with an error that the framework put in plain text as all of the API's look.
async fn as_problem(answer: Response) -> Response {
    let status = answer.status();
    let kind = answer.headers().get(http::header::CONTENT_TYPE);
    let plain = kind.is_some_and(|kind| kind.as_bytes().starts_with(b"text/plain"));
    if !plain || !(status.is_client_error() || status.is_server_error()) {
        return answer;
    }
    let text = axum::body::to_bytes(answer.into_body(), BODY_BYTES_MAX).await.unwrap_or_default();
    error(status, String::from_utf8_lossy(&text))
}
