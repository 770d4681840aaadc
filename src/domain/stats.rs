//! Mergeable statistics of one version's answers: counts, errors, latency.

use std::ops::AddAssign;

use serde::{Deserialize, Serialize};

/// Buckets in an octave; the middle of a bucket is at most 1/32 (3.2 %) from any latency in it.
const PER_OCTAVE: u32 = 16;
/// Latencies below this many microseconds share the first bucket.
const FLOOR_US: u64 = 64;
const FLOOR_BITS: u32 = FLOOR_US.trailing_zeros();
/// Octaves above the floor: up to 64 µs × 2^21 = 134 s; longer latencies share the last bucket.
const OCTAVES: u32 = 21;
/// Number of buckets of a latency histogram.
pub const BUCKETS: usize = (OCTAVES * PER_OCTAVE) as usize + 2;

/// Returns the histogram bucket of a latency in microseconds, `0..BUCKETS`.
pub fn bucket_of(latency_us: u64) -> usize {
    if latency_us < FLOOR_US {
        return 0;
    }
    let octave = latency_us.ilog2() - FLOOR_BITS;
    if octave >= OCTAVES {
        return BUCKETS - 1;
    }
    let within = (latency_us >> (octave + FLOOR_BITS - PER_OCTAVE.ilog2())) - u64::from(PER_OCTAVE);
    1 + (octave * PER_OCTAVE) as usize + within as usize
}

/// Returns the latency in microseconds in the middle of a bucket.
pub fn middle_us(bucket: usize) -> u64 {
    assert!(bucket < BUCKETS, "bucket {bucket} out of range");
    let Some(index) = bucket.checked_sub(1) else { return FLOOR_US / 2 };
    if bucket == BUCKETS - 1 {
        return FLOOR_US << OCTAVES;
    }
    let (octave, within) = (index as u32 / PER_OCTAVE, (index as u32 % PER_OCTAVE) as u64);
    let width = (FLOOR_US << octave) / u64::from(PER_OCTAVE);
    (FLOOR_US << octave) + width * within + width / 2
}

/// Counts of one version's answers. Adding two is exact, in any order: three nodes' sums are what one node that saw
/// everything would have counted.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Stats {
    /// Answers.
    pub count: u64,
    /// Answers that were errors (5xx, time-outs, connections refused or broken).
    pub errors: u64,
    /// Sum of latencies, in microseconds.
    pub latency_sum_us: u64,
    /// Answers by latency: (bucket, answers), ascending, without zeros; see [`bucket_of`].
    histogram: Vec<(u16, u32)>,
}

impl Stats {
    /// Returns statistics from raw counters; `histogram` holds one count for each of [`BUCKETS`].
    pub fn from_counts(count: u64, errors: u64, latency_sum_us: u64, histogram: impl IntoIterator<Item = u32>) -> Self {
        let histogram = histogram.into_iter().zip(0u16..).filter(|(n, _)| *n > 0).map(|(n, b)| (b, n)).collect();
        Self { count, errors, latency_sum_us, histogram }
    }

    /// Counts one answer.
    pub fn record(&mut self, latency_us: u64, error: bool) {
        self.count += 1;
        self.errors += u64::from(error);
        self.latency_sum_us += latency_us;
        let bucket = bucket_of(latency_us) as u16;
        match self.histogram.binary_search_by_key(&bucket, |(b, _)| *b) {
            Ok(i) => self.histogram[i].1 += 1,
            Err(i) => self.histogram.insert(i, (bucket, 1)),
        }
    }

    /// Returns true when the parts agree, as they do in everything this program counted; a peer's bytes may not.
    pub fn is_consistent(&self) -> bool {
        let ascending = self.histogram.windows(2).all(|pair| pair[0].0 < pair[1].0);
        let in_range = self.histogram.iter().all(|(b, n)| usize::from(*b) < BUCKETS && *n > 0);
        let sum: u64 = self.histogram.iter().map(|(_, n)| u64::from(*n)).sum();
        ascending && in_range && sum == self.count && self.errors <= self.count
    }

