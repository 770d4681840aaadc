//! The one source of chance: everything a run does follows from its seed.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// A stream of random draws.
pub struct Dice(ChaCha8Rng);

impl Dice {
    /// Returns the stream of `seed`.
    pub fn new(seed: u64) -> Self {
        Self(ChaCha8Rng::seed_from_u64(seed))
    }

    /// Returns a number in `low..=high`.
    pub fn between(&mut self, low: u64, high: u64) -> u64 {
        self.0.random_range(low..=high)
    }

    /// Returns a number in `0..below`.
    pub fn below(&mut self, below: usize) -> usize {
        self.0.random_range(0..below)
    }

    /// Returns true with this probability, in 1/10 000.
    pub fn chance(&mut self, bp: u64) -> bool {
        self.between(0, 9_999) < bp
    }

    /// Returns any number at all.
    pub fn any(&mut self) -> u64 {
        self.0.random()
    }

    /// Returns one of `choices`, each with the same probability; panics if there are none.
    pub fn pick<'a, T>(&mut self, choices: &'a [T]) -> &'a T {
        &choices[self.below(choices.len())]
    }

    /// Returns the index of one of `weights`, drawn in proportion.
    pub fn weighted(&mut self, weights: &[u64]) -> usize {
        let mut ticket = self.between(1, weights.iter().sum::<u64>().max(1));
        for (index, weight) in weights.iter().enumerate() {
            if ticket <= *weight {
                return index;
            }
            ticket -= weight;
        }
        weights.len() - 1
    }
}
