//! Files that people write, typed once at the edge: unknown keys are refused, units stand in the keys.

pub mod node;
pub mod rollout;
