//! I15: a pause is never shorter than asked, whatever the time of day is at any node.

use std::collections::BTreeMap;

use aviary_core::domain::ids::ServiceId;
use aviary_core::domain::rollout::Change;
use aviary_core::protocol::record::{Initiator, Operation, Record, Slot};

use super::{Invariant, PAUSES, Violation};
use crate::broken;
use crate::truth::{ExpectedRollouts, Fact, Truth};

/// The longest write of a simulated disk, in microseconds: the core dates a stage from when it learns of it, and a record is known
/// to be chosen only once that is durable.
const WRITE_US: u64 = 60_000;

/// I15: what the cluster does by itself waits for the whole pause of the stage before.
#[derive(Default)]
pub struct Pauses {
    rollouts: ExpectedRollouts,
    /// The routing version of each service, and when it was chosen, in microseconds.
    began: BTreeMap<ServiceId, (u64, u64)>,
    seen: Slot,
}

impl Pauses {
    fn promoted(&self, record: &Record, now: u64) -> Result<(), Violation> {
        let Operation::Change(id, Change::Promote { full: false, .. }) = &record.intent.operation else {
            return Ok(());
        };
        let known = self.rollouts.now.get(id).and_then(|expected| Some((expected, expected.spec.as_ref()?)));
        let (Some((expected, spec)), Some((_, began)), Initiator::Node) =
            (known, self.began.get(id), record.intent.initiator)
        else {
            return Ok(());
        };
        let bake_ms = if expected.stage == spec.last_stage() { spec.bake_ms } else { 0 };
        let asked_us = (spec.stages[expected.stage].hold_ms + bake_ms) * 1000;
        // The fastest clock is 1 % ahead.
        let (least, lasted) = (asked_us * 100 / 101, now - began);
        match lasted + WRITE_US < least {
            true => Err(broken!(
                PAUSES,
                "slot {}: {id} goes on from stage {} after {lasted} us, asked were {asked_us} us",
                record.slot,
                expected.stage
            )),
            false => Ok(()),
        }
    }
}

impl Invariant for Pauses {
    fn see(&mut self, fact: &Fact, truth: &Truth) -> Result<(), Violation> {
        let Fact::Chosen(record, _) = fact else { return Ok(()) };
        if record.slot <= self.seen {
            return Ok(());
        }
        self.seen = record.slot;
        self.promoted(record, truth.now)?;
        if let (Some(id), Some(state)) = (record.intent.operation.service(), &record.state) {
            let began = self.began.entry(id.clone()).or_insert((state.version, truth.now));
            if began.0 != state.version {
                *began = (state.version, truth.now);
            }
        }
        self.rollouts.follow(record, true).map_err(|why| broken!(PAUSES, "{why}"))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use aviary_core::domain::plan::Manifest;
    use aviary_core::domain::rollout::Target;

    use super::*;
    use crate::testing::*;

    /// A rollout whose first stage lasts 10 s.
    fn patient() -> Arc<Manifest> {
        let mut spec = (**spec()).clone();
        spec.stages[0].hold_ms = 10_000;
        Arc::new(spec.checked().unwrap())
    }

    #[test]
    fn a_step_before_the_pause_is_over_is_caught_unless_somebody_asked_for_it() {
        let step = |slot, initiator| {
            let mut record = change(slot, Change::Promote { to: Target::Stage(1), full: false });
            (record.state, record.intent.initiator) = (Some(routing(slot)), initiator);
            record
        };
        let (mut pauses, mut truth) = (Pauses::default(), truth());
        let mut start = change(1, Change::Start(patient()));
        start.state = Some(routing(1));
        pauses.see(&Fact::Chosen(&start, &ballot("a", 1)), &truth).unwrap();
        truth.now = 9_800_000;
        let early = pauses.promoted(&step(2, Initiator::Node), truth.now).unwrap_err();
        assert!(early.what.contains("after 9800000 us, asked were 10000000 us"), "{early}");
        pauses.promoted(&step(2, Initiator::Client), truth.now).unwrap();
        pauses.promoted(&step(2, Initiator::Node), 9_950_000).unwrap();
    }
}
