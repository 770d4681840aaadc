//! A sliding window of statistics for the two versions of one service, in one-second buckets.

use std::collections::VecDeque;

use super::stats::{Counts, Stats};
use super::time::Mono;

/// What one service's two versions did: the evidence that gates and verdicts judge.
#[derive(Debug, Clone, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
pub struct Evidence {
    /// The stable version's answers.
    pub stable: Stats,
    /// The canary's answers.
    pub canary: Stats,
}

impl Evidence {
    /// Returns true when its parts agree; a peer's bytes may not.
    pub fn is_consistent(&self) -> bool {
        self.stable.is_consistent() && self.canary.is_consistent()
    }

    /// Adds another node's or another second's evidence.
    pub fn merge(&mut self, other: &Evidence) {
        self.stable += &other.stable;
        self.canary += &other.canary;
    }
}

/// A counter of both versions' answers.
#[derive(Debug, Clone, Default)]
pub struct Tally {
    /// The stable version's.
    pub stable: Counts,
    /// The canary's.
    pub canary: Counts,
}

impl Tally {
    /// Returns what was counted since the last call.
    pub fn take(&mut self) -> Evidence {
        Evidence { stable: self.stable.take(), canary: self.canary.take() }
    }
}

/// The last seconds of evidence at one routing version.
///
/// It begins empty whenever the weight changes, so that a step is judged by what happened at that step.
#[derive(Debug, Clone, Default)]
pub struct Window {
    seconds: VecDeque<(u64, Evidence)>,
}

impl Window {
    /// Adds evidence observed at `at`.
    pub fn add(&mut self, at: Mono, evidence: &Evidence) {
        let second = at.0 / 1_000_000;
        match self.seconds.back_mut() {
            Some((last, bucket)) if *last >= second => bucket.merge(evidence),
            _ => self.seconds.push_back((second, evidence.clone())),
        }
    }

    /// Drops what is older than `span_ms` before `now`.
    pub fn expire(&mut self, now: Mono, span_ms: u64) {
        let first = now.before_ms(span_ms).0 / 1_000_000;
        while self.seconds.front().is_some_and(|(second, _)| *second < first) {
            self.seconds.pop_front();
        }
    }

    /// Returns everything in the window, merged.
    pub fn total(&self) -> Evidence {
        let mut total = Evidence::default();
        self.seconds.iter().for_each(|(_, bucket)| total.merge(bucket));
        total
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
}
