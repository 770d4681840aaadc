//! `aviary router`: splits a Kafka topic between two versions of its consumer, and sends commands to a router.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::{Args, Subcommand};
use serde_json::json;
use tokio::time::{Instant, sleep};

use super::Exit;
use super::output::{self, Format};
use crate::adapters::kafka::KafkaRouter;
use crate::config::router::RouterConfig;
use crate::domain::router_state::{ControlCommand, ControlEntry, RouterEnd, RouterPhase};
use crate::domain::side::Side;
use crate::domain::weights::Weight;
use crate::ports::{RouterTopics, RouterWorld as _};
use crate::router::snapshot::RouterSnapshot;

mod audit;
mod start;
mod status;

#[derive(Debug, Subcommand)]
pub enum RouterVerb {
    /// Show what `start` would do, and what prevents it. Changes nothing.
    Plan(FileArgs),
    /// Take the topic over from the stable service and split it until the rollout ends. A restart continues where it stopped.
    Start(start::StartArgs),
    /// Show the phase, and the weight, counts and lag of each partition.
    Status(FileArgs),
    /// Set the canary's share of the records.
    SetWeight(SetWeightArgs),
    /// Send all records to the canary, which then reads the source topic alone.
    Promote(CommandArgs),
    /// Send all records to stable, also those that the canary has not read; stable then reads the source topic alone.
    Abort(AbortArgs),
    /// Go on after records that the router had not read are gone, at the first that is left.
    Resume(ResumeArgs),
    /// Compare the three topics: missing, extra and duplicate records. Exit code 0: there are none.
    Audit(FileArgs),
}

/// Option of every verb: the router's file.
#[derive(Debug, Args)]
pub struct FileArgs {
    /// File of the router (YAML); docs/router.md explains it.
    #[arg(short, long, value_name = "FILE")]
    file: PathBuf,
}

/// Options of a command: its wait.
#[derive(Debug, Args)]
pub struct CommandArgs {
    #[command(flatten)]
    file: FileArgs,
    /// Return once the command is queued, without waiting until it is done.
    #[arg(long)]
    no_wait: bool,
    /// Maximum wait; the command remains queued afterwards.
    #[arg(long, value_name = "DURATION", default_value = "10m", value_parser = humantime::parse_duration)]
    timeout: Duration,
}

/// Arguments of `aviary router set-weight`.
#[derive(Debug, Args)]
pub struct SetWeightArgs {
    /// The canary's share, in percent, such as 5 or 0.01.
    #[arg(value_name = "PERCENT", value_parser = super::proxy::weight)]
    weight: Weight,
    #[command(flatten)]
    options: CommandArgs,
}

/// Arguments of `aviary router abort`.
#[derive(Debug, Args)]
pub struct AbortArgs {
    /// Reason, for the log and the history.
    #[arg(long, default_value = "asked for by an operator")]
    reason: String,
    #[command(flatten)]
    options: CommandArgs,
}

/// Arguments of `aviary router resume`.
#[derive(Debug, Args)]
pub struct ResumeArgs {
    /// Pass over the records that are gone. `status` says how many there were.
    #[arg(long, required = true)]
    skip_lost: bool,
    #[command(flatten)]
    file: FileArgs,
}

/// Runs a verb of the router; returns the program's exit code.
pub fn run(verb: RouterVerb, format: Format) -> anyhow::Result<Exit> {
    match verb {
        RouterVerb::Start(args) => start::run(&args),
        RouterVerb::Plan(args) => status::plan(&load(&args)?, format),
        RouterVerb::Status(args) => status::status(&load(&args)?, format),
        RouterVerb::Audit(args) => audit::run(&load(&args)?, format),
        RouterVerb::SetWeight(SetWeightArgs { weight, options }) => {
            send(&options, ControlCommand::SetWeight { weight }, &format!("the canary's share is {weight}"), |state| {
                !state.splits.is_empty()
                    && state.splits.iter().all(|split| split.weight().0 == weight && split.former().is_none())
            })
        }
        // That it is given is clap's rule: nobody passes over records by accident.
        RouterVerb::Resume(ResumeArgs { skip_lost: _, file }) => {
            let options = CommandArgs { file, no_wait: true, timeout: Duration::ZERO };
            send(&options, ControlCommand::SkipLost, "asked", |_| true)
        }
        RouterVerb::Promote(options) => {
            send(&options, ControlCommand::Promote, "promoted", |state| state.winner() == Some(Side::Canary))
        }
        RouterVerb::Abort(AbortArgs { reason, options }) => {
            send(&options, ControlCommand::Abort { reason }, "aborted", |state| state.winner() == Some(Side::Stable))
        }
    }
}

