//! I9: once a decrease is chosen, no node exceeds it for longer than a lease, cut off or not.

use std::collections::{BTreeMap, BTreeSet};

use aviary_core::domain::ids::{NodeId, ServiceId, VersionId};
use aviary_core::domain::plan::OnPartition;
use aviary_core::protocol::record::Slot;

use super::{ENFORCEMENT, Invariant, Violation};
use crate::broken;
use crate::truth::{ExpectedRollouts, Fact, Served, Truth};

/// A share that was allowed, and until when it may still be seen.
struct Allowed {
    bp: u16,
    ends: Option<u64>,
}

/// I9: once a decrease is chosen, nobody exceeds it for longer than a lease.
#[derive(Default)]
pub struct Enforcement {
    rollouts: ExpectedRollouts,
    seen: Slot,
    /// Increases that so far were chosen in doubt only.
    doubtful: BTreeSet<Slot>,
    allowed: BTreeMap<(ServiceId, VersionId), Vec<Allowed>>,
    cordoned: BTreeMap<NodeId, u64>,
    /// Decreases that some node shows as enforced: the highest slot told, and who told.
    told: BTreeMap<ServiceId, (Slot, NodeId)>,
}

/// Longest real time that a lease of this length lasts on the slowest allowed clock, in microseconds.
fn longest_us(lease_ms: u64) -> u64 {
    lease_ms * 1000 * 100 / 99 + 1000
}

impl Enforcement {
    fn chosen(&mut self, record: &aviary_core::protocol::record::Record, truth: &Truth) {
        let certain = truth.chosen(record.slot).is_none_or(|known| known.certain);
        if record.slot <= self.seen {
            if certain && self.doubtful.remove(&record.slot) {
                self.certain_late(record, truth);
            }
            return;
        }
        self.seen = record.slot;
        if !certain {
            self.doubtful.insert(record.slot);
        }
        let before = self.rollouts.now.clone();
        if self.rollouts.follow(record, certain).is_err() {
            return;
        }
        for node in &self.rollouts.cordoned {
            self.cordoned.entry(node.clone()).or_insert(truth.now);
        }
        self.cordoned.retain(|node, _| self.rollouts.cordoned.contains(node));
        let operation = &record.intent.operation;
        let Some(service) = operation.service().filter(|_| !operation.is_verdict()) else { return };
        let (Some(expected), old) = (self.rollouts.now.get(service), before.get(service)) else { return };
        let completed = !expected.active && record.intent.operation.name() == "Promote";
        if completed {
            return;
        }
        // A rollout that starts follows one that was rolled back, and ended then, or one that completed: its canary is
        // the stable of this one, and a node that still calls it canary exceeds nothing.
        let starts = record.intent.operation.name() == "Start";
        if let Some(spec) = old.and_then(|old| old.spec.as_ref()).filter(|_| !starts) {
            let key = (service.clone(), spec.canary.version.clone());
            for allowed in self.allowed.entry(key).or_default() {
                if allowed.bp > expected.ceiling || expected.spec.as_ref() != Some(spec) {
                    allowed.ends.get_or_insert(truth.now + longest_us(spec.lease_ms));
                }
            }
        }
        if let Some(spec) = &expected.spec {
            let key = (service.clone(), spec.canary.version.clone());
            let list = self.allowed.entry(key).or_default();
            list.retain(|allowed| allowed.ends.is_none_or(|ends| ends > truth.now));
            if starts {
                let ends = truth.now + longest_us(spec.lease_ms);
                list.iter_mut().for_each(|allowed| allowed.ends = allowed.ends.or(Some(ends)));
            }
            list.push(Allowed { bp: expected.ceiling, ends: None });
        }
    }
}

impl Enforcement {
    /// Returns true when some node shows a later decrease than this node knows of as enforced everywhere. A restart may
    /// forget that it was decided; what needs no lease then goes on until the node hears of it again.
    fn is_told(&self, served: &Served) -> bool {
        let known = self.told.get(served.service).is_some_and(|(slot, _)| served.slot < *slot);
        known && served.on_partition == OnPartition::Stable
    }

    /// The ballot that voted on an increase reached its majority after a later one did: a node that learns of it so may serve it.
    fn certain_late(&mut self, record: &aviary_core::protocol::record::Record, truth: &Truth) {
        let Some(service) = record.intent.operation.service() else { return };
        let Some(expected) = self.rollouts.now.get_mut(service) else { return };
        let (Some(spec), Some(state)) = (&expected.spec, &record.state) else { return };
        let bp = state.canary_weight().bp();
        let newest = record.slot == self.seen;
        if newest && expected.active {
            expected.ceiling = bp;
        }
        let ends = (!newest).then(|| truth.now + longest_us(spec.lease_ms));
        self.allowed.entry((service.clone(), spec.canary.version.clone())).or_default().push(Allowed { bp, ends });
    }
}

