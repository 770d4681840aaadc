//! I15: what serves stable is what served before the first rollout, or the canary of the last one that completed: a rollout
//! under way, its end and every way back leave stable's servers where they are.

use std::collections::BTreeMap;

use aviary_core::domain::ids::ServiceId;
use aviary_core::domain::plan::Backend;
use aviary_core::domain::rollout::{Change, Target};
use aviary_core::protocol::record::{Operation, Record, Slot};

use super::{Invariant, STABLE, Violation};
use crate::broken;
use crate::truth::{Fact, Truth};

/// What serves a service's stable, and what its rollout would put in its place.
#[derive(Clone)]
struct Expected {
    stable: Backend,
    canary: Backend,
}

/// I15: no rollout moves stable.
#[derive(Default)]
pub struct Stables {
    seen: Slot,
    now: BTreeMap<ServiceId, Expected>,
    /// What served before each increase.
    before: BTreeMap<Slot, Expected>,
    /// What may serve stable at each routing version: what it leads to, and what served before, where it may be in doubt.
    allowed: BTreeMap<(ServiceId, u64), Vec<Backend>>,
}

impl Stables {
    fn chosen(&mut self, record: &Record) -> Result<(), Violation> {
        let operation = &record.intent.operation;
        let Some((service, version)) = operation.service().zip(record.state.as_ref().map(|state| state.version)) else {
            return Ok(());
        };
        let known = self.now.get(service).cloned();
        let next = match (operation, known.clone()) {
            (Operation::Change(_, Change::Start(spec)), known) => {
                let stable = known.as_ref().map_or(&spec.stable, |known| &known.stable).clone();
                if !stable.is_same(&spec.stable) {
                    let (slot, serving, found) = (record.slot, stable.servers(), spec.stable.servers());
                    return Err(broken!(STABLE, "slot {slot} moves {service}'s stable from {serving} to {found}"));
                }
                Expected { stable, canary: spec.canary.clone() }
            }
            (Operation::Change(_, Change::Promote { to: Target::Complete, .. }), Some(known)) => {
                Expected { stable: known.canary.clone(), ..known }
            }
            (Operation::Revert { increased, .. }, Some(known)) => self.before.get(increased).cloned().unwrap_or(known),
            (_, Some(known)) => known,
            (_, None) => return Ok(()),
        };
        let allowed = self.allowed.entry((service.clone(), version)).or_default();
        allowed.push(next.stable.clone());
        if operation.increases_exposure() {
            allowed.extend(known.as_ref().map(|known| known.stable.clone()));
            self.before.extend(known.map(|known| (record.slot, known)));
        }
        self.now.insert(service.clone(), next);
        Ok(())
    }
}

impl Invariant for Stables {
    fn see(&mut self, fact: &Fact, _: &Truth) -> Result<(), Violation> {
        match fact {
            Fact::Chosen(record, _) if record.slot > self.seen => {
                self.seen = record.slot;
                self.chosen(record)
            }
            Fact::Stable { node, service, routing_version, stable } => {
                let allowed = self.allowed.get(&((*service).clone(), *routing_version)).map_or(&[][..], Vec::as_slice);
                if allowed.iter().any(|allowed| allowed.is_same(stable)) {
                    return Ok(());
                }
                let (found, expected) = (stable.servers(), allowed.iter().map(Backend::servers).collect::<Vec<_>>());
                Err(broken!(
                    STABLE,
                    "{node} serves {service}'s stable at version {routing_version} by {} at {found}, expected {expected:?}",
                    stable.version
                ))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;

    fn with_state(mut record: Record, routing_version: u64) -> Record {
        record.state = Some(routing(routing_version));
        record
    }

    #[test]
    fn a_start_that_moves_stable_and_a_node_that_serves_it_elsewhere_are_caught() {
        let (mut stables, truth) = (Stables::default(), truth());
        let start = |slot, spec| with_state(change(slot, Change::Start(spec)), slot);
        stables.see(&Fact::Chosen(&start(1, spec()), &ballot("a", 1)), &truth).unwrap();
        let (node, service) = (node("a"), service());
        let mut serves = |urls: &[&str]| {
            let stable = Backend::new(version("v1"), urls.iter().map(ToString::to_string).collect());
            stables.see(&Fact::Stable { node: &node, service: &service, routing_version: 1, stable: &stable }, &truth)
        };
        serves(&[]).unwrap();
        assert!(serves(&["http://x:1"]).unwrap_err().what.contains("at http://x:1"));
        let rollback = with_state(change(2, Change::Rollback { reason: "bad".into() }), 2);
        stables.see(&Fact::Chosen(&rollback, &ballot("a", 1)), &truth).unwrap();
        let mut moved = (**spec()).clone();
        moved.stable.urls = vec!["http://x:1".into()];
        let moved = start(3, std::sync::Arc::new(moved.checked().unwrap()));
        let error = stables.see(&Fact::Chosen(&moved, &ballot("a", 1)), &truth).unwrap_err();
        assert!(error.what.contains("moves s0's stable from no server of its own to http://x:1"), "{error}");
    }
}
