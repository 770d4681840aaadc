//! What people and programs around the routers do: they write to the topics, ask for weights and ends, and read.

use aviary::ports::Topic;
use aviary::router::engine::{CommittedWeight, Steering};
use aviary_core::domain::router_state::{ControlCommand, ControlEntry, RouterEnd};
use aviary_core::domain::side::Side;
use aviary_core::domain::weights::Weight;

use super::super::log::Fate;
use super::super::truth::KnownRecord;
use super::{SplitWorld, weight};

/// Keys of records; few, so that each has many.
pub const KEYS: [&[u8]; 12] = [b"a", b"b", b"", b"c", b"d", b"e", b"f", b"g", b"h", b"i", b"j", b"k"];

impl SplitWorld {
    /// Lets everything else go on for a moment.
    pub fn happen(&mut self) {
        self.now_ms += self.dice.between(0, 10);
        self.catch_up();
        if self.dice.chance(self.rates.emit) {
            for _ in 0..self.dice.between(1, 4).min(self.quota) {
                self.quota -= 1;
                self.emit();
            }
        }
        for service in 0..self.services.len() {
            let service = &mut self.services[service];
            service.tick(&mut self.broker, &mut self.dice, self.now_ms);
            if service.runs() && self.dice.chance(self.rates.work) {
                match service.work(&mut self.broker, &mut self.truth, &mut self.dice) {
                    Ok(_) => {}
                    Err(violation) => self.violate(violation),
                }
            }
        }
        self.truth.look(&self.broker, self.now_ms);
        if self.faulty {
            self.chance();
        }
    }

    /// What people and machines do out of nowhere.
    fn chance(&mut self) {
        if !self.emitters.is_empty() && self.dice.chance(1000) {
            self.end_emitter();
        }
        if self.dice.chance(self.rates.ask) {
            self.change_weight();
        }
        if self.dice.chance(self.rates.end) {
            self.send_end();
        }
        if self.committed.is_some() && self.dice.chance(if self.lease { self.rates.lease } else { 500 }) {
            self.lease = !self.lease;
            if !self.lease {
                self.truth.saw("lease lost");
            }
        }
        if self.dice.chance(self.rates.unavailable) {
            self.unavailable_until_ms = self.now_ms + self.dice.between(1, 300);
        }
    }

    /// Appends a record to the source, sometimes in an emitter's transaction.
    pub fn emit(&mut self) {
        let partition = self.dice.below(self.partitions());
        let key = (!self.dice.chance(1500)).then(|| KEYS[self.dice.below(self.keys)]);
        let transaction = match self.dice.between(0, 9) {
            0 if self.faulty && self.emitters.len() < 2 => {
                let number = self.broker.begin();
                self.emitters.push(number);
                Some(number)
            }
            0..3 => self.emitters.last().copied(),
            _ => None,
        };
        if transaction.is_some() {
            self.truth.saw("uncommitted records in the source");
        }
        self.broker.emit(partition, key, transaction);
    }

    fn end_emitter(&mut self) {
        let number = self.emitters.swap_remove(self.dice.below(self.emitters.len()));
        let fate = if self.dice.chance(5000) { Fate::Committed } else { Fate::Aborted };
        if fate == Fate::Aborted {
            self.truth.saw("aborted records in the source");
        }
        self.broker.end(number, fate);
    }

    fn send(&mut self, command: ControlCommand) {
        self.say(format!("an operator sends {command:?}"));
        let line = serde_json::to_string(&ControlEntry::Command(command)).expect("an entry has a text");
        self.broker.control.append(line, None);
    }

    fn change_weight(&mut self) {
        let weight = weight(&mut self.dice);
        let by_hand = self.dice.chance(2000);
        match &mut self.committed {
            Some(_) if by_hand => self.send(ControlCommand::SetWeight { weight }),
            Some(committed) => {
                (committed.weight, committed.weight_version) = (weight, committed.weight_version + 1);
                self.truth.asked(weight);
                self.say(format!("the cluster agrees on {weight}"));
            }
            None => {
                self.truth.asked(weight);
                self.send(ControlCommand::SetWeight { weight });
            }
        }
    }

