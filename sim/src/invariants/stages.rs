//! I7: stages go to the next one, or down; and the routing in a record is the stage's.

use super::{Invariant, STAGES, Violation};
use crate::broken;
use crate::truth::{ExpectedRollouts, Fact, Truth};
use aviary_core::protocol::record::Slot;

/// I7: a rollout goes to the next stage, to 100 % when asked for, or down.
#[derive(Default)]
pub struct Stages {
    rollouts: ExpectedRollouts,
    seen: Slot,
}

impl Invariant for Stages {
    fn see(&mut self, fact: &Fact, _: &Truth) -> Result<(), Violation> {
        let Fact::Chosen(record, _) = fact else { return Ok(()) };
        if record.slot <= self.seen {
            return Ok(());
        }
        self.seen = record.slot;
        let operation = &record.intent.operation;
        let followed = self.rollouts.follow(record, true);
        followed.map_err(|why| broken!(STAGES, "slot {}: {why}", record.slot))?;
        let Some((rollout, state)) =
            operation.service().and_then(|s| self.rollouts.now.get(s)).zip(record.state.as_ref())
        else {
            return Ok(());
        };
        let (found, expected) = (state.canary_weight().bp(), rollout.ceiling);
        if found != expected {
            return Err(broken!(
                STAGES,
                "slot {} ({}): routes {found} bp, its stage {} has {expected} bp",
                record.slot,
                operation.name(),
                rollout.stage
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;

    #[test]
    fn a_change_without_a_rollout_is_caught() {
        let record = pause(1, "x").record;
        let error = Stages::default().see(&Fact::Chosen(&record, &ballot("a", 1)), &truth()).unwrap_err();
        assert!(error.what.contains("without a rollout"), "{error}");
    }
}
