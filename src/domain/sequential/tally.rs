//! What is counted of two versions' requests, in any order, on any node: adding two tallies is exact.

use std::ops::AddAssign;

/// Factor between two neighbouring bins; a tolerance on latency is a whole number of bins, so that moving a histogram by
/// it is exact.
pub const BIN_RATIO: f64 = 1.03;
/// Upper edge of the first bin, in microseconds.
const FIRST_US: f64 = 250.0;
/// Bins: up to 250 µs × 1.03^419 = 60 s; slower answers share the last one.
pub const BINS: usize = 420;

/// Returns the bin of a latency in microseconds, `0..BINS`.
pub fn bin_of(latency_us: u64) -> usize {
    let latency = latency_us as f64;
    if latency < FIRST_US {
        return 0;
    }
    let bin = 1.0 + (latency / FIRST_US).ln() * (1.0 / 0.029_558_802_241_544_4);
    (bin as usize).min(BINS - 1)
}

/// A request's version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// What serves today.
    Stable,
    /// What is tried.
    Canary,
}

/// Counts of one version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Counts {
    /// Requests.
    pub requests: u64,
    /// Those that failed.
    pub errors: u64,
    /// The others, by latency.
    pub latency: Box<[u32; BINS]>,
}

impl Default for Counts {
    fn default() -> Self {
        Self { requests: 0, errors: 0, latency: Box::new([0; BINS]) }
    }
}

/// Counts of both.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Tally {
    /// What serves today.
    pub stable: Counts,
    /// What is tried.
    pub canary: Counts,
}

impl Tally {
    /// Counts a request.
    pub fn record(&mut self, side: Side, error: bool, latency_us: u64) {
        let counts = match side {
            Side::Stable => &mut self.stable,
            Side::Canary => &mut self.canary,
        };
        counts.requests += 1;
        if error {
            counts.errors += 1;
        } else {
            counts.latency[bin_of(latency_us)] += 1;
        }
    }

    /// Returns true while nothing was counted.
    pub fn is_empty(&self) -> bool {
        self.stable.requests + self.canary.requests == 0
    }

    /// Counts nothing any more.
    pub fn clear(&mut self) {
        for counts in [&mut self.stable, &mut self.canary] {
            (counts.requests, counts.errors) = (0, 0);
            counts.latency.fill(0);
        }
    }
}

impl AddAssign<&Counts> for Counts {
    fn add_assign(&mut self, other: &Counts) {
        self.requests += other.requests;
        self.errors += other.errors;
        self.latency.iter_mut().zip(other.latency.iter()).for_each(|(sum, more)| *sum = sum.saturating_add(*more));
    }
}

impl AddAssign<&Tally> for Tally {
    fn add_assign(&mut self, other: &Tally) {
        self.stable += &other.stable;
        self.canary += &other.canary;
    }
}
