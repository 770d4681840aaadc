//! The bets on errors: given that some request failed, was it the canary's?
//!
//! Under "no worse", a failing request of a block belongs to the canary with at most the probability that the canary's
//! share of the block's requests gives it. What hits both versions alike says nothing about that, so it cancels. Each
//! failing request, in a random but reproducible order, multiplies the wealth of each alternative by its likelihood there
//! over its likelihood under the worst acceptable null. Wealth is an e-process, and P(it ever reaches 1/α) ≤ α (Ville).

use serde::{Deserialize, Serialize};

use super::mixture::Mixture;

/// Counts and times stay below this, so that adding to them can't overflow.
pub const NUMBER_MAX: u64 = 1 << 62;

/// How much worse a canary may be under an alternative.
#[derive(Debug, Clone, Copy)]
enum ErrorAlternative {
    /// The odds ratio of failing: the canary's odds, divided by stable's.
    OddsRatio(f64),
    /// This share of its requests fails.
    Share(f64),
}

const ALTERNATIVES: [ErrorAlternative; 5] = [
    ErrorAlternative::OddsRatio(1.7),
    ErrorAlternative::OddsRatio(3.0),
    ErrorAlternative::OddsRatio(7.0),
    ErrorAlternative::Share(0.12),
    ErrorAlternative::Share(0.8),
];
pub(super) const COUNT: usize = ALTERNATIVES.len();

/// What each of them gets at once, of all wealth: most the one that a handful of requests must be enough for. The rest is for
/// harm that begins later.
pub(super) const START: [f64; COUNT] = [0.136, 0.128, 0.096, 0.072, 0.44];
/// Share of that for each alternative: later there are more requests.
pub(super) const RESTART: [f64; COUNT] = [0.24, 0.22, 0.2, 0.14, 0.2];

/// A block's failing requests, still in the urn.
#[derive(Debug, Clone, Copy)]
pub(super) struct Urn {
    /// Requests of the canary, and of stable.
    pub requests: (u64, u64),
    /// Failed requests of the canary, and of stable.
    pub errors: (u64, u64),
}

/// Stable's error rate, as far as it is known before a block is bet on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Rate {
    errors: f64,
    requests: f64,
    /// Overdispersion of stable's errors: failures in clumps say less than as many alone.
    clumping: (f64, f64),
    /// Power that bets are raised to for it, 0 to 1.
    pub temper: f64,
    before: (f64, f64),
}

impl Default for Rate {
    fn default() -> Self {
        Self { errors: 0.01, requests: 2.0, clumping: (10.0, 10.0), temper: 1.0, before: (0.0, 0.0) }
    }
}

/// What a bet is part of.
#[derive(Debug, Clone, Copy)]
pub(super) struct Stake {
    /// Tolerated: rates so much higher, as a share of stable's.
    pub margin: f64,
    /// And so much higher in absolute terms.
    pub allowance: f64,
    /// The share of the whole e-value that this wealth is.
    pub share: f64,
    /// What else the whole e-value consists of at the moment.
    pub others: f64,
    /// The whole e-value that is enough: 1/α.
    pub needed: f64,
}

impl Rate {
    /// Returns the same rate with bets of at most this power.
    pub fn tempered(&self, most: f64) -> Self {
        Self { temper: self.temper.min(most), ..self.clone() }
    }

    /// Returns true when it is one.
    pub fn is_sound(&self) -> bool {
        let Self { errors, requests, clumping, temper, before } = self;
        let parts = [errors, requests, &clumping.0, &clumping.1, &before.0, &before.1];
        let numbers = parts.iter().all(|part| part.is_finite() && **part >= 0.0);
        numbers && *requests > 0.0 && clumping.1 > 0.0 && (0.0..=1.0).contains(temper)
    }

    /// Returns the rate, 0.0001 to 0.6.
    pub fn value(&self) -> f64 {
        (self.errors / self.requests).clamp(1e-4, 0.6)
    }

