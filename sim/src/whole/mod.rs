//! Whole nodes on turmoil's network: real codec, links, shell and HTTP, on disks that lose what was not synced.
//!
//! The core's own world (`world`) checks every step of the protocol; this one checks what is around it. A run is a
//! cluster of three under cuts, held and slow links, crashes and restarts, with operators and users; then everything is
//! healed, and what people were told must be so. turmoil's runtime draws some numbers of its own, so a seed gives the
//! same faults and questions each time, and nearly the same run.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use aviary::adapters::memory::MemoryStore;
use aviary::node::frame::Versions;

use crate::dice::Dice;

mod house;
mod people;

use people::{ProbeAnswer, ServedAnswer};

/// The nodes' names, which are also their hosts'.
const NAMES: [&str; 3] = ["a", "b", "c"];
/// The protocol versions of an old release, of one that speaks the next version too, and of one on the way there.
const RELEASES: [Versions; 3] = [Versions { min: 2, max: 2 }, Versions { min: 2, max: 3 }, Versions { min: 1, max: 9 }];
/// Length of a lease, in milliseconds: what a rollout has that names none.
const LEASE_MS: u64 = 2_000;

/// What a run came to.
#[derive(Debug, Default, Clone, Copy)]
pub struct WholeSummary {
    /// Virtual milliseconds.
    pub ms: u64,
    /// Changes that people were told are decided.
    pub decided: u64,
    /// Changes that nobody could decide at the time.
    pub undecided: u64,
    /// `/predict` answers.
    pub served: u64,
    /// Those that the canary gave.
    pub canary: u64,
    /// Crashes.
    pub crashes: u64,
    /// Links cut or held.
    pub cuts: u64,
}

/// What the run's parts share.
#[derive(Clone)]
struct Town {
    disks: [Arc<Mutex<MemoryStore>>; 3],
    answered: Arc<Mutex<Vec<ProbeAnswer>>>,
    served: Arc<Mutex<Vec<ServedAnswer>>>,
    quiet: Arc<AtomicBool>,
    judged: Arc<AtomicBool>,
    /// What each node speaks: nodes may be of different releases.
    versions: [Versions; 3],
    seed: u64,
}

/// Runs a seed: `ms` milliseconds of faults, then healing and judgement.
pub fn run(seed: u64, ms: u64) -> anyhow::Result<WholeSummary> {
    let mut dice = Dice::new(seed ^ 0x7768_6f6c_6573_6565);
    let mut builder = turmoil::Builder::new();
    builder.rng_seed(seed).tcp_capacity(4_096).tick_duration(Duration::from_millis(1));
    builder.simulation_duration(Duration::from_millis(10 * ms + 120_000));
    builder.epoch(std::time::UNIX_EPOCH + Duration::from_secs(1_790_000_000));
    builder.min_message_latency(Duration::from_millis(1));
    builder.max_message_latency(Duration::from_millis(*dice.pick(&[2, 10, 60])));
    let mut sim = builder.build();
    let town = Town {
        disks: house::new_disks(),
        answered: Arc::default(),
        served: Arc::default(),
        quiet: Arc::default(),
        judged: Arc::default(),
        versions: [(); 3].map(|()| *dice.pick(&RELEASES)),
        seed,
    };
    for (i, name) in NAMES.into_iter().enumerate() {
        let town = town.clone();
        sim.host(name, move || house::live(i, town.clone()));
    }
    sim.client("operators", people::operate(town.clone()));
    sim.client("users", people::use_it(town.clone()));

    let mut summary = WholeSummary::default();
    let mut next_fault = 1_000;
    let mut down: Vec<(usize, u64)> = Vec::new();
    let mut now = 0;
    while now < ms {
        now = step(&mut sim)?;
        let (back, still): (Vec<_>, Vec<_>) = down.into_iter().partition(|(_, at)| *at <= now);
        down = still;
        back.iter().for_each(|(i, _)| sim.bounce(NAMES[*i]));
        if now < next_fault {
            continue;
        }
        next_fault = now + dice.between(50, 1_500);
        let (i, j) = (dice.below(3), dice.below(3));
        let up = |i: usize| !down.iter().any(|(dead, _)| *dead == i);
        match dice.weighted(&[4, 3, 3, 3, 5, 2]) {
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
    town.quiet.store(true, Ordering::Relaxed);
    let calm = now + 8_000;
    while now < calm {
        now = step(&mut sim)?;
    }
    sim.client("judge", people::judge(town.clone()));
    let end = now + 60_000;
    while !town.judged.load(Ordering::Relaxed) {
        now = step(&mut sim)?;
        ensure!(now < end, "liveness: the healed cluster was not judged within 60 s");
    }
    compare_logs(&town)?;
    let answered = town.answered.lock().expect("nobody panics with it");
    let served = town.served.lock().expect("nobody panics with it");
    people::audit(&answered, &served)?;
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
fn compare_logs(town: &Town) -> anyhow::Result<()> {
    let logs = town.disks.each_ref().map(|disk| house::log_of(&disk.lock().expect("nobody panics with it")));
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
    #[test]
    fn a_short_run_of_whole_nodes_is_clean() {
        for seed in 1..=3 {
            super::run(seed, 4_000).unwrap_or_else(|error| panic!("seed {seed}: {error:#}"));
        }
    }
}
