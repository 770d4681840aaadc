//! I6: promises never go down. I13: no ballot stands for two things in one slot.

use std::collections::BTreeMap;

use aviary_core::domain::ids::{Incarnation, NodeId};
use aviary_core::protocol::message::{Decision, Message};
use aviary_core::protocol::record::{Ballot, Hash, Intent, Slot};

use super::{BALLOTS, Invariant, PROMISES, Violation};
use crate::broken;
use crate::truth::{Fact, Truth};

/// I6: a node's promise and head never go down within an incarnation.
#[derive(Default)]
pub struct Promises(BTreeMap<(NodeId, Incarnation), (Option<Ballot>, Slot, u64)>);

impl Invariant for Promises {
    fn see(&mut self, fact: &Fact, _: &Truth) -> Result<(), Violation> {
        let Fact::Persisted(node, acceptor) = fact else { return Ok(()) };
        let now = (acceptor.promised.clone(), acceptor.head, acceptor.boot);
        let before = self.0.insert(((*node).clone(), acceptor.incarnation), now.clone());
        match before {
            Some(before) if before.0 > now.0 => {
                Err(broken!(PROMISES, "{node} promised {:?}, then {:?}", before.0, now.0))
            }
            Some(before) if before.2 > now.2 => Err(broken!(PROMISES, "{node} booted {}, then {}", before.2, now.2)),
            Some(before) if before.1 > now.1 => {
                Err(broken!(PROMISES, "{node}'s head was {}, then {}", before.1, now.1))
            }
            _ => Ok(()),
        }
    }
}

/// I13, and at most one value proposed in a ballot and slot.
#[derive(Default)]
pub struct Ballots {
    asked: BTreeMap<(Ballot, Slot), Intent>,
    proposed: BTreeMap<(Ballot, Slot), Hash>,
}

impl Invariant for Ballots {
    fn see(&mut self, fact: &Fact, _: &Truth) -> Result<(), Violation> {
        match fact {
            Fact::Sent(node, _, Message::Prepare(prepare)) => {
                let what = &prepare.intent;
                let key = (prepare.ballot.clone(), prepare.slot);
                let before = self.asked.entry(key).or_insert_with(|| what.clone());
                if before != what || prepare.ballot.node != **node {
                    return Err(broken!(BALLOTS, "{node} uses {} for {what:?} and {before:?}", prepare.ballot));
                }
            }
            Fact::Sent(node, _, Message::Decision(Decision::Propose(ballot, record))) => {
                let what = record.hash();
                let before = self.proposed.entry((ballot.clone(), record.slot)).or_insert(what);
                if *before != what || ballot.node != **node {
                    return Err(broken!(BALLOTS, "{node} proposes two values in {ballot}: {before:?} and {what:?}"));
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
    fn a_falling_promise_is_caught() {
        let (mut promises, truth) = (Promises::default(), truth());
        promises.see(&Fact::Persisted(&node("a"), &acceptor("a", 2, "x")), &truth).unwrap();
        assert!(promises.see(&Fact::Persisted(&node("a"), &acceptor("a", 1, "x")), &truth).is_err());
    }

    #[test]
    fn two_proposals_in_a_ballot_are_caught() {
        let (mut ballots, truth) = (Ballots::default(), truth());
        let propose = |tx| Message::Decision(Decision::Propose(ballot("a", 1), Box::new(pause(1, tx).record)));
        ballots.see(&Fact::Sent(&node("a"), Incarnation(1), &propose("x")), &truth).unwrap();
        assert!(ballots.see(&Fact::Sent(&node("a"), Incarnation(1), &propose("y")), &truth).is_err());
    }
}
