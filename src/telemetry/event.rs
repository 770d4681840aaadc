//! One request that somebody reports, as JSON or protobuf, read and checked.

use std::borrow::Cow;

use serde::Deserialize;

/// A request of a service, checked.
#[derive(Debug, Clone, PartialEq)]
pub struct Event<'b> {
    /// The service.
    pub service: Cow<'b, str>,
    /// The version that answered.
    pub version: Cow<'b, str>,
    /// True for an error: a status of 500 or more.
    pub error: bool,
    /// How long the answer took, in microseconds.
    pub latency_us: u64,
    /// When it was answered, in milliseconds since 1970.
    pub at_ms: u64,
    /// The event's id; empty for none.
    pub id: Cow<'b, str>,
}

/// Why an event doesn't count.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Rejection {
    /// Not what an event looks like.
    #[error("{0}")]
    Malformed(String),
    /// No HTTP status.
    #[error("status is {0}, expected 100 to 599")]
    Status(u64),
    /// No latency.
    #[error("latency_ms is {0}, expected 0 to 3600000")]
    Latency(String),
    /// Nobody has applied a rollout for it.
    #[error("service {0:?} is unknown")]
    Service(String),
    /// Neither of the service's versions.
    #[error("version is {found:?}, expected {expected}")]
    Version {
        /// What it says.
        found: String,
        /// The service's versions.
        expected: String,
    },
    /// Not yet.
    #[error("event_time is {0} ms ahead of this node's clock, expected at most {FUTURE_MS_MAX}")]
    Future(u64),
    /// Too long ago.
    #[error("event_time is {0} ms ago, expected at most {LATE_MS_MAX}")]
    Late(u64),
    /// It came before.
    #[error("it came before")]
    Duplicate,
}

/// How far a reporter's clock may be ahead, in milliseconds.
pub const FUTURE_MS_MAX: u64 = 5_000;
/// How late an event may come, in milliseconds.
pub const LATE_MS_MAX: u64 = 60_000;
/// Longest latency, in milliseconds: an hour.
const LATENCY_MS_MAX: f64 = 3_600_000.0;
/// Longest name or id, in bytes.
const TEXT_BYTES_MAX: usize = 256;

impl Rejection {
    /// Names of all kinds, as metrics and answers have them.
    pub const KINDS: [&'static str; 8] =
        ["malformed", "bad_status", "bad_latency", "unknown_service", "unknown_version", "future", "late", "duplicate"];

    /// Returns the place of this kind in [`Rejection::KINDS`].
    pub fn kind(&self) -> usize {
        match self {
            Self::Malformed(_) => 0,
            Self::Status(_) => 1,
            Self::Latency(_) => 2,
            Self::Service(_) => 3,
            Self::Version { .. } => 4,
            Self::Future(_) => 5,
            Self::Late(_) => 6,
            Self::Duplicate => 7,
        }
    }
}

/// An event's fields, as they came.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Fields<'b> {
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

impl Default for Time<'_> {
    fn default() -> Self {
        Self::Millis(0)
    }
}

