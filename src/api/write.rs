//! Changes: by any node, through the coordinator, once for each key.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Bytes;
use axum::extract::{Path, State};
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use http::{HeaderMap, Request, StatusCode, header};
use http_body_util::Full;
use serde::Deserialize;
use serde_json::json;
use tokio::sync::broadcast::error::RecvError;
use tracing::{info, warn};

use crate::code::Code;
use crate::domain::ids::{Incarnation, NodeId, ServiceId, TxId};
use crate::domain::text::bounded;
use crate::entropy;
use crate::protocol::record::{ConfigChange, Slot};
use crate::protocol::{OperatorRequest, Outcome};

use crate::http_client::HttpAnswer;

use super::auth::Actor;
use super::state::{ApiState, BODY_BYTES_MAX, error};

/// Set on a request that was forwarded once, with the node that did.
const FORWARDED: &str = "x-aviary-forwarded";
/// Longest wait for this node to serve by a write that the coordinator answered.
const SERVED_TIMEOUT: Duration = Duration::from_secs(2);
/// Longest wait for the coordinator's answer.
const FORWARD_TIMEOUT: Duration = Duration::from_secs(5);

/// `POST /v1/rollouts`: a rollout file, YAML or JSON.
pub async fn apply(
    State(state): State<ApiState>,
    actor: Option<Extension<Actor>>,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let Ok(text) = std::str::from_utf8(&body) else {
        return error(StatusCode::BAD_REQUEST, "the rollout is not UTF-8, expected a rollout file");
    };
    let file = headers.get("x-aviary-file").and_then(|name| name.to_str().ok()).unwrap_or("rollout");
    match crate::config::rollout::parse(text, file) {
        Ok(spec) => {
            submit(&state, actor.as_deref(), "/v1/rollouts", &headers, &body, OperatorRequest::Apply(Arc::new(spec)))
                .await
        }
        Err(why) => error(StatusCode::BAD_REQUEST, why.to_string()),
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Details {
    #[serde(default)]
    full: bool,
    #[serde(default)]
    reason: Option<String>,
}

/// Answers `POST /v1/rollouts/{name}/{verb}`: proposes a change of a rollout.
pub async fn change(
    State(state): State<ApiState>,
    Path((name, verb)): Path<(String, String)>,
    actor: Option<Extension<Actor>>,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let service = match ServiceId::new(&name) {
        Ok(service) => service,
        Err(why) => return error(StatusCode::BAD_REQUEST, why.to_string()),
    };
    let details = if body.is_empty() { Ok(Details::default()) } else { serde_json::from_slice(&body) };
    let Details { full, reason } = match details {
        Ok(details) => details,
        Err(why) => return error(StatusCode::BAD_REQUEST, format!("{why}; expected {{\"full\": …, \"reason\": …}}")),
    };
    let reason = bounded(reason.unwrap_or_default());
    let reason = if reason.is_empty() { "asked by an operator".to_string() } else { reason };
    let asked = match verb.as_str() {
        "promote" => OperatorRequest::Promote { service, full },
        "pause" => OperatorRequest::Pause { service, reason },
        "resume" => OperatorRequest::Resume { service },
        "abort" => OperatorRequest::Abort { service, reason },
        "retry" => OperatorRequest::Retry { service },
        "undo" => OperatorRequest::Undo { service },
        _ => {
            let expected = "promote, pause, resume, abort, retry or undo";
            return error(StatusCode::NOT_FOUND, format!("{verb:?} is unknown, expected {expected}"));
        }
    };
    submit(&state, actor.as_deref(), &format!("/v1/rollouts/{name}/{verb}"), &headers, &body, asked).await
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct MemberBody {
    node: NodeId,
    #[serde(default)]
    incarnation: Option<String>,
}

/// Answers `POST /v1/cluster/{verb}`: proposes a change of the members.
pub async fn configure(
    State(state): State<ApiState>,
    Path(verb): Path<String>,
    actor: Option<Extension<Actor>>,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let MemberBody { node, incarnation } = match serde_json::from_slice(&body) {
        Ok(member) => member,
        Err(why) => return error(StatusCode::BAD_REQUEST, format!("{why}; expected {{\"node\": …}}")),
    };
    let incarnation = incarnation.map(|text| u64::from_str_radix(&text, 16).map(Incarnation));
    let change = match (verb.as_str(), incarnation) {
        ("cordon", None) => ConfigChange::Cordon(node),
        ("uncordon", None) => ConfigChange::Uncordon(node),
        ("remove", None) => ConfigChange::Remove(node),
        ("readmit", Some(Ok(incarnation))) => ConfigChange::Readmit(node, incarnation),
        ("add", Some(Ok(incarnation))) => ConfigChange::Add(node, incarnation),
        ("readmit" | "add", _) => {
            return error(
                StatusCode::BAD_REQUEST,
                "expected the incarnation too, in hexadecimal: GET /v1/cluster shows a member's, `aviary cluster join` a new node's",
            );
        }
        _ => {
            return error(
                StatusCode::NOT_FOUND,
                format!("{verb:?} is unknown, expected cordon, uncordon, readmit, add or remove"),
            );
        }
    };
    submit(&state, actor.as_deref(), &format!("/v1/cluster/{verb}"), &headers, &body, OperatorRequest::Config(change))
        .await
}

/// Has a change decided, by the coordinator if it can be reached, else by this node: any node may run a ballot, and
/// the key makes a repetition harmless.
async fn submit(
    state: &ApiState,
    actor: Option<&Actor>,
    path: &str,
    headers: &HeaderMap,
    body: &Bytes,
    asked: OperatorRequest,
) -> Response {
    let key = match headers.get("idempotency-key").map(|key| key.to_str()) {
        None => random_key(),
        Some(Ok(key)) => key.to_string(),
        Some(Err(_)) => return error(StatusCode::BAD_REQUEST, "Idempotency-Key is not text"),
    };
    let tx = match TxId::new(&key) {
        Ok(tx) => tx,
        Err(why) => return error(StatusCode::BAD_REQUEST, format!("Idempotency-Key: {why}")),
    };
    if !headers.contains_key(FORWARDED) {
        let coordinator = state.node.published.view().coordinator.clone();
        if let Some(address) = state.peers.get(&coordinator)
            && let Some(answer) = forward(state, address, path, headers, body, &tx).await
        {
            if let Ok(Forwarded { slot: Some(slot) }) = serde_json::from_slice(&answer.body) {
                served(state, slot).await;
            }
            return (answer.status, [(header::CONTENT_TYPE, "application/json")], answer.body).into_response();
        }
    }
    let actor = actor.map_or_else(|| NOBODY.to_string(), |actor| actor.name.to_string());
    info!(%tx, path, actor, "write asked for");
    let outcome = state.node.submit(tx.clone(), actor, asked).await;
    answer(&tx, outcome)
}

/// The actor of writes that need no token.
const NOBODY: &str = "anybody on loopback";

fn random_key() -> String {
    format!("tx-{:032x}", entropy::bits())
}

/// Returns the coordinator's answer; none when it gave none.
async fn forward(
    state: &ApiState,
    address: &str,
    path: &str,
    headers: &HeaderMap,
    body: &Bytes,
    tx: &TxId,
) -> Option<HttpAnswer> {
    let node = state.node.published.view().node.clone();
    let mut request = Request::post(format!("http://{address}{path}"))
        .header("idempotency-key", tx.as_str())
        .header(FORWARDED, node.as_str());
    for name in [header::AUTHORIZATION, header::CONTENT_TYPE, http::HeaderName::from_static("x-aviary-file")] {
        if let Some(value) = headers.get(&name) {
            request = request.header(name, value);
        }
    }
    let request = request.body(Full::from(body.clone())).ok()?;
    state.client.send(request, FORWARD_TIMEOUT, BODY_BYTES_MAX).await.ok()
}

/// What matters here of a coordinator's answer.
#[derive(Deserialize)]
struct Forwarded {
    #[serde(default)]
    slot: Option<Slot>,
}

/// Waits until this node routes with the record in `slot`, so that a client that was answered here finds its write here; at most
/// [`SERVED_TIMEOUT`]. The coordinator routes with a record before it answers.
async fn served(state: &ApiState, slot: Slot) {
    // Before the view is looked at: what is published from here on is announced.
    let mut events = state.node.events();
    let wait = async {
        while state.node.published.view().head < slot {
            if matches!(events.recv().await, Err(RecvError::Closed)) {
                return;
            }
        }
    };
    if tokio::time::timeout(SERVED_TIMEOUT, wait).await.is_err() {
        warn!(slot = slot.0, "a write that the coordinator answered isn't served here yet");
    }
}

fn answer(tx: &TxId, outcome: Outcome) -> Response {
    let unavailable = StatusCode::SERVICE_UNAVAILABLE;
    let (status, body) = match outcome {
        Outcome::Committed { slot, state, repeated } => {
            (StatusCode::OK, json!({"status": "COMMITTED", "slot": slot, "repeated": repeated, "state": state}))
        }
        Outcome::Aborted { slot, reasons, repeated } => {
            let body = json!({
                "code": Code::Aborted, "status": "ABORTED", "slot": slot, "repeated": repeated, "reasons": reasons,
            });
            (StatusCode::CONFLICT, body)
        }
        Outcome::Unchanged(state) => (StatusCode::OK, json!({"status": "UNCHANGED", "state": state})),
        Outcome::Refused(why) => {
            (StatusCode::CONFLICT, json!({"code": Code::Refused, "status": "REFUSED", "error": why}))
        }
        Outcome::KeyReused { slot } => {
            let why = format!("this Idempotency-Key was used for another request, in slot {slot}");
            (StatusCode::UNPROCESSABLE_ENTITY, json!({"code": Code::KeyReused, "error": why}))
        }
        Outcome::NoQuorum { reached, needed } => {
            let body = json!({"code": Code::NoQuorum, "error": "no quorum", "reached": reached, "needed": needed});
            (unavailable, body)
        }
        Outcome::InDoubt => {
            let why = "outcome unknown; repeat with the same Idempotency-Key";
            (unavailable, json!({"code": Code::OutcomeUnknown, "error": why}))
        }
        Outcome::Busy => (
            StatusCode::TOO_MANY_REQUESTS,
            json!({"code": Code::Busy, "error": "too many requests are waiting; try again"}),
        ),
        Outcome::Current(slot) => (StatusCode::OK, json!({"status": "CURRENT", "slot": slot})),
    };
    let mut body = body;
    body["txid"] = json!(tx);
    (status, Json(body)).into_response()
}
