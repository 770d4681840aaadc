//! The analysis run of one canary: what all nodes saw goes in, tick by tick; window verdicts with what they rest on
//! come out.
//!
//! A node, `aviary judge` and `aviary replay` run this same code. Two nodes with the same tick samples come to the
//! same window verdicts.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::analysis::Analysis;
use super::classes::ErrorClasses;
use super::sequential::{ClassComparison, Policy, Sequential, SequentialResult, SequentialVerdict};
use super::stats::Stats;
use super::ticks::{Placed, TickMerger, TickSample};
use super::verdict::Verdict;
use super::window::Evidence;

/// One version's answers in a few numbers.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
pub struct AnswerSummary {
    /// Number of answers, errors among them.
    pub count: u64,
    /// Number of answers that were errors.
    pub errors: u64,
    /// Median latency of the other answers, in milliseconds; none without such answers.
    pub p50_ms: Option<f64>,
    /// 95th percentile of the same latencies, in milliseconds.
    pub p95_ms: Option<f64>,
    /// 99th percentile of the same latencies, in milliseconds.
    pub p99_ms: Option<f64>,
}

impl From<&Stats> for AnswerSummary {
    fn from(stats: &Stats) -> Self {
        let quantile = |q| stats.quantile_ms(q);
        let [p50_ms, p95_ms, p99_ms] = [0.5, 0.95, 0.99].map(quantile);
        Self { count: stats.count, errors: stats.errors, p50_ms, p95_ms, p99_ms }
    }
}

/// Numbers behind a SEQUENTIAL verdict.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct SequentialEvidence {
    /// Evidence that the canary is worse, as an e-value; 1.0 is none.
    pub e_value: f64,
    /// E-value at which the canary is rolled back: 1/α.
    pub bound: f64,
    /// E-value of the bets on errors alone; 1 without evidence.
    pub e_errors: f64,
    /// E-value of the bets on latency alone; 1 without evidence.
    pub e_latency: f64,
    /// Part of α that was spent on bets so far, 0.0 to α.
    pub alpha_spent: f64,
}

/// Verdict of a window or of the comparison, with its evidence.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct WindowVerdict {
    /// Start, in milliseconds since the rollout's start.
    pub from_ms: u64,
    /// End (exclusive), in milliseconds since the rollout's start.
    pub to_ms: u64,
    /// What the analysis concluded from these answers.
    pub verdict: Verdict,
    /// The stable version's answers in that time.
    pub stable: AnswerSummary,
    /// The canary's answers in that time.
    pub canary: AnswerSummary,
    /// SEQUENTIAL's reckoning; none where it was THRESHOLD's alone.
    pub sequential: Option<SequentialEvidence>,
    /// True for a closed window's, of which there is one each; false where SEQUENTIAL came to another verdict within a window.
    pub is_window: bool,
}

// No figure in it is ever NaN.
impl Eq for WindowVerdict {}

impl WindowVerdict {
    /// Returns what is said of time that nobody looked at, or of which only a part was seen.
    pub fn unseen(from_ms: u64, to_ms: u64) -> Self {
        Self {
            from_ms,
            to_ms,
            verdict: Verdict::Hold("nobody saw the whole of it".into()),
            stable: AnswerSummary::default(),
            canary: AnswerSummary::default(),
            sequential: None,
            is_window: true,
        }
    }

    /// Returns true when every figure is a number.
    pub fn is_finite(&self) -> bool {
        let latencies = [&self.stable, &self.canary].map(|summary| [summary.p50_ms, summary.p95_ms, summary.p99_ms]);
        let sequential = self.sequential.map(|sequential| {
            [sequential.e_value, sequential.bound, sequential.e_errors, sequential.e_latency, sequential.alpha_spent]
        });
        latencies.as_flattened().iter().flatten().chain(sequential.iter().flatten()).all(|figure| figure.is_finite())
    }
}

