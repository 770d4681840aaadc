//! What the cluster has committed about a router's rollout, asked for again and again.

use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use tokio::sync::watch;
use tokio::time::MissedTickBehavior;
use tracing::warn;

use super::POLL;
use crate::client::{Api, segment};
use crate::config::router::RouterConfig;
use crate::domain::ids::VersionId;
use crate::domain::router_state::RouterEnd;
use crate::domain::side::Side;
use crate::domain::time::Mono;
use crate::domain::weights::{Weight, WeightError};
use crate::ports::RouterWorld;
use crate::router::engine::{CommittedWeight, Steering};

/// What is known of the cluster, and until when it may be acted by; none: it was never asked successfully.
pub type LastCommitted = Option<(CommittedWeight, Mono)>;

/// Returns the steering by what is known at the moment.
pub fn steering(known: &watch::Receiver<LastCommitted>, now: Mono) -> Steering {
    let known = known.borrow();
    let known = known.as_ref().filter(|(_, until)| now < *until);
    Steering::Cluster(known.map(|(committed, _)| committed.clone()))
}

/// Asks the cluster what it has committed. An answer counts as long as the node that gave it may act by it: for its lease, from the
/// moment it was asked.
pub async fn follow(api: Api, config: RouterConfig, world: Arc<dyn RouterWorld>, known: watch::Sender<LastCommitted>) {
    let path = format!("/routing/state?service={}", segment(config.name.as_str()));
    let mut ticks = tokio::time::interval(POLL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut said, mut newest) = (String::new(), 0);
    loop {
        ticks.tick().await;
        let asked = world.clock().now().mono;
        let mut failed = Vec::new();
        for address in api.addresses() {
            let answer = tokio::time::timeout(Duration::from_secs(1), api.get_from(address, &path)).await;
            let found = match answer {
                Err(_) => Err("no answer within 1 s".to_string()),
                Ok(Err(why)) => Err(why.to_string()),
                Ok(Ok(answer)) if answer.status.is_success() => {
                    read_state(&answer.json(), &config).map_err(|why| why.to_string())
                }
                Ok(Ok(answer)) => Err(answer.error()),
            };
            match found {
                // A node that lags may know only an older weight: the router doesn't go back to it.
                Ok((committed, _)) if committed.weight_version < newest => {
                    failed
                        .push(format!("{address}: knows version {} only, expected {newest}", committed.weight_version));
                }
                Ok((committed, lease)) => {
                    newest = committed.weight_version;
                    known.send_replace(Some((committed, asked.after_ms(lease.as_millis() as u64))));
                    failed.clear();
                    break;
                }
                Err(why) => failed.push(format!("{address}: {why}")),
            }
        }
        let failed = failed.join(" · ");
        if failed != said && !failed.is_empty() {
            warn!("no node says what the cluster has committed: {failed}");
        }
        said = failed;
    }
}

/// Why a node's routing state says nothing that a router may act by.
#[derive(Debug, thiserror::Error)]
enum StateError {
    /// The node is a learner, or has lost the majority.
    #[error("its mode is {0:?}, expected \"normal\"")]
    Mode(String),
    /// The canary's share is no weight.
    #[error(transparent)]
    Weight(#[from] WeightError),
    /// The state has other versions than the router's file.
    #[error("its weights are {found}, expected those of {stable} and {canary}")]
    Versions {
        /// Weights of the state.
        found: Value,
        /// The file's stable version.
        stable: VersionId,
        /// The file's canary version.
        canary: VersionId,
    },
    /// The node may not act by the state itself.
    #[error("it holds no lease")]
    NoLease,
}

/// Returns what a node's routing state says of a router's rollout, and for how long it may be acted by.
fn read_state(state: &Value, config: &RouterConfig) -> Result<(CommittedWeight, Duration), StateError> {
    let [stable, canary] = Side::BOTH.map(|side| &config.service(side).version);
    let text = |key: &str| state[key].as_str().unwrap_or_default();
    if text("mode") != "normal" {
        return Err(StateError::Mode(text("mode").into()));
    }
    let share = |version: &VersionId| state["weights"][version.as_str()].as_f64();
    let weight = Weight::from_percent(share(canary).unwrap_or(0.0) * 100.0)?;
    let end = match text("phase") {
        "Completed" if share(canary) == Some(1.0) => Some(RouterEnd::Promote),
        "RolledBack" if share(stable) == Some(1.0) => Some(RouterEnd::Abort(text("reason").into())),
        _ if share(canary).is_none() || share(stable).is_none() => {
            let (stable, canary) = (stable.clone(), canary.clone());
            return Err(StateError::Versions { found: state["weights"].clone(), stable, canary });
        }
        _ => None,
    };
    // What is over needs no lease.
    let lease_ms = if end.is_some() { 10_000 } else { state["lease_ms_left"].as_u64().unwrap_or(0) };
    let weight_version = state["version"].as_u64().unwrap_or(0);
    match lease_ms {
        0 => Err(StateError::NoLease),
        ms => Ok((CommittedWeight { weight, weight_version, end }, Duration::from_millis(ms))),
    }
}
