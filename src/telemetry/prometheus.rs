//! Metrics that a Prometheus keeps: asked for by each node itself, for its own gate.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use http::{Request, StatusCode, header};
use http_body_util::Full;
use serde_json::Value;
use tokio_util::sync::CancellationToken;

use crate::domain::ids::ServiceId;
use crate::domain::query::{NoValue, Query};
use crate::domain::time::Mono;
use crate::http_client::{HttpClient, HttpError, HttpSettings};
use crate::node::handle::NodeHandle;
use crate::protocol::{Measurement, ServiceView};

/// Between two looks at what is due.
const LOOK: Duration = Duration::from_millis(250);
/// Longest wait for an answer, where the interval isn't shorter.
const ANSWER_MAX: Duration = Duration::from_secs(5);
/// Longest answer: one value is a few hundred bytes.
const ANSWER_BYTES_MAX: usize = 64 * 1024;

/// Why a query gave no value.
#[derive(Debug, thiserror::Error)]
enum QueryError {
    /// The request got no answer.
    #[error(transparent)]
    Http(#[from] HttpError),
    /// The body is not JSON.
    #[error("{status} without JSON")]
    NotJson { status: StatusCode },
    /// The provider reports an error; it may give a reason.
    #[error("{status}: {}", .reason.as_deref().unwrap_or("no success"))]
    Failed { status: StatusCode, reason: Option<String> },
    /// The vector has no element.
    #[error("no series, expected one")]
    NoSeries,
    /// The vector has several elements.
    #[error("{found} series, expected one")]
    ManySeries { found: usize },
    /// The result has another type.
    #[error("a {}, expected a scalar or a vector of one", .found.as_deref().unwrap_or("nothing"))]
    OtherType { found: Option<String> },
    /// The value can't be read.
    #[error("{found:?}, expected a number")]
    NotNumber { found: String },
}

fn client() -> HttpClient {
    HttpClient::new(HttpSettings::new(ANSWER_MAX))
}

/// Asks for the metrics of every rollout under way, each as often as its file says, until `shutdown`.
pub async fn run(node: NodeHandle, shutdown: CancellationToken) {
    let client = client();
    let mut due: BTreeMap<(ServiceId, String, u64), Mono> = BTreeMap::new();
    let mut tick = tokio::time::interval(LOOK);
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            _ = tick.tick() => {}
        }
        let (view, now) = (node.published.view(), node.published.clock().now().mono);
        let under_way = view.services.iter().filter(|(_, shown)| shown.service.rollout.phase.is_active());
        let mut asked = BTreeMap::new();
        for (id, shown) in under_way {
            // At each weight it is asked anew.
            let version = shown.service.routing.version;
            for query in &shown.service.rollout.spec.analysis.queries {
                let key = (id.clone(), query.name.clone(), version);
                let at = due.get(&key).copied().unwrap_or(now);
                let next = if at <= now { now.after_ms(query.interval_ms) } else { at };
                asked.insert(key, next);
                if at <= now {
                    let (node, client) = (node.clone(), client.clone());
                    tokio::spawn(ask(node, client, id.clone(), shown.clone(), query.clone()));
                }
            }
        }
        due = asked;
    }
}

async fn ask(node: NodeHandle, client: HttpClient, service: ServiceId, shown: Arc<ServiceView>, query: Query) {
    let routing = &shown.service.routing;
    let spec = &shown.service.rollout.spec;
    let text = query.text(
        service.as_str(),
        spec.stable.version.as_str(),
        spec.canary.version.as_str(),
        spec.analysis.window_ms,
    );
    let value = measure(&client, &query, &text).await.map_err(|why| reason(&query, &why));
    metrics::counter!("aviary_queries_total", "outcome" => if value.is_ok() { "ok" } else { "error" }).increment(1);
    node.measured(Measurement { service, routing_version: routing.version, name: query.name, value }).await;
}