/// Analysis of one rollout's canary. `S` names the sources: nodes, or one for a recording.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(bound(deserialize = "S: Ord + Deserialize<'de>"))]
pub struct AnalysisRun<S> {
    analysis: Analysis,
    tick_ms: u64,
    ticks: TickMerger<S>,
    /// When it began to be looked at, in milliseconds since the rollout's start.
    began_ms: u64,
    /// Windows that began before this weren't seen whole.
    whole_from_ms: u64,
    version: u64,
    total: Evidence,
    /// Of the window that is open.
    window: Evidence,
    /// Verdict of the last closed window.
    closed: Option<Verdict>,
    /// Several kilobytes, where there is one.
    sequential: Option<Box<Sequential>>,
    result: Option<SequentialResult>,
    /// The canary's weights, by the routing versions that they came with: the last few.
    #[serde(skip)]
    weights: BTreeMap<u64, f64>,
}

/// Weights that are kept: samples of earlier routing versions don't count any more.
const WEIGHTS_MAX: usize = 4;

// No figure in it is ever NaN.
impl<S: Eq> Eq for AnalysisRun<S> {}

impl<S: Ord + Clone> AnalysisRun<S> {
    /// Returns an analysis run by these limits and this comparison, in ticks of `tick_ms`, from `at_ms` after the
    /// rollout's start on.
    pub fn new(analysis: Analysis, policy: Option<Policy>, tick_ms: u64, at_ms: u64) -> Self {
        let first = at_ms / tick_ms;
        Self {
            tick_ms,
            ticks: TickMerger::new(first),
            began_ms: first * tick_ms,
            whole_from_ms: first * tick_ms,
            version: 0,
            total: Evidence::default(),
            window: Evidence::default(),
            closed: None,
            sequential: policy.map(Sequential::new).map(Box::new),
            result: None,
            weights: BTreeMap::new(),
            analysis,
        }
    }

    /// Returns true when its parts agree, as they do in every one that was built here; a peer's bytes may not.
    pub fn is_sound(&self) -> bool {
        let finite = |found: &SequentialResult| {
            let figures = [found.e, found.e_errors, found.e_latency, found.alpha_spent];
            figures.iter().chain(&found.promotion).all(|figure| figure.is_finite())
        };
        self.ticks.is_sound()
            && self.tick_ms > 0
            && self.began_ms <= self.whole_from_ms
            && (self.ticks.next() + 1).checked_mul(self.tick_ms).is_some_and(|next_ms| self.whole_from_ms <= next_ms)
            && self.sequential.as_ref().is_none_or(|sequential| sequential.is_sound())
            && self.result.as_ref().is_none_or(finite)
    }

    /// Returns true when the other one is by the same limits, the same comparison and the same ticks.
    pub fn is_like(&self, other: &Self) -> bool {
        let policy = |run: &Self| run.sequential.as_ref().map(|test| test.policy().clone());
        self.analysis == other.analysis && self.tick_ms == other.tick_ms && policy(self) == policy(other)
    }

    /// Chooses the classes of statuses that SEQUENTIAL compares beside errors; none before the first call.
    pub fn compare_classes(&mut self, classes: ErrorClasses) {
        if let Some(test) = &mut self.sequential {
            test.compare_classes(classes);
        }
    }

    /// Says what share of the requests the canary's weight gives it from a routing version on, 0.0 to 1.0.
    pub fn weigh(&mut self, version: u64, weight: f64) {
        self.weights.insert(version, weight);
        while self.weights.len() > WEIGHTS_MAX {
            self.weights.pop_first();
        }
    }

    /// Returns SEQUENTIAL's comparison of classes; none where it compares nothing.
    pub fn classes(&self) -> Option<&ClassComparison> {
        self.sequential.as_ref().map(|test| test.classes())
    }

    /// Goes on with another node's comparison of classes.
    pub fn set_classes(&mut self, classes: ClassComparison) {
        if let Some(test) = &mut self.sequential {
            test.set_classes(classes);
        }
    }

    /// Returns the tick after the last one that a source told of; the first one that isn't closed, when that is later.
    pub fn next_of(&self, source: &S) -> u64 {
        self.ticks.next_of(source)
    }

