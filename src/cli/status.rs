//! `aviary status`: follows a rollout until it ends or waits for a person, and prints each transition.

use std::time::Duration;

use clap::Args;
use serde_json::Value;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout_at};

use super::Exit;
use super::announced::Announced;
use super::followed::{End, Followed, News};
use super::output::{self, Format};
use crate::client::{AnswerError, Api, StreamEvent, Unreachable, segment};
use crate::model::{Changed, RolloutView};

#[derive(Debug, Args)]
#[command(
    after_help = "Exit codes: 0 completed, 1 rolled back, 2 timeout or no node reachable, 3 waits for a person,\n\
    4 another rollout took its place.\n\n\
    Example:\n  aviary status fraud-model --timeout 5m && echo shipped"
)]
pub struct StatusArgs {
    /// Service whose rollout is followed.
    name: String,
    /// Maximum wait; default: no limit.
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    timeout: Option<Duration>,
    #[command(flatten)]
    pause: PauseArgs,
    /// Answer of the write whose rollout is followed; none follows the one that the service is in.
    #[arg(skip)]
    answer: Option<Changed>,
}

/// How a rollout that waits for a person ends the program.
#[derive(Debug, Clone, Copy, Default, Args)]
pub struct PauseArgs {
    /// Exit with 0 instead of 3 when the rollout waits for a person.
    #[arg(long)]
    success_on_pause: bool,
}

impl StatusArgs {
    /// Returns the arguments that wait for as long as it takes, for the rollout that a write was answered with.
    pub fn after(name: String, pause: PauseArgs, answer: Option<&Changed>) -> Self {
        Self { name, timeout: None, pause, answer: answer.cloned() }
    }
}

/// A wait that nobody outlives, where no timeout is given.
const YEAR: Duration = Duration::from_secs(365 * 24 * 3600);
/// How often a node is asked what the rollout waits for, as that changes without an event.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// How long the log may take to tell how the rollout ended, once another has taken its place.
const LOG_PATIENCE: Duration = Duration::from_secs(2);

/// Follows the rollout until it ends, waits for a person or `--timeout` is over, and prints what happens.
pub async fn run(api: &Api, args: &StatusArgs, format: Format) -> anyhow::Result<Exit> {
    let limit = Instant::now() + args.timeout.unwrap_or(YEAR);
    // From the answered decision on: what happens before the stream is open is told, too.
    let after = args.answer.as_ref().and_then(|changed| changed.sequence).map(|sequence| sequence.0);
    let mut feed = api.follow(after);
    let mut wait = RolloutWait {
        path: format!("/v1/rollouts/{}", segment(&args.name)),
        followed: Followed::new(args.name.clone(), args.answer.as_ref()),
        pause: args.pause,
        format,
        replaced: None,
    };
    let mut look = interval(LOOK_EVERY);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut connected, mut lost) = (false, Vec::new());
    loop {
        let until = wait.replaced.as_ref().map_or(limit, |(_, until)| limit.min(*until));
        let next = timeout_at(until, async {
            tokio::select! {
                biased;
                next = feed.recv() => Heard::Stream(next),
                _ = look.tick(), if connected => Heard::Look,
            }
        });
        let exit = match next.await {
            Err(_) => match wait.replaced.take() {
                Some((end, _)) if Instant::now() < limit => Some(wait.end(&end)),
                _ => {
                    let waited = humantime::format_duration(args.timeout.unwrap_or(YEAR));
                    eprintln!("timeout: the rollout did not end within {waited}");
                    Some(Exit::Unavailable)
                }
            },
            Ok(Heard::Look) => wait.look(api, limit).await?,
            Ok(Heard::Stream(Some(StreamEvent::Connected))) => {
                connected = true;
                look.reset();
                wait.look(api, limit).await?
            }
            Ok(Heard::Stream(Some(StreamEvent::Event(event)))) => {
                let announced = Announced::read(&event.data);
                let news = wait.followed.event(&announced);
                // What it waits for after a transition is news as well.
                news.line.is_some().then(|| look.reset_immediately());
                wait.tell(news, &announced.json)?
            }
            Ok(Heard::Stream(Some(StreamEvent::Lost(why)))) if !connected => {
                lost.push(why);
                if lost.len() >= api.addresses().len() {
                    return Err(Unreachable { failed: lost }.into());
                }
                None
            }
            Ok(Heard::Stream(Some(StreamEvent::Lost(why)))) => {
                eprintln!("event stream lost, trying the next node: {why}");
                None
            }
            Ok(Heard::Stream(Some(StreamEvent::Refused(refusal)))) => return Err(refusal.into()),
            Ok(Heard::Stream(None)) => {
                anyhow::bail!("the event stream ended, expected it to continue on another node")
            }
        };
        if let Some(exit) = exit {
            return Ok(exit);
        }
    }
}

/// What comes next of a rollout.
enum Heard {
    /// An item of the event stream.
    Stream(Option<StreamEvent>),
    /// It is time to ask a node.
    Look,
}

/// A wait for a rollout.
struct RolloutWait {
    path: String,
    followed: Followed,
    pause: PauseArgs,
    format: Format,
    /// That another rollout has taken the place, and until when the log is given time to say how this one ended.
    replaced: Option<(End, Instant)>,
}

impl RolloutWait {
    /// Asks a node where the rollout stands; returns how the program ends by it.
    async fn look(&mut self, api: &Api, limit: Instant) -> anyhow::Result<Option<Exit>> {
        let Ok(Ok(answer)) = timeout_at(limit, api.get(&self.path)).await else { return Ok(None) };
        let view = match answer.read::<RolloutView>() {
            Ok(view) => view.routing,
            // Another node may be able to tell.
            Err(AnswerError::Problem(problem)) if problem.status >= 500 => return Ok(None),
            Err(why) => anyhow::bail!("{}: {why}", self.path),
        };
        let news = self.followed.snapshot(&view);
        if let Some(end @ End::Replaced(_)) = news.end {
            self.replaced.get_or_insert_with(|| (end, Instant::now() + LOG_PATIENCE));
            return Ok(None);
        }
        self.tell(news, &serde_json::from_str(&answer.body)?)
    }

    /// Prints what is new; returns how the program ends by it.
    fn tell(&self, News { line, end }: News, json: &Value) -> anyhow::Result<Option<Exit>> {
        if let Some(line) = line {
            match self.format {
                Format::Table => output::line(&line)?,
                Format::Json => output::line(&output::json_text(&json.to_string()))?,
                Format::Yaml => output::put(&format!("---\n{}", output::yaml_text(json)?))?,
            }
        }
        Ok(end.map(|end| self.end(&end)))
    }

    /// Says why the wait ends where the lines before don't; returns how the program ends by it.
    fn end(&self, end: &End) -> Exit {
        match end {
            End::Completed | End::RolledBack => {}
            End::Waits(what) if what.is_empty() => eprintln!("the rollout waits for a person"),
            End::Waits(what) => eprintln!("the rollout waits for a person: {what}"),
            End::Replaced(what) => eprintln!("{what}"),
        }
        end.exit(self.pause.success_on_pause)
    }
}
