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
}

/// A number beyond its limits.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
#[error("{} is {found}, expected {} to {}", .limits.what, .limits.min, .limits.max)]
pub struct OutOfRange {
    /// The limits that the number exceeds.
    pub limits: Limits,
    /// The number that was found, in the unit that people write.
    pub found: f64,
}

// What is stored is the same number in smaller units, without a remainder, so that no check is nearer than another.
impl Eq for OutOfRange {}

impl Limits {
    const fn new(what: &'static str, min: f64, max: f64) -> Self {
        Self { what, min, max }
    }

    /// Returns `found`, or that it is beyond the limits, as a NaN always is.
    pub fn check(self, found: f64) -> Result<f64, OutOfRange> {
        match (self.min..=self.max).contains(&found) {
            true => Ok(found),
            false => Err(OutOfRange { limits: self, found }),
        }
    }
}

/// Probability of ever rolling back a canary that is no worse than stable.
pub const ALPHA: Limits = Limits::new("alpha", 0.0001, 0.5);
/// Errors more than stable's that must be ruled out, as a share of all answers.
pub const ERRORS_INCREASE: Limits = Limits::new("allowedIncrease", 0.0001, 0.5);
/// Latency above stable's that must be ruled out, as a share of stable's.
pub const LATENCY_INCREASE: Limits = Limits::new("allowedIncrease", 0.0001, 10.0);
/// The quantile of latency that is compared.
pub const QUANTILE: Limits = Limits::new("quantile", 0.05, 0.999);

/// Most steps of a rollout, counted as stages: a pause belongs to the weight before it.
pub const STAGES_MAX: usize = 100;
/// Most servers of a version.
pub const URLS_MAX: usize = 64;
/// Most `match` entries of a rollout.
pub const MATCHES_MAX: usize = 32;
/// Most metrics that the data plane keeps.
pub const METRICS_MAX: usize = 32;
/// Most metrics that other systems keep.
pub const QUERIES_MAX: usize = 16;
/// Most bytes of a whole rollout, as JSON: it is in a record, in messages and twice in the ledger.
pub const SPEC_BYTES_MAX: usize = 24 * 1024;
/// How often another system may be asked, in milliseconds.
pub const QUERY_INTERVAL_MS: (u64, u64) = (1_000, 600_000);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_limits_are_allowed_and_what_is_beyond_is_named() {
        assert_eq!(ALPHA.check(0.5), Ok(0.5));
        assert_eq!(ALPHA.check(f64::from(100_u32) / 1e6), Ok(0.0001));
        assert_eq!(ALPHA.check(2.0).unwrap_err().to_string(), "alpha is 2, expected 0.0001 to 0.5");
        assert!(QUANTILE.check(f64::NAN).is_err() && QUANTILE.check(f64::from(9_990_u16) / 1e4).is_ok());
    }
}
