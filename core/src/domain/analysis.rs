//! From evidence to a verdict.
//!
//! THRESHOLD metrics hold the canary against a fixed limit, over a window; SEQUENTIAL ones hold it against stable, over the
//! whole rollout ([`super::sequential`]). No data and too little data hold the step; they never promote and never roll back.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::classes::ErrorClasses;
use super::limits::{self, OutOfRange};
use super::query::Query;
use super::sequential::{CLASS_SHARE, ERRORS_SHARE, Harm, Policy, Required, Slowdown};
use super::stats::Stats;
use super::verdict::{OnFailure, Verdict};
use super::window::Evidence;

/// The number of the latency distribution that a metric compares.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Statistic {
    /// Mean latency of all answers, errors included.
    Mean,
    /// The latency that this share of answers stays within, in basis points (9500 = p95).
    Quantile(u16),
}

impl fmt::Display for Statistic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Mean => f.write_str("mean"),
            Self::Quantile(bp) => write!(f, "p{}", f64::from(*bp) / 100.0),
        }
    }
}

/// The number that a metric compares, and its limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Limit {
    /// Share of errors, in basis points (500 = 5 %).
    ErrorRate {
        /// Highest error rate that is healthy, in basis points, 0 to 10000.
        max_bp: u16,
    },
    /// THRESHOLD: the latency of answers.
    Latency {
        /// Mean or quantile that is compared.
        statistic: Statistic,
        /// Highest latency that is healthy, in microseconds.
        max_us: u64,
    },
    /// SEQUENTIAL: the canary's error rate compared with stable's.
    ErrorsVsStable {
        /// Increase of the error rate that must be ruled out before a promotion, in millionths of all answers.
        increase_ppm: u32,
    },
    /// SEQUENTIAL: the canary's latency compared with stable's.
    LatencyVsStable {
        /// The quantile that a promotion looks at, in basis points.
        quantile_bp: u16,
        /// Increase of the quantile that must be ruled out before a promotion, in millionths of stable's.
        increase_ppm: u32,
    },
}

/// A metric of the rollout file, with its limit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Metric {
    /// Name from the rollout file; unique within the rollout.
    pub name: String,
    /// Limit that the canary must keep.
    pub limit: Limit,
    /// Reaction once the canary exceeds the limit.
    pub on_failure: OnFailure,
}

/// Reaction to a whole window without canary traffic.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum NoData {
    /// The step is held until there is traffic.
    Hold,
    /// The rollout is rolled back once its step is due.
    Fail,
}

/// Rules by which a rollout's canary is analysed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Analysis {
    /// Length of the sliding window, in milliseconds.
    pub window_ms: u64,
    /// Fewest canary answers that allow any verdict but hold: of THRESHOLD in the window, of SEQUENTIAL, whose evidence lasts, in
    /// the step.
    pub min_samples: u64,
    /// The metrics, all of which must hold.
    pub metrics: Vec<Metric>,
    /// Metrics that Prometheus stores, all of which must hold.
    pub queries: Vec<Query>,
    /// Reaction to a window without canary traffic.
    pub no_data: NoData,
    /// Probability of ever rolling back a canary that is no worse than stable, by SEQUENTIAL metrics, in millionths.
    pub alpha_ppm: u32,
    /// How long a due step may hold before the rollout is paused, in milliseconds; none: for ever.
    pub inconclusive_after_ms: Option<u64>,
}

/// What the comparison of a canary with stable says at the present step.
#[derive(Debug, Clone)]
pub struct StepComparison {
    /// Its verdict; Promote where there is none to make.
    pub verdict: Verdict,
    /// Whether the step has as many of the canary's answers as it needs: Hold while it hasn't.
    pub samples: Verdict,
}

impl StepComparison {
    /// There is nothing to compare.
    pub const NOTHING: Self = Self { verdict: Verdict::Promote, samples: Verdict::Promote };
}

