//! The evidence that a canary is as good as stable, within a margin: silence is not health.
//!
//! Three e-values against "worse by more than the margin": for errors, the median and the 95th percentile of latency. Each
//! is the growth-optimal one when the truth is "no difference", made safe over the whole null by a normaliser.

/// Factors by which a yes-or-no observation multiplies an e-value, as logarithms.
#[derive(Debug, Clone, Copy)]
pub(super) struct Factors {
    canary: (f64, f64),
    stable: (f64, f64),
}

/// So many yes and no of each version.
#[derive(Debug, Clone, Copy)]
pub(super) struct VersionCounts {
    pub canary: (f64, f64),
    pub stable: (f64, f64),
}

/// Returns the factors for "the canary's rate exceeds stable's by less than `margin`", when both are expected at `rate`
/// and the canary has this share of the requests.
pub(super) fn factors(rate: f64, share: f64, margin: f64) -> Factors {
    let (shifted, top) = (rate - margin, 1.0 - 1e-9 - margin);
    let within = |value: f64| value.clamp(1e-9, top);
    let (mut low, mut high) = (within(rate.min(shifted)), within(rate.max(shifted)));
    // The point of the null nearest to the truth: where the likelihood's slope vanishes.
    for _ in 0..50 {
        let (x, y) = (0.5 * (low + high), 0.5 * (low + high) + margin);
        let slope =
            -share * (rate / y - (1.0 - rate) / (1.0 - y)) - (1.0 - share) * (rate / x - (1.0 - rate) / (1.0 - x));
        if slope < 0.0 {
            low = x;
        } else {
            high = x;
        }
    }
    let (x, y) = (0.5 * (low + high), 0.5 * (low + high) + margin);
    let (canary, stable) = ((rate / y, (1.0 - rate) / (1.0 - y)), (rate / x, (1.0 - rate) / (1.0 - x)));
    let corners = [(0.0, margin), (1.0 - margin, 1.0), (0.0, 1.0)];
    let expected = |(p0, p1): (f64, f64)| {
        share * (p1 * canary.0 + (1.0 - p1) * canary.1) + (1.0 - share) * (p0 * stable.0 + (1.0 - p0) * stable.1)
    };
    let safe = corners.into_iter().map(expected).fold(1.0, f64::max);
    let log = |(yes, no): (f64, f64)| ((yes / safe).ln(), (no / safe).ln());
    Factors { canary: log(canary), stable: log(stable) }
}

impl Factors {
    /// Returns the logarithm of what these observations multiply the e-value by.
    pub fn of(&self, seen: VersionCounts) -> f64 {
        seen.canary.0 * self.canary.0
            + seen.canary.1 * self.canary.1
            + seen.stable.0 * self.stable.0
            + seen.stable.1 * self.stable.1
    }
}
