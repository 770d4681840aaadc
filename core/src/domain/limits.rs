//! How large and how small the numbers of a rollout may be: each limit once, in the unit that people write.
//!
//! Files, command lines and peers are all checked by these, and complain in the same words.

/// A number's limits, both included.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Limits {
    /// What is limited, as files and command lines call it.
    pub what: &'static str,
    /// Least value that is allowed, in the unit that people write.
    pub min: f64,
    /// Greatest value that is allowed, in the unit that people write.
    pub max: f64,
    /// Unit as it is written behind a number, such as ` ms`; empty for a number without one.
    pub unit: &'static str,
}

/// A number beyond its limits.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
#[error("{what} is {found}{unit}, expected {min} to {max}{unit}", what = .limits.what, min = .limits.min, max = .limits.max, unit = .limits.unit)]
pub struct OutOfRange {
    /// The limits that the number exceeds.
    pub limits: Limits,
    /// The number that was found, in the unit that people write.
    pub found: f64,
}

// What is stored is the same number in smaller units, without a remainder, so that no check is nearer than another.
impl Eq for OutOfRange {}

impl Limits {
    const fn new(what: &'static str, min: f64, max: f64, unit: &'static str) -> Self {
        Self { what, min, max, unit }
    }

    const fn ms(what: &'static str, min: u64, max: u64) -> Self {
        Self::new(what, min as f64, max as f64, " ms")
    }

    /// Returns `found`, or that it is beyond the limits, as a NaN always is.
    pub fn check(self, found: f64) -> Result<f64, OutOfRange> {
        match (self.min..=self.max).contains(&found) {
            true => Ok(found),
            false => Err(OutOfRange { limits: self, found }),
        }
    }

    /// Returns a whole number, or that it is beyond the limits.
    pub fn check_whole(self, found: u64) -> Result<u64, OutOfRange> {
        self.check(found as f64).map(|_| found)
    }
}

/// Probability of ever rolling back a canary that is no worse than stable.
pub const ALPHA: Limits = Limits::new("alpha", 0.0001, 0.5, "");
/// Errors more than stable's that must be ruled out, as a share of all answers.
pub const ERRORS_INCREASE: Limits = Limits::new("allowedIncrease", 0.0001, 0.5, "");
/// Latency above stable's that must be ruled out, as a share of stable's.
pub const LATENCY_INCREASE: Limits = Limits::new("allowedIncrease", 0.0001, 10.0, "");
/// The quantile of latency that is compared.
pub const QUANTILE: Limits = Limits::new("quantile", 0.05, 0.999, "");
/// THRESHOLD's highest healthy error rate.
pub const ERRORS_MAX: Limits = Limits::new("thresholdRange.max", 0.0, 100.0, " %");
/// THRESHOLD's highest healthy latency: it is stored in whole microseconds.
pub const LATENCY_MAX: Limits = Limits::new("thresholdRange.max", 0.001, 3_600_000.0, " ms");
/// The lowest and the highest healthy value of a metric that another system keeps: millionths of it fit into an `i64`.
pub const QUERY_BOUND: Limits = Limits::new("thresholdRange", -1e12, 1e12, "");

/// 90 days: longer than any rollout.
const LONG_MS: u64 = 90 * 24 * 3600 * 1000;
/// How long canary traffic outlives the last contact with a majority.
pub const LEASE: Limits = Limits::ms("safety.lease", 1_000, 60_000);
/// How long the canary is analysed at 100 %.
pub const BAKE: Limits = Limits::ms("bake.duration", 0, LONG_MS);
/// Minimum time at a stage.
pub const PAUSE: Limits = Limits::ms("pause.duration", 0, LONG_MS);
/// Longest time without progress.
pub const PROGRESS_DEADLINE: Limits = Limits::ms("progressDeadline", 1_000, LONG_MS);
/// Length of the window that THRESHOLD judges.
pub const WINDOW: Limits = Limits::ms("analysis.window", 1_000, 3_600_000);
/// How often a server is probed.
pub const PROBE_INTERVAL: Limits = Limits::ms("healthCheck.interval", 100, 3_600_000);
/// Requests of a service at a node at once.
pub const REQUESTS: Limits = Limits::new("routing.limits.maxRequests", 1.0, 1_000_000.0, "");
/// Requests at a server at once.
pub const REQUESTS_PER_SERVER: Limits = Limits::new("routing.limits.maxRequestsPerServer", 1.0, 1_000_000.0, "");
/// Requests that may wait for a place at a version's servers.
pub const PENDING: Limits = Limits::new("routing.limits.maxPending", 0.0, 1_000_000.0, "");
/// How long a request may wait for a place at a server.
pub const PENDING_TIMEOUT: Limits = Limits::ms("routing.limits.pendingTimeout", 1, 60_000);
/// How long a server's share of requests grows after its ejection.
pub const SLOW_START: Limits = Limits::ms("routing.slowStart", 0, 3_600_000);
/// How long a client keeps the cookie that assigns it: browsers keep none for longer than 400 days.
pub const COOKIE_AGE: Limits = Limits::ms("routing.hashOn.maxAge", 1_000, 400 * 24 * 3600 * 1000);
/// Longest wait for the first byte of a service's answer.
pub const FIRST_BYTE: Limits = Limits::ms("routing.timeouts.firstByte", 1, 24 * 3600 * 1000);
/// Longest silence within a service's answer.
pub const IDLE: Limits = Limits::ms("routing.timeouts.idle", 1, 24 * 3600 * 1000);
/// Longest time from a service's request to its answer's end; 0: without end.
pub const TOTAL: Limits = Limits::ms("routing.timeouts.total", 0, 24 * 3600 * 1000);
/// How often another system is asked for a metric.
pub const QUERY_INTERVAL: Limits = Limits::ms("provider.prometheus.interval", 1_000, 600_000);

/// Most steps of a rollout, counted as stages: a pause belongs to the weight before it.
pub const STAGES_MAX: usize = 100;
/// Most servers of a version.
pub const URLS_MAX: usize = 64;
/// Most labels, and most annotations, of a rollout.
pub const LABELS_MAX: usize = 64;
/// Most `match` entries of a rollout.
pub const MATCHES_MAX: usize = 32;
/// Most metrics that the data plane keeps.
pub const METRICS_MAX: usize = 32;
/// Most metrics that other systems keep.
pub const QUERIES_MAX: usize = 16;
/// Most bytes of a whole rollout, as JSON: it is in a record, in messages and twice in the ledger.
pub const SPEC_BYTES_MAX: usize = 24 * 1024;
/// Most bytes of a probe's path.
pub const PROBE_PATH_BYTES_MAX: usize = 1_024;
/// Most bytes of a query to another system.
pub const QUERY_BYTES_MAX: usize = 4_096;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_limits_are_allowed_and_what_is_beyond_is_named() {
        assert_eq!(ALPHA.check(0.5), Ok(0.5));
        assert_eq!(ALPHA.check(f64::from(100_u32) / 1e6), Ok(0.0001));
        assert_eq!(ALPHA.check(2.0).unwrap_err().to_string(), "alpha is 2, expected 0.0001 to 0.5");
        assert_eq!(LEASE.check_whole(60_000), Ok(60_000));
        let error = LEASE.check_whole(999).unwrap_err().to_string();
        assert_eq!(error, "safety.lease is 999 ms, expected 1000 to 60000 ms");
        assert!(QUANTILE.check(f64::NAN).is_err() && QUANTILE.check(f64::from(9_990_u16) / 1e4).is_ok());
    }
}