fn load(args: &FileArgs) -> anyhow::Result<RouterConfig> {
    Ok(RouterConfig::load(&args.file)?)
}

fn topics(config: &RouterConfig) -> anyhow::Result<Box<dyn RouterTopics>> {
    Ok(KafkaRouter::new(config.clone()).topics()?)
}

/// Sends a command to a router by an entry of its control topic, and waits until it is done.
fn send(
    args: &CommandArgs,
    command: ControlCommand,
    done: &str,
    is_done: impl Fn(&RouterSnapshot) -> bool,
) -> anyhow::Result<Exit> {
    let config = load(&args.file)?;
    if config.push.is_some() {
        bail!("{}: spec.push: the weight is the file's, or the cluster's", args.file.file.display());
    }
    if config.follow.is_some() && !matches!(command, ControlCommand::Abort { .. } | ControlCommand::SkipLost) {
        bail!(
            "{}: spec.follow: the cluster says what the weight is: ask it (aviary promote {})",
            args.file.file.display(),
            config.name
        );
    }
    let topics = topics(&config)?;
    let seen = RouterSnapshot::look(topics.as_ref())?;
    if let Some(rollout) = seen.control.rollout.as_ref().filter(|rollout| **rollout != config.identity()) {
        let [v1, v2] = &rollout.versions;
        bail!("the topics of router {} are those of {v1} to {v2}, expected the file of that rollout", config.name);
    }
    let (winner, returning) = (seen.winner(), matches!(seen.control.phase, Some(RouterPhase::Returning { .. })));
    if winner.is_some() || returning {
        bail!("router {} is {} already", config.name, seen.words());
    }
    if seen.control.phase.is_none() && seen.splits.is_empty() && topics.partitions(&config.control())?.is_none() {
        bail!("router {} is not started, expected: aviary router start -f {}", config.name, args.file.file.display());
    }
    if let (Some(RouterEnd::Abort(reason)), false) =
        (&seen.control.end, matches!(command, ControlCommand::Abort { .. }))
    {
        bail!("router {} is being aborted: {reason}", config.name);
    }
    let line = serde_json::to_string(&ControlEntry::Command(command)).context("an entry has a text")?;
    topics.send(&line)?;
    if args.no_wait {
        return output::line("asked").map(|()| Exit::Done);
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let (begun, mut moved, mut before) = (Instant::now(), Instant::now(), String::new());
        loop {
            let seen = match RouterSnapshot::look(topics.as_ref()) {
                Ok(seen) => seen,
                // A broker that is unavailable, a router that died in a transaction: the command remains queued.
                Err(why) if begun.elapsed() <= args.timeout => {
                    if begun.elapsed() > Duration::from_secs(10) {
                        eprintln!("{why:#}");
                    }
                    sleep(Duration::from_secs(1)).await;
                    continue;
                }
                Err(why) => {
                    eprintln!("could not confirm: {why:#}; the request remains queued");
                    return Ok(Exit::Unavailable);
                }
            };
            if is_done(&seen) {
                return output::line(done).map(|()| Exit::Done);
            }
            if let Some(winner) = seen.winner() {
                bail!("router {} ended otherwise: {} continues alone", config.name, winner.word());
            }
            let (present, words) = (format!("{:?} {:?}", seen.next, seen.control.phase), seen.words());
            if present != before {
                (moved, before) = (Instant::now(), present);
            }
            if begun.elapsed() > args.timeout {
                eprintln!(
                    "not done within {}: {words}; the request remains queued",
                    humantime::format_duration(args.timeout)
                );
                return Ok(Exit::Unavailable);
            }
            if moved.elapsed() > Duration::from_secs(10) {
                eprintln!("no progress for 10 s ({words}): check that `aviary router start` runs, and its log");
                moved = Instant::now();
            }
            sleep(Duration::from_millis(200)).await;
        }
    })
}

fn print(format: Format, value: &serde_json::Value, table: impl FnOnce() -> String) -> anyhow::Result<()> {
    output::print(format, &json!(value).to_string(), |_| table())
}
