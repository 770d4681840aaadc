//! The two sides of a rollout.

use serde::{Deserialize, Serialize};

/// One of the two versions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Side {
    /// The version that is to be replaced, or kept.
    Stable,
    /// The one that is tried.
    Canary,
}

impl Side {
    /// Both sides, stable first: for loops over what each side has.
    pub const BOTH: [Self; 2] = [Self::Stable, Self::Canary];

    /// Returns its word in files, hooks and topic names.
    pub fn word(self) -> &'static str {
        match self {
            Self::Stable => "stable",
            Self::Canary => "canary",
        }
    }

    /// Returns the side that this one is compared with.
    pub fn other(self) -> Self {
        match self {
            Self::Stable => Self::Canary,
            Self::Canary => Self::Stable,
        }
    }
}
