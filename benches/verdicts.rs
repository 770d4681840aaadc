//! SEQUENTIAL beside what others judge by, on the same made-up traffic: how often a healthy canary is rolled back, how long
//! harm takes to be found. `cargo bench --bench verdicts -- [--reps N] [--null N] [--plot FILE.svg]`.
//!
//! The others are models of what their users configure, kept simple: a fixed limit on each 30 s window; Argo Rollouts'
//! `failureLimit` (measurements beyond a limit, counted); Mann-Whitney's test repeated every minute, as Kayenta uses it.

use std::fmt::Write as _;

use aviary::domain::analysis::Analysis;
use aviary::domain::sequential::{Policy, Sequential, SequentialVerdict};
use aviary::domain::window::Evidence;
use aviary::synthetic::{Profile, Regression, Traffic};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// How long a run lasts, in seconds.
const SECONDS: u64 = 1_800;
const PROFILE: Profile = Profile { requests_per_second: 100.0, error_rate: 0.005, p50_ms: 80.0, p95_ms: 215.0 };

/// One second of a scenario.
struct Moment {
    requests: f64,
    share: f64,
    /// Of both versions.
    errors: f64,
    canary: Regression,
    weight_changes: bool,
}

struct Scenario {
    name: &'static str,
    /// When harm begins; none for a healthy canary.
    onset: Option<u64>,
    /// What a second is like; the random number belongs to the run, and is the same for all its seconds.
    at: fn(second: u64, run: f64) -> Moment,
}

fn plain() -> Moment {
    Moment {
        requests: PROFILE.requests_per_second,
        share: 0.05,
        errors: PROFILE.error_rate,
        canary: Regression::NONE,
        weight_changes: false,
    }
}

fn worse(errors_added: f64, slower: f64) -> Moment {
    Moment { canary: Regression { errors_added, slower }, ..plain() }
}

/// Bursts of errors that both versions share: every 150 s or so, 5 to 20 s long.
fn burst(second: u64, run: f64) -> f64 {
    let phase = (second as f64 + run * 150.0) % 150.0;
    let length = 5.0 + 15.0 * run;
    if phase < length { 0.02 + 0.13 * run } else { PROFILE.error_rate }
}

const SCENARIOS: [Scenario; 12] = [
    Scenario { name: "healthy", onset: None, at: |_, _| plain() },
    Scenario { name: "healthy, 1 request/s", onset: None, at: |_, _| Moment { requests: 1.0, ..plain() } },
    Scenario {
        name: "healthy, bursts of errors in both",
        onset: None,
        at: |second, run| Moment { errors: burst(second, run), ..plain() },
    },
    Scenario {
        name: "healthy, cold start",
        onset: None,
        at: |second, _| worse(0.0, 1.0 + 2.0 * (-(second as f64) / 8.0).exp()),
    },
    Scenario {
        name: "healthy, incident after a step from 5 to 50 %",
        onset: None,
        at: |second, _| Moment {
            share: if second >= 900 { 0.5 } else { 0.05 },
            errors: if (1_000..1_120).contains(&second) { 0.2 } else { PROFILE.error_rate },
            weight_changes: second == 900,
            ..plain()
        },
    },
    Scenario { name: "every request fails", onset: Some(0), at: |_, _| worse(1.0, 1.0) },
    Scenario { name: "+5 % errors", onset: Some(0), at: |_, _| worse(0.05, 1.0) },
    Scenario {
        name: "+5 % errors after 15 min",
        onset: Some(900),
        at: |second, _| if second < 900 { plain() } else { worse(0.05, 1.0) },
    },
    Scenario { name: "errors ×5, from 0.5 %", onset: Some(0), at: |_, _| worse(0.02, 1.0) },
    Scenario {
        name: "+20 % errors, 1 request/s",
        onset: Some(0),
        at: |_, _| Moment { requests: 1.0, ..worse(0.2, 1.0) },
    },
    Scenario { name: "latency +20 %", onset: Some(0), at: |_, _| worse(0.0, 1.2) },
    Scenario {
        name: "latency +20 % after 15 min",
        onset: Some(900),
        at: |second, _| if second < 900 { plain() } else { worse(0.0, 1.2) },
    },
];

/// Says when a canary is rolled back.
trait Detector {
    /// Takes a second; returns true to roll back.
    fn take(&mut self, second: u64, evidence: &Evidence, weight_changes: bool) -> bool;
}

