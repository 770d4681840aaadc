//! I10 and I12: no vote leaves before the write it depends on, nor from an incarnation that isn't bound.

use aviary_core::domain::ids::{Incarnation, NodeId};
use aviary_core::protocol::message::{Answer, Decision, Message, Vote};

use super::{Invariant, Violation, WRITES};
use crate::broken;
use crate::truth::{Fact, Truth};

/// I10 and I12: only votes of current incarnations count, and none leaves before the write it depends on.
pub struct Writes;

impl Writes {
    fn vote(node: &NodeId, incarnation: Incarnation, vote: &Vote, truth: &Truth) -> Result<(), Violation> {
        let acceptor = truth.acceptors.get(node);
        let me = (node.clone(), incarnation);
        match &vote.answer {
            Answer::Refuse(_) => return Ok(()),
            Answer::Gate { accepted, .. } => {
                if acceptor.and_then(|r| r.promised.as_ref()) < Some(&vote.ballot) {
                    return Err(broken!(WRITES, "{node} votes in {} before the promise is durable", vote.ballot));
                }
                let slot = truth.accepts.range((vote.slot, lowest())..).take_while(|(key, _)| key.0 == vote.slot);
                let last =
                    slot.filter(|(key, s)| key.1 < vote.ballot && s.by.contains(&me)).last().map(|(key, _)| &key.1);
                let told = accepted.as_ref().map(|accepted| &accepted.ballot);
                if last > told {
                    return Err(broken!(
                        WRITES,
                        "{node} accepted slot {} in {last:?} and its vote tells {told:?}",
                        vote.slot
                    ));
                }
            }
            Answer::Accept => {
                let support = truth.accepts.get(&(vote.slot, vote.ballot.clone()));
                if !support.is_some_and(|support| support.by.contains(&me)) {
                    return Err(broken!(
                        WRITES,
                        "{node} confirms {} slot {} before the accept is durable",
                        vote.ballot,
                        vote.slot
                    ));
                }
            }
        }
        match truth.membership_for(vote.slot) {
            Some(members) if members.counts(node, incarnation) => Ok(()),
            _ => Err(broken!(WRITES, "{node} votes on slot {} in unbound incarnation {incarnation}", vote.slot)),
        }
    }
}

fn lowest() -> aviary_core::protocol::record::Ballot {
    let node = NodeId::new("-").expect("a valid name");
    aviary_core::protocol::record::Ballot { round: 0, node, incarnation: Incarnation(0), boot: 0 }
}

impl Invariant for Writes {
    fn see(&mut self, fact: &Fact, truth: &Truth) -> Result<(), Violation> {
        match fact {
            Fact::Sent(node, incarnation, Message::Vote(vote)) => Self::vote(node, *incarnation, vote, truth),
            Fact::Sent(node, _, Message::Decision(Decision::Propose(ballot, record))) => {
                let Some(members) = truth.membership_for(record.slot) else {
                    return Err(broken!(WRITES, "{node} proposes slot {} beyond the open one", record.slot));
                };
                let promised = truth
                    .promises
                    .get(ballot)
                    .map_or(0, |by| by.iter().filter(|(node, incarnation)| members.counts(node, *incarnation)).count());
                if promised < members.quorum() {
                    return Err(broken!(
                        WRITES,
                        "{node} proposes in {ballot} with {promised} durable promises of {}",
                        members.quorum()
                    ));
                }
                let hash = record.hash();
                match truth.chosen(record.slot) {
                    Some(known) if known.hash != hash && known.ballots.iter().any(|chosen| chosen < ballot) => {
                        Err(broken!(
                            WRITES,
                            "{node} proposes another value than the chosen one for slot {} in {ballot}",
                            record.slot
                        ))
                    }
                    _ => Ok(()),
                }
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
    fn a_vote_before_its_write_is_caught() {
        let vote = |answer| {
            Message::Vote(Vote {
                ballot: ballot("a", 1),
                slot: aviary_core::protocol::record::Slot(1),
                head: Default::default(),
                writes: 1,
                answer,
            })
        };
        let mut truth = truth();
        let early = vote(Answer::Accept);
        assert!(Writes.see(&Fact::Sent(&node("a"), Incarnation(1), &early), &truth).is_err());
        truth.persisted(&node("a"), &acceptor("a", 1, "x")).unwrap();
        Writes.see(&Fact::Sent(&node("a"), Incarnation(1), &early), &truth).unwrap();
        let unbound = Fact::Sent(&node("a"), Incarnation(9), &early);
        assert!(Writes.see(&unbound, &truth).is_err());
    }
}
