//! One request that somebody reports, as JSON or protobuf, read and checked.

use std::fmt::{Display, Formatter};

mod json;
mod protobuf;

pub use json::Json;

/// A request of a service, checked.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ReportedEvent<'b> {
    /// Name of the service that answered.
    pub service: Text<'b>,
    /// Name of the version that answered.
    pub version: Text<'b>,
    /// The answer's HTTP status, 100 to 599.
    pub status: u64,
    /// How long the answer took, in microseconds.
    pub latency_us: u64,
    /// When it was answered, in milliseconds since 1970.
    pub at_ms: u64,
    /// The event's id; empty for none.
    pub id: Text<'b>,
}

/// UTF-8, kept as bytes: they are compared and hashed, and hardly ever shown.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Text<'b>(&'b [u8]);

impl<'b> Text<'b> {
    /// Returns the text that these bytes are, if they are one.
    #[inline]
    fn read(bytes: &'b [u8]) -> Option<Self> {
        const HIGH: u64 = 0x8080_8080_8080_8080;
        let is_ascii = match (bytes.first_chunk(), bytes.last_chunk()) {
            // Most are this short, and the two overlap.
            (Some(first), Some(last)) if bytes.len() <= 16 => {
                (u64::from_le_bytes(*first) | u64::from_le_bytes(*last)) & HIGH == 0
            }
            _ => bytes.len() < 8 && bytes.iter().fold(0, |all, byte| all | byte) < 0x80,
        };
        (is_ascii || std::str::from_utf8(bytes).is_ok()).then_some(Self(bytes))
    }

    /// Returns the text's bytes, which need not be UTF-8.
    pub fn as_bytes(self) -> &'b [u8] {
        self.0
    }
}

impl<'b> From<&'b str> for Text<'b> {
    fn from(text: &'b str) -> Self {
        Self(text.as_bytes())
    }
}

impl Display for Text<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        f.write_str(&String::from_utf8_lossy(self.0))
    }
}

/// Why an event doesn't count.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Rejection {
    /// Not what an event looks like.
    #[error("{0}")]
    Malformed(String),
    /// The status is not between 100 and 599.
    #[error("status is {0}, expected 100 to 599")]
    Status(u64),
    /// The latency is not between 0 and 3600000 ms.
    #[error("latency_ms is {0}, expected 0 to 3600000")]
    Latency(String),
    /// Nobody has applied a rollout for it.
    #[error("service {0:?} is unknown")]
    Service(String),
    /// Neither of the service's versions.
    #[error("version is {found:?}, expected {expected}")]
    Version {
        /// Version that the event names.
        found: String,
        /// Versions of the service's rollout.
        expected: String,
    },
    /// The time of the event is ahead of this node's clock.
    #[error("event_time is {0} ms ahead of this node's clock, expected at most {FUTURE_MS_MAX}")]
    Future(u64),
    /// The event is too old.
    #[error("event_time is {0} ms ago, expected at most {LATE_MS_MAX}")]
    Late(u64),
    /// This node counted an event with the same id before.
    #[error("event_id was counted before, expected a new one")]
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

impl<'b> ReportedEvent<'b> {
    /// Returns the event of these fields; the time is in milliseconds since 1970.
    pub fn new(
        service: &'b str,
        version: &'b str,
        status: u64,
        latency_ms: f64,
        at_ms: u64,
        id: &'b str,
    ) -> Result<Self, Rejection> {
        let [service, version, id] = [service, version, id].map(Text::from);
        Raw { service, version, status, latency_ms, at_ms, id }.checked()
    }
}

/// An event's fields, as they came.
#[derive(Default)]
struct Raw<'b> {
    service: Text<'b>,
    version: Text<'b>,
    status: u64,
    latency_ms: f64,
    at_ms: u64,
    id: Text<'b>,
}

