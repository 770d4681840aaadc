//! I4 and I5: one outcome for each transaction; what was answered is durable on a majority and stays so. I11: reads.

use std::collections::{BTreeMap, BTreeSet};

use aviary_core::protocol::record::{ConfigChange, Operation, Slot};
use aviary_core::protocol::{OperatorRequest, Outcome, RequestId};

use super::{ANSWERS, Invariant, READS, Violation};
use crate::broken;
use crate::truth::{Fact, Truth};

/// I4 and I5: a transaction has one outcome, and what was answered stays so.
#[derive(Default)]
pub struct Answers {
    asked: BTreeMap<RequestId, (String, OperatorRequest)>,
    slots: BTreeMap<String, Slot>,
    answers: BTreeMap<String, (bool, Slot)>,
    /// The last slot that anybody was told of, and what it was when each request was asked.
    told: Slot,
    told_before: BTreeMap<RequestId, Slot>,
    /// Transactions that were asked more than once.
    again: BTreeSet<String>,
}

impl Answers {
    fn decided(&mut self, request: RequestId, committed: bool, slot: Slot, truth: &Truth) -> Result<(), Violation> {
        let Some((tx, asked)) = self.asked.get(&request) else {
            return Err(broken!(ANSWERS, "an answer to nobody's question"));
        };
        let word = if committed { "COMMITTED" } else { "ABORTED" };
        let Some(known) = truth.chosen(slot) else {
            return Err(broken!(ANSWERS, "{tx} answered {word} at slot {slot}, which isn't chosen"));
        };
        let operation = &known.record.intent.operation;
        let is_abort = matches!(operation, Operation::Refused { .. });
        let own = known.record.intent.tx.as_str() == tx;
        let reverted = !committed && operation.increases_exposure() && !known.certain;
        let revert = !committed && matches!(operation, Operation::Revert { .. });
        let own_outcome = own && (is_abort != committed || reverted);
        if !own_outcome && !revert {
            return Err(broken!(
                ANSWERS,
                "{tx} answered {word} at slot {slot}, which holds {} of {}",
                operation.name(),
                known.record.intent.tx
            ));
        }
        if own && committed && !fits(asked, operation) {
            return Err(broken!(
                ANSWERS,
                "{tx} answered {word}: asked {asked:?}, slot {slot} holds {}",
                operation.name()
            ));
        }
        // Linearizable: what is decided first was asked before the answer to what is decided after it.
        let least = self.told_before.get(&request).copied().unwrap_or_default();
        let first = !self.answers.contains_key(tx) && !self.again.contains(tx);
        if first && own && slot <= least {
            return Err(broken!(ANSWERS, "{tx} is in slot {slot}, and was asked after slot {least} was answered"));
        }
        self.told = self.told.max(slot);
        match self.answers.insert(tx.clone(), (committed, slot)) {
            Some((before, at)) if before != committed => {
                Err(broken!(ANSWERS, "{tx} answered {word} at slot {slot}, and otherwise before, at slot {at}"))
            }
            _ => Ok(()),
        }
    }
}

/// Returns true when `operation` can be what `asked` led to.
fn fits(asked: &OperatorRequest, operation: &Operation) -> bool {
    match (asked, operation) {
        (OperatorRequest::Config(ConfigChange::Cordon(a)), Operation::Config(ConfigChange::Cordon(b))) => a == b,
        (OperatorRequest::Config(ConfigChange::Uncordon(a)), Operation::Config(ConfigChange::Uncordon(b))) => a == b,
        (OperatorRequest::Config(ConfigChange::Remove(a)), Operation::Config(ConfigChange::Remove(b))) => a == b,
        (OperatorRequest::Config(ConfigChange::Add(a, i)), Operation::Config(ConfigChange::Add(b, j))) => {
            a == b && i == j
        }
        (OperatorRequest::Config(ConfigChange::Readmit(a, i)), Operation::Config(ConfigChange::Readmit(b, j))) => {
            a == b && i == j
        }
        (OperatorRequest::SetDefault { service }, Operation::SetDefault(found)) => service == found,
        (OperatorRequest::Config(_) | OperatorRequest::SetDefault { .. }, _)
        | (_, Operation::Config(_) | Operation::SetDefault(_)) => false,
        (OperatorRequest::Retry { .. }, operation) => operation.name() == "Start",
        (OperatorRequest::Apply(_) | OperatorRequest::Undo { .. } | OperatorRequest::UndoNow { .. }, operation) => {
            matches!(operation.name(), "Start" | "Rollback")
        }
        (OperatorRequest::Promote { .. } | OperatorRequest::SkipWait { .. }, operation) => {
            operation.name() == "Promote"
        }
        (OperatorRequest::SetServers { .. }, operation) => operation.name() == "SetServers",
        (OperatorRequest::Pause { .. }, operation) => operation.name() == "Pause",
        (OperatorRequest::Resume { .. }, operation) => operation.name() == "Resume",
        (OperatorRequest::Abort { .. }, operation) => operation.name() == "Rollback",
    }
}

