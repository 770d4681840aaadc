//! Runs the real record router on a broker in memory, with faults from one seed, and looks for records that were lost,
//! processed twice or out of order.
//!
//! `log` and `broker` are the broker, `services` what reads the topics, `faulty` where calls fail, `world` what happens around
//! the routers, `life` a run, `truth` what must hold, `coverage` what runs must reach, `seeded_bugs` the bugs that must be found.

use std::process::ExitCode;

use anyhow::bail;
use clap::Parser;

mod broker;
mod coverage;
mod faulty;
mod life;
mod log;
mod seeded_bugs;
mod services;
mod truth;
mod world;

use coverage::RouterCoverage;

/// Seeds that a seeded bug may live through.
const SEEDS_MAX: u64 = 500;

/// Seeds that once found something, and what.
const PINNED: &[(u64, &str)] = &[
    (
        1262,
        "the cluster's abort was ignored once somebody had asked for a promotion by hand: records went to the canary",
    ),
    (1671, "the same, and the canary won"),
    (12, "a router went on in a phase that another had entered, with a state of no partitions"),
];

/// Simulates the record router on a broker in memory.
#[derive(Parser)]
struct RouterArguments {
    /// Run this one seed, instead of many.
    #[arg(long)]
    seed: Option<u64>,
    /// Run this many seeds, one after the other.
    #[arg(long, default_value_t = 50)]
    seeds: u64,
    /// Begin with this seed, and count upwards.
    #[arg(long, default_value_t = 1)]
    from: u64,
    /// Print everything that happens in the run.
    #[arg(short, long)]
    verbose: bool,
    /// Go on after a failure.
    #[arg(long)]
    keep_going: bool,
    /// Fail unless everything that a long run must reach was reached.
    #[arg(long)]
    complete: bool,
    /// A hook call may come so late that another router has gone on, which no hook can be kept from.
    #[arg(long)]
    late: bool,
    /// Run each seeded bug on the seed that is pinned to it; one that isn't caught fails.
    #[arg(long)]
    seeded_bugs: bool,
    /// With --seeded-bugs: find the first seed that catches each, for pins that a change has moved.
    #[arg(long, requires = "seeded_bugs")]
    search: bool,
}

fn main() -> anyhow::Result<ExitCode> {
    let arguments = RouterArguments::parse();
    std::panic::set_hook(Box::new(|_| {}));
    if arguments.seeded_bugs {
        return Ok(run_seeded_bugs(arguments.search));
    }
    let seeds = match arguments.seed {
        Some(seed) => seed..seed + 1,
        None => arguments.from..arguments.from + arguments.seeds,
    };
    run(&arguments, seeds)
}

/// Runs the pinned seeds, then those that were asked for.
#[expect(clippy::disallowed_methods, reason = "seeds per second are real seconds; no run depends on them")]
fn run(arguments: &RouterArguments, seeds: std::ops::Range<u64>) -> anyhow::Result<ExitCode> {
    let started = std::time::Instant::now();
    let count = seeds.end - seeds.start;
    let (mut coverage, mut failures) = (RouterCoverage::default(), 0);
    let pinned = PINNED.iter().map(|(seed, _)| *seed).filter(|_| count > 1);
    for seed in pinned.chain(seeds) {
        let outcome = life::run(seed, None, arguments.late, arguments.verbose);
        coverage.add(&outcome.coverage);
        outcome.lines.iter().for_each(|line| println!("{line}"));
        let Some(violation) = outcome.violation else { continue };
        failures += 1;
        if arguments.keep_going {
            println!("seed {seed}: {violation}");
            continue;
        }
        if !arguments.verbose {
            let again = life::run(seed, None, arguments.late, true);
            again.lines.iter().for_each(|line| println!("{line}"));
            if again.violation.as_ref() != Some(&violation) {
                println!("(the second run differed: the run isn't deterministic)");
            }
        }
        println!("\nVIOLATION {violation}");
        let late = if arguments.late { " --late" } else { "" };
        println!("REPRODUCE: cargo run --release -p sim-whole --bin sim-router -- --seed {seed}{late}");
        return Ok(ExitCode::FAILURE);
    }
    let real = started.elapsed().as_secs_f64();
    println!(
        "{count} seeds of the record router in {real:.1} s ({:.0} seeds/s), {failures} failed",
        count as f64 / real
    );
    if count >= 100 {
        coverage.lines().for_each(|line| println!("{line}"));
    }
    let never = coverage.never();
    if arguments.complete && !never.is_empty() {
        bail!("{} events were never seen, expected all in {count} seeds: {}", never.len(), never.join(", "));
    }
    Ok(if failures == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Runs each seeded bug on its pinned seed, where it must be caught; or finds the first seed that catches it.
fn run_seeded_bugs(search: bool) -> ExitCode {
    println!("{:<62} {:>6}  BROKEN RULE", "SEEDED BUG OF THE RECORD ROUTER", "SEED");
    let mut alive = 0;
    for (bug, name, pin) in seeded_bugs::ALL {
        let found = match search {
            true => seeded_bugs::search(bug, SEEDS_MAX),
            false => life::run(pin, Some(bug), false, false).violation.map(|violation| (pin, violation)),
        };
        match found {
            Some((seed, violation)) => {
                let short: String = violation.to_string().chars().take(90).collect();
                println!("{name:<62} {seed:>6}  {short}");
            }
            None => {
                alive += 1;
                println!("{name:<62} {pin:>6}  NOT CAUGHT");
            }
        }
    }
    match alive {
        0 => ExitCode::SUCCESS,
        _ => {
            println!("{alive} seeded bugs live, expected none; if a change moved the pins: --seeded-bugs --search");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_found_once_stays_found() {
        for (seed, about) in PINNED {
            let violation = life::run(*seed, None, false, false).violation;
            assert!(violation.is_none(), "seed {seed} ({about}): {violation:?}");
        }
    }

    #[test]
    fn no_record_is_lost_or_processed_twice_whatever_fails() {
        for seed in 1..=200 {
            let violation = life::run(seed, None, false, false).violation;
            assert!(
                violation.is_none(),
                "{violation:?}; REPRODUCE: cargo run -p sim-whole --bin sim-router -- --seed {seed}"
            );
        }
    }

    #[test]
    fn every_seeded_bug_is_caught() {
        for (bug, name, pin) in seeded_bugs::ALL {
            assert!(life::run(pin, Some(bug), false, false).violation.is_some(), "{name}: not caught by seed {pin}");
        }
    }

    #[test]
    fn a_seed_gives_the_same_run_twice() {
        for seed in 1..=5 {
            assert_eq!(life::run(seed, None, false, true).lines, life::run(seed, None, false, true).lines);
        }
    }
}
