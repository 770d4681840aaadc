//! I2: a checkpoint is what the log adds up to, down to the replaced incarnations and the outcomes that clients may ask for.

use std::collections::BTreeMap;

use aviary_core::protocol::checkpoint::Checkpoint;
use aviary_core::protocol::ledger::Ledger;
use aviary_core::protocol::record::{Chosen, Record, Slot};

use super::{CHAIN, Invariant, Violation};
use crate::broken;
use crate::truth::{Fact, Known, Truth};

/// I2: a checkpoint says what every record up to its slot adds up to, one after the other, from genesis.
#[derive(Default)]
pub struct Sums {
    sum: Option<Ledger>,
    /// The sums at slots that some node made a checkpoint of.
    at: BTreeMap<Slot, Ledger>,
}

impl Sums {
    fn compare(&mut self, node: &str, checkpoint: &Checkpoint, truth: &Truth) -> Result<(), Violation> {
        let found = checkpoint.ledger().map_err(|why| broken!(CHAIN, "{node}: its checkpoint: {why}"))?;
        let slot = checkpoint.slot;
        if !self.at.contains_key(&slot) {
            let sum =
                self.advance(slot, truth).map_err(|why| broken!(CHAIN, "the chosen log adds up to nothing: {why}"))?;
            self.at.insert(slot, sum);
        }
        match without_doubt(found) == self.at[&slot] {
            true => Ok(()),
            false => Err(broken!(CHAIN, "{node}: its checkpoint of slot {slot} is not what the log adds up to")),
        }
    }

    /// Returns the sum of the chosen records up to `slot`, which is not below the last one asked for, or begins anew.
    fn advance(&mut self, slot: Slot, truth: &Truth) -> Result<Ledger, String> {
        let known = self.sum.take().filter(|sum| sum.head <= slot);
        let genesis = Ledger::new(&chosen(&truth.log[0])).ok_or("no genesis")?;
        let mut sum = known.unwrap_or(genesis);
        while sum.head < slot {
            let next = truth.chosen(sum.head.next()).ok_or("it ends before")?;
            sum.apply(&chosen(next)).map_err(|error| error.to_string())?;
        }
        self.sum = Some(sum.clone());
        Ok(without_doubt(sum))
    }
}

fn chosen(known: &Known) -> Chosen {
    let record: Record = known.record.clone();
    Chosen { ballot: known.ballots.first().cloned(), decided_at: record.intent.at, record }
}

/// Which ballot a node heard of differs, so that an increase may be in doubt at one node and certain at another.
fn without_doubt(mut ledger: Ledger) -> Ledger {
    let increases = ledger.services.values_mut().filter_map(|service_state| service_state.increase.as_mut());
    increases.for_each(|increase| increase.in_doubt = false);
    ledger
}

impl Invariant for Sums {
    fn see(&mut self, fact: &Fact, truth: &Truth) -> Result<(), Violation> {
        match fact {
            Fact::SummedUp(node, checkpoint) => self.compare(node.as_str(), checkpoint, truth),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;

    #[test]
    fn a_checkpoint_that_leaves_something_out_is_caught() {
        let truth = truth();
        let mut ledger = Ledger::new(&genesis()).unwrap();
        let sound = Checkpoint::of(&ledger).unwrap();
        Sums::default().see(&Fact::SummedUp(&node("a"), &sound), &truth).unwrap();
        ledger.members.0.remove(&node("c"));
        let other = Checkpoint::of(&ledger).unwrap();
        let error = Sums::default().see(&Fact::SummedUp(&node("a"), &other), &truth).unwrap_err();
        assert!(error.what.contains("slot 0 is not what the log adds up to"), "{error}");
    }
}
