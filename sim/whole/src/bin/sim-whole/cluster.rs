//! Whole nodes on turmoil's network: real codec, links, shell and HTTP, on disks that lose what was not synced.
//!
//! The core's own world (`world`) checks every step of the protocol; this one checks what is around it. A run is a
//! cluster of three under cuts, held and slow links, crashes and restarts, with operators and users; then everything is
//! healed, and what people were told must be so.
//!
//! A seed gives the same run, byte for byte: turmoil seeds its runtimes (`--cfg tokio_unstable`), nodes draw from
//! [`aviary::entropy`], clocks are turmoil's, and no host may use another thread.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use aviary::adapters::memory::MemoryStore;
use aviary::node::frame::Versions;

use sim::dice::Dice;

use crate::host;
use crate::trace::SharedTrace;
use crate::workload::{self, ProbeAnswer, ServedAnswer};

/// The nodes' names, which are also their hosts'.
pub const NAMES: [&str; 3] = ["a", "b", "c"];
/// The protocol versions of an old release, of one that speaks the next version too, and of one on the way there.
const RELEASES: [Versions; 3] =
    [Versions { min: 8, max: 8 }, Versions { min: 8, max: 9 }, Versions { min: 7, max: 10 }];
/// Length of a lease, in milliseconds: what a rollout has that names none.
pub const LEASE_MS: u64 = 2_000;

/// What a run came to.
#[derive(Debug, Default, Clone, Copy)]
pub struct WholeSummary {
    /// Length of the run, in virtual milliseconds.
    pub ms: u64,
    /// Changes that people were told are decided.
    pub decided: u64,
    /// Changes that nobody could decide at the time.
    pub undecided: u64,
    /// Answers of `/predict` that clients got.
    pub served: u64,
    /// Those that the canary gave.
    pub canary: u64,
    /// Processes that crashed and started again.
    pub crashes: u64,
    /// Links that were cut or held for a while.
    pub cuts: u64,
}

impl WholeSummary {
    /// Adds another run's numbers to these.
    pub fn add(&mut self, other: &Self) {
        self.ms += other.ms;
        self.decided += other.decided;
        self.undecided += other.undecided;
        self.served += other.served;
        self.canary += other.canary;
        self.crashes += other.crashes;
        self.cuts += other.cuts;
    }
}

/// What the run's parts share.
#[derive(Clone)]
pub struct Cluster {
    pub disks: [Arc<Mutex<MemoryStore>>; 3],
    pub answered: Arc<Mutex<Vec<ProbeAnswer>>>,
    pub served: Arc<Mutex<Vec<ServedAnswer>>>,
    pub quiet: Arc<AtomicBool>,
    pub judged: Arc<AtomicBool>,
    /// What each node speaks: nodes may be of different releases.
    pub versions: [Versions; 3],
    pub seed: u64,
    pub trace: SharedTrace,
}

