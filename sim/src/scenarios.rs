//! Seeds that once found something, pinned.

/// A pinned run.
pub struct Scenario {
    /// Its name.
    pub name: &'static str,
    /// What it once found.
    pub about: &'static str,
    /// Its seed.
    pub seed: u64,
    /// Its length in virtual milliseconds.
    pub ms: u64,
    /// Its nodes; drawn from the seed when none.
    pub nodes: Option<usize>,
}

/// All of them.
pub const ALL: &[Scenario] =
    &[Scenario { name: "first", about: "a plain run; it pins no bug", seed: 1, ms: 20_000, nodes: None }];
