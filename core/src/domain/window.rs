//! A sliding window of statistics for the two versions of one service, in one-second buckets.

use std::collections::VecDeque;

use super::stats::{Stats, StatsCounter};
use super::time::Mono;

/// What one service's two versions did: the evidence that gates and verdicts judge. Decoding checks both (see [`Stats`]).
#[derive(Debug, Clone, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
pub struct Evidence {
    /// Answers of the stable version, from the same nodes and seconds as the canary's.
    pub stable: Stats,
    /// Answers of the canary, in the same time.
    pub canary: Stats,
}

impl Evidence {
    /// Adds another node's or another second's evidence.
    pub fn merge(&mut self, other: &Evidence) {
        self.stable += &other.stable;
        self.canary += &other.canary;
    }
}

impl Evidence {
    /// Takes away what was added before.
    fn take_away(&mut self, other: &Evidence) {
        self.stable -= &other.stable;
        self.canary -= &other.canary;
    }
}

/// A counter of both versions' answers.
#[derive(Debug, Clone, Default)]
pub struct Tally {
    /// Answers of the stable version since the last `take`.
    pub stable: StatsCounter,
    /// Answers of the canary since the last `take`.
    pub canary: StatsCounter,
}

impl Tally {
    /// Returns what was counted since the last call.
    pub fn take(&mut self) -> Evidence {
        Evidence { stable: self.stable.take(), canary: self.canary.take() }
    }
}

/// The last seconds of evidence at one routing version.
///
/// It begins empty whenever the weight changes, so that a step is judged by what happened at that step. What it costs to ask
/// doesn't depend on its length: the sum is kept.
#[derive(Debug, Clone, Default)]
pub struct Window {
    seconds: VecDeque<(u64, Evidence)>,
    total: Evidence,
}

impl Window {
    /// Adds evidence observed at `at`.
    pub fn add(&mut self, at: Mono, evidence: &Evidence) {
        let second = at.0 / 1_000_000;
        self.total.merge(evidence);
        match self.seconds.back_mut() {
            Some((last, bucket)) if *last >= second => bucket.merge(evidence),
            _ => self.seconds.push_back((second, evidence.clone())),
        }
    }

    /// Drops what is older than `span_ms` before `now`.
    pub fn expire(&mut self, now: Mono, span_ms: u64) {
        let first = now.before_ms(span_ms).0 / 1_000_000;
        while self.seconds.front().is_some_and(|(second, _)| *second < first) {
            let (_, gone) = self.seconds.pop_front().expect("a second just seen");
            self.total.take_away(&gone);
        }
    }

    /// Returns everything in the window, merged.
    pub fn total(&self) -> &Evidence {
        &self.total
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::codec;
    use proptest::prelude::*;

    fn one(errors: bool) -> Evidence {
        let mut evidence = Evidence::default();
        evidence.canary.record(1000, errors);
        evidence
    }

    #[test]
    fn evidence_older_than_the_span_is_gone() {
        let mut window = Window::default();
        window.add(Mono::from_millis(1_000), &one(true));
        window.add(Mono::from_millis(1_900), &one(false));
        window.add(Mono::from_millis(20_000), &one(false));
        window.expire(Mono::from_millis(31_500), 30_000);
        assert_eq!(window.total().canary.count, 3);
        window.expire(Mono::from_millis(32_100), 30_000);
        assert_eq!((window.total().canary.count, window.total().canary.errors), (1, 0));
    }

    #[test]
    fn evidence_with_an_unsound_half_cannot_be_decoded() {
        let parts = |count: u64| (count, 1u64, 5u64, Vec::<(u16, u32)>::new());
        let decode =
            |stable, canary| codec::decode::<Evidence>(&codec::encode(&(parts(stable), parts(canary)))).is_ok();
        assert!(decode(1, 1) && !decode(1, 2) && !decode(0, 1));
    }

    proptest! {
        #[test]
        fn the_sum_is_that_of_the_seconds_in_the_window(
            events in prop::collection::vec((0u64..4_000, 0u64..10_000_000, any::<bool>(), any::<bool>()), 1..80),
            span_ms in 1_000u64..20_000,
        ) {
            let (mut window, mut now) = (Window::default(), Mono::from_millis(0));
            for (later_ms, latency_us, error, canary) in events {
                now = now.after_ms(later_ms);
                let mut evidence = Evidence::default();
                if canary { &mut evidence.canary } else { &mut evidence.stable }.record(latency_us, error);
                window.add(now, &evidence);
                window.expire(now, span_ms);
                let mut sum = Evidence::default();
                window.seconds.iter().for_each(|(_, bucket)| sum.merge(bucket));
                prop_assert_eq!(window.total(), &sum);
            }
        }
    }
}
