//! A reported event as a JSON object.

use std::borrow::Cow;

use schemars::JsonSchema;
use serde::Deserialize;

use super::{Rejection, ReportedEvent};

/// An event as JSON has it: `{"service", "version", "status", "latency_ms", "event_time", "event_id"}`; the time is a number of
/// milliseconds since 1970, or RFC 3339.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(
    rename = "TelemetryEvent",
    description = "One answered request of a service, as a program outside the proxy reports it."
)]
pub struct Json<'b> {
    /// Name of the service, as in its rollout.
    #[serde(borrow)]
    #[schemars(length(max = 256))]
    service: Cow<'b, str>,
    /// The version that answered: the rollout's stable or canary.
    #[serde(borrow)]
    #[schemars(length(max = 256))]
    version: Cow<'b, str>,
    /// HTTP status of the answer; 500 and above count as errors.
    #[schemars(range(min = 100, max = 599))]
    status: u64,
    /// Latency of the answer, in milliseconds.
    #[schemars(range(min = 0, max = 3_600_000))]
    latency_ms: f64,
    /// Time of the answer. An event from more than a minute ago or from the future is rejected.
    #[serde(borrow)]
    event_time: Time<'b>,
    /// Id of the event; a node counts each id once. Empty: the event counts each time it is reported.
    #[serde(borrow, default)]
    #[schemars(length(max = 256))]
    event_id: Cow<'b, str>,
}

/// A point in time: milliseconds since 1970, or RFC 3339.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(untagged)]
#[schemars(rename = "EventTime")]
enum Time<'b> {
    /// Milliseconds since 1970.
    Millis(#[schemars(range(min = 0))] i64),
    /// By RFC 3339.
    Text(#[serde(borrow)] Cow<'b, str>),
}

impl<'b> Json<'b> {
    /// Reads an event's JSON; whether its values make an event is the next question.
    pub fn read(text: &'b [u8]) -> Result<Self, Rejection> {
        serde_json::from_slice(text).map_err(|error| Rejection::Malformed(error.to_string()))
    }

    /// Returns the event that the object holds, or why it is refused.
    pub fn event(&self) -> Result<ReportedEvent<'_>, Rejection> {
        let at_ms = match &self.event_time {
            Time::Millis(ms) => u64::try_from(*ms).ok(),
            Time::Text(text) => {
                let time = humantime::parse_rfc3339_weak(text).ok();
                time.and_then(|time| time.duration_since(std::time::UNIX_EPOCH).ok())
                    .map(|past| past.as_millis() as u64)
            }
        };
        let at_ms = at_ms.ok_or_else(|| {
            Rejection::Malformed(format!(
                "event_time is {:?}, expected milliseconds since 1970 or RFC 3339",
                self.event_time
            ))
        })?;
        ReportedEvent::new(&self.service, &self.version, self.status, self.latency_ms, at_ms, &self.event_id)
    }
}
