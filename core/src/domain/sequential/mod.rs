//! SEQUENTIAL: a canary against the stable version that serves beside it, looked at as often as one likes.
//!
//! Traffic is cut into blocks: a tick of the clock, longer where there is little. Each block multiplies two e-processes,
//! one that bets on errors and one on latency; their weighted mean stays below 1/α for ever with probability 1 − α while
//! the canary is no worse than tolerated (Ville's inequality). Reaching it is evidence of harm. New wealth is started all
//! the time, so that harm which begins late is found soon after. Promotion needs evidence of its own.
//!
//! Everything is counts ([`Stats`](super::stats::Stats)), so that three nodes which saw a third each decide as one that saw all.

mod classes;
mod errors;
mod latency;
mod mixture;
mod policy;
mod promote;

use classes::ClassBlock;
pub use classes::{CLASS_SHARE, ClassComparison};
use errors::{NUMBER_MAX, Rate, Stake, Urn};
use latency::{Bets, Coarse, NULLS, Shape};
use mixture::Mixture;
pub use policy::{ERRORS_SHARE, Harm, Policy, Required, Slowdown};
use promote::VersionCounts;
use serde::{Deserialize, Serialize};

use super::classes::ErrorClasses;
use super::window::Evidence;

/// The share of wealth that is started at once on latency; the rest is for harm that begins later.
const LATENCY_START: f64 = 0.9;
/// Requests of a block, at least, by how many of them failed: a failure says more the more requests it is one of. That a
/// block is over must not depend on whose failures they are.
const BLOCK_REQUESTS_MIN: [u64; 4] = [60, 60, 28, 20];
/// And of those that come once bets on errors did well: a little more may be enough.
const BLOCK_REQUESTS_MIN_WARNED: [u64; 4] = [60, 20, 20, 20];
/// A pause may be wrong so many times as often as a rollback, and at most every other time.
const PAUSE_TIMES: f64 = 5.0;
/// The e-value that the smaller blocks begin at.
const WARNED: f64 = 5.0;

/// Verdict of the sequential test.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum SequentialVerdict {
    /// As good as stable, within the margins.
    Promote,
    /// The evidence does not suffice for a verdict.
    Hold,
    /// The canary is probably worse.
    Pause,
    /// The canary is worse, with an error probability of at most α.
    Rollback,
}

/// Verdict of the sequential test with its evidence.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SequentialResult {
    /// Verdict of the test at this moment.
    pub decision: SequentialVerdict,
    /// The e-value of harm: 1/α rolls back.
    pub e: f64,
    /// E-value of the bets on errors alone; 1 without evidence.
    pub e_errors: f64,
    /// E-value of the bets on latency alone; 1 without evidence.
    pub e_latency: f64,
    /// The e-values for promotion, as logarithms, in the order of what is required; ln(1/α) is enough.
    pub promotion: Vec<f64>,
    /// The share of α that was put into bets so far, times α.
    pub alpha_spent: f64,
    /// Requests seen, of stable and of the canary.
    pub requests: (u64, u64),
    /// Failed requests of stable and of the canary.
    pub errors: (u64, u64),
}

/// The test of one rollout. Its state is of one size, however many requests there are.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sequential {
    policy: Policy,
    at_ms: u64,
    block: Block,
    errors: Mixture<{ errors::COUNT }>,
    /// Bets on latency against each null, a slowness that decays; their minimum is the evidence.
    latency: [Mixture<{ latency::COUNT }>; NULLS],
    rate: Rate,
    shape: Shape,
    bets: Option<Bets>,
    tolerated: [usize; NULLS],
    bets_until_ms: u64,
    promotion: Vec<f64>,
    started: bool,
    weight_changed: bool,
    e: f64,
    e_latency: f64,
    rolled_back: bool,
    requests: (u64, u64),
    failed: (u64, u64),
    /// Encoded beside the rest, because not every build compares classes: see `protocol::message::ClassEvidence`.
    #[serde(skip)]
    classes: ClassComparison,
}

/// Counts since the last block was closed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Block {
    requests: (u64, u64),
    errors: (u64, u64),
    canary: Coarse,
    /// Stable's, as they would be at the edge of what is tolerated.
    tolerated: [Coarse; NULLS],
    stable: Coarse,
}