/// Fewest canary answers that a node needs to judge by itself, without its peers' evidence.
const LOCAL_SAMPLES_MIN: u64 = 20;

impl Default for Analysis {
    /// The seed's rule: over 30 s, more than 5 % errors rolls back, a mean latency over 500 ms pauses.
    fn default() -> Self {
        let errors = Limit::ErrorRate { max_bp: 500 };
        let latency = Limit::Latency { statistic: Statistic::Mean, max_us: 500_000 };
        Self {
            window_ms: 30_000,
            min_samples: 100,
            metrics: vec![
                Metric { name: "errors".into(), limit: errors, on_failure: OnFailure::Rollback },
                Metric { name: "latency".into(), limit: latency, on_failure: OnFailure::Pause },
            ],
            queries: Vec::new(),
            no_data: NoData::Hold,
            alpha_ppm: 10_000,
            inconclusive_after_ms: None,
        }
    }
}

impl Analysis {
    /// Checks the numbers of the metrics, which peers send as well.
    pub fn check_numbers(&self) -> Result<(), OutOfRange> {
        limits::ALPHA.check(f64::from(self.alpha_ppm) / 1e6)?;
        for metric in &self.metrics {
            match metric.limit {
                Limit::ErrorsVsStable { increase_ppm } => {
                    limits::ERRORS_INCREASE.check(f64::from(increase_ppm) / 1e6)?;
                }
                Limit::LatencyVsStable { quantile_bp, increase_ppm } => {
                    limits::QUANTILE.check(f64::from(quantile_bp) / 1e4)?;
                    limits::LATENCY_INCREASE.check(f64::from(increase_ppm) / 1e6)?;
                }
                Limit::ErrorRate { max_bp } => {
                    limits::ERRORS_MAX.check(f64::from(max_bp) / 1e2)?;
                }
                Limit::Latency { max_us, .. } => {
                    limits::LATENCY_MAX.check(max_us as f64 / 1e3)?;
                }
            }
        }
        Ok(())
    }

    /// Returns the verdict on everything the cluster has seen.
    pub fn judge(&self, cluster: &Evidence) -> Verdict {
        self.judge_canary(&cluster.canary)
    }

    /// Returns the verdict on the canary's answers that the cluster has seen. Quantiles need their latencies' distribution
    /// (see [`Analysis::reads_quantiles`]).
    pub(crate) fn judge_canary(&self, canary: &Stats) -> Verdict {
        self.judge_with(canary, self.min_samples)
    }

    /// Returns true when some metric has a limit for a quantile of the latencies.
    pub(crate) fn reads_quantiles(&self) -> bool {
        let is_quantile =
            |metric: &Metric| matches!(metric.limit, Limit::Latency { statistic: Statistic::Quantile(_), .. });
        self.metrics.iter().any(is_quantile)
    }

    /// Returns the verdict on what one node has seen by itself. It needs fewer samples than the cluster's, so that one
    /// node's broken path to the canary isn't hidden by its healthy peers; it can veto, and never be enough to promote.
    pub fn judge_alone(&self, node: &Evidence) -> Verdict {
        self.judge_with(&node.canary, self.min_samples.min(LOCAL_SAMPLES_MIN))
    }

    /// Returns whether a step in which all nodes saw so many canary answers has enough of them for what is compared with stable.
    pub fn enough_in_step(&self, answers: u64) -> Verdict {
        let least = self.min_samples.max(1);
        match self.compares() && answers < least {
            true => Verdict::Hold(format!("{answers} of {least} canary samples in this step")),
            false => Verdict::Promote,
        }
    }

    /// Returns how many canary answers a second the limits need to judge at all: `minSamples` in each window; none where no
    /// metric has a fixed limit.
    pub fn rate_needed(&self) -> Option<f64> {
        self.has_limits().then(|| self.min_samples.max(1) as f64 / (self.window_ms as f64 / 1000.0))
    }

