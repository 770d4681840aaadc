//! The bets on latency: of all successful requests of a block, are the slow ones the canary's?
//!
//! Stable's recent latencies, moved by what is tolerated, are the null; the same moved further, or with a heavier tail,
//! are the alternatives. A bet is a factor for each bin, and is settled against the urn of both versions' requests.
//!
//! A canary may be slow while it warms up. What is tolerated then is not one schedule but any slowdown that goes away: the
//! null is the union of those that begin at so and so much and decay. Each is bet against by itself, and the e-value is the
//! least of them all: a slowness that stays is soon unlike every warm-up.

use std::ops::{Deref, DerefMut};
use std::sync::LazyLock;

use serde::{Deserialize, Serialize};
use serde_big_array::BigArray;

use super::policy::{Policy, Slowdown};
use crate::domain::stats::{BIN_RATIO, BINS, FIRST_US};

/// Fine bins in one of those that are bet on.
const COARSENESS: usize = 7;
/// Bins that are bet on; their edges are 1.23 apart.
pub(super) const COARSE: usize = BINS / COARSENESS;
/// Answers (or shares of them) by coarse bins of their latency.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(super) struct Coarse(#[serde(with = "BigArray")] [f64; COARSE]);

impl Coarse {
    /// A histogram without answers: all bins are 0.
    pub const EMPTY: Self = Self([0.0; COARSE]);

    /// Returns true when each bin holds a number of answers.
    pub fn is_sound(&self) -> bool {
        self.iter().all(|answers| answers.is_finite() && *answers >= 0.0)
    }
}

impl Deref for Coarse {
    type Target = [f64];
    fn deref(&self) -> &[f64] {
        &self.0
    }
}

impl DerefMut for Coarse {
    fn deref_mut(&mut self) -> &mut [f64] {
        &mut self.0
    }
}

/// How much slower a canary may be under an alternative, beyond what is tolerated.
#[derive(Debug, Clone, Copy)]
enum LatencyAlternative {
    /// Every request takes so many times as long.
    Shift(f64),
    /// This share of them does.
    Tail(f64, f64),
}

const ALTERNATIVES: [LatencyAlternative; 7] = [
    LatencyAlternative::Shift(1.02),
    LatencyAlternative::Shift(1.07),
    LatencyAlternative::Shift(1.17),
    LatencyAlternative::Shift(1.6),
    LatencyAlternative::Shift(3.5),
    LatencyAlternative::Tail(0.012, 3.0),
    LatencyAlternative::Tail(0.06, 2.5),
];
pub(super) const COUNT: usize = ALTERNATIVES.len();
/// Share of the wealth for each alternative.
pub(super) const WEIGHTS: [f64; COUNT] = [0.11, 0.11, 0.43, 0.08, 0.06, 0.105, 0.105];

/// Adds a fine histogram, `by` bins slower, in coarse bins.
pub(super) fn add_moved(sum: &mut Coarse, fine: &[(u16, u32)], by: usize) {
    for (bin, count) in fine {
        sum[(usize::from(*bin) + by).min(BINS - 1) / COARSENESS] += f64::from(*count);
    }
}

/// Initial slowness of each warm-up, as a share of stable's latency.
const WARM_UPS: [f64; 7] = [0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0];
pub(super) const NULLS: usize = WARM_UPS.len();

/// Returns what each null tolerates so long after the start, in fine bins.
pub(super) fn tolerances(seconds: f64, policy: &Policy) -> [usize; NULLS] {
    WARM_UPS.map(|warm_up| {
        let factor = 1.0 + policy.latency_margin + warm_up * (-seconds / policy.warm_up_seconds).exp();
        (factor.ln() / BIN_RATIO.ln()).round() as usize
    })
}

/// Stable's latencies, as far as they are known before a block is bet on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Shape(Coarse);

impl Default for Shape {
    fn default() -> Self {
        Self(Coarse(PRIOR.0.map(|share| share * 5.0)))
    }
}

/// A wide guess: around 100 ms, a factor of 3.3 either way.
static PRIOR: LazyLock<Coarse> = LazyLock::new(|| {
    let mut prior = Coarse::EMPTY;
    for (bin, share) in prior.iter_mut().enumerate() {
        let middle_ms = FIRST_US / 1000.0 * BIN_RATIO.powf((bin * COARSENESS) as f64 + COARSENESS as f64 / 2.0);
        *share = (-0.5 * ((middle_ms.ln() - 100f64.ln()) / 1.2).powi(2)).exp();
    }
    normal(prior)
});

fn normal(mut shares: Coarse) -> Coarse {
    let scale = 1.0 / shares.iter().sum::<f64>();
    shares.iter_mut().for_each(|share| *share *= scale);
    shares
}

impl Shape {
    /// Learns from a block that was bet on already.
    pub fn learn(&mut self, seconds: f64, requests: f64, block: &Coarse) {
        let keep = (-(seconds / 300.0).min(requests / 15_000.0)).exp2();
        self.0.iter_mut().zip(block.iter()).for_each(|(sum, more)| *sum = *sum * keep + more);
    }

