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
    let steps = steps(&spec, profile, args.runs, |index| eprint!("\rstep {} of {} …", index + 1, spec.stages.len()));
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

/// Plays all steps. Each begins with what a healthy canary carried over from the step before. Calls `says` with a step's index
/// before it is played.
fn steps(spec: &RolloutSpec, profile: Profile, runs: u64, says: impl Fn(usize)) -> Vec<Value> {
    let policy = || spec.analysis.sequential(spec.planned_ms());
    let fresh = || {
        let mut run = AnalysisRun::new(spec.analysis.clone(), policy(), 1_000, 0);
        run.compare_classes(spec.compared_classes);
        Carried { run, second: 0 }
    };
    let mut carried: Vec<_> = (0..runs).map(|_| fresh()).collect();
    let mut steps = Vec::new();
    for (index, stage) in spec.stages.iter().enumerate() {
        says(index);
        let hold_ms = stage.hold_ms + if index == spec.last_stage() { spec.bake_ms } else { 0 };
        let seconds = match hold_ms / 1000 {
            0 => PLAYED_SECONDS.0,
            seconds => seconds.clamp(PLAYED_SECONDS_MIN, PLAYED_SECONDS.1),
        };
        let (version, weight) = (index as u64 + 1, stage.weight);
        let mut play = Play { spec, profile, version, weight, seconds, hold_ms, carried };
        steps.push(play.step(stage.manual));
        carried = play.carried;
    }
    steps
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

/// What a healthy canary's steps so far left behind: evidence lasts.
#[derive(Clone)]
struct Carried {
    run: AnalysisRun<()>,
    /// Seconds since the rollout's start.
    second: u64,
}

/// Returns which steps never get the samples that their limits need, by the traffic that the cluster sees of the service at the
/// moment; nothing where it sees none, or can't be asked.
pub async fn never_ready(api: &Api, spec: &RolloutSpec) -> Vec<String> {
    let Ok(answer) = api.get(&format!("/v1/rollouts/{}", segment(spec.service.as_str()))).await else {
        return Vec::new();
    };
    let Ok(view) = answer.read::<RolloutView>() else { return Vec::new() };
    let requests: u64 = view.health.cluster.values().map(|counts| counts.count).sum();
    let per_second = requests as f64 / (view.health.window_ms as f64 / 1000.0);
    if requests == 0 { Vec::new() } else { never_at(spec, per_second) }
}

fn never_at(spec: &RolloutSpec, requests_per_second: f64) -> Vec<String> {
    let shares = spec.stages.iter().map(|stage| stage.weight.fraction()).filter(|share| *share > 0.0);
    let never = |share: f64| {
        let why = spec.analysis.never_enough(requests_per_second * share)?;
        Some(format!("the step at {} % {why}", share * 100.0))
    };
    shares.filter_map(never).collect()
}

/// A step, to be played through.
struct Play<'p> {
    spec: &'p RolloutSpec,
    profile: Profile,
    /// Stands for the routing version: the step's number.
    version: u64,
    weight: Weight,
    seconds: u64,
    hold_ms: u64,
    /// Where each run begins.
    carried: Vec<Carried>,
}

/// When something was first said in a run, in seconds since the step began.
struct PlanEnd {
    stopped: Option<u64>,
    ready: Option<u64>,
    /// Where the next step begins.
    left: Carried,
}