impl<'b> Event<'b> {
    /// Reads `{"service", "version", "status", "latency_ms", "event_time", "event_id"}`; the time is a number of
    /// milliseconds since 1970, or RFC 3339.
    pub fn from_json(text: &'b [u8]) -> Result<Self, Rejection> {
        let fields: Fields = serde_json::from_slice(text).map_err(|error| Rejection::Malformed(error.to_string()))?;
        let at_ms = match &fields.event_time {
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
                fields.event_time
            ))
        })?;
        Self::checked(fields, at_ms)
    }

    /// Reads an `aviary.v1.TelemetryEvent`.
    ///
    /// By hand, for one message: a general decoder takes twice as long, and this runs for millions of events a minute.
    pub fn from_protobuf(bytes: &'b [u8]) -> Result<Self, Rejection> {
        let mut wire = Wire(bytes);
        let (mut fields, mut at_ms) = (Fields::default(), 0);
        while let Some((field, kind)) = wire.tag()? {
            match (field, kind) {
                (1, LENGTH) => fields.service = Cow::Borrowed(wire.text()?),
                (2, LENGTH) => fields.version = Cow::Borrowed(wire.text()?),
                (3, VARINT) => fields.status = wire.varint()?,
                (4, FIXED64) => fields.latency_ms = f64::from_bits(wire.fixed64()?),
                (5, LENGTH) => at_ms = Wire(wire.bytes()?).timestamp_ms()?,
                (6, LENGTH) => fields.event_id = Cow::Borrowed(wire.text()?),
                (_, kind) => wire.skip(kind)?,
            }
        }
        Self::checked(fields, at_ms)
    }

    /// Returns the event of these fields; the time is in milliseconds since 1970.
    pub fn new(
        service: &'b str,
        version: &'b str,
        status: u64,
        latency_ms: f64,
        at_ms: u64,
        id: &'b str,
    ) -> Result<Self, Rejection> {
        let [service, version, event_id] = [service, version, id].map(Cow::Borrowed);
        Self::checked(Fields { service, version, status, latency_ms, event_id, ..Fields::default() }, at_ms)
    }

    fn checked(fields: Fields<'b>, at_ms: u64) -> Result<Self, Rejection> {
        let Fields { service, version, status, latency_ms, event_id: id, .. } = fields;
        for (name, text) in [("service", &service), ("version", &version), ("event_id", &id)] {
            if text.len() > TEXT_BYTES_MAX {
                let found = text.len();
                return Err(Rejection::Malformed(format!(
                    "{name} has {found} bytes, expected at most {TEXT_BYTES_MAX}"
                )));
            }
        }
        if !(100..=599).contains(&status) {
            return Err(Rejection::Status(status));
        }
        if !(0.0..=LATENCY_MS_MAX).contains(&latency_ms) {
            return Err(Rejection::Latency(latency_ms.to_string()));
        }
        Ok(Self { service, version, error: status >= 500, latency_us: (latency_ms * 1000.0) as u64, at_ms, id })
    }
}

/// The wire types of protobuf.
const VARINT: u8 = 0;
const FIXED64: u8 = 1;
const LENGTH: u8 = 2;
const FIXED32: u8 = 5;

/// What is left of a message.
struct Wire<'b>(&'b [u8]);

impl<'b> Wire<'b> {
    /// Returns the next field's number and wire type; none at the end.
    fn tag(&mut self) -> Result<Option<(u64, u8)>, Rejection> {
        if self.0.is_empty() {
            return Ok(None);
        }
        let tag = self.varint()?;
        match tag >> 3 {
            0 => Err(malformed("field 0")),
            field => Ok(Some((field, (tag & 7) as u8))),
        }
    }

    fn varint(&mut self) -> Result<u64, Rejection> {
        let mut value = 0;
        for (shift, byte) in (0..64).step_by(7).zip(self.0) {
            value |= u64::from(byte & 0x7f) << shift;
            if *byte < 0x80 {
                self.0 = &self.0[shift / 7 + 1..];
                return Ok(value);
            }
        }
        Err(malformed("a number that doesn't end"))
    }

    fn take(&mut self, length: usize) -> Result<&'b [u8], Rejection> {
        let (taken, rest) = self.0.split_at_checked(length).ok_or_else(|| malformed("a field that is cut off"))?;
        self.0 = rest;
        Ok(taken)
    }

    fn bytes(&mut self) -> Result<&'b [u8], Rejection> {
        let length = self.varint()?;
        self.take(usize::try_from(length).unwrap_or(usize::MAX))
    }

    fn text(&mut self) -> Result<&'b str, Rejection> {
        std::str::from_utf8(self.bytes()?).map_err(|_| malformed("a text that is no UTF-8"))
    }

    fn fixed64(&mut self) -> Result<u64, Rejection> {
        let bytes = self.take(8)?;
        Ok(u64::from_le_bytes(bytes.try_into().expect("8 bytes")))
    }

    fn skip(&mut self, kind: u8) -> Result<(), Rejection> {
        match kind {
            VARINT => self.varint().map(drop),
            FIXED64 => self.take(8).map(drop),
            LENGTH => self.bytes().map(drop),
            FIXED32 => self.take(4).map(drop),
            _ => Err(malformed("a wire type that this schema doesn't have")),
        }
    }

    /// Reads a `google.protobuf.Timestamp` to its end.
    fn timestamp_ms(&mut self) -> Result<u64, Rejection> {
        let (mut seconds, mut nanos) = (0, 0);
        while let Some((field, kind)) = self.tag()? {
            match (field, kind) {
                (1, VARINT) => seconds = self.varint()?,
                (2, VARINT) => nanos = self.varint()?,
                (_, kind) => self.skip(kind)?,
            }
        }
        // Years before 1970 are negative, and as an unsigned number beyond any year.
        if seconds > 253_402_300_799 || nanos > 999_999_999 {
            return Err(malformed("event_time outside 1970 to 9999"));
        }
        Ok(seconds * 1000 + nanos / 1_000_000)
    }
}

