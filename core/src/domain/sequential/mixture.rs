//! A mixture of bets, whose value is an e-process: wealth spread over alternatives, started over time.

use serde::{Deserialize, Serialize};
use serde_big_array::BigArray;

/// Wealth spread over alternatives, and what is kept for later.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Mixture<const K: usize> {
    /// Wealth that the bets on each alternative have reached.
    #[serde(with = "BigArray")]
    pub wealth: [f64; K],
    /// The share that was started; the rest waits.
    pub started: f64,
}

impl<const K: usize> Default for Mixture<K> {
    fn default() -> Self {
        Self { wealth: [0.0; K], started: 0.0 }
    }
}

impl<const K: usize> Mixture<K> {
    /// Starts so much more of the whole, spread by `weights`, which sum to 1.
    pub fn start(&mut self, share: f64, weights: &[f64; K]) {
        let share = share.min(1.0 - self.started);
        self.started += share;
        self.wealth.iter_mut().zip(weights).for_each(|(wealth, weight)| *wealth += share * weight);
    }

    pub fn is_sound(&self) -> bool {
        let wealth = self.wealth.iter().all(|wealth| wealth.is_finite() && *wealth >= 0.0);
        wealth && (0.0..=1.0).contains(&self.started)
    }

    pub fn multiply(&mut self, factors: &[f64; K]) {
        for (wealth, factor) in self.wealth.iter_mut().zip(factors) {
            *wealth = (*wealth * factor).min(1e200);
        }
    }

    /// Returns the e-value: the sum of what was started and what waits.
    pub fn value(&self) -> f64 {
        self.value_with(&[1.0; K])
    }

    /// Returns the e-value that these factors would lead to.
    pub fn value_with(&self, factors: &[f64; K]) -> f64 {
        self.invested_with(factors) + 1.0 - self.started
    }

    pub fn invested_with(&self, factors: &[f64; K]) -> f64 {
        self.wealth.iter().zip(factors).map(|(wealth, factor)| wealth * factor).sum()
    }
}
