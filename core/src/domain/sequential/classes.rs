//! The bets on answers that are no errors by themselves: does the canary give more of them than stable does beside it?
//!
//! 4xx and 3xx are mostly what clients ask for: a crawler gets 404, an expired login 401, a busy client 429. As long as every
//! request is assigned at random that hits both versions alike, and cancels. Where users stay at their version, one client's
//! answers are all of one version. Such a client comes *beside* the usual traffic: its version gets more requests than its weight
//! gives it. So what the canary got beyond its weight isn't bet on. The rest is bet on as errors are, with a wider tolerance, and
//! with small bets.

use serde::{Deserialize, Serialize};

use super::errors::{self, NUMBER_MAX, Rate, Stake, Urn};
use super::mixture::Mixture;
use crate::domain::classes::{ClassCounts, ErrorClasses};
use crate::domain::window::Evidence;

/// The classes, in the order of [`ClassCounts::by_class`].
const NAMES: [&str; 2] = ["4xx answers", "3xx answers"];
/// The share of α that each compared class gets.
pub const CLASS_SHARE: f64 = 0.05;
/// Tolerated: shares of a class so much higher, as a share of stable's.
const MARGIN: f64 = 0.1;
/// And so much higher in absolute terms: as much more as `allowedIncrease` of errors is by default.
const ALLOWANCE: f64 = 0.005;
/// Most that bets are raised to: as if each client caused a few of such answers, also where stable has none in clumps yet.
const TEMPER_MAX: f64 = 1.0 / 7.0;
/// How fast it is forgotten what the canary got beyond its weight: half of it in so many seconds.
const HALF_LIFE_SECONDS: f64 = 120.0;

/// The comparison of a rollout's classes. A default one compares none.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct ClassComparison {
    /// Classes that are compared, in the order of [`ClassCounts::by_class`].
    compared: [bool; 2],
    /// The canary's share of the requests, by its weight; none where nobody knows it.
    weight: Option<f64>,
    of: [ClassBets; 2],
    /// Requests that the canary got lately beyond its weight.
    extra: f64,
    /// The variance that as many requests have by chance.
    spread: f64,
    /// True once wealth was started.
    begun: bool,
}

/// The bets on one class.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
struct ClassBets {
    wealth: Mixture<{ errors::COUNT }>,
    rate: Rate,
    /// Answers of the class in the open block, of the canary and of stable.
    block: (u64, u64),
    /// The same, in the whole rollout.
    seen: (u64, u64),
    /// The canary's answers that weren't bet on lately.
    removed: f64,
}

/// A block whose classes are bet on.
pub(super) struct ClassBlock {
    /// Requests of the canary, and of stable.
    pub requests: (u64, u64),
    /// Length of the block's last tick, in seconds.
    pub seconds: f64,
    /// What all else comes to of the whole e-value.
    pub others: f64,
    /// The whole e-value that is enough: 1/α.
    pub needed: f64,
}

impl ClassComparison {
    /// Chooses the classes that are compared. What was bet on the others is given up.
    pub fn compare(&mut self, classes: ErrorClasses) {
        self.compared = [classes.client, classes.redirect];
    }

    /// Says what share of the requests the canary's weight gives it, 0.0 to 1.0.
    pub fn expect(&mut self, weight: Option<f64>) {
        self.weight = weight.filter(|weight| (0.0..1.0).contains(weight));
    }

    /// Returns true when its parts are such that it can go on with them.
    pub fn is_sound(&self) -> bool {
        let number = |value: &f64| value.is_finite() && *value >= 0.0;
        let sound = |bets: &ClassBets| {
            let counts = [bets.block.0, bets.block.1, bets.seen.0, bets.seen.1];
            bets.wealth.is_sound()
                && bets.rate.is_sound()
                && number(&bets.removed)
                && counts.iter().all(|count| *count <= NUMBER_MAX)
        };
        self.of.iter().all(sound)
            && [self.extra, self.spread].iter().all(number)
            && self.weight.is_none_or(|weight| (0.0..1.0).contains(&weight))
    }

    /// Returns true when no class is compared.
    pub fn is_off(&self) -> bool {
        self.compared == [false; 2]
    }

    fn bets(&self) -> impl Iterator<Item = &ClassBets> {
        self.of.iter().zip(self.compared).filter_map(|(bets, compared)| compared.then_some(bets))
    }

    /// Returns the share of the whole e-value that errors and latency have.
    pub(super) fn rest(&self) -> f64 {
        1.0 - CLASS_SHARE * self.bets().count() as f64
    }

