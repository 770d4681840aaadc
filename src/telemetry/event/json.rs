//! A reported event as a JSON object.

use std::borrow::Cow;

use serde::Deserialize;

use super::{Rejection, ReportedEvent};

/// An event as JSON has it: `{"service", "version", "status", "latency_ms", "event_time", "event_id"}`; the time is a number of
/// milliseconds since 1970, or RFC 3339.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Json<'b> {
    #[serde(borrow)]
    service: Cow<'b, str>,
    #[serde(borrow)]
    version: Cow<'b, str>,
    status: u64,
    latency_ms: f64,
    #[serde(borrow)]
    event_time: Time<'b>,
    #[serde(borrow, default)]
    event_id: Cow<'b, str>,
}

/// A point in time: milliseconds since 1970, or RFC 3339.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Time<'b> {
    Millis(i64),
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
