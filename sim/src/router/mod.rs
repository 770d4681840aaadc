//! Runs the real record router on a broker in memory, with faults from one seed, and looks for records that were lost,
//! processed twice or out of order.
//!
//! `log` and `broker` are the broker, `services` what reads the topics, `door` where calls fail, `world` what happens around
//! the routers, `life` a run, `truth` what must hold, `coverage` what runs must reach, `teeth` the bugs that must be found.

use std::process::ExitCode;

use anyhow::bail;

mod broker;
mod coverage;
mod door;
mod life;
mod log;
mod services;
mod teeth;
mod truth;
mod world;

use coverage::RouterCoverage;

/// Seeds that a seeded bug may live through.
const TEETH_SEEDS: u64 = 500;

/// Seeds that once found something, and what.
const PINNED: &[(u64, &str)] = &[
    (
        1262,
        "the cluster's abort was ignored once somebody had asked for a promotion by hand: records went to the canary",
    ),
    (1671, "the same, and the canary won"),
    (12, "a router went on in a phase that another had entered, with a state of no partitions"),
];

/// What to run.
pub struct RouterOptions {
    /// The seeds.
    pub seeds: std::ops::Range<u64>,
    /// Print everything that happens.
    pub verbose: bool,
    /// Go on after a failure.
    pub keep_going: bool,
    /// Fail unless everything was reached.
    pub complete: bool,
    /// Let hook calls be overtaken by other routers.
    pub late: bool,
}

/// Runs the pinned seeds, then those that were asked for.
#[expect(clippy::disallowed_methods, reason = "seeds per second are real seconds; no run depends on them")]
pub fn run(options: &RouterOptions) -> anyhow::Result<ExitCode> {
    let started = std::time::Instant::now();
    let count = options.seeds.end - options.seeds.start;
    let (mut coverage, mut failures) = (RouterCoverage::default(), 0);
    let pinned = PINNED.iter().map(|(seed, _)| *seed).filter(|_| count > 1);
    for seed in pinned.chain(options.seeds.clone()) {
        let outcome = life::run(seed, None, options.late, options.verbose);
        coverage.add(&outcome.coverage);
        outcome.lines.iter().for_each(|line| println!("{line}"));
        let Some(what) = outcome.violation else { continue };
        failures += 1;
        if options.keep_going {
            println!("seed {seed}: {what}");
            continue;
        }
        if !options.verbose {
            let again = life::run(seed, None, options.late, true);
            again.lines.iter().for_each(|line| println!("{line}"));
            if again.violation.as_ref() != Some(&what) {
                println!("(the second run differed: the run isn't deterministic)");
            }
        }
        println!("\nVIOLATION {what}");
        let late = if options.late { " --late" } else { "" };
        println!("REPRODUCE: cargo run --release -p sim -- --router --seed {seed}{late}");
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
    if options.complete && !never.is_empty() {
        bail!("{} events were never seen, expected all in {count} seeds: {}", never.len(), never.join(", "));
    }
    Ok(if failures == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Lets each seeded bug loose, until it is caught.
pub fn bite() -> ExitCode {
    println!("{:<62} {:>6}  BROKEN RULE", "SEEDED BUG OF THE RECORD ROUTER", "SEEDS");
    let mut alive = 0;
    for (bug, name) in teeth::ALL {
        match teeth::hunt(bug, TEETH_SEEDS) {
            Some((seed, what)) => println!("{name:<62} {seed:>6}  {}", what.chars().take(90).collect::<String>()),
            None => {
                alive += 1;
                println!("{name:<62} {TEETH_SEEDS:>6}  NOT CAUGHT");
            }
        }
    }
    match alive {
        0 => ExitCode::SUCCESS,
        _ => {
            println!("{alive} seeded bugs live, expected none");
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
            assert!(violation.is_none(), "{violation:?}; REPRODUCE: cargo run -p sim -- --router --seed {seed}");
        }
    }

    #[test]
    fn every_seeded_bug_is_caught() {
        for (bug, name) in teeth::ALL {
            assert!(teeth::hunt(bug, TEETH_SEEDS).is_some(), "{name}: not caught in {TEETH_SEEDS} seeds");
        }
    }

    #[test]
    fn a_seed_gives_the_same_run_twice() {
        for seed in 1..=5 {
            assert_eq!(life::run(seed, None, false, true).lines, life::run(seed, None, false, true).lines);
        }
    }
}
