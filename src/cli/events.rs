//! `aviary events`: prints the cluster's events, one per line; `-f` follows new ones.

use std::time::Duration;

use clap::Args;
use serde_json::Value;
use tokio::time::timeout;

use super::output::{self, Format};
use super::{Exit, show};
use crate::client::{Api, StreamEvent, Unreachable};

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  aviary events                    all events in the log\n  \
    aviary events -f                 new events only\n  aviary events -f --after 120     events from slot 121 on")]
pub struct EventsArgs {
    /// Follow new events; without it, the command ends after 0.5 s without an event.
    #[arg(short, long)]
    follow: bool,
    /// Begin after this slot; default: 0, with -f only new events.
    #[arg(long, value_name = "SLOT")]
    after: Option<u64>,
}

const SILENCE: Duration = Duration::from_millis(500);
const FIRST_ANSWER_MAX: Duration = Duration::from_secs(5);

/// Prints events, one per line, until the stream is silent or Ctrl-C.
pub async fn run(api: &Api, args: &EventsArgs, format: Format) -> anyhow::Result<Exit> {
    let after = if args.follow { args.after } else { Some(args.after.unwrap_or(0)) };
    let mut feed = api.follow(after);
    let (mut connected, mut lost) = (false, Vec::new());
    loop {
        let next = match (args.follow, connected) {
            (true, _) => feed.recv().await,
            (false, false) => timeout(FIRST_ANSWER_MAX, feed.recv()).await.unwrap_or_default(),
            (false, true) => match timeout(SILENCE, feed.recv()).await {
                Ok(next) => next,
                Err(_) => return Ok(Exit::Done),
            },
        };
        match next {
            Some(StreamEvent::Connected) => connected = true,
            Some(StreamEvent::Event(event)) => output::line(&line(&event.data, format)?)?,
            Some(StreamEvent::Lost(_)) if connected && !args.follow => return Ok(Exit::Done),
            Some(StreamEvent::Lost(why)) if !connected && lost.len() + 1 >= api.addresses().len() => {
                lost.push(why);
                return Err(Unreachable { failed: lost }.into());
            }
            Some(StreamEvent::Lost(why)) => {
                eprintln!("event stream lost, trying the next node: {why}");
                lost.push(why);
            }
            Some(StreamEvent::Refused(refusal)) => return Err(refusal.into()),
            None => return Err(Unreachable { failed: lost }.into()),
        }
    }
}

fn line(data: &str, format: Format) -> anyhow::Result<String> {
    let Ok(json) = serde_json::from_str::<Value>(data) else { return Ok(data.into()) };
    Ok(match format {
        Format::Json => data.replace('\n', ""),
        Format::Yaml => format!("---\n{}", serde_saphyr::to_string(&json)?.trim_end()),
        Format::Table => {
            let from = json["node"].as_str().unwrap_or_default();
            format!("{}  {from}  {}", show::clock(show::seek(&json, "at")), show::event(&json))
        }
    })
}
