//! What became of requests: counters for the gate and for Prometheus, and the breaker.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed};

use metrics::{Counter, Histogram};

use crate::domain::ids::{ServiceId, VersionId};
use crate::domain::stats::{BUCKETS, Stats, bucket_of};

/// One version's answers since the last drain. Adding is wait-free.
pub struct Counts {
    errors: AtomicU64,
    latency_sum_us: AtomicU64,
    histogram: Box<[AtomicU32]>,
    by_class: [Counter; 5],
    durations: Histogram,
}

impl Counts {
    pub fn new(service: &ServiceId, version: &VersionId) -> Self {
        let by_class = ["1xx", "2xx", "3xx", "4xx", "5xx"].map(|class| {
            metrics::counter!("aviary_requests_total", "service" => service.to_string(),
                "version" => version.to_string(), "code_class" => class)
        });
        let durations = metrics::histogram!("aviary_request_duration_seconds", "service" => service.to_string(),
            "version" => version.to_string());
        Self {
            errors: AtomicU64::new(0),
            latency_sum_us: AtomicU64::new(0),
            histogram: (0..BUCKETS).map(|_| AtomicU32::new(0)).collect(),
            by_class,
            durations,
        }
    }

    pub fn add(&self, status: u16, latency_us: u64, error: bool) {
        self.errors.fetch_add(u64::from(error), Relaxed);
        self.latency_sum_us.fetch_add(latency_us, Relaxed);
        self.histogram[bucket_of(latency_us)].fetch_add(1, Relaxed);
        self.by_class[usize::from((status / 100).clamp(1, 5) - 1)].increment(1);
        self.durations.record(latency_us as f64 / 1e6);
    }

    /// Returns what was counted since the last call.
    pub fn take(&self) -> Stats {
        let errors = self.errors.swap(0, Relaxed);
        let sum = self.latency_sum_us.swap(0, Relaxed);
        let histogram: Vec<u32> = self.histogram.iter().map(|bucket| bucket.swap(0, Relaxed)).collect();
        let count = histogram.iter().map(|n| u64::from(*n)).sum::<u64>();
        // An answer between two of these reads has its error here and its bucket in the next report.
        let early = errors.saturating_sub(count);
        self.errors.fetch_add(early, Relaxed);
        Stats::from_counts(count, errors - early, sum, histogram)
    }
}

/// Stops a canary that fails every request while stable doesn't: a brake, not a verdict.
#[derive(Default)]
pub struct Breaker {
    tripped: AtomicBool,
    failures: AtomicU32,
    /// The last stable results, one bit each, 1 for a failure; a leading 1 marks how many there are.
    stable: AtomicU32,
}

/// Canary failures in a row that trip the breaker.
pub const FAILURES_MAX: u32 = 5;
/// Stable results that are remembered.
const STABLE_RESULTS: u32 = 20;

impl Breaker {
    pub fn is_tripped(&self) -> bool {
        self.tripped.load(Relaxed)
    }

    pub fn stable(&self, error: bool) {
        let mask = (1 << STABLE_RESULTS) - 1;
        let _ = self.stable.fetch_update(Relaxed, Relaxed, |results| {
            let seen = results.max(1);
            let next = (seen << 1) | u32::from(error);
            Some(if next >> (STABLE_RESULTS + 1) == 0 { next } else { (next & mask) | (1 << STABLE_RESULTS) })
        });
    }

    /// Counts a canary result; returns true when this one trips the breaker.
    pub fn canary(&self, error: bool) -> bool {
        if !error {
            self.failures.store(0, Relaxed);
            return false;
        }
        let failures = self.failures.fetch_add(1, Relaxed) + 1;
        failures >= FAILURES_MAX && !self.stable_fails_too() && !self.tripped.swap(true, Relaxed)
    }

    fn stable_fails_too(&self) -> bool {
        let results = self.stable.load(Relaxed).max(1);
        let seen = results.ilog2();
        let failed = results.count_ones() - 1;
        failed * 2 > seen
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn five_failures_in_a_row_trip_the_breaker_once() {
        let breaker = Breaker::default();
        let found: Vec<_> = [true, true, false, true, true, true, true, true, true].map(|e| breaker.canary(e)).into();
        assert_eq!(found, [false, false, false, false, false, false, false, true, false]);
        assert!(breaker.is_tripped());
    }

    #[test]
    fn a_failure_that_stable_shares_trips_nothing() {
        let breaker = Breaker::default();
        (0..50).for_each(|_| breaker.stable(true));
        assert!((0..50).all(|_| !breaker.canary(true)));
        (0..11).for_each(|_| breaker.stable(false));
        assert!(breaker.canary(true));
    }

    #[test]
    fn counts_are_taken_once() {
        let counts = Counts::new(&ServiceId::new("s").unwrap(), &VersionId::new("v").unwrap());
        counts.add(200, 1_000, false);
        counts.add(502, 3_000, true);
        let stats = counts.take();
        assert_eq!((stats.count, stats.errors, stats.mean_ms()), (2, 1, Some(2.0)));
        assert!(stats.is_consistent());
        assert_eq!(counts.take(), Stats::default());
    }
}