    /// Returns the length of a tick, in milliseconds.
    pub fn tick_ms(&self) -> u64 {
        self.tick_ms
    }

    /// Returns the first tick that isn't closed.
    pub fn next_tick(&self) -> u64 {
        self.ticks.next()
    }

    /// Goes on at `at_ms` after the start, until when nobody looked, and what was seen lately may be lost; returns what was
    /// decided by what is left.
    pub fn wake(&mut self, at_ms: u64) -> Vec<WindowVerdict> {
        let (mut window_verdicts, mut next) = (Vec::new(), self.ticks.next());
        while let Some((tick, tick_sample)) = self.ticks.wake(at_ms / self.tick_ms) {
            self.take(next, tick, &tick_sample, &mut window_verdicts);
            next = tick + 1;
        }
        self.nobody_looked_until(at_ms.next_multiple_of(self.tick_ms));
        window_verdicts
    }

    fn nobody_looked_until(&mut self, at_ms: u64) {
        self.whole_from_ms = self.whole_from_ms.max(at_ms);
    }

    /// Returns the canary's answers in the whole rollout.
    pub fn canary_answers(&self) -> u64 {
        self.total.canary.count
    }

    /// Returns the latest routing version of what was compared; 0 before there was any traffic.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// Takes what a source saw in a tick.
    pub fn put(&mut self, source: &S, tick: u64, tick_sample: &TickSample) -> Placed {
        self.ticks.put(source, tick, tick_sample)
    }

