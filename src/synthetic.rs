//! Made-up traffic that looks like a service's, drawn from a seed: what plans and benchmarks are reckoned with.

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use rand_distr::{Distribution, LogNormal, Poisson};

use crate::domain::window::{Evidence, Tally};

/// Rate, errors and latencies of a service's traffic.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Profile {
    /// Requests a second, of both versions.
    pub requests_per_second: f64,
    /// Share of them that fail, 0.0 to 1.0.
    pub error_rate: f64,
    /// Median latency of the answers, in milliseconds.
    pub p50_ms: f64,
    /// 95th percentile of the latency, in milliseconds.
    pub p95_ms: f64,
}

/// How a canary is worse.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Regression {
    /// More of its requests fail, as a share of all.
    pub errors_added: f64,
    /// They take so many times as long.
    pub slower: f64,
}

impl Regression {
    /// A canary as good as stable.
    pub const NONE: Self = Self { errors_added: 0.0, slower: 1.0 };
}

/// Generator of synthetic requests, which follow from its seed.
#[derive(Debug, Clone)]
pub struct Traffic {
    random: SmallRng,
    latency_us: LogNormal<f64>,
    tally: Tally,
}

/// Requests of one version drawn in one piece, at most: what more would find, so many find too.
const DRAWS_MAX: f64 = 20_000.0;

impl Traffic {
    /// Returns the traffic of this profile that belongs to `seed`.
    ///
    /// Latencies are log-normal through the two quantiles.
    pub fn new(profile: &Profile, seed: u64) -> Self {
        let spread = (profile.p95_ms / profile.p50_ms).max(1.0).ln() / 1.644_853_6;
        let latency_us = LogNormal::new((profile.p50_ms * 1000.0).max(1.0).ln(), spread).expect("a finite spread");
        Self { random: SmallRng::seed_from_u64(seed), latency_us, tally: Tally::default() }
    }

    /// Returns so many requests of it (on average), of which the canary gets a share (0.0 to 1.0) and is worse like this. The
    /// `error_rate` is both versions'.
    pub fn next(&mut self, requests: f64, share: f64, error_rate: f64, regression: Regression) -> Evidence {
        for (is_canary, mean) in [(false, requests * (1.0 - share)), (true, requests * share)] {
            if mean <= 0.0 {
                continue;
            }
            let mean = mean.min(DRAWS_MAX);
            let count = Poisson::new(mean).expect("a positive mean").sample(&mut self.random) as u64;
            let (added, slower) = if is_canary { (regression.errors_added, regression.slower) } else { (0.0, 1.0) };
            let counts = if is_canary { &mut self.tally.canary } else { &mut self.tally.stable };
            for _ in 0..count {
                let failed = self.random.random::<f64>() < error_rate + added;
                let latency = self.latency_us.sample(&mut self.random) * slower;
                counts.record(latency as u64, failed);
            }
        }
        self.tally.take()
    }

    /// Returns a number in 0.0 to 1.0.
    pub fn chance(&mut self) -> f64 {
        self.random.random()
    }
}