fn malformed(what: &str) -> Rejection {
    Rejection::Malformed(format!("{what}, expected an aviary.v1.TelemetryEvent"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn protobuf(service: &str, status: u64, latency_ms: f64, seconds: u64) -> Vec<u8> {
        let mut bytes = vec![0x0a, service.len() as u8];
        bytes.extend(service.as_bytes());
        bytes.extend([0x12, 2, b'v', b'2', 0x18]);
        let varint = |bytes: &mut Vec<u8>, mut value: u64| {
            while value >= 0x80 {
                bytes.push(value as u8 | 0x80);
                value >>= 7;
            }
            bytes.push(value as u8);
        };
        varint(&mut bytes, status);
        bytes.push(0x21);
        bytes.extend(latency_ms.to_le_bytes());
        let mut time = vec![0x08];
        varint(&mut time, seconds);
        time.extend([0x10, 0x80, 0x89, 0x7a]);
        bytes.extend([0x2a, time.len() as u8]);
        bytes.extend(time);
        bytes.extend([0x32, 2, b'i', b'7']);
        bytes
    }

    #[test]
    fn both_encodings_say_the_same() {
        let json = br#"{"service":"svc","version":"v2","status":503,"latency_ms":12.5,"event_time":1790000000002,"event_id":"i7"}"#;
        let text = br#"{"service":"svc","version":"v2","status":503,"latency_ms":12.5,"event_time":"2026-09-21T14:13:20.002Z","event_id":"i7"}"#;
        let event = Event::from_json(json).unwrap();
        assert_eq!(Event::from_json(text).unwrap(), event);
        assert_eq!(Event::from_protobuf(&protobuf("svc", 503, 12.5, 1_790_000_000)).unwrap(), event);
        assert_eq!((event.error, event.latency_us, &*event.version), (true, 12_500, "v2"));
    }

    #[test]
    fn what_is_absurd_is_named() {
        let of =
            |status, latency, seconds| Event::from_protobuf(&protobuf("svc", status, latency, seconds)).unwrap_err();
        assert_eq!(of(99, 1.0, 1), Rejection::Status(99));
        for latency in [f64::NAN, f64::INFINITY, -1.0, 1e12] {
            assert_eq!(of(200, latency, 1).kind(), 2, "{latency}");
        }
        assert!(of(200, 1.0, u64::MAX).to_string().contains("outside 1970 to 9999"));
        assert_eq!(Event::from_protobuf(b"\x0a\x50abc").unwrap_err().kind(), 0);
        assert_eq!(Event::from_json(b"{}").unwrap_err().kind(), 0);
        let long = protobuf(&"x".repeat(120), 200, 1.0, 1);
        assert!(Event::from_protobuf(&long).is_ok());
    }

    proptest! {
        #[test]
        fn whatever_comes_is_an_event_or_rejected(bytes in prop::collection::vec(any::<u8>(), 0..80), at in any::<prop::sample::Index>(), bit in 0u32..8) {
            let _ = Event::from_protobuf(&bytes);
            let _ = Event::from_json(&bytes);
            let mut event = protobuf("svc", 200, 3.0, 1_790_000_000);
            let at = at.index(event.len());
            event[at] ^= 1 << bit;
            let _ = Event::from_protobuf(&event);
            let _ = Event::from_protobuf(&event[..at]);
        }
    }
}
