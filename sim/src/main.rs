//! Runs the real protocol core in a simulated world and looks for broken invariants.
//!
//! Everything follows from one seed: network, disks, clocks, crashes, operators, traffic. `world` is the world, `truth`
//! the omniscient observer, `invariants` what must hold after every step, `subject` the seam to the core.

use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::Parser;

mod dice;
mod invariants;
mod scenarios;
mod subject;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod toy;
mod trace;
mod truth;
mod world;

use subject::Real;
use world::{Options, Summary, Violation, World};

/// Simulates clusters and checks the protocol's invariants after every step.
#[derive(Parser)]
struct Arguments {
    /// Run this one seed.
    #[arg(long)]
    seed: Option<u64>,
    /// Run this many seeds.
    #[arg(long, default_value_t = 50)]
    seeds: u64,
    /// Begin with this seed.
    #[arg(long, default_value_t = 1)]
    from: u64,
    /// Length of the faulty part, in virtual milliseconds; the liveness phase follows it.
    #[arg(long, default_value_t = 20_000)]
    ms: u64,
    /// Nodes; drawn from each seed when absent.
    #[arg(long, value_parser = clap::value_parser!(u8).range(1..=7))]
    nodes: Option<u8>,
    /// Print everything that happens.
    #[arg(short, long)]
    verbose: bool,
    /// Run each seed twice and compare.
    #[arg(long)]
    twice: bool,
    /// Go on after a failure, and count failures by kind.
    #[arg(long)]
    keep_going: bool,
    /// Run this pinned scenario.
    #[arg(long)]
    scenario: Option<String>,
    /// List the pinned scenarios.
    #[arg(long)]
    list: bool,
}

fn main() -> anyhow::Result<ExitCode> {
    let arguments = Arguments::parse();
    if arguments.list {
        scenarios::ALL.iter().for_each(|s| println!("{:<24} seed {:<8} {}", s.name, s.seed, s.about));
        return Ok(ExitCode::SUCCESS);
    }
    let mut nodes = arguments.nodes.map(usize::from);
    let (mut from, mut count, mut ms) = (arguments.from, arguments.seeds, arguments.ms);
    if let Some(seed) = arguments.seed {
        (from, count) = (seed, 1);
    }
    if let Some(name) = &arguments.scenario {
        let found = scenarios::ALL.iter().find(|scenario| scenario.name == name);
        let scenario = found.with_context(|| format!("scenario {name:?} is unknown, expected one of --list"))?;
        (from, count, ms) = (scenario.seed, 1, scenario.ms);
        nodes = scenario.nodes;
    }
    std::panic::set_hook(Box::new(|info| eprintln!("panic: {info}")));
    run(&arguments, from, count, Options { seed: 0, ms, nodes, words: false, print: arguments.verbose })
}

#[expect(clippy::disallowed_methods, reason = "seeds per second are real seconds; no run depends on them")]
fn run(arguments: &Arguments, from: u64, count: u64, options: Options) -> anyhow::Result<ExitCode> {
    let started = std::time::Instant::now();
    let mut total = Summary::default();
    let mut failures = std::collections::BTreeMap::<&str, Vec<u64>>::new();
    for seed in from..from + count {
        let options = Options { seed, ..options };
        let result = World::<Real>::new(options).run();
        if arguments.twice {
            let again = World::<Real>::new(options).run();
            if let (Ok(one), Ok(two)) = (&result, &again)
                && one.hash != two.hash
            {
                bail!("seed {seed}: trace hash {:016x}, then {:016x}: the run isn't deterministic", one.hash, two.hash);
            }
        }
        match result {
            Ok(summary) => {
                if count <= 10 {
                    println!("seed {seed}: trace {:016x}, {summary:?}", summary.hash);
                }
                add(&mut total, &summary);
            }
            Err(violation) if arguments.keep_going => {
                println!("seed {seed}: {}: {}", violation.invariant, violation.what);
                failures.entry(violation.invariant).or_default().push(seed);
            }
            Err(violation) => {
                report(options, &violation);
                return Ok(ExitCode::FAILURE);
            }
        }
    }
    let (real, virtual_s) = (started.elapsed().as_secs_f64(), total.us as f64 / 1e6);
    println!(
        "{count} seeds in {real:.1} s ({:.1} seeds/s, {:.0}x real time): {} slots, {} raises ({} unarmed), {} crashes, {} wipes, {} installs, {} steps with canary traffic",
        count as f64 / real,
        virtual_s / real,
        total.slots,
        total.raises,
        total.unarmed,
        total.crashes,
        total.wipes,
        total.installs,
        total.exposed
    );
    for (invariant, seeds) in &failures {
        println!("FAILED {invariant}: {} seeds: {:?}", seeds.len(), &seeds[..seeds.len().min(12)]);
    }
    Ok(if failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn add(total: &mut Summary, one: &Summary) {
    total.us += one.us;
    total.slots += one.slots;
    total.raises += one.raises;
    total.unarmed += one.unarmed;
    total.crashes += one.crashes;
    total.wipes += one.wipes;
    total.installs += one.installs;
    total.exposed += one.exposed;
}

/// Runs the failing seed again with words, and says all about it.
fn report(options: Options, violation: &Violation) {
    let mut world = World::<Real>::new(Options { words: true, ..options });
    let again = world.run();
    world.trace.lines().for_each(|line| println!("{line}"));
    world.states().iter().for_each(|line| println!("{line}"));
    println!("\nVIOLATION {}: {}", violation.invariant, violation.what);
    if !again.is_err_and(|again| again.what == violation.what) {
        println!("(the second run differed: the run isn't deterministic)");
    }
    let nodes = options.nodes.map(|nodes| format!(" --nodes {nodes}")).unwrap_or_default();
    println!("REPRODUCE: cargo run -p sim -- --seed {} --ms {}{nodes}", options.seed, options.ms);
}
