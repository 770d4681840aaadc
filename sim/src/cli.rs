//! The command line: which seeds to run, and what to say of them.

use std::collections::BTreeMap;
use std::process::{Command, ExitCode};

use anyhow::{Context, bail, ensure};
use clap::Parser;

use crate::coverage::Coverage;
use crate::invariants::Violation;
use crate::seeded_bugs::SeededBug;
use crate::subject::Real;
use crate::world::{FAULTS, Options, Summary, World};
use crate::{exhaust, scenarios, seeded_bugs, shrink};

/// Simulates clusters and checks the protocol's invariants after every step.
#[derive(Parser)]
#[command(after_help = "Examples:\n  \
    cargo run --release -p sim -- --seed 42               one cluster's life, and what became of it\n  \
    cargo run --release -p sim -- --seeds 10000           look for a seed that breaks a rule\n  \
    cargo run --release -p sim -- --seed 42 --shrink      make a failing run small\n  \
    cargo run --release -p sim -- --seeded-bugs           would seeded bugs be found?")]
struct Arguments {
    /// Run this one seed, instead of many.
    #[arg(long)]
    seed: Option<u64>,
    /// Run this many seeds, one after the other.
    #[arg(long, default_value_t = 50)]
    seeds: u64,
    /// Begin with this seed, and count upwards.
    #[arg(long, default_value_t = 1)]
    from: u64,
    /// Length of the faulty part, in virtual milliseconds; the liveness phase follows it.
    #[arg(long, default_value_t = 60_000)]
    ms: u64,
    /// Nodes; drawn from each seed when absent.
    #[arg(long, value_parser = clap::value_parser!(u8).range(1..=7))]
    nodes: Option<u8>,
    /// Leave these kinds of faults out.
    #[arg(long, value_delimiter = ',', value_parser = clap::builder::PossibleValuesParser::new(FAULTS))]
    without: Vec<String>,
    /// Print everything that happens in the run.
    #[arg(short, long)]
    verbose: bool,
    /// Make the failing run smaller before it is reported.
    #[arg(long)]
    shrink: bool,
    /// Run the seeds in two processes and compare the traces.
    #[arg(long)]
    determinism: bool,
    /// Print each seed's trace hash, and nothing else.
    #[arg(long)]
    hashes: bool,
    /// Go on after a failure, and count failures by kind.
    #[arg(long)]
    keep_going: bool,
    /// Fail unless everything that a long run must reach was reached.
    #[arg(long)]
    complete: bool,
    /// Go through every order of everything at small bounds: crashes, wipes, timeouts, requests, losses, such as
    /// 1,1,1,2,0.
    #[arg(long, value_name = "C,W,T,R,L", value_delimiter = ',')]
    exhaust: Option<Vec<u8>>,
    /// States at which an exhaustive search stops.
    #[arg(long, default_value_t = 3_000_000)]
    states: usize,
    /// Run each seeded bug on the seed that is pinned to it; one that isn't caught fails.
    #[arg(long)]
    seeded_bugs: bool,
    /// With --seeded-bugs: find the first seed that catches each, for pins that a change has moved.
    #[arg(long, requires = "seeded_bugs")]
    search: bool,
    /// With --seeded-bugs: only those whose name holds this.
    #[arg(long, requires = "seeded_bugs", default_value = "")]
    bug: String,
    /// Run this pinned scenario instead of seeds; `--list` names them.
    #[arg(long)]
    scenario: Option<String>,
    /// List the pinned scenarios, each with what it once found.
    #[arg(long)]
    list: bool,
}

/// Seeds that a seeded bug may live through.
const SEEDS_MAX: u64 = 6_000;

