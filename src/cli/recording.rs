//! Recorded or live requests, as lines of JSON, and the analysis run they are fed to.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::Path;

use anyhow::{Context, bail};
use serde::Deserialize;

use crate::config;
use crate::domain::analysis::Analysis;
use crate::domain::classes::ErrorClasses;
use crate::domain::limits;
use crate::domain::run::{AnalysisRun, WindowVerdict};
use crate::domain::sequential::Policy;
use crate::domain::ticks::TickSample;
use crate::domain::window::Tally;

/// Kinds of lines of a recording, as `--help` shows them.
pub const LINES: &str = "  \
    {\"type\":\"start\",\"tick_ms\":1000,\"horizon_ms\":3600000}\n  \
    {\"id\":17,\"timestamp_ms\":12,\"version\":\"stable\",\"status\":200,\"latency_ms\":81.2}\n  \
    {\"type\":\"weight\",\"timestamp_ms\":900000,\"canary_share\":0.2}\n  \
    {\"type\":\"tick\",\"timestamp_ms\":1000}\n  {\"type\":\"end\"}\n\n\
    Only request lines are required. A status of 500 or more is an error. A repeated id counts once. A late request counts in its\n\
    own tick while that is open, otherwise in the next one; a tick stays open as long as recent requests were late.";

#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
enum ControlLine {
    Start { tick_ms: Option<u64>, horizon_ms: Option<u64> },
    Weight { timestamp_ms: u64 },
    Tick { timestamp_ms: u64 },
    End,
}

#[derive(Deserialize)]
struct RequestLine<'l> {
    #[serde(default)]
    id: Option<u64>,
    timestamp_ms: f64,
    version: &'l str,
    status: u16,
    latency_ms: f64,
}

/// Ids that are remembered to know a request that comes again.
const IDS_MAX: usize = 1 << 20;
/// Length of a tick when nobody says, in milliseconds.
const TICK_MS: u64 = 1_000;
/// The latest time that a recording may reach, in milliseconds: a year.
const AT_MS_MAX: u64 = 365 * 24 * 3_600_000;

#[derive(Default)]
struct SeenIds {
    ids: BTreeSet<u64>,
    order: VecDeque<u64>,
}

impl SeenIds {
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

/// How late requests come, in ticks. Failures that belong together must be judged together, so that a tick stays open for as long as
/// requests came late in the last minute; where none do, it is closed at once.
#[derive(Default)]
struct Lateness {
    /// The most of the ticks that are over, and of the one that is open.
    recent: VecDeque<u64>,
    open: u64,
}

/// Ticks that lateness is remembered for.
const LATENESS_TICKS: usize = 60;
/// Most ticks that stay open for who is late.
const LATENESS_MAX: u64 = 10;

impl Lateness {
    fn seen(&mut self, ticks: u64) {
        self.open = self.open.max(ticks.min(LATENESS_MAX));
    }

    /// Ends a tick; returns the most of late.
    fn turn(&mut self) -> u64 {
        self.recent.push_back(std::mem::take(&mut self.open));
        if self.recent.len() > LATENESS_TICKS {
            self.recent.pop_front();
        }
        self.recent.iter().copied().max().unwrap_or(0)
    }
}

/// How a recording is judged.
#[derive(Debug, Clone)]
pub struct Rules {
    analysis: Analysis,
    policy: Option<Policy>,
    classes: ErrorClasses,
}

impl Rules {
    /// Returns a rollout file's rules; without a file: SEQUENTIAL, errors, median and 95th percentile, at this `alpha`.
    pub fn load(file: Option<&Path>, alpha: Option<f64>) -> anyhow::Result<Self> {
        if let Some(alpha) = alpha {
            limits::ALPHA.check(alpha).context("--alpha")?;
        }
        let Some(file) = file else {
            let (analysis, policy) = (Analysis { metrics: Vec::new(), ..Analysis::default() }, Policy::default());
            let alpha = alpha.unwrap_or(policy.alpha);
            let classes = ErrorClasses { client: true, redirect: true };
            return Ok(Self { analysis, policy: Some(Policy { alpha, ..policy }), classes });
        };
        let text = std::fs::read_to_string(file).with_context(|| file.display().to_string())?;
        let spec = config::rollout::parse(&text, &file.display().to_string())?;
        let mut policy = spec.analysis.sequential(spec.planned_ms());
        if let (Some(policy), Some(alpha)) = (&mut policy, alpha) {
            policy.alpha = alpha;
        }
        Ok(Self { analysis: spec.analysis.clone(), policy, classes: spec.compared_classes })
    }