    /// Returns what the classes come to of the whole e-value.
    pub(super) fn part(&self) -> f64 {
        self.bets().map(|bets| CLASS_SHARE * bets.wealth.value()).sum()
    }

    /// Returns the share of α that was put into bets on classes so far.
    pub(super) fn started(&self) -> f64 {
        self.bets().map(|bets| CLASS_SHARE * bets.wealth.started).sum()
    }

    /// Returns the class that contributes most to the whole e-value: by how much, and how it is told.
    pub(super) fn worst(&self, requests: (u64, u64)) -> Option<(f64, String)> {
        let all = self.of.iter().zip(self.compared).zip(NAMES).filter(|((_, compared), _)| *compared);
        let (bets, name) = all
            .map(|((bets, _), name)| (bets, name))
            .max_by(|(one, _), (other, _)| one.wealth.value().total_cmp(&other.wealth.value()))?;
        let (canary, stable) = bets.seen;
        let told = format!("{name}: {canary} of {}, stable's {stable} of {}", requests.1, requests.0);
        Some((CLASS_SHARE * bets.wealth.value(), told))
    }

    /// Counts what was seen.
    pub(super) fn add(&mut self, evidence: &Evidence) {
        if self.is_off() {
            return;
        }
        let counts = |classes: ClassCounts| classes.by_class();
        let (canary, stable) = (counts(evidence.canary.classes), counts(evidence.stable.classes));
        for ((bets, canary), stable) in self.of.iter_mut().zip(canary).zip(stable) {
            for sum in [&mut bets.block, &mut bets.seen] {
                (sum.0, sum.1) = (sum.0 + canary, sum.1 + stable);
            }
        }
    }

    /// Starts so much more wealth; at first all that begins at once.
    pub(super) fn start(&mut self, share: f64) {
        if self.is_off() {
            return;
        }
        let first = !std::mem::replace(&mut self.begun, true);
        let at_once: f64 = errors::START.iter().sum();
        for bets in &mut self.of {
            match first {
                true => bets.wealth.start(at_once, &errors::START.map(|share| share / at_once)),
                false => bets.wealth.start(share, &errors::RESTART),
            }
        }
    }

    /// The weight changed: what the canary got beyond the former one says nothing any more.
    pub(super) fn weight_changed(&mut self) {
        if self.is_off() {
            return;
        }
        let left = 0.1;
        (self.extra, self.spread) = (0.0, 0.0);
        for bets in &mut self.of {
            let share = left * (1.0 - bets.wealth.started);
            bets.wealth.start(share, &errors::RESTART);
            bets.removed = 0.0;
        }
    }

    /// Bets on a block that is over; returns true when the whole e-value was enough on the way.
    pub(super) fn close(&mut self, block: &ClassBlock, mut chance: impl FnMut() -> f64) -> bool {
        let (canary, stable) = block.requests;
        let kept = (-block.seconds / HALF_LIFE_SECONDS).exp2();
        if let Some(weight) = self.weight {
            // Stable has such clients too: its usual traffic is what it answered otherwise, and half of all at least.
            let (all, other) = (stable as f64, self.of.iter().map(|bets| bets.block.1 as f64).sum::<f64>());
            let usual = (all - other).max(all / 2.0);
            let ratio = weight / (1.0 - weight);
            self.extra = (self.extra * kept + canary as f64 - usual * ratio).max(0.0);
            self.spread = self.spread * kept + canary as f64 + usual * ratio * ratio;
        }
        let extra = self.extra + self.spread.sqrt();
        let mut reached = false;
        for place in 0..self.of.len() {
            let others = block.others + self.part() - CLASS_SHARE * self.of[place].wealth.value();
            let compared = self.compared[place];
            let bets = &mut self.of[place];
            let (found, found_stable) = std::mem::take(&mut bets.block);
            bets.removed *= kept;
            let removed = (extra - bets.removed).max(0.0).ceil().min(found as f64);
            bets.removed += removed;
            let answers = (found - removed as u64, found_stable);
            let urn = Urn { requests: (canary.max(answers.0), stable.max(answers.1)), errors: answers };
            let (share, needed) = (CLASS_SHARE, block.needed);
            let stake = Stake { margin: MARGIN, allowance: ALLOWANCE, share, others, needed };
            if compared {
                let rate = bets.rate.tempered(TEMPER_MAX);
                reached |= errors::bet(&mut bets.wealth, urn, &rate, stake, &mut chance);
            }
            bets.rate.learn(block.seconds, stable as f64, found_stable as f64);
        }
        reached
    }
}
