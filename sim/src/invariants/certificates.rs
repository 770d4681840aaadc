//! I3: each increase that is accepted, and so each that is chosen, has every gate voter's Yes, given in the certificate's
//! ballot for that slot.

use std::collections::BTreeSet;

use aviary_core::domain::ids::NodeId;
use aviary_core::protocol::message::{Answer, GateVote, Message};
use aviary_core::protocol::record::{Ballot, Slot};

use super::{Invariant, UNANIMITY, Violation};
use crate::broken;
use crate::truth::{Fact, Truth};

/// I3: a chosen increase carries a Yes of every gate voter.
#[derive(Default)]
pub struct Certificates(BTreeSet<(Ballot, Slot, NodeId)>);

impl Invariant for Certificates {
    fn see(&mut self, fact: &Fact, truth: &Truth) -> Result<(), Violation> {
        match fact {
            Fact::Sent(node, _, Message::Vote(vote)) => {
                if matches!(&vote.answer, Answer::Gate { gate: GateVote::Yes(_), .. }) {
                    self.0.insert((vote.ballot.clone(), vote.slot, (*node).clone()));
                }
                Ok(())
            }
            Fact::Persisted(node, acceptor) => {
                let accepted = acceptor.accepted.as_ref().map(|accepted| &accepted.record);
                let Some(record) = accepted.filter(|record| record.intent.operation.increases_exposure()) else {
                    return Ok(());
                };
                let Some(members) = truth.membership_for(record.slot) else { return Ok(()) };
                let yes = record.certificate.as_ref().map(|certificate| &certificate.yes);
                let missing = members.gate_voters().find(|voter| !yes.is_some_and(|yes| yes.contains_key(*voter)));
                match missing {
                    Some(voter) => Err(broken!(UNANIMITY, "{node} accepts slot {} without {voter}'s Yes", record.slot)),
                    None => Ok(()),
                }
            }
            Fact::Chosen(record, ballot) if record.intent.operation.increases_exposure() => {
                let slot = record.slot;
                let Some(certificate) = &record.certificate else {
                    return Err(broken!(UNANIMITY, "slot {slot}: an increase without certificate"));
                };
                if certificate.ballot > **ballot {
                    return Err(broken!(
                        UNANIMITY,
                        "slot {slot}: chosen in {ballot}, its certificate is of {}",
                        certificate.ballot
                    ));
                }
                let members = truth.membership_for(slot).ok_or_else(|| broken!(UNANIMITY, "no membership"))?;
                for voter in members.gate_voters() {
                    if !certificate.yes.contains_key(voter) {
                        return Err(broken!(UNANIMITY, "slot {slot}: the certificate lacks {voter}'s Yes"));
                    }
                    let own = *voter == certificate.ballot.node;
                    if !own && !self.0.contains(&(certificate.ballot.clone(), slot, voter.clone())) {
                        return Err(broken!(
                            UNANIMITY,
                            "slot {slot}: {voter} never said Yes in {}",
                            certificate.ballot
                        ));
                    }
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use aviary_core::domain::rollout::{Change, Target};
    use aviary_core::protocol::record::{Certificate, Operation};

    use super::*;
    use crate::testing::*;

    #[test]
    fn an_acceptance_without_every_yes_is_caught() {
        let mut state = acceptor("b", 1, "x");
        let mut certificates = Certificates::default();
        certificates.see(&Fact::Persisted(&node("b"), &state), &truth()).unwrap();
        let record = &mut state.accepted.as_mut().unwrap().record;
        record.intent.operation = Operation::Change(service(), Change::Promote { to: Target::Stage(1), full: false });
        let yes = ["a", "c"].map(|voter| (node(voter), "fine".to_string()));
        record.certificate = Some(Certificate { ballot: ballot("a", 1), yes: yes.into() });
        let error = certificates.see(&Fact::Persisted(&node("b"), &state), &truth()).unwrap_err();
        assert!(error.what.contains("without b's Yes"), "{error}");
    }

    #[test]
    fn a_yes_that_nobody_said_is_caught() {
        let mut increase = pause(1, "x").record;
        increase.intent.operation = Operation::Change(service(), Change::Promote { to: Target::Stage(1), full: false });
        let yes = ["a", "b", "c"].map(|voter| (node(voter), "fine".to_string()));
        increase.certificate = Some(Certificate { ballot: ballot("a", 1), yes: yes.into() });
        let error = Certificates::default().see(&Fact::Chosen(&increase, &ballot("a", 1)), &truth()).unwrap_err();
        assert!(error.what.contains("never said Yes"), "{error}");
    }
}