/// Does what the command line says.
pub fn main() -> anyhow::Result<ExitCode> {
    let arguments = Arguments::parse();
    if arguments.list {
        scenarios::ALL.iter().for_each(|s| println!("{:<24} seed {:<8} {}", s.name, s.seed, s.about));
        return Ok(ExitCode::SUCCESS);
    }
    std::panic::set_hook(Box::new(|_| {}));
    let nodes = arguments.nodes.map(usize::from);
    let place = |name: &String| FAULTS.iter().position(|fault| fault == name).expect("clap knows them");
    let without = arguments.without.iter().fold(0, |bits, name| bits | 1 << place(name));
    let mut options = Options { seed: 0, ms: arguments.ms, nodes, words: false, print: arguments.verbose, without };
    let (mut from, mut count) = (arguments.from, arguments.seeds);
    if let Some(seed) = arguments.seed {
        (from, count) = (seed, 1);
    }
    if let Some(name) = &arguments.scenario {
        let found = scenarios::ALL.iter().find(|scenario| scenario.name == name);
        let scenario = found.with_context(|| format!("scenario {name:?} is unknown, expected one of --list"))?;
        options = Options { print: arguments.verbose, ..scenario.options() };
        (from, count) = (scenario.seed, 1);
    }
    let seeds = from..from + count;
    if arguments.hashes {
        for seed in seeds {
            println!("{seed} {:016x}", trace_of(Options { seed, ..options }));
        }
        return Ok(ExitCode::SUCCESS);
    }
    if let Some(bounds) = &arguments.exhaust {
        return exhaust_all(bounds, arguments.states);
    }
    if arguments.determinism {
        return compare_processes(count);
    }
    refuse_chance(Options { seed: from, ms: 500, print: false, ..options })?;
    if arguments.seeded_bugs {
        let bugs: Vec<_> = seeded_bugs::ALL.iter().filter(|bug| bug.name.contains(&arguments.bug)).collect();
        return Ok(if arguments.search { search_pins(&bugs, options) } else { run_pins(&bugs, options) });
    }
    run(&arguments, seeds, options)
}

fn exhaust_all(bounds: &[u8], states: usize) -> anyhow::Result<ExitCode> {
    let [crashes, wipes, timeouts, requests, losses] =
        bounds.try_into().with_context(|| format!("found {} numbers, expected 5: C,W,T,R,L", bounds.len()))?;
    ensure!(requests <= 3, "{requests} requests, expected at most 3");
    match exhaust::search(exhaust::Bounds { crashes, wipes, timeouts, requests, losses, states }) {
        Ok(found) => {
            println!("{found:?}");
            Ok(if found.complete { ExitCode::SUCCESS } else { ExitCode::from(2) })
        }
        Err(what) => {
            println!("VIOLATION {what}");
            Ok(ExitCode::FAILURE)
        }
    }
}

fn trace_of(options: Options) -> u64 {
    let mut world = World::<Real>::new(options);
    let _ = world.run();
    world.trace.hash()
}

/// A build in which the same seed doesn't give the same run finds nothing that anybody could look at again.
fn refuse_chance(options: Options) -> anyhow::Result<()> {
    let (one, two) = (trace_of(options), trace_of(options));
    ensure!(
        one == two,
        "this build isn't deterministic: seed {} gave the trace {one:016x}, then {two:016x}; \
         something reads a clock, a random number or a map's order",
        options.seed
    );
    Ok(())
}

/// Runs the same seeds in two processes, whose maps are ordered differently.
fn compare_processes(count: u64) -> anyhow::Result<ExitCode> {
    let mut arguments: Vec<_> = std::env::args().skip(1).filter(|argument| argument != "--determinism").collect();
    arguments.push("--hashes".into());
    let program = std::env::current_exe()?;
    let run = || anyhow::Ok(Command::new(&program).args(&arguments).output()?.stdout);
    let (one, two) = (String::from_utf8(run()?)?, String::from_utf8(run()?)?);
    for (line, other) in one.lines().zip(two.lines()) {
        ensure!(line == other, "the run isn't deterministic: one process found {line}, another {other}");
    }
    let found = one.lines().count() as u64;
    ensure!(found == count && one == two, "{found} traces, expected {count}");
    println!("{count} seeds: the same traces in two processes");
    Ok(ExitCode::SUCCESS)
}

