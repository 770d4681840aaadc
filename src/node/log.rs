//! Announcements as log lines: an event in words, facts as fields.

use serde_json::{Map, Value, json};
use tracing::{debug, error, info, warn};

use crate::domain::routing::{RoutingState, Status};
use crate::domain::run::WindowVerdict;
use crate::domain::verdict::Verdict;
use crate::protocol::{Announcement, Event};

/// Writes one announcement to the log.
pub fn write(announcement: &Announcement) {
    match &announcement.event {
        Event::Routing { slot, kind, initiator: _, state, phase, reasons, took_ms } => {
            let RoutingState { service, version, stable_model_id, canary_model_id, status, txid, timestamp, .. } =
                state;
            let what = match status {
                Status::Prepared => "routing prepared",
                Status::Committed => "routing committed",
                Status::Aborted => "transaction refused",
            };
            let canary_model_id = canary_model_id.as_ref().map(tracing::field::display);
            info!(
                %service, slot = slot.0, kind = kind.to_string(), version, %stable_model_id, canary_model_id,
                weights = %weights_json(state), %status, %txid, %timestamp, phase,
                reasons = (!reasons.is_empty()).then(|| reasons.join("; ")), took_ms, "{what}"
            );
        }
        Event::Membership { slot, kind, node, txid } => {
            info!(slot = slot.0, kind, member = %node, %txid, "membership changed");
        }
        Event::Voted { slot, ballot, txid, vote, reason } => {
            debug!(slot = slot.0, ballot, %txid, vote, reason, "voted");
        }
        Event::Verdict { service, routing_version, verdict, samples } => {
            let (verdict, reason) = (verdict.word(), Some(verdict.reason()).filter(|why| !why.is_empty()));
            if verdict == Verdict::Promote.word() || verdict == "HOLD" {
                info!(%service, version = routing_version, verdict, reason, samples, "verdict");
            } else {
                warn!(%service, version = routing_version, verdict, reason, samples, "verdict");
            }
        }
        Event::Analyzed { slot, service, window_verdict, .. } => {
            let WindowVerdict { from_ms, to_ms, verdict, stable, canary, sequential, is_window: _ } = window_verdict;
            let e_value = sequential.map(|sequential| sequential.e_value);
            let word = verdict.word();
            info!(
                slot = slot.map(|slot| slot.0), %service, from_ms, to_ms, verdict = word, reason = verdict.reason(), canary = canary.count,
                canary_errors = canary.errors, stable = stable.count, stable_errors = stable.errors, e_value, "analyzed"
            );
        }
        Event::LocalHold { service, reason } => warn!(%service, reason, "canary stopped on this node"),
        Event::Enforced { service, slot, took_ms } => {
            info!(%service, slot = slot.0, took_ms, "decrease enforced everywhere");
        }
        Event::Lease { held: true } => info!("lease held"),
        Event::Lease { held: false } => warn!("lease lost: canary traffic that needs one goes to stable"),
        Event::Coordinator { node } => info!(coordinator = %node, "coordinator changed"),
        Event::Peer { node, alive: true } => info!(peer = %node, "peer is back"),
        Event::Peer { node, alive: false } => warn!(peer = %node, "peer is silent"),
        Event::Rejected { node, reason } => error!(peer = %node, reason, "message refused"),
    }
}

/// Returns the weights as `{"v1":0.95,"v2":0.05}`.
pub fn weights_json(state: &RoutingState) -> Value {
    let weights = state.weights.iter().map(|(version, weight)| (version.to_string(), json!(weight.fraction())));
    Value::Object(weights.collect::<Map<_, _>>())
}
