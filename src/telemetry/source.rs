//! Reads reported events from a topic.

use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::Intake;
use super::event::ReportedEvent;
use crate::ports::{EventSource, OutsideError};

/// Longest wait for events, and so for the end.
const WAIT: Duration = Duration::from_millis(100);
/// Between two lines that say the same.
const SAY_AGAIN: u32 = 600;

/// Reads events until `shutdown`; blocks, so that it needs a thread of its own.
#[expect(clippy::disallowed_methods, reason = "it has a thread of its own")]
pub fn run(mut source: Box<dyn EventSource>, intake: &Intake, shutdown: &CancellationToken) {
    let mut said: Option<(OutsideError, u32)> = None;
    while !shutdown.is_cancelled() {
        let read = source.poll(WAIT, &mut |payloads| {
            intake.take(payloads.iter().map(|payload| ReportedEvent::from_protobuf(payload)));
        });
        match read {
            Ok(0) => {}
            Ok(_) => said = None,
            Err(why) => {
                let again = said.as_ref().filter(|(before, times)| *before == why && *times < SAY_AGAIN);
                let times = again.map_or(0, |(_, times)| times + 1);
                if times == 0 {
                    warn!("events can't be read: {why}");
                }
                said = Some((why, times));
                std::thread::sleep(WAIT);
            }
        }
    }
}