/// More than 5 % errors in a closed window of 30 s.
#[derive(Default)]
struct Threshold(Evidence);

impl Detector for Threshold {
    fn take(&mut self, second: u64, evidence: &Evidence, _: bool) -> bool {
        self.0.merge(evidence);
        second.is_multiple_of(30)
            && Analysis { min_samples: 1, ..Analysis::default() }.judge(&std::mem::take(&mut self.0)).word()
                == "ROLLBACK"
    }
}

/// A measurement each 30 s: success of at least 99 %, mean latency at most a tenth above stable's at the start; the fourth
/// that isn't so ends the rollout.
#[derive(Default)]
struct FailureLimit {
    window: Evidence,
    limit_ms: Option<f64>,
    failures: u32,
}

impl Detector for FailureLimit {
    fn take(&mut self, second: u64, evidence: &Evidence, _: bool) -> bool {
        self.window.merge(evidence);
        if !second.is_multiple_of(30) {
            return false;
        }
        let Evidence { stable, canary } = std::mem::take(&mut self.window);
        let limit_ms = *self.limit_ms.get_or_insert_with(|| stable.mean_ms().unwrap_or(f64::MAX) * 1.1);
        let failing = canary.error_rate().is_some_and(|rate| rate > 0.01);
        self.failures += u32::from(failing || canary.mean_ms().is_some_and(|mean| mean > limit_ms));
        self.failures > 3
    }
}

/// Mann-Whitney's test, one-sided, every minute, on the last 50 points of 10 s each: errors, then mean latency; p < 0.01.
#[derive(Default)]
struct MannWhitney {
    window: Evidence,
    points: Vec<[(f64, f64); 2]>,
}

impl Detector for MannWhitney {
    fn take(&mut self, second: u64, evidence: &Evidence, _: bool) -> bool {
        self.window.merge(evidence);
        if second.is_multiple_of(10) {
            let Evidence { stable, canary } = std::mem::take(&mut self.window);
            if let (Some(a), Some(b), Some(c), Some(d)) =
                (stable.error_rate(), canary.error_rate(), stable.mean_ms(), canary.mean_ms())
            {
                self.points.push([(a, b), (c, d)]);
            }
        }
        let recent = &self.points[self.points.len().saturating_sub(50)..];
        second.is_multiple_of(60) && recent.len() >= 10 && (0..2).any(|metric| is_greater(recent, metric))
    }
}

/// Returns true when the canary's points are greater than stable's: z > 2.326, with the correction for ties.
fn is_greater(points: &[[(f64, f64); 2]], metric: usize) -> bool {
    let mut all: Vec<(f64, bool)> =
        points.iter().flat_map(|point| [(point[metric].0, false), (point[metric].1, true)]).collect();
    all.sort_by(|a, b| a.0.total_cmp(&b.0));
    let (n, total) = (points.len() as f64, all.len() as f64);
    let (mut rank_sum, mut ties, mut at) = (0.0, 0.0, 0);
    while at < all.len() {
        let same = all[at..].iter().take_while(|point| point.0 == all[at].0).count();
        let rank = at as f64 + (same as f64 + 1.0) / 2.0;
        rank_sum += rank * all[at..at + same].iter().filter(|point| point.1).count() as f64;
        ties += (same as f64).powi(3) - same as f64;
        at += same;
    }
    let u = rank_sum - n * (n + 1.0) / 2.0;
    let variance = n * n / 12.0 * (total + 1.0 - ties / (total * (total - 1.0)));
    variance > 0.0 && (u - n * n / 2.0) / variance.sqrt() > 2.326
}

struct Ours(Sequential);

impl Detector for Ours {
    fn take(&mut self, second: u64, evidence: &Evidence, weight_changes: bool) -> bool {
        if weight_changes {
            self.0.weight_changed();
        }
        self.0.advance(second * 1_000, evidence).decision == SequentialVerdict::Rollback
    }
}

const NAMES: [&str; 4] = ["threshold, 30 s", "failureLimit", "Mann-Whitney, each minute", "SEQUENTIAL"];

fn detectors() -> [Box<dyn Detector>; 4] {
    let policy = Policy { horizon_seconds: SECONDS as f64, ..Policy::default() };
    [
        Box::new(Threshold::default()),
        Box::new(FailureLimit::default()),
        Box::new(MannWhitney::default()),
        Box::new(Ours(Sequential::new(policy))),
    ]
}

