//! Points in time, as arguments: the one clock that leases trust, and the one that people read.

use std::borrow::Cow;
use std::fmt;
use std::ops::Add;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Microseconds on a node's own clock that never jumps and counts suspend (`CLOCK_BOOTTIME`).
///
/// Only differences mean anything, and only on the node that read it: it never crosses the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Mono(pub u64);

impl Mono {
    /// Returns the time that many milliseconds after zero.
    pub const fn from_millis(ms: u64) -> Self {
        Self(ms * 1000)
    }

    /// Returns the milliseconds from `earlier` to here; 0 when `earlier` is later.
    pub const fn millis_since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0) / 1000
    }

    /// Returns the time `ms` milliseconds after this one.
    pub const fn after_ms(self, ms: u64) -> Self {
        Self(self.0.saturating_add(ms.saturating_mul(1000)))
    }

    /// Returns the time `ms` milliseconds before this one; 0 when there is none.
    pub const fn before_ms(self, ms: u64) -> Self {
        Self(self.0.saturating_sub(ms.saturating_mul(1000)))
    }
}

/// Milliseconds since 1970 (UTC), for people and for pauses across restarts; safety never depends on it. In JSON a text by
/// RFC 3339, `2026-11-29T14:05:09.250Z`; in the log a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Wall(pub u64);

impl JsonSchema for Wall {
    fn schema_name() -> Cow<'static, str> {
        "Time".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "description": "A point in time (UTC), to the millisecond.", "type": "string", "format": "date-time",
        })
    }
}

impl Serialize for Wall {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() { serializer.collect_str(self) } else { self.0.serialize(serializer) }
    }
}

impl<'de> Deserialize<'de> for Wall {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        if !deserializer.is_human_readable() {
            return u64::deserialize(deserializer).map(Self);
        }
        let text = String::deserialize(deserializer)?;
        let time = humantime::parse_rfc3339(&text).map_err(|why| D::Error::custom(format!("time {text:?}: {why}")))?;
        let since = time.duration_since(std::time::UNIX_EPOCH).map_err(D::Error::custom)?;
        u64::try_from(since.as_millis()).map(Self).map_err(D::Error::custom)
    }
}

impl Add<u64> for Wall {
    type Output = Self;
    fn add(self, ms: u64) -> Self {
        Self(self.0.saturating_add(ms))
    }
}

impl fmt::Display for Wall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let time = std::time::UNIX_EPOCH + std::time::Duration::from_millis(self.0);
        write!(f, "{}", humantime::format_rfc3339_millis(time))
    }
}

/// Both clocks, read at the same moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Now {
    /// Monotonic clock, for durations, deadlines and leases.
    pub mono: Mono,
    /// Time of day, for timestamps.
    pub wall: Wall,
}