    /// Returns errors ÷ answers, 0.0 to 1.0; none without answers.
    pub fn error_rate(&self) -> Option<f64> {
        (self.count > 0).then(|| self.errors as f64 / self.count as f64)
    }

    /// Returns the mean latency in milliseconds; none without answers.
    pub fn mean_ms(&self) -> Option<f64> {
        (self.count > 0).then(|| self.latency_sum_us as f64 / self.count as f64 / 1000.0)
    }

    /// Returns the latency in milliseconds that a share `q` (0.0 to 1.0) of answers stays at or below; within 3.2 %.
    pub fn quantile_ms(&self, q: f64) -> Option<f64> {
        let total: u64 = self.histogram.iter().map(|(_, n)| u64::from(*n)).sum();
        let rank = ((total as f64 * q).ceil() as u64).clamp(1, total.max(1));
        let mut seen = 0;
        for (bucket, n) in &self.histogram {
            seen += u64::from(*n);
            if seen >= rank {
                return Some(middle_us(usize::from(*bucket)) as f64 / 1000.0);
            }
        }
        None
    }
}

impl AddAssign<&Stats> for Stats {
    fn add_assign(&mut self, other: &Stats) {
        self.count += other.count;
        self.errors += other.errors;
        self.latency_sum_us += other.latency_sum_us;
        let mut merged = Vec::with_capacity(self.histogram.len() + other.histogram.len());
        let (mut left, mut right) = (self.histogram.iter().peekable(), other.histogram.iter().peekable());
        while let Some(next) = match (left.peek(), right.peek()) {
            (Some(l), Some(r)) if l.0 == r.0 => {
                let sum = (l.0, l.1.saturating_add(r.1));
                left.next();
                right.next();
                Some(sum)
            }
            (Some(l), Some(r)) if l.0 > r.0 => right.next().copied(),
            (Some(_), _) => left.next().copied(),
            (None, _) => right.next().copied(),
        } {
            merged.push(next);
        }
        self.histogram = merged;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn of(answers: &[(u64, bool)]) -> Stats {
        let mut stats = Stats::default();
        answers.iter().for_each(|(us, error)| stats.record(*us, *error));
        stats
    }

    #[test]
    fn quantiles_are_within_the_stated_error() {
        let stats = of(&(1..=1000).map(|ms| (ms * 1000, false)).collect::<Vec<_>>());
        for (q, expected) in [(0.5, 500.0), (0.95, 950.0), (0.99, 990.0), (1.0, 1000.0)] {
            let found = stats.quantile_ms(q).unwrap();
            assert!((found / expected - 1.0).abs() <= 0.032 + 0.002, "p{q}: {found}, expected about {expected}");
        }
        assert_eq!(stats.mean_ms(), Some(500.5));
    }

    #[test]
    fn without_answers_there_is_no_rate() {
        let none = Stats::default();
        assert_eq!((none.error_rate(), none.mean_ms(), none.quantile_ms(0.5)), (None, None, None));
    }

    proptest! {
        #[test]
        fn buckets_hold_their_middle_and_ascend(us in 0u64..1 << 40) {
            let bucket = bucket_of(us);
            prop_assert!(bucket < BUCKETS);
            prop_assert_eq!(bucket_of(middle_us(bucket)), bucket);
            prop_assert!(bucket_of(us + 1) >= bucket);
        }

        #[test]
        fn merging_equals_having_seen_everything(
            left in prop::collection::vec((0u64..10_000_000, any::<bool>()), 0..50),
            right in prop::collection::vec((0u64..10_000_000, any::<bool>()), 0..50),
        ) {
            let mut merged = of(&left);
            merged += &of(&right);
            prop_assert!(merged.is_consistent());
            prop_assert_eq!(merged, of(&[left, right].concat()));
        }
    }
}
