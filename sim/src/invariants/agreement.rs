//! I1: one value for each slot. I2: logs are contiguous and chained.

use std::collections::BTreeMap;

use aviary_core::domain::ids::NodeId;
use aviary_core::protocol::record::{Chosen, Slot};

use super::{AGREEMENT, CHAIN, Invariant, Violation};
use crate::broken;
use crate::truth::{Fact, Truth};

/// I1 and I10: what a node learns or proposes is what a majority of bound voters accepted.
pub struct Agreement;

impl Invariant for Agreement {
    fn see(&mut self, fact: &Fact, truth: &Truth) -> Result<(), Violation> {
        let Fact::Appended(node, chosen) = fact else { return Ok(()) };
        let (slot, hash) = (chosen.record.slot, chosen.record.hash());
        let known = truth.chosen(slot).ok_or_else(|| {
            let name = chosen.record.intent.operation.name();
            broken!(AGREEMENT, "{node} learned slot {slot} ({name}), which no majority of bound voters accepted")
        })?;
        if known.hash != hash {
            return Err(broken!(AGREEMENT, "{node} learned {hash} for slot {slot}, chosen is {}", known.hash));
        }
        match &chosen.ballot {
            Some(ballot) if known.ballots.contains(ballot) => Ok(()),
            other => Err(broken!(
                AGREEMENT,
                "{node} learned slot {slot} as chosen in {other:?}, it was in {:?}",
                known.ballots
            )),
        }
    }
}

/// I2: each log is contiguous from genesis, and each record names the hash of the one before.
#[derive(Default)]
pub struct Chained(BTreeMap<NodeId, Chosen>);

impl Invariant for Chained {
    fn see(&mut self, fact: &Fact, _: &Truth) -> Result<(), Violation> {
        match fact {
            Fact::Started(node, log) => {
                let last = log.last().ok_or_else(|| broken!(CHAIN, "a log without genesis"))?;
                self.0.insert((*node).clone(), last.clone());
                Ok(())
            }
            Fact::Appended(node, chosen) => {
                let before = self.0.insert((*node).clone(), (*chosen).clone());
                let Some(before) = before else {
                    return Err(broken!(CHAIN, "{node} appended before it started"));
                };
                let expected = Slot(before.record.slot.0 + 1);
                if chosen.record.slot != expected || chosen.record.prev_hash != before.record.hash() {
                    return Err(broken!(
                        CHAIN,
                        "{node} appended slot {} after slot {}",
                        chosen.record.slot,
                        before.record.slot
                    ));
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;

    #[test]
    fn a_record_that_nobody_accepted_is_caught() {
        let truth = truth();
        let error = Agreement.see(&Fact::Appended(&node("a"), &pause(1, "x")), &truth).unwrap_err();
        assert!(error.what.contains("no majority"), "{error}");
    }

    #[test]
    fn a_gap_is_caught() {
        let truth = truth();
        let mut chained = Chained::default();
        chained.see(&Fact::Started(&node("a"), &[genesis()]), &truth).unwrap();
        assert!(chained.see(&Fact::Appended(&node("a"), &pause(2, "x")), &truth).is_err());
    }

    #[test]
    fn two_majorities_for_one_slot_are_caught() {
        let mut truth = truth();
        for voter in ["a", "b"] {
            truth.persisted(&node(voter), &acceptor(voter, 1, "x")).unwrap();
        }
        assert!(truth.persisted(&node("b"), &acceptor("b", 2, "y")).unwrap().is_none());
        assert!(truth.persisted(&node("c"), &acceptor("c", 2, "y")).unwrap_err().what.contains("two chosen values"));
    }
}
