//! `aviary status`: follows a rollout to its end and prints each transition.

use std::time::Duration;

use clap::Args;
use tokio::time::{Instant, timeout_at};

use super::announced::Announced;
use super::output::{self, Format};
use super::{Exit, show};
use crate::client::{AnswerError, Api, StreamEvent, Unreachable, segment};
use crate::domain::routing::Status;
use crate::model::{RolloutView, RoutingView};
use crate::protocol::Event;

#[derive(Debug, Args)]
#[command(after_help = "Exit codes: 0 completed, 1 rolled back or paused, 2 timeout or no node reachable.\n\n\
    Example:\n  aviary status fraud-model --timeout 5m && echo shipped")]
pub struct StatusArgs {
    /// Service whose rollout is followed.
    name: String,
    /// Maximum wait; default: no limit.
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    timeout: Option<Duration>,
    /// Last slot that the reader knows of: a node that lags behind it is not believed.
    #[arg(skip)]
    known: Option<u64>,
}

impl StatusArgs {
    /// Returns the arguments that wait for as long as it takes, for what follows slot `known`.
    pub fn after(name: String, known: Option<u64>) -> Self {
        Self { name, timeout: None, known }
    }
}

/// A wait that nobody outlives, where no timeout is given.
const YEAR: Duration = Duration::from_secs(365 * 24 * 3600);

/// Follows the rollout until it ends or `--timeout` is over, and prints what happens.
pub async fn run(api: &Api, args: &StatusArgs, format: Format) -> anyhow::Result<Exit> {
    let end = Instant::now() + args.timeout.unwrap_or(YEAR);
    let path = format!("/v1/rollouts/{}", segment(&args.name));
    let mut feed = api.follow(None);
    let mut told = LastTold { service: args.name.clone(), slot: args.known };
    let (mut connected, mut lost) = (false, Vec::new());
    loop {
        let next = match timeout_at(end, feed.recv()).await {
            Ok(Some(next)) => next,
            Ok(None) => anyhow::bail!("the event stream ended, expected it to continue on another node"),
            Err(_) => {
                eprintln!("timeout: the rollout did not end within {}", humantime::format_duration(waited(args)));
                return Ok(Exit::Unavailable);
            }
        };
        let (json, phase, line) = match next {
            StreamEvent::Connected => {
                connected = true;
                let answer = match timeout_at(end, api.get(&path)).await {
                    Ok(Ok(answer)) => answer,
                    Ok(Err(_)) | Err(_) => continue,
                };
                let view = match answer.read::<RolloutView>() {
                    Ok(view) => view.routing,
                    // Another node may be able to tell.
                    Err(AnswerError::Problem(problem)) if problem.status >= 500 => continue,
                    Err(why) => anyhow::bail!("{}: {why}", args.name),
                };
                let line = told.snapshot(&view);
                (serde_json::from_str(&answer.body)?, view.phase.to_string(), line)
            }
            StreamEvent::Event(event) => {
                let announced = Announced::read(&event.data);
                let (phase, line) = (announced.phase(), told.event(&announced));
                (announced.json, phase, line)
            }
            StreamEvent::Lost(why) if !connected => {
                lost.push(why);
                if lost.len() >= api.addresses().len() {
                    return Err(Unreachable { failed: lost }.into());
                }
                continue;
            }
            StreamEvent::Lost(why) => {
                eprintln!("event stream lost, trying the next node: {why}");
                continue;
            }
            StreamEvent::Refused(refusal) => return Err(refusal.into()),
        };
        let Some(line) = line else { continue };
        match format {
            Format::Table => output::line(&line)?,
            Format::Json => output::line(&json.to_string())?,
            Format::Yaml => output::put(&format!("---\n{}", serde_saphyr::to_string(&json)?))?,
        }
        if let Some(exit) = ended(&phase) {
            return Ok(exit);
        }
    }
}

fn waited(args: &StatusArgs) -> Duration {
    args.timeout.unwrap_or(YEAR)
}

