//! What a node serves a service by: never more than is agreed, less where something holds it back.

use crate::domain::plan::OnPartition;

use super::context::Context;
use super::log::ledger::{Ledger, ServiceState};
use super::message::Membership;
use super::view::{Hold, Serving};

/// Returns what a service is served by; `local_hold` says why this node stopped its canary by itself, if it did.
pub(super) fn serving(ctx: &Context, service_state: &ServiceState, local_hold: Option<&str>) -> Serving {
    let in_doubt = service_state.increase.as_ref().filter(|increase| increase.in_doubt);
    let service = in_doubt.map_or(&service_state.service, |increase| &increase.before);
    let spec = &service.rollout.spec;
    let held_back = hold(ctx, service_state, local_hold);
    let canary = service.routing.canary_model_id.as_ref().map(|_| {
        let weight_bp = service.routing.canary_weight().bp();
        (spec.canary.clone(), held_back.as_ref().map_or(weight_bp, |hold| hold.ceiling_bp(weight_bp)))
    });
    let leased = service.needs_lease() && spec.on_partition == OnPartition::Stable;
    Serving {
        routing_version: service_state.service.routing.version,
        stable: service.stable.clone(),
        canary,
        lease_ms: leased.then_some(spec.lease_ms),
        spec: spec.clone(),
        held_back,
    }
}

/// Returns what holds a service back: what stops the canary before what only lowers it.
fn hold(ctx: &Context, service_state: &ServiceState, local_hold: Option<&str>) -> Option<Hold> {
    if ctx.membership() == Membership::Learner {
        return Some(Hold::Learner);
    }
    if ctx.ledger.members.is_cordoned(&ctx.settings.node) {
        return Some(Hold::Cordoned);
    }
    if let Err(why) = service_state.service.rollout.spec.known() {
        return Some(Hold::UnknownKey(why));
    }
    if is_decreasing(ctx, service_state) {
        return Some(Hold::Decreasing);
    }
    if let Some(why) = local_hold {
        return Some(Hold::Local(why.into()));
    }
    let in_doubt = service_state.increase.as_ref().filter(|increase| increase.in_doubt);
    in_doubt.map(|increase| Hold::InDoubt(increase.slot))
}

/// Returns true when this node accepted a decrease of the service that it doesn't know to be decided.
fn is_decreasing(ctx: &Context, service_state: &ServiceState) -> bool {
    let accepted = ctx.acceptor.accepted.as_ref();
    Ledger::decrease_in(accepted).is_some_and(|slot| slot > ctx.ledger.head)
        && accepted.and_then(|accepted| accepted.record.intent.operation.service())
            == Some(&service_state.service.routing.service)
}
