//! The thread of a router that posts records.

use std::time::Duration;

use metrics::counter;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::{POLL, PROGRESS, hash};
use crate::config::router::{Push, RouterConfig};
use crate::domain::side::Side;
use crate::ports::{OutsideError, RouterWorld};
use crate::router::engine::Steering;
use crate::router::push::{PushPlan, Pushed, Pusher};

/// Pause after an error, before the next try.
const RETRY: Duration = Duration::from_secs(1);

/// Posts records until `shutdown`.
///
/// # Errors
/// When the topics can't be opened at first; later that is tried again.
#[expect(clippy::disallowed_methods, reason = "a router has a thread of its own")]
pub fn run(
    config: &RouterConfig,
    push: &Push,
    world: &dyn RouterWorld,
    steer: &dyn Fn() -> Steering,
    shutdown: &CancellationToken,
) -> Result<(), OutsideError> {
    let group = &config.service(Side::Stable).group;
    let plan = PushPlan {
        keyed: config.keyed,
        attempts: push.attempts,
        in_flight: push.in_flight,
        // A batch is committed when its slowest record is done.
        batch_max: config.batch_max.min(push.in_flight * 16),
        interval: Duration::from_millis(config.interval_ms),
    };
    let open = || {
        let (source, post) = world.push()?;
        Pusher::new(source, post, plan.clone())
    };
    let mut pusher = Some(open()?);
    info!("posting records of {} to {} in the place of group {group}", config.source, push.url);
    let (mut said, mut total, mut waits) = (world.clock().now().mono, 0, false);
    let mut blocked: Option<OutsideError> = None;
    while !shutdown.is_cancelled() {
        let (weight, hash) = match steer() {
            Steering::Alone => (config.weight, hash(config)),
            Steering::Cluster(Some(committed)) => (committed.weight, committed.hash),
            Steering::Cluster(None) => {
                if !std::mem::replace(&mut waits, true) {
                    info!("waiting for the cluster: what it has committed isn't known");
                }
                std::thread::sleep(POLL);
                continue;
            }
        };
        waits = false;
        // After an error it begins anew, at the place that was committed: what was read since is read again.
        let turn = match pusher.take() {
            Some(mut open) => open.turn(weight, hash).map(|pushed| (open, pushed)),
            None => open().map(|open| (open, Pushed::default())),
        };
        match turn {
            Ok((open, pushed)) => {
                pusher = Some(open);
                for (version, count) in pushed.done {
                    counter!("aviary_router_records_total", "version" => version).increment(count);
                    total += count;
                }
                counter!("aviary_router_dead_letters_total").increment(pushed.given_up);
                match pushed.blocked {
                    None => blocked = None,
                    Some(why) => {
                        counter!("aviary_router_errors_total").increment(1);
                        if blocked.as_ref() != Some(&why) {
                            warn!("its records wait: {why}");
                        }
                        blocked = Some(why);
                        std::thread::sleep(RETRY);
                    }
                }
            }
            Err(why) => {
                counter!("aviary_router_errors_total").increment(1);
                warn!("begins anew: {why}");
                std::thread::sleep(RETRY);
            }
        }
        let now = world.clock().now().mono;
        if now.millis_since(said) >= PROGRESS.as_millis() as u64 {
            info!("{total} records done");
            said = now;
        }
    }
    Ok(())
}
