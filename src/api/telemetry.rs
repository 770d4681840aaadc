//! `POST /v1/telemetry`: a batch of events, as JSON or JSON lines.

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use http::{HeaderMap, StatusCode, header};
use schemars::{Schema, SchemaGenerator, json_schema};
use serde::Deserialize;
use serde_json::value::RawValue;

use super::state::{ApiState, error};
use crate::model::{BatchReceipt, Problem, RejectedEvent};
use crate::telemetry::Receipt;
use crate::telemetry::event::Json as Reported;

/// Maximum size of a batch of events, in bytes.
pub const BATCH_BYTES_MAX: usize = 8 * 1024 * 1024;

/// Returns the schema of a batch.
pub fn batch_schema(generator: &mut SchemaGenerator) -> Schema {
    let list = json_schema!({ "type": "array", "items": generator.subschema_for::<Reported>() });
    json_schema!({
        "anyOf": [
            { "type": "object", "properties": { "events": list }, "required": ["events"], "additionalProperties": false },
            list,
        ],
    })
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ReportedBatch<'b> {
    #[serde(borrow)]
    events: Vec<&'b RawValue>,
}

/// Returns the events of a list, or of an object that holds one.
fn events_of(body: &[u8]) -> serde_json::Result<Vec<&RawValue>> {
    match body.trim_ascii_start().first() {
        Some(b'[') => serde_json::from_slice(body),
        _ => serde_json::from_slice(body).map(|ReportedBatch { events }| events),
    }
}

fn take<'b>(state: &ApiState, events: impl Iterator<Item = &'b [u8]>) -> Receipt {
    let mut batch = state.intake.batch();
    for event in events {
        match Reported::read(event) {
            Ok(event) => batch.put(&event.event()),
            Err(why) => batch.put(&Err(why)),
        }
    }
    batch.receipt()
}

/// Counts a batch of events. A batch in which nothing counts is answered 422, any other 200: with how many counted, and why
/// others did not.
pub async fn report(State(state): State<ApiState>, headers: HeaderMap, body: Bytes) -> Response {
    let kind = headers.get(header::CONTENT_TYPE).map_or(&b""[..], |kind| kind.as_bytes());
    let receipt = if kind.starts_with(b"application/x-ndjson") {
        let lines = body.split(|byte| *byte == b'\n').filter(|line| !line.trim_ascii().is_empty());
        take(&state, lines)
    } else {
        match events_of(&body) {
            Ok(events) => take(&state, events.iter().map(|event| event.get().as_bytes())),
            Err(why) => {
                let expected = "expected a list of events, {\"events\": […]}, or lines (application/x-ndjson)";
                return error(StatusCode::BAD_REQUEST, format!("{why}, {expected}"));
            }
        }
    };
    let receipt = shown(receipt);
    match (receipt.accepted, receipt.first_rejected.first()) {
        (0, Some(first)) => {
            let detail = format!("no event was accepted: {}", first.error);
            let mut problem = Problem::of_status(StatusCode::UNPROCESSABLE_ENTITY, detail);
            problem.facts.receipt = Some(receipt);
            problem.into_response()
        }
        _ => Json(receipt).into_response(),
    }
}

fn shown(receipt: Receipt) -> BatchReceipt {
    let Receipt { accepted, rejected, first } = receipt;
    let rejected = rejected.into_iter().map(|(kind, count)| (kind.to_string(), count)).collect();
    let first_rejected = first.into_iter().map(|(event, error)| RejectedEvent { event, error }).collect();
    BatchReceipt { accepted, rejected, first_rejected }
}
