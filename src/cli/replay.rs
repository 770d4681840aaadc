//! `aviary replay`: runs a recording through the nodes' analysis code and prints the decisions with their reasons.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;

use anyhow::Context;
use clap::Args;
use serde_json::json;

use super::Exit;
use super::recording::{Feed, LINES, RecordingStep, Rules};
use crate::domain::run::{AnswerSummary, WindowVerdict};

#[derive(Debug, Args)]
#[command(after_help = format!("The recording: one JSON object per line, in order of arrival:\n{LINES}\n\nThe same recording and rollout always \
    give the same decisions.\n\nExample:\n  aviary replay -f config/rollout.yaml yesterday.ndjson"))]
pub struct ReplayArgs {
    /// Rollout file with the analysis rules; default: SEQUENTIAL on errors, median and 95th percentile latency.
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Bound on the probability of ever rolling back a canary within tolerance, 0.0001 to 0.5; default: the file's, or 0.01.
    #[arg(long, value_name = "P")]
    alpha: Option<f64>,
    /// Print JSON, one object per line.
    #[arg(long)]
    json: bool,
    /// File with the recording; `-` reads standard input.
    #[arg(value_name = "RECORDING")]
    recording: PathBuf,
}

/// Replays a recording through the analysis, and prints its verdicts.
pub fn run(args: &ReplayArgs) -> anyhow::Result<Exit> {
    let mut feed = Feed::new(Rules::load(args.file.as_deref(), args.alpha)?);
    let name = args.recording.display().to_string();
    let input: Box<dyn BufRead> = match name.as_str() {
        "-" => Box::new(std::io::stdin().lock()),
        _ => Box::new(BufReader::new(File::open(&args.recording).with_context(|| name.clone())?)),
    };
    let mut last = 0;
    'lines: for (number, line) in input.lines().enumerate() {
        let line = line.with_context(|| name.clone())?;
        for step in feed.take(&line).with_context(|| format!("{name}: line {}", number + 1))? {
            match step {
                RecordingStep::Tick(at_ms, window_verdicts) => {
                    last = at_ms;
                    window_verdicts.iter().for_each(|window_verdict| print(window_verdict, args.json));
                }
                RecordingStep::End => break 'lines,
            }
        }
    }
    if let RecordingStep::Tick(at_ms, window_verdicts) = feed.turn() {
        last = at_ms.max(last);
        window_verdicts.iter().chain(&feed.finish()).for_each(|window_verdict| print(window_verdict, args.json));
    }
    let verdict = feed.run.overall();
    if args.json {
        println!("{}", json!({"end_ms": last, "verdict": verdict}));
    } else {
        println!("end {}: {} {}", clock(last), verdict.word(), verdict.reason());
    }
    Ok(Exit::Done)
}

fn print(window_verdict: &WindowVerdict, as_json: bool) {
    if as_json {
        println!("{}", json!(window_verdict));
        return;
    }
    let WindowVerdict { from_ms, to_ms, verdict, stable, canary, sequential, is_window: _ } = window_verdict;
    let side = |summary: &AnswerSummary| {
        let p95 = summary.p95_ms.map_or("-".into(), |ms| format!("{ms:.1} ms"));
        format!("{} answers, {} errors, p95 {p95}", summary.count, summary.errors)
    };
    let by = sequential.map_or("THRESHOLD".into(), |sequential| {
        format!(
            "SEQUENTIAL e {:.2} of {:.0}, α spent {:.4}",
            sequential.e_value, sequential.bound, sequential.alpha_spent
        )
    });
    println!("{}-{}  {:8} {}", clock(*from_ms), clock(*to_ms), verdict.word(), verdict.reason());
    println!("                   canary {}; stable {}; {by}", side(canary), side(stable));
}

fn clock(ms: u64) -> String {
    format!("{:02}:{:02}:{:02}", ms / 3_600_000, ms / 60_000 % 60, ms / 1_000 % 60)
}