impl Default for Block {
    fn default() -> Self {
        let (requests, errors) = ((0, 0), (0, 0));
        Self { requests, errors, canary: Coarse::EMPTY, tolerated: [Coarse::EMPTY; NULLS], stable: Coarse::EMPTY }
    }
}

impl Sequential {
    /// Returns the test of a rollout that begins now, at 0 ms.
    pub fn new(policy: Policy) -> Self {
        Self {
            promotion: vec![0.0; policy.required.len()],
            policy,
            at_ms: 0,
            block: Block::default(),
            errors: Mixture::default(),
            latency: Default::default(),
            rate: Rate::default(),
            shape: Shape::default(),
            bets: None,
            tolerated: [0; NULLS],
            bets_until_ms: 0,
            started: false,
            weight_changed: false,
            e: 1.0,
            e_latency: 1.0,
            rolled_back: false,
            requests: (0, 0),
            failed: (0, 0),
            classes: ClassComparison::default(),
        }
    }

    /// Returns true when its parts are such that it can go on with them, as in everything that it came to by itself; a peer's
    /// bytes may not be.
    pub fn is_sound(&self) -> bool {
        let Self { block, errors, latency, rate, shape, bets, promotion, .. } = self;
        let histograms = block.tolerated.iter().chain([&block.canary, &block.stable]);
        let counted = [block.requests, block.errors, self.requests, self.failed].into_iter().flat_map(|(a, b)| [a, b]);
        promotion.len() == self.policy.required.len()
            && [self.e, self.e_latency].iter().chain(promotion).all(|e| e.is_finite())
            && errors.is_sound()
            && latency.iter().all(Mixture::is_sound)
            && rate.is_sound()
            && shape.is_sound()
            && self.classes.is_sound()
            && bets.iter().all(Bets::is_sound)
            && latency::are_tolerances(&self.tolerated)
            && histograms.into_iter().all(Coarse::is_sound)
            && counted.chain([self.at_ms, self.bets_until_ms]).all(|number| number <= NUMBER_MAX)
    }

    /// Chooses the classes of statuses that are compared beside errors; none before the first call.
    pub fn compare_classes(&mut self, classes: ErrorClasses) {
        self.classes.compare(classes);
    }

    /// Says what share of the requests the canary's weight gives it, 0.0 to 1.0; none where nobody knows.
    pub fn expect_weight(&mut self, weight: Option<f64>) {
        self.classes.expect(weight);
    }

    /// Returns the comparison of classes.
    pub fn classes(&self) -> &ClassComparison {
        &self.classes
    }

    /// Goes on with another node's comparison of classes.
    pub fn set_classes(&mut self, classes: ClassComparison) {
        self.classes = classes;
    }

    /// Returns what it goes by.
    pub fn policy(&self) -> &Policy {
        &self.policy
    }

    /// Says that the canary's share changes from here on: promotion needs evidence at the new one.
    pub fn weight_changed(&mut self) {
        self.weight_changed = true;
    }

    /// Takes everything that happened since the last call, up to `at_ms` after the start; returns what it says.
    pub fn advance(&mut self, at_ms: u64, evidence: &Evidence) -> SequentialResult {
        if self.rolled_back {
            return self.result();
        }
        let (since, seconds) = (self.at_ms as f64 / 1000.0, at_ms.saturating_sub(self.at_ms) as f64 / 1000.0);
        let now = at_ms as f64 / 1000.0;
        self.tolerated = latency::tolerances(since, &self.policy);
        self.add(evidence);
        self.start_wealth(since, seconds);
        let block = &self.block;
        let (requests, failed) = (block.requests.0 + block.requests.1, block.errors.0 + block.errors.1);
        let least = if self.errors.value() >= WARNED { BLOCK_REQUESTS_MIN_WARNED } else { BLOCK_REQUESTS_MIN };
        let closes = requests >= least[failed.min(3) as usize] && block.requests.0 > 0 && block.requests.1 > 0;
        if at_ms >= self.bets_until_ms {
            self.bets = Some(self.shape.bets(&self.tolerated));
            let wait = if now < 60.0 {
                1_000
            } else if now < 120.0 {
                10_000
            } else {
                30_000
            };
            self.bets_until_ms = at_ms + wait;
        }
        if closes {
            self.close(at_ms, seconds);
        }
        self.at_ms = at_ms;
        self.result()
    }