    /// Returns that so many canary answers a second never suffice for the limits; none where they do.
    pub fn never_enough(&self, answers_per_second: f64) -> Option<String> {
        let needed = self.rate_needed().filter(|needed| answers_per_second < *needed)?;
        Some(format!("needs {needed:.1} canary requests/s, sees {answers_per_second:.1}: never at this rate"))
    }

    /// Returns what is judged, in words, a line for each metric and one for the samples; SEQUENTIAL compares these classes beside
    /// errors.
    pub fn in_words(&self, compared: ErrorClasses) -> Vec<String> {
        let does = |on_failure| match on_failure {
            OnFailure::Rollback => "rolls back",
            OnFailure::Pause => "pauses",
        };
        let percent = |ppm: u32| f64::from(ppm) / 1e4;
        let (window, alpha) = (self.window_ms as f64 / 1000.0, percent(self.alpha_ppm));
        let metric = |metric: &Metric| {
            let says = match metric.limit {
                Limit::ErrorRate { max_bp } => {
                    format!(
                        "more than {} % errors in {window} s {}",
                        f64::from(max_bp) / 100.0,
                        does(metric.on_failure)
                    )
                }
                Limit::Latency { statistic, max_us } => {
                    let max_ms = max_us as f64 / 1000.0;
                    format!("{statistic} latency above {max_ms} ms in {window} s {}", does(metric.on_failure))
                }
                Limit::ErrorsVsStable { increase_ppm } => {
                    format!("promotes once {} % more errors than stable's are ruled out", percent(increase_ppm))
                }
                Limit::LatencyVsStable { quantile_bp, increase_ppm } => format!(
                    "promotes once {} % above stable's p{} are ruled out",
                    percent(increase_ppm),
                    f64::from(quantile_bp) / 100.0
                ),
            };
            format!("{}: {says}", metric.name)
        };
        let query = |query: &Query| {
            format!("{}: a value of Prometheus out of its range {}", query.name, does(query.on_failure))
        };
        let mut lines: Vec<_> = self.metrics.iter().map(metric).chain(self.queries.iter().map(query)).collect();
        if self.compares() {
            lines.push(format!(
                "harm beside stable rolls back, wrongly with a probability of {alpha} % at most; harm that is likely pauses, \
                 wrongly with {} %",
                (alpha * 5.0).min(50.0)
            ));
            for (class, _) in [("4xx", compared.client), ("3xx", compared.redirect)].iter().filter(|(_, is)| *is) {
                lines.push(format!(
                    "{class}: more of them than stable has beside it is harm, with {} % of α",
                    CLASS_SHARE * 1e2
                ));
            }
        }
        let least = self.min_samples.max(1);
        if let Some(needed) = self.rate_needed() {
            lines.push(format!("limits need {least} canary answers in {window} s: {needed:.1} canary requests/s"));
        }
        if self.compares() {
            lines.push(format!("the comparison with stable needs {least} canary answers in the step"));
        }
        lines
    }

    /// Returns true when some metric has a fixed limit.
    pub fn has_limits(&self) -> bool {
        self.metrics.iter().any(|metric| metric.required().is_none())
    }

    /// Returns true when some metric compares the canary with stable.
    pub fn compares(&self) -> bool {
        self.metrics.iter().any(|metric| metric.required().is_some())
    }

    /// Returns how the canary is compared with stable in a rollout that is planned to last so long; none when no metric
    /// does.
    pub fn sequential(&self, planned_ms: u64) -> Option<Policy> {
        let required: Vec<_> = self.metrics.iter().filter_map(Metric::required).collect();
        let errors = required.iter().filter(|required| matches!(required.harm, Harm::Errors(_))).count();
        let errors_share = match (errors, required.len() - errors) {
            (0, 0) => return None,
            (0, _) => 0.0,
            (_, 0) => 1.0,
            _ => ERRORS_SHARE,
        };
        let alpha = f64::from(self.alpha_ppm) / 1e6;
        let horizon_seconds = (planned_ms as f64 / 1000.0 * 1.5).clamp(600.0, 86_400.0);
        Some(Policy { alpha, errors_share, required, horizon_seconds, ..Policy::default() })
    }

