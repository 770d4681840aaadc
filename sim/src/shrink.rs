//! Makes a failing run smaller: shorter, with fewer kinds of faults, fewer nodes, as long as the same rule breaks.

use crate::invariants::Violation;
use crate::subject::Real;
use crate::world::{FAULTS, Options, World};

/// Returns the smallest failing run that was found, and how it fails.
pub fn shrink(options: Options, violation: Violation) -> (Options, Violation) {
    let mut best = (options, violation);
    let fails = |options: Options, best: &Violation| {
        let found = World::<Real>::new(options).run().err()?;
        (found.invariant == best.invariant).then_some(found)
    };
    let try_one = |best: &mut (Options, Violation), options: Options| {
        if let Some(found) = fails(options, &best.1) {
            *best = (options, found);
            println!("  still: {}", best.0.arguments());
            return true;
        }
        false
    };
    for fault in 0..FAULTS.len() {
        let without = best.0.without | 1 << fault;
        if without != best.0.without {
            let options = Options { without, ..best.0 };
            try_one(&mut best, options);
        }
    }
    // What breaks a rule in the faulty part breaks it in a shorter one too, up to that moment.
    let mut step = best.0.ms / 2;
    while step >= 50 {
        let options = Options { ms: best.0.ms.saturating_sub(step), ..best.0 };
        if !try_one(&mut best, options) {
            step /= 2;
        }
    }
    best
}
