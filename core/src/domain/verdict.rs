//! The words in which the analysis decides.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Verdict of the analysis on a canary.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Verdict {
    /// Enough evidence, all of it good.
    Promote,
    /// Not enough evidence; with why.
    Hold(String),
    /// Stay at this weight until an operator looks; with why.
    Pause(String),
    /// Back to stable; with why.
    Rollback(String),
}

impl Verdict {
    fn rank(&self) -> u8 {
        match self {
            Self::Promote => 0,
            Self::Hold(_) => 1,
            Self::Pause(_) => 2,
            Self::Rollback(_) => 3,
        }
    }

    /// Returns the more careful of two verdicts, this one when they are equally careful.
    pub fn or_worse(self, other: Self) -> Self {
        if other.rank() > self.rank() { other } else { self }
    }

    /// Returns the verdict's word, as topics and streams spell it.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Promote => "PROMOTE",
            Self::Hold(_) => "HOLD",
            Self::Pause(_) => "PAUSE",
            Self::Rollback(_) => "ROLLBACK",
        }
    }

    /// Returns why; empty for a promotion.
    pub fn reason(&self) -> &str {
        match self {
            Self::Promote => "",
            Self::Hold(why) | Self::Pause(why) | Self::Rollback(why) => why,
        }
    }
}

/// Reaction to a canary that exceeds a limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum OnFailure {
    /// The rollout is rolled back: all traffic goes to stable.
    Rollback,
    /// The rollout is paused until an operator decides.
    Pause,
}
