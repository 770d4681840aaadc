//! Seeded bugs: the real router behind a broker or hooks that break one rule. A world that misses one of them checks nothing.
//!
//! The bugs are in the wrapper, not in the router: nothing of them is in the shipped program.

use std::time::Duration;

use aviary::ports::{
    Assignment, Broker, Commit, Hooks, Opened, OutsideError, RebuiltPlace, Reclaimed, SourceRecord, Topic,
};
use aviary_core::domain::router_state::HookCall;
use aviary_core::domain::side::Side;
use sim::Violation;

use super::faulty::{FaultyBroker, FaultyHooks};
use super::life;
use super::world::Shared;

/// A rule that a broken router, broker or service ignores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bug {
    /// Places are committed in a transaction of their own.
    Outside,
    /// A commit that failed is taken as done.
    Done,
    /// A commit that failed is done again, with its records.
    Again,
    /// The last record of a transaction isn't told.
    Short,
    /// What is written is taken as read.
    Written,
    /// An older router can go on.
    Unfenced,
    /// Records that aren't committed are copied.
    Uncommitted,
    /// What was reclaimed isn't taken off the canary's group.
    Reclaimed,
    /// The router begins one record after the committed place.
    Began,
    /// The winner begins one record before the router's place.
    Returned,
    /// A group is taken as empty.
    Members,
    /// A hook that failed is taken as done.
    Hook,
    /// Records that were read before the last start are skipped after an error.
    Sought,
}

/// All of them, in words, each with the first seed that catches it. A change that draws differently moves them:
/// `sim-router --seeded-bugs --search` finds the new ones.
pub const ALL: [(Bug, &str, u64); 13] = [
    (Bug::Outside, "places are committed outside of the records' transaction", 2),
    (Bug::Done, "a commit that failed is taken as done", 2),
    (Bug::Again, "a commit that may have been done is done again", 5),
    (Bug::Short, "the last record of a transaction isn't told", 13),
    (Bug::Written, "what is written is taken as read", 12),
    (Bug::Unfenced, "an older router isn't fenced", 2),
    (Bug::Uncommitted, "records that aren't committed are copied", 2),
    (Bug::Reclaimed, "what was reclaimed stays the canary's", 13),
    (Bug::Began, "the router begins after the first unread record", 2),
    (Bug::Returned, "the winner begins before the router's place", 7),
    (Bug::Members, "a group that has members is taken as empty", 11),
    (Bug::Hook, "a hook that failed is taken as done", 51),
    (Bug::Sought, "the router goes on reading where it was, not at its place", 6),
];

/// Runs seeds from 1 on until the bug is caught; returns the seed, and what broke.
pub fn search(bug: Bug, seeds_max: u64) -> Option<(u64, Violation)> {
    (1..=seeds_max)
        .find_map(|seed| life::run(seed, Some(bug), false, false).violation.map(|violation| (seed, violation)))
}

/// Returns what a router reaches the world by.
pub fn ports(shared: &Shared, who: usize, partitions: usize, bug: Option<Bug>) -> (Box<dyn Broker>, Box<dyn Hooks>) {
    let broker = FaultyBroker::new(shared, who, partitions);
    let hand = FaultyHooks { world: shared.clone(), who };
    match bug {
        None => (Box::new(broker), Box::new(hand)),
        Some(bug) => {
            let bent = BentBroker { broker, bug, copied: Vec::new(), partitions, sought: false };
            (Box::new(bent), Box::new(BentHooks { hand, bug }))
        }
    }
}

struct BentBroker {
    broker: FaultyBroker,
    bug: Bug,
    partitions: usize,
    /// Records copied since the last commit: partition, offset, and who got them.
    copied: Vec<(usize, i64, Assignment)>,
    sought: bool,
}

impl BentBroker {
    /// Copies the same records again, and commits.
    fn again(&mut self, commit: &Commit) -> Result<(), OutsideError> {
        self.broker.open()?;
        if let Some((_, first, _)) = self.copied.first() {
            let mut next = vec![*first; self.partitions];
            for (partition, offset, _) in self.copied.iter().rev() {
                next[*partition] = *offset;
            }
            let of = |partition: usize| self.copied.iter().filter(move |(other, ..)| *other == partition);
            self.broker.seek(&next)?;
            let mut left: Vec<_> = (0..self.partitions).map(|partition| of(partition).count()).collect();
            for _ in 0..50 {
                let held: Vec<_> = left.iter().map(|left| *left == 0).collect();
                self.broker.copy(Duration::ZERO, 1, &held, &mut |record| {
                    left[record.partition] -= 1;
                    let same =
                        self.copied.iter().find(|(at, offset, _)| (*at, *offset) == (record.partition, record.offset));
                    same.map_or(Assignment { side: Side::Stable, weight_version: 0 }, |(.., stamp)| *stamp)
                })?;
            }
        }
        self.broker.commit(commit)
    }
}

