//! Seeds that once found something, pinned.

use crate::world::{LATER, Options};

/// A run that once found a bug, kept so that it is run again.
pub struct Scenario {
    /// Name of the scenario, for `--scenario`.
    pub name: &'static str,
    /// What the run once found, in words.
    pub about: &'static str,
    /// Seed from which the run follows.
    pub seed: u64,
    /// Its length in virtual milliseconds.
    pub ms: u64,
    /// Its nodes; drawn from the seed when none.
    pub nodes: Option<usize>,
    /// The kinds of faults it is without.
    pub without: u32,
}

impl Scenario {
    /// Returns the options that repeat this run.
    pub fn options(&self) -> Options {
        let Self { seed, ms, nodes, without, .. } = *self;
        Options { seed, ms, nodes, without, words: false, print: false }
    }
}

const fn seed(name: &'static str, seed: u64, about: &'static str) -> Scenario {
    Scenario { name, about, seed, ms: 20_000, nodes: None, without: LATER }
}

/// All pinned runs, each with what it found.
pub const ALL: &[Scenario] = &[
    seed("first", 1, "a plain run; it pins no bug"),
    seed("hold-and-checkpoint", 3, "a node that took over a peer's checkpoint forgot its own hold"),
    seed("late-readmit", 1698, "a readmission overtaken by another wipe took the vote from a node that had it"),
    seed("late-readmit-2", 3348, "the same, and the node's own incarnation could never count again"),
    seed("old-disk", 4950, "an incarnation that was replaced could be readmitted, without what it had promised since"),
    seed("catch-up-order", 42, "records that came out of order stalled a node that caught up"),
    seed("single-hold", 55, "a local hold was published before it was durable in a cluster of one"),
    seed("single-hold-2", 673, "the same"),
    seed("certain-late", 928, "an increase chosen in doubt first and by its own ballot after that"),
    seed("completed-in-doubt", 3024, "a completion learned as decided in doubt, next to an aborted start"),
    Scenario {
        ms: 60_000,
        without: 0,
        ..seed(
            "verdict-renews-gate",
            74,
            "a verdict on a window began the evidence anew, and the rollout was rolled back",
        )
    },
    seed("start-in-doubt", 437, "a duel decided a start in doubt, and it was reverted"),
];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::subject::Real;
    use crate::world::World;

    #[test]
    fn what_was_found_once_stays_found() {
        for scenario in ALL {
            let outcome = World::<Real>::new(scenario.options()).run();
            assert!(outcome.is_ok(), "{} ({}): {:?}", scenario.name, scenario.about, outcome.err());
        }
    }
}
