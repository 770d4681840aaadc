//! What must hold after every step: one file for each group of rules of the protocol.

use crate::truth::{Fact, Truth};

mod agreement;
mod answers;
mod ballots;
mod ceiling;
mod certificates;
mod enforcement;
mod evidence;
mod pauses;
mod stable;
mod stages;
mod sums;
mod writes;

// The rules' names in the protocol's list, as reports and the pins of seeded bugs say them.
pub(crate) const AGREEMENT: &str = "I1 agreement";
pub(crate) const CHAIN: &str = "I2 chain";
pub(crate) const UNANIMITY: &str = "I3 unanimity";
pub(crate) const ANSWERS: &str = "I4/I5 answers";
const PROMISES: &str = "I6 promises";
const STAGES: &str = "I7 stages";
const CEILING: &str = "I8 ceiling";
const ENFORCEMENT: &str = "I9 enforcement";
const WRITES: &str = "I10/I12 writes";
const READS: &str = "I11 reads";
const BALLOTS: &str = "I13 ballots";
const EVIDENCE: &str = "I14 evidence";
const PAUSES: &str = "I15 pauses";
const STABLE: &str = "I16 stable";

/// A rule that a run broke: the program that was simulated has a bug, or the simulator has.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{invariant}: {what}")]
pub struct Violation {
    /// Name of the rule, such as `I1 agreement`, `liveness` or `panic`.
    pub invariant: &'static str,
    /// What happened, and what was expected.
    pub what: String,
}

/// Makes the [`Violation`] of a rule: its name, then what `format!` takes.
#[macro_export]
macro_rules! broken {
    ($invariant:expr, $($what:tt)+) => {
        $crate::Violation { invariant: $invariant, what: format!($($what)+) }
    };
}

/// A rule that sees every fact of a run, and says when one breaks it.
pub trait Invariant {
    /// Looks at what happened; an error says what broke.
    fn see(&mut self, fact: &Fact, truth: &Truth) -> Result<(), Violation>;
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
        Box::new(sums::Sums::default()),
        Box::new(pauses::Pauses::default()),
        Box::new(stable::Stables::default()),
    ]
}
