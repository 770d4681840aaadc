//! A metric that some other system keeps, asked for by a query: what is asked, and what its answer says.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::text::bounded;
use super::verdict::{OnFailure, Verdict};

/// A value in millionths, so that limits can be compared and stored exactly.
pub type Micro = i64;

/// One metric of another system.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Query {
    /// The name its author gave it.
    pub name: String,
    /// Where a Prometheus answers, `http://host:port`, with its path prefix where it has one.
    pub address: String,
    /// PromQL, with `{{service}}`, `{{stable}}`, `{{version}}` (the canary) and `{{window}}` in it.
    pub template: String,
    /// How often it is asked, in milliseconds.
    pub interval_ms: u64,
    /// Lowest healthy value; none: any.
    pub min: Option<Micro>,
    /// Highest healthy value; none: any.
    pub max: Option<Micro>,
    /// Reaction to a value outside the range.
    pub on_failure: OnFailure,
}

/// Why another system gave no value, in its own words: cut where they are long, since they become a reason that is voted
/// on and recorded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{why}")]
pub struct NoValue {
    why: String,
    is_silence: bool,
}

impl NoValue {
    /// Returns that no usable answer came, with the first characters of `why`.
    pub fn new(why: impl fmt::Display) -> Self {
        Self { why: bounded(why.to_string()), is_silence: false }
    }

    /// Returns that the other system answered that it has no value: what it measures is silent.
    pub fn silence(why: impl fmt::Display) -> Self {
        Self { is_silence: true, ..Self::new(why) }
    }
}

impl Query {
    /// Returns the query with its words filled in.
    pub fn text(&self, service: &str, stable: &str, canary: &str, window_ms: u64) -> String {
        // PromQL reads whole seconds everywhere.
        let window = format!("{}s", window_ms.div_ceil(1000).max(1));
        let words = [("service", service), ("stable", stable), ("version", canary), ("window", &window)];
        words.iter().fold(self.template.clone(), |text, (word, value)| {
            text.replace(&format!("{{{{{word}}}}}"), value).replace(&format!("{{{{ {word} }}}}"), value)
        })
    }

    /// Returns how old an answer may be, in milliseconds.
    pub fn fresh_ms(&self) -> u64 {
        self.interval_ms.saturating_mul(3)
    }

    /// Returns why the other system gives no usable answer; none where it gives one, even if that is that it has no value.
    pub fn outage(&self, answer: Option<&Result<f64, NoValue>>) -> Option<String> {
        match answer {
            None => Some(format!("{}: no answer yet", self.name)),
            Some(Err(why)) if !why.is_silence => Some(format!("{}: {why}", self.name)),
            Some(_) => None,
        }
    }

    /// Returns true when the other system answers that it has no value, as without traffic.
    pub fn is_silent(answer: Option<&Result<f64, NoValue>>) -> bool {
        match answer {
            Some(Ok(value)) => !value.is_finite(),
            Some(Err(why)) => why.is_silence,
            None => false,
        }
    }

    /// Returns what an answer says: the value, or why there is none; none when nothing fresh was answered. Only a value can
    /// be harm: an outage of the metric's provider holds the step.
    pub fn judge(&self, answer: Option<&Result<f64, NoValue>>) -> Verdict {
        let Self { name, min, max, .. } = self;
        let value = match answer {
            None => return Verdict::Hold(format!("{name}: no answer yet")),
            Some(Err(why)) => return Verdict::Hold(format!("{name}: {why}")),
            Some(Ok(value)) if !value.is_finite() => {
                return Verdict::Hold(format!("{name}: the answer is {value}, as without traffic, expected a number"));
            }
            Some(Ok(value)) => *value,
        };
        let bound = |micro: Micro| micro as f64 / 1e6;
        let why = match (min.map(bound), max.map(bound)) {
            (Some(min), _) if value < min => format!("{name}: {value}, limit at least {min}"),
            (_, Some(max)) if value > max => format!("{name}: {value}, limit {max}"),
            _ => return Verdict::Promote,
        };
        match self.on_failure {
            OnFailure::Rollback => Verdict::Rollback(why),
            OnFailure::Pause => Verdict::Pause(why),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn query(min: Option<Micro>, max: Option<Micro>) -> Query {
        Query {
            name: "saturation".into(),
            address: "http://127.0.0.1:9090".into(),
            template: "x{v=\"{{version}}\",s=\"{{ service }}\",t=\"{{stable}}\"}[{{window}}]".into(),
            interval_ms: 1_000,
            min,
            max,
            on_failure: OnFailure::Pause,
        }
    }

    #[test]
    fn words_are_filled_in() {
        assert_eq!(query(None, None).text("svc", "v1", "v2", 1_500), "x{v=\"v2\",s=\"svc\",t=\"v1\"}[2s]");
    }

    #[test]
    fn a_value_beyond_is_harm_and_no_value_holds() {
        let query = query(Some(-1_000_000), Some(2_500_000));
        let words =
            [Ok(2.5), Ok(2.6), Ok(-1.1), Err(NoValue::new("no route"))].map(|answer| query.judge(Some(&answer)).word());
        assert_eq!(words, ["PROMOTE", "PAUSE", "PAUSE", "HOLD"]);
        assert_eq!(query.judge(None).word(), "HOLD");
        assert_eq!(query.judge(Some(&Ok(2.6))).reason(), "saturation: 2.6, limit 2.5");
    }

    #[test]
    fn what_is_no_number_holds_whatever_the_range_and_its_reaction() {
        let ranges = [(Some(500_000), None), (None, Some(500_000)), (Some(-1), Some(1)), (None, None)];
        for (min, max) in ranges {
            for on_failure in [OnFailure::Rollback, OnFailure::Pause] {
                let query = Query { on_failure, ..query(min, max) };
                for value in [f64::INFINITY, f64::NEG_INFINITY, f64::NAN, -f64::NAN] {
                    let verdict = query.judge(Some(&Ok(value)));
                    assert_eq!(verdict.word(), "HOLD", "{value} in {min:?} to {max:?}");
                }
            }
        }
        let reason = query(None, Some(1)).judge(Some(&Ok(f64::INFINITY))).reason().to_owned();
        assert_eq!(reason, "saturation: the answer is inf, as without traffic, expected a number");
    }
}
