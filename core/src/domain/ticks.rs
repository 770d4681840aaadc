//! What several sources saw, tick by tick, put together in whatever order it arrives.
//!
//! A tick sample (of one source, in one tick) counts once, however often it comes. A tick is closed when all who are
//! expected have said
//! what they saw in it, or have had time to; what comes later counts in the tick that is open then. Within that, neither
//! order nor repetition changes anything: three sources that saw a third each come to exactly what one that saw all has.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeInclusive;

use serde::{Deserialize, Serialize};

use super::window::Evidence;

/// Ticks that a source has to say what it saw.
const GRACE: u64 = 8;
/// Ticks that a tick sample may be late, and that a source may be ahead.
const MEMORY: u64 = 480;

/// Answers that one source counted in one tick.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct TickSample {
    /// The latest routing version at which some of it was observed; 0 without traffic.
    pub version: u64,
    /// Answers of both versions in the tick.
    pub evidence: Evidence,
}

impl TickSample {
    /// Adds another source's, or more of this one.
    pub fn merge(&mut self, other: &TickSample) {
        self.version = self.version.max(other.version);
        self.evidence.merge(&other.evidence);
    }
}

/// Result of adding a tick sample.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Placed {
    /// It counts in its own tick.
    InTime,
    /// Its tick was closed: it counts in the next one.
    Late,
    /// The source had reported the tick before; the sample is ignored.
    Duplicate,
    /// Too old or too far ahead to count.
    Dropped,
}

/// Ticks that aren't closed yet, of sources `S`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(bound(deserialize = "S: Ord + Deserialize<'de>"))]
pub struct TickMerger<S> {
    open: BTreeMap<u64, (TickSample, BTreeSet<S>)>,
    /// The first tick that isn't closed.
    next: u64,
    /// Ticks that each source has told of, as far back as it matters.
    told: BTreeMap<S, TickSet>,
}

/// Ticks in runs without a hole, of which there are few: the first of each, and the one after its last; ascending.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
struct TickSet(Vec<(u64, u64)>);

impl TickSet {
    /// Adds a tick; returns false when it was there.
    fn insert(&mut self, tick: u64) -> bool {
        let at = self.0.partition_point(|(_, end)| *end < tick);
        match self.0.get_mut(at) {
            Some((first, end)) if (*first..*end).contains(&tick) => return false,
            Some((_, end)) if *end == tick => *end += 1,
            Some((first, _)) if *first == tick + 1 => *first = tick,
            _ => self.0.insert(at, (tick, tick + 1)),
        }
        if let Some((first, end)) = self.0.get(at + 1).copied()
            && first == self.0[at].1
        {
            self.0[at].1 = end;
            self.0.remove(at + 1);
        }
        true
    }

    fn forget_before(&mut self, tick: u64) {
        self.0.retain(|(_, end)| *end > tick);
        if let Some((first, _)) = self.0.first_mut() {
            *first = tick.max(*first);
        }
    }

    fn next(&self) -> Option<u64> {
        self.0.last().map(|(_, end)| *end)
    }

    /// Returns true when it is as if ticks of this range had been inserted.
    fn is_sound(&self, within: &RangeInclusive<u64>) -> bool {
        let apart = self.0.windows(2).all(|runs| runs[0].1 < runs[1].0);
        apart && self.0.iter().all(|(first, end)| first < end && within.contains(first) && within.contains(&(end - 1)))
    }
}

impl<S: Ord + Clone> TickMerger<S> {
    /// Returns a tick merger that begins at this tick.
    pub fn new(first: u64) -> Self {
        Self { open: BTreeMap::new(), next: first, told: BTreeMap::new() }
    }

    /// Returns the first tick that isn't closed.
    pub fn next(&self) -> u64 {
        self.next
    }

    /// Returns true when its parts agree, as they do in every one that was built here; a peer's bytes may not.
    pub fn is_sound(&self) -> bool {
        if self.next > u64::MAX / 2 {
            return false;
        }
        let (first, last) = (self.next.saturating_sub(MEMORY), self.next + MEMORY);
        self.told.values().all(|told| told.is_sound(&(first..=last)))
            && self.open.keys().all(|tick| (self.next..=last).contains(tick))
    }

    /// Returns the tick after the last one that a source told of; the first one that isn't closed, when that is later.
    pub fn next_of(&self, source: &S) -> u64 {
        self.told.get(source).and_then(TickSet::next).map_or(self.next, |next| self.next.max(next))
    }

    /// Takes what a source saw in a tick.
    pub fn put(&mut self, source: &S, tick: u64, tick_sample: &TickSample) -> Placed {
        if tick + MEMORY < self.next || tick > self.next + MEMORY {
            return Placed::Dropped;
        }
        let told = self.told.entry(source.clone()).or_default();
        if !told.insert(tick) {
            return Placed::Duplicate;
        }
        let (merged, sources) = self.open.entry(tick.max(self.next)).or_default();
        merged.merge(tick_sample);
        if tick >= self.next {
            sources.insert(source.clone());
            Placed::InTime
        } else {
            Placed::Late
        }
    }

