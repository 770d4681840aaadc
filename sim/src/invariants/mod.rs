//! What must hold after every step: one file for each group of rules of the protocol.

use crate::truth::{Fact, Truth};

mod agreement;
mod answers;
mod ballots;
mod ceiling;
mod certificates;
mod enforcement;
mod evidence;
mod stages;
mod writes;

/// A rule that sees every fact of a run, and says when one breaks it.
pub trait Invariant {
    /// Its name in the protocol's list.
    fn name(&self) -> &'static str;
    /// Looks at what happened; an error says what broke.
    fn see(&mut self, fact: &Fact, truth: &Truth) -> Result<(), String>;
}

/// Returns all of them, at the beginning of a run.
pub fn all() -> Vec<Box<dyn Invariant>> {
    vec![
        Box::new(agreement::Agreement),
        Box::new(agreement::Chained::default()),
        Box::new(certificates::Certificates::default()),
        Box::new(answers::Answers::default()),
        Box::new(answers::Reads::default()),
        Box::new(ballots::Promises::default()),
        Box::new(stages::Stages::default()),
        Box::new(ceiling::Ceiling::default()),
        Box::new(enforcement::Enforcement::default()),
        Box::new(writes::Writes),
        Box::new(ballots::Ballots::default()),
        Box::new(evidence::Observed::default()),
    ]
}