    fn judge_with(&self, canary: &Stats, min_samples: u64) -> Verdict {
        if !self.has_limits() {
            // Other systems count, and say when they have nothing; what is compared with stable is counted over the step.
            return Verdict::Promote;
        }
        if canary.count < min_samples.max(1) {
            return Verdict::Hold(format!("{} of {} canary samples", canary.count, min_samples.max(1)));
        }
        let verdicts = self.metrics.iter().filter_map(|metric| metric.broken(canary));
        verdicts.fold(Verdict::Promote, Verdict::or_worse)
    }
}

impl Metric {
    /// Returns what a SEQUENTIAL metric must rule out; none for one with a fixed limit.
    fn required(&self) -> Option<Required> {
        let share = |ppm: u32| f64::from(ppm) / 1e6;
        let harm = match self.limit {
            Limit::ErrorsVsStable { increase_ppm } => Harm::Errors(share(increase_ppm)),
            Limit::LatencyVsStable { quantile_bp, increase_ppm } => {
                Harm::Latency(f64::from(quantile_bp) / 1e4, Slowdown::Increase(share(increase_ppm)))
            }
            Limit::ErrorRate { .. } | Limit::Latency { .. } => return None,
        };
        Some(Required { name: self.name.clone(), harm })
    }

    /// Returns the verdict that breaking this metric's limit leads to; none while it holds.
    fn broken(&self, canary: &Stats) -> Option<Verdict> {
        let name = &self.name;
        let why = match self.limit {
            Limit::ErrorRate { max_bp } => {
                let (found, max) = (canary.error_rate()? * 100.0, f64::from(max_bp) / 100.0);
                (found > max).then(|| format!("{name}: {found:.2} % of {} answers, limit {max} %", canary.count))
            }
            Limit::Latency { statistic, max_us } => {
                let found = match statistic {
                    Statistic::Mean => canary.mean_ms()?,
                    Statistic::Quantile(bp) => canary.quantile_ms(f64::from(bp) / 10_000.0)?,
                };
                let max = max_us as f64 / 1000.0;
                (found > max).then(|| format!("{name}: {statistic} {found:.1} ms, limit {max} ms"))
            }
            Limit::ErrorsVsStable { .. } | Limit::LatencyVsStable { .. } => None,
        }?;
        Some(match self.on_failure {
            OnFailure::Rollback => Verdict::Rollback(why),
            OnFailure::Pause => Verdict::Pause(why),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn canary(count: u64, errors: u64, latency_us: u64) -> Evidence {
        let mut evidence = Evidence::default();
        (0..count).for_each(|i| evidence.canary.record(latency_us, i < errors));
        evidence
    }

    #[test]
    fn the_seed_rule_rolls_back_over_five_percent_and_pauses_over_500_ms() {
        let rule = Analysis::default();
        assert_eq!(rule.judge(&canary(200, 10, 1_000)), Verdict::Promote);
        let found = rule.judge(&canary(200, 11, 1_000));
        assert_eq!(found, Verdict::Rollback("errors: 5.50 % of 200 answers, limit 5 %".into()));
        assert_eq!(rule.judge(&canary(200, 0, 500_000)), Verdict::Promote);
        let found = rule.judge(&canary(200, 0, 501_000));
        assert_eq!(found, Verdict::Pause("latency: mean 501.0 ms, limit 500 ms".into()));
    }

    #[test]
    fn the_worse_of_two_broken_limits_counts() {
        let found = Analysis::default().judge(&canary(200, 200, 900_000));
        assert_eq!(found.word(), "ROLLBACK");
    }

    #[test]
    fn where_only_others_count_no_samples_are_needed_here() {
        let query = Query {
            name: "failing".into(),
            address: "http://x:1".into(),
            template: "q".into(),
            interval_ms: 1_000,
            min: None,
            max: Some(50_000),
            on_failure: OnFailure::Rollback,
        };
        let rule = Analysis { metrics: Vec::new(), queries: vec![query], ..Analysis::default() };
        assert_eq!(rule.judge(&Evidence::default()), Verdict::Promote);
    }

    #[test]
    fn a_threshold_that_no_answer_can_pass_or_fail_is_refused() {
        let checked = |limit| {
            let metric = Metric { name: "m".into(), limit, on_failure: OnFailure::Pause };
            Analysis { metrics: vec![metric], ..Analysis::default() }.check_numbers().map_err(|error| error.to_string())
        };
        let latency = |max_us| checked(Limit::Latency { statistic: Statistic::Mean, max_us });
        assert_eq!((latency(1), latency(3_600_000_000)), (Ok(()), Ok(())));
        let expected = "expected 0.001 to 3600000 ms";
        assert_eq!(latency(0), Err(format!("thresholdRange.max is 0 ms, {expected}")));
        assert_eq!(latency(3_600_000_001), Err(format!("thresholdRange.max is 3600000.001 ms, {expected}")));
        assert_eq!(checked(Limit::ErrorRate { max_bp: 10_000 }), Ok(()));
        let error = checked(Limit::ErrorRate { max_bp: 10_001 });
        assert_eq!(error, Err("thresholdRange.max is 100.01 %, expected 0 to 100 %".into()));
    }

    #[test]
    fn what_is_judged_and_what_can_never_come_is_said_in_words() {
        let rule = Analysis::default();
        let expected = [
            "errors: more than 5 % errors in 30 s rolls back",
            "latency: mean latency above 500 ms in 30 s pauses",
            "limits need 100 canary answers in 30 s: 3.3 canary requests/s",
        ];
        let both = ErrorClasses { client: true, redirect: true };
        assert_eq!(rule.in_words(both), expected);
        assert_eq!(rule.never_enough(2.0), Some("needs 3.3 canary requests/s, sees 2.0: never at this rate".into()));
        assert_eq!(rule.never_enough(3.4), None);
        let limit = Limit::ErrorsVsStable { increase_ppm: 5_000 };
        let metrics = vec![Metric { name: "errors".into(), limit, on_failure: OnFailure::Rollback }];
        let rule = Analysis { metrics, ..rule };
        let expected = [
            "errors: promotes once 0.5 % more errors than stable's are ruled out",
            "harm beside stable rolls back, wrongly with a probability of 1 % at most; harm that is likely pauses, wrongly with 5 %",
            "4xx: more of them than stable has beside it is harm, with 5 % of α",
            "3xx: more of them than stable has beside it is harm, with 5 % of α",
            "the comparison with stable needs 100 canary answers in the step",
        ];
        assert_eq!(rule.in_words(both), expected);
        assert_eq!(rule.in_words(ErrorClasses::default()).len(), expected.len() - 2);
        assert_eq!(rule.never_enough(0.1), None, "what is compared adds up");
        assert_eq!(rule.judge(&canary(3, 0, 1)), Verdict::Promote);
        assert_eq!(rule.enough_in_step(99), Verdict::Hold("99 of 100 canary samples in this step".into()));
        assert_eq!(
            (rule.enough_in_step(100), Analysis::default().enough_in_step(0)),
            (Verdict::Promote, Verdict::Promote)
        );
    }

    #[test]
    fn silence_and_little_data_hold() {
        let rule = Analysis::default();
        assert_eq!(rule.judge(&Evidence::default()), Verdict::Hold("0 of 100 canary samples".into()));
        assert_eq!(rule.judge(&canary(99, 99, 1)).word(), "HOLD");
        assert_eq!(rule.judge_alone(&canary(99, 99, 1)).word(), "ROLLBACK");
        assert_eq!(rule.judge_alone(&canary(19, 19, 1)).word(), "HOLD");
    }
}
