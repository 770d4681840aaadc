//! How long a request may take: the service's limits, the node's where the service says none, and a gRPC client's deadline. Pure.

use crate::domain::plan::Timeouts;

use super::request::{HeaderFields, field};
use super::settings::ProxySettings;

/// The time limits of a request, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TimeLimits {
    /// Longest wait for the first byte of the answer.
    pub first_byte_ms: u64,
    /// Longest silence within the answer's body.
    pub idle_ms: u64,
    /// Longest time to the answer's last byte; none: without end.
    pub total_ms: Option<u64>,
}

impl TimeLimits {
    /// Returns the limits of a service at a node with these settings.
    pub fn of(settings: &ProxySettings, timeouts: Timeouts) -> Self {
        let total_ms = timeouts.total_ms.unwrap_or(settings.total_timeout_ms);
        Self {
            first_byte_ms: timeouts.first_byte_ms.unwrap_or(settings.first_byte_timeout_ms),
            idle_ms: timeouts.idle_ms.unwrap_or(settings.idle_timeout_ms),
            total_ms: (total_ms > 0).then_some(total_ms),
        }
    }

    /// Returns the limits of one request: where its client gives a gRPC call less time than the service does, that is all it has.
    pub fn for_request(self, fields: HeaderFields) -> Self {
        let Some(asked) = field(fields, "grpc-timeout").and_then(grpc_timeout_ms) else { return self };
        if !field(fields, "content-type").is_some_and(is_grpc) {
            return self;
        }
        Self { total_ms: Some(self.total_ms.map_or(asked, |total| total.min(asked))), ..self }
    }

    /// Returns the limit that ends the wait for an answer's first byte.
    pub fn until_first_byte_ms(self) -> u64 {
        self.total_ms.map_or(self.first_byte_ms, |total| total.min(self.first_byte_ms))
    }
}

/// Returns true for the content type of a gRPC call.
pub fn is_grpc(content_type: &[u8]) -> bool {
    content_type.starts_with(b"application/grpc")
}

/// Reads `grpc-timeout`: one to eight digits and a unit (gRPC over HTTP/2, "Timeout"); less than a millisecond is one. As for Envoy,
/// 0 is no deadline.
fn grpc_timeout_ms(value: &[u8]) -> Option<u64> {
    let (unit, digits) = value.split_last()?;
    if digits.len() > 8 || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let number: u64 = std::str::from_utf8(digits).ok()?.parse().ok()?;
    let ms = match unit {
        b'H' => number * 3_600_000,
        b'M' => number * 60_000,
        b'S' => number * 1_000,
        b'm' => number,
        b'u' => number.div_ceil(1_000),
        b'n' => number.div_ceil(1_000_000),
        _ => return None,
    };
    (ms > 0).then_some(ms)
}

#[cfg(test)]
mod tests {
    use httparse::Header;

    use super::*;

    #[test]
    fn a_deadline_has_digits_and_a_unit() {
        for (text, ms) in [
            ("1H", Some(3_600_000)),
            ("2M", Some(120_000)),
            ("3S", Some(3_000)),
            ("99999999m", Some(99_999_999)),
            ("1500u", Some(2)),
            ("1n", Some(1)),
            ("0S", None),
            ("", None),
            ("S", None),
            ("5", None),
            ("100000000m", None),
            ("-1S", None),
            ("+1S", None),
            ("1.5S", None),
            ("1s", None),
        ] {
            assert_eq!(grpc_timeout_ms(text.as_bytes()), ms, "{text}");
        }
    }

    #[test]
    fn the_shortest_of_all_limits_counts() {
        let settings = ProxySettings { first_byte_timeout_ms: 30, idle_timeout_ms: 60, ..ProxySettings::default() };
        let of = |timeouts| TimeLimits::of(&settings, timeouts);
        let own = of(Timeouts::default());
        assert_eq!(own, TimeLimits { first_byte_ms: 30, idle_ms: 60, total_ms: None });
        let said = Timeouts { first_byte_ms: Some(500), idle_ms: Some(7), total_ms: Some(900) };
        assert_eq!(of(said), TimeLimits { first_byte_ms: 500, idle_ms: 7, total_ms: Some(900) });
        let bounded = ProxySettings { total_timeout_ms: 40, ..settings.clone() };
        assert_eq!(TimeLimits::of(&bounded, Timeouts::default()).total_ms, Some(40));
        let endless = Timeouts { total_ms: Some(0), ..Timeouts::default() };
        assert_eq!(TimeLimits::of(&bounded, endless).total_ms, None);

        let asked = |kind: &'static str, deadline: &'static str| {
            let field = |name, value: &'static str| Header { name, value: value.as_bytes() };
            of(said).for_request(&[field("content-type", kind), field("grpc-timeout", deadline)])
        };
        assert_eq!(asked("application/grpc", "20m").total_ms, Some(20));
        assert_eq!(asked("application/grpc+proto", "20m").until_first_byte_ms(), 20);
        assert_eq!(asked("application/grpc", "1H"), of(said));
        assert_eq!(asked("application/grpc", "x"), of(said));
        assert_eq!(asked("application/json", "20m"), of(said), "no gRPC call");
        assert_eq!(of(said).until_first_byte_ms(), 500);
    }
}
