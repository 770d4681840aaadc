//! I3: each chosen raise has every gate voter's Yes, given in the certificate's ballot.

use std::collections::BTreeSet;

use aviary::domain::ids::NodeId;
use aviary::protocol::message::{Answer, GateVote, Message};
use aviary::protocol::record::Ballot;

use super::Invariant;
use crate::truth::{Fact, Truth};

/// I3.
#[derive(Default)]
pub struct Certificates(BTreeSet<(Ballot, NodeId)>);

impl Invariant for Certificates {
    fn name(&self) -> &'static str {
        "I3 unanimity"
    }

    fn see(&mut self, fact: &Fact, truth: &Truth) -> Result<(), String> {
        match fact {
            Fact::Sent(node, _, Message::Vote(vote)) => {
                if matches!(&vote.answer, Answer::Gate { gate: GateVote::Yes(_), .. }) {
                    self.0.insert((vote.ballot.clone(), (*node).clone()));
                }
                Ok(())
            }
            Fact::Chosen(record, _) if record.intent.act.raises_exposure() => {
                let slot = record.slot;
                let certificate =
                    record.certificate.as_ref().ok_or(format!("slot {slot}: a raise without certificate"))?;
                let members = truth.membership_for(slot).ok_or("no membership")?;
                for voter in members.gate_voters() {
                    if !certificate.yes.contains_key(voter) {
                        return Err(format!("slot {slot}: the certificate lacks {voter}'s Yes"));
                    }
                    let own = *voter == certificate.ballot.node;
                    if !own && !self.0.contains(&(certificate.ballot.clone(), voter.clone())) {
                        return Err(format!("slot {slot}: {voter} never said Yes in {}", certificate.ballot));
                    }
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }
}
