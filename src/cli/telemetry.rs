//! `aviary telemetry produce`: made-up events of a service, for trying out what is decided by them.

use std::fmt::Write as _;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::{Args, Subcommand, ValueEnum};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use rand_distr::{Distribution, LogNormal, Poisson};
use tokio::time::{Instant, MissedTickBehavior};

use super::Exit;
use super::client::Api;
use crate::domain::ids::{ServiceId, VersionId};
use crate::domain::weights::Weight;

/// Verbs of `aviary telemetry`.
#[derive(Debug, Subcommand)]
pub enum TelemetryVerb {
    /// Report made-up events to the cluster.
    Produce(ProduceArgs),
}

/// What happens after `--after`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Profile {
    /// Nothing: both versions are well.
    Healthy,
    /// One in ten of the canary's answers is an error.
    ErrorBurst,
    /// The canary takes twice as long.
    Slow,
    /// One in three answers of both versions is an error.
    SharedIncident,
}

/// Arguments of `aviary telemetry produce`.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  aviary telemetry produce --service fraud-model --stable v1 --canary v2 --share 20 --rate 500 \
    --profile error-burst --after 20s\n\nEvents are sent to POST /v1/telemetry, in batches, to the nodes of --api in turn. Before --after both \
    versions are well:\n0.5 % errors, 80 ms in the median, 215 ms at the 95th percentile."
)]
pub struct ProduceArgs {
    /// The service, as its rollout names it.
    #[arg(long)]
    service: ServiceId,
    /// Its stable version.
    #[arg(long)]
    stable: VersionId,
    /// Its canary.
    #[arg(long)]
    canary: VersionId,
    /// The canary's share of the events, in percent.
    #[arg(long, value_name = "PERCENT", default_value = "5", value_parser = super::proxy::weight)]
    share: Weight,
    /// Events a second.
    #[arg(long, value_name = "N", default_value_t = 200, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    rate: u64,
    /// What happens to them.
    #[arg(long, value_enum, default_value_t = Profile::Healthy)]
    profile: Profile,
    /// When it begins to.
    #[arg(long, value_name = "DURATION", default_value = "0s", value_parser = humantime::parse_duration)]
    after: Duration,
    /// How long; without it, until Ctrl-C.
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    duration: Option<Duration>,
    /// The same seed gives the same events, but for their times.
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
}

/// Time between two batches.
const BATCH: Duration = Duration::from_millis(100);

/// Runs a verb.
pub async fn run(api: &Api, verb: TelemetryVerb) -> anyhow::Result<Exit> {
    let TelemetryVerb::Produce(args) = verb;
    let mut source = Source::new(&args);
    let began = Instant::now();
    let mut tick = tokio::time::interval(BATCH);
    tick.set_missed_tick_behavior(MissedTickBehavior::Burst);
    let (mut sent, mut accepted, mut rejected, mut told) = (0u64, 0u64, 0u64, began);
    let mut interrupt = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::interrupt())?;
    let mut turn = 0;
    loop {
        tokio::select! {
            _ = tick.tick() => {}
            _ = interrupt.recv() => break,
        }
        let elapsed = began.elapsed();
        if args.duration.is_some_and(|duration| elapsed >= duration) {
            break;
        }
        let (count, batch) = source.batch(elapsed >= args.after);
        if count > 0 {
            let addresses = api.addresses();
            let address = &addresses[turn % addresses.len()];
            turn += 1;
            let answer = api.report(address, batch).await;
            sent += count;
            match answer {
                Ok(answer) if answer.json()["accepted"].is_u64() => {
                    let json = answer.json();
                    accepted += json["accepted"].as_u64().unwrap_or(0);
                    let kinds = json["rejected"].as_object().into_iter().flatten();
                    rejected += kinds.filter_map(|(_, count)| count.as_u64()).sum::<u64>();
                    if let (Some(first), true) = (json["first_rejected"].get(0), accepted == 0) {
                        bail!("{address}: nothing counts: {}", first["error"].as_str().unwrap_or_default());
                    }
                }
                Ok(answer) => bail!("{address}: {} {}", answer.status, answer.error()),
                Err(why) if accepted == 0 => return Err(anyhow::anyhow!(why)).context(address.to_string()),
                Err(why) => eprintln!("{address}: {why}; {count} events were not reported"),
            }
        }
        if told.elapsed() >= Duration::from_secs(1) {
            told = Instant::now();
            let phase = if elapsed >= args.after { args.profile } else { Profile::Healthy };
            println!("{:>5} s  sent {sent}  counted {accepted}  rejected {rejected}  {phase:?}", elapsed.as_secs());
        }
    }
    println!("sent {sent}  counted {accepted}  rejected {rejected}");
    Ok(Exit::Done)
}

/// Draws events.
struct Source<'a> {
    args: &'a ProduceArgs,
    random: SmallRng,
    count: Poisson<f64>,
    latency_ms: LogNormal<f64>,
    next_id: u64,
    run: u64,
}

impl<'a> Source<'a> {
    fn new(args: &'a ProduceArgs) -> Self {
        let mean = args.rate as f64 * BATCH.as_secs_f64();
        Self {
            args,
            random: SmallRng::seed_from_u64(args.seed),
            count: Poisson::new(mean).expect("a positive rate"),
            latency_ms: LogNormal::new(80f64.ln(), 0.6).expect("a finite spread"),
            next_id: 0,
            run: rand::random(),
        }
    }

    /// Returns the next batch as JSON lines, and how many events it holds.
    fn batch(&mut self, happens: bool) -> (u64, String) {
        let ProduceArgs { service, stable, canary, share, profile, .. } = self.args;
        let count = self.count.sample(&mut self.random) as u64;
        let now = super::wall_ms();
        let mut lines = String::with_capacity(count as usize * 160);
        for _ in 0..count {
            let is_canary = self.random.random::<f64>() < share.fraction();
            let (errors, slower) = match (happens, profile, is_canary) {
                (true, Profile::ErrorBurst, true) => (0.1, 1.0),
                (true, Profile::Slow, true) => (0.005, 2.0),
                (true, Profile::SharedIncident, _) => (0.33, 1.0),
                _ => (0.005, 1.0),
            };
            let status = if self.random.random::<f64>() < errors { 500 } else { 200 };
            let latency_ms = self.latency_ms.sample(&mut self.random) * slower;
            let version = if is_canary { canary } else { stable };
            self.next_id += 1;
            let _ = writeln!(
                lines,
                "{{\"service\":\"{service}\",\"version\":\"{version}\",\"status\":{status},\"latency_ms\":{latency_ms:.3},\
                 \"event_time\":{now},\"event_id\":\"{:x}-{}\"}}",
                self.run, self.next_id
            );
        }
        (count, lines)
    }
}
