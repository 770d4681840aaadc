//! A record router as a process: the thread that works, and beside it what follows the cluster, compares the topics and tells.

use std::sync::Arc;
use std::time::Duration;

use metrics_exporter_prometheus::PrometheusHandle;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::client::Api;
use crate::config::router::RouterConfig;
use crate::domain::assignment::{TicketHash, UserAssignment};
use crate::ports::{OutsideError, RouterWorld};

use super::engine::Steering;

mod audit;
mod follow;
mod push;
mod split;
mod status;

/// Between two questions to the cluster.
const POLL: Duration = Duration::from_millis(200);
/// Between two lines on how it goes.
const PROGRESS: Duration = Duration::from_secs(10);
/// Longest wait for the end of a turn when told to stop.
const STOP_MAX: Duration = Duration::from_secs(15);

/// What goes on beside the router's work.
pub struct Beside {
    /// The cluster whose rollout is followed; needed where the file says `follow`.
    pub cluster: Option<Api>,
    /// Where the router's state and metrics are served.
    pub status: Option<(TcpListener, PrometheusHandle)>,
    /// How often the topics are compared; zero: never.
    pub audit_every: Duration,
}

/// How a router's process ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// The rollout is over: a restart has nothing to do.
    Over,
    /// It was told to stop; started again, it goes on.
    Stopped,
    /// It was told to stop and the broker has not answered: what is not committed is read again by the next router.
    Unanswered,
}

/// Runs a router until the rollout is over, or `shutdown`.
///
/// # Errors
/// When its topics can't be prepared, or another process has become the router.
pub async fn serve(
    config: RouterConfig,
    world: Arc<dyn RouterWorld>,
    beside: Beside,
    shutdown: CancellationToken,
) -> Result<Ended, OutsideError> {
    let Beside { cluster, status, audit_every } = beside;
    let (report, reported) = watch::channel(None);
    if let Some((listener, metrics)) = status {
        let pages = status::pages(reported, metrics);
        tokio::spawn(async move { axum::serve(listener, pages).await });
    }
    let (known, knows) = watch::channel(None);
    if let Some(api) = cluster {
        tokio::spawn(follow::follow(api, config.clone(), world.clone(), known));
    }
    if !audit_every.is_zero() && config.push.is_none() {
        tokio::spawn(audit::audit(world.clone(), audit_every, shutdown.clone()));
    }
    let stop = shutdown.clone();
    let thread = tokio::task::spawn_blocking(move || work(&config, world.as_ref(), &knows, &report, &stop));
    tokio::select! {
        ended = thread => ended.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic())),
        () = async { shutdown.cancelled().await; tokio::time::sleep(STOP_MAX).await } => {
            warn!("the broker has not answered: what is not committed is read again by the next router");
            Ok(Ended::Unanswered)
        }
    }
}

/// Body of the router's thread: turns until it is told to stop.
fn work(
    config: &RouterConfig,
    world: &dyn RouterWorld,
    known: &watch::Receiver<follow::LastCommitted>,
    report: &watch::Sender<Option<super::engine::Report>>,
    shutdown: &CancellationToken,
) -> Result<Ended, OutsideError> {
    let steer = || match config.follow {
        None => Steering::Alone,
        Some(_) => follow::steering(known, world.clock().now().mono),
    };
    let over = match &config.push {
        Some(push) => push::run(config, push, world, &steer, shutdown).map(|()| false)?,
        None => split::run(config, world, &steer, report, shutdown)?,
    };
    Ok(if over { Ended::Over } else { Ended::Stopped })
}

/// Makes tickets of keys where no cluster is followed, as the data plane does for a rollout of this name without a salt.
fn hash(config: &RouterConfig) -> TicketHash {
    TicketHash::of(&config.name, UserAssignment::default())
}
