//! `aviary upstream`: a demo model server whose latency and errors can be changed while it runs.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::Context;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{any, get};
use axum::{Json, Router};
use clap::Args;
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::signal::unix::{SignalKind, signal};

use super::Exit;

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  aviary upstream --listen 127.0.0.1:9102 --version v2 --latency-ms 5\n  \
    curl -X PUT 127.0.0.1:9102/fault -d '{\"error_percent\":100}' -H 'content-type: application/json'\n\n\
    Answers /predict, /v1/models/…, /v2/models/… (any method), /healthz, and GET or PUT /fault.")]
#[command(disable_version_flag = true)]
pub struct UpstreamArgs {
    /// Address to listen on, `host:port`.
    #[arg(long, value_name = "ADDRESS")]
    listen: SocketAddr,
    /// Version that the answers name.
    #[arg(long)]
    version: String,
    /// Minimum latency of an answer, in milliseconds.
    #[arg(long, default_value_t = 5, value_name = "MS")]
    latency_ms: u64,
    /// Maximum of the random extra latency, in milliseconds.
    #[arg(long, default_value_t = 0, value_name = "MS")]
    latency_jitter_ms: u64,
    /// Percentage of answers that are errors (status 500).
    #[arg(long, default_value_t = 0.0, value_name = "PERCENT", value_parser = percent)]
    error_percent: f64,
}

/// How the server misbehaves; `POST /fault` changes it while it runs.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
struct InjectedFault {
    error_percent: f64,
    latency_ms: u64,
    latency_jitter_ms: u64,
}

/// A change of behaviour: what it doesn't name stays.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct FaultChange {
    error_percent: Option<f64>,
    latency_ms: Option<u64>,
    latency_jitter_ms: Option<u64>,
}

struct UpstreamServer {
    version: String,
    fault: Mutex<InjectedFault>,
}

/// Longest wait for requests in flight when the server is told to stop.
const STOP_MAX: Duration = Duration::from_secs(5);
/// Longest latency that can be asked for, in milliseconds.
const LATENCY_MS_MAX: u64 = 600_000;

/// A text is no percentage.
#[derive(Debug, thiserror::Error)]
#[error("found {found:?}, expected 0 to 100")]
struct PercentError {
    found: String,
}

fn percent(text: &str) -> Result<f64, PercentError> {
    match text.parse::<f64>() {
        Ok(found) if (0.0..=100.0).contains(&found) => Ok(found),
        _ => Err(PercentError { found: text.into() }),
    }
}

/// Serves until SIGINT or SIGTERM.
pub async fn run(args: UpstreamArgs) -> anyhow::Result<Exit> {
    let listen = args.listen;
    let listener = tokio::net::TcpListener::bind(listen)
        .await
        .with_context(|| format!("{listen}: can't listen, expected a free port of this machine"))?;
    println!("upstream {} listens on http://{}", args.version, listener.local_addr()?);
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let mut waiting = stopped.clone();
    let graceful = async move {
        let _ = waiting.wait_for(|stop| *stop).await;
    };
    let server = tokio::spawn(axum::serve(listener, router(args)).with_graceful_shutdown(graceful).into_future());
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
    stop.send_replace(true);
    match tokio::time::timeout(STOP_MAX, server).await {
        Ok(served) => served??,
        Err(_) => eprintln!("dropping requests that are still in flight after {} s", STOP_MAX.as_secs()),
    }
    Ok(Exit::Done)
}

fn router(args: UpstreamArgs) -> Router {
    let UpstreamArgs { error_percent, latency_ms, latency_jitter_ms, version, .. } = args;
    let fault = Mutex::new(InjectedFault { error_percent, latency_ms, latency_jitter_ms });
    Router::new()
        .route("/healthz", get(async || "ok\n"))
        .route("/fault", get(show_fault).put(change_fault))
        .route("/predict", any(predict))
        .route("/predict/{*rest}", any(predict))
        .route("/v1/models/{*rest}", any(predict))
        .route("/v2/models/{*rest}", any(predict))
        .with_state(Arc::new(UpstreamServer { version, fault }))
}

impl UpstreamServer {
    fn fault(&self) -> std::sync::MutexGuard<'_, InjectedFault> {
        self.fault.lock().expect("no holder of this lock panics")
    }
}

async fn predict(State(server): State<Arc<UpstreamServer>>, body: Bytes) -> Response {
    let fault = *server.fault();
    let jitter = rand::random_range(0..=fault.latency_jitter_ms);
    tokio::time::sleep(Duration::from_millis(fault.latency_ms + jitter)).await;
    if rand::random::<f64>() * 100.0 < fault.error_percent {
        let answer = json!({ "model": server.version, "error": "this server was told to fail" });
        return (StatusCode::INTERNAL_SERVER_ERROR, Json(answer)).into_response();
    }
    Json(json!({ "model": server.version, "score": score(&server.version, &body) })).into_response()
}

