//! A router's life: turn after turn, with a pause after errors, until the rollout is over or it is told to stop.

use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::engine::{Engine, Steering, Turn};
use crate::backoff::Backoff;
use crate::ports::{Clock, OutsideError};

/// Pause while something is waited for that no call waits for.
const WAIT: Duration = Duration::from_millis(100);
/// First pause after an error.
const RETRY_MIN: Duration = Duration::from_millis(200);
/// Longest pause after an error of a turn.
const RETRY_MAX: Duration = Duration::from_secs(5);

/// Runs a router, on a thread of its own. Returns true when the rollout is over, false when it was told to stop.
///
/// # Errors
/// When another process has become the router, or nothing has begun and nothing can by itself.
#[expect(clippy::disallowed_methods, reason = "a router has a thread of its own")]
pub fn run(
    engine: &mut Engine,
    clock: &dyn Clock,
    steering: &dyn Fn() -> Steering,
    shutdown: &CancellationToken,
    told: &mut dyn FnMut(&Engine, &Result<Turn, OutsideError>),
) -> Result<bool, OutsideError> {
    let (mut retry, mut waited_for) = (Backoff::new(RETRY_MIN, RETRY_MAX), None);
    while !shutdown.is_cancelled() {
        let turn = engine.turn(clock.now().wall.0, &steering());
        told(engine, &turn);
        match turn {
            Ok(Turn::Over) => return Ok(true),
            Ok(Turn::Busy(_)) => {
                retry.reset();
                waited_for = None;
            }
            // The broker has waited for records already.
            Ok(Turn::Idle) => retry.reset(),
            Ok(Turn::Waits(what)) => {
                retry.reset();
                if waited_for.as_ref() != Some(&what) {
                    info!("waiting for {what}");
                    waited_for = Some(what);
                }
                std::thread::sleep(WAIT);
            }
            // Nothing was touched: somebody has to change something first.
            Err(why) if why.replaced || why.lasting && engine.is_untouched() => return Err(why),
            Err(why) => {
                warn!("begins anew: {why}");
                std::thread::sleep(retry.wait());
            }
        }
    }
    Ok(false)
}
