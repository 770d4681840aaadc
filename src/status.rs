//! Status answers that both HTTP ports give, without a token: `/routing/state`, `/health/snapshot`, `/livez`, `/readyz`.

use bytes::Bytes;
use http::{HeaderValue, Method, Response, StatusCode, Uri, header};
use http_body_util::Full;
use serde_json::{Map, Value, json};

use crate::code::Code;
use crate::domain::ids::ServiceId;
use crate::domain::stats::Stats;
use crate::domain::weights::Weight;
use crate::domain::window::Evidence;
use crate::node::handle::NodeHandle;
use crate::protocol::{Mode, Outcome, ServiceView};

/// Returns true for the paths that [`answer`] answers.
pub fn is_here(path: &str) -> bool {
    matches!(path, "/routing/state" | "/health/snapshot" | "/livez" | "/readyz")
}

/// Answers `/routing/state`, `/health/snapshot`, `/livez` and `/readyz`; none for any other path.
pub async fn answer(node: &NodeHandle, method: &Method, uri: &Uri) -> Option<Response<Full<Bytes>>> {
    let path = uri.path();
    if !is_here(path) {
        return None;
    }
    if *method != Method::GET && *method != Method::HEAD {
        let mut response = json_response(
            StatusCode::METHOD_NOT_ALLOWED,
            &json!({"code": Code::MethodNotAllowed, "error": format!("{path} takes GET")}),
        );
        response.headers_mut().insert(header::ALLOW, HeaderValue::from_static("GET, HEAD"));
        return Some(response);
    }
    Some(match path {
        "/livez" => json_response(StatusCode::OK, &json!({"status": "alive"})),
        "/readyz" => ready(node),
        _ => {
            if parameter(uri, "consistency").as_deref() == Some("linearizable")
                && let Err(response) = caught_up(node).await
            {
                return Some(*response);
            }
            match service_of(node, uri) {
                Ok(service) if path == "/routing/state" => {
                    let state = routing_state(node, &service).unwrap_or_default();
                    json_response(StatusCode::OK, &state)
                }
                Ok(service) => {
                    let snapshot = health_snapshot(node, &service).unwrap_or_default();
                    json_response(StatusCode::OK, &snapshot)
                }
                Err(response) => *response,
            }
        }
    })
}

/// Returns an answer with this status and a body of one line of JSON.
pub fn json_response(status: StatusCode, body: &Value) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from(format!("{body}\n")));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// Waits until this node knows every write answered so far.
async fn caught_up(node: &NodeHandle) -> Result<(), Box<Response<Full<Bytes>>>> {
    let (code, error, reached, needed) = match node.read().await {
        Outcome::Current(_) => return Ok(()),
        Outcome::NoQuorum { reached, needed } => (Code::NoQuorum, "no quorum".into(), json!(reached), json!(needed)),
        Outcome::Refused(why) => (Code::Refused, why, Value::Null, Value::Null),
        _ => (Code::Unavailable, "the read could not be confirmed; try again".into(), Value::Null, Value::Null),
    };
    let body = json!({"code": code, "error": error, "reached": reached, "needed": needed});
    Err(Box::new(json_response(StatusCode::SERVICE_UNAVAILABLE, &body)))
}

fn parameter(uri: &Uri, name: &str) -> Option<String> {
    let mut pairs = form_urlencoded::parse(uri.query()?.as_bytes());
    pairs.find(|(key, _)| key == name).map(|(_, value)| value.into_owned())
}

fn service_of(node: &NodeHandle, uri: &Uri) -> Result<ServiceId, Box<Response<Full<Bytes>>>> {
    let view = node.published.view();
    let known: Vec<_> = view.services.keys().collect();
    let found = match parameter(uri, "service") {
        Some(name) => known.iter().find(|id| id.as_str() == name).copied(),
        None => known.first().copied(),
    };
    found.cloned().ok_or_else(|| {
        let error = match (known.is_empty(), parameter(uri, "service")) {
            (true, _) | (_, None) => "no service is known here: apply a rollout first".to_string(),
            (false, Some(name)) => format!("service {name:?} is unknown"),
        };
        Box::new(json_response(StatusCode::NOT_FOUND, &json!({"code": Code::NotFound, "error": error, "known": known})))
    })
}