/// Returns when each detector rolled back.
fn run(scenario: &Scenario, seed: u64) -> [Option<u64>; 4] {
    let mut traffic = Traffic::new(&PROFILE, seed);
    let luck = traffic.chance();
    let mut detectors = detectors();
    let mut ended = [None; 4];
    for second in 1..=SECONDS {
        let moment = (scenario.at)(second - 1, luck);
        let evidence = traffic.next(moment.requests, moment.share, moment.errors, moment.canary);
        for (ended, detector) in ended.iter_mut().zip(&mut detectors).filter(|(ended, _)| ended.is_none()) {
            if detector.take(second, &evidence, moment.weight_changes) {
                *ended = Some(second);
            }
        }
        if ended.iter().all(Option::is_some) {
            break;
        }
    }
    ended
}

/// What one detector did in one scenario.
enum Cell {
    /// Rolled back so many of all, healthy as they were.
    False(usize, usize),
    /// Found it in so many, of all, after this median time; and was wrong before its onset in so many.
    Found(usize, usize, Option<u64>, usize),
}

fn cell(scenario: &Scenario, ended: &[Option<u64>]) -> Cell {
    let all = ended.len();
    let Some(onset) = scenario.onset else { return Cell::False(ended.iter().flatten().count(), all) };
    let early = ended.iter().flatten().filter(|second| **second <= onset).count();
    let mut found: Vec<u64> = ended.iter().flatten().filter(|second| **second > onset).map(|at| at - onset).collect();
    found.sort_unstable();
    Cell::Found(found.len(), all, found.get(all / 2).copied(), early)
}

fn text(cell: &Cell) -> String {
    match cell {
        Cell::False(wrong, all) => format!("{:.2}", *wrong as f64 / *all as f64),
        Cell::Found(found, all, median, early) => {
            let median =
                median.map_or_else(|| format!("found {:.2}", *found as f64 / *all as f64), |s| format!("{s} s"));
            let early =
                if *early > 0 { format!(" ({:.2} before it)", *early as f64 / *all as f64) } else { String::new() };
            median + &early
        }
    }
}

/// Returns the plot: delays on a logarithmic axis, and false rollbacks.
fn plot(rows: &[(&str, Vec<Cell>)]) -> String {
    const COLOURS: [&str; 4] = ["#999999", "#d08a2e", "#7a5fb0", "#1a7f5a"];
    let (left, width, row) = (300.0, 520.0, 26.0);
    let height = 70.0 + row * rows.len() as f64 + 40.0;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{}\" height=\"{height}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n",
        left + width + 60.0
    );
    for (i, (name, colour)) in NAMES.iter().zip(COLOURS).enumerate() {
        let x = 20.0 + 215.0 * i as f64;
        let _ = writeln!(
            svg,
            "<circle cx=\"{x}\" cy=\"20\" r=\"5\" fill=\"{colour}\"/><text x=\"{}\" y=\"24\">{name}</text>",
            x + 10.0
        );
    }
    let scale = |seconds: f64| left + width * (seconds.max(1.0).ln() / (SECONDS as f64).ln());
    let mut y = 56.0;
    let mut harmful = false;
    for (name, cells) in rows {
        if !harmful && matches!(cells[0], Cell::Found(..)) {
            harmful = true;
            for seconds in [1.0, 10.0, 100.0, 1_000.0] {
                let x = scale(seconds);
                let _ = writeln!(
                    svg,
                    "<text x=\"{x}\" y=\"{}\" text-anchor=\"middle\" fill=\"#555\">{seconds} s</text>\
                     <line x1=\"{x}\" x2=\"{x}\" y1=\"{}\" y2=\"{}\" stroke=\"#ddd\"/>",
                    y + 8.0,
                    y + 12.0,
                    height - 10.0
                );
            }
            y += 30.0;
        }
        let _ = writeln!(svg, "<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{name}</text>", left - 14.0, y + 4.0);
        let _ = writeln!(svg, "<line x1=\"{left}\" x2=\"{}\" y1=\"{y}\" y2=\"{y}\" stroke=\"#eee\"/>", left + width);
        for (i, (cell, colour)) in cells.iter().zip(COLOURS).enumerate() {
            let y = y + (i as f64 - 1.5) * 3.0;
            match cell {
                Cell::False(wrong, all) => {
                    let x = left + width * *wrong as f64 / *all as f64;
                    let _ = writeln!(svg, "<circle cx=\"{x}\" cy=\"{y}\" r=\"5\" fill=\"{colour}\"/>");
                }
                Cell::Found(_, _, Some(median), _) => {
                    let x = scale(*median as f64);
                    let _ = writeln!(svg, "<circle cx=\"{x}\" cy=\"{y}\" r=\"5\" fill=\"{colour}\"/>");
                }
                Cell::Found(..) => {
                    let x = left + width + 10.0 + 10.0 * i as f64;
                    let _ = writeln!(svg, "<text x=\"{x}\" y=\"{}\" fill=\"{colour}\">–</text>", y + 4.0);
                }
            }
        }
        y += row;
    }
    let _ = writeln!(
        svg,
        "<text x=\"{left}\" y=\"46\" fill=\"#555\">0</text><text x=\"{}\" y=\"46\" text-anchor=\"end\" fill=\"#555\">all healthy \
         canaries rolled back</text>\n</svg>",
        left + width
    );
    svg
}

