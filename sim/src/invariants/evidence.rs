//! I14: a step goes on, without an operator's word, only by evidence that was observed at that step.

use std::collections::BTreeMap;

use aviary_core::domain::ids::ServiceId;
use aviary_core::domain::rollout::Change;
use aviary_core::protocol::record::{Operation, Record, Slot};

use super::{EVIDENCE, Invariant, Violation};
use crate::broken;
use crate::truth::{ExpectedRollouts, Fact, Truth};

/// I14: without an operator's word, a step goes on only by evidence observed at that step.
#[derive(Default)]
pub struct Observed {
    /// Canary answers really given at each routing version, and errors among them.
    seen: BTreeMap<(ServiceId, u64), (u64, u64)>,
    rollouts: ExpectedRollouts,
    through: Slot,
}

impl Observed {
    fn promoted(&self, record: &Record) -> Result<(), Violation> {
        let Operation::Change(service, Change::Promote { full: false, .. }) = &record.intent.operation else {
            return Ok(());
        };
        let (Some(expected), Some(state)) = (self.rollouts.now.get(service), &record.state) else { return Ok(()) };
        let Some(spec) = expected.spec.as_ref().filter(|spec| spec.stages[expected.stage].weight.bp() > 0) else {
            return Ok(());
        };
        // The version is the one after the change; what it was judged by was seen at the one before.
        let judged = (service.clone(), state.version.saturating_sub(1));
        let (count, errors) = self.seen.get(&judged).copied().unwrap_or_default();
        if count < spec.analysis.min_samples {
            return Err(broken!(
                EVIDENCE,
                "slot {}: {service} goes on from version {} after {count} canary answers, {} are needed",
                record.slot,
                judged.1,
                spec.analysis.min_samples
            ));
        }
        if errors == count {
            return Err(broken!(
                EVIDENCE,
                "slot {}: {service} goes on though all {count} canary answers failed",
                record.slot
            ));
        }
        Ok(())
    }
}

impl Invariant for Observed {
    fn see(&mut self, fact: &Fact, _: &Truth) -> Result<(), Violation> {
        match fact {
            Fact::Observed(service, version, count, errors) => {
                let seen = self.seen.entry(((*service).clone(), *version)).or_default();
                seen.0 += count;
                seen.1 += errors;
                Ok(())
            }
            Fact::Chosen(record, _) if record.slot > self.through => {
                self.through = record.slot;
                self.promoted(record)?;
                self.rollouts.follow(record, true).map_err(|why| broken!(EVIDENCE, "{why}"))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use aviary_core::domain::rollout::Target;

    #[test]
    fn a_step_without_evidence_is_caught() {
        let (mut observed, truth) = (Observed::default(), truth());
        let mut start = change(1, Change::Start(spec()));
        start.state = Some(routing(1));
        observed.see(&Fact::Chosen(&start, &ballot("a", 1)), &truth).unwrap();
        let mut promote = change(2, Change::Promote { to: Target::Stage(1), full: false });
        promote.state = Some(routing(2));
        let least = spec().analysis.min_samples;
        observed.see(&Fact::Observed(&service(), 1, least - 1, 0), &truth).unwrap();
        let error = observed.promoted(&promote).unwrap_err();
        assert!(error.what.contains("99 canary answers, 100 are needed"), "{error}");
        observed.see(&Fact::Observed(&service(), 1, 1, 0), &truth).unwrap();
        observed.promoted(&promote).unwrap();
    }
}
