//! `aviary judge`: reads recorded or live requests, and prints verdicts with their evidence as lines of JSON.

use std::io::{BufRead, Write};
use std::path::PathBuf;

use anyhow::Context;
use clap::Args;
use serde_json::{Value, json};

use super::Exit;
use super::recording::{Feed, LINES, RecordingStep, Rules};
use crate::domain::run::WindowVerdict;

#[derive(Debug, Args)]
#[command(after_help = format!("Standard input: one JSON object per line, in order of arrival:\n{LINES}\n\nEach tick gives one line of \
    output. Without ticks, each second of the requests' own time gives one.\nSee also `aviary replay`, which prints decisions only."))]
pub struct JudgeArgs {
    /// Rollout file with the analysis rules; default: SEQUENTIAL on errors, median and 95th percentile latency.
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Bound on the probability of ever rolling back a canary within tolerance, 0.0001 to 0.5; default: the file's, or 0.01.
    #[arg(long, value_name = "P")]
    alpha: Option<f64>,
}

/// Analyses standard input and prints one line of JSON for each tick.
pub fn run(args: &JudgeArgs) -> anyhow::Result<Exit> {
    let mut feed = Feed::new(Rules::load(args.file.as_deref(), args.alpha)?);
    let (input, mut output) = (std::io::stdin().lock(), std::io::stdout().lock());
    for (number, line) in input.lines().enumerate() {
        let line = line.context("standard input")?;
        for step in feed.take(&line).with_context(|| format!("line {}", number + 1))? {
            match step {
                RecordingStep::Tick(at_ms, window_verdicts) => {
                    let said =
                        writeln!(output, "{}", answer(&feed, at_ms, &window_verdicts)).and_then(|()| output.flush());
                    said.context("standard output")?;
                }
                RecordingStep::End => return Ok(Exit::Done),
            }
        }
    }
    Ok(Exit::Done)
}

fn answer(feed: &Feed, at_ms: u64, window_verdicts: &[WindowVerdict]) -> Value {
    let verdict = feed.run.overall();
    let mut answer = json!({"timestamp_ms": at_ms, "decision": verdict.word(), "reason": verdict.reason()});
    if let Some((policy, found)) = feed.run.result() {
        answer["e"] = found.e.into();
        answer["bound"] = (1.0 / policy.alpha).into();
        answer["e_errors"] = found.e_errors.into();
        answer["e_latency"] = found.e_latency.into();
        answer["alpha_spent"] = found.alpha_spent.into();
        answer["stable"] = json!({"requests": found.requests.0, "errors": found.errors.0});
        answer["canary"] = json!({"requests": found.requests.1, "errors": found.errors.1});
        let promotion = policy.required.iter().zip(&found.promotion);
        answer["promotion"] = promotion.map(|(required, e)| (required.name.clone(), json!(e))).collect();
    }
    if !window_verdicts.is_empty() {
        answer["verdicts"] = json!(window_verdicts);
    }
    answer
}