    /// Learns from a block that was bet on already: `seconds` long, with so many stable requests and errors.
    pub fn learn(&mut self, seconds: f64, requests: f64, errors: f64) {
        let (requests_before, errors_before) = self.before;
        if requests_before > 0.0 && errors_before + errors > 0.0 {
            let difference = errors_before * requests - errors * requests_before;
            let surprise = difference.powi(2) / (requests_before * requests) / (errors_before + errors);
            let keep = 1.0 - 1.0 / 300.0;
            self.clumping = (self.clumping.0 * keep + surprise.min(12.0), self.clumping.1 * keep + 1.0);
            self.temper = temper(self.clumping.0 / self.clumping.1);
        }
        self.before = (requests, errors);
        let keep = (-(seconds / 60.0).min(requests / 3000.0)).exp2();
        self.errors = self.errors * keep + errors;
        self.requests = self.requests * keep + requests;
        if self.requests < 50.0 {
            self.errors = self.errors.max(0.01);
        }
    }
}

/// Returns the power that bets are raised to for this overdispersion; 1 is none.
fn temper(overdispersion: f64) -> f64 {
    if overdispersion < 1.2 { 1.0 } else { 1.0 / (2.0 * overdispersion - 1.0) }
}

/// Bets on every failing request of a block; returns true when the e-value of the whole was enough on the way.
pub(super) fn bet(
    wealth: &mut Mixture<COUNT>,
    urn: Urn,
    rate: &Rate,
    stake: Stake,
    mut chance: impl FnMut() -> f64,
) -> bool {
    let Stake { margin, allowance, share, others, needed } = stake;
    let stable = rate.value();
    let stable_odds = stable / (1.0 - stable);
    let mut ratios = [0.0; COUNT];
    for (k, (ratio, alternative)) in ratios.iter_mut().zip(ALTERNATIVES).enumerate() {
        *ratio = match alternative {
            ErrorAlternative::OddsRatio(times) => times,
            ErrorAlternative::Share(share) => {
                (share / (1.0 - share)).max(stable_odds * (1.6 + 0.4 * k as f64)) / stable_odds
            }
        };
    }
    let margin = 1.0 + margin + allowance / stable;
    let (mut canary, mut other) = (urn.requests.0 as f64, urn.requests.1 as f64);
    let (mut failing, mut failing_other) = urn.errors;
    let mut reached = false;
    while failing + failing_other > 0 {
        let is_canary = chance() * ((failing + failing_other) as f64) < failing as f64;
        let null = (margin * canary / (margin * canary + other)).min(1.0 - 1e-12);
        let (mut up, mut down) = ([1.0; COUNT], [1.0; COUNT]);
        for k in 0..COUNT {
            let likely = (ratios[k] * canary / (ratios[k] * canary + other)).max(null).min(1.0 - 1e-12);
            if canary > 0.0 {
                up[k] = power(likely / null, rate.temper);
            }
            down[k] = power((1.0 - likely) / (1.0 - null), rate.temper);
        }
        let mut lift = 1.0;
        if canary > 0.0 && rate.temper >= 1.0 {
            // What lies beyond 1/α is of no use there: it is spent on the other outcome.
            let beyond = share * wealth.value_with(&up) + others - needed;
            if beyond > 0.0 {
                let kept = share * wealth.invested_with(&down);
                lift = (1.0 + null * beyond / ((1.0 - null) * kept.max(1e-300))).min(1e9);
            }
        }
        wealth.multiply(&if is_canary { up } else { down.map(|factor| factor * lift) });
        reached |= share * wealth.value() + others >= needed * (1.0 - 1e-12);
        if is_canary {
            (failing, canary) = (failing - 1, canary - 1.0);
        } else {
            (failing_other, other) = (failing_other - 1, other - 1.0);
        }
    }
    reached
}

fn power(base: f64, exponent: f64) -> f64 {
    if exponent >= 1.0 { base } else { base.powf(exponent) }
}
