//! A router's way to the world: every call may fail before or after its effect, be its process's last, or take so long that
//! another router goes on meanwhile.

use std::time::Duration;

use aviary::ports::{
    Assignment, Broker, Commit, Hooks, Opened, OutsideError, RebuiltPlace, Reclaimed, SourceRecord, Topic,
};
use aviary_core::domain::router_state::HookCall;
use aviary_core::domain::side::Side;
use sim::broken;

use super::broker::Handle;
use super::life::interrupt;
use super::world::{Fault, Shared, SplitWorld, lock};

/// The broker as one router reaches it, with faults on the way.
pub struct FaultyBroker {
    world: Shared,
    who: usize,
    handle: Handle,
    /// The last call failed: `open` comes first.
    broken: bool,
}

impl FaultyBroker {
    /// Returns the broker of this router.
    pub fn new(world: &Shared, who: usize, partitions: usize) -> Self {
        Self { world: world.clone(), who, handle: Handle::new(partitions), broken: true }
    }

    fn call<T>(
        &mut self,
        name: &str,
        operation: impl FnOnce(&mut SplitWorld, &mut Handle) -> Result<T, OutsideError>,
    ) -> Result<T, OutsideError> {
        interrupt(&self.world, self.who, false);
        let mut world = lock(&self.world);
        world.happen();
        if self.broken && name != "open" {
            world.violate(broken!("contract", "{name} after an error, expected open"));
        }
        let result = match world.fault(self.who, name) {
            None => {
                let result = operation(&mut world, &mut self.handle);
                if result.is_err() && world.broker.is_fenced(&self.handle) {
                    let wrote = self.handle.has_written();
                    world.truth.saw(if wrote { "zombie fenced with records written" } else { "zombie fenced" });
                }
                result
            }
            Some(Fault::Before) => Err(OutsideError::new("broker", format!("{name} failed"))),
            Some(Fault::After) => match operation(&mut world, &mut self.handle) {
                Ok(_) => Err(OutsideError::new("broker", format!("{name} timed out"))),
                Err(error) => Err(error),
            },
        };
        self.broken = result.is_err();
        if world.words
            && let Err(error) = &result
        {
            let who = self.who;
            world.say(format!("router {who}: {name}: {error}"));
        }
        result
    }
}

impl Broker for FaultyBroker {
    fn open(&mut self) -> Result<Opened, OutsideError> {
        let who = self.who;
        self.call("open", |world, handle| {
            world.say(format!("router {who} opens"));
            world.truth.opened();
            let opened = world.broker.open(handle);
            world.routers[who].producer_epoch = handle.producer_epoch;
            Ok(opened)
        })
    }

    fn rehearse(&mut self) -> Result<(), OutsideError> {
        self.call("rehearse", |_, _| Ok(()))
    }

    fn rebuild(&mut self) -> Result<Vec<RebuiltPlace>, OutsideError> {
        self.call("rebuild", |world, _| Ok(world.broker.rebuild()))
    }

    fn entries(&mut self) -> Result<Vec<String>, OutsideError> {
        self.call("entries", |world, handle| Ok(world.broker.entries(handle)))
    }

    fn seek(&mut self, next: &[i64]) -> Result<(), OutsideError> {
        self.call("seek", |world, handle| {
            world.broker.seek(handle, next);
            Ok(())
        })
    }

    fn copy(
        &mut self,
        _wait: Duration,
        most: usize,
        held: &[bool],
        assign: &mut dyn FnMut(SourceRecord<'_>) -> Assignment,
    ) -> Result<usize, OutsideError> {
        self.call("copy", |world, handle| {
            world.now_ms += 20;
            if held.contains(&true) {
                world.truth.saw("partition held");
            }
            Ok(world.broker.copy(handle, &mut world.dice, most, held, assign))
        })
    }

    fn reclaim(
        &mut self,
        partition: usize,
        from: i64,
        until: i64,
        most: usize,
        weight_version: u64,
    ) -> Result<Reclaimed, OutsideError> {
        self.call("reclaim", |world, handle| {
            let (count, next) = world.broker.reclaim(handle, partition, (from, until), most, weight_version);
            Ok(Reclaimed { count, next })
        })
    }

    fn flush(&mut self) -> Result<Vec<[Option<i64>; 2]>, OutsideError> {
        self.call("flush", |world, handle| world.broker.flush(handle))
    }

    fn commit(&mut self, commit: &Commit) -> Result<(), OutsideError> {
        let (who, mut done) = (self.who, false);
        let result = self.call("commit", |world, handle| {
            if let Some(entry) = commit.entry.as_ref().filter(|_| world.leaves_entry()) {
                world.broker.append(handle, entry)?;
                world.truth.saw("entry left in an open transaction");
                return Err(OutsideError::new("broker", "failed in the middle of a commit"));
            }
            let transaction = world.broker.commit(handle, commit)?;
            done = true;
            if world.words {
                let entry = commit.entry.as_deref().unwrap_or_default();
                let places: Vec<_> = commit.places.iter().map(|(partition, place)| (partition, place.next)).collect();
                let wrote = &transaction.wrote;
                world.say(format!("router {who} commits {wrote:?}, places {places:?}, {:?} {entry}", commit.groups));
            }
            let known = world.routers[who].known;
            if let Err(what) = world.truth.committed(&world.broker, known, &transaction, commit) {
                world.violate(what);
            }
            Ok(())
        });
        if done && result.is_err() {
            let phase = commit.entry.as_ref().is_some_and(|entry| entry.contains("\"phase\""));
            let event = if phase { "ambiguous commit of a phase" } else { "ambiguous commit of records" };
            lock(&self.world).truth.saw(event);
        }
        result
    }

    fn members(&mut self, side: Side) -> Result<usize, OutsideError> {
        self.call("members", |world, _| {
            let of = world.services.iter().filter(|service| service.side == side);
            Ok(of.map(|service| service.members()).sum())
        })
    }

    fn reads(&mut self, side: Side, topic: Topic) -> Result<Vec<Option<i64>>, OutsideError> {
        self.call("reads", |world, _| Ok(world.broker.groups[&(side, topic)].clone()))
    }

    fn bounds(&mut self, topic: Topic) -> Result<Vec<(i64, i64)>, OutsideError> {
        self.call("bounds", |world, _| {
            Ok(world.broker.topic(topic).iter().map(|log| (log.low(), log.high())).collect())
        })
    }
}

/// Hooks of one router, which may fail before or after they take effect.
pub struct FaultyHooks {
    /// World in which the services run.
    pub world: Shared,
    /// Number of the router that calls.
    pub who: usize,
}

impl Hooks for FaultyHooks {
    fn call(&mut self, call: HookCall, side: Side, topic: Topic, number: u64) -> Result<(), OutsideError> {
        let late = lock(&self.world).late;
        if late {
            interrupt(&self.world, self.who, true);
        }
        let mut world = lock(&self.world);
        world.happen();
        let (who, words) = (self.who, format!("{} {} on {}", call.word(), side.word(), topic.word()));
        if !late && world.routers[who].producer_epoch != world.broker.producer_epoch {
            world.violate(broken!("hook", "router {who} calls {words}, and another has taken over"));
        }
        if world.defers(call, side, topic, number) {
            return Err(OutsideError::new("hook", format!("{words} takes too long")));
        }
        let fault = world.hook_fault(who);
        if fault != Some(Fault::Before) {
            world.call(call, side, topic, number);
            world.say(format!("router {who}: {words}"));
        }
        match fault {
            None => Ok(()),
            Some(_) => Err(OutsideError::new("hook", format!("{words} failed"))),
        }
    }
}