#[expect(clippy::disallowed_methods, reason = "seeds per second are real seconds; no run depends on them")]
fn run(arguments: &Arguments, seeds: std::ops::Range<u64>, options: Options) -> anyhow::Result<ExitCode> {
    let started = std::time::Instant::now();
    let count = seeds.end - seeds.start;
    let mut total = Summary::default();
    let mut coverage = Coverage::default();
    let mut failures = BTreeMap::<&str, Vec<u64>>::new();
    for seed in seeds {
        let options = Options { seed, ..options };
        let mut world = World::<Real>::new(options);
        let result = world.run();
        coverage.add(&world.coverage);
        match result {
            Ok(summary) => {
                if count <= 10 {
                    println!("seed {seed}: trace {:016x}, {summary:?}", summary.hash);
                }
                add(&mut total, &summary);
            }
            Err(violation) if arguments.keep_going => {
                println!("seed {seed}: {violation}");
                failures.entry(violation.invariant).or_default().push(seed);
            }
            Err(violation) => {
                report(options, violation, arguments.shrink);
                return Ok(ExitCode::FAILURE);
            }
        }
        let done = total.us as f64 / 1e6;
        if count > 500 && (seed + 1).is_multiple_of(1_000) {
            let real = started.elapsed().as_secs_f64();
            eprintln!("seed {seed}: {real:.0} s, {:.0}x real time", done / real);
        }
    }
    let (real, virtual_s) = (started.elapsed().as_secs_f64(), total.us as f64 / 1e6);
    println!(
        "{count} seeds in {real:.1} s ({:.1} seeds/s, {:.0}x real time): {} slots, {} increases ({} in doubt), {} crashes, {} wipes, {} installs, {} steps with canary traffic",
        count as f64 / real,
        virtual_s / real,
        total.slots,
        total.increases,
        total.in_doubt,
        total.crashes,
        total.wipes,
        total.installs,
        total.exposed
    );
    if count >= 100 {
        coverage.report().iter().for_each(|line| println!("{line}"));
    }
    for (invariant, seeds) in &failures {
        println!("FAILED {invariant}: {} seeds: {:?}", seeds.len(), &seeds[..seeds.len().min(12)]);
    }
    let never = coverage.never();
    if arguments.complete && !never.is_empty() {
        bail!("{} moments were never reached, expected all in {count} seeds: {}", never.len(), never.join(", "));
    }
    Ok(if failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn add(total: &mut Summary, one: &Summary) {
    total.us += one.us;
    total.slots += one.slots;
    total.increases += one.increases;
    total.in_doubt += one.in_doubt;
    total.crashes += one.crashes;
    total.wipes += one.wipes;
    total.installs += one.installs;
    total.exposed += one.exposed;
}

/// Runs each seeded bug on its pinned seed: each must be caught, by the rule that is pinned.
fn run_pins(bugs: &[&SeededBug], options: Options) -> ExitCode {
    println!("{:<52} {:>6}  BROKEN RULE", "SEEDED BUG", "SEED");
    let mut alive = 0;
    for bug in bugs {
        if bug.pin.rule == seeded_bugs::BY_SCRIPT {
            println!("{:<52} {:>6}  an event script catches it, in the tests", bug.name, "-");
            continue;
        }
        let found = bug.run_pinned(options);
        let seed = bug.pin.seed;
        match &found {
            Some(violation) if violation.invariant == bug.pin.rule => {
                let short: String = violation.what.chars().take(90).collect();
                println!("{:<52} {seed:>6}  {}: {short}", bug.name, violation.invariant);
            }
            other => {
                alive += 1;
                let found = other.as_ref().map(|violation| (violation.invariant, &violation.what));
                println!("{:<52} {seed:>6}  NOT CAUGHT: found {found:?}, expected {}", bug.name, bug.pin.rule);
            }
        }
    }
    if alive > 0 {
        println!("{alive} seeded bugs live, expected none; if a change moved the pins: --seeded-bugs --search");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

/// Finds the first seed that catches each seeded bug, and what breaks there.
fn search_pins(bugs: &[&SeededBug], options: Options) -> ExitCode {
    let mut alive = 0;
    for bug in bugs {
        match bug.search(options, SEEDS_MAX) {
            Some((seed, violation)) => {
                let moved = (seed, violation.invariant) != (bug.pin.seed, bug.pin.rule);
                let mark = if moved { "MOVED" } else { "" };
                println!("{:<52} {seed:>6}  {:?} {mark}", bug.name, violation.invariant);
            }
            None => {
                alive += 1;
                println!("{:<52} {SEEDS_MAX:>6}  NOT CAUGHT", bug.name);
            }
        }
    }
    if alive == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Runs the failing seed again with words, and says all about it.
fn report(options: Options, violation: Violation, shrink: bool) {
    let (options, violation) = match shrink {
        true => {
            println!("{violation}; looking for a smaller run");
            shrink::shrink(options, violation)
        }
        false => (options, violation),
    };
    let mut world = World::<Real>::new(Options { words: true, ..options });
    let again = world.run();
    world.trace.lines().for_each(|line| println!("{line}"));
    world.states().iter().for_each(|line| println!("{line}"));
    println!("\nVIOLATION {violation}");
    if !again.is_err_and(|again| again == violation) {
        println!("(the second run differed: the run isn't deterministic)");
    }
    println!("REPRODUCE: cargo run --release -p sim -- {}", options.arguments());
}