/// Returns a score, 0.0 to 1.0 with four decimals: the same for the same body and version.
fn score(version: &str, body: &[u8]) -> f64 {
    let salt = xxhash_rust::xxh3::xxh3_64(version.as_bytes());
    (xxhash_rust::xxh3::xxh3_64_with_seed(body, salt) % 10_001) as f64 / 10_000.0
}

async fn show_fault(State(server): State<Arc<UpstreamServer>>) -> Json<InjectedFault> {
    Json(*server.fault())
}

/// Takes any content type, so that a plain `curl -d` will do.
async fn change_fault(State(server): State<Arc<UpstreamServer>>, body: Bytes) -> Response {
    let refuse = |why: String| (StatusCode::UNPROCESSABLE_ENTITY, Json(json!({ "error": why }))).into_response();
    let change: FaultChange = match serde_json::from_slice(&body) {
        Ok(change) => change,
        Err(error) => return refuse(error.to_string()),
    };
    if let Some(found) = change.error_percent.filter(|p| !(0.0..=100.0).contains(p)) {
        return refuse(format!("error_percent is {found}, expected 0 to 100"));
    }
    let latencies = [change.latency_ms, change.latency_jitter_ms];
    if let Some(found) = latencies.into_iter().flatten().find(|ms| *ms > LATENCY_MS_MAX) {
        return refuse(format!("latency is {found} ms, expected at most {LATENCY_MS_MAX} ms"));
    }
    let mut fault = server.fault();
    fault.error_percent = change.error_percent.unwrap_or(fault.error_percent);
    fault.latency_ms = change.latency_ms.unwrap_or(fault.latency_ms);
    fault.latency_jitter_ms = change.latency_jitter_ms.unwrap_or(fault.latency_jitter_ms);
    Json(*fault).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::body::Body;
    use axum::http::Request;
    use http_body_util::BodyExt;
    use serde_json::Value;
    use tower::ServiceExt;

    fn server() -> Router {
        let listen = "127.0.0.1:0".parse().unwrap();
        let version = "v1".into();
        router(UpstreamArgs { listen, version, latency_ms: 0, latency_jitter_ms: 0, error_percent: 0.0 })
    }

    async fn ask(server: &Router, method: &str, path: &str, body: &str) -> (u16, Value) {
        let request = Request::builder().method(method).uri(path).body(Body::from(body.to_owned())).unwrap();
        let response = server.clone().oneshot(request).await.unwrap();
        let status = response.status().as_u16();
        let bytes = response.into_body().collect().await.unwrap().to_bytes();
        (status, serde_json::from_slice(&bytes).unwrap_or(Value::Null))
    }

    #[test]
    fn a_percentage_is_from_0_to_100() {
        assert_eq!(percent("99.5").unwrap(), 99.5);
        for wrong in ["101", "-1", "NaN", "most"] {
            assert_eq!(percent(wrong).unwrap_err().to_string(), format!("found {wrong:?}, expected 0 to 100"));
        }
    }

    #[tokio::test]
    async fn the_same_body_gets_the_same_score() {
        let server = server();
        let (status, first) = ask(&server, "POST", "/predict", "a").await;
        assert_eq!((status, &first["model"]), (200, &json!("v1")));
        assert_eq!(ask(&server, "PUT", "/v1/models/m:predict", "a").await.1, first);
        assert_ne!(ask(&server, "POST", "/predict", "b").await.1, first);
    }

    #[tokio::test]
    async fn a_fault_is_obeyed_and_what_it_does_not_name_stays() {
        let server = server();
        let (_, fault) = ask(&server, "PUT", "/fault", r#"{"error_percent":100,"latency_ms":40}"#).await;
        assert_eq!(fault, json!({"error_percent": 100.0, "latency_ms": 40, "latency_jitter_ms": 0}));
        let asked = tokio::time::Instant::now();
        assert_eq!(ask(&server, "GET", "/predict", "").await.0, 500);
        assert!(asked.elapsed() >= Duration::from_millis(40));
        let (_, fault) = ask(&server, "PUT", "/fault", r#"{"error_percent":0}"#).await;
        assert_eq!(fault["latency_ms"], 40);
        assert_eq!(ask(&server, "GET", "/predict", "").await.0, 200);
    }

    #[tokio::test]
    async fn a_wrong_fault_is_refused_with_what_was_expected() {
        let server = server();
        let (status, answer) = ask(&server, "PUT", "/fault", r#"{"error_percent":101}"#).await;
        assert_eq!((status, &answer["error"]), (422, &json!("error_percent is 101, expected 0 to 100")));
        assert_eq!(ask(&server, "PUT", "/fault", r#"{"eror_percent":1}"#).await.0, 422);
        assert_eq!(ask(&server, "GET", "/fault", "").await.1["error_percent"], 0.0);
    }
}
