//! `aviary telemetry produce`: reports synthetic events of a service, to try the analysis out.

use std::time::Duration;

use anyhow::{Context, bail};
use clap::{Args, Subcommand, ValueEnum};
#[cfg(feature = "kafka")]
use prost::Message as _;
#[cfg(feature = "kafka")]
use prost_types::Timestamp;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use rand_distr::{Distribution, LogNormal, Poisson};
use tokio::time::{Instant, MissedTickBehavior};

use super::Exit;
#[cfg(feature = "kafka")]
use crate::adapters::kafka::KafkaEvents;
use crate::client::{AnswerError, Api};
#[cfg(feature = "kafka")]
use crate::config::node::Kafka;
use crate::domain::ids::{ServiceId, VersionId};
use crate::domain::side::Side;
use crate::domain::weights::Weight;
use crate::model::{BatchReceipt, Problem};
#[cfg(feature = "kafka")]
use crate::schema::v1::TelemetryEvent;

#[derive(Debug, Subcommand)]
pub enum TelemetryVerb {
    /// Report synthetic events to the cluster or to Kafka.
    Produce(ProduceArgs),
}

/// Behaviour of the simulated versions after `--after`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ProduceProfile {
    /// Both versions stay healthy: the rollout should complete.
    Healthy,
    /// 10 % of the canary's answers are errors.
    ErrorBurst,
    /// The canary's latency doubles, its errors stay as they are.
    Slow,
    /// A third of the answers of both versions are errors.
    SharedIncident,
}

/// Arguments of `aviary telemetry produce`.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  aviary telemetry produce --service fraud-model --stable v1 --canary v2 --share 20 --rate 500 \
    --profile error-burst --after 20s\n\nSends batches of events to POST /v1/telemetry of the nodes of --api in turn; with --kafka, to a topic.\n\
    Before --after, both versions are healthy: 0.5 % errors, median 80 ms, 95th percentile 215 ms."
)]
pub struct ProduceArgs {
    /// Name of the service, as in its rollout file.
    #[arg(long)]
    service: ServiceId,
    /// Id of the stable version.
    #[arg(long)]
    stable: VersionId,
    /// Id of the canary version.
    #[arg(long)]
    canary: VersionId,
    /// The canary's share of the events, in percent.
    #[arg(long, value_name = "PERCENT", default_value = "5", value_parser = super::proxy::weight)]
    share: Weight,
    /// Events per second, of all versions together.
    #[arg(long, value_name = "N", default_value_t = 200, value_parser = clap::value_parser!(u64).range(1..=10_000_000))]
    rate: u64,
    /// Behaviour of the versions after --after.
    #[arg(long, value_enum, default_value_t = ProduceProfile::Healthy)]
    profile: ProduceProfile,
    /// Time after which the profile begins.
    #[arg(long, value_name = "DURATION", default_value = "0s", value_parser = humantime::parse_duration)]
    after: Duration,
    /// Duration of the run; default: until Ctrl-C.
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    duration: Option<Duration>,
    /// Write to Kafka instead of the API; brokers as `host:port,host:port`.
    #[cfg(feature = "kafka")]
    #[arg(long, value_name = "BROKERS")]
    kafka: Option<String>,
    /// Kafka topic to write the events to, instead of the API.
    #[cfg(feature = "kafka")]
    #[arg(long, value_name = "TOPIC", default_value = "telemetry.raw", requires = "kafka")]
    topic: String,
    /// Seed; the same seed gives the same events with other times.
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
}

/// Time from one batch of events to the next.
const BATCH: Duration = Duration::from_millis(100);

/// Runs a verb of telemetry; returns the program's exit code.
pub async fn run(api: &Api, verb: TelemetryVerb) -> anyhow::Result<Exit> {
    let TelemetryVerb::Produce(args) = verb;
    let mut out = Out::new(api, &args)?;
    let mut source = Source::new(&args);
    let began = Instant::now();
    let mut tick = tokio::time::interval(BATCH);
    tick.set_missed_tick_behavior(MissedTickBehavior::Burst);
    let mut told = began;
    let mut interrupt = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::interrupt())?;
    loop {
        tokio::select! {
            _ = tick.tick() => {}
            _ = interrupt.recv() => break,
        }
        let elapsed = began.elapsed();
        if args.duration.is_some_and(|duration| elapsed >= duration) {
            break;
        }
        out.send(&args, &source.batch(elapsed >= args.after)).await?;
        if told.elapsed() >= Duration::from_secs(1) {
            told = Instant::now();
            let phase = if elapsed >= args.after { args.profile } else { ProduceProfile::Healthy };
            println!("{:>5} s  {}  {phase:?}", elapsed.as_secs(), out.told());
        }
    }
    out.finish();
    println!("{}", out.told());
    Ok(Exit::Done)
}

/// Where the events go, with what is counted on the way.
enum Out<'a> {
    Api {
        api: &'a Api,
        turn: usize,
        sent: u64,
        accepted: u64,
        rejected: u64,
    },
    #[cfg(feature = "kafka")]
    Kafka {
        events: KafkaEvents,
        sent: u64,
    },
}

