//! `aviary watch`: shows a rollout on a live screen from the event stream; without a terminal it prints plain lines.

use std::collections::VecDeque;
use std::io::IsTerminal;
use std::time::Duration;

use clap::Args;
use tokio::sync::mpsc;
use tokio::time::interval;

use super::announced::Announced;
use super::output::{self, Format, Tone, colours, paint};
use super::{Exit, cluster, read, show, status, wall_ms};
use crate::client::{Api, StreamEvent, segment};

#[derive(Debug, Args)]
pub struct WatchArgs {
    /// Service whose rollout is watched.
    name: String,
}

/// Events kept on the screen.
const EVENTS_SHOWN: usize = 8;
/// How often a terminal's numbers are read again, as samples and leases change without an event.
const REFRESH: Duration = Duration::from_secs(1);

/// Draws the rollout's state after each event and once a second, until Ctrl-C.
pub async fn run(api: &Api, args: &WatchArgs) -> anyhow::Result<Exit> {
    if !std::io::stdout().is_terminal() {
        let args = status::StatusArgs::after(args.name.clone(), status::PauseArgs::default(), None);
        return status::run(api, &args, Format::Table).await;
    }
    let mut feed = api.follow(None);
    let mut screen = Screen::default();
    let mut refresh = interval(REFRESH);
    loop {
        tokio::select! {
            stop = tokio::signal::ctrl_c() => return stop.map(|()| Exit::Done).map_err(Into::into),
            next = feed.recv() => screen.take(next)?,
            _ = refresh.tick() => {}
        }
        drain(&mut feed, &mut screen)?;
        let picture = picture(api, &args.name, &screen).await;
        screen.draw(&picture)?;
    }
}

/// Takes what else has arrived: one picture shows it all.
fn drain(feed: &mut mpsc::Receiver<StreamEvent>, screen: &mut Screen) -> anyhow::Result<()> {
    while let Ok(next) = feed.try_recv() {
        screen.take(Some(next))?;
    }
    Ok(())
}

async fn picture(api: &Api, name: &str, screen: &Screen) -> String {
    let head = format!("{name}   {} UTC   Ctrl-C ends the view, not the rollout", show::clock_of(wall_ms()));
    let body = match api.get(&format!("/v1/rollouts/{}", segment(name))).await {
        Ok(answer) => match answer.read() {
            Ok(view) => read::rollout(&view),
            Err(why) => paint(colours(), Tone::Odd, &why.to_string()),
        },
        Err(error) => paint(colours(), Tone::Bad, &error.to_string()),
    };
    let members = match api.get("/v1/cluster").await {
        Ok(answer) => answer.read().map(|view| cluster::status(&view)).unwrap_or_default(),
        Err(_) => String::new(),
    };
    let events = screen.events.iter().fold(String::new(), |text, line| format!("{text}{line}\n"));
    format!("{}\n\n{body}\n\n{members}\n\n{events}", paint(colours(), Tone::Faint, &head))
}

/// How much was drawn last, and the newest events.
#[derive(Default)]
struct Screen {
    drawn: usize,
    events: VecDeque<String>,
}

impl Screen {
    fn take(&mut self, next: Option<StreamEvent>) -> anyhow::Result<()> {
        let line = match next {
            Some(StreamEvent::Event(event)) => {
                let announced = Announced::read(&event.data);
                format!("{}  {}", announced.time(), announced.line())
            }
            Some(StreamEvent::Lost(why)) => format!("{}  stream lost: {why}", show::clock_of(wall_ms())),
            Some(StreamEvent::Connected) => return Ok(()),
            Some(StreamEvent::Refused(refusal)) => return Err(refusal.into()),
            None => anyhow::bail!("the event stream ended, expected it to continue on another node"),
        };
        self.events.push_back(line);
        if self.events.len() > EVENTS_SHOWN {
            self.events.pop_front();
        }
        Ok(())
    }

    /// Draws over the last picture, line by line, so that nothing flickers.
    fn draw(&mut self, picture: &str) -> anyhow::Result<()> {
        let up = if self.drawn > 0 { format!("\x1b[{}A\r", self.drawn) } else { String::new() };
        let lines: String = picture.lines().map(|line| format!("{line}\x1b[K\n")).collect();
        self.drawn = picture.lines().count();
        output::put(&format!("{up}{lines}\x1b[J"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::SseEvent;

    #[test]
    fn only_the_last_events_stay_on_the_screen() {
        let mut screen = Screen::default();
        for slot in 0..20 {
            let event = format!(r#""event":"enforced","slot":{slot},"service":"m","took_ms":5"#);
            let data = format!(r#"{{"at":"1970-01-01T00:00:00.000Z","reported_by":"a",{event}}}"#);
            screen.take(Some(StreamEvent::Event(SseEvent { id: None, data }))).unwrap();
        }
        assert_eq!(screen.events.len(), EVENTS_SHOWN);
        assert_eq!(screen.events.back().unwrap(), "1970-01-01 00:00:00Z  slot 19  enforced everywhere  m  5 ms");
    }
}