/// Returns the error as the reason that nodes vote on and record, which is cut where the provider is wordy.
fn reason(query: &Query, why: &QueryError) -> NoValue {
    let words = format_args!("{}: {why}", query.address);
    match why {
        QueryError::NoSeries => NoValue::silence(words),
        _ => NoValue::new(words),
    }
}

/// Returns the value that a query's provider gives for `text`.
async fn measure(client: &HttpClient, query: &Query, text: &str) -> Result<f64, QueryError> {
    let body = form_urlencoded::Serializer::new(String::new()).append_pair("query", text).finish();
    let request = Request::post(format!("{}/api/v1/query", query.address))
        .header(header::CONTENT_TYPE, "application/x-www-form-urlencoded")
        .body(Full::from(body))
        .map_err(HttpError::from)?;
    let limit = ANSWER_MAX.min(Duration::from_millis(query.interval_ms));
    let answer = client.send(request, limit, ANSWER_BYTES_MAX).await?;
    value_of(answer.status, &answer.body)
}

/// Returns the value in the answer to an instant query that gives one.
fn value_of(status: StatusCode, body: &[u8]) -> Result<f64, QueryError> {
    let json: Value = serde_json::from_slice(body).map_err(|_| QueryError::NotJson { status })?;
    let owned = |value: &Value| value.as_str().map(str::to_owned);
    if json["status"] != "success" {
        return Err(QueryError::Failed { status, reason: owned(&json["error"]) });
    }
    let result = &json["data"]["result"];
    let sample = match json["data"]["resultType"].as_str() {
        Some("scalar") => &result[1],
        Some("vector") => match result.as_array().map(Vec::as_slice) {
            Some([one]) => &one["value"][1],
            Some([]) => return Err(QueryError::NoSeries),
            series => return Err(QueryError::ManySeries { found: series.map_or(0, <[Value]>::len) }),
        },
        found => return Err(QueryError::OtherType { found: found.map(str::to_owned) }),
    };
    let text = sample.as_str().unwrap_or_default();
    text.parse().map_err(|_| QueryError::NotNumber { found: text.to_owned() })
}

#[cfg(test)]
mod tests {
    use axum::Router;
    use axum::routing::post;
    use serde_json::json;
    use tokio::net::TcpListener;

    use super::*;
    use crate::domain::text::{CHARACTERS_MAX, CUT};
    use crate::domain::verdict::OnFailure;

    /// Returns what is measured where a provider, which has a path prefix, answers with this.
    async fn measured(answer: Value) -> Result<f64, NoValue> {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}/team-a", listener.local_addr().unwrap());
        let provider = Router::new().route("/team-a/api/v1/query", post(async move || axum::Json(answer)));
        let served = tokio::spawn(axum::serve(listener, provider).into_future());
        let query = Query {
            name: "errors".into(),
            address,
            template: "errors".into(),
            interval_ms: 5_000,
            min: None,
            max: None,
            on_failure: OnFailure::Pause,
        };
        let value = measure(&client(), &query, "errors").await.map_err(|why| reason(&query, &why));
        served.abort();
        value
    }

    #[tokio::test]
    async fn a_value_is_read_and_a_wordy_provider_is_cut() {
        let vector = json!([{"metric": {}, "value": [1.0, "0.25"]}]);
        let answer = json!({"status": "success", "data": {"resultType": "vector", "result": vector}});
        assert_eq!(measured(answer).await, Ok(0.25));
        let essay = "ü".repeat(30_000);
        let no_number = json!({"status": "success", "data": {"resultType": "scalar", "result": [1.0, essay]}});
        let no_type = json!({"status": "success", "data": {"resultType": essay, "result": []}});
        for answer in [json!({"status": "error", "error": essay}), no_number, no_type] {
            let why = measured(answer).await.unwrap_err().to_string();
            assert!(why.starts_with("http://127.0.0.1:") && why.contains("üüü") && why.ends_with(CUT), "{why}");
            assert_eq!(why.chars().count(), CHARACTERS_MAX + CUT.chars().count());
        }
    }
}
