//! What the cluster decides, told to others: the log is the truth, and streams and publishers follow it.
//!
//! Every node makes the same [`Decision`] of the same record, so that streams, topics and stores say the same.

use prost_types::Timestamp;

use crate::domain::rollout::Change;
use crate::domain::run::{AnswerSummary, WindowVerdict};
use crate::domain::verdict;
use crate::protocol::record::{Chosen, Operation};
use crate::schema::v1::{self, Decision, DecisionKind, Verdict, VersionSummary};

pub mod follow;
pub mod guard;
pub mod publish;

/// Returns what a record decides about a service; none for what is no service's.
pub fn decision(chosen: &Chosen) -> Option<Decision> {
    let record = &chosen.record;
    let operation = &record.intent.operation;
    let state = record.state.as_ref()?;
    let (window, rollout_generation) = match operation {
        Operation::Verdict { window_verdict, rollout_generation, .. } => {
            (Some(window(window_verdict)), *rollout_generation)
        }
        _ => (None, 0),
    };
    let at_ms = record.intent.at.0;
    Some(Decision {
        sequence: record.slot.0,
        service: state.service.to_string(),
        kind: kind(operation).into(),
        transaction_id: record.intent.tx.to_string(),
        routing_version: state.version,
        stable_version: state.stable_model_id.to_string(),
        canary_version: state.canary_model_id.as_ref().map(ToString::to_string).unwrap_or_default(),
        canary_weight_bp: state.canary_weight().bp().into(),
        reasons: operation.reasons(),
        decision_time: Some(Timestamp { seconds: (at_ms / 1000) as i64, nanos: (at_ms % 1000 * 1_000_000) as i32 }),
        window,
        rollout_generation,
    })
}

fn kind(operation: &Operation) -> DecisionKind {
    match operation {
        Operation::Change(_, Change::Start(_)) => DecisionKind::Start,
        Operation::Change(_, Change::Promote { .. }) => DecisionKind::Promote,
        Operation::Change(_, Change::Pause { .. }) => DecisionKind::Pause,
        Operation::Change(_, Change::Resume) => DecisionKind::Resume,
        Operation::Change(_, Change::Rollback { .. }) => DecisionKind::Rollback,
        Operation::Revert { .. } => DecisionKind::Revert,
        Operation::Refused { .. } => DecisionKind::Refused,
        Operation::Verdict { .. } => DecisionKind::Verdict,
        Operation::Genesis { .. } | Operation::Config(_) => DecisionKind::Unspecified,
    }
}

fn window(window_verdict: &WindowVerdict) -> v1::WindowVerdict {
    let WindowVerdict { from_ms, to_ms, verdict, stable, canary, sequential, is_window: _ } = window_verdict;
    let verdict = match verdict {
        verdict::Verdict::Promote => Verdict::Promote,
        verdict::Verdict::Hold(_) => Verdict::Hold,
        verdict::Verdict::Pause(_) => Verdict::Pause,
        verdict::Verdict::Rollback(_) => Verdict::Rollback,
    };
    v1::WindowVerdict {
        verdict: verdict.into(),
        from_ms: *from_ms,
        to_ms: *to_ms,
        stable: Some(summary(stable)),
        canary: Some(summary(canary)),
        e_value: sequential.map(|sequential| sequential.e_value),
        e_value_bound: sequential.map(|sequential| sequential.bound),
        alpha_spent: sequential.map(|sequential| sequential.alpha_spent),
    }
}

fn summary(summary: &AnswerSummary) -> VersionSummary {
    let AnswerSummary { count, errors, p50_ms, p95_ms, p99_ms } = summary;
    VersionSummary { count: *count, errors: *errors, p50_ms: *p50_ms, p95_ms: *p95_ms, p99_ms: *p99_ms }
}