impl Broker for BentBroker {
    fn open(&mut self) -> Result<Opened, OutsideError> {
        self.copied.clear();
        self.broker.open()
    }

    fn rehearse(&mut self) -> Result<(), OutsideError> {
        self.broker.rehearse()
    }

    fn rebuild(&mut self) -> Result<Vec<RebuiltPlace>, OutsideError> {
        self.broker.rebuild()
    }

    fn entries(&mut self) -> Result<Vec<String>, OutsideError> {
        self.broker.entries()
    }

    fn seek(&mut self, next: &[i64]) -> Result<(), OutsideError> {
        match self.bug == Bug::Sought && std::mem::replace(&mut self.sought, true) {
            true => Ok(()),
            false => self.broker.seek(next),
        }
    }

    fn copy(
        &mut self,
        wait: Duration,
        most: usize,
        held: &[bool],
        assign: &mut dyn FnMut(SourceRecord<'_>) -> Assignment,
    ) -> Result<usize, OutsideError> {
        let copied = &mut self.copied;
        self.broker.copy(wait, most, held, &mut |record| {
            let stamp = assign(record);
            copied.push((record.partition, record.offset, stamp));
            stamp
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
        self.broker.reclaim(partition, from, until, most, weight_version)
    }

    fn flush(&mut self) -> Result<Vec<[Option<i64>; 2]>, OutsideError> {
        let mut written = self.broker.flush()?;
        if self.bug == Bug::Short {
            for last in written.iter_mut().flatten() {
                *last = last.map(|last| last - 1);
            }
        }
        Ok(written)
    }

    fn commit(&mut self, commit: &Commit) -> Result<(), OutsideError> {
        let mut commit = commit.clone();
        match self.bug {
            Bug::Outside if !self.copied.is_empty() => self.broker.commit(&Commit::default())?,
            Bug::Reclaimed => commit.groups.retain(|(side, topic, next)| {
                (*side, *topic) != (Side::Canary, Topic::Of(Side::Canary)) || next.iter().all(|(_, next)| *next == 0)
            }),
            Bug::Returned => {
                let source = commit.groups.iter_mut().filter(|(_, topic, _)| *topic == Topic::Source);
                source.flat_map(|(.., next)| next).for_each(|(_, next)| *next = (*next - 1).max(0));
            }
            _ => {}
        }
        let result = self.broker.commit(&commit);
        let result = match (self.bug, result) {
            (Bug::Done, Err(_)) => self.broker.open().map(drop),
            (Bug::Again, Err(_)) => self.again(&commit),
            (_, result) => result,
        };
        self.copied.clear();
        result
    }

    fn members(&mut self, side: Side) -> Result<usize, OutsideError> {
        let members = self.broker.members(side)?;
        Ok(if self.bug == Bug::Members { 0 } else { members })
    }

    fn reads(&mut self, side: Side, topic: Topic) -> Result<Vec<Option<i64>>, OutsideError> {
        let mut next = self.broker.reads(side, topic)?;
        match (self.bug, topic) {
            (Bug::Written, Topic::Of(_)) => {
                next = self.broker.bounds(topic)?.iter().map(|(_, high)| Some(*high)).collect();
            }
            (Bug::Began, Topic::Source) => next.iter_mut().flatten().for_each(|next| *next += 1),
            _ => {}
        }
        Ok(next)
    }

    fn bounds(&mut self, topic: Topic) -> Result<Vec<(i64, i64)>, OutsideError> {
        self.broker.bounds(topic)
    }
}

struct BentHooks {
    hand: FaultyHooks,
    bug: Bug,
}

impl Hooks for BentHooks {
    fn call(&mut self, call: HookCall, side: Side, topic: Topic, number: u64) -> Result<(), OutsideError> {
        match (self.bug, self.hand.call(call, side, topic, number)) {
            (Bug::Hook, Err(_)) => Ok(()),
            (_, result) => result,
        }
    }
}