    /// Returns a run by these rules that begins at 0 ms, in ticks of `tick_ms`.
    fn run(&self, policy: Option<Policy>, tick_ms: u64) -> AnalysisRun<()> {
        let mut run = AnalysisRun::new(self.analysis.clone(), policy, tick_ms, 0);
        run.compare_classes(self.classes);
        run
    }
}

/// Result of a line of a recording.
pub enum RecordingStep {
    /// A tick ended, so many milliseconds after the start, with these verdicts.
    Tick(u64, Vec<WindowVerdict>),
    /// The recording says that it is over.
    End,
}

/// A recording on its way into an analysis run.
pub struct Feed {
    rules: Rules,
    pub run: AnalysisRun<()>,
    /// Ticks that aren't closed yet, by the requests' own time.
    open: BTreeMap<u64, Tally>,
    /// The tick in which each weight but the first came into force.
    weights: Vec<u64>,
    lateness: Lateness,
    seen: SeenIds,
    /// True once the recording says itself when a tick is over.
    ticks: bool,
    /// The end of the tick that is open.
    open_ms: u64,
}

impl Feed {
    /// Returns one that begins at 0 ms.
    pub fn new(rules: Rules) -> Self {
        let run = rules.run(rules.policy.clone(), TICK_MS);
        Self {
            rules,
            run,
            open: BTreeMap::new(),
            weights: Vec::new(),
            lateness: Lateness::default(),
            seen: SeenIds::default(),
            ticks: false,
            open_ms: TICK_MS,
        }
    }

    /// Takes the next line; returns the steps that it completes, or why it can't be read.
    pub fn take(&mut self, line: &str) -> anyhow::Result<Vec<RecordingStep>> {
        let mut steps = Vec::new();
        if line.trim().is_empty() {
            return Ok(steps);
        }
        if line.contains("\"type\"") {
            match serde_json::from_str(line)? {
                ControlLine::Start { tick_ms, horizon_ms } => self.start(tick_ms.unwrap_or(TICK_MS), horizon_ms)?,
                ControlLine::Weight { timestamp_ms } => self.weights.push(timestamp_ms / self.run.tick_ms()),
                ControlLine::Tick { timestamp_ms } => {
                    self.ticks = true;
                    self.open_ms = timestamp_ms;
                    steps.push(self.turn());
                }
                ControlLine::End => steps.push(RecordingStep::End),
            }
            return Ok(steps);
        }
        let request: RequestLine = serde_json::from_str(line)?;
        let RequestLine { timestamp_ms: at, latency_ms: latency, .. } = request;
        if !(0.0..=AT_MS_MAX as f64).contains(&at) || !(0.0..=AT_MS_MAX as f64).contains(&latency) {
            bail!("latency {latency} ms at {at} ms, expected both to be 0 to {AT_MS_MAX}");
        }
        while !self.ticks && at >= self.open_ms as f64 {
            steps.push(self.turn());
        }
        let is_canary = match request.version {
            "stable" => false,
            "canary" => true,
            other => bail!("version is {other:?}, expected \"stable\" or \"canary\""),
        };
        if request.id.is_none_or(|id| self.seen.is_new(id)) {
            let now = (self.open_ms / self.run.tick_ms()).saturating_sub(1);
            let tick = (at as u64 / self.run.tick_ms()).min(now);
            self.lateness.seen(now - tick);
            // Whose tick is closed counts in the first one that isn't.
            let tally = self.open.entry(tick.max(self.run.next_tick())).or_default();
            let counts = if is_canary { &mut tally.canary } else { &mut tally.stable };
            counts.record((latency * 1000.0) as u64, request.status >= 500);
            counts.classes.add(request.status);
        }
        Ok(steps)
    }

    /// Ends the tick that is open, as after the last line, and closes those that nobody is late for any more.
    pub fn turn(&mut self) -> RecordingStep {
        let (at_ms, tick_ms) = (self.open_ms, self.run.tick_ms());
        self.open_ms += tick_ms;
        let end = (at_ms / tick_ms).saturating_sub(self.lateness.turn());
        RecordingStep::Tick(at_ms, self.close(end))
    }

    /// Closes all that is open, as at the end; returns what was decided by it.
    pub fn finish(&mut self) -> Vec<WindowVerdict> {
        self.close(self.open_ms / self.run.tick_ms())
    }

    /// Closes the ticks before `end`.
    fn close(&mut self, end: u64) -> Vec<WindowVerdict> {
        let later = self.open.split_off(&end);
        for (tick, mut tally) in std::mem::replace(&mut self.open, later) {
            let version = 1 + self.weights.iter().filter(|since| **since <= tick).count() as u64;
            self.run.put(&(), tick, &TickSample { version, evidence: tally.take() });
        }
        self.run.advance(end * self.run.tick_ms(), [].iter())
    }

    fn start(&mut self, tick_ms: u64, horizon_ms: Option<u64>) -> anyhow::Result<()> {
        if !(10..=60_000).contains(&tick_ms) {
            bail!("tick_ms is {tick_ms}, expected 10 to 60000");
        }
        let mut policy = self.rules.policy.clone();
        if let (Some(policy), Some(horizon_ms)) = (&mut policy, horizon_ms) {
            policy.horizon_seconds = (horizon_ms as f64 / 1000.0).max(1.0);
        }
        self.run = self.rules.run(policy, tick_ms);
        self.open_ms = tick_ms;
        Ok(())
    }
}