    fn add(&mut self, evidence: &Evidence) {
        let (stable, canary, block) = (&evidence.stable, &evidence.canary, &mut self.block);
        for (sum, more) in
            [(&mut block.requests, (canary.count, stable.count)), (&mut block.errors, (canary.errors, stable.errors))]
        {
            (sum.0, sum.1) = (sum.0 + more.0, sum.1 + more.1);
        }
        self.requests = (self.requests.0 + stable.count, self.requests.1 + canary.count);
        self.failed = (self.failed.0 + stable.errors, self.failed.1 + canary.errors);
        self.classes.add(evidence);
        latency::add_moved(&mut block.canary, canary.histogram(), 0);
        latency::add_moved(&mut block.stable, stable.histogram(), 0);
        for (sum, bins) in block.tolerated.iter_mut().zip(self.tolerated) {
            latency::add_moved(sum, stable.histogram(), bins);
        }
    }

    fn start_wealth(&mut self, since: f64, seconds: f64) {
        let horizon = self.policy.horizon_seconds;
        let spread = if since <= horizon { 0.7 * seconds / horizon } else { 0.3 * seconds * horizon / (since * since) };
        let at_once: f64 = errors::START.iter().sum();
        let (mut errors, mut latency) = ((1.0 - at_once) * spread, (1.0 - LATENCY_START) * spread);
        let first = !std::mem::replace(&mut self.started, true);
        self.classes.start(errors);
        if first {
            self.errors.start(at_once, &errors::START.map(|share| share / at_once));
            (errors, latency) = (0.0, LATENCY_START);
        }
        if std::mem::take(&mut self.weight_changed) {
            errors += 0.1 * (1.0 - self.errors.started);
            latency += 0.1 * (1.0 - self.latency[0].started);
            self.classes.weight_changed();
            self.promotion.fill(0.0);
        }
        self.errors.start(errors, &errors::RESTART);
        self.latency.iter_mut().for_each(|wealth| wealth.start(latency, &latency::WEIGHTS));
    }

    fn close(&mut self, at_ms: u64, seconds: f64) {
        let block = std::mem::take(&mut self.block);
        let urn = Urn { requests: block.requests, errors: block.errors };
        let (share, rest, needed) = (self.policy.errors_share, self.classes.rest(), 1.0 / self.policy.alpha);
        let others = rest * (1.0 - share) * self.e_latency + self.classes.part();
        let Policy { error_margin: margin, error_allowance: allowance, .. } = self.policy;
        let stake = Stake { margin, allowance, share: rest * share, others, needed };
        let mut state = self.policy.seed.wrapping_mul(1_000_003).wrapping_add(at_ms);
        let mut chance = move || chance(&mut state);
        self.rolled_back |= errors::bet(&mut self.errors, urn, &self.rate, stake, &mut chance);
        if let Some(bets) = &self.bets {
            let mut settled: Option<(usize, &Coarse, [f64; latency::COUNT])> = None;
            let nulls = self.latency.iter_mut().zip(&block.tolerated).zip(self.tolerated);
            for ((wealth, stable), tolerated) in nulls {
                // Once warm, all nulls tolerate the same.
                let same = settled.filter(|(before, counts, _)| *before == tolerated && *counts == stable);
                let factors =
                    same.map_or_else(|| bets.settle(tolerated, &block.canary, stable), |(_, _, factors)| factors);
                settled = Some((tolerated, stable, factors));
                wealth.multiply(&factors);
            }
        }
        self.e_latency = self.latency.iter().map(Mixture::value).fold(f64::INFINITY, f64::min);
        let main = rest * (share * self.errors.value() + (1.0 - share) * self.e_latency);
        if !self.classes.is_off() {
            let block = ClassBlock { requests: block.requests, seconds, others: main, needed };
            self.rolled_back |= self.classes.close(&block, &mut chance);
        }
        self.e = main + self.classes.part();
        if at_ms as f64 / 1000.0 > self.policy.promote_after_seconds {
            self.promotion_grows(&block);
        }
        let stable = (block.requests.1 as f64, block.errors.1 as f64);
        self.rate.learn(seconds, stable.0, stable.1);
        self.shape.learn(seconds, stable.0, &block.stable);
    }