/// Lines that were printed already: a stream that resumes on another node may repeat events.
struct LastTold {
    service: String,
    slot: Option<u64>,
}

impl LastTold {
    /// Returns the line about where the rollout stands; none when that was told.
    fn snapshot(&mut self, view: &RoutingView) -> Option<String> {
        let slot = Some(view.slot.0);
        if self.slot >= slot {
            return None;
        }
        self.slot = slot;
        Some(show::line([
            show::clock(view.routing.timestamp),
            format!("slot {}", view.slot),
            view.routing.status.to_string(),
            self.service.clone(),
            show::weights(&view.routing.weights),
            format!("version {}", view.routing.version),
            view.phase.to_string(),
            view.waiting_for.clone(),
            view.reason.clone(),
        ]))
    }

    /// Returns the line about an event; none when it concerns something else, changes nothing, or was told.
    fn event(&mut self, announced: &Announced) -> Option<String> {
        if announced.service() != self.service {
            return None;
        }
        if let Some(Event::Routing { slot, state, .. }) = announced.event() {
            let slot = Some(slot.0);
            if state.status == Status::Prepared || self.slot >= slot {
                return None;
            }
            self.slot = slot;
        }
        Some(format!("{}  {}", announced.time(), announced.line()))
    }
}

/// Returns how a rollout in this phase ended; none while it goes on.
fn ended(phase: &str) -> Option<Exit> {
    match phase {
        "Completed" => Some(Exit::Done),
        "RolledBack" | "Paused" => Some(Exit::Refused),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::cli::announced::tests::{promotion, sent};
    use crate::domain::ids::NodeId;
    use crate::domain::rollout::Phase;
    use crate::protocol::Mode;
    use crate::protocol::record::Slot;

    fn routing(slot: u64, status: Status, phase: Phase) -> Announced {
        sent(promotion(slot, status, phase))
    }

    /// Returns the routing that the record in this slot led to.
    fn at(slot: u64) -> RoutingView {
        let Event::Routing { state, .. } = promotion(slot, Status::Committed, Phase::Progressing) else {
            unreachable!()
        };
        RoutingView {
            routing: state,
            node: NodeId::new("a").unwrap(),
            slot: Slot(slot),
            hash: String::new(),
            mode: Mode::Normal,
            phase: Phase::Progressing,
            stage: 0,
            stages: 2,
            reason: String::new(),
            waiting_for: String::new(),
            held_back: None,
            effective_weights: BTreeMap::new(),
            lease_ms_left: None,
            enforced: true,
        }
    }

    #[test]
    fn a_transition_is_told_once_and_only_when_decided() {
        let mut told = LastTold { service: "m".into(), slot: None };
        assert_eq!(told.event(&routing(3, Status::Prepared, Phase::Progressing)), None);
        assert!(told.event(&routing(3, Status::Committed, Phase::Progressing)).is_some());
        assert_eq!(told.event(&routing(3, Status::Committed, Phase::Progressing)), None);
        assert_eq!(told.snapshot(&at(3)), None);
        assert!(told.snapshot(&at(4)).is_some());
    }

    #[test]
    fn a_node_that_lags_behind_what_was_answered_is_not_believed() {
        let mut told = LastTold { service: "m".into(), slot: Some(9) };
        assert_eq!(told.snapshot(&at(8)), None);
        assert_eq!(told.event(&routing(8, Status::Committed, Phase::Completed)), None);
    }

    #[test]
    fn other_services_are_not_told() {
        let mut told = LastTold { service: "other".into(), slot: None };
        assert_eq!(told.event(&routing(3, Status::Committed, Phase::Completed)), None);
    }

    #[test]
    fn the_phases_end_the_program_as_documented() {
        assert_eq!(ended(&routing(3, Status::Committed, Phase::Completed).phase()), Some(Exit::Done));
        assert_eq!(ended(&routing(3, Status::Committed, Phase::RolledBack).phase()), Some(Exit::Refused));
        assert_eq!(ended("Paused"), Some(Exit::Refused));
        assert_eq!(ended("Baking"), None);
    }
}