/// Runs a seed: `ms` milliseconds of faults, then healing and the final checks. What was seen is in `trace`, also of a run that
/// fails.
pub fn run(seed: u64, ms: u64, trace: &SharedTrace) -> anyhow::Result<WholeSummary> {
    aviary::entropy::seed(seed);
    let mut dice = Dice::new(seed ^ 0x7768_6f6c_6573_6565);
    let mut builder = turmoil::Builder::new();
    builder.rng_seed(seed).tcp_capacity(4_096).tick_duration(Duration::from_millis(1));
    builder.simulation_duration(Duration::from_millis(10 * ms + 120_000));
    builder.epoch(std::time::UNIX_EPOCH + Duration::from_secs(1_790_000_000));
    builder.min_message_latency(Duration::from_millis(1));
    builder.max_message_latency(Duration::from_millis(*dice.pick(&[2, 10, 60])));
    let mut sim = builder.build();
    let cluster = Cluster {
        disks: host::new_disks(),
        answered: Arc::default(),
        served: Arc::default(),
        quiet: Arc::default(),
        judged: Arc::default(),
        versions: [(); 3].map(|()| *dice.pick(&RELEASES)),
        seed,
        trace: trace.clone(),
    };
    for (i, name) in NAMES.into_iter().enumerate() {
        let cluster = cluster.clone();
        sim.host(name, move || host::live(i, cluster.clone()));
    }
    sim.client("operators", workload::operate(cluster.clone()));
    sim.client("users", workload::use_it(cluster.clone()));

    let mut summary = WholeSummary::default();
    let mut next_fault = 1_000;
    let mut down: Vec<(usize, u64)> = Vec::new();
    let mut now = 0;
    while now < ms {
        now = step(&mut sim)?;
        let (back, still): (Vec<_>, Vec<_>) = down.into_iter().partition(|(_, at)| *at <= now);
        down = still;
        for (i, _) in &back {
            trace.add_at(1_000 * now, NAMES[*i], "restarts", &[], String::new);
            sim.bounce(NAMES[*i]);
        }
        if now < next_fault {
            continue;
        }
        next_fault = now + dice.between(50, 1_500);
        let (i, j) = (dice.below(3), dice.below(3));
        let up = |i: usize| !down.iter().any(|(dead, _)| *dead == i);
        let kind = dice.weighted(&[4, 3, 3, 3, 5, 2]);
        trace
            .add_at(1_000 * now, NAMES[i], "fault", &[kind as u8, j as u8], || format!("kind {kind}, to {}", NAMES[j]));
        match kind {
            0 if up(i) => {
                sim.crash(NAMES[i]);
                down.push((i, now + dice.between(1, 3_000)));
                summary.crashes += 1;
            }
            1 if i != j => {
                sim.partition(NAMES[i], NAMES[j]);
                summary.cuts += 1;
            }
            2 if i != j => {
                sim.partition_oneway(NAMES[i], NAMES[j]);
                summary.cuts += 1;
            }
            3 if i != j => {
                sim.hold(NAMES[i], NAMES[j]);
                summary.cuts += 1;
            }
            4 => heal(&sim),
            5 if i != j => {
                sim.set_link_max_message_latency(NAMES[i], NAMES[j], Duration::from_millis(dice.between(2, 400)))
            }
            _ => {}
        }
    }

    // Healing: the stated bounds, and what people were told.
    heal(&sim);
    sim.set_max_message_latency(Duration::from_millis(5));
    down.iter().for_each(|(i, _)| sim.bounce(NAMES[*i]));
    cluster.quiet.store(true, Ordering::Relaxed);
    let calm = now + 8_000;
    while now < calm {
        now = step(&mut sim)?;
    }
    sim.client("judge", workload::judge(cluster.clone()));
    let end = now + 60_000;
    while !cluster.judged.load(Ordering::Relaxed) {
        now = step(&mut sim)?;
        ensure!(now < end, "liveness: the healed cluster was not judged within 60 s");
    }
    compare_logs(&cluster)?;
    let answered = cluster.answered.lock().expect("nobody panics with it");
    let served = cluster.served.lock().expect("nobody panics with it");
    workload::audit(&answered, &served)?;
    summary.ms = now;
    summary.decided = answered.iter().filter(|answer| answer.decided()).count() as u64;
    summary.undecided = answered.len() as u64 - summary.decided;
    summary.served = served.len() as u64;
    summary.canary = served.iter().filter(|served| served.version == "v2").count() as u64;
    Ok(summary)
}

fn step(sim: &mut turmoil::Sim<'_>) -> anyhow::Result<u64> {
    match sim.step() {
        Ok(_) => Ok(sim.elapsed().as_millis() as u64),
        Err(error) => bail!("{error}"),
    }
}

fn heal(sim: &turmoil::Sim<'_>) {
    for (i, one) in NAMES.iter().enumerate() {
        for other in &NAMES[i + 1..] {
            sim.release(*one, *other);
            sim.repair(*one, *other);
        }
    }
}

/// I1, on the disks: one record in a slot.
fn compare_logs(cluster: &Cluster) -> anyhow::Result<()> {
    let logs = cluster.disks.each_ref().map(|disk| host::log_of(&disk.lock().expect("nobody panics with it")));
    for (i, log) in logs.iter().enumerate() {
        for (other, name) in logs.iter().zip(NAMES).skip(i + 1) {
            for (one, two) in log.iter().zip(other) {
                ensure!(one == two, "I1: {} and {name} hold different records: {one:?} and {two:?}", NAMES[i]);
            }
        }
    }
    logs.iter().map(Vec::len).min().filter(|shortest| *shortest > 1).context("nothing was decided in the whole run")?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_gives_the_same_trace_twice_and_another_seed_another() {
        let hash = |seed| {
            let trace = SharedTrace::new(false);
            run(seed, 3_000, &trace).unwrap();
            trace.hash()
        };
        let first = hash(4);
        assert_ne!(hash(5), first);
        assert_eq!(hash(4), first);
    }

    #[test]
    fn a_short_run_of_whole_nodes_is_clean() {
        for seed in 1..=3 {
            super::run(seed, 4_000, &SharedTrace::new(false)).unwrap_or_else(|error| panic!("seed {seed}: {error:#}"));
        }
    }
}