    /// Closes all ticks that can be closed at `at_ms` after the start, when these sources are expected; returns what was
    /// decided by them: every closed window once, and every change of SEQUENTIAL's verdict.
    pub fn advance<'s>(&mut self, at_ms: u64, expected: impl Iterator<Item = &'s S> + Clone) -> Vec<WindowVerdict>
    where
        S: 's,
    {
        let mut window_verdicts = Vec::new();
        let mut next = self.ticks.next();
        while let Some((tick, tick_sample)) = self.ticks.close(at_ms / self.tick_ms, expected.clone()) {
            self.take(next, tick, &tick_sample, &mut window_verdicts);
            next = tick + 1;
        }
        window_verdicts
    }

    /// Takes what was seen from tick `from` on; beyond that one it was slept through.
    fn take(&mut self, from: u64, tick: u64, tick_sample: &TickSample, window_verdicts: &mut Vec<WindowVerdict>) {
        let (from_ms, to_ms) = (from * self.tick_ms, (tick + 1) * self.tick_ms);
        if tick > from {
            self.nobody_looked_until(to_ms);
        }
        self.total.merge(&tick_sample.evidence);
        self.window.merge(&tick_sample.evidence);
        self.compare(to_ms, tick_sample, window_verdicts);
        let length = self.analysis.window_ms;
        let end_ms = (from_ms / length + 1) * length;
        if to_ms >= end_ms {
            self.close_window(end_ms, window_verdicts);
        }
    }

    fn compare(&mut self, to_ms: u64, tick_sample: &TickSample, window_verdicts: &mut Vec<WindowVerdict>) {
        let Some(test) = &mut self.sequential else { return };
        if tick_sample.version > self.version {
            if self.version > 0 {
                test.weight_changed();
            }
            self.version = tick_sample.version;
        }
        test.expect_weight(self.weights.get(&self.version).copied());
        let found = test.advance(to_ms - self.began_ms, &tick_sample.evidence);
        let before = self.result.replace(found).map(|found| found.decision);
        if before != self.result.as_ref().map(|found| found.decision) {
            window_verdicts.extend(self.compared(to_ms));
        }
    }

    fn close_window(&mut self, to_ms: u64, window_verdicts: &mut Vec<WindowVerdict>) {
        let window = std::mem::take(&mut self.window);
        let from_ms = to_ms - self.analysis.window_ms;
        let (stable, canary) = ((&window.stable).into(), (&window.canary).into());
        if from_ms < self.whole_from_ms {
            window_verdicts.push(WindowVerdict { stable, canary, ..WindowVerdict::unseen(from_ms, to_ms) });
            return;
        }
        self.closed = Some(self.analysis.judge(&window));
        let (verdict, sequential) = (self.overall(), self.sequential());
        window_verdicts.push(WindowVerdict { from_ms, to_ms, verdict, stable, canary, sequential, is_window: true });
    }

    /// Returns what the last closed window and the comparison say at the moment, the worse of the two.
    pub fn overall(&self) -> Verdict {
        let open = || Verdict::Hold("the first window is open".into());
        let limits = self.analysis.has_limits().then(|| self.closed.clone().unwrap_or_else(open));
        let compared =
            self.sequential.is_some().then(|| self.verdict().unwrap_or_else(|| Verdict::Hold(String::new())));
        limits.into_iter().chain(compared).reduce(Verdict::or_worse).unwrap_or(Verdict::Promote)
    }

    /// Returns what the comparison with stable says at the moment; none without one, or before the first tick is closed.
    pub fn verdict(&self) -> Option<Verdict> {
        let (test, found) = (self.sequential.as_ref()?, self.result.as_ref()?);
        let why = test.reason(found);
        Some(match found.decision {
            SequentialVerdict::Promote => Verdict::Promote,
            SequentialVerdict::Hold => Verdict::Hold(why),
            SequentialVerdict::Pause => Verdict::Pause(why),
            SequentialVerdict::Rollback => Verdict::Rollback(why),
        })
    }

    /// Returns the comparison's reckoning at the moment.
    pub fn sequential(&self) -> Option<SequentialEvidence> {
        let (test, found) = (self.sequential.as_ref()?, self.result.as_ref()?);
        Some(SequentialEvidence {
            e_value: found.e,
            bound: 1.0 / test.policy().alpha,
            e_errors: found.e_errors,
            e_latency: found.e_latency,
            alpha_spent: found.alpha_spent,
        })
    }

    /// Returns what the comparison found last.
    pub fn result(&self) -> Option<(&Policy, &SequentialResult)> {
        Some((self.sequential.as_ref()?.policy(), self.result.as_ref()?))
    }

    fn compared(&self, to_ms: u64) -> Option<WindowVerdict> {
        Some(WindowVerdict {
            from_ms: self.began_ms,
            to_ms,
            verdict: self.verdict()?,
            stable: (&self.total.stable).into(),
            canary: (&self.total.canary).into(),
            sequential: self.sequential(),
            is_window: false,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns an analysis run by limits alone, in windows of a minute.
    fn by_the_minute() -> AnalysisRun<u8> {
        AnalysisRun::new(Analysis { window_ms: 60_000, min_samples: 1, ..Analysis::default() }, None, 250, 0)
    }

    fn failing() -> TickSample {
        let mut tick_sample = TickSample { version: 1, evidence: Evidence::default() };
        (0..100).for_each(|_| tick_sample.evidence.canary.record(1_000, true));
        tick_sample
    }

    #[test]
    fn time_that_was_slept_through_ends_the_window_that_it_began_in() {
        let mut run = by_the_minute();
        for tick in 0..300 {
            run.put(&1, tick, &TickSample::default());
            run.advance((tick + 1) * 250, [1].iter());
        }
        run.put(&1, 300, &failing());
        let slept: Vec<_> = run.advance(600_000 + 1_000, [1].iter());
        let told = |window_verdict: &WindowVerdict| {
            (window_verdict.from_ms, window_verdict.verdict.word(), window_verdict.canary.count)
        };
        assert_eq!(
            slept.iter().map(told).collect::<Vec<_>>(),
            [(60_000, "HOLD", 100)],
            "in its own window, not seen whole"
        );
        for tick in 2_404..=2_880 {
            run.put(&1, tick, &TickSample::default());
        }
        let after = run.advance(720_000 + 250, [1].iter());
        assert_eq!(after.iter().map(told).collect::<Vec<_>>(), [(600_000, "HOLD", 0), (660_000, "HOLD", 0)]);
        assert_eq!(after[0].verdict.reason(), "nobody saw the whole of it");
        assert_ne!(after[1].verdict.reason(), "nobody saw the whole of it");
    }
}