fn ready(node: &NodeHandle) -> Response<Full<Bytes>> {
    let mode = node.published.mode();
    let reason = match mode {
        Mode::Normal => return json_response(StatusCode::OK, &json!({"status": "ready", "mode": mode})),
        Mode::FailSafe => "no contact with a majority: this node may not know the newest routing",
        Mode::Learner => "this node has no vote and may not know the newest routing",
    };
    json_response(StatusCode::SERVICE_UNAVAILABLE, &json!({"status": "not ready", "mode": mode, "reason": reason}))
}

/// Returns one service's routing as this node serves it; none when it is unknown.
pub fn routing_state(node: &NodeHandle, service: &ServiceId) -> Option<Value> {
    let view = node.published.view();
    let found = view.services.get(service)?;
    let ServiceView { service: service_state, slot, hash, serving, waiting_for, enforced, .. } = &**found;
    let (routing, rollout) = (&service_state.routing, &service_state.rollout);
    let effective = Weight::from_bp(node.published.effective_bp(serving)).unwrap_or_default();
    let mut effective_weights =
        Map::from_iter([(serving.stable.version.to_string(), json!(effective.rest().fraction()))]);
    if let Some((canary, _)) = &serving.canary {
        effective_weights.insert(canary.version.to_string(), json!(effective.fraction()));
    }
    Some(json!({
        "version": routing.version,
        "stable_model_id": routing.stable_model_id,
        "canary_model_id": routing.canary_model_id,
        "weights": routing.weights,
        "status": routing.status,
        "txid": routing.txid,
        "timestamp": routing.timestamp,
        "service": routing.service,
        "node": view.node,
        "slot": slot,
        "hash": hash.to_string(),
        "mode": node.published.mode(),
        "phase": rollout.phase.to_string(),
        "stage": rollout.stage,
        "stages": rollout.spec.stages.len(),
        "reason": rollout.reason,
        "waiting_for": waiting_for,
        "held_back": serving.held_back.as_ref().map(ToString::to_string),
        "effective_weights": effective_weights,
        "lease_ms_left": node.published.lease_ms_left(serving.lease_ms.unwrap_or(rollout.spec.lease_ms)),
        "enforced": enforced,
    }))
}

/// Returns one service's evidence as this node and the cluster see it; none when it is unknown.
pub fn health_snapshot(node: &NodeHandle, service: &ServiceId) -> Option<Value> {
    let view = node.published.view();
    let found = view.services.get(service)?;
    let (routing, spec) = (&found.service.routing, &found.service.rollout.spec);
    let stable = &routing.stable_model_id;
    let canary = routing.canary_model_id.as_ref();
    let versions = |evidence: &Evidence| {
        let mut versions = Map::from_iter([(stable.to_string(), stats_json(&evidence.stable))]);
        if let Some(canary) = canary {
            versions.insert(canary.to_string(), stats_json(&evidence.canary));
        }
        Value::Object(versions)
    };
    Some(json!({
        "service": routing.service,
        "node": view.node,
        "routing_version": routing.version,
        "window_ms": spec.analysis.window_ms,
        "local": versions(&found.local),
        "cluster": versions(&found.cluster),
        "verdict": found.verdict.as_ref().map(|verdict| verdict.word()),
        "verdict_reason": found.verdict.as_ref().map(|verdict| verdict.reason()),
        "sequential": found.sequential,
    }))
}

fn stats_json(stats: &Stats) -> Value {
    json!({
        "count": stats.count,
        "errors": stats.errors,
        "error_rate": stats.error_rate(),
        "mean_ms": stats.mean_ms(),
        "p50_ms": stats.quantile_ms(0.5),
        "p95_ms": stats.quantile_ms(0.95),
        "p99_ms": stats.quantile_ms(0.99),
    })
}