    /// Closes the next tick, if it can be closed at the beginning of tick `now`; returns its number, and what all saw.
    pub fn close<'s>(&mut self, now: u64, mut expected: impl Iterator<Item = &'s S>) -> Option<(u64, TickSample)>
    where
        S: 's,
    {
        if now > self.next + MEMORY {
            return self.wake(now);
        }
        let told = |source: &S| self.open.get(&self.next).is_some_and(|(_, sources)| sources.contains(source));
        if now <= self.next || (now <= self.next + GRACE && !expected.all(told)) {
            return None;
        }
        let tick_sample = self.open.remove(&self.next).map(|(tick_sample, _)| tick_sample).unwrap_or_default();
        Some((self.pass(self.next), tick_sample))
    }

    /// Closes the next tick without waiting for anybody, because nobody looked until tick `now`; once nothing is open any more, all
    /// that are left are closed as one, whose number is the last one's.
    pub fn wake(&mut self, now: u64) -> Option<(u64, TickSample)> {
        if now <= self.next {
            return None;
        }
        let tick = if self.open.is_empty() { now - 1 } else { self.next };
        let tick_sample = self.open.remove(&tick).map(|(tick_sample, _)| tick_sample).unwrap_or_default();
        Some((self.pass(tick), tick_sample))
    }

    fn pass(&mut self, tick: u64) -> u64 {
        self.next = tick + 1;
        self.told.retain(|_, told| {
            told.forget_before(self.next.saturating_sub(MEMORY));
            told.next().is_some()
        });
        tick
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn tick_sample(canary: u64) -> TickSample {
        let mut tick_sample = TickSample { version: canary, ..TickSample::default() };
        (0..canary).for_each(|i| tick_sample.evidence.canary.record(1_000 * i, i % 3 == 0));
        tick_sample
    }

    #[test]
    fn a_tick_waits_for_all_who_are_expected_but_not_for_ever() {
        let mut ticks = TickMerger::new(10);
        let close = |ticks: &mut TickMerger<u8>, now| {
            ticks.close(now, [1, 2].iter()).map(|(tick, tick_sample)| (tick, tick_sample.version))
        };
        assert_eq!(ticks.put(&1, 10, &tick_sample(3)), Placed::InTime);
        assert_eq!(close(&mut ticks, 11), None);
        assert_eq!(ticks.put(&2, 10, &tick_sample(5)), Placed::InTime);
        assert_eq!(close(&mut ticks, 10), None, "not over yet");
        assert_eq!(close(&mut ticks, 11), Some((10, 5)));
        assert_eq!(ticks.put(&2, 10, &tick_sample(5)), Placed::Duplicate);
        assert_eq!(ticks.put(&1, 11, &tick_sample(1)), Placed::InTime);
        assert_eq!(close(&mut ticks, 19), None);
        assert_eq!(close(&mut ticks, 20), Some((11, 1)), "source 2 had its time");
        assert_eq!(ticks.put(&2, 11, &tick_sample(7)), Placed::Late);
        assert_eq!(ticks.put(&2, 11, &tick_sample(7)), Placed::Duplicate);
        assert_eq!(close(&mut ticks, 21), Some((12, 7)));
        assert_eq!(ticks.put(&2, 10_000, &tick_sample(7)), Placed::Dropped);
        assert_eq!(close(&mut ticks, 5_000), Some((4_999, 0)), "time that was slept through is one tick");
        assert_eq!(ticks.put(&2, 13, &tick_sample(7)), Placed::Dropped);
        assert_eq!(ticks.told.len(), 0, "nothing is remembered for ever");
    }

    proptest! {
        #[test]
        fn runs_hold_what_a_set_holds(ticks in prop::collection::vec((0u64..40, 0u64..30), 1..60)) {
            let (mut told, mut set) = (TickSet::default(), BTreeSet::new());
            for (tick, forgotten) in ticks {
                let tick = tick + forgotten;
                prop_assert_eq!(told.insert(tick), set.insert(tick));
                told.forget_before(forgotten / 2);
                set = set.split_off(&(forgotten / 2));
                let held: Vec<u64> = told.0.iter().flat_map(|(first, end)| *first..*end).collect();
                prop_assert_eq!(held, set.iter().copied().collect::<Vec<_>>());
                prop_assert!(told.is_sound(&(0..=100)), "{:?}", told);
            }
        }

        #[test]
        fn order_and_repetition_change_nothing(
            tick_samples in prop::collection::vec((0u8..3, 0u64..6, 0u64..9), 1..40),
            swaps in prop::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>()), 0..80),
        ) {
            let unique: BTreeMap<(u8, u64), u64> = tick_samples.iter().map(|(source, tick, n)| ((*source, *tick), *n)).collect();
            let mut shuffled: Vec<_> = unique.iter().chain(unique.iter()).collect();
            for (a, b) in swaps {
                let (a, b) = (a.index(shuffled.len()), b.index(shuffled.len()));
                shuffled.swap(a, b);
            }
            let (mut one, mut three) = (TickMerger::new(0), TickMerger::new(0));
            for ((source, tick), n) in shuffled {
                three.put(source, *tick, &tick_sample(*n));
            }
            for tick in 0..6 {
                let mut all = TickSample::default();
                unique.iter().filter(|((_, at), _)| *at == tick).for_each(|(_, n)| all.merge(&tick_sample(*n)));
                one.put(&9, tick, &all);
            }
            for tick in 0..6 {
                prop_assert_eq!(one.close(tick + 20, [].iter()), three.close(tick + 20, [].iter()));
            }
        }
    }
}