/// The property itself: a canary that is no worse, while both versions' errors jump about; never more than α of runs.
fn null(rounds: u64) {
    println!("\n| α | runs | rolled back | share | 95 % interval |\n|---:|---:|---:|---:|---|");
    let lines = std::thread::scope(|scope| {
        let handles = [0.2, 0.05, 0.01].map(|alpha| scope.spawn(move || (alpha, nulls(rounds, alpha))));
        handles.map(|handle| handle.join().expect("no panic"))
    });
    for (alpha, found) in lines {
        let (n, share) = (rounds as f64, found as f64 / rounds as f64);
        // Wilson's interval.
        let z = 1.96f64;
        let middle = (share + z * z / (2.0 * n)) / (1.0 + z * z / n);
        let half = z * (share * (1.0 - share) / n + z * z / (4.0 * n * n)).sqrt() / (1.0 + z * z / n);
        println!(
            "| {alpha} | {rounds} | {found} | {share:.4} | {:.4} to {:.4} |",
            (middle - half).max(0.0),
            middle + half
        );
        assert!(middle - half <= alpha, "{found} of {rounds} at α = {alpha}");
    }
}

fn nulls(rounds: u64, alpha: f64) -> u64 {
    let policy = Policy { alpha, horizon_seconds: 300.0, ..Policy::default() };
    let is_rolled_back = |seed: u64| {
        let mut traffic = Traffic::new(&PROFILE, 1_000_000 + seed);
        let mut test = Sequential::new(policy.clone());
        let (mut left, mut rate) = (0u64, 0.01);
        (1..=300).any(|second| {
            if left == 0 {
                left = 1 + (traffic.chance() * 30.0) as u64;
                rate = if traffic.chance() < 0.3 { traffic.chance() * 0.5 } else { 0.01 };
            }
            left -= 1;
            let evidence = traffic.next(60.0, 0.2, rate, Regression::NONE);
            test.advance(second * 1_000, &evidence).decision == SequentialVerdict::Rollback
        })
    };
    (0..rounds).filter(|seed| is_rolled_back(*seed)).count() as u64
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let value = |name: &str| arguments.iter().position(|argument| argument == name).map(|at| arguments[at + 1].clone());
    let reps: u64 = value("--reps").map_or(20, |reps| reps.parse().expect("--reps needs a number"));
    println!(
        "{reps} runs of {SECONDS} s each; share of healthy canaries rolled back, or median time until harm is found\n"
    );
    println!("| scenario | {} |\n|---|{}", NAMES.join(" | "), "---:|".repeat(NAMES.len()));
    let mut rows = Vec::new();
    for scenario in &SCENARIOS {
        let ended: Vec<_> = (0..reps).map(|seed| run(scenario, seed)).collect();
        let of = |detector: usize| ended.iter().map(|run| run[detector]).collect::<Vec<_>>();
        let cells: Vec<_> = (0..NAMES.len()).map(|detector| cell(scenario, &of(detector))).collect();
        println!("| {} | {} |", scenario.name, cells.iter().map(text).collect::<Vec<_>>().join(" | "));
        rows.push((scenario.name, cells));
    }
    if let Some(file) = value("--plot") {
        std::fs::write(&file, plot(&rows)).unwrap_or_else(|error| panic!("{file}: {error}"));
    }
    if let Some(rounds) = value("--null") {
        null(rounds.parse().expect("--null needs a number"));
    }
}
