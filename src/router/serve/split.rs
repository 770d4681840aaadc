//! The thread of a router that copies records, and what it tells meanwhile.

use std::time::Duration;

use metrics::counter;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::info;

use super::status::measure;
use super::{PROGRESS, hash};
use crate::config::router::RouterConfig;
use crate::domain::side::Side;
use crate::domain::time::Mono;
use crate::ports::{OutsideError, RouterWorld};
use crate::router::engine::{Engine, Plan, Report, Steering, Turn};
use crate::router::obstacles::obstacles;
use crate::router::run;
use crate::router::snapshot::RouterSnapshot;

/// Between two looks at the router's state.
const LOOK_MS: u64 = 500;

/// Splits until the rollout is over (true) or `shutdown` (false), and tells its state.
///
/// # Errors
/// When the topics can't be prepared, or another process has become the router.
pub fn run(
    config: &RouterConfig,
    world: &dyn RouterWorld,
    steer: &dyn Fn() -> Steering,
    report: &watch::Sender<Option<Report>>,
    shutdown: &CancellationToken,
) -> Result<bool, OutsideError> {
    let topics = world.topics()?;
    let control = RouterSnapshot::look(topics.as_ref()).map(|seen| seen.control);
    // A router whose places can't be seen has begun.
    if let Ok(control) = control {
        let found = obstacles(topics.as_ref(), config, &control)?;
        if !found.is_empty() {
            let why = format!("can't begin, and has touched nothing: {}", found.join("; "));
            return Err(OutsideError::lasting(format!("router {}", config.name), why));
        }
    }
    let made = topics.prepare()?;
    if !made.is_empty() {
        info!("made topics {}", made.join(", "));
    }
    let plan = Plan {
        hash: hash(config),
        keyed: config.keyed,
        weight: config.weight,
        lag_max: config.lag_max,
        change_ms_max: config.change_ms_max,
        interval: Duration::from_millis(config.interval_ms),
        batch_max: config.batch_max,
    };
    let mut engine = Engine::new(world.broker()?, world.hooks(), plan).of(config.identity());
    let mut teller = Teller::new(world.clock().now().mono, report);
    let mut tell = |engine: &Engine, turn: &Result<Turn, OutsideError>| {
        match turn {
            Ok(Turn::Busy(copied)) => counter!("aviary_router_copied_total").increment(*copied as u64),
            Err(_) => counter!("aviary_router_errors_total").increment(1),
            Ok(_) => {}
        }
        teller.look(world.clock().now().mono, engine);
    };
    run::run(&mut engine, world.clock(), steer, shutdown, &mut tell)
}

/// Tells people and metrics how the router goes on.
struct Teller<'a> {
    report: &'a watch::Sender<Option<Report>>,
    looked: Mono,
    said: Mono,
    /// Records taken when it was said last.
    taken: Option<u64>,
}

impl<'a> Teller<'a> {
    fn new(now: Mono, report: &'a watch::Sender<Option<Report>>) -> Self {
        Self { report, looked: now, said: now, taken: None }
    }

    fn look(&mut self, now: Mono, engine: &Engine) {
        if now.millis_since(self.looked) < LOOK_MS {
            return;
        }
        self.looked = now;
        let Some(report) = engine.report() else { return };
        measure(&report);
        self.say(now, &report);
        self.report.send_replace(Some(report));
    }

    fn say(&mut self, now: Mono, report: &Report) {
        let total: u64 = report.splits.iter().map(|split| split.taken()).sum();
        let passed_ms = now.millis_since(self.said);
        if passed_ms < PROGRESS.as_millis() as u64 {
            return;
        }
        let rate = total.saturating_sub(self.taken.unwrap_or(total)) * 1000 / passed_ms;
        if self.taken.is_some_and(|before| before != total) {
            info!(
                records = total,
                stable = report.given(Side::Stable),
                canary = report.given(Side::Canary),
                canary_lag = report.lag,
                "{rate} records/s"
            );
        }
        (self.said, self.taken) = (now, Some(total));
    }
}
