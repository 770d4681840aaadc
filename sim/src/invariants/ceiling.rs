//! I8: a node serves at most what the newest record it learned allows.

use std::collections::{BTreeMap, BTreeSet};

use aviary_core::domain::ids::{NodeId, ServiceId};
use aviary_core::domain::plan::OnPartition;

use super::{CEILING, Invariant, Violation};
use crate::broken;
use crate::truth::{ExpectedRollouts, Fact, Truth};
use aviary_core::protocol::record::Slot;

/// I8: a node serves at most what the newest record that it has learned allows.
#[derive(Default)]
pub struct Ceiling {
    learned: BTreeMap<NodeId, ExpectedRollouts>,
    holding: BTreeSet<(NodeId, ServiceId)>,
    /// Decreases that nodes accepted last, and their slots.
    accepted: BTreeMap<NodeId, (ServiceId, Slot)>,
    /// The last slot that each node learned.
    heads: BTreeMap<NodeId, Slot>,
}

impl Invariant for Ceiling {
    fn see(&mut self, fact: &Fact, _: &Truth) -> Result<(), Violation> {
        match fact {
            Fact::Started(node, log) => {
                let mut rollouts = ExpectedRollouts::default();
                for chosen in *log {
                    rollouts.follow(&chosen.record, !chosen.is_in_doubt()).map_err(|why| broken!(CEILING, "{why}"))?;
                }
                self.learned.insert((*node).clone(), rollouts);
                self.holding.retain(|(holding, _)| holding != *node);
                let head = log.last().map_or(Slot(0), |last| last.record.slot);
                self.heads.insert((*node).clone(), head);
                Ok(())
            }
            Fact::Appended(node, chosen) => {
                self.heads.insert((*node).clone(), chosen.record.slot);
                if let Some(service) = chosen.record.intent.operation.service() {
                    self.holding.remove(&((*node).clone(), service.clone()));
                }
                let rollouts = self.learned.entry((*node).clone()).or_default();
                rollouts.follow(&chosen.record, !chosen.is_in_doubt()).map_err(|why| broken!(CEILING, "{why}"))
            }
            Fact::Persisted(node, acceptor) => {
                let accepted = acceptor.accepted.as_ref().map(|accepted| &accepted.record);
                let decrease = accepted.filter(|record| record.intent.operation.decreases_exposure());
                match decrease.and_then(|record| Some((record.intent.operation.service()?.clone(), record.slot))) {
                    Some(decrease) => drop(self.accepted.insert((*node).clone(), decrease)),
                    None => drop(self.accepted.remove(*node)),
                }
                Ok(())
            }
            Fact::LocalHold(node, service) => {
                self.holding.insert(((*node).clone(), (*service).clone()));
                Ok(())
            }
            Fact::Served(served) if served.bp > 0 => {
                let (node, bp) = (served.node, served.bp);
                let rollouts = self.learned.get(node).ok_or_else(|| broken!(CEILING, "serves before it started"))?;
                let ceiling =
                    rollouts.now.get(served.service).map_or(0, |expected| expected.ceiling.max(expected.in_doubt));
                if bp > ceiling {
                    return Err(broken!(
                        CEILING,
                        "{node} serves {bp} bp of {}, its newest record allows {ceiling}",
                        served.service
                    ));
                }
                if let Some((service, slot)) = self.accepted.get(node)
                    && service == served.service
                    && self.heads.get(node) < Some(slot)
                    && !served.is_writing
                {
                    return Err(broken!(
                        CEILING,
                        "{node} serves {bp} bp of {service} though it accepted a decrease in slot {slot}"
                    ));
                }
                if rollouts.cordoned.contains(node) {
                    return Err(broken!(CEILING, "{node} serves {bp} bp though it knows that it is cordoned"));
                }
                if !served.leased && served.on_partition == OnPartition::Stable {
                    return Err(broken!(
                        CEILING,
                        "{node} serves {bp} bp of {} without needing a lease",
                        served.service
                    ));
                }
                if self.holding.contains(&(node.clone(), served.service.clone())) {
                    return Err(broken!(
                        CEILING,
                        "{node} serves {bp} bp of {} after its local hold began",
                        served.service
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
    fn canary_traffic_after_an_accepted_decrease_is_caught() {
        use aviary_core::domain::rollout::Change;
        let (mut ceiling, truth) = (Ceiling::default(), truth());
        let mut start = pause(1, "x");
        start.record.intent.operation = change(1, Change::Start(spec())).intent.operation;
        ceiling.see(&Fact::Started(&node("a"), &[genesis(), start]), &truth).unwrap();
        let (node, service, canary) = (node("a"), service(), version("v2"));
        let serves = Fact::Served(served(&node, &service, &canary, 500));
        ceiling.see(&serves, &truth).unwrap();
        let mut state = acceptor("a", 1, "x");
        state.accepted.as_mut().unwrap().record = change(2, Change::Rollback { reason: "bad".into() });
        ceiling.see(&Fact::Persisted(&node, &state), &truth).unwrap();
        assert!(ceiling.see(&serves, &truth).unwrap_err().what.contains("accepted a decrease in slot 2"));
    }

    #[test]
    fn canary_traffic_without_any_record_is_caught() {
        let (mut ceiling, truth) = (Ceiling::default(), truth());
        ceiling.see(&Fact::Started(&node("a"), &[genesis()]), &truth).unwrap();
        let (node, service, canary) = (node("a"), service(), version("v2"));
        assert!(ceiling.see(&Fact::Served(served(&node, &service, &canary, 1)), &truth).is_err());
        ceiling.see(&Fact::Served(served(&node, &service, &canary, 0)), &truth).unwrap();
    }
}