    /// Returns the share of answers that take at least as long as each coarse bin's lower edge.
    pub fn survival(&self) -> Coarse {
        survival(&normal(self.0))
    }

    /// Returns the bets against each null: `tolerated` are their tolerances, the first one that of a warm canary.
    pub fn bets(&self, tolerated: &[usize; NULLS]) -> Bets {
        Drawn { shape: self.clone(), tolerated: *tolerated }.into()
    }

    fn against(&self, tolerated: &[usize; NULLS]) -> Vec<(usize, Box<[Coarse; COUNT]>)> {
        let (known, prior) = (Moving::new(&normal(self.0)), &*PRIOR);
        let null = |bins: usize| {
            let shares = from_survival(&known.by(bins as f64 / COARSENESS as f64));
            normal(Coarse(std::array::from_fn(|bin| 0.999 * shares[bin] + 0.001 * prior[bin])))
        };
        let warm = null(tolerated[0]);
        let moving = Moving::new(&warm);
        let above = ALTERNATIVES.map(|alternative| slower(alternative, &moving));
        let mut all: Vec<(usize, Box<[Coarse; COUNT]>)> = Vec::with_capacity(NULLS);
        for bins in tolerated {
            if all.iter().all(|(known, _)| known != bins) {
                let cold = (*bins != tolerated[0]).then(|| Cold::new(null(*bins)));
                let mut bets = Box::new([Coarse::EMPTY; COUNT]);
                for (k, factors) in bets.iter_mut().enumerate() {
                    bet_on(factors, ALTERNATIVES[k], &above[k], &warm, cold.as_ref());
                }
                all.push((*bins, bets));
            }
        }
        all
    }

    /// Returns true when bets can be drawn from it.
    pub fn is_sound(&self) -> bool {
        self.0.is_sound() && self.0.iter().sum::<f64>() > 0.0
    }
}

/// The bets in force. Another node gets what they were drawn from, and draws the same.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(from = "Drawn", into = "Drawn")]
pub(super) struct Bets {
    drawn: Drawn,
    /// A factor for each coarse bin, by the tolerance that they are against.
    against: Vec<(usize, Box<[Coarse; COUNT]>)>,
}

/// Basis of the bets: stable's latencies, and the tolerance of each null.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Drawn {
    shape: Shape,
    tolerated: [usize; NULLS],
}

impl From<Drawn> for Bets {
    fn from(drawn: Drawn) -> Self {
        let is_sound = drawn.shape.is_sound() && are_tolerances(&drawn.tolerated);
        let against = if is_sound { drawn.shape.against(&drawn.tolerated) } else { Vec::new() };
        Self { drawn, against }
    }
}

impl From<Bets> for Drawn {
    fn from(bets: Bets) -> Self {
        bets.drawn
    }
}

/// Returns true when these can be tolerances, in fine bins.
pub(super) fn are_tolerances(bins: &[usize; NULLS]) -> bool {
    bins.iter().all(|bins| *bins < BINS)
}

fn survival(shares: &Coarse) -> Coarse {
    let mut survival = Coarse::EMPTY;
    let mut sum = 0.0;
    for bin in (0..COARSE).rev() {
        sum += shares[bin];
        survival[bin] = sum;
    }
    survival[0] = 1.0;
    survival
}

fn from_survival(survival: &Coarse) -> Coarse {
    let next = |bin: usize| survival.get(bin + 1).map_or(0.0, |next| *next);
    Coarse(std::array::from_fn(|bin| (survival[bin] - next(bin)).max(0.0)))
}

/// A survival that can be moved towards slower answers; between edges it is exponential.
struct Moving {
    survival: Coarse,
    logs: Coarse,
}

impl Moving {
    fn new(shares: &Coarse) -> Self {
        Self::of(survival(shares))
    }

    fn of(survival: Coarse) -> Self {
        Self { survival, logs: Coarse(survival.0.map(|share| share.max(1e-12).ln())) }
    }

    /// Returns the survival of answers that take longer by so many coarse bins.
    fn by(&self, bins: f64) -> Coarse {
        let (whole, part) = (bins.floor() as usize, bins - bins.floor());
        let at = |bin: usize, less: usize| if bin <= less { 0.0 } else { self.logs[bin - less] };
        let moved = |bin: usize| ((1.0 - part) * at(bin, whole) + part * at(bin, whole + 1)).exp();
        Coarse(std::array::from_fn(|bin| if bin == 0 { 1.0 } else { moved(bin) }))
    }
}

/// Returns what a canary's answers are like that is so much slower.
fn slower(alternative: LatencyAlternative, warm: &Moving) -> Coarse {
    let moved_by = |factor: f64| warm.by(factor.ln() / (BIN_RATIO.ln() * COARSENESS as f64));
    from_survival(&match alternative {
        LatencyAlternative::Shift(factor) => moved_by(factor),
        LatencyAlternative::Tail(share, factor) => {
            let moved = moved_by(factor);
            Coarse(std::array::from_fn(|bin| warm.survival[bin].max(moved[bin].min(share))))
        }
    })
}

/// The null of a canary that warms up.
struct Cold {
    shares: Coarse,
    /// 1 divided by each share, kept because bets divide by it often.
    inverse: Coarse,
}