    /// Requests a promotion or an abort, by hand or through the cluster.
    pub fn send_end(&mut self) {
        let end = match self.dice.chance(5000) {
            true => RouterEnd::Promote,
            false => RouterEnd::Abort("chance".into()),
        };
        if end == RouterEnd::Promote {
            self.truth.asked(Weight::FULL);
        }
        let by_hand = self.dice.chance(2000);
        match &mut self.committed {
            Some(committed) if !by_hand => {
                if committed.end.is_none() {
                    self.truth.saw("cluster's end taken over");
                    committed.end = Some(end);
                }
            }
            Some(_) | None => self.send(match end {
                RouterEnd::Promote => ControlCommand::Promote,
                RouterEnd::Abort(reason) => ControlCommand::Abort { reason },
            }),
        }
    }

    /// Says what a router that is turned now is told.
    pub fn steering(&self) -> Steering {
        match &self.committed {
            None => Steering::Alone,
            Some(committed) => Steering::Cluster(self.lease.then(|| committed.clone())),
        }
    }

    /// Returns the weight that the routers are to come to.
    pub fn wanted(&self) -> Weight {
        let asked = self.control().filter_map(|entry| match entry {
            ControlEntry::Command(ControlCommand::SetWeight { weight }) => Some(weight),
            _ => None,
        });
        match &self.committed {
            Some(committed) => committed.weight,
            None => asked.last().unwrap_or(self.plan.weight),
        }
    }

    fn control(&self) -> impl Iterator<Item = ControlEntry> {
        let visible =
            (0..self.broker.control.stable()).filter_map(|at| self.broker.control.get(&self.broker.fates, at));
        visible.map(|line| serde_json::from_str(line).expect("entries come back"))
    }

    /// Returns whether the cluster's rollout was rolled back.
    pub fn is_rolled_back(&self) -> bool {
        matches!(&self.committed, Some(CommittedWeight { end: Some(RouterEnd::Abort(_)), .. }))
    }

    /// Returns what a router that is turned now knows; its clock and its plan are its own.
    pub fn known(&self) -> KnownRecord {
        let steering = self.steering();
        let committed =
            matches!(&steering, Steering::Cluster(Some(CommittedWeight { end: Some(RouterEnd::Abort(_)), .. })));
        let aborted = committed
            || self.control().any(|entry| matches!(entry, ControlEntry::Command(ControlCommand::Abort { .. })));
        KnownRecord {
            blind: steering == Steering::Cluster(None),
            aborted,
            world_ms: self.now_ms,
            ..KnownRecord::default()
        }
    }

    /// Ends everything that goes wrong.
    pub fn heal(&mut self) {
        (self.faulty, self.lease, self.unavailable_until_ms) = (false, true, 0);
        while !self.emitters.is_empty() {
            self.end_emitter();
        }
    }

    /// Ends the emission: emitters append nothing more.
    pub fn quiet(&mut self) {
        self.quota = 0;
    }

    /// Emits some more committed records.
    pub fn emit_last(&mut self) {
        for _ in 0..20 {
            let partition = self.dice.below(self.partitions());
            self.broker.emit(partition, Some(KEYS[0]), None);
        }
    }

    /// Returns what is still to be done in a run that has no end.
    pub fn unsettled(&self) -> Option<String> {
        let wanted = self.wanted();
        self.truth.splits.iter().enumerate().find_map(|(partition, split)| {
            let Some((split, next)) = split else { return Some(format!("partition {partition} has no place")) };
            let (weight, _) = split.weight();
            if self.broker.next(Topic::Source, partition, *next).is_some() {
                return Some(format!("partition {partition} has records that nobody took"));
            }
            (weight != wanted || split.former().is_some()).then(|| {
                format!(
                    "partition {partition} has weight {weight}, expected {wanted}, and waits for {:?}",
                    split.former()
                )
            })
        })
    }

    /// Does what an error asks an operator for.
    pub fn operate(&mut self, error: &str) {
        if !error.contains("has no place in partition") {
            return;
        }
        self.truth.saw("place set by an operator");
        let lows: Vec<i64> = self.broker.topic(Topic::Source).iter().map(|log| log.low()).collect();
        let group = self.broker.groups.get_mut(&(Side::Stable, Topic::Source)).expect("it is known");
        for (next, low) in group.iter_mut().zip(lows) {
            next.get_or_insert(low);
        }
    }
}
