//! What the test tolerates, and how often its verdicts may be wrong.

use serde::{Deserialize, Serialize};

/// The share of α that errors get where both are compared; latency has the rest.
pub const ERRORS_SHARE: f64 = 0.68;

/// A harm that must be ruled out before a promotion.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Required {
    /// Name of the metric in the rollout file.
    pub name: String,
    /// Harm that must be ruled out.
    pub harm: Harm,
}

impl Required {
    pub(super) fn new(name: &str, harm: Harm) -> Self {
        Self { name: name.into(), harm }
    }
}

/// How a canary may be worse.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub enum Harm {
    /// An error rate higher by this much, as a share of all requests.
    Errors(f64),
    /// That so much fewer answers stay within stable's quantile (0.0 to 1.0).
    Latency(f64, Slowdown),
}

/// Latency increase that is allowed.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub enum Slowdown {
    /// More answers beyond stable's quantile, as a share of all.
    Share(f64),
    /// A quantile higher by this much, as a share of stable's.
    Increase(f64),
}

/// Tolerances, and the error probabilities of verdicts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Policy {
    /// Probability of ever rolling back a canary that is no worse than tolerated, at most.
    pub alpha: f64,
    /// Probability of promoting a canary that is worse than the margins below, at most.
    pub alpha_promote: f64,
    /// A rollout's expected length, in seconds: restarts are spread over it.
    pub horizon_seconds: f64,
    /// Tolerated: error rates so much higher, as a share of stable's.
    pub error_margin: f64,
    /// And so much higher in absolute terms.
    pub error_allowance: f64,
    /// Tolerated: latencies so much longer, as a share.
    pub latency_margin: f64,
    /// How fast a warm-up's slowness goes away: to 1/e of it in so many seconds.
    pub warm_up_seconds: f64,
    /// The share of α that errors get, 0.0 to 1.0; latency has the rest.
    pub errors_share: f64,
    /// Harms that a promotion must have ruled out.
    pub required: Vec<Required>,
    /// Nothing is promoted before so many seconds.
    pub promote_after_seconds: f64,
    /// Decides the order in which failing requests of a block are looked at.
    pub seed: u64,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            alpha: 0.01,
            alpha_promote: 0.05,
            horizon_seconds: 3_600.0,
            error_margin: 0.02,
            error_allowance: 0.0001,
            latency_margin: 0.03,
            warm_up_seconds: 8.0,
            errors_share: ERRORS_SHARE,
            required: vec![
                Required::new("errors", Harm::Errors(0.005)),
                Required::new("median", Harm::Latency(0.5, Slowdown::Share(0.05))),
                Required::new("p95", Harm::Latency(0.95, Slowdown::Share(0.025))),
            ],
            promote_after_seconds: 30.0,
            seed: 1,
        }
    }
}
