//! What is: rollouts, their history, the cluster.

use axum::Json;
use axum::extract::{Path, State};
use axum::response::{IntoResponse, Response};
use http::StatusCode;
use serde_json::{Value, json};

use crate::domain::ids::ServiceId;
use crate::domain::plan::{Backend, Stage};
use crate::protocol::record::{Chosen, Operation, Slot};
use crate::status;

use super::state::{ApiState, error};

/// Answers `GET /v1/rollouts`: the last rollout of each service.
pub async fn list(State(state): State<ApiState>) -> Response {
    let view = state.node.published.view();
    let rollouts: Vec<_> = view.services.keys().filter_map(|id| one(&state, id)).collect();
    Json(json!({ "rollouts": rollouts })).into_response()
}

/// Answers `GET /v1/rollouts/{name}`: one rollout; 404 for an unknown service.
pub async fn rollout(State(state): State<ApiState>, Path(name): Path<String>) -> Response {
    match ServiceId::new(&name).ok().and_then(|id| one(&state, &id)) {
        Some(json) => Json(json).into_response(),
        None => unknown(&state, &name),
    }
}

fn unknown(state: &ApiState, name: &str) -> Response {
    let view = state.node.published.view();
    let known: Vec<_> = view.services.keys().map(ServiceId::as_str).collect();
    let known = if known.is_empty() { "none yet".to_string() } else { known.join(", ") };
    error(StatusCode::NOT_FOUND, format!("rollout {name:?} is unknown, known: {known}"))
}

fn one(state: &ApiState, id: &ServiceId) -> Option<Value> {
    let view = state.node.published.view();
    let spec = &view.services.get(id)?.service.rollout.spec;
    let mut json = status::routing_state(&state.node, id)?;
    json["name"] = json!(id);
    json["health"] = status::health_snapshot(&state.node, id)?;
    let step =
        |stage: &Stage| json!({"weight": stage.weight.fraction(), "pause_ms": stage.hold_ms, "manual": stage.manual});
    json["spec"] = json!({
        "stable": backend(&spec.stable), "canary": backend(&spec.canary),
        "steps": spec.stages.iter().map(step).collect::<Vec<_>>(),
        "bake_ms": spec.bake_ms,
        "lease_ms": spec.lease_ms,
    });
    Some(json)
}

fn backend(backend: &Backend) -> Value {
    json!({"version": backend.version, "urls": backend.urls})
}

/// Records read from the log at a time.
const BATCH: usize = 256;
/// Most records told at once: the newest.
const HISTORY_MAX: usize = 1000;

/// `GET /v1/rollouts/{name}/history`: every record that changed the service or was to, oldest first.
pub async fn history(State(state): State<ApiState>, Path(name): Path<String>) -> Response {
    let known = ServiceId::new(&name).ok().filter(|id| state.node.published.view().services.contains_key(id));
    let Some(id) = known else { return unknown(&state, &name) };
    let log = state.node.log.clone();
    let head = state.node.published.view().head;
    let read = tokio::task::spawn_blocking(move || {
        let mut found = std::collections::VecDeque::new();
        let mut from = Slot(0);
        while from <= head {
            let records = log.read(from, BATCH)?;
            let Some(last) = records.last() else { break };
            from = last.record.slot.next();
            let concerns = |operation: &Operation| operation.service() == Some(&id) && !operation.is_verdict();
            for chosen in records.iter().filter(|chosen| concerns(&chosen.record.intent.operation)) {
                found.push_back(record_json(chosen));
                if found.len() > HISTORY_MAX {
                    found.pop_front();
                }
            }
        }
        Ok::<_, crate::ports::StoreError>(found)
    });
    match read.await {
        Ok(Ok(history)) => Json(json!({ "history": history })).into_response(),
        Ok(Err(why)) => error(StatusCode::INTERNAL_SERVER_ERROR, why.to_string()),
        Err(why) => error(StatusCode::INTERNAL_SERVER_ERROR, why.to_string()),
    }
}

fn record_json(chosen: &Chosen) -> Value {
    let record = &chosen.record;
    let state = record.state.as_ref();
    json!({
        "slot": record.slot,
        "kind": record.intent.operation.name(),
        "txid": record.intent.tx,
        "proposed_at": record.intent.at,
        "decided_at": chosen.decided_at,
        "ballot": chosen.ballot.as_ref().map(ToString::to_string),
        "version": state.map(|state| state.version),
        "weights": state.map(|state| &state.weights),
        "phase": record.phase,
        "actor": record.intent.actor,
        "status": state.map(|state| state.status),
        "reasons": record.intent.operation.reasons(),
        "yes": record.certificate.as_ref().map(|certificate| &certificate.yes),
        "in_doubt": chosen.is_in_doubt(),
        "hash": record.hash().to_string(),
    })
}

/// Answers `GET /v1/cluster`: members, coordinator and log positions.
pub async fn cluster(State(state): State<ApiState>) -> Response {
    let view = state.node.published.view();
    let members = view.members.iter().map(|(node, member)| {
        let json = json!({
            "alive": member.alive,
            "cordoned": member.cordoned,
            "head": member.head,
            "incarnation": member.incarnation.to_string(),
            "counts_not": member.counts_not,
        });
        (node.to_string(), json)
    });
    Json(json!({
        "cluster": view.cluster.to_string(),
        "node": view.node,
        "incarnation": view.incarnation.to_string(),
        "membership": format!("{:?}", view.membership),
        "mode": state.node.published.mode(),
        "coordinator": view.coordinator,
        "head": view.head,
        "hash": view.head_hash.to_string(),
        "members": members.collect::<serde_json::Map<_, _>>(),
    }))
    .into_response()
}