impl Invariant for Enforcement {
    fn see(&mut self, fact: &Fact, truth: &Truth) -> Result<(), Violation> {
        match fact {
            Fact::Chosen(record, _) => {
                self.chosen(record, truth);
                Ok(())
            }
            Fact::Enforced(node, service, slot) => {
                let known = self.told.get(*service).is_some_and(|(known, _)| known >= slot);
                if !known {
                    self.told.insert((*service).clone(), (*slot, (*node).clone()));
                }
                Ok(())
            }
            Fact::Served(served) if served.bp > 0 && self.is_told(served) => Err(broken!(
                ENFORCEMENT,
                "{} serves {} bp of {} by slot {}, though {:?} shows a later decrease as enforced",
                served.node,
                served.bp,
                served.service,
                served.slot,
                self.told[served.service]
            )),
            Fact::Served(served) if served.bp > 0 && served.on_partition == OnPartition::Stable => {
                let key = (served.service.clone(), served.canary.clone());
                let live = self.allowed.get(&key).into_iter().flatten();
                let most =
                    live.filter(|a| a.ends.is_none_or(|ends| ends >= truth.now)).map(|a| a.bp).max().unwrap_or(0);
                // What is everybody's stable by now, and only this node still calls canary, exceeds nothing.
                let stable = self.rollouts.now.get(served.service).is_some_and(|expected| {
                    let version = expected.spec.as_ref().map(|spec| &spec.canary.version);
                    !expected.active && version == Some(served.canary) && served.bp <= expected.in_doubt
                });
                if served.bp > most && !stable {
                    return Err(broken!(
                        ENFORCEMENT,
                        "{} serves {} bp of {} {}, at most {most} bp were chosen within a lease's length",
                        served.node,
                        served.bp,
                        served.service,
                        served.canary
                    ));
                }
                let lease = self.rollouts.now.get(served.service).and_then(|expected| expected.spec.as_ref());
                let lease = lease.map_or(3_000, |spec| spec.lease_ms.max(3_000));
                match self.cordoned.get(served.node) {
                    Some(since) if truth.now > since + longest_us(lease) => Err(broken!(
                        ENFORCEMENT,
                        "{} serves {} bp a lease's length after it was cordoned",
                        served.node,
                        served.bp
                    )),
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
    fn canary_traffic_that_was_never_chosen_is_caught() {
        let (mut enforcement, truth) = (Enforcement::default(), truth());
        let (node, service, canary) = (node("a"), service(), version("v2"));
        assert!(enforcement.see(&Fact::Served(served(&node, &service, &canary, 1)), &truth).is_err());
    }

    #[test]
    fn canary_traffic_after_its_decrease_was_told_as_enforced_is_caught() {
        use aviary_core::domain::rollout::Change;
        let (mut enforcement, truth) = (Enforcement::default(), truth());
        let (a, service, canary, ballot) = (node("a"), service(), version("v2"), ballot("a", 1));
        let serves = Fact::Served(served(&a, &service, &canary, 500));
        enforcement.see(&Fact::Chosen(&change(1, Change::Start(spec())), &ballot), &truth).unwrap();
        enforcement.see(&serves, &truth).unwrap();
        enforcement.see(&Fact::Enforced(&node("b"), &service, Slot(2)), &truth).unwrap();
        assert!(enforcement.see(&serves, &truth).unwrap_err().what.contains("shows a later decrease as enforced"));
    }

    #[test]
    fn a_share_outlives_its_rollback_by_a_lease_and_no_longer() {
        use aviary_core::domain::rollout::Change;
        let (mut enforcement, mut truth) = (Enforcement::default(), truth());
        let (node, service, canary, ballot) = (node("a"), service(), version("v2"), ballot("a", 1));
        let mut at = |now, fact: &Fact| {
            truth.now = now;
            enforcement.see(fact, &truth)
        };
        let serves = Fact::Served(served(&node, &service, &canary, 500));
        at(0, &Fact::Chosen(&change(1, Change::Start(spec())), &ballot)).unwrap();
        at(60_000_000, &serves).unwrap();
        at(60_000_000, &Fact::Chosen(&change(2, Change::Rollback { reason: "bad".into() }), &ballot)).unwrap();
        at(62_000_000, &serves).unwrap();
        assert!(at(62_030_000, &serves).unwrap_err().what.contains("at most 0 bp"));
    }
}