impl Cold {
    fn new(shares: Coarse) -> Self {
        Self { shares, inverse: Coarse(shares.0.map(|share| 1.0 / share)) }
    }
}

/// Makes `factors` the bet that a canary is like `above`, against a `warm` one or against a `cold` one.
fn bet_on(factors: &mut Coarse, alternative: LatencyAlternative, above: &Coarse, warm: &Coarse, cold: Option<&Cold>) {
    let most = match (cold, alternative) {
        // A canary that is faster than tolerated is no worse: a bet never falls towards slower answers.
        (None, alternative) => {
            never_falling(factors, above, warm);
            match alternative {
                LatencyAlternative::Shift(factor) => (4.0 * factor.ln() + 0.3).min(6.0).exp(),
                LatencyAlternative::Tail(..) => 5f64.exp(),
            }
        }
        // A warm-up is a path, not a bound: slowness that stays may well be less than it at first.
        (Some(cold), _) => {
            for ((factor, above), inverse) in factors.iter_mut().zip(above.iter()).zip(cold.inverse.iter()) {
                *factor = above * inverse;
            }
            6f64.exp()
        }
    };
    let least = (-4f64).exp();
    factors.iter_mut().for_each(|factor| *factor = factor.max(least).min(most));
    let scale = 1.0 / dot(factors, cold.map_or(warm, |cold| &cold.shares));
    factors.iter_mut().for_each(|factor| *factor *= scale);
}

/// Returns the sum of products, in four sums that don't wait for each other.
fn dot(a: &Coarse, b: &Coarse) -> f64 {
    let mut sums = [0.0; 4];
    for (a, b) in a.chunks(4).zip(b.chunks(4)) {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum += a * b;
        }
    }
    sums.iter().sum()
}

/// Makes `factors` `above ÷ below`, made never falling by pooling neighbours.
fn never_falling(factors: &mut Coarse, above: &Coarse, below: &Coarse) {
    let mut pools = [(0.0, 0.0, 0); COARSE];
    let mut count = 0;
    for (a, b) in above.iter().zip(below.iter()) {
        let mut pool = (*a, *b, 1);
        while count > 0 && pools[count - 1].0 * pool.1 >= pool.0 * pools[count - 1].1 {
            count -= 1;
            pool = (pool.0 + pools[count].0, pool.1 + pools[count].1, pool.2 + pools[count].2);
        }
        pools[count] = pool;
        count += 1;
    }
    let mut bin = 0;
    for (a, b, bins) in &pools[..count] {
        factors[bin..bin + bins].fill(a / b);
        bin += bins;
    }
}

/// Returns where a promotion compares answers, and by how much a larger share of the canary's may be beyond that: given
/// stable's survival, the first coarse bin beyond, and the margin.
pub(super) fn edge(survival: &Coarse, quantile: f64, allowed: Slowdown) -> (usize, f64) {
    let beyond = 1.0 - quantile;
    let nearest = |curve: &Coarse, share: f64| {
        let distance = |bin: &usize| (curve[*bin] - share).abs();
        (0..COARSE).min_by(|a, b| distance(a).total_cmp(&distance(b))).unwrap_or(0)
    };
    match allowed {
        Slowdown::Share(margin) => (nearest(survival, beyond), margin),
        Slowdown::Increase(increase) => {
            // A canary whose quantile is that much higher has `beyond` of its answers beyond the moved one.
            let moved = Moving::of(*survival).by((1.0 + increase).ln() / (BIN_RATIO.ln() * COARSENESS as f64));
            let edge = nearest(&moved, beyond);
            (edge, (moved[edge] - survival[edge]).max(1e-3))
        }
    }
}

impl Bets {
    /// Returns true when they were drawn from something they can be drawn from.
    pub fn is_sound(&self) -> bool {
        !self.against.is_empty()
    }

    /// Settles the bets against the null that tolerates so many bins: the canary's answers of a block against both
    /// versions', stable's moved by as much. Returns what each alternative's wealth is multiplied by.
    pub fn settle(&self, tolerated: usize, canary: &Coarse, stable: &Coarse) -> [f64; COUNT] {
        let nearest = self.against.iter().min_by_key(|(bins, _)| bins.abs_diff(tolerated));
        let (ours, theirs): (f64, f64) = (canary.iter().sum(), stable.iter().sum());
        let Some((_, bets)) = nearest.filter(|_| ours > 0.0 && theirs > 0.0) else { return [1.0; COUNT] };
        let share = ours / (ours + theirs);
        let mut logs = [0.0; COUNT];
        for bin in (0..COARSE).filter(|bin| canary[*bin] + stable[*bin] > 0.0) {
            for (log, factors) in logs.iter_mut().zip(bets.iter()) {
                *log -= (canary[bin] + stable[bin]) * (1.0 + share * (factors[bin] - 1.0)).ln();
                if canary[bin] > 0.0 {
                    *log += canary[bin] * factors[bin].ln();
                }
            }
        }
        logs.map(|log| log.clamp(-700.0, 300.0).exp())
    }
}
