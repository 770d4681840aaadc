//! Runs whole nodes on turmoil's network, from one seed, and judges what people were told.
//!
//! `cluster` is a run, `trace` what was seen of it, `host` a node as a host, `workload` who asks it things.

use std::process::{Command, ExitCode};

use anyhow::ensure;
use clap::Parser;

mod cluster;
mod host;
mod trace;
mod workload;

use cluster::WholeSummary;
use trace::SharedTrace;

#[cfg(not(tokio_unstable))]
compile_error!(
    "sim-whole needs --cfg tokio_unstable, without which turmoil can't seed its runtimes and a seed gives another run each \
     time. The repository's .cargo/config.toml sets it; an exported RUSTFLAGS takes that line's place: add the flag to it"
);

/// Simulates clusters of whole nodes: codec, links, shell, HTTP.
#[derive(Parser)]
struct WholeArguments {
    /// Run this one seed, instead of many.
    #[arg(long)]
    seed: Option<u64>,
    /// Run this many seeds, one after the other.
    #[arg(long, default_value_t = 20)]
    seeds: u64,
    /// Begin with this seed, and count upwards.
    #[arg(long, default_value_t = 1)]
    from: u64,
    /// Length of the faulty part, in virtual milliseconds; healing and the final checks follow it.
    #[arg(long, default_value_t = 20_000)]
    ms: u64,
    /// Print everything that is seen: the trace's hash so far, and what was added to it.
    #[arg(short, long)]
    verbose: bool,
    /// Run the seeds in two processes and compare the traces.
    #[arg(long)]
    determinism: bool,
    /// Print each seed's trace hash, and nothing else.
    #[arg(long)]
    hashes: bool,
}

fn main() -> anyhow::Result<ExitCode> {
    let arguments = WholeArguments::parse();
    std::panic::set_hook(Box::new(|_| {}));
    let seeds = match arguments.seed {
        Some(seed) => seed..seed + 1,
        None => arguments.from..arguments.from + arguments.seeds,
    };
    if arguments.determinism {
        return compare_processes(seeds.end - seeds.start);
    }
    if arguments.hashes {
        for seed in seeds {
            let trace = SharedTrace::new(false);
            let _ = cluster::run(seed, arguments.ms, &trace);
            println!("{seed} {:016x}", trace.hash());
        }
        return Ok(ExitCode::SUCCESS);
    }
    run(seeds, &arguments)
}

/// Runs the same seeds in two processes, whose maps are ordered and whose memory is laid out differently.
fn compare_processes(count: u64) -> anyhow::Result<ExitCode> {
    let mut arguments: Vec<_> = std::env::args().skip(1).filter(|argument| argument != "--determinism").collect();
    arguments.push("--hashes".into());
    let program = std::env::current_exe()?;
    let run = || anyhow::Ok(String::from_utf8(Command::new(&program).args(&arguments).output()?.stdout)?);
    let (one, two) = (run()?, run()?);
    for (line, other) in one.lines().zip(two.lines()) {
        ensure!(line == other, "the run isn't deterministic: one process found {line}, another {other}");
    }
    let found = one.lines().count() as u64;
    ensure!(found == count && one == two, "{found} traces, expected {count}");
    println!("{count} seeds of whole nodes: the same traces in two processes");
    Ok(ExitCode::SUCCESS)
}

#[expect(clippy::disallowed_methods, reason = "seeds per second are real seconds; no run depends on them")]
fn run(seeds: std::ops::Range<u64>, arguments: &WholeArguments) -> anyhow::Result<ExitCode> {
    let ms = arguments.ms;
    let started = std::time::Instant::now();
    let count = seeds.end - seeds.start;
    let mut total = WholeSummary::default();
    for seed in seeds {
        let trace = SharedTrace::new(arguments.verbose);
        match cluster::run(seed, ms, &trace) {
            Ok(one) => total.add(&one),
            Err(error) => {
                println!("\nVIOLATION {error:#}");
                println!("REPRODUCE: cargo run --release -p sim-whole --bin sim-whole -- --seed {seed} --ms {ms}");
                return Ok(ExitCode::FAILURE);
            }
        };
    }
    let real = started.elapsed().as_secs_f64();
    println!(
        "{count} seeds of whole nodes in {real:.1} s ({:.1} seeds/s, {:.0}x real time): {} changes decided, {} not, \
         {} predictions ({} by the canary), {} crashes, {} cuts",
        count as f64 / real,
        total.ms as f64 / 1000.0 / real,
        total.decided,
        total.undecided,
        total.served,
        total.canary,
        total.crashes,
        total.cuts
    );
    Ok(ExitCode::SUCCESS)
}
