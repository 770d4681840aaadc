//! I8: a node serves at most what the newest record it learned allows.

use std::collections::{BTreeMap, BTreeSet};

use aviary_core::domain::ids::{NodeId, ServiceId};
use aviary_core::domain::plan::OnPartition;

use super::Invariant;
use crate::truth::{Courses, Fact, Truth};

/// I8.
#[derive(Default)]
pub struct Ceiling {
    learned: BTreeMap<NodeId, Courses>,
    braked: BTreeSet<(NodeId, ServiceId)>,
}

impl Invariant for Ceiling {
    fn name(&self) -> &'static str {
        "I8 ceiling"
    }

    fn see(&mut self, fact: &Fact, _: &Truth) -> Result<(), String> {
        match fact {
            Fact::Started(node, log) => {
                let mut courses = Courses::default();
                for chosen in *log {
                    courses.follow(&chosen.record, !chosen.is_in_doubt())?;
                }
                self.learned.insert((*node).clone(), courses);
                self.braked.retain(|(braked, _)| braked != *node);
                Ok(())
            }
            Fact::Appended(node, chosen) => {
                if let Some(service) = chosen.record.intent.operation.service() {
                    self.braked.remove(&((*node).clone(), service.clone()));
                }
                self.learned.entry((*node).clone()).or_default().follow(&chosen.record, !chosen.is_in_doubt())
            }
            Fact::LocalHold(node, service) => {
                self.braked.insert(((*node).clone(), (*service).clone()));
                Ok(())
            }
            Fact::Served(served) if served.bp > 0 => {
                let (node, bp) = (served.node, served.bp);
                let courses = self.learned.get(node).ok_or("serves before it started")?;
                let ceiling = courses.now.get(served.service).map_or(0, |course| course.ceiling.max(course.in_doubt));
                if bp > ceiling {
                    return Err(format!(
                        "{node} serves {bp} bp of {}, its newest record allows {ceiling}",
                        served.service
                    ));
                }
                if courses.cordoned.contains(node) {
                    return Err(format!("{node} serves {bp} bp though it knows itself benched"));
                }
                if !served.leased && served.on_partition == OnPartition::Stable {
                    return Err(format!("{node} serves {bp} bp of {} without needing a lease", served.service));
                }
                if self.braked.contains(&(node.clone(), served.service.clone())) {
                    return Err(format!("{node} serves {bp} bp of {} after it braked", served.service));
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
    fn canary_traffic_without_any_record_is_caught() {
        let (mut ceiling, truth) = (Ceiling::default(), truth());
        ceiling.see(&Fact::Started(&node("a"), &[genesis()]), &truth).unwrap();
        let (node, service, canary) = (node("a"), service(), version("v2"));
        assert!(ceiling.see(&Fact::Served(served(&node, &service, &canary, 1)), &truth).is_err());
        ceiling.see(&Fact::Served(served(&node, &service, &canary, 0)), &truth).unwrap();
    }
}