impl Invariant for Answers {
    fn see(&mut self, fact: &Fact, truth: &Truth) -> Result<(), Violation> {
        match fact {
            Fact::Asked(request, tx, asked) => {
                // Asked twice, the first time is what counts.
                if !self.asked.values().any(|(known, _)| known == tx) {
                    self.told_before.insert(*request, self.told);
                } else {
                    self.again.insert((*tx).into());
                }
                self.asked.insert(*request, ((*tx).into(), (*asked).clone()));
            }
            Fact::Chosen(record, _) => {
                let tx = record.intent.tx.as_str().to_string();
                if let Some(before) = self.slots.insert(tx, record.slot)
                    && before != record.slot
                {
                    return Err(broken!(ANSWERS, "{} is in slots {before} and {}", record.intent.tx, record.slot));
                }
            }
            Fact::Replied(request, Outcome::Committed { slot, .. }) => {
                return self.decided(*request, true, *slot, truth);
            }
            Fact::Replied(request, Outcome::Aborted { slot, .. }) => {
                return self.decided(*request, false, *slot, truth);
            }
            Fact::Over => {
                for (tx, (_, slot)) in &self.answers {
                    truth.chosen(*slot).ok_or_else(|| broken!(ANSWERS, "the answer to {tx} vanished"))?;
                }
            }
            _ => {}
        }
        Ok(())
    }
}

/// I11: a read counts every write that was answered before it was asked.
#[derive(Default)]
pub struct Reads {
    answered: Slot,
    asked: BTreeMap<RequestId, Slot>,
}

impl Invariant for Reads {
    fn see(&mut self, fact: &Fact, _: &Truth) -> Result<(), Violation> {
        match fact {
            Fact::Reads(request) => drop(self.asked.insert(*request, self.answered)),
            Fact::Replied(_, Outcome::Committed { slot, .. } | Outcome::Aborted { slot, .. }) => {
                self.answered = self.answered.max(*slot);
            }
            Fact::Replied(request, Outcome::Current(slot)) => {
                let least = self.asked.get(request).copied().unwrap_or_default();
                self.answered = self.answered.max(*slot);
                if *slot < least {
                    return Err(broken!(
                        READS,
                        "a read found slot {slot}, slot {least} was answered before it was asked"
                    ));
                }
            }
            _ => {}
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;

    #[test]
    fn an_answer_before_the_majority_is_caught() {
        let mut answers = Answers::default();
        let (truth, asked) = (truth(), OperatorRequest::Resume { service: service() });
        answers.see(&Fact::Asked(RequestId(1), "x", &asked), &truth).unwrap();
        let outcome = Outcome::Committed { slot: Slot(1), state: None, reason: String::new(), repeated: false };
        assert!(answers.see(&Fact::Replied(RequestId(1), &outcome), &truth).unwrap_err().what.contains("isn't chosen"));
    }

    #[test]
    fn a_stale_read_is_caught() {
        let (mut reads, truth) = (Reads::default(), truth());
        reads.see(&Fact::Replied(RequestId(1), &Outcome::Current(Slot(4))), &truth).unwrap();
        reads.see(&Fact::Reads(RequestId(2)), &truth).unwrap();
        assert!(reads.see(&Fact::Replied(RequestId(2), &Outcome::Current(Slot(3))), &truth).is_err());
    }
}
