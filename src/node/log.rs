//! Announcements as log lines: an event in words, facts as fields.

use serde_json::json;
use tracing::{debug, error, info, warn};

use crate::domain::routing::{RoutingState, Status};
use crate::domain::run::WindowVerdict;
use crate::domain::verdict::Verdict;
use crate::protocol::{Announcement, Event};

/// Writes one announcement to the log.
pub fn write(announcement: &Announcement) {
    match &announcement.event {
        Event::Routing { slot, kind, refused, actor, state, phase, reasons, took_ms, .. } => {
            let RoutingState { service, version, stable_model_id, canary_model_id, status, txid, timestamp, .. } =
                state;
            let what = match status {
                Status::Prepared => "routing prepared",
                Status::Committed => "routing committed",
                Status::Aborted => "transaction refused",
            };
            let canary_model_id = canary_model_id.as_ref().map(tracing::field::display);
            info!(
                %service, slot = slot.0, kind = kind.name(), refused, actor, version, %stable_model_id, canary_model_id,
                weights = %json!(state.weights), %status, %txid, proposed_at = %timestamp, phase = phase.map(tracing::field::display),
                reasons = (!reasons.is_empty()).then(|| reasons.join("; ")), took_ms, "{what}"
            );
        }
        Event::DefaultService { slot, service, txid, actor, .. } => {
            info!(%slot, %service, %txid, actor, "default service set");
        }
        Event::Membership { slot, kind, node, txid, actor, .. } => {
            info!(slot = slot.0, kind = kind.name(), member = %node, %txid, actor, "membership changed");
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
        Event::Analyzed { sequence, service, window_verdict, .. } => {
            let WindowVerdict { from_ms, to_ms, verdict, stable, canary, sequential, is_window: _ } = window_verdict;
            let e_value = sequential.map(|sequential| sequential.e_value);
            let word = verdict.word();
            info!(
                sequence = sequence.map(|sequence| sequence.0), %service, from_ms, to_ms, verdict = word, reason = verdict.reason(), canary = canary.count,
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
