//! Where nodes and the data plane draw random numbers from: a generator for each thread.
//!
//! The operating system seeds it, except in a simulation, which seeds its thread to run the same again.

use std::cell::RefCell;

use rand::distr::uniform::{SampleRange, SampleUniform};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

thread_local! {
    static GENERATOR: RefCell<StdRng> = RefCell::new(StdRng::from_rng(&mut rand::rng()));
}

/// Makes all draws of this thread follow from `seed`. For simulations alone: what is drawn can then be foretold.
pub fn seed(seed: u64) {
    GENERATOR.with_borrow_mut(|generator| *generator = StdRng::seed_from_u64(seed));
}

/// Returns a uniform draw from `range`, which must not be empty.
pub fn within<T: SampleUniform>(range: impl SampleRange<T>) -> T {
    GENERATOR.with_borrow_mut(|generator| generator.random_range(range))
}

/// Returns 128 bits that nobody can foretell; in a simulation, those that the seed gives.
pub fn bits() -> u128 {
    GENERATOR.with_borrow_mut(|generator| generator.random())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seeded_thread_draws_the_same_again_and_another_thread_does_not() {
        let draws = |seed_it: bool| {
            if seed_it {
                seed(7);
            }
            (bits(), within(0..u64::MAX))
        };
        let one = draws(true);
        assert_eq!(draws(true), one);
        assert_ne!(draws(false), one, "the stream goes on");
        assert_ne!(std::thread::spawn(move || draws(false)).join().unwrap(), one);
    }
}
