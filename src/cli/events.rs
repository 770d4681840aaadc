//! `aviary events`: prints the cluster's events, one per line; `-f` follows new ones.

use std::time::Duration;

use clap::Args;
use tokio::time::timeout;

use super::Exit;
use super::announced::Announced;
use super::output::{self, Format};
use crate::client::{Api, StreamEvent, Unreachable};
use crate::domain::text::visible;

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  aviary events                    all events in the log\n  \
    aviary events -f                 new events only\n  aviary events -f --after 495616  events after this one")]
pub struct EventsArgs {
    /// Follow new events; without it, the command ends after 0.5 s without an event.
    #[arg(short, long)]
    follow: bool,
    /// Begin after the event with this id: slot × 4096 + index in the slot; default: 0, with -f only new events.
    #[arg(long, value_name = "ID")]
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
    let announced = Announced::read(data);
    Ok(match format {
        _ if announced.json.is_null() => visible(data.into()),
        Format::Json => output::json_text(&data.replace('\n', "")),
        Format::Yaml => format!("---\n{}", output::yaml_text(&serde_json::from_str(data)?)?.trim_end()),
        Format::Table => format!("{}  {}  {}", announced.time(), announced.reporter(), announced.line()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_names_the_node_that_reports_and_json_stays_as_it_is() {
        let data = r#"{"at":3723000,"reported_by":"b","event":"peer","node":"c","alive":false}"#;
        let table = line(data, Format::Table).unwrap();
        assert_eq!(table, "1970-01-01 01:02:03Z  b  peer  alive=false  node=c  reported_by=b");
        assert_eq!(line(data, Format::Json).unwrap(), data);
        assert_eq!(line("no JSON", Format::Table).unwrap(), "no JSON");
    }
}
