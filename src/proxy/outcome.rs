//! What became of requests: counters for the gate and for Prometheus, and the circuit breaker.

use std::collections::BTreeMap;
use std::sync::OnceLock;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64};

use metrics::{Counter, Histogram};

use crate::domain::classes::ClassCounts;
use crate::domain::ids::{ServiceId, VersionId};
use crate::domain::stats::{BINS, Stats, bin_of, middle_us};

/// Names of two metrics: how many, and how long.
pub type MetricNames = (&'static str, &'static str);
/// Of answers that clients got.
pub const ANSWERS: MetricNames = ("aviary_requests_total", "aviary_request_duration_seconds");
/// Of answers to mirrored requests.
pub const COPIES: MetricNames = ("aviary_mirrored_requests_total", "aviary_mirrored_request_duration_seconds");
/// Of answers to requests whose header chose the version.
pub const FORCED: MetricNames = ("aviary_forced_requests_total", "aviary_forced_request_duration_seconds");

/// One version's answers since the last drain, each worker's in a shard of its own.
pub struct OutcomeCounts {
    shards: Box<[Shard]>,
    by_class: [Counter; 6],
    durations: Histogram,
}

/// Counts of one worker; only the worker and the drain write here.
#[repr(align(128))]
struct Shard {
    latency_sum_us: AtomicU64,
    /// By hundreds of the status, from 1xx on; 304 by itself, last: it tells that a client's copy is good.
    by_class: [AtomicU32; 6],
    /// Answers by latency: those that were no errors, and those that were; none before the first answer, because of many
    /// services most have no traffic here.
    histograms: OnceLock<[Box<[AtomicU32]>; 2]>,
}

impl OutcomeCounts {
    /// Returns the counts of a version, in these metrics, with a shard for each worker.
    pub fn new(service: &ServiceId, version: &VersionId, shards: usize, (total, seconds): MetricNames) -> Self {
        let by_class = ["1xx", "2xx", "3xx", "4xx", "5xx", "3xx"].map(|class| {
            metrics::counter!(total, "service" => service.to_string(),
                "version" => version.to_string(), "code_class" => class)
        });
        let durations = metrics::histogram!(seconds, "service" => service.to_string(),
            "version" => version.to_string());
        let shard =
            |_| Shard { latency_sum_us: AtomicU64::new(0), by_class: Default::default(), histograms: OnceLock::new() };
        Self { shards: (0..shards).map(shard).collect(), by_class, durations }
    }

    /// Counts an answer of this worker's.
    pub fn add(&self, shard: usize, status: u16, latency_us: u64, error: bool) {
        let shard = &self.shards[shard];
        shard.latency_sum_us.fetch_add(latency_us, Relaxed);
        shard.histograms.get_or_init(empty)[usize::from(error)][bin_of(latency_us)].fetch_add(1, Relaxed);
        // Last, and seen last: a reader that sees it finds the rest.
        shard.by_class[class_of(status)].fetch_add(1, Release);
    }

    /// Returns what was counted since the last call, and puts it into the metrics.
    pub fn take(&self) -> Stats {
        let mut stats = Stats::default();
        for shard in &self.shards {
            let mut new = [0; 6];
            for ((count, counter), new) in shard.by_class.iter().zip(&self.by_class).zip(&mut new) {
                if count.load(Acquire) > 0 {
                    *new = count.swap(0, Acquire).into();
                    counter.increment(*new);
                }
            }
            if new != [0; 6] {
                let mut answers = shard.take(&self.durations);
                // Of an answer that is being counted at this moment the class alone may have been seen.
                answers.classes = ClassCounts { redirect: new[2], client: new[3] }.within(answers.count);
                stats += &answers;
            }
        }
        stats
    }
}

/// Returns the place of a status among the classes.
fn class_of(status: u16) -> usize {
    if status == 304 { 5 } else { usize::from((status / 100).clamp(1, 5) - 1) }
}

/// Returns histograms without answers.
fn empty() -> [Box<[AtomicU32]>; 2] {
    [(); 2].map(|()| (0..BINS).map(|_| AtomicU32::new(0)).collect())
}

impl Shard {
    fn take(&self, durations: &Histogram) -> Stats {
        let sum = self.latency_sum_us.swap(0, Relaxed);
        let take = |(bin, count): (usize, &AtomicU32)| {
            if count.load(Relaxed) == 0 {
                return 0;
            }
            let new = count.swap(0, Relaxed);
            durations.record_many(middle_us(bin) as f64 / 1e6, new as usize);
            new
        };
        let [fine, errors] = self.histograms.get_or_init(empty);
        let errors = errors.iter().enumerate().map(take).map(u64::from).sum();
        let stats = Stats::from_counts(errors, sum, fine.iter().enumerate().map(take));
        if stats.count == 0 {
            // An answer is being counted at this moment: its latency waits for its count, without which peers refuse it.
            self.latency_sum_us.fetch_add(sum, Relaxed);
            return Stats::default();
        }
        stats
    }
}

/// Stops a canary that fails every request while stable doesn't: a local hold, not a verdict.
#[derive(Default)]
pub struct CircuitBreaker {
    tripped: AtomicBool,
    failures: AtomicU32,
    /// Status codes of the last failures; which is the latest follows from their number.
    statuses: [AtomicU32; FAILURES_MAX as usize],
    /// The last stable results, one bit each, 1 for a failure; a leading 1 marks how many there are.
    stable: AtomicU32,
}