impl<'b> Raw<'b> {
    #[inline]
    fn checked(self) -> Result<ReportedEvent<'b>, Rejection> {
        let Self { service, version, status, latency_ms, at_ms, id } = self;
        for (name, text) in [("service", &service), ("version", &version), ("event_id", &id)] {
            let found = text.as_bytes().len();
            if found > TEXT_BYTES_MAX {
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
        Ok(ReportedEvent { service, version, status, latency_us: (latency_ms * 1000.0) as u64, at_ms, id })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schema::v1::TelemetryEvent;
    use proptest::prelude::*;
    use prost::Message as _;

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
        let event = Json::read(json).unwrap();
        let event = event.event().unwrap();
        assert_eq!(Json::read(text).unwrap().event().unwrap(), event);
        assert_eq!(ReportedEvent::from_protobuf(&protobuf("svc", 503, 12.5, 1_790_000_000)).unwrap(), event);
        assert_eq!((event.status, event.latency_us, event.version.as_bytes()), (503, 12_500, &b"v2"[..]));
    }

    #[test]
    fn what_is_absurd_is_named() {
        let of = |status, latency, seconds| {
            ReportedEvent::from_protobuf(&protobuf("svc", status, latency, seconds)).unwrap_err()
        };
        assert_eq!(of(99, 1.0, 1), Rejection::Status(99));
        for latency in [f64::NAN, f64::INFINITY, -1.0, 1e12] {
            assert_eq!(of(200, latency, 1).kind(), 2, "{latency}");
        }
        assert!(of(200, 1.0, u64::MAX).to_string().contains("outside 1970 to 9999"));
        assert_eq!(ReportedEvent::from_protobuf(b"\x0a\x50abc").unwrap_err().kind(), 0);
        assert_eq!(Json::read(b"{}").unwrap_err().kind(), 0);
        let long = protobuf(&"x".repeat(120), 200, 1.0, 1);
        assert!(ReportedEvent::from_protobuf(&long).is_ok());
    }

    #[test]
    fn a_text_that_is_no_utf_8_is_malformed_wherever_the_byte_is() {
        for length in 1..40 {
            let mut event = protobuf(&"x".repeat(length), 200, 1.0, 1);
            assert!(ReportedEvent::from_protobuf(&event).is_ok());
            for at in 2..2 + length {
                event[at] = 0xc3;
                assert_eq!(ReportedEvent::from_protobuf(&event).unwrap_err().kind(), 0, "{length} {at}");
                event[at] = b'x';
            }
        }
    }

    proptest! {
        #[test]
        fn a_number_is_read_whatever_its_length(bits in 10u32..64, low in any::<u64>(), is_last in any::<bool>()) {
            let number = 1 << bits | low >> (64 - bits);
            let mut event = protobuf("svc", number, 1.0, 1);
            if is_last {
                // Nothing but it after what went before: service and version.
                let end = 5 + 4 + 1 + (bits / 7 + 1) as usize;
                event.truncate(end);
            }
            prop_assert_eq!(ReportedEvent::from_protobuf(&event), Err(Rejection::Status(number)));
        }

        #[test]
        fn protobuf_is_read_as_it_was_written(
            (service, version, event_id) in (".{0,40}", ".{0,20}", ".{0,70}"),
            (status, latency_ms) in (prop_oneof![100u32..600, any::<u32>()], prop_oneof![0.0..4e6f64, any::<f64>()]),
            (seconds, nanos) in (0i64..253_402_300_800, 0i32..1_000_000_000),
        ) {
            let at_ms = seconds as u64 * 1000 + nanos as u64 / 1_000_000;
            let event = ReportedEvent::new(&service, &version, status.into(), latency_ms, at_ms, &event_id);
            let event_time = Some(prost_types::Timestamp { seconds, nanos });
            let (service, version, event_id) = (service.clone(), version.clone(), event_id.clone());
            let bytes = TelemetryEvent { service, version, status, latency_ms, event_time, event_id }.encode_to_vec();
            prop_assert_eq!(ReportedEvent::from_protobuf(&bytes), event);
        }

        #[test]
        fn whatever_comes_is_an_event_or_rejected(bytes in prop::collection::vec(any::<u8>(), 0..80), at in any::<prop::sample::Index>(), bit in 0u32..8) {
            let _ = ReportedEvent::from_protobuf(&bytes);
            let _ = Json::read(&bytes).map(|event| event.event().is_ok());
            let mut event = protobuf("svc", 200, 3.0, 1_790_000_000);
            let at = at.index(event.len());
            event[at] ^= 1 << bit;
            let _ = ReportedEvent::from_protobuf(&event);
            let _ = ReportedEvent::from_protobuf(&event[..at]);
        }
    }
}