impl<'a> Out<'a> {
    fn new(api: &'a Api, args: &ProduceArgs) -> anyhow::Result<Self> {
        #[cfg(feature = "kafka")]
        if let Some(brokers) = &args.kafka {
            let config = Kafka { telemetry: args.topic.clone(), ..Kafka::at(brokers) };
            return Ok(Self::Kafka { events: KafkaEvents::new(&config)?, sent: 0 });
        }
        let _ = args;
        Ok(Self::Api { api, turn: 0, sent: 0, accepted: 0, rejected: 0 })
    }

    async fn send(&mut self, args: &ProduceArgs, batch: &[Made]) -> anyhow::Result<()> {
        if batch.is_empty() {
            return Ok(());
        }
        match self {
            #[cfg(feature = "kafka")]
            Self::Kafka { events, sent } => {
                for made in batch {
                    events.send(args.service.as_str(), &made.protobuf(args))?;
                }
                *sent += batch.len() as u64;
            }
            Self::Api { api, turn, sent, accepted, rejected } => {
                let addresses = api.addresses();
                let address = &addresses[*turn % addresses.len()];
                *turn += 1;
                let lines: String = batch.iter().map(|made| made.json(args)).collect();
                let answer = api.report(address, lines).await;
                *sent += batch.len() as u64;
                match answer.map(|answer| answer.read::<BatchReceipt>()) {
                    Ok(Ok(receipt)) => {
                        *accepted += receipt.accepted;
                        *rejected += receipt.rejected.values().sum::<u64>();
                    }
                    Ok(Err(AnswerError::Problem(Problem { facts, .. })))
                        if *accepted > 0 && facts.receipt.is_some() =>
                    {
                        *rejected += facts.receipt.iter().flat_map(|receipt| receipt.rejected.values()).sum::<u64>();
                    }
                    Ok(Err(why)) => bail!("{address}: {why}"),
                    Err(why) if *accepted == 0 => return Err(why).context(address.to_string()),
                    Err(why) => eprintln!("{address}: {why}; {} events were not reported", batch.len()),
                }
            }
        }
        Ok(())
    }

    fn finish(&self) {
        #[cfg(feature = "kafka")]
        if let Self::Kafka { events, .. } = self {
            events.flush();
        }
    }

    fn told(&self) -> String {
        match self {
            #[cfg(feature = "kafka")]
            Self::Kafka { events, sent } => {
                let (delivered, failed) = events.counts();
                format!("sent {sent}  delivered {delivered}  failed {failed}")
            }
            Self::Api { sent, accepted, rejected, .. } => {
                format!("sent {sent}  counted {accepted}  rejected {rejected}")
            }
        }
    }
}

/// An event before it is encoded.
struct Made {
    side: Side,
    status: u32,
    latency_ms: f64,
    at_ms: u64,
    id: String,
}

impl Made {
    fn version<'a>(&self, args: &'a ProduceArgs) -> &'a VersionId {
        match self.side {
            Side::Stable => &args.stable,
            Side::Canary => &args.canary,
        }
    }

    fn json(&self, args: &ProduceArgs) -> String {
        let (Self { status, latency_ms, at_ms, id, .. }, version) = (self, self.version(args));
        format!(
            "{{\"service\":\"{}\",\"version\":\"{version}\",\"status\":{status},\"latency_ms\":{latency_ms:.3},\
             \"event_time\":{at_ms},\"event_id\":\"{id}\"}}\n",
            args.service
        )
    }

    #[cfg(feature = "kafka")]
    fn protobuf(&self, args: &ProduceArgs) -> Vec<u8> {
        let event_time =
            Timestamp { seconds: (self.at_ms / 1000) as i64, nanos: (self.at_ms % 1000 * 1_000_000) as i32 };
        let event = TelemetryEvent {
            service: args.service.to_string(),
            version: self.version(args).to_string(),
            status: self.status,
            latency_ms: self.latency_ms,
            event_time: Some(event_time),
            event_id: self.id.clone(),
        };
        event.encode_to_vec()
    }
}

/// Draws events of both versions, at the rate and the share of the arguments.
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

    /// Returns the events of the next batch; `happens` says whether the profile's fault is on.
    fn batch(&mut self, happens: bool) -> Vec<Made> {
        let count = self.count.sample(&mut self.random) as u64;
        let now = super::wall_ms();
        (0..count).map(|_| self.event(happens, now)).collect()
    }

    fn event(&mut self, happens: bool, at_ms: u64) -> Made {
        let side = match self.random.random::<f64>() < self.args.share.fraction() {
            true => Side::Canary,
            false => Side::Stable,
        };
        let (errors, slower) = match (happens, self.args.profile, side) {
            (true, ProduceProfile::ErrorBurst, Side::Canary) => (0.1, 1.0),
            (true, ProduceProfile::Slow, Side::Canary) => (0.005, 2.0),
            (true, ProduceProfile::SharedIncident, _) => (0.33, 1.0),
            _ => (0.005, 1.0),
        };
        let status = if self.random.random::<f64>() < errors { 500 } else { 200 };
        let latency_ms = self.latency_ms.sample(&mut self.random) * slower;
        self.next_id += 1;
        Made { side, status, latency_ms, at_ms, id: format!("{:x}-{}", self.run, self.next_id) }
    }
}