/// Canary failures in a row that trip the circuit breaker.
pub const FAILURES_MAX: u32 = 5;
/// Stable results that are remembered.
const STABLE_RESULTS: u32 = 20;

impl CircuitBreaker {
    /// Returns true once it tripped, for good.
    pub fn is_tripped(&self) -> bool {
        self.tripped.load(Relaxed)
    }

    /// Counts a result of the stable version: an answer or an error.
    pub fn stable(&self, error: bool) {
        let mask = (1 << STABLE_RESULTS) - 1;
        if !error && self.stable.load(Relaxed) == 1 << STABLE_RESULTS {
            // All well, as before.
            return;
        }
        let _ = self.stable.fetch_update(Relaxed, Relaxed, |results| {
            let seen = results.max(1);
            let next = (seen << 1) | u32::from(error);
            Some(if next >> (STABLE_RESULTS + 1) == 0 { next } else { (next & mask) | (1 << STABLE_RESULTS) })
        });
    }

    /// Counts a canary result with the status that the client got; returns true when this one trips the circuit breaker.
    pub fn canary(&self, error: bool, status: u16) -> bool {
        if !error {
            self.failures.store(0, Relaxed);
            return false;
        }
        let before = self.failures.fetch_add(1, Relaxed);
        self.statuses[(before % FAILURES_MAX) as usize].store(u32::from(status), Relaxed);
        before + 1 >= FAILURES_MAX && !self.stable_fails_too() && !self.tripped.swap(true, Relaxed)
    }

    /// Returns how the last failures looked to clients, `3 × 503, 2 × 502`: 502 and 504 are the node's own where no answer came.
    pub fn last_failures(&self) -> String {
        let mut counts = BTreeMap::<u32, usize>::new();
        self.statuses.iter().for_each(|status| *counts.entry(status.load(Relaxed)).or_default() += 1);
        let mut counts: Vec<_> = counts.into_iter().collect();
        counts.sort_by_key(|(status, count)| (std::cmp::Reverse(*count), *status));
        counts.iter().map(|(status, count)| format!("{count} × {status}")).collect::<Vec<_>>().join(", ")
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
    fn five_failures_in_a_row_trip_the_circuit_breaker_once() {
        let circuit_breaker = CircuitBreaker::default();
        let found: Vec<_> =
            [true, true, false, true, true, true, true, true, true].map(|e| circuit_breaker.canary(e, 503)).into();
        assert_eq!(found, [false, false, false, false, false, false, false, true, false]);
        assert!(circuit_breaker.is_tripped());
    }

    #[test]
    fn the_circuit_breaker_tells_how_requests_failed() {
        let circuit_breaker = CircuitBreaker::default();
        circuit_breaker.canary(true, 500);
        circuit_breaker.canary(false, 200);
        for status in [502, 502, 504, 502] {
            assert!(!circuit_breaker.canary(true, status));
        }
        assert!(circuit_breaker.canary(true, 504));
        assert_eq!(circuit_breaker.last_failures(), "3 × 502, 2 × 504");
    }

    #[test]
    fn a_failure_that_stable_shares_trips_nothing() {
        let circuit_breaker = CircuitBreaker::default();
        (0..50).for_each(|_| circuit_breaker.stable(true));
        assert!((0..50).all(|_| !circuit_breaker.canary(true, 502)));
        (0..11).for_each(|_| circuit_breaker.stable(false));
        assert!(circuit_breaker.canary(true, 504));
    }

    #[test]
    fn counts_are_taken_once() {
        let counts = OutcomeCounts::new(&ServiceId::new("s").unwrap(), &VersionId::new("v").unwrap(), 2, ANSWERS);
        counts.add(0, 200, 1_000, false);
        counts.add(1, 502, 3_000, true);
        let stats = counts.take();
        assert_eq!((stats.count, stats.errors, stats.mean_ms()), (2, 1, Some(2.0)));
        assert_eq!(stats.check(), Ok(()));
        assert_eq!(counts.take(), Stats::default());
    }

    #[test]
    fn answers_that_are_no_errors_are_counted_by_class() {
        let counts = OutcomeCounts::new(&ServiceId::new("s").unwrap(), &VersionId::new("v").unwrap(), 1, ANSWERS);
        [200, 304, 307, 404, 429, 500].into_iter().for_each(|status| counts.add(0, status, 1_000, status >= 500));
        assert_eq!(counts.take().classes, ClassCounts { redirect: 1, client: 2 });
    }

    #[test]
    fn an_answer_that_is_half_counted_waits_for_the_next_time() {
        let counts = OutcomeCounts::new(&ServiceId::new("s").unwrap(), &VersionId::new("v").unwrap(), 1, ANSWERS);
        // The order in which `add` and `take` may meet: class and sum are seen, the bin is not.
        counts.shards[0].by_class[1].fetch_add(1, Release);
        counts.shards[0].latency_sum_us.fetch_add(1_000, Relaxed);
        assert_eq!(counts.take(), Stats::default());
        counts.shards[0].histograms.get_or_init(empty)[0][bin_of(1_000)].fetch_add(1, Relaxed);
        counts.shards[0].by_class[1].fetch_add(1, Release);
        let stats = counts.take();
        assert_eq!((stats.count, stats.mean_ms(), stats.check()), (1, Some(1.0), Ok(())));
    }
}
