//! The operators' API: rollouts, the cluster, events and metrics over HTTP.
//!
//! `service` carries out changes (forwarding them to the coordinator), `write` takes them over HTTP, `show` tells what is, `events`
//! streams what happens, `backup` streams a backup, `auth` knows tokens and roles, `admission` lets requests through by them; `state`
//! is what all of them share.

use std::time::Duration;

use axum::extract::{DefaultBodyLimit, Request, State};
use axum::response::Response;
use axum::routing::{get, post};
use axum::{Router, middleware};
use http::StatusCode;

use crate::listener::{self, Accept};
use crate::status;

mod admission;
pub mod auth;
mod backup;
mod events;
pub mod grpc;
pub mod metrics;
mod service;
mod show;
mod state;
mod telemetry;
mod write;

pub use state::{ApiState, BackupSource};
use state::{BODY_BYTES_MAX, error};

/// Bounds of the API's port: people and scripts, not traffic.
const LIMITS: listener::PortLimits = listener::PortLimits {
    name: "api",
    connections_max: 1024,
    half_open_max: 128,
    header_timeout: Duration::from_secs(5),
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

const ROUTES: &str = "GET|POST /v1/rollouts, GET /v1/rollouts/{name}, GET /v1/rollouts/{name}/history, \
    POST /v1/rollouts/{name}/{promote|pause|resume|abort|retry|undo}, GET /v1/events, GET /v1/cluster, \
    GET /v1/cluster/backup, POST /v1/cluster/{cordon|uncordon|readmit|add|remove|set-default}, POST /v1/telemetry, GET /metrics, /routing/state, /health/snapshot, /livez, /readyz";

fn router(state: ApiState) -> Router {
    let router = Router::new()
        .route("/v1/rollouts", get(show::list).post(write::apply))
        .route("/v1/rollouts/{name}", get(show::rollout))
        .route("/v1/rollouts/{name}/history", get(show::history))
        .route("/v1/rollouts/{name}/{verb}", post(write::change))
        .route("/v1/events", get(events::follow))
        .route("/v1/cluster", get(show::cluster))
        .route("/v1/cluster/backup", get(backup::stream))
        .route("/v1/cluster/set-default", post(write::set_default))
        .route("/v1/cluster/{verb}", post(write::configure))
        .route("/v1/telemetry", post(telemetry::report).layer(DefaultBodyLimit::max(telemetry::BATCH_BYTES_MAX)))
        .route("/metrics", get(metrics::scrape))
        .fallback(fallback)
        .method_not_allowed_fallback(async || error(StatusCode::METHOD_NOT_ALLOWED, format!("expected {ROUTES}")))
        .with_state(state.clone());
    grpc::routes(router, &state)
        .layer(middleware::from_fn_with_state(state.clone(), admission::check))
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .layer(middleware::map_response(as_problem))
}

async fn fallback(State(state): State<ApiState>, request: Request) -> Response {
    match status::answer(&state.node, request.method(), request.uri()).await {
        Some(answer) => answer.map(axum::body::Body::new),
        None => error(StatusCode::NOT_FOUND, format!("{} is unknown, expected {ROUTES}", request.uri().path())),
    }
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
