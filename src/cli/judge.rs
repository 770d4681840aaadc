//! `aviary judge`: recorded or live requests in, verdicts with their evidence out, as lines of JSON.

use std::collections::{BTreeSet, VecDeque};
use std::io::{BufRead, Write};

use anyhow::{Context, bail};
use clap::Args;
use serde::Deserialize;
use serde_json::json;

use super::Exit;
use crate::domain::sequential::{Decision, Finding, Policy, Sequential};
use crate::domain::window::Tally;

/// Arguments of `aviary judge`.
#[derive(Debug, Args)]
#[command(after_help = "Standard input, one object a line, in the order of arrival:\n  \
    {\"type\":\"start\",\"canary_share\":0.05,\"tick_ms\":1000,\"horizon_ms\":3600000}\n  \
    {\"id\":17,\"timestamp_ms\":12,\"version\":\"stable\",\"status\":200,\"latency_ms\":81.2}\n  \
    {\"type\":\"weight\",\"timestamp_ms\":900000,\"canary_share\":0.2}\n  \
    {\"type\":\"tick\",\"timestamp_ms\":1000}\n  {\"type\":\"end\"}\n\n\
    Each tick is answered with one line; without ticks there is one for each second of the requests' own time. A request \
    that comes twice\ncounts once; one that comes late counts in the block that is open.")]
pub struct JudgeArgs {
    /// Probability of ever rolling back a canary that is no worse than tolerated, 0.0001 to 0.5.
    #[arg(long, default_value_t = 0.01, value_name = "P")]
    alpha: f64,
}

#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
enum Control {
    Start {
        #[serde(default = "an_hour")]
        horizon_ms: u64,
    },
    Weight {},
    Tick {
        timestamp_ms: u64,
    },
    End,
}

fn an_hour() -> u64 {
    3_600_000
}

#[derive(Deserialize)]
struct Event<'l> {
    #[serde(default)]
    id: Option<u64>,
    timestamp_ms: f64,
    version: &'l str,
    status: u16,
    latency_ms: f64,
}

/// Ids that are remembered to know a request that comes again.
const IDS_MAX: usize = 1 << 20;

#[derive(Default)]
struct Seen {
    ids: BTreeSet<u64>,
    order: VecDeque<u64>,
}

impl Seen {
    /// Returns true the first time.
    fn is_new(&mut self, id: u64) -> bool {
        if !self.ids.insert(id) {
            return false;
        }
        self.order.push_back(id);
        if self.order.len() > IDS_MAX
            && let Some(oldest) = self.order.pop_front()
        {
            self.ids.remove(&oldest);
        }
        true
    }
}

struct Judge {
    policy: Policy,
    test: Option<Sequential>,
    tally: Tally,
    seen: Seen,
    ticks: bool,
    second: u64,
}

/// Judges standard input.
pub fn run(args: &JudgeArgs) -> anyhow::Result<Exit> {
    if !(0.0001..=0.5).contains(&args.alpha) {
        bail!("--alpha is {}, expected 0.0001 to 0.5", args.alpha);
    }
    let policy = Policy { alpha: args.alpha, ..Policy::default() };
    let (input, mut output) = (std::io::stdin().lock(), std::io::stdout().lock());
    let mut judge =
        Judge { policy, test: None, tally: Tally::default(), seen: Seen::default(), ticks: false, second: 0 };
    for (number, line) in input.lines().enumerate() {
        let line = line.context("standard input")?;
        if line.trim().is_empty() {
            continue;
        }
        let more = judge.take(&line, &mut output).with_context(|| format!("line {}", number + 1))?;
        if !more {
            break;
        }
    }
    Ok(Exit::Done)
}

impl Judge {
    fn take(&mut self, line: &str, output: &mut impl Write) -> anyhow::Result<bool> {
        if line.contains("\"type\"") {
            match serde_json::from_str(line)? {
                Control::Start { horizon_ms } => {
                    let policy = Policy { horizon_seconds: horizon_ms as f64 / 1000.0, ..self.policy.clone() };
                    self.test = Some(Sequential::new(policy));
                }
                Control::Weight {} => self.test().weight_changed(),
                Control::Tick { timestamp_ms } => {
                    self.ticks = true;
                    self.close(timestamp_ms, output)?;
                }
                Control::End => return Ok(false),
            }
            return Ok(true);
        }
        let event: Event = serde_json::from_str(line)?;
        let sane = event.latency_ms.is_finite() && event.latency_ms >= 0.0 && event.timestamp_ms >= 0.0;
        if !sane {
            bail!("latency {} ms at {} ms, expected both to be at least 0", event.latency_ms, event.timestamp_ms);
        }
        let second = event.timestamp_ms as u64 / 1000;
        while !self.ticks && second > self.second {
            self.second += 1;
            self.close(self.second * 1000, output)?;
        }
        let counts = match event.version {
            "stable" => &mut self.tally.stable,
            "canary" => &mut self.tally.canary,
            other => bail!("version is {other:?}, expected \"stable\" or \"canary\""),
        };
        if event.id.is_none_or(|id| self.seen.is_new(id)) {
            counts.record((event.latency_ms * 1000.0) as u64, event.status >= 500);
        }
        Ok(true)
    }

    fn test(&mut self) -> &mut Sequential {
        let policy = &self.policy;
        self.test.get_or_insert_with(|| Sequential::new(policy.clone()))
    }

    fn close(&mut self, at_ms: u64, output: &mut impl Write) -> anyhow::Result<()> {
        let evidence = self.tally.take();
        let found = self.test().advance(at_ms, &evidence);
        let said = writeln!(output, "{}", line(at_ms, &found)).and_then(|()| output.flush());
        said.context("standard output")
    }
}

fn line(at_ms: u64, found: &Finding) -> serde_json::Value {
    let decision = match found.decision {
        Decision::Promote => "PROMOTE",
        Decision::Hold => "HOLD",
        Decision::Pause => "PAUSE",
        Decision::Rollback => "ROLLBACK",
    };
    let [errors, median, tail] = found.promotion;
    json!({
        "timestamp_ms": at_ms, "decision": decision, "e": found.e, "e_errors": found.e_errors, "e_latency": found.e_latency,
        "stable": {"requests": found.requests.0, "errors": found.errors.0},
        "canary": {"requests": found.requests.1, "errors": found.errors.1},
        "promotion": {"errors": errors, "median": median, "p95": tail},
    })
}