impl Play<'_> {
    fn step(&mut self, manual: bool) -> Value {
        let hold_ms = self.hold_ms;
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
        let canary_rate = self.profile.requests_per_second * share;
        step["never"] = self.spec.analysis.never_enough(canary_rate).into();
        step["stopped_though_healthy"] = healthy.iter().filter(|run| run.stopped.is_some()).count().into();
        step["ready_seconds"] = median(healthy.iter().map(|run| run.ready), all).into();
        step["errors_found"] = self.smallest(&ERRORS, |errors_added| Regression { errors_added, slower: 1.0 });
        step["slowness_found"] = self.smallest(&SLOWER, |slower| Regression { errors_added: 0.0, slower });
        self.carried = healthy.into_iter().map(|run| run.left).collect();
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
        (0..).zip(&self.carried).map(|(seed, carried)| self.run(regression, seed, carried)).collect()
    }

    /// Plays one run of the step. The next one begins once the pause is over and a healthy canary is ready.
    fn run(&self, regression: Regression, seed: u64, carried: &Carried) -> PlanEnd {
        let analysis = &self.spec.analysis;
        let Carried { mut run, second: since } = carried.clone();
        let before = run.canary_answers();
        let mut window = Window::default();
        let mut traffic = Traffic::new(&self.profile, seed + 1_000_000 * (self.version - 1));
        let mut ended = PlanEnd { stopped: None, ready: None, left: carried.clone() };
        for second in 1..=self.seconds {
            let Profile { requests_per_second, error_rate, .. } = self.profile;
            let evidence = traffic.next(requests_per_second, self.weight.fraction(), error_rate, regression);
            let now = Mono::from_millis(second * 1_000);
            window.add(now, &evidence);
            window.expire(now, analysis.window_ms);
            run.put(&(), since + second - 1, &TickSample { version: self.version, evidence });
            run.advance((since + second) * 1_000, [].iter());
            // As a gate does: the limits on the sliding window, and the comparison. At 100 % there is no stable traffic left to
            // compare with.
            let compared = match run.verdict().unwrap_or(Verdict::Promote) {
                Verdict::Hold(_) if self.weight == Weight::FULL => Verdict::Promote,
                verdict => verdict,
            };
            let enough = analysis.enough_in_step(run.canary_answers() - before);
            match analysis.judge(window.total()).or_worse(enough).or_worse(compared) {
                Verdict::Rollback(_) | Verdict::Pause(_) => {
                    ended.stopped = Some(second);
                    break;
                }
                Verdict::Promote if ended.ready.is_none() => ended.ready = Some(second),
                Verdict::Promote | Verdict::Hold(_) => {}
            }
            let is_over = second * 1_000 >= self.hold_ms && ended.ready.is_some();
            if ended.left.second == since && is_over {
                ended.left = Carried { run: run.clone(), second: since + second };
            }
        }
        if ended.left.second == since && ended.stopped.is_none() {
            ended.left = Carried { run, second: since + self.seconds };
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
            let not_ready = || step["never"].as_str().map_or(format!("not in {played} s"), |_| "never (below)".into());
            row[4] = step["ready_seconds"].as_u64().map_or_else(not_ready, |s| format!("{s} s"));
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
    let never = |(index, step): (usize, &Value)| {
        Some(format!(
            "Step {} {}: raise the weight, lower minSamples or make the window longer.\n",
            index + 1,
            step["never"].as_str()?
        ))
    };
    let never: String = plan["steps"].as_array().into_iter().flatten().enumerate().filter_map(never).collect();
    format!(
        "{}: {:.1} requests a second, {:.3} % errors, p50 {:.1} ms, p95 {:.1} ms; {} s by plan\n\n{}\n\n{never}\
         Ready after: when a canary as good as stable may go on, in the median. Found: the smallest regression of those tried that \
         {FOUND_OF_TEN} of 10\nruns stop for while the step lasts, and the median time that takes. Each step\nbegins where a healthy canary leaves the one before.{not_played}",
        plan["service"].as_str().unwrap_or_default(),
        number(&traffic["requests_per_second"]),
        number(&traffic["error_rate"]) * 100.0,
        number(&traffic["p50_ms"]),
        number(&traffic["p95_ms"]),
        number(&plan["planned_ms"]) / 1000.0,
        rows.trim_fmt(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(step: &str, analysis: &str) -> RolloutSpec {
        let text = format!(
            "apiVersion: aviary/v1\nkind: Rollout\nmetadata: {{ name: s }}\nspec:\n  stable: {{ version: v1, answer: node }}\n  \
             canary: {{ version: v2, answer: node }}\n  steps: [ {step} ]\n  analysis:\n{analysis}"
        );
        (*config::rollout::parse(&text, "r").unwrap()).clone()
    }

    const COMPARED: &str = "    metrics:\n      - { name: errors-vs-stable, strategy: SEQUENTIAL, allowedIncrease: 0.005 }\n      \
        - { name: latency-vs-stable, strategy: SEQUENTIAL, quantile: 0.95, allowedIncrease: 0.10 }\n";

    fn profile(requests_per_second: f64) -> Profile {
        Profile { requests_per_second, error_rate: 0.005, p50_ms: 80.0, p95_ms: 210.0 }
    }

    #[test]
    fn the_documented_comparison_comes_through_one_percent_at_200_requests_a_second() {
        let spec = spec("{ setWeight: 1 }, { pause: { duration: 30m } }, { setWeight: 100 }", COMPARED);
        let steps = steps(&spec, profile(200.0), 5, |_| ());
        let ready = steps[0]["ready_seconds"].as_u64();
        assert!(ready.is_some_and(|seconds| seconds < 1_800), "{ready:?}");
        assert_eq!(steps[0]["never"], Value::Null);
    }

    #[test]
    fn samples_that_can_never_come_are_said_to_be_so() {
        let spec = spec("{ setWeight: 1 }, { pause: { duration: 60s } }, { setWeight: 100 }", "    minSamples: 100\n");
        let plan =
            json!({"service": "s", "traffic": {}, "planned_ms": 0, "steps": steps(&spec, profile(200.0), 5, |_| ())});
        let text = table(&plan);
        assert!(text.contains("never (below)"), "{text}");
        assert!(
            text.contains("Step 1 needs 3.3 canary requests/s, sees 2.0: never at this rate: raise the weight"),
            "{text}"
        );
        assert!(!text.contains("not in"), "{text}");
    }

    #[test]
    fn only_the_steps_that_never_get_their_samples_are_named() {
        let spec = spec("{ setWeight: 1 }, { setWeight: 5 }, { setWeight: 100 }", "    minSamples: 100\n");
        let expected = "the step at 1 % needs 3.3 canary requests/s, sees 2.0: never at this rate";
        assert_eq!(never_at(&spec, 200.0), [expected]);
        assert_eq!(never_at(&spec, 400.0), [""; 0]);
    }

    #[test]
    fn a_step_begins_with_the_evidence_of_the_steps_before() {
        let held = "{ setWeight: 20 }, { pause: { duration: 60s } }, { setWeight: 50 }, { pause: { duration: 60s } }";
        let spec = spec(
            held,
            "    metrics:\n      - { name: errors-vs-stable, strategy: SEQUENTIAL, allowedIncrease: 0.05 }\n",
        );
        let steps = steps(&spec, profile(200.0), 5, |_| ());
        let ready = |step: usize| steps[step]["ready_seconds"].as_u64().unwrap();
        assert!(ready(0) > 30, "the first step waits for 30 s of evidence: {}", ready(0));
        assert!(ready(1) < 25, "the second one needn't wait so long again: {}", ready(1));
    }
}
