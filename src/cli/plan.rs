//! `aviary plan`: estimates which regressions a rollout's analysis can detect, and how fast. It changes nothing.

use std::path::PathBuf;

use anyhow::bail;
use clap::Args;
use serde_json::{Value, json};

use super::Exit;
use super::input::InputFile;
use super::output::{self, Format};
use crate::client::{Api, segment};
use crate::config;
use crate::domain::plan::RolloutSpec;
use crate::domain::run::AnalysisRun;
use crate::domain::ticks::TickSample;
use crate::domain::time::Mono;
use crate::domain::verdict::Verdict;
use crate::domain::weights::Weight;
use crate::domain::window::Window;
use crate::model::RolloutView;
use crate::synthetic::{Profile, Regression, Traffic};

#[derive(Debug, Args)]
#[command(
    after_help = "Simulates each step many times, with synthetic traffic like the service's and the analysis code of the nodes.\n\n\
    Examples:\n  aviary plan -f config/rollout.yaml                                   # traffic as the cluster sees it now\n  \
    aviary plan -f config/rollout.yaml --rps 200 --error-rate 0.5 --p50-ms 80 --p95-ms 210"
)]
pub struct PlanArgs {
    /// File of the rollout (YAML or JSON); `-` is standard input.
    #[arg(short, long, value_name = "FILE")]
    file: PathBuf,
    /// Requests per second of both versions together; default: the rate that the cluster measures for the service.
    #[arg(long, value_name = "N")]
    rps: Option<f64>,
    /// Error rate of the stable version, in percent.
    #[arg(long, value_name = "PERCENT", default_value_t = 0.1, requires = "rps")]
    error_rate: f64,
    /// Median latency of the stable version, in milliseconds.
    #[arg(long, value_name = "MS", default_value_t = 50.0, requires = "rps")]
    p50_ms: f64,
    /// 95th percentile of the stable version's latency, in milliseconds.
    #[arg(long, value_name = "MS", default_value_t = 150.0, requires = "rps")]
    p95_ms: f64,
    /// Simulated runs of a step for each regression.
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u64).range(5..=1000))]
    runs: u64,
}

/// A regression counts as found when so many of ten runs stop.
const FOUND_OF_TEN: u64 = 8;
/// Steps without a duration of their own are played for so long, longer ones cut, in seconds.
const PLAYED_SECONDS: (u64, u64) = (600, 3_600);
/// No step is played for less: a window's worth at least.
const PLAYED_SECONDS_MIN: u64 = 60;
/// Added errors that are tried, as shares of all requests, and slownesses.
const ERRORS: [f64; 10] = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0];
const SLOWER: [f64; 10] = [1.03, 1.05, 1.1, 1.15, 1.2, 1.3, 1.5, 2.0, 3.0, 5.0];

/// Prints what the analysis of a rollout file will find, and how soon.
pub async fn run(api: impl FnOnce() -> anyhow::Result<Api>, args: &PlanArgs, format: Format) -> anyhow::Result<Exit> {
    let InputFile { name, text } = InputFile::read(&args.file)?;
    let spec = config::rollout::parse(&text, &name)?;
    let profile = match args.rps {
        Some(requests_per_second) => checked(Profile {
            requests_per_second,
            error_rate: args.error_rate / 100.0,
            p50_ms: args.p50_ms,
            p95_ms: args.p95_ms,
        })?,
        None => observed(&api()?, &spec).await?,
    };
    let mut steps = Vec::new();
    for (index, stage) in spec.stages.iter().enumerate() {
        eprint!("\rstep {} of {} …", index + 1, spec.stages.len());
        let hold_ms = stage.hold_ms + if index == spec.last_stage() { spec.bake_ms } else { 0 };
        let seconds = match hold_ms / 1000 {
            0 => PLAYED_SECONDS.0,
            seconds => seconds.clamp(PLAYED_SECONDS_MIN, PLAYED_SECONDS.1),
        };
        let play = Play { spec: &spec, profile, weight: stage.weight, seconds, runs: args.runs };
        steps.push(play.step(stage.manual, hold_ms));
    }
    eprint!("\r{:30}\r", "");
    let plan = json!({
        "service": spec.service,
        "traffic": {
            "requests_per_second": profile.requests_per_second, "error_rate": profile.error_rate,
            "p50_ms": profile.p50_ms, "p95_ms": profile.p95_ms,
        },
        "planned_ms": spec.planned_ms(),
        "not_played": not_played(&spec),
        "steps": steps,
    });
    output::print(format, &plan.to_string(), table)?;
    Ok(Exit::Done)
}

