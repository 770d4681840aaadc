//! What the cluster has committed about a router's rollout, asked for again and again.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::MissedTickBehavior;
use tracing::warn;

use super::POLL;
use crate::client::{Api, segment};
use crate::config::router::RouterConfig;
use crate::domain::assignment::TicketHash;
use crate::domain::ids::VersionId;
use crate::domain::rollout::Phase;
use crate::domain::router_state::RouterEnd;
use crate::domain::side::Side;
use crate::domain::time::Mono;
use crate::domain::weights::{Weight, Weights};
use crate::model::RoutingView;
use crate::ports::RouterWorld;
use crate::protocol::Mode;
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
    let (mut said, mut newest, mut followed) = (String::new(), 0, None);
    loop {
        ticks.tick().await;
        let asked = world.clock().now().mono;
        let mut failed = Vec::new();
        for address in api.addresses() {
            let answer = tokio::time::timeout(Duration::from_secs(1), api.get_from(address, &path)).await;
            let found = match answer {
                Err(_) => Err("no answer within 1 s".to_string()),
                Ok(Err(why)) => Err(why.to_string()),
                Ok(Ok(answer)) => answer
                    .read::<RoutingView>()
                    .map_err(|why| why.to_string())
                    .and_then(|view| committed(&view, &config).map_err(|why| why.to_string())),
            };
            match found {
                // A node that lags may know only an older weight: the router doesn't go back to it.
                Ok((committed, _)) if committed.weight_version < newest => {
                    failed
                        .push(format!("{address}: knows version {} only, expected {newest}", committed.weight_version));
                }
                Ok((committed, lease)) => {
                    newest = committed.weight_version;
                    let committed = of_one_rollout(committed, &mut followed);
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

/// Returns what is committed for the rollout that is followed, by the hash of its users. Another rollout's come in another order: the
/// one before it was rolled back, though no answer was asked for while that could be seen.
fn of_one_rollout(committed: CommittedWeight, followed: &mut Option<TicketHash>) -> CommittedWeight {
    if committed.end.is_some() {
        *followed = None;
        return committed;
    }
    match followed.get_or_insert(committed.hash) {
        hash if *hash == committed.hash => committed,
        _ => {
            let end = RouterEnd::Abort("another rollout of the service took its place".into());
            CommittedWeight { end: Some(end), ..committed }
        }
    }
}

/// Why a node's routing state says nothing that a router may act by.
#[derive(Debug, thiserror::Error)]
enum StateError {
    /// The node is a learner, or has lost the majority.
    #[error("its mode is {0:?}, expected Normal")]
    Mode(Mode),
    /// The state has other versions than the router's file.
    #[error("its weights are {found}, expected those of {stable} and {canary}")]
    Versions {
        /// Weights of the state.
        found: Weights,
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
fn committed(view: &RoutingView, config: &RouterConfig) -> Result<(CommittedWeight, Duration), StateError> {
    let [stable, canary] = Side::BOTH.map(|side| &config.service(side).version);
    if view.mode != Mode::Normal {
        return Err(StateError::Mode(view.mode));
    }
    let weights = &view.routing.weights;
    let share = |version: &VersionId| weights.iter().find(|(of, _)| of == version).map(|(_, weight)| *weight);
    let end = match view.phase {
        Phase::Completed if share(canary) == Some(Weight::FULL) => Some(RouterEnd::Promote),
        Phase::RolledBack if share(stable) == Some(Weight::FULL) => Some(RouterEnd::Abort(view.reason.clone())),
        _ if share(canary).is_none() || share(stable).is_none() => {
            let (stable, canary) = (stable.clone(), canary.clone());
            return Err(StateError::Versions { found: weights.clone(), stable, canary });
        }
        _ => None,
    };
    // What is over needs no lease.
    let lease_ms = if end.is_some() { 10_000 } else { view.lease_ms_left.unwrap_or(0) };
    let (weight, weight_version) = (share(canary).unwrap_or(Weight::ZERO), view.routing.version);
    let hash = TicketHash::of(&config.name, view.assignment);
    match lease_ms {
        0 => Err(StateError::NoLease),
        ms => Ok((CommittedWeight { weight, weight_version, hash, end }, Duration::from_millis(ms))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::assignment::UserAssignment;
    use crate::domain::ids::ServiceId;

    fn weight(salt_slot: u64, end: Option<RouterEnd>) -> CommittedWeight {
        let assignment = UserAssignment { salt_slot: Some(salt_slot), ..UserAssignment::default() };
        let hash = TicketHash::of(&ServiceId::new("orders").unwrap(), assignment);
        CommittedWeight { weight: Weight::from_bp(500).unwrap(), weight_version: 7, hash, end }
    }

    #[test]
    fn another_rollouts_users_end_the_rollout_that_was_followed() {
        let mut followed = None;
        for seen in [weight(3, None), weight(3, None)] {
            assert_eq!(of_one_rollout(seen.clone(), &mut followed), seen);
        }
        let Some(RouterEnd::Abort(why)) = of_one_rollout(weight(9, None), &mut followed).end else { panic!("no end") };
        assert_eq!(why, "another rollout of the service took its place");
        // What was seen to end makes room for the next one.
        let ended = weight(3, Some(RouterEnd::Abort("bad".into())));
        assert_eq!(of_one_rollout(ended.clone(), &mut followed), ended);
        assert_eq!(of_one_rollout(weight(9, None), &mut followed), weight(9, None));
    }
}