    fn promotion_grows(&mut self, block: &Block) {
        let yes_no = |all: u64, yes: u64| (yes as f64, (all - yes) as f64);
        let seen = VersionCounts {
            canary: yes_no(block.requests.0, block.errors.0),
            stable: yes_no(block.requests.1, block.errors.1),
        };
        let share = block.requests.0 as f64 / (block.requests.0 + block.requests.1) as f64;
        let sum = |bins: &[f64]| bins.iter().sum::<f64>();
        let (canary, stable) = (sum(&block.canary), sum(&block.stable));
        let survival = self.shape.survival();
        for (e, required) in self.promotion.iter_mut().zip(&self.policy.required) {
            match required.harm {
                Harm::Errors(increase) => *e += promote::factors(self.rate.value(), share, increase).of(seen),
                Harm::Latency(..) if canary == 0.0 || stable == 0.0 => {}
                Harm::Latency(quantile, allowed) => {
                    let (edge, margin) = latency::edge(&survival, quantile, allowed);
                    let (above, above_stable) = (sum(&block.canary[edge..]), sum(&block.stable[edge..]));
                    let seen = VersionCounts {
                        canary: (above, canary - above),
                        stable: (above_stable, stable - above_stable),
                    };
                    let rate = survival[edge].clamp(1e-3, 0.9);
                    *e += promote::factors(rate, canary / (canary + stable), margin).of(seen);
                }
            }
        }
    }

    /// Returns what a finding means, in words: the metric, the evidence and what it rests on.
    pub fn reason(&self, found: &SequentialResult) -> String {
        let Policy { required, errors_share, alpha, alpha_promote, .. } = &self.policy;
        let (by_errors, by_latency) = (errors_share * found.e_errors, (1.0 - errors_share) * found.e_latency);
        let of_main = self.classes.rest() * by_errors.max(by_latency);
        let by_errors = by_errors >= by_latency;
        let named = |errors: bool| required.iter().find(|required| matches!(required.harm, Harm::Errors(_)) == errors);
        let (requests, errors) = (found.requests, found.errors);
        let counts = format!("{} of {} failed, stable's {} of {}", errors.1, requests.1, errors.0, requests.0);
        match found.decision {
            SequentialVerdict::Promote => String::new(),
            SequentialVerdict::Hold => {
                let least = found.promotion.iter().zip(required).min_by(|a, b| a.0.total_cmp(b.0));
                let (e, name) = least.map_or((0.0, ""), |(e, required)| (e.exp(), &required.name));
                format!("{name}: evidence {e:.2} of {:.0} that the canary is as good; {counts}", 1.0 / alpha_promote)
            }
            SequentialVerdict::Pause | SequentialVerdict::Rollback => {
                if let Some((_, told)) = self.classes.worst(requests).filter(|(part, _)| *part > of_main) {
                    return format!("{told}: evidence {:.0} of {:.0} that the canary is worse", found.e, 1.0 / alpha);
                }
                let name = named(by_errors).or(named(!by_errors)).map_or("", |required| &required.name);
                format!("{name}: evidence {:.0} of {:.0} that the canary is worse; {counts}", found.e, 1.0 / alpha)
            }
        }
    }

    fn result(&mut self) -> SequentialResult {
        self.rolled_back |= self.e >= 1.0 / self.policy.alpha;
        let enough = (1.0 / self.policy.alpha_promote).ln();
        let decision = if self.rolled_back {
            SequentialVerdict::Rollback
        } else if self.e >= 1.0 / (PAUSE_TIMES * self.policy.alpha).min(0.5) {
            SequentialVerdict::Pause
        } else if self.promotion.iter().all(|e| *e >= enough) {
            SequentialVerdict::Promote
        } else {
            SequentialVerdict::Hold
        };
        let (share, rest) = (self.policy.errors_share, self.classes.rest());
        let started = rest * (share * self.errors.started + (1.0 - share) * self.latency[0].started);
        SequentialResult {
            decision,
            e: self.e,
            e_errors: self.errors.value(),
            e_latency: self.e_latency,
            promotion: self.promotion.clone(),
            alpha_spent: self.policy.alpha * (started + self.classes.started()),
            requests: self.requests,
            errors: self.failed,
        }
    }
}

/// Returns a number in 0 to 1 that looks random and is the same each time (splitmix64).
fn chance(state: &mut u64) -> f64 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut mixed = *state;
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    (mixed ^ (mixed >> 31)) as f64 / 2f64.powi(64)
}

#[cfg(test)]
mod tests;