/// Returns the names of the metrics that another system keeps.
fn not_played(spec: &RolloutSpec) -> Vec<&str> {
    spec.analysis.queries.iter().map(|query| query.name.as_str()).collect()
}

fn checked(profile: Profile) -> anyhow::Result<Profile> {
    let Profile { requests_per_second, error_rate, p50_ms, p95_ms } = profile;
    if !(0.001..=10_000_000.0).contains(&requests_per_second) {
        bail!("--rps is {requests_per_second}, expected 0.001 to 10000000");
    }
    if !(0.0..=1.0).contains(&error_rate) {
        bail!("--error-rate is {} %, expected 0 to 100", error_rate * 100.0);
    }
    if !(0.001..=3_600_000.0).contains(&p50_ms) || !(p50_ms..=3_600_000.0).contains(&p95_ms) {
        bail!("--p50-ms is {p50_ms} and --p95-ms {p95_ms}, expected 0.001 to 3600000, in this order");
    }
    Ok(profile)
}

/// Returns the traffic that the cluster sees of the stable version.
async fn observed(api: &Api, spec: &RolloutSpec) -> anyhow::Result<Profile> {
    let service = &spec.service;
    let answer = api.get(&format!("/v1/rollouts/{}", segment(service.as_str()))).await?;
    let unseen = || format!("{service}: the cluster measured no recent traffic, expected some, or the option --rps");
    if !answer.status.is_success() {
        bail!(unseen());
    }
    let view: RolloutView = answer.read()?;
    let requests: u64 = view.health.cluster.values().map(|counts| counts.count).sum();
    let seconds = view.health.window_ms as f64 / 1000.0;
    let stable = view.health.cluster.get(&view.routing.routing.stable_model_id);
    match stable.map(|counts| (counts.error_rate, counts.p50_ms, counts.p95_ms)) {
        Some((Some(error_rate), Some(p50_ms), Some(p95_ms))) => {
            Ok(Profile { requests_per_second: requests as f64 / seconds, error_rate, p50_ms, p95_ms })
        }
        _ => bail!(unseen()),
    }
}

/// A step, to be played through.
struct Play<'p> {
    spec: &'p RolloutSpec,
    profile: Profile,
    weight: Weight,
    seconds: u64,
    runs: u64,
}

/// When something was first said in a run, in seconds.
struct PlanEnd {
    stopped: Option<u64>,
    ready: Option<u64>,
}

impl Play<'_> {
    fn step(&self, manual: bool, hold_ms: u64) -> Value {
        let share = self.weight.fraction();
        let mut step = json!({
            "weight": share, "pause_ms": hold_ms, "manual": manual, "played_seconds": self.seconds,
            "canary_requests_per_second": self.profile.requests_per_second * share,
        });
        // What another system measures can't be played, and without metrics of the cluster's own nothing is left.
        if self.weight == Weight::ZERO || self.spec.analysis.metrics.is_empty() {
            return step;
        }
        let healthy = self.all(Regression::NONE);
        let all = healthy.len();
        step["runs"] = all.into();
        step["stopped_though_healthy"] = healthy.iter().filter(|run| run.stopped.is_some()).count().into();
        step["ready_seconds"] = median(healthy.iter().map(|run| run.ready), all).into();
        step["errors_found"] = self.smallest(&ERRORS, |errors_added| Regression { errors_added, slower: 1.0 });
        step["slowness_found"] = self.smallest(&SLOWER, |slower| Regression { errors_added: 0.0, slower });
        step
    }

    /// Returns the smallest regression of these that most runs stop for, and after how long.
    fn smallest(&self, sizes: &[f64], regression: impl Fn(f64) -> Regression) -> Value {
        let mut found = None;
        let (mut low, mut high) = (0, sizes.len());
        while low < high {
            let middle = (low + high) / 2;
            let runs = self.all(regression(sizes[middle]));
            let stopped = runs.iter().filter(|run| run.stopped.is_some()).count() as u64;
            if stopped * 10 >= runs.len() as u64 * FOUND_OF_TEN {
                let seconds = median(runs.iter().map(|run| run.stopped), runs.len());
                found = Some(json!({"size": sizes[middle], "seconds": seconds}));
                high = middle;
            } else {
                low = middle + 1;
            }
        }
        found.unwrap_or(Value::Null)
    }

    fn all(&self, regression: Regression) -> Vec<PlanEnd> {
        (0..self.runs).map(|seed| self.run(regression, seed)).collect()
    }

    fn run(&self, regression: Regression, seed: u64) -> PlanEnd {
        let analysis = self.spec.analysis.clone();
        // At 100 % there is no stable traffic left to compare with.
        let policy = analysis.sequential(self.spec.planned_ms()).filter(|_| self.weight != Weight::FULL);
        let mut run: AnalysisRun<()> = AnalysisRun::new(analysis.clone(), policy, 1_000, 0);
        let mut window = Window::default();
        let mut traffic = Traffic::new(&self.profile, seed);
        let mut ended = PlanEnd { stopped: None, ready: None };
        for second in 1..=self.seconds {
            let Profile { requests_per_second, error_rate, .. } = self.profile;
            let evidence = traffic.next(requests_per_second, self.weight.fraction(), error_rate, regression);
            let now = Mono::from_millis(second * 1_000);
            window.add(now, &evidence);
            window.expire(now, analysis.window_ms);
            run.put(&(), second - 1, &TickSample { version: 1, evidence });
            run.advance(second * 1_000, [].iter());
            // As a gate does: the limits on the sliding window, and the comparison.
            let compared = run.verdict().unwrap_or(Verdict::Promote);
            match analysis.judge(window.total()).or_worse(compared) {
                Verdict::Rollback(_) | Verdict::Pause(_) => {
                    ended.stopped = Some(second);
                    break;
                }
                Verdict::Promote if ended.ready.is_none() => ended.ready = Some(second),
                Verdict::Promote | Verdict::Hold(_) => {}
            }
        }
        ended
    }
}

/// Returns the median of what happened; none when it happened in fewer than half of all.
fn median(times: impl Iterator<Item = Option<u64>>, all: usize) -> Option<u64> {
    let mut times: Vec<u64> = times.flatten().collect();
    times.sort_unstable();
    times.get(all / 2).copied()
}

fn table(plan: &Value) -> String {
    let number = |value: &Value| value.as_f64().unwrap_or_default();
    let rounded = |value: f64| (value * 1e6).round() / 1e6;
    let mut rows = output::table([
        "STEP",
        "WEIGHT",
        "PAUSE",
        "CANARY REQ/S",
        "READY AFTER",
        "STOPPED FOR NOTHING",
        "ERRORS FOUND",
        "SLOWNESS FOUND",
    ]);
    for (index, step) in plan["steps"].as_array().into_iter().flatten().enumerate() {
        let pause = match (step["manual"].as_bool(), number(&step["pause_ms"]) / 1000.0) {
            (Some(true), _) => "an operator's".to_string(),
            (_, seconds) => format!("{seconds} s"),
        };
        let played = number(&step["played_seconds"]);
        let found = |key: &str, text: &dyn Fn(f64) -> String| match &step[key] {
            Value::Null => format!("none in {played} s"),
            found => format!("{} in {} s", text(number(&found["size"])), found["seconds"]),
        };
        let mut row = [(); 8].map(|()| "-".to_string());
        row[0] = (index + 1).to_string();
        row[1] = format!("{} %", rounded(number(&step["weight"]) * 100.0));
        row[2] = pause;
        row[3] = format!("{:.2}", number(&step["canary_requests_per_second"]));
        if !step["runs"].is_null() {
            row[4] = step["ready_seconds"].as_u64().map_or(format!("not in {played} s"), |s| format!("{s} s"));
            row[5] = format!("{} of {} runs", step["stopped_though_healthy"], step["runs"]);
            row[6] = found("errors_found", &|size| format!("+{} %", rounded(size * 100.0)));
            row[7] = found("slowness_found", &|size| format!("+{} %", rounded((size - 1.0) * 100.0)));
        }
        rows.add_row(row);
    }
    let names: Vec<_> = plan["not_played"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    let not_played = match names.is_empty() {
        true => String::new(),
        false => format!(
            "\nNot played: {}. Another system measures that; a step is ready once it is in its range, too.",
            names.join(", ")
        ),
    };
    let traffic = &plan["traffic"];
    format!(
        "{}: {:.1} requests a second, {:.3} % errors, p50 {:.1} ms, p95 {:.1} ms; {} s by plan\n\n{}\n\n\
         Ready after: when a canary as good as stable may go on, in the median. Found: the smallest regression of those tried that \
         {FOUND_OF_TEN} of 10\nruns stop for while the step lasts, and the median time that takes. Each step is played by itself.{not_played}",
        plan["service"].as_str().unwrap_or_default(),
        number(&traffic["requests_per_second"]),
        number(&traffic["error_rate"]) * 100.0,
        number(&traffic["p50_ms"]),
        number(&traffic["p95_ms"]),
        number(&plan["planned_ms"]) / 1000.0,
        rows.trim_fmt(),
    )
}
